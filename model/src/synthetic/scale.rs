//! How large the random weights are, so that a row keeps its size on its way and logits spread like a model's.

use crate::config::ModelConfig;
use crate::packed::{TensorName, local_inter};

/// Output of a block (attention or experts) for a row of size 1: small, so that the residual grows slowly.
pub(super) const BRANCH_RMS: f32 = 0.2;
/// Spread of the logits of the head: the least that the tests of real models ask for.
const LOGIT_RMS: f32 = 3.0;
/// Spread of the gate's logits: experts differ clearly, none dominates.
const GATE_RMS: f32 = 1.0;
/// Spread of norm weights around 1.
const NORM_SPREAD: f32 = 0.05;
/// Root mean square of `silu(g) * u` for independent standard normal g and u: sqrt(E[silu(g)^2]), by integration.
const GATED_RMS: f32 = 0.5964;

/// Mean of a vector's values: norms scale by about 1, everything else is around zero.
pub(super) fn centre(name: TensorName) -> f32 {
    use TensorName as N;
    match name {
        N::AttentionNorm(_) | N::FfnNorm(_) | N::FinalNorm | N::QNorm(_) | N::KNorm(_) => 1.0,
        _ => 0.0,
    }
}

/// Root mean square of a tensor's weights (around `centre`); of an expert, gate and up first, then down.
pub(super) fn rms(config: &ModelConfig, name: TensorName) -> [f32; 2] {
    use TensorName as N;
    // Products of rows of size 1 with such weights have size 1.
    let unit = |inputs: usize| 1.0 / libm::sqrtf(inputs as f32);
    let down = |inter: usize| BRANCH_RMS / GATED_RMS * unit(inter);
    let hidden = unit(config.hidden);
    let one = match name {
        N::Embedding => 1.0,
        N::AttentionNorm(_) | N::FfnNorm(_) | N::FinalNorm | N::QNorm(_) | N::KNorm(_) | N::QkvBias(_) => {
            NORM_SPREAD
        }
        N::Qkv(_) | N::LocalGateUp(_) | N::Expert(..) => hidden,
        N::AttentionOut(_) => BRANCH_RMS * unit(config.q_width()),
        N::Gate(_) | N::SharedGate(_) => GATE_RMS * hidden,
        N::LocalDown(l) => down(local_inter(config, l.into()).unwrap_or(1)),
        N::Head => LOGIT_RMS * hidden,
    };
    [one, down(config.moe.inter)]
}
