//! Models of real shapes with seeded random weights: performance can be studied without the real ones.
//!
//! `synthetic:<shape>?layers=N&seed=S` names a model that any machine makes by itself, tensor by tensor, directly
//! in the packed format: equal names give equal bytes everywhere. Weights are uniform noise, scaled so that rows
//! keep their size through any number of layers (each block adds a fifth of the residual's size at the start) and
//! logits spread like a real model's. The text of such a model is noise. A shape that is not a family this program
//! computes is refused, with the list; so is any unknown key. `write_checkpoint` makes a directory instead, for
//! what needs a tokenizer and files.

mod noise;
mod scale;
mod shapes;
mod spec;
mod tokenizer;
mod write;

use crate::config::ModelConfig;
use crate::format::{Format, padded_inputs};
use crate::pack::probe::{self, LayerView};
use crate::packed::{TensorKind, TensorName, kind, slice};
use crate::region::{Buffer, Bytes};
use noise::Stream;
use scale::{BRANCH_RMS, centre, rms};
use spec::Spec;
pub use spec::{PREFIX, SyntheticError};
pub use write::write_checkpoint;

/// A synthetic model. Tensors are made when they are asked for.
#[derive(Clone, Debug)]
pub struct Synthetic {
    spec: Spec,
    config: ModelConfig,
    format: Format,
    step_log2: i8,
}

impl Synthetic {
    /// Parses `synthetic:<shape>?layers=N&seed=S` (layers: all of the shape; seed: 0). Makes one gate, no more.
    pub fn parse(spec: &str, format: Format) -> Result<Synthetic, SyntheticError> {
        let spec = Spec::parse(spec)?;
        let config = spec.model_config()?;
        let mut made = Synthetic { spec, config, format, step_log2: 0 };
        made.step_log2 = made.find_step();
        Ok(made)
    }

    /// The spec with every key, as the model's name.
    pub fn canonical(&self) -> String {
        let (shape, seed) = (self.spec.shape, self.spec.seed);
        format!("{PREFIX}{shape}?layers={}&seed={seed}", self.config.layers.len())
    }

    /// What it is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// BLAKE3 of the canonical spec, the format and the version of the generator.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("moemesh synthetic model 1");
        hasher.update(self.canonical().as_bytes());
        hasher.update(self.format.name().as_bytes());
        *hasher.finalize().as_bytes()
    }

    /// Combine step of every MoE layer, as a power of two.
    pub fn step_log2(&self) -> i8 {
        self.step_log2
    }

    /// All layers are alike, so one step serves: the size of an expert's output is known by construction, and
    /// that of the routing weights is found by sending noise through the first layer's gate.
    fn find_step(&self) -> i8 {
        let Some(layer) = self.config.moe_layers().next() else { return 0 };
        let floats = |name: TensorName| -> Vec<f32> {
            let bytes = self.tensor(name);
            let bytes = bytes.as_deref().unwrap_or_default();
            bytes.as_chunks::<4>().0.iter().map(|bits| f32::from_le_bytes(*bits)).collect()
        };
        let (norm, gate) =
            (floats(TensorName::FfnNorm(layer as u16)), floats(TensorName::Gate(layer as u16)));
        let weight = probe::weight_norm(&self.config, LayerView { index: layer, norm: &norm, gate: &gate });
        probe::step_for(self.format, BRANCH_RMS * weight)
    }

    /// The packed bytes of a tensor, made now; `None` where the model has none of that name.
    pub fn tensor(&self, name: TensorName) -> Option<Bytes> {
        let kind = kind(&self.config, name)?;
        let mut bytes = Buffer::zeroed(kind.bytes(self.format));
        let mut stream = Stream::new(self.spec.seed, &name.to_string());
        let [first, second] = rms(&self.config, name);
        match kind {
            TensorKind::Embedding { .. } => stream.bf16(&mut bytes, first),
            TensorKind::Vector(_) => stream.f32(&mut bytes, centre(name), first),
            TensorKind::Matrix { .. } => stream.packed(self.format, &mut bytes, first),
            TensorKind::Expert { hidden, inter } => {
                let gate_up = self.format.matrix_bytes(2 * padded_inputs(inter), hidden);
                let (gate_up, down) = bytes.split_at_mut(gate_up);
                stream.packed(self.format, gate_up, first);
                stream.packed(self.format, down, second);
            }
        }
        Some(bytes.into())
    }

    /// Makes blocks `from..to` of an expert at the beginning of `out`, and nothing else of it: `tensor` cut by
    /// `packed::slice`. `None` where there are no such blocks or `out` is too short.
    pub fn write_slice(&self, name: TensorName, blocks: (u16, u16), out: &mut [u8]) -> Option<()> {
        let TensorKind::Expert { hidden, inter } = kind(&self.config, name)? else { return None };
        let [gate_up, down] = rms(&self.config, name);
        let boundary = self.format.matrix_bytes(2 * padded_inputs(inter), hidden);
        let start = Stream::new(self.spec.seed, &name.to_string());
        let mut at = 0;
        for run in slice::runs(self.format, (hidden, inter), blocks)? {
            let parts =
                [(run.start..run.end.min(boundary), gate_up), (run.start.max(boundary)..run.end, down)];
            for (part, rms) in parts.into_iter().filter(|(part, _)| !part.is_empty()) {
                let len = part.len();
                start.after(part.start).packed(self.format, out.get_mut(at..at + len)?, rms);
                at += len;
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests;
