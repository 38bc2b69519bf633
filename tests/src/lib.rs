//! Harness for tests that cross crates: where the fixtures are, a cluster in one process, and what fuzz targets check.

pub mod scripted;

pub mod cluster;

pub mod fuzz;

pub mod lies;

use std::path::{Path, PathBuf};

/// The top folder of the project.
pub fn project() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().map_or_else(|| here.to_owned(), Path::to_owned)
}

/// Golden values and tiny checkpoints (made by tests/oracle).
pub fn fixtures() -> PathBuf {
    project().join("tests/fixtures")
}

/// The demo model.
pub fn tale_moe() -> PathBuf {
    project().join("models/tale-moe")
}
