//! Rung: audits. Honest nodes are never found wrong and the text is that of one process, whatever share is audited and
//! however experts are held; liars are found, by whoever holds the same experts or by the router.

use std::sync::Arc;
use std::time::Duration;

use mesh_proto::cluster::NodeState;
use mesh_proto::routes::Table;
use mesh_wire::control::Vitals;
use model::format::Format;
use model::open::Model;
use moemesh_tests::cluster::{even, generate, open};
use moemesh_tests::lies::Lie;
use moemesh_tests::scripted::{Mood, Part, Troupe};
use router::audit::AuditCounts;

use super::equivalence::{alone, prompt, request};
use super::failures::{cut, story, tale, well, wide};

/// For whatever happens as soon as the machine has the time.
const LONG: Duration = Duration::from_secs(60);

/// Stories told until a liar was found. Audits wait for a thread that has little time while stories are told.
const STORIES_MAX: usize = 200;

fn liar(lie: Lie) -> Part {
    Part::new(move |_| Mood::Lie(lie))
}

fn counts(troupe: &Troupe) -> Vec<AuditCounts> {
    troupe.audits.as_ref().map(|audits| audits.read()).unwrap_or_default()
}

fn is_quarantined(troupe: &Troupe, node: u16) -> bool {
    troupe.hub.wait_until(Duration::ZERO, |cluster| {
        cluster.status(node).is_some_and(|node| node.state == NodeState::Quarantined)
    })
}

/// Everything audited, of honest nodes: nothing is found, and no bit is another.
fn honest(model: &Arc<Model>, plan: (Table, bool), nodes: usize) {
    let cast = (0..nodes).map(|_| well()).collect();
    let troupe = Troupe::audited(model, cast, plan, 1.0);
    for request in [story(), request(prompt(2, 300), 0.8, 4)] {
        assert_eq!(generate(&troupe.engine, request.clone()).0, alone(model, &request));
    }
    // Let it look at what waits.
    let looked = || counts(&troupe).iter().map(|counts| counts.right).sum::<u64>();
    let expected = alone(model, &story());
    assert!((0..STORIES_MAX).any(|_| {
        assert_eq!(generate(&troupe.engine, story()).0, expected);
        looked() >= 200
    }));
    for (node, counts) in counts(&troupe).iter().enumerate() {
        assert!(counts.right > 0 && counts.wrong == 0, "node {node}: {counts:?}");
        assert!(!is_quarantined(&troupe, node as u16));
    }
}

#[test]
fn honest_nodes_are_never_found_wrong_and_no_bit_changes() {
    honest(&tale(), (even(&tale(), 3, 2), true), 3);
    // Without copies only the router can look, also where it computes nothing else.
    honest(&tale(), (even(&tale(), 3, 1), false), 3);
}

#[test]
fn slices_are_audited_as_they_were_asked_for() {
    let model = wide();
    let troupe = Troupe::audited(&model, vec![well(), well(), well(), well()], (cut(&model, 2), true), 1.0);
    let story = request(prompt(1, 20), 0.0, 16);
    let looked = || counts(&troupe).iter().map(|counts| counts.right).sum::<u64>();
    let expected = alone(&model, &story);
    assert!((0..STORIES_MAX).any(|_| {
        assert_eq!(generate(&troupe.engine, story.clone()).0, expected);
        looked() >= 8
    }));
    assert!(counts(&troupe).iter().all(|counts| counts.wrong == 0), "{:?}", counts(&troupe));
}

#[test]
fn a_liar_among_replicas_is_left_out_until_it_is_pardoned() {
    let model = tale();
    let cast = vec![well(), liar(Lie::OtherExperts), well()];
    let troupe = Troupe::audited(&model, cast, (even(&model, 3, 2), true), 0.5);
    let found = (0..STORIES_MAX).any(|_| {
        generate(&troupe.engine, story());
        is_quarantined(&troupe, 1)
    });
    assert!(found, "{:?}", counts(&troupe));
    assert_eq!(generate(&troupe.engine, story()).0, alone(&model, &story()), "it is still asked");
    assert!(!is_quarantined(&troupe, 0) && !is_quarantined(&troupe, 2));
    let note = troupe.hub.nodes()[1].cluster.note.clone();
    assert!(note.contains("up to") && note.contains("pardon"), "{note}");
}

