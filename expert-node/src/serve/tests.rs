//! What the network gets to hear, without a network.

use mesh_wire::buffer::Pool;

use super::*;
use crate::batch::QUEUE_CALLS_MAX;
use crate::fixture::{self, EXPERT_BYTES, FINGERPRINT, FakeKernels, FakeSource, call, placement, refusal};

fn service() -> Service {
    let hello = Hello {
        name: "bench".into(),
        version: "0".into(),
        model: FINGERPRINT,
        memory_bytes: 2 * EXPERT_BYTES,
        threads: 1,
        exact: true,
        kernels: "fake none".into(),
        weight_mb_s: [1; 5],
        held_epoch: 99,
        instance: 0,
    };
    let (source, kernels) = (FakeSource::default(), FakeKernels::default());
    let shard = Arc::new(Shard::new(Arc::new(source), Arc::new(kernels), hello.memory_bytes));
    Service::new(hello, shard, Arc::default(), Arc::default())
}

#[test]
fn placements_are_answered_and_the_hello_says_what_is_held() {
    let service = service();
    assert_eq!(service.hello().held_epoch, 0);
    let placed = service.place(placement(7, [(1, 0), (3, 1)]));
    assert_eq!(placed, Placed { epoch: 7, weight_bytes: 2 * EXPERT_BYTES, refusal: String::new() });
    assert_eq!((service.hello().held_epoch, service.health().epoch, service.loading()), (7, 7, None));
    let refused = service.place(placement(8, [(1, 0), (1, 1), (1, 2)]));
    assert!(refused.epoch == 8 && refused.refusal.contains("--memory"), "{refused:?}");
    assert_eq!(service.hello().held_epoch, 7);
}

#[test]
fn calls_beyond_the_queue_are_refused_at_once() {
    let (service, pool) = (service(), Pool::new(1 << 24));
    let enqueue = || {
        let (job, answers, _) = fixture::job(call(&pool, (1, 1, 1), &[1], &[(0, 0, 1.0)]));
        service.enqueue(job);
        answers
    };
    let waiting: Vec<_> = (0..QUEUE_CALLS_MAX).map(|_| enqueue()).collect();
    assert_eq!(refusal(&enqueue()).0, Refusal::Busy);
    assert_eq!((service.health().queued as usize, service.rejected()), (QUEUE_CALLS_MAX, 1));
    assert!(waiting.iter().all(|answers| answers.try_recv().is_err()));
    service.queue.close();
    assert_eq!(refusal(&enqueue()).0, Refusal::Stopping);
}

#[test]
#[cfg(target_os = "linux")]
fn resident_memory_is_known() {
    assert!(resident_bytes() > 1 << 20);
}
