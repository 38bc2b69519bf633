//! Packing: from a Hugging Face checkpoint to canonical bytes, once.
//!
//! Every tensor is read row by row from the mapped checkpoint, converted and written at once, so memory stays at a
//! few row blocks whatever the model's size. Files are written into a temporary directory, made durable, and the
//! directory renamed last: a killed pack leaves nothing that opens. A lock file makes a second process wait for the
//! first instead of doing the work twice. Refused: tensors that the config does not account for (they would be
//! ignored, and the model be another one), non-finite weights, and anything `checkpoint` refuses.

mod error;
mod identity;
mod layout;
mod names;
pub mod probe;
pub mod quantize;
mod writer;

use std::collections::HashSet;
use std::fs::File;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use crate::checkpoint::{Checkpoint, read_limited};
use crate::config::parse::limits::MAX_CONFIG_BYTES;
use crate::config::{Ffn, ModelConfig, parse};
use crate::format::Format;
use crate::packed::manifest::{Found, MANIFEST_FILE, Manifest, PackedFiles, VERSION};
use crate::packed::{TensorKind, TensorName, expert_tensors, kind, router_tensors};
use crate::region::Bytes;
pub use error::{PackError, Progress};
use layout::{BlockPacker, Sink, Stack};
pub use names::Source;
use writer::{OpenFile, Written, sync_directory, write_durably};

/// Longest part of a model's name in its cache directory.
const MAX_NAME: usize = 64;
/// Hexadecimal digits of the source hash in the cache directory: 64 bits, enough to tell a user's models apart.
/// The manifest has all of it and is compared.
const HASH_DIGITS: usize = 16;

/// The config of the checkpoint in `directory`, and its text.
pub fn read_config(directory: &Path) -> Result<(ModelConfig, String), PackError> {
    let config_path = directory.join("config.json");
    let text = read_limited(&config_path, MAX_CONFIG_BYTES as u64)?;
    let text = String::from_utf8(text)
        .map_err(|_| PackError(format!("{} is not UTF-8; download it again", config_path.display())))?;
    let config = parse::parse(&text).map_err(|error| PackError::config(&config_path, &error))?;
    Ok((config, text))
}

/// The packed form of the checkpoint in `directory`, packed now unless `cache` has it.
pub fn open_or_pack(
    directory: &Path,
    format: Format,
    cache: &Path,
    progress: Progress<'_>,
) -> Result<PackedFiles, PackError> {
    let (config, text) = read_config(directory)?;
    let checkpoint = Checkpoint::open(directory)?;
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
    let memory = identity::Memory { cache, now_s };
    let source = identity::identify(directory, &text, &checkpoint, &memory, progress)?;
    let home = cache.join(format!("{}-{}", cache_name(directory), &source[..HASH_DIGITS]));
    let target = home.join(format.name());
    if let Some(found) = open_packed(&target, &source)? {
        return Ok(found);
    }
    std::fs::create_dir_all(&home).map_err(|error| PackError::write(&home, 0, &error))?;
    let _lock = lock(&home, format, progress)?;
    // Another process may have packed it while this one waited.
    if let Some(found) = open_packed(&target, &source)? {
        return Ok(found);
    }
    clear(&home, format)?;
    let job = Job { config: &config, checkpoint: &checkpoint, format, source: &source };
    job.run(&home, &target, progress)?;
    open_packed(&target, &source)?
        .ok_or_else(|| PackError(format!("{} vanished after it was packed; start again", target.display())))
}

/// Every tensor of a checkpoint of this config: what it becomes part of, which part, its name and shape there.
pub fn source_tensors(config: &ModelConfig) -> impl Iterator<Item = (TensorName, usize, Source)> + '_ {
    names::all(config)
}

fn open_packed(target: &Path, source: &str) -> Result<Option<PackedFiles>, PackError> {
    match PackedFiles::open(target)? {
        Found::Model(model) if model.manifest().source == source => Ok(Some(*model)),
        Found::Model(_) | Found::OtherVersion | Found::Nothing => Ok(None),
    }
}

