//! The router's view of its nodes: who is here, who holds what, who is trusted with calls.

use std::sync::Arc;
use std::time::Duration;

use mesh_wire::control::{Health, Hello, Placed, Placement};

use crate::facts::{Member, ModelFacts};
use crate::routes::{NodeIndex, Routes};

/// What happened.
#[derive(Clone, Debug)]
pub enum Event {
    /// A node's connection is up and it introduced itself (again).
    Joined(NodeIndex, Hello),
    /// Its connection is gone.
    Lost(NodeIndex),
    /// It answered a placement.
    Placed(NodeIndex, Placed),
    /// Its periodic report.
    Health(NodeIndex, Health),
    /// A call was answered.
    Answered {
        /// By whom.
        node: NodeIndex,
        /// Assignments (row, expert) it computed.
        assignments: u32,
        /// Time in its kernels.
        service: Duration,
        /// Time from send to receipt.
        round_trip: Duration,
    },
    /// A call's budget ran out, or its reply was unusable.
    Missed(NodeIndex),
    /// Time passed.
    Tick,
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this placement.
    Place(NodeIndex, Placement),
    /// Close the connection, telling the node why.
    Disconnect(NodeIndex, String),
    /// `routes()` changed; hand the new table to the dispatcher.
    RoutesChanged,
}

/// The state machine. See `Cluster::handle`.
#[derive(Debug)]
pub struct Cluster {
    members: Vec<Member>,
    facts: ModelFacts,
    routes: Arc<Routes>,
}

impl Cluster {
    /// A cluster whose nodes have all yet to come: every expert is the router's own.
    pub fn new(members: Vec<Member>, facts: ModelFacts) -> Cluster {
        let layers = facts.moe_layers.last().map_or(0, |last| usize::from(*last) + 1);
        let mut nodes = vec![Vec::new(); layers];
        for layer in &facts.moe_layers {
            nodes[usize::from(*layer)] = vec![None; usize::from(facts.experts)];
        }
        Cluster { members, facts, routes: Arc::new(Routes { epoch: 0, nodes }) }
    }

    /// Takes in one event at time `now` (since an arbitrary start, never going back).
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let _ = (now, event, &self.members, &self.facts);
        Vec::new()
    }

    /// The table to dispatch by.
    pub fn routes(&self) -> Arc<Routes> {
        Arc::clone(&self.routes)
    }

    /// How long a call with this many assignments may take at this node before its experts are computed on the
    /// router instead (DESIGN section 8).
    pub fn budget(&self, node: NodeIndex, assignments: u32) -> Duration {
        let _ = (node, assignments);
        Duration::from_millis(250)
    }
}
