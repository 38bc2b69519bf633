//! The quantized products with AVX2: two registers of 8 accumulators per row, up to 4 rows at a time.
//!
//! `maddubs` multiplies unsigned by signed bytes and adds pairs in i16. q4: nibbles 0..15 keep the whole group in
//! i16 (eight sums of at most 2 * 15 * 127 = 3810, together 30480). q8: |w| times sign(q, w), at most 2 * 128 *
//! 127 = 32512, safe even at w = -128; widened to i32 at once. Four rows share each load of weights; a taller tile
//! walks the row block again, from the first cache level.
#![allow(unsafe_code, reason = "vector loads and stores")]

use std::arch::x86_64::*;

use super::block::{Added, Block, COMBINE_GROUPS, Outputs, Terms};
use super::definition::{LANES, QuantizedGroup, amax};
use super::passes::{Pass, by_rows, passes};
use super::tiles::{Tile, View};
use crate::format::{Format, GROUP};

/// Outputs per register.
const HALF: usize = 8;

type Accumulators<const R: usize> = [[__m256; R]; 2];

/// Asks for the lines of a group `ahead` bytes further on; addresses past the end are harmless.
#[inline(always)]
pub(super) fn prefetch<const BYTES: usize>(group: &[u8; BYTES], ahead: usize) {
    if ahead != 0 {
        for line in 0..BYTES.div_ceil(64) {
            let address = group.as_ptr().wrapping_add(ahead + line * 64);
            // SAFETY: a prefetch never faults, whatever the address.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
        }
    }
}

/// 32 bytes of line `j` of a group: the quads of 8 outputs.
#[inline]
#[target_feature(enable = "avx2")]
fn half_line<const BYTES: usize>(group: &[u8; BYTES], j: usize, half: usize) -> __m256i {
    let bytes: &[u8] = &group[j * 64 + half * 32..][..32];
    // SAFETY: 32 bytes are readable; the load has no alignment demand.
    unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) }
}

/// Eight weight scales of a group.
#[inline]
#[target_feature(enable = "avx2,f16c")]
fn half_scales<const BYTES: usize>(group: &[u8; BYTES], half: usize) -> __m256 {
    let bytes: &[u8] = &group[BYTES - 2 * LANES + half * 16..][..16];
    // SAFETY: 16 bytes are readable; the load has no alignment demand.
    _mm256_cvtph_ps(unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) })
}

/// Integer dot products of 8 outputs of one group with `R` rows, the first of which is cell `cell`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn dots<const BYTES: usize, const R: usize>(
    group: &[u8; BYTES],
    half: usize,
    tile: Tile<'_>,
    cell: usize,
) -> [__m256i; R] {
    let mut d = [_mm256_setzero_si256(); R];
    let q = &tile.values[cell..][..R];
    let ones = _mm256_set1_epi16(1);
    if BYTES == Format::Q8.group_bytes() {
        for j in 0..8 {
            let v = half_line(group, j, half);
            let magnitude = _mm256_abs_epi8(v);
            for r in 0..R {
                let x = _mm256_sign_epi8(_mm256_set1_epi32(q[r][j]), v);
                d[r] = _mm256_add_epi32(d[r], _mm256_madd_epi16(_mm256_maddubs_epi16(magnitude, x), ones));
            }
        }
        return d;
    }
    let low_bits = _mm256_set1_epi8(15);
    for j in 0..4 {
        let v = half_line(group, j, half);
        let low = _mm256_and_si256(v, low_bits);
        let high = _mm256_and_si256(_mm256_srli_epi16::<4>(v), low_bits);
        for r in 0..R {
            d[r] = _mm256_add_epi16(d[r], _mm256_maddubs_epi16(low, _mm256_set1_epi32(q[r][j])));
            d[r] = _mm256_add_epi16(d[r], _mm256_maddubs_epi16(high, _mm256_set1_epi32(q[r][j + 4])));
        }
    }
    let offsets = &tile.offsets[cell..][..R];
    for r in 0..R {
        d[r] = _mm256_add_epi32(_mm256_madd_epi16(d[r], ones), _mm256_set1_epi32(offsets[r]));
    }
    d
}

