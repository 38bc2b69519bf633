//! Everything that is not a quantized product, written once and compiled once per instruction set.
//!
//! Idea: the bodies are `inline(always)` loops over arrays of 16; inside a function with target features they
//! become its vector instructions, and since rustc neither contracts nor reassociates, the bits are those of the
//! definition. Plain loops, because a closure handed to the standard library is compiled without the features.
//! Holds the portable bf16 products (f32 activations, 16 lanes, one tree), the activation step between the two phases,
//! and the row operations that `ops` offers.
#![allow(unsafe_code, reason = "target features, enabled only by tables chosen after detection")]

use std::ops::Range;

use super::block::{Added, AddedRow, Block, GateUp, Outputs, Terms};
use super::definition::{self, LANES, QuantizedGroup, combine_term, widen_bf16};
use super::tiles::{GroupSlots, View};
use crate::format::{COMBINE_BLOCK, GROUP};

/// Outputs computed together by the bf16 product: enough independent chains to hide the latency of fma.
const CHAINS: usize = 4;

/// Rounds and adds one block's results. An addend beyond i32 leaves an arbitrary sum; its peak tells.
#[inline(always)]
pub(super) fn add_terms(y: &Outputs<f32>, weight: f32, scale: f32, to: AddedRow<'_>) {
    for n in 0..LANES {
        let v = combine_term(y[n], weight, scale);
        to.peaks[n] = to.peaks[n].max(v.to_bits() & 0x7fff_ffff);
        to.sums[n] = to.sums[n].wrapping_add(v.round_ties_even() as i32);
    }
}

/// Dot products of four weight rows (bf16, little-endian, `inputs` each) with the same part of one row.
#[inline(always)]
fn four_dots(weights: [&[u8]; CHAINS], x: &[f32]) -> [f32; CHAINS] {
    let mut lanes = [[0.0f32; LANES]; CHAINS];
    let x = x.as_chunks::<LANES>().0;
    let mut w: [&[[u8; 2 * LANES]]; CHAINS] = [&[]; CHAINS];
    for c in 0..CHAINS {
        w[c] = &weights[c].as_chunks::<{ 2 * LANES }>().0[..x.len()];
    }
    for k in 0..x.len() {
        for c in 0..CHAINS {
            let bits: [u16; LANES] = bytemuck::cast(w[c][k]);
            for i in 0..LANES {
                lanes[c][i] = widen_bf16(u16::from_le(bits[i])).mul_add(x[k][i], lanes[c][i]);
            }
        }
    }
    let mut out = [0.0; CHAINS];
    for c in 0..CHAINS {
        out[c] = definition::reduce(lanes[c]);
    }
    out
}

/// Products of the 16 bf16 rows of `block` with one row, over the inputs of `range` (whole groups).
#[inline(always)]
pub(super) fn lanes_of_rows(block: Block<'_>, row: &[f32], range: Range<usize>, out: &mut Outputs<f32>) {
    let stride = block.bytes.len() / LANES;
    let x = &row[range.clone()];
    for n in (0..LANES).step_by(CHAINS) {
        let mut weights: [&[u8]; CHAINS] = [&[]; CHAINS];
        for c in 0..CHAINS {
            weights[c] = &block.bytes[(n + c) * stride..][2 * range.start..2 * range.end];
        }
        out[n..n + CHAINS].copy_from_slice(&four_dots(weights, x));
    }
}

/// Products of a bf16 row block with all rows of `x`, portably.
pub(super) fn product_bf16(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
    let width = x.groups * GROUP;
    for row in 0..x.rows {
        lanes_of_rows(block, &x.floats[row * width..][..width], 0..width, &mut out[row]);
    }
}

/// The same with the combine of DESIGN section 5.
pub(super) fn combine_bf16(block: Block<'_>, x: View<'_>, terms: Terms<'_>, mut added: Added<'_>) {
    let width = x.groups * GROUP;
    for row in 0..x.rows {
        let mut start = 0;
        while start < width {
            let end = if start + COMBINE_BLOCK < width { start + COMBINE_BLOCK } else { width };
            let mut y = [0.0; LANES];
            lanes_of_rows(block, &x.floats[row * width..][..width], start..end, &mut y);
            add_terms(&y, terms.weights[row], terms.scale, added.slot(row));
            start = end;
        }
    }
}

