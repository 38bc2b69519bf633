//! Membership and epochs, event by event; random orders of events are in `simulation`.

mod coming;
mod simulation;

use mesh_wire::control::{Loading, Vitals};
use mesh_wire::id::{ExpertKey, NodeId, Slice};

use super::*;

/// A cluster whose plans are made on the spot, and taken.
#[derive(Debug)]
struct Direct(Cluster);

impl std::ops::Deref for Direct {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.0
    }
}

impl std::ops::DerefMut for Direct {
    fn deref_mut(&mut self) -> &mut Cluster {
        &mut self.0
    }
}

impl Direct {
    fn new(members: Vec<Member>, facts: ModelFacts) -> Direct {
        Direct::with_policy(members, facts, at_once())
    }

    fn with_policy(members: Vec<Member>, facts: ModelFacts, policy: Policy) -> Direct {
        Direct(Cluster::with_policy(members, facts, policy))
    }

    fn handle(&mut self, now: Duration, event: Event) -> Vec<Action> {
        let mut actions = self.0.handle(now, event);
        // Routes change first or last of all: what is told twice is told once.
        while let Some(at) = actions.iter().position(|action| matches!(action, Action::Plan(_))) {
            let Action::Plan(task) = actions.remove(at) else { unreachable!() };
            let more = self.0.handle(now, Event::Planned(Box::new(task.work())));
            let changed = actions.contains(&Action::RoutesChanged) || more.contains(&Action::RoutesChanged);
            actions.retain(|action| *action != Action::RoutesChanged);
            actions.extend(more.into_iter().filter(|action| *action != Action::RoutesChanged));
            actions.extend(changed.then_some(Action::RoutesChanged));
        }
        actions
    }
}

/// Nothing is waited out.
fn at_once() -> Policy {
    let patience = Patience {
        steady: Duration::ZERO,
        at_latest: Duration::ZERO,
        unserved: 1000 * SECOND,
        lost: 2000 * SECOND,
        reconsider: 3000 * SECOND,
    };
    Policy { patience, ..Policy::default() }
}

const SECOND: Duration = Duration::from_secs(1);

fn facts() -> ModelFacts {
    ModelFacts {
        fingerprint: [7; 32],
        moe_layers: vec![1, 2],
        experts: 12,
        expert_bytes: 100,
        top_k: 2,
        blocks: 1,
        ..ModelFacts::default()
    }
}

fn hello(experts: u64) -> Hello {
    Hello {
        name: "n".into(),
        version: "0".into(),
        model: [7; 32],
        memory_bytes: experts * 100,
        threads: 1,
        exact: true,
        kernels: "native scalar".into(),
        ..Hello::default()
    }
}

fn members(count: u8) -> Vec<Member> {
    (0..count).map(|key| Member { id: NodeId([key; 32]), name: format!("n{key}") }).collect()
}

fn cluster(count: u8) -> Direct {
    Direct::new(members(count), facts())
}

fn ack(epoch: u64) -> Placed {
    Placed { epoch, weight_bytes: 1, refusal: String::new() }
}

/// Nodes that are sent a placement, with its epoch and number of experts.
fn places(actions: &[Action]) -> Vec<(NodeIndex, u64, usize)> {
    let place = |action: &Action| match action {
        Action::Place(node, placement) => Some((*node, placement.epoch, placement.experts.len())),
        _ => None,
    };
    actions.iter().filter_map(place).collect()
}

fn routed(cluster: &Direct, node: NodeIndex) -> usize {
    cluster.routes().table.held_by(node).count()
}

fn state(cluster: &Direct, node: NodeIndex) -> NodeState {
    cluster.status(node).unwrap().state
}

/// Three nodes that serve epoch 1 with 8 experts each.
fn serving() -> Direct {
    let mut cluster = cluster(3);
    for node in 0..3 {
        cluster.handle(SECOND, Event::Joined(node, hello(100)));
    }
    for node in 0..3 {
        assert_eq!(cluster.handle(SECOND, Event::Placed(node, ack(1))), [Action::RoutesChanged]);
    }
    assert!(cluster.settled());
    cluster
}

#[test]
fn the_first_plan_waits_for_the_roster_and_experts_for_their_node() {
    let mut cluster = cluster(3);
    assert_eq!(cluster.routes().table, Table::empty(&facts()));
    assert_eq!(cluster.handle(SECOND, Event::Joined(0, hello(100))), []);
    assert_eq!(cluster.handle(SECOND, Event::Joined(2, hello(100))), []);
    assert_eq!(state(&cluster, 0), NodeState::Waiting);
    assert_eq!(state(&cluster, 1), NodeState::Absent);
    let actions = cluster.handle(SECOND, Event::Joined(1, hello(100)));
    assert_eq!(places(&actions), [(0, 1, 8), (1, 1, 8), (2, 1, 8)]);
    assert_eq!((state(&cluster, 0), cluster.settled()), (NodeState::Loading, false));
    assert_eq!(cluster.handle(SECOND, Event::Placed(1, ack(1))), [Action::RoutesChanged]);
    assert_eq!((routed(&cluster, 0), routed(&cluster, 1), cluster.epoch()), (0, 8, 1));
    assert_eq!((state(&cluster, 1), cluster.status(1).unwrap().epoch), (NodeState::Serving, 1));
    assert_eq!(cluster.status(1).unwrap().experts, 8);
    assert_eq!(cluster.handle(SECOND, Event::Placed(1, ack(1))), [], "said twice");
    assert_eq!(cluster.handle(SECOND, Event::Placed(0, ack(9))), [], "about something else");
}

