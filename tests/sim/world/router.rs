//! The router's side of connections and control messages, as `hub` has them, around the real `Cluster`; and what must be
//! true of every routing table.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use mesh_proto::cluster::{Action, Cluster, Event, NodeState, Patience, Policy, Why};
use mesh_proto::facts::{Member, ModelFacts};
use mesh_proto::machine;
use mesh_proto::placement::{Copies, Wishes};
use mesh_proto::routes::{NodeIndex, ROUTER, Routes};
use mesh_proto::stored::Stored;
use mesh_wire::control::{Hello, Placed};
use mesh_wire::id::NodeId;

use super::{Control, Happening, Order, Way, World};
use crate::dice::Dice;
use crate::machine::Machine;

#[derive(Debug)]
struct Connection {
    id: u64,
    heard_at: Duration,
    memory_bytes: u64,
    /// Epochs it was told to load and said it has.
    ordered: BTreeSet<u64>,
    acknowledged: BTreeSet<u64>,
}

/// The roster.
pub(crate) fn members(nodes: usize) -> Vec<Member> {
    (0..nodes).map(|key| Member { id: NodeId([key as u8; 32]), name: format!("n{key}") }).collect()
}

/// What the operator of a seed wants.
pub(crate) fn policy(nodes: u64, facts: &ModelFacts, dice: &mut Dice) -> Policy {
    let copies = if dice.chance(300) { Copies::Auto } else { Copies::Exactly(dice.between(1, 4) as u8) };
    let router_experts = if dice.chance(300) { dice.roll(u64::from(facts.experts) + 1) as u16 } else { 0 };
    let speed = if dice.chance(500) { dice.between(200, 4000) as u32 } else { 0 };
    let router = machine::Machine { weight_mb_s: [speed; 5], ..machine::Machine::default() };
    // Some operators are patient, some tests are not.
    let patience = Patience {
        steady: dice.millis(0, 2000),
        at_latest: dice.millis(0, 10_000),
        unserved: dice.millis(0, 5000),
        lost: dice.millis(3000, 30_000),
        reconsider: dice.millis(1000, 20_000),
    };
    Policy {
        patience,
        plan_at_nodes: 1 + dice.roll(nodes + 1) as usize,
        plan_after: dice.millis(0, 4000),
        require_exact: true,
        measure_within: if dice.chance(500) { dice.millis(0, 2000) } else { Duration::ZERO },
        wishes: Wishes { copies, slices: dice.chance(500), router_experts, router },
    }
}

#[derive(Debug)]
pub(crate) struct Router {
    pub(crate) cluster: Cluster,
    connections: Vec<Option<Connection>>,
    reported: Arc<Routes>,
    stored_epoch: u64,
    /// Times each node sent what no correct node sends.
    pub(crate) malformed: Vec<u32>,
    /// The operator waits with a new plan for the last machine.
    pub(crate) plan_when_all_are_here: bool,
    /// Which start of the router it is: plans of an earlier one are nobody's.
    pub(crate) life: u64,
    /// Epoch whose change was counted.
    seen: u64,
}

impl Router {
    /// A router that starts, with the plan of an earlier one if it has it.
    pub(crate) fn new(facts: &ModelFacts, policy: Policy, nodes: usize, stored: Option<Stored>) -> Router {
        let mut cluster = Cluster::with_policy(members(nodes), facts.clone(), policy);
        if let Some(stored) = stored {
            cluster.restore(stored);
        }
        Router {
            reported: cluster.routes(),
            stored_epoch: 0,
            cluster,
            connections: (0..nodes).map(|_| None).collect(),
            malformed: vec![0; nodes],
            plan_when_all_are_here: false,
            life: 0,
            seen: 0,
        }
    }

    /// A machine joins the cluster; it has yet to come.
    pub(crate) fn admit(&mut self) {
        let all = members(self.connections.len() + 1);
        self.cluster.admit(all[all.len() - 1].clone());
        self.connections.push(None);
        self.malformed.push(0);
    }

    /// The connection to a node, as this side sees it.
    pub(crate) fn connection(&self, node: NodeIndex) -> Option<u64> {
        self.connections[usize::from(node)].as_ref().map(|connection| connection.id)
    }

