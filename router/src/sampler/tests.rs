//! The sampler against a slow, obvious implementation and against the distribution it promises.

use model::kernel::native::definition::exp_f64 as exp;
use proptest::prelude::*;

use super::*;

fn row(vocab: usize, seed: u64) -> Vec<f32> {
    (0..vocab as u64).map(|index| (uniform(seed, index) * 12.0 - 6.0) as f32).collect()
}

fn choose(sampling: &Sampling, logits: &[f32]) -> u32 {
    Sampler::new(sampling.clone(), &[], &[], 0).choose(logits, &mut Scratch::default()).unwrap()
}

/// Everything sorted, every filter a loop.
fn obvious(logits: &[f32], sampling: &Sampling, uniform: f64) -> u32 {
    let mut ranked: Vec<(f32, u32)> =
        logits.iter().enumerate().map(|(id, logit)| (*logit, id as u32)).collect();
    ranked.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let unfiltered = sampling.top_p >= 1.0 && sampling.min_p <= 0.0;
    if unfiltered && (sampling.top_k == 0 || sampling.top_k as usize >= logits.len()) {
        ranked.sort_by_key(|(_, id)| *id);
    }
    if sampling.top_k > 0 {
        ranked.truncate(sampling.top_k as usize);
    }
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f64> = ranked
        .iter()
        .map(|(logit, _)| ((f64::from(*logit) - f64::from(highest)) / f64::from(sampling.temperature)).exp())
        .collect();
    let total: f64 = weights.iter().sum();
    let mut kept = 0;
    let mut mass = 0.0;
    for weight in &weights {
        let full = sampling.top_p < 1.0 && mass >= f64::from(sampling.top_p) * total;
        if kept > 0 && (full || *weight < f64::from(sampling.min_p)) {
            break;
        }
        kept += 1;
        mass += weight;
    }
    let mut passed = 0.0;
    for (rank, weight) in weights[..kept].iter().enumerate() {
        passed += weight;
        if passed > uniform * mass {
            return ranked[rank].1;
        }
    }
    ranked[kept - 1].1
}

proptest! {
    #[test]
    fn equals_the_obvious_implementation(
        vocab in 1usize..3000,
        seed in any::<u64>(),
        temperature in prop_oneof![Just(0.3f32), Just(1.0), Just(2.0)],
        top_k in prop_oneof![Just(0u32), 2u32..50, Just(100_000)],
        top_p in prop_oneof![Just(1.0f32), 0.05f32..1.0],
        min_p in prop_oneof![Just(0.0f32), 0.0f32..0.5],
    ) {
        let sampling = Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() };
        let logits = row(vocab, seed ^ 1);
        prop_assert_eq!(choose(&sampling, &logits), obvious(&logits, &sampling, uniform(seed, 0)));
    }

    #[test]
    fn exp_is_within_an_ulp_or_two(x in -690.0f64..0.0) {
        let (ours, system) = (exp(x), x.exp());
        prop_assert!(((ours - system) / system).abs() < 6e-16, "{x}: {ours} {system}");
    }

    #[test]
    fn uniform_is_in_range(seed in any::<u64>(), index in any::<u64>()) {
        prop_assert!((0.0..1.0).contains(&uniform(seed, index)));
    }
}

#[test]
fn a_large_vocabulary_with_many_ties_is_ranked_right() {
    // So large that the head of the ranking is cut off by the peaks of parts, and with few distinct logits.
    for round in 0..60u64 {
        let steps = [2.0, 40.0, 1e6][(round % 3) as usize];
        let logits: Vec<f32> =
            row(20_000 + 37 * round as usize, round).iter().map(|x| (x * steps).round() / steps).collect();
        let top_k = [0, 5, 300][(round / 3 % 3) as usize];
        let top_p = [0.9, 0.02, 0.999][(round / 9 % 3) as usize];
        let temperature = [0.2, 1.0][(round % 2) as usize];
        let sampling = Sampling { temperature, top_k, top_p, seed: round, ..Sampling::default() };
        assert_eq!(choose(&sampling, &logits), obvious(&logits, &sampling, uniform(round, 0)), "{round}");
        let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let first = logits.iter().position(|logit| *logit == highest).unwrap();
        assert_eq!(choose(&greedy, &logits), first as u32);
    }
}

#[test]
fn fixed_draws_do_not_change() {
    // Written down once: a change here changes every seeded text ever produced.
    let drawn: Vec<u64> = (0..4).map(|index| (uniform(42, index) * (1u64 << 53) as f64) as u64).collect();
    assert_eq!(drawn, FIXED_DRAWS);
    assert_eq!(exp(-1.0).to_bits(), 0x3fd7_8b56_362c_ef38);
    assert_eq!(exp(0.0), 1.0);
    assert_eq!(exp(-1e9), 0.0);
    assert_eq!(exp(f64::NEG_INFINITY), 0.0);
}

/// Computed by an independent implementation in Python.
const FIXED_DRAWS: [u64; 4] =
    [3_092_098_744_885_774, 8_608_601_199_334_984, 4_380_647_180_739_872, 606_705_965_462_011];

#[test]
fn greedy_ties_go_to_the_lower_id() {
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    assert_eq!(choose(&sampling, &[1.0, 5.0, -2.0, 5.0]), 1);
    let one = Sampling { temperature: 1.0, top_k: 1, ..Sampling::default() };
    assert_eq!(choose(&one, &[1.0, 5.0, -2.0, 5.0]), 1);
}

