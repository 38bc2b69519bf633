//! One cache block folded into the running softmax of many queries, in registers.
//!
//! Problem: with one query at a time every fused multiply-add waits for a load. Idea: a chunk of queries shares each
//! loaded register of keys (lanes are keys, one chain of fma per key and query, dimensions ascending) and of values
//! (lanes are dimensions, keys ascending); a chain never knows who runs beside it, so the bits are those of
//! `attend`'s definition. Queries of a chunk may see different parts of a block (the causal diagonal, windows): keys
//! that all of them see are shared, the others are added for each query alone, still in ascending order. A key
//! outside a query's span is never multiplied by zero, because it may hold anything.
//!
//! Price: the scores of a block are computed for all its 32 keys, seen or not.
#![allow(unsafe_code, reason = "intrinsics behind `Lanes`; entered through tables chosen after detection")]

use super::super::definition::exp;
use super::super::kv::KV_BLOCK;
#[cfg(target_arch = "x86_64")]
use super::super::lanes::{Avx2, Avx512};
use super::super::lanes::{Lanes, Portable, Stored, each};

/// Scores of one query with a block's keys, later their weights.
type Row = [f32; KV_BLOCK];

/// Running softmax of one query.
#[derive(Clone, Copy, Debug)]
pub(super) struct State {
    pub(super) max: f32,
    pub(super) total: f32,
}

/// Keys of a block that a query sees, ascending; none if `from >= to`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) from: usize,
    pub(super) to: usize,
}

impl Span {
    fn is_empty(self) -> bool {
        self.from >= self.to
    }
}

/// What the queries of one tile have gathered so far.
#[derive(Debug, Default)]
pub(super) struct Space {
    /// Width of a head.
    pub(super) dims: usize,
    /// Factor on scores.
    pub(super) scale: f32,
    /// `[chunk][dims][queries of the chunk]`: a dimension of the whole chunk lies together.
    pub(super) queries: Vec<f32>,
    /// What each query sees of the current block.
    pub(super) spans: Vec<Span>,
    pub(super) states: Vec<State>,
    /// `[queries][dims]`
    pub(super) sums: Vec<f32>,
    weights: Vec<Row>,
    /// What the sums so far are scaled by in this block.
    factors: Vec<f32>,
}

impl Space {
    /// Empties it for `queries` queries of width `dims`.
    pub(super) fn reset(&mut self, queries: usize, dims: usize) {
        (self.dims, self.scale) = (dims, 1.0 / (dims as f32).sqrt());
        self.states.clear();
        self.states.resize(queries, State { max: f32::NEG_INFINITY, total: 0.0 });
        self.sums.clear();
        self.sums.resize(queries * dims, 0.0);
        self.queries.resize(queries * dims, 0.0);
        self.spans.resize(queries, Span { from: 0, to: 0 });
        self.weights.resize(queries, [0.0; KV_BLOCK]);
        self.factors.resize(queries, 1.0);
    }

    /// Puts query `index` where a chunk of `chunk` queries reads it.
    pub(super) fn pack(&mut self, index: usize, chunk: usize, query: &[f32]) {
        let first = index / chunk * chunk;
        let len = chunk.min(self.states.len() - first);
        let place = self.queries[first * self.dims..].iter_mut().skip(index - first).step_by(len);
        for (to, x) in place.zip(query) {
            *to = *x;
        }
    }
}

/// Keys and values of the next block, fetched while this one is computed with.
pub(super) type Ahead<'a, T> = Option<[&'a [T]; 2]>;

