//! Fetches experts into the store: whom to ask, and what to do when somebody fails.
//!
//! Several threads take experts from one queue. Each is asked of a node that has it, the one with the fewest streams of
//! ours, and of the router where no node has it, all are busy enough already, or all have failed: the router has
//! everything. What has come stays when a source fails, and the next one goes on from there. A node that stalls, drips
//! or cannot be reached is not asked for this expert again, and not at all in this placement after `STRIKES_MAX` times;
//! one whose bytes make a wrong hash, or that breaks the protocol, at once. All of it is counted and written down with
//! its name. Where bytes of several sources made the wrong hash nobody can say whose were wrong: none of them but the
//! router is asked for it again.
//!
//! A router that is away or busy is asked again after a pause, as long as it is not away for too long. Refuses to go on
//! without it: a placement whose experts cannot be had is refused, with the expert and the reason.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_net::borrower::BorrowError;
use mesh_net::exchange::{self, Exchange, Origin};
use mesh_wire::id::{NodeId, Slice};
use mesh_wire::weights::{Fetch, Hash, Holder, Holders, Reason};

use crate::store::{Part, Store, StoreError, name_of};

/// Experts fetched at a time: enough to fill a gigabit while some wait for a disk.
pub const STREAMS: usize = 4;

/// Of these, from one node; more are asked of the router meanwhile.
const STREAMS_EACH: usize = 2;

/// Failures of a node after which it is not asked again in this placement.
const STRIKES_MAX: u32 = 3;

/// Failures of the router in a row, none of which brought a byte, after which the placement is refused. Each takes as
/// long as the exchange waits for it.
const ROUTER_FAILURES_MAX: u32 = 4;

/// Pause before a router is asked again that was busy, and one that failed.
const BUSY_PAUSE: Duration = Duration::from_millis(200);
const FAILED_PAUSE: Duration = Duration::from_secs(1);

/// Where experts come from. `Exchange` is the one; tests have others. Methods wait.
pub trait Supply: Send + Sync + std::fmt::Debug {
    /// Hashes of these, as the router says.
    ///
    /// # Errors
    /// `BorrowError`.
    fn hashes(&self, slices: &[Slice]) -> Result<Vec<Hash>, BorrowError>;

    /// Who else has these, as the router says.
    ///
    /// # Errors
    /// `BorrowError`.
    fn holders(&self, slices: &[Slice]) -> Result<Holders, BorrowError>;

    /// Asks for an expert of so many bytes.
    ///
    /// # Errors
    /// `BorrowError`.
    fn order(&self, origin: Origin, fetch: Fetch, bytes: u64) -> Result<Box<dyn Chunks>, BorrowError>;

    /// Waits so long.
    fn pause(&self, time: Duration);

    /// There is nothing more to fetch for now.
    fn rest(&self);
}

/// Bytes on their way.
pub trait Chunks {
    /// Replaces what is in `out` by the next bytes; false when all have come.
    ///
    /// # Errors
    /// `BorrowError`; then there will be no more.
    fn next(&mut self, out: &mut Vec<u8>) -> Result<bool, BorrowError>;
}

impl Supply for Exchange {
    fn hashes(&self, slices: &[Slice]) -> Result<Vec<Hash>, BorrowError> {
        Exchange::hashes(self, slices)
    }

    fn holders(&self, slices: &[Slice]) -> Result<Holders, BorrowError> {
        Exchange::holders(self, slices)
    }

    fn order(&self, origin: Origin, fetch: Fetch, bytes: u64) -> Result<Box<dyn Chunks>, BorrowError> {
        Ok(Box::new(Exchange::order(self, origin, fetch, bytes)?))
    }

    fn pause(&self, time: Duration) {
        Exchange::pause(self, time);
    }

    fn rest(&self) {
        Exchange::rest(self);
    }
}

impl Chunks for exchange::Delivery {
    fn next(&mut self, out: &mut Vec<u8>) -> Result<bool, BorrowError> {
        exchange::Delivery::next(self, out)
    }
}

/// An expert, or a slice of one, that is to be fetched.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Which.
    pub slice: Slice,
    /// Of its bytes.
    pub hash: Hash,
    /// Its length.
    pub bytes: u64,
    /// Nodes that have it.
    pub holders: Vec<Holder>,
}

/// Why it is not there.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The disk.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The router cannot or will not send it.
    #[error("{} cannot be fetched from the router: {error}", name(.slice))]
    Router {
        /// Which.
        slice: Slice,
        /// Why.
        error: BorrowError,
    },
    /// What the router sends does not have the hash that the router says.
    #[error(
        "{} of the router's packed model is damaged: its bytes do not have the hash {} of its manifest; delete the \
         packed model in the router's --cache and start the router again", name(.slice), name_of(.hash)
    )]
    Damaged {
        /// Which.
        slice: Slice,
        /// The hash.
        hash: Hash,
    },
    /// The process is ending.
    #[error("the node is shutting down")]
    Ending,
}

/// A slice for people.
pub(crate) fn name(slice: &Slice) -> String {
    let Slice { key, from, to } = slice;
    format!("expert {} of layer {} (blocks {from}..{to})", key.expert, key.layer)
}

