//! Rung: failures. Copies, slices, and nodes that are silent, late, refuse or talk nonsense: the text is that of one
//! process, and only what nobody can compute ends a request, by name.

use std::sync::{Arc, LazyLock};
use std::time::Instant;

use mesh_proto::cluster::NodeState;
use mesh_proto::routes::{self, Holders, ROUTER, Table};
use mesh_wire::control::Refusal;
use model::format::Format;
use model::open::Model;
use moemesh_tests::cluster::{Outcome, even, finish, generate, open};
use moemesh_tests::scripted::{Mood, Part, Troupe};
use router::request::{Event, GenerateError, GenerateRequest};

use super::equivalence::{alone, prompt, request};

/// Packed once for all tests of this program.
static CACHE: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

/// A layer of 64 experts of eight blocks each: experts that can be cut.
const WIDE: &str = "synthetic:olmoe-1b-7b?layers=1&seed=3";

/// Calls of a node before it changes its mood: few, because a router that learned that another is faster may ask it
/// rarely.
const WELL_FOR: u64 = 4;

/// Stories told until a node has had the occasion to misbehave.
const STORIES_MAX: usize = 20;

pub(super) fn tale() -> Arc<Model> {
    open(&moemesh_tests::tale_moe(), Format::Q4, CACHE.path())
}

pub(super) fn wide() -> Arc<Model> {
    Arc::new(Model::open(WIDE, Format::Q4, CACHE.path(), &mut |_, _, _| {}).unwrap())
}

pub(super) fn well() -> Part {
    Part::new(|_| Mood::Answer)
}

/// Answers, and is in this mood from then on.
fn then(mood: Mood) -> Part {
    Part::new(move |call| if call < WELL_FOR { Mood::Answer } else { mood })
}

/// With copies the router computes nothing itself, unless an honest node was late, too: on a busy machine a thread may
/// wait for longer than a call may take.
#[track_caller]
fn assert_copies_sufficed(troupe: &Troupe, liar: Option<usize>) {
    let nodes = troupe.hub.nodes();
    let late = |index: usize| nodes[index].counters.late;
    let late: u64 = (0..nodes.len()).filter(|index| Some(*index) != liar).map(late).sum();
    let cost = troupe.status.read().cost;
    assert!(cost.fallbacks == 0 || late > 0, "{cost:?}");
}

/// Tells the story until a node got so many calls: with copies a router that learned that others are faster asks it
/// rarely. Each time it must be the expected one.
#[track_caller]
fn tell_until_asked(troupe: &Troupe, (node, calls): (usize, u64), expected: &Outcome) {
    let asked = (0..STORIES_MAX).any(|_| {
        assert_eq!(&generate(&troupe.engine, story()).0, expected);
        troupe.nodes[node].calls() >= calls
    });
    assert!(asked, "no occasion: {:?} {:?}", troupe.nodes, troupe.hub.nodes());
}

pub(super) fn story() -> GenerateRequest {
    request(prompt(1, 40), 0.0, 120)
}

#[test]
fn copies_are_used_side_by_side_and_change_no_bit() {
    let model = tale();
    let troupe = Troupe::start(&model, vec![well(), well(), well()], (even(&model, 3, 2), true));
    assert_eq!(troupe.hub.routes().table, even(&model, 3, 2), "the plan is another");
    assert_eq!(generate(&troupe.engine, story()).0, alone(&model, &story()));
    assert!(troupe.nodes.iter().all(|node| node.calls() > 0), "{:?}", troupe.nodes);
    let long = request(prompt(2, 700), 0.0, 4);
    assert_eq!(generate(&troupe.engine, long.clone()).0, alone(&model, &long), "a prompt");
    assert_copies_sufficed(&troupe, None);
}

#[test]
fn with_copies_a_silent_node_costs_a_few_late_calls_and_the_router_computes_nothing() {
    let model = tale();
    let troupe = Troupe::start(&model, vec![well(), then(Mood::Silence), well()], (even(&model, 3, 2), true));
    let expected = alone(&model, &story());
    let began = Instant::now();
    tell_until_asked(&troupe, (1, WELL_FOR + 1), &expected);
    let seconds = began.elapsed().as_secs() + 1;
    let cost = troupe.status.read().cost;
    assert_copies_sufficed(&troupe, Some(1));
    assert!(cost.hedges_won > 0, "{cost:?}");
    assert!(cost.hedges <= 16 + cost.calls / 20, "{cost:?}");
    // Not one delay per layer: others are preferred for a second after each late call (`DOUBT_MAX`). Else it would be
    // asked until the first of its calls is given up, several times within a tenth of a second.
    let asked = troupe.nodes[1].calls() - WELL_FOR;
    assert!(asked <= 1 + 2 * seconds, "asked {asked} times within {seconds} s");
    assert!(troupe.hub.nodes()[1].counters.hedged > 0);
}