type Scores<T> = unsafe fn(&mut Space, &[T], Ahead<'_, T>);
type Values<T> = unsafe fn(&mut Space, &[T]);

/// The steps of one instruction set.
pub(super) struct Steps {
    /// Queries of a chunk.
    pub(super) chunk: usize,
    /// Weights, from keys `[dims, KV_BLOCK]` in f16 or f32.
    pub(super) scores_half: Scores<u16>,
    pub(super) scores: Scores<f32>,
    /// Sums, from values `[KV_BLOCK, dims]`.
    pub(super) values_half: Values<u16>,
    pub(super) values: Values<f32>,
    /// The result of query `index`.
    pub(super) result: unsafe fn(&Space, usize, &mut [f32]),
}

/// Calls `$f::<L, T, queries>` for 1 to 8 queries.
macro_rules! by_queries {
    ($queries:expr, $f:ident, $args:tt) => { by_queries!(@ $queries, $f, $args, 1 2 3 4 5 6 7 8) };
    (@ $queries:expr, $f:ident, $args:tt, $($n:literal)*) => {
        match $queries { $( $n if $n <= L::QUERIES => $f::<L, T, $n> $args, )* _ => {} }
    };
}

/// Scores and weights of all queries; factors for the sums so far.
#[inline(always)]
unsafe fn weigh_all<L: Lanes, T: Stored>(space: &mut Space, keys: &[T], mut ahead: Ahead<'_, T>) {
    let (dims, scale) = (space.dims, space.scale);
    let mut first = 0;
    while first < space.states.len() {
        let len = L::QUERIES.min(space.states.len() - first);
        let spans = &space.spans[first..first + len];
        if spans.iter().any(|span| !span.is_empty()) {
            let queries = &space.queries[first * dims..(first + len) * dims];
            let weights = &mut space.weights[first..first + len];
            // SAFETY: the caller's, and every instantiation is one of its registers.
            unsafe { by_queries!(len, scores, (queries, keys, ahead.take(), weights)) };
            for q in 0..len {
                let state = &mut space.states[first + q];
                space.factors[first + q] = weigh(&mut weights[q], spans[q], scale, state);
            }
            add_totals(weights, spans, &mut space.states[first..first + len]);
        }
        first += len;
    }
}

/// `out[q][j] = sum over d of queries[d][q] keys[d][j]`, for `Q` queries and all keys of the block.
#[inline(always)]
unsafe fn scores<L: Lanes, T: Stored, const Q: usize>(
    queries: &[f32],
    keys: &[T],
    ahead: Ahead<'_, T>,
    out: &mut [Row],
) {
    let (queries, keys) = (queries.as_chunks::<Q>().0, keys.as_chunks::<KV_BLOCK>().0);
    let (dims, out) = (queries.len().min(keys.len()), &mut out[..Q]);
    for at in (0..KV_BLOCK).step_by(2 * L::N) {
        // SAFETY: both registers lie within the block's keys and the row of scores, since 2 N divides 32.
        unsafe {
            let mut acc = [[L::zero(); 2]; Q];
            for d in 0..dims {
                if let Some(next) = ahead {
                    fetch::<L, T>(next, d);
                }
                let key = keys[d].as_ptr().add(at);
                let (low, high) = (T::load::<L>(key), T::load::<L>(key.add(L::N)));
                let query = &queries[d];
                each!(Q, q, {
                    let x = L::splat(query[q]);
                    acc[q][0] = L::fma(x, low, acc[q][0]);
                    acc[q][1] = L::fma(x, high, acc[q][1]);
                });
            }
            each!(Q, q, {
                L::store(out[q].as_mut_ptr().add(at), acc[q][0]);
                L::store(out[q].as_mut_ptr().add(at + L::N), acc[q][1]);
            });
        }
    }
}

/// Asks for line `d` of the next block's keys and values: a block has as many of 32 values as a head dimensions.
#[inline(always)]
unsafe fn fetch<L: Lanes, T>(next: [&[T]; 2], d: usize) {
    for tile in next {
        let line = tile.as_ptr().wrapping_add(d * KV_BLOCK).cast::<u8>();
        // SAFETY: the caller's; prefetches never fault.
        unsafe {
            L::prefetch(line);
            if size_of::<T>() > 2 {
                L::prefetch(line.wrapping_add(64));
            }
        }
    }
}

/// Scores become weights `exp(score - max)`; returns what the sums so far are scaled by. Beyond the span weights are
/// arbitrary.
#[inline(always)]
fn weigh(row: &mut Row, span: Span, scale: f32, state: &mut State) -> f32 {
    if span.is_empty() {
        return 1.0;
    }
    let mut seen = [f32::NEG_INFINITY; KV_BLOCK];
    for j in 0..KV_BLOCK {
        let score = row[j] * scale;
        row[j] = score;
        // The comparison passes over NaN, which the tree of maxima would not.
        let counts = (j >= span.from) & (j < span.to) & (score > f32::NEG_INFINITY);
        seen[j] = if counts { score } else { f32::NEG_INFINITY };
    }
    let top = largest(&seen);
    let max = if top > state.max { top } else { state.max };
    let mut factor = 1.0;
    if state.total != 0.0 && max > state.max {
        factor = exp(state.max - max);
        state.total *= factor;
    }
    state.max = max;
    for j in 0..KV_BLOCK {
        row[j] = exp(row[j] - max);
    }
    factor
}

/// Largest of values that are not NaN.
#[inline(always)]
fn largest(x: &Row) -> f32 {
    let mut lanes = [0.0f32; 16];
    for i in 0..16 {
        lanes[i] = if x[i + 16] > x[i] { x[i + 16] } else { x[i] };
    }
    for i in 0..8 {
        lanes[i] = if lanes[i + 8] > lanes[i] { lanes[i + 8] } else { lanes[i] };
    }
    for i in 0..4 {
        lanes[i] = if lanes[i + 4] > lanes[i] { lanes[i + 4] } else { lanes[i] };
    }
    let mut max = lanes[0];
    for i in 1..4 {
        max = if lanes[i] > max { lanes[i] } else { max };
    }
    max
}

/// Adds the weights of each span to its total, keys ascending. The chains of a chunk run side by side.
#[inline(always)]
fn add_totals(weights: &[Row], spans: &[Span], states: &mut [State]) {
    let mut q = 0;
    while q + 4 <= spans.len() {
        let (rows, spans) = (&weights[q..q + 4], &spans[q..q + 4]);
        let states = &mut states[q..q + 4];
        let shared = seen_by_all(spans);
        let mut totals = [0.0f32; 4];
        for i in 0..4 {
            totals[i] = added(states[i].total, &rows[i], spans[i].from, shared.from.min(spans[i].to));
        }
        for j in shared.from..shared.to {
            each!(4, i, {
                totals[i] += rows[i][j];
            });
        }
        for i in 0..4 {
            let next = shared.to.max(shared.from).max(spans[i].from);
            states[i].total = added(totals[i], &rows[i], next, spans[i].to);
        }
        q += 4;
    }
    for q in q..spans.len() {
        states[q].total = added(states[q].total, &weights[q], spans[q].from, spans[q].to);
    }
}

#[inline(always)]
fn added(mut total: f32, row: &Row, from: usize, to: usize) -> f32 {
    for j in from..to {
        total += row[j];
    }
    total
}

/// Keys that all of several queries see.
#[inline(always)]
fn seen_by_all(spans: &[Span]) -> Span {
    let mut all = Span { from: 0, to: KV_BLOCK };
    for span in spans {
        all.from = all.from.max(span.from);
        all.to = all.to.min(span.to);
    }
    all
}

/// Values of a block, and the keys that count.
#[derive(Clone, Copy)]
struct Part<'a, T> {
    /// `[KV_BLOCK, dims]`
    values: &'a [T],
    dims: usize,
    span: Span,
}

