//! Small files with a figure in each, of which any may be missing, unreadable or nonsense.
//!
//! Everything is bounded: how much of a file is read, how many entries of a folder are looked at, how often nonsense is
//! written to the log. Only ordinary files are opened: a pipe in their place would keep the reader for ever.

use std::collections::BTreeSet;
use std::fs::{File, metadata, read_dir};
use std::io::Read;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

/// Most bytes of a file: a figure has twenty digits, a name a few letters.
pub(super) const FILE_BYTES_MAX: u64 = 64;

/// Most entries of a folder: processors of the largest machines, and more sensors than any has.
const ENTRIES_MAX: usize = 512;

/// Most files that nonsense is reported of.
const COMPLAINTS_MAX: usize = 16;

/// See the module.
#[derive(Debug)]
pub(super) struct Files {
    root: PathBuf,
    /// Files that the log has been told about.
    told: BTreeSet<PathBuf>,
}

impl Files {
    pub(super) fn new(root: &Path) -> Files {
        Files { root: root.to_owned(), told: BTreeSet::new() }
    }

    /// Entries of a folder below the root whose names begin like this, and go on with a number, in a fixed order.
    pub(super) fn list(&self, folder: &str, begin: &str) -> Vec<PathBuf> {
        entries(&self.root.join(folder), |name| {
            name.strip_prefix(begin)
                .is_some_and(|rest| rest.starts_with(|digit: char| digit.is_ascii_digit()))
        })
    }

    /// Entries of a folder whose names begin and end like this.
    pub(super) fn list_named(&self, folder: &Path, begin: &str, end: &str) -> Vec<PathBuf> {
        entries(folder, |name| name.starts_with(begin) && name.ends_with(end))
    }

    /// A short text; none where there is no such file, or it is too long.
    pub(super) fn text(&self, path: &Path) -> Option<String> {
        if !metadata(path).ok()?.is_file() {
            return None;
        }
        let mut text = String::new();
        File::open(path).ok()?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).ok()?;
        (text.len() as u64 <= FILE_BYTES_MAX).then(|| text.trim().to_owned())
    }

    /// A whole number within bounds. Others are reported once per file.
    pub(super) fn within(&mut self, path: &Path, bounds: &RangeInclusive<i64>) -> Option<i64> {
        let text = self.text(path)?;
        let number = text.parse::<i64>().ok().filter(|number| bounds.contains(number));
        if number.is_none() {
            self.complain(path, &text);
        }
        number
    }

    /// A counter, which may be as large as it likes.
    pub(super) fn counter(&mut self, path: &Path) -> Option<u64> {
        let text = self.text(path)?;
        let number = text.parse().ok();
        if number.is_none() {
            self.complain(path, &text);
        }
        number
    }

    /// Says once that a file holds what cannot be.
    pub(super) fn complain(&mut self, path: &Path, text: &str) {
        if self.told.len() < COMPLAINTS_MAX && self.told.insert(path.to_owned()) {
            let shown = text.escape_debug();
            tracing::warn!("{} shows '{shown}', which cannot be: it is passed over", path.display());
        }
    }
}

fn entries(folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(found) = read_dir(folder) else { return Vec::new() };
    let named =
        found.take(ENTRIES_MAX).flatten().filter(|entry| entry.file_name().to_str().is_some_and(&wanted));
    let mut paths: Vec<PathBuf> = named.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}
