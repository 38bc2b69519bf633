//! Loaded matrices and experts of the libtorch backend.
//!
//! A call's rows become one bf16 tensor on the device, once. Experts run one after the other, each with all its rows
//! in one product per matrix; on a device the results of all of them come back in one copy. Then every
//! assignment's output is rounded into the integer sums, as in native.
#![allow(unsafe_code, reason = "results are read where libtorch put them")]

use std::sync::{Arc, Mutex};

use tch::{Device, Kind, TchError, Tensor};

use super::product::{Product, Shop, lock};
use super::unpack::Packed;
use super::widen::{add_rounded, narrow, single, widen, widen_row};
use crate::activations::Activations;
use crate::format::{Format, padded_inputs, padded_outputs};
use crate::kernel::call::{Expected, beyond_f32, check_call, check_product, may_overflow};
use crate::kernel::native::definition::WIDE_LIMIT;
use crate::kernel::{Assignment, KernelError, LayerExperts, Linear, PartialSums};
use crate::packed::PackedExpert;

/// Rows as a bf16 tensor `[rows, padded inputs]` on the device.
fn rows_tensor(shop: &Shop, x: &Activations<'_>) -> Result<Tensor, TchError> {
    let width = padded_inputs(x.inputs());
    let mut values = vec![0u16; x.rows() * width];
    for (row, out) in values.chunks_exact_mut(width).enumerate() {
        if x.format().is_quantized() {
            let (values, scales) = x.quantized(row);
            widen_row(values, scales, out);
        } else {
            narrow(x.values(row), out);
        }
    }
    let size = [x.rows() as i64, width as i64];
    let rows = Tensor::f_from_data_size(bytemuck::cast_slice(&values), &size, Kind::BFloat16)?;
    if shop.place.remote { rows.f_to_device(shop.place.device) } else { Ok(rows) }
}

/// Hands out the bf16 values of `y`, row-major.
fn with_values<T>(y: &Tensor, read: impl FnOnce(&[u16]) -> T) -> Result<T, TchError> {
    let y = y.f_to_device(Device::Cpu)?.f_to_kind(Kind::BFloat16)?.f_contiguous()?;
    // SAFETY: a contiguous bf16 tensor in main memory holds `numel` values at `data_ptr`; `y` lives until `read` is done.
    let values = unsafe { std::slice::from_raw_parts(y.data_ptr().cast::<u16>().cast_const(), y.numel()) };
    Ok(read(values))
}

/// Bytes that a call takes on the device while it runs: rows in and out, and what lies between.
fn call_bytes(rows: usize, widths: &[usize]) -> u64 {
    widths.iter().map(|width| (rows * width * 2) as u64).sum()
}

#[derive(Debug)]
pub(super) struct TorchLinear {
    pub(super) shop: Arc<Shop>,
    pub(super) format: Format,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    /// A tensor may be used by one thread at a time.
    pub(super) weights: Mutex<Product>,
}

impl Linear for TorchLinear {
    fn outputs(&self) -> usize {
        self.outputs
    }

    fn apply(&self, x: Activations<'_>, y: &mut [f32]) -> Result<(), KernelError> {
        check_product(self.format, (self.outputs, self.inputs), &x, y.len())?;
        if x.rows() == 0 {
            return Ok(());
        }
        let padded = padded_outputs(self.outputs);
        let what = format!("a product of {} rows with {} x {}", x.rows(), self.outputs, self.inputs);
        let bytes = call_bytes(x.rows(), &[self.inputs, padded]);
        let _memory = self.shop.place.reserve(bytes, &what)?;
        let product = lock(&self.weights);
        let result = rows_tensor(&self.shop, &x).and_then(|x| product.apply(&x, &Ok)).and_then(|result| {
            with_values(&result, |values| {
                for (from, to) in values.chunks_exact(padded).zip(y.chunks_exact_mut(self.outputs)) {
                    widen(from, to);
                }
            })
        });
        result.map_err(|error| self.shop.place.failed(&error, bytes, &what))
    }
}

/// One expert: gate and up as one matrix, then down.
#[derive(Debug)]
pub(super) struct TorchExpert {
    gate_up: Product,
    down: Product,
}

/// `silu(gate) * up` of a piece whose first half is gate.
fn activate(y: Tensor) -> Result<Tensor, TchError> {
    let half = y.size2()?.1 / 2;
    y.f_narrow(1, 0, half)?.f_silu()?.f_mul(&y.f_narrow(1, half, half)?)
}

impl TorchExpert {
    pub(super) fn new(
        shop: &Arc<Shop>,
        index: u16,
        expert: &PackedExpert,
    ) -> Result<TorchExpert, KernelError> {
        let PackedExpert { format, hidden, inter, ref bytes } = *expert;
        let padded = padded_inputs(inter);
        let first = format.matrix_bytes(2 * padded, hidden);
        let parts = bytes.slice(0, first).zip(bytes.slice(first, format.matrix_bytes(hidden, inter)));
        let what = format!("expert {index} of {hidden} x {inter} in {format}");
        let Some((gate_up, down)) =
            parts.filter(|_| bytes.len() == format.expert_bytes(hidden, inter) && hidden > 0 && inter > 0)
        else {
            return Err(KernelError::Weights(format!(
                "{what} has {} bytes: pack the model again",
                bytes.len()
            )));
        };
        let inputs = padded_inputs(hidden);
        let gate_up = Packed { format, outputs: 2 * padded, inputs, paired: true, bytes: gate_up };
        let outputs = padded_outputs(hidden);
        let down = Packed { format, outputs, inputs: padded, paired: false, bytes: down };
        Ok(TorchExpert {
            gate_up: Product::new(shop, gate_up, &what)?,
            down: Product::new(shop, down, &what)?,
        })
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor, TchError> {
        self.down.apply(&self.gate_up.apply(x, &activate)?, &Ok)
    }
}

/// Takes one assignment and its expert's output, bf16 `[hidden]`, before the weight.
type TakeOutput<'a> = &'a mut dyn FnMut(&Assignment, &[u16]) -> Result<(), KernelError>;

#[derive(Debug)]
pub(super) struct TorchExperts {
    pub(super) shop: Arc<Shop>,
    pub(super) format: Format,
    pub(super) hidden: usize,
    /// Of the widest: some may be slices.
    pub(super) inter: usize,
    /// `2^-step_log2`.
    pub(super) scale: f32,
    pub(super) experts: Vec<Option<Mutex<TorchExpert>>>,
}

impl TorchExperts {
    fn expert(&self, index: u16) -> Option<&Mutex<TorchExpert>> {
        self.experts.get(usize::from(index)).and_then(Option::as_ref)
    }

