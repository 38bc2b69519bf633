//! Memory-mapped safetensors: one file, or several with an index, read by tensor name.
//!
//! Files come from strangers, so everything is checked before a byte of weights is used: the header's length and
//! JSON, known dtypes, shapes whose product fits the byte range, ranges that follow each other without hole or
//! overlap to the end of the file, names that appear once, index entries that stay in the directory. A view
//! borrows the map; rows are converted to f32 one at a time, so reading costs one row of memory. Refused: pickled
//! weights, dtypes other than F32, F16 and BF16 (when such a tensor is asked for), and anything malformed, by
//! file and tensor. Links are followed (the Hugging Face cache is made of them); devices and pipes are not opened.

mod header;

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use serde_json::Value;

use crate::json::{self, shown};
use crate::region::Bytes;

pub use header::{DType, MAX_HEADER_BYTES, MAX_TENSORS};

/// Name of an unsharded checkpoint's file.
pub const SINGLE_FILE: &str = "model.safetensors";
/// Name of a sharded checkpoint's index.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// Largest index, bytes: a million tensors with names of a hundred characters.
pub const MAX_INDEX_BYTES: u64 = 200 << 20;
/// Most files of one checkpoint; the largest releases have a few hundred.
pub const MAX_FILES: usize = 4096;

/// Why a checkpoint cannot be read; names file and tensor, expected and found, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", shown(.0))]
pub struct CheckpointError(pub String);

fn fail<T>(message: String) -> Result<T, CheckpointError> {
    Err(CheckpointError(message))
}

/// An opened checkpoint. Holds maps, no copies.
#[derive(Debug)]
pub struct Checkpoint {
    files: Vec<File>,
    tensors: HashMap<String, Place>,
}

#[derive(Debug)]
struct File {
    path: PathBuf,
    bytes: Bytes,
}

#[derive(Debug)]
struct Place {
    file: usize,
    dtype: DType,
    shape: Vec<u64>,
    start: usize,
    len: usize,
}

/// One tensor as it lies in its file. Row-major; `bytes` may have any alignment.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    /// Its name, for messages.
    pub name: &'a str,
    /// Type of the elements.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: &'a [u64],
    /// `product(shape)` elements, little-endian.
    pub bytes: &'a [u8],
}

impl Checkpoint {
    /// Opens and checks all files of the checkpoint in `dir`. Reads headers only.
    pub fn open(dir: &Path) -> Result<Checkpoint, CheckpointError> {
        let single = dir.join(SINGLE_FILE);
        if single.exists() {
            let mut checkpoint = Checkpoint { files: Vec::new(), tensors: HashMap::new() };
            checkpoint.add(single)?;
            return Ok(checkpoint);
        }
        let index = dir.join(INDEX_FILE);
        if index.exists() {
            return Checkpoint::open_index(dir, &index);
        }
        let pickled =
            dir.join("pytorch_model.bin").exists() || dir.join("pytorch_model.bin.index.json").exists();
        let remedy = if pickled {
            "it has pickled weights, which are not loaded: convert them to safetensors"
        } else {
            "download the model's *.safetensors files into it"
        };
        fail(format!("{} has neither {SINGLE_FILE} nor {INDEX_FILE}; {remedy}", dir.display()))
    }

    fn open_index(dir: &Path, index: &Path) -> Result<Checkpoint, CheckpointError> {
        let map = weight_map(index)?;
        let mut names: Vec<&String> = map.values().collect();
        names.sort_unstable();
        names.dedup();
        if names.len() > MAX_FILES {
            return fail(format!(
                "{} names {} files, at most {MAX_FILES} are read",
                index.display(),
                names.len()
            ));
        }
        let mut checkpoint = Checkpoint { files: Vec::new(), tensors: HashMap::new() };
        for name in names {
            if !is_plain_name(name) {
                let (shown, index) = (name.escape_debug(), index.display());
                return fail(format!(
                    "{index} points to '{shown}'; files must lie beside the index, by plain name"
                ));
            }
            let path = dir.join(name);
            if !path.exists() {
                let (path, index) = (path.display(), index.display());
                return fail(format!("{path} is missing, but {index} names it; download it again"));
            }
            checkpoint.add(path)?;
        }
        for (tensor, file) in &map {
            let place = checkpoint.tensors.get(tensor.as_str());
            if place.is_none_or(|place| checkpoint.files[place.file].path != dir.join(file)) {
                let (tensor, index) = (tensor.escape_debug(), index.display());
                return fail(format!(
                    "tensor {tensor} is not in {file}, where {index} says; download both again"
                ));
            }
        }
        Ok(checkpoint)
    }

    fn add(&mut self, path: PathBuf) -> Result<(), CheckpointError> {
        let at = |what: String| CheckpointError(format!("{}: {what}", path.display()));
        let bytes = map_regular(&path)?;
        let (start, entries) = header::parse(&bytes).map_err(at)?;
        for (name, entry) in entries {
            let place = Place {
                file: self.files.len(),
                dtype: entry.dtype,
                shape: entry.shape,
                start: start + entry.begin,
                len: entry.end - entry.begin,
            };
            if let Some(other) = self.tensors.insert(name.clone(), place) {
                let other = self.files[other.file].path.display();
                return Err(at(format!(
                    "tensor {} is also in {other}; remove one of the files",
                    name.escape_debug()
                )));
            }
        }
        self.files.push(File { path, bytes });
        Ok(())
    }