/// What has been fetched and what is to be: written by all threads, read by whoever shows it.
#[derive(Debug, Default)]
pub struct Counts {
    /// Experts that are in the store.
    pub experts_done: AtomicU64,
    /// Experts that were missing.
    pub experts_total: AtomicU64,
    /// Bytes that are in the store.
    pub bytes_done: AtomicU64,
    /// Bytes that were missing.
    pub bytes_total: AtomicU64,
    /// Since the process started: bytes that came from the router,
    pub router_bytes: AtomicU64,
    /// and from other nodes.
    pub peer_bytes: AtomicU64,
    /// Since the process started: times that a node failed as a source.
    pub failures: AtomicU64,
    /// Whether something is being fetched.
    pub busy: AtomicBool,
}

/// What fetching needs.
#[derive(Clone, Copy, Debug)]
pub struct Tools<'a> {
    /// Where experts come from.
    pub supply: &'a dyn Supply,
    /// Where they go.
    pub store: &'a Store,
    /// Set when the process is ending.
    pub ending: &'a AtomicBool,
    /// What is counted.
    pub counts: &'a Counts,
}

/// Fetches all of these, which have different hashes. There must be room (`Store::make_room`).
///
/// # Errors
/// The first that makes it impossible; what has come stays.
pub fn fetch_all(tools: Tools<'_>, wanted: Vec<Wanted>) -> Result<(), FetchError> {
    let counts = tools.counts;
    counts.experts_done.store(0, Ordering::Relaxed);
    counts.bytes_done.store(0, Ordering::Relaxed);
    counts.experts_total.store(wanted.len() as u64, Ordering::Relaxed);
    counts.bytes_total.store(wanted.iter().map(|one| one.bytes).sum(), Ordering::Relaxed);
    counts.busy.store(true, Ordering::Relaxed);
    let crew = Crew { tools, state: Mutex::new(State { queue: wanted.into(), ..State::default() }) };
    std::thread::scope(|scope| {
        for _ in 1..STREAMS {
            // Without more threads this one does it all.
            drop(std::thread::Builder::new().name("fetch".into()).spawn_scoped(scope, || crew.work()));
        }
        crew.work();
    });
    counts.busy.store(false, Ordering::Relaxed);
    crew.state().failed.take().map_or(Ok(()), Err)
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Wanted>,
    /// Streams to each node.
    streams: BTreeMap<NodeId, usize>,
    /// Failures of each.
    strikes: BTreeMap<NodeId, u32>,
    failed: Option<FetchError>,
}

/// What the threads share.
struct Crew<'a> {
    tools: Tools<'a>,
    state: Mutex<State>,
}

/// How pulling bytes ended before the last one.
enum Stopped {
    /// It is not the source's fault, and another will not help.
    Here(FetchError),
    /// The source failed.
    There(BorrowError),
}

/// What is known of one expert while it is fetched.
struct Attempt {
    wanted: Wanted,
    /// Nodes that are not asked for it again.
    tried: BTreeSet<NodeId>,
    /// Failures of the router since a byte came.
    router_failures: u32,
    /// Bytes that are in the counts.
    counted: u64,
}

