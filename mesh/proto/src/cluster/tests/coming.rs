//! Machines that come and go while the cluster serves, in virtual time, with the patience of real ones.

use super::*;
use crate::popularity::Counts;

const TENTH: Duration = Duration::from_millis(100);

/// A cluster with machines that load what they are told within a tenth of a second.
struct Stage {
    cluster: Direct,
    now: Duration,
    /// What connected nodes were told and have not answered.
    orders: Vec<(NodeIndex, Placement)>,
    /// Epochs that came into use, and when.
    used: Vec<(Duration, u64)>,
    /// Nodes that were let go.
    released: Vec<NodeIndex>,
}

impl Stage {
    fn new(nodes: u8, policy: Policy) -> Stage {
        let cluster = Direct::with_policy(members(nodes), facts(), policy);
        Stage { cluster, now: SECOND, orders: Vec::new(), used: Vec::new(), released: Vec::new() }
    }

    /// So many nodes with room for so many experts each serve.
    fn serving(nodes: u8, experts: u64) -> Stage {
        let mut stage = Stage::new(nodes, Policy::default());
        (0..nodes.into()).for_each(|node| stage.join(node, experts));
        stage.run(SECOND);
        assert!(stage.cluster.settled() && stage.cluster.epoch() == 1);
        stage
    }

    fn event(&mut self, event: Event) {
        for action in self.cluster.handle(self.now, event) {
            match action {
                Action::Place(node, order)
                    if order.experts.is_empty() && state(&self.cluster, node) == NodeState::Leaving =>
                {
                    self.released.push(node);
                }
                Action::Place(node, order) => self.orders.push((node, order)),
                _ => {}
            }
        }
        let epoch = self.cluster.epoch();
        if self.used.last().is_none_or(|(_, last)| *last != epoch) {
            self.used.push((self.now, epoch));
        }
    }

    fn join(&mut self, node: NodeIndex, experts: u64) {
        while usize::from(node) >= self.cluster.members().len() {
            let key = self.cluster.members().len() as u8;
            self.cluster.admit(Member { id: NodeId([key; 32]), name: format!("n{key}") });
        }
        self.event(Event::Joined(node, hello(experts)));
    }

    fn lose(&mut self, node: NodeIndex) {
        self.orders.retain(|(of, _)| *of != node);
        self.event(Event::Lost(node));
    }

    /// Time passes, and who was told to load has loaded.
    fn run(&mut self, time: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.now += TENTH;
            for (node, order) in std::mem::take(&mut self.orders) {
                self.event(Event::Placed(node, ack(order.epoch)));
            }
            self.event(Event::Tick);
        }
    }

    fn unserved(&self) -> usize {
        self.cluster.routes().table.all().filter(|(_, part)| part.holders.is_empty()).count()
    }

    fn why(&self) -> Why {
        self.cluster.last_change().unwrap().why
    }
}

#[test]
fn a_new_machine_is_planned_for_when_it_stays() {
    let mut stage = Stage::serving(3, 100);
    stage.join(3, 100);
    assert!(!stage.cluster.settled(), "something is about to change");
    stage.run(SECOND);
    assert_eq!(stage.cluster.epoch(), 1);
    stage.run(2 * SECOND);
    assert_eq!((stage.cluster.epoch(), routed(&stage.cluster, 3), stage.unserved()), (2, 6, 0));
    let change = stage.cluster.last_change().unwrap();
    assert_eq!((change.why, &change.nodes[..], change.moved_bytes), (Why::Joined, &[3][..], 600));
    // Five that come within three seconds come at once.
    for node in 4..9 {
        stage.join(node, 100);
        stage.run(6 * TENTH);
    }
    stage.run(10 * SECOND);
    assert_eq!((stage.cluster.epoch(), stage.cluster.settled()), (3, true));
    assert_eq!(stage.cluster.last_change().unwrap().nodes, [4, 5, 6, 7, 8]);
}

