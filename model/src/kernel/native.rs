//! The native backend: the definition of the bits, and SIMD that equals it bit for bit.
//!
//! Problem: decoding streams weights from memory once per token, so a kernel must read packed bytes in order at
//! the speed of memory; and every machine, thread count and batch must round alike. Idea: one layout for all
//! instruction sets (`format`), exact integer dot products per group of 32, f32 operations in one fixed order
//! (`definition`), integer sums over experts.
//!
//! Files, from the call down: `linear`, `experts` (drivers), `engine` (what a call computes with), `plan` (a call,
//! sorted), `weights` (checked bytes), `pool` (threads), `isa` (the table of functions and its choice), `scalar`,
//! `neon`, `avx2`, `avx512` and their `_bf16`, `amx` with `amx_tiles` and `crossover` (products), `elementwise` (the
//! rest, compiled per instruction set), `columns`, `block`, `tiles`, `passes` (what these take and give), `lanes` (registers),
//! `definition` (the bits). Beside them `ops`, `dots`, `rows` (row operations for the forward pass) and `stream` (how
//! fast this machine reads).
//!
//! Price: one call at a time per backend (a mutex around pool and scratch memory). Refuses: weights with
//! non-finite scales, calls that do not fit them, instruction sets that the machine lacks.
#![allow(
    clippy::needless_range_loop,
    reason = "index loops over arrays become vector code; iterator closures are compiled without target features"
)]

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod amx_tiles;
pub mod attend;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_bf16;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
mod block;
mod columns;
#[cfg(target_arch = "x86_64")]
mod crossover;
pub mod definition;
pub mod dots;
mod elementwise;
mod engine;
mod experts;
mod isa;
pub mod kv;
mod lanes;
mod linear;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod ops;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod passes;
mod plan;
mod pool;
pub mod rows;
mod scalar;
pub mod stream;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod tests_alloc;
mod tiles;
mod weights;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use self::engine::{Crew, Engine, Space, ThreadSpace};
use self::experts::NativeExperts;
pub use self::isa::Isa;
use self::isa::Table;
use self::linear::NativeLinear;
use self::ops::Ops;
use self::pool::Pool;
use super::{KernelError, Kernels, LayerExperts, Linear};
use crate::packed::{PackedExpert, PackedMatrix};

/// Threads of one backend at most: more than any machine has; a typo is caught.
const MAX_THREADS: usize = 1024;

/// Time that threads watch for work before they sleep: longer than the gap between two calls of a step that
/// waits for the network, which is tens of microseconds.
pub const DEFAULT_SPIN: Duration = Duration::from_micros(50);

/// The variable that forces an instruction set.
pub const ISA_VARIABLE: &str = "MOEMESH_ISA";

/// How to run.
#[derive(Clone, Debug)]
pub struct NativeConfig {
    /// Threads that compute, the caller's included; at least 1.
    pub threads: usize,
    /// Instruction set; `None` takes `MOEMESH_ISA`, else the best the machine has.
    pub isa: Option<Isa>,
    /// Cores for the threads, in order; empty leaves them to the system. The caller (thread 0) is not moved.
    pub cores: Vec<usize>,
    /// Time that idle threads watch before they sleep. Zero where other processes need the cores.
    pub spin: Duration,
}

impl NativeConfig {
    /// `threads` threads, everything else default. Where the process has exactly as many cores to itself, each worker
    /// keeps one: a thread that wakes on another's core waits for it. With fewer threads than cores the system places
    /// them better than a guess, since other programs use those cores too.
    pub fn threads(threads: usize) -> NativeConfig {
        let cores = if threads > 1 { pool::allowed_cores() } else { Vec::new() };
        let cores = if cores.len() == threads { cores } else { Vec::new() };
        NativeConfig { threads, isa: None, cores, spin: DEFAULT_SPIN }
    }
}

/// The native backend. Cheap to share by `Arc`; loaded weights keep what they need of it alive.
#[derive(Debug)]
pub struct Native {
    engine: Arc<Engine>,
    ops: Ops,
    threads: usize,
}

impl Native {
    /// Starts the threads and chooses the instruction set. An error names the setting and the remedy.
    pub fn new(config: NativeConfig) -> Result<Native, KernelError> {
        let isa = config.isa.map_or_else(Isa::chosen, Ok).map_err(refused)?;
        Native::with_table(&config, Table::new(isa).map_err(refused)?)
    }

    fn with_table(config: &NativeConfig, table: Table) -> Result<Native, KernelError> {
        if config.threads == 0 || config.threads > MAX_THREADS {
            return Err(refused(format!("{} threads: give 1 to {MAX_THREADS}", config.threads)));
        }
        let pool = Pool::new(config.threads, &config.cores, config.spin)
            .map_err(|e| refused(format!("{} threads could not be started: {e}", config.threads)))?;
        let mut space = Space::default();
        space.threads.resize_with(config.threads, || Mutex::new(ThreadSpace::new()));
        let engine = Arc::new(Engine { table, crew: Mutex::new(Crew { pool, space }) });
        Ok(Native { engine, ops: Ops::of(table.isa()), threads: config.threads })
    }

    /// Row operations with the same instruction set.
    pub fn ops(&self) -> Ops {
        self.ops
    }

    /// Threads that compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Calls `job(i)` for every i below `threads()`, in parallel, and returns when all are done: for work of the
    /// forward pass that is no matrix product. The job must not call this backend's products (they wait for the
    /// same threads).
    pub fn parallel(&self, job: &(dyn Fn(usize) + Sync)) {
        self.engine.crew().pool.run(job);
    }
}

fn refused(reason: String) -> KernelError {
    KernelError::Backend { backend: "native", reason }
}

impl Kernels for Native {
    fn name(&self) -> &'static str {
        "native"
    }

    fn isa(&self) -> String {
        self.engine.table.isa().name().to_owned()
    }

    fn exact(&self) -> bool {
        true
    }

    fn linear(&self, matrix: PackedMatrix) -> Result<Box<dyn Linear>, KernelError> {
        Ok(Box::new(NativeLinear::new(Arc::clone(&self.engine), matrix)?))
    }

    fn experts(
        &self,
        experts: Vec<(u16, PackedExpert)>,
        step_log2: i8,
    ) -> Result<Arc<dyn LayerExperts>, KernelError> {
        Ok(Arc::new(NativeExperts::new(Arc::clone(&self.engine), experts, step_log2)?))
    }
}