#[test]
fn the_first_plan_is_made_after_a_while_or_on_demand() {
    let policy = Policy { plan_after: 5 * SECOND, ..at_once() };
    let mut cluster = Direct::with_policy(members(3), facts(), policy);
    assert_eq!(cluster.handle(10 * SECOND, Event::Tick), []);
    assert_eq!(cluster.handle(16 * SECOND, Event::Tick), [], "nobody to plan for");
    assert_eq!(places(&cluster.handle(17 * SECOND, Event::Joined(1, hello(100)))), [(1, 1, 24)]);

    let mut cluster = Direct::with_policy(members(3), facts(), policy);
    cluster.handle(SECOND, Event::Joined(1, hello(5)));
    assert_eq!(places(&cluster.handle(2 * SECOND, Event::Plan)), [(1, 1, 5)]);
    assert_eq!(cluster.unplaced(), 19);

    let policy = Policy { plan_at_nodes: 2, ..at_once() };
    let mut cluster = Direct::with_policy(members(3), facts(), policy);
    assert_eq!(cluster.handle(SECOND, Event::Joined(2, hello(100))), []);
    assert_eq!(places(&cluster.handle(SECOND, Event::Joined(0, hello(100)))), [(0, 1, 12), (2, 1, 12)]);
}

#[test]
fn nodes_that_do_not_fit_are_turned_away_with_the_remedy() {
    let turned_away = |hello: Hello, remedy: &str| {
        let mut cluster = cluster(1);
        let actions = cluster.handle(SECOND, Event::Joined(0, hello));
        let [Action::Disconnect(0, reason)] = &actions[..] else { panic!("{actions:?}") };
        assert!(reason.contains(remedy), "{reason}");
        assert_eq!(cluster.status(0).unwrap().note, *reason);
        assert_eq!(state(&cluster, 0), NodeState::Absent);
    };
    turned_away(Hello { model: [8; 32], ..hello(9) }, "same --model");
    turned_away(Hello { exact: false, ..hello(9) }, "--kernels exact");
    turned_away(Hello { held_epoch: u64::MAX, ..hello(9) }, "restart the node");

    let policy = Policy { require_exact: false, ..at_once() };
    let mut cluster = Direct::with_policy(members(1), facts(), policy);
    let actions = cluster.handle(SECOND, Event::Joined(0, Hello { exact: false, ..hello(9) }));
    assert_eq!(places(&actions), [(0, 1, 9)]);
}

#[test]
fn a_lost_node_is_unrouted_at_once_and_comes_back_after_it_loaded() {
    let mut cluster = serving();
    assert_eq!(cluster.handle(SECOND, Event::Lost(1)), [Action::RoutesChanged]);
    assert_eq!((routed(&cluster, 0), routed(&cluster, 1), cluster.epoch()), (8, 0, 1));
    assert_eq!(cluster.handle(SECOND, Event::Missed(1)), [], "its last calls");
    assert_eq!(cluster.handle(SECOND, Event::Placed(1, ack(1))), []);
    let back = Hello { held_epoch: 1, ..hello(100) };
    assert_eq!(places(&cluster.handle(SECOND, Event::Joined(1, back))), [(1, 1, 8)]);
    assert_eq!(routed(&cluster, 1), 0);
    assert_eq!(cluster.handle(SECOND, Event::Placed(1, ack(1))), [Action::RoutesChanged]);
    assert_eq!((routed(&cluster, 1), cluster.epoch()), (8, 1));
    // A new connection while the old one still seems up: it has to load again.
    let actions = cluster.handle(SECOND, Event::Joined(1, hello(100)));
    assert_eq!((places(&actions), routed(&cluster, 1)), (vec![(1, 1, 8)], 0));
}

