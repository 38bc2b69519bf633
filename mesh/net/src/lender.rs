//! Lends weights: answers what members ask about them over connections that carry nothing else.
//!
//! The router lends everything it has, a node what it has fetched and checked. A member opens a stream per question. A
//! question about an expert's bytes is answered with chunks from where the asker wants them to begin, read on a thread
//! that may wait while earlier ones travel. Weights have connections of their own, and not streams of the connection
//! that carries calls: both would share its flow-control windows, so a node whose disk is slow would keep calls from
//! it, and its congestion window, so calls would queue behind megabytes. What calls and weights still share is the
//! network's thread here, which does twenty packets of either at a time, and the cable: `rate` bounds that.
//!
//! Everything is bounded: connections per member (one; a newer takes its place), streams per connection and in all,
//! bytes of frames, the time a question may take to arrive and a chunk to leave. Whoever is shut out of the cluster
//! gets no further chunk. Refuses to queue: beyond the streams there are, it says so, and the asker comes again.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::frame::{CHUNK_BYTES_MAX, Op};
use mesh_wire::id::NodeId;
use mesh_wire::weights::{Chunk, Fetch, Reason, Weights};
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep_until, timeout};

use crate::endpoint::{Close, LaneReset, peer_key};
use crate::members::{Members, Standing};
use crate::shelf::{Blob, Directory, NotLent, Shelf};
use crate::stream::{read_frame, write_frame};

/// Streams of one member: what it fetches at a time, and a question beside it.
const STREAMS_EACH_MAX: u32 = 8;

/// Experts that are sent at a time, to all members together. A gigabit is full with two of them; each takes the memory
/// of a few chunks, and of a slice's bytes.
const LENDING_MAX: usize = 16;

/// Questions that are answered at a time on threads that may wait: hashes of slices are computed.
const ANSWERING_MAX: usize = 4;

/// Bytes of frames under way: what QUIC keeps until it is acknowledged, of the experts that are sent at a time.
pub(crate) const POOL_BYTES_MAX: usize = 64 << 20;

/// Time for a question to arrive once its stream is open.
const ASKED_WITHIN: Duration = Duration::from_secs(5);

/// Time for a chunk to leave: below 26 KB/s whoever reads is not served.
const SENT_WITHIN: Duration = Duration::from_secs(10);

/// What may be asked.
const QUESTIONS: [Op; 4] = [Op::AskCatalogue, Op::AskHashes, Op::AskHolders, Op::Fetch];

/// Spreads bytes over time.
#[derive(Debug)]
struct Meter {
    /// Bytes per second; `None`: as many as the link takes.
    bytes_s: Option<f64>,
    next: Mutex<Instant>,
}

impl Meter {
    fn new(bytes_s: Option<u64>) -> Meter {
        Meter { bytes_s: bytes_s.map(|bytes_s| bytes_s.max(1) as f64), next: Mutex::new(Instant::now()) }
    }

    /// When these bytes may leave.
    fn turn(&self, bytes: usize) -> Option<Instant> {
        let bytes_s = self.bytes_s?;
        let mut next = self.next.lock().unwrap_or_else(PoisonError::into_inner);
        let turn = (*next).max(Instant::now());
        *next = turn + Duration::from_secs_f64(bytes as f64 / bytes_s);
        Some(turn)
    }
}

/// See the module.
pub(crate) struct Lender {
    shelf: Arc<dyn Shelf>,
    directory: Arc<dyn Directory>,
    members: Arc<Members>,
    pool: Pool,
    lending: Arc<Semaphore>,
    answering: Semaphore,
    meter: Meter,
    guests: Mutex<HashMap<NodeId, Connection>>,
}

/// Who asks.
#[derive(Clone)]
struct Guest {
    id: NodeId,
    connection: Connection,
}

impl Guest {
    fn address(&self) -> SocketAddr {
        self.connection.remote_address()
    }
}

