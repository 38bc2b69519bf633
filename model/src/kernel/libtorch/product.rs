//! One matrix in the form that an operator takes, and the product with it.
//!
//! Quantized on the CPU there are two ways. `Operators`: libtorch's int4 or int8 operator on a copy in its own layout,
//! which reads few bytes per product. `Dequantized`: no copy; each product turns packed bytes into bf16, a piece
//! small enough for the cache at a time, and multiplies that with oneDNN, which uses the matrix units. On other
//! devices weights are copied there once: nibbles where the device's own int4 operator passes a trial (`Int4Trial`),
//! else bf16 (2 bytes per weight).
#![allow(unsafe_code, reason = "bf16 weights are viewed, not copied")]

use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tch::{Device, Kind, TchError, Tensor};

use super::device::{Place, Reserved};
use super::unpack::{Packed, Wide};
use crate::format::{BLOCK_OUTPUTS, Format, GROUP};
use crate::kernel::KernelError;
use crate::kernel::native::Native;
use crate::region::{Buffer, Bytes};

/// bf16 weights that are made and multiplied at a time: they stay in a second- or last-level cache, and a product
/// with them is long beside the call of an operator.
const PIECE_BYTES: usize = 1 << 20;

/// Below this much bf16, waking other threads costs more than they save.
const SHARED_BYTES: usize = 256 << 10;

/// The `innerKTiles` argument of the int4 repacking: the CPU ignores but checks it; CUDA takes tiles of 16 inputs, and
/// with 2 of them every multiple of a group fits.
const INNER_K_TILES: i64 = 2;

/// How quantized weights meet libtorch on the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// Its int4 and int8 operators, on a copy of the weights in their layout: for few rows.
    Operators,
    /// bf16 matmul on weights that every call makes from the packed bytes: for many rows.
    Dequantized,
}

/// What products share: the device, the route, threads and memory for `Dequantized`.
#[derive(Debug)]
pub(super) struct Shop {
    pub(super) place: Place,
    pub(super) route: Route,
    /// Threads that help to dequantize.
    pub(super) crew: Option<Arc<Native>>,
    /// Whether the device multiplies nibbles.
    pub(super) int4: bool,
    /// One piece of bf16 weights.
    piece: Mutex<Buffer>,
}

/// A lock whose holder panicked guards nothing that could be half done here.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shop {
    pub(super) fn new(place: Place, route: Route, crew: Option<Arc<Native>>) -> Shop {
        let int4 = place.remote && int4_trial(place.device).unwrap_or(false);
        Shop { place, route, crew, int4, piece: Mutex::new(Buffer::zeroed(0)) }
    }
}

#[derive(Debug)]
enum Weights {
    /// bf16 `[outputs, inputs]`. On the CPU a view of `_bytes`.
    Dense { weights: Tensor, _bytes: Option<Bytes> },
    /// int8 `[outputs, inputs]` and one bf16 scale per output.
    Int8 { weights: Tensor, scales: Tensor },
    /// Repacked nibbles, and `[inputs / 32, outputs, 2]` scales and zeros.
    Int4 { weights: Tensor, scales: Tensor },
    /// As packed; dequantized for each product.
    Packed,
}

/// A matrix that multiplies.
#[derive(Debug)]
pub(super) struct Product {
    shop: Arc<Shop>,
    packed: Option<Packed>,
    weights: Weights,
    _memory: Option<Reserved>,
}

impl Product {
    /// Loads a matrix. `what` names it in messages.
    pub(super) fn new(shop: &Arc<Shop>, packed: Packed, what: &str) -> Result<Product, KernelError> {
        let place = &shop.place;
        let bytes = resident_bytes(shop, &packed);
        let memory = if bytes > 0 { Some(place.reserve(bytes, what)?) } else { None };
        let weights = match (packed.format, place.remote) {
            (Format::Bf16, false) => view(&packed),
            (Format::Bf16, true) => dense(place.device, &packed, &packed.bytes),
            (Format::Q4, true) if shop.int4 => int4_device(place.device, &packed),
            (_, true) => dense(place.device, &packed, bytemuck::cast_slice(&packed.widened())),
            (Format::Q8, false) if shop.route == Route::Operators => int8(&packed),
            (Format::Q4, false) if shop.route == Route::Operators => int4(&packed),
            (Format::Q4 | Format::Q8, false) => Ok(Weights::Packed),
        };
        let weights = weights.map_err(|error| place.failed(&error, bytes, what))?;
        let packed = matches!(weights, Weights::Packed).then_some(packed);
        Ok(Product { shop: Arc::clone(shop), packed, weights, _memory: memory })
    }

