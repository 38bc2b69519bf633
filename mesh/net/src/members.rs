//! The keys that may talk to the router, at this moment.
//!
//! TLS asks here during each handshake, so a change of the roster holds from the next handshake on, without a new
//! endpoint. A revoked key is told apart from a strange one: its machine must learn that trying again is of no use.

use std::collections::HashSet;
use std::sync::{PoisonError, RwLock};

use mesh_wire::id::NodeId;

use crate::roster::{Machine, Roster};
use crate::throttle::Throttle;

/// The keys that may talk, as TLS asks for them.
#[derive(Debug, Default)]
pub struct Members {
    keys: RwLock<(HashSet<NodeId>, HashSet<NodeId>)>,
    /// What is written down of keys that were turned away.
    pub(crate) refusals: Throttle,
}

/// What a key is to the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// A node.
    Member,
    /// It was one.
    Revoked,
    /// Nobody.
    Stranger,
}

impl Members {
    /// Takes over the roster's.
    pub fn set(&self, roster: &Roster) {
        let keys = |machines: &[Machine]| machines.iter().map(|machine| machine.key).collect();
        let sets = (keys(&roster.nodes), keys(&roster.revoked));
        *self.keys.write().unwrap_or_else(PoisonError::into_inner) = sets;
    }

    /// What this key is.
    pub fn standing(&self, key: NodeId) -> Standing {
        let (members, revoked) = &*self.keys.read().unwrap_or_else(PoisonError::into_inner);
        if members.contains(&key) {
            Standing::Member
        } else if revoked.contains(&key) {
            Standing::Revoked
        } else {
            Standing::Stranger
        }
    }
}