#[test]
fn frequencies_follow_the_softmax() {
    let logits = [2.0f32, 1.0, 0.0, -1.0];
    let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    let mut sampler = Sampler::new(Sampling { seed: 7, ..Sampling::default() }, &[], &[], 0);
    let mut scratch = Scratch::default();
    let mut seen = [0u32; 4];
    let draws = 40_000;
    for _ in 0..draws {
        seen[sampler.choose(&logits, &mut scratch).unwrap() as usize] += 1;
    }
    for (logit, count) in logits.iter().zip(seen) {
        let expected = f64::from(*logit).exp() / total;
        let measured = f64::from(count) / f64::from(draws);
        // Four standard deviations of a binomial.
        let allowed = 4.0 * (expected * (1.0 - expected) / f64::from(draws)).sqrt();
        assert!((measured - expected).abs() < allowed, "{measured} {expected}");
    }
}

#[test]
fn draws_depend_on_seed_and_index_only() {
    let logits = row(1000, 3);
    let mut scratch = Scratch::default();
    let mut first = Sampler::new(Sampling { seed: 5, ..Sampling::default() }, &[], &[], 0);
    let alone: Vec<u32> = (0..20).map(|_| first.choose(&logits, &mut scratch).unwrap()).collect();
    let mut second = Sampler::new(Sampling { seed: 5, ..Sampling::default() }, &[9, 8], &[], 0);
    let mut other = Sampler::new(Sampling { seed: 6, ..Sampling::default() }, &[], &[], 0);
    let mut differs = false;
    for token in alone {
        assert_eq!(second.choose(&logits, &mut scratch).unwrap(), token);
        differs |= other.choose(&logits, &mut scratch).unwrap() != token;
    }
    assert!(differs);
}

#[test]
fn penalties_and_bias_act_as_documented() {
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let mut scratch = Scratch::default();
    let repetition = Sampling { repetition_penalty: 2.0, ..greedy.clone() };
    let mut sampler = Sampler::new(repetition, &[0], &[], 0);
    assert_eq!(sampler.choose(&[3.0, 2.0, -1.0], &mut scratch).unwrap(), 1, "3 / 2 < 2");
    assert_eq!(sampler.choose(&[3.0, 2.0, -1.0], &mut scratch).unwrap(), 0, "both halved now");
    let negative = Sampling { repetition_penalty: 2.0, ..greedy.clone() };
    let mut sampler = Sampler::new(negative, &[0], &[], 0);
    assert_eq!(sampler.choose(&[-1.0, -1.5], &mut scratch).unwrap(), 1, "-1 * 2 < -1.5");
    let presence = Sampling { presence_penalty: 0.5, ..greedy.clone() };
    let mut sampler = Sampler::new(presence, &[0], &[], 0);
    assert_eq!(sampler.choose(&[1.0, 0.6], &mut scratch).unwrap(), 0, "the prompt does not count");
    assert_eq!(sampler.choose(&[1.0, 0.6], &mut scratch).unwrap(), 1);
    let frequency = Sampling { frequency_penalty: 0.3, ..greedy.clone() };
    let mut sampler = Sampler::new(frequency, &[], &[], 0);
    let chosen: Vec<u32> = (0..4).map(|_| sampler.choose(&[1.0, 0.6], &mut scratch).unwrap()).collect();
    assert_eq!(chosen, [0, 0, 1, 0]);
    let bias = Sampling { logit_bias: vec![(1, 10.0), (99, 1.0)], ..greedy };
    assert_eq!(choose(&bias, &[3.0, 2.0]), 1);
}

#[test]
fn stop_tokens_wait_for_the_minimum() {
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    let mut sampler = Sampler::new(greedy, &[], &[0], 2);
    let mut scratch = Scratch::default();
    let chosen: Vec<u32> = (0..3).map(|_| sampler.choose(&[9.0, 1.0], &mut scratch).unwrap()).collect();
    assert_eq!(chosen, [1, 1, 0]);
}

#[test]
fn logprobs_are_of_the_raw_row() {
    let logits = [1.0f32, 3.0, 3.0, -2.0];
    let total: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
    let of = |logit: f32| (f64::from(logit) - total.ln()) as f32;
    let got = logprobs(&logits, 0, 3).unwrap();
    assert!((got.logprob - of(1.0)).abs() < 1e-6);
    let ids: Vec<u32> = got.top.iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [1, 2, 0]);
    assert!((got.top[1].1 - of(3.0)).abs() < 1e-6);
    assert_eq!(logprobs(&logits, 3, 0).unwrap().top, []);
    assert_eq!(logprobs(&logits, 3, 20).unwrap().top.len(), 4);
}

#[test]
fn rows_that_are_not_finite_are_refused() {
    let mut scratch = Scratch::default();
    let mut sampler = Sampler::new(Sampling::default(), &[], &[], 0);
    let error = sampler.choose(&[0.0, f32::INFINITY], &mut scratch).unwrap_err();
    assert_eq!(error, SampleError::NotFinite { token: 1, value: f32::INFINITY });
    assert!(matches!(
        sampler.choose(&[f32::NAN, 1.0], &mut scratch),
        Err(SampleError::NotFinite { token: 0, .. })
    ));
    assert_eq!(sampler.choose(&[], &mut scratch), Err(SampleError::Empty));
    assert_eq!(sampler.generated(), 0);
}
