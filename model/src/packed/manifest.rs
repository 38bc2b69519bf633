//! `manifest.json`: what a packed directory holds, and the check that it does.
//!
//! The manifest is written last and names every blob with its place, length and BLAKE3 hash, the model's config
//! and the combine steps. Opening checks everything that can be checked without reading weights: plain file
//! names, regular files of the stated lengths, blobs of exactly the sizes the config demands, aligned, apart from
//! each other and inside their file. Hashes are compared on demand (`PackedFiles::verify`), which reads all.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::{is_plain_name, map_regular, read_limited};
use crate::config::parse::check;
use crate::config::{Ffn, ModelConfig};
use crate::format::Format;
use crate::json::{self, shown};
use crate::packed::{TensorName, expert_tensors, kind, router_tensors};
use crate::region::Bytes;

/// Version of the layout of packed directories. Another one is packed again.
pub const VERSION: u32 = 1;
/// Name of the manifest in its directory.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Alignment of blobs: a page, so that blobs can be mapped, read and evicted one by one.
pub const BLOB_ALIGN: u64 = 4096;
/// Largest manifest, bytes: 4096 experts in 1024 layers would take more, real models stay under 10 MB.
const MAX_MANIFEST_BYTES: u64 = 256 << 20;
/// Range of combine steps: as far as f32 reaches with the factor still normal.
const STEP_RANGE: std::ops::RangeInclusive<i8> = -100..=100;

/// Why a packed directory cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", shown(.0))]
pub struct ManifestError(pub String);

/// The contents of `manifest.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// `VERSION` when it was written.
    pub version: u32,
    /// BLAKE3 of the checkpoint it was packed from, hexadecimal.
    pub source: String,
    /// Format of matrices and experts.
    pub format: Format,
    /// The model.
    pub config: ModelConfig,
    /// Per layer: log2 of the combine step; null in dense layers.
    pub steps_log2: Vec<Option<i8>>,
    /// The files beside the manifest.
    pub files: Vec<PackedFile>,
    /// Every tensor by the name `TensorName` displays.
    pub blobs: BTreeMap<String, Blob>,
}

/// One file of a packed directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackedFile {
    /// Plain name.
    pub name: String,
    /// Length.
    pub bytes: u64,
}

/// Where one tensor lies.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    /// Index into `files`.
    pub file: usize,
    /// Bytes before it; a multiple of `BLOB_ALIGN`.
    pub offset: u64,
    /// Length.
    pub bytes: u64,
    /// BLAKE3 of the bytes, hexadecimal.
    pub blake3: String,
}

/// A packed directory, opened: the manifest and the mapped files.
#[derive(Debug)]
pub struct PackedFiles {
    manifest: Manifest,
    fingerprint: [u8; 32],
    directory: PathBuf,
    maps: Vec<Bytes>,
}

/// What is in a directory.
#[derive(Debug)]
pub enum Found {
    /// No manifest: nothing was packed here.
    Nothing,
    /// A manifest of another version of this program.
    OtherVersion,
    /// A valid packed model.
    Model(Box<PackedFiles>),
}

impl PackedFiles {
    /// Opens `directory` and checks it; see the module for what is checked.
    pub fn open(directory: &Path) -> Result<Found, ManifestError> {
        let path = directory.join(MANIFEST_FILE);
        if !path.exists() {
            return Ok(Found::Nothing);
        }
        let damaged = |reason: String| {
            let shown = directory.display();
            ManifestError(format!(
                "packed model {shown} is damaged: {reason}; delete {shown} and start again"
            ))
        };
        let text = read_limited(&path, MAX_MANIFEST_BYTES).map_err(|error| damaged(error.0))?;
        let value = json::parse(&text).map_err(|error| damaged(format!("{MANIFEST_FILE}: {error}")))?;
        if value.get("version").is_some_and(|version| version.is_u64() && *version != VERSION) {
            return Ok(Found::OtherVersion);
        }
        let manifest: Manifest =
            serde_json::from_value(value).map_err(|error| damaged(format!("{MANIFEST_FILE}: {error}")))?;
        manifest.check().map_err(damaged)?;
        let mut maps = Vec::with_capacity(manifest.files.len());
        for file in &manifest.files {
            let map = map_regular(&directory.join(&file.name)).map_err(|error| damaged(error.0))?;
            if map.len() as u64 != file.bytes {
                return Err(damaged(format!(
                    "{} is {} bytes long, expected {}",
                    file.name,
                    map.len(),
                    file.bytes
                )));
            }
            maps.push(map);
        }
        let fingerprint = *blake3::hash(&text).as_bytes();
        let directory = directory.to_path_buf();
        Ok(Found::Model(Box::new(PackedFiles { manifest, fingerprint, directory, maps })))
    }

