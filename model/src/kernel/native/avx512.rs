//! The quantized products with AVX-512 VNNI: one register of 16 accumulators per row, up to 16 rows at a time.
//!
//! `dpbusd` multiplies unsigned by signed bytes and adds four products exactly; weights go in as value + 8 (q4)
//! or + 128 (q8) and the start value takes that times the sum of the activations away. A group's weights are
//! loaded once and meet all rows of the tile. Under four rows the latency of the chain shows, so there it is cut in
//! two (integer addition does not care). Row loops are unrolled by hand: past 8 rows LLVM keeps the loop and the
//! accumulators go to the stack. Price: sixteen copies of each function, one per tile height.
#![allow(unsafe_code, reason = "vector loads, stores and prefetch")]

use std::arch::x86_64::*;

use super::avx2::prefetch;
use super::block::{Added, Block, COMBINE_GROUPS, Outputs, Terms};
use super::definition::{LANES, QUIET, QuantizedGroup};
use super::tiles::{Quads, Tile, View};
use crate::format::{Format, GROUP};

/// Runs a block for each row index below `$n`, as literals.
macro_rules! rows {
    ($n:expr, $i:ident, $b:block) => { rows!(@ $n, $i, $b, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    (@ $n:expr, $i:ident, $b:block, $($k:literal)*) => { $( if $k < $n { let $i: usize = $k; $b } )* };
}

/// Calls `$f::<BYTES, height>` for a height of 1 to 16.
macro_rules! by_height {
    ($height:expr, $f:ident, $args:tt) => { by_height!(@ $height, $f, $args, 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16) };
    (@ $height:expr, $f:ident, $args:tt, $($n:literal)*) => {
        match $height { $( $n => $f::<BYTES, $n> $args, )* _ => {} }
    };
}

/// Part of a tile that meets a run of groups, `R` rows each.
#[derive(Clone, Copy)]
struct Cells<'a, const R: usize> {
    values: &'a [[Quads; R]],
    scales: &'a [[f32; R]],
    offsets: &'a [[i32; R]],
}

impl<'a, const R: usize> Cells<'a, R> {
    #[inline(always)]
    fn new(tile: Tile<'a>) -> Cells<'a, R> {
        Cells {
            values: tile.values.as_chunks().0,
            scales: tile.scales.as_chunks().0,
            offsets: tile.offsets.as_chunks().0,
        }
    }

    #[inline(always)]
    fn part(self, first: usize, groups: usize) -> Cells<'a, R> {
        Cells {
            values: &self.values[first..][..groups],
            scales: &self.scales[first..][..groups],
            offsets: &self.offsets[first..][..groups],
        }
    }
}

/// The eight quads of a group as unsigned bytes: value + 8 (q4) or + 128 (q8).
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
fn unsigned_weights<const BYTES: usize>(group: &[u8; BYTES]) -> [__m512i; 8] {
    let mut v = [_mm512_setzero_si512(); 8];
    for j in 0..4 {
        if BYTES == Format::Q8.group_bytes() {
            let flip = _mm512_set1_epi8(-128);
            v[j] = _mm512_xor_si512(line(group, j), flip);
            v[j + 4] = _mm512_xor_si512(line(group, j + 4), flip);
        } else {
            let (bytes, low) = (line(group, j), _mm512_set1_epi8(15));
            v[j] = _mm512_and_si512(bytes, low);
            v[j + 4] = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low);
        }
    }
    v
}

/// Line `j` of a group.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn line<const BYTES: usize>(group: &[u8; BYTES], j: usize) -> __m512i {
    let bytes: &[u8] = &group[j * 64..][..64];
    // SAFETY: 64 bytes are readable; the load has no alignment demand.
    unsafe { _mm512_loadu_si512(bytes.as_ptr().cast()) }
}

/// The 16 weight scales of a group.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn scales<const BYTES: usize>(group: &[u8; BYTES]) -> __m512 {
    let bytes: &[u8] = &group[BYTES - 2 * LANES..];
    // SAFETY: 32 bytes are readable; the load has no alignment demand.
    _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(bytes.as_ptr().cast()) })
}

