//! A call under way, seen from the thread that waits for it.
//!
//! The compute thread is not async: it hands calls over, does its own share of the work, and then waits until the
//! answers are there. Each call has a slot that is completed exactly once, by whichever comes first: the reply, its
//! budget, the loss of the connection, or its queue being full. While it waits for a decode call the thread drives
//! the network itself (`helm`); else, and where another thread does that already, it sleeps until a slot is full.
//! It may wait for any of several calls, and for a time at which it wants to do something about those that are late.

use std::future::poll_fn;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use mesh_wire::call::OutgoingCall;
use mesh_wire::control::Refusal;
use mesh_wire::reply::Reply;
use thiserror::Error;
use tokio::sync::Notify;
use tokio::time::timeout_at;

use crate::helm::Helm;

/// Why a call has no reply. Whichever it is, the experts can be computed elsewhere.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum CallError {
    /// The node is not connected, its connection was lost, or it dropped the call.
    #[error("the node is gone")]
    Gone,
    /// The budget ran out.
    #[error("the node did not answer within the call's budget")]
    Late,
    /// The node said no.
    #[error("the node refused: {detail} ({refusal:?})")]
    Refused {
        /// Why, for programs.
        refusal: Refusal,
        /// Why, for people.
        detail: String,
    },
    /// The node's answer is not a valid reply to this call.
    #[error("the node's reply was refused: {reason}")]
    Rejected {
        /// What is wrong with it.
        reason: String,
    },
    /// As many calls to this node as may wait are waiting.
    #[error("too many calls to this node are waiting")]
    Full,
}

/// The outcome of a call.
pub type Outcome = Result<Reply, CallError>;

#[derive(Debug)]
enum State {
    Open,
    Done(Outcome),
    /// The waiting side has what it wanted, or wants nothing any more.
    Closed,
}

/// What is locked of a slot.
#[derive(Debug)]
struct Inner {
    state: State,
    /// Who is to be woken: the thread that drives while it waits,
    waker: Option<Waker>,
    /// or the one that sleeps.
    sleeper: Option<Thread>,
}

/// What network thread and waiting thread share about a call.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) call: u64,
    pub(crate) rows: u32,
    pub(crate) hidden: u32,
    pub(crate) assignments: u32,
    pub(crate) sent: Instant,
    pub(crate) deadline: Instant,
    inner: Mutex<Inner>,
    done: AtomicBool,
    /// Told when the waiting side gives up.
    pub(crate) abandoned: Notify,
}

impl Slot {
    pub(crate) fn new(call: &OutgoingCall, now: Instant) -> Arc<Slot> {
        let head = call.head();
        Arc::new(Slot {
            call: head.call,
            rows: head.rows,
            hidden: head.hidden,
            assignments: call.assignments(),
            sent: now,
            deadline: now + Duration::from_micros(u64::from(head.budget_us)),
            inner: Mutex::new(Inner { state: State::Open, waker: None, sleeper: None }),
            done: AtomicBool::new(false),
            abandoned: Notify::new(),
        })
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody waits any more.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.inner().state, State::Closed)
    }

    /// Hands over the outcome; only the first counts. False where it came too late to matter.
    pub(crate) fn complete(&self, outcome: Outcome) -> bool {
        let mut inner = self.inner();
        if !matches!(inner.state, State::Open) {
            return false;
        }
        inner.state = State::Done(outcome);
        self.done.store(true, Ordering::Release);
        let (waker, sleeper) = (inner.waker.take(), inner.sleeper.take());
        drop(inner);
        if let Some(waker) = waker {
            waker.wake();
        }
        if let Some(sleeper) = sleeper {
            sleeper.unpark();
        }
        true
    }

    /// Has this thread unparked once there is an outcome.
    fn wake_by_unparking(&self, thread: &Thread) {
        let mut inner = self.inner();
        if matches!(inner.state, State::Open) {
            inner.sleeper = Some(thread.clone());
        } else {
            drop(inner);
            thread.unpark();
        }
    }

    /// Ready once there is an outcome.
    fn poll_done(&self, context: &Context<'_>) -> Poll<()> {
        let mut inner = self.inner();
        if !matches!(inner.state, State::Open) {
            return Poll::Ready(());
        }
        if !inner.waker.as_ref().is_some_and(|known| known.will_wake(context.waker())) {
            inner.waker = Some(context.waker().clone());
        }
        Poll::Pending
    }
}

/// A call that was handed over. Dropping it cancels the call.
#[derive(Debug)]
#[must_use = "dropping it cancels the call"]
pub struct PendingCall {
    slot: Arc<Slot>,
    /// What to drive while waiting.
    helm: Option<Arc<Helm>>,
}

impl PendingCall {
    pub(crate) fn new(slot: Arc<Slot>, helm: Option<Arc<Helm>>) -> PendingCall {
        PendingCall { slot, helm }
    }

    /// The call's number.
    pub fn call(&self) -> u64 {
        self.slot.call
    }

    /// Whether `wait` would return at once.
    pub fn is_done(&self) -> bool {
        self.slot.done.load(Ordering::Acquire) || Instant::now() >= self.slot.deadline
    }

    /// Waits for the reply, at most until the budget has run out.
    ///
    /// # Errors
    /// Why there is none.
    pub fn wait(self) -> Outcome {
        wait_any(std::iter::once(&self), self.slot.deadline);
        self.finish()
    }

    /// The outcome; `Late` where there is none yet. If the node has the call already, it is held to the budget all the
    /// same: what it answers within is counted as answered, and what it does not as late.
    ///
    /// # Errors
    /// Why there is no reply.
    pub fn finish(self) -> Outcome {
        let mut inner = self.slot.inner();
        match std::mem::replace(&mut inner.state, State::Closed) {
            State::Done(outcome) => outcome,
            State::Open | State::Closed => Err(CallError::Late),
        }
    }
}

/// Waits until one of the calls is done (`PendingCall::is_done`), at most until `until`; false if none is. Drives the
/// network meanwhile, if one of them is a decode call.
pub fn wait_any<'a>(calls: impl Iterator<Item = &'a PendingCall> + Clone, until: Instant) -> bool {
    let done = || calls.clone().any(PendingCall::is_done);
    if done() {
        return true;
    }
    // A lane that is busy with another call completes this one later than it is over.
    let until = calls.clone().map(|call| call.slot.deadline).fold(until, Instant::min);
    if let Some(helm) = calls.clone().find_map(|call| call.helm.as_deref()) {
        let any = poll_fn(|context| {
            let mut all = calls.clone().map(|call| call.slot.poll_done(context));
            if all.any(|done| done.is_ready()) { Poll::Ready(()) } else { Poll::Pending }
        });
        // A timer can be had only within the runtime. However it ends, what follows looks at the slots again.
        let _steered = helm.steer(async { timeout_at(until.into(), any).await });
    }
    let thread = std::thread::current();
    loop {
        if done() {
            return true;
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return done();
        }
        calls.clone().for_each(|call| call.slot.wake_by_unparking(&thread));
        // Returns at once where a call was completed since.
        std::thread::park_timeout(left);
    }
}

impl Drop for PendingCall {
    fn drop(&mut self) {
        let mut inner = self.slot.inner();
        if matches!(inner.state, State::Open) {
            inner.state = State::Closed;
            drop(inner);
            self.slot.abandoned.notify_one();
        }
    }
}
