//! The quantized products with NEON dot products: four registers of four accumulators per row, up to 4 rows at a time.
//!
//! `sdot` multiplies signed bytes and adds four products exactly, and takes the four values of a row from one lane
//! of a register, so nothing is broadcast. Weights of q4 go in as value + 8, which the start value takes away; q8
//! as they are. Within a group the outputs come four at a time: their dot products, the rows' values and the
//! accumulators then fit 32 registers. A taller tile walks the row block again, from the first cache level. f16, `sdot`
//! and the prefetch are assembly because std has them for nightly compilers only.
#![allow(unsafe_code, reason = "vector loads and stores, and assembly")]

use std::arch::aarch64::*;
use std::arch::asm;

use super::block::{Added, Block, COMBINE_GROUPS, Outputs, Terms};
use super::definition::{LANES, QuantizedGroup, amax};
use super::passes::{Pass, by_rows, passes};
use super::tiles::View;
use crate::format::{Format, GROUP};

/// Outputs per register.
const QUARTER: usize = 4;

type Accumulators<const R: usize> = [[float32x4_t; R]; LANES / QUARTER];

/// `d[n] += dot(weights[4n..4n + 4], row[4 * LANE..4 * LANE + 4])` for the four lanes n of `d`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn sdot<const LANE: i32>(d: int32x4_t, weights: int8x16_t, row: int8x16_t) -> int32x4_t {
    let mut d = d;
    // SAFETY: works on registers only; the feature is enabled.
    unsafe {
        asm!(
            "sdot {d:v}.4s, {weights:v}.16b, {row:v}.4b[{lane}]",
            d = inout(vreg) d,
            weights = in(vreg) weights,
            row = in(vreg) row,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags)
        )
    };
    d
}

/// Four f16 to f32, exact.
#[inline]
#[target_feature(enable = "neon")]
fn widen(halves: uint16x4_t) -> float32x4_t {
    let out;
    // SAFETY: works on registers only.
    unsafe {
        asm!(
            "fcvtl {out:v}.4s, {halves:v}.4h",
            out = lateout(vreg) out,
            halves = in(vreg) halves,
            options(pure, nomem, nostack, preserves_flags)
        )
    };
    out
}

/// Four f32 to f16, nearest even.
#[inline]
#[target_feature(enable = "neon")]
fn narrow(x: float32x4_t) -> uint16x4_t {
    let out;
    // SAFETY: works on registers only.
    unsafe {
        asm!(
            "fcvtn {out:v}.4h, {x:v}.4s",
            out = lateout(vreg) out,
            x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags)
        )
    };
    out
}

/// Asks for the lines of a group `ahead` bytes further on; addresses past the end are harmless.
#[inline(always)]
fn prefetch<const BYTES: usize>(group: &[u8; BYTES], ahead: usize) {
    if ahead != 0 {
        for line in 0..BYTES.div_ceil(64) {
            let address = group.as_ptr().wrapping_add(ahead + line * 64);
            // SAFETY: a prefetch never faults, whatever the address.
            unsafe {
                asm!("prfm pldl1keep, [{0}]", in(reg) address, options(nostack, readonly, preserves_flags))
            };
        }
    }
}

/// The quads of four outputs in line `j` of a group.
#[inline]
#[target_feature(enable = "neon")]
fn quads<const BYTES: usize>(group: &[u8; BYTES], j: usize, quarter: usize) -> uint8x16_t {
    let bytes: &[u8] = &group[j * 64 + quarter * 16..][..16];
    // SAFETY: 16 bytes are readable; the load has no alignment demand.
    unsafe { vld1q_u8(bytes.as_ptr()) }
}

/// Four weight scales of a group.
#[inline]
#[target_feature(enable = "neon")]
fn quarter_scales<const BYTES: usize>(group: &[u8; BYTES], quarter: usize) -> float32x4_t {
    let bytes: &[u8] = &group[BYTES - 2 * LANES + quarter * 8..][..8];
    // SAFETY: 8 bytes are readable; the load of bytes has no alignment demand.
    widen(vreinterpret_u16_u8(unsafe { vld1_u8(bytes.as_ptr()) }))
}

