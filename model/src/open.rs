//! Opening a model: a Hugging Face directory (packed on first use) or a `synthetic:` name.

use std::path::{Path, PathBuf};

use crate::config::ModelConfig;
use crate::format::Format;
use crate::json::shown;
use crate::pack::{self, PackError};
use crate::packed::manifest::PackedFiles;
use crate::packed::slice::runs;
use crate::packed::{PackedExpert, PackedMatrix, TensorKind, TensorName, kind};
use crate::region::Bytes;
use crate::synthetic::{self, Synthetic};

pub use crate::pack::Progress;

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
    weights: Weights,
}

#[derive(Debug)]
enum Weights {
    Packed(Box<PackedFiles>),
    Synthetic(Box<Synthetic>),
}

/// Why a model does not open. Every message names the file or key and says what to do.
#[derive(Debug, thiserror::Error)]
#[error("{}", shown(.0))]
pub struct OpenError(pub String);

impl From<PackError> for OpenError {
    fn from(error: PackError) -> OpenError {
        OpenError(error.0)
    }
}

impl Model {
    /// Name and shape of a model, from its `config.json` or its synthetic name alone: no weights are needed.
    ///
    /// # Errors
    /// What is wrong with the name or the config.
    pub fn describe(spec: &str, format: Format) -> Result<(String, ModelConfig), OpenError> {
        if spec.starts_with(synthetic::PREFIX) {
            let made = Synthetic::parse(spec, format).map_err(|error| OpenError(error.0))?;
            return Ok((made.canonical(), made.config().clone()));
        }
        let directory = Path::new(spec);
        let name =
            directory.file_name().map_or_else(|| spec.to_owned(), |name| name.to_string_lossy().into_owned());
        Ok((name, pack::read_config(directory)?.0))
    }

    /// Opens `spec`: a directory, or `synthetic:<shape>?layers=N&seed=S`. A directory is packed into
    /// `cache/<name>-<hash of the source>/<format>/` unless that is there already.
    pub fn open(
        spec: &str,
        format: Format,
        cache: &Path,
        progress: Progress<'_>,
    ) -> Result<Model, OpenError> {
        if spec.starts_with(synthetic::PREFIX) {
            let made = Synthetic::parse(spec, format).map_err(|error| OpenError(error.0))?;
            return Ok(Model {
                name: made.canonical(),
                config: made.config().clone(),
                format,
                fingerprint: made.fingerprint(),
                directory: None,
                weights: Weights::Synthetic(Box::new(made)),
            });
        }
        let directory = std::fs::canonicalize(spec).map_err(|error| {
            OpenError(format!(
                "cannot open model '{}': {error}; give a Hugging Face directory or {}<shape>",
                spec.escape_debug(),
                synthetic::PREFIX
            ))
        })?;
        if !directory.is_dir() {
            let shown = directory.display();
            return Err(OpenError(format!(
                "{shown} is not a directory; give the directory that has config.json"
            )));
        }
        let packed = pack::open_or_pack(&directory, format, cache, progress)?;
        let name = directory.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(Model {
            name: name.unwrap_or_else(|| spec.to_string()),
            config: packed.manifest().config.clone(),
            format,
            fingerprint: packed.fingerprint(),
            directory: Some(directory),
            weights: Weights::Packed(Box::new(packed)),
        })
    }

    /// A matrix (`Qkv`, `AttentionOut`, `LocalGateUp`, `LocalDown`, `Head`).
    pub fn matrix(&self, name: TensorName) -> Result<PackedMatrix, OpenError> {
        match self.kind(name)? {
            TensorKind::Matrix { outputs, inputs } => {
                Ok(PackedMatrix { format: self.format, outputs, inputs, bytes: self.bytes(name)? })
            }
            _ => Err(OpenError(format!("{name} is not a matrix"))),
        }
    }

