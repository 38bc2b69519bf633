//! Random orders of events, thousands of seeds, against a model of what nodes were told and said.
//!
//! A failing seed is in the message; `run(seed)` replays it.

use std::collections::BTreeSet;

use super::*;

const SEEDS: u64 = 3000;
const EVENTS: u32 = 150;

/// SplitMix64 (Steele, Lea, Flood 2014).
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below
    }
}

/// What one node knows, as far as the cluster can see.
#[derive(Default)]
struct Peer {
    connected: bool,
    /// Placements it has not answered.
    orders: Vec<Placement>,
    /// The last two it loaded in this process, by epoch.
    held: Vec<(u64, BTreeSet<Slice>)>,
    /// Epochs acknowledged on this connection.
    acknowledged: BTreeSet<u64>,
    memory: u64,
}

struct World {
    seed: u64,
    dice: Dice,
    now: Duration,
    cluster: Direct,
    peers: Vec<Peer>,
    epoch: u64,
    reported: Arc<Routes>,
}

impl World {
    fn new(seed: u64) -> World {
        let mut dice = Dice(seed);
        let count = 1 + dice.roll(5) as u8;
        let facts = ModelFacts { moe_layers: vec![0, 2, 3], experts: 1 + dice.roll(10) as u16, ..facts() };
        let patience = Patience {
            steady: SECOND / 10 * dice.roll(20) as u32,
            at_latest: SECOND * dice.roll(10) as u32,
            unserved: SECOND * dice.roll(20) as u32,
            lost: SECOND * dice.roll(60) as u32,
            reconsider: SECOND * dice.roll(60) as u32,
        };
        let policy = Policy {
            patience,
            plan_at_nodes: 1 + dice.roll(6) as usize,
            plan_after: SECOND * dice.roll(20) as u32,
            ..at_once()
        };
        let cluster = Direct::with_policy(members(count), facts, policy);
        let peers = (0..count).map(|_| Peer { memory: dice.roll(20), ..Peer::default() }).collect();
        World { seed, dice, now: SECOND, reported: cluster.routes(), cluster, peers, epoch: 0 }
    }

    fn step(&mut self, event: Event) {
        let seed = self.seed;
        let actions = self.cluster.handle(self.now, event.clone());
        // Twice, as plans come back at once here.
        assert!(actions.len() <= 2 * (3 * self.peers.len() + 3), "seed {seed}: {event:?} gave {actions:?}");
        let mut changed = false;
        for action in actions {
            match action {
                Action::Place(node, placement) => {
                    let peer = &mut self.peers[usize::from(node)];
                    assert!(peer.connected, "seed {seed}: order for {node}, which is away");
                    let room = peer.memory;
                    assert!(placement.experts.len() as u64 <= room, "seed {seed}: above memory of {node}");
                    peer.orders.push(placement);
                }
                Action::Disconnect(node, _) => self.peers[usize::from(node)].connected = false,
                Action::RoutesChanged => changed = true,
                Action::Report(..) | Action::Plan(_) => {}
            }
        }
        let routes = self.cluster.routes();
        assert_eq!(changed, routes != self.reported, "seed {seed}: {event:?}");
        self.reported = routes;
        self.check();
    }

    /// Whoever is routed to is connected, and said on this connection that it holds the epoch, and does.
    fn check(&mut self) {
        let seed = self.seed;
        let routes = self.cluster.routes();
        assert!(routes.epoch >= self.epoch, "seed {seed}: epoch went back");
        self.epoch = routes.epoch;
        for (key, part) in routes.table.all() {
            for node in part.holders.as_slice().iter().copied() {
                let peer = &self.peers[usize::from(node)];
                assert!(peer.connected, "seed {seed}: routed to {node}, which is away");
                assert!(peer.acknowledged.contains(&routes.epoch), "seed {seed}: {node} did not acknowledge");
                let held = peer.held.iter().find(|(epoch, _)| *epoch == routes.epoch);
                let slice = Slice { key, from: part.from, to: part.to };
                assert!(
                    held.is_some_and(|(_, keys)| keys.contains(&slice)),
                    "seed {seed}: {node} lacks {slice:?}"
                );
                assert_ne!(self.cluster.status(node).unwrap().state, NodeState::Suspect, "seed {seed}");
            }
        }
    }

    fn join(&mut self, node: NodeIndex) {
        let peer = &mut self.peers[usize::from(node)];
        peer.orders.clear();
        peer.acknowledged.clear();
        peer.connected = true;
        let held_epoch = peer.held.iter().map(|(epoch, _)| *epoch).max().unwrap_or(0);
        let hello = Hello { held_epoch, ..hello(peer.memory) };
        self.step(Event::Joined(node, hello));
    }

