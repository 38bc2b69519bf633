//! A lane: one QUIC stream that carries calls to a node, one after the other.
//!
//! A node has a few lanes for decode and a few for prefill, each served by one task for the life of the connection,
//! so a call costs no task and no stream. A lane has one call under way at a time; that is what makes
//! cancelling simple: whether the budget runs out, the waiting side gives up, or a frame is refused, the stream is
//! reset and the next call opens another. Calls wait in a bounded queue per kind of lane, and fail at once when the
//! connection goes. The price: at most `Lane::streams` calls of one kind are at the node; more wait here.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use mesh_proto::cluster::Event;
use mesh_proto::routes::NodeIndex;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::call::OutgoingCall;
use mesh_wire::control::{CallRefused, Refusal};
use mesh_wire::frame::{FrameError, Op};
use mesh_wire::message::Message;
use mesh_wire::reply::Reply;
use quinn::{RecvStream, SendStream};
use tokio::sync::Notify;
use tokio::time::{sleep_until, timeout_at};

use crate::endpoint::LaneReset;
use crate::pending::{CallError, Slot};
use crate::stream::{ReadFrameError, read_frame, write_frame};
use crate::tally::{Feed, Tally};

/// Calls of one kind to one node that may wait for a lane. Beyond that the node is hopelessly behind, and whoever
/// sends should compute elsewhere.
const QUEUE_CALLS_MAX: usize = 64;

/// Replies that nobody waits for, which a lane drops before it calls the node malformed. A correct node sends none: a
/// call that is given up takes its stream with it, so what it answers too late goes nowhere.
const STALE_REPLIES_MAX: u32 = 8;

/// Which lanes a call takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Lane {
    /// Few rows, and somebody waits for the next token.
    Decode,
    /// Many rows. Never holds up a decode call for longer than a packet.
    Prefill,
}

impl Lane {
    /// Both, in the order of `index`.
    pub(crate) const ALL: [Lane; 2] = [Lane::Decode, Lane::Prefill];

    pub(crate) fn index(self) -> usize {
        match self {
            Lane::Decode => 0,
            Lane::Prefill => 1,
        }
    }

    /// Streams, and so calls at the node at a time. Prefill has more: while one chunk of 1 MiB is computed, the next
    /// ones travel. Together half of what the node allows, the other half is for those being replaced.
    pub(crate) fn streams(self) -> usize {
        match self {
            Lane::Decode => 2,
            Lane::Prefill => 4,
        }
    }

    /// QUIC sends streams of a higher priority first.
    fn priority(self) -> i32 {
        match self {
            Lane::Decode => 1,
            Lane::Prefill => 0,
        }
    }
}

/// A call on its way. However it ends, its slot is completed.
#[derive(Debug)]
pub(crate) struct Job {
    slot: Arc<Slot>,
    frame: Option<Buffer>,
    tally: Arc<Tally>,
    /// It counts as out.
    is_out: bool,
}

impl Job {
    pub(crate) fn new(slot: Arc<Slot>, call: OutgoingCall, tally: Arc<Tally>) -> Job {
        tally.begin(slot.assignments);
        Job { slot, frame: Some(call.into_buffer()), tally, is_out: true }
    }

    /// It is not out any more. Before its slot is completed, so that whoever is woken by that does not count it.
    fn end(&mut self) {
        if std::mem::take(&mut self.is_out) {
            self.tally.end(self.slot.assignments);
        }
    }
}

impl Job {
    /// Ends a call that was never sent.
    fn fail(self, error: CallError) {
        self.slot.complete(Err(error));
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.end();
        if self.slot.complete(Err(CallError::Gone)) {
            self.tally.update(|counters| counters.gone += 1);
        }
    }
}