/// The last component of a path, as far as it makes a plain file name.
fn cache_name(directory: &Path) -> String {
    let name = directory.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || "-_".contains(c) { c } else { '_' };
    name.chars().map(plain).take(MAX_NAME).collect()
}

/// Held while packing; the system releases it with the file, also when the process dies.
fn lock(home: &Path, format: Format, progress: Progress<'_>) -> Result<File, PackError> {
    let path = home.join(format!("{format}.lock"));
    let failed = |error: std::io::Error| PackError::write(&path, 0, &error);
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    if file.try_lock().is_err() {
        progress(0, 1, "waiting for another process that packs this model");
        file.lock().map_err(failed)?;
    }
    Ok(file)
}

/// Removes what killed packs and other versions left; called with the lock held.
fn clear(home: &Path, format: Format) -> Result<(), PackError> {
    let prefix = temporary_prefix(format);
    let entries = std::fs::read_dir(home).map_err(|error| PackError::write(home, 0, &error))?;
    for entry in entries.flatten() {
        let name = entry.file_name();
        if name.to_string_lossy().starts_with(&prefix) || name == format.name() {
            let path = entry.path();
            std::fs::remove_dir_all(&path).map_err(|error| PackError::write(&path, 0, &error))?;
        }
    }
    Ok(())
}

fn temporary_prefix(format: Format) -> String {
    format!(".{format}-")
}

struct Job<'a> {
    config: &'a ModelConfig,
    checkpoint: &'a Checkpoint,
    format: Format,
    source: &'a str,
}

