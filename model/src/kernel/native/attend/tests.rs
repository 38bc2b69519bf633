//! Attention of every instruction set and thread count against the definition, one query at a time.

use std::sync::Arc;

use super::super::definition::{exp, narrow_f16, widen_f16};
use super::super::kv::{KvCache, KvShape, Slot};
use super::super::tests::Rng;
use super::super::{Isa, Native, NativeConfig};
use super::*;
use crate::format::Format;

/// One sequence: rounded keys and values by position, per key head.
struct Sequence {
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    table: Vec<u32>,
    position: usize,
    len: usize,
}

struct Case {
    shape: KvShape,
    heads: usize,
    window: Option<usize>,
    cache: KvCache,
    sequences: Vec<Sequence>,
    queries: Vec<f32>,
    stride: usize,
}

/// Tokens of a run, around tiles and blocks.
const SIZES: [usize; 8] = [1, 1, 2, 7, 31, 33, 64, 89];

fn rounded(format: Format, x: &[f32]) -> Vec<f32> {
    let round = |x: &f32| if format.is_quantized() { widen_f16(narrow_f16(*x)) } else { *x };
    x.iter().map(round).collect()
}

impl Case {
    fn random(rng: &mut Rng, format: Format, shape: KvShape, group: usize) -> Case {
        let heads = shape.heads * group;
        let window = [None, Some(1 + rng.below(100))][rng.below(2)];
        let sizes: Vec<(usize, usize)> =
            (0..1 + rng.below(3)).map(|_| (rng.below(120), SIZES[rng.below(SIZES.len())])).collect();
        let blocks: usize = sizes.iter().map(|(position, len)| (position + len).div_ceil(KV_BLOCK)).sum();
        let ops = Ops::new(Isa::Scalar).unwrap();
        let mut cache = KvCache::of_shape(shape, 2, format, blocks);
        // Whatever a slot held before must not matter, NaN least of all.
        let width = shape.heads * shape.head_dim;
        for block in 0..blocks as u32 {
            for offset in 0..KV_BLOCK {
                cache.store(1, Slot { block, offset }, &vec![f32::NAN; 2 * width], ops);
            }
        }
        let mut free: Vec<u32> = (0..blocks as u32).collect();
        let mut sequences = Vec::new();
        for (position, len) in sizes {
            let table: Vec<u32> = (0..(position + len).div_ceil(KV_BLOCK))
                .map(|_| free.swap_remove(rng.below(free.len())))
                .collect();
            let (mut keys, mut values) = (Vec::new(), Vec::new());
            for position in 0..position + len {
                let row: Vec<f32> = (0..2 * width).map(|_| rng.unit() * 3.0).collect();
                cache.store(1, Slot::of(position, &table), &row, ops);
                keys.push(rounded(format, &row[..width]));
                values.push(rounded(format, &row[width..]));
            }
            sequences.push(Sequence { keys, values, table, position, len });
        }
        let rows: usize = sequences.iter().map(|sequence| sequence.len).sum();
        let stride = heads * shape.head_dim + 3;
        let loud = [1.0, 1.0, 40.0][rng.below(3)];
        let mut queries: Vec<f32> = (0..rows * stride).map(|_| rng.unit() * loud).collect();
        if rng.below(4) == 0 {
            let broken = rng.below(queries.len());
            queries[broken] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][rng.below(3)];
        }
        Case { shape, heads, window, cache, sequences, queries, stride }
    }

    fn run(&self, native: &Native) -> Vec<u32> {
        let mut first_row = 0;
        let mut runs = Vec::new();
        for Sequence { len, position, table, .. } in &self.sequences {
            runs.push(Run { first_row, len: *len, position: *position, table });
            first_row += len;
        }
        let mut out = vec![7.0; first_row * self.heads * self.shape.head_dim];
        let task = Attend {
            kv: self.cache.layer(1),
            heads: self.heads,
            window: self.window,
            queries: &self.queries,
            stride: self.stride,
        };
        let mut scratch = AttendScratch::default();
        // The second call finds the scratch memory of the first.
        native.attend(&task, &runs, &mut out, &mut scratch);
        native.attend(&task, &runs, &mut out, &mut scratch);
        out.into_iter().map(canonical).collect()
    }

    fn expected(&self) -> Vec<u32> {
        let (dim, group) = (self.shape.head_dim, self.heads / self.shape.heads);
        let rows =
            self.sequences.iter().flat_map(|sequence| (0..sequence.len).map(move |row| (sequence, row)));
        let mut out = Vec::new();
        for (index, (sequence, row)) in rows.enumerate() {
            for head in 0..self.heads {
                let query = &self.queries[index * self.stride + head * dim..][..dim];
                let columns = head / group * dim..(head / group + 1) * dim;
                let position = sequence.position + row;
                let lowest = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
                let seen: Vec<(usize, &[f32], &[f32])> = (lowest..=position)
                    .map(|j| (j, &sequence.keys[j][columns.clone()], &sequence.values[j][columns.clone()]))
                    .collect();
                out.extend(attend_one(query, &seen).into_iter().map(canonical));
            }
        }
        out
    }
}

