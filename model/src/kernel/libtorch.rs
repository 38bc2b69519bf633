//! The libtorch backend: the same products through tch operators, equal to native within tolerance.
//!
//! For GPUs, for machines whose libtorch is faster at many rows, and as an independent check of native. One
//! matrix product per expert and matrix, whatever the number of rows; gate and up are one matrix. Files: `experts`
//! (a call), `product` (one matrix: the operators and layouts), `device` (where, and its memory), `unpack` and
//! `widen` (packed bytes to what operators take), `plain` (the yardstick of `bench kernel`).
//!
//! Price: products round to bf16 in libtorch's order and activations are not quantized between the two phases, so
//! sums differ from native (`TOLERANCE`) and from machine to machine: `exact` is false. Results are rounded to the
//! combine step and join the same integer sum. The number of threads is global to libtorch. On a device other
//! than the CPU, rows are copied in and results out once per call; what the decoder does between products stays on
//! the CPU. Refuses: devices that libtorch does not find; nothing here panics, every operator's error is returned,
//! a device that runs out of memory included.

mod device;
mod experts;
mod plain;
mod product;
mod unpack;
mod widen;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex};

pub use self::device::devices;
use self::device::{Place, refused};
use self::experts::{TorchExpert, TorchExperts, TorchLinear};
pub use self::plain::PlainMatmul;
pub use self::product::Route;
use self::product::{Product, Shop};
use self::unpack::Packed;
use super::call::combine_scale;
use super::native::Native;
use super::{KernelError, Kernels, LayerExperts, Linear};
use crate::format::{Format, padded_inputs, padded_outputs};
use crate::packed::{PackedExpert, PackedMatrix};

/// Root mean square difference from native over the root mean square of native, per format in the order of
/// `Format as usize`, on well-scaled weights and rows. bf16: results rounded to 8 bits twice. q8: one scale per
/// output instead of one per 32 inputs, and native's int8 activations. q4: native's int8 activations.
pub const TOLERANCE: [f64; 3] = [0.008, 0.025, 0.02];

/// How to run.
#[derive(Clone, Debug)]
pub struct LibtorchConfig {
    /// `cpu`, `cuda`, `cuda:N` or `mps`.
    pub device: String,
    /// Threads of libtorch's operators; global to the process.
    pub threads: usize,
    /// How quantized weights are multiplied on the CPU; other devices have their own way.
    pub route: Route,
    /// Whose threads help to dequantize; none leaves it to the caller's.
    pub crew: Option<Arc<Native>>,
    /// Most bytes to take of the device beside packed weights; `None` leaves it to the device to refuse.
    pub memory_bytes: Option<u64>,
}

impl LibtorchConfig {
    /// The CPU with `threads` threads.
    pub fn cpu(threads: usize, route: Route) -> LibtorchConfig {
        LibtorchConfig { device: "cpu".to_owned(), threads, route, crew: None, memory_bytes: None }
    }
}

/// The libtorch backend.
#[derive(Debug)]
pub struct Libtorch {
    shop: Arc<Shop>,
}

/// Sets the threads of libtorch's operators, in the whole process.
fn set_threads(threads: usize) -> Result<(), KernelError> {
    let count = i32::try_from(threads).ok().filter(|threads| *threads > 0);
    tch::set_num_threads(count.ok_or_else(|| refused(format!("{threads} threads: give at least 1")))?);
    Ok(())
}

impl Libtorch {
    /// Opens the device.
    ///
    /// # Errors
    /// A device that is not here is named beside those that are.
    pub fn new(config: &LibtorchConfig) -> Result<Libtorch, KernelError> {
        set_threads(config.threads)?;
        let place = Place::open(&config.device, config.memory_bytes)?;
        Ok(Libtorch { shop: Arc::new(Shop::new(place, config.route, config.crew.clone())) })
    }
}

impl Kernels for Libtorch {
    fn name(&self) -> &'static str {
        "libtorch"
    }

    fn isa(&self) -> String {
        let place = &self.shop.place;
        match (place.remote, self.shop.route) {
            (true, _) if self.shop.int4 => format!("{} int4", place.name),
            (true, _) => place.name.clone(),
            (false, Route::Operators) => "operators".to_owned(),
            (false, Route::Dequantized) => "to bf16".to_owned(),
        }
    }

    fn exact(&self) -> bool {
        false
    }

    fn linear(&self, matrix: PackedMatrix) -> Result<Box<dyn Linear>, KernelError> {
        let PackedMatrix { format, outputs, inputs, bytes } = matrix;
        let what = format!("matrix of {outputs} x {inputs} in {format}");
        if bytes.len() != format.matrix_bytes(outputs, inputs) || outputs == 0 || inputs == 0 {
            return Err(KernelError::Weights(format!(
                "{what} has {} bytes: pack the model again",
                bytes.len()
            )));
        }
        let (rows, width) = (padded_outputs(outputs), padded_inputs(inputs));
        let packed = Packed { format, outputs: rows, inputs: width, paired: false, bytes };
        let weights = Mutex::new(Product::new(&self.shop, packed, &what)?);
        Ok(Box::new(TorchLinear { shop: Arc::clone(&self.shop), format, outputs, inputs, weights }))
    }

    fn experts(
        &self,
        experts: Vec<(u16, PackedExpert)>,
        step_log2: i8,
    ) -> Result<Arc<dyn LayerExperts>, KernelError> {
        let first = experts.first().map(|(_, e)| (e.format, e.hidden));
        let (format, hidden) = first.unwrap_or((Format::Q8, 0));
        let inter = experts.iter().map(|(_, expert)| expert.inter).max().unwrap_or(0);
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
            let loaded = TorchExpert::new(&self.shop, index, &expert)?;
            if held[slot].replace(Mutex::new(loaded)).is_some() {
                return Err(KernelError::Weights(format!("expert {index} was given twice")));
            }
        }
        let scale = combine_scale(step_log2)?;
        let shop = Arc::clone(&self.shop);
        Ok(Arc::new(TorchExperts { shop, format, hidden, inter, scale, experts: held }))
    }
}