/// The accumulators of `R` rows over `groups`, the first of which is group `first`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn accumulate<const BYTES: usize, const R: usize>(
    groups: &[[u8; BYTES]],
    first: usize,
    pass: Pass<'_>,
) -> Accumulators<R> {
    let mut acc = [[_mm256_setzero_ps(); R]; 2];
    for (offset, group) in groups.iter().enumerate() {
        prefetch(group, pass.ahead);
        let cell = (first + offset) * pass.tile.height + pass.row;
        let scales = &pass.tile.scales[cell..][..R];
        for half in 0..2 {
            let d = dots::<BYTES, R>(group, half, pass.tile, cell);
            let sw = half_scales(group, half);
            for r in 0..R {
                let scale = _mm256_mul_ps(_mm256_set1_ps(scales[r]), sw);
                acc[half][r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(d[r]), scale, acc[half][r]);
            }
        }
    }
    acc
}

#[target_feature(enable = "avx2,fma,f16c")]
fn product_pass<const BYTES: usize, const R: usize>(
    groups: &[[u8; BYTES]],
    pass: Pass<'_>,
    out: &mut [Outputs<f32>],
) {
    let acc = accumulate::<BYTES, R>(groups, 0, pass);
    let out = &mut out[pass.tile.first + pass.row..][..R];
    for r in 0..R {
        for half in 0..2 {
            let to: &mut [f32] = &mut out[r][half * HALF..][..HALF];
            // SAFETY: 8 floats are writable.
            unsafe { _mm256_storeu_ps(to.as_mut_ptr(), acc[half][r]) };
        }
    }
}

/// Rounds and adds one block's results of 8 outputs of one row.
#[inline]
#[target_feature(enable = "avx2")]
fn add_terms(y: __m256, weight: f32, scale: f32, sums: &mut [i32], peaks: &mut [u32]) {
    let v = _mm256_mul_ps(_mm256_mul_ps(y, _mm256_set1_ps(weight)), _mm256_set1_ps(scale));
    let magnitude = _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(i32::MAX));
    let rounded = _mm256_cvtps_epi32(_mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v));
    let (sums, peaks) = (&mut sums[..HALF], &mut peaks[..HALF]);
    // SAFETY: both places are 8 values of 32 bits, readable and writable.
    unsafe {
        let (s, p) = (sums.as_mut_ptr().cast(), peaks.as_mut_ptr().cast());
        _mm256_storeu_si256(s, _mm256_add_epi32(_mm256_loadu_si256(s), rounded));
        _mm256_storeu_si256(p, _mm256_max_epu32(_mm256_loadu_si256(p), magnitude));
    }
}

#[target_feature(enable = "avx2,fma,f16c")]
fn combine_pass<const BYTES: usize, const R: usize>(
    groups: &[[u8; BYTES]],
    pass: Pass<'_>,
    terms: Terms<'_>,
    added: &mut Added<'_>,
) {
    let at = pass.tile.first + pass.row;
    for (index, chunk) in groups.chunks(COMBINE_GROUPS).enumerate() {
        let acc = accumulate::<BYTES, R>(chunk, index * COMBINE_GROUPS, pass);
        for r in 0..R {
            let (sums, peaks) = (&mut added.sums[at + r], &mut added.peaks[at + r]);
            for half in 0..2 {
                let (sums, peaks) = (&mut sums[half * HALF..], &mut peaks[half * HALF..]);
                add_terms(acc[half][r], terms.weights[at + r], terms.scale, sums, peaks);
            }
        }
    }
}

/// Products of a row block with all rows of `x`; `BYTES` is the size of a group and so the format.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn product<const BYTES: usize>(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
    let groups = block.bytes.as_chunks::<BYTES>().0;
    for (pass, rows) in passes(x, block.ahead) {
        by_rows!(rows, product_pass, (groups, pass, out));
    }
}

