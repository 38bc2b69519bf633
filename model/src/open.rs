//! Opening a model: a Hugging Face directory (packed on first use) or a `synthetic:` name.

use std::path::{Path, PathBuf};

use crate::config::ModelConfig;
use crate::format::Format;
use crate::packed::{PackedExpert, PackedMatrix, TensorName};
use crate::region::Bytes;

/// An opened model: everything by name, as views of mapped files or made from the seed on request.
#[derive(Debug)]
pub struct Model {
    /// Directory or synthetic name it was opened by, as `/v1/models` shows it (last path component).
    pub name: String,
    /// What it is.
    pub config: ModelConfig,
    /// Format of its large matrices.
    pub format: Format,
    /// BLAKE3 of the manifest: equal fingerprints mean equal bytes of every tensor and equal combine steps.
    pub fingerprint: [u8; 32],
    /// The Hugging Face directory with tokenizer and templates; `None` for a synthetic model.
    pub directory: Option<PathBuf>,
}

/// Why a model does not open. Every message names the file or key and says what to do.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct OpenError(pub String);

/// Reports of long work: bytes done, bytes in all, and what is being done.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64, &str);

impl Model {
    /// Opens `spec`: a directory, or `synthetic:<shape>?layers=N&seed=S`. A directory is packed into
    /// `cache/<name>-<hash of the source>/<format>/` unless that is there already.
    pub fn open(
        spec: &str,
        format: Format,
        cache: &Path,
        progress: Progress<'_>,
    ) -> Result<Model, OpenError> {
        let _ = (spec, format, cache, progress);
        todo!()
    }

    /// A matrix (`Qkv`, `AttentionOut`, `LocalGateUp`, `LocalDown`, `Head`).
    pub fn matrix(&self, name: TensorName) -> Result<PackedMatrix, OpenError> {
        let _ = name;
        todo!()
    }

    /// A small f32 tensor (norms, biases, gates).
    pub fn vector(&self, name: TensorName) -> Result<Vec<f32>, OpenError> {
        let _ = name;
        todo!()
    }

    /// The embedding: bf16 `[vocab, hidden]`, little-endian, row-major.
    pub fn embedding(&self) -> Result<Bytes, OpenError> {
        todo!()
    }

    /// One expert. Of a directory: a view of the mapped file. Synthetic: made now.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<PackedExpert, OpenError> {
        let _ = (layer, expert);
        todo!()
    }

    /// Combine step of a MoE layer, as a power of two.
    pub fn step_log2(&self, layer: usize) -> i8 {
        let _ = layer;
        todo!()
    }
}