#[test]
fn replicas_that_lie_alike_are_found_by_the_router() {
    let model = tale();
    let cast = vec![liar(Lie::Scaled), liar(Lie::Scaled)];
    let troupe = Troupe::audited(&model, cast, (even(&model, 2, 2), true), 0.5);
    let found = (0..STORIES_MAX).any(|_| {
        generate(&troupe.engine, story());
        is_quarantined(&troupe, 0) && is_quarantined(&troupe, 1)
    });
    assert!(found, "{:?}", counts(&troupe));
    // Nobody is left but the router.
    assert_eq!(generate(&troupe.engine, story()).0, alone(&model, &story()));
}

#[test]
fn a_hot_node_is_asked_only_for_what_nobody_else_holds() {
    let model = tale();
    let hot = Vitals { temperature_mc: Some(90_000), ..Vitals::default() };
    // Half of the experts are on both, a quarter on either alone.
    let facts = router::serve::model_facts(&model);
    let mut plan = Table::empty(&facts);
    for layer in &facts.moe_layers {
        let holders = |expert: u16| match expert % 4 {
            0 => [0].into_iter().collect(),
            1 => [1].into_iter().collect(),
            _ => [0, 1].into_iter().collect(),
        };
        let whole =
            |expert| [mesh_proto::routes::Part { from: 0, to: facts.blocks, holders: holders(expert) }];
        plan.set_layer(*layer, (0..facts.experts).map(whole));
    }
    let troupe = Troupe::start(&model, vec![well().showing(hot), well()], (plan, false));
    assert!(troupe.hub.wait_until(LONG, |cluster| cluster.routes().spared == [0]));
    assert_eq!(generate(&troupe.engine, story()).0, alone(&model, &story()));
    let asked: Vec<u64> = troupe.hub.nodes().iter().map(|node| node.counters.assignments).collect();
    // Of four experts alike the hot one computes one: with calls divided evenly it would be two.
    assert!(asked[0] > 0 && asked[0] * 2 < asked[1], "{asked:?}");
    assert_eq!(troupe.status.read().cost.fallbacks, 0, "nothing is lost for it");
}

#[test]
fn a_router_whose_own_copy_is_damaged_accuses_nobody() {
    let sound = tale();
    let folder = tempfile::tempdir().unwrap();
    drop(open(&moemesh_tests::tale_moe(), Format::Q4, folder.path()));
    let mut damaged = 0;
    for model in std::fs::read_dir(folder.path()).unwrap().flatten() {
        for file in std::fs::read_dir(model.path().join("q4")).into_iter().flatten().flatten() {
            if !file.file_name().to_string_lossy().starts_with("layer-") {
                continue;
            }
            let mut bytes = std::fs::read(file.path()).unwrap();
            bytes.iter_mut().step_by(97).for_each(|byte| *byte ^= 1);
            std::fs::write(file.path(), bytes).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 0, "the experts lie elsewhere");
    let own = open(&moemesh_tests::tale_moe(), Format::Q4, folder.path());
    // Nodes have sound copies, and hold everything.
    let troupe = Troupe::of((&own, &sound), vec![well(), well()], (even(&sound, 2, 1), false), 1.0);
    let looked = || counts(&troupe).iter().map(|counts| counts.unchecked).sum::<u64>();
    let expected = alone(&sound, &story());
    assert!((0..STORIES_MAX).any(|_| {
        assert_eq!(generate(&troupe.engine, story()).0, expected);
        looked() >= 20
    }));
    for node in 0..2 {
        assert_eq!((counts(&troupe)[usize::from(node)].wrong, is_quarantined(&troupe, node)), (0, false));
    }
}
