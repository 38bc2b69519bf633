//! Packed matrices as libtorch's operators want them: which row block lies where, and the arrays they start from.
//!
//! In a quantized expert row blocks of gate and up alternate; here rows of gate come first and those of up after
//! them, so that the halves of a product are contiguous. Runs at load, but for `Packed::widen`, which writes bf16
//! for one call.

use std::ops::Range;

use super::widen::widen_block;
use crate::format::{BLOCK_OUTPUTS, Format, GROUP};
use crate::region::Bytes;

/// A packed matrix of whole row blocks.
#[derive(Clone, Debug)]
pub(super) struct Packed {
    pub(super) format: Format,
    /// Padded.
    pub(super) outputs: usize,
    /// Padded.
    pub(super) inputs: usize,
    /// Row blocks of gate and up alternate.
    pub(super) paired: bool,
    pub(super) bytes: Bytes,
}

/// A quantized matrix, unpacked: rows of gate, then rows of up.
pub(super) struct Wide {
    inputs: usize,
    /// `[outputs, inputs]`.
    pub(super) values: Vec<i8>,
    /// `[outputs, inputs / 32]`.
    pub(super) scales: Vec<f32>,
}

impl Packed {
    /// Row blocks that stay together: one of gate and one of up, or one.
    pub(super) fn units(&self) -> usize {
        self.outputs / BLOCK_OUTPUTS / self.blocks_per_unit()
    }

    /// Outputs of one unit.
    pub(super) fn unit_outputs(&self) -> usize {
        BLOCK_OUTPUTS * self.blocks_per_unit()
    }

    fn blocks_per_unit(&self) -> usize {
        if self.paired && self.format.is_quantized() { 2 } else { 1 }
    }

    fn block_bytes(&self) -> usize {
        self.inputs / GROUP * self.format.group_bytes()
    }

    /// Packed bytes of the row block that comes at `place` of `0..blocks` among the units `units`, gate before up.
    fn block(&self, units: &Range<usize>, place: usize) -> &[u8] {
        let index = if self.blocks_per_unit() == 2 {
            2 * (units.start + place % units.len()) + place / units.len()
        } else {
            units.start + place
        };
        &self.bytes[index * self.block_bytes()..][..self.block_bytes()]
    }

    /// The blocks `places` of the units `units` as bf16 rows.
    pub(super) fn widen(&self, units: &Range<usize>, places: Range<usize>, out: &mut [u16]) {
        for (place, rows) in places.zip(out.chunks_exact_mut(BLOCK_OUTPUTS * self.inputs)) {
            widen_block(self.format, self.block(units, place), rows);
        }
    }

    /// The whole matrix as bf16 rows.
    pub(super) fn widened(&self) -> Vec<u16> {
        let mut out = vec![0; self.outputs * self.inputs];
        self.widen(&(0..self.units()), 0..self.outputs / BLOCK_OUTPUTS, &mut out);
        out
    }

    /// Integers and scales of a q4 or q8 matrix.
    pub(super) fn unpack(&self) -> Wide {
        let (outputs, inputs, groups) = (self.outputs, self.inputs, self.inputs / GROUP);
        let mut wide =
            Wide { inputs, values: vec![0; outputs * inputs], scales: vec![0.0; outputs * groups] };
        let units = 0..self.units();
        for place in 0..outputs / BLOCK_OUTPUTS {
            let block = self.block(&units, place);
            for (g, group) in block.chunks_exact(self.format.group_bytes()).enumerate() {
                let (lines, scales) = group.split_at(self.format.group_bytes() - 2 * BLOCK_OUTPUTS);
                for r in 0..BLOCK_OUTPUTS {
                    let n = place * BLOCK_OUTPUTS + r;
                    let row = &mut wide.values[n * inputs + g * GROUP..][..GROUP];
                    unpack_row(self.format, lines, r, row);
                    let bits = [scales[2 * r], scales[2 * r + 1]];
                    wide.scales[n * groups + g] = half::f16::from_le_bytes(bits).to_f32();
                }
            }
        }
        wide
    }
}

/// The 32 integers of output `r` of a group.
fn unpack_row(format: Format, lines: &[u8], r: usize, row: &mut [i8]) {
    for (line, bytes) in lines.chunks_exact(64).enumerate() {
        for (i, byte) in bytes[4 * r..4 * r + 4].iter().enumerate() {
            if format == Format::Q8 {
                row[4 * line + i] = *byte as i8;
            } else {
                row[4 * line + i] = (byte & 15) as i8 - 8;
                row[GROUP / 2 + 4 * line + i] = (byte >> 4) as i8 - 8;
            }
        }
    }
}

impl Wide {
    /// int8 with one scale per output: the largest weight of the row becomes 127.
    pub(super) fn per_output(&self) -> (Vec<i8>, Vec<f32>) {
        let (mut values, mut scales) = (Vec::with_capacity(self.values.len()), Vec::new());
        let groups = self.inputs / GROUP;
        for (row, scale) in self.values.chunks_exact(self.inputs).zip(self.scales.chunks_exact(groups)) {
            let floats = row.iter().enumerate().map(|(i, v)| f32::from(*v) * scale[i / GROUP]);
            let largest = floats.clone().fold(0.0f32, |m, v| m.max(v.abs()));
            let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
            values.extend(floats.map(|v| (v / scale).round_ties_even() as i8));
            scales.push(scale);
        }
        (values, scales)
    }
}
