//! A packed model: canonical bytes per tensor, by name, from a directory or produced from a seed.
//!
//! The names below are the whole vocabulary; families differ in which of them exist (`ModelConfig` says).
//! Bytes are in the layout of `format`, ready for kernels, so a loaded model is views of mapped files.

pub mod manifest;

pub mod slice;

use crate::config::{Ffn, ModelConfig, QkNorm};
use crate::format::Format;
use crate::region::Bytes;

/// A tensor of a packed model. Layer numbers count from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum TensorName {
    /// bf16 `[vocab, hidden]`, row-major, not padded; also the source of a tied head.
    Embedding,
    /// f32 `[hidden]`: norm before attention.
    AttentionNorm(u16),
    /// Matrix `[q_width + 2 kv_width, hidden]`: q, k, v stacked in this order.
    Qkv(u16),
    /// f32 `[q_width + 2 kv_width]`.
    QkvBias(u16),
    /// f32 `[head_dim]` or `[q_width]`.
    QNorm(u16),
    /// f32 `[head_dim]` or `[kv_width]`.
    KNorm(u16),
    /// Matrix `[hidden, q_width]`.
    AttentionOut(u16),
    /// f32 `[hidden]`: norm before the feed-forward half.
    FfnNorm(u16),
    /// f32 `[experts, hidden]`, row-major: the routing gate.
    Gate(u16),
    /// Matrix `[2 inter, hidden]`: gate rows then up rows of a dense or shared block.
    LocalGateUp(u16),
    /// Matrix `[hidden, inter]`: down of a dense or shared block.
    LocalDown(u16),
    /// f32 `[hidden]`: the gate of the shared expert.
    SharedGate(u16),
    /// One expert `(layer, index)`: gate and up, then down (`PackedExpert`).
    Expert(u16, u16),
    /// f32 `[hidden]`: the last norm.
    FinalNorm,
    /// Matrix `[vocab, hidden]`.
    Head,
}

impl std::fmt::Display for TensorName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            TensorName::Embedding => write!(f, "embedding"),
            TensorName::AttentionNorm(l) => write!(f, "layers.{l}.attention_norm"),
            TensorName::Qkv(l) => write!(f, "layers.{l}.qkv"),
            TensorName::QkvBias(l) => write!(f, "layers.{l}.qkv_bias"),
            TensorName::QNorm(l) => write!(f, "layers.{l}.q_norm"),
            TensorName::KNorm(l) => write!(f, "layers.{l}.k_norm"),
            TensorName::AttentionOut(l) => write!(f, "layers.{l}.attention_out"),
            TensorName::FfnNorm(l) => write!(f, "layers.{l}.ffn_norm"),
            TensorName::Gate(l) => write!(f, "layers.{l}.gate"),
            TensorName::LocalGateUp(l) => write!(f, "layers.{l}.local_gate_up"),
            TensorName::LocalDown(l) => write!(f, "layers.{l}.local_down"),
            TensorName::SharedGate(l) => write!(f, "layers.{l}.shared_gate"),
            TensorName::Expert(l, e) => write!(f, "layers.{l}.experts.{e}"),
            TensorName::FinalNorm => write!(f, "final_norm"),
            TensorName::Head => write!(f, "head"),
        }
    }
}

/// A matrix `[outputs, inputs]` in one of the weight formats.
#[derive(Clone, Debug)]
pub struct PackedMatrix {
    /// Format of `bytes`.
    pub format: Format,
    /// Rows of the result.
    pub outputs: usize,
    /// Length of the dot products.
    pub inputs: usize,
    /// `format.matrix_bytes(outputs, inputs)` bytes, 64-byte aligned.
    pub bytes: Bytes,
}

/// One expert, or a slice of one (`slice`): `down(silu(gate x) * up x)`.
///
/// Quantized: row blocks of gate and up alternate (gate 0, up 0, gate 1, up 1, ...; `padded_inputs(inter)`
/// outputs each), so that one pass yields 16 products of both; then the row blocks of down. bf16: gate
/// `[inter, hidden]`, up, down `[hidden, inter]`, each row-major and padded like a matrix.
#[derive(Clone, Debug)]
pub struct PackedExpert {
    /// Format of `bytes`.
    pub format: Format,
    /// Width of a row.
    pub hidden: usize,
    /// Width of the expert.
    pub inter: usize,
    /// `format.expert_bytes(hidden, inter)` bytes, 64-byte aligned.
    pub bytes: Bytes,
}

/// What a tensor is, which with a format gives its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TensorKind {
    /// bf16, row-major, not padded, in every format.
    Embedding {
        /// Rows.
        vocab: usize,
        /// Row width.
        hidden: usize,
    },
    /// f32 values, as many as this.
    Vector(usize),
    /// `PackedMatrix`.
    Matrix {
        /// Rows.
        outputs: usize,
        /// Row width.
        inputs: usize,
    },
    /// `PackedExpert`.
    Expert {
        /// Width of a row.
        hidden: usize,
        /// Width of the expert.
        inter: usize,
    },
}