#[test]
fn what_a_lost_node_alone_held_others_take_over_and_it_finds_its_place_again() {
    let mut stage = Stage::serving(3, 100);
    stage.lose(1);
    assert_eq!(stage.unserved(), 8);
    stage.run(2 * SECOND);
    assert_eq!((stage.cluster.epoch(), stage.unserved()), (1, 8), "most are back by now");
    stage.run(2 * SECOND);
    assert_eq!((stage.cluster.epoch(), stage.unserved(), stage.why()), (2, 0, Why::Lost));
    assert_eq!([0, 2].map(|node| routed(&stage.cluster, node)), [12, 12]);
    assert_eq!(stage.cluster.last_change().unwrap().moved_bytes, 800);
    stage.run(100 * SECOND);
    assert_eq!(stage.used.len(), 3, "{:?}", stage.used);
    // It is asked for what it held, and nothing moves.
    stage.join(1, 100);
    assert_eq!(
        stage.orders.iter().map(|(node, order)| (*node, order.experts.len())).collect::<Vec<_>>(),
        [(1, 8)]
    );
    stage.run(20 * SECOND);
    assert_eq!((stage.cluster.epoch(), routed(&stage.cluster, 1)), (2, 8));
    // The next time it is lost, nothing need be done.
    stage.lose(1);
    assert_eq!(stage.unserved(), 0);
}

#[test]
fn a_node_that_is_back_takes_what_nobody_had_room_for() {
    let mut stage = Stage::serving(3, 8);
    stage.lose(1);
    stage.lose(2);
    stage.run(20 * SECOND);
    assert_eq!(stage.unserved(), 16, "the one that is left is full");
    stage.join(2, 16);
    stage.run(20 * SECOND);
    assert_eq!((stage.unserved(), routed(&stage.cluster, 2)), (0, 16));
    // What is lost is not taken over twice, however often others come and go.
    let epoch = stage.cluster.epoch();
    for _ in 0..3 {
        stage.lose(0);
        stage.run(TENTH);
        stage.join(0, 8);
        stage.run(20 * SECOND);
    }
    assert_eq!((stage.cluster.epoch(), stage.unserved()), (epoch, 0));
}

#[test]
fn copies_are_not_made_before_what_nobody_holds_is_taken_over() {
    let patience = Patience { unserved: 5 * SECOND, lost: SECOND, ..Patience::default() };
    let mut stage = Stage::new(3, Policy { patience, ..Policy::default() });
    (0..3).for_each(|node| stage.join(node, 100));
    stage.run(SECOND);
    stage.lose(1);
    stage.run(20 * SECOND);
    assert_eq!((stage.cluster.epoch(), stage.unserved(), stage.why()), (2, 0, Why::Lost));
}

#[test]
fn what_is_predicted_follows_who_serves_and_changes_nothing() {
    let mut stage = Stage::serving(3, 100);
    let shares = |stage: &Stage| -> Vec<bool> {
        stage.cluster.outlook().unwrap().shares.iter().map(|share| share.share > 0.0).collect()
    };
    let ns = |stage: &Stage| stage.cluster.outlook().unwrap().token_ns;
    assert_eq!(shares(&stage), [true; 3]);
    stage.lose(1);
    stage.run(10 * SECOND);
    assert_eq!((stage.cluster.epoch(), shares(&stage)), (2, vec![true, false, true]));
    let without = ns(&stage);
    stage.join(1, 100);
    stage.run(20 * SECOND);
    assert_eq!((stage.cluster.epoch(), stage.why(), shares(&stage)), (2, Why::Lost, vec![true; 3]));
    assert!(ns(&stage) != without && stage.cluster.settled());
    // Nothing need be loaded when it is lost again, but less is to be expected.
    stage.lose(1);
    stage.run(20 * SECOND);
    assert_eq!((stage.cluster.epoch(), shares(&stage)), (2, vec![true, false, true]));
    assert_eq!(ns(&stage), without);
    // One that comes and goes is not followed.
    let mut seen = Vec::new();
    for turn in 0..40 {
        if turn % 2 == 0 {
            stage.join(1, 100)
        } else {
            stage.lose(1)
        }
        stage.run(SECOND);
        seen.push(shares(&stage));
    }
    seen.dedup();
    assert!(seen.len() <= 3, "{seen:?}");
}