    pub(crate) fn connect(&mut self, node: NodeIndex, id: u64, now: Duration, hello: &Hello) {
        let (ordered, acknowledged) = (BTreeSet::new(), BTreeSet::new());
        let memory_bytes = hello.memory_bytes;
        let connection = Connection { id, heard_at: now, memory_bytes, ordered, acknowledged };
        self.connections[usize::from(node)] = Some(connection);
    }

    pub(crate) fn close(&mut self, node: NodeIndex) {
        self.connections[usize::from(node)] = None;
    }

    pub(crate) fn heard(&mut self, node: NodeIndex, now: Duration) {
        if let Some(connection) = &mut self.connections[usize::from(node)] {
            connection.heard_at = now;
        }
    }

    pub(crate) fn silent_since(&self, node: NodeIndex) -> Option<Duration> {
        self.connections[usize::from(node)].as_ref().map(|connection| connection.heard_at)
    }

    /// Notes what a node said, before the cluster hears it.
    pub(crate) fn placed(&mut self, node: NodeIndex, placed: &Placed) {
        let Some(connection) = &mut self.connections[usize::from(node)] else { return };
        if placed.refusal.is_empty() && connection.ordered.contains(&placed.epoch) {
            connection.acknowledged.insert(placed.epoch);
        }
    }

    /// Whether the routes name a node.
    pub(crate) fn serves(&self, node: NodeIndex) -> bool {
        self.reported.table.held_by(node).next().is_some()
    }

    /// Whoever is routed to is here, is trusted, and said on this connection that it holds the epoch.
    fn check_routes(&self, routes: &Routes) {
        assert!(routes.epoch >= self.reported.epoch, "the epoch went back");
        let states: Vec<NodeState> = self.cluster.statuses().iter().map(|status| status.state).collect();
        for (key, part) in routes.table.all() {
            for node in part.holders.as_slice().iter().copied().filter(|node| *node != ROUTER) {
                let index = usize::from(node);
                let Some(connection) = &self.connections[index] else {
                    panic!("{key:?} is routed to {node}, which is away")
                };
                assert!(
                    connection.acknowledged.contains(&routes.epoch),
                    "{node} never said it holds {}",
                    routes.epoch
                );
                let fine = matches!(states[index], NodeState::Serving | NodeState::Leaving);
                assert!(fine, "{key:?} is routed to {node}, which is {}", states[index]);
                assert!(self.malformed[index] < mesh_proto::cluster::MALFORMED_MAX, "{node} is quarantined");
            }
        }
    }
}

impl World {
    /// Tells the cluster, and does what it says.
    pub(crate) fn handle(&mut self, event: Event) {
        if let Event::Pardon(node) = event {
            self.router.malformed[usize::from(node)] = 0;
        }
        let now = self.now;
        let told = (!matches!(event, Event::Tick | Event::Health(..))).then(|| format!("{event:?}"));
        let actions = self.router.cluster.handle(now, event);
        if let Some(told) = told {
            let actions: Vec<String> = actions.iter().map(brief).collect();
            self.trace.note(now, format_args!("  {told} -> {actions:?}"));
        }
        assert!(actions.len() <= 3 * self.machines.len() + 3, "{actions:?}");
        self.store_plan();
        let mut changed = false;
        for action in actions {
            match action {
                Action::Place(node, placement) => {
                    let connection = self.router.connections[usize::from(node)].as_mut();
                    let connection = connection.expect("orders go to nodes that are here");
                    let bytes: u64 = placement
                        .experts
                        .iter()
                        .map(|slice| self.facts.slice_bytes(slice.from, slice.to))
                        .sum();
                    assert!(bytes <= connection.memory_bytes, "{node} is to hold {bytes} bytes");
                    connection.ordered.insert(placement.epoch);
                    let id = connection.id;
                    self.say(node, Way::Out, id, Control::Place(Order(placement)));
                }
                Action::Disconnect(node, _) => {
                    self.router.close(node);
                    self.fail_calls(node);
                }
                Action::RoutesChanged => changed = true,
                Action::Report(..) => {}
                Action::Plan(task) => {
                    let (router, delay) = (self.router.life, self.dice.millis(0, 200));
                    self.at(delay, Happening::Planned { router, task });
                }
            }
        }
        self.count_change();
        let routes = self.router.cluster.routes();
        assert_eq!(
            changed,
            routes != self.router.reported,
            "changes of the routes are told, and nothing else is"
        );
        if changed {
            self.router.check_routes(&routes);
            self.router.reported = routes;
        }
        let here = |(node, machine): (&Option<Connection>, &Machine)| node.is_some() || machine.dead;
        let mut all = self.router.connections.iter().zip(&self.machines);
        if self.router.plan_when_all_are_here && all.all(here) {
            self.router.plan_when_all_are_here = false;
            self.handle(Event::Plan);
        }
    }

