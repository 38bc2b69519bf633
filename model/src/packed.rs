//! A packed model: canonical bytes per tensor, by name, from a directory or produced from a seed.
//!
//! The names below are the whole vocabulary; families differ in which of them exist (`ModelConfig` says).
//! Bytes are in the layout of `format`, ready for kernels, so a loaded model is views of mapped files.

pub mod manifest;

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

/// One expert: `down(silu(gate x) * up x)`.
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
