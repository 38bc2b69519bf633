//! The native backend: the definition of the bits, and SIMD that equals it bit for bit.
//!
//! Problem: decoding streams weights from memory once per token, so a kernel must read packed bytes in order at
//! the speed of memory; and every machine, thread count and batch must round alike. Idea: one layout for all
//! instruction sets (`format`), exact integer dot products per group of 32, f32 operations in one fixed order
//! (`definition`), integer sums over experts. Files: `definition` (the bits), `isa` (the table and its choice),
//! `scalar`, `avx2`, `avx512` and their `_bf16` (products), `elementwise` (the rest, compiled per instruction set), `tiles` (rows),
//! `weights` (checked bytes), `linear` and `experts` (drivers), `pool` (threads), `ops` (row operations for the
//! forward pass), `stream` (how fast this machine reads).
//!
//! Price: one call at a time per backend (a mutex around pool and scratch memory). Refuses: weights with
//! non-finite scales, calls that do not fit them, instruction sets that the machine lacks.
#![allow(
    clippy::needless_range_loop,
    reason = "index loops over arrays become vector code; iterator closures are compiled without target features"
)]

pub mod attend;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx2_bf16;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
pub mod definition;
mod elementwise;
mod experts;
mod isa;
pub mod kv;
mod linear;
pub mod ops;
mod pool;
mod scalar;
pub mod stream;
#[cfg(test)]
pub(crate) mod tests;
mod tiles;
mod weights;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use self::experts::{NativeExperts, Plan};
pub use self::isa::Isa;
use self::isa::{Outputs, Table};
use self::linear::NativeLinear;
use self::ops::Ops;
use self::pool::Pool;
use self::tiles::Tiles;
use super::{KernelError, Kernels, LayerExperts, Linear};
use crate::packed::{PackedExpert, PackedMatrix};

/// Rows that meet a row block together: their int8 groups (256 rows of 2048 take 0.6 MB) fit the second cache
/// level, and the weights are then read once per 256 rows, which is 3 % of the time these take.
const SEGMENT_ROWS: usize = 256;

/// Rows from which copying them into tiles is worth waking the other threads for.
const PARALLEL_COPY_ROWS: usize = 64;

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
    /// `threads` threads, everything else default.
    pub fn threads(threads: usize) -> NativeConfig {
        NativeConfig { threads, isa: None, cores: Vec::new(), spin: DEFAULT_SPIN }
    }
}

/// The native backend. Cheap to share by `Arc`; loaded weights keep what they need of it alive.
#[derive(Debug)]
pub struct Native {
    engine: Arc<Engine>,
    ops: Ops,
    threads: usize,
}

/// What loaded weights compute with.
#[derive(Debug)]
struct Engine {
    table: Table,
    crew: Mutex<Crew>,
}

/// Threads and the memory they work in: one call at a time.
#[derive(Debug)]
struct Crew {
    pool: Pool,
    space: Space,
}

/// Scratch memory, grown by the largest call so far.
#[derive(Debug, Default)]
struct Space {
    x: Tiles,
    h: Tiles,
    plan: Plan,
    threads: Vec<Mutex<ThreadSpace>>,
}

/// Scratch memory of one thread.
#[derive(Debug)]
struct ThreadSpace {
    /// Gate and up products of two row blocks: `[SEGMENT_ROWS][16]` each.
    products: [Vec<Outputs<f32>>; 4],
    sums: Vec<Outputs<i32>>,
    peaks: Vec<Outputs<u32>>,
    /// Largest addend per row of the batch, as f32 bits.
    row_peaks: Vec<u32>,
}

impl ThreadSpace {
    fn new() -> ThreadSpace {
        ThreadSpace {
            products: std::array::from_fn(|_| vec![[0.0; 16]; SEGMENT_ROWS]),
            sums: vec![[0; 16]; SEGMENT_ROWS],
            peaks: vec![[0; 16]; SEGMENT_ROWS],
            row_peaks: Vec::new(),
        }
    }
}

/// Scratch memory means nothing between calls, so a panic while it was locked leaves nothing broken.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Share `index` of `0..n` cut in `of`.
fn part(n: usize, index: usize, of: usize) -> Range<usize> {
    n * index / of..n * (index + 1) / of
}

/// Calls `copy` for every row, on all threads if there are many. Whether all returned true.
fn on_rows(pool: &mut Pool, rows: usize, copy: &(dyn Fn(usize) -> bool + Sync)) -> bool {
    if rows < PARALLEL_COPY_ROWS {
        return (0..rows).all(copy);
    }
    let (threads, fine) = (pool.threads(), AtomicBool::new(true));
    pool.run(&|thread| {
        if !part(rows, thread, threads).all(copy) {
            fine.store(false, Ordering::Relaxed);
        }
    });
    fine.into_inner()
}

/// The error for a row that holds -128.
fn forged_row() -> KernelError {
    KernelError::Call("a row holds the value -128, which no quantizer makes: its sender is broken".to_owned())
}

impl Engine {
    fn crew(&self) -> MutexGuard<'_, Crew> {
        lock(&self.crew)
    }
}

impl Native {
    /// Starts the threads and chooses the instruction set. An error names the setting and the remedy.
    pub fn new(config: NativeConfig) -> Result<Native, KernelError> {
        let isa = match config.isa {
            Some(isa) => isa,
            None => match std::env::var(ISA_VARIABLE) {
                Ok(name) => name.parse().map_err(refused)?,
                Err(_) => Isa::best(),
            },
        };
        let table = Table::new(isa).map_err(refused)?;
        if config.threads == 0 || config.threads > MAX_THREADS {
            return Err(refused(format!("{} threads: give 1 to {MAX_THREADS}", config.threads)));
        }
        let pool = Pool::new(config.threads, &config.cores, config.spin)
            .map_err(|e| refused(format!("{} threads could not be started: {e}", config.threads)))?;
        let mut space = Space::default();
        space.threads.resize_with(config.threads, || Mutex::new(ThreadSpace::new()));
        let engine = Arc::new(Engine { table, crew: Mutex::new(Crew { pool, space }) });
        let ops = Ops::new(isa).map_err(refused)?;
        Ok(Native { engine, ops, threads: config.threads })
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
