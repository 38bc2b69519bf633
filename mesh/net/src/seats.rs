//! The router's table of machines: one seat each, for as long as the process lives.
//!
//! Seats are only ever added. A node's index is its seat's, so routes, plans and calls under way stay true while
//! machines come in and are shut out; a revoked one leaves an empty seat behind. Reading takes a lock that is held for
//! a few instructions. Beside it: how many peers shake hands at the moment, in all and per address, so that one
//! address cannot take all places.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use mesh_proto::routes::NodeIndex;
use mesh_wire::id::NodeId;
use quinn::Incoming;
use tokio::sync::Semaphore;

use crate::link::Link;
use crate::roster::Machine;
use crate::tally::Tally;

/// Seats of one process: as many machines as a cluster has, thrice replaced.
pub(crate) const SEATS_MAX: usize = 1024;

/// Peers that may be between first packet and hello at a time.
pub(crate) const GREETING_MAX: usize = 64;

/// And from one address, or one IPv6 network.
pub(crate) const GREETING_PER_ADDRESS_MAX: usize = 24;

/// From this many on, a peer must first prove that it receives at the address it sends from: a flood of forged
/// first packets then costs one small packet each and no memory.
pub(crate) const GREETING_UNPROVEN_MAX: usize = 16;

/// The same per address: nobody can take the places of another address in its name.
pub(crate) const GREETING_UNPROVEN_PER_ADDRESS_MAX: usize = 4;

/// Connections of one machine that may be between handshake and hello at a time: that of a process that just ended, and
/// that of the next one. Each may hold a stream's window of bytes that nobody reads.
pub(crate) const INTRODUCTIONS_MAX: usize = 2;

/// One machine's.
pub(crate) struct Seat {
    pub(crate) machine: Machine,
    pub(crate) tally: Arc<Tally>,
    link: Mutex<Option<Arc<Link>>>,
    revoked: AtomicBool,
    note: Mutex<String>,
    /// Where it lends weights.
    lends_at: Mutex<Option<SocketAddr>>,
    /// Held while a new connection finds out whether an old one is alive.
    pub(crate) arrival: tokio::sync::Mutex<()>,
    /// Places of `INTRODUCTIONS_MAX`.
    pub(crate) introductions: Semaphore,
}

impl Seat {
    fn new(machine: Machine) -> Seat {
        Seat {
            machine,
            tally: Arc::default(),
            link: Mutex::default(),
            revoked: AtomicBool::new(false),
            note: Mutex::default(),
            lends_at: Mutex::default(),
            arrival: tokio::sync::Mutex::default(),
            introductions: Semaphore::new(INTRODUCTIONS_MAX),
        }
    }

    /// The live connection.
    pub(crate) fn link(&self) -> MutexGuard<'_, Option<Arc<Link>>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes this the live connection; the one before. False where the machine was shut out meanwhile.
    pub(crate) fn sit(&self, link: &Arc<Link>) -> Result<Option<Arc<Link>>, ()> {
        let mut current = self.link();
        if self.is_revoked() { Err(()) } else { Ok(current.replace(Arc::clone(link))) }
    }

    /// Shuts the machine out; the connection it had.
    pub(crate) fn revoke(&self) -> Option<Arc<Link>> {
        let mut current = self.link();
        self.revoked.store(true, Ordering::Relaxed);
        current.take()
    }

