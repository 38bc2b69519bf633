//! What packing reports.

use std::io;
use std::path::Path;

use crate::checkpoint::CheckpointError;
use crate::config::parse::ConfigError;
use crate::json::shown;
use crate::packed::manifest::ManifestError;

/// Why a model could not be packed; names file and tensor and says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", shown(.0))]
pub struct PackError(pub String);

/// Reports of long work: bytes done, bytes in all, and what is being done.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64, &str);

impl From<CheckpointError> for PackError {
    fn from(error: CheckpointError) -> PackError {
        PackError(error.0)
    }
}

impl From<ManifestError> for PackError {
    fn from(error: ManifestError) -> PackError {
        PackError(error.0)
    }
}

impl PackError {
    /// A refused config, with the path of its file.
    pub(crate) fn config(path: &Path, error: &ConfigError) -> PackError {
        PackError(format!("{}: {}", path.display(), error.0))
    }

    /// A failed write. Where the disk is full the message says what the whole pack needs (0: little).
    pub(crate) fn write(path: &Path, needed: u64, error: &io::Error) -> PackError {
        let path = path.display();
        let full = matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        PackError(match (full, needed) {
            (true, 0) => format!("no space left for {path}; free some or set another cache directory"),
            (true, _) => format!(
                "no space left for {path}: the packed model takes {needed} bytes; free some or set another cache directory"
            ),
            (false, _) => format!("cannot write {path}: {error}"),
        })
    }
}