    /// `x` is bf16 `[rows, inputs]` on the device. Each piece of the product, bf16 `[rows, outputs of the piece]` with
    /// gate before up, goes through `finish`; the results side by side are returned.
    pub(super) fn apply(
        &self,
        x: &Tensor,
        finish: &dyn Fn(Tensor) -> Result<Tensor, TchError>,
    ) -> Result<Tensor, TchError> {
        match (&self.weights, &self.packed) {
            (Weights::Dense { weights, .. }, _) => finish(x.f_matmul(&weights.f_tr()?)?),
            (Weights::Int8 { weights, scales }, _) => {
                finish(x.f_internal_weight_int8pack_mm(weights, scales)?)
            }
            (Weights::Int4 { weights, scales }, _) if self.shop.place.remote => {
                finish(x.f_internal_weight_int4pack_mm(weights, GROUP as i64, scales)?)
            }
            (Weights::Int4 { weights, scales }, _) => {
                finish(x.f_internal_weight_int4pack_mm_for_cpu(weights, GROUP as i64, scales)?)
            }
            (Weights::Packed, Some(packed)) => self.apply_packed(packed, x, finish),
            (Weights::Packed, None) => Err(TchError::Shape("packed weights without bytes".to_owned())),
        }
    }

    fn apply_packed(
        &self,
        packed: &Packed,
        x: &Tensor,
        finish: &dyn Fn(Tensor) -> Result<Tensor, TchError>,
    ) -> Result<Tensor, TchError> {
        let unit_bytes = packed.unit_outputs() * packed.inputs * 2;
        let step = (PIECE_BYTES / unit_bytes).clamp(1, packed.units());
        // Equal pieces, so that none is a short rest.
        let step = packed.units().div_ceil(packed.units().div_ceil(step));
        let mut results = Vec::new();
        let mut piece = lock(&self.shop.piece);
        if piece.len() < step * unit_bytes {
            *piece = Buffer::zeroed(step * unit_bytes);
        }
        for start in (0..packed.units()).step_by(step) {
            let units = start..packed.units().min(start + step);
            let values: &mut [u16] = bytemuck::cast_slice_mut(&mut piece[..units.len() * unit_bytes]);
            widen(packed, &units, values, self.shop.crew.as_deref());
            let size = [(units.len() * packed.unit_outputs()) as i64, packed.inputs as i64];
            // SAFETY: `piece` holds that many bf16 values, is locked, and is written again only after the product, which
            // the CPU finishes before it returns; the view ends with this round.
            let weights = unsafe {
                Tensor::f_from_blob(
                    values.as_ptr().cast(),
                    &size,
                    &[size[1], 1],
                    Kind::BFloat16,
                    Device::Cpu,
                )?
            };
            results.push(finish(x.f_matmul(&weights.f_tr()?)?)?);
        }
        match results.len() {
            1 => Ok(results.swap_remove(0)),
            _ => Tensor::f_cat(&results, 1),
        }
    }
}

/// Row blocks `units` of `packed` as bf16, on all threads if that is worth it.
fn widen(packed: &Packed, units: &Range<usize>, out: &mut [u16], crew: Option<&Native>) {
    let block = BLOCK_OUTPUTS * packed.inputs;
    let blocks = out.len() / block;
    let crew = crew.filter(|crew| crew.threads() > 1 && out.len() * 2 >= SHARED_BYTES);
    let Some(crew) = crew else { return packed.widen(units, 0..blocks, out) };
    let share = blocks.div_ceil(crew.threads());
    let parts: Vec<Mutex<&mut [u16]>> = out.chunks_mut(share * block).map(Mutex::new).collect();
    crew.parallel(&|thread| {
        if let Some(part) = parts.get(thread) {
            let mut part = lock(part);
            let first = thread * share;
            packed.widen(units, first..first + part.len() / block, &mut part);
        }
    });
}

/// Bytes that a matrix takes beside its packed form.
fn resident_bytes(shop: &Shop, packed: &Packed) -> u64 {
    let weights = (packed.outputs * packed.inputs) as u64;
    match (packed.format, shop.place.remote) {
        // Nibbles, and a bf16 scale and zero per group.
        (Format::Q4, true) if shop.int4 => weights / 2 + weights / GROUP as u64 * 4,
        (_, true) => weights * 2,
        (Format::Q4, false) if shop.route == Route::Operators => weights / 2 + weights / GROUP as u64 * 4,
        (Format::Q8, false) if shop.route == Route::Operators => weights,
        _ => 0,
    }
}

fn size(packed: &Packed) -> [i64; 2] {
    [packed.outputs as i64, packed.inputs as i64]
}

fn view(packed: &Packed) -> Result<Weights, TchError> {
    let (bytes, size) = (packed.bytes.clone(), size(packed));
    let strides = [size[1], 1];
    // SAFETY: `bytes` holds outputs x inputs bf16 values (its length was checked), never changes, and is kept
    // beside the tensor, which nothing writes to.
    let weights =
        unsafe { Tensor::f_from_blob(bytes.as_ptr(), &size, &strides, Kind::BFloat16, Device::Cpu)? };
    Ok(Weights::Dense { weights, _bytes: Some(bytes) })
}

