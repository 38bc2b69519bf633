//! A plan with its number, why it was made and since when; and what it asks of a node.
//!
//! Refuses to know how far nodes are with it: that is theirs (`nodes`).

use std::time::Duration;

use mesh_wire::control::Placement;

use super::Action;
use crate::changes::{Change, Why};
use crate::facts::ModelFacts;
use crate::placement::Plan;
use crate::routes::NodeIndex;

/// A plan that is used, or being loaded.
#[derive(Debug)]
pub(super) struct Stage {
    pub(super) epoch: u64,
    pub(super) since: Duration,
    /// It is being loaded for longer than anybody waits (`SWITCH_WAIT_MAX`), by a node that shows progress.
    pub(super) lingers: bool,
    pub(super) plan: Plan,
    /// Nodes that what is predicted of the plan counts on.
    pub(super) present: Vec<NodeIndex>,
    pub(super) change: Change,
}

impl Stage {
    /// An earlier router's.
    pub(super) fn restored(epoch: u64, plan: Plan) -> Stage {
        let after_ns = plan.predicted.token_ns;
        let change = Change {
            epoch,
            why: Why::Restored,
            nodes: Vec::new(),
            before_ns: None,
            after_ns,
            moved_bytes: 0,
        };
        let present = plan.members();
        Stage { epoch, since: Duration::ZERO, lingers: false, plan, present, change }
    }
}

/// Most experts of a layer that a node holds.
pub(super) fn per_layer(plan: &Plan, node: NodeIndex) -> u32 {
    u32::try_from(plan.load(node).per_layer).unwrap_or(u32::MAX)
}

/// The order to load a plan's part.
pub(super) fn place(facts: &ModelFacts, stage: &Stage, node: NodeIndex) -> Action {
    let experts = stage.plan.experts(node);
    Action::Place(node, Placement { epoch: stage.epoch, model: facts.fingerprint, experts })
}
