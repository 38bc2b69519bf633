//! The combine step of a layer: the size of one unit of the integer sum over experts.
//!
//! A few rows of seeded noise, shaped by the layer's norm weight as real rows are, go through the layer's own gate
//! and the chosen experts, read from the packed bytes. In q4 and q8 models the step is the largest power of two at
//! or below rms / 2048 of the combined output. A sum of n block results then carries a rounding error of about
//! 0.3 sqrt(n) steps: a thousandth of the rms for the 48 blocks of a large model, a quarter of what int8 activations
//! lose; an i16 on the wire holds 8 to 16 times the rms, so most rows fit, and an i32 half a million times.
//! In bf16 models rounding would be the largest error left against an f32 reference (target Q2 allows 2e-3 of the
//! logits' spread), so they get rms / 16384; their rows travel as i32, which still holds 65 thousand times the rms.
//!
//! Everything is scalar f32 in a fixed order, with `libm` for exp, so every machine finds the same steps. Cost: 4
//! rows through at most `4 top_k` experts per layer, about a second for 30 layers of a large model.

use super::error::PackError;
use super::quantize::{self, Group};
use crate::config::{ModelConfig, Scoring};
use crate::format::{BLOCK_OUTPUTS, Format, GROUP, padded_inputs, padded_outputs};

/// Rows that are sent through the layer.
const ROWS: usize = 4;
/// Seed of the noise.
const SEED: u64 = 0x6d6f_656d_6573_6801;
/// Step of a layer whose experts give zero for every row.
const ZERO_STEP: i8 = -40;
/// Smallest and largest step, as powers of two: block sums divided by it stay far inside f32.
const STEP_LIMIT: i32 = 60;

/// log2 of (rms / step) for a format.
pub fn headroom_log2(format: Format) -> i32 {
    if format.is_quantized() { 11 } else { 14 }
}

/// The largest power of two at or below `rms / 2^headroom`.
pub fn step_for(format: Format, rms: f32) -> i8 {
    if rms == 0.0 {
        return ZERO_STEP;
    }
    let (_, exponent) = libm::frexpf(rms);
    (exponent - 1 - headroom_log2(format)).clamp(-STEP_LIMIT, STEP_LIMIT) as i8
}

/// The combine step of a layer, from its gate (`[experts, hidden]`), the norm before it and its packed experts.
pub fn step<B: AsRef<[u8]>>(
    config: &ModelConfig,
    format: Format,
    layer: LayerView<'_>,
    expert: impl FnMut(usize) -> Result<B, PackError>,
) -> Result<i8, PackError> {
    let rms = combined_rms(config, format, layer, expert)?;
    if !rms.is_finite() {
        return Err(PackError(format!(
            "layer {}: the experts' output for ordinary rows is not finite; the checkpoint is damaged",
            layer.index
        )));
    }
    Ok(step_for(format, rms))
}

/// The parts of a layer that decide where rows go.
#[derive(Clone, Copy, Debug)]
pub struct LayerView<'a> {
    /// Its number.
    pub index: usize,
    /// f32 `[hidden]`.
    pub norm: &'a [f32],
    /// f32 `[experts, hidden]`.
    pub gate: &'a [f32],
}

/// Root mean square of the combined output over all rows.
pub fn combined_rms<B: AsRef<[u8]>>(
    config: &ModelConfig,
    format: Format,
    layer: LayerView<'_>,
    mut expert: impl FnMut(usize) -> Result<B, PackError>,
) -> Result<f32, PackError> {
    let (hidden, moe) = (config.hidden, &config.moe);
    let rows: Vec<Vec<f32>> = (0..ROWS).map(|row| noise(layer, row)).collect();
    let routes: Vec<Vec<(usize, f32)>> = rows.iter().map(|row| route(config, row, layer.gate)).collect();
    let mut sums = vec![vec![0.0f32; hidden]; ROWS];
    for index in 0..moe.experts {
        let chosen = routes.iter().enumerate().flat_map(|(row, route)| {
            route.iter().filter(|(chosen, _)| *chosen == index).map(move |(_, weight)| (row, *weight))
        });
        let chosen: Vec<(usize, f32)> = chosen.collect();
        if chosen.is_empty() {
            continue;
        }
        let bytes = expert(index)?;
        let inputs: Vec<&[f32]> = chosen.iter().map(|(row, _)| rows[*row].as_slice()).collect();
        let outputs = run(format, (hidden, moe.inter), bytes.as_ref(), &inputs);
        for ((row, weight), output) in chosen.iter().zip(outputs) {
            for (sum, value) in sums[*row].iter_mut().zip(output) {
                *sum += value * weight;
            }
        }
    }
    let squares: f64 = sums.iter().flatten().map(|value| f64::from(*value) * f64::from(*value)).sum();
    Ok(libm::sqrt(squares / (ROWS * hidden) as f64) as f32)
}

