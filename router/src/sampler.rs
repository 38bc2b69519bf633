//! One token from one row of logits.
//!
//! Problem: the same request with the same seed must give the same tokens on every machine, in any batch and
//! after any preemption. Idea: everything is f64 arithmetic in a fixed order with our own `exp` (the system's
//! differs between machines), candidates are ordered by (logit descending, id ascending), and the random number
//! of a draw is a hash of the seed and the token's index alone, so there is no generator state to lose. Price:
//! two passes over the vocabulary per drawn token (a fraction of a millisecond for 150 000 entries); the
//! vocabulary is never sorted as a whole, only as much of its head as the draw reaches.
//!
//! Order of operations: logit bias; repetition, frequency and presence penalties; stop tokens barred while below
//! the minimum length; temperature; top-k; top-p; min-p; draw. Log-probabilities are of the raw logits.
//!
//! It refuses rows with values that are not finite, naming the first, and knows neither text nor stop strings.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use crate::request::{Sampling, TokenLogprobs};

/// Tokens sorted at first when drawing; four times as many in every further round. A draw from a model's
/// distribution ends within the first few hundred almost always.
const SORTED_FIRST: usize = 256;

/// `exp` below this is taken as 0: 1e-304 of the best token's probability, never drawn in practice, and above
/// the subnormal numbers whose handling differs between floating-point modes.
const EXP_FLOOR: f64 = -700.0;

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
    order: Vec<u32>,
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
        check_finite(logits)?;
        let adjusted = if self.adjusts() {
            scratch.logits.clear();
            scratch.logits.extend_from_slice(logits);
            self.adjust(&mut scratch.logits);
            &scratch.logits[..]
        } else {
            logits
        };
        let token = if self.sampling.temperature <= 0.0 || self.sampling.top_k == 1 {
            best(adjusted)
        } else {
            let uniform = uniform(self.sampling.seed, self.generated);
            draw(adjusted, &self.sampling, uniform, &mut scratch.weights, &mut scratch.order)
        };
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
    check_finite(logits)?;
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| exp(f64::from(*logit) - f64::from(highest))).sum();
    let offset = f64::from(highest) + libm::log(sum);
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

fn check_finite(logits: &[f32]) -> Result<(), SampleError> {
    if logits.is_empty() {
        return Err(SampleError::Empty);
    }
    // Whole-row test first: it runs at memory speed, the search for the culprit need not.
    if logits.iter().fold(true, |all, logit| all & logit.is_finite()) {
        return Ok(());
    }
    let found = logits.iter().copied().enumerate().find(|(_, value)| !value.is_finite());
    let (token, value) = found.unwrap_or((0, f32::NAN));
    Err(SampleError::NotFinite { token, value })
}

/// The highest logit's index; ties to the lower id.
fn best(logits: &[f32]) -> u32 {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|logit| *logit == highest).unwrap_or(0) as u32
}

/// Higher logit first, then lower id.
fn by_rank(logits: &[f32]) -> impl Fn(&u32, &u32) -> Ordering + '_ {
    |a, b| logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b))
}

