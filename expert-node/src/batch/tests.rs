//! The queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::Wake;

use mesh_wire::buffer::Pool;

use super::*;
use crate::fixture::{self, call};

fn job(pool: &Pool, number: u64, layer: u16, rows: usize) -> Job {
    fixture::job(call(pool, (number, 1, layer), &vec![1; rows], &[(0, 0, 1.0)])).0
}

fn next(queue: &Queue) -> Option<Vec<Job>> {
    let mut batch = Vec::new();
    queue.next(&mut batch).then_some(batch)
}

fn numbers(batch: &[Job]) -> Vec<u64> {
    batch.iter().map(|job| job.call.head().call).collect()
}

#[test]
fn calls_of_one_layer_leave_together_and_others_keep_their_order() {
    let (pool, queue) = (Pool::new(1 << 24), Queue::default());
    for (number, layer, rows) in
        [(1, 1, 2), (2, 3, 1), (3, 1, 1), (4, 3, 1), (5, 1, 253), (6, 1, 1), (7, 1, 300)]
    {
        queue.push(job(&pool, number, layer, rows)).unwrap();
    }
    assert_eq!(queue.len(), 7);
    assert_eq!(numbers(&next(&queue).unwrap()), [1, 3, 5], "up to {BATCH_ROWS_MAX} rows");
    assert_eq!(numbers(&next(&queue).unwrap()), [2, 4]);
    assert_eq!(numbers(&next(&queue).unwrap()), [6]);
    assert_eq!(numbers(&next(&queue).unwrap()), [7], "a large one goes alone");
    assert!(queue.is_empty());
}

#[test]
fn epochs_do_not_mix() {
    let (pool, queue) = (Pool::new(1 << 24), Queue::default());
    for epoch in [1, 2] {
        queue.push(fixture::job(call(&pool, (epoch, epoch, 1), &[1], &[(0, 0, 1.0)])).0).unwrap();
    }
    assert_eq!(numbers(&next(&queue).unwrap()), [1]);
    assert_eq!(numbers(&next(&queue).unwrap()), [2]);
}

#[test]
fn the_queue_is_bounded() {
    let (pool, queue) = (Pool::new(1 << 24), Queue::default());
    for number in 0..QUEUE_CALLS_MAX as u64 {
        queue.push(job(&pool, number, 1, 1)).unwrap();
    }
    let (job, rejected) = queue.push(job(&pool, 99, 1, 1)).unwrap_err();
    assert_eq!((job.call.head().call, rejected), (99, Rejected::Full));
}

#[test]
fn closing_wakes_the_worker_and_hands_back_what_waits() {
    let (pool, queue) = (Pool::new(1 << 24), Arc::new(Queue::default()));
    let waiter = std::thread::spawn({
        let queue = Arc::clone(&queue);
        move || {
            let first = next(&queue).map(|batch| numbers(&batch));
            (first, next(&queue).is_none())
        }
    });
    queue.push(job(&pool, 1, 1, 1)).unwrap();
    // Whether the waiter has taken it by now or not, nothing is lost.
    let handed_back = numbers(&queue.close());
    let (taken, ended) = waiter.join().unwrap();
    assert_eq!(taken.into_iter().flatten().chain(handed_back).collect::<Vec<_>>(), [1]);
    assert!(ended);
    assert_eq!(queue.push(job(&pool, 2, 1, 1)).unwrap_err().1, Rejected::Closed);
}

#[test]
fn a_worker_that_does_something_else_is_woken_by_a_call_and_by_the_end() {
    struct Woken(AtomicU32);
    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let woken = Arc::new(Woken(AtomicU32::new(0)));
    let waker = Waker::from(Arc::clone(&woken));
    let context = Context::from_waker(&waker);
    let (pool, queue, mut batch) = (Pool::new(1 << 24), Queue::default(), Vec::new());
    assert!(queue.poll_next(&mut batch, &context).is_pending());
    queue.push(job(&pool, 1, 1, 1)).unwrap();
    assert_eq!(woken.0.load(Ordering::SeqCst), 1);
    // Somebody who looks already is not woken.
    queue.push(job(&pool, 2, 3, 1)).unwrap();
    assert_eq!(woken.0.load(Ordering::SeqCst), 1);
    for number in [1, 2] {
        assert_eq!(queue.poll_next(&mut batch, &context), Poll::Ready(true));
        assert_eq!(numbers(&std::mem::take(&mut batch)), [number]);
    }
    assert!(queue.poll_next(&mut batch, &context).is_pending());
    assert!(queue.close().is_empty());
    assert_eq!(woken.0.load(Ordering::SeqCst), 2);
    assert_eq!(queue.poll_next(&mut batch, &context), Poll::Ready(false));
}