/// Calls waiting for a lane.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: Mutex<Waiting>,
    ready: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    closed: bool,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a call, or fails it where it cannot. Never blocks for longer than another push.
    pub(crate) fn push(&self, job: Job) {
        let mut waiting = self.waiting();
        if waiting.closed {
            drop(waiting);
            job.fail(CallError::Gone);
        } else if waiting.jobs.len() >= QUEUE_CALLS_MAX {
            drop(waiting);
            job.fail(CallError::Full);
        } else {
            waiting.jobs.push_back(job);
            drop(waiting);
            self.ready.notify_one();
        }
    }

    /// Fails everything that waits and everything that will come.
    pub(crate) fn close(&self) {
        let jobs = {
            let mut waiting = self.waiting();
            waiting.closed = true;
            std::mem::take(&mut waiting.jobs)
        };
        drop(jobs);
        self.ready.notify_waiters();
    }

    /// The next call; `None` once closed.
    async fn next(&self) -> Option<Job> {
        loop {
            // Registered before looking: a push or close in between is not missed.
            let ready = self.ready.notified();
            {
                let mut waiting = self.waiting();
                if let Some(job) = waiting.jobs.pop_front() {
                    return Some(job);
                }
                if waiting.closed {
                    return None;
                }
            }
            ready.await;
        }
    }
}

/// What a lane's task works with.
pub(crate) struct Worker {
    pub(crate) node: NodeIndex,
    pub(crate) lane: Lane,
    pub(crate) connection: quinn::Connection,
    pub(crate) queue: Arc<Queue>,
    pub(crate) tally: Arc<Tally>,
    pub(crate) pool: Pool,
    pub(crate) feed: Arc<dyn Feed>,
    /// Replies nobody waited for, since the node was last called malformed for them.
    pub(crate) stale: u32,
}

/// How a call ended for its lane.
enum End {
    /// The lane takes the next call.
    Keep,
    /// It must be replaced.
    Replace(LaneReset),
}

/// What came back.
enum Answer {
    Reply(Reply),
    Refused(CallRefused),
}

/// Why nothing usable came back.
enum Failure {
    /// The lane or the connection broke.
    Broken,
    /// No buffer on our side.
    NoRoom(FrameError),
    /// The node sent something that is not an answer to this call.
    Unusable(String),
}

impl From<ReadFrameError> for Failure {
    fn from(error: ReadFrameError) -> Failure {
        match error {
            // A process that ends closes its streams wherever they are.
            ReadFrameError::Stream(_) | ReadFrameError::Truncated => Failure::Broken,
            ReadFrameError::Frame(error @ FrameError::PoolExhausted(_)) => Failure::NoRoom(error),
            error => Failure::Unusable(error.to_string()),
        }
    }
}

impl From<FrameError> for Failure {
    fn from(error: FrameError) -> Failure {
        Failure::Unusable(error.to_string())
    }
}

impl Worker {
    /// Carries calls until the connection is gone or the queue closed.
    pub(crate) async fn run(mut self) {
        let mut streams: Option<(SendStream, RecvStream)> = None;
        while let Some(mut job) = self.queue.next().await {
            if job.slot.is_closed() {
                self.tally.update(|counters| counters.cancelled += 1);
                continue;
            }
            let (mut send, mut recv) = match streams.take() {
                Some(open) => open,
                // A node that leaves its streams open after a reset has none left for us: that, too, is lateness.
                None => match timeout_at(job.slot.deadline.into(), self.connection.open_bi()).await {
                    Ok(Ok(open)) => open,
                    Ok(Err(_)) => return,
                    Err(_) => {
                        self.late(&job.slot);
                        continue;
                    }
                },
            };
            // Fails only on a closed stream, which the exchange will notice.
            drop(send.set_priority(self.lane.priority()));
            match self.exchange(&mut send, &mut recv, &mut job).await {
                End::Keep => streams = Some((send, recv)),
                End::Replace(reset) => {
                    // Both fail only where the stream is closed already, which is what is wanted.
                    drop((send.reset(reset.into()), recv.stop(reset.into())));
                }
            }
        }
    }

    async fn exchange(&mut self, send: &mut SendStream, recv: &mut RecvStream, job: &mut Job) -> End {
        let slot = Arc::clone(&job.slot);
        let Some(frame) = job.frame.take() else { return End::Keep };
        self.tally.update(|counters| {
            counters.calls += 1;
            counters.rows += u64::from(slot.rows);
            counters.assignments += u64::from(slot.assignments);
            counters.bytes_out += frame.frame().len() as u64;
        });
        let answer = async {
            write_frame(send, frame).await.map_err(|_| Failure::Broken)?;
            self.answer(recv, &slot).await
        };
        tokio::select! {
            biased;
            answer = answer => {
                job.end();
                match answer {
                    Ok(answer) => self.settle(answer, &slot),
                    Err(failure) => self.fail(failure, &slot),
                }
            }
            () = slot.abandoned.notified() => {
                self.tally.update(|counters| counters.cancelled += 1);
                End::Replace(LaneReset::Cancelled)
            }
            () = sleep_until(slot.deadline.into()) => {
                self.late(&slot);
                End::Replace(LaneReset::Late)
            }
        }
    }

