//! The router's view of its nodes: who is here, who holds what, who is trusted with calls.
//!
//! Nodes come, load what the plan gives them, may go silent, go away and come back. The router wants one table
//! that is true at every moment (`Routes`), and every change of it must leave a state in which each call can be
//! answered. The idea is two plans at most: the one in use and the next. Nodes serve both; the next one comes into
//! use when every node of it that is still here has answered, and only if it then leaves no more to the router than the
//! one in use: so no expert is unserved because of a change. All else is a filter over the plan in use: an expert is
//! routed to its holders while they are connected, have acknowledged this epoch, and are neither suspect nor released;
//! without any the router computes it.
//!
//! When plans are made is in `plans`, what nodes do in `nodes`. Planning itself is handed out (`Action::Plan`), because
//! it takes longer than a token. A node that is away keeps its place: others get what only it held beside what they
//! have (`standin`), and it finds its part when it comes back.
//!
//! The price: one slow loader holds back a new plan, for `SWITCH_WAIT_MAX` without progress and `LOADING_MAX` with it,
//! and plans never overlap, so a node that joins during a change waits for the next one.

mod plans;

mod nodes;

mod stage;

use std::sync::Arc;
use std::time::Duration;

use mesh_wire::control::{Health, Hello, Loading, Placed, Placement};

use self::nodes::{Cover, Link, Node, Order};
use self::plans::Errand;
use self::stage::Stage;
pub use crate::changes::{Change, HANDOVER_MAX, Patience, Why};
use crate::facts::{LinkSpeed, Member, ModelFacts};
use crate::health::{Budget, Speed, Trust};
use crate::placement::{Outlook, Wishes};
use crate::planner::{Proposal, Task};
use crate::popularity::{Counts, Popularity};
use crate::routes::{NodeIndex, Routes, Table};
pub use crate::status::{NodeState, NodeStatus};
use crate::stored::Stored;

/// Longest wait of a new plan for a connected node that shows no progress with its placement. The longest that a node
/// has nothing to show for is that its router computes the hashes of what it is to fetch: 20 GB of slices, read from a
/// disk at 40 MB/s. Until then the old plan serves, so waiting costs nothing but the help of the new node. This long, too,
/// everything else waits behind a plan that is loaded; from then on, what cannot wait ends it (`plans`).
pub const SWITCH_WAIT_MAX: Duration = Duration::from_secs(600);

/// Longest wait of a new plan for a node, whatever progress it shows: 20 GB over 10 Mbit/s take four and a half hours.
/// A node that says it got one more byte every second is not believed any longer.
pub const LOADING_MAX: Duration = Duration::from_secs(6 * 3600);

/// Largest epoch that is believed of a node. Epochs grow by one per plan; more than this is a broken or hostile
/// node, and counting on from it could overflow. Own epochs are believed beyond it: a node that lies up to here makes the
/// next plan's epoch greater than this, and honest nodes hold that.
pub const EPOCH_MAX: u64 = 1 << 48;

/// Largest epoch of an earlier router's plan that is taken up: nobody counts that far from `EPOCH_MAX`.
const RESTORED_EPOCH_MAX: u64 = 2 * EPOCH_MAX;

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
    /// How far it says it is with what it is loading; about as often.
    Loading(NodeIndex, Loading),
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
    /// What was to be planned (`Action::Plan`) is.
    Planned(Box<Proposal>),
    /// So many rows wanted each expert since the last time.
    Used(Box<Counts>),
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
    /// Do this where it may take long, and hand back what comes of it (`Event::Planned`).
    Plan(Box<Task>),
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
    /// How long events are waited out.
    pub patience: Patience,
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
            patience: Patience::default(),
            wishes: Wishes::default(),
        }
    }
}

