//! A plan as a piece of work: taken away from the network's thread, done anywhere, and judged when it comes back.
//!
//! Planning for many nodes takes longer than a token, so the cluster's logic hands out what is to be planned (`Task`),
//! with copies of all that it depends on, and goes on; what comes back (`Proposal`) it takes only if those it was
//! made for are still there. The work itself is a function of the task: the same task gives the same proposal on
//! every machine. Refuses to know when anything is planned, or whether a proposal is taken.

use std::fmt;

use crate::cost::{DRAWS, Decode, NodeUse, Scene};
use crate::facts::ModelFacts;
use crate::machine::Capacity;
use crate::placement::{Plan, Wishes, plan};
use crate::popularity::Popularity;
use crate::routes::NodeIndex;
use crate::standin::{Loss, StoodIn, stand_in};
use crate::tune::{GAIN_MIN, MOVE_MAX, tuned};

/// What is to be planned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Work {
    /// A placement for these nodes, little different from the one before.
    Anew(Vec<Capacity>),
    /// Stand-ins for nodes that are away.
    StandIns(Loss),
    /// The same placement, better suited to what is wanted of it.
    Tune,
    /// The same placement: what it gives with the nodes that serve it now.
    Forecast,
}

/// See the module.
#[derive(Clone, PartialEq, Eq)]
pub struct Task {
    /// Which it is; the proposal carries it back.
    pub ticket: u64,
    /// The model.
    pub facts: ModelFacts,
    /// What the operator wants.
    pub wishes: Wishes,
    /// The placement in use.
    pub before: Option<Plan>,
    /// The nodes that serve it.
    pub serving: Vec<NodeIndex>,
    /// What is wanted how often, as far as it is known.
    pub popularity: Option<Popularity>,
    /// What to do.
    pub work: Work,
}

/// Its number and kind: the rest is a table of thousands of experts.
impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Task({}, {:?})", self.ticket, self.work)
    }
}

/// What comes back.
#[derive(Clone, PartialEq, Eq)]
pub struct Proposal {
    /// Of the task.
    pub ticket: u64,
    /// The plan; `None` where nothing can be made better.
    pub plan: Option<Plan>,
    /// Nodes that what is predicted of it counts on.
    pub present: Vec<NodeIndex>,
    /// Nanoseconds of a token predicted of what was.
    pub before_ns: Option<u64>,
    /// Bytes that nodes have to get.
    pub moved_bytes: u64,
    /// Whether more could be done in another step.
    pub more: bool,
}

/// Its number, and whether there is a plan.
impl fmt::Debug for Proposal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plan = if self.plan.is_some() { "a plan" } else { "nothing" };
        write!(f, "Proposal({}, {plan}, {} bytes)", self.ticket, self.moved_bytes)
    }
}

impl Task {
    /// Does it. Takes as long as `placement::plan`.
    pub fn work(&self) -> Proposal {
        match (&self.work, &self.before) {
            (Work::Anew(nodes), _) => self.anew(nodes),
            (Work::StandIns(loss), Some(before)) => self.stand_in(before, loss),
            (Work::Tune, Some(before)) => self.tune(before),
            (Work::Forecast, Some(before)) => self.forecast(before),
            (Work::StandIns(_) | Work::Tune | Work::Forecast, None) => self.nothing(None),
        }
    }

    /// That nothing can be made better than the plan before, with what is predicted of it.
    fn nothing(&self, before_ns: Option<u64>) -> Proposal {
        let (ticket, present) = (self.ticket, Vec::new());
        Proposal { ticket, plan: None, present, before_ns, moved_bytes: 0, more: false }
    }

    fn anew(&self, nodes: &[Capacity]) -> Proposal {
        let mut plan = plan(&self.facts, nodes, &self.wishes, self.before.as_ref());
        if let Some(kept) = self.before.as_ref().and_then(|before| self.kept(before, nodes, &plan)) {
            return kept;
        }
        if let Some(popularity) = &self.popularity {
            plan.table = tuned(&self.facts, &plan, popularity, MOVE_MAX);
            plan.predicted = self.predicted(&plan, &plan.members());
        }
        let moved_bytes = self.moved_bytes(&plan);
        let before_ns = self.before.as_ref().map(|before| self.predicted_by(before, &plan));
        Proposal { present: plan.members(), plan: Some(plan), moved_bytes, ..self.nothing(before_ns) }
    }

    /// The placement before with stand-ins for who is not among `nodes`, where the new one would leave more to the router:
    /// cut experts are laid out anew only where all of them fit.
    fn kept(&self, before: &Plan, nodes: &[Capacity], anew: &Plan) -> Option<Proposal> {
        let open = anew.table.open_blocks(&[]);
        let flags = |wishes: &Wishes| (wishes.copies, wishes.slices, wishes.router_experts);
        if open == 0 || flags(&before.wishes) != flags(&anew.wishes) {
            return None;
        }
        let now = |node: NodeIndex| nodes.iter().find(|now| now.node == node);
        let too_much = |now: &Capacity| before.bytes(now.node, &self.facts) > now.memory_bytes;
        if nodes.iter().any(too_much) {
            return None;
        }
        let out = before.members().into_iter().filter(|node| now(*node).is_none()).collect();
        let loss = Loss { out, gone: Vec::new(), able: nodes.to_vec(), step_bytes: u64::MAX };
        let StoodIn { table, moved_bytes, open: still, .. } =
            stand_in(&self.facts, before, &loss, self.popularity.as_ref());
        if still >= open {
            return None;
        }
        let away = before.capacities.iter().filter(|then| now(then.node).is_none());
        let mut capacities: Vec<Capacity> = away.chain(nodes).copied().collect();
        capacities.sort_by_key(|capacity| capacity.node);
        let mut plan = Plan { table, capacities, wishes: anew.wishes, ..before.clone() };
        let present: Vec<NodeIndex> = nodes.iter().map(|node| node.node).collect();
        plan.predicted = self.predicted(&plan, &present);
        let before_ns = Some(self.predicted_by(before, &plan));
        Some(Proposal { plan: Some(plan), present, moved_bytes, ..self.nothing(before_ns) })
    }

