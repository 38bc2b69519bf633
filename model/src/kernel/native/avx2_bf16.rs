//! The bf16 products with AVX2: four outputs by one row at a time, two registers of 8 lanes each.
//!
//! The same lanes and the same tree as `avx512_bf16`. More rows walk the four weight rows again, which then lie in
//! the first cache level. Price: weights are widened once per row.
#![allow(unsafe_code, reason = "vector loads, stores and prefetch")]

use std::arch::x86_64::*;

use super::avx512_bf16::{add_terms, input_rows, transposed_sum};
use super::definition::LANES;
use super::isa::{Added, Block, Outputs, Terms};
use super::tiles::View;
use crate::format::{COMBINE_BLOCK, GROUP};

/// Outputs per pass.
const OUT: usize = 4;

type WeightRow<'a> = &'a [[u8; 2 * LANES]];

/// Outputs `n..n + 4` of a block.
#[inline(always)]
fn four_rows<'a>(block: Block<'a>, n: usize) -> [WeightRow<'a>; OUT] {
    let stride = block.bytes.len() / LANES;
    let mut weights: [WeightRow<'a>; OUT] = [&[]; OUT];
    for c in 0..OUT {
        weights[c] = block.bytes[(n + c) * stride..][..stride].as_chunks().0;
    }
    weights
}

/// The dot products of four weight rows with one row; `ahead` is the prefetch distance, 0 for none.
#[inline]
#[target_feature(enable = "avx2,fma")]
fn dots(weights: [WeightRow<'_>; OUT], x: &[[f32; LANES]], ahead: usize) -> __m128 {
    let mut acc = [[_mm256_setzero_ps(); 2]; OUT];
    let w = weights.map(|row| &row[..x.len()]);
    for k in 0..x.len() {
        let halves = [0, 8].map(|at| {
            let values: &[f32] = &x[k][at..at + 8];
            // SAFETY: 32 bytes are readable; the load has no alignment demand.
            unsafe { _mm256_loadu_ps(values.as_ptr()) }
        });
        for c in 0..OUT {
            let bytes = w[c][k].as_ptr();
            if ahead != 0 && k % 2 == 0 {
                _mm_prefetch::<_MM_HINT_T1>(bytes.wrapping_add(ahead).cast());
            }
            for half in 0..2 {
                // SAFETY: 16 of the chunk's 32 bytes; the load has no alignment demand.
                let bits = unsafe { _mm_loadu_si128(bytes.add(16 * half).cast()) };
                let wide = _mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits));
                acc[c][half] = _mm256_fmadd_ps(_mm256_castsi256_ps(wide), halves[half], acc[c][half]);
            }
        }
    }
    let mut q = [_mm_setzero_ps(); OUT];
    for c in 0..OUT {
        let eight = _mm256_add_ps(acc[c][0], acc[c][1]);
        q[c] = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    }
    transposed_sum(q)
}

/// Prefetch distance for row `row`: the next four weight rows, by the first row only.
#[inline(always)]
fn ahead_of(block: Block<'_>, row: usize) -> usize {
    if row > 0 || block.ahead == 0 { 0 } else { OUT * block.bytes.len() / LANES }
}

/// Products of a row block with all rows of `x`.
#[target_feature(enable = "avx2,fma")]
pub(super) fn product(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
    for n in (0..LANES).step_by(OUT) {
        let weights = four_rows(block, n);
        for row in 0..x.rows {
            let [input] = input_rows::<1>(x, row);
            let y = dots(weights, input, ahead_of(block, row));
            let to: &mut [f32] = &mut out[row][n..n + OUT];
            // SAFETY: 4 floats are writable.
            unsafe { _mm_storeu_ps(to.as_mut_ptr(), y) };
        }
    }
}

/// The same with the combine of DESIGN section 5.
#[target_feature(enable = "avx2,fma")]
pub(super) fn combine(block: Block<'_>, x: View<'_>, terms: Terms<'_>, added: Added<'_>) {
    const CHUNKS: usize = COMBINE_BLOCK / LANES;
    let chunks = x.groups * GROUP / LANES;
    for n in (0..LANES).step_by(OUT) {
        let weights = four_rows(block, n);
        for row in 0..x.rows {
            let [input] = input_rows::<1>(x, row);
            let (sums, peaks) = (&mut added.sums[row][n..], &mut added.peaks[row][n..]);
            for first in (0..chunks).step_by(CHUNKS) {
                let last = (first + CHUNKS).min(chunks);
                let y = dots(weights.map(|w| &w[first..last]), &input[first..last], ahead_of(block, row));
                add_terms(y, terms.weights[row], terms.scale, sums, peaks);
            }
        }
    }
}
