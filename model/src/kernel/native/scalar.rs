//! The quantized products in portable Rust: the definition that SIMD must equal bit for bit.
//!
//! Per group: the exact integer dot product, then `acc = fma(f32(dot), s_x * s_w, acc)`, groups ascending, from
//! +0. The combine starts a new accumulator every `COMBINE_BLOCK` inputs and adds its rounded value times the
//! weight. Also here, because it need not be fast: the wide combine in i64. Price: about one GFLOP/s.

use super::block::{Added, Block, COMBINE_GROUPS, Outputs, Terms};
use super::definition::{LANES, WIDE_LIMIT, combine_term, widen_f16};
use super::elementwise;
use super::tiles::{Tile, View};
use crate::format::{Format, GROUP};

/// Weight of output `n`, input `i` of a packed group.
#[inline(always)]
fn weight<const BYTES: usize>(group: &[u8; BYTES], n: usize, i: usize) -> i32 {
    let (quad, byte) = (i / 4, n * 4 + i % 4);
    if BYTES == Format::Q8.group_bytes() {
        i32::from(group[quad * 64 + byte] as i8)
    } else {
        i32::from(group[quad % 4 * 64 + byte] >> (quad / 4 * 4) & 15) - 8
    }
}

/// Scale of output `n` of a packed group.
#[inline(always)]
pub(super) fn weight_scale<const BYTES: usize>(group: &[u8; BYTES], n: usize) -> f32 {
    let at = BYTES - 2 * LANES + 2 * n;
    widen_f16(u16::from_le_bytes([group[at], group[at + 1]]))
}

/// Continues `acc` with `groups`, the first of which is group `first` of the row.
#[inline(always)]
fn accumulate<const BYTES: usize>(
    groups: &[[u8; BYTES]],
    first: usize,
    tile: Tile<'_>,
    row: usize,
    acc: &mut Outputs<f32>,
) {
    for (offset, group) in groups.iter().enumerate() {
        let cell = (first + offset) * tile.height + row;
        let values: [i8; GROUP] = bytemuck::cast(tile.values[cell]);
        for (n, acc) in acc.iter_mut().enumerate() {
            let mut dot = 0;
            for (i, value) in values.iter().enumerate() {
                dot += weight(group, n, i) * i32::from(*value);
            }
            *acc = (dot as f32).mul_add(tile.scales[cell] * weight_scale(group, n), *acc);
        }
    }
}

fn product<const BYTES: usize>(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
    let groups = block.bytes.as_chunks::<BYTES>().0;
    for tile in (0..x.tiles()).map(|t| x.tile(t)) {
        for row in 0..tile.height {
            let mut acc = [0.0; LANES];
            accumulate(groups, 0, tile, row, &mut acc);
            out[tile.first + row] = acc;
        }
    }
}

fn combine<const BYTES: usize>(block: Block<'_>, x: View<'_>, terms: Terms<'_>, mut added: Added<'_>) {
    let groups = block.bytes.as_chunks::<BYTES>().0;
    for tile in (0..x.tiles()).map(|t| x.tile(t)) {
        for row in 0..tile.height {
            let at = tile.first + row;
            for (index, chunk) in groups.chunks(COMBINE_GROUPS).enumerate() {
                let mut acc = [0.0; LANES];
                accumulate(chunk, index * COMBINE_GROUPS, tile, row, &mut acc);
                elementwise::add_terms(&acc, terms.weights[at], terms.scale, added.slot(at));
            }
        }
    }
}

/// `product` for q8.
pub(super) fn product_q8(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
    product::<{ Format::Q8.group_bytes() }>(block, x, out);
}

/// `product` for q4.
pub(super) fn product_q4(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
    product::<{ Format::Q4.group_bytes() }>(block, x, out);
}

/// `combine` for q8.
pub(super) fn combine_q8(block: Block<'_>, x: View<'_>, terms: Terms<'_>, added: Added<'_>) {
    combine::<{ Format::Q8.group_bytes() }>(block, x, terms, added);
}

/// `combine` for q4.
pub(super) fn combine_q4(block: Block<'_>, x: View<'_>, terms: Terms<'_>, added: Added<'_>) {
    combine::<{ Format::Q4.group_bytes() }>(block, x, terms, added);
}

/// The combine of one row in i64, one output block, all formats: addends are rounded, saturated to +-2^52 and
/// added to `sums`, which is shorter than 16 where the block is (its padding may be NaN and is not looked at).
/// False where an addend is NaN.
pub(super) fn combine_wide(block: Block<'_>, x: View<'_>, terms: Terms<'_>, sums: &mut [i64]) -> bool {
    for first in (0..x.groups).step_by(COMBINE_GROUPS) {
        let last = (first + COMBINE_GROUPS).min(x.groups);
        let mut acc = [0.0; LANES];
        match block.format {
            Format::Bf16 => {
                elementwise::lanes_of_rows(block, x.floats, first * GROUP..last * GROUP, &mut acc)
            }
            Format::Q8 => {
                let groups = block.bytes.as_chunks::<{ Format::Q8.group_bytes() }>().0;
                accumulate(&groups[first..last], first, x.tile(0), 0, &mut acc);
            }
            Format::Q4 => {
                let groups = block.bytes.as_chunks::<{ Format::Q4.group_bytes() }>().0;
                accumulate(&groups[first..last], first, x.tile(0), 0, &mut acc);
            }
        }
        for (sum, y) in sums.iter_mut().zip(acc) {
            let v = f64::from(combine_term(y, terms.weights[0], terms.scale).round_ties_even());
            if v.is_nan() {
                return false;
            }
            *sum += v.clamp(-WIDE_LIMIT, WIDE_LIMIT) as i64;
        }
    }
    true
}