    /// The answer to this call; others are dropped. Checked are the frame, the call it belongs to, and the shape. Sums
    /// are integers, so none can be not finite; the rows that were sent are quantized from values that the decoder has
    /// checked (`DecodeError::NotFinite`).
    async fn answer(&mut self, recv: &mut RecvStream, slot: &Slot) -> Result<Answer, Failure> {
        loop {
            let frame = read_frame(recv, &self.pool, &[Op::Reply, Op::CallRefused]).await?;
            let Some(frame) = frame else { return Err(Failure::Broken) };
            let bytes = frame.frame().len() as u64;
            self.tally.update(|counters| counters.bytes_in += bytes);
            let answer = match frame.op() {
                Op::Reply => Answer::Reply(Reply::parse(frame)?),
                _ => match Message::decode(&frame)? {
                    Message::CallRefused(refused) => Answer::Refused(refused),
                    _ => return Err(FrameError::UnexpectedOp(frame.op()).into()),
                },
            };
            let call = match &answer {
                Answer::Reply(reply) => reply.head().call,
                Answer::Refused(refused) => refused.call,
            };
            if call == slot.call {
                if let Answer::Reply(reply) = &answer {
                    reply.view().check_against(slot.call, slot.rows, slot.hidden)?;
                }
                return Ok(answer);
            }
            self.tally.update(|counters| counters.stale += 1);
            self.stale += 1;
            if self.stale > STALE_REPLIES_MAX {
                let stale = std::mem::take(&mut self.stale);
                return Err(Failure::Unusable(format!("{stale} replies to calls that nobody made")));
            }
        }
    }

    fn settle(&self, answer: Answer, slot: &Slot) -> End {
        match answer {
            Answer::Reply(reply) => {
                let service = std::time::Duration::from_micros(u64::from(reply.head().service_us));
                let round_trip = slot.sent.elapsed();
                self.tally.update(|counters| counters.answered += 1);
                if slot.complete(Ok(reply)) || Instant::now() < slot.deadline {
                    let (node, assignments) = (self.node, slot.assignments);
                    self.feed.feed(Event::Answered { node, assignments, service, round_trip });
                } else {
                    // The waiting side's clock was faster than this task's timer: for it the call was late.
                    self.tally.update(|counters| {
                        counters.answered -= 1;
                        counters.stale += 1;
                    });
                    self.late(slot);
                }
            }
            Answer::Refused(CallRefused { refusal, detail, .. }) => {
                self.tally.update(|counters| counters.refused += 1);
                slot.complete(Err(CallError::Refused { refusal, detail }));
                // These happen to a healthy node when plans change, when it stops, and when there is much to do.
                if !matches!(refusal, Refusal::UnknownEpoch | Refusal::Stopping | Refusal::Busy) {
                    self.feed.feed(Event::Missed(self.node));
                }
            }
        }
        End::Keep
    }

    fn fail(&self, failure: Failure, slot: &Slot) -> End {
        match failure {
            Failure::Broken => {
                if slot.complete(Err(CallError::Gone)) {
                    self.tally.update(|counters| counters.gone += 1);
                }
                if self.connection.close_reason().is_none() {
                    self.feed.feed(Event::Missed(self.node));
                }
                End::Replace(LaneReset::Cancelled)
            }
            Failure::NoRoom(error) => {
                tracing::warn!(node = self.node, %error, "a reply was dropped");
                slot.complete(Err(CallError::Rejected { reason: error.to_string() }));
                End::Replace(LaneReset::Busy)
            }
            Failure::Unusable(reason) => {
                tracing::warn!(node = self.node, reason, "a node's reply was refused");
                self.tally.update(|counters| counters.rejected += 1);
                slot.complete(Err(CallError::Rejected { reason }));
                self.feed.feed(Event::Malformed(self.node));
                End::Replace(LaneReset::Frame)
            }
        }
    }

    fn late(&self, slot: &Slot) {
        slot.complete(Err(CallError::Late));
        self.tally.update(|counters| counters.late += 1);
        self.feed.feed(Event::Missed(self.node));
    }
}
