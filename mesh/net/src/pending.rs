//! A call under way, seen from the thread that waits for it.
//!
//! The compute thread is not async: it hands calls over, does its own share of the work, and then sleeps until the
//! answers are there. Each call has a slot that is completed exactly once, by whichever comes first: the reply, its
//! budget, the loss of the connection, or its queue being full. A thread that is alone on its core may look at the
//! slot for a while before it sleeps (`spin`), which saves the wake-up of a few microseconds and costs the core;
//! where threads share cores it would keep the network thread from delivering the very reply.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_wire::call::OutgoingCall;
use mesh_wire::control::Refusal;
use mesh_wire::reply::Reply;
use thiserror::Error;
use tokio::sync::Notify;

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

/// What network thread and waiting thread share about a call.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) call: u64,
    pub(crate) rows: u32,
    pub(crate) hidden: u32,
    pub(crate) assignments: u32,
    pub(crate) sent: Instant,
    pub(crate) deadline: Instant,
    state: Mutex<State>,
    done: AtomicBool,
    wake: Condvar,
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
            state: Mutex::new(State::Open),
            done: AtomicBool::new(false),
            wake: Condvar::new(),
            abandoned: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether nobody waits any more.
    pub(crate) fn is_closed(&self) -> bool {
        matches!(*self.state(), State::Closed)
    }

    /// Hands over the outcome; only the first counts. False where it came too late to matter.
    pub(crate) fn complete(&self, outcome: Outcome) -> bool {
        let mut state = self.state();
        if !matches!(*state, State::Open) {
            return false;
        }
        *state = State::Done(outcome);
        self.done.store(true, Ordering::Release);
        drop(state);
        self.wake.notify_one();
        true
    }
}

/// A call that was handed over. Dropping it cancels the call.
#[derive(Debug)]
#[must_use = "dropping it cancels the call"]
pub struct PendingCall {
    slot: Arc<Slot>,
    spin: Duration,
}

impl PendingCall {
    pub(crate) fn new(slot: Arc<Slot>, spin: Duration) -> PendingCall {
        PendingCall { slot, spin }
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
        let spin_until = Instant::now() + self.spin;
        while !self.slot.done.load(Ordering::Acquire) && Instant::now() < spin_until {
            std::hint::spin_loop();
        }
        let mut state = self.slot.state();
        while matches!(*state, State::Open) {
            let left = self.slot.deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let woken = self.slot.wake.wait_timeout(state, left);
            state = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        match std::mem::replace(&mut *state, State::Closed) {
            State::Done(outcome) => outcome,
            State::Open | State::Closed => Err(CallError::Late),
        }
    }
}

impl Drop for PendingCall {
    fn drop(&mut self) {
        let mut state = self.slot.state();
        if matches!(*state, State::Open) {
            *state = State::Closed;
            drop(state);
            self.slot.abandoned.notify_one();
        }
    }
}