#[test]
fn a_late_node_is_planned_for_while_the_old_plan_serves() {
    let policy = Policy { plan_at_nodes: 2, ..at_once() };
    let mut cluster = Direct::with_policy(members(4), facts(), policy);
    cluster.handle(SECOND, Event::Joined(0, hello(100)));
    cluster.handle(SECOND, Event::Joined(1, hello(100)));
    cluster.handle(SECOND, Event::Placed(0, ack(1)));
    cluster.handle(SECOND, Event::Placed(1, ack(1)));
    let old = cluster.routes();
    // It brings an epoch of an earlier router: the next one must be beyond it.
    let actions = cluster.handle(SECOND, Event::Joined(2, Hello { held_epoch: 40, ..hello(100) }));
    assert_eq!(places(&actions), [(0, 41, 8), (1, 41, 8), (2, 41, 8)]);
    assert_eq!(cluster.next_epoch(), Some(41));
    assert_eq!(cluster.handle(SECOND, Event::Placed(2, ack(41))), []);
    assert_eq!(cluster.handle(SECOND, Event::Placed(0, ack(41))), []);
    // Another one: not before this change is over.
    assert_eq!(cluster.handle(SECOND, Event::Joined(3, hello(100))), []);
    assert_eq!(cluster.routes(), old);
    // The last one dies instead of answering: what it held is lost in either plan. It keeps its place in the next.
    let actions = cluster.handle(SECOND, Event::Lost(1));
    assert_eq!(places(&actions), [(0, 42, 6), (2, 42, 6), (3, 42, 6)]);
    assert_eq!(actions.last(), Some(&Action::RoutesChanged));
    assert_eq!((cluster.epoch(), routed(&cluster, 0), routed(&cluster, 2)), (41, 8, 8));
    assert_eq!(cluster.last_change().unwrap().nodes, [2]);
    // It comes back in the middle of that change, with what it held before.
    let back = Hello { held_epoch: 41, ..hello(100) };
    assert_eq!(places(&cluster.handle(SECOND, Event::Joined(1, back))), [(1, 41, 8), (1, 42, 6)]);
    assert_eq!(cluster.handle(SECOND, Event::Placed(1, ack(41))), [Action::RoutesChanged]);
    assert_eq!(routed(&cluster, 1), 8);
    for node in [0, 1, 2] {
        assert_eq!(cluster.handle(SECOND, Event::Placed(node, ack(42))), []);
    }
    assert_eq!(cluster.handle(SECOND, Event::Placed(3, ack(42))), [Action::RoutesChanged]);
    assert_eq!((cluster.epoch(), routed(&cluster, 1), routed(&cluster, 3)), (42, 6, 6));
    let change = cluster.last_change().unwrap();
    assert_eq!((change.epoch, change.why, &change.nodes[..]), (42, Why::Joined, &[3][..]));
    assert!(change.before_ns.is_some() && change.moved_bytes >= 600);
}

#[test]
fn a_plan_that_would_lose_experts_is_given_up() {
    let policy = Policy { plan_at_nodes: 2, ..at_once() };
    let mut cluster = Direct::with_policy(members(3), facts(), policy);
    for node in [0, 1] {
        cluster.handle(SECOND, Event::Joined(node, hello(100)));
    }
    for node in [0, 1] {
        cluster.handle(SECOND, Event::Placed(node, ack(1)));
    }
    let old = cluster.routes();
    assert_eq!(places(&cluster.handle(SECOND, Event::Joined(2, hello(100)))).len(), 3);
    cluster.handle(SECOND, Event::Placed(0, ack(2)));
    cluster.handle(SECOND, Event::Lost(2));
    // The new one died, and the others were to give it a third of theirs. They go back to what they hold.
    let actions = cluster.handle(SECOND, Event::Placed(1, ack(2)));
    assert_eq!(places(&actions), [(0, 1, 12), (1, 1, 12)]);
    assert_eq!((cluster.next_epoch(), cluster.settled()), (None, true));
    assert!(Arc::ptr_eq(&old, &cluster.routes()), "as if nothing had been");
    // The next plan has another number: some may still hold the old one.
    assert_eq!(
        places(&cluster.handle(SECOND, Event::Joined(2, hello(100)))),
        [(0, 3, 8), (1, 3, 8), (2, 3, 8)]
    );
}

#[test]
fn a_node_that_never_answers_its_placement_holds_back_a_plan_for_a_while_only() {
    let policy = Policy { plan_at_nodes: 1, ..at_once() };
    let mut cluster = Direct::with_policy(members(2), facts(), policy);
    cluster.handle(SECOND, Event::Joined(0, hello(100)));
    cluster.handle(SECOND, Event::Placed(0, ack(1)));
    cluster.handle(SECOND, Event::Joined(1, hello(100)));
    cluster.handle(SECOND, Event::Placed(0, ack(2)));
    assert_eq!(cluster.handle(SWITCH_WAIT_MAX, Event::Tick), []);
    let actions = cluster.handle(SECOND + SWITCH_WAIT_MAX, Event::Tick);
    assert!(matches!(&actions[..], [Action::Place(0, _), Action::Report(1, _)]), "{actions:?}");
    assert_eq!((cluster.epoch(), routed(&cluster, 0), routed(&cluster, 1)), (1, 24, 0));
    assert_eq!((state(&cluster, 1), cluster.settled()), (NodeState::Refused, true));
    assert_eq!(cluster.handle(SECOND + SWITCH_WAIT_MAX, Event::Placed(1, ack(2))), [], "too late");
    assert_eq!(places(&cluster.handle(SECOND + SWITCH_WAIT_MAX, Event::Plan)), [(0, 3, 12), (1, 3, 12)]);
    // Where nothing is lost by it, the plan comes into use without the slow one, who may still come.
    let policy =
        Policy { wishes: Wishes { copies: crate::placement::Copies::Exactly(2), ..policy.wishes }, ..policy };
    let mut cluster = Direct::with_policy(members(2), facts(), policy);
    cluster.handle(SECOND, Event::Joined(0, hello(100)));
    cluster.handle(SECOND, Event::Placed(0, ack(1)));
    cluster.handle(SECOND, Event::Joined(1, hello(100)));
    cluster.handle(SECOND, Event::Placed(0, ack(2)));
    assert_eq!(cluster.handle(SECOND + SWITCH_WAIT_MAX, Event::Tick), [Action::RoutesChanged]);
    assert_eq!((cluster.epoch(), routed(&cluster, 0), routed(&cluster, 1)), (2, 24, 0));
    assert_eq!(cluster.handle(SECOND + SWITCH_WAIT_MAX, Event::Placed(1, ack(2))), [Action::RoutesChanged]);
    assert_eq!(routed(&cluster, 1), 24);
}

