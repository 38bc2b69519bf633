//! The libtorch backend: the same products through tch operators, equal to native within tolerance.
//!
//! For GPUs, for machines whose libtorch is faster at many rows, and as an independent check of native. One
//! matrix product per expert and phase, whatever the number of rows; gate and up are one matrix. Operators, on the
//! CPU: bf16 matmul; q8 `_weight_int8pack_mm`, which knows one scale per output, so weights are requantized
//! per output at load; q4 `_weight_int4pack_mm_for_cpu` with groups of 32, canonical nibbles repacked at load. On
//! other devices all formats become bf16 at load (2 bytes per weight) and use matmul.
//!
//! Price: activations are not quantized between the two phases and products round to bf16 or f32 in libtorch's
//! order, so sums differ from native (`TOLERANCE`) and from machine to machine: `exact` is false. Results are
//! rounded to the combine step and join the same integer sum. Number of threads is global to libtorch.
//! Refuses: devices that libtorch does not find; nothing here panics, every operator's error is returned.
#![allow(unsafe_code, reason = "bf16 weights are viewed, not copied")]

mod unpack;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, TchError, Tensor};

use self::unpack::{Wide, dequantize_row, unpack};
use super::call::{Expected, beyond_f32, check_call, check_product, may_overflow};
use super::{Assignment, KernelError, Kernels, LayerExperts, Linear, PartialSums};
use crate::activations::Activations;
use crate::format::{BLOCK_OUTPUTS, Format, GROUP, padded_inputs, padded_outputs};
use crate::packed::{PackedExpert, PackedMatrix};
use crate::region::Bytes;

/// Root mean square difference from native over the root mean square of native, per format in the order of
/// `Format as usize`, on well-scaled weights and rows. bf16: results rounded to 8 bits twice. q8: one scale per
/// output instead of one per 32 inputs, and native's int8 activations. q4: native's int8 activations.
pub const TOLERANCE: [f64; 3] = [0.008, 0.025, 0.02];

/// Addends saturate here in the wide sums, as in native.
const WIDE_LIMIT: f64 = super::native::definition::WIDE_LIMIT;

/// The `innerKTiles` argument of the int4 repacking, which the CPU ignores but checks.
const INNER_K_TILES: i64 = 2;

/// How to run.
#[derive(Clone, Debug)]
pub struct LibtorchConfig {
    /// `cpu`, `cuda`, `cuda:N` or `mps`.
    pub device: String,
    /// Threads of libtorch's operators; global to the process.
    pub threads: usize,
}

/// The libtorch backend.
#[derive(Debug)]
pub struct Libtorch {
    device: Device,
    name: String,
}

fn failed(error: TchError) -> KernelError {
    KernelError::Backend { backend: "libtorch", reason: error.to_string() }
}

fn refused(reason: String) -> KernelError {
    KernelError::Backend { backend: "libtorch", reason }
}

fn parse_device(name: &str) -> Result<Device, KernelError> {
    let no_cuda = || refused(format!("device '{name}': libtorch finds no such GPU; use cpu"));
    match name.split_once(':').unwrap_or((name, "0")) {
        ("cpu", _) => Ok(Device::Cpu),
        ("mps", _) if tch::utils::has_mps() => Ok(Device::Mps),
        ("mps", _) => Err(refused("device 'mps': this libtorch has no Metal support; use cpu".to_owned())),
        ("cuda", index) => {
            let count = usize::try_from(tch::Cuda::device_count()).unwrap_or(0);
            let index: usize = index.parse().map_err(|_| no_cuda())?;
            if index < count { Ok(Device::Cuda(index)) } else { Err(no_cuda()) }
        }
        _ => Err(refused(format!("unknown device '{name}': use cpu, cuda, cuda:N or mps"))),
    }
}

impl Libtorch {
    /// Opens the device.
    pub fn new(config: &LibtorchConfig) -> Result<Libtorch, KernelError> {
        let device = parse_device(&config.device)?;
        let threads = i32::try_from(config.threads).ok().filter(|threads| *threads > 0);
        let threads =
            threads.ok_or_else(|| refused(format!("{} threads: give at least 1", config.threads)))?;
        tch::set_num_threads(threads);
        Ok(Libtorch { device, name: config.device.clone() })
    }
}

