//! Rotary position embedding (Su et al. 2021), half-split pairs, with the context extensions of
//! transformers `modeling_rope_utils`.
//!
//! Frequencies, sines and cosines come from the `libm` crate: pure Rust, so every machine gets the same bits,
//! which the system's mathematical library would not promise. They are computed once per step and token, not
//! per layer; a table over the whole context would be 64 MB for 128 k tokens.

use crate::config::{Rope, RopeScaling};

/// Frequencies of one model.
#[derive(Clone, Debug)]
pub struct Rotary {
    /// `[head_dim / 2]`, rounded to f32 as the reference implementation keeps them.
    frequencies: Vec<f32>,
    /// Factor on cos and sin.
    attention_factor: f32,
}

impl Rotary {
    /// Frequencies for heads of `head_dim`.
    pub fn new(rope: &Rope, head_dim: usize) -> Rotary {
        let half = head_dim / 2;
        let plain = |i: usize| libm::pow(rope.theta, -(2.0 * i as f64) / head_dim as f64);
        let mut attention_factor = 1.0;
        let frequencies = match rope.scaling {
            RopeScaling::Default => (0..half).map(|i| plain(i) as f32).collect(),
            RopeScaling::Linear { factor } => (0..half).map(|i| (plain(i) / factor) as f32).collect(),
            RopeScaling::Yarn { factor, attention_factor: attention, .. } => {
                attention_factor = attention as f32;
                let keep = yarn_keep(rope, head_dim);
                (0..half).map(|i| (plain(i) / factor * (1.0 - keep[i]) + plain(i) * keep[i]) as f32).collect()
            }
        };
        Rotary { frequencies, attention_factor }
    }

    /// Cosines then sines for one position: `[head_dim / 2]` each, appended to `out`.
    pub fn angles(&self, position: usize, out: &mut Vec<f32>) {
        let angle = |frequency: &f32| f64::from(position as f32 * frequency);
        out.extend(self.frequencies.iter().map(|f| libm::cos(angle(f)) as f32 * self.attention_factor));
        out.extend(self.frequencies.iter().map(|f| libm::sin(angle(f)) as f32 * self.attention_factor));
    }
}

/// YaRN (Peng et al. 2023, section 3.2): how much of each dimension's own frequency is kept, 1 for fast ones.
fn yarn_keep(rope: &Rope, head_dim: usize) -> Vec<f64> {
    let RopeScaling::Yarn { original_context, beta_fast, beta_slow, truncate, .. } = rope.scaling else {
        return vec![1.0; head_dim / 2];
    };
    let dim = head_dim as f64;
    let correction = |rotations: f64| {
        dim * libm::log(original_context as f64 / (rotations * std::f64::consts::TAU))
            / (2.0 * libm::log(rope.theta))
    };
    let (mut low, mut high) = (correction(beta_fast), correction(beta_slow));
    if truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dim - 1.0));
    if low == high {
        high += 0.001; // as the reference: no division by zero
    }
    (0..head_dim / 2).map(|i| 1.0 - ((i as f64 - low) / (high - low)).clamp(0.0, 1.0)).collect()
}
