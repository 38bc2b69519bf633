//! Causal attention over the block cache, for decode and prefill alike.
//!
//! Per query the blocks are walked in ascending order with a running maximum (Milakov and Gimelshein 2018), so
//! a query's result depends only on its own keys, never on which other queries are computed beside it, how a
//! prompt was cut into chunks or where its blocks lie. Within a block:
//!
//! * score of key j: `sum over d of q[d] k[j][d]`, one chain of fma per key, d ascending, times `1/sqrt(head_dim)`;
//! * `m' = max(m, scores)`; what was summed so far is scaled by `exp(m - m')`;
//! * per key, ascending: `p = exp(score - m')`, `l += p`, `acc[d] = fma(p, v[j][d], acc[d])`.
//!
//! The result is `acc / l`. A chain per key instead of 16 lanes per dot product spares every horizontal sum
//! (docs/decisions/0003). How a block is folded into many queries at once: `fold`. Here: which queries make a tile, who
//! computes it, and whether its keys and values are widened to f32 once for all (many queries) or in registers (few).
#![allow(
    unsafe_code,
    reason = "target features, enabled only after detection; results written by all threads"
)]

mod fold;
#[cfg(test)]
mod tests;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::Native;
use super::engine::{lock, part};
use super::isa::Isa;
use super::kv::{KV_BLOCK, KvLayer, KvPart};
use super::ops::Ops;
use fold::{Ahead, Space, Span, Steps};

/// Queries that share the widened keys of a block. Their sums and packed queries stay in the second-level cache
/// (64 KB at a head size of 128), and widening costs 1 % of what they compute.
const TILE_QUERIES: usize = 64;

/// Up to so many queries, f16 is widened in registers, again for every chunk of them.
const DIRECT_QUERIES: usize = 16;

/// Scores (queries times keys) from which waking the other threads pays: 5 us of work on one core.
const PARALLEL_SCORES: usize = 4096;

/// Consecutive tokens of one sequence, whose queries attend to all keys up to their own position.
#[derive(Clone, Copy, Debug)]
pub struct Run<'a> {
    /// Index of the first token's row in the batch.
    pub first_row: usize,
    /// Tokens.
    pub len: usize,
    /// Position of the first token in its sequence.
    pub position: usize,
    /// Blocks of the sequence.
    pub table: &'a [u32],
}

/// What does not change from run to run.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// Keys and values, those of the runs themselves stored already.
    pub kv: KvLayer<'a>,
    /// Query heads; a multiple of the key heads.
    pub heads: usize,
    /// Keys a query sees, itself included.
    pub window: Option<usize>,
    /// Queries, heads first in each row of the batch.
    pub queries: &'a [f32],
    /// Elements from one row's queries to the next row's.
    pub stride: usize,
}

/// Memory of one call, reused by the next.
#[derive(Debug, Default)]
pub struct AttendScratch {
    tiles: Vec<Tile>,
    threads: Vec<Mutex<ThreadSpace>>,
}

#[derive(Debug, Default)]
struct ThreadSpace {
    space: Space,
    /// Keys, then values of one block.
    wide: Vec<f32>,
}

/// Some queries of one run with one key head.
#[derive(Clone, Copy, Debug)]
struct Tile {
    run: usize,
    /// First token within the run, and how many.
    first: usize,
    len: usize,
    /// Key head.
    kv_head: usize,
    /// First query head, and how many: all that share the key head, or fewer where threads would idle.
    head: usize,
    heads: usize,
}

/// Results, written by all threads, each its own tiles.
struct Results {
    start: *mut f32,
    len: usize,
}

// SAFETY: a plain pointer to floats; who writes what is the contract of `at`.
unsafe impl Sync for Results {}

impl Results {
    /// # Safety
    /// The values must outlive the slice, and no other thread may use these meanwhile.
    unsafe fn at<'a>(&self, first: usize, len: usize) -> &'a mut [f32] {
        assert!(first + len <= self.len);
        // SAFETY: inside the values by the assertion; exclusive by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }
}

impl Native {
    /// Attention of all runs: into `out`, `[rows, heads * head_dim]` by batch row.
    pub fn attend(&self, task: &Attend<'_>, runs: &[Run<'_>], out: &mut [f32], scratch: &mut AttendScratch) {
        let scores: usize = runs.iter().map(|run| run.len * (run.position + run.len) * task.heads).sum();
        let threads = if scores < PARALLEL_SCORES { 1 } else { self.threads() };
        cut(task, runs, threads, &mut scratch.tiles);
        scratch.threads.resize_with(self.threads(), Mutex::default);
        let (tiles, next) = (&scratch.tiles, AtomicUsize::new(0));
        let results = Results { start: out.as_mut_ptr(), len: out.len() };
        let work = |thread: usize| {
            let mut space = lock(&scratch.threads[thread]);
            while let Some(tile) = tiles.get(next.fetch_add(1, Ordering::Relaxed)) {
                space.compute(task, (tile, runs[tile.run]), self.ops(), &results);
            }
        };
        if threads == 1 { work(0) } else { self.parallel(&work) }
    }
}