    /// Answers the oldest order of `node`, if it has one.
    fn answer(&mut self, node: NodeIndex, refuse: bool) {
        let peer = &mut self.peers[usize::from(node)];
        if !peer.connected || peer.orders.is_empty() {
            return;
        }
        let order = peer.orders.remove(0);
        let mut placed = ack(order.epoch);
        if refuse {
            placed.refusal = "no".into();
        } else {
            peer.acknowledged.insert(order.epoch);
            peer.held.retain(|(epoch, _)| *epoch < order.epoch);
            peer.held.push((order.epoch, order.experts.into_iter().collect()));
            let surplus = peer.held.len().saturating_sub(2);
            peer.held.drain(..surplus);
        }
        self.step(Event::Placed(node, placed));
    }

    fn random_event(&mut self) {
        let node = self.dice.roll(self.peers.len() as u64) as NodeIndex;
        let peer = &mut self.peers[usize::from(node)];
        match self.dice.roll(20) {
            0 => {
                // The process died, or only its connection; or it comes back with other memory.
                peer.connected = false;
                match self.dice.roll(3) {
                    0 => peer.held.clear(),
                    1 => peer.memory = self.dice.roll(20),
                    _ => {}
                }
                self.step(Event::Lost(node));
            }
            1..4 if !peer.connected => self.join(node),
            4 if self.dice.roll(4) == 0 => self.join(node),
            5..12 => self.answer(node, false),
            12 => self.answer(node, true),
            13..15 => self.step(Event::Missed(node)),
            15 => {
                let assignments = self.dice.roll(5000) as u32;
                let round_trip = SECOND / 1000 * self.dice.roll(3000) as u32;
                let service = round_trip / 2;
                self.step(Event::Answered { node, assignments, service, round_trip });
                assert!(self.cluster.budget(node, assignments).total >= crate::health::BUDGET_FLOOR);
            }
            16 if self.dice.roll(5) == 0 => self.step(Event::Plan),
            18 => {
                let (done_bytes, total_bytes) = (self.dice.roll(3), self.dice.roll(3));
                self.step(Event::Loading(node, Loading { done_bytes, total_bytes, peer_bytes: 0 }));
                // A long night: whoever was loading still is.
                if self.dice.roll(20) == 0 {
                    self.now += SWITCH_WAIT_MAX;
                    self.step(Event::Tick);
                }
            }
            17 => {
                // An answer to something it was not asked.
                let epoch = self.dice.roll(10);
                if peer.orders.iter().all(|order| order.epoch != epoch) {
                    self.step(Event::Placed(node, ack(epoch)));
                }
            }
            _ => {
                self.now += SECOND / 10 * self.dice.roll(30) as u32;
                self.step(Event::Tick);
            }
        }
    }

    /// Everyone comes and behaves: after finitely many events all that fits is routed, and nothing is left to do.
    fn calm(&mut self) {
        let seed = self.seed;
        for node in 0..self.peers.len() as NodeIndex {
            if !self.peers[usize::from(node)].connected {
                self.join(node);
            }
        }
        // Nobody is barred any more, and every refusal is forgotten, so that nobody is left out.
        self.now += crate::health::PAUSE_MAX;
        self.step(Event::Tick);
        self.step(Event::Plan);
        let mut rounds = 0;
        while self.peers.iter().any(|peer| !peer.orders.is_empty()) {
            rounds += 1;
            assert!(rounds < 20, "seed {seed}: plans without end");
            (0..self.peers.len() as NodeIndex).for_each(|node| self.answer(node, false));
        }
        self.now += crate::health::PAUSE_MAX;
        self.step(Event::Tick);
        assert!(self.cluster.settled(), "seed {seed}");
        let routes = self.cluster.routes();
        let room: u64 = self.peers.iter().map(|peer| peer.memory).sum();
        let all = routes.table.all().count() as u64;
        let routed = routes.table.all().filter(|(_, part)| !part.holders.is_empty()).count() as u64;
        assert_eq!(routed, all.min(room), "seed {seed}");
        assert_eq!(self.cluster.unplaced() as u64, all - routed, "seed {seed}");
        let quiet = self.cluster.handle(self.now, Event::Tick);
        assert_eq!(quiet, [], "seed {seed}: restless");
    }
}

fn run(seed: u64) {
    let mut world = World::new(seed);
    for _ in 0..EVENTS {
        world.random_event();
    }
    world.calm();
}

#[test]
fn random_orders_of_events_keep_every_route_true() {
    (0..SEEDS).for_each(run);
}
