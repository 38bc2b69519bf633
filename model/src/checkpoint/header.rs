//! The header of a safetensors file: strict parsing (reference: safetensors `src/tensor.rs`, `Metadata::validate`).

use std::collections::HashSet;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

/// Largest header, bytes: the limit of the reference implementation.
pub const MAX_HEADER_BYTES: usize = 100_000_000;
/// Most tensors in one file. The largest open model has about 200 thousand in all of its files.
pub const MAX_TENSORS: usize = 1 << 20;
/// Most dimensions of a tensor.
const MAX_RANK: usize = 8;
/// Bytes before the header: its length as u64.
const LENGTH_BYTES: usize = 8;

/// Type of a tensor's elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// A type weights cannot have here, with its size in bits.
    Other(&'static str),
}

/// All types of the format, with their bits. Only whole bytes per tensor are possible.
const TYPES: [(&str, u64); 20] = [
    ("F32", 32),
    ("F16", 16),
    ("BF16", 16),
    ("BOOL", 8),
    ("F4", 4),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("U8", 8),
    ("I8", 8),
    ("F8_E5M2", 8),
    ("F8_E4M3", 8),
    ("F8_E8M0", 8),
    ("I16", 16),
    ("U16", 16),
    ("I32", 32),
    ("U32", 32),
    ("F64", 64),
    ("I64", 64),
    ("U64", 64),
    ("C64", 64),
];

impl DType {
    fn parse(name: &str) -> Option<(DType, u64)> {
        let (name, bits) = TYPES.into_iter().find(|(known, _)| *known == name)?;
        let dtype = match name {
            "F32" => DType::F32,
            "F16" => DType::F16,
            "BF16" => DType::BF16,
            other => DType::Other(other),
        };
        Some((dtype, bits))
    }

    /// Bytes of an element of a type that weights can have.
    pub fn float_bytes(self) -> Option<usize> {
        match self {
            DType::F32 => Some(4),
            DType::F16 | DType::BF16 => Some(2),
            DType::Other(_) => None,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "F32",
            DType::F16 => "F16",
            DType::BF16 => "BF16",
            DType::Other(name) => name,
        })
    }
}

/// One tensor; `begin..end` counts from the end of the header.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) dtype: DType,
    pub(super) shape: Vec<u64>,
    pub(super) begin: usize,
    pub(super) end: usize,
}

/// Parses the start of a file. Returns where its tensors start, and the tensors.
pub(super) fn parse(file: &[u8]) -> Result<(usize, Vec<(String, Entry)>), String> {
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(format!(
            "{} bytes long, too short for a safetensors file; download it again",
            file.len()
        ));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES as u64 {
        return Err(format!(
            "the header claims {length} bytes, at most {MAX_HEADER_BYTES} are read; is this a safetensors file?"
        ));
    }
    let length = length as usize;
    let Some((header, body)) = rest.split_at_checked(length) else {
        return Err(format!(
            "the header claims {length} bytes, only {} follow: the file is truncated; download it again",
            rest.len()
        ));
    };
    // As the reference does: what is skipped, in the metadata, would not be looked at otherwise.
    let header = std::str::from_utf8(header).map_err(|error| format!("the header is not UTF-8: {error}"))?;
    let raw: Header =
        serde_json::from_str(header).map_err(|error| format!("the header is not valid: {error}"))?;
    let mut entries = Vec::with_capacity(raw.0.len());
    for (name, tensor) in raw.0 {
        let entry = entry(&tensor).map_err(|reason| format!("tensor {}: {reason}", name.escape_debug()))?;
        entries.push((name, entry));
    }
    check_ranges(&mut entries, body.len())?;
    Ok((LENGTH_BYTES + length, entries))
}

fn entry(raw: &RawTensor) -> Result<Entry, String> {
    let Some((dtype, bits)) = DType::parse(&raw.dtype) else {
        return Err(format!("dtype '{}' is unknown", raw.dtype.escape_debug()));
    };
    if raw.shape.len() > MAX_RANK {
        return Err(format!("{} dimensions, at most {MAX_RANK} are read", raw.shape.len()));
    }
    let [begin, end] = raw.data_offsets;
    // Also without the sizes that are 0: rows of a tensor that has none are multiplied, too.
    let elements =
        |least: u64| raw.shape.iter().try_fold(bits, |bits, size| bits.checked_mul((*size).max(least)));
    let (Some(bits), Some(_)) = (elements(0), elements(1)) else {
        return Err(format!("shape {:?} overflows", raw.shape));
    };
    if end < begin || (end - begin).checked_mul(8) != Some(bits) {
        let expected = bits.div_ceil(8);
        return Err(format!(
            "shape {:?} of {dtype} takes {expected} bytes, data_offsets are [{begin}, {end}]",
            raw.shape
        ));
    }
    let (Ok(begin), Ok(end)) = (usize::try_from(begin), usize::try_from(end)) else {
        return Err(format!("data_offsets [{begin}, {end}] are beyond this machine's memory"));
    };
    Ok(Entry { dtype, shape: raw.shape.clone(), begin, end })
}

/// Tensors must follow each other from the end of the header to the end of the file.
fn check_ranges(entries: &mut [(String, Entry)], available: usize) -> Result<(), String> {
    entries.sort_by_key(|(_, entry)| (entry.begin, entry.end));
    let mut next = 0;
    for (name, entry) in entries.iter() {
        let name = name.escape_debug();
        if entry.begin != next {
            return Err(format!(
                "tensor {name} starts at {}, expected {next}: the file has a hole or an overlap",
                entry.begin
            ));
        }
        if entry.end > available {
            return Err(format!(
                "tensor {name} ends at {}, but only {available} bytes follow the header: the file is truncated; download it again",
                entry.end
            ));
        }
        next = entry.end;
    }
    if next != available {
        return Err(format!("{} bytes follow the last tensor, which belong to none", available - next));
    }
    Ok(())
}

struct Header(Vec<(String, RawTensor)>);

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct RawTensor {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: [u64; 2],
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Header, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = Header;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Header, A::Error> {
        let mut tensors = Vec::new();
        let mut seen = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !seen.insert(name.clone()) {
                return Err(A::Error::custom(format!("tensor {} appears twice", name.escape_debug())));
            }
            if seen.len() > MAX_TENSORS {
                return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
            }
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
            } else {
                tensors.push((name, map.next_value::<RawTensor>()?));
            }
        }
        Ok(Header(tensors))
    }
}
