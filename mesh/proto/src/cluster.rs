//! The router's view of its nodes: who is here, who holds what, who is trusted with calls.
//!
//! Nodes come, load what the plan gives them, may go silent, go away and come back. The router wants one table
//! that is true at every moment (`Routes`), and every change of it must leave a state in which each call can be
//! answered. The idea is two plans at most: the one in use and the next. Nodes serve both; the next one comes into
//! use when every node of it that is still here has answered, so no expert is unserved because of a change. All
//! else is a filter over the plan in use: an expert is routed to its holders while they are connected, have
//! acknowledged this epoch, and are neither suspect nor on their way out; without any the router computes it.
//!
//! The price: one slow loader holds back a new plan (at most `SWITCH_WAIT_MAX`), and plans never overlap, so
//! a node that joins during a change waits for the next one. This module refuses to move experts because a node was
//! lost: their bytes are on the router, and a restart is more frequent than a loss for good.

use std::sync::Arc;
use std::time::Duration;

use mesh_wire::control::{Health, Hello, Placed, Placement};

use crate::claims::{Claims, believable, bounded};
use crate::facts::{LinkSpeed, Member, ModelFacts};
use crate::health::{Budget, Flaps, Speed, Trust};
use crate::heat::Heat;
use crate::machine::{Capacity, Machine};
use crate::placement::{Outlook, Plan, Wishes, plan};
use crate::routes::{NodeIndex, Routes, Table};
pub use crate::status::{NodeState, NodeStatus};
use crate::stored::Stored;

/// Longest wait of a new plan for a connected node that does not answer its placement. A node of a home cluster
/// reads 20 GB from a slow disk in five minutes; until then the old plan serves, so waiting costs nothing but
/// the help of the new node.
pub const SWITCH_WAIT_MAX: Duration = Duration::from_secs(600);

/// Largest epoch that is believed of a node. Epochs grow by one per plan; more than this is a broken or hostile
/// node, and counting on from it could overflow.
pub const EPOCH_MAX: u64 = 1 << 48;

/// Times a node may send what no correct node sends before it is left out until the operator pardons it. One may be a
/// defect of this program; three are a broken machine or a hostile one.
pub const MALFORMED_MAX: u32 = 3;

/// Wrong answers that leave a node out. Kernels of the exact class give one result everywhere, and the router proves it
/// twice before it says so: this is no suspicion that more of the same would confirm. A machine that computed wrongly
/// once, whether it lies or its memory fails, changes text every time it does, and nobody notices; that it may be a
/// good machine with one bad bit costs its help until somebody has looked at it.
pub const WRONG_MAX: u32 = 1;

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
    /// It sent something that no correct node sends: a reply of the wrong shape, a frame that does not parse.
    Malformed(NodeIndex),
    /// It answered a call wrongly, which was proven by computing it here; the text says where and what follows from it.
    Lied(NodeIndex, String),
    /// It is going to stop and wants no more calls.
    Leaving(NodeIndex),
    /// Its link was measured.
    Linked(NodeIndex, LinkSpeed),
    /// The operator shut it out for good; its key is no longer in the roster.
    Revoked(NodeIndex),
    /// The operator lets a quarantined node back in.
    Pardon(NodeIndex),
    /// The operator wants a plan for the nodes that are here now, without waiting for more.
    Plan,
    /// Time passed. Expected several times a second: pauses and waits end with a tick.
    Tick,
}

/// What to do about it.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Send this placement.
    Place(NodeIndex, Placement),
    /// Close the connection, telling the node why. No `Lost` is expected for it.
    Disconnect(NodeIndex, String),
    /// `routes()` changed; hand the new table to the dispatcher.
    RoutesChanged,
    /// Something the operator should read in the log about this node.
    Report(NodeIndex, String),
}

/// When the first plan is made, and who may take part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Connected nodes that make it; `usize::MAX`: all of the roster, as it is then.
    pub plan_at_nodes: usize,
    /// Time since the first event after which it is made for whoever is here, once somebody is.
    pub plan_after: Duration,
    /// Whether nodes must compute the bits of the definition.
    pub require_exact: bool,
    /// How long a plan waits for the link of a node that just joined to be measured.
    pub measure_within: Duration,
    /// What plans are to be like.
    pub wishes: Wishes,
}

