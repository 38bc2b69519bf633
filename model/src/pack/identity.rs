//! Which checkpoint a directory holds: BLAKE3 of its config and of every byte of its weights.
//!
//! Hashing reads everything: about 1.5 GB/s from memory, otherwise what the disk gives (a minute or so for 60 GB on
//! an NVMe drive). So the result is kept in the cache under the directory's path, with each file's device, inode,
//! length and times of modification and change, and used again while all of these are as they were: the rule by
//! which git trusts its index. As there, a file modified within the last seconds is not trusted, because its times
//! could not show another change; it is hashed again next time.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::{PackError, Progress};
use super::writer::write_durably;
use crate::checkpoint::Checkpoint;

/// A file younger than this, in seconds, may change again within the resolution of its times.
const YOUNG_S: i64 = 3;
/// Bytes hashed between two reports of progress.
const CHUNK_BYTES: usize = 16 << 20;

/// Where hashes are remembered.
pub(crate) struct Memory<'a> {
    /// The cache directory.
    pub(crate) cache: &'a Path,
    /// Seconds since 1970.
    pub(crate) now_s: i64,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Remembered {
    directory: PathBuf,
    files: Vec<Stamp>,
    hash: String,
}

/// What changes when a file changes.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Stamp {
    name: String,
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    fn new(path: &Path, metadata: &Metadata) -> Stamp {
        Stamp {
            name: file_name(path),
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// Hash of the checkpoint in `directory`, hexadecimal; remembered in `memory`.
pub(crate) fn identify(
    directory: &Path,
    config: &str,
    checkpoint: &Checkpoint,
    memory: &Memory<'_>,
    progress: Progress<'_>,
) -> Result<String, PackError> {
    let stamps = stamps(directory, checkpoint)?;
    let key = blake3::hash(directory.as_os_str().as_encoded_bytes()).to_hex();
    let path = memory.cache.join("identities").join(format!("{}.json", &key[..32]));
    let remembered =
        std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Remembered>(&text).ok());
    if let Some(remembered) = remembered.filter(|known| known.directory == directory && known.files == stamps)
    {
        return Ok(remembered.hash);
    }
    let hash = hash(config, checkpoint, progress);
    let settled = |stamp: &Stamp| stamp.modified.0.max(stamp.changed.0) + YOUNG_S < memory.now_s;
    if stamps.iter().all(settled) {
        let record = Remembered { directory: directory.to_path_buf(), files: stamps, hash: hash.clone() };
        remember(&path, &record);
    }
    Ok(hash)
}

fn stamps(directory: &Path, checkpoint: &Checkpoint) -> Result<Vec<Stamp>, PackError> {
    let config = directory.join("config.json");
    let paths = std::iter::once(config.as_path()).chain(checkpoint.files().map(|(path, _)| path));
    let stamp = |path: &Path| match std::fs::metadata(path) {
        Ok(metadata) => Ok(Stamp::new(path, &metadata)),
        Err(error) => Err(PackError(format!("cannot read {}: {error}", path.display()))),
    };
    paths.map(stamp).collect()
}

/// Failing to remember costs time only.
fn remember(memory: &Path, record: &Remembered) {
    let Some(parent) = memory.parent() else { return };
    let temporary = memory.with_extension(format!("{}.tmp", std::process::id()));
    let Ok(text) = serde_json::to_vec_pretty(record) else { return };
    let written = std::fs::create_dir_all(parent)
        .map_err(|error| PackError::write(parent, 0, &error))
        .and_then(|()| write_durably(&temporary, &text))
        .and_then(|()| {
            std::fs::rename(&temporary, memory).map_err(|error| PackError::write(memory, 0, &error))
        });
    if let Err(error) = written {
        tracing::warn!(%error, "the checkpoint will be hashed again next time");
    }
}

fn hash(config: &str, checkpoint: &Checkpoint, progress: Progress<'_>) -> String {
    let total = checkpoint.files().map(|(_, bytes)| bytes.len() as u64).sum();
    let mut done = 0;
    let mut hasher = blake3::Hasher::new();
    let part = |hasher: &mut blake3::Hasher, name: &str, len: usize| {
        hasher.update(&(name.len() as u64).to_le_bytes());
        hasher.update(name.as_bytes());
        hasher.update(&(len as u64).to_le_bytes());
    };
    part(&mut hasher, "config.json", config.len());
    hasher.update(config.as_bytes());
    for (path, bytes) in checkpoint.files() {
        let name = file_name(path);
        part(&mut hasher, &name, bytes.len());
        for chunk in bytes.chunks(CHUNK_BYTES) {
            progress(done, total, &format!("hashing {name}"));
            hasher.update(chunk);
            done += chunk.len() as u64;
        }
    }
    hasher.finalize().to_hex().to_string()
}
