//! What is held, what is read, what is refused.

use std::sync::atomic::AtomicUsize;

use super::*;
use crate::fixture::{
    EXPERT_BYTES, FINGERPRINT, FakeKernels, FakeSource, HIDDEN, WIDE, first, key, placement, wide_expert,
};

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

fn reads(setup: &Setup) -> Vec<Slice> {
    std::mem::take(&mut setup.source.reads.lock().unwrap())
}

#[test]
fn two_epochs_are_served_and_what_they_share_is_read_once() {
    let setup = setup(100);
    assert_eq!(place(&setup, 4, &[(1, 0), (1, 1), (3, 5)]).unwrap(), 3 * EXPERT_BYTES);
    assert_eq!(reads(&setup), [first(1, 0), first(1, 1), first(3, 5)]);
    assert_eq!(place(&setup, 5, &[(1, 1), (1, 2), (3, 5)]).unwrap(), 4 * EXPERT_BYTES);
    assert_eq!(reads(&setup), [first(1, 2)]);
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
    for Piece { slice, packed } in setup.shard.lock().iter().flat_map(|epoch| epoch.pieces()) {
        let value = (10 * slice.key.layer + slice.key.expert) as u8;
        assert!(packed.bytes.iter().all(|byte| *byte == value), "{slice:?}");
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
    assert_eq!(
        reads(&setup),
        [first(1, 2), first(3, 0), first(3, 1)],
        "what is shared is taken over nevertheless"
    );
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

fn sliced(epoch: u64, slices: &[(u16, u16, u16, u16)]) -> Placement {
    let slice = |(layer, expert, from, to)| Slice { key: key(layer, expert), from, to };
    Placement { epoch, model: FINGERPRINT, experts: slices.iter().copied().map(slice).collect() }
}

/// Bytes of so many values of a wide expert.
fn bytes(inter: usize) -> u64 {
    Format::Q8.expert_bytes(HIDDEN, inter) as u64
}

fn wide_setup(memory: u64) -> Setup {
    let source = Arc::new(FakeSource { wide: true, ..FakeSource::default() });
    let kernels = Arc::new(FakeKernels::default());
    let shard = Shard::new(Arc::clone(&source) as _, Arc::clone(&kernels) as _, memory);
    Setup { source, kernels, shard }
}

/// What the newest epoch holds is what it should be, to the byte.
fn assert_pieces(setup: &Setup) {
    for Piece { slice, packed } in setup.shard.lock().last().unwrap().pieces() {
        let want = wide_expert(slice.key).slice(slice.from, slice.to).unwrap();
        assert_eq!((packed.inter, packed.bytes.len()), (want.inter, want.bytes.len()));
        assert!(*packed.bytes == *want.bytes, "{slice:?}");
    }
}

#[test]
fn slices_are_read_shared_cut_and_counted() {
    let setup = wide_setup(u64::MAX);
    let place = |epoch, slices: &[_]| setup.shard.place(&sliced(epoch, slices), &mut |_, _| {}).unwrap();
    let start = [(1, 0, 0, 3), (1, 1, 1, 3), (1, 2, 0, 1), (3, 4, 2, 3)];
    let first = bytes(WIDE) + bytes(172) + bytes(128) + bytes(44);
    assert_eq!(place(1, &start), first);
    assert_eq!(reads(&setup).len(), 4);
    assert_pieces(&setup);
    // Equal ones are shared, parts of what is held are cut, anything else is read.
    let next = [(1, 0, 1, 2), (1, 1, 1, 3), (1, 2, 0, 2), (3, 4, 2, 3)];
    assert_eq!(place(2, &next), first + bytes(128) + bytes(256));
    assert_eq!(reads(&setup), [Slice { key: key(1, 2), from: 0, to: 2 }]);
    assert_pieces(&setup);
    assert_eq!(setup.kernels.layers.load(Ordering::Relaxed), 3, "layer 3 is the same");
    // Only the newest epoch and the one before it count.
    assert_eq!(place(3, &next[..1]), bytes(128) + bytes(172) + bytes(256) + bytes(44));
    assert_eq!(reads(&setup), []);
    // The same keys with other blocks are another placement, also under the same epoch.
    assert_eq!(place(3, &[(1, 0, 1, 2)]), bytes(128) + bytes(172) + bytes(256) + bytes(44));
    assert_eq!(place(3, &[(1, 0, 0, 2)]), bytes(256));
    assert_pieces(&setup);
}

#[test]
fn memory_counts_the_bytes_of_slices() {
    // Two thirds of an expert, where no whole one fits.
    let memory = bytes(256);
    let setup = wide_setup(memory);
    let place = |epoch, slices: &[_]| setup.shard.place(&sliced(epoch, slices), &mut |_, _| {});
    assert!(
        matches!(place(1, &[(1, 0, 0, 3)]), Err(PlaceError::Memory { needed, .. }) if needed == bytes(300))
    );
    assert_eq!(place(1, &[(1, 0, 0, 2)]).unwrap(), memory);
    assert_eq!(place(2, &[(1, 0, 1, 3)]).unwrap(), bytes(172), "no room for both");
    assert!(setup.shard.layer(1, 1, [0]).is_err() && setup.shard.layer(2, 1, [0]).is_ok());
    reads(&setup);
    // Cut only where what is cut from may stay: else it is read, so that both are never in memory.
    assert_eq!(place(3, &[(1, 0, 1, 2), (1, 1, 2, 3)]).unwrap(), bytes(128) + bytes(44));
    assert_eq!(reads(&setup).len(), 2);
    assert_pieces(&setup);
    assert_eq!(place(4, &[(1, 1, 2, 3)]).unwrap(), bytes(128) + bytes(44));
    assert_eq!(reads(&setup), []);
}

#[test]
fn blocks_that_the_model_has_not_are_refused_before_anything_is_let_go() {
    let setup = wide_setup(u64::MAX);
    let place = |epoch, slices: &[_]| setup.shard.place(&sliced(epoch, slices), &mut |_, _| {});
    place(1, &[(1, 0, 0, 3)]).unwrap();
    for bad in [(1, 0, 0, 4), (1, 0, 3, 3), (1, 0, 2, 1), (1, 8, 0, 1), (2, 0, 0, 1), (1, 0, 0, u16::MAX)] {
        let error = place(2, &[bad]).unwrap_err();
        assert!(matches!(error, PlaceError::Unknown(_)), "{error}");
    }
    assert!(setup.shard.layer(1, 1, [0]).is_ok());
}

/// Slices over two shards against the whole in one, with real kernels.
#[test]
fn shards_of_slices_add_up_to_the_whole() {
    use model::activations::Activations;
    use model::kernel::native::{Native, NativeConfig};
    use model::kernel::{Assignment, PartialSums};

    let shard = |slices: &[_]| {
        let source = Arc::new(FakeSource { wide: true, ..FakeSource::default() });
        let kernels = Arc::new(Native::new(NativeConfig::threads(1)).unwrap());
        let shard = Shard::new(source, kernels, u64::MAX);
        shard.place(&sliced(1, slices), &mut |_, _| {}).unwrap();
        shard
    };
    let mut rows = model::region::Buffer::zeroed(2 * 64);
    for (at, row) in rows.chunks_exact_mut(64).enumerate() {
        row[..HIDDEN].iter_mut().enumerate().for_each(|(i, value)| *value = (i * 5 + at * 40) as u8 & 0x7f);
        row[HIDDEN..HIDDEN + 4].copy_from_slice(&0.001_f32.to_le_bytes());
    }
    let x = Activations::new(Format::Q8, 2, HIDDEN, &rows).unwrap();
    let run = |shard: &Shard, assignments: &[Assignment]| {
        let experts = assignments.iter().map(|a| a.expert);
        let (runs, mut sums) = (shard.layer(1, 1, experts).unwrap(), PartialSums::default());
        runs.run(x, assignments, &mut sums).unwrap();
        assert!(!sums.overflowed.contains(&true));
        sums.sums
    };
    let of = |row, expert| Assignment { row, expert, weight: 0.5 };
    let all = [of(0, 0), of(1, 0), of(1, 5)];
    let whole = run(&shard(&[(1, 0, 0, 3), (1, 5, 0, 3)]), &all);
    assert!(whole.iter().any(|sum| *sum != 0));
    // Expert 0 in three parts, expert 5 in two, of different widths within a shard.
    let shards = [
        (shard(&[(1, 0, 0, 1), (1, 5, 0, 2)]), &all[..]),
        (shard(&[(1, 0, 1, 2), (1, 5, 2, 3)]), &all[..]),
        (shard(&[(1, 0, 2, 3)]), &all[..2]),
    ];
    let mut sums = vec![0; whole.len()];
    for (shard, assignments) in &shards {
        sums.iter_mut().zip(run(shard, assignments)).for_each(|(sum, part)| *sum += part);
    }
    assert_eq!(sums, whole);
}