/// Root mean square over rows of the length of a row's routing weights: what the combined output of independent
/// experts of size 1 measures.
pub fn weight_norm(config: &ModelConfig, layer: LayerView<'_>) -> f32 {
    let weights = (0..ROWS).flat_map(|row| route(config, &noise(layer, row), layer.gate));
    let squares: f32 = weights.map(|(_, weight)| weight * weight).sum();
    libm::sqrtf(squares / ROWS as f32)
}

/// Noise close to gaussian (a sum of twelve uniforms) times the norm weight.
fn noise(layer: LayerView<'_>, row: usize) -> Vec<f32> {
    let mut state =
        SEED.wrapping_add(((layer.index * ROWS + row) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let mut uniform = || {
        // SplitMix64 (Steele, Lea, Flood 2014).
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 24) as f32
    };
    layer.norm.iter().map(|weight| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * weight).collect()
}

/// The experts of a row and their weights, by the config's rule.
fn route(config: &ModelConfig, row: &[f32], gate: &[f32]) -> Vec<(usize, f32)> {
    let routing = config.moe.routing;
    let logits: Vec<f32> = gate.chunks_exact(row.len()).map(|weights| dot(weights, row)).collect();
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let scores: Vec<f32> = match routing.scoring {
        Scoring::Softmax => {
            let powers: Vec<f32> = logits.iter().map(|logit| libm::expf(logit - top)).collect();
            let sum: f32 = powers.iter().sum();
            powers.into_iter().map(|power| power / sum).collect()
        }
        Scoring::Sigmoid => logits.iter().map(|logit| 1.0 / (1.0 + libm::expf(-logit))).collect(),
    };
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
    order.truncate(config.moe.top_k);
    let sum: f32 = order.iter().map(|expert| scores[*expert]).sum();
    let divisor = if routing.renormalise { sum } else { 1.0 };
    order.into_iter().map(|expert| (expert, scores[expert] / divisor * routing.scale)).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// One packed expert for several rows, without quantizing activations: `[row][hidden]`.
pub fn run(format: Format, (hidden, inter): (usize, usize), expert: &[u8], rows: &[&[f32]]) -> Vec<Vec<f32>> {
    let padded = padded_inputs(inter);
    let (gate_up, down) = expert.split_at(format.matrix_bytes(2 * padded, hidden));
    let both = product(format, (2 * padded, hidden), gate_up, rows);
    let activated = |both: Vec<f32>| -> Vec<f32> {
        let place = |index: usize, up: usize| match format {
            // Row blocks of gate and up alternate.
            Format::Q8 | Format::Q4 => {
                (index / BLOCK_OUTPUTS * 2 + up) * BLOCK_OUTPUTS + index % BLOCK_OUTPUTS
            }
            Format::Bf16 => up * padded + index,
        };
        let silu = |x: f32| x / (1.0 + libm::expf(-x));
        (0..inter).map(|index| silu(both[place(index, 0)]) * both[place(index, 1)]).collect()
    };
    let activated: Vec<Vec<f32>> = both.into_iter().map(activated).collect();
    let inputs: Vec<&[f32]> = activated.iter().map(Vec::as_slice).collect();
    product(format, (hidden, inter), down, &inputs)
}

/// A packed matrix `[outputs, inputs]` times rows: `[row][output]`.
pub fn product(
    format: Format,
    (outputs, inputs): (usize, usize),
    bytes: &[u8],
    rows: &[&[f32]],
) -> Vec<Vec<f32>> {
    let groups = padded_inputs(inputs) / GROUP;
    let mut results = vec![vec![0.0f32; outputs]; rows.len()];
    let mut group: Group = [[0.0; BLOCK_OUTPUTS]; GROUP];
    let block_bytes = groups * format.group_bytes();
    for (block, bytes) in
        bytes.chunks_exact(block_bytes).take(padded_outputs(outputs) / BLOCK_OUTPUTS).enumerate()
    {
        let mut sums = vec![[0.0f32; BLOCK_OUTPUTS]; rows.len()];
        for index in 0..groups {
            read_group(format, bytes, (index, groups), &mut group);
            for (sums, row) in sums.iter_mut().zip(rows) {
                let first = index * GROUP;
                for (weights, x) in group.iter().zip(&row[first.min(row.len())..]) {
                    for (sum, weight) in sums.iter_mut().zip(weights) {
                        *sum += weight * x;
                    }
                }
            }
        }
        for (result, sums) in results.iter_mut().zip(sums) {
            for (slot, sum) in result.iter_mut().skip(block * BLOCK_OUTPUTS).zip(sums) {
                *slot = sum;
            }
        }
    }
    results
}

/// Group `index` of a row block, as f32, whatever the format.
fn read_group(format: Format, block: &[u8], (index, groups): (usize, usize), group: &mut Group) {
    if format.is_quantized() {
        let size = format.group_bytes();
        quantize::dequantize(format, &block[index * size..(index + 1) * size], group);
        return;
    }
    for (input, row) in group.iter_mut().enumerate() {
        for (output, slot) in row.iter_mut().enumerate() {
            let at = 2 * ((output * groups + index) * GROUP + input);
            *slot = half::bf16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        }
    }
}
