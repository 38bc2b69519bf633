//! The one thread that computes: takes calls from the queue, runs the kernel, writes replies.
//!
//! While it has nothing to compute it drives the network (`mesh_net::helm`), and it puts short replies on the wire
//! itself. Before a batch of many rows it hands the network to the network thread at once: such a batch takes long.
//!
//! One thread, because the kernels have a pool of their own and streaming weights is limited by memory: two calls
//! at once would only finish together. A call goes in as the bytes the network delivered and comes out as a frame
//! ready to send; what is allocated on the way is kept for the next one. Everything a call can get wrong is refused
//! with a reason, and so is a panic of a kernel: the process goes on, the router computes the call itself.

use std::any::Any;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mesh_net::helm::{Helm, SEND_HERE_BYTES_MAX};
use mesh_wire::buffer::{Buffer as Frame, Pool};
use mesh_wire::control::Refusal;
use mesh_wire::payload::RowFormat;
use mesh_wire::reply::{ReplyHead, encode_sums};
use model::activations::{Activations, row_bytes};
use model::kernel::{Assignment, LayerExperts, PartialSums};
use model::region::Buffer;

use crate::batch::{Answer, Job, Queue};
use crate::shard::{Missing, Shape, Shard};

/// Rows of a batch that counts as short: a decode step of a few requests. A kernel reads the weights of its experts
/// once, whatever the rows, and that many rows of eight experts each take a few milliseconds.
const SHORT_ROWS_MAX: u32 = 16;

/// Counts since the process started.
#[derive(Debug, Default)]
pub struct Counters {
    /// Calls answered with sums.
    pub calls: AtomicU64,
    /// Rows of those.
    pub rows: AtomicU64,
    /// Microseconds in kernels.
    pub busy_us: AtomicU64,
    /// Calls refused.
    pub refused: AtomicU64,
    /// Calls dropped because nobody waited any more or their budget was spent.
    pub unwanted: AtomicU64,
    /// Panics of kernels.
    pub panics: AtomicU64,
}

fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// The worker and what it keeps between calls.
#[derive(Debug)]
pub struct Worker {
    queue: Arc<Queue>,
    shard: Arc<Shard>,
    counters: Arc<Counters>,
    shape: Shape,
    /// What to drive while there is nothing to compute.
    helm: Option<Arc<Helm>>,
    /// Replies are written into buffers of this.
    pool: Pool,
    /// Replies of a batch, ready to be sent.
    answers: Vec<(Box<dyn Answer>, Frame)>,
    /// Rows of a batch of several calls, one after the other.
    rows: Buffer,
    assignments: Vec<Assignment>,
    sums: PartialSums,
}

/// A call that cannot be computed.
type Refused = (Refusal, String);

impl Worker {
    /// A worker that has yet to `run`. Replies are written into buffers of `pool`.
    pub fn new(queue: Arc<Queue>, shard: Arc<Shard>, pool: Pool) -> Worker {
        Worker {
            shape: shard.shape(),
            queue,
            shard,
            counters: Arc::default(),
            helm: None,
            pool,
            answers: Vec::new(),
            rows: Buffer::zeroed(0),
            assignments: Vec::new(),
            sums: PartialSums::default(),
        }
    }

    /// Has it drive the network while it waits.
    #[must_use]
    pub fn at(mut self, helm: Arc<Helm>) -> Worker {
        self.helm = Some(helm);
        self
    }

    /// What it did so far.
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// Computes until the queue is closed.
    pub fn run(mut self) {
        let mut batch = Vec::new();
        while self.next(&mut batch) {
            let rows: u32 = batch.iter().map(|job| job.call.head().rows).sum();
            if rows > SHORT_ROWS_MAX {
                self.helm.iter().for_each(|helm| helm.release());
            }
            self.compute(&mut batch);
        }
    }

    /// Waits for the next batch; false once the queue is closed.
    fn next(&self, batch: &mut Vec<Job>) -> bool {
        if let Some(helm) = &self.helm
            && self.queue.is_empty()
            && let Some(more) = helm.steer(poll_fn(|context| self.queue.poll_next(batch, context)))
        {
            return more;
        }
        // Calls wait, or another thread drives.
        self.queue.next(batch)
    }

    /// Answers every call of a batch and leaves it empty.
    pub fn compute(&mut self, batch: &mut Vec<Job>) {
        let mut layer = None;
        let mut at = 0;
        while let Some(job) = batch.get(at) {
            if !job.answer.is_wanted() {
                count(&self.counters.unwanted, 1);
                drop(batch.remove(at));
                continue;
            }
            match self.admit(job) {
                Ok(experts) => {
                    layer = Some(experts);
                    at += 1;
                }
                Err((refusal, detail)) => self.refuse(batch.remove(at), refusal, &detail),
            }
        }
        let Some(layer) = layer else { return };
        let started = Instant::now();
        match self.run_kernel(&*layer, batch) {
            Ok(()) => self.reply(batch, started.elapsed()),
            Err((refusal, detail)) => {
                tracing::error!(calls = batch.len(), "{detail}");
                batch.drain(..).for_each(|job| self.refuse(job, refusal, &detail));
            }
        }
    }

