//! A folder of a few small files that must never be half-written.
//!
//! Keys, rosters and tokens decide who may talk. Each is written whole to a file beside it, synced, renamed over the
//! old one, and the folder is synced: after a crash or on a full disk there is the old content or the new one. The
//! folder is locked while a process uses it, so that no two of them take turns in overwriting each other. The price:
//! every change costs two syncs, so nothing that changes often belongs here. Refuses folders that others may write
//! to, and files that others may read.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Longest file that is read: a roster of all the machines there can be takes a tenth of it.
pub const FILE_BYTES_MAX: u64 = 1 << 20;

/// The file whose lock stands for the folder.
const LOCK: &str = "lock";

/// Why a folder or a file in it cannot be used.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The system says no.
    #[error("{what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which file or folder.
        path: PathBuf,
        /// What went wrong.
        error: std::io::Error,
    },
    /// Another process uses the folder.
    #[error("{0} is in use by another moemesh process; stop that one, or give this one its own --state")]
    InUse(PathBuf),
    /// Others on this machine can read a file that is to be kept secret.
    #[error("{path} can be read by others (mode {mode:o}); run `chmod 600 {path}`")]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Others on this machine could replace files of the folder.
    #[error("others can write to {path} (mode {mode:o}); run `chmod 700 {path}`, or choose another --state")]
    Writable {
        /// Which folder.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file is longer than any of ours.
    #[error("{0} is larger than {FILE_BYTES_MAX} bytes; is it the right file?")]
    TooLong(PathBuf),
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> DiskError {
    move |error| DiskError::Io { what, path: path.to_owned(), error }
}

/// A locked folder; the lock goes with it.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    /// `None`: only to be looked at.
    lock: Option<File>,
}

impl Folder {
    /// Makes the folder (mode 700) where there is none, and locks it.
    ///
    /// # Errors
    /// `Io`, `InUse`, `Writable`.
    pub fn open(path: &Path) -> Result<Folder, DiskError> {
        let mut builder = DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        builder.create(path).map_err(io("make the folder", path))?;
        let mode = mode(&std::fs::metadata(path).map_err(io("look at", path))?);
        if mode & 0o022 != 0 {
            return Err(DiskError::Writable { path: path.to_owned(), mode });
        }
        let lock = path.join(LOCK);
        let file = private().create(true).truncate(false).open(&lock).map_err(io("open", &lock))?;
        match file.try_lock() {
            Ok(()) => Ok(Folder { path: path.to_owned(), lock: Some(file) }),
            Err(TryLockError::WouldBlock) => Err(DiskError::InUse(path.to_owned())),
            Err(TryLockError::Error(source)) => Err(io("lock", &lock)(source)),
        }
    }

    /// To read what is there, beside a process that uses the folder. Never writes; it may not even exist.
    pub fn peek(path: &Path) -> Folder {
        Folder { path: path.to_owned(), lock: None }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Content of a file; `None` where there is none.
    ///
    /// # Errors
    /// `Io`, `Exposed`, `TooLong`.
    pub fn read(&self, name: &str) -> Result<Option<Vec<u8>>, DiskError> {
        let path = self.file(name);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(io("open", &path)(source)),
        };
        let mode = mode(&file.metadata().map_err(io("look at", &path))?);
        if mode & 0o077 != 0 {
            return Err(DiskError::Exposed { path, mode });
        }
        let mut content = Vec::new();
        let read = file.take(FILE_BYTES_MAX + 1).read_to_end(&mut content).map_err(io("read", &path))?;
        if read as u64 > FILE_BYTES_MAX { Err(DiskError::TooLong(path)) } else { Ok(Some(content)) }
    }

    /// Writes a file whole or not at all.
    ///
    /// # Errors
    /// `Io`; then the old content is still there.
    pub fn write(&self, name: &str, content: &[u8]) -> Result<(), DiskError> {
        let path = self.file(name);
        if self.lock.is_none() {
            return Err(DiskError::InUse(self.path.clone()));
        }
        replace(&path, content).map_err(io("write", &path))
    }
}

/// Writes a file, readable by its owner only, whole or not at all: where it fails the old content is still there.
pub(crate) fn replace(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let written = || -> std::io::Result<()> {
        // What an interrupted attempt has left may have another mode.
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = private().create_new(true).open(&new)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    };
    let outcome = written();
    if outcome.is_err() {
        // What is left of it is overwritten by the next attempt.
        drop(std::fs::remove_file(&new));
    }
    outcome
}

/// For writing, by the owner only.
fn private() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.write(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options
}

#[cfg(unix)]
fn mode(metadata: &std::fs::Metadata) -> u32 {
    std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777
}

#[cfg(not(unix))]
fn mode(_: &std::fs::Metadata) -> u32 {
    0o600
}