#[test]
fn without_room_the_router_computes_and_a_machine_that_is_plugged_in_makes_it_good() {
    let mut stage = Stage::serving(3, 8);
    let speed = stage.cluster.last_change().unwrap().after_ns;
    stage.lose(1);
    stage.run(20 * SECOND);
    assert_eq!((stage.cluster.epoch(), stage.unserved()), (1, 8));
    assert!(!stage.cluster.may_recover(), "nothing is to be waited for");
    stage.join(3, 8);
    stage.run(4 * SECOND);
    assert_eq!((stage.cluster.epoch(), stage.unserved(), stage.why()), (2, 0, Why::Joined));
    assert_eq!(stage.cluster.last_change().unwrap().after_ns, speed, "as fast as before");
}

#[test]
fn copies_are_made_again_after_a_minute() {
    let wishes = Wishes { copies: crate::placement::Copies::Exactly(2), ..Wishes::default() };
    let mut stage = Stage::new(3, Policy { wishes, ..Policy::default() });
    (0..3).for_each(|node| stage.join(node, 100));
    stage.run(SECOND);
    stage.lose(2);
    stage.run(50 * SECOND);
    assert_eq!((stage.cluster.epoch(), stage.unserved()), (1, 0));
    stage.run(20 * SECOND);
    let twice = |part: &crate::routes::Part| part.holders.as_slice().len() == 2;
    assert!(stage.cluster.routes().table.all().all(|(_, part)| twice(part)));
    assert_eq!((stage.cluster.epoch(), stage.why()), (2, Why::Lost));
    stage.run(100 * SECOND);
    assert_eq!(stage.cluster.epoch(), 2);
}

#[test]
fn a_leaving_node_serves_until_others_hold_what_it_held() {
    let mut stage = Stage::serving(3, 100);
    stage.event(Event::Leaving(1));
    assert_eq!((state(&stage.cluster, 1), routed(&stage.cluster, 1)), (NodeState::Leaving, 8));
    assert_eq!((stage.unserved(), stage.released.len()), (0, 0));
    stage.run(2 * TENTH);
    assert_eq!((stage.cluster.epoch(), stage.unserved(), stage.why()), (2, 0, Why::Leaving));
    assert_eq!((stage.released.clone(), routed(&stage.cluster, 1)), (vec![1], 0));
    stage.lose(1);
    stage.run(5 * SECOND);
    assert_eq!((stage.unserved(), stage.cluster.epoch()), (0, 2));
    // It was an upgrade: it finds its place.
    stage.join(1, 100);
    stage.run(5 * SECOND);
    assert_eq!((routed(&stage.cluster, 1), stage.cluster.epoch()), (8, 2));
}

#[test]
fn two_that_leave_hand_over_to_the_third_not_to_each_other() {
    let mut stage = Stage::serving(3, 100);
    stage.event(Event::Leaving(1));
    stage.event(Event::Leaving(2));
    stage.run(5 * TENTH);
    assert_eq!((stage.released.clone(), stage.unserved()), (vec![1, 2], 0));
    assert_eq!(routed(&stage.cluster, 0), 24);
}

#[test]
fn one_that_leaves_while_a_plan_is_loaded_hands_over_all_the_same() {
    let mut stage = Stage::serving(3, 100);
    stage.join(3, 100);
    stage.run(19 * TENTH);
    let orders = |stage: &Stage| stage.orders.iter().map(|(node, _)| *node).collect::<Vec<_>>();
    while orders(&stage).is_empty() {
        stage.now += TENTH;
        stage.event(Event::Tick);
    }
    assert_eq!(orders(&stage), [0, 1, 2, 3]);
    stage.event(Event::Leaving(1));
    // A station that is leaving loads nothing.
    let order = stage.orders.remove(1).1;
    let refusal = Placed { epoch: order.epoch, weight_bytes: 0, refusal: "the node is stopping".into() };
    stage.event(Event::Placed(1, refusal));
    assert_eq!(stage.unserved(), 0);
    for _ in 0..50 {
        stage.run(TENTH);
        assert_eq!(stage.unserved(), 0, "at {:?}", stage.now);
    }
    assert_eq!(stage.released, [1]);
    stage.lose(1);
    stage.run(5 * SECOND);
    assert_eq!((stage.unserved(), routed(&stage.cluster, 3) > 0), (0, true));
}