    /// Why the placement in use is another one than before.
    fn count_change(&mut self) {
        let Some(change) = self.router.cluster.last_change().filter(|change| change.epoch > self.router.seen)
        else {
            return;
        };
        self.router.seen = change.epoch;
        let counted = match change.why {
            Why::Joined => &mut self.summary.newcomers_planned,
            Why::Lost => &mut self.summary.stand_ins,
            Why::Leaving => &mut self.summary.handovers,
            Why::Frequencies => &mut self.summary.tuned,
            _ => return,
        };
        *counted += 1;
    }

    /// A new plan goes to the router's disk.
    fn store_plan(&mut self) {
        let epoch = self.router.cluster.newest_epoch();
        if epoch == self.router.stored_epoch {
            return;
        }
        self.router.stored_epoch = epoch;
        if let Some(newest) = self.router.cluster.newest() {
            let members = members(self.machines.len());
            self.stored.push(newest.to_text(&self.facts, &members));
            let surplus = self.stored.len().saturating_sub(3);
            self.stored.drain(..surplus);
        }
    }

    /// Something arrived that no correct node sends.
    pub(crate) fn malformed(&mut self, node: NodeIndex) {
        self.summary.malformed += 1;
        let count = &mut self.router.malformed[usize::from(node)];
        *count += 1;
        self.summary.quarantined += u64::from(*count == mesh_proto::cluster::MALFORMED_MAX);
        self.handle(Event::Malformed(node));
    }

    /// Experts of all layers.
    fn experts(&self) -> u64 {
        u64::from(self.facts.experts) * self.facts.moe_layers.len() as u64
    }

    /// Whether everything is as good as it gets: all nodes are here and serve what they hold, and as many experts have
    /// a holder as fit.
    pub(crate) fn is_placed(&self) -> bool {
        let cluster = &self.router.cluster;
        if self.router.plan_when_all_are_here || !cluster.settled() || cluster.next_epoch().is_some() {
            return false;
        }
        // Both ends know of the same connection: who was replaced, is leaving or died a moment ago is not missed yet.
        let connected = |(machine, node): (&Machine, NodeIndex)| {
            let same = machine.connection == self.router.connection(node);
            match machine.dead {
                true => self.router.connection(node).is_none(),
                false => !machine.leaving && machine.connection.is_some() && same,
            }
        };
        if !self.machines.iter().zip(0..).all(connected) {
            return false;
        }
        // With slices more may fit, and experts of the router need no room.
        let alive = || self.machines.iter().filter(|machine| !machine.dead);
        let room: u64 = alive().map(|machine| machine.memory_bytes / self.facts.expert_bytes).sum();
        let is_dead = |node: NodeIndex| self.machines[usize::from(node)].dead;
        let routes = cluster.routes();
        let all = routes.table.all().count() as u64;
        let held = routes.table.all().filter(|(_, part)| !part.holders.is_empty()).count() as u64;
        let states = cluster.statuses();
        let newest = cluster.newest();
        let planned = |node| newest.as_ref().is_some_and(|newest| newest.plan.capacity(node).is_some());
        if !(0..self.machines.len() as NodeIndex).all(|node| is_dead(node) || planned(node)) {
            return false;
        }
        let out = |state| {
            use NodeState::{Absent, Leaving, Loading, Suspect};
            matches!(state, Suspect | Loading | Absent | Leaving)
        };
        let whole = routes.table.all().all(|(_, part)| (part.from, part.to) == (0, self.facts.blocks));
        let fits = if whole { held >= all.min(room) } else { held == all || room < self.experts() };
        fits && !(0..).zip(&states).any(|(node, status)| !is_dead(node) && out(status.state))
    }
}

/// An action for the trace.
fn brief(action: &Action) -> String {
    match action {
        Action::Place(node, placement) => format!("place {node}: {:?}", Order(placement.clone())),
        Action::Disconnect(node, reason) => format!("disconnect {node}: {reason}"),
        Action::RoutesChanged => "routes".to_owned(),
        Action::Report(node, text) => format!("report {node}: {text}"),
        Action::Plan(task) => format!("plan {}", task.ticket),
    }
}
