//! What the cluster logic has to know of the model and the machines.

use mesh_wire::id::NodeId;

/// The model, as far as placement cares.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelFacts {
    /// Fingerprint every node must share (BLAKE3 of the manifest).
    pub fingerprint: [u8; 32],
    /// Decoder layers that have routed experts, ascending.
    pub moe_layers: Vec<u16>,
    /// Experts per such layer.
    pub experts: u16,
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// Blocks of 128 intermediate values of one expert (the last may be shorter): it can be cut between them.
    pub blocks: u16,
    /// Values of a row.
    pub hidden: u32,
    /// Whether rows travel as int8 groups (q4, q8) and not as f32 (bf16).
    pub int8_rows: bool,
    /// Bytes of weights that the router itself reads per token.
    pub router_bytes: u64,
    /// Experts a row passes through per layer.
    pub top_k: u16,
}

/// What a link to a node was measured to be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkSpeed {
    /// Round trip of a small message in microseconds.
    pub round_trip_us: u32,
    /// Megabytes (10^6) per second that large ones get, 0 where not measured.
    pub mb_s: u32,
}

/// A machine of the roster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its key.
    pub id: NodeId,
    /// Its name, for people.
    pub name: String,
}
