//! What loaded weights compute with: the chosen table, the threads, and memory that is reused from call to call.
//!
//! One call at a time has the threads and the scratch memory (one mutex for both); scratch memory grows to the
//! largest call so far and is never shrunk, so that a warm call allocates nothing.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::block::Outputs;
use super::isa::Table;
use super::plan::{Plan, SEGMENT_ROWS};
use super::pool::Pool;
use super::tiles::Tiles;
use crate::kernel::KernelError;

/// Rows from which copying them into tiles is worth waking the other threads for.
const PARALLEL_COPY_ROWS: usize = 64;

/// What loaded weights compute with.
#[derive(Debug)]
pub(super) struct Engine {
    pub(super) table: Table,
    pub(super) crew: Mutex<Crew>,
}

/// Threads and the memory they work in: one call at a time.
#[derive(Debug)]
pub(super) struct Crew {
    pub(super) pool: Pool,
    pub(super) space: Space,
}

/// Scratch memory, grown by the largest call so far.
#[derive(Debug, Default)]
pub(super) struct Space {
    pub(super) x: Tiles,
    pub(super) h: Tiles,
    pub(super) plan: Plan,
    pub(super) threads: Vec<Mutex<ThreadSpace>>,
}

/// Scratch memory of one thread.
#[derive(Debug)]
pub(super) struct ThreadSpace {
    /// Gate and up products of two row blocks: `[SEGMENT_ROWS][16]` each.
    pub(super) products: [Vec<Outputs<f32>>; 4],
    pub(super) sums: Vec<Outputs<i32>>,
    /// Sums over all experts of the thread's own output blocks: `[block][row of the batch]`.
    pub(super) totals: Vec<Outputs<i32>>,
    pub(super) peaks: Vec<Outputs<u32>>,
    /// Largest addend per row of the batch, as f32 bits.
    pub(super) row_peaks: Vec<u32>,
}

impl ThreadSpace {
    pub(super) fn new() -> ThreadSpace {
        ThreadSpace {
            products: std::array::from_fn(|_| vec![[0.0; 16]; SEGMENT_ROWS]),
            sums: vec![[0; 16]; SEGMENT_ROWS],
            totals: Vec::new(),
            peaks: vec![[0; 16]; SEGMENT_ROWS],
            row_peaks: Vec::new(),
        }
    }
}

/// Scratch memory means nothing between calls, so a panic while it was locked leaves nothing broken.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Share `index` of `0..n` cut in `of`.
pub(super) fn part(n: usize, index: usize, of: usize) -> Range<usize> {
    n * index / of..n * (index + 1) / of
}

/// Calls `copy` for every row, on all threads if there are many. Whether all returned true.
pub(super) fn on_rows(pool: &mut Pool, rows: usize, copy: &(dyn Fn(usize) -> bool + Sync)) -> bool {
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
pub(super) fn forged_row() -> KernelError {
    KernelError::Call("a row holds the value -128, which no quantizer makes: its sender is broken".to_owned())
}

impl Engine {
    pub(super) fn crew(&self) -> MutexGuard<'_, Crew> {
        lock(&self.crew)
    }
}