/// Plans that were asked for.
#[derive(Clone, Copy, Debug, Default)]
struct Wanted {
    /// By the operator.
    asked: bool,
    /// Because a node will not serve any more what it was to hold.
    replaced: Option<NodeIndex>,
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
    /// The plan that is being made somewhere.
    errand: Option<Errand>,
    /// Number of the last one.
    ticket: u64,
    /// Newest epoch of any plan, given up or not.
    epoch: u64,
    /// What should be planned for, beyond what the nodes tell.
    wanted: Wanted,
    /// When anybody came or went last, and when a plan was made last.
    stirred: Duration,
    changed: Duration,
    /// Before this no more stand-ins are looked for.
    step_after: Duration,
    popularity: Popularity,
    /// When frequencies were looked at last.
    considered: Duration,
    /// When it was predicted last what the plan in use gives.
    foreseen: Duration,
    /// Whether `current` is an earlier router's: nobody is planned for before those who come back had the time to.
    restored: bool,
    routes: Arc<Routes>,
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
        let popularity = Popularity::even(&facts);
        Cluster {
            members,
            facts,
            policy,
            started: None,
            nodes,
            current: None,
            next: None,
            errand: None,
            ticket: 0,
            epoch: 0,
            wanted: Wanted::default(),
            stirred: Duration::ZERO,
            changed: Duration::ZERO,
            step_after: Duration::ZERO,
            popularity,
            considered: Duration::ZERO,
            foreseen: Duration::ZERO,
            restored: false,
            routes,
        }
    }

    /// Takes up an earlier router's plan: nodes that come back are asked for what they hold. Before the first event, and
    /// with all members that the plan names.
    pub fn restore(&mut self, stored: Stored) {
        let Stored { epoch, plan } = stored;
        if epoch < RESTORED_EPOCH_MAX {
            self.current = Some(Stage::restored(epoch, plan));
            (self.epoch, self.restored) = (epoch, true);
        }
    }

    /// Takes in one event at time `now` (since an arbitrary start, never going back).
    ///
    /// Events about nodes outside the roster, and about connections that are gone, are ignored: events of the
    /// network may cross. At most three actions per member and three more come back.
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
            Event::Loading(node, loading) => {
                self.loads(now, node, loading);
                return actions;
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
                    link.leaving.get_or_insert(now);
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
            Event::Planned(proposal) => self.planned(now, *proposal, &mut actions),
            Event::Used(counts) => drop(self.popularity.learn(&counts)),
            Event::Placed(node, placed) => self.placed(now, (node, placed), &mut actions),
            Event::Plan => {
                (self.wanted.asked, self.restored) = (true, false);
                let links = self.nodes.iter_mut().filter_map(|node| node.link.as_mut());
                links.for_each(|link| link.declined = None);
            }
            Event::Tick => self.tick(now, &mut actions),
        }
        self.note_absences(now);
        self.advance(now, &mut actions);
        self.refresh(&mut actions);
        self.note_absences(now);
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
        self.current.as_ref().map(|stage| stage.plan.outlook(stage.epoch, &self.facts, &stage.present))
    }

    /// What the last change of the placement was, if there was one since the start.
    pub fn last_change(&self) -> Option<&Change> {
        self.current.as_ref().map(|stage| &stage.change)
    }

    /// What the change is that nodes are loading for.
    pub fn coming_change(&self) -> Option<&Change> {
        self.next.as_ref().map(|stage| &stage.change)
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

    /// Whether every connected node that is part of the plan in use serves it, and no plan is due for another one: the
    /// cluster is as good as it gets without another event.
    pub fn settled(&self) -> bool {
        if self.current.is_none() {
            return false;
        }
        let waits = !self.restored && self.newcomers().next().is_some();
        let planned = self.errand.as_ref().is_some_and(|errand| errand.why.is_some());
        let changing = waits || self.next.is_some() || planned;
        !changing && !self.loads_current()
    }

    /// Whether a node that is here is loading its part of the plan in use.
    fn loads_current(&self) -> bool {
        let loading = |link: &Link| link.current == Order::Sent;
        let part = |node| self.current.as_ref().is_some_and(|current| current.plan.capacity(node).is_some());
        self.links().any(|(node, link)| part(node) && loading(link))
    }

    /// Whether experts that are out of reach may be back soon, without a machine's return: nodes are loading them, or
    /// are tried again shortly. A plan that has been loaded for long already says nothing about soon.
    pub fn may_recover(&self) -> bool {
        let shortly = |(_, link): (NodeIndex, &Link)| link.trust.pauses_shortly();
        let changing = match &self.next {
            Some(next) => !next.lingers || self.loads_current(),
            None => !self.settled(),
        };
        self.current.is_some() && (changing || self.links().any(shortly))
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
            Some(link) if link.leaving.is_some() => NodeState::Leaving,
            Some(link) if entry.barred || link.trust.is_suspect() => NodeState::Suspect,
            Some(link) => match (link.current, link.next) {
                (Order::Held, _) => NodeState::Serving,
                _ if link.declined.is_some() => NodeState::Refused,
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
            loading: link.and_then(|link| link.loading),
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

    /// Notes since when nodes do not do what the plan in use wants of them. One that is back may have room for what others
    /// had none for.
    fn note_absences(&mut self, now: Duration) {
        let Some(current) = &self.current else { return };
        let mut back = false;
        for (index, node) in (0..).zip(&mut self.nodes) {
            let was_out = node.out_since.is_some();
            node.note_absence(now, current.plan.capacity(index).is_some());
            back |= was_out && node.out_since.is_none();
        }
        if back {
            let out = self.nodes.iter_mut().filter(|node| node.out_since.is_some());
            out.for_each(|node| node.covered = Cover::Nothing);
        }
    }

    /// Recomputes the table and reports if it changed.
    fn refresh(&mut self, actions: &mut Vec<Action>) {
        let Some(current) = &self.current else { return };
        let serves: Vec<bool> = self.nodes.iter().map(Node::serves).collect();
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

#[cfg(test)]
mod tests;