impl Job<'_> {
    fn run(&self, home: &Path, target: &Path, progress: Progress<'_>) -> Result<(), PackError> {
        self.refuse_unknown_tensors()?;
        let temporary = home.join(format!("{}{}", temporary_prefix(self.format), std::process::id()));
        std::fs::create_dir(&temporary)
            .map_err(|error| PackError::write(&temporary, self.total(), &error))?;
        let packed = self.write(&temporary, progress).and_then(|()| {
            std::fs::rename(&temporary, target).map_err(|error| PackError::write(target, 0, &error))
        });
        match packed {
            Ok(()) => sync_directory(home),
            Err(error) => {
                // The reason of the failure matters more than what is left, which the next pack clears.
                drop(std::fs::remove_dir_all(&temporary));
                Err(error)
            }
        }
    }

    /// Every tensor of the files must have a meaning in the config.
    fn refuse_unknown_tensors(&self) -> Result<(), PackError> {
        let known: HashSet<String> = names::all(self.config).map(|(_, _, source)| source.name).collect();
        let harmless = |name: &str| {
            // Tables of frequencies that old versions saved, and a copy of the embedding it is tied to.
            name.ends_with(".rotary_emb.inv_freq")
                || (self.config.tied_embeddings && name == "lm_head.weight")
        };
        let mut strangers: Vec<&str> =
            self.checkpoint.names().filter(|name| !known.contains(*name) && !harmless(name)).collect();
        strangers.sort_unstable();
        match strangers.first() {
            None => Ok(()),
            Some(first) => Err(PackError(format!(
                "tensor {} and {} others have no meaning in a {} model of this config.json; is it of another model?",
                first.escape_debug(),
                strangers.len() - 1,
                self.config.family.model_type()
            ))),
        }
    }

    fn total(&self) -> u64 {
        let experts = (0..self.config.layers.len()).flat_map(|layer| expert_tensors(self.config, layer));
        let names = router_tensors(self.config).into_iter().chain(experts);
        names.filter_map(|name| kind(self.config, name)).map(|kind| kind.bytes(self.format) as u64).sum()
    }

    fn write(&self, directory: &Path, progress: Progress<'_>) -> Result<(), PackError> {
        let mut written = Written::new(directory, self.total(), progress);
        let mut packer = BlockPacker::new(self.format);
        let mut router = written.create("router.bin")?;
        for name in router_tensors(self.config) {
            self.blob(&mut written, &mut router, &mut packer, name)?;
        }
        written.finish(router)?;
        let mut steps = Vec::with_capacity(self.config.layers.len());
        for (index, layer) in self.config.layers.iter().enumerate() {
            if layer.ffn != Ffn::Moe {
                steps.push(None);
                continue;
            }
            let name = format!("layer-{index:03}.bin");
            let mut file = written.create(&name)?;
            for name in expert_tensors(self.config, index) {
                self.blob(&mut written, &mut file, &mut packer, name)?;
            }
            written.finish(file)?;
            steps.push(Some(self.step(index, &directory.join(name), &written)?));
        }
        written.report("packed");
        let manifest = Manifest {
            version: VERSION,
            source: self.source.to_string(),
            format: self.format,
            config: self.config.clone(),
            steps_log2: steps,
            files: written.files,
            blobs: written.blobs,
        };
        let path = directory.join(MANIFEST_FILE);
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|error| PackError(format!("cannot write {}: {error}", path.display())))?;
        write_durably(&path, &text)?;
        sync_directory(directory)
    }

    fn blob(
        &self,
        written: &mut Written<'_>,
        file: &mut OpenFile,
        packer: &mut BlockPacker,
        name: TensorName,
    ) -> Result<(), PackError> {
        let Some(kind) = kind(self.config, name) else { return Ok(()) };
        written.blob(file, name, |sink| self.tensor(name, kind, packer, sink))
    }

    /// Sends the packed bytes of one tensor to `sink`.
    fn tensor(
        &self,
        name: TensorName,
        kind: TensorKind,
        packer: &mut BlockPacker,
        sink: Sink<'_>,
    ) -> Result<(), PackError> {
        let sources = names::sources(self.config, name);
        let mut views = Vec::with_capacity(sources.len());
        for source in &sources {
            views.push(self.checkpoint.tensor(&source.name, &source.shape)?);
        }
        match kind {
            TensorKind::Vector(_) => {
                for view in views {
                    let values = view.to_f32();
                    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                        return Err(PackError(format!(
                            "tensor {}, element {at}: not finite; the checkpoint is damaged, download it again",
                            view.name
                        )));
                    }
                    let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                    sink(&bytes)?;
                }
                Ok(())
            }
            // The row-major bf16 layout without padding of rows is the embedding's, one row at a time.
            TensorKind::Embedding { vocab: _, hidden } => packer.rows(&Stack::new(views, hidden), sink),
            TensorKind::Matrix { outputs: _, inputs } => packer.matrix(&Stack::new(views, inputs), sink),
            TensorKind::Expert { hidden, inter } => {
                let mut parts = views.into_iter();
                let mut part = |inputs: usize| Stack::new(parts.by_ref().take(1).collect(), inputs);
                packer.expert(&[part(hidden), part(hidden), part(inter)], sink)
            }
        }
    }

    /// The combine step of a layer whose experts have just been written to `path`.
    fn step(&self, layer: usize, path: &Path, written: &Written<'_>) -> Result<i8, PackError> {
        let vector = |name: TensorName| -> Result<Vec<f32>, PackError> {
            let mut values = Vec::new();
            for source in names::sources(self.config, name) {
                values.extend(self.checkpoint.tensor(&source.name, &source.shape)?.to_f32());
            }
            Ok(values)
        };
        let (norm, gate) =
            (vector(TensorName::FfnNorm(layer as u16))?, vector(TensorName::Gate(layer as u16))?);
        let vanished = || PackError(format!("cannot read back {}; start again", path.display()));
        let file = Bytes::map(path).map_err(|_| vanished())?;
        let view = probe::LayerView { index: layer, norm: &norm, gate: &gate };
        probe::step(self.config, self.format, view, |expert| {
            let blob = written.blobs.get(&TensorName::Expert(layer as u16, expert as u16).to_string());
            let bytes = blob.and_then(|blob| file.slice(blob.offset as usize, blob.bytes as usize));
            bytes.map(Mapped).ok_or_else(vanished)
        })
    }
}

/// Lets mapped bytes be read as a slice.
struct Mapped(Bytes);

impl AsRef<[u8]> for Mapped {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests;