/// All tiles, those with the most keys first, so that threads finish together.
fn cut(task: &Attend<'_>, runs: &[Run<'_>], threads: usize, tiles: &mut Vec<Tile>) {
    let kv_heads = task.kv.shape().heads;
    let group = task.heads / kv_heads;
    let rows = (TILE_QUERIES / group).max(1);
    let whole: usize = runs.iter().map(|run| run.len.div_ceil(rows) * kv_heads).sum();
    // No query's keys are split: their order is part of the bits. Its neighbours can be given away.
    let shares = if whole < threads { group.min(threads.div_ceil(whole.max(1))) } else { 1 };
    tiles.clear();
    for (run, Run { len, .. }) in runs.iter().enumerate() {
        for first in (0..*len).step_by(rows).rev() {
            for kv_head in 0..kv_heads {
                for share in 0..shares {
                    let heads = part(group, share, shares);
                    let (head, heads) = (kv_head * group + heads.start, heads.len());
                    tiles.push(Tile { run, first, len: rows.min(len - first), kv_head, head, heads });
                }
            }
        }
    }
}

fn lowest_key(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

impl ThreadSpace {
    fn compute(&mut self, task: &Attend<'_>, (tile, run): (&Tile, Run<'_>), ops: Ops, results: &Results) {
        let (steps, head_dim) = (steps(ops.isa()), task.kv.shape().head_dim);
        let queries = tile.len * tile.heads;
        self.space.reset(queries, head_dim);
        for query in 0..queries {
            let (row, head) =
                (run.first_row + tile.first + query / tile.heads, tile.head + query % tile.heads);
            let values = &task.queries[row * task.stride + head * head_dim..][..head_dim];
            self.space.pack(query, steps.chunk, values);
        }
        let start = run.position + tile.first;
        let last = (start + tile.len - 1) / KV_BLOCK;
        for block in lowest_key(task.window, start) / KV_BLOCK..=last {
            for (query, span) in self.space.spans.iter_mut().enumerate() {
                *span = seen(task.window, start + query / tile.heads, block);
            }
            let here = task.kv.head(run.table[block], tile.kv_head);
            let next = (block < last).then(|| task.kv.head(run.table[block + 1], tile.kv_head));
            self.fold(steps, ops, here, next);
        }
        for query in 0..queries {
            let (row, head) =
                (run.first_row + tile.first + query / tile.heads, tile.head + query % tile.heads);
            // SAFETY: this tile alone has this row and head; `attend` returns after all tiles are done.
            let out = unsafe { results.at((row * task.heads + head) * head_dim, head_dim) };
            // SAFETY: `steps` chose this function for an instruction set that `Native` detected.
            unsafe { (steps.result)(&self.space, query, out) };
        }
    }

    /// Folds one block into all queries; `next` is the block after it.
    fn fold(&mut self, steps: &Steps, ops: Ops, here: [KvPart<'_>; 2], next: Option<[KvPart<'_>; 2]>) {
        let ThreadSpace { space, wide } = self;
        // SAFETY of all calls: `steps` chose these functions for an instruction set that `Native` detected.
        match here {
            [KvPart::F16(keys), KvPart::F16(values)] if space.states.len() <= DIRECT_QUERIES => {
                let ahead: Ahead<'_, u16> = match next {
                    Some([KvPart::F16(keys), KvPart::F16(values)]) => Some([keys, values]),
                    _ => None,
                };
                // SAFETY: as above.
                unsafe { (steps.scores_half)(space, keys, ahead) };
                // SAFETY: as above.
                unsafe { (steps.values_half)(space, values) };
            }
            [KvPart::F16(keys), KvPart::F16(values)] => {
                wide.resize(keys.len(), 0.0);
                ops.widen_f16(keys, wide);
                // SAFETY: as above.
                unsafe { (steps.scores)(space, wide, None) };
                ops.widen_f16(values, wide);
                // SAFETY: as above.
                unsafe { (steps.values)(space, wide) };
            }
            [KvPart::F32(keys), KvPart::F32(values)] => {
                let ahead: Ahead<'_, f32> = match next {
                    Some([KvPart::F32(keys), KvPart::F32(values)]) => Some([keys, values]),
                    _ => None,
                };
                // SAFETY: as above.
                unsafe { (steps.scores)(space, keys, ahead) };
                // SAFETY: as above.
                unsafe { (steps.values)(space, values) };
            }
            [KvPart::F16(_), KvPart::F32(_)] | [KvPart::F32(_), KvPart::F16(_)] => {
                unreachable!("a layer keeps keys and values in one form")
            }
        }
    }
}

/// The keys of `block` that the query at `position` sees.
fn seen(window: Option<usize>, position: usize, block: usize) -> Span {
    let start = block * KV_BLOCK;
    let from = lowest_key(window, position).saturating_sub(start).min(KV_BLOCK);
    Span { from, to: (position + 1).saturating_sub(start).min(KV_BLOCK) }
}

/// The steps of an instruction set that the machine has.
fn steps(isa: Isa) -> &'static Steps {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => &fold::avx2::STEPS,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => &fold::avx512::STEPS,
        _ => &fold::portable::STEPS,
    }
}
