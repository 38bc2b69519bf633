//! One token from one row of logits.
//!
//! Problem: the same request with the same seed must give the same tokens on every machine, in any batch and
//! after any preemption. Idea: everything is f64 arithmetic in a fixed order with our own `exp` (`model`'s, vectorised; the
//! system's differs between machines), candidates are ordered by (logit descending, id ascending) or, where no filter needs
//! that, by id, and the random number of a draw is a hash of the seed and the token's index alone, so there is no generator state to lose. Price:
//! two passes over the vocabulary per drawn token (a fraction of a millisecond for 150 000 entries); the
//! vocabulary is never sorted as a whole, only as much of its head as the draw reaches.
//!
//! Order of operations: logit bias; repetition, frequency and presence penalties; stop tokens barred while below
//! the minimum length; temperature; top-k; top-p; min-p; draw. Log-probabilities are of the raw logits.
//!
//! It refuses rows with values that are not finite, naming the first, and knows neither text nor stop strings.

use std::collections::BTreeMap;

use model::kernel::native::definition::Tempered;
use model::kernel::native::ops::Ops;

use crate::request::{Sampling, TokenLogprobs};

/// Tokens sorted at first when drawing; four times as many in every further round. A draw from a model's
/// distribution ends within the first few hundred almost always.
const SORTED_FIRST: usize = 256;

/// Logits whose maxima are looked at first when the head of the ranking is wanted: so few that the head's members
/// rarely share one, so many that the maxima cost nothing.
const RANKED_TOGETHER: usize = 64;

/// Logits searched together for the best: a maximum is found at memory speed, its place is not.
const SEARCHED_TOGETHER: usize = 1024;

/// A row that cannot be sampled from.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum SampleError {
    /// The model produced infinity or NaN.
    #[error("the logit of token {token} is {value}; the model's weights or a node's answers are damaged")]
    NotFinite {
        /// First such token.
        token: usize,
        /// Its logit.
        value: f32,
    },
    /// There is nothing to choose from.
    #[error("the row of logits is empty")]
    Empty,
}

/// Buffers for sampling, one per engine, reused for every row.
#[derive(Debug, Default)]
pub struct Scratch {
    logits: Vec<f32>,
    weights: Vec<f64>,
    order: Vec<u64>,
    peaks: Vec<f32>,
    heights: Vec<f32>,
    ops: Ops,
}

/// The choosing state of one sequence: what it has seen. A function of prompt and output alone.
#[derive(Debug)]
pub struct Sampler {
    sampling: Sampling,
    stop_tokens: Vec<u32>,
    min_tokens: u32,
    generated: u64,
    /// Tokens of prompt and output, one bit each; empty unless the repetition penalty needs it.
    seen: Vec<u64>,
    /// Occurrences in the output; filled only if a penalty needs them.
    counts: BTreeMap<u32, u32>,
}

impl Sampler {
    /// For a sequence that starts with `prompt`. `stop_tokens` are not chosen before `min_tokens` tokens.
    pub fn new(sampling: Sampling, prompt: &[u32], stop_tokens: &[u32], min_tokens: u32) -> Sampler {
        let mut sampler = Sampler {
            sampling,
            stop_tokens: stop_tokens.to_vec(),
            min_tokens,
            generated: 0,
            seen: Vec::new(),
            counts: BTreeMap::new(),
        };
        if sampler.sampling.repetition_penalty != 1.0 {
            prompt.iter().for_each(|token| sampler.mark_seen(*token));
        }
        sampler
    }

    /// Tokens chosen so far.
    pub fn generated(&self) -> u64 {
        self.generated
    }

    /// Chooses the next token from a row of `[vocab]` raw logits and remembers it.
    pub fn choose(&mut self, logits: &[f32], scratch: &mut Scratch) -> Result<u32, SampleError> {
        check_finite(logits, scratch.ops)?;
        let mut own = std::mem::take(&mut scratch.logits);
        let adjusted = if self.adjusts() {
            own.clear();
            own.extend_from_slice(logits);
            self.adjust(&mut own);
            &own[..]
        } else {
            logits
        };
        let token = if self.sampling.temperature <= 0.0 || self.sampling.top_k == 1 {
            best(adjusted, scratch.ops)
        } else {
            draw(adjusted, &self.sampling, uniform(self.sampling.seed, self.generated), scratch)
        };
        scratch.logits = own;
        self.remember(token);
        Ok(token)
    }