/// The same with the combine of DESIGN section 5.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn combine<const BYTES: usize>(
    block: Block<'_>,
    x: View<'_>,
    terms: Terms<'_>,
    mut added: Added<'_>,
) {
    let groups = block.bytes.as_chunks::<BYTES>().0;
    for (pass, rows) in passes(x, block.ahead) {
        by_rows!(rows, combine_pass, (groups, pass, terms, &mut added));
    }
}

/// f16 to f32; lengths are equal.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn widen_f16(x: &[u16], out: &mut [f32]) {
    let (whole, rest) = x.as_chunks::<HALF>();
    let (out, out_rest) = out.as_chunks_mut::<HALF>();
    for (x, out) in whole.iter().zip(out) {
        // SAFETY: 16 bytes are readable and 32 writable.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), _mm256_cvtph_ps(_mm_loadu_si128(x.as_ptr().cast()))) };
    }
    super::definition::widen_each(rest, out_rest);
}

/// f32 to f16, clamped to the finite range; lengths are equal.
#[target_feature(enable = "avx2,f16c")]
pub(super) fn narrow_f16(x: &[f32], out: &mut [u16]) {
    let (whole, rest) = x.as_chunks::<HALF>();
    let (out, out_rest) = out.as_chunks_mut::<HALF>();
    let max = _mm256_set1_ps(super::definition::F16_MAX);
    let min = _mm256_set1_ps(-super::definition::F16_MAX);
    for (x, out) in whole.iter().zip(out) {
        // SAFETY: 32 bytes are readable and 16 writable. min and max return their second operand on NaN.
        unsafe {
            let v = _mm256_max_ps(min, _mm256_min_ps(max, _mm256_loadu_ps(x.as_ptr())));
            _mm_storeu_si128(out.as_mut_ptr().cast(), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(v));
        }
    }
    super::definition::narrow_each(rest, out_rest);
}

/// The quantizer of the definition: largest magnitude by integer comparison, two IEEE divisions, nearest even.
#[inline]
#[target_feature(enable = "avx2")]
pub(super) fn quantize_group(x: &[f32; GROUP]) -> QuantizedGroup {
    let mut v = [_mm256_setzero_ps(); 4];
    let mut peaks = _mm256_setzero_si256();
    for (v, x) in v.iter_mut().zip(x.as_chunks::<HALF>().0) {
        // SAFETY: 8 floats are readable; the load has no alignment demand.
        *v = unsafe { _mm256_loadu_ps(x.as_ptr()) };
        let magnitude = _mm256_and_si256(_mm256_castps_si256(*v), _mm256_set1_epi32(i32::MAX));
        peaks = _mm256_max_epu32(peaks, magnitude);
    }
    let m = _mm_max_epu32(_mm256_castsi256_si128(peaks), _mm256_extracti128_si256::<1>(peaks));
    let m = _mm_max_epu32(m, _mm_shuffle_epi32::<0b1110>(m));
    let peak = _mm_cvtsi128_si32(_mm_max_epu32(m, _mm_shuffle_epi32::<0b01>(m))) as u32;
    let amax = match amax(peak) {
        Ok(amax) => amax,
        Err(whole) => return whole,
    };
    let mut out = QuantizedGroup::quiet();
    let inverse = _mm256_set1_ps(127.0 / amax);
    let q = v.map(|v| _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse)));
    // Packing works within 128-bit halves; the permutation puts the quads back in order.
    let words = (_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    let bytes = _mm256_packs_epi16(words.0, words.1);
    let bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    // SAFETY: 32 bytes are writable.
    unsafe { _mm256_storeu_si256(out.values.as_mut_ptr().cast(), bytes) };
    let sums = _mm256_add_epi32(_mm256_add_epi32(q[0], q[1]), _mm256_add_epi32(q[2], q[3]));
    let s = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256::<1>(sums));
    let s = _mm_add_epi32(s, _mm_shuffle_epi32::<0b1110>(s));
    out.sum = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32::<0b01>(s)));
    out.scale = amax / 127.0;
    out
}
