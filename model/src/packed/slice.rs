//! Slices of experts: what a machine holds that has no room for whole ones.
//!
//! A slice is a range of blocks of `COMBINE_BLOCK` intermediate values: their rows of gate and up, their columns of
//! down. It is packed like an expert of that width, so kernels need not know. Every block of an expert adds its own
//! rounded integers to the sums (DESIGN section 5, Combine), so slices that cover an expert add up to exactly what the
//! whole would have added. In the layout of `format` the rows of gate and up lie together (in bf16, each for itself),
//! and every row block (in bf16, every row) of down has its columns together: a slice is some thousand runs of the
//! whole's bytes. The price: it is copied, where a whole expert can be a view of a mapped file.

use std::ops::Range;

use super::PackedExpert;
use crate::format::{
    BLOCK_OUTPUTS, COMBINE_BLOCK, Format, GROUP, padded_inputs, padded_outputs, slice_width,
};
use crate::region::{Buffer, Bytes};

/// Bytes at whose multiples experts begin.
const LINE: usize = 64;

/// Runs of bytes with the same length, at the same distance.
struct Runs {
    first: usize,
    len: usize,
    stride: usize,
    count: usize,
}

impl Runs {
    fn ranges(self) -> impl Iterator<Item = Range<usize>> {
        let Runs { first, len, stride, count } = self;
        (0..count).map(move |run| first + run * stride).map(move |start| start..start + len)
    }
}

/// Where in the bytes of an expert of `hidden` x `inter` its blocks `from..to` lie, in the order in which they make the
/// packed slice. `None` where it has no such blocks.
pub fn runs(
    format: Format,
    (hidden, inter): (usize, usize),
    (from, to): (u16, u16),
) -> Option<impl Iterator<Item = Range<usize>>> {
    let width = padded_inputs(slice_width(inter, (from, to))?);
    let (padded, start) = (padded_inputs(inter), usize::from(from) * COMBINE_BLOCK);
    // Gate and up: bytes of one row of each; interleaved where quantized.
    let (row, count) = if format.is_quantized() { (2, 1) } else { (1, 2) };
    let row = row * format.matrix_bytes(BLOCK_OUTPUTS, hidden) / BLOCK_OUTPUTS;
    let gate_up = Runs { first: start * row, len: width * row, stride: padded * row, count };
    // Down: bytes of one group of inputs, of a row block or of a row.
    let rows = padded_outputs(hidden);
    let (group, count) = if format.is_quantized() {
        (format.group_bytes(), rows / BLOCK_OUTPUTS)
    } else {
        (format.group_bytes() / BLOCK_OUTPUTS, rows)
    };
    let first = format.matrix_bytes(2 * padded, hidden) + start / GROUP * group;
    let down = Runs { first, len: width / GROUP * group, stride: padded / GROUP * group, count };
    if width == padded {
        // All of it: one run.
        let whole = Runs { first: 0, len: format.expert_bytes(hidden, inter), stride: 0, count: 1 };
        return Some(whole.ranges().chain(Runs { count: 0, ..down }.ranges()));
    }
    Some(gate_up.ranges().chain(down.ranges()))
}

impl PackedExpert {
    /// Its blocks `from..to` of `COMBINE_BLOCK` intermediate values, in memory of their own; all of them are the expert
    /// itself, without a copy. `None` where it has no such blocks.
    pub fn slice(&self, from: u16, to: u16) -> Option<PackedExpert> {
        let PackedExpert { format, hidden, inter, .. } = *self;
        let width = slice_width(inter, (from, to))?;
        if width == inter {
            return Some(self.clone());
        }
        let mut bytes = Buffer::zeroed(format.expert_bytes(hidden, width));
        self.write_slice((from, to), &mut bytes)?;
        Some(PackedExpert { format, hidden, inter: width, bytes: bytes.into() })
    }

    /// Writes its blocks `from..to`, packed, to the beginning of `out`. `None` where it has no such blocks, or its
    /// bytes or `out` are too short.
    pub fn write_slice(&self, blocks: (u16, u16), out: &mut [u8]) -> Option<()> {
        let mut at = 0;
        for run in runs(self.format, (self.hidden, self.inter), blocks)? {
            let len = run.len();
            out.get_mut(at..at + len)?.copy_from_slice(self.bytes.get(run)?);
            at += len;
        }
        Some(())
    }
}

/// Room that an expert of `hidden` x `inter` takes in `gather`, bytes.
pub fn room(format: Format, hidden: usize, inter: usize) -> usize {
    format.expert_bytes(hidden, inter).next_multiple_of(LINE)
}

/// Experts of one layer, or slices of them, one after the other in one allocation: huge pages cover all of it but its
/// end, and experts that are used together are streamed one after the other. Each begins at a cache line. The
/// allocation lives as long as one of them. `experts` are their numbers and widths; `write` fills in the packed bytes
/// of the one at a position of that list.
///
/// # Errors
/// The first of `write`.
pub fn gather<E>(
    (format, hidden): (Format, usize),
    experts: &[(u16, usize)],
    mut write: impl FnMut(usize, &mut [u8]) -> Result<(), E>,
) -> Result<Vec<(u16, PackedExpert)>, E> {
    let mut arena = Buffer::zeroed(experts.iter().map(|(_, inter)| room(format, hidden, *inter)).sum());
    let mut rest = &mut arena[..];
    for (position, (_, inter)) in experts.iter().enumerate() {
        let (one, after) = rest.split_at_mut(room(format, hidden, *inter));
        write(position, &mut one[..format.expert_bytes(hidden, *inter)])?;
        rest = after;
    }
    let arena = Bytes::from(arena);
    let mut at = 0;
    let mut expert = |(index, inter): &(u16, usize)| {
        let bytes = arena.slice(at, format.expert_bytes(hidden, *inter))?;
        at += room(format, hidden, *inter);
        Some((*index, PackedExpert { format, hidden, inter: *inter, bytes }))
    };
    Ok(experts.iter().filter_map(&mut expert).collect())
}

#[cfg(test)]
mod tests;
