//! What router and node tell each other besides calls, as owned values. Their encoding is in `message`.
//!
//! These are said a few times per second at most, so they are ordinary structs with strings; `message` writes them
//! as flat archives and checks every length, text and code of those that come in.

use crate::id::Slice;

/// First message of a node on its control stream.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Hello {
    /// Name the operator gave the node; at most `NAME_BYTES_MAX` bytes of UTF-8.
    pub name: String,
    /// Program version, for people.
    pub version: String,
    /// Fingerprint of the model the node can load experts of (BLAKE3 of its manifest).
    pub model: [u8; 32],
    /// Bytes it will spend on weights.
    pub memory_bytes: u64,
    /// Threads it computes with.
    pub threads: u16,
    /// Whether its kernels compute the bits of the definition.
    pub exact: bool,
    /// Kernel and instruction set, for people: `native avx512-vnni`.
    pub kernels: String,
    /// Measured weight bandwidth, in MB/s, at 1, 4, 16, 64 and 256 rows; 0 where not measured.
    pub weight_mb_s: [u32; 5],
    /// Epoch whose placement it still holds in memory, 0 for none.
    pub held_epoch: u64,
    /// Drawn when the process started: tells a machine that came back from a second one with a copied key.
    pub instance: u64,
}

/// The router's order to hold these experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Placement {
    /// Version of the placement; grows.
    pub epoch: u64,
    /// Model it is about (BLAKE3 of the manifest).
    pub model: [u8; 32],
    /// Experts this node shall hold, whole or in part, ascending by expert; each expert at most once.
    pub experts: Vec<Slice>,
}

/// The node's answer to a `Placement`.
#[derive(Clone, Debug, PartialEq)]
pub struct Placed {
    /// The placement it is about.
    pub epoch: u64,
    /// Bytes of weights now in memory.
    pub weight_bytes: u64,
    /// Empty when the experts are loaded; otherwise why not, for people.
    pub refusal: String,
}

/// What a machine's sensors show. `None` where it has none, or what they show cannot be: never zero instead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vitals {
    /// The hottest part of its processor, thousandths of a degree Celsius.
    pub temperature_mc: Option<i32>,
    /// Whether it slowed its processor down within the last seconds, because of heat or power.
    pub throttled: Option<bool>,
    /// What it draws, milliwatts.
    pub power_mw: Option<u32>,
    /// What it used since the node started, millijoules.
    pub energy_mj: Option<u64>,
}

/// Counters a node reports every second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    /// Epoch it serves.
    pub epoch: u64,
    /// Calls answered since it started.
    pub calls: u64,
    /// Rows computed since it started.
    pub rows: u64,
    /// Microseconds in kernels since it started.
    pub busy_us: u64,
    /// Calls waiting now.
    pub queued: u32,
    /// Resident memory of the process.
    pub resident_bytes: u64,
    /// The machine's sensors.
    pub vitals: Vitals,
}

/// How far a node is with the weights of a placement; said every second while it is at it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Loading {
    /// Bytes that are where they belong: on its disk, or in its memory where it needs no disk.
    pub done_bytes: u64,
    /// Bytes of the placement.
    pub total_bytes: u64,
    /// Of what was fetched over the network: bytes that came from other nodes and not from the router.
    pub peer_bytes: u64,
}

/// The router asks on a lane how long bytes take; the node answers with `Probed`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Comes back in the answer.
    pub id: u64,
    /// Bytes of padding the answer shall carry; at most `PROBE_BYTES_MAX`.
    pub answer_bytes: u32,
    /// Padding of this message.
    pub padding: Vec<u8>,
}

/// The answer to a `Probe`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probed {
    /// Of the probe.
    pub id: u64,
    /// As many bytes as were asked for.
    pub padding: Vec<u8>,
}

/// Why a node did not compute a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Refusal {
    /// It does not serve the epoch the call was made for.
    UnknownEpoch = 1,
    /// It does not hold one of the experts.
    UnknownExpert = 2,
    /// The frame is not a valid call, or not one for this model.
    Malformed = 3,
    /// The budget was spent before it could start.
    Expired = 4,
    /// Too many calls are waiting.
    Busy = 5,
    /// It is stopping.
    Stopping = 6,
    /// Computing failed.
    Failed = 7,
}

impl Refusal {
    /// The refusal with this code on the wire.
    pub fn from_code(code: u8) -> Option<Refusal> {
        use Refusal::{Busy, Expired, Failed, Malformed, Stopping, UnknownEpoch, UnknownExpert};
        let all = [UnknownEpoch, UnknownExpert, Malformed, Expired, Busy, Stopping, Failed];
        all.into_iter().find(|refusal| *refusal as u8 == code)
    }
}

/// The answer to a call that was not computed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CallRefused {
    /// The call; 0 where the frame was too broken to tell.
    pub call: u64,
    /// Why, for programs.
    pub refusal: Refusal,
    /// Why, for people.
    pub detail: String,
}

/// A last message before a side closes.
#[derive(Clone, Debug, PartialEq)]
pub struct Goodbye {
    /// Why, for people.
    pub reason: String,
}
