//! Row operations with the bits of the definition, at the speed of the machine: what a forward pass needs beside
//! matrix products.
//!
//! Every operation gives the same bits with every instruction set. Sums use 16 lanes and one tree
//! (`definition`); nothing here allocates. Lengths are checked by panicking on the caller's own mistakes only:
//! no length comes from outside.
#![allow(unsafe_code, reason = "calls through the table, made safe by detection when the table is chosen")]

use super::definition::Tempered;
use super::dots::{self, Dots, DotsFunction};
use super::elementwise::{self, RowFunctions};
use super::isa::Isa;
#[cfg(target_arch = "aarch64")]
use super::neon;
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx512};
use crate::activations::row_bytes;
use crate::format::{Format, GROUP, padded_inputs};

/// A row that holds NaN or infinity, by its index in the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("row {row} holds NaN or infinity: the weights or the numbers before this layer are broken")]
pub struct NonFinite {
    /// Index of the row.
    pub row: usize,
}

type Widen = unsafe fn(&[u16], &mut [f32]);
type Narrow = unsafe fn(&[f32], &mut [u16]);

/// The operations of one instruction set. A few words; copy it where it is needed.
#[derive(Clone, Copy)]
pub struct Ops {
    isa: Isa,
    rows: &'static RowFunctions,
    widen: Widen,
    narrow: Narrow,
    dots: DotsFunction,
}

impl std::fmt::Debug for Ops {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Ops({})", self.isa.name())
    }
}

impl Default for Ops {
    /// The fastest this machine has.
    fn default() -> Ops {
        Ops::of(Isa::best())
    }
}

impl Ops {
    /// The operations of `isa`, or an error if the machine lacks it.
    pub fn new(isa: Isa) -> Result<Ops, String> {
        isa.checked().map(Ops::of)
    }

