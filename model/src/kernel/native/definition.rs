//! The bits: what every instruction set must compute, one value at a time.
//!
//! Problem: replies of replicas, failover and batching are exact only if every machine rounds alike. Idea: the
//! few operations that round (activation quantizer, `exp`, SwiGLU, 16-lane sums, the combine step) are written
//! once, here, in plain Rust; rustc never contracts or reassociates, so compiling the same source with wider
//! registers gives the same bits. Price: no approximate reciprocals, no library `exp`, one fixed order of every
//! sum. Each function is `inline(always)`, so that it takes on the target features of its caller.
//!
//! Refuses: NaN and infinity in activations (an error that names the row, at the caller).

use crate::format::GROUP;

/// Lanes of every f32 sum: element i belongs to lane i mod 16, whatever the register width.
pub const LANES: usize = 16;

/// Groups whose largest magnitude lies below this become zero. Above it, neither the scale nor the products can
/// be subnormal where it matters, so flush-to-zero modes cannot change a bit. In f32: 2^-64.
pub const QUIET: f32 = f32::from_bits((127 - 64) << 23);

/// Largest finite f16.
pub const F16_MAX: f32 = 65504.0;

/// Saturation of one addend in the wide (i64) combine: 2^52, so that 2^11 addends cannot overflow i64 and the
/// value is exact as f64.
pub const WIDE_LIMIT: f64 = (1u64 << 52) as f64;

/// One group of 32 activations as int8.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QuantizedGroup {
    /// Values, -127..=127.
    pub values: [i8; GROUP],
    /// `amax / 127`, or 0 for a quiet group, or NaN for a group that holds NaN or infinity.
    pub scale: f32,
    /// Sum of the values.
    pub sum: i32,
}

impl QuantizedGroup {
    /// All zeros.
    #[inline(always)]
    pub fn quiet() -> QuantizedGroup {
        QuantizedGroup { values: [0; GROUP], scale: 0.0, sum: 0 }
    }
}

/// The largest magnitude of a group, from the largest of its bit patterns without sign.
///
/// # Errors
/// The whole group where nothing is left to compute: one that holds NaN or infinity, one that is quiet.
#[inline(always)]
pub fn amax(peak: u32) -> Result<f32, QuantizedGroup> {
    if peak >= f32::INFINITY.to_bits() {
        return Err(QuantizedGroup { scale: f32::NAN, ..QuantizedGroup::quiet() });
    }
    let amax = f32::from_bits(peak);
    if amax < QUIET { Err(QuantizedGroup::quiet()) } else { Ok(amax) }
}

/// Quantizes one group: `scale = amax / 127`, `q = rne(x * (127 / amax))`, both divisions IEEE. `amax` is taken
/// over bit patterns, which orders NaN above infinity above finite and does not depend on the order. No clamp is
/// needed: `x * (127 / amax)` rounds to at most 127.
#[inline(always)]
pub fn quantize_group(x: &[f32; GROUP]) -> QuantizedGroup {
    let mut peak = 0u32;
    for v in x {
        peak = peak.max(v.to_bits() & 0x7fff_ffff);
    }
    let amax = match amax(peak) {
        Ok(amax) => amax,
        Err(whole) => return whole,
    };
    let mut out = QuantizedGroup::quiet();
    let inverse = 127.0 / amax;
    for i in 0..GROUP {
        let v = nearest(x[i] * inverse);
        out.values[i] = v as i8;
        out.sum += v;
    }
    out.scale = amax / 127.0;
    out
}

/// Nearest integer, ties to even, of a value known to lie far inside i32 (and never NaN).
#[inline(always)]
fn nearest(x: f32) -> i32 {
    debug_assert!(x.abs() < 1e9);
    // Adding 1.5 * 2^23 leaves the rounded integer in the low bits for |x| < 2^22: round to nearest even is the
    // mode of the addition itself, and it compiles to one vector instruction on every target.
    let magic = 12_582_912.0f32;
    (x + magic).to_bits() as i32 - magic.to_bits() as i32
}

/// `e^x` with relative error below 7.4e-8, for x clamped to [-86, 88] (NaN becomes -86): Cephes `expf` with
/// fused multiply-adds. The result is never subnormal.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let x = if x > -86.0 { x } else { -86.0 };
    let x = if x < 88.0 { x } else { 88.0 };
    let n = nearest(x * std::f32::consts::LOG2_E);
    let k = n as f32;
    let r = k.mul_add(-0.693_359_4, x);
    let r = k.mul_add(2.121_944_4e-4, r);
    let mut p = 1.987_569_2e-4f32;
    for c in [1.398_2e-3f32, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5, 1.0, 1.0] {
        p = p.mul_add(r, c);
    }
    p * f32::from_bits(((n + 127) << 23) as u32)
}

