//! What the router runs of a model: everything but the routed experts, stage by stage.
//!
//! ```text
//! begin -> for each layer { attention -> route -> (experts, elsewhere) + local_ffn -> finish } -> logits
//! ```
//!
//! The caller owns the loop, because between `route` and `finish` it has calls out to other machines; `reference`
//! is the same loop with every expert at home. State that a step needs lives in a `Workspace`, reused from step
//! to step, so that no stage allocates once the largest step has been seen.
//!
//! Every stage is a function of single rows (attention: of a row and its own sequence), so batch composition
//! never reaches the numbers.

pub mod workspace;

pub mod gate;

pub mod rope;

use crate::config::{Ffn, ModelConfig, QkNorm};
use crate::kernel::native::Native;
use crate::kernel::native::attend::{Attend, Run};
use crate::kernel::native::definition;
use crate::kernel::native::kv::{KvCache, Slot};
use crate::kernel::{KernelError, Kernels, Linear};
use crate::open::{Model, OpenError};
use crate::packed::TensorName;
use crate::region::Bytes;
use rope::Rotary;
use std::sync::Arc;

use workspace::Workspace;

/// Why a stage failed.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// A row left the range of numbers; the request it belongs to ends, others go on.
    #[error("layer {layer}: {stage} of row {row} is not finite")]
    NotFinite {
        /// Decoder layer.
        layer: usize,
        /// What was being computed.
        stage: &'static str,
        /// Row of the batch.
        row: usize,
    },
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// Why a decoder could not be built.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The model's files.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The backend.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The configuration asks for what the decoder does not compute.
    #[error("{0}")]
    Unsupported(String),
}

/// The router's part of a model, loaded.
#[derive(Debug)]
pub struct Decoder {
    config: ModelConfig,
    native: Arc<Native>,
    embedding: Bytes,
    layers: Vec<Layer>,
    final_norm: Vec<f32>,
    head: Box<dyn Linear>,
    rotary: Rotary,
}

#[derive(Debug)]
struct Layer {
    attention_norm: Vec<f32>,
    qkv: Box<dyn Linear>,
    qkv_bias: Option<Vec<f32>>,
    q_norm: Vec<f32>,
    k_norm: Vec<f32>,
    out: Box<dyn Linear>,
    ffn_norm: Vec<f32>,
    /// Dense block, or shared expert of a MoE layer.
    local: Option<LocalFfn>,
    /// `[experts, hidden]`, empty in a dense layer.
    gate: Vec<f32>,
    step: f32,
}

#[derive(Debug)]
struct LocalFfn {
    inter: usize,
    gate_up: Box<dyn Linear>,
    down: Box<dyn Linear>,
    /// `[hidden]`: the output is scaled by the sigmoid of its product with the row.
    gate: Option<Vec<f32>>,
}

impl Decoder {
    /// Loads the router's weights into resident memory. Products run on `kernels`, everything between them on
    /// `native`.
    pub fn load(model: &Model, kernels: &dyn Kernels, native: Arc<Native>) -> Result<Decoder, LoadError> {
        let config = model.config.clone();
        let routing = config.moe.routing;
        let plain = !routing.router_bias && !routing.selection_bias && routing.groups.is_none();
        if !plain || routing.weight_on != crate::config::WeightOn::Output {
            return Err(LoadError::Unsupported(format!(
                "routing {routing:?} is not computed by this version"
            )));
        }
        let linear = |name| -> Result<Box<dyn Linear>, LoadError> {
            let mut matrix = model.matrix(name)?;
            matrix.bytes = matrix.bytes.to_resident();
            Ok(kernels.linear(matrix)?)
        };
        let layers = (0..config.layers.len()).map(|index| Layer::load(model, &linear, index));
        Ok(Decoder {
            native,
            embedding: model.embedding()?,
            layers: layers.collect::<Result<_, _>>()?,
            final_norm: model.vector(TensorName::FinalNorm)?,
            head: linear(TensorName::Head)?,
            rotary: Rotary::new(&config.rope, config.head_dim),
            config,
        })
    }