impl Crew<'_> {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        loop {
            let next = {
                let mut state = self.state();
                if state.failed.is_some() { None } else { state.queue.pop_front() }
            };
            let Some(wanted) = next else { return };
            if let Err(error) = self.fetch(wanted) {
                self.state().failed.get_or_insert(error);
                return;
            }
            self.tools.counts.experts_done.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Fetches one, whatever it takes.
    fn fetch(&self, wanted: Wanted) -> Result<(), FetchError> {
        let mut attempt = Attempt { wanted, tried: BTreeSet::new(), router_failures: 0, counted: 0 };
        loop {
            let (hash, bytes) = (attempt.wanted.hash, attempt.wanted.bytes);
            let mut part = self.tools.store.part(hash, bytes)?;
            let resumed = part.have() > 0;
            self.count(&mut attempt, part.have());
            let mut sources: Vec<Origin> = Vec::new();
            while !part.is_complete() {
                let origin = self.choose(&attempt);
                let before = part.have();
                let pulled = self.pull(origin, &mut attempt, &mut part);
                if part.have() > before {
                    sources.push(origin);
                    attempt.router_failures = 0;
                }
                let judged = match pulled {
                    Ok(()) => Ok(()),
                    Err(Stopped::Here(error)) => Err(error),
                    Err(Stopped::There(error)) => self.blame(origin, &mut attempt, error),
                };
                // Not before it was judged: others would ask it as well.
                self.let_go(origin);
                judged?;
            }
            if part.finish()? {
                return Ok(());
            }
            self.count(&mut attempt, 0);
            self.blame_bytes(&sources, resumed, &mut attempt)?;
        }
    }

    /// Whom to ask next.
    fn choose(&self, attempt: &Attempt) -> Origin {
        let mut state = self.state();
        let asked = |state: &State, id: NodeId| state.streams.get(&id).copied().unwrap_or(0);
        let willing = attempt.wanted.holders.iter().filter(|holder| {
            let strikes = state.strikes.get(&holder.id).copied().unwrap_or(0);
            let free = asked(&state, holder.id) < STREAMS_EACH;
            free && strikes < STRIKES_MAX && !attempt.tried.contains(&holder.id)
        });
        let Some(holder) = willing.min_by_key(|holder| asked(&state, holder.id)).copied() else {
            return Origin::Router;
        };
        *state.streams.entry(holder.id).or_default() += 1;
        Origin::Peer(holder)
    }

    fn let_go(&self, origin: Origin) {
        if let Origin::Peer(holder) = origin
            && let Some(streams) = self.state().streams.get_mut(&holder.id)
        {
            *streams = streams.saturating_sub(1);
        }
    }

    /// Takes bytes from one source until all are there or it fails.
    fn pull(&self, origin: Origin, attempt: &mut Attempt, part: &mut Part<'_>) -> Result<(), Stopped> {
        let Wanted { slice, hash, bytes, .. } = attempt.wanted;
        let fetch = Fetch { slice, hash, from: part.have() };
        let mut chunks = self.tools.supply.order(origin, fetch, bytes).map_err(Stopped::There)?;
        let counts = self.tools.counts;
        let from = if origin == Origin::Router { &counts.router_bytes } else { &counts.peer_bytes };
        let mut piece = Vec::new();
        while chunks.next(&mut piece).map_err(Stopped::There)? {
            if self.tools.ending.load(Ordering::Relaxed) {
                return Err(Stopped::Here(FetchError::Ending));
            }
            part.append(&piece).map_err(|error| Stopped::Here(error.into()))?;
            from.fetch_add(piece.len() as u64, Ordering::Relaxed);
            self.count(attempt, part.have());
        }
        Ok(())
    }

    /// Counts that so many bytes of it are there now.
    fn count(&self, attempt: &mut Attempt, have: u64) {
        let done = &self.tools.counts.bytes_done;
        done.fetch_add(have, Ordering::Relaxed);
        done.fetch_sub(attempt.counted, Ordering::Relaxed);
        attempt.counted = have;
    }

    /// A source has failed before the last byte.
    fn blame(&self, origin: Origin, attempt: &mut Attempt, error: BorrowError) -> Result<(), FetchError> {
        let slice = attempt.wanted.slice;
        if self.tools.ending.load(Ordering::Relaxed) {
            return Err(FetchError::Ending);
        }
        let Origin::Peer(holder) = origin else {
            let pause = match &error {
                BorrowError::Refused(Reason::Busy, _) => BUSY_PAUSE,
                BorrowError::Refused(..) | BorrowError::Revoked => {
                    return Err(FetchError::Router { slice, error });
                }
                _ => {
                    attempt.router_failures += 1;
                    FAILED_PAUSE
                }
            };
            if attempt.router_failures >= ROUTER_FAILURES_MAX {
                return Err(FetchError::Router { slice, error });
            }
            tracing::debug!(expert = name(&slice), %error, "the router is asked again");
            self.tools.supply.pause(pause);
            return Ok(());
        };
        attempt.tried.insert(holder.id);
        let strikes = match &error {
            // It never had it, or has others to serve.
            BorrowError::Refused(Reason::Absent | Reason::Busy, _) => 0,
            BorrowError::Wrong(_) | BorrowError::Gone(_) => STRIKES_MAX,
            _ => 1,
        };
        if strikes > 0 {
            self.strike(holder, strikes, &slice, &error.to_string());
        }
        Ok(())
    }

    /// All bytes are there and make another hash.
    fn blame_bytes(
        &self,
        sources: &[Origin],
        resumed: bool,
        attempt: &mut Attempt,
    ) -> Result<(), FetchError> {
        let Wanted { slice, hash, .. } = attempt.wanted;
        let peers: Vec<Holder> = sources
            .iter()
            .filter_map(|source| match source {
                Origin::Peer(holder) => Some(*holder),
                Origin::Router => None,
            })
            .collect();
        if peers.is_empty() && !resumed {
            return Err(FetchError::Damaged { slice, hash });
        }
        // With one source, and nothing from an earlier run, it is known whose bytes were wrong.
        let certain = !resumed && sources.len() == 1;
        for holder in &peers {
            attempt.tried.insert(holder.id);
            let strikes = if certain { STRIKES_MAX } else { 1 };
            self.strike(*holder, strikes, &slice, "its bytes do not have the hash of this expert");
        }
        if peers.is_empty() {
            tracing::warn!(
                expert = name(&slice),
                "what an earlier run had fetched was damaged; it is fetched again"
            );
        }
        Ok(())
    }

    fn strike(&self, holder: Holder, strikes: u32, slice: &Slice, why: &str) {
        self.tools.counts.failures.fetch_add(1, Ordering::Relaxed);
        let mut state = self.state();
        let count = state.strikes.entry(holder.id).or_default();
        *count = count.saturating_add(strikes);
        let dropped = *count >= STRIKES_MAX;
        tracing::warn!(
            node = %holder.id, address = %holder.address, expert = name(slice), dropped,
            "a node failed as a source of weights: {why}"
        );
    }
}

#[cfg(test)]
mod tests;
