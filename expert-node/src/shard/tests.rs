//! What is held, what is read, what is refused.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::fixture::{EXPERT_BYTES, FakeKernels, FakeSource, key, placement};

struct Setup {
    source: Arc<FakeSource>,
    kernels: Arc<FakeKernels>,
    shard: Shard,
}

fn setup(experts: u64) -> Setup {
    let (source, kernels) = (Arc::new(FakeSource::default()), Arc::new(FakeKernels::default()));
    let shard = Shard::new(Arc::clone(&source) as _, Arc::clone(&kernels) as _, experts * EXPERT_BYTES);
    Setup { source, kernels, shard }
}

fn place(setup: &Setup, epoch: u64, experts: &[(u16, u16)]) -> Result<u64, PlaceError> {
    setup.shard.place(&placement(epoch, experts.iter().copied()), &mut |_, _| {})
}

fn reads(setup: &Setup) -> Vec<ExpertKey> {
    std::mem::take(&mut setup.source.reads.lock().unwrap())
}

#[test]
fn two_epochs_are_served_and_what_they_share_is_read_once() {
    let setup = setup(100);
    assert_eq!(place(&setup, 4, &[(1, 0), (1, 1), (3, 5)]).unwrap(), 3 * EXPERT_BYTES);
    assert_eq!(reads(&setup), [key(1, 0), key(1, 1), key(3, 5)]);
    assert_eq!(place(&setup, 5, &[(1, 1), (1, 2), (3, 5)]).unwrap(), 4 * EXPERT_BYTES);
    assert_eq!(reads(&setup), [key(1, 2)]);
    assert_eq!(
        setup.kernels.layers.load(Ordering::Relaxed),
        3,
        "layer 3 is the same and was not taken over again"
    );
    let shard = &setup.shard;
    assert_eq!(shard.epoch(), 5);
    for (epoch, has) in [(4, [true, true, false]), (5, [false, true, true])] {
        for (expert, has) in (0..).zip(has) {
            assert_eq!(shard.layer(epoch, 1, [expert]).is_ok(), has, "expert {expert} in epoch {epoch}");
        }
    }
    // The third epoch ends the first.
    assert_eq!(place(&setup, 6, &[(1, 2)]).unwrap(), 3 * EXPERT_BYTES);
    assert_eq!(reads(&setup), []);
    assert_eq!(shard.layer(4, 1, [0]).unwrap_err(), Missing::Epoch { wanted: 4, held: vec![5, 6] });
    assert!(shard.layer(5, 3, [5]).is_ok() && shard.layer(6, 1, [2]).is_ok());
}

#[test]
fn weights_are_those_of_the_expert_at_aligned_places() {
    let setup = setup(100);
    place(&setup, 1, &[(1, 0), (1, 7), (3, 2)]).unwrap();
    place(&setup, 2, &[(1, 3), (1, 7), (3, 2)]).unwrap();
    for (found, packed) in setup.shard.lock().iter().flat_map(|epoch| epoch.experts()) {
        let value = (10 * found.layer + found.expert) as u8;
        assert!(packed.bytes.iter().all(|byte| *byte == value), "{found:?}");
        assert_eq!(packed.bytes.len() as u64, EXPERT_BYTES);
        assert_eq!(packed.bytes.as_ptr().addr() % 64, 0);
    }
}

#[test]
fn the_same_placement_again_costs_nothing() {
    let setup = setup(2);
    place(&setup, 1, &[(1, 0), (1, 1)]).unwrap();
    reads(&setup);
    assert_eq!(place(&setup, 1, &[(1, 0), (1, 1)]).unwrap(), 2 * EXPERT_BYTES);
    assert_eq!(reads(&setup), []);
}

#[test]
fn an_epoch_that_comes_again_with_other_experts_replaces_the_first() {
    let setup = setup(9);
    place(&setup, 1, &[(1, 0), (1, 1)]).unwrap();
    assert_eq!(place(&setup, 1, &[(1, 1), (1, 2)]).unwrap(), 2 * EXPERT_BYTES);
    assert!(setup.shard.layer(1, 1, [0]).is_err() && setup.shard.layer(1, 1, [1, 2]).is_ok());
}

#[test]
fn a_layer_that_only_grows_is_taken_over_with_its_new_experts() {
    let setup = setup(9);
    place(&setup, 1, &[(1, 4)]).unwrap();
    place(&setup, 2, &[(1, 3), (1, 4), (1, 5)]).unwrap();
    assert!(setup.shard.layer(2, 1, [3, 4, 5]).is_ok() && setup.shard.layer(1, 1, [5]).is_err());
}