impl Lender {
    /// Lends from `shelf` to `members`, `rate` bytes per second at most.
    pub(crate) fn new(
        shelf: Arc<dyn Shelf>,
        directory: Arc<dyn Directory>,
        members: Arc<Members>,
        rate: Option<u64>,
    ) -> Lender {
        Lender {
            shelf,
            directory,
            members,
            pool: Pool::new(POOL_BYTES_MAX),
            lending: Arc::new(Semaphore::new(LENDING_MAX)),
            answering: Semaphore::new(ANSWERING_MAX),
            meter: Meter::new(rate),
            guests: Mutex::default(),
        }
    }

    /// Serves one connection to its end.
    pub(crate) async fn serve(self: Arc<Lender>, connection: Connection) {
        let Some(id) = peer_key(&connection) else { return };
        let guest = Guest { id, connection: connection.clone() };
        let before = self.guests().insert(id, connection.clone());
        if let Some(before) = before {
            before.close(Close::Replaced.into(), b"a newer connection of this machine took its place");
        }
        connection.set_max_concurrent_bi_streams(STREAMS_EACH_MAX.into());
        let mut streams = JoinSet::new();
        loop {
            tokio::select! {
                stream = connection.accept_bi() => match stream {
                    Ok((send, recv)) => {
                        streams.spawn(Arc::clone(&self).answer(guest.clone(), send, recv));
                    }
                    Err(_) => break,
                },
                Some(_) = streams.join_next() => {}
            }
        }
        let present = {
            let mut guests = self.guests();
            let present = guests.get(&id).is_some_and(|last| last.stable_id() == connection.stable_id());
            if present {
                guests.remove(&id);
            }
            present
        };
        if present {
            self.directory.announce(id, None);
        }
    }

    fn guests(&self) -> std::sync::MutexGuard<'_, HashMap<NodeId, Connection>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One stream: one question.
    async fn answer(self: Arc<Lender>, guest: Guest, mut send: SendStream, mut recv: RecvStream) {
        let reading = timeout(ASKED_WITHIN, read_frame(&mut recv, &self.pool, &QUESTIONS)).await;
        let asked = match reading {
            Ok(Ok(Some(frame))) => Weights::decode(&frame).map_err(|error| error.to_string()),
            Ok(Ok(None)) => Err("a stream without a question".to_owned()),
            Ok(Err(error)) => Err(error.to_string()),
            Err(_) => Err("no question within 5 s".to_owned()),
        };
        let outcome = match asked {
            Ok(_) if !self.admits(&guest) => return,
            Ok(Weights::Fetch(fetch)) => self.lend(&guest, fetch, &mut send).await,
            Ok(question) => match self.reply(&guest, question).await {
                Ok(answer) => self.say(&answer, &mut send).await,
                Err(refusal) => Err(refusal),
            },
            Err(reason) => Err(NotLent::new(Reason::Malformed, reason)),
        };
        if let Err(NotLent { reason, detail }) = outcome {
            tracing::debug!(peer = %guest.id, ?reason, detail, "weights were not lent");
            // Where it cannot be said, the stream ends without an answer.
            drop(self.say(&Weights::Refused(reason, detail), &mut send).await);
        }
        drop(send.finish());
    }

    /// Whether the guest still belongs to the cluster; its connection is closed where it does not.
    fn admits(&self, guest: &Guest) -> bool {
        let member = self.members.standing(guest.id) == Standing::Member;
        if !member {
            guest.connection.close(Close::Revoked.into(), b"the operator revoked this machine's key");
        }
        member
    }

    async fn say(&self, answer: &Weights, send: &mut SendStream) -> Result<(), NotLent> {
        let frame = answer.encode(&self.pool)?;
        self.write(frame, send).await
    }