#[test]
fn a_refusal_is_reported_and_the_others_take_over_what_fits() {
    let mut cluster = cluster(2);
    cluster.handle(SECOND, Event::Joined(0, hello(20)));
    cluster.handle(SECOND, Event::Joined(1, hello(20)));
    cluster.handle(SECOND, Event::Placed(0, ack(1)));
    let refusal = Placed { epoch: 1, weight_bytes: 0, refusal: "disk on fire".into() };
    let actions = cluster.handle(SECOND, Event::Placed(1, refusal.clone()));
    assert!(matches!(&actions[0], Action::Report(1, note) if note.contains("disk on fire")));
    assert_eq!(places(&actions), [(0, 2, 20)]);
    assert_eq!((state(&cluster, 1), routed(&cluster, 0), routed(&cluster, 1)), (NodeState::Refused, 12, 0));
    cluster.handle(SECOND, Event::Placed(0, ack(2)));
    assert_eq!((routed(&cluster, 0), cluster.unplaced()), (20, 4));
    assert_eq!(state(&cluster, 1), NodeState::Refused);
    let almost = SECOND + nodes::DECLINED_MIN - Duration::from_millis(1);
    assert_eq!(cluster.handle(almost, Event::Tick), [], "it is not asked again at once");
    assert_eq!(places(&cluster.handle(almost, Event::Plan)), [(0, 3, 12), (1, 3, 12)], "but on demand");
}

/// What follows from an event, where node 0 does whatever it is asked for. The epoch that node 1 is asked to hold.
fn settle(cluster: &mut Direct, now: Duration, event: Event) -> Option<u64> {
    let mut asked = None;
    for (node, epoch, _) in places(&cluster.handle(now, event)) {
        if node == 0 {
            asked = settle(cluster, now, Event::Placed(0, ack(epoch))).or(asked);
        } else {
            asked = Some(epoch);
        }
    }
    asked
}

#[test]
fn who_refused_is_asked_again_later_and_later() {
    let mut cluster = cluster(2);
    settle(&mut cluster, SECOND, Event::Joined(0, hello(20)));
    let mut asked = settle(&mut cluster, SECOND, Event::Joined(1, hello(20)));
    let (mut now, mut pauses) = (SECOND, Vec::new());
    for _ in 0..3 {
        let refusal = Placed { epoch: asked.unwrap(), weight_bytes: 0, refusal: "disk full".into() };
        assert_eq!(settle(&mut cluster, now, Event::Placed(1, refusal)), None, "at once");
        assert_eq!((state(&cluster, 1), routed(&cluster, 0)), (NodeState::Refused, 20));
        let refused = now;
        asked = None;
        while asked.is_none() && now < refused + 900 * SECOND {
            now += SECOND;
            asked = settle(&mut cluster, now, Event::Tick);
        }
        pauses.push((now - refused).as_secs());
    }
    assert!(
        pauses.iter().zip([30, 60, 120]).all(|(found, least)| (least..least + 10).contains(found)),
        "{pauses:?}"
    );
    // There is room now.
    settle(&mut cluster, now, Event::Placed(1, ack(asked.unwrap())));
    assert_eq!((routed(&cluster, 0), routed(&cluster, 1), cluster.unplaced()), (12, 12, 0));
}

#[test]
fn a_node_that_returns_with_less_memory_is_planned_for_anew() {
    let mut cluster = serving();
    cluster.handle(SECOND, Event::Lost(2));
    assert_eq!(places(&cluster.handle(SECOND, Event::Joined(2, hello(8)))), [(2, 1, 8)], "still fits");
    cluster.handle(SECOND, Event::Lost(2));
    assert_eq!(places(&cluster.handle(SECOND, Event::Joined(2, hello(7)))).last(), Some(&(2, 2, 7)));
}

#[test]
fn misses_make_a_node_suspect_and_a_trial_brings_it_back() {
    let mut cluster = serving();
    assert_eq!(cluster.budget(0, 8).total, crate::health::BUDGET_BEFORE_HISTORY);
    assert_eq!(cluster.handle(SECOND, Event::Missed(0)), []);
    let actions = cluster.handle(SECOND, Event::Missed(0));
    assert!(matches!(actions[..], [Action::Report(0, _), Action::RoutesChanged]), "{actions:?}");
    assert_eq!((state(&cluster, 0), routed(&cluster, 0)), (NodeState::Suspect, 0));
    assert!(cluster.may_recover(), "its first pause");
    assert_eq!(cluster.handle(SECOND * 3 / 2, Event::Tick), []);
    let actions = cluster.handle(2 * SECOND, Event::Tick);
    assert!(matches!(actions[..], [Action::Report(0, _), Action::RoutesChanged]), "{actions:?}");
    assert_eq!(routed(&cluster, 0), 8);
    let (service, round_trip) = (SECOND / 1000, SECOND / 500);
    cluster.handle(2 * SECOND, Event::Answered { node: 0, assignments: 8, service, round_trip });
    assert_eq!(cluster.budget(0, 8).total, crate::health::BUDGET_FLOOR);
    assert_eq!(cluster.status(0).unwrap().call_means, Some((service, round_trip)));
    assert!(!cluster.may_recover(), "all is well");
    assert_eq!(cluster.handle(2 * SECOND, Event::Missed(0)), []);
    // Nor is one waited for that fails its trial, too.
    cluster.handle(2 * SECOND, Event::Missed(0));
    assert!(cluster.may_recover());
    cluster.handle(3 * SECOND, Event::Tick);
    cluster.handle(3 * SECOND, Event::Missed(0));
    assert_eq!((state(&cluster, 0), cluster.may_recover()), (NodeState::Suspect, false));
}

