//! Calls in, replies or refusals out.

use mesh_wire::call::Call;
use mesh_wire::reply::Row;

use super::*;
use crate::fixture::{
    Answers, FAILS, FakeKernels, FakeSource, HIDDEN, OVERFLOWS, PANICS, call, job, placement, refusal, reply,
};

struct Setup {
    pool: Pool,
    kernels: Arc<FakeKernels>,
    shard: Arc<Shard>,
    worker: Worker,
}

/// Experts 0 to 3 of layers 1 and 3 in epoch 1.
fn setup() -> Setup {
    let kernels = Arc::new(FakeKernels::default());
    let shard = Arc::new(Shard::new(Arc::new(FakeSource::default()), Arc::clone(&kernels) as _, u64::MAX));
    let experts = [1, 3].into_iter().flat_map(|layer| (0..4).map(move |expert| (layer, expert)));
    shard.place(&placement(1, experts), &mut |_, _| {}).unwrap();
    let pool = Pool::new(1 << 24);
    let worker = Worker::new(Arc::default(), Arc::clone(&shard), pool.clone());
    Setup { pool, kernels, shard, worker }
}

impl Setup {
    fn compute(&mut self, calls: Vec<Call>) -> Vec<Answers> {
        let (mut jobs, answers): (Vec<_>, Vec<_>) =
            calls.into_iter().map(job).map(|(job, to, _)| (job, to)).unzip();
        self.worker.compute(&mut jobs);
        assert!(jobs.is_empty());
        answers
    }

    fn one(&mut self, head: (u64, u64, u16), values: &[i8], assignments: &[(u32, u16, f32)]) -> Answers {
        let call = call(&self.pool, head, values, assignments);
        self.compute(vec![call]).remove(0)
    }
}

fn rows(answers: &Answers) -> Vec<Option<i32>> {
    let reply = reply(answers);
    let view = reply.view();
    assert_eq!(view.head().hidden as usize, HIDDEN);
    let rows = view.rows().map(|row| match row {
        Row::I16(sums) => {
            assert!(sums.len() == HIDDEN && sums.iter().all(|sum| *sum == sums[0]));
            Some(i32::from(sums[0]))
        }
        Row::I32(sums) => {
            assert!(sums.len() == HIDDEN && sums.iter().all(|sum| *sum == sums[0]));
            assert!(i16::try_from(sums[0]).is_err(), "would have fit");
            Some(sums[0])
        }
        Row::Overflow => None,
    });
    rows.collect()
}

#[test]
fn sums_come_back_in_the_width_they_need() {
    let mut setup = setup();
    // Experts 0, 1, 2, 3 of layer 1 are 10, 11, 12, 13.
    let assignments = [
        (0, 0, 1.0),
        (0, 1, 2.0),
        (1, 2, -3.0),
        (2, 3, 252.0),
        (3, 0, OVERFLOWS),
        (4, 3, -252.1),
        (5, 0, 1.0),
    ];
    let answers = setup.one((7, 1, 1), &[1, 2, 10, 1, 10, -128], &assignments);
    assert_eq!(rows(&answers), [Some(32), Some(-72), Some(32760), None, Some(-32760), Some(-1280)]);
    let answers = setup.one((8, 1, 1), &[10, -128], &[(0, 3, 253.0), (1, 0, 26.0)]);
    assert_eq!(rows(&answers), [Some(32890), Some(-33280)]);
    let counters = setup.worker.counters();
    assert_eq!(counters.calls.load(Ordering::Relaxed), 2);
    assert_eq!(counters.rows.load(Ordering::Relaxed), 8);
}

#[test]
fn a_batch_is_one_entry_and_gives_what_each_call_gives_alone() {
    let mut setup = setup();
    let calls = |pool: &Pool| {
        vec![
            call(pool, (1, 1, 3), &[1, 2, 3], &[(0, 0, 1.0), (2, 1, 5.0)]),
            call(pool, (2, 1, 3), &[100], &[(0, 0, 1.0), (0, 1, 1.0), (0, 2, 300.0)]),
            call(pool, (3, 1, 3), &[-1, -2], &[(1, 3, 1.0)]),
        ]
    };
    let (batch, single) = (calls(&setup.pool), calls(&setup.pool));
    let together: Vec<_> = setup.compute(batch).iter().map(rows).collect();
    assert_eq!(setup.kernels.entries.load(Ordering::Relaxed), 1);
    let alone: Vec<_> = single.into_iter().map(|call| rows(&setup.compute(vec![call])[0])).collect();
    assert_eq!(setup.kernels.entries.load(Ordering::Relaxed), 4);
    assert_eq!(together, alone);
    assert_eq!(alone, [vec![Some(30), Some(0), Some(465)], vec![Some(966_100)], vec![Some(0), Some(-66)]]);
}

