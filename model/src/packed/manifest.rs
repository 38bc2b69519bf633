//! `manifest.json`: what a packed directory holds, and the check that it does.
//!
//! The manifest is written last and names every blob with its place, length and BLAKE3 hash, the model's config
//! and the combine steps. Opening checks everything that can be checked without reading weights: plain file
//! names, regular files of the stated lengths, blobs of exactly the sizes the config demands, aligned, apart from
//! each other and inside their file.
//!
//! Disks rot, so a blob's hash is compared before its bytes are used: each time it is read into memory, and once per
//! process before it is given out as a view of the mapped file. Reading goes through the file and not the map, because
//! touching the map of a file that became shorter ends the process. The price: a slice of an expert costs one reading
//! of all of it, the first time.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::checkpoint::{CheckpointError, is_plain_name, map_regular, read_limited};
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
/// Bytes that are hashed at a time.
const PIECE_BYTES: usize = 1 << 20;
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

/// A packed directory, opened: the manifest and the files.
#[derive(Debug)]
pub struct PackedFiles {
    manifest: Manifest,
    fingerprint: [u8; 32],
    directory: PathBuf,
    files: Vec<OpenFile>,
    /// Tensors whose hash was compared by this process.
    checked: Mutex<BTreeSet<TensorName>>,
}

/// One file, to be viewed and to be read.
#[derive(Debug)]
struct OpenFile {
    map: Bytes,
    /// Whoever has the lock moves its position.
    file: Mutex<File>,
}

impl OpenFile {
    fn open(path: &Path) -> Result<OpenFile, CheckpointError> {
        let map = map_regular(path)?;
        let cannot = |error| CheckpointError(format!("cannot read {}: {error}", path.display()));
        Ok(OpenFile { map, file: Mutex::new(File::open(path).map_err(cannot)?) })
    }

    /// Fills `out` with the bytes from `at` on.
    fn read(&self, at: u64, out: &mut [u8]) -> std::io::Result<()> {
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        file.seek(SeekFrom::Start(at))?;
        file.read_exact(out)
    }