#[test]
fn events_about_strangers_are_ignored() {
    let mut cluster = serving();
    let before = cluster.routes();
    let health = Health { epoch: 1, ..Health::default() };
    for event in [
        Event::Joined(3, hello(9)),
        Event::Lost(3),
        Event::Placed(NodeIndex::MAX, ack(1)),
        Event::Health(3, health),
        Event::Missed(3),
        Event::Answered { node: 3, assignments: 1, service: SECOND, round_trip: SECOND },
    ] {
        assert_eq!(cluster.handle(SECOND, event), []);
    }
    assert_eq!(cluster.routes(), before);
    assert!(cluster.status(3).is_none());
    assert_eq!(cluster.budget(3, 1).total, crate::health::BUDGET_BEFORE_HISTORY);
    assert_eq!(cluster.statuses().len(), 3);
}

#[test]
fn placements_name_experts_in_order() {
    let mut cluster = cluster(1);
    let actions = cluster.handle(SECOND, Event::Joined(0, hello(100)));
    let [Action::Place(0, placement), Action::RoutesChanged] = &actions[..] else { panic!("{actions:?}") };
    let all = [1, 2].into_iter().flat_map(|layer| {
        (0..12).map(move |expert| Slice { key: ExpertKey { layer, expert }, from: 0, to: 1 })
    });
    assert_eq!(placement.experts, all.collect::<Vec<_>>());
    assert_eq!(placement.model, [7; 32]);
}

#[test]
fn a_node_that_sends_nonsense_is_left_out_until_it_is_pardoned() {
    let mut cluster = serving();
    for _ in 1..MALFORMED_MAX {
        assert_eq!(cluster.handle(SECOND, Event::Malformed(1)), []);
    }
    let actions = cluster.handle(SECOND, Event::Malformed(1));
    assert!(matches!(&actions[..], [Action::Report(1, _), .., Action::RoutesChanged]), "{actions:?}");
    assert_eq!(places(&actions), [(0, 2, 12), (2, 2, 12)], "the others are to take over");
    assert_eq!((state(&cluster, 1), routed(&cluster, 1)), (NodeState::Quarantined, 0));
    // Coming back changes nothing, neither before the others hold its part nor after.
    for epoch in [1, 2] {
        cluster.handle(SECOND, Event::Lost(1));
        assert_eq!(places(&cluster.handle(SECOND, Event::Joined(1, hello(100)))), []);
        cluster.handle(SECOND, Event::Placed(1, ack(epoch)));
        assert_eq!((state(&cluster, 1), routed(&cluster, 1)), (NodeState::Quarantined, 0));
        for node in [0, 2] {
            cluster.handle(SECOND, Event::Placed(node, ack(2)));
        }
        assert_eq!((cluster.epoch(), routed(&cluster, 0), routed(&cluster, 2)), (2, 12, 12));
    }
    let actions = cluster.handle(SECOND, Event::Pardon(1));
    assert_eq!(places(&actions), [(0, 3, 8), (1, 3, 8), (2, 3, 8)], "the plan was made without it");
    assert_ne!(state(&cluster, 1), NodeState::Quarantined);
}

/// Three nodes that serve epoch 1, with no room for more than their 8 experts.
fn full() -> Direct {
    let mut cluster = cluster(3);
    for node in 0..3 {
        cluster.handle(SECOND, Event::Joined(node, hello(8)));
    }
    for node in 0..3 {
        cluster.handle(SECOND, Event::Placed(node, ack(1)));
    }
    cluster
}

#[test]
fn a_node_that_was_proven_wrong_is_left_out_at_once_until_it_is_pardoned() {
    let mut cluster = serving();
    let actions = cluster.handle(SECOND, Event::Lied(1, "computed wrongly".into()));
    let Action::Report(1, text) = &actions[0] else { panic!("{actions:?}") };
    assert_eq!(*text, "computed wrongly; it is left out until `moemesh nodes pardon`");
    assert_eq!(cluster.status(1).unwrap().note, *text);
    assert_eq!(places(&actions), [(0, 2, 12), (2, 2, 12)], "the others are to take over");
    assert_eq!((state(&cluster, 1), routed(&cluster, 1)), (NodeState::Quarantined, 0));
    assert_eq!(cluster.handle(SECOND, Event::Lied(1, "again".into())), [], "said once");
    cluster.handle(SECOND, Event::Lost(1));
    cluster.handle(SECOND, Event::Joined(1, hello(100)));
    assert_eq!(state(&cluster, 1), NodeState::Quarantined, "coming back changes nothing");
    assert!(cluster.status(1).unwrap().note.contains("computed wrongly"), "nor what is said of it");
    cluster.handle(SECOND, Event::Pardon(1));
    assert_ne!(state(&cluster, 1), NodeState::Quarantined);
    let actions = cluster.handle(SECOND, Event::Lied(1, "once more".into()));
    assert!(
        matches!(&actions[0], Action::Report(1, _)),
        "a pardon forgives, it does not protect: {actions:?}"
    );
}