#[test]
fn a_leaving_node_is_let_go_after_a_while_whatever_others_do() {
    let mut stage = Stage::serving(3, 100);
    stage.event(Event::Leaving(1));
    stage.orders.clear();
    stage.now += HANDOVER_MAX - TENTH;
    stage.event(Event::Tick);
    assert!(stage.released.is_empty());
    stage.now += TENTH;
    stage.event(Event::Tick);
    assert_eq!((stage.released.clone(), routed(&stage.cluster, 1)), (vec![1], 0));
}

#[test]
fn a_node_that_flaps_changes_the_placement_once_and_costs_the_others_nothing() {
    // One of the cluster, and one that never was part of it.
    for node in [1, 3] {
        let mut stage = Stage::serving(3, 100);
        for second in 0..120 {
            if second % 2 == 0 {
                stage.lose(node);
            } else {
                stage.join(node, 100);
            }
            stage.run(SECOND);
        }
        for pair in stage.used[1..].windows(2) {
            assert!(pair[1].0 - pair[0].0 >= 10 * SECOND, "node {node}: {:?}", stage.used);
        }
        assert!(stage.used.len() <= 3, "node {node}: {:?}", stage.used);
        assert_eq!(stage.unserved(), 0, "others hold what it held");
        // When it stays, it is taken back.
        stage.join(node, 100);
        stage.run(45 * SECOND);
        assert!(routed(&stage.cluster, node) > 0, "{:?}", state(&stage.cluster, node));
    }
}

#[test]
fn a_storm_of_joins_and_leaves_is_over_soon_after_its_last_event() {
    let mut stage = Stage::serving(3, 100);
    let mut lost = 0;
    // Fifty machines a minute that come for some seconds; a third goes without a word.
    for number in 0..150_u16 {
        let node = 3 + number % 20;
        match state_of(&stage, node) {
            None | Some(NodeState::Absent) => stage.join(node, 50),
            Some(_) if number % 3 == 0 => stage.lose(node),
            Some(_) => {
                stage.event(Event::Leaving(node));
                stage.run(2 * TENTH);
                stage.lose(node);
            }
        }
        stage.run(SECOND);
        lost = lost.max(stage.unserved());
    }
    assert!(lost <= 12, "{lost} of 24 experts had to be computed by the router");
    let last = stage.now;
    stage.run(5 * SECOND);
    assert!(stage.cluster.settled() && stage.unserved() == 0, "{:?}", stage.used);
    let epoch = stage.cluster.epoch();
    stage.run(40 * SECOND);
    let later: Vec<_> = stage.used.iter().filter(|(at, _)| *at > last + 5 * SECOND).collect();
    assert!(stage.cluster.epoch() == epoch, "it changes {later:?} after {last:?}");
    // About one change in ten seconds, and one for each that left with experts of its own.
    assert!(stage.used.len() < 80, "{} changes", stage.used.len());
}

fn state_of(stage: &Stage, node: NodeIndex) -> Option<NodeState> {
    stage.cluster.status(node).map(|status| status.state)
}

/// Shares of experts that wander, as thousands of tokens of all requests show them.
fn counts(shares: &[f64]) -> Counts {
    let sum: f64 = shares.iter().sum();
    let rows = shares.iter().map(|share| (share / sum * 200_000.0) as u32).collect();
    Counts { tokens: 8192, rows: vec![rows; 2] }
}

fn used(stage: &mut Stage, shares: &[f64]) {
    stage.event(Event::Used(Box::new(counts(shares))));
}