    fn remember(&mut self, token: u32) {
        self.generated += 1;
        if self.sampling.repetition_penalty != 1.0 {
            self.mark_seen(token);
        }
        if self.sampling.frequency_penalty != 0.0 || self.sampling.presence_penalty != 0.0 {
            *self.counts.entry(token).or_default() += 1;
        }
    }

    fn mark_seen(&mut self, token: u32) {
        let word = token as usize / 64;
        if self.seen.len() <= word {
            self.seen.resize(word + 1, 0);
        }
        self.seen[word] |= 1 << (token % 64);
    }

    fn bars_stop_tokens(&self) -> bool {
        self.generated < u64::from(self.min_tokens) && !self.stop_tokens.is_empty()
    }

    fn adjusts(&self) -> bool {
        !self.sampling.logit_bias.is_empty()
            || !self.seen.is_empty()
            || !self.counts.is_empty()
            || self.bars_stop_tokens()
    }

    fn adjust(&self, logits: &mut [f32]) {
        for (token, bias) in &self.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit += bias;
            }
        }
        let penalty = self.sampling.repetition_penalty;
        for (word, bits) in self.seen.iter().enumerate() {
            let mut rest = *bits;
            while rest != 0 {
                if let Some(logit) = logits.get_mut(word * 64 + rest.trailing_zeros() as usize) {
                    *logit = if *logit > 0.0 { *logit / penalty } else { *logit * penalty };
                }
                rest &= rest - 1;
            }
        }
        for (token, count) in &self.counts {
            if let Some(logit) = logits.get_mut(*token as usize) {
                *logit -= self.sampling.frequency_penalty * *count as f32 + self.sampling.presence_penalty;
            }
        }
        if self.bars_stop_tokens() {
            for token in &self.stop_tokens {
                if let Some(logit) = logits.get_mut(*token as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }
}

/// Log-probability of `token` and of the `top` most probable tokens in a row of `[vocab]` raw logits: natural
/// logarithm, best first, ties to the lower id. One pass to sum, one to find the best.
pub fn logprobs(logits: &[f32], token: u32, top: u32) -> Result<TokenLogprobs, SampleError> {
    let ops = Ops::default();
    check_finite(logits, ops)?;
    let highest = f64::from(ops.max(logits));
    let offset = highest + libm::log(ops.tempered(logits, Tempered { highest, temperature: 1.0 }, &mut []));
    let of = |logit: f32| (f64::from(logit) - offset) as f32;
    let mut most: Vec<(f32, u32)> = Vec::with_capacity(top as usize + 1);
    for (id, logit) in logits.iter().enumerate() {
        if most.len() < top as usize || most.last().is_some_and(|(worst, _)| logit > worst) {
            let at = most.partition_point(|(other, _)| other >= logit);
            most.insert(at, (*logit, id as u32));
            most.truncate(top as usize);
        }
    }
    let chosen = logits.get(token as usize).copied().ok_or(SampleError::Empty)?;
    Ok(TokenLogprobs {
        logprob: of(chosen),
        top: most.into_iter().map(|(logit, id)| (id, of(logit))).collect(),
    })
}

fn check_finite(logits: &[f32], ops: Ops) -> Result<(), SampleError> {
    if logits.is_empty() {
        return Err(SampleError::Empty);
    }
    // Whole-row test first: it runs at memory speed, the search for the culprit need not.
    if ops.is_finite(logits) {
        return Ok(());
    }
    let found = logits.iter().copied().enumerate().find(|(_, value)| !value.is_finite());
    let (token, value) = found.unwrap_or((0, f32::NAN));
    Err(SampleError::NotFinite { token, value })
}

/// The highest logit's index; ties to the lower id.
fn best(logits: &[f32], ops: Ops) -> u32 {
    let (mut highest, mut from) = (f32::NEG_INFINITY, 0);
    for (index, part) in logits.chunks(SEARCHED_TOGETHER).enumerate() {
        let peak = ops.max(part);
        if peak > highest {
            (highest, from) = (peak, index * SEARCHED_TOGETHER);
        }
    }
    let place = logits[from..].iter().position(|logit| *logit == highest).unwrap_or(0);
    (from + place) as u32
}

/// Token `id` with its logit as one number whose ascending order is rank: higher logit first, then lower id.
fn ranked(logit: f32, id: usize) -> u64 {
    // The bits of a float, negative ones reversed, ascend as `f32::total_cmp` does.
    let bits = logit.to_bits();
    let ascending = if bits >> 31 == 0 { bits | 1 << 31 } else { !bits };
    u64::from(!ascending) << 32 | id as u64
}

/// The token of a [`ranked`] number.
fn token_of(ranked: u64) -> u32 {
    ranked as u32
}

/// Draws with `uniform` in [0, 1) from the filtered distribution.
fn draw(logits: &[f32], sampling: &Sampling, uniform: f64, scratch: &mut Scratch) -> u32 {
    let ops = scratch.ops;
    let by = Tempered { highest: f64::from(ops.max(logits)), temperature: f64::from(sampling.temperature) };
    let weight = |ranked: &u64| by.weight(logits[token_of(*ranked) as usize]);
    let kept = match sampling.top_k as usize {
        0 => logits.len(),
        k => k.min(logits.len()),
    };
    let least = f64::from(sampling.min_p);
    let top_p = sampling.top_p < 1.0;
    if kept == logits.len() && !top_p && least <= 0.0 {
        // Nothing is left out, so no order is needed but that of ids.
        scratch.weights.resize(logits.len(), 0.0);
        let total = ops.tempered(logits, by, &mut scratch.weights);
        return pick((0..).zip(scratch.weights.iter().copied()), uniform * total);
    }
    let (mut sorted, total) = if kept < logits.len() {
        scratch.rank_head(logits, kept);
        sort_head(&mut scratch.order, 0, kept);
        (kept, scratch.order[..kept].iter().map(weight).sum())
    } else {
        scratch.order.clear();
        (0, ops.tempered(logits, by, &mut []))
    };
    let enough = f64::from(sampling.top_p) * total;
    scratch.weights.clear();
    let mut mass = 0.0;
    while scratch.weights.len() < kept && !(top_p && mass >= enough) {
        if scratch.weights.len() == sorted {
            let upto = (sorted * 4).max(SORTED_FIRST).min(kept);
            if upto > scratch.order.len() {
                scratch.rank_head(logits, upto);
                sorted = 0;
            }
            sort_head(&mut scratch.order, sorted, upto);
            sorted = upto;
        }
        let next = weight(&scratch.order[scratch.weights.len()]);
        // The best token (weight 1) always stays.
        if next < least {
            break;
        }
        mass += next;
        scratch.weights.push(next);
    }
    let ranked = scratch.order.iter().map(|ranked| token_of(*ranked));
    pick(ranked.zip(scratch.weights.iter().copied()), uniform * mass)
}

impl Scratch {
    /// Into `order` the first `count` tokens of the ranking at least, with all that are as good, in no order.
    fn rank_head(&mut self, logits: &[f32], count: usize) {
        let Scratch { peaks, heights, order, ops, .. } = self;
        peaks.clear();
        peaks.extend(logits.chunks(RANKED_TOGETHER).map(|part| ops.max(part)));
        // The `count`th highest of the peaks is reached by `count` logits at least, one under each of those peaks.
        let mut bar = f32::NEG_INFINITY;
        if count <= peaks.len() {
            heights.clone_from(peaks);
            bar = *heights.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a)).1;
        }
        order.clear();
        for (index, part) in logits.chunks(RANKED_TOGETHER).enumerate() {
            if peaks[index] >= bar {
                let from = index * RANKED_TOGETHER;
                let high = part.iter().enumerate().filter(|(_, logit)| **logit >= bar);
                order.extend(high.map(|(id, logit)| ranked(*logit, from + id)));
            }
        }
    }
}