#[test]
fn a_hot_node_is_spared_while_it_serves_and_routed_all_the_same() {
    let mut cluster = serving();
    let shown = |degrees: i32| {
        let vitals = Vitals { temperature_mc: Some(degrees * 1000), ..Vitals::default() };
        Event::Health(1, Health { vitals, ..Health::default() })
    };
    assert_eq!(cluster.handle(2 * SECOND, shown(81)), []);
    let actions = cluster.handle(3 * SECOND, shown(82));
    assert!(matches!(&actions[..], [Action::Report(1, _), Action::RoutesChanged]), "{actions:?}");
    assert_eq!(cluster.routes().spared, [1]);
    assert_eq!((routed(&cluster, 1), cluster.status(1).unwrap().spared), (8, true));
    // Reconnecting does not make it cool, and does not let it change more often.
    cluster.handle(4 * SECOND, Event::Lost(1));
    assert!(cluster.routes().spared.is_empty());
    cluster.handle(5 * SECOND, Event::Joined(1, hello(100)));
    cluster.handle(5 * SECOND, Event::Placed(1, ack(1)));
    assert_eq!(cluster.routes().spared, [1]);
    assert_eq!(cluster.handle(6 * SECOND, shown(40)), []);
    let actions = cluster.handle(40 * SECOND, shown(40));
    assert!(matches!(&actions[..], [Action::Report(1, _), Action::RoutesChanged]), "{actions:?}");
    assert!(cluster.routes().spared.is_empty());
    // What no sensor shows is not believed.
    assert_eq!(cluster.handle(100 * SECOND, shown(2_000_000)), []);
    assert_eq!(cluster.status(1).unwrap().health.unwrap().vitals, Vitals::default());
}

#[test]
fn a_node_that_leaves_gets_no_more_calls_where_nobody_can_take_over() {
    let mut cluster = full();
    let actions = cluster.handle(SECOND, Event::Leaving(1));
    // It is told that it may go.
    assert_eq!(places(&actions), [(1, 1, 0)]);
    assert_eq!(actions.last(), Some(&Action::RoutesChanged));
    assert_eq!((state(&cluster, 1), routed(&cluster, 1)), (NodeState::Leaving, 0));
    assert_eq!(cluster.handle(SECOND, Event::Leaving(1)), [], "said twice");
    cluster.handle(SECOND, Event::Lost(1));
    cluster.handle(SECOND, Event::Joined(1, hello(8)));
    cluster.handle(SECOND, Event::Placed(1, ack(1)));
    assert_eq!((state(&cluster, 1), routed(&cluster, 1)), (NodeState::Serving, 8));
}

#[test]
fn a_revoked_node_is_cut_and_stays_out() {
    let mut cluster = serving();
    let actions = cluster.handle(SECOND, Event::Revoked(1));
    assert!(matches!(&actions[..], [Action::Disconnect(1, _), .., Action::RoutesChanged]), "{actions:?}");
    assert_eq!(places(&actions), [(0, 2, 12), (2, 2, 12)], "the others are to take over");
    assert_eq!((state(&cluster, 1), routed(&cluster, 1)), (NodeState::Revoked, 0));
    let actions = cluster.handle(SECOND, Event::Joined(1, hello(100)));
    assert!(matches!(&actions[..], [Action::Disconnect(1, _)]), "{actions:?}");
    // One that is away leaves what it should hold as well; one that holds nothing leaves nothing.
    let mut cluster = serving();
    cluster.handle(SECOND, Event::Lost(1));
    assert_eq!(places(&cluster.handle(SECOND, Event::Revoked(1))), [(0, 2, 12), (2, 2, 12)]);
    let mut cluster = serving();
    cluster.admit(Member { id: NodeId([9; 32]), name: "late".into() });
    assert_eq!(cluster.handle(SECOND, Event::Revoked(3)), []);
}

#[test]
fn a_machine_that_is_admitted_later_takes_part() {
    let mut cluster = serving();
    assert_eq!(cluster.admit(Member { id: NodeId([9; 32]), name: "late".into() }), 3);
    assert_eq!(state(&cluster, 3), NodeState::Absent);
    let actions = cluster.handle(SECOND, Event::Joined(3, hello(100)));
    assert_eq!(
        places(&actions).iter().map(|(node, epoch, _)| (*node, *epoch)).collect::<Vec<_>>(),
        [(0, 2), (1, 2), (2, 2), (3, 2)]
    );
    for node in 0..4 {
        cluster.handle(SECOND, Event::Placed(node, ack(2)));
    }
    assert_eq!(routed(&cluster, 3), 6);
}

/// A loss and a return of `node`, its part loaded.
fn flap(cluster: &mut Direct, node: NodeIndex, now: Duration) -> Vec<Action> {
    let actions = cluster.handle(now, Event::Lost(node));
    cluster.handle(now, Event::Joined(node, hello(8)));
    cluster.handle(now, Event::Placed(node, ack(1)));
    actions
}

