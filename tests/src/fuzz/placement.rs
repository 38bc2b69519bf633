//! The plan that a router keeps on disk, and the orders to nodes that follow from it.

use mesh_proto::facts::{Member, ModelFacts};
use mesh_proto::stored::Stored;
use mesh_wire::buffer::Pool;
use mesh_wire::control::Placement;
use mesh_wire::id::NodeId;
use mesh_wire::message::Message;

use super::{Verdict, says_why};

/// A model that is small, with layers left out and experts that can be cut.
pub(super) fn facts() -> ModelFacts {
    ModelFacts {
        fingerprint: [7; 32],
        moe_layers: vec![1, 4],
        experts: 3,
        expert_bytes: 60_000_000,
        blocks: 6,
        block_bytes: 10_000_000,
        top_k: 2,
        hidden: 64,
        ..ModelFacts::default()
    }
}

/// Three machines.
pub(super) fn members() -> Vec<Member> {
    (1..=3).map(|key| Member { id: NodeId([key; 32]), name: format!("n{key}") }).collect()
}

/// The text of a plan.
pub(super) fn placement(bytes: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(bytes) else { return Verdict::Refused };
    let (facts, members) = (facts(), members());
    let stored = match Stored::parse(text, &facts, &members) {
        Ok(stored) => stored,
        Err(error) => return says_why(&error),
    };
    for layer in &facts.moe_layers {
        for expert in 0..facts.experts {
            let mut end = 0;
            for part in stored.plan.table.parts(*layer, expert) {
                assert!(part.from == end && part.to > part.from, "{layer}/{expert}: {part:?} after {end}");
                end = part.to;
            }
            assert_eq!(end, facts.blocks, "expert {layer}/{expert} is not whole");
        }
    }
    let written = stored.to_text(&facts, &members);
    assert_eq!(Stored::parse(&written, &facts, &members).as_ref(), Ok(&stored), "out of\n{written}");
    let pool = Pool::new(1 << 20);
    for node in 0..members.len() as u16 {
        let experts = stored.plan.experts(node);
        let order = Placement { epoch: stored.epoch, model: facts.fingerprint, experts };
        let order = Message::Placement(order);
        let frame = order.encode(&pool).expect("what a plan says of a node can be ordered");
        assert_eq!(Message::decode(&frame), Ok(order));
    }
    Verdict::Taken
}