    /// A small f32 tensor (norms, biases, gates).
    pub fn vector(&self, name: TensorName) -> Result<Vec<f32>, OpenError> {
        match self.kind(name)? {
            TensorKind::Vector(_) => Ok(self
                .bytes(name)?
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bits| f32::from_le_bytes(*bits))
                .collect()),
            _ => Err(OpenError(format!("{name} is not a vector"))),
        }
    }

    /// The embedding: bf16 `[vocab, hidden]`, little-endian, row-major.
    pub fn embedding(&self) -> Result<Bytes, OpenError> {
        self.bytes(TensorName::Embedding)
    }

    /// One expert. Of a directory: a view of the mapped file. Synthetic: made now.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<PackedExpert, OpenError> {
        let absent = || OpenError(format!("{} has no expert {expert} in layer {layer}", self.name));
        let (Ok(l), Ok(e)) = (u16::try_from(layer), u16::try_from(expert)) else { return Err(absent()) };
        let name = TensorName::Expert(l, e);
        let Some(TensorKind::Expert { hidden, inter }) = kind(&self.config, name) else {
            return Err(absent());
        };
        Ok(PackedExpert { format: self.format, hidden, inter, bytes: self.bytes(name)? })
    }

    /// Writes blocks `from..to` of an expert, packed like an expert of that width (`packed::slice`), to `out`, which has
    /// their length. Of a directory: read from the file, after its hash was compared.
    ///
    /// # Errors
    /// There are no such blocks; the file is damaged or cannot be read, and is named.
    pub fn write_slice(
        &self,
        (layer, expert): (u16, u16),
        (from, to): (u16, u16),
        out: &mut [u8],
    ) -> Result<(), OpenError> {
        let name = TensorName::Expert(layer, expert);
        let absent = || OpenError(format!("{} has no blocks {from}..{to} of {name}", self.name));
        let files = match &self.weights {
            Weights::Packed(files) => files,
            Weights::Synthetic(made) => return made.write_slice(name, (from, to), out).ok_or_else(absent),
        };
        let size = (self.config.hidden, self.config.moe.inter);
        let runs = runs(self.format, size, (from, to)).ok_or_else(absent)?;
        let written = files.read(name, runs, out).map_err(|error| OpenError(error.0))?;
        if written { Ok(()) } else { Err(absent()) }
    }

    /// Whether views of this tensor may be touched: a mapped file that became shorter ends the process when it is.
    ///
    /// # Errors
    /// Names the file.
    pub fn check_length(&self, name: TensorName) -> Result<(), OpenError> {
        match &self.weights {
            Weights::Packed(files) => files.check_length(name).map_err(|error| OpenError(error.0)),
            Weights::Synthetic(_) => Ok(()),
        }
    }

    /// Combine step of a MoE layer, as a power of two. 0 for a layer that has no experts.
    pub fn step_log2(&self, layer: usize) -> i8 {
        match &self.weights {
            Weights::Packed(files) => files.manifest().steps_log2.get(layer).copied().flatten().unwrap_or(0),
            Weights::Synthetic(made) => made.step_log2(),
        }
    }

    /// BLAKE3 of a tensor's bytes: from the manifest of a directory, computed for a synthetic model.
    pub fn hash(&self, name: TensorName) -> Result<[u8; 32], OpenError> {
        if let Weights::Packed(files) = &self.weights {
            let blob = files.manifest().blobs.get(&name.to_string());
            let hash = blob.and_then(|blob| blake3::Hash::from_hex(&blob.blake3).ok());
            return hash.map(|hash| *hash.as_bytes()).ok_or_else(|| self.absent(name));
        }
        Ok(*blake3::hash(&self.bytes(name)?).as_bytes())
    }

    /// Reads every byte of a packed model and compares hashes; the error names the first tensor that differs.
    pub fn verify(&self, progress: Progress<'_>) -> Result<(), OpenError> {
        match &self.weights {
            Weights::Packed(files) => files.verify(progress).map_err(|error| OpenError(error.0)),
            Weights::Synthetic(_) => Ok(()),
        }
    }

    fn kind(&self, name: TensorName) -> Result<TensorKind, OpenError> {
        kind(&self.config, name).ok_or_else(|| self.absent(name))
    }

    fn bytes(&self, name: TensorName) -> Result<Bytes, OpenError> {
        let bytes = match &self.weights {
            Weights::Packed(files) => files.tensor(name).map_err(|error| OpenError(error.0))?,
            Weights::Synthetic(made) => made.tensor(name),
        };
        bytes.ok_or_else(|| self.absent(name))
    }

    fn absent(&self, name: TensorName) -> OpenError {
        OpenError(format!("model {} has no tensor {name}", self.name))
    }
}

#[cfg(test)]
mod tests;
