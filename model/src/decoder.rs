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
use crate::kernel::native::dots::Dots;
use crate::kernel::native::kv::{KvCache, NewTokens, Slot};
use crate::kernel::{Assignment, KernelError, Kernels, Linear};
use crate::open::{Model, OpenError};
use crate::packed::TensorName;
use crate::region::Bytes;
use rope::Rotary;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use workspace::Workspace;

/// Rows that read the gate's weights together, when there are many: their values stay in the second cache level.
/// With fewer, threads divide the experts.
const GATE_ROWS: usize = 8;

/// Logits looked at together for NaN: 32 KB.
const CHECKED: usize = 8192;

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
    /// The mapped embedding cannot be used any more.
    #[error(transparent)]
    Open(#[from] OpenError),
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
        self.native.each_part(&mut work.residual, hidden, &|index, row| {
            let source = &table[tokens[index] as usize * hidden..][..hidden];
            row.iter_mut().zip(source).for_each(|(x, bits)| *x = f32::from_bits(u32::from(*bits) << 16));
        });
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
        let (config, ops) = (&self.config, self.native.ops());
        let task = Attend {
            kv: kv.layer(layer),
            heads: config.heads,
            window: config.layers[layer].window,
            queries: &work.qkv,
            stride: config.q_width() + 2 * config.kv_width(),
        };
        self.native.attend(&task, runs, &mut work.attended, &mut work.attend);
        let Workspace { input, attended, hidden, residual, .. } = work;
        input.fill(&self.native, attended, config.q_width(), &|_, _| ()).map_err(stage("attention"))?;
        weights.out.apply(input.view(), hidden)?;
        let width = config.hidden;
        self.native.each_part(residual, width, &|row, x| ops.add(&hidden[row * width..][..width], x));
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
        let nobody = Assignment { row: 0, expert: 0, weight: 0.0 };
        work.assignments.resize(work.rows * self.config.moe.top_k, nobody);
        work.scores.resize(work.rows * self.config.moe.experts, 0.0);
        if work.rows < GATE_ROWS {
            self.gate_few(&weights.gate, work)
        } else {
            self.gate_many(&weights.gate, work)
        }
        Ok(())
    }

    /// Gate of few rows: threads divide the experts.
    fn gate_few(&self, gate: &[f32], work: &mut Workspace) {
        let (moe, inputs, ops) = (&self.config.moe, self.config.hidden, self.native.ops());
        let Workspace { rows, normed, scores, logits, assignments, .. } = work;
        let (rows, share) = (*rows, moe.experts.div_ceil(self.native.threads()));
        self.native.each_large_part(scores, share * rows, &|index, scores| {
            let weights = &gate[index * share * inputs..][..scores.len() / rows * inputs];
            ops.dots(Dots { weights, x: normed, inputs, row_step: 1, output_step: rows }, scores);
        });
        logits.resize(moe.experts, 0.0);
        for (row, assignments) in assignments.chunks_exact_mut(moe.top_k).enumerate() {
            logits.iter_mut().zip(scores[row..].iter().step_by(rows)).for_each(|(to, score)| *to = *score);
            gate::choose(moe, ops, row as u32, logits, assignments);
        }
    }

    /// Gate of many rows: threads divide the rows, and weights are read once for several of them.
    fn gate_many(&self, gate: &[f32], work: &mut Workspace) {
        let (moe, inputs, ops) = (&self.config.moe, self.config.hidden, self.native.ops());
        let Workspace { normed, scores, assignments, .. } = work;
        let (experts, top_k) = (moe.experts, moe.top_k);
        let scores = (&mut scores[..], GATE_ROWS * experts);
        self.native.each_pair(scores, (assignments, GATE_ROWS * top_k), &|index, scores, assignments| {
            let first = index * GATE_ROWS;
            let x = &normed[first * inputs..][..scores.len() / experts * inputs];
            ops.dots(Dots { weights: gate, x, inputs, row_step: experts, output_step: 1 }, scores);
            let places = assignments.chunks_exact_mut(top_k);
            for (row, (scores, places)) in scores.chunks_exact_mut(experts).zip(places).enumerate() {
                gate::choose(moe, ops, (first + row) as u32, scores, places);
            }
        });
    }

    /// The dense block or shared expert of a layer, if it has one: into `work.local`.
    pub fn local_ffn(&self, layer: usize, work: &mut Workspace) -> Result<(), DecodeError> {
        let Some(local) = &self.layers[layer].local else { return Ok(()) };
        let (rows, inter) = (work.rows, local.inter);
        work.gate_up.resize(rows * 2 * inter, 0.0);
        local.gate_up.apply(work.input.view(), &mut work.gate_up)?;
        work.inner.resize(rows * inter, 0.0);
        let (stage, ops) = ("the inner row of the local feed-forward block", self.native.ops());
        let Workspace { inner, inner_input, gate_up, normed, .. } = work;
        inner_input
            .fill(&self.native, inner, inter, &|row, h| {
                let (gate, up) = gate_up[row * 2 * inter..][..2 * inter].split_at(inter);
                ops.swiglu(gate, up, h);
            })
            .map_err(|row| DecodeError::NotFinite { layer, stage, row })?;
        local.down.apply(inner_input.view(), &mut work.local)?;
        let Some(gate) = &local.gate else { return Ok(()) };
        let hidden = self.config.hidden;
        self.native.each_part(&mut work.local, hidden, &|row, y| {
            ops.scale(definition::sigmoid(ops.dot16(gate, &normed[row * hidden..][..hidden])), y);
        });
        Ok(())
    }

    /// Ends a layer: `sums` (`[rows, hidden]`, in multiples of the layer's step) are the routed experts' output;
    /// the shared expert is added to it, and both to the residual stream. In a dense layer `sums` is not read.
    pub fn finish(&self, layer: usize, sums: &[i64], work: &mut Workspace) {
        let (weights, width, ops) = (&self.layers[layer], self.config.hidden, self.native.ops());
        let (with_local, dense) = (weights.local.is_some(), weights.gate.is_empty());
        let Workspace { residual, local, .. } = work;
        let sums = |row: usize| &sums[row * width..][..width];
        if with_local && !dense {
            self.native.each_pair((residual, width), (local, width), &|row, x, both| {
                ops.add_sums(sums(row), weights.step, both);
                ops.add(both, x);
            });
        } else if dense {
            self.native.each_part(residual, width, &|row, x| ops.add(&local[row * width..][..width], x));
        } else {
            self.native.each_part(residual, width, &|row, x| ops.add_sums(sums(row), weights.step, x));
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
        let (ops, vocab) = (self.native.ops(), self.config.vocab);
        let Workspace { normed, residual, input, .. } = work;
        normed.resize(rows.len() * hidden, 0.0);
        let norm = |index: usize, normed: &mut [f32]| {
            let x = &residual[rows[index] * hidden..][..hidden];
            ops.rms_norm(x, &self.final_norm, self.config.norm_eps, normed);
        };
        let not_finite = |stage, index| DecodeError::NotFinite { layer, stage, row: rows[index] };
        input
            .fill(&self.native, normed, hidden, &norm)
            .map_err(|index| not_finite("the input of the head", index))?;
        out.resize(rows.len() * vocab, 0.0);
        self.head.apply(input.view(), out)?;
        let broken = AtomicUsize::new(usize::MAX);
        self.native.each_large_part(out, CHECKED, &|index, part| {
            if let Some(at) =
                (!ops.is_finite(part)).then(|| part.iter().position(|x| !x.is_finite())).flatten()
            {
                broken.fetch_min((index * CHECKED + at) / vocab, Ordering::Relaxed);
            }
        });
        match broken.into_inner() {
            usize::MAX => Ok(()),
            index => Err(not_finite("logits", index)),
        }
    }

    /// RMS norm of the residual stream into `work.normed`, and that as kernel input. The error is a row.
    fn normalise(&self, weight: &[f32], work: &mut Workspace) -> Result<(), usize> {
        let (hidden, eps, ops) = (self.config.hidden, self.config.norm_eps, self.native.ops());
        let Workspace { rows, normed, residual, input, .. } = work;
        normed.resize(*rows * hidden, 0.0);
        input.fill(&self.native, normed, hidden, &|row, normed| {
            ops.rms_norm(&residual[row * hidden..][..hidden], weight, eps, normed);
        })
    }

    /// Bias, clip, norm and rope of q and k, in place (reference: `*Attention.forward` of transformers).
    fn prepare_qkv(&self, weights: &Layer, work: &mut Workspace) {
        let (config, ops) = (&self.config, self.native.ops());
        let (q_width, kv_width, head_dim) = (config.q_width(), config.kv_width(), config.head_dim);
        let Workspace { qkv, angles, .. } = work;
        self.native.each_part(qkv, q_width + 2 * kv_width, &|index, row| {
            if let Some(bias) = &weights.qkv_bias {
                ops.add(bias, row);
            }
            let (q, kv) = row.split_at_mut(q_width);
            let (k, v) = kv.split_at_mut(kv_width);
            // OLMoE normalises first and clips afterwards; the other families do not clip.
            self.normalise_heads(q, &weights.q_norm);
            self.normalise_heads(k, &weights.k_norm);
            if let Some(limit) = config.clip_qkv {
                for x in q.iter_mut().chain(k.iter_mut()).chain(v) {
                    *x = x.clamp(-limit, limit);
                }
            }
            let (cos, sin) = angles[index * head_dim..][..head_dim].split_at(head_dim / 2);
            for head in q.chunks_exact_mut(head_dim).chain(k.chunks_exact_mut(head_dim)) {
                ops.rotate(head, cos, sin);
            }
        });
    }

    fn normalise_heads(&self, heads: &mut [f32], weight: &[f32]) {
        let width = match self.config.qk_norm {
            QkNorm::None => return,
            QkNorm::PerHead => self.config.head_dim,
            QkNorm::FullWidth => heads.len(),
        };
        for head in heads.chunks_exact_mut(width) {
            self.native.ops().rms_norm_here(head, weight, self.config.norm_eps);
        }
    }

    fn store_kv(&self, layer: usize, runs: &[Run<'_>], kv: &mut KvCache, work: &mut Workspace) {
        let first = self.config.q_width();
        let stride = first + 2 * self.config.kv_width();
        let Workspace { qkv, slots, .. } = work;
        slots.clear();
        for run in runs {
            let slot = |index| (run.first_row + index, Slot::of(run.position + index, run.table));
            slots.extend((0..run.len).map(slot));
        }
        self.native.store_tokens(kv, layer, NewTokens { slots, rows: qkv, stride, first });
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