/// Draws with `uniform` in [0, 1) from the filtered distribution.
fn draw(
    logits: &[f32],
    sampling: &Sampling,
    uniform: f64,
    weights: &mut Vec<f64>,
    order: &mut Vec<u32>,
) -> u32 {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let temperature = f64::from(sampling.temperature);
    let weight = |logit: f32| exp((f64::from(logit) - highest) / temperature);
    order.clear();
    order.extend(0..logits.len() as u32);
    let kept = match sampling.top_k as usize {
        0 => logits.len(),
        k => k.min(logits.len()),
    };
    let mut sorted = 0;
    weights.clear();
    let total: f64 = if kept < logits.len() {
        sorted = sort_head(logits, order, 0, kept);
        order.truncate(kept);
        order.iter().map(|id| weight(logits[*id as usize])).sum()
    } else {
        logits.iter().map(|logit| weight(*logit)).sum()
    };
    // Weights in rank order, as far as needed to pass `goal`; -0.0 and 0.0 differ in rank only.
    let mut extend_to = |goal: &dyn Fn(f64, f64) -> bool, weights: &mut Vec<f64>| {
        let mut passed: f64 = weights.iter().sum();
        while weights.len() < order.len() {
            if weights.len() == sorted {
                let upto = (sorted * 4).max(SORTED_FIRST).min(order.len());
                sorted = sort_head(logits, order, sorted, upto);
            }
            let next = weight(logits[order[weights.len()] as usize]);
            if goal(passed, next) {
                break;
            }
            passed += next;
            weights.push(next);
        }
        passed
    };
    let least = f64::from(sampling.min_p);
    let filtered = sampling.top_p < 1.0 || least > 0.0;
    let mass = if filtered {
        let enough = f64::from(sampling.top_p) * total;
        let top_p = sampling.top_p < 1.0;
        // The best token (weight 1) always stays.
        extend_to(&|passed, next| passed > 0.0 && ((top_p && passed >= enough) || next < least), weights)
    } else {
        let goal = uniform * total;
        extend_to(&|passed, _| passed > goal, weights);
        total
    };
    let goal = uniform * mass;
    let mut passed = 0.0;
    for (rank, weight) in weights.iter().enumerate() {
        passed += weight;
        if passed > goal {
            return order[rank];
        }
    }
    // Rounding can leave the goal a hair above the sum: the least probable token with any weight.
    let last = weights.iter().rposition(|weight| *weight > 0.0).unwrap_or(0);
    order[last]
}

/// Puts ranks `from..upto` of `order` into their final places, given that those before are. Returns `upto`.
fn sort_head(logits: &[f32], order: &mut [u32], from: usize, upto: usize) -> usize {
    let rest = &mut order[from..];
    let count = upto - from;
    if count < rest.len() {
        rest.select_nth_unstable_by(count, by_rank(logits));
    }
    rest[..count].sort_unstable_by(by_rank(logits));
    upto
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

/// `e^x` for `x <= 0`, the same bits everywhere: `2^n * p(r)` with `r = x - n ln 2` and a Taylor polynomial of
/// degree 13 by Horner's rule, multiplications and additions only (error below 4e-16 relative). Branch-free
/// inside, so loops over it vectorise without changing the result.
fn exp(x: f64) -> f64 {
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1;
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    /// 1.5 * 2^52: adding and subtracting it rounds to the nearest integer.
    const ROUNDER: f64 = 6_755_399_441_055_744.0;
    let clamped = if x > EXP_FLOOR { x } else { EXP_FLOOR };
    let shifted = clamped * std::f64::consts::LOG2_E + ROUNDER;
    let n = shifted - ROUNDER;
    let r = (clamped - n * LN2_HIGH) - n * LN2_LOW;
    let mut p = INVERSE_FACTORIALS[0];
    for coefficient in &INVERSE_FACTORIALS[1..] {
        p = p * r + coefficient;
    }
    // The low bits of `shifted` hold n in two's complement.
    let power = f64::from_bits(shifted.to_bits().wrapping_add(1023) << 52);
    if x > EXP_FLOOR { p * power } else { 0.0 }
}

/// 1/13! down to 1/0!.
const INVERSE_FACTORIALS: [f64; 14] = [
    1.0 / 6_227_020_800.0,
    1.0 / 479_001_600.0,
    1.0 / 39_916_800.0,
    1.0 / 3_628_800.0,
    1.0 / 362_880.0,
    1.0 / 40_320.0,
    1.0 / 5_040.0,
    1.0 / 720.0,
    1.0 / 120.0,
    1.0 / 24.0,
    1.0 / 6.0,
    0.5,
    1.0,
    1.0,
];

#[cfg(test)]
mod tests;
