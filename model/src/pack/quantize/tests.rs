//! Rung: pure. Quantized groups against a naive definition, and the error they leave.

use half::bf16;

use super::*;
use crate::checkpoint::Checkpoint;

/// Deterministic noise with a few outliers.
fn group(seed: u32, size: f32) -> Group {
    let mut state = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        (state as f32 / u32::MAX as f32 - 0.5) * 2.0
    };
    let mut group = [[0.0; BLOCK_OUTPUTS]; GROUP];
    for row in &mut group {
        for value in row {
            let x = next();
            *value = size * x * x * x;
        }
    }
    group
}

fn packed(format: Format, group: &Group) -> Vec<u8> {
    let mut out = vec![0; format.group_bytes()];
    quantize(format, group, &mut out).unwrap();
    out
}

fn round_trip(format: Format, group: &Group) -> Group {
    let mut back = [[f32::NAN; BLOCK_OUTPUTS]; GROUP];
    dequantize(format, &packed(format, group), &mut back);
    back
}

fn error(a: &Group, b: &Group) -> f64 {
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    pairs.map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

/// The layout of `format.rs`, written as its text says.
fn naive(format: Format, bytes: &[u8], input: usize, output: usize) -> f32 {
    let (quantized, scales) = match format {
        Format::Q8 => (i32::from(bytes[64 * (input / 4) + 4 * output + input % 4] as i8), 512),
        _ => {
            let line = if input < 16 { input / 4 } else { input / 4 - 4 };
            let byte = bytes[64 * line + 4 * output + input % 4];
            (i32::from(if input < 16 { byte & 0xf } else { byte >> 4 }) - 8, 256)
        }
    };
    let scale = f16::from_le_bytes([bytes[scales + 2 * output], bytes[scales + 2 * output + 1]]);
    quantized as f32 * scale.to_f32()
}

#[test]
fn the_layout_is_the_documented_one() {
    for format in [Format::Q4, Format::Q8] {
        let group = group(3, 0.1);
        let (bytes, back) = (packed(format, &group), round_trip(format, &group));
        for input in 0..GROUP {
            for output in 0..BLOCK_OUTPUTS {
                let (found, expected) = (back[input][output], naive(format, &bytes, input, output));
                assert_eq!(found.to_bits(), expected.to_bits(), "{format} {input} {output}");
                let tolerance = if format == Format::Q8 { 0.1 / 127.0 } else { 0.1 / 7.0 };
                assert!((found - group[input][output]).abs() < tolerance, "{format} {input} {output}");
            }
        }
    }
}

#[test]
fn quantized_values_quantize_to_themselves() {
    for seed in 1..50 {
        // A q8 group whose scale came from its largest weight, and a q4 group that uses -8.
        let mut q4 = group(seed, 0.05);
        q4[7] = [-0.06; BLOCK_OUTPUTS];
        let once = round_trip(Format::Q4, &q4);
        assert!(error(&once, &round_trip(Format::Q4, &once)) <= error(&q4, &once) * 1e-3, "{seed}");
        let once = round_trip(Format::Q8, &group(seed, 3.0));
        assert_eq!(packed(Format::Q8, &once), packed(Format::Q8, &group(seed, 3.0)), "{seed}");
    }
}

#[test]
fn q8_takes_the_largest_weights_scale() {
    let mut weights = group(5, 1.0);
    weights[9][4] = -12.7;
    let bytes = packed(Format::Q8, &weights);
    assert_eq!(f16::from_le_bytes([bytes[512 + 8], bytes[512 + 9]]), f16::from_f32(0.1));
    assert_eq!(bytes[2 * 64 + 4 * 4 + 1] as i8, -127);
}

/// GGUF's rule: the largest weight becomes -8.
fn plain_q4(group: &Group) -> Group {
    let extreme = extremes(group);
    let scales = extreme.map(|extreme| f16::from_f32(extreme / -8.0).to_f32());
    let inverse = extreme.map(|extreme| if extreme == 0.0 { 0.0 } else { -8.0 / extreme });
    let mut back = *group;
    for row in &mut back {
        for output in 0..BLOCK_OUTPUTS {
            row[output] = (row[output] * inverse[output] + 8.5).floor().clamp(0.0, 15.0) - 8.0;
            row[output] *= scales[output];
        }
    }
    back
}

#[test]
fn the_search_is_never_worse_than_the_plain_rule() {
    let (mut searched, mut plain) = (0.0, 0.0);
    for seed in 1..200 {
        let weights = group(seed, 0.02);
        searched += error(&weights, &round_trip(Format::Q4, &weights));
        plain += error(&weights, &plain_q4(&weights));
    }
    assert!(searched < 0.9 * plain, "{searched} {plain}");
}

#[test]
fn extreme_weights_stay_finite_or_are_refused() {
    for format in [Format::Q4, Format::Q8] {
        for value in [0.0, 1e-45, 1e-30, -1e-20, 1e-7, 3e-6, 0.5, 6e4, -4e5] {
            let mut weights = [[0.0; BLOCK_OUTPUTS]; GROUP];
            weights[3] = [value; BLOCK_OUTPUTS];
            let back = round_trip(format, &weights)[3][0];
            // Below the smallest f16 scale weights become zero; around it the scale is coarse.
            assert!((back - value).abs() <= (value.abs() * 0.01).max(4e-6), "{format} {value}: {back}");
        }
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e7, f32::MAX, -f32::MAX] {
            for input in [0, 17, 31] {
                let mut weights = group(1, 1.0);
                weights[input][11] = value;
                let mut out = vec![0; format.group_bytes()];
                assert_eq!(
                    quantize(format, &weights, &mut out),
                    Err(BadWeight { output: 11 }),
                    "{format} {value}"
                );
            }
        }
    }
}