/// Adds the products of line `J` (low half of the inputs) and line `J + 4` (high half) of four outputs to the dot
/// products of `R` rows.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn two_lines<const BYTES: usize, const R: usize, const J: i32>(
    group: &[u8; BYTES],
    quarter: usize,
    rows: &[[int8x16_t; 2]; R],
    d: &mut [int32x4_t; R],
) {
    let bytes = quads(group, J as usize, quarter);
    let (low, high) = if BYTES == Format::Q8.group_bytes() {
        (bytes, quads(group, J as usize + 4, quarter))
    } else {
        (vandq_u8(bytes, vdupq_n_u8(15)), vshrq_n_u8::<4>(bytes))
    };
    for r in 0..R {
        d[r] = sdot::<J>(d[r], vreinterpretq_s8_u8(low), rows[r][0]);
        d[r] = sdot::<J>(d[r], vreinterpretq_s8_u8(high), rows[r][1]);
    }
}

/// The accumulators of `R` rows over `groups`, the first of which is group `first`.
#[inline]
#[target_feature(enable = "neon,dotprod")]
fn accumulate<const BYTES: usize, const R: usize>(
    groups: &[[u8; BYTES]],
    first: usize,
    pass: Pass<'_>,
) -> Accumulators<R> {
    let mut acc = [[vdupq_n_f32(0.0); R]; LANES / QUARTER];
    for (offset, group) in groups.iter().enumerate() {
        prefetch(group, pass.ahead);
        let Pass { tile, row, .. } = pass;
        let cell = (first + offset) * tile.height + row;
        let (values, scales) = (&tile.values[cell..][..R], &tile.scales[cell..][..R]);
        let offsets = &tile.offsets[cell..][..R];
        let mut rows = [[vdupq_n_s8(0); 2]; R];
        for r in 0..R {
            let quads: &[i32] = &values[r];
            // SAFETY: 32 bytes are readable.
            rows[r] = unsafe { [vld1q_s8(quads.as_ptr().cast()), vld1q_s8(quads.as_ptr().add(4).cast())] };
        }
        for quarter in 0..LANES / QUARTER {
            let mut d = [vdupq_n_s32(0); R];
            if BYTES == Format::Q4.group_bytes() {
                for r in 0..R {
                    d[r] = vdupq_n_s32(offsets[r]);
                }
            }
            two_lines::<BYTES, R, 0>(group, quarter, &rows, &mut d);
            two_lines::<BYTES, R, 1>(group, quarter, &rows, &mut d);
            two_lines::<BYTES, R, 2>(group, quarter, &rows, &mut d);
            two_lines::<BYTES, R, 3>(group, quarter, &rows, &mut d);
            let sw = quarter_scales(group, quarter);
            for r in 0..R {
                let scale = vmulq_n_f32(sw, scales[r]);
                acc[quarter][r] = vfmaq_f32(acc[quarter][r], vcvtq_f32_s32(d[r]), scale);
            }
        }
    }
    acc
}

#[target_feature(enable = "neon,dotprod")]
fn product_pass<const BYTES: usize, const R: usize>(
    groups: &[[u8; BYTES]],
    pass: Pass<'_>,
    out: &mut [Outputs<f32>],
) {
    let acc = accumulate::<BYTES, R>(groups, 0, pass);
    for (r, out) in out[pass.tile.first + pass.row..][..R].iter_mut().enumerate() {
        for (quarter, out) in out.as_chunks_mut::<QUARTER>().0.iter_mut().enumerate() {
            // SAFETY: 4 floats are writable.
            unsafe { vst1q_f32(out.as_mut_ptr(), acc[quarter][r]) };
        }
    }
}

/// Rounds and adds one block's results of four outputs of one row.
#[inline]
#[target_feature(enable = "neon")]
fn add_terms(y: float32x4_t, (weight, scale): (f32, f32), sums: &mut [i32], peaks: &mut [u32]) {
    let v = vmulq_n_f32(vmulq_n_f32(y, weight), scale);
    let magnitude = vandq_u32(vreinterpretq_u32_f32(v), vdupq_n_u32(0x7fff_ffff));
    let (sums, peaks) = (&mut sums[..QUARTER], &mut peaks[..QUARTER]);
    // SAFETY: both places are 4 values of 32 bits, readable and writable.
    unsafe {
        let (s, p) = (sums.as_mut_ptr(), peaks.as_mut_ptr());
        vst1q_s32(s, vaddq_s32(vld1q_s32(s), vcvtnq_s32_f32(v)));
        vst1q_u32(p, vmaxq_u32(vld1q_u32(p), magnitude));
    }
}