    /// Runs every expert once, with all its rows, and hands each assignment's output to `take`.
    fn for_each(
        &self,
        x: &Activations<'_>,
        assignments: &[Assignment],
        take: TakeOutput<'_>,
    ) -> Result<(), KernelError> {
        let expected = Expected { format: self.format, hidden: self.hidden, holds: &|e| self.holds(e) };
        check_call(expected, x, assignments)?;
        if assignments.is_empty() {
            return Ok(());
        }
        let mut sorted = assignments.to_vec();
        sorted.sort_by_key(|a| (a.expert, a.row));
        let most = sorted.chunk_by(|a, b| a.expert == b.expert).map(<[_]>::len).max().unwrap_or(0);
        let outputs = if self.shop.place.remote { sorted.len() } else { most };
        let bytes = call_bytes(x.rows(), &[self.hidden])
            + call_bytes(most, &[self.hidden, 3 * self.inter])
            + call_bytes(outputs, &[self.hidden]);
        let what = format!("a call of {} rows for {} assignments", x.rows(), sorted.len());
        let _memory = self.shop.place.reserve(bytes, &what)?;
        let failed = |error: TchError| self.shop.place.failed(&error, bytes, &what);
        let rows = rows_tensor(&self.shop, x).map_err(failed)?;
        let mut waiting = Vec::new();
        for run in sorted.chunk_by(|a, b| a.expert == b.expert) {
            let Some(expert) = self.expert(run[0].expert) else { continue };
            let y = chosen(&rows, run).and_then(|x| lock(expert).apply(&x)).map_err(failed)?;
            if self.shop.place.remote {
                waiting.push(y);
            } else {
                self.hand_out(run, &y, take)?;
            }
        }
        if waiting.is_empty() {
            return Ok(());
        }
        let all = Tensor::f_cat(&waiting, 0).map_err(failed)?;
        self.hand_out(&sorted, &all, take)
    }

    /// `y`: one row of padded outputs per assignment.
    fn hand_out(&self, run: &[Assignment], y: &Tensor, take: TakeOutput<'_>) -> Result<(), KernelError> {
        let width = padded_outputs(self.hidden);
        with_values(y, |values| {
            let mut rows = run.iter().zip(values.chunks_exact(width));
            rows.try_for_each(|(a, y)| take(a, &y[..self.hidden]))
        })
        .map_err(|error| self.shop.place.failed(&error, call_bytes(run.len(), &[width]), "a result"))?
    }
}

/// The rows of one expert, on the device.
fn chosen(rows: &Tensor, run: &[Assignment]) -> Result<Tensor, TchError> {
    let first = i64::from(run[0].row);
    if run.iter().enumerate().all(|(i, a)| i64::from(a.row) == first + i as i64) {
        return rows.f_narrow(0, first, run.len() as i64);
    }
    let index: Vec<i64> = run.iter().map(|a| i64::from(a.row)).collect();
    rows.f_index_select(0, &Tensor::f_from_slice(&index)?.f_to_device(rows.device())?)
}

impl LayerExperts for TorchExperts {
    fn holds(&self, index: u16) -> bool {
        self.expert(index).is_some()
    }

    fn run(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut PartialSums,
    ) -> Result<(), KernelError> {
        out.reset(x.rows(), x.inputs());
        let mut bounds = vec![(0u32, 0u32); x.rows()];
        self.for_each(&x, assignments, &mut |a, y| {
            let row = a.row as usize;
            let sums = &mut out.sums[row * self.hidden..(row + 1) * self.hidden];
            let (peak, count) = &mut bounds[row];
            *count += 1;
            *peak = (*peak).max(add_rounded(y, a.weight, self.scale, sums));
            Ok(())
        })?;
        for (row, (peak, count)) in bounds.into_iter().enumerate() {
            if may_overflow(peak, count) {
                out.overflowed[row] = true;
                out.sums[row * self.hidden..(row + 1) * self.hidden].fill(0);
            }
        }
        Ok(())
    }

    fn run_wide(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut Vec<i64>,
    ) -> Result<(), KernelError> {
        out.clear();
        out.resize(x.rows() * x.inputs(), 0);
        self.for_each(&x, assignments, &mut |a, y| {
            let row = a.row as usize;
            for (sum, y) in out[row * self.hidden..(row + 1) * self.hidden].iter_mut().zip(y) {
                let v = single(*y) * a.weight * self.scale;
                if v.is_nan() {
                    return Err(beyond_f32(a));
                }
                let v = f64::from(v).round_ties_even().clamp(-WIDE_LIMIT, WIDE_LIMIT);
                *sum = sum.saturating_add(v as i64);
            }
            Ok(())
        })
    }
}