    /// What a token takes by the plan before, with the figures that the new one was made with: what was measured of
    /// machines and links in between is the doing of neither.
    fn predicted_by(&self, before: &Plan, plan: &Plan) -> u64 {
        let now = |then: &Capacity| plan.capacity(then.node).copied().unwrap_or(*then);
        let capacities = before.capacities.iter().map(now).collect();
        self.predicted(&Plan { capacities, ..before.clone() }, &self.serving).token_ns
    }

    fn stand_in(&self, before: &Plan, loss: &Loss) -> Proposal {
        let stood_in = stand_in(&self.facts, before, loss, self.popularity.as_ref());
        if stood_in.open > 0 && !stood_in.more {
            // Cut in another way, or with fewer copies of the rest, there may be room for all.
            let anew = self.anew(&loss.able);
            let fewer = |plan: &Plan| plan.table.open_blocks(&loss.out) < stood_in.open;
            if anew.plan.as_ref().is_some_and(fewer) {
                return anew;
            }
        }
        let nothing = self.nothing(Some(self.predicted(before, &self.serving).token_ns));
        if stood_in.moved_bytes == 0 {
            return Proposal { more: stood_in.more, ..nothing };
        }
        let StoodIn { table, moved_bytes, more, .. } = stood_in;
        let mut plan = Plan { table, ..before.clone() };
        let mut present = plan.members();
        present.retain(|node| !loss.out.contains(node));
        plan.predicted = self.predicted(&plan, &present);
        Proposal { plan: Some(plan), present, moved_bytes, more, ..nothing }
    }

    fn tune(&self, before: &Plan) -> Proposal {
        let now = self.predicted(before, &self.serving).token_ns;
        let nothing = self.nothing(Some(now));
        let Some(popularity) = &self.popularity else { return nothing };
        let mut plan = Plan { table: tuned(&self.facts, before, popularity, MOVE_MAX), ..before.clone() };
        let present = plan.members();
        plan.predicted = self.predicted(&plan, &present);
        let better = u128::from(plan.predicted.token_ns) * 100 < u128::from(now) * u128::from(100 - GAIN_MIN);
        if !better {
            return nothing;
        }
        let moved_bytes = self.moved_bytes(&plan);
        Proposal { plan: Some(plan), present, moved_bytes, ..nothing }
    }

    fn forecast(&self, before: &Plan) -> Proposal {
        let mut present = before.members();
        present.retain(|node| self.serving.contains(node));
        let predicted = self.predicted(before, &present);
        Proposal { plan: Some(Plan { predicted, ..before.clone() }), present, ..self.nothing(None) }
    }

    /// What a token takes if only these nodes are there; `nodes` as in the plan's capacities.
    fn predicted(&self, plan: &Plan, present: &[NodeIndex]) -> Decode {
        let is_here = |capacity: &&Capacity| present.contains(&capacity.node);
        let machines: Vec<_> =
            plan.capacities.iter().filter(is_here).map(|node| (node.node, node.machine)).collect();
        let scene = Scene {
            facts: &self.facts,
            router: plan.wishes.router,
            fallback_mb_s: 0,
            nodes: &machines,
            popularity: self.popularity.as_ref(),
        };
        let mut decode = scene.decode(&plan.table, DRAWS);
        let mut used = std::mem::take(&mut decode.nodes).into_iter();
        let all = plan.capacities.iter();
        decode.nodes = all
            .map(|node| if is_here(&node) { used.next().unwrap_or_default() } else { NodeUse::default() })
            .collect();
        decode
    }

    /// Bytes that nodes hold by a plan and did not by the one before.
    fn moved_bytes(&self, plan: &Plan) -> u64 {
        let held = |layer: u16, expert: u16, node: NodeIndex, (from, to): (u16, u16)| {
            let before = self.before.iter().flat_map(|plan| plan.table.parts(layer, expert));
            before.filter(|part| part.holders.contains(node)).any(|part| part.from <= from && to <= part.to)
        };
        let mut bytes = 0_u64;
        for (key, part) in plan.table.all() {
            for node in part.holders.as_slice() {
                let is_node = *node != crate::routes::ROUTER;
                if is_node && !held(key.layer, key.expert, *node, (part.from, part.to)) {
                    bytes = bytes.saturating_add(self.facts.slice_bytes(part.from, part.to));
                }
            }
        }
        bytes
    }
}

#[cfg(test)]
mod tests;
