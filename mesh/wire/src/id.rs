//! Names of machines and experts on the wire.

use serde::{Deserialize, Serialize};

/// A machine: its Ed25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(pub [u8; 32]);

impl NodeId {
    /// All 64 hexadecimal digits, as rosters and key files write it.
    pub fn to_hex(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Parses `to_hex`.
    pub fn from_hex(text: &str) -> Option<NodeId> {
        let bytes = text.as_bytes();
        // Digits only: Rust would take a sign in front of a number, too.
        if bytes.len() != 64 || !bytes.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let mut key = [0; 32];
        for (byte, pair) in key.iter_mut().zip(bytes.chunks(2)) {
            *byte = u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()?;
        }
        Some(NodeId(key))
    }
}

/// The first eight digits: enough to tell machines apart in a log.
impl std::fmt::Display for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0[..4].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for NodeId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "NodeId({self})")
    }
}

impl Serialize for NodeId {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.to_hex())
    }
}

impl<'de> Deserialize<'de> for NodeId {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<NodeId, D::Error> {
        let text = String::deserialize(deserializer)?;
        NodeId::from_hex(&text).ok_or_else(|| serde::de::Error::custom("a key is 64 hexadecimal digits"))
    }
}

/// What a node holds of one expert: the intermediate values of these blocks, so the rows of gate and up and the
/// columns of down that belong to them. A whole expert is `0..blocks`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slice {
    /// The expert.
    pub key: ExpertKey,
    /// First block of 128 intermediate values (`COMBINE_BLOCK` of the model).
    pub from: u16,
    /// The block after the last one.
    pub to: u16,
}

/// One expert of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ExpertKey {
    /// Decoder layer, from 0.
    pub layer: u16,
    /// Index in the layer.
    pub expert: u16,
}
