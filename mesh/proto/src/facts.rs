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
    /// Bytes of such a block; 0 where only whole experts matter.
    pub block_bytes: u64,
    /// Values of a row.
    pub hidden: u32,
    /// Whether rows travel as int8 groups (q4, q8) and not as f32 (bf16).
    pub int8_rows: bool,
    /// Bytes of weights that the router itself reads per token.
    pub router_bytes: u64,
    /// Of these the head, which a prompt needs for its last token only.
    pub head_bytes: u64,
    /// Experts a row passes through per layer.
    pub top_k: u16,
}

impl ModelFacts {
    /// Bytes of the blocks `from..to` of an expert; what the last block is short of 128 values is taken off.
    pub fn slice_bytes(&self, from: u16, to: u16) -> u64 {
        let block = if self.block_bytes > 0 {
            self.block_bytes
        } else {
            self.expert_bytes.div_ceil(u64::from(self.blocks.max(1)))
        };
        let upto = |end: u16| {
            if end >= self.blocks {
                self.expert_bytes
            } else {
                self.expert_bytes.min(block.saturating_mul(u64::from(end)))
            }
        };
        upto(to).saturating_sub(upto(from))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_of_an_expert_add_up_to_it() {
        // 320 values of 10 bytes: two full blocks and half of one.
        let facts = ModelFacts { expert_bytes: 3200, blocks: 3, block_bytes: 1280, ..ModelFacts::default() };
        assert_eq!([(0, 1), (1, 2), (2, 3)].map(|(from, to)| facts.slice_bytes(from, to)), [1280, 1280, 640]);
        assert_eq!(
            (facts.slice_bytes(0, 3), facts.slice_bytes(1, 3), facts.slice_bytes(2, 2)),
            (3200, 1920, 0)
        );
        let unsaid = ModelFacts { block_bytes: 0, ..facts };
        assert_eq!((unsaid.slice_bytes(0, 1), unsaid.slice_bytes(2, 3)), (1067, 1066));
    }
}