impl Kernels for Libtorch {
    fn name(&self) -> &'static str {
        "libtorch"
    }

    fn isa(&self) -> String {
        self.name.clone()
    }

    fn exact(&self) -> bool {
        false
    }

    fn linear(&self, matrix: PackedMatrix) -> Result<Box<dyn Linear>, KernelError> {
        let PackedMatrix { format, outputs, inputs, bytes } = matrix;
        if bytes.len() != format.matrix_bytes(outputs, inputs) || outputs == 0 || inputs == 0 {
            return Err(KernelError::Weights(format!(
                "matrix of {outputs} x {inputs} in {format} has {} bytes: pack the model again",
                bytes.len()
            )));
        }
        let shape = (padded_outputs(outputs), padded_inputs(inputs));
        let weights = Mutex::new(Product::new(self.device, format, shape, bytes)?);
        Ok(Box::new(TorchLinear { format, outputs, inputs, weights }))
    }

    fn experts(
        &self,
        experts: Vec<(u16, PackedExpert)>,
        step_log2: i8,
    ) -> Result<Arc<dyn LayerExperts>, KernelError> {
        let (format, hidden) = experts.first().map_or((Format::Q8, 0), |(_, e)| (e.format, e.hidden));
        let mut held: Vec<Option<Mutex<TorchExpert>>> = Vec::new();
        for (index, expert) in experts {
            if expert.format != format || expert.hidden != hidden {
                return Err(KernelError::Weights(format!(
                    "expert {index} is of width {} in {} beside experts of width {hidden} in {format}",
                    expert.hidden, expert.format
                )));
            }
            let slot = usize::from(index);
            if held.len() <= slot {
                held.resize_with(slot + 1, || None);
            }
            let loaded = TorchExpert::new(self.device, index, &expert)?;
            if held[slot].replace(Mutex::new(loaded)).is_some() {
                return Err(KernelError::Weights(format!("expert {index} was given twice")));
            }
        }
        let scale = 2.0f32.powi(-i32::from(step_log2));
        Ok(Arc::new(TorchExperts { format, hidden, scale, experts: held }))
    }
}

/// One matrix in the form its operator takes.
#[derive(Debug)]
enum Weights {
    /// bf16 `[outputs, inputs]`. On the CPU a view of `_bytes`.
    Dense { weights: Tensor, _bytes: Option<Bytes> },
    /// int8 `[outputs, inputs]` and one bf16 scale per output.
    Int8 { weights: Tensor, scales: Tensor },
    /// Repacked nibbles, and `[inputs / 32, outputs, 2]` scales and zeros.
    Int4 { weights: Tensor, scales: Tensor },
}

/// A matrix that multiplies.
#[derive(Debug)]
struct Product {
    device: Device,
    weights: Weights,
}

impl Product {
    /// `shape` is padded; `bytes` is the packed matrix.
    fn new(
        device: Device,
        format: Format,
        shape: (usize, usize),
        bytes: Bytes,
    ) -> Result<Product, KernelError> {
        let size = [shape.0 as i64, shape.1 as i64];
        let weights = match (format, device) {
            (Format::Bf16, Device::Cpu) => Product::view(size, bytes),
            (Format::Bf16, _) => Tensor::f_from_data_size(&bytes, &size, Kind::BFloat16)
                .and_then(|weights| weights.f_to_device(device))
                .map(|weights| Weights::Dense { weights, _bytes: None }),
            (Format::Q8, Device::Cpu) => Product::int8(size, &unpack(format, shape, &bytes)),
            (Format::Q4, Device::Cpu) => Product::int4(size, &unpack(format, shape, &bytes)),
            (Format::Q8 | Format::Q4, _) => Product::dense(device, size, &unpack(format, shape, &bytes)),
        };
        Ok(Product { device, weights: weights.map_err(failed)? })
    }

    fn view(size: [i64; 2], bytes: Bytes) -> Result<Weights, TchError> {
        let strides = [size[1], 1];
        // SAFETY: `bytes` holds outputs x inputs bf16 values (its length was checked), never changes, and is kept
        // beside the tensor, which nothing writes to.
        let weights =
            unsafe { Tensor::f_from_blob(bytes.as_ptr(), &size, &strides, Kind::BFloat16, Device::Cpu)? };
        Ok(Weights::Dense { weights, _bytes: Some(bytes) })
    }