#[target_feature(enable = "neon,dotprod")]
fn combine_pass<const BYTES: usize, const R: usize>(
    groups: &[[u8; BYTES]],
    pass: Pass<'_>,
    terms: Terms<'_>,
    added: &mut Added<'_>,
) {
    for (index, chunk) in groups.chunks(COMBINE_GROUPS).enumerate() {
        let acc = accumulate::<BYTES, R>(chunk, index * COMBINE_GROUPS, pass);
        for r in 0..R {
            let at = pass.tile.first + pass.row + r;
            let (factors, added) = ((terms.weights[at], terms.scale), added.slot(at));
            for quarter in 0..LANES / QUARTER {
                let (sums, peaks) =
                    (&mut added.sums[quarter * QUARTER..], &mut added.peaks[quarter * QUARTER..]);
                add_terms(acc[quarter][r], factors, sums, peaks);
            }
        }
    }
}

/// Products of a row block with all rows of `x`; `BYTES` is the size of a group and so the format.
#[target_feature(enable = "neon,dotprod")]
pub(super) fn product<const BYTES: usize>(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
    let groups = block.bytes.as_chunks::<BYTES>().0;
    for (pass, rows) in passes(x, block.ahead) {
        by_rows!(rows, product_pass, (groups, pass, out));
    }
}

/// The same with the combine of DESIGN section 5.
#[target_feature(enable = "neon,dotprod")]
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
#[target_feature(enable = "neon")]
pub(super) fn widen_f16(x: &[u16], out: &mut [f32]) {
    let (whole, rest) = x.as_chunks::<QUARTER>();
    let (out, out_rest) = out.as_chunks_mut::<QUARTER>();
    for (x, out) in whole.iter().zip(out) {
        // SAFETY: 8 bytes are readable and 16 writable.
        unsafe { vst1q_f32(out.as_mut_ptr(), widen(vld1_u16(x.as_ptr()))) };
    }
    super::definition::widen_each(rest, out_rest);
}

/// f32 to f16, clamped to the finite range; lengths are equal.
#[target_feature(enable = "neon")]
pub(super) fn narrow_f16(x: &[f32], out: &mut [u16]) {
    let (whole, rest) = x.as_chunks::<QUARTER>();
    let (out, out_rest) = out.as_chunks_mut::<QUARTER>();
    let max = vdupq_n_f32(super::definition::F16_MAX);
    let min = vdupq_n_f32(-super::definition::F16_MAX);
    for (x, out) in whole.iter().zip(out) {
        // SAFETY: 16 bytes are readable and 8 writable. Comparisons with NaN are false, so it stays.
        unsafe {
            let v = vld1q_f32(x.as_ptr());
            let v = vbslq_f32(vcgtq_f32(v, max), max, v);
            let v = vbslq_f32(vcltq_f32(v, min), min, v);
            vst1_u16(out.as_mut_ptr(), narrow(v));
        }
    }
    super::definition::narrow_each(rest, out_rest);
}

/// The quantizer of the definition: largest magnitude by integer comparison, two IEEE divisions, nearest even.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn quantize_group(x: &[f32; GROUP]) -> QuantizedGroup {
    let mut v = [vdupq_n_f32(0.0); GROUP / QUARTER];
    let mut peaks = vdupq_n_u32(0);
    for (v, x) in v.iter_mut().zip(x.as_chunks::<QUARTER>().0) {
        // SAFETY: 4 floats are readable.
        *v = unsafe { vld1q_f32(x.as_ptr()) };
        peaks = vmaxq_u32(peaks, vandq_u32(vreinterpretq_u32_f32(*v), vdupq_n_u32(0x7fff_ffff)));
    }
    let peak = vmaxvq_u32(peaks);
    let amax = match amax(peak) {
        Ok(amax) => amax,
        Err(whole) => return whole,
    };
    let mut out = QuantizedGroup::quiet();
    let inverse = 127.0 / amax;
    let mut sums = vdupq_n_s32(0);
    for (pair, to) in v.as_chunks::<2>().0.iter().zip(out.values.as_chunks_mut::<8>().0) {
        let low = vcvtnq_s32_f32(vmulq_n_f32(pair[0], inverse));
        let high = vcvtnq_s32_f32(vmulq_n_f32(pair[1], inverse));
        sums = vaddq_s32(sums, vaddq_s32(low, high));
        // SAFETY: 8 bytes are writable.
        unsafe { vst1_s8(to.as_mut_ptr(), vmovn_s16(vcombine_s16(vmovn_s32(low), vmovn_s32(high)))) };
    }
    out.scale = amax / 127.0;
    out.sum = vaddvq_s32(sums);
    out
}
