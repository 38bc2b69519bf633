//! The bf16 products with AVX-512: four outputs by up to four rows at a time, one register of 16 lanes each.
//!
//! A weight is its upper 16 bits of an f32, so widening is a shift; lane i takes inputs i, i + 16, ... by fma, as
//! the definition says (hardware bf16 dot products round differently). The tree is walked for four outputs
//! together: halves, quarters, then a transposition of 4 x 4. Price: two more instructions per 16 weights than
//! f32 weights would take, shared by the rows of a tile.
#![allow(unsafe_code, reason = "vector loads, stores and prefetch")]

use std::arch::x86_64::*;

use super::avx2_bf16::{InputRow, OUT, WeightRow, add_terms, input_rows, transposed_sum};
use super::block::{Added, Block, Outputs, Terms};
use super::definition::LANES;
use super::tiles::View;
use crate::format::{COMBINE_BLOCK, GROUP};

/// Rows per pass.
const PASS: usize = 4;

/// Calls `$f::<rows>` for 1 to 4 rows.
macro_rules! by_rows {
    ($rows:expr, $f:ident, $args:tt) => {
        match $rows {
            1 => $f::<1> $args,
            2 => $f::<2> $args,
            3 => $f::<3> $args,
            _ => $f::<4> $args,
        }
    };
}

/// Unrolls by hand: LLVM would keep the accumulators of the fourth row in memory.
macro_rules! each_row {
    ($n:expr, $i:ident, $b:block) => { each_row!(@ $n, $i, $b, 0 1 2 3) };
    (@ $n:expr, $i:ident, $b:block, $($k:literal)*) => { $( if $k < $n { let $i: usize = $k; $b } )* };
}

/// Four weight rows of a block and where to fetch ahead (bytes; 0: nowhere).
#[derive(Clone, Copy)]
struct Four<'a> {
    weights: [WeightRow<'a>; OUT],
    ahead: usize,
}

impl<'a> Four<'a> {
    /// Outputs `n..n + 4` of a block. Their successors are fetched while they are read.
    #[inline(always)]
    fn of(block: Block<'a>, n: usize) -> Four<'a> {
        let stride = block.bytes.len() / LANES;
        let mut weights: [WeightRow<'a>; OUT] = [&[]; OUT];
        for c in 0..OUT {
            weights[c] = block.bytes[(n + c) * stride..][..stride].as_chunks().0;
        }
        Four { weights, ahead: if block.ahead == 0 { 0 } else { OUT * stride } }
    }

    #[inline(always)]
    fn without_prefetch(self) -> Four<'a> {
        Four { ahead: 0, ..self }
    }
}

/// The dot products of four weight rows with `R` rows, over chunks `first..last` of 16 inputs.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,fma")]
fn dots<const R: usize>(four: Four<'_>, x: [InputRow<'_>; R], first: usize, last: usize) -> [__m128; R] {
    let mut acc = [[_mm512_setzero_ps(); OUT]; R];
    let (mut w, mut x) = (four.weights, x);
    for row in &mut w {
        *row = &row[first..last];
    }
    for row in &mut x {
        *row = &row[first..last];
    }
    for k in 0..last - first {
        let mut wide = [_mm512_setzero_ps(); OUT];
        for c in 0..OUT {
            let bytes = w[c][k].as_ptr();
            if four.ahead != 0 && k % 2 == 0 {
                _mm_prefetch::<_MM_HINT_T1>(bytes.wrapping_add(four.ahead).cast());
            }
            // SAFETY: 32 bytes are readable; the load has no alignment demand.
            let bits = _mm512_cvtepu16_epi32(unsafe { _mm256_loadu_si256(bytes.cast()) });
            wide[c] = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits));
        }
        each_row!(R, r, {
            // SAFETY: 64 bytes are readable; the load has no alignment demand.
            let values = unsafe { _mm512_loadu_ps(x[r][k].as_ptr()) };
            acc[r][0] = _mm512_fmadd_ps(wide[0], values, acc[r][0]);
            acc[r][1] = _mm512_fmadd_ps(wide[1], values, acc[r][1]);
            acc[r][2] = _mm512_fmadd_ps(wide[2], values, acc[r][2]);
            acc[r][3] = _mm512_fmadd_ps(wide[3], values, acc[r][3]);
        });
    }
    let mut out = [_mm_setzero_ps(); R];
    each_row!(R, r, { out[r] = reduce(acc[r]) });
    out
}

/// The reduction tree of four registers at once.
#[inline]
#[target_feature(enable = "avx512f,avx512dq")]
fn reduce(lanes: [__m512; OUT]) -> __m128 {
    let mut q = [_mm_setzero_ps(); OUT];
    for c in 0..OUT {
        let eight = _mm256_add_ps(_mm512_castps512_ps256(lanes[c]), _mm512_extractf32x8_ps::<1>(lanes[c]));
        q[c] = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    }
    transposed_sum(q)
}

#[target_feature(enable = "avx512f,avx512dq,fma")]
fn product_pass<const R: usize>(
    four: Four<'_>,
    x: View<'_>,
    (row, n): (usize, usize),
    out: &mut [Outputs<f32>],
) {
    let y = dots::<R>(four, input_rows(x, row), 0, x.groups * GROUP / LANES);
    for r in 0..R {
        let to: &mut [f32] = &mut out[row + r][n..n + OUT];
        // SAFETY: 4 floats are writable.
        unsafe { _mm_storeu_ps(to.as_mut_ptr(), y[r]) };
    }
}

#[target_feature(enable = "avx512f,avx512dq,fma")]
fn combine_pass<const R: usize>(
    four: Four<'_>,
    x: View<'_>,
    (row, n): (usize, usize),
    terms: Terms<'_>,
    added: &mut Added<'_>,
) {
    let chunks = x.groups * GROUP / LANES;
    let rows = input_rows::<R>(x, row);
    for first in (0..chunks).step_by(COMBINE_BLOCK / LANES) {
        let last = (first + COMBINE_BLOCK / LANES).min(chunks);
        let y = dots::<R>(four, rows, first, last);
        for r in 0..R {
            let (sums, peaks) = (&mut added.sums[row + r][n..], &mut added.peaks[row + r][n..]);
            add_terms(y[r], terms.weights[row + r], terms.scale, sums, peaks);
        }
    }
}

/// Products of a row block with all rows of `x`.
#[target_feature(enable = "avx512f,avx512dq,fma")]
pub(super) fn product(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
    for n in (0..LANES).step_by(OUT) {
        let mut four = Four::of(block, n);
        for row in (0..x.rows).step_by(PASS) {
            by_rows!(x.rows - row, product_pass, (four, x, (row, n), out));
            four = four.without_prefetch();
        }
    }
}

/// The same with the combine of DESIGN section 5.
#[target_feature(enable = "avx512f,avx512dq,fma")]
pub(super) fn combine(block: Block<'_>, x: View<'_>, terms: Terms<'_>, mut added: Added<'_>) {
    for n in (0..LANES).step_by(OUT) {
        let mut four = Four::of(block, n);
        for row in (0..x.rows).step_by(PASS) {
            by_rows!(x.rows - row, combine_pass, (four, x, (row, n), terms, &mut added));
            four = four.without_prefetch();
        }
    }
}