/// The first token at which the sum of weights passes `goal`. Rounding can leave the goal a hair above the whole
/// sum: then the last one with any weight.
fn pick(candidates: impl Iterator<Item = (u32, f64)>, goal: f64) -> u32 {
    let (mut passed, mut last) = (0.0, 0);
    for (token, weight) in candidates {
        passed += weight;
        if passed > goal {
            return token;
        }
        if weight > 0.0 {
            last = token;
        }
    }
    last
}

/// Puts ranks `from..upto` of `order` into their final places, given that those before are.
fn sort_head(order: &mut [u64], from: usize, upto: usize) {
    let rest = &mut order[from..];
    let count = upto - from;
    if count < rest.len() {
        rest.select_nth_unstable(count);
    }
    rest[..count].sort_unstable();
}

/// The `index`th number of stream `seed`, in [0, 1): SplitMix64's output function (Steele, Lea, Flood, "Fast
/// splittable pseudorandom number generators", 2014) over the hashed seed plus `index` steps, top 53 bits.
pub fn uniform(seed: u64, index: u64) -> f64 {
    let start = mix(seed.wrapping_add(GOLDEN));
    let bits = mix(start.wrapping_add(index.wrapping_add(1).wrapping_mul(GOLDEN)));
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// 2^64 divided by the golden ratio: SplitMix64's step.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