    /// Its length now; the map has the one it had when it was opened.
    fn len(&self) -> std::io::Result<u64> {
        Ok(self.file.lock().unwrap_or_else(PoisonError::into_inner).metadata()?.len())
    }
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
        let mut files = Vec::with_capacity(manifest.files.len());
        for file in &manifest.files {
            let opened = OpenFile::open(&directory.join(&file.name)).map_err(|error| damaged(error.0))?;
            if opened.map.len() as u64 != file.bytes {
                return Err(damaged(format!(
                    "{} is {} bytes long, expected {}",
                    file.name,
                    opened.map.len(),
                    file.bytes
                )));
            }
            files.push(opened);
        }
        let fingerprint = *blake3::hash(&text).as_bytes();
        let directory = directory.to_path_buf();
        Ok(Found::Model(Box::new(PackedFiles {
            manifest,
            fingerprint,
            directory,
            files,
            checked: Mutex::default(),
        })))
    }

    /// The checked manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// BLAKE3 of the manifest's text.
    pub fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// A view of a tensor in the mapped file, whose hash was compared; `None` where the model has none of that name.
    /// Before it is used again later: `check_length`.
    ///
    /// # Errors
    /// It is damaged, or cannot be read; names the file.
    pub fn tensor(&self, name: TensorName) -> Result<Option<Bytes>, ManifestError> {
        let Some(blob) = self.manifest.blobs.get(&name.to_string()) else { return Ok(None) };
        self.check(name, blob)?;
        Ok(self
            .files
            .get(blob.file)
            .and_then(|file| file.map.slice(blob.offset as usize, blob.bytes as usize)))
    }

    /// Fills `out` with these runs of a tensor's bytes, one after the other; a run of all of them has the hash when it is
    /// in `out`. False where the model has no such tensor or `out` another length than the runs.
    ///
    /// # Errors
    /// As `tensor`.
    pub fn read(
        &self,
        name: TensorName,
        runs: impl Iterator<Item = Range<usize>>,
        out: &mut [u8],
    ) -> Result<bool, ManifestError> {
        let Some(blob) = self.manifest.blobs.get(&name.to_string()) else { return Ok(false) };
        let whole = out.len() as u64 == blob.bytes;
        if !whole {
            self.check(name, blob)?;
        }
        let mut rest = &mut *out;
        for run in runs {
            let Some((to, after)) = rest.split_at_mut_checked(run.len()) else { return Ok(false) };
            if run.end as u64 > blob.bytes {
                return Ok(false);
            }
            let read = self.files[blob.file].read(blob.offset + run.start as u64, to);
            read.map_err(|error| self.unreadable(name, blob, &error))?;
            rest = after;
        }
        if !rest.is_empty() {
            return Ok(false);
        }
        if whole && *blake3::hash(out).to_hex() != *blob.blake3 {
            return Err(self.damaged(name, blob));
        }
        Ok(true)
    }

    /// Whether the file of a tensor is as long as its map, which must not be touched where it is not.
    ///
    /// # Errors
    /// Names the file that became shorter.
    pub fn check_length(&self, name: TensorName) -> Result<(), ManifestError> {
        let Some(blob) = self.manifest.blobs.get(&name.to_string()) else { return Ok(()) };
        let file = &self.files[blob.file];
        match file.len() {
            Ok(len) if len >= file.map.len() as u64 => Ok(()),
            Ok(_) => Err(self.unreadable(name, blob, &ErrorKind::UnexpectedEof.into())),
            Err(error) => Err(self.unreadable(name, blob, &error)),
        }
    }

    /// Compares every blob with its hash; reads everything. The error names the first that differs.
    pub fn verify(&self, progress: &mut dyn FnMut(u64, u64, &str)) -> Result<(), ManifestError> {
        let total = self.manifest.blobs.values().map(|blob| blob.bytes).sum();
        let mut done = 0;
        for name in self.manifest.names() {
            let Some(blob) = self.manifest.blobs.get(&name.to_string()) else { continue };
            progress(done, total, &name.to_string());
            self.compare(name, blob)?;
            done += blob.bytes;
        }
        progress(done, total, "verified");
        Ok(())
    }

    /// Compares a tensor with its hash, unless this process did so before.
    fn check(&self, name: TensorName, blob: &Blob) -> Result<(), ManifestError> {
        let checked = || self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        if checked().contains(&name) {
            return self.check_length(name);
        }
        self.compare(name, blob)?;
        checked().insert(name);
        Ok(())
    }

    fn compare(&self, name: TensorName, blob: &Blob) -> Result<(), ManifestError> {
        let (mut hasher, mut at) = (blake3::Hasher::new(), 0);
        let mut piece = vec![0; PIECE_BYTES.min(blob.bytes as usize)];
        while at < blob.bytes {
            let piece = &mut piece[..PIECE_BYTES.min((blob.bytes - at) as usize)];
            let read = self.files[blob.file].read(blob.offset + at, piece);
            read.map_err(|error| self.unreadable(name, blob, &error))?;
            hasher.update(piece);
            at += piece.len() as u64;
        }
        if *hasher.finalize().to_hex() != *blob.blake3 {
            return Err(self.damaged(name, blob));
        }
        Ok(())
    }

    fn damaged(&self, name: TensorName, blob: &Blob) -> ManifestError {
        let (file, at) = (&self.manifest.files[blob.file].name, self.directory.display());
        ManifestError(format!(
            "{at}/{file}: {name} does not have the hash in {MANIFEST_FILE}; delete {at} and start again"
        ))
    }

    fn unreadable(&self, name: TensorName, blob: &Blob, error: &std::io::Error) -> ManifestError {
        let (file, at) = (&self.manifest.files[blob.file].name, self.directory.display());
        let why = match error.kind() {
            ErrorKind::UnexpectedEof => "the file became shorter while it was in use".to_owned(),
            _ => error.to_string(),
        };
        ManifestError(format!("{at}/{file}: {name} cannot be read: {why}; delete {at} and start again"))
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
