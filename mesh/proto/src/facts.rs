//! What the cluster logic has to know of the model and the machines.

use mesh_wire::id::NodeId;

/// The model, as far as placement cares.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelFacts {
    /// Fingerprint every node must share (BLAKE3 of the manifest).
    pub fingerprint: [u8; 32],
    /// Decoder layers that have routed experts, ascending.
    pub moe_layers: Vec<u16>,
    /// Experts per such layer.
    pub experts: u16,
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// Experts a row passes through per layer.
    pub top_k: u16,
}

/// A machine of the roster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub id: NodeId,
    /// Its name, for people.
    pub name: String,
}