    /// The experts for a call, or why it is not computed.
    fn admit(&self, job: &Job) -> Result<Arc<dyn LayerExperts>, Refused> {
        let head = job.call.head();
        let quantized = head.format == RowFormat::Int8;
        let Shape { format, hidden, .. } = self.shape;
        if head.hidden as usize != hidden || quantized != format.is_quantized() {
            let wanted =
                format!("rows are {:?} of {}, this {format} model has {hidden}", head.format, head.hidden);
            return Err((Refusal::Malformed, wanted));
        }
        let experts = job.call.view().assignments().iter().map(|assignment| assignment.expert);
        self.shard.layer(head.epoch, head.layer, experts).map_err(|missing| match missing {
            Missing::Epoch { .. } => (Refusal::UnknownEpoch, missing.to_string()),
            Missing::Layer(_) | Missing::Expert(_) => (Refusal::UnknownExpert, missing.to_string()),
        })
    }

    /// One entry into the kernel for all calls; the sums of their rows follow each other.
    fn run_kernel(&mut self, layer: &dyn LayerExperts, jobs: &[Job]) -> Result<(), Refused> {
        let Shape { format, hidden, .. } = self.shape;
        self.assignments.clear();
        let mut rows = 0;
        for job in jobs {
            let call = job.call.view().assignments().iter();
            self.assignments.extend(call.map(|from| Assignment {
                row: rows + from.row,
                expert: from.expert,
                weight: from.weight,
            }));
            rows += job.call.head().rows;
        }
        let bytes = match jobs {
            [job] => job.call.view().payload(),
            jobs => gather(&mut self.rows, jobs),
        };
        let Some(x) = Activations::new(format, rows as usize, hidden, bytes) else {
            let wanted = row_bytes(format, hidden);
            let detail = format!("{} bytes are not {rows} rows of {wanted} bytes", bytes.len());
            return Err((Refusal::Malformed, detail));
        };
        let (assignments, sums) = (&self.assignments, &mut self.sums);
        let outcome = catch_unwind(AssertUnwindSafe(|| layer.run(x, assignments, sums)));
        let outcome = outcome.unwrap_or_else(|panic| {
            count(&self.counters.panics, 1);
            // Whatever state it was left in.
            self.sums = PartialSums::default();
            Err(model::kernel::KernelError::Backend { backend: "kernel", reason: panic_text(&*panic) })
        });
        outcome.map_err(|error| (Refusal::Failed, error.to_string()))
    }

    fn reply(&mut self, jobs: &mut Vec<Job>, service: Duration) {
        let service_us = u32::try_from(service.as_micros()).unwrap_or(u32::MAX);
        count(&self.counters.busy_us, u64::from(service_us));
        let hidden = self.shape.hidden;
        let mut first = 0;
        for job in jobs.drain(..) {
            let head = *job.call.head();
            let rows = first..first + head.rows as usize;
            first = rows.end;
            let sums: Vec<_> = rows
                .map(|row| {
                    let overflowed = self.sums.overflowed.get(row).copied().unwrap_or(true);
                    self.sums.sums.get(row * hidden..(row + 1) * hidden).filter(|_| !overflowed)
                })
                .collect();
            let reply = ReplyHead { call: head.call, service_us, hidden: head.hidden };
            match encode_sums(&self.pool, reply, &sums) {
                Ok(frame) => {
                    count(&self.counters.calls, 1);
                    count(&self.counters.rows, u64::from(head.rows));
                    self.answers.push((job.answer, frame));
                }
                Err(error) => self.refuse(job, Refusal::Busy, &error.to_string()),
            }
        }
        self.send();
    }

    /// Hands over the replies. Short ones have left the machine when it returns; the rest of long ones is left to
    /// the network thread, as the next batch need not wait for it.
    fn send(&mut self) {
        let answers = &mut self.answers;
        let bytes: usize = answers.iter().map(|(_, frame)| frame.frame().len()).sum();
        let mut complete = || answers.drain(..).for_each(|(answer, frame)| answer.complete(frame));
        match &self.helm {
            Some(helm) if bytes <= SEND_HERE_BYTES_MAX => helm.now(complete),
            Some(helm) => {
                complete();
                helm.release();
            }
            None => complete(),
        }
    }

    fn refuse(&self, job: Job, refusal: Refusal, detail: &str) {
        count(&self.counters.refused, 1);
        job.answer.refuse(refusal, detail);
    }
}

/// The rows of all calls, one after the other, in `scratch`.
fn gather<'a>(scratch: &'a mut Buffer, jobs: &[Job]) -> &'a [u8] {
    let bytes = jobs.iter().map(|job| job.call.view().payload().len()).sum();
    if scratch.len() < bytes {
        *scratch = Buffer::zeroed(bytes);
    }
    let mut at = 0;
    for job in jobs {
        let rows = job.call.view().payload();
        scratch[at..at + rows.len()].copy_from_slice(rows);
        at += rows.len();
    }
    &scratch[..bytes]
}

fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panicked: {}", text.unwrap_or("no message"))
}

#[cfg(test)]
mod tests;
