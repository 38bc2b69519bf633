//! The router's view of its nodes: whatever nodes say, in whatever order, every call can be answered, and what nodes are
//! told fits what they said.
//!
//! An input is a story: nodes join with any figures, answer, report, lie, leave and come back, plans are made, time
//! passes. A model beside it knows who is connected and what each was asked and has answered; the promises are checked
//! after every event.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use mesh_proto::claims::believable;
use mesh_proto::cluster::{Action, Cluster, EPOCH_MAX, Event, NodeState, Policy};
use mesh_proto::facts::{LinkSpeed, Member, ModelFacts};
use mesh_proto::health::{BUDGET_FLOOR, BUDGET_MAX, Budget};
use mesh_proto::machine::{Capacity, Machine};
use mesh_proto::placement::{Copies, Wishes};
use mesh_proto::planner::{Proposal, Task};
use mesh_proto::popularity::{BATCH_TOKENS_MIN, Counts};
use mesh_proto::routes::{NodeIndex, ROUTER, Table};
use mesh_proto::stored::Stored;
use mesh_wire::buffer::Pool;
use mesh_wire::control::{Health, Hello, Loading, Placed, Placement, Vitals};
use mesh_wire::id::NodeId;
use mesh_wire::message::Message;

use super::{Verdict, says_why};

/// Events of one story.
const EVENTS_MAX: usize = 96;

/// Members that are admitted beside those of `members`.
const ADMITTED_MAX: usize = 2;

/// Bytes of the pool that a message needs.
const POOL_BYTES: usize = 1 << 20;

/// A model that is small, with layers left out and experts that can be cut.
pub(super) fn facts() -> ModelFacts {
    ModelFacts {
        fingerprint: [7; 32],
        moe_layers: vec![1, 4],
        experts: 3,
        expert_bytes: 60_000_000,
        blocks: 6,
        block_bytes: 10_000_000,
        top_k: 2,
        hidden: 64,
        ..ModelFacts::default()
    }
}

/// Three machines.
pub(super) fn members() -> Vec<Member> {
    (1..=3).map(|key| Member { id: NodeId([key; 32]), name: format!("n{key}") }).collect()
}

/// What three of them can do, the first as much as the others together.
pub(super) fn capacities() -> [Capacity; 3] {
    [(0, 8000), (1, 4000), (2, 4000)].map(|(node, mb_s)| {
        let machine = Machine { weight_mb_s: [mb_s; 5], ..Machine::default() };
        Capacity { node, memory_bytes: 1 << 40, machine }
    })
}

/// Every expert of `facts` is there from its first block to its last, each block once.
pub(super) fn is_whole(table: &Table) {
    let facts = facts();
    for layer in &facts.moe_layers {
        for expert in 0..facts.experts {
            let mut end = 0;
            for part in table.parts(*layer, expert) {
                assert!(part.from == end && part.to > part.from, "{layer}/{expert}: {part:?} after {end}");
                end = part.to;
            }
            assert_eq!(end, facts.blocks, "expert {layer}/{expert} is not whole");
        }
    }
}

/// What becomes of a plan that was kept.
#[rustfmt::skip]
const COMEBACK: [u8; 57] = [
    0, 0, 0, 130, 5, 5, 0, 1, 0, 130, 5, 5, // Two nodes join,
    2, 0, 0, 2, 1, 0, // both have loaded,
    15, 0, 17, 1, 1, 15, 0, 5, // one is lost after a minute, a quarter of one passes,
    11, 0, 2, 0, 0, 0, 1, 0, 130, 5, 5, // the other stands in, it comes back,
    15, 0, 17, 10, 0, 11, 0, 2, 0, 0, 2, 1, 0, // a plan is made anew,
    15, 0, 5, 8, 0, 11, 0, // and one leaves.
];

/// The bytes of a story, one after the other; zeros behind its end.
struct Story<'a>(&'a [u8]);

impl Story<'_> {
    fn next(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else { return 0 };
        self.0 = rest;
        *first
    }

    /// A number of any size: six bits, shifted.
    fn number(&mut self) -> u64 {
        let byte = self.next();
        match byte {
            u8::MAX => u64::MAX,
            254 => EPOCH_MAX - 1,
            _ => u64::from(byte >> 2) << (u32::from(byte % 4) * 14),
        }
    }

    fn small(&mut self) -> u32 {
        u32::try_from(self.number()).unwrap_or(u32::MAX)
    }
}