/// `silu(gate) * up`: `gate / (1 + exp(-gate)) * up`.
#[inline(always)]
pub fn swiglu(gate: f32, up: f32) -> f32 {
    gate / (1.0 + exp(-gate)) * up
}

/// `1 / (1 + exp(-x))`.
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// One addend of the combine before rounding: `(y * weight) * scale`, where `scale` is the power of two
/// `2^-step_log2`. Two products, in this order.
#[inline(always)]
pub fn combine_term(y: f32, weight: f32, scale: f32) -> f32 {
    (y * weight) * scale
}

/// The one reduction tree of 16 lanes: halves are added, 8, 4, 2, 1.
#[inline(always)]
pub fn reduce(mut lanes: [f32; LANES]) -> f32 {
    for i in 0..8 {
        lanes[i] += lanes[i + 8];
    }
    for i in 0..4 {
        lanes[i] += lanes[i + 4];
    }
    (lanes[0] + lanes[2]) + (lanes[1] + lanes[3])
}

/// The 16 values from `at` on, zeros past the end.
#[inline(always)]
fn tail(x: &[f32]) -> [f32; LANES] {
    let mut out = [0.0; LANES];
    out[..x.len()].copy_from_slice(x);
    out
}

/// Sum of `x`: 16 lanes, then the tree.
#[inline(always)]
pub fn sum16(x: &[f32]) -> f32 {
    let (chunks, rest) = x.as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for c in chunks {
        for i in 0..LANES {
            lanes[i] += c[i];
        }
    }
    let c = tail(rest);
    for i in 0..LANES {
        lanes[i] += c[i];
    }
    reduce(lanes)
}

/// Dot product: lane i takes elements i, i + 16, ... by fma from +0, then the tree. The shorter length counts.
#[inline(always)]
pub fn dot16(a: &[f32], b: &[f32]) -> f32 {
    let n = a.len().min(b.len());
    let (ac, ar) = a[..n].as_chunks::<LANES>();
    let (bc, br) = b[..n].as_chunks::<LANES>();
    let mut lanes = [0.0f32; LANES];
    for c in 0..ac.len() {
        let (x, y) = (&ac[c], &bc[c]);
        for i in 0..LANES {
            lanes[i] = x[i].mul_add(y[i], lanes[i]);
        }
    }
    let (x, y) = (tail(ar), tail(br));
    for i in 0..LANES {
        lanes[i] = x[i].mul_add(y[i], lanes[i]);
    }
    reduce(lanes)
}

/// RMS norm: `out = (x * inv) * weight` with `inv = 1 / sqrt(sum16(x^2) / n + eps)`, all IEEE.
#[inline(always)]
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let mean = dot16(x, x) / x.len() as f32;
    let inverse = 1.0 / (mean + eps).sqrt();
    let n = x.len().min(weight.len()).min(out.len());
    let (x, weight, out) = (&x[..n], &weight[..n], &mut out[..n]);
    for i in 0..n {
        out[i] = (x[i] * inverse) * weight[i];
    }
}

/// The same in place.
#[inline(always)]
pub fn rms_norm_here(x: &mut [f32], weight: &[f32], eps: f32) {
    let mean = dot16(x, x) / x.len() as f32;
    let inverse = 1.0 / (mean + eps).sqrt();
    let n = x.len().min(weight.len());
    let (x, weight) = (&mut x[..n], &weight[..n]);
    for i in 0..n {
        x[i] = (x[i] * inverse) * weight[i];
    }
}

/// Replaces every x by `exp(x - max)` and returns the 16-lane sum of the results.
#[inline(always)]
pub fn exp_shifted(x: &mut [f32], max: f32) -> f32 {
    for v in x.iter_mut() {
        *v = exp(*v - max);
    }
    sum16(x)
}

/// Largest element; -inf for an empty slice. NaN elements are passed over.
#[inline(always)]
pub fn max16(x: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for c in chunks {
        for i in 0..LANES {
            lanes[i] = if c[i] > lanes[i] { c[i] } else { lanes[i] };
        }
    }
    let mut max = f32::NEG_INFINITY;
    for v in lanes.iter().chain(rest) {
        max = if *v > max { *v } else { max };
    }
    max
}

/// `e^x` for `x <= 0` in f64, for sampling: `2^n * p(r)` with `r = x - n ln 2` and a Taylor polynomial of degree 13 by
/// Horner's rule, multiplications and additions only (error below 4e-16 relative). Below -700 it is 0: 1e-304 of the
/// best token's probability, never drawn in practice, and above the subnormal numbers whose handling differs between
/// floating-point modes.
#[inline(always)]
pub fn exp_f64(x: f64) -> f64 {
    const FLOOR: f64 = -700.0;
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    /// 1.5 * 2^52: adding and subtracting it rounds to the nearest integer.
    const ROUNDER: f64 = 6_755_399_441_055_744.0;
    let clamped = if x > FLOOR { x } else { FLOOR };
    let shifted = clamped * std::f64::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = INVERSE_FACTORIALS[0];
    for coefficient in &INVERSE_FACTORIALS[1..] {
        p = p * r + coefficient;
    }
    // The low bits of `shifted` hold n in two's complement.
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x > FLOOR { p * power } else { 0.0 }
}

