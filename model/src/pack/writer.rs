//! Writes the files of a packed directory: blobs one after the other, each aligned and hashed as it streams by.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::error::{PackError, Progress};
use crate::packed::TensorName;
use crate::packed::manifest::{BLOB_ALIGN, Blob, PackedFile};

/// Bytes collected before they are handed to the system.
const BUFFER_BYTES: usize = 1 << 20;

/// What has been written so far of one pack.
pub(crate) struct Written<'a> {
    directory: &'a Path,
    total: u64,
    done: u64,
    progress: Progress<'a>,
    pub(crate) files: Vec<PackedFile>,
    pub(crate) blobs: std::collections::BTreeMap<String, Blob>,
}

/// One file being written.
pub(crate) struct OpenFile {
    path: PathBuf,
    name: String,
    offset: u64,
    out: BufWriter<File>,
}

impl<'a> Written<'a> {
    /// Starts writing into `directory`; `total` bytes of blobs are expected.
    pub(crate) fn new(directory: &'a Path, total: u64, progress: Progress<'a>) -> Written<'a> {
        Written { directory, total, done: 0, progress, files: Vec::new(), blobs: Default::default() }
    }

    pub(crate) fn create(&self, name: &str) -> Result<OpenFile, PackError> {
        let path = self.directory.join(name);
        let file = File::create_new(&path).map_err(|error| PackError::write(&path, self.total, &error))?;
        Ok(OpenFile {
            path,
            name: name.to_string(),
            offset: 0,
            out: BufWriter::with_capacity(BUFFER_BYTES, file),
        })
    }

    /// Writes one blob into `file`: whatever `fill` sends to its sink.
    pub(crate) fn blob(
        &mut self,
        file: &mut OpenFile,
        name: TensorName,
        fill: impl FnOnce(&mut dyn FnMut(&[u8]) -> Result<(), PackError>) -> Result<(), PackError>,
    ) -> Result<(), PackError> {
        let label = name.to_string();
        (self.progress)(self.done, self.total, &label);
        let mut hasher = blake3::Hasher::new();
        let mut bytes = 0;
        let (out, path, total) = (&mut file.out, &file.path, self.total);
        fill(&mut |part| {
            hasher.update(part);
            bytes += part.len() as u64;
            out.write_all(part).map_err(|error| PackError::write(path, total, &error))
        })?;
        let padding = bytes.next_multiple_of(BLOB_ALIGN) - bytes;
        let zeros = [0; BLOB_ALIGN as usize];
        let padded = out.write_all(&zeros[..padding as usize]);
        padded.map_err(|error| PackError::write(path, total, &error))?;
        let blob = Blob {
            file: self.files.len(),
            offset: file.offset,
            bytes,
            blake3: hasher.finalize().to_hex().to_string(),
        };
        self.blobs.insert(label, blob);
        file.offset += bytes + padding;
        self.done += bytes;
        Ok(())
    }

    /// Makes a file durable and counts it. Files are finished in the order in which they were created.
    pub(crate) fn finish(&mut self, file: OpenFile) -> Result<(), PackError> {
        let failed = |error: &std::io::Error| PackError::write(&file.path, self.total, error);
        let inner = file.out.into_inner().map_err(|error| failed(error.error()))?;
        inner.sync_all().map_err(|error| failed(&error))?;
        self.files.push(PackedFile { name: file.name, bytes: file.offset });
        Ok(())
    }

    /// Reports the end.
    pub(crate) fn report(&mut self, what: &str) {
        (self.progress)(self.done, self.total, what);
    }
}

/// Writes a small file at once and makes it durable.
pub(crate) fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), PackError> {
    let failed = |error: std::io::Error| PackError::write(path, bytes.len() as u64, &error);
    let mut file = File::create(path).map_err(failed)?;
    file.write_all(bytes).map_err(failed)?;
    file.sync_all().map_err(failed)
}

/// Makes the names in a directory durable.
pub(crate) fn sync_directory(path: &Path) -> Result<(), PackError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(|error| PackError::write(path, 0, &error))
}
