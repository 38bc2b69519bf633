//! What can be computed with packed weights, behind one trait.
//!
//! `native` is the definition of the bits (DESIGN section 5, NUMERICS): scalar code and SIMD that equals it bit for bit. `libtorch`
//! runs the same products through tch operators, equal within tolerance. `fastest` holds several and chooses by the
//! number of rows. A backend turns packed bytes into something it can run; after that, one call computes one product
//! for any number of rows, or all the experts of one layer that a process holds (one call per (node, layer), never
//! one operator per expert).

pub mod fastest;

pub mod bench;
#[cfg(feature = "torch")]
pub mod libtorch;
pub mod measure;
pub mod native;
pub mod paced;

mod call;

use std::fmt::Debug;
use std::sync::Arc;

use crate::activations::Activations;
use crate::packed::{PackedExpert, PackedMatrix};

/// One row for one expert, with its routing weight.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Assignment {
    /// Index of the row in the batch.
    pub row: u32,
    /// Index of the expert in its layer.
    pub expert: u16,
    /// Routing weight.
    pub weight: f32,
}

/// Sums over a process's experts, in multiples of the layer's combine step: `[rows, hidden]`.
#[derive(Debug, Default)]
pub struct PartialSums {
    /// Rows, each `hidden` long. A row that overflowed holds no meaning.
    pub sums: Vec<i32>,
    /// Per row: whether i32 may have overflowed, so that the router must recompute the row in i64.
    pub overflowed: Vec<bool>,
}

impl PartialSums {
    /// Zeroes the sums for `rows` rows of `hidden`, keeping the memory.
    pub fn reset(&mut self, rows: usize, hidden: usize) {
        self.sums.clear();
        self.sums.resize(rows * hidden, 0);
        self.overflowed.clear();
        self.overflowed.resize(rows, false);
    }
}

/// Why a kernel refused.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The weights cannot be used by this backend; the message names them and the remedy.
    #[error("{0}")]
    Weights(String),
    /// A call does not fit the loaded weights (shape, format, expert not held).
    #[error("{0}")]
    Call(String),
    /// The backend itself failed (libtorch error, device out of memory).
    #[error("{backend}: {reason}")]
    Backend {
        /// Name of the backend.
        backend: &'static str,
        /// What it said.
        reason: String,
    },
}

/// A backend.
pub trait Kernels: Send + Sync + Debug {
    /// `native`, `libtorch`, or `fastest` for a choice between them.
    fn name(&self) -> &'static str;

    /// The instruction set or device in use, as `bench kernel` and `nodes` print it.
    fn isa(&self) -> String;

    /// Whether results are the bits of the definition.
    fn exact(&self) -> bool;

    /// Takes over a matrix.
    fn linear(&self, matrix: PackedMatrix) -> Result<Box<dyn Linear>, KernelError>;

    /// Takes over experts of one layer, by index, whole or slices, each of its own width. `step_log2` is the layer's
    /// combine step.
    fn experts(
        &self,
        experts: Vec<(u16, PackedExpert)>,
        step_log2: i8,
    ) -> Result<Arc<dyn LayerExperts>, KernelError>;
}

/// A loaded matrix.
pub trait Linear: Send + Sync + Debug {
    /// Rows of the result.
    fn outputs(&self) -> usize;

    /// `y[row * outputs + o] = sum over i of w[o, i] x[row, i]`, for all rows of `x`.
    fn apply(&self, x: Activations<'_>, y: &mut [f32]) -> Result<(), KernelError>;
}

/// The experts of one layer that this process holds.
pub trait LayerExperts: Send + Sync + Debug {
    /// Whether expert `index` is here.
    fn holds(&self, index: u16) -> bool;

    /// Adds, for every assignment, the expert's output times the weight, rounded block by block to multiples
    /// of the step (DESIGN section 5, Combine), into `out`, which the call resets. Row order and the order of assignments
    /// do not matter.
    fn run(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut PartialSums,
    ) -> Result<(), KernelError>;

    /// As `run`, in i64 and never overflowing: `out` is `[rows, hidden]`. Slow; for the rows `run` reported.
    fn run_wide(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut Vec<i64>,
    ) -> Result<(), KernelError>;
}
