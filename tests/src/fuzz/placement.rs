//! The plan that a router keeps on disk, and the orders to nodes that follow from it.

use mesh_proto::stored::Stored;
use mesh_wire::buffer::Pool;
use mesh_wire::control::Placement;
use mesh_wire::message::Message;

use super::cluster::{facts, is_whole, members, restored};
use super::{Verdict, says_why};

/// The text of a plan; one that is taken lives on in a router that starts with it.
pub(super) fn placement(bytes: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(bytes) else { return Verdict::Refused };
    let (facts, members) = (facts(), members());
    let stored = match Stored::parse(text, &facts, &members) {
        Ok(stored) => stored,
        Err(error) => return says_why(&error),
    };
    is_whole(&stored.plan.table);
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
    restored(stored);
    Verdict::Taken
}
