//! What is counted per node, and where the cluster's logic is told what happened.
//!
//! Counters only grow, so whoever reads them twice knows a rate. They are updated on the network thread, once per
//! call, and read from anywhere.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, PoisonError};

use mesh_proto::cluster::Event;

/// What happened with one node's calls since the router started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeCounters {
    /// Calls sent.
    pub calls: u64,
    /// Rows in them.
    pub rows: u64,
    /// (row, expert) pairs in them.
    pub assignments: u64,
    /// Calls answered in time with a valid reply.
    pub answered: u64,
    /// Bytes of call frames sent.
    pub bytes_out: u64,
    /// Bytes of reply frames received.
    pub bytes_in: u64,
    /// Calls whose budget ran out.
    pub late: u64,
    /// Calls the node refused.
    pub refused: u64,
    /// Replies that were not valid.
    pub rejected: u64,
    /// Replies to calls nobody waits for (late, repeated, invented), dropped.
    pub stale: u64,
    /// Calls that were late, so that others were asked as well.
    pub hedged: u64,
    /// Calls that were cancelled by the router.
    pub cancelled: u64,
    /// Calls lost with their lane or connection.
    pub gone: u64,
    /// Probes of its link that it answered as it should.
    pub probes: u64,
    /// Probes that it answered wrongly or not at all.
    pub probes_failed: u64,
    /// Connections of this node, counting the present one.
    pub connections: u64,
    /// Bytes of weights that the router sent it.
    pub lent_bytes: u64,
}

/// The counters of one node.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    counters: Mutex<NodeCounters>,
    outstanding: AtomicU32,
}

impl Tally {
    pub(crate) fn update(&self, change: impl FnOnce(&mut NodeCounters)) {
        change(&mut self.counters.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn snapshot(&self) -> NodeCounters {
        *self.counters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Assignments handed over and not yet answered.
    pub(crate) fn outstanding(&self) -> u32 {
        self.outstanding.load(Ordering::Relaxed)
    }

    pub(crate) fn begin(&self, assignments: u32) {
        self.outstanding.fetch_add(assignments, Ordering::Relaxed);
    }

    pub(crate) fn end(&self, assignments: u32) {
        self.outstanding.fetch_sub(assignments, Ordering::Relaxed);
    }
}

/// Takes what happened to the cluster's logic.
pub(crate) trait Feed: Send + Sync {
    fn feed(&self, event: Event);
}
