//! What is said of a node to those who look: the router's log, its API, `moemesh nodes`.
//!
//! One word per node out of what `cluster` knows of it, and the figures beside it.

use std::time::Duration;

use mesh_wire::control::{Health, Hello, Loading};

use crate::facts::LinkSpeed;

/// How a node is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeState {
    /// Not connected.
    Absent,
    /// Connected; no plan has work for it yet.
    Waiting,
    /// Loading its experts.
    Loading,
    /// Its experts are routed to it.
    Serving,
    /// Too many calls went unanswered, or its connection was lost too often: it gets no calls until it is tried again.
    Suspect,
    /// It refused its placement; its experts run on the router.
    Refused,
    /// It is going to stop; calls under way are its last.
    Leaving,
    /// It sent what no correct node sends, `MALFORMED_MAX` times. Only the operator lets it back in.
    Quarantined,
    /// The operator shut it out for good.
    Revoked,
}

impl NodeState {
    /// Whether the node may be counted on to come to a plan: it is connected, or was until just now.
    pub fn is_here(self) -> bool {
        !matches!(self, NodeState::Absent | NodeState::Revoked)
    }
}

impl std::fmt::Display for NodeState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            NodeState::Absent => "absent",
            NodeState::Waiting => "waiting",
            NodeState::Loading => "loading",
            NodeState::Serving => "serving",
            NodeState::Suspect => "suspect",
            NodeState::Refused => "refused",
            NodeState::Leaving => "leaving",
            NodeState::Quarantined => "quarantined",
            NodeState::Revoked => "revoked",
        })
    }
}

/// A row of `moemesh nodes`.
#[derive(Clone, Debug)]
pub struct NodeStatus {
    /// How it is doing.
    pub state: NodeState,
    /// Newest epoch it acknowledged since it connected, 0 for none.
    pub epoch: u64,
    /// Experts assigned to it by the plan in use.
    pub experts: usize,
    /// Bytes of weights it reported.
    pub weight_bytes: u64,
    /// What it said of itself when it connected.
    pub hello: Option<Hello>,
    /// Its last report.
    pub health: Option<Health>,
    /// How far it is with what it is loading, as it last said.
    pub loading: Option<Loading>,
    /// Whether others are asked before it, as it is hot (`heat`).
    pub spared: bool,
    /// Mean time in its kernels and mean round trip of recent calls.
    pub call_means: Option<(Duration, Duration)>,
    /// What its link was measured to be.
    pub link: LinkSpeed,
    /// Why it was refused, turned away or suspected last; empty if never.
    pub note: String,
}
