//! The queue in front of the worker, which hands out together what can be computed together.
//!
//! Calls of one layer read the same weights, so those that wait at the same time go through the kernel in one
//! entry: the weights come from memory once. Results do not change by it, since kernels give the same bits for any
//! batch. Nothing ever waits for company. The price: calls of one batch finish together, so a batch is limited to
//! `BATCH_ROWS_MAX`. Refuses more than `QUEUE_CALLS_MAX` calls: the router then computes them itself.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use mesh_net::station::ReplySink;
use mesh_wire::buffer::Buffer;
use mesh_wire::call::Call;
use mesh_wire::control::Refusal;

/// Calls that may wait. A router has one step out at a time, which is a few row chunks per node; more is a router
/// that gave up on earlier calls, and then the newest are as late as the oldest.
pub const QUEUE_CALLS_MAX: usize = 64;

/// Rows of one batch, unless a single call has more. Kernels gain nothing beyond: at 256 rows they compute on
/// weights in the cache, and the first call of the batch would only wait longer.
pub const BATCH_ROWS_MAX: u32 = 256;

/// Where the answer to a call goes. The network has one; tests have others.
pub trait Answer: Send + std::fmt::Debug {
    /// Whether somebody still waits and the budget is not spent. Where not, the answer is dropped.
    fn is_wanted(&self) -> bool;

    /// Sends the reply frame.
    fn complete(self: Box<Self>, reply: Buffer);

    /// Says why there is none.
    fn refuse(self: Box<Self>, refusal: Refusal, detail: &str);
}

impl Answer for ReplySink {
    fn is_wanted(&self) -> bool {
        ReplySink::is_wanted(self)
    }

    fn complete(self: Box<Self>, reply: Buffer) {
        ReplySink::complete(*self, reply);
    }

    fn refuse(self: Box<Self>, refusal: Refusal, detail: &str) {
        ReplySink::refuse(*self, refusal, detail);
    }
}

/// A call that waits.
#[derive(Debug)]
pub struct Job {
    /// What to compute.
    pub call: Call,
    /// Who wants to know.
    pub answer: Box<dyn Answer>,
}

impl Job {
    /// Whether both may be one entry into the kernel.
    fn joins(&self, other: &Job) -> bool {
        let (a, b) = (self.call.head(), other.call.head());
        (a.epoch, a.layer, a.format, a.hidden) == (b.epoch, b.layer, b.format, b.hidden)
    }
}

/// Why a call was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// `QUEUE_CALLS_MAX` calls wait already.
    Full,
    /// The node is stopping.
    Closed,
}

/// First in, first out, but for calls that join an earlier one.
#[derive(Debug, Default)]
pub struct Queue {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    jobs: VecDeque<Job>,
    closed: bool,
    /// Who is to be woken: the worker that drives the network while it waits,
    waker: Option<Waker>,
    /// or the one that sleeps.
    sleeps: bool,
}

impl State {
    /// The first call with all that join it, in order of arrival.
    fn take(&mut self, batch: &mut Vec<Job>) -> bool {
        let first = if self.closed { None } else { self.jobs.pop_front() };
        let Some(first) = first else { return false };
        let mut rows = first.call.head().rows;
        batch.push(first);
        let mut index = 0;
        while let Some(job) = self.jobs.get(index) {
            let more = rows.saturating_add(job.call.head().rows);
            if more <= BATCH_ROWS_MAX && batch[0].joins(job) {
                rows = more;
                batch.extend(self.jobs.remove(index));
            } else {
                index += 1;
            }
        }
        true
    }
}

impl Queue {
    /// Adds a call, without waiting. A call that is not taken is handed back.
    ///
    /// # Errors
    /// `Rejected`, with the call.
    pub fn push(&self, job: Job) -> Result<(), (Box<Job>, Rejected)> {
        let mut state = self.lock();
        if state.closed {
            return Err((Box::new(job), Rejected::Closed));
        }
        if state.jobs.len() >= QUEUE_CALLS_MAX {
            return Err((Box::new(job), Rejected::Full));
        }
        state.jobs.push_back(job);
        self.wake(state);
        Ok(())
    }

    /// Calls that wait.
    pub fn len(&self) -> usize {
        self.lock().jobs.len()
    }

    /// Whether no call waits.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits for a call and puts it, with all that join it, into the empty `batch`, in order of arrival; false once
    /// the queue is closed.
    pub fn next(&self, batch: &mut Vec<Job>) -> bool {
        let mut state = self.lock();
        state.sleeps = true;
        let waiting = |state: &mut State| state.jobs.is_empty() && !state.closed;
        state = self.changed.wait_while(state, waiting).unwrap_or_else(PoisonError::into_inner);
        state.sleeps = false;
        state.take(batch)
    }

    /// `next` for a worker that does something else while it waits. One worker at a time.
    pub fn poll_next(&self, batch: &mut Vec<Job>, context: &Context<'_>) -> Poll<bool> {
        let mut state = self.lock();
        if !state.jobs.is_empty() || state.closed {
            return Poll::Ready(state.take(batch));
        }
        if !state.waker.as_ref().is_some_and(|known| known.will_wake(context.waker())) {
            state.waker = Some(context.waker().clone());
        }
        Poll::Pending
    }

    /// Ends `next`, refuses further calls, and hands back those that wait.
    pub fn close(&self) -> Vec<Job> {
        let mut state = self.lock();
        state.closed = true;
        let jobs = std::mem::take(&mut state.jobs);
        self.wake(state);
        jobs.into()
    }

    /// Wakes the worker, if it waits.
    fn wake(&self, mut state: MutexGuard<'_, State>) {
        let (waker, sleeps) = (state.waker.take(), state.sleeps);
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        // A system call, whether or not somebody sleeps.
        if sleeps {
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests;
