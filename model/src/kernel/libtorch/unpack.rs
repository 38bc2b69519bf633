//! Canonical packed weights to the plain arrays that libtorch's operators start from. Runs at load, once.

use half::f16;

use crate::format::{BLOCK_OUTPUTS, Format, GROUP};

/// A quantized matrix, unpacked.
pub(super) struct Wide {
    inputs: usize,
    /// `[outputs, inputs]`.
    pub(super) values: Vec<i8>,
    /// `[outputs, inputs / 32]`.
    pub(super) scales: Vec<f32>,
}

/// Unpacks a q4 or q8 matrix of padded shape `(outputs, inputs)`.
pub(super) fn unpack(format: Format, (outputs, inputs): (usize, usize), bytes: &[u8]) -> Wide {
    let groups = inputs / GROUP;
    let mut wide = Wide { inputs, values: vec![0; outputs * inputs], scales: vec![0.0; outputs * groups] };
    for (index, group) in bytes.chunks_exact(format.group_bytes()).enumerate() {
        let (block, g) = (index / groups, index % groups);
        let (lines, scales) = group.split_at(format.group_bytes() - 2 * BLOCK_OUTPUTS);
        for r in 0..BLOCK_OUTPUTS {
            let n = block * BLOCK_OUTPUTS + r;
            let row = &mut wide.values[n * inputs + g * GROUP..][..GROUP];
            for (i, value) in row.iter_mut().enumerate() {
                let (quad, byte) = (i / 4, r * 4 + i % 4);
                *value = if format == Format::Q8 {
                    lines[quad * 64 + byte] as i8
                } else {
                    (lines[quad % 4 * 64 + byte] >> (quad / 4 * 4) & 15) as i8 - 8
                };
            }
            wide.scales[n * groups + g] = f16::from_le_bytes([scales[2 * r], scales[2 * r + 1]]).to_f32();
        }
    }
    wide
}

impl Wide {
    /// The weights as real numbers, row-major.
    pub(super) fn floats(&self) -> Vec<f32> {
        let scales = self.scales.iter().flat_map(|s| std::iter::repeat_n(*s, GROUP));
        self.values.iter().zip(scales).map(|(v, s)| f32::from(*v) * s).collect()
    }

    /// int8 with one scale per output: the largest weight of the row becomes 127.
    pub(super) fn per_output(&self) -> (Vec<i8>, Vec<f32>) {
        let floats = self.floats();
        let (mut values, mut scales) = (Vec::with_capacity(floats.len()), Vec::new());
        for row in floats.chunks_exact(self.inputs) {
            let largest = row.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
            values.extend(row.iter().map(|v| (v / scale).round_ties_even() as i8));
            scales.push(scale);
        }
        (values, scales)
    }
}

/// Appends a quantized row as real numbers.
pub(super) fn dequantize_row((values, scales): (&[i8], &[f32]), out: &mut Vec<f32>) {
    for (group, scale) in values.chunks_exact(GROUP).zip(scales) {
        out.extend(group.iter().map(|v| f32::from(*v) * scale));
    }
}