    /// What it is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Whether layer `layer` has routed experts.
    pub fn is_moe(&self, layer: usize) -> bool {
        self.config.layers[layer].ffn == Ffn::Moe
    }

    /// Starts a step: the embeddings of `tokens`, one row each, become the residual stream.
    pub fn begin(&self, tokens: &[u32], positions: impl Iterator<Item = usize>, work: &mut Workspace) {
        let hidden = self.config.hidden;
        work.start(tokens.len(), &self.config);
        let table: &[u16] = bytemuck::cast_slice(&self.embedding);
        for (row, token) in work.residual.chunks_exact_mut(hidden).zip(tokens) {
            let source = &table[*token as usize * hidden..][..hidden];
            row.iter_mut().zip(source).for_each(|(x, bits)| *x = f32::from_bits(u32::from(*bits) << 16));
        }
        work.angles.clear();
        positions.for_each(|position| self.rotary.angles(position, &mut work.angles));
    }

    /// The attention half of a layer, residual included. `runs` cover the rows of the step.
    pub fn attention(
        &self,
        layer: usize,
        runs: &[Run<'_>],
        kv: &mut KvCache,
        work: &mut Workspace,
    ) -> Result<(), DecodeError> {
        let weights = &self.layers[layer];
        let stage = |stage| move |row| DecodeError::NotFinite { layer, stage, row };
        self.normalise(&weights.attention_norm, work).map_err(stage("the input of attention"))?;
        weights.qkv.apply(work.input.view(), &mut work.qkv)?;
        self.prepare_qkv(weights, work);
        self.store_kv(layer, runs, kv, work);
        let config = &self.config;
        let task = Attend {
            kv: kv.layer(layer),
            heads: config.heads,
            window: config.layers[layer].window,
            queries: &work.qkv,
            stride: config.q_width() + 2 * config.kv_width(),
        };
        self.native.attend(&task, runs, &mut work.attended, &mut work.attend);
        work.input.fill(self.native.ops(), &work.attended, config.q_width()).map_err(stage("attention"))?;
        weights.out.apply(work.input.view(), &mut work.hidden)?;
        work.residual.iter_mut().zip(&work.hidden).for_each(|(x, y)| *x += y);
        Ok(())
    }

    /// Normalises the rows for the feed-forward half and, in a MoE layer, chooses their experts: afterwards
    /// `work.input` are the rows as experts take them and `work.assignments` who gets them, rows ascending.
    pub fn route(&self, layer: usize, work: &mut Workspace) -> Result<(), DecodeError> {
        let weights = &self.layers[layer];
        self.normalise(&weights.ffn_norm, work).map_err(|row| DecodeError::NotFinite {
            layer,
            stage: "the input of the experts",
            row,
        })?;
        work.assignments.clear();
        if weights.gate.is_empty() {
            return Ok(());
        }
        let (hidden, ops) = (self.config.hidden, self.native.ops());
        for (row, x) in work.normed.chunks_exact(hidden).enumerate() {
            work.scores.resize(self.config.moe.experts, 0.0);
            ops.dot16_rows(&weights.gate, x, &mut work.scores);
            gate::choose(&self.config.moe, ops, row as u32, &mut work.scores, &mut work.assignments);
        }
        Ok(())
    }

    /// The dense block or shared expert of a layer, if it has one: into `work.local`.
    pub fn local_ffn(&self, layer: usize, work: &mut Workspace) -> Result<(), DecodeError> {
        let Some(local) = &self.layers[layer].local else { return Ok(()) };
        let (rows, inter) = (work.rows, local.inter);
        work.gate_up.resize(rows * 2 * inter, 0.0);
        local.gate_up.apply(work.input.view(), &mut work.gate_up)?;
        work.inner.resize(rows * inter, 0.0);
        for (h, gate_up) in work.inner.chunks_exact_mut(inter).zip(work.gate_up.chunks_exact(2 * inter)) {
            let (gate, up) = gate_up.split_at(inter);
            self.native.ops().swiglu(gate, up, h);
        }
        let stage = "the inner row of the local feed-forward block";
        work.inner_input
            .fill(self.native.ops(), &work.inner, inter)
            .map_err(|row| DecodeError::NotFinite { layer, stage, row })?;
        local.down.apply(work.inner_input.view(), &mut work.local)?;
        let Some(gate) = &local.gate else { return Ok(()) };
        let hidden = self.config.hidden;
        for (y, x) in work.local.chunks_exact_mut(hidden).zip(work.normed.chunks_exact(hidden)) {
            let factor = definition::sigmoid(self.native.ops().dot16(gate, x));
            y.iter_mut().for_each(|y| *y *= factor);
        }
        Ok(())
    }

    /// Ends a layer: `sums` (`[rows, hidden]`, in multiples of the layer's step) are the routed experts' output;
    /// the shared expert is added to it, and both to the residual stream. In a dense layer `sums` is not read.
    pub fn finish(&self, layer: usize, sums: &[i64], work: &mut Workspace) {
        let weights = &self.layers[layer];
        let local = weights.local.is_some();
        if weights.gate.is_empty() {
            work.residual.iter_mut().zip(&work.local).for_each(|(x, y)| *x += y);
        } else if local {
            let routed = sums.iter().map(|sum| *sum as f32 * weights.step);
            let both = routed.zip(&work.local).map(|(routed, shared)| routed + shared);
            work.residual.iter_mut().zip(both).for_each(|(x, y)| *x += y);
        } else {
            work.residual.iter_mut().zip(sums).for_each(|(x, sum)| *x += *sum as f32 * weights.step);
        }
    }

    /// Logits of the given rows: `[rows.len(), vocab]`, replacing what `out` held.
    pub fn logits(
        &self,
        rows: &[usize],
        work: &mut Workspace,
        out: &mut Vec<f32>,
    ) -> Result<(), DecodeError> {
        let (hidden, layer) = (self.config.hidden, self.config.layers.len());
        work.normed.resize(rows.len() * hidden, 0.0);
        for (row, normed) in rows.iter().zip(work.normed.chunks_exact_mut(hidden)) {
            let x = &work.residual[row * hidden..][..hidden];
            self.native.ops().rms_norm(x, &self.final_norm, self.config.norm_eps, normed);
        }
        let stage = "the input of the head";
        work.input.fill(self.native.ops(), &work.normed, hidden).map_err(|index| DecodeError::NotFinite {
            layer,
            stage,
            row: rows[index],
        })?;
        out.resize(rows.len() * self.config.vocab, 0.0);
        self.head.apply(work.input.view(), out)?;
        let bad =
            out.chunks_exact(self.config.vocab).position(|logits| !logits.iter().all(|l| l.is_finite()));
        match bad {
            Some(index) => Err(DecodeError::NotFinite { layer, stage: "logits", row: rows[index] }),
            None => Ok(()),
        }
    }

    /// RMS norm of the residual stream into `work.normed`, and that as kernel input. The error is a row.
    fn normalise(&self, weight: &[f32], work: &mut Workspace) -> Result<(), usize> {
        let hidden = self.config.hidden;
        work.normed.resize(work.rows * hidden, 0.0);
        for (x, normed) in work.residual.chunks_exact(hidden).zip(work.normed.chunks_exact_mut(hidden)) {
            self.native.ops().rms_norm(x, weight, self.config.norm_eps, normed);
        }
        work.input.fill(self.native.ops(), &work.normed, hidden)
    }

    /// Bias, clip, norm and rope of q and k, in place (reference: `*Attention.forward` of transformers).
    fn prepare_qkv(&self, weights: &Layer, work: &mut Workspace) {
        let config = &self.config;
        let (q_width, kv_width, head_dim) = (config.q_width(), config.kv_width(), config.head_dim);
        let rows = work.qkv.chunks_exact_mut(q_width + 2 * kv_width).zip(work.angles.chunks_exact(head_dim));
        for (row, angles) in rows {
            if let Some(bias) = &weights.qkv_bias {
                row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
            }
            let (q, kv) = row.split_at_mut(q_width);
            let (k, v) = kv.split_at_mut(kv_width);
            // OLMoE normalises first and clips afterwards; the other families do not clip.
            self.normalise_heads(q, &weights.q_norm, &mut work.head);
            self.normalise_heads(k, &weights.k_norm, &mut work.head);
            if let Some(limit) = config.clip_qkv {
                for x in q.iter_mut().chain(k.iter_mut()).chain(v) {
                    *x = x.clamp(-limit, limit);
                }
            }
            let (cos, sin) = angles.split_at(head_dim / 2);
            for head in q.chunks_exact_mut(head_dim).chain(k.chunks_exact_mut(head_dim)) {
                rope::rotate(head, cos, sin);
            }
        }
    }

    fn normalise_heads(&self, heads: &mut [f32], weight: &[f32], scratch: &mut Vec<f32>) {
        let width = match self.config.qk_norm {
            QkNorm::None => return,
            QkNorm::PerHead => self.config.head_dim,
            QkNorm::FullWidth => heads.len(),
        };
        for head in heads.chunks_exact_mut(width) {
            scratch.clear();
            scratch.extend_from_slice(head);
            self.native.ops().rms_norm(scratch, weight, self.config.norm_eps, head);
        }
    }

    fn store_kv(&self, layer: usize, runs: &[Run<'_>], kv: &mut KvCache, work: &Workspace) {
        let q_width = self.config.q_width();
        let stride = q_width + 2 * self.config.kv_width();
        for run in runs {
            for index in 0..run.len {
                let row = &work.qkv[(run.first_row + index) * stride..][q_width..stride];
                kv.store(layer, Slot::of(run.position + index, run.table), row, self.native.ops());
            }
        }
    }
}

impl Layer {
    fn load(
        model: &Model,
        linear: &dyn Fn(TensorName) -> Result<Box<dyn Linear>, LoadError>,
        index: usize,
    ) -> Result<Layer, LoadError> {
        let l = index as u16;
        let config = &model.config;
        let optional = |wanted: bool, name| if wanted { model.vector(name) } else { Ok(Vec::new()) };
        let moe = config.layers[index].ffn == Ffn::Moe;
        let norm = config.qk_norm != QkNorm::None;
        let inter = match config.layers[index].ffn {
            Ffn::Dense(inter) => Some(inter),
            Ffn::Moe => config.moe.shared_inter,
        };
        let local = match inter {
            None => None,
            Some(inter) => Some(LocalFfn {
                inter,
                gate_up: linear(TensorName::LocalGateUp(l))?,
                down: linear(TensorName::LocalDown(l))?,
                gate: if moe && config.moe.shared_gated {
                    Some(model.vector(TensorName::SharedGate(l))?)
                } else {
                    None
                },
            }),
        };
        Ok(Layer {
            attention_norm: model.vector(TensorName::AttentionNorm(l))?,
            qkv: linear(TensorName::Qkv(l))?,
            qkv_bias: if config.qkv_bias { Some(model.vector(TensorName::QkvBias(l))?) } else { None },
            q_norm: optional(norm, TensorName::QNorm(l))?,
            k_norm: optional(norm, TensorName::KNorm(l))?,
            out: linear(TensorName::AttentionOut(l))?,
            ffn_norm: model.vector(TensorName::FfnNorm(l))?,
            local,
            gate: optional(moe, TensorName::Gate(l))?,
            step: if moe { f32::powi(2.0, i32::from(model.step_log2(index))) } else { 0.0 },
        })
    }
}
