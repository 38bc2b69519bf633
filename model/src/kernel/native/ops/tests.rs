//! Row operations of every instruction set against their obvious writing.

use super::*;
use crate::kernel::native::definition::{dot16, exp_f64};
use crate::kernel::native::tests::Rng;

fn all() -> impl Iterator<Item = Ops> {
    Isa::available_here().map(|isa| Ops::new(isa).unwrap())
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

fn random(rng: &mut Rng, len: usize) -> Vec<f32> {
    // Some zeros of both signs, whose sums are where careless padding shows.
    (0..len).map(|_| [rng.unit(), rng.unit() * 1e3, 0.0, -0.0][rng.below(4)]).collect()
}

#[test]
fn dots_are_dot16_of_every_pair() {
    let mut rng = Rng::new(31);
    for inputs in [1, 15, 16, 17, 32, 100, 256] {
        for (outputs, rows) in [(1, 1), (4, 4), (5, 3), (9, 9), (16, 1), (3, 8)] {
            let (mut weights, mut x) = (random(&mut rng, outputs * inputs), random(&mut rng, rows * inputs));
            // Products too small for f32 leave -0 in every lane, and the zeros behind the last input make +0 of it.
            weights[..inputs].fill(-1e-30);
            x[..inputs].fill(if outputs.is_multiple_of(2) { -0.0 } else { 1e-30 });
            let one =
                |n: usize, r: usize| dot16(&weights[n * inputs..][..inputs], &x[r * inputs..][..inputs]);
            let by_row: Vec<f32> = (0..rows * outputs).map(|i| one(i % outputs, i / outputs)).collect();
            let by_output: Vec<f32> = (0..rows * outputs).map(|i| one(i / rows, i % rows)).collect();
            for ops in all() {
                for (row_step, output_step, expected) in [(outputs, 1, &by_row), (1, rows, &by_output)] {
                    let mut out = vec![7.0; rows * outputs];
                    let (weights, x) = (&weights[..], &x[..]);
                    ops.dots(Dots { weights, x, inputs, row_step, output_step }, &mut out);
                    assert_eq!(bits(&out), bits(expected), "{ops:?}: {outputs} x {inputs} with {rows} rows");
                }
            }
        }
    }
}

#[test]
fn sums_and_turns_round_as_written() {
    let mut rng = Rng::new(32);
    for len in [0, 2, 14, 64, 80, 130] {
        let (a, b, weight) = (random(&mut rng, len), random(&mut rng, len), random(&mut rng, len));
        let (cos, sin) = (random(&mut rng, len / 2), random(&mut rng, len / 2));
        let sums: Vec<i64> = (0..len).map(|_| (rng.unit() * 1e14) as i64 * 3 + 1).collect();
        let added: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
        let summed: Vec<f32> = a.iter().zip(&sums).map(|(a, sum)| a + *sum as f32 * 0.125).collect();
        let mut turned = a.clone();
        for i in 0..len / 2 {
            let (x, y) = (a[i], a[i + len / 2]);
            (turned[i], turned[i + len / 2]) = (x * cos[i] - y * sin[i], y * cos[i] + x * sin[i]);
        }
        for ops in all() {
            let mut found = [a.clone(), a.clone(), a.clone(), a.clone()];
            ops.add(&b, &mut found[0]);
            ops.add_sums(&sums, 0.125, &mut found[1]);
            ops.rotate(&mut found[2], &cos, &sin);
            ops.rms_norm_here(&mut found[3], &weight, 1e-6);
            let mut normed = vec![0.0; len];
            ops.rms_norm(&a, &weight, 1e-6, &mut normed);
            for (found, expected) in found.iter().zip([&added, &summed, &turned, &normed]) {
                assert_eq!(bits(found), bits(expected), "{ops:?} on {len} values");
            }
        }
    }
}

#[test]
fn one_broken_value_is_noticed_wherever_it_is() {
    for ops in all() {
        let mut x = vec![f32::MAX; 100];
        assert!(ops.is_finite(&x) && ops.is_finite(&[]));
        for at in 0..100 {
            for broken in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                x[at] = broken;
                assert!(!ops.is_finite(&x), "{ops:?} at {at}");
            }
            x[at] = -f32::MAX;
        }
    }
}

#[test]
fn tempered_weights_are_those_of_one_value_and_sum_in_sixteen_lanes() {
    let mut rng = Rng::new(33);
    for len in [0, 1, 16, 255, 256, 257, 1000, 4099] {
        let logits: Vec<f32> = (0..len).map(|_| rng.unit() * 400.0).collect();
        let by = Tempered { highest: 398.5, temperature: 0.7 };
        let expected: Vec<f64> =
            logits.iter().map(|logit| exp_f64((f64::from(*logit) - 398.5) / 0.7)).collect();
        let mut lanes = [0.0f64; 16];
        expected.iter().enumerate().for_each(|(i, weight)| lanes[i % 16] += weight);
        let sum: f64 = lanes.iter().sum();
        for ops in all() {
            let mut out = vec![7.0; len];
            assert_eq!(ops.tempered(&logits, by, &mut out).to_bits(), sum.to_bits(), "{ops:?}: {len}");
            assert_eq!(ops.tempered(&logits, by, &mut []).to_bits(), sum.to_bits(), "{ops:?}: {len}");
            assert!(out.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{ops:?}: {len}");
        }
    }
}