/// Scales all sums by their factors and adds the weighted values of each span.
#[inline(always)]
unsafe fn add_all<L: Lanes, T: Stored>(space: &mut Space, values: &[T]) {
    let dims = space.dims;
    let mut first = 0;
    while first < space.states.len() {
        let len = L::QUERIES.min(space.states.len() - first);
        let spans = &space.spans[first..first + len];
        let (weights, factors) = (&space.weights[first..first + len], &mut space.factors[first..first + len]);
        let sums = &mut space.sums[first * dims..(first + len) * dims];
        let shared = seen_by_all(spans);
        let Span { from, to } = shared;
        // SAFETY: the caller's, and every instantiation is one of its registers.
        unsafe {
            for q in 0..len {
                let own = Span { from: spans[q].from, to: spans[q].to.min(from) };
                let own = if shared.is_empty() { spans[q] } else { own };
                if !own.is_empty() {
                    let part = Part { values, dims, span: own };
                    add::<L, T, 1>(part, &weights[q..], &factors[q..], &mut sums[q * dims..]);
                    factors[q] = 1.0;
                }
            }
            if !shared.is_empty() {
                let part = Part { values, dims, span: shared };
                by_queries!(len, add, (part, weights, factors, sums));
                for q in 0..len {
                    let part = Part { values, dims, span: Span { from: to, to: spans[q].to } };
                    if !part.span.is_empty() {
                        add::<L, T, 1>(part, &weights[q..], &[1.0], &mut sums[q * dims..]);
                    }
                }
            }
        }
        first += len;
    }
}

