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
//! (docs/decisions/0003). Keys and values of a block are widened to f32 once for all queries of a tile.
#![allow(unsafe_code, reason = "target features, enabled only after detection")]

use std::sync::Mutex;

use super::Native;
use super::definition::exp;
use super::engine::lock;
use super::isa::Isa;
use super::kv::{KV_BLOCK, KvLayer};
use super::ops::Ops;

/// Queries that share the widened keys of a block: their accumulators stay in the second-level cache.
const TILE: usize = 16;

/// Scores (queries times keys) from which waking the other threads pays: 20 us of work on one core.
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
    threads: Vec<Mutex<ThreadScratch>>,
}

#[derive(Debug, Default)]
struct ThreadScratch {
    keys: Vec<f32>,
    values: Vec<f32>,
    states: Vec<State>,
    sums: Vec<f32>,
    /// Results of this thread's tiles, one after the other.
    results: Vec<f32>,
}

/// Running softmax of one (row, head).
#[derive(Clone, Copy, Debug)]
struct State {
    max: f32,
    total: f32,
}

/// Up to `TILE` queries of one run with the query heads of one key head.
#[derive(Clone, Copy)]
struct Tile<'a> {
    run: Run<'a>,
    first: usize,
    len: usize,
    head: usize,
}

type BlockStep = unsafe fn(Block<'_>, &mut State, &mut [f32]);

/// One query against the keys `from..to` of one block.
#[derive(Clone, Copy)]
struct Block<'a> {
    query: &'a [f32],
    /// `[head_dim, KV_BLOCK]`
    keys: &'a [f32],
    /// `[KV_BLOCK, head_dim]`
    values: &'a [f32],
    from: usize,
    to: usize,
    scale: f32,
}

impl Native {
    /// Attention of all runs: into `out`, `[rows, heads * head_dim]` by batch row.
    pub fn attend(&self, task: &Attend<'_>, runs: &[Run<'_>], out: &mut [f32], scratch: &mut AttendScratch) {
        let kv_heads = task.kv.shape().heads;
        let tiles: Vec<Tile<'_>> = runs.iter().flat_map(|run| tiles(*run, kv_heads)).collect();
        let scores: usize = runs.iter().map(|run| run.len * (run.position + run.len) * task.heads).sum();
        let threads = if scores < PARALLEL_SCORES { 1 } else { self.threads() };
        scratch.threads.resize_with(self.threads(), Mutex::default);
        let (ops, step) = (self.ops(), block_step(self.ops().isa()));
        let work = |thread: usize| {
            let mut space = lock(&scratch.threads[thread]);
            space.results.clear();
            for tile in tiles.iter().skip(thread).step_by(threads) {
                space.tile(task, tile, ops, step);
            }
        };
        if threads == 1 {
            work(0)
        } else {
            self.parallel(&work)
        }
        let (width, group) = (task.heads * task.kv.shape().head_dim, task.heads / kv_heads);
        let part = group * task.kv.shape().head_dim;
        for thread in 0..threads {
            let space = lock(&scratch.threads[thread]);
            let mut results = space.results.chunks_exact(part);
            for tile in tiles.iter().skip(thread).step_by(threads) {
                let rows = tile.run.first_row + tile.first..tile.run.first_row + tile.first + tile.len;
                for (row, result) in rows.zip(&mut results) {
                    out[row * width + tile.head * part..][..part].copy_from_slice(result);
                }
            }
        }
    }
}

fn tiles(run: Run<'_>, kv_heads: usize) -> impl Iterator<Item = Tile<'_>> {
    (0..run.len).step_by(TILE).flat_map(move |first| {
        let len = TILE.min(run.len - first);
        (0..kv_heads).map(move |head| Tile { run, first, len, head })
    })
}

fn lowest_key(window: Option<usize>, position: usize) -> usize {
    window.map_or(0, |window| (position + 1).saturating_sub(window))
}

impl ThreadScratch {
    fn tile(&mut self, task: &Attend<'_>, tile: &Tile<'_>, ops: Ops, step: BlockStep) {
        let shape = task.kv.shape();
        let (head_dim, group) = (shape.head_dim, task.heads / shape.heads);
        let scale = 1.0 / (head_dim as f32).sqrt();
        self.keys.resize(shape.tile(), 0.0);
        self.values.resize(shape.tile(), 0.0);
        self.states.clear();
        self.states.resize(tile.len * group, State { max: f32::NEG_INFINITY, total: 0.0 });
        self.sums.clear();
        self.sums.resize(tile.len * group * head_dim, 0.0);
        let start = tile.run.position + tile.first;
        let blocks = lowest_key(task.window, start) / KV_BLOCK..=(start + tile.len - 1) / KV_BLOCK;
        for block in blocks {
            let index = tile.run.table[block];
            task.kv.keys(index, tile.head, ops, &mut self.keys);
            task.kv.values(index, tile.head, ops, &mut self.values);
            for row in 0..tile.len {
                let position = start + row;
                let from = lowest_key(task.window, position).max(block * KV_BLOCK);
                let to = (position + 1).min((block + 1) * KV_BLOCK);
                if from >= to {
                    continue;
                }
                let (from, to) = (from - block * KV_BLOCK, to - block * KV_BLOCK);
                let row_at = (tile.run.first_row + tile.first + row) * task.stride;
                for head in 0..group {
                    let query = &task.queries[row_at + (tile.head * group + head) * head_dim..][..head_dim];
                    let block = Block { query, keys: &self.keys, values: &self.values, from, to, scale };
                    let state = row * group + head;
                    let sums = &mut self.sums[state * head_dim..][..head_dim];
                    // SAFETY: `block_step` chose this function for an instruction set that `Native` detected.
                    unsafe { step(block, &mut self.states[state], sums) };
                }
            }
        }
        for (sums, state) in self.sums.chunks_exact(head_dim).zip(&self.states) {
            self.results.extend(sums.iter().map(|sum| sum / state.total));
        }
    }
}

/// The step of an instruction set that the machine has.
fn block_step(isa: Isa) -> BlockStep {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => step_avx2,
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 | Isa::Amx => step_avx512,
        _ => step_each,
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
fn step_avx2(block: Block<'_>, state: &mut State, sums: &mut [f32]) {
    step_each(block, state, sums);
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
fn step_avx512(block: Block<'_>, state: &mut State, sums: &mut [f32]) {
    step_each(block, state, sums);
}

/// Folds one block into the state of one (row, head).
#[inline(always)]
fn step_each(block: Block<'_>, state: &mut State, sums: &mut [f32]) {
    let mut scores = [0.0f32; KV_BLOCK];
    let columns = block.keys.as_chunks::<KV_BLOCK>().0;
    for d in 0..block.query.len() {
        for j in 0..KV_BLOCK {
            scores[j] = block.query[d].mul_add(columns[d][j], scores[j]);
        }
    }
    let mut max = state.max;
    for score in &mut scores[block.from..block.to] {
        *score *= block.scale;
        max = if *score > max { *score } else { max };
    }
    if state.total != 0.0 && max > state.max {
        let factor = exp(state.max - max);
        state.total *= factor;
        for sum in sums.iter_mut() {
            *sum *= factor;
        }
    }
    state.max = max;
    let head_dim = sums.len();
    for j in block.from..block.to {
        let weight = exp(scores[j] - max);
        state.total += weight;
        let value = &block.values[j * head_dim..(j + 1) * head_dim];
        for d in 0..head_dim {
            sums[d] = weight.mul_add(value[d], sums[d]);
        }
    }
}