/// Large experts on three nodes of one speed, so that what is wanted matters.
fn large() -> Stage {
    let facts = ModelFacts { expert_bytes: 20_000_000, top_k: 4, ..facts() };
    let mut stage = Stage::new(3, Policy::default());
    stage.cluster = Direct::with_policy(members(3), facts, Policy::default());
    for node in 0..3 {
        let hello = Hello { memory_bytes: 1 << 40, weight_mb_s: [8000; 5], ..hello(0) };
        stage.event(Event::Joined(node, hello));
    }
    stage.run(SECOND);
    assert!(stage.cluster.settled());
    stage
}

#[test]
fn frequencies_are_followed_once_and_little_is_moved() {
    let mut stage = large();
    // What node 0 holds is wanted ten times as often.
    let shares: Vec<f64> = (0..12)
        .map(|expert| {
            let holders = stage.cluster.routes().table.parts(1, expert)[0].holders;
            if holders.contains(0) { 10.0 } else { 1.0 }
        })
        .collect();
    let mut changes: Vec<Change> = Vec::new();
    for _ in 0..360 {
        used(&mut stage, &shares);
        stage.run(10 * SECOND);
        let change = stage.cluster.last_change().unwrap();
        if change.why == Why::Frequencies && changes.last() != Some(change) {
            changes.push(change.clone());
        }
    }
    assert!((1..4).contains(&changes.len()), "{:?}", stage.used);
    for change in changes {
        assert!(change.before_ns.unwrap() * 95 > change.after_ns * 100, "{change:?}");
        assert!(change.moved_bytes <= 2 * 2 * 20_000_000, "two experts of each layer: {change:?}");
    }
    assert!(stage.used[2].0 >= 600 * SECOND, "not before ten minutes");
}

#[test]
fn frequencies_that_wander_for_hours_move_next_to_nothing() {
    let mut stage = large();
    let mut dice = 7_u64;
    let mut roll = || {
        dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (dice >> 33) as f64 / f64::from(1_u32 << 31)
    };
    let mut shares = [1.0_f64; 12];
    for _ in 0..6 * 360 {
        for share in &mut shares {
            // A random walk within a factor of two of even, a tenth at a time.
            *share = (*share * (0.9 + 0.2 * roll())).clamp(0.7, 1.4);
        }
        used(&mut stage, &shares);
        stage.run(10 * SECOND);
    }
    // Six hours: 36 times it is looked at.
    assert!(stage.used.len() <= 6, "{:?}", stage.used);
}

/// Of what the slow node has to load.
const SLOW_BYTES: u64 = 1 << 40;

impl Stage {
    /// As `run`, but node 2 does not get done; every second it says how far it is: so many bytes further.
    fn run_beside_slow(&mut self, time: Duration, bytes_s: u64) {
        let until = self.now + time;
        while self.now < until {
            let (kept, others) =
                std::mem::take(&mut self.orders).into_iter().partition(|(node, _)| *node == 2);
            self.orders = others;
            self.run(TENTH);
            self.orders.splice(0..0, kept);
            if self.now.as_millis().is_multiple_of(1000) {
                let done_bytes = self.now.as_secs() * bytes_s;
                self.event(Event::Loading(2, Loading { done_bytes, total_bytes: SLOW_BYTES, peer_bytes: 0 }));
            }
        }
    }

    /// Two nodes serve, a third one has been asked to load what none of them would hold then.
    fn with_slow_newcomer() -> Stage {
        let mut stage = Stage::serving(2, 100);
        stage.join(2, 100);
        stage.run_beside_slow(4 * SECOND, 1000);
        assert_eq!((stage.cluster.epoch(), stage.cluster.next_epoch()), (1, Some(2)));
        stage
    }
}

#[test]
fn a_node_that_shows_progress_is_waited_for_however_slow_it_is() {
    let mut stage = Stage::with_slow_newcomer();
    assert!(stage.cluster.may_recover());
    stage.run_beside_slow(2 * SWITCH_WAIT_MAX, 1000);
    assert_eq!((stage.cluster.epoch(), stage.cluster.next_epoch(), stage.unserved()), (1, Some(2), 0));
    assert_eq!(state(&stage.cluster, 2), NodeState::Loading);
    assert!(!stage.cluster.may_recover(), "not soon, as far as anybody can tell");
    stage.run(SECOND);
    assert_eq!((stage.cluster.epoch(), routed(&stage.cluster, 2), stage.unserved()), (2, 8, 0));
    assert!(stage.cluster.settled());
}

