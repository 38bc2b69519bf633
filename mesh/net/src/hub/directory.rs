//! Who lends which experts, as far as the router knows.
//!
//! A node that fetches says where it lends what it has; what it has is what the routes say it serves. Machines are
//! named only where the asker can reach them: an address of the router's own machine is of use on that machine alone.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use mesh_proto::routes::{NodeIndex, ROUTER};
use mesh_wire::frame::NAMED_HOLDERS_MAX;
use mesh_wire::id::{NodeId, Slice};
use mesh_wire::weights::{HOLDERS_EACH_MAX, Holder, Holders};

use super::Shared;
use crate::shelf::Directory;

impl Directory for Shared {
    fn announce(&self, machine: NodeId, address: Option<SocketAddr>) {
        if let Some((_, seat)) = self.seats.of(machine) {
            seat.lend_at(address);
        }
    }

    fn holders(&self, (asker, from): (NodeId, SocketAddr), slices: &[Slice]) -> Holders {
        let routes = self.routes();
        let mut found = Holders::default();
        let mut positions: BTreeMap<NodeIndex, Option<u8>> = BTreeMap::new();
        for slice in slices {
            let mut of = Vec::new();
            let parts = routes.table.parts(slice.key.layer, slice.key.expert);
            let same = parts.iter().filter(|part| (part.from, part.to) == (slice.from, slice.to));
            let holders = same.flat_map(|part| part.holders.as_slice()).filter(|node| **node != ROUTER);
            for node in holders.take(HOLDERS_EACH_MAX) {
                let position = positions.entry(*node).or_insert_with(|| {
                    let seat = self.seats.at(*node)?;
                    let address = seat.lends_at().filter(|_| seat.machine.key != asker)?;
                    let near = !address.ip().is_loopback() || from.ip().is_loopback();
                    // The list is full: the router has it, too.
                    if !near || found.machines.len() >= NAMED_HOLDERS_MAX {
                        return None;
                    }
                    found.machines.push(Holder { id: seat.machine.key, address });
                    u8::try_from(found.machines.len() - 1).ok()
                });
                of.extend(*position);
            }
            found.of.push(of);
        }
        found
    }

    fn lent(&self, machine: NodeId, bytes: u64) {
        if let Some((_, seat)) = self.seats.of(machine) {
            seat.tally.update(|counters| counters.lent_bytes += bytes);
        }
    }
}