/// What is known of a connected node.
#[derive(Default)]
struct Peer {
    memory_bytes: u64,
    /// Placements it was asked for and has not answered, newest last.
    asked: Vec<u64>,
    /// Those it said it holds.
    holds: BTreeSet<u64>,
}

struct Scene {
    cluster: Cluster,
    now: Duration,
    peers: BTreeMap<NodeIndex, Peer>,
    revoked: BTreeSet<NodeIndex>,
    /// Newest epoch each node was asked to hold, over all its connections.
    ordered: BTreeMap<NodeIndex, u64>,
    task: Option<Box<Task>>,
    proposal: Option<Proposal>,
    epoch: u64,
}

/// First byte: the policy. Second: whether there is an earlier router's plan (`earlier`).
pub(super) fn cluster(bytes: &[u8]) -> Verdict {
    let mut story = Story(bytes);
    let (wishes, start) = (story.next(), story.next());
    let policy = Policy {
        plan_at_nodes: [1, 2, 3, usize::MAX][usize::from(wishes) % 4],
        require_exact: wishes & 4 != 0,
        wishes: Wishes {
            copies: [Copies::Auto, Copies::Exactly(1), Copies::Exactly(2), Copies::Exactly(4)]
                [usize::from(wishes >> 3) % 4],
            slices: wishes & 32 != 0,
            router_experts: u16::from(wishes >> 6),
            ..Wishes::default()
        },
        ..Policy::default()
    };
    let mut scene = Scene::new(policy, start);
    let mut refused = false;
    for _ in 0..EVENTS_MAX {
        if story.0.is_empty() {
            break;
        }
        if let Some(event) = scene.event(&mut story) {
            refused |= scene.happens(event);
        }
    }
    scene.is_kept_and_read();
    if refused { Verdict::Refused } else { Verdict::Taken }
}

/// What a router kept of a story: after any, it can be read again, and is taken up.
pub(super) fn restored(stored: Stored) {
    let mut scene = Scene::new(Policy { plan_at_nodes: 2, ..Policy::default() }, 0);
    scene.cluster.restore(stored);
    scene.epoch = scene.cluster.epoch();
    let mut story = Story(&COMEBACK);
    while !story.0.is_empty() {
        if let Some(event) = scene.event(&mut story) {
            scene.happens(event);
        }
    }
    scene.is_kept_and_read();
}

impl Scene {
    fn new(policy: Policy, start: u8) -> Scene {
        let mut cluster = Cluster::with_policy(members(), facts(), policy);
        if start % 2 == 1 {
            let plan = mesh_proto::placement::plan(&facts(), &capacities(), &policy.wishes, None);
            cluster.restore(Stored { epoch: u64::from(start), plan });
        }
        Scene {
            cluster,
            now: Duration::ZERO,
            peers: BTreeMap::new(),
            revoked: BTreeSet::new(),
            ordered: BTreeMap::new(),
            task: None,
            proposal: None,
            epoch: 0,
        }
    }

    /// The next event; `None` where it is none by now.
    fn event(&mut self, story: &mut Story<'_>) -> Option<Event> {
        let (what, node) = (story.next(), NodeIndex::from(story.next()) % 6);
        Some(match what % 16 {
            0 => Event::Joined(node, self.hello(node, story)),
            1 => Event::Lost(node),
            2 => Event::Placed(node, self.placed(node, story)),
            3 => Event::Health(node, health(story)),
            4 => Event::Answered {
                node,
                assignments: story.small(),
                service: Duration::from_micros(story.number()),
                round_trip: Duration::from_micros(story.number()),
            },
            5 => Event::Missed(node),
            6 => Event::Malformed(node),
            7 => Event::Lied(node, "its sums were wrong".to_owned()),
            8 => Event::Leaving(node),
            9 => Event::Linked(node, LinkSpeed { round_trip_us: story.small(), mb_s: story.small() }),
            10 => Event::Plan,
            11 => Event::Planned(Box::new(self.proposal(node)?)),
            12 => Event::Used(Box::new(used(story))),
            13 if story.next() % 8 == 7 => Event::Revoked(node),
            13 => Event::Pardon(node),
            14 if story.next() % 2 == 1 => Event::Loading(node, loading(story)),
            14 => return self.admit(),
            _ => {
                self.now = self.now.saturating_add(Duration::from_millis(story.number() % (1 << 30)));
                Event::Tick
            }
        })
    }

