//! From f32 weights to q8 and q4 groups in the block layout, and back.
//!
//! A group is 32 inputs of 16 outputs (`format.rs`). The work is done with the 16 outputs side by side, which
//! compilers vectorise on every machine, and with nothing but IEEE additions, multiplications and divisions in a
//! fixed order, so the same checkpoint packs to the same bytes everywhere.
//!
//! q8 takes the scale that the largest weight asks for. q4 tries the scales around GGUF Q4_0's, keeps the one
//! with the least squared error after fitting it (the search of llama.cpp's `make_qx_quants`, unweighted).
//! Refused: weights that are not finite, and weights too large for an f16 scale.

use half::f16;

use crate::format::{BLOCK_OUTPUTS, Format, GROUP};

/// One group with the outputs side by side: `[input][output]`.
pub type Group = [[f32; BLOCK_OUTPUTS]; GROUP];

type Lanes = [f32; BLOCK_OUTPUTS];

/// Adding and subtracting this rounds an f32 below 2^22 in magnitude to the nearest integer, ties to even.
const ROUND: f32 = 12_582_912.0;

/// Scales tried for q4: the extreme weight goes to -8 minus this. On trained weights the search leaves 6 % less
/// rms error than the first alone with GGUF's rounding; a search four times as fine gains another 0.05 %.
const Q4_TRIALS: [f32; 9] = [0.0, -1.5, -1.2, -0.9, -0.6, -0.3, 0.3, 0.6, 0.9];

/// A weight that cannot be packed: in this output of the row block.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BadWeight {
    /// Which of the 16 outputs.
    pub output: usize,
}

/// Quantizes one group into `out` (`format.group_bytes()` bytes: lines, then scales). Not for bf16.
pub fn quantize(format: Format, group: &Group, out: &mut [u8]) -> Result<(), BadWeight> {
    let (scales, values) = match format {
        Format::Q8 => q8(group),
        Format::Q4 | Format::Bf16 => q4(group),
    };
    // A weight that is not finite, or larger than any f16 scale can reach, shows in its scale.
    let finite =
        |output: usize| scales[output].is_finite() && group.iter().all(|row| row[output].is_finite());
    if let Some(output) = (0..BLOCK_OUTPUTS).find(|output| !finite(*output)) {
        return Err(BadWeight { output });
    }
    store(format, &values, out);
    let at = format.group_bytes() - 2 * BLOCK_OUTPUTS;
    for (slot, scale) in out[at..].as_chunks_mut::<2>().0.iter_mut().zip(scales) {
        *slot = scale.to_le_bytes();
    }
    Ok(())
}

/// The inverse: the weights that kernels multiply with, exact in f32.
pub fn dequantize(format: Format, bytes: &[u8], group: &mut Group) {
    let at = format.group_bytes() - 2 * BLOCK_OUTPUTS;
    let scales: Vec<f32> =
        bytes[at..].as_chunks::<2>().0.iter().map(|s| f16::from_le_bytes(*s).to_f32()).collect();
    for (input, row) in group.iter_mut().enumerate() {
        for (output, value) in row.iter_mut().enumerate() {
            let quantized = match format {
                Format::Q8 => i32::from(bytes[input / 4 * 64 + output * 4 + input % 4] as i8),
                Format::Q4 | Format::Bf16 => {
                    let byte = bytes[input % 16 / 4 * 64 + output * 4 + input % 4];
                    i32::from(if input < 16 { byte & 15 } else { byte >> 4 }) - 8
                }
            };
            *value = quantized as f32 * scales[output];
        }
    }
}

fn store(format: Format, values: &Group, out: &mut [u8]) {
    for input in 0..GROUP {
        for output in 0..BLOCK_OUTPUTS {
            let value = values[input][output] as i32;
            match format {
                Format::Q8 => out[input / 4 * 64 + output * 4 + input % 4] = value as i8 as u8,
                Format::Q4 | Format::Bf16 if input < 16 => {
                    out[input / 4 * 64 + output * 4 + input % 4] = (value + 8) as u8;
                }
                Format::Q4 | Format::Bf16 => {
                    out[(input - 16) / 4 * 64 + output * 4 + input % 4] |= ((value + 8) as u8) << 4;
                }
            }
        }
    }
}