#[test]
fn a_node_that_flaps_gets_no_calls_for_a_while_and_the_routes_stay() {
    let mut cluster = serving();
    flap(&mut cluster, 1, SECOND);
    flap(&mut cluster, 1, 2 * SECOND);
    assert_eq!(state(&cluster, 1), NodeState::Serving, "two may happen");
    let actions = flap(&mut cluster, 1, 3 * SECOND);
    assert!(
        actions
            .iter()
            .any(|action| matches!(action, Action::Report(1, why) if why.contains("again and again")))
    );
    assert_eq!((state(&cluster, 1), routed(&cluster, 1)), (NodeState::Suspect, 0));
    let routes = cluster.routes();
    flap(&mut cluster, 1, 3 * SECOND + SECOND / 2);
    assert!(Arc::ptr_eq(&routes, &cluster.routes()), "the routes flap with it");
    cluster.handle(5 * SECOND, Event::Tick);
    assert_eq!(routed(&cluster, 1), 0, "two seconds this time");
    let actions = cluster.handle(6 * SECOND, Event::Tick);
    assert!(actions.contains(&Action::Report(1, "is tried again".into())));
    assert_eq!(state(&cluster, 1), NodeState::Serving);
    assert!(routed(&cluster, 1) > 0);
}

#[test]
fn a_node_that_says_it_leaves_does_not_flap() {
    let mut cluster = full();
    for second in 1..6 {
        cluster.handle(second * SECOND, Event::Leaving(1));
        flap(&mut cluster, 1, second * SECOND);
    }
    assert_eq!(state(&cluster, 1), NodeState::Serving);
}

#[test]
fn a_measured_link_counts_before_there_is_history() {
    let mut cluster = serving();
    let before = cluster.budget(0, 1);
    cluster.handle(SECOND, Event::Linked(0, LinkSpeed { round_trip_us: 150_000, mb_s: 0 }));
    assert_eq!(before.hedge, crate::health::HEDGE_BEFORE_HISTORY);
    assert_eq!(cluster.budget(0, 1).hedge, Duration::from_millis(150));
}

#[test]
fn a_node_that_claims_what_no_machine_has_is_counted_as_an_ordinary_one_and_that_is_said() {
    let large = ModelFacts { expert_bytes: 10_000_000, top_k: 8, ..facts() };
    let mut cluster = Direct::new(members(2), large);
    let greedy = Hello { memory_bytes: u64::MAX, weight_mb_s: [u32::MAX; 5], ..hello(0) };
    let honest = Hello { memory_bytes: 1 << 40, weight_mb_s: [20_000; 5], ..hello(0) };
    let actions = cluster.handle(SECOND, Event::Joined(0, greedy));
    assert!(matches!(&actions[..], [Action::Report(0, note)] if note.contains("claims")), "{actions:?}");
    let placed = places(&cluster.handle(SECOND, Event::Joined(1, honest)));
    // Who is not believed counts like the others, and answers are waited for as if nothing were known.
    assert_eq!(placed, [(0, 1, 12), (1, 1, 12)]);
    assert_eq!(cluster.budget(0, 8).total, crate::health::BUDGET_BEFORE_HISTORY);
    let status = cluster.status(0).unwrap();
    let counted = status.hello.unwrap();
    assert_eq!(counted.memory_bytes, crate::claims::MEMORY_BYTES_MAX);
    assert_eq!(counted.weight_mb_s, [crate::claims::WEIGHT_MB_S_MAX; 5]);
    assert!(status.note.contains("counted as 16384"), "{}", status.note);
}

/// A cluster whose router starts again with the plan of `serving`, of epoch 1.
fn restarted(plan_at_nodes: usize) -> Direct {
    let stored = serving().newest().unwrap();
    let patience = Patience { unserved: SECOND, ..at_once().patience };
    let policy = Policy { plan_at_nodes, plan_after: 60 * SECOND, patience, ..Policy::default() };
    let mut cluster = Direct::with_policy(members(4), facts(), policy);
    cluster.restore(stored);
    cluster
}

#[test]
fn after_a_restart_nodes_are_asked_for_what_they_hold() {
    let mut cluster = restarted(4);
    assert_eq!(cluster.handle(SECOND, Event::Tick), [Action::RoutesChanged]);
    assert_eq!((cluster.epoch(), routed(&cluster, 0)), (1, 0), "nobody is here yet");
    let back = Hello { held_epoch: 1, ..hello(100) };
    let actions = cluster.handle(SECOND, Event::Joined(2, back.clone()));
    let [Action::Place(2, placement)] = &actions[..] else { panic!("{actions:?}") };
    let before = serving().newest().unwrap();
    assert_eq!((placement.epoch, &placement.experts), (1, &before.plan.experts(2)));
    assert_eq!(cluster.handle(SECOND, Event::Placed(2, ack(1))), [Action::RoutesChanged]);
    assert_eq!(routed(&cluster, 2), 8);
    // Somebody new does not make those who are late lose theirs.
    assert_eq!(cluster.handle(2 * SECOND, Event::Joined(3, hello(100))), []);
    assert_eq!(places(&cluster.handle(3 * SECOND, Event::Joined(0, back.clone()))), [(0, 1, 8)]);
    cluster.handle(3 * SECOND, Event::Placed(0, ack(1)));
    let actions = cluster.handle(4 * SECOND, Event::Joined(1, back));
    let planned: Vec<_> = places(&actions).into_iter().filter(|(_, epoch, _)| *epoch == 2).collect();
    assert_eq!(planned, [(0, 2, 6), (1, 2, 6), (2, 2, 6), (3, 2, 6)]);
    assert_eq!(cluster.newest_epoch(), 2);
}

