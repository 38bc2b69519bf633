//! Who belongs: the machine's own key, the keys that may connect, and the keys that are looked for.
//!
//! A machine's libp2p peer id is its Ed25519 key, the same that QUIC pins, so the roster is the allow-list. A router
//! lets in the nodes of its roster and looks for nobody, as nodes dial it. A node lets in the router and the nodes of the
//! newest roster it has seen, and looks for the router: before it has seen one, for nobody else at all.

use std::sync::Arc;

use libp2p::PeerId;
use libp2p::identity::{Keypair, PublicKey, ed25519};
use mesh_net::authority::Authority;
use mesh_net::identity::Identity;
use mesh_net::membership::Membership;
use mesh_net::suggestions::Suggestions;
use mesh_wire::id::NodeId;

/// What a machine is to its cluster, with what it keeps about it.
#[derive(Clone, Debug)]
pub enum Circle {
    /// Its router.
    Router(Arc<Authority>),
    /// A node.
    Node(Arc<Membership>),
}

impl Circle {
    /// This machine.
    pub(crate) fn identity(&self) -> &Identity {
        match self {
            Circle::Router(authority) => authority.identity(),
            Circle::Node(membership) => membership.identity(),
        }
    }

    /// Public half of the cluster's key.
    pub(crate) fn cluster(&self) -> NodeId {
        match self {
            Circle::Router(authority) => authority.cluster(),
            Circle::Node(membership) => membership.admission().cluster,
        }
    }

    /// Number of the roster that `keys` follows, 0 for none.
    pub(crate) fn epoch(&self) -> u64 {
        match self {
            Circle::Router(authority) => authority.roster().roster().epoch,
            Circle::Node(membership) => membership.epoch(),
        }
    }

    /// Whose connections are taken; never this machine's own.
    pub(crate) fn keys(&self) -> Vec<NodeId> {
        let (mut keys, roster) = match self {
            Circle::Router(authority) => (Vec::new(), Some(authority.roster().roster().clone())),
            Circle::Node(membership) => {
                let roster = membership.roster().map(|signed| signed.roster().clone());
                (vec![membership.admission().router], roster)
            }
        };
        keys.extend(roster.iter().flat_map(|roster| &roster.nodes).map(|machine| machine.key));
        let own = self.identity().id();
        keys.retain(|key| *key != own);
        keys
    }

    /// Who is asked where it is, and where the answers go.
    pub(crate) fn sought(&self) -> Option<(NodeId, &Suggestions)> {
        match self {
            Circle::Router(_) => None,
            Circle::Node(membership) => Some((membership.admission().router, membership.suggestions())),
        }
    }
}

/// What libp2p calls a machine; `None` for 32 bytes that are no point of the curve, which no machine has as its key.
pub(crate) fn peer_of(key: NodeId) -> Option<PeerId> {
    let key = ed25519::PublicKey::try_from_bytes(&key.0).ok()?;
    Some(PublicKey::from(key).to_peer_id())
}

/// The machine's key as libp2p takes it; `None` never happens to a key that QUIC takes.
pub(crate) fn keypair_of(identity: &Identity) -> Option<Keypair> {
    Keypair::ed25519_from_bytes(*identity.seed()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_net::membership::Admission;

    #[test]
    fn the_peer_id_of_a_machine_is_its_key() {
        let identity = Identity::from_seed([5; 32]).unwrap();
        let pair = keypair_of(&identity).unwrap();
        assert_eq!(Some(pair.public().to_peer_id()), peer_of(identity.id()));
        let bytes = pair.public().try_into_ed25519().unwrap().to_bytes();
        assert_eq!(NodeId(bytes), identity.id());
    }

    #[test]
    fn the_circle_is_the_roster_and_follows_it() {
        let authority = Arc::new(Authority::in_memory().unwrap());
        let router = authority.identity().id();
        let circle = Circle::Router(Arc::clone(&authority));
        assert!(circle.keys().is_empty() && circle.sought().is_none());
        let node = Identity::from_seed([9; 32]).unwrap();
        authority.admit("node-1", node.id()).unwrap();
        assert_eq!((circle.keys(), circle.epoch()), (vec![node.id()], 2));
        authority.revoke("node-1").unwrap();
        assert_eq!((circle.keys(), circle.epoch()), (vec![], 3));

        // A node that has seen no roster yet knows its router only.
        let admission =
            Admission { cluster: authority.cluster(), router, name: "node-1".into(), addresses: Vec::new() };
        let membership = Arc::new(Membership::in_memory(node, admission));
        let circle = Circle::Node(membership);
        assert_eq!(circle.keys(), [router]);
        assert_eq!(circle.sought().map(|(key, _)| key), Some(router));
    }
}
