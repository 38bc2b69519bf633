//! What a model is: the validated contents of a Hugging Face `config.json`.
//!
//! A family is a value of these types, never a branch in the forward pass. Whatever a config asks for that is
//! not in here is refused by name when it is read: a model that loads is computed in full.

pub mod parse;

use serde::{Deserialize, Serialize};

/// Architectures that load. The variant only picks tensor names and defaults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// Qwen3-MoE: per-head qk-norm, explicit head size.
    Qwen3Moe,
    /// Qwen2-MoE: bias on q, k, v; one shared expert behind a sigmoid gate.
    Qwen2Moe,
    /// Mixtral: sliding window.
    Mixtral,
    /// OLMoE: qk-norm over the full width, clipped q, k, v.
    Olmoe,
}

/// Everything the forward pass needs to know. Sizes are in elements.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelConfig {
    /// Which family the tensor names follow.
    pub family: Family,
    /// Width of a row.
    pub hidden: usize,
    /// Tokens of the vocabulary, rows of the embedding.
    pub vocab: usize,
    /// Longest sequence, `max_position_embeddings`.
    pub context: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Added to the mean square in every RMS norm.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Whether the q, k, v projections have a bias.
    pub qkv_bias: bool,
    /// Norm of queries and keys before rope.
    pub qk_norm: QkNorm,
    /// Clamp of q, k and v to plus or minus this, after the norm of q and k and before rope (`clip_qkv`).
    pub clip_qkv: Option<f32>,
    /// Whether the output head is the embedding.
    pub tied_embeddings: bool,
    /// One entry per layer.
    pub layers: Vec<LayerConfig>,
    /// The routed experts; every MoE layer has the same shape.
    pub moe: MoeConfig,
}

/// One decoder layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerConfig {
    /// Keys a query sees, itself included; `None` sees all before it.
    pub window: Option<usize>,
    /// What follows attention.
    pub ffn: Ffn,
}

/// The feed-forward half of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ffn {
    /// One gated block of this width, on the router.
    Dense(usize),
    /// Routed experts of `ModelConfig::moe`.
    Moe,
}

/// Routed and shared experts.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoeConfig {
    /// Experts per layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width of a routed expert.
    pub inter: usize,
    /// How tokens choose.
    pub routing: RoutingSpec,
    /// Width of the shared expert that every token passes through, if any.
    pub shared_inter: Option<usize>,
    /// Whether the shared expert's output is scaled by `sigmoid(w . x)`.
    pub shared_gated: bool,
}

/// Token-choice routing without capacity limits (reference: the `*TopKRouter` modules of transformers 5).
///
/// Scores are computed from `logits = W x`; the `top_k` best are chosen, ties to the lower index; their
/// weights are the scores, optionally renormalised, times `scale`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct RoutingSpec {
    /// Score of an expert.
    pub scoring: Scoring,
    /// Whether the logits have a bias.
    pub router_bias: bool,
    /// Whether a bias is added for the choice only, not for the weight.
    pub selection_bias: bool,
    /// Choice restricted to the best groups of experts.
    pub groups: Option<Groups>,
    /// Whether the chosen weights are divided by their sum.
    pub renormalise: bool,
    /// Factor on every weight.
    pub scale: f32,
    /// Where the weight is applied.
    pub weight_on: WeightOn,
}

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scoring {
    /// Softmax over all experts.
    Softmax,
    /// Sigmoid of each.
    Sigmoid,
}

/// Group-limited choice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Groups {
    /// Groups of equal size, in index order.
    pub count: usize,
    /// Groups that stay.
    pub keep: usize,
}

/// What the routing weight multiplies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightOn {
    /// The expert's output.
    Output,
    /// Its input.
    Input,
}

/// RMS norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QkNorm {
    /// None.
    None,
    /// Each head by itself, one weight of `head_dim`.
    PerHead,
    /// All heads together, one weight of `heads * head_dim` (keys: `kv_heads * head_dim`).
    FullWidth,
}

/// Rotary position embedding, half-split pairs (i, i + head_dim/2).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Change of the frequencies for longer contexts.
    pub scaling: RopeScaling,
}

/// Context extension of rope (reference: transformers `modeling_rope_utils`).
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// None.
    Default,
    /// Positions divided by the factor.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// Context extension factor.
        factor: f64,
        /// Context of pre-training.
        original_context: usize,
        /// Rotations above which a dimension keeps its frequency.
        beta_fast: f64,
        /// Rotations below which a dimension is fully interpolated.
        beta_slow: f64,
        /// Factor on cos and sin.
        attention_factor: f64,
        /// Whether the correction range is rounded to whole dimensions.
        truncate: bool,
    },
}

impl ModelConfig {
    /// Width of all query heads together.
    pub fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Width of all key (or value) heads together.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Indices of the layers with routed experts.
    pub fn moe_layers(&self) -> impl Iterator<Item = usize> + '_ {
        self.layers.iter().enumerate().filter(|(_, layer)| layer.ffn == Ffn::Moe).map(|(index, _)| index)
    }
}

/// Bytes of weights that one token reads: what a decode step is bounded by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenBytes {
    /// Attention, gates, dense and shared blocks, head: always on the router.
    pub router: u64,
    /// The chosen routed experts of all layers.
    pub experts: u64,
}

impl ModelConfig {
    /// Weight bytes per token with large matrices in `format` (norms and biases are left out: under 0.1 %).
    pub fn token_bytes(&self, format: crate::format::Format) -> TokenBytes {
        let matrix = |outputs, inputs| format.matrix_bytes(outputs, inputs) as u64;
        let block = |inter| matrix(2 * inter, self.hidden) + matrix(self.hidden, inter);
        let mut bytes = TokenBytes { router: matrix(self.vocab, self.hidden), experts: 0 };
        for layer in &self.layers {
            bytes.router += matrix(self.q_width() + 2 * self.kv_width(), self.hidden);
            bytes.router += matrix(self.hidden, self.q_width());
            match layer.ffn {
                Ffn::Dense(inter) => bytes.router += block(inter),
                Ffn::Moe => {
                    bytes.router += (self.moe.experts * self.hidden * size_of::<f32>()) as u64;
                    bytes.router += self.moe.shared_inter.map_or(0, block);
                    bytes.experts +=
                        self.moe.top_k as u64 * format.expert_bytes(self.hidden, self.moe.inter) as u64;
                }
            }
        }
        bytes
    }
}