    /// The tensor called `name`, which must have this shape and be F32, F16 or BF16.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<TensorView<'_>, CheckpointError> {
        let Some((name, place)) = self.tensors.get_key_value(name) else {
            return fail(format!(
                "tensor {name} is missing from {}; the download is incomplete or config.json is of another model",
                self.whole()
            ));
        };
        let path = self.files[place.file].path.display();
        if place.shape.len() != shape.len() || place.shape.iter().zip(shape).any(|(a, b)| *a != *b as u64) {
            return fail(format!(
                "{path}: tensor {name} has shape {:?}, config.json demands {shape:?}",
                place.shape
            ));
        }
        if place.dtype.float_bytes().is_none() {
            return fail(format!(
                "{path}: tensor {name} is {}; weights must be F32, F16 or BF16",
                place.dtype
            ));
        }
        Ok(TensorView { name, dtype: place.dtype, shape: &place.shape, bytes: self.bytes(place) })
    }

    /// Names of all tensors, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Paths and contents of the files, in the order of their names.
    pub fn files(&self) -> impl Iterator<Item = (&Path, &[u8])> {
        self.files.iter().map(|file| (file.path.as_path(), &*file.bytes))
    }

    fn bytes(&self, place: &Place) -> &[u8] {
        &self.files[place.file].bytes[place.start..place.start + place.len]
    }

    /// The files, as a message names them.
    fn whole(&self) -> String {
        match self.files.as_slice() {
            [] => "the checkpoint".to_string(),
            [file] => file.path.display().to_string(),
            [first, ..] => format!("{} and the other {} files", first.path.display(), self.files.len() - 1),
        }
    }
}

impl TensorView<'_> {
    /// Elements of one row: the product of all sizes but the first (1 for a vector).
    pub fn row_len(&self) -> usize {
        self.shape.iter().skip(1).product::<u64>() as usize
    }

    /// Converts row `row` into `out`, which is at least `row_len` long; the rest of `out` is left as it is.
    ///
    /// # Panics
    /// If there is no such row or `out` is too short.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        let len = self.row_len();
        let width = self.dtype.float_bytes().unwrap_or(0);
        self.convert(row * len * width, &mut out[..len]);
    }

    /// All elements: for norms and biases.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.shape.iter().product::<u64>() as usize];
        self.convert(0, &mut out);
        out
    }

    fn convert(&self, start: usize, out: &mut [f32]) {
        let bytes = &self.bytes[start..];
        match self.dtype {
            DType::F32 => {
                for (out, source) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                    *out = f32::from_le_bytes(*source);
                }
            }
            DType::F16 => {
                for (out, source) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = f16::from_le_bytes(*source).to_f32();
                }
            }
            DType::BF16 => {
                for (out, source) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                    *out = bf16::from_le_bytes(*source).to_f32();
                }
            }
            // `Checkpoint::tensor` gives out no other type.
            DType::Other(_) => {}
        }
    }
}

/// Whether `name` is one path component: no folder, no way up, not absolute.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let first = components.next();
    matches!(first, Some(std::path::Component::Normal(only)) if only == name) && components.next().is_none()
}

/// Maps a file that is a file: a pipe would block and a device never ends.
pub(crate) fn map_regular(path: &Path) -> Result<Bytes, CheckpointError> {
    let cannot = |error: std::io::Error| CheckpointError(format!("cannot read {}: {error}", path.display()));
    if !std::fs::metadata(path).map_err(cannot)?.is_file() {
        return fail(format!("{} is not a regular file", path.display()));
    }
    Bytes::map(path).map_err(cannot)
}

/// Reads a regular text file of at most `limit` bytes.
pub(crate) fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, CheckpointError> {
    let cannot = |error: std::io::Error| CheckpointError(format!("cannot read {}: {error}", path.display()));
    let metadata = std::fs::metadata(path).map_err(cannot)?;
    if !metadata.is_file() {
        return fail(format!("{} is not a regular file", path.display()));
    }
    if metadata.len() > limit {
        return fail(format!(
            "{} is {} bytes long, at most {limit} are read",
            path.display(),
            metadata.len()
        ));
    }
    std::fs::read(path).map_err(cannot)
}

fn weight_map(index: &Path) -> Result<HashMap<String, String>, CheckpointError> {
    let at = |what: String| CheckpointError(format!("{}: {what}", index.display()));
    let document = json::parse(&read_limited(index, MAX_INDEX_BYTES)?)
        .map_err(|error| at(format!("not valid JSON: {error}")))?;
    let Some(Value::Object(map)) = document.get("weight_map") else {
        return Err(at("weight_map is missing or not an object; download the file again".to_string()));
    };
    if map.is_empty() {
        return Err(at("weight_map is empty; download the file again".to_string()));
    }
    let entry = |(tensor, file): (&String, &Value)| match file {
        Value::String(file) => Ok((tensor.clone(), file.clone())),
        other => Err(at(format!(
            "weight_map gives {} for tensor {}, not a file name",
            other,
            tensor.escape_debug()
        ))),
    };
    map.iter().map(entry).collect()
}

#[cfg(test)]
mod tests;