    pub(crate) fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Relaxed)
    }

    /// Where others can get the weights it has.
    pub(crate) fn lends_at(&self) -> Option<SocketAddr> {
        *self.lends_at.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that; `None`: nowhere.
    pub(crate) fn lend_at(&self, address: Option<SocketAddr>) {
        *self.lends_at.lock().unwrap_or_else(PoisonError::into_inner) = address;
    }

    /// What the operator should know of the machine beside the cluster's own note; empty for nothing.
    pub(crate) fn note(&self) -> MutexGuard<'_, String> {
        self.note.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// See the module.
#[derive(Default)]
pub(crate) struct Seats {
    list: RwLock<Arc<Vec<Arc<Seat>>>>,
}

impl Seats {
    /// All of them, in the order of `NodeIndex`.
    pub(crate) fn all(&self) -> Arc<Vec<Arc<Seat>>> {
        Arc::clone(&self.list.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn at(&self, node: NodeIndex) -> Option<Arc<Seat>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner).get(usize::from(node)).cloned()
    }

    /// The seat of a machine that may sit.
    pub(crate) fn of(&self, key: NodeId) -> Option<(NodeIndex, Arc<Seat>)> {
        let all = self.all();
        let mut seated = (0..).zip(all.iter()).filter(|(_, seat)| !seat.is_revoked());
        seated.find(|(_, seat)| seat.machine.key == key).map(|(node, seat)| (node, Arc::clone(seat)))
    }

    /// Adds one; false where there are too many.
    pub(crate) fn add(&self, machine: Machine) -> bool {
        let mut list = self.list.write().unwrap_or_else(PoisonError::into_inner);
        if list.len() >= SEATS_MAX {
            return false;
        }
        let mut longer = Vec::clone(&list);
        longer.push(Arc::new(Seat::new(machine)));
        *list = Arc::new(longer);
        true
    }
}

/// Peers that shake hands at one port.
#[derive(Debug, Default)]
pub(crate) struct Greeters {
    counts: Mutex<HashMap<IpAddr, usize>>,
}

/// What to do with a new peer.
#[derive(Debug)]
pub(crate) enum Welcome {
    /// Shake hands; it counts while this lives.
    Greet(Greeting),
    /// Ask it to prove its address, then the same.
    Prove(Greeting),
    /// Turn it away.
    Refuse,
}

/// Counts a peer as being greeted while it lives.
#[derive(Debug)]
pub(crate) struct Greeting(Arc<Greeters>, IpAddr);

impl Drop for Greeting {
    fn drop(&mut self) {
        let mut counts = self.0.counts();
        if let Some(count) = counts.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.1);
            }
        }
    }
}

impl Greeters {
    fn counts(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A peer that sent its first packet, if it may shake hands now; else it is told to prove its address and come again,
    /// or turned away.
    pub(crate) fn let_in(self: &Arc<Greeters>, incoming: Incoming) -> Option<(Incoming, Greeting)> {
        match self.welcome(incoming.remote_address()) {
            Welcome::Refuse => incoming.refuse(),
            // Fails only where `may_retry` is false.
            Welcome::Prove(_) if incoming.may_retry() => drop(incoming.retry()),
            Welcome::Greet(greeting) | Welcome::Prove(greeting) => return Some((incoming, greeting)),
        }
        None
    }

    /// Decides about a peer that sent its first packet from here.
    pub(crate) fn welcome(self: &Arc<Greeters>, from: SocketAddr) -> Welcome {
        let place = network(from.ip());
        let mut counts = self.counts();
        let all: usize = counts.values().sum();
        let here = counts.get(&place).copied().unwrap_or(0);
        if all >= GREETING_MAX || here >= GREETING_PER_ADDRESS_MAX {
            return Welcome::Refuse;
        }
        *counts.entry(place).or_default() += 1;
        let greeting = Greeting(Arc::clone(self), place);
        if all >= GREETING_UNPROVEN_MAX || here >= GREETING_UNPROVEN_PER_ADDRESS_MAX {
            Welcome::Prove(greeting)
        } else {
            Welcome::Greet(greeting)
        }
    }
}

/// What one sender can be held to: an IPv4 address, or an IPv6 network, of which it may have every address.
fn network(ip: IpAddr) -> IpAddr {
    match ip.to_canonical() {
        IpAddr::V6(ip) => IpAddr::V6((ip.to_bits() >> 64 << 64).into()),
        ip => ip,
    }
}