    /// `isa` is available (of AMX, its AVX-512 part).
    pub(super) fn of(isa: Isa) -> Ops {
        let (rows, widen, narrow): (_, Widen, Narrow) = match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => (&elementwise::avx2::ROWS, avx2::widen_f16, avx2::narrow_f16),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => (&elementwise::avx512::ROWS, avx512::widen_f16, avx512::narrow_f16),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => (&elementwise::neon::ROWS, neon::widen_f16, neon::narrow_f16),
            _ => (&elementwise::scalar::ROWS, super::definition::widen_each, super::definition::narrow_each),
        };
        let dots: DotsFunction = match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => dots::avx2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => dots::avx512,
            _ => dots::portable,
        };
        Ops { isa, rows, widen, narrow, dots }
    }

    /// The instruction set in use.
    pub fn isa(self) -> Isa {
        self.isa
    }

    /// Dot product of two f32 vectors of equal length.
    pub fn dot16(self, a: &[f32], b: &[f32]) -> f32 {
        assert_eq!(a.len(), b.len());
        // SAFETY: `of` was given an instruction set that the machine has. The same holds for every call below.
        unsafe { (self.rows.dot)(a, b) }
    }

    /// `out[n] = dot16(weights[n], x)` for a row-major f32 matrix `[out.len(), x.len()]`: the routing gate.
    pub fn dot16_rows(self, weights: &[f32], x: &[f32], out: &mut [f32]) {
        assert_eq!(weights.len(), x.len() * out.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.dot_rows)(weights, x, out) }
    }

    /// `dot16` of every row with every matrix row.
    pub fn dots(self, task: Dots<'_>, out: &mut [f32]) {
        let Dots { weights, x, inputs, row_step, output_step } = task;
        assert!(inputs > 0 && weights.len().is_multiple_of(inputs) && x.len().is_multiple_of(inputs));
        let (outputs, rows) = (weights.len() / inputs, x.len() / inputs);
        if outputs == 0 || rows == 0 {
            return;
        }
        assert!((rows - 1) * row_step + (outputs - 1) * output_step < out.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.dots)(task, out) }
    }

    /// Sum in 16 lanes.
    pub fn sum16(self, x: &[f32]) -> f32 {
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.sum)(x) }
    }

    /// Largest element; -inf for none, NaN passed over.
    pub fn max(self, x: &[f32]) -> f32 {
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.max)(x) }
    }

    /// RMS norm (Zhang and Sennrich 2019) of one row: `out = x / sqrt(mean(x^2) + eps) * weight`.
    pub fn rms_norm(self, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
        assert!(x.len() == weight.len() && x.len() == out.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.rms_norm)(x, weight, eps, out) }
    }

    /// The same in place.
    pub fn rms_norm_here(self, x: &mut [f32], weight: &[f32], eps: f32) {
        assert_eq!(x.len(), weight.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.rms_norm_here)(x, weight, eps) }
    }

    /// `to[i] += x[i]`.
    pub fn add(self, x: &[f32], to: &mut [f32]) {
        assert_eq!(x.len(), to.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.add)(x, to) }
    }

    /// `to[i] += sums[i] * step`, the sum as f32 first.
    pub fn add_sums(self, sums: &[i64], step: f32, to: &mut [f32]) {
        assert_eq!(sums.len(), to.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.add_sums)(sums, step, to) }
    }

    /// Turns the pairs `(x[i], x[i + half])` by the angles with these cosines and sines, `[half]` each.
    pub fn rotate(self, x: &mut [f32], cos: &[f32], sin: &[f32]) {
        assert!(x.len() == 2 * cos.len() && x.len() == 2 * sin.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.rotate)(x, cos, sin) }
    }

    /// Whether no element is NaN or infinite.
    pub fn is_finite(self, x: &[f32]) -> bool {
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.peak)(x) < f32::INFINITY.to_bits() }
    }

    /// Weights of a tempered softmax into `out` (as many as logits, or none), and their sum in 16 lanes that are
    /// added up in ascending order.
    pub fn tempered(self, logits: &[f32], by: Tempered, out: &mut [f64]) -> f64 {
        assert!(out.is_empty() || out.len() == logits.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.tempered)(logits, by, out) }
    }

    /// Replaces x by `exp(x - max)` and returns the 16-lane sum: one step of a streaming softmax.
    pub fn exp_shifted(self, x: &mut [f32], max: f32) -> f32 {
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.exp_shifted)(x, max) }
    }

    /// Softmax in place: `exp(x - max) * (1 / sum)`. An empty slice stays empty.
    pub fn softmax(self, x: &mut [f32]) {
        let max = self.max(x);
        let sum = self.exp_shifted(x, max);
        self.scale(1.0 / sum, x);
    }

    /// `out = gate / (1 + exp(-gate)) * up`, element by element.
    pub fn swiglu(self, gate: &[f32], up: &[f32], out: &mut [f32]) {
        assert!(gate.len() == up.len() && gate.len() == out.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.swiglu)(gate, up, out) }
    }

    /// `acc[i] = fma(p, v[i], acc[i])`.
    pub fn axpy(self, p: f32, v: &[f32], acc: &mut [f32]) {
        assert_eq!(v.len(), acc.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.axpy)(p, v, acc) }
    }

    /// `x[i] *= p`.
    pub fn scale(self, p: f32, x: &mut [f32]) {
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.scale)(p, x) }
    }

    /// f16 bits to f32, exact.
    pub fn widen_f16(self, x: &[u16], out: &mut [f32]) {
        assert_eq!(x.len(), out.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.widen)(x, out) }
    }

    /// f32 to f16 bits, nearest even; beyond the finite range +-65504; NaN stays NaN.
    pub fn narrow_f16(self, x: &[f32], out: &mut [u16]) {
        assert_eq!(x.len(), out.len());
        // SAFETY: as in `dot16`.
        unsafe { (self.narrow)(x, out) }
    }

    /// Fills a batch of `Activations` of `format` from f32 rows of `inputs`, row-major. `bytes` holds
    /// `rows * row_bytes(format, inputs)`; padding becomes zero. A row with NaN or infinity is refused.
    pub fn fill_rows(
        self,
        format: Format,
        inputs: usize,
        rows: &[f32],
        bytes: &mut [u8],
    ) -> Result<(), NonFinite> {
        let stride = row_bytes(format, inputs);
        assert!(
            inputs > 0 && rows.len().is_multiple_of(inputs) && bytes.len() == rows.len() / inputs * stride
        );
        for (row, (x, to)) in rows.chunks_exact(inputs).zip(bytes.chunks_exact_mut(stride)).enumerate() {
            if !self.fill_row(format, x, to) {
                return Err(NonFinite { row });
            }
        }
        Ok(())
    }

    /// Fills one row of `row_bytes(format, x.len())`. False if it holds NaN or infinity.
    pub fn fill_row(self, format: Format, x: &[f32], to: &mut [u8]) -> bool {
        assert_eq!(to.len(), row_bytes(format, x.len()));
        if format.is_quantized() { self.quantize(x, to) } else { self.copy_row(x, to) }
    }

    /// Copies a row of f32 and zeroes the rest. Whether all values are finite.
    fn copy_row(self, x: &[f32], to: &mut [u8]) -> bool {
        let (row, padding) = to.split_at_mut(x.len() * 4);
        row.copy_from_slice(bytemuck::cast_slice(x));
        padding.fill(0);
        self.is_finite(x)
    }

    fn quantize(self, x: &[f32], to: &mut [u8]) -> bool {
        let padded = padded_inputs(x.len());
        let (values, rest) = to.split_at_mut(padded);
        let (scales, padding) = rest.split_at_mut(padded / GROUP * 4);
        padding.fill(0);
        // SAFETY: as in `dot16`.
        unsafe { (self.rows.quantize)(x, bytemuck::cast_slice_mut(values), bytemuck::cast_slice_mut(scales)) }
    }
}

#[cfg(test)]
mod tests;