    fn int8(size: [i64; 2], wide: &Wide) -> Result<Weights, TchError> {
        let (values, scales) = wide.per_output();
        let weights = Tensor::f_from_slice(&values)?.f_view_(size)?;
        let scales = Tensor::f_from_slice(&scales)?.f_to_kind(Kind::BFloat16)?;
        Ok(Weights::Int8 { weights, scales })
    }

    fn int4(size: [i64; 2], wide: &Wide) -> Result<Weights, TchError> {
        let nibbles: Vec<i32> = wide.values.iter().map(|v| i32::from(*v) + 8).collect();
        let weights = Tensor::f_from_slice(&nibbles)?
            .f_view_(size)?
            .f_internal_convert_weight_to_int4pack_for_cpu(INNER_K_TILES)?;
        let groups = size[1] / GROUP as i64;
        let scales = Tensor::f_from_slice(&wide.scales)?.f_view_([size[0], groups])?.f_tr()?;
        let zeros = scales.f_zeros_like()?;
        let scales = Tensor::f_stack(&[scales, zeros], 2)?.f_to_kind(Kind::BFloat16)?.f_contiguous()?;
        Ok(Weights::Int4 { weights, scales })
    }

    fn dense(device: Device, size: [i64; 2], wide: &Wide) -> Result<Weights, TchError> {
        let weights = Tensor::f_from_slice(&wide.floats())?
            .f_view_(size)?
            .f_to_kind(Kind::BFloat16)?
            .f_to_device(device)?;
        Ok(Weights::Dense { weights, _bytes: None })
    }

    /// `x` is bf16 `[rows, inputs]` on the device; the result is bf16 `[rows, outputs]`.
    fn apply(&self, x: &Tensor) -> Result<Tensor, TchError> {
        match &self.weights {
            Weights::Dense { weights, .. } => x.f_matmul(&weights.f_tr()?),
            Weights::Int8 { weights, scales } => x.f_internal_weight_int8pack_mm(weights, scales),
            Weights::Int4 { weights, scales } => {
                x.f_internal_weight_int4pack_mm_for_cpu(weights, GROUP as i64, scales)
            }
        }
    }
}

/// Rows as a bf16 tensor `[rows, padded inputs]` on `device`.
fn rows_tensor(
    device: Device,
    x: &Activations<'_>,
    rows: impl Iterator<Item = usize>,
) -> Result<Tensor, TchError> {
    let width = padded_inputs(x.inputs());
    let mut values = Vec::new();
    for row in rows {
        if x.format().is_quantized() {
            dequantize_row(x.quantized(row), &mut values);
        } else {
            values.extend_from_slice(x.values(row));
        }
    }
    let count = (values.len() / width) as i64;
    Tensor::f_from_slice(&values)?
        .f_view_([count, width as i64])?
        .f_to_kind(Kind::BFloat16)?
        .f_to_device(device)
}

/// The first `columns` columns as f32, row-major.
fn to_floats(y: &Tensor, columns: usize) -> Result<Vec<f32>, TchError> {
    let y = y.f_narrow(1, 0, columns as i64)?.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?;
    let y = y.f_contiguous()?;
    let mut out = vec![0.0; y.numel()];
    let len = out.len();
    y.f_copy_data(&mut out, len)?;
    Ok(out)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug)]
struct TorchLinear {
    format: Format,
    outputs: usize,
    inputs: usize,
    /// A tensor may be used by one thread at a time.
    weights: Mutex<Product>,
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
        let product = lock(&self.weights);
        let result = rows_tensor(product.device, &x, 0..x.rows())
            .and_then(|x| product.apply(&x))
            .and_then(|y| to_floats(&y, self.outputs))
            .map_err(failed)?;
        y.copy_from_slice(&result);
        Ok(())
    }
}

/// One expert: gate and up as one matrix, then down.
#[derive(Debug)]
struct TorchExpert {
    gate_up: Product,
    down: Product,
    /// Rows of gate and up alternate in blocks of 16 (quantized) or follow each other (bf16).
    alternating: bool,
}