#[test]
fn a_node_that_stops_making_progress_is_not_waited_for() {
    let mut stage = Stage::with_slow_newcomer();
    stage.run_beside_slow(2 * SWITCH_WAIT_MAX, 1000);
    stage.run_beside_slow(SWITCH_WAIT_MAX - 10 * SECOND, 0);
    assert_eq!(stage.cluster.next_epoch(), Some(2));
    stage.run_beside_slow(12 * SECOND, 0);
    assert_eq!((stage.cluster.epoch(), stage.cluster.next_epoch(), stage.unserved()), (1, None, 0));
    assert_eq!(state(&stage.cluster, 2), NodeState::Refused);
    stage.run_beside_slow(nodes::DECLINED_MIN - 5 * SECOND, 0);
    assert_eq!((stage.cluster.epoch(), stage.cluster.next_epoch()), (1, None), "it is left out for a while");
    stage.run(100 * SECOND);
    assert_eq!(routed(&stage.cluster, 2), 8, "and then asked again");
}

#[test]
fn a_node_that_says_forever_that_it_makes_progress_is_not_believed_forever() {
    let mut stage = Stage::with_slow_newcomer();
    let began = stage.now;
    while stage.cluster.next_epoch() == Some(2) {
        stage.run_beside_slow(60 * SECOND, 1);
        assert!(stage.now - began < LOADING_MAX + 100 * SECOND);
    }
    assert!(stage.now - began >= LOADING_MAX - 10 * SECOND);
    assert_eq!((state(&stage.cluster, 2), stage.unserved()), (NodeState::Refused, 0));
}

#[test]
fn what_is_urgent_does_not_wait_for_a_slow_node_and_that_goes_on_after_it() {
    let mut stage = Stage::with_slow_newcomer();
    stage.run_beside_slow(SWITCH_WAIT_MAX - 60 * SECOND, 1000);
    stage.lose(1);
    stage.run_beside_slow(30 * SECOND, 1000);
    assert_eq!((stage.cluster.epoch(), stage.unserved()), (1, 12), "it may be done in a moment");
    stage.run_beside_slow(60 * SECOND, 1000);
    assert_eq!((stage.cluster.epoch(), stage.unserved(), stage.why()), (3, 0, Why::Lost));
    assert_eq!(routed(&stage.cluster, 0), 24);
    // It was not to blame, and is planned for again.
    assert_eq!((state(&stage.cluster, 2), stage.cluster.next_epoch()), (NodeState::Loading, Some(4)));
    stage.run_beside_slow(2 * SWITCH_WAIT_MAX, 1000);
    assert_eq!(stage.cluster.next_epoch(), Some(4), "the loss is known and nothing more can be done");
    stage.run(SECOND);
    assert_eq!((stage.cluster.epoch(), stage.unserved()), (4, 0));
    assert_eq!([0, 2].map(|node| routed(&stage.cluster, node)), [12, 12]);
}

#[test]
fn a_plan_that_lacks_more_than_the_slow_node_is_not_waited_for() {
    let mut stage = Stage::serving(2, 100);
    stage.join(2, 100);
    stage.join(3, 100);
    stage.run_beside_slow(10 * SECOND, 1000);
    assert_eq!((stage.cluster.epoch(), stage.cluster.next_epoch()), (1, Some(2)));
    stage.lose(3);
    stage.run_beside_slow(SWITCH_WAIT_MAX, 1000);
    assert_eq!((stage.cluster.epoch(), stage.unserved()), (1, 0));
    assert_eq!(stage.cluster.next_epoch(), Some(3), "without the one that has gone");
    stage.run(SECOND);
    assert_eq!([0, 1, 2].map(|node| routed(&stage.cluster, node)), [8, 8, 8]);
}