#[test]
fn a_bad_call_in_a_batch_does_not_hurt_the_others() {
    let mut setup = setup();
    let calls = vec![
        call(&setup.pool, (1, 1, 1), &[1], &[(0, 9, 1.0)]),
        call(&setup.pool, (2, 1, 1), &[2], &[(0, 0, 1.0)]),
    ];
    let answers = setup.compute(calls);
    assert_eq!((refusal(&answers[0]).0, rows(&answers[1])), (Refusal::UnknownExpert, vec![Some(20)]));
}

#[test]
fn calls_that_cannot_be_computed_are_refused_by_name() {
    let mut setup = setup();
    let refused = |answers: Answers, reason: Refusal, text: &str| {
        let (refusal, detail) = refusal(&answers);
        assert!(refusal == reason && detail.contains(text), "{refusal:?} {detail}");
    };
    refused(setup.one((5, 2, 1), &[1], &[(0, 0, 1.0)]), Refusal::UnknownEpoch, "epoch 2");
    refused(setup.one((5, 1, 2), &[1], &[(0, 0, 1.0)]), Refusal::UnknownExpert, "layer 2");
    refused(setup.one((5, 1, 1), &[1], &[(0, 0, 1.0), (0, 4, 1.0)]), Refusal::UnknownExpert, "expert 4");
    refused(setup.one((5, 1, 1), &[1], &[(0, 0, FAILS)]), Refusal::Failed, "as told");
    assert_eq!(setup.worker.counters().refused.load(Ordering::Relaxed), 4);
}

#[test]
fn rows_of_another_shape_are_refused() {
    let mut setup = setup();
    // 31 takes as many bytes as 32, so the length would not tell.
    for hidden in [31, 64] {
        setup.worker.shape.hidden = hidden;
        let answers = setup.one((5, 1, 1), &[1], &[(0, 0, 1.0)]);
        assert_eq!(refusal(&answers).0, Refusal::Malformed);
    }
    setup.worker.shape = Shape { format: model::format::Format::Bf16, ..setup.shard.shape() };
    let answers = setup.one((5, 1, 1), &[1], &[(0, 0, 1.0)]);
    assert_eq!(refusal(&answers).0, Refusal::Malformed);
}

#[test]
fn a_panic_in_a_kernel_is_a_refusal() {
    let mut setup = setup();
    let answers = setup.one((1, 1, 1), &[1], &[(0, 0, PANICS)]);
    let (refusal, detail) = refusal(&answers);
    assert!(refusal == Refusal::Failed && detail.contains("panicked: as told"), "{refusal:?} {detail}");
    assert_eq!(setup.worker.counters().panics.load(Ordering::Relaxed), 1);
    assert_eq!(rows(&setup.one((2, 1, 1), &[1], &[(0, 0, 1.0)])), [Some(10)], "and life goes on");
}

#[test]
fn unwanted_calls_are_dropped_unseen() {
    let mut setup = setup();
    let (job, answers, wanted) = job(call(&setup.pool, (1, 1, 1), &[1], &[(0, 0, 1.0)]));
    wanted.store(false, Ordering::Relaxed);
    setup.worker.compute(&mut vec![job]);
    assert!(answers.try_recv().is_err());
    assert_eq!(setup.kernels.entries.load(Ordering::Relaxed), 0);
    assert_eq!(setup.worker.counters().unwanted.load(Ordering::Relaxed), 1);
}

#[test]
fn an_exhausted_pool_is_a_refusal() {
    let mut setup = setup();
    setup.worker.pool = Pool::new(0);
    let answers = setup.one((1, 1, 1), &[1], &[(0, 0, 1.0)]);
    assert_eq!(refusal(&answers).0, Refusal::Busy);
}

#[test]
fn the_thread_ends_with_the_queue() {
    let setup = setup();
    let queue = Arc::clone(&setup.worker.queue);
    let worker = std::thread::spawn(|| setup.worker.run());
    let (job, answers, _) = job(call(&setup.pool, (1, 1, 1), &[3], &[(0, 0, 1.0)]));
    queue.push(job).unwrap();
    let frame = answers.recv().unwrap().unwrap();
    assert_eq!(mesh_wire::reply::Reply::parse(frame).unwrap().head().call, 1);
    assert!(queue.close().is_empty());
    worker.join().unwrap();
}