/// `sums[q] = sums[q] * factors[q] + sum over keys of weights[q][j] values[j]`, for `Q` queries.
#[inline(always)]
unsafe fn add<L: Lanes, T: Stored, const Q: usize>(
    part: Part<'_, T>,
    weights: &[Row],
    factors: &[f32],
    sums: &mut [f32],
) {
    let Part { values, dims, span } = part;
    let (weights, factors, sums) = (&weights[..Q], &factors[..Q], &mut sums[..Q * dims]);
    let mut d = 0;
    // SAFETY: the caller's; columns `d` and up to two registers of them lie within `dims`.
    unsafe {
        while d + 2 * L::N <= dims {
            add_columns::<L, T, Q, 2>(part, weights, factors, &mut sums[d..]);
            d += 2 * L::N;
        }
        while d + L::N <= dims {
            add_columns::<L, T, Q, 1>(part, weights, factors, &mut sums[d..]);
            d += L::N;
        }
    }
    for d in d..dims {
        for q in 0..Q {
            let mut sum = sums[q * dims + d] * factors[q];
            for j in span.from..span.to {
                sum = weights[q][j].mul_add(values[j * dims + d].widen(), sum);
            }
            sums[q * dims + d] = sum;
        }
    }
}

/// `add` for `R` registers of columns, those from which `sums` begins.
#[inline(always)]
unsafe fn add_columns<L: Lanes, T: Stored, const Q: usize, const R: usize>(
    part: Part<'_, T>,
    weights: &[Row],
    factors: &[f32],
    sums: &mut [f32],
) {
    let Part { values, dims, span } = part;
    // `sums` is the rest of `Q` rows.
    let column = Q * dims - sums.len();
    assert!(column + R * L::N <= dims && span.to <= KV_BLOCK && values.len() >= KV_BLOCK * dims);
    let start = sums.as_mut_ptr();
    // SAFETY: rows below `Q` have `R * N` values from the column on, and so have all rows of values below `to`.
    unsafe {
        let mut acc = [[L::zero(); R]; Q];
        each!(Q, q, {
            let factor = L::splat(factors[q]);
            each!(R, r, {
                acc[q][r] = L::mul(L::load(start.add(q * dims + r * L::N)), factor);
            });
        });
        for j in span.from..span.to {
            let row = values.as_ptr().add(j * dims + column);
            let mut value = [L::zero(); R];
            each!(R, r, {
                value[r] = T::load::<L>(row.add(r * L::N));
            });
            each!(Q, q, {
                let weight = L::splat(*weights.as_ptr().add(q).cast::<f32>().add(j));
                each!(R, r, {
                    acc[q][r] = L::fma(weight, value[r], acc[q][r]);
                });
            });
        }
        each!(Q, q, {
            each!(R, r, {
                L::store(start.add(q * dims + r * L::N), acc[q][r]);
            });
        });
    }
}

#[inline(always)]
fn divide(space: &Space, index: usize, out: &mut [f32]) {
    let total = space.states[index].total;
    let sums = &space.sums[index * space.dims..(index + 1) * space.dims];
    let n = sums.len().min(out.len());
    let (sums, out) = (&sums[..n], &mut out[..n]);
    for d in 0..n {
        out[d] = sums[d] / total;
    }
}

macro_rules! compiled_for {
    ($name:ident, $lanes:ty $(, $features:literal)?) => {
        /// The steps above, compiled for one instruction set.
        pub(super) mod $name {
            use super::*;

            compiled_for!(@ ($($features)?)
                unsafe fn scores_half(space: &mut Space, keys: &[u16], ahead: Ahead<'_, u16>) {
                    // SAFETY: compiled for these registers; the caller detected them. So below.
                    unsafe { weigh_all::<$lanes, u16>(space, keys, ahead) }
                }
                unsafe fn scores(space: &mut Space, keys: &[f32], ahead: Ahead<'_, f32>) {
                    // SAFETY: as above.
                    unsafe { weigh_all::<$lanes, f32>(space, keys, ahead) }
                }
                unsafe fn values_half(space: &mut Space, values: &[u16]) {
                    // SAFETY: as above.
                    unsafe { add_all::<$lanes, u16>(space, values) }
                }
                unsafe fn values(space: &mut Space, values: &[f32]) {
                    // SAFETY: as above.
                    unsafe { add_all::<$lanes, f32>(space, values) }
                }
                unsafe fn result(space: &Space, index: usize, out: &mut [f32]) {
                    divide(space, index, out)
                }
            );

            /// The steps of this instruction set.
            pub(in super::super) static STEPS: Steps =
                Steps { chunk: <$lanes>::QUERIES, scores_half, scores, values_half, values, result };
        }
    };
    (@ () $($item:item)*) => { $($item)* };
    (@ ($features:literal) $($item:item)*) => { $( #[target_feature(enable = $features)] $item )* };
}

compiled_for!(portable, Portable);
#[cfg(target_arch = "x86_64")]
compiled_for!(avx2, Avx2, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
compiled_for!(avx512, Avx512, "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c");