#[test]
fn what_does_not_fit_is_refused_with_figures_and_nothing_is_lost() {
    let setup = setup(2);
    place(&setup, 1, &[(1, 0), (1, 1)]).unwrap();
    let error = place(&setup, 2, &[(1, 0), (1, 1), (1, 2)]).unwrap_err().to_string();
    let (needed, allowed) = (3 * EXPERT_BYTES, 2 * EXPERT_BYTES);
    assert!(error.contains(&needed.to_string()) && error.contains(&allowed.to_string()), "{error}");
    assert!(setup.shard.layer(1, 1, [0, 1]).is_ok());
}

#[test]
fn without_memory_for_both_the_old_placement_makes_room() {
    let setup = setup(3);
    place(&setup, 1, &[(1, 0), (1, 1)]).unwrap();
    reads(&setup);
    assert_eq!(place(&setup, 2, &[(1, 1), (1, 2)]).unwrap(), 3 * EXPERT_BYTES);
    assert!(setup.shard.layer(1, 1, [0]).is_ok(), "three fit, so both are held");
    assert_eq!(place(&setup, 3, &[(1, 2), (3, 0), (3, 1)]).unwrap(), 3 * EXPERT_BYTES);
    assert_eq!(reads(&setup), [key(1, 2), key(3, 0), key(3, 1)], "what is shared is taken over nevertheless");
    assert!(setup.shard.layer(2, 1, [1]).is_err() && setup.shard.layer(3, 1, [2]).is_ok());
}

#[test]
fn a_failed_load_leaves_the_last_epoch() {
    let source = Arc::new(FakeSource { broken: Some(key(3, 1)), ..FakeSource::default() });
    let shard = Shard::new(source, Arc::new(FakeKernels::default()), u64::MAX);
    shard.place(&placement(1, [(1, 0)]), &mut |_, _| {}).unwrap();
    let error = shard.place(&placement(2, [(1, 0), (3, 1)]), &mut |_, _| {}).unwrap_err();
    assert_eq!(error.to_string(), "expert 1 of layer 3 cannot be read");
    assert!(shard.layer(1, 1, [0]).is_ok());
    assert_eq!(shard.epoch(), 1);
    // Unknown experts come from the network too.
    assert!(shard.place(&placement(2, [(2, 0)]), &mut |_, _| {}).is_err());
    assert!(shard.place(&placement(2, [(1, 8)]), &mut |_, _| {}).is_err());
    let stranger = Placement { model: [9; 32], ..placement(2, [(1, 0)]) };
    assert!(matches!(shard.place(&stranger, &mut |_, _| {}), Err(PlaceError::Model)));
    shard.end();
    assert!(matches!(shard.place(&placement(2, [(1, 1)]), &mut |_, _| {}), Err(PlaceError::Ending)));
}

#[test]
fn missing_experts_are_named() {
    let setup = setup(9);
    assert_eq!(setup.shard.layer(1, 1, [0]).unwrap_err(), Missing::Epoch { wanted: 1, held: vec![] });
    place(&setup, 1, &[(1, 0), (1, 4)]).unwrap();
    assert_eq!(setup.shard.layer(1, 1, [0, 4, 5]).unwrap_err(), Missing::Expert(key(1, 5)));
    assert_eq!(setup.shard.layer(1, 3, [0]).unwrap_err(), Missing::Layer(3));
    assert_eq!(setup.shard.layer(1, u16::MAX, []).unwrap_err(), Missing::Layer(u16::MAX));
    place(&setup, 2, &[]).unwrap();
    assert_eq!((setup.shard.epoch(), setup.shard.weight_bytes()), (2, 2 * EXPERT_BYTES));
}

#[test]
fn progress_counts_experts() {
    let setup = setup(9);
    place(&setup, 1, &[(1, 0)]).unwrap();
    let seen = AtomicUsize::new(0);
    let all = placement(2, [(1, 0), (1, 1), (3, 0)]);
    let mut last = 0;
    let mut progress = |done, total| {
        assert!(done > last && total == 3);
        last = done;
        seen.fetch_add(1, Ordering::Relaxed);
    };
    setup.shard.place(&all, &mut progress).unwrap();
    assert_eq!((last, seen.into_inner()), (3, 2));
}