    async fn write(&self, frame: Buffer, send: &mut SendStream) -> Result<(), NotLent> {
        match timeout(SENT_WITHIN, write_frame(send, frame)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(NotLent::new(Reason::Failed, error.to_string())),
            Err(_) => {
                // Fails only where the stream is closed already.
                drop(send.reset(LaneReset::Late.into()));
                Err(NotLent::new(Reason::Failed, "the asker does not read what it asked for"))
            }
        }
    }

    /// Answers anything but a fetch.
    async fn reply(&self, guest: &Guest, question: Weights) -> Result<Weights, NotLent> {
        let _place = self.answering.acquire().await;
        let shelf = Arc::clone(&self.shelf);
        match question {
            Weights::AskCatalogue { port } => {
                let catalogue = blocking(move || Ok(shelf.catalogue())).await?;
                let absent = || NotLent::new(Reason::Absent, "which model it is the router says");
                let catalogue = catalogue.ok_or_else(absent)?;
                let address = (port != 0).then(|| SocketAddr::new(guest.address().ip(), port));
                self.directory.announce(guest.id, address);
                Ok(Weights::Catalogue(catalogue))
            }
            Weights::AskHashes(slices) => Ok(Weights::Hashes(blocking(move || shelf.hashes(&slices)).await?)),
            Weights::AskHolders(slices) => {
                Ok(Weights::Holders(self.directory.holders((guest.id, guest.address()), &slices)))
            }
            _ => Err(NotLent::new(Reason::Malformed, "that is no question")),
        }
    }

    /// Sends an expert.
    async fn lend(&self, guest: &Guest, fetch: Fetch, send: &mut SendStream) -> Result<(), NotLent> {
        let busy = |_| NotLent::new(Reason::Busy, "as many experts as may be are being sent");
        let _place = Arc::clone(&self.lending).try_acquire_owned().map_err(busy)?;
        let shelf = Arc::clone(&self.shelf);
        let mut blob = blocking(move || shelf.open(fetch.slice, fetch.hash)).await?;
        let (mut at, end) = (fetch.from, blob.bytes());
        if at >= end {
            return Err(NotLent::new(Reason::Malformed, format!("it has {end} bytes, none from {at} on")));
        }
        while at < end {
            let len = (end - at).min(CHUNK_BYTES_MAX as u64) as usize;
            let frame;
            (frame, blob) = self.read(blob, (at, len)).await?;
            if let Some(turn) = self.meter.turn(len) {
                sleep_until(turn).await;
            }
            if !self.admits(guest) {
                return Ok(());
            }
            self.write(frame, send).await?;
            self.directory.lent(guest.id, len as u64);
            at += len as u64;
        }
        Ok(())
    }

    /// The next chunk.
    async fn read(
        &self,
        mut blob: Box<dyn Blob>,
        (at, len): (u64, usize),
    ) -> Result<(Buffer, Box<dyn Blob>), NotLent> {
        let pool = self.pool.clone();
        blocking(move || {
            let failed = |error: std::io::Error| NotLent::new(Reason::Failed, error.to_string());
            let frame = Chunk::write(&pool, (at, len), |out| blob.read(at, out).map_err(failed))?;
            Ok((frame, blob))
        })
        .await
    }
}

/// Does something on a thread that may wait.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, NotLent> + Send + 'static,
) -> Result<T, NotLent> {
    let done = spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(NotLent::new(Reason::Failed, error.to_string())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_meter_spreads_bytes_over_time_and_keeps_no_credit() {
        let meter = Meter::new(Some(1000));
        let began = Instant::now();
        let turns: Vec<_> = (0..3).map(|_| meter.turn(500).unwrap() - began).collect();
        assert_eq!(turns.iter().map(Duration::as_millis).collect::<Vec<_>>(), [0, 500, 1000]);
        sleep_until(began + Duration::from_secs(60)).await;
        let later = [meter.turn(1000).unwrap(), meter.turn(1).unwrap()].map(|turn| (turn - began).as_secs());
        assert_eq!(later, [60, 61]);
        assert_eq!(Meter::new(None).turn(1 << 30), None);
    }
}