#[test]
fn bf16_ties_round_to_even_in_our_way_too() {
    for value in -900..900 {
        let value = value as f32 / 100.0;
        assert_eq!(round(value), value.round_ties_even());
    }
    assert_eq!(bf16::from_f32(1.003_906_3).to_f32(), 1.0);
}

/// Prints how much error each tensor of the demo model keeps; run with `--nocapture`.
#[test]
fn the_search_helps_on_real_weights() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tale-moe");
    let checkpoint = Checkpoint::open(std::path::Path::new(directory)).unwrap();
    let expert = |part: &str| format!("model.layers.2.mlp.experts.7.{part}_proj.weight");
    let tensors = [
        (expert("gate"), [128, 256]),
        (expert("up"), [128, 256]),
        (expert("down"), [256, 128]),
        ("model.layers.0.self_attn.q_proj.weight".to_string(), [512, 256]),
        ("model.layers.5.self_attn.v_proj.weight".to_string(), [128, 256]),
        ("model.layers.3.self_attn.o_proj.weight".to_string(), [256, 512]),
        ("model.embed_tokens.weight".to_string(), [4096, 256]),
    ];
    for (name, shape) in tensors {
        let weights = checkpoint.tensor(&name, &shape).unwrap().to_f32();
        let (mut searched, mut plain, mut q8, mut power) = (0.0, 0.0, 0.0, 0.0);
        for block in weights.chunks_exact(BLOCK_OUTPUTS * shape[1]) {
            for at in (0..shape[1]).step_by(GROUP) {
                let mut group = [[0.0; BLOCK_OUTPUTS]; GROUP];
                for (output, row) in block.chunks_exact(shape[1]).enumerate() {
                    (0..GROUP).for_each(|input| group[input][output] = row[at + input]);
                }
                power += error(&group, &[[0.0; BLOCK_OUTPUTS]; GROUP]);
                searched += error(&group, &round_trip(Format::Q4, &group));
                plain += error(&group, &plain_q4(&group));
                q8 += error(&group, &round_trip(Format::Q8, &group));
            }
        }
        let relative = |error: f64| (error / power).sqrt();
        let (searched, plain, q8) = (relative(searched), relative(plain), relative(q8));
        eprintln!("{name}: relative rms q4 {searched:.5} (plain {plain:.5}), q8 {q8:.5}");
        assert!(searched < 0.95 * plain && searched < 0.1 && q8 < 0.006, "{name}");
    }
}