#[test]
fn a_restart_with_an_older_plan_goes_beyond_what_nodes_hold() {
    let mut cluster = restarted(4);
    cluster.handle(SECOND, Event::Joined(0, Hello { held_epoch: 1, ..hello(100) }));
    let actions = cluster.handle(SECOND, Event::Joined(1, Hello { held_epoch: 7, ..hello(100) }));
    assert_eq!(places(&actions), [(0, 8, 8), (1, 8, 8)]);
    cluster.handle(SECOND, Event::Placed(0, ack(1)));
    assert_eq!(routed(&cluster, 0), 0, "an answer about the old epoch");
    cluster.handle(SECOND, Event::Placed(0, ack(8)));
    cluster.handle(SECOND, Event::Placed(1, ack(8)));
    assert_eq!((cluster.epoch(), routed(&cluster, 0), routed(&cluster, 1)), (8, 8, 8));
}

#[test]
fn a_node_that_claims_the_largest_epoch_does_not_shut_the_others_out() {
    let mut cluster = Direct::with_policy(members(2), facts(), Policy { plan_at_nodes: 2, ..at_once() });
    cluster.handle(SECOND, Event::Joined(0, Hello { held_epoch: EPOCH_MAX - 1, ..hello(100) }));
    let placed = places(&cluster.handle(SECOND, Event::Joined(1, hello(100))));
    assert_eq!(placed, [(0, EPOCH_MAX, 12), (1, EPOCH_MAX, 12)]);
    cluster.handle(SECOND, Event::Placed(1, ack(EPOCH_MAX)));
    // An honest node loses its connection and comes back, to this router and to its next start.
    let back = Hello { held_epoch: EPOCH_MAX, ..hello(100) };
    let asked = places(&cluster.handle(2 * SECOND, Event::Joined(1, back.clone())));
    assert_eq!(asked, [(1, EPOCH_MAX, 12)]);
    let mut next = Direct::with_policy(members(2), facts(), at_once());
    next.restore(cluster.newest().unwrap());
    assert_eq!(places(&next.handle(SECOND, Event::Joined(1, back))), [(1, EPOCH_MAX, 12)]);
    let beyond = Hello { held_epoch: EPOCH_MAX + 1, ..hello(100) };
    let actions = next.handle(SECOND, Event::Joined(0, beyond));
    assert!(matches!(&actions[..], [Action::Disconnect(0, why)] if why.contains("restart")), "{actions:?}");
}

#[test]
fn without_those_who_are_gone_a_new_node_is_planned_for_after_a_while() {
    let mut cluster = restarted(4);
    cluster.handle(SECOND, Event::Joined(0, hello(100)));
    assert_eq!(cluster.handle(SECOND, Event::Joined(3, hello(100))), []);
    assert_eq!(places(&cluster.handle(60 * SECOND, Event::Tick)), []);
    assert_eq!(places(&cluster.handle(62 * SECOND, Event::Tick)), [(0, 2, 12), (3, 2, 12)]);
}

#[test]
fn a_plan_waits_for_links_to_be_measured_but_not_for_long() {
    let policy = Policy { measure_within: SECOND, plan_at_nodes: 2, ..at_once() };
    let linked = |node| Event::Linked(node, LinkSpeed { round_trip_us: 200, mb_s: 100 });
    let joined = || {
        let mut cluster = Direct::with_policy(members(2), facts(), policy);
        cluster.handle(SECOND, Event::Joined(0, hello(100)));
        assert_eq!(cluster.handle(SECOND, Event::Joined(1, hello(100))), []);
        assert_eq!(cluster.handle(SECOND, linked(1)), []);
        cluster
    };
    assert_eq!(places(&joined().handle(SECOND, linked(0))), [(0, 1, 12), (1, 1, 12)]);
    let mut cluster = joined();
    assert_eq!(cluster.handle(3 * SECOND / 2, Event::Tick), []);
    assert_eq!(places(&cluster.handle(2 * SECOND, Event::Tick)), [(0, 1, 12), (1, 1, 12)]);
    assert_eq!(cluster.handle(2 * SECOND, linked(0)), [], "later measurements move nothing");
}

#[test]
fn a_node_that_makes_it_slower_is_told_so() {
    let large = ModelFacts { expert_bytes: 10_000_000, top_k: 8, ..facts() };
    let policy = Policy { plan_at_nodes: 2, ..at_once() };
    let mut cluster = Direct::with_policy(members(2), large, policy);
    let with = |mb_s| Hello { memory_bytes: 1 << 40, weight_mb_s: [mb_s; 5], ..hello(0) };
    cluster.handle(SECOND, Event::Joined(0, with(20_000)));
    let actions = cluster.handle(SECOND, Event::Joined(1, with(500)));
    assert!(
        actions.iter().any(|action| matches!(action, Action::Report(1, note) if note.contains("slower"))),
        "{actions:?}"
    );
    assert_eq!(places(&actions), [(0, 1, 24), (1, 1, 0)]);
    let outlook = cluster.outlook().unwrap();
    assert_eq!(outlook.shares.iter().map(|share| share.left_out).collect::<Vec<_>>(), [false, true]);
    assert_eq!((outlook.epoch, outlook.copies, outlook.unplaced), (1, (1, 1), 0));
}
