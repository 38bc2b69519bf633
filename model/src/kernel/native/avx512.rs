//! The quantized products with AVX-512 VNNI: one register of 16 accumulators per row, up to 16 rows at a time.
//!
//! `dpbusd` multiplies unsigned by signed bytes and adds four products exactly; weights go in as value + 8 (q4)
//! or + 128 (q8) and the start value takes that times the sum of the activations away. A group's weights are
//! loaded once and meet all rows of the tile. Under four rows the latency of the chain shows, so there it is cut in
//! two (integer addition does not care). Row loops are unrolled by hand: past 8 rows LLVM keeps the loop and the
//! accumulators go to the stack. Price: sixteen copies of each function, one per tile height.
#![allow(unsafe_code, reason = "vector loads, stores and prefetch")]

use std::arch::asm;
use std::arch::x86_64::*;

use super::avx2::prefetch;
use super::block::{Added, Block, COMBINE_GROUPS, Outputs, Terms};
use super::definition::{LANES, QuantizedGroup, amax};
use super::tiles::{Quads, TILE, Tile, View};
use crate::format::{Format, GROUP};

/// Below so many rows the latency of a chain of eight multiplications shows.
const FEW_ROWS: usize = 4;

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

/// The start values of a group's dot products, which undo the offset of unsigned weights: -8 times the sum of the
/// activations as stored (q4), 16 times that (q8).
#[inline]
#[target_feature(enable = "avx512f")]
fn starts<const R: usize>(offsets: &[i32; R]) -> [i32; TILE] {
    let mut starts = [0; TILE];
    let mask = (u16::MAX) >> (TILE - R);
    // SAFETY: the mask keeps the load to the `R` values; 16 are writable.
    unsafe {
        let scaled = _mm512_slli_epi32::<4>(_mm512_maskz_loadu_epi32(mask, offsets.as_ptr()));
        _mm512_storeu_si512(starts.as_mut_ptr().cast(), scaled);
    }
    starts
}

/// Adds the dot products of one group and one row, scaled, to `acc`. One row after the other keeps few values alive:
/// left to itself LLVM puts all rows of a quad together, spills accumulators, and separates the multiplications from
/// the conversions that could run beside them. `halved` cuts the chain of multiplications in two, which integer addition
/// does not notice: for few rows, where nothing else hides its latency.
macro_rules! add_row {
    (whole, $($row:expr),*) => { add_row!(@ "{d}" [] [] $($row),*) };
    (halved, $($row:expr),*) => {{
        let half = _mm512_setzero_si512();
        add_row!(@ "{e}" ["vpaddd {d}, {d}, {e}"] [e = inout(zmm_reg) half => _,] $($row),*)
    }};
    (@ $odd:literal [$($join:literal)?] [$($half:tt)*] $w:expr, $sw:expr, $start:expr, $q:expr, $sx:expr, $acc:expr) => {
        // SAFETY: reads the start value, the scale and the 32 bytes of one row, whose pointers come from references.
        unsafe {
            // Named for their types: discarded outputs have none, and would get registers of any width.
            let (mut _dot, mut _scale): (__m512i, __m512);
            asm!(
                "vpbroadcastd {d}, dword ptr [{start}]",
                "vpdpbusd {d}, {w0}, dword ptr [{q}]{{1to16}}",
                concat!("vpdpbusd ", $odd, ", {w1}, dword ptr [{q} + 4]{{1to16}}"),
                "vpdpbusd {d}, {w2}, dword ptr [{q} + 8]{{1to16}}",
                concat!("vpdpbusd ", $odd, ", {w3}, dword ptr [{q} + 12]{{1to16}}"),
                "vpdpbusd {d}, {w4}, dword ptr [{q} + 16]{{1to16}}",
                concat!("vpdpbusd ", $odd, ", {w5}, dword ptr [{q} + 20]{{1to16}}"),
                "vpdpbusd {d}, {w6}, dword ptr [{q} + 24]{{1to16}}",
                concat!("vpdpbusd ", $odd, ", {w7}, dword ptr [{q} + 28]{{1to16}}"),
                "vmulps {s}, {sw}, dword ptr [{sx}]{{1to16}}",
                $($join,)?
                "vcvtdq2ps {d}, {d}",
                "vfmadd231ps {acc}, {d}, {s}",
                start = in(reg) $start,
                q = in(reg) $q,
                sx = in(reg) $sx,
                w0 = in(zmm_reg) $w[0],
                w1 = in(zmm_reg) $w[1],
                w2 = in(zmm_reg) $w[2],
                w3 = in(zmm_reg) $w[3],
                w4 = in(zmm_reg) $w[4],
                w5 = in(zmm_reg) $w[5],
                w6 = in(zmm_reg) $w[6],
                w7 = in(zmm_reg) $w[7],
                sw = in(zmm_reg) $sw,
                d = out(zmm_reg) _dot,
                $($half)*
                s = out(zmm_reg) _scale,
                acc = inout(zmm_reg) $acc,
                options(readonly, nostack, preserves_flags)
            );
        }
    };
}

/// Continues the accumulators of `R` rows with group `$g` of `$cells`, and does `$then` with each row `$r` right after.
/// A macro, because LLVM leaves a function of this size where it is, and the accumulators would go through memory for
/// every group.
macro_rules! add_group {
    ($group:expr, $cells:ident, $g:expr, $acc:ident, $r:ident, $then:block) => {
        let group: &[u8; BYTES] = $group;
        let (w, sw) = (unsigned_weights(group), scales(group));
        let (q, sx, offset) = (&$cells.values[$g], &$cells.scales[$g], &$cells.offsets[$g]);
        let q8 = if BYTES == Format::Q8.group_bytes() { starts(offset) } else { [0; TILE] };
        let start = if BYTES == Format::Q8.group_bytes() { q8.as_ptr() } else { offset.as_ptr() };
        rows!(R, $r, {
            let (q, sx) = (q.as_ptr().wrapping_add($r), sx.as_ptr().wrapping_add($r));
            if R < FEW_ROWS {
                add_row!(halved, w, sw, start.wrapping_add($r), q, sx, $acc[$r]);
            } else {
                add_row!(whole, w, sw, start.wrapping_add($r), q, sx, $acc[$r]);
            }
            $then
        });
    };
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,f16c,fma")]
fn product_tile<const BYTES: usize, const R: usize>(
    groups: &[[u8; BYTES]],
    tile: Tile<'_>,
    ahead: usize,
    out: &mut [Outputs<f32>],
) {
    let cells = Cells::<R>::new(tile).part(0, groups.len());
    let mut acc = [_mm512_setzero_ps(); R];
    for g in 0..groups.len() {
        prefetch(&groups[g], ahead);
        add_group!(&groups[g], cells, g, acc, r, {});
    }
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
        let part = cells.part(first, chunk.len());
        let mut acc = [_mm512_setzero_ps(); R];
        let Some((last, others)) = chunk.split_last() else { break };
        for g in 0..others.len() {
            prefetch(&others[g], ahead);
            add_group!(&others[g], part, g, acc, r, {});
        }
        prefetch(last, ahead);
        // Rounding one row runs beside the products of the next.
        add_group!(last, part, others.len(), acc, r, {
            add_terms(acc[r], weights[r], terms.scale, &mut sums[r], &mut peaks[r]);
        });
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
    let amax = match amax(peak) {
        Ok(amax) => amax,
        Err(whole) => return whole,
    };
    let mut out = QuantizedGroup::quiet();
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