    fn hello(&self, node: NodeIndex, story: &mut Story<'_>) -> Hello {
        let how = story.next();
        let ordered = self.ordered.get(&node).copied().unwrap_or(0);
        Hello {
            name: format!("n{node}"),
            model: if how % 16 == 15 { [8; 32] } else { facts().fingerprint },
            exact: how & 16 == 0,
            memory_bytes: story.number(),
            weight_mb_s: [story.small(), 1, 2, 3, story.small()],
            held_epoch: if how & 32 == 0 { ordered } else { story.number() },
            ..Hello::default()
        }
    }

    /// An answer to the newest placement it was asked for, mostly.
    fn placed(&self, node: NodeIndex, story: &mut Story<'_>) -> Placed {
        let how = story.next();
        let newest = self.peers.get(&node).and_then(|peer| peer.asked.last().copied()).unwrap_or(0);
        let oldest = self.peers.get(&node).and_then(|peer| peer.asked.first().copied()).unwrap_or(0);
        let epoch = match how % 4 {
            0 | 1 => newest,
            2 => oldest,
            _ => story.number(),
        };
        let refusal = if how & 16 == 0 { String::new() } else { "disk full".to_owned() };
        Placed { epoch, weight_bytes: 1, refusal }
    }

    /// What comes of the last task, at once, or a second time.
    fn proposal(&mut self, again: NodeIndex) -> Option<Proposal> {
        if let Some(task) = self.task.take() {
            self.proposal = Some(task.work());
        }
        if again == 5 { self.proposal.clone() } else { self.proposal.take() }
    }

    fn admit(&mut self) -> Option<Event> {
        let count = self.cluster.members().len();
        if count < members().len() + ADMITTED_MAX {
            let key = 1 + count as u8;
            self.cluster.admit(Member { id: NodeId([key; 32]), name: format!("n{key}") });
        }
        None
    }

    /// Takes in an event and checks every promise. Whether something was refused.
    fn happens(&mut self, event: Event) -> bool {
        self.learn(&event);
        let hello = match &event {
            Event::Joined(node, hello) if usize::from(*node) < self.cluster.members().len() => {
                Some((*node, hello.clone()))
            }
            _ => None,
        };
        let actions = self.cluster.handle(self.now, event);
        let members = self.cluster.members().len();
        assert!(actions.len() <= 3 * members + 3, "{} actions", actions.len());
        let mut refused = false;
        for action in actions {
            refused |= self.acts(action);
        }
        if let Some((node, hello)) = hello
            && !self.peers.contains_key(&node)
        {
            let wrong = hello.model != facts().fingerprint || !hello.exact || self.revoked.contains(&node);
            let known = self.ordered.get(&node).copied().unwrap_or(0) == hello.held_epoch;
            assert!(wrong || !known, "who holds what it was told to is turned away: {hello:?}");
        }
        self.keeps_routes();
        self.keeps_statuses();
        refused
    }

    /// What the model knows without the cluster.
    fn learn(&mut self, event: &Event) {
        let known = |node: &NodeIndex| usize::from(*node) < self.cluster.members().len();
        match event {
            Event::Joined(node, hello) if known(node) => {
                let peer = Peer { memory_bytes: hello.memory_bytes, ..Peer::default() };
                self.peers.insert(*node, peer);
            }
            Event::Lost(node) => drop(self.peers.remove(node)),
            Event::Revoked(node) if known(node) => {
                self.revoked.insert(*node);
            }
            Event::Placed(node, placed) => {
                if let Some(peer) = self.peers.get_mut(node) {
                    let asked = peer.asked.contains(&placed.epoch);
                    if asked && placed.refusal.is_empty() {
                        peer.holds.insert(placed.epoch);
                    } else {
                        peer.holds.remove(&placed.epoch);
                    }
                }
            }
            _ => {}
        }
    }

    fn acts(&mut self, action: Action) -> bool {
        match action {
            Action::Place(node, placement) => self.is_asked(node, placement),
            Action::Disconnect(node, reason) => {
                says_why(&reason);
                assert!(self.peers.remove(&node).is_some(), "{node} is not connected");
                return true;
            }
            Action::Report(node, note) => {
                says_why(&note);
                assert!(usize::from(node) < self.cluster.members().len());
            }
            Action::RoutesChanged => {}
            Action::Plan(task) => self.task = Some(task),
        }
        false
    }

