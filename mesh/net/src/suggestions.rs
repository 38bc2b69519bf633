//! Where machines of the cluster may be, as discovery found out (`mesh-discovery` writes, the station reads).
//!
//! A suggestion is an address at which somebody has just proven to own the machine's key. It is still no more than a
//! place to dial: QUIC's mutual TLS decides who is there, as at every other address, so a wrong one costs a
//! handshake. Addresses that a person gave or a token carried come first; with discovery off this table is empty and
//! nothing else changes. Bounded: some machines, a few addresses each, the newest first; 257 machines with 4
//! addresses take 40 kB.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_wire::id::NodeId;

use crate::roster::NODES_MAX;

/// Machines that are remembered: all there can be, and the router.
pub const MACHINES_MAX: usize = NODES_MAX + 1;

/// Addresses of each: it has that many networks at most that matter, or moved that often.
pub const PLACES_MAX: usize = 4;

/// The table; clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Suggestions(Arc<Mutex<BTreeMap<NodeId, Vec<SocketAddr>>>>);

impl Suggestions {
    fn table(&self) -> MutexGuard<'_, BTreeMap<NodeId, Vec<SocketAddr>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the machine was just found there. Whether that is news: it was not known, or not the newest place.
    pub fn suggest(&self, machine: NodeId, address: SocketAddr) -> bool {
        let mut table = self.table();
        if table.len() >= MACHINES_MAX && !table.contains_key(&machine) {
            return false;
        }
        let places = table.entry(machine).or_default();
        if places.first() == Some(&address) {
            return false;
        }
        places.retain(|place| *place != address);
        places.insert(0, address);
        places.truncate(PLACES_MAX);
        true
    }

    /// Where the machine may be, the newest place first.
    pub fn of(&self, machine: NodeId) -> Vec<SocketAddr> {
        self.table().get(&machine).cloned().unwrap_or_default()
    }

    /// Forgets the machines that do not belong any more.
    pub fn keep(&self, belongs: impl Fn(NodeId) -> bool) {
        self.table().retain(|machine, _| belongs(*machine));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(number: u16) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, 1], number))
    }

    #[test]
    fn the_newest_place_is_first_and_the_table_is_bounded() {
        let suggestions = Suggestions::default();
        let machine = NodeId([7; 32]);
        assert!(suggestions.of(machine).is_empty());
        assert!((1..=5).all(|number| suggestions.suggest(machine, place(number))));
        assert_eq!(suggestions.of(machine), [5, 4, 3, 2].map(place), "the oldest is forgotten");
        assert!(!suggestions.suggest(machine, place(5)), "known and newest");
        assert!(suggestions.suggest(machine, place(3)));
        assert_eq!(suggestions.of(machine), [3, 5, 4, 2].map(place));
        for number in 0..10_000_u16 {
            let mut key = [0; 32];
            key[..2].copy_from_slice(&number.to_le_bytes());
            suggestions.suggest(NodeId(key), place(number));
        }
        assert_eq!(suggestions.table().len(), MACHINES_MAX);
        assert_eq!(suggestions.of(machine).len(), 4, "whoever was there stays");
        suggestions.keep(|key| key == machine);
        assert_eq!(suggestions.table().len(), 1);
    }
}