/// Waits for the whole roster, for a minute; exact nodes only; one whole copy of each expert.
impl Default for Policy {
    fn default() -> Policy {
        Policy {
            plan_at_nodes: usize::MAX,
            plan_after: Duration::from_secs(60),
            require_exact: true,
            measure_within: Duration::ZERO,
            wishes: Wishes::default(),
        }
    }
}

/// The state machine. See `Cluster::handle`.
#[derive(Debug)]
pub struct Cluster {
    members: Vec<Member>,
    facts: ModelFacts,
    policy: Policy,
    /// Time of the first event.
    started: Option<Duration>,
    /// One per member.
    nodes: Vec<Node>,
    /// The plan in use.
    current: Option<Stage>,
    /// The plan nodes are loading; not without `current`.
    next: Option<Stage>,
    /// Whether a plan should be made as soon as none is being loaded.
    plan_wanted: bool,
    /// Whether `current` is an earlier router's: nobody is planned for before those who come back had the time to.
    restored: bool,
    routes: Arc<Routes>,
}

#[derive(Debug, Default)]
struct Node {
    link: Option<Link>,
    note: String,
    /// Times it sent what no correct node sends; kept over reconnects.
    malformed: u32,
    /// Times it was proven wrong; kept over reconnects.
    wrong: u32,
    /// Kept over reconnects, or a node could reconnect to be asked again.
    heat: Heat,
    flaps: Flaps,
    /// It lost its connection too often, and gets no calls for now.
    barred: bool,
    revoked: bool,
}

impl Node {
    fn is_quarantined(&self) -> bool {
        self.malformed >= MALFORMED_MAX || self.wrong >= WRONG_MAX
    }
}

/// A connection that passed the checks.
#[derive(Debug)]
struct Link {
    hello: Hello,
    /// Where it stands with `Cluster::current`.
    current: Order,
    /// Where it stands with `Cluster::next`.
    next: Order,
    /// It refused a placement. It is left out of plans until it reconnects or the operator asks for a plan;
    /// planning with it again and again would reload the others for nothing.
    declined: bool,
    epoch: u64,
    weight_bytes: u64,
    health: Option<Health>,
    trust: Trust,
    speed: Speed,
    joined: Duration,
    measured: LinkSpeed,
    /// It said that it is going to stop.
    leaving: bool,
}

impl Link {
    fn is_measured(&self) -> bool {
        self.measured != LinkSpeed::default()
    }

    fn capacity(&self, node: NodeIndex) -> Capacity {
        let machine = Machine { weight_mb_s: self.speed.weight_mb_s, link: self.measured };
        Capacity { node, memory_bytes: self.hello.memory_bytes, machine }
    }
}

/// A placement on its way to be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    NotSent,
    Sent,
    Held,
    Refused,
}

#[derive(Debug)]
struct Stage {
    epoch: u64,
    since: Duration,
    plan: Plan,
}

impl Cluster {
    /// A cluster whose nodes have all yet to come, with the default policy: every expert is the router's own.
    pub fn new(members: Vec<Member>, facts: ModelFacts) -> Cluster {
        Cluster::with_policy(members, facts, Policy::default())
    }

    /// As `new`, with a policy.
    pub fn with_policy(members: Vec<Member>, facts: ModelFacts, policy: Policy) -> Cluster {
        let routes = Arc::new(Routes { table: Table::empty(&facts), ..Routes::default() });
        let nodes = members.iter().map(|_| Node::default()).collect();
        Cluster {
            members,
            facts,
            policy,
            started: None,
            nodes,
            current: None,
            next: None,
            plan_wanted: false,
            restored: false,
            routes,
        }
    }

    /// Takes up an earlier router's plan: nodes that come back are asked for what they hold. Before the first event, and
    /// with all members that the plan names.
    pub fn restore(&mut self, stored: Stored) {
        let Stored { epoch, plan } = stored;
        if epoch < EPOCH_MAX {
            self.current = Some(Stage { epoch, since: Duration::ZERO, plan });
            self.restored = true;
        }
    }