    /// An order that can be sent, and fits.
    fn is_asked(&mut self, node: NodeIndex, placement: Placement) {
        let facts = facts();
        let bytes: u64 = placement.experts.iter().map(|slice| facts.slice_bytes(slice.from, slice.to)).sum();
        let peer = self.peers.get_mut(&node).expect("only who is connected is asked");
        assert!(bytes <= peer.memory_bytes, "{bytes} bytes for {node}, which has {}", peer.memory_bytes);
        assert_eq!(placement.model, facts.fingerprint);
        // Without experts it lets a leaving node go.
        if !placement.experts.is_empty() || !peer.holds.contains(&placement.epoch) {
            peer.asked.push(placement.epoch);
        }
        let ordered = self.ordered.entry(node).or_default();
        *ordered = (*ordered).max(placement.epoch);
        let order = Message::Placement(placement);
        let frame = order.encode(&Pool::new(POOL_BYTES)).expect("an order can be sent");
        assert_eq!(Message::decode(&frame), Ok(order));
    }

    /// Every expert is whole, and only those are asked for it who have it.
    fn keeps_routes(&mut self) {
        let routes = self.cluster.routes();
        assert!(routes.epoch >= self.epoch, "epoch {} after {}", routes.epoch, self.epoch);
        self.epoch = routes.epoch;
        is_whole(&routes.table);
        for (key, part) in routes.table.all() {
            for node in part.holders.as_slice().iter().filter(|node| **node != ROUTER) {
                let peer = self.peers.get(node);
                let holds = peer.is_some_and(|peer| peer.holds.contains(&routes.epoch));
                assert!(
                    holds && !self.revoked.contains(node),
                    "{key:?} is asked of {node} in {}",
                    routes.epoch
                );
            }
        }
    }

    fn keeps_statuses(&self) {
        let statuses = self.cluster.statuses();
        assert_eq!(statuses.len(), self.cluster.members().len());
        for (node, status) in (0..).zip(&statuses) {
            assert_eq!(status.hello.is_some(), self.peers.contains_key(&node), "{node}: {status:?}");
            assert_eq!(status.state == NodeState::Revoked, self.revoked.contains(&node));
            if let Some(health) = status.health {
                assert_eq!(believable(health.vitals), health.vitals, "what is shown is believed");
            }
            if !status.note.is_empty() {
                says_why(&status.note);
            }
            for assignments in [1, 40, u32::MAX] {
                let Budget { hedge, total } = self.cluster.budget(node, assignments);
                assert!(
                    hedge <= total && (BUDGET_FLOOR..=BUDGET_MAX).contains(&total),
                    "{hedge:?}, {total:?}"
                );
            }
        }
    }

    /// What the router keeps of it for its next start is read again.
    fn is_kept_and_read(&self) {
        let Some(stored) = self.cluster.newest() else { return };
        let text = stored.to_text(&facts(), self.cluster.members());
        let read = Stored::parse(&text, &facts(), self.cluster.members());
        let read = read.unwrap_or_else(|error| panic!("{error} in\n{text}"));
        assert_eq!((read.epoch, &read.plan.table), (stored.epoch, &stored.plan.table), "out of\n{text}");
    }
}

fn health(story: &mut Story<'_>) -> Health {
    let how = story.next();
    let vitals = Vitals {
        temperature_mc: (how & 1 == 0).then(|| story.small() as i32),
        throttled: [None, Some(false), Some(true), None][usize::from(how >> 1) % 4],
        power_mw: (how & 8 == 0).then(|| story.small()),
        energy_mj: (how & 16 == 0).then(|| story.number()),
    };
    Health { calls: story.number(), vitals, ..Health::default() }
}

fn loading(story: &mut Story<'_>) -> Loading {
    Loading { done_bytes: story.number(), total_bytes: story.number(), peer_bytes: story.number() }
}

/// Rows per expert, as the router counts them.
fn used(story: &mut Story<'_>) -> Counts {
    let layers = if story.next() == 99 { 1 } else { facts().moe_layers.len() };
    let mut layer = || (0..facts().experts).map(|_| story.small()).collect();
    Counts { rows: (0..layers).map(|_| layer()).collect(), tokens: BATCH_TOKENS_MIN }
}
