//! Token-choice routing: from logits to chosen experts and weights (`RoutingSpec`).
//!
//! Dropless: nothing but a row's own logits decides about it, so one user's load never changes another's text.

use crate::config::{MoeConfig, RoutingSpec, Scoring};
use crate::kernel::Assignment;
use crate::kernel::native::definition;
use crate::kernel::native::ops::Ops;

/// Chooses an expert for every place of `out` (`moe.top_k` of them) for one row, best first, ties to the lower index.
///
/// `logits` (`[experts]`, at least as many as places) is consumed as scratch. `row` only labels the assignments.
pub fn choose(moe: &MoeConfig, ops: Ops, row: u32, logits: &mut [f32], out: &mut [Assignment]) {
    score(&moe.routing, ops, logits);
    let mut held = 0;
    for (expert, score) in logits.iter().enumerate() {
        if held == out.len() && out.last().is_none_or(|worst| *score <= worst.weight) {
            continue;
        }
        // The places after those that are as good or better move on by one; the last drops out.
        let place = out[..held].iter().rposition(|other| other.weight >= *score).map_or(0, |at| at + 1);
        held = (held + 1).min(out.len());
        out.copy_within(place..held - 1, place + 1);
        out[place] = Assignment { row, expert: expert as u16, weight: *score };
    }
    if moe.routing.renormalise {
        let sum = out.iter().fold(0.0, |sum, assignment| sum + assignment.weight);
        out.iter_mut().for_each(|assignment| assignment.weight /= sum);
    }
    if moe.routing.scale != 1.0 {
        out.iter_mut().for_each(|assignment| assignment.weight *= moe.routing.scale);
    }
}

fn score(routing: &RoutingSpec, ops: Ops, logits: &mut [f32]) {
    match routing.scoring {
        Scoring::Softmax => ops.softmax(logits),
        Scoring::Sigmoid => logits.iter_mut().for_each(|logit| *logit = definition::sigmoid(*logit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::WeightOn;
    use crate::kernel::native::tests::Rng;

    /// The definition: the best of what is left, as often as wanted.
    fn obvious(moe: &MoeConfig, logits: &[f32]) -> Vec<(u16, f32)> {
        let mut scores = logits.to_vec();
        score(&moe.routing, Ops::default(), &mut scores);
        let best = |scores: &[f32]| (0..scores.len()).rev().max_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        (0..moe.top_k)
            .map(|_| {
                let index = best(&scores).unwrap();
                let chosen = (index as u16, scores[index]);
                scores[index] = f32::NEG_INFINITY;
                chosen
            })
            .collect()
    }

    #[test]
    fn the_best_are_chosen_in_order_and_ties_go_to_the_lower_index() {
        let mut rng = Rng::new(21);
        for round in 0..3000 {
            let experts = 1 + rng.below(200);
            let kinds = [3, 20, 100_000][rng.below(3)];
            let logits: Vec<f32> = (0..experts).map(|_| rng.below(kinds) as f32 / 7.0 - 1.0).collect();
            let routing = RoutingSpec {
                scoring: [Scoring::Softmax, Scoring::Sigmoid][round % 2],
                router_bias: false,
                selection_bias: false,
                groups: None,
                renormalise: false,
                scale: 1.0,
                weight_on: WeightOn::Output,
            };
            let top_k = 1 + rng.below(experts.min(12));
            let moe =
                MoeConfig { experts, top_k, inter: 8, routing, shared_inter: None, shared_gated: false };
            let mut out = vec![Assignment { row: 9, expert: 9, weight: 9.0 }; moe.top_k];
            choose(&moe, Ops::default(), 5, &mut logits.clone(), &mut out);
            let found: Vec<(u16, f32)> = out.iter().map(|a| (a.expert, a.weight)).collect();
            assert_eq!(found, obvious(&moe, &logits));
            assert!(out.iter().all(|assignment| assignment.row == 5));
        }
    }
}