#[inline(always)]
fn activate_rows(quantize: QuantizeGroup, products: GateUp<'_>, slots: &GroupSlots) {
    for row in 0..products.gate[0].len() {
        let mut h = [0.0f32; GROUP];
        for half in 0..2 {
            let (gate, up) = (products.gate[half][row], products.up[half][row]);
            for i in 0..LANES {
                h[half * LANES + i] = definition::swiglu(gate[i], up[i]);
            }
        }
        if slots.quantized() {
            // SAFETY: the quantizer of the instruction set that this is compiled for.
            slots.put(row, &unsafe { quantize(&h) });
        } else {
            slots.put_floats(row, &h);
        }
    }
}

/// The quantizer of one instruction set. LLVM makes gathers of the plain one, so SIMD has its own.
type QuantizeGroup = unsafe fn(&[f32; GROUP]) -> QuantizedGroup;

/// Row operations of one instruction set, as `ops::Ops` calls them.
pub(super) struct RowFunctions {
    pub(super) dot: unsafe fn(&[f32], &[f32]) -> f32,
    pub(super) dot_rows: unsafe fn(&[f32], &[f32], &mut [f32]),
    pub(super) sum: unsafe fn(&[f32]) -> f32,
    pub(super) max: unsafe fn(&[f32]) -> f32,
    pub(super) rms_norm: unsafe fn(&[f32], &[f32], f32, &mut [f32]),
    pub(super) exp_shifted: unsafe fn(&mut [f32], f32) -> f32,
    pub(super) swiglu: unsafe fn(&[f32], &[f32], &mut [f32]),
    pub(super) axpy: unsafe fn(f32, &[f32], &mut [f32]),
    pub(super) scale: unsafe fn(f32, &mut [f32]),
    pub(super) quantize: unsafe fn(&[f32], &mut [i8], &mut [f32]) -> bool,
    pub(super) rms_norm_here: unsafe fn(&mut [f32], &[f32], f32),
    pub(super) add: unsafe fn(&[f32], &mut [f32]),
    pub(super) add_sums: unsafe fn(&[i64], f32, &mut [f32]),
    pub(super) rotate: unsafe fn(&mut [f32], &[f32], &[f32]),
    pub(super) peak: unsafe fn(&[f32]) -> u32,
    pub(super) tempered: unsafe fn(&[f32], definition::Tempered, &mut [f64]) -> f64,
}

/// Group `g` of a row, zeros past its end.
#[inline(always)]
fn padded_group(x: &[f32], g: usize) -> [f32; GROUP] {
    let rest = &x[g * GROUP..];
    let mut group = [0.0; GROUP];
    match rest.first_chunk() {
        Some(whole) => group = *whole,
        None => group[..rest.len()].copy_from_slice(rest),
    }
    group
}

#[inline(always)]
fn dot_each_row(weights: &[f32], x: &[f32], out: &mut [f32]) {
    for (n, y) in out.iter_mut().enumerate() {
        *y = definition::dot16(&weights[n * x.len()..(n + 1) * x.len()], x);
    }
}

#[inline(always)]
fn swiglu_each(gate: &[f32], up: &[f32], out: &mut [f32]) {
    let n = gate.len().min(up.len()).min(out.len());
    let (gate, up, out) = (&gate[..n], &up[..n], &mut out[..n]);
    for i in 0..n {
        out[i] = definition::swiglu(gate[i], up[i]);
    }
}

#[inline(always)]
fn axpy_each(p: f32, v: &[f32], acc: &mut [f32]) {
    let n = v.len().min(acc.len());
    let (v, acc) = (&v[..n], &mut acc[..n]);
    for i in 0..n {
        acc[i] = p.mul_add(v[i], acc[i]);
    }
}

#[inline(always)]
fn scale_each(p: f32, x: &mut [f32]) {
    for v in x.iter_mut() {
        *v *= p;
    }
}

#[inline(always)]
fn add_each(x: &[f32], to: &mut [f32]) {
    let n = x.len().min(to.len());
    let (x, to) = (&x[..n], &mut to[..n]);
    for i in 0..n {
        to[i] += x[i];
    }
}

