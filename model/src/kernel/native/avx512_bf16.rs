//! The bf16 products with AVX-512: four outputs by up to four rows at a time, one register of 16 lanes each.
//!
//! A weight is its upper 16 bits of an f32, so widening is a shift; lane i takes inputs i, i + 16, ... by fma, as
//! the definition says (hardware bf16 dot products round differently). The tree is walked for four outputs
//! together: halves, quarters, then a transposition of 4 x 4. Price: two more instructions per 16 weights than
//! f32 weights would take, shared by the rows of a tile.
#![allow(unsafe_code, reason = "vector loads, stores and prefetch")]

use std::arch::x86_64::*;

use super::definition::LANES;
use super::isa::{Added, Block, Outputs, Terms};
use super::tiles::View;
use crate::format::{COMBINE_BLOCK, GROUP};

/// Outputs per pass.
const OUT: usize = 4;
/// Rows per pass.
const PASS: usize = 4;

type WeightRow<'a> = &'a [[u8; 2 * LANES]];
type InputRow<'a> = &'a [[f32; LANES]];

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
        for r in 0..R {
            // SAFETY: 64 bytes are readable; the load has no alignment demand.
            let values = unsafe { _mm512_loadu_ps(x[r][k].as_ptr()) };
            for c in 0..OUT {
                acc[r][c] = _mm512_fmadd_ps(wide[c], values, acc[r][c]);
            }
        }
    }
    let mut out = [_mm_setzero_ps(); R];
    for r in 0..R {
        out[r] = reduce(acc[r]);
    }
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

/// `(q0 + q2) + (q1 + q3)` of each register's lanes, for four registers.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn transposed_sum(q: [__m128; OUT]) -> __m128 {
    let (ab, cd) = (_mm_unpacklo_ps(q[0], q[1]), _mm_unpacklo_ps(q[2], q[3]));
    let (ef, gh) = (_mm_unpackhi_ps(q[0], q[1]), _mm_unpackhi_ps(q[2], q[3]));
    let (l0, l1) = (_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab));
    let (l2, l3) = (_mm_movelh_ps(ef, gh), _mm_movehl_ps(gh, ef));
    _mm_add_ps(_mm_add_ps(l0, l2), _mm_add_ps(l1, l3))
}

/// Rounds and adds one block's results of outputs `n..n + 4` of one row.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn add_terms(y: __m128, weight: f32, scale: f32, sums: &mut [i32], peaks: &mut [u32]) {
    let v = _mm_mul_ps(_mm_mul_ps(y, _mm_set1_ps(weight)), _mm_set1_ps(scale));
    let magnitude = _mm_and_si128(_mm_castps_si128(v), _mm_set1_epi32(i32::MAX));
    let rounded = _mm_cvtps_epi32(_mm_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v));
    let (sums, peaks) = (&mut sums[..OUT], &mut peaks[..OUT]);
    // SAFETY: both places are 4 values of 32 bits, readable and writable.
    unsafe {
        let (s, p) = (sums.as_mut_ptr().cast(), peaks.as_mut_ptr().cast());
        _mm_storeu_si128(s, _mm_add_epi32(_mm_loadu_si128(s), rounded));
        _mm_storeu_si128(p, _mm_max_epu32(_mm_loadu_si128(p), magnitude));
    }
}

/// Rows `first..first + R` of a view, as chunks of 16.
#[inline(always)]
pub(super) fn input_rows<'a, const R: usize>(x: View<'a>, first: usize) -> [InputRow<'a>; R] {
    let width = x.groups * GROUP;
    let mut rows: [InputRow<'a>; R] = [&[]; R];
    for r in 0..R {
        rows[r] = x.floats[(first + r) * width..][..width].as_chunks().0;
    }
    rows
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