#[test]
fn whatever_a_node_says_the_bits_are_those_of_one_process() {
    let model = tale();
    let expected = alone(&model, &story());
    for mood in [
        Mood::Silence,
        Mood::AfterNext,
        Mood::Refuse(Refusal::Stopping),
        Mood::Refuse(Refusal::Busy),
        Mood::Refuse(Refusal::Failed),
        Mood::WrongShape,
        Mood::Overflow,
    ] {
        for copies_of_each in [1, 2] {
            let plan = even(&model, 3, copies_of_each);
            let troupe = Troupe::start(&model, vec![then(mood), well(), well()], (plan, true));
            let enough = WELL_FOR + if mood == Mood::WrongShape { 3 } else { 1 };
            tell_until_asked(&troupe, (0, enough), &expected);
            let (cost, node) = (troupe.status.read().cost, &troupe.hub.nodes()[0]);
            let (state, counters) = (node.cluster.state, node.counters);
            match mood {
                Mood::WrongShape => {
                    assert_eq!((state, counters.rejected), (NodeState::Quarantined, 3), "{counters:?}");
                }
                Mood::Refuse(Refusal::Stopping | Refusal::Busy) => {
                    assert_eq!(state, NodeState::Serving, "a refusal is no reason for suspicion");
                    assert!(counters.refused > 0);
                }
                _ => assert_ne!(state, NodeState::Quarantined, "{mood:?}"),
            }
            if copies_of_each == 2 && mood != Mood::Overflow {
                assert_copies_sufficed(&troupe, Some(0));
            }
            if matches!(mood, Mood::Refuse(_) | Mood::WrongShape) {
                assert_eq!(cost.retries > 0, copies_of_each == 2, "{mood:?}: {cost:?}");
            }
        }
    }
}

/// Every expert in two parts, each held by so many of the four nodes; some parts are the router's, in memory or not.
pub(super) fn cut(model: &Arc<Model>, copies: usize) -> Table {
    let facts = router::serve::model_facts(model);
    let mut table = Table::empty(&facts);
    let parts = |expert: u16| {
        let nodes = |first: u16| (0..copies as u16).map(move |copy| (expert + first + copy) % 4);
        let second: Holders = match expert % 7 {
            0 => Holders::default(),
            1 => nodes(2).chain([ROUTER]).collect(),
            _ => nodes(2).collect(),
        };
        [
            routes::Part { from: 0, to: 3, holders: nodes(0).collect() },
            routes::Part { from: 3, to: facts.blocks, holders: second },
        ]
    };
    table.set_layer(0, (0..facts.experts).map(parts));
    table
}

#[test]
fn slices_and_their_failures_change_no_bit() {
    let model = wide();
    let story = request(prompt(1, 20), 0.0, 16);
    let expected = alone(&model, &story);
    for mood in [Mood::Answer, Mood::Silence, Mood::WrongShape, Mood::Overflow] {
        for copies in [1, 2] {
            let cast = vec![then(mood), well(), well(), well()];
            let troupe = Troupe::start(&model, cast, (cut(&model, copies), true));
            assert_eq!(troupe.hub.routes().table, cut(&model, copies), "the plan is another");
            assert_eq!(generate(&troupe.engine, story.clone()).0, expected, "{mood:?}, {copies} copies");
            assert!(copies == 2 || troupe.nodes[0].calls() > WELL_FOR, "{:?}", troupe.nodes);
        }
    }
}

#[test]
fn without_fallback_only_requests_that_need_what_is_lost_end_and_they_name_it() {
    let model = tale();
    let facts = router::serve::model_facts(&model);
    // The silent node holds a handful of the first layer's experts.
    let mut plan = Table::empty(&facts);
    let holders = |expert: u16| [if expert < 5 { 0 } else { 1 + expert % 2 }].into_iter().collect();
    for (at, layer) in facts.moe_layers.iter().enumerate() {
        let first = if at == 0 { 0 } else { 5 };
        let whole = |expert| [routes::Part { from: 0, to: facts.blocks, holders: holders(expert + first) }];
        plan.set_layer(*layer, (0..facts.experts).map(whole));
    }
    let cast = vec![Part::new(|_| Mood::Silence), well(), well()];
    let troupe = Troupe::start(&model, cast, (plan, false));
    let lost: Vec<String> = {
        let routes = troupe.hub.routes();
        routes.table.held_by(0).map(|slice| format!("{}/{}", slice.key.layer, slice.key.expert)).collect()
    };
    assert_eq!(lost.len(), 5, "{lost:?}");
    let requests: Vec<GenerateRequest> = (0..24).map(|i| request(prompt(i, 1), 0.0, 1)).collect();
    let streams: Vec<_> =
        requests.iter().map(|request| troupe.engine.submit(request.clone()).unwrap()).collect();
    let (mut ended, mut told) = (0, 0);
    for (request, mut stream) in requests.iter().zip(streams) {
        match stream.blocking_recv() {
            Some(Event::Failed(GenerateError::ExpertsUnavailable { experts })) => {
                assert!(
                    experts.split(", ").all(|expert| lost.iter().any(|lost| lost == expert)),
                    "{experts}"
                );
                ended += 1;
            }
            Some(Event::Token { id, .. }) => {
                let (outcome, _) = finish(stream);
                let expected = alone(&model, request);
                assert_eq!((vec![id], outcome.digest), (expected.tokens, expected.digest));
                told += 1;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(ended > 0 && told > 0, "{ended} ended, {told} told");
    assert_eq!(troupe.status.read().cost.fallbacks, 0);
    assert_eq!(troupe.status.read().home_bytes, 0, "the router computed experts");
}