/// `bytes`: bf16, row-major.
fn dense(device: Device, packed: &Packed, bytes: &[u8]) -> Result<Weights, TchError> {
    let weights = Tensor::f_from_data_size(bytes, &size(packed), Kind::BFloat16)?.f_to_device(device)?;
    Ok(Weights::Dense { weights, _bytes: None })
}

fn int8(packed: &Packed) -> Result<Weights, TchError> {
    let (values, scales) = packed.unpack().per_output();
    let weights = Tensor::f_from_slice(&values)?.f_view_(size(packed))?;
    let scales = Tensor::f_from_slice(&scales)?.f_to_kind(Kind::BFloat16)?;
    Ok(Weights::Int8 { weights, scales })
}

fn int4(packed: &Packed) -> Result<Weights, TchError> {
    let wide = packed.unpack();
    let nibbles: Vec<i32> = wide.values.iter().map(|v| i32::from(*v) + 8).collect();
    let weights = Tensor::f_from_slice(&nibbles)?
        .f_view_(size(packed))?
        .f_internal_convert_weight_to_int4pack_for_cpu(INNER_K_TILES)?;
    Ok(Weights::Int4 { weights, scales: scales_and_zeros(packed, &wide)? })
}

/// `[inputs / 32, outputs, 2]`: the operators compute `(nibble - 8) * scale + zero`.
fn scales_and_zeros(packed: &Packed, wide: &Wide) -> Result<Tensor, TchError> {
    let [outputs, inputs] = size(packed);
    let scales = Tensor::f_from_slice(&wide.scales)?.f_view_([outputs, inputs / GROUP as i64])?.f_tr()?;
    let zeros = scales.f_zeros_like()?;
    Tensor::f_stack(&[scales, zeros], 2)?.f_to_kind(Kind::BFloat16)?.f_contiguous()
}

/// Nibbles for the operator of a GPU, which takes two inputs per byte, the first in the high half, and repacks them
/// there.
fn int4_device(device: Device, packed: &Packed) -> Result<Weights, TchError> {
    let wide = packed.unpack();
    let [outputs, inputs] = size(packed);
    let nibble = |v: i8| (v + 8) as u8;
    let pairs: Vec<u8> =
        wide.values.as_chunks::<2>().0.iter().map(|[a, b]| nibble(*a) << 4 | nibble(*b)).collect();
    let weights = Tensor::f_from_slice(&pairs)?
        .f_view_([outputs, inputs / 2])?
        .f_to_device(device)?
        .f_internal_convert_weight_to_int4pack(INNER_K_TILES)?;
    let scales = scales_and_zeros(packed, &wide)?.f_to_device(device)?;
    Ok(Weights::Int4 { weights, scales })
}

/// Whether the int4 operator of `device` exists there and multiplies right: its layout is libtorch's own affair and
/// depends on the GPU's generation, so a small product is compared with the same in bf16. Any error means no.
fn int4_trial(device: Device) -> Result<bool, TchError> {
    const WIDTH: usize = 64;
    if !device.is_cuda() {
        return Ok(false);
    }
    let mut bytes = Buffer::zeroed(Format::Q4.matrix_bytes(WIDTH, WIDTH));
    for group in bytes.chunks_exact_mut(Format::Q4.group_bytes()) {
        let (lines, scales) = group.split_at_mut(Format::Q4.group_bytes() - 2 * BLOCK_OUTPUTS);
        lines.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 89 % 251) as u8);
        for (i, scale) in scales.as_chunks_mut::<2>().0.iter_mut().enumerate() {
            *scale = (0x2c00 + 16 * i as u16).to_le_bytes();
        }
    }
    let packed =
        Packed { format: Format::Q4, outputs: WIDTH, inputs: WIDTH, paired: false, bytes: bytes.into() };
    let x: Vec<f32> = (0..3 * WIDTH).map(|i| (i * 37 % 61) as f32 / 30.0 - 1.0).collect();
    let x = Tensor::f_from_slice(&x)?.f_view_([3, WIDTH as i64])?.f_to_kind(Kind::BFloat16)?;
    let weights =
        Tensor::f_from_data_size(bytemuck::cast_slice(&packed.widened()), &size(&packed), Kind::BFloat16)?;
    let expected = x.f_matmul(&weights.f_tr()?)?.f_to_kind(Kind::Float)?;
    let Weights::Int4 { weights, scales } = int4_device(device, &packed)? else { return Ok(false) };
    let x = x.f_to_device(device)?;
    let y = x.f_internal_weight_int4pack_mm(&weights, GROUP as i64, &scales)?;
    let y = y.f_to_kind(Kind::Float)?.f_to_device(Device::Cpu)?;
    let error = y.f_sub(&expected)?.f_norm()?.f_double_value(&[])?;
    Ok(error <= 0.02 * expected.f_norm()?.f_double_value(&[])?)
}
