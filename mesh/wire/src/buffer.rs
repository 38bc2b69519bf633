//! Where frames lie: reusable, 64-byte aligned, bounded.
//!
//! A frame is built or received in a `Buffer`: 56 bytes of slack, the 8-byte header, then the body, which thereby
//! begins at a multiple of 64 while header and body are still one contiguous run to send. Buffers come from a
//! `Pool` in sizes of powers of two and go back to it when dropped, from any thread. The pool never holds more than
//! the bytes it was given, idle and outstanding together, and refuses beyond that: a peer, however fast, cannot
//! make the process grow. The price is one short lock per frame and up to half a buffer unused. Memory is zeroed
//! when it is first allocated, not between uses; `archive` overwrites what it sends.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rkyv::util::AlignedVec;

use crate::frame::{BODY_BYTES_MAX, FrameError, HEADER_BYTES, Header, Op};

/// Where the body begins: the alignment of payloads.
const BODY_AT: usize = 64;

/// Where the header begins, so that header and body are contiguous.
const HEADER_AT: usize = BODY_AT - HEADER_BYTES;

/// Smallest buffer: a decode call or reply of a model 2048 wide fits.
const CLASS_BYTES_MIN: usize = 8 << 10;

/// Sizes are `CLASS_BYTES_MIN << 0 ..`; the last holds the largest frame.
const CLASSES: usize = 11;

/// Share of a pool's bytes that may lie idle: the rest of a burst is given back to the system.
const IDLE_SHARE: usize = 4;

const _: () = assert!(CLASS_BYTES_MIN << (CLASSES - 1) >= BODY_AT + BODY_BYTES_MAX);

/// A bounded set of buffers. Cloning gives another handle to the same set.
#[derive(Clone, Debug)]
pub struct Pool {
    shared: Arc<Shared>,
}

/// What a pool did so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolCounters {
    /// Buffers taken from the system.
    pub allocated: u64,
    /// Buffers handed out again.
    pub reused: u64,
    /// Buffers not handed out because the pool was at its limit.
    pub refused: u64,
    /// Bytes held now, idle and outstanding.
    pub bytes: u64,
}

#[derive(Debug)]
struct Shared {
    bytes_max: usize,
    state: Mutex<State>,
    allocated: AtomicU64,
    reused: AtomicU64,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    idle: [Vec<AlignedVec<BODY_AT>>; CLASSES],
    idle_bytes: usize,
    bytes: usize,
}

impl Pool {
    /// A pool that holds at most `bytes_max` bytes.
    pub fn new(bytes_max: usize) -> Pool {
        let state = Mutex::new(State::default());
        let zero = || AtomicU64::new(0);
        let shared = Shared { bytes_max, state, allocated: zero(), reused: zero(), refused: zero() };
        Pool { shared: Arc::new(shared) }
    }

    /// A buffer for a frame with this header, its body not yet written (it may hold bytes of an earlier frame).
    ///
    /// # Errors
    /// `PoolExhausted` where it would take the pool beyond its limit.
    pub fn take(&self, header: Header) -> Result<Buffer, FrameError> {
        let needed = BODY_AT + header.body_bytes();
        let class = class_of(needed);
        let mut storage = match self.reuse(class)? {
            Some(storage) => {
                self.shared.reused.fetch_add(1, Ordering::Relaxed);
                storage
            }
            None => {
                self.shared.allocated.fetch_add(1, Ordering::Relaxed);
                let mut storage = AlignedVec::with_capacity(class_bytes(class));
                storage.resize(class_bytes(class), 0);
                storage
            }
        };
        storage[HEADER_AT..BODY_AT].copy_from_slice(&header.to_bytes());
        Ok(Buffer { storage, header, pool: self.clone() })
    }

    /// What happened so far.
    pub fn counters(&self) -> PoolCounters {
        let bytes = self.state().bytes as u64;
        PoolCounters {
            allocated: self.shared.allocated.load(Ordering::Relaxed),
            reused: self.shared.reused.load(Ordering::Relaxed),
            refused: self.shared.refused.load(Ordering::Relaxed),
            bytes,
        }
    }

    /// An idle buffer of the class; `None` where a new one has to be, and may be, allocated.
    fn reuse(&self, class: usize) -> Result<Option<AlignedVec<BODY_AT>>, FrameError> {
        let wanted = class_bytes(class);
        let mut state = self.state();
        if let Some(storage) = state.idle[class].pop() {
            state.idle_bytes -= wanted;
            return Ok(Some(storage));
        }
        // Idle buffers of other sizes give way, largest first.
        let mut others = CLASSES;
        while state.bytes + wanted > self.shared.bytes_max && others > 0 {
            match state.idle[others - 1].pop() {
                Some(_) => {
                    state.bytes -= class_bytes(others - 1);
                    state.idle_bytes -= class_bytes(others - 1);
                }
                None => others -= 1,
            }
        }
        if state.bytes + wanted > self.shared.bytes_max {
            self.shared.refused.fetch_add(1, Ordering::Relaxed);
            return Err(FrameError::PoolExhausted(wanted));
        }
        state.bytes += wanted;
        Ok(None)
    }

    fn give_back(&self, storage: AlignedVec<BODY_AT>) {
        let bytes = storage.len();
        let mut state = self.state();
        if state.idle_bytes + bytes <= self.shared.bytes_max / IDLE_SHARE {
            state.idle_bytes += bytes;
            state.idle[class_of(bytes)].push(storage);
        } else {
            state.bytes -= bytes;
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn class_bytes(class: usize) -> usize {
    CLASS_BYTES_MIN << class
}

/// The smallest class that holds `bytes`; headers keep it within `CLASSES`.
fn class_of(bytes: usize) -> usize {
    let classes = bytes.div_ceil(CLASS_BYTES_MIN).next_power_of_two().trailing_zeros();
    (classes as usize).min(CLASSES - 1)
}

/// One frame: a header and room for its body. Goes back to its pool when dropped.
#[derive(Debug)]
pub struct Buffer {
    storage: AlignedVec<BODY_AT>,
    header: Header,
    pool: Pool,
}

impl Buffer {
    /// What the frame is.
    pub fn op(&self) -> Op {
        self.header.op()
    }

    /// The archive; begins at a multiple of 64.
    pub fn body(&self) -> &[u8] {
        &self.storage[BODY_AT..BODY_AT + self.header.body_bytes()]
    }

    /// Where a received body is to be written.
    pub fn body_mut(&mut self) -> &mut [u8] {
        &mut self.storage[BODY_AT..BODY_AT + self.header.body_bytes()]
    }

    /// Header and body: what is sent.
    pub fn frame(&self) -> &[u8] {
        &self.storage[HEADER_AT..BODY_AT + self.header.body_bytes()]
    }

    /// Shortens the body to what was really written.
    pub(crate) fn truncate(&mut self, body_bytes: usize) {
        let bytes = body_bytes.min(self.header.body_bytes());
        if let Ok(header) = Header::new(self.header.op(), bytes) {
            self.header = header;
            self.storage[HEADER_AT..BODY_AT].copy_from_slice(&header.to_bytes());
        }
    }
}

/// Header and body, so that a buffer can be handed to the network as it is.
impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.frame()
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.storage));
    }
}
