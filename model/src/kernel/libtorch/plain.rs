//! libtorch's bf16 matmul with the shapes of an expert and nothing else: what many rows are measured against.
//!
//! Weights are bf16 from the start, rows too, no activation between the two products, no sums: the fastest that
//! libtorch does on this machine. Walks through weights that are several times the last-level cache, as the
//! other benchmarks do.

use std::time::{Duration, Instant};

use tch::{Kind, TchError, Tensor};

use super::device::refused;
use super::set_threads;
use crate::kernel::KernelError;

/// Weights of one expert, bf16: `[2 inter, hidden]` and `[hidden, inter]`.
type Pair = (Tensor, Tensor);

/// Bare products with distinct experts, one after the other.
#[derive(Debug)]
pub struct PlainMatmul {
    shape: (usize, usize),
    weights: Vec<Pair>,
    next: usize,
    x: Tensor,
}

fn failed(error: &TchError) -> KernelError {
    refused(format!("bf16 matmul: {}", error.to_string().lines().next().unwrap_or_default()))
}

fn made(shape: (usize, usize), bytes: usize) -> Result<Vec<Pair>, TchError> {
    let (hidden, inter) = (shape.0 as i64, shape.1 as i64);
    let each = 6 * shape.0 * shape.1;
    let kind = (Kind::BFloat16, tch::Device::Cpu);
    let one = || {
        // Not zeros: untouched pages are all one page, and products of zeros may be quicker.
        let gate_up = Tensor::f_full([2 * inter, hidden], 0.0117, kind)?;
        Ok((gate_up, Tensor::f_full([hidden, inter], -0.0229, kind)?))
    };
    (0..bytes.div_ceil(each).max(2)).map(|_| one()).collect()
}

impl PlainMatmul {
    /// Makes `bytes` of weights for experts of `shape` (hidden, inter).
    ///
    /// # Errors
    /// libtorch's, and 0 threads.
    pub fn new(shape: (usize, usize), bytes: usize, threads: usize) -> Result<PlainMatmul, KernelError> {
        set_threads(threads)?;
        let weights = made(shape, bytes).map_err(|e| failed(&e))?;
        Ok(PlainMatmul { shape, weights, next: 0, x: Tensor::new() })
    }

    /// Rows of the products from now on.
    ///
    /// # Errors
    /// libtorch's.
    pub fn set_rows(&mut self, rows: usize) -> Result<(), KernelError> {
        let size = [rows as i64, self.shape.0 as i64];
        self.x = Tensor::f_full(size, 0.25, (Kind::BFloat16, tch::Device::Cpu)).map_err(|e| failed(&e))?;
        Ok(())
    }

    /// Multiplies with the next expert and returns the time it took.
    ///
    /// # Errors
    /// libtorch's.
    pub fn step(&mut self) -> Result<Duration, KernelError> {
        self.next = (self.next + 1) % self.weights.len();
        let (gate_up, down) = &self.weights[self.next];
        let inter = self.shape.1 as i64;
        let start = Instant::now();
        let product = || self.x.f_matmul(&gate_up.f_tr()?)?.f_narrow(1, 0, inter)?.f_matmul(&down.f_tr()?);
        let y = product().map_err(|e| failed(&e))?;
        let time = start.elapsed();
        drop(y);
        Ok(time)
    }
}