/// Continues the accumulators of `R` rows over `groups`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
fn accumulate<const BYTES: usize, const R: usize>(
    groups: &[[u8; BYTES]],
    cells: Cells<'_, R>,
    ahead: usize,
    mut acc: [__m512; R],
) -> [__m512; R] {
    let cells = cells.part(0, groups.len());
    for g in 0..groups.len() {
        prefetch(&groups[g], ahead);
        let w = unsigned_weights(&groups[g]);
        let sw = scales(&groups[g]);
        let (q, sx, offset) = (&cells.values[g], &cells.scales[g], &cells.offsets[g]);
        rows!(R, r, {
            let mut d = _mm512_set1_epi32(offset[r]);
            if BYTES == Format::Q8.group_bytes() {
                d = _mm512_slli_epi32::<4>(d);
            }
            if R < 4 {
                let mut e = _mm512_setzero_si512();
                for j in 0..4 {
                    d = _mm512_dpbusd_epi32(d, w[j], _mm512_set1_epi32(q[r][j]));
                    e = _mm512_dpbusd_epi32(e, w[j + 4], _mm512_set1_epi32(q[r][j + 4]));
                }
                d = _mm512_add_epi32(d, e);
            } else {
                for j in 0..8 {
                    d = _mm512_dpbusd_epi32(d, w[j], _mm512_set1_epi32(q[r][j]));
                }
            }
            let scale = _mm512_mul_ps(_mm512_set1_ps(sx[r]), sw);
            acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(d), scale, acc[r]);
        });
    }
    acc
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
fn product_tile<const BYTES: usize, const R: usize>(
    groups: &[[u8; BYTES]],
    tile: Tile<'_>,
    ahead: usize,
    out: &mut [Outputs<f32>],
) {
    let acc = accumulate(groups, Cells::<R>::new(tile), ahead, [_mm512_setzero_ps(); R]);
    let out = &mut out[..R];
    rows!(R, r, {
        // SAFETY: 16 floats are writable.
        unsafe { _mm512_storeu_ps(out[r].as_mut_ptr(), acc[r]) };
    });
}

/// Rounds and adds one block's results of one row.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn add_terms(
    y: __m512,
    weight: f32,
    scale: f32,
    sums: &mut Outputs<i32>,
    peaks: &mut Outputs<u32>,
) {
    let v = _mm512_mul_ps(_mm512_mul_ps(y, _mm512_set1_ps(weight)), _mm512_set1_ps(scale));
    let magnitude = _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(i32::MAX));
    let rounded = _mm512_cvt_roundps_epi32::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
    // SAFETY: both places are 16 values of 32 bits, readable and writable.
    unsafe {
        let (s, p) = (sums.as_mut_ptr().cast(), peaks.as_mut_ptr().cast());
        _mm512_storeu_si512(s, _mm512_add_epi32(_mm512_loadu_si512(s), rounded));
        _mm512_storeu_si512(p, _mm512_max_epu32(_mm512_loadu_si512(p), magnitude));
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
fn combine_tile<const BYTES: usize, const R: usize>(
    groups: &[[u8; BYTES]],
    tile: Tile<'_>,
    ahead: usize,
    terms: Terms<'_>,
    added: &mut Added<'_>,
) {
    let cells = Cells::<R>::new(tile);
    let weights = &terms.weights[tile.first..][..R];
    let sums = &mut added.sums[tile.first..][..R];
    let peaks = &mut added.peaks[tile.first..][..R];
    let mut first = 0;
    for chunk in groups.chunks(COMBINE_GROUPS) {
        let acc = accumulate(chunk, cells.part(first, chunk.len()), ahead, [_mm512_setzero_ps(); R]);
        rows!(R, r, { add_terms(acc[r], weights[r], terms.scale, &mut sums[r], &mut peaks[r]) });
        first += chunk.len();
    }
}

/// Products of a row block with all rows of `x`; `BYTES` is the size of a group and so the format.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
pub(super) fn product<const BYTES: usize>(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
    let groups = block.bytes.as_chunks::<BYTES>().0;
    for t in 0..x.tiles() {
        let tile = x.tile(t);
        let ahead = if t == 0 { block.ahead } else { 0 };
        by_height!(tile.height, product_tile, (groups, tile, ahead, &mut out[tile.first..]));
    }
}

/// The same with the combine of DESIGN section 5.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
pub(super) fn combine<const BYTES: usize>(
    block: Block<'_>,
    x: View<'_>,
    terms: Terms<'_>,
    mut added: Added<'_>,
) {
    let groups = block.bytes.as_chunks::<BYTES>().0;
    for t in 0..x.tiles() {
        let tile = x.tile(t);
        let ahead = if t == 0 { block.ahead } else { 0 };
        by_height!(tile.height, combine_tile, (groups, tile, ahead, terms, &mut added));
    }
}

/// f16 to f32; lengths are equal.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) fn widen_f16(x: &[u16], out: &mut [f32]) {
    let (whole, rest) = x.as_chunks::<LANES>();
    let (out, out_rest) = out.as_chunks_mut::<LANES>();
    for (x, out) in whole.iter().zip(out) {
        // SAFETY: 32 bytes are readable and 64 writable.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), _mm512_cvtph_ps(_mm256_loadu_si256(x.as_ptr().cast()))) };
    }
    super::definition::widen_each(rest, out_rest);
}