impl TorchExpert {
    fn new(device: Device, index: u16, expert: &PackedExpert) -> Result<TorchExpert, KernelError> {
        let PackedExpert { format, hidden, inter, ref bytes } = *expert;
        let padded = padded_inputs(inter);
        let first = format.matrix_bytes(2 * padded, hidden);
        let parts = bytes.slice(0, first).zip(bytes.slice(first, format.matrix_bytes(hidden, inter)));
        let Some((gate_up, down)) =
            parts.filter(|_| bytes.len() == format.expert_bytes(hidden, inter) && hidden > 0 && inter > 0)
        else {
            return Err(KernelError::Weights(format!(
                "expert {index} of {hidden} x {inter} in {format} has {} bytes: pack the model again",
                bytes.len()
            )));
        };
        Ok(TorchExpert {
            gate_up: Product::new(device, format, (2 * padded, padded_inputs(hidden)), gate_up)?,
            down: Product::new(device, format, (padded_outputs(hidden), padded), down)?,
            alternating: format.is_quantized(),
        })
    }

    fn apply(&self, x: &Tensor) -> Result<Tensor, TchError> {
        let products = self.gate_up.apply(x)?;
        let (rows, both) = (products.size()[0], products.size()[1]);
        let split: [i64; 4] = if self.alternating {
            [rows, both / (2 * BLOCK_OUTPUTS as i64), 2, BLOCK_OUTPUTS as i64]
        } else {
            [rows, 1, 2, both / 2]
        };
        let products = products.f_view_(split)?;
        let (gate, up) = (products.f_select(2, 0)?, products.f_select(2, 1)?);
        let h = gate.f_silu()?.f_mul(&up)?.f_reshape([rows, both / 2])?;
        self.down.apply(&h)
    }
}

/// Takes the addends of one assignment, one per column, before rounding.
type AddendsOf<'a> = &'a mut dyn FnMut(&Assignment, &mut dyn Iterator<Item = f32>) -> Result<(), KernelError>;

#[derive(Debug)]
struct TorchExperts {
    format: Format,
    hidden: usize,
    /// `2^-step_log2`.
    scale: f32,
    experts: Vec<Option<Mutex<TorchExpert>>>,
}

impl TorchExperts {
    fn expert(&self, index: u16) -> Option<&Mutex<TorchExpert>> {
        self.experts.get(usize::from(index)).and_then(Option::as_ref)
    }

    /// Runs every expert once, with all its rows, and hands each assignment's addends (before rounding) to
    /// `add`.
    fn for_each(
        &self,
        x: &Activations<'_>,
        assignments: &[Assignment],
        add: AddendsOf<'_>,
    ) -> Result<(), KernelError> {
        let expected = Expected { format: self.format, hidden: self.hidden, holds: &|e| self.holds(e) };
        check_call(expected, x, assignments)?;
        let mut sorted = assignments.to_vec();
        sorted.sort_by_key(|a| (a.expert, a.row));
        for run in sorted.chunk_by(|a, b| a.expert == b.expert) {
            let Some(expert) = self.expert(run[0].expert) else { continue };
            let expert = lock(expert);
            let rows = run.iter().map(|a| a.row as usize);
            let y = rows_tensor(expert.down.device, x, rows)
                .and_then(|x| expert.apply(&x))
                .and_then(|y| to_floats(&y, self.hidden))
                .map_err(failed)?;
            for (a, y) in run.iter().zip(y.chunks_exact(self.hidden)) {
                add(a, &mut y.iter().map(|y| (y * a.weight) * self.scale))?;
            }
        }
        Ok(())
    }
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
        self.for_each(&x, assignments, &mut |a, addends| {
            let row = a.row as usize;
            let sums = &mut out.sums[row * self.hidden..(row + 1) * self.hidden];
            let (peak, count) = &mut bounds[row];
            *count += 1;
            for (sum, v) in sums.iter_mut().zip(addends) {
                *peak = (*peak).max(v.to_bits() & 0x7fff_ffff);
                *sum = sum.wrapping_add(v.round_ties_even() as i32);
            }
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
        self.for_each(&x, assignments, &mut |a, addends| {
            let row = a.row as usize;
            for (sum, v) in out[row * self.hidden..(row + 1) * self.hidden].iter_mut().zip(addends) {
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