/// NaN is NaN: which one is not part of the bits.
fn canonical(x: f32) -> u32 {
    if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }
}

/// The text of the definition (module `attend`), for one query and the (position, key, value) it sees.
fn attend_one(query: &[f32], seen: &[(usize, &[f32], &[f32])]) -> Vec<f32> {
    let scale = 1.0 / (query.len() as f32).sqrt();
    let (mut max, mut total, mut sums) = (f32::NEG_INFINITY, 0.0f32, vec![0.0f32; query.len()]);
    for block in seen.chunk_by(|a, b| a.0 / KV_BLOCK == b.0 / KV_BLOCK) {
        let score =
            |key: &[f32]| query.iter().zip(key).fold(0.0f32, |sum, (q, k)| q.mul_add(*k, sum)) * scale;
        let scores: Vec<f32> = block.iter().map(|(_, key, _)| score(key)).collect();
        let new = scores.iter().fold(max, |max, score| if *score > max { *score } else { max });
        if total != 0.0 && new > max {
            let factor = exp(max - new);
            total *= factor;
            sums.iter_mut().for_each(|sum| *sum *= factor);
        }
        max = new;
        for (score, (_, _, value)) in scores.iter().zip(block) {
            let weight = exp(score - max);
            total += weight;
            sums.iter_mut().zip(*value).for_each(|(sum, v)| *sum = weight.mul_add(*v, *sum));
        }
    }
    sums.iter().map(|sum| sum / total).collect()
}

fn backends() -> Vec<Native> {
    let with = |isa, threads| Native::new(NativeConfig { isa: Some(isa), ..NativeConfig::threads(threads) });
    let all = Isa::available_here().flat_map(|isa| [1, 3].map(|threads| with(isa, threads).unwrap()));
    all.chain([with(Isa::best(), 12).unwrap()]).collect()
}

#[test]
fn attention_is_the_definition_with_every_instruction_set() {
    let backends = backends();
    let mut rng = Rng::new(11);
    for head_dim in [64, 80, 96, 128, 256, 2, 10, 24] {
        for group in [1, 2, 3, 4, 5, 7, 8, 12, 16] {
            let format = [Format::Q4, Format::Bf16][rng.below(2)];
            let shape = KvShape { heads: 1 + rng.below(3), head_dim };
            let case = Case::random(&mut rng, format, shape, group);
            let expected = case.expected();
            for native in &backends {
                let (found, dim) = (case.run(native), case.shape.head_dim);
                let wrong = found.iter().zip(&expected).position(|(found, expected)| found != expected);
                let place = wrong.map(|at| (at / dim / case.heads, at / dim % case.heads, at % dim));
                assert_eq!(
                    place, None,
                    "{native:?}: row, head, dimension of {shape:?} x {group}, {format:?}, window {:?}",
                    case.window
                );
            }
        }
    }
}

#[test]
fn a_query_does_not_see_who_is_computed_beside_it() {
    let mut rng = Rng::new(12);
    let native = Arc::new(Native::new(NativeConfig::threads(2)).unwrap());
    let mut case = Case::random(&mut rng, Format::Q4, KvShape { heads: 2, head_dim: 64 }, 3);
    case.sequences.truncate(1);
    let sequence = &mut case.sequences[0];
    let (position, len) = (sequence.position, sequence.len);
    let whole = case.run(&native);
    let width = case.heads * case.shape.head_dim;
    let queries = case.queries.clone();
    for row in 0..len {
        (case.sequences[0].position, case.sequences[0].len) = (position + row, 1);
        case.queries = queries[row * case.stride..(row + 1) * case.stride].to_vec();
        assert_eq!(case.run(&native), whole[row * width..(row + 1) * width], "row {row} of {len}");
    }
}