#[inline(always)]
fn add_sums_each(sums: &[i64], step: f32, to: &mut [f32]) {
    let n = sums.len().min(to.len());
    let (sums, to) = (&sums[..n], &mut to[..n]);
    for i in 0..n {
        to[i] += sums[i] as f32 * step;
    }
}

/// Turns the pairs `(x[i], x[i + half])`. Two products and a sum, each rounded.
#[inline(always)]
fn rotate_each(x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let half = x.len() / 2;
    let (low, high) = x.split_at_mut(half);
    let (low, high, cos, sin) = (&mut low[..half], &mut high[..half], &cos[..half], &sin[..half]);
    for i in 0..half {
        let (a, b) = (low[i], high[i]);
        low[i] = a * cos[i] - b * sin[i];
        high[i] = b * cos[i] + a * sin[i];
    }
}

/// Largest magnitude as bits, so that NaN counts above infinity.
#[inline(always)]
fn peak_each(x: &[f32]) -> u32 {
    let mut peak = 0u32;
    for v in x {
        peak = peak.max(v.to_bits() & 0x7fff_ffff);
    }
    peak
}

macro_rules! compiled_for {
    ($name:ident, $quantize:path $(, $features:literal)?) => {
        /// The functions above, compiled for one instruction set.
        pub(super) mod $name {
            use super::*;

            compiled_for!(@ ($($features)?)
                pub(in super::super) fn activate(products: GateUp<'_>, slots: &GroupSlots) { activate_rows($quantize, products, slots) }
                fn dot(a: &[f32], b: &[f32]) -> f32 { definition::dot16(a, b) }
                fn dot_rows(weights: &[f32], x: &[f32], out: &mut [f32]) { dot_each_row(weights, x, out) }
                fn sum(x: &[f32]) -> f32 { definition::sum16(x) }
                fn max(x: &[f32]) -> f32 { definition::max16(x) }
                fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) { definition::rms_norm(x, weight, eps, out) }
                fn exp_shifted(x: &mut [f32], max: f32) -> f32 { definition::exp_shifted(x, max) }
                fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) { swiglu_each(gate, up, out) }
                fn axpy(p: f32, v: &[f32], acc: &mut [f32]) { axpy_each(p, v, acc) }
                fn scale(p: f32, x: &mut [f32]) { scale_each(p, x) }
                fn quantize(x: &[f32], values: &mut [i8], scales: &mut [f32]) -> bool {
                    let (values, mut finite) = (values.as_chunks_mut::<GROUP>().0, true);
                    for g in 0..scales.len() {
                        let group = ($quantize)(&padded_group(x, g));
                        values[g] = group.values;
                        scales[g] = group.scale;
                        finite &= group.scale.is_finite();
                    }
                    finite
                }
                fn rms_norm_here(x: &mut [f32], weight: &[f32], eps: f32) { definition::rms_norm_here(x, weight, eps) }
                fn add(x: &[f32], to: &mut [f32]) { add_each(x, to) }
                fn add_sums(sums: &[i64], step: f32, to: &mut [f32]) { add_sums_each(sums, step, to) }
                fn rotate(x: &mut [f32], cos: &[f32], sin: &[f32]) { rotate_each(x, cos, sin) }
                fn peak(x: &[f32]) -> u32 { peak_each(x) }
                fn tempered(logits: &[f32], by: definition::Tempered, out: &mut [f64]) -> f64 { definition::tempered(logits, by, out) }
            );

            /// The row operations of this instruction set.
            pub(in super::super) static ROWS: RowFunctions = RowFunctions {
                dot, dot_rows, sum, max, rms_norm, exp_shifted, swiglu, axpy, scale, quantize, rms_norm_here, add, add_sums,
                rotate, peak, tempered,
            };
        }
    };
    (@ () $($item:item)*) => { $($item)* };
    (@ ($features:literal) $($item:item)*) => { $( #[target_feature(enable = $features)] $item )* };
}

compiled_for!(scalar, definition::quantize_group);
#[cfg(target_arch = "x86_64")]
compiled_for!(avx2, crate::kernel::native::avx2::quantize_group, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
compiled_for!(
    avx512,
    crate::kernel::native::avx512::quantize_group,
    "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
);
#[cfg(target_arch = "aarch64")]
compiled_for!(neon, crate::kernel::native::neon::quantize_group, "neon,dotprod");