    /// Takes in one event at time `now` (since an arbitrary start, never going back).
    ///
    /// Events about nodes outside the roster, and about connections that are gone, are ignored: events of the
    /// network may cross. At most three actions per member and two more come back.
    pub fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        self.started.get_or_insert(now);
        let mut actions = Vec::new();
        match event {
            Event::Answered { node, assignments, service, round_trip } => {
                if let Some(link) = self.link(node) {
                    link.trust.answered(assignments, service, round_trip);
                }
                return actions;
            }
            Event::Health(node, health) => {
                if !self.heard(now, (node, health), &mut actions) {
                    return actions;
                }
            }
            Event::Missed(node) => {
                if !self.link(node).is_some_and(|link| link.trust.missed(now)) {
                    return actions;
                }
                let note = "calls went unanswered; it gets no more until it is tried again";
                self.report(node, note.into(), &mut actions);
            }
            Event::Malformed(node) => self.malformed(node, &mut actions),
            Event::Lied(node, how) => self.lied(node, &how, &mut actions),
            Event::Leaving(node) => {
                if let Some(link) = self.link(node) {
                    link.leaving = true;
                }
            }
            Event::Linked(node, measured) => {
                if let Some(link) = self.link(node) {
                    link.measured = measured;
                    link.speed.round_trip = Duration::from_micros(u64::from(measured.round_trip_us));
                }
            }
            Event::Revoked(node) => {
                if let Some(entry) = self.nodes.get_mut(usize::from(node)) {
                    entry.revoked = true;
                    if entry.link.take().is_some() {
                        let reason = "the operator revoked this node's key".to_owned();
                        actions.push(Action::Disconnect(node, reason));
                    }
                    self.replace(node);
                }
            }
            Event::Pardon(node) => self.pardon(node),
            Event::Joined(node, hello) => {
                // A connection that is replaced was lost, though nobody noticed.
                self.lost(now, node, &mut actions);
                self.joined(now, (node, hello), &mut actions);
            }
            Event::Lost(node) => self.lost(now, node, &mut actions),
            Event::Placed(node, placed) => self.placed(node, placed, &mut actions),
            Event::Plan => {
                (self.plan_wanted, self.restored) = (true, false);
                self.nodes
                    .iter_mut()
                    .filter_map(|node| node.link.as_mut())
                    .for_each(|link| link.declined = false);
            }
            Event::Tick => self.tick(now, &mut actions),
        }
        self.advance(now, &mut actions);
        self.refresh(&mut actions);
        actions
    }

    /// Takes a new machine in; it has yet to come.
    pub fn admit(&mut self, member: Member) -> NodeIndex {
        self.members.push(member);
        self.nodes.push(Node::default());
        (self.nodes.len() - 1) as NodeIndex
    }

    /// The table to dispatch by.
    pub fn routes(&self) -> Arc<Routes> {
        Arc::clone(&self.routes)
    }

    /// How long a call may take at this node before others are asked (DESIGN section 8). `assignments` counts what
    /// the node has to compute before it can answer: the call's own and those of calls still out to it.
    pub fn budget(&self, node: NodeIndex, assignments: u32) -> Budget {
        let link = self.nodes.get(usize::from(node)).and_then(|node| node.link.as_ref());
        match link {
            Some(link) => link.trust.budget(assignments, &link.speed),
            None => Trust::default().budget(assignments, &Speed::default()),
        }
    }

    /// The roster, in the order of `NodeIndex`.
    pub fn members(&self) -> &[Member] {
        &self.members
    }

    /// Epoch in use; 0 before the first plan.
    pub fn epoch(&self) -> u64 {
        self.routes.epoch
    }

    /// Epoch that nodes are loading, if any.
    pub fn next_epoch(&self) -> Option<u64> {
        self.next.as_ref().map(|stage| stage.epoch)
    }

    /// The plan in use, in short.
    pub fn outlook(&self) -> Option<Outlook> {
        self.current.as_ref().map(|stage| stage.plan.outlook(stage.epoch, &self.facts))
    }

    /// The newest plan, in use or being loaded: what `restore` takes after a restart. Its epoch tells whether
    /// it is a new one.
    pub fn newest(&self) -> Option<Stored> {
        let newest = self.next.as_ref().or(self.current.as_ref())?;
        Some(Stored { epoch: newest.epoch, plan: newest.plan.clone() })
    }

    /// Epoch of `newest`; 0 without one.
    pub fn newest_epoch(&self) -> u64 {
        self.next.as_ref().or(self.current.as_ref()).map_or(0, |stage| stage.epoch)
    }

    /// The model.
    pub fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    /// Experts that no node is meant to hold: they run on the router for lack of memory, or of a plan.
    pub fn unplaced(&self) -> usize {
        let all = self.facts.moe_layers.len() * usize::from(self.facts.experts);
        self.current.as_ref().map_or(all, |stage| stage.plan.unplaced())
    }

    /// Whether every connected node that is part of the plan in use serves it: the cluster is as good as it
    /// gets without another event.
    pub fn settled(&self) -> bool {
        let Some(current) = &self.current else { return false };
        let loading = |link: &Link| link.current == Order::Sent;
        let part = |node| current.plan.capacity(node).is_some();
        self.next.is_none() && !self.links().any(|(node, link)| part(node) && loading(link))
    }

    /// Whether experts that are out of reach may be back soon, without a machine's return: nodes are loading them, or
    /// are tried again shortly.
    pub fn may_recover(&self) -> bool {
        let shortly = |(_, link): (NodeIndex, &Link)| link.trust.pauses_shortly();
        self.current.is_some() && (!self.settled() || self.links().any(shortly))
    }

    /// How a node is doing; `None` outside the roster.
    pub fn status(&self, node: NodeIndex) -> Option<NodeStatus> {
        let entry = self.nodes.get(usize::from(node))?;
        let link = entry.link.as_ref();
        let experts = self.current.as_ref().map_or(0, |stage| stage.plan.load(node).experts);
        let state = match link {
            _ if entry.revoked => NodeState::Revoked,
            _ if entry.is_quarantined() => NodeState::Quarantined,
            None => NodeState::Absent,
            Some(link) if link.leaving => NodeState::Leaving,
            Some(link) if entry.barred || link.trust.is_suspect() => NodeState::Suspect,
            Some(link) => match (link.current, link.next) {
                (Order::Held, _) => NodeState::Serving,
                _ if link.declined => NodeState::Refused,
                (Order::NotSent, Order::NotSent) => NodeState::Waiting,
                _ => NodeState::Loading,
            },
        };
        Some(NodeStatus {
            state,
            epoch: link.map_or(0, |link| link.epoch),
            experts,
            weight_bytes: link.map_or(0, |link| link.weight_bytes),
            hello: link.map(|link| link.hello.clone()),
            health: link.and_then(|link| link.health),
            spared: link.is_some() && entry.heat.is_hot(),
            call_means: link.and_then(|link| link.trust.means()),
            link: link.map_or_else(LinkSpeed::default, |link| link.measured),
            note: entry.note.clone(),
        })
    }

    /// `status` of every member, in the order of `NodeIndex`.
    pub fn statuses(&self) -> Vec<NodeStatus> {
        (0..).map_while(|node| self.status(node)).collect()
    }

    fn link(&mut self, node: NodeIndex) -> Option<&mut Link> {
        self.nodes.get_mut(usize::from(node))?.link.as_mut()
    }

    fn links(&self) -> impl Iterator<Item = (NodeIndex, &Link)> {
        (0..).zip(&self.nodes).filter_map(|(index, node)| Some((index, node.link.as_ref()?)))
    }

    fn report(&mut self, node: NodeIndex, note: String, actions: &mut Vec<Action>) {
        if let Some(entry) = self.nodes.get_mut(usize::from(node)) {
            entry.note.clone_from(&note);
            actions.push(Action::Report(node, note));
        }
    }

    /// Why a node may not take part, with the remedy.
    fn objection(&self, hello: &Hello) -> Option<String> {
        if hello.model != self.facts.fingerprint {
            let short =
                |hash: &[u8; 32]| hash[..4].iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            return Some(format!(
                "the node has model {}, the router serves {}: start both with the same --model and --weights",
                short(&hello.model),
                short(&self.facts.fingerprint),
            ));
        }
        if self.policy.require_exact && !hello.exact {
            return Some(format!(
                "kernels '{}' do not compute the exact bits that the router promises: start the node with \
                 --kernels exact, or the router with --kernels fastest",
                hello.kernels
            ));
        }
        (hello.held_epoch >= EPOCH_MAX).then(|| {
            format!("the node claims to hold epoch {}, which cannot be: restart the node", hello.held_epoch)
        })
    }

    fn joined(&mut self, now: Duration, (node, hello): (NodeIndex, Hello), actions: &mut Vec<Action>) {
        if usize::from(node) >= self.nodes.len() {
            return;
        }
        let entry = &mut self.nodes[usize::from(node)];
        entry.link = None;
        if entry.revoked {
            actions.push(Action::Disconnect(node, "the operator revoked this node's key".into()));
            return;
        }
        if !entry.is_quarantined() && !entry.barred {
            entry.note.clear();
        }
        if let Some(reason) = self.objection(&hello) {
            self.nodes[usize::from(node)].note.clone_from(&reason);
            actions.push(Action::Disconnect(node, reason));
            return;
        }
        let (hello, claims) = bounded(hello);
        // Who claims what cannot be is not believed in anything: its speed is unknown.
        let weight_mb_s =
            if matches!(claims, Claims::Cut(_)) { Default::default() } else { hello.weight_mb_s };
        self.outgrow(hello.held_epoch, actions);
        let memory_bytes = hello.memory_bytes;
        let mut link = Link {
            speed: Speed {
                weight_mb_s,
                expert_bytes: self.facts.expert_bytes,
                per_layer: 0,
                round_trip: Duration::ZERO,
            },
            hello,
            current: Order::NotSent,
            next: Order::NotSent,
            declined: false,
            epoch: 0,
            weight_bytes: 0,
            health: None,
            trust: Trust::default(),
            joined: now,
            measured: LinkSpeed::default(),
            leaving: false,
        };
        // Its part of the newest plan, if that plan still fits what it has. An older plan would only be loaded
        // to be dropped.
        let newest = if self.next.is_some() {
            (&self.next, &mut link.next)
        } else {
            (&self.current, &mut link.current)
        };
        match newest {
            (Some(stage), order) if stage.plan.suits(node, memory_bytes, &self.facts) => {
                *order = Order::Sent;
                link.speed.per_layer = per_layer(&stage.plan, node);
                actions.push(place(&self.facts, stage, node));
            }
            (None, _) => {}
            (Some(_), _) => self.plan_wanted |= !self.nodes[usize::from(node)].is_quarantined(),
        }
        self.nodes[usize::from(node)].link = Some(link);
        match claims {
            Claims::Sound => {}
            // Why it is left out matters more.
            _ if self.nodes[usize::from(node)].is_quarantined() => {}
            Claims::Unmeasured(note) => self.nodes[usize::from(node)].note = note,
            Claims::Cut(note) => self.report(node, note, actions),
        }
    }

    /// An earlier router's plan that is older than what a node holds was not its last. It gets an epoch beyond all, and
    /// nodes that are here are asked again.
    fn outgrow(&mut self, held_epoch: u64, actions: &mut Vec<Action>) {
        let Some(stage) = self.current.as_mut().filter(|stage| self.restored && stage.epoch < held_epoch)
        else {
            return;
        };
        stage.epoch = held_epoch + 1;
        for (node, entry) in (0..).zip(&mut self.nodes) {
            let Some(link) = entry.link.as_mut().filter(|link| link.current != Order::NotSent) else {
                continue;
            };
            link.current = Order::Sent;
            actions.push(place(&self.facts, stage, node));
        }
    }

    /// Its connection is gone. If that happens again and again, the routes shall not flap with it.
    fn lost(&mut self, now: Duration, node: NodeIndex, actions: &mut Vec<Action>) {
        let Some(entry) = self.nodes.get_mut(usize::from(node)) else { return };
        let Some(link) = entry.link.take().filter(|link| !link.leaving) else { return };
        drop(link);
        let Some(pause) = entry.flaps.lost(now) else { return };
        entry.barred = true;
        if entry.is_quarantined() {
            return;
        }
        let note =
            format!("its connection was lost again and again; it gets no calls for {} s", pause.as_secs());
        self.report(node, note, actions);
    }

    fn malformed(&mut self, node: NodeIndex, actions: &mut Vec<Action>) {
        let Some(entry) = self.nodes.get_mut(usize::from(node)) else { return };
        entry.malformed = entry.malformed.saturating_add(1);
        if entry.malformed == MALFORMED_MAX {
            let note = format!(
                "sent what no correct node sends, {MALFORMED_MAX} times; it is left out until `moemesh nodes pardon`"
            );
            self.report(node, note, actions);
            self.replace(node);
        }
    }

    fn lied(&mut self, node: NodeIndex, how: &str, actions: &mut Vec<Action>) {
        let Some(entry) = self.nodes.get_mut(usize::from(node)) else { return };
        entry.wrong = entry.wrong.saturating_add(1);
        if entry.wrong == WRONG_MAX {
            self.report(node, format!("{how}; it is left out until `moemesh nodes pardon`"), actions);
            self.replace(node);
        }
    }

    /// Takes in a report. True if it changes who is to be asked.
    fn heard(
        &mut self,
        now: Duration,
        (node, health): (NodeIndex, Health),
        actions: &mut Vec<Action>,
    ) -> bool {
        let Some(entry) = self.nodes.get_mut(usize::from(node)) else { return false };
        let Some(link) = &mut entry.link else { return false };
        let vitals = believable(health.vitals);
        link.health = Some(Health { vitals, ..health });
        let Some(change) = entry.heat.report(now, vitals) else { return false };
        actions.push(Action::Report(node, change.to_string()));
        true
    }

    /// A node will not serve any more; the others shall hold what it was to hold.
    fn replace(&mut self, node: NodeIndex) {
        let newest = self.next.as_ref().or(self.current.as_ref());
        self.plan_wanted |= newest.is_some_and(|stage| stage.plan.load(node).experts > 0);
    }

    /// The operator lets a node back in. It is planned for, if the plan was made without it.
    fn pardon(&mut self, node: NodeIndex) {
        let newest = self.next.as_ref().or(self.current.as_ref());
        let without = newest.is_some_and(|stage| stage.plan.capacity(node).is_none());
        let Some(entry) = self.nodes.get_mut(usize::from(node)) else { return };
        self.plan_wanted |= entry.is_quarantined() && entry.link.is_some() && without;
        (entry.malformed, entry.wrong) = (0, 0);
        entry.note.clear();
    }

    fn placed(&mut self, node: NodeIndex, placed: Placed, actions: &mut Vec<Action>) {
        let is = |stage: &Option<Stage>| stage.as_ref().is_some_and(|stage| stage.epoch == placed.epoch);
        let (current, next) = (is(&self.current), is(&self.next));
        let Some(link) = self.link(node) else { return };
        let order = match (current, next) {
            (true, _) => &mut link.current,
            (_, true) => &mut link.next,
            _ => return,
        };
        if *order != Order::Sent {
            return;
        }
        if placed.refusal.is_empty() {
            *order = Order::Held;
            link.epoch = placed.epoch;
            link.weight_bytes = placed.weight_bytes;
            return;
        }
        *order = Order::Refused;
        link.declined = true;
        // The others may have room for its part. It is asked again when it reconnects.
        self.plan_wanted = true;
        let note = format!("refused its placement: {}; its experts stay on the router", placed.refusal);
        self.report(node, note, actions);
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<Action>) {
        for (index, node) in (0..).zip(&mut self.nodes) {
            let pardoned = node.barred && !node.flaps.is_barred(now);
            node.barred &= !pardoned;
            if node.link.as_mut().is_some_and(|link| link.trust.tick(now) || pardoned) {
                actions.push(Action::Report(index, "is tried again".into()));
            }
        }
    }

    /// Takes the next plan into use when all have answered, then makes a plan if one is due. Each at most once
    /// per event; a plan that is due and not made now is made at a later event.
    fn advance(&mut self, now: Duration, actions: &mut Vec<Action>) {
        if let Some(next) = &self.next {
            let waited = now.saturating_sub(next.since) >= SWITCH_WAIT_MAX;
            if waited || !self.links().any(|(_, link)| link.next == Order::Sent) {
                self.current = self.next.take();
                for link in self.nodes.iter_mut().filter_map(|node| node.link.as_mut()) {
                    link.current = std::mem::replace(&mut link.next, Order::NotSent);
                }
            }
        }
        if self.next.is_none() && self.plan_is_due(now) {
            self.make_plan(now, actions);
        }
    }

    fn plan_is_due(&self, now: Duration) -> bool {
        let measured =
            |link: &Link| now.saturating_sub(link.joined) >= self.policy.measure_within || link.is_measured();
        if !self.links().all(|(_, link)| measured(link)) {
            return false;
        }
        let started = self.current.is_some() && !self.restored;
        if started || self.plan_wanted && self.current.is_none() {
            return self.plan_wanted;
        }
        if self.restored && !self.plan_wanted {
            return false;
        }
        let enough = match self.policy.plan_at_nodes {
            usize::MAX => self.nodes.iter().filter(|node| !node.revoked).count(),
            nodes => nodes,
        };
        let waited = now.saturating_sub(self.started.unwrap_or(now));
        self.links().count() >= enough || waited >= self.policy.plan_after
    }

    /// Plans for the nodes that are here and did not refuse. Without any, the wish for a plan stays.
    fn make_plan(&mut self, now: Duration, actions: &mut Vec<Action>) {
        let willing = self.links().filter(|(node, link)| {
            !link.declined && !link.leaving && !self.nodes[usize::from(*node)].is_quarantined()
        });
        let capacities: Vec<_> = willing.map(|(node, link)| link.capacity(node)).collect();
        if capacities.is_empty() {
            return;
        }
        self.plan_wanted = false;
        let used = self.current.as_ref().map_or(0, |stage| stage.epoch);
        let epoch = self.links().map(|(_, link)| link.hello.held_epoch).fold(used, u64::max) + 1;
        let before = self.current.as_ref().map(|stage| &stage.plan);
        let plan = plan(&self.facts, &capacities, &self.policy.wishes, before);
        self.restored = false;
        for node in plan.left_out(&self.facts).collect::<Vec<_>>() {
            let note =
                "would make every token slower by computing; it holds copies of others' experts at most";
            self.report(node, note.to_owned(), actions);
        }
        let stage = Stage { epoch, since: now, plan };
        let first = self.current.is_none();
        for capacity in &capacities {
            let Some(link) = self.link(capacity.node) else { continue };
            *(if first { &mut link.current } else { &mut link.next }) = Order::Sent;
            link.speed.per_layer = link.speed.per_layer.max(per_layer(&stage.plan, capacity.node));
            actions.push(place(&self.facts, &stage, capacity.node));
        }
        *(if first { &mut self.current } else { &mut self.next }) = Some(stage);
    }

    /// Recomputes the table and reports if it changed.
    fn refresh(&mut self, actions: &mut Vec<Action>) {
        let Some(current) = &self.current else { return };
        let serves: Vec<bool> = self
            .nodes
            .iter()
            .map(|node| {
                let serves =
                    |link: &Link| link.current == Order::Held && !link.leaving && !link.trust.is_suspect();
                !node.is_quarantined() && !node.barred && node.link.as_ref().is_some_and(serves)
            })
            .collect();
        let table =
            current.plan.table.filtered(|node| serves.get(usize::from(node)).is_some_and(|serves| *serves));
        let hot =
            (0..).zip(&self.nodes).zip(&serves).filter(|((_, node), serves)| **serves && node.heat.is_hot());
        let spared = hot.map(|((index, _), _)| index).collect();
        let routes = Routes { epoch: current.epoch, table, spared };
        if routes != *self.routes {
            self.routes = Arc::new(routes);
            actions.push(Action::RoutesChanged);
        }
    }
}

fn per_layer(plan: &Plan, node: NodeIndex) -> u32 {
    u32::try_from(plan.load(node).per_layer).unwrap_or(u32::MAX)
}

fn place(facts: &ModelFacts, stage: &Stage, node: NodeIndex) -> Action {
    let experts = stage.plan.experts(node);
    Action::Place(node, Placement { epoch: stage.epoch, model: facts.fingerprint, experts })
}

#[cfg(test)]
mod tests;