impl TensorKind {
    /// Bytes of such a tensor in a model of `format`.
    pub fn bytes(self, format: Format) -> usize {
        match self {
            TensorKind::Embedding { vocab, hidden } => vocab * hidden * 2,
            TensorKind::Vector(len) => len * 4,
            TensorKind::Matrix { outputs, inputs } => format.matrix_bytes(outputs, inputs),
            TensorKind::Expert { hidden, inter } => format.expert_bytes(hidden, inter),
        }
    }
}

/// Every tensor of a model that is not a routed expert, in the order in which they are packed.
pub fn router_tensors(config: &ModelConfig) -> Vec<TensorName> {
    let mut names = vec![TensorName::Embedding];
    for (index, layer) in config.layers.iter().enumerate() {
        let l = index as u16;
        names.extend([TensorName::AttentionNorm(l), TensorName::Qkv(l)]);
        if config.qkv_bias {
            names.push(TensorName::QkvBias(l));
        }
        if config.qk_norm != QkNorm::None {
            names.extend([TensorName::QNorm(l), TensorName::KNorm(l)]);
        }
        names.extend([TensorName::AttentionOut(l), TensorName::FfnNorm(l)]);
        if layer.ffn == Ffn::Moe {
            names.push(TensorName::Gate(l));
        }
        if local_inter(config, index).is_some() {
            names.extend([TensorName::LocalGateUp(l), TensorName::LocalDown(l)]);
        }
        if layer.ffn == Ffn::Moe && config.moe.shared_gated {
            names.push(TensorName::SharedGate(l));
        }
    }
    names.extend([TensorName::FinalNorm, TensorName::Head]);
    names
}

/// The routed experts of a layer (none where it is dense).
pub fn expert_tensors(config: &ModelConfig, layer: usize) -> impl Iterator<Item = TensorName> + use<> {
    let moe = config.layers.get(layer).is_some_and(|layer| layer.ffn == Ffn::Moe);
    let count = if moe { config.moe.experts } else { 0 };
    (0..count).map(move |expert| TensorName::Expert(layer as u16, expert as u16))
}

/// Width of the block that the router runs itself in `layer`: dense, or the shared expert.
pub fn local_inter(config: &ModelConfig, layer: usize) -> Option<usize> {
    match config.layers.get(layer)?.ffn {
        Ffn::Dense(inter) => Some(inter),
        Ffn::Moe => config.moe.shared_inter,
    }
}

/// What `name` is in a model of this config; `None` where the model has no such tensor.
pub fn kind(config: &ModelConfig, name: TensorName) -> Option<TensorKind> {
    use TensorName as N;
    let hidden = config.hidden;
    let layer_of = |l: u16| config.layers.get(usize::from(l));
    let moe = |l: u16| layer_of(l).is_some_and(|layer| layer.ffn == Ffn::Moe);
    let vector = |exists: bool, len: usize| exists.then_some(TensorKind::Vector(len));
    let matrix = |exists: bool, outputs, inputs| exists.then_some(TensorKind::Matrix { outputs, inputs });
    let qk_width = |full: usize| match config.qk_norm {
        QkNorm::None => None,
        QkNorm::PerHead => Some(TensorKind::Vector(config.head_dim)),
        QkNorm::FullWidth => Some(TensorKind::Vector(full)),
    };
    let qkv = config.q_width() + 2 * config.kv_width();
    match name {
        N::Embedding => Some(TensorKind::Embedding { vocab: config.vocab, hidden }),
        N::AttentionNorm(l) | N::FfnNorm(l) => vector(layer_of(l).is_some(), hidden),
        N::Qkv(l) => matrix(layer_of(l).is_some(), qkv, hidden),
        N::QkvBias(l) => vector(config.qkv_bias && layer_of(l).is_some(), qkv),
        N::QNorm(l) => layer_of(l).and_then(|_| qk_width(config.q_width())),
        N::KNorm(l) => layer_of(l).and_then(|_| qk_width(config.kv_width())),
        N::AttentionOut(l) => matrix(layer_of(l).is_some(), hidden, config.q_width()),
        N::Gate(l) => vector(moe(l), config.moe.experts * hidden),
        N::LocalGateUp(l) => local_inter(config, l.into())
            .map(|inter| TensorKind::Matrix { outputs: 2 * inter, inputs: hidden }),
        N::LocalDown(l) => {
            local_inter(config, l.into()).map(|inter| TensorKind::Matrix { outputs: hidden, inputs: inter })
        }
        N::SharedGate(l) => vector(moe(l) && config.moe.shared_gated, hidden),
        N::Expert(l, e) => (moe(l) && usize::from(e) < config.moe.experts)
            .then_some(TensorKind::Expert { hidden, inter: config.moe.inter }),
        N::FinalNorm => vector(true, hidden),
        N::Head => matrix(true, config.vocab, hidden),
    }
}
