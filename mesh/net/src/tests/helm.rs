//! Who drives, and what happens to those who cannot. No times: every wait ends by an event.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use tokio::sync::oneshot;

use super::harness::LONG;
use crate::helm::Helm;

/// A helm, kept by a thread of its own until the sender is used or dropped.
fn kept() -> (Arc<Helm>, oneshot::Sender<()>, JoinHandle<bool>) {
    let helm = Arc::new(Helm::new(Duration::ZERO).unwrap());
    let (end, ended) = oneshot::channel();
    let thread = std::thread::spawn({
        let helm = Arc::clone(&helm);
        move || helm.keep(async move { ended.await.is_ok() })
    });
    (helm, end, thread)
}

async fn timer() {
    tokio::time::sleep(Duration::from_millis(1)).await;
}

#[test]
fn both_threads_drive_in_turns_and_what_either_left_undone_goes_on() {
    let (helm, end, thread) = kept();
    for round in 0..200 {
        // Begun while a guest drives, ended by whoever drives when its time comes.
        let (done, is_done) = channel();
        let spawned = helm.now(|| {
            tokio::spawn(async move {
                timer().await;
                done.send(round).unwrap();
            })
        });
        if round % 3 == 0 {
            helm.release();
        }
        if round % 2 == 0 {
            // The network thread takes over by itself.
            assert_eq!(is_done.recv_timeout(LONG), Ok(round));
        } else {
            assert!(helm.steer(spawned).unwrap().is_ok());
            assert_eq!(is_done.try_recv().unwrap(), round);
        }
    }
    end.send(()).unwrap();
    assert!(thread.join().unwrap());
}

#[test]
fn what_is_begun_now_has_run_up_to_its_first_wait() {
    // No network thread: nobody else could have run it.
    let helm = Helm::new(Duration::ZERO).unwrap();
    let (begun, is_begun) = channel();
    let first = begun.clone();
    helm.now(|| {
        tokio::spawn(async move {
            first.send("the first").unwrap();
            std::future::pending::<()>().await;
        })
    });
    assert_eq!(is_begun.try_recv(), Ok("the first"));
    // Ready at the same time as another: all of them.
    helm.now(|| {
        for name in ["the second", "the third"] {
            let begun = begun.clone();
            tokio::spawn(async move { begun.send(name).unwrap() });
        }
    });
    assert_eq!(is_begun.try_iter().collect::<Vec<_>>(), ["the second", "the third"]);
}

#[test]
fn a_guest_is_sent_home_when_all_is_over() {
    let (helm, end, thread) = kept();
    let (ready, is_ready) = channel();
    let guest = std::thread::spawn({
        let helm = Arc::clone(&helm);
        move || {
            helm.steer(async {
                ready.send(()).unwrap();
                std::future::pending::<()>().await;
            })
        }
    });
    is_ready.recv().unwrap();
    end.send(()).unwrap();
    assert_eq!(guest.join().unwrap(), None);
    assert!(thread.join().unwrap());
    // And nobody may drive any more, but work is done.
    assert_eq!(helm.steer(async {}), None);
    assert_eq!(helm.now(|| 3), 3);
}

#[test]
fn a_second_guest_is_refused_and_served_by_the_first() {
    let (helm, end, thread) = kept();
    let (go, gone) = oneshot::channel();
    let (ready, is_ready) = channel();
    let first = std::thread::spawn({
        let helm = Arc::clone(&helm);
        move || {
            helm.steer(async {
                ready.send(()).unwrap();
                gone.await
            })
        }
    });
    is_ready.recv().unwrap();
    assert_eq!(helm.steer(async {}), None);
    // What the second one wants done happens all the same.
    assert!(helm.now(|| go.send(())).is_ok());
    assert_eq!(first.join().unwrap(), Some(Ok(())));
    end.send(()).unwrap();
    assert!(thread.join().unwrap());
}

#[test]
fn within_a_runtime_nobody_drives() {
    let (helm, end, thread) = kept();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        assert_eq!(helm.steer(async {}), None);
        assert_eq!(helm.now(|| 5), 5);
    });
    end.send(()).unwrap();
    assert!(thread.join().unwrap());
}

#[test]
fn a_guest_that_panics_leaves_the_helm() {
    let (helm, end, thread) = kept();
    let panicked = std::thread::spawn({
        let helm = Arc::clone(&helm);
        move || helm.steer(async { panic!("on purpose") })
    });
    assert!(panicked.join().is_err());
    assert_eq!(helm.steer(timer()), Some(()));
    end.send(()).unwrap();
    assert!(thread.join().unwrap());
}

#[test]
fn what_still_runs_is_dropped_at_the_end() {
    let (helm, end, thread) = kept();
    let (kept_open, open) = oneshot::channel::<()>();
    drop(helm.now(|| {
        tokio::spawn(async move {
            let _kept_open = kept_open;
            std::future::pending::<()>().await;
        })
    }));
    drop(end);
    assert!(!thread.join().unwrap());
    assert!(open.blocking_recv().is_err());
}