/// q8: `scale = f16(amax / 127)`, `q = rne(w / scale)` within plus or minus 127.
fn q8(group: &Group) -> ([f16; BLOCK_OUTPUTS], Group) {
    let mut amax: Lanes = [0.0; BLOCK_OUTPUTS];
    for row in group {
        for output in 0..BLOCK_OUTPUTS {
            amax[output] = amax[output].max(row[output].abs());
        }
    }
    let scales = amax.map(|amax| f16::from_f32(amax / 127.0));
    let divisors = scales.map(|scale| if scale.to_f32() == 0.0 { f32::MAX } else { scale.to_f32() });
    let mut values = *group;
    for row in &mut values {
        for output in 0..BLOCK_OUTPUTS {
            row[output] = round((row[output] / divisors[output]).clamp(-127.0, 127.0));
        }
    }
    (scales, values)
}

fn q4(group: &Group) -> ([f16; BLOCK_OUTPUTS], Group) {
    let extreme = extremes(group);
    let mut best: Lanes = [0.0; BLOCK_OUTPUTS];
    let mut best_gain: Lanes = [0.0; BLOCK_OUTPUTS];
    for trial in Q4_TRIALS {
        let inverse = extreme.map(|extreme| if extreme == 0.0 { 0.0 } else { (-8.0 - trial) / extreme });
        let (wq, qq) = products(group, &inverse);
        for output in 0..BLOCK_OUTPUTS {
            // With the fitted scale wq/qq the squared error is sum(w^2) - wq^2/qq.
            let (wq, qq) = (wq[output], qq[output].max(1.0));
            let gain = wq * wq / qq;
            let better = gain > best_gain[output];
            best_gain[output] = if better { gain } else { best_gain[output] };
            best[output] = if better { wq / qq } else { best[output] };
        }
    }
    finish(group, best, extreme)
}

/// The values for the chosen scales, once those are rounded to f16.
fn finish(group: &Group, scale: Lanes, extreme: Lanes) -> ([f16; BLOCK_OUTPUTS], Group) {
    let mut scales = scale.map(f16::from_f32);
    let mut inverse: Lanes = [0.0; BLOCK_OUTPUTS];
    for output in 0..BLOCK_OUTPUTS {
        // Squares of weights below 1e-19 vanish in f32, and those of weights above 1e19 overflow.
        if !scale[output].is_normal() {
            scales[output] = f16::from_f32(extreme[output] / -8.0);
        }
        let scale = scales[output].to_f32();
        inverse[output] = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    }
    let mut values = *group;
    for row in &mut values {
        for output in 0..BLOCK_OUTPUTS {
            row[output] = round((row[output] * inverse[output]).clamp(-8.0, 7.0));
        }
    }
    (scales, values)
}

/// The weight of largest magnitude per output, with its sign; the first of equals.
fn extremes(group: &Group) -> Lanes {
    let mut extreme: Lanes = [0.0; BLOCK_OUTPUTS];
    for row in group {
        for output in 0..BLOCK_OUTPUTS {
            let larger = row[output].abs() > extreme[output].abs();
            extreme[output] = if larger { row[output] } else { extreme[output] };
        }
    }
    extreme
}

/// `sum(w q)` and `sum(q q)` for `q = round(w * inverse)` within -8 and 7.
fn products(group: &Group, inverse: &Lanes) -> (Lanes, Lanes) {
    let (mut wq, mut qq): (Lanes, Lanes) = ([0.0; BLOCK_OUTPUTS], [0.0; BLOCK_OUTPUTS]);
    for row in group {
        for output in 0..BLOCK_OUTPUTS {
            let q = round((row[output] * inverse[output]).clamp(-8.0, 7.0));
            wq[output] += row[output] * q;
            qq[output] += q * q;
        }
    }
    (wq, qq)
}

/// Nearest integer, ties to even, for magnitudes below 2^22.
#[inline(always)]
fn round(value: f32) -> f32 {
    (value + ROUND) - ROUND
}

#[cfg(test)]
mod tests;