/// f32 to f16, clamped to the finite range; lengths are equal.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
pub(super) fn narrow_f16(x: &[f32], out: &mut [u16]) {
    let (whole, rest) = x.as_chunks::<LANES>();
    let (out, out_rest) = out.as_chunks_mut::<LANES>();
    let max = _mm512_set1_ps(super::definition::F16_MAX);
    let min = _mm512_set1_ps(-super::definition::F16_MAX);
    for (x, out) in whole.iter().zip(out) {
        // SAFETY: 64 bytes are readable and 32 writable. min and max return their second operand on NaN.
        unsafe {
            let v = _mm512_max_ps(min, _mm512_min_ps(max, _mm512_loadu_ps(x.as_ptr())));
            let h = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v);
            _mm256_storeu_si256(out.as_mut_ptr().cast(), h);
        }
    }
    super::definition::narrow_each(rest, out_rest);
}

/// The quantizer of the definition: largest magnitude by integer comparison, two IEEE divisions, nearest even.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vl")]
pub(super) fn quantize_group(x: &[f32; GROUP]) -> QuantizedGroup {
    // SAFETY: 32 floats are readable; the loads have no alignment demand.
    let (a, b) = unsafe { (_mm512_loadu_ps(x.as_ptr()), _mm512_loadu_ps(x.as_ptr().add(LANES))) };
    let magnitude = _mm512_set1_epi32(i32::MAX);
    let low = _mm512_and_si512(_mm512_castps_si512(a), magnitude);
    let high = _mm512_and_si512(_mm512_castps_si512(b), magnitude);
    let peak = _mm512_reduce_max_epu32(_mm512_max_epu32(low, high));
    let mut out = QuantizedGroup::quiet();
    if peak >= f32::INFINITY.to_bits() {
        out.scale = f32::NAN;
        return out;
    }
    let amax = f32::from_bits(peak);
    if amax < QUIET {
        return out;
    }
    let inverse = _mm512_set1_ps(127.0 / amax);
    let a = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse));
    let b = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
    // SAFETY: 32 bytes are writable.
    unsafe {
        _mm_storeu_si128(out.values.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(a));
        _mm_storeu_si128(out.values.as_mut_ptr().add(LANES).cast(), _mm512_cvtepi32_epi8(b));
    }
    out.scale = amax / 127.0;
    out.sum = _mm512_reduce_add_epi32(_mm512_add_epi32(a, b));
    out
}