/// 1/13! down to 1/0!.
const INVERSE_FACTORIALS: [f64; 14] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

/// A softmax before it is divided by its sum, as sampling takes it.
#[derive(Clone, Copy, Debug)]
pub struct Tempered {
    /// The highest logit.
    pub highest: f64,
    /// Above 0.
    pub temperature: f64,
}

impl Tempered {
    /// `exp((logit - highest) / temperature)`.
    #[inline(always)]
    pub fn weight(self, logit: f32) -> f64 {
        exp_f64((f64::from(logit) - self.highest) / self.temperature)
    }
}

/// Values per pass of `tempered`: they stay in the first cache level. A multiple of the lanes.
const TEMPERED_BLOCK: usize = 256;

/// Weights of all logits, and their sum in 16 lanes that are added up in ascending order. `out` holds as many
/// values as `logits`, or none: then only the sum is wanted.
#[inline(always)]
pub fn tempered(logits: &[f32], by: Tempered, out: &mut [f64]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    let mut first = 0;
    while first < logits.len() {
        let len = if logits.len() - first < TEMPERED_BLOCK { logits.len() - first } else { TEMPERED_BLOCK };
        let (part, mut block) = (&logits[first..first + len], [0.0f64; TEMPERED_BLOCK]);
        let weights = &mut block[..len];
        for i in 0..len {
            weights[i] = by.weight(part[i]);
        }
        if !out.is_empty() {
            out[first..first + len].copy_from_slice(weights);
        }
        // Past the end are zeros, which change no sum.
        for c in block.as_chunks::<LANES>().0 {
            for i in 0..LANES {
                lanes[i] += c[i];
            }
        }
        first += len;
    }
    let mut sum = 0.0;
    for lane in lanes {
        sum += lane;
    }
    sum
}

/// f32 to f16, nearest even, beyond the finite range to +-65504; NaN stays NaN. The definition in integers;
/// F16C gives the same bits.
#[inline(always)]
pub fn narrow_f16(x: f32) -> u16 {
    let x = if x > F16_MAX { F16_MAX } else { x };
    let x = if x < -F16_MAX { -F16_MAX } else { x };
    let bits = x.to_bits();
    let sign = (bits >> 16) as u16 & 0x8000;
    let magnitude = bits & 0x7fff_ffff;
    if magnitude > 0x7f80_0000 {
        return sign | 0x7e00 | (bits >> 13) as u16 & 0x1ff;
    }
    if magnitude < 0x3880_0000 {
        // Below 2^-14 the result is subnormal: adding 0.5 aligns its unit (2^-24) with the last bit of the sum.
        let aligned = f32::from_bits(magnitude) + 0.5;
        return sign | (aligned.to_bits() - 0x3f00_0000) as u16;
    }
    let even = (magnitude >> 13) & 1;
    sign | ((magnitude - 0x3800_0000 + 0xfff + even) >> 13) as u16
}

/// f16 bits to f32, exact.
#[inline(always)]
pub fn widen_f16(x: u16) -> f32 {
    let sign = ((x & 0x8000) as u32) << 16;
    let magnitude = (x & 0x7fff) as u32;
    if magnitude >= 0x7c00 {
        // F16C makes a signalling NaN quiet.
        let quiet = if magnitude > 0x7c00 { 0x0040_0000 } else { 0 };
        return f32::from_bits(sign | 0x7f80_0000 | quiet | (magnitude & 0x3ff) << 13);
    }
    if magnitude < 0x400 {
        let value = magnitude as f32 * f32::from_bits((127 - 24) << 23);
        return f32::from_bits(sign | value.to_bits());
    }
    f32::from_bits(sign | ((magnitude << 13) + 0x3800_0000))
}

/// bf16 bits to f32, exact.
#[inline(always)]
pub fn widen_bf16(x: u16) -> f32 {
    f32::from_bits((x as u32) << 16)
}

/// f16 to f32, portably.
pub(super) fn widen_each(x: &[u16], out: &mut [f32]) {
    for (x, out) in x.iter().zip(out) {
        *out = widen_f16(*x);
    }
}

/// f32 to f16, portably.
pub(super) fn narrow_each(x: &[f32], out: &mut [u16]) {
    for (x, out) in x.iter().zip(out) {
        *out = narrow_f16(*x);
    }
}