    /// The checked manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// BLAKE3 of the manifest's text.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// The bytes of a tensor; `None` where the model has none of that name.
    pub fn tensor(&self, name: TensorName) -> Option<Bytes> {
        let blob = self.manifest.blobs.get(&name.to_string())?;
        self.maps.get(blob.file)?.slice(blob.offset as usize, blob.bytes as usize)
    }

    /// Compares every blob with its hash; reads everything. The error names the first that differs.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64, &str)) -> Result<(), ManifestError> {
        let total = self.manifest.blobs.values().map(|blob| blob.bytes).sum();
        let mut done = 0;
        for (name, blob) in &self.manifest.blobs {
            progress(done, total, name);
            let bytes = self.maps[blob.file].slice(blob.offset as usize, blob.bytes as usize);
            let hash = bytes.map(|bytes| blake3::hash(&bytes).to_hex());
            if hash.is_none_or(|hash| *hash != *blob.blake3) {
                let (file, at) = (&self.manifest.files[blob.file].name, self.directory.display());
                return Err(ManifestError(format!(
                    "{at}/{file}: {name} does not have the hash in {MANIFEST_FILE}; delete {at} and start again"
                )));
            }
            done += blob.bytes;
        }
        progress(done, total, "verified");
        Ok(())
    }
}

impl Manifest {
    /// Names of all tensors of the model, in the order of packing.
    fn names(&self) -> impl Iterator<Item = TensorName> + '_ {
        let experts = (0..self.config.layers.len()).flat_map(|layer| expert_tensors(&self.config, layer));
        router_tensors(&self.config).into_iter().chain(experts)
    }

    fn check(&self) -> Result<(), String> {
        check(&self.config).map_err(|error| error.to_string())?;
        let steps = self.config.layers.iter().zip(&self.steps_log2);
        let fits = |(layer, step): (&crate::config::LayerConfig, &Option<i8>)| match step {
            None => layer.ffn != Ffn::Moe,
            Some(step) => layer.ffn == Ffn::Moe && STEP_RANGE.contains(step),
        };
        if self.steps_log2.len() != self.config.layers.len() || !steps.clone().all(fits) {
            return Err("the combine steps do not fit the layers".to_string());
        }
        if let Some(file) = self.files.iter().find(|file| !is_plain_name(&file.name)) {
            return Err(format!("file '{}' is outside the directory", file.name.escape_debug()));
        }
        let mut count = 0;
        for name in self.names() {
            self.check_blob(name)?;
            count += 1;
        }
        if count != self.blobs.len() {
            return Err(format!("{} blobs, the config demands {count}", self.blobs.len()));
        }
        self.check_apart()
    }

    fn check_blob(&self, name: TensorName) -> Result<(), String> {
        let Some(blob) = self.blobs.get(&name.to_string()) else { return Err(format!("{name} is missing")) };
        let demanded = kind(&self.config, name).map_or(0, |kind| kind.bytes(self.format)) as u64;
        if blob.bytes != demanded {
            return Err(format!("{name} has {} bytes, the config demands {demanded}", blob.bytes));
        }
        let Some(file) = self.files.get(blob.file) else {
            return Err(format!("{name} is in file {}, there are {}", blob.file, self.files.len()));
        };
        if !blob.offset.is_multiple_of(BLOB_ALIGN) {
            return Err(format!("{name} starts at {}, not at a multiple of {BLOB_ALIGN}", blob.offset));
        }
        if blob.offset.checked_add(blob.bytes).is_none_or(|end| end > file.bytes) {
            return Err(format!(
                "{name} at {} reaches past the {} bytes of {}",
                blob.offset, file.bytes, file.name
            ));
        }
        if blake3::Hash::from_hex(&blob.blake3).is_err() {
            return Err(format!("{name} has no valid hash"));
        }
        Ok(())
    }

    fn check_apart(&self) -> Result<(), String> {
        let mut places: Vec<_> =
            self.blobs.iter().map(|(name, b)| (b.file, b.offset, b.bytes, name)).collect();
        places.sort_unstable();
        for pair in places.windows(2) {
            if pair[0].0 == pair[1].0 && pair[0].1 + pair[0].2 > pair[1].1 {
                return Err(format!("{} and {} overlap", pair[0].3, pair[1].3));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
