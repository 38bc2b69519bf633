//! Token-choice routing: from logits to chosen experts and weights (`RoutingSpec`).
//!
//! Dropless: nothing but a row's own logits decides about it, so one user's load never changes another's text.

use crate::config::{MoeConfig, RoutingSpec, Scoring};
use crate::kernel::Assignment;
use crate::kernel::native::definition;
use crate::kernel::native::ops::Ops;

/// Chooses `moe.top_k` experts for one row and appends them to `out`, best first, ties to the lower index.
///
/// `logits` (`[experts]`) is consumed as scratch. `row` only labels the assignments.
pub fn choose(moe: &MoeConfig, ops: Ops, row: u32, logits: &mut [f32], out: &mut Vec<Assignment>) {
    score(&moe.routing, ops, logits);
    let first = out.len();
    for _ in 0..moe.top_k {
        let mut best = 0;
        for (index, score) in logits.iter().enumerate() {
            if *score > logits[best] {
                best = index;
            }
        }
        out.push(Assignment { row, expert: best as u16, weight: logits[best] });
        logits[best] = f32::NEG_INFINITY;
    }
    let chosen = &mut out[first..];
    if moe.routing.renormalise {
        let sum = chosen.iter().fold(0.0, |sum, assignment| sum + assignment.weight);
        chosen.iter_mut().for_each(|assignment| assignment.weight /= sum);
    }
    if moe.routing.scale != 1.0 {
        chosen.iter_mut().for_each(|assignment| assignment.weight *= moe.routing.scale);
    }
}

fn score(routing: &RoutingSpec, ops: Ops, logits: &mut [f32]) {
    match routing.scoring {
        Scoring::Softmax => ops.softmax(logits),
        Scoring::Sigmoid => logits.iter_mut().for_each(|logit| *logit = definition::sigmoid(*logit)),
    }
}
