//! The header of a frame, the operation codes, the limits and the errors.
//!
//! Every frame begins with eight bytes: length of the body (u32), operation code (u16), and sixteen zero bits kept
//! for later, all little-endian. The protocol's version is not among them: peers of another version are turned
//! away by ALPN before they can send a frame. Each operation has its own cap, so a peer cannot make the other side
//! reserve megabytes by announcing a `Health`. The header is parsed before a buffer is taken: nothing is ever
//! allocated on the word of a peer beyond that cap. Price: a frame of a future extension is refused, not skipped.

use thiserror::Error;

use crate::payload::{GROUP, RowFormat};

/// The protocol and its version, negotiated in TLS.
pub const ALPN: &[u8] = b"moemesh/3";

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 8;

/// Largest payload of a call: 1 MiB. A larger batch is split by rows into several calls, so that a prefill chunk
/// never keeps the link from a decode call for more than about 8 ms at 1 Gb/s, a lost call costs little to repeat,
/// and a node begins to compute while the next chunk is still on its way. A 16 MiB prefill batch is 16 calls.
pub const CALL_PAYLOAD_BYTES_MAX: usize = 1 << 20;

/// Largest payload of a reply: 4 MiB. A row of i32 sums takes 4 bytes per value where the call's int8 row took at
/// least 9/8, so the reply to a full call can be up to 3.6 times as large.
pub const REPLY_PAYLOAD_BYTES_MAX: usize = 4 << 20;

/// Rows per call: what fits in a payload of int8 rows of 256 values, the smallest models there are.
pub const ROWS_MAX: usize = 4096;

/// Width of the hidden state: twice the widest model known (Kimi-K2 and DeepSeek-V3 have 7168).
pub const HIDDEN_MAX: usize = 16_384;

/// Experts per row and layer: twice the largest top-k of a published model.
pub const TOP_K_MAX: usize = 32;

/// Assignments per call. Not `ROWS_MAX * TOP_K_MAX`: no real call is large in both, and this keeps a frame small.
pub const ASSIGNMENTS_MAX: usize = 1 << 16;

/// Longest budget of a call in microseconds: a minute. A call that may take longer should have been split.
pub const BUDGET_US_MAX: u32 = 60_000_000;

/// Experts in one placement: 60 layers of 384 (Kimi-K2) are 23 040.
pub const PLACED_EXPERTS_MAX: usize = 1 << 16;

/// Padding of a probe or of its answer: what a gigabit link carries in 2 ms, so that a decode call is not held up by it.
pub const PROBE_BYTES_MAX: usize = 256 << 10;

/// Bytes of a signed roster: 256 machines take about a tenth.
pub const ROSTER_BYTES_MAX: usize = 256 << 10;

/// Bytes of weights in one frame: with header and archive it fits a buffer of 256 KiB, takes 2 ms on a gigabit, and is
/// what a sender reads, and a receiver writes, at a time.
pub const CHUNK_BYTES_MAX: usize = 255 << 10;

/// Experts or slices that are asked about at a time: a layer of twice the experts of any model.
pub const ASKED_SLICES_MAX: usize = 1024;

/// Layers with routed experts in a catalogue, as many as a config may have.
pub const CATALOGUE_LAYERS_MAX: usize = 1024;

/// Machines in one answer about who holds what; one byte numbers them.
pub const NAMED_HOLDERS_MAX: usize = 255;

/// Bytes of a node's name, as in DNS labels.
pub const NAME_BYTES_MAX: usize = 63;

/// Bytes of any other text a peer sends for people to read.
pub const TEXT_BYTES_MAX: usize = 512;

/// Bytes an archive takes beyond the vectors in it: fixed fields, alignment of two vectors.
pub(crate) const ARCHIVE_FIXED_BYTES_MAX: usize = 512;

/// Body of the largest frame of all, a reply.
pub const BODY_BYTES_MAX: usize = REPLY_PAYLOAD_BYTES_MAX + ROWS_MAX + ARCHIVE_FIXED_BYTES_MAX;

/// What a frame is. Codes below 16 travel on lanes, the others on the control stream; 32-47 are kept for the
/// roster and 48-63 for weights, which have connections of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Op {
    /// Router to node: rows to be computed.
    Call = 1,
    /// Node to router: the sums of a call.
    Reply = 2,
    /// Node to router: why a call was not computed.
    CallRefused = 3,
    /// Router to node: how long do bytes take?
    Probe = 4,
    /// Node to router: the answer to that.
    Probed = 5,
    /// Node to router, first on the control stream: who it is and what it can do.
    Hello = 16,
    /// Router to node: the experts to hold.
    Placement = 17,
    /// Node to router: it holds them, or why not.
    Placed = 18,
    /// Node to router, every second: its counters.
    Health = 19,
    /// Either side, last: why it closes.
    Goodbye = 20,
    /// Node to router: it is going to stop; no more calls, please. It serves those under way.
    Leaving = 21,
    /// Router to node: are you there?
    Ping = 22,
    /// Node to router: yes.
    Pong = 23,
    /// Router to node: the signed roster, now and whenever it changes.
    Roster = 32,
    /// To the router, on a connection for weights: which model is it?
    AskCatalogue = 48,
    /// The answer.
    Catalogue = 49,
    /// To the router: what are the hashes of these experts or slices?
    AskHashes = 50,
    /// The answer.
    Hashes = 51,
    /// To the router: who else has them?
    AskHolders = 52,
    /// The answer.
    Holders = 53,
    /// To the router or a node: send one, from here on.
    Fetch = 54,
    /// The next bytes of it.
    Chunk = 55,
    /// Why not.
    WeightsRefused = 56,
    /// Node to router, on the control stream while it fetches or loads: how far it is.
    Loading = 57,
}

impl Op {
    /// Every operation.
    pub const ALL: [Op; 24] = [
        Op::Call,
        Op::Reply,
        Op::CallRefused,
        Op::Probe,
        Op::Probed,
        Op::Hello,
        Op::Placement,
        Op::Placed,
        Op::Health,
        Op::Goodbye,
        Op::Leaving,
        Op::Ping,
        Op::Pong,
        Op::Roster,
        Op::AskCatalogue,
        Op::Catalogue,
        Op::AskHashes,
        Op::Hashes,
        Op::AskHolders,
        Op::Holders,
        Op::Fetch,
        Op::Chunk,
        Op::WeightsRefused,
        Op::Loading,
    ];

    /// The operation with this code.
    pub fn from_code(code: u16) -> Option<Op> {
        Op::ALL.into_iter().find(|op| *op as u16 == code)
    }

    /// The largest body a frame of this operation may have.
    pub const fn body_bytes_max(self) -> usize {
        match self {
            Op::Call => CALL_PAYLOAD_BYTES_MAX + ASSIGNMENTS_MAX * 12 + ARCHIVE_FIXED_BYTES_MAX,
            Op::Reply => BODY_BYTES_MAX,
            Op::Placement => PLACED_EXPERTS_MAX * 8 + ARCHIVE_FIXED_BYTES_MAX,
            Op::Probe | Op::Probed => PROBE_BYTES_MAX + ARCHIVE_FIXED_BYTES_MAX,
            Op::Roster => ROSTER_BYTES_MAX + ARCHIVE_FIXED_BYTES_MAX,
            Op::Leaving | Op::Ping | Op::Pong | Op::AskCatalogue | Op::Loading => ARCHIVE_FIXED_BYTES_MAX,
            Op::Fetch => 8 + ARCHIVE_FIXED_BYTES_MAX,
            Op::Catalogue => CATALOGUE_LAYERS_MAX * 4 + TEXT_BYTES_MAX + ARCHIVE_FIXED_BYTES_MAX,
            Op::AskHashes | Op::AskHolders => ASKED_SLICES_MAX * 8 + ARCHIVE_FIXED_BYTES_MAX,
            Op::Hashes => ASKED_SLICES_MAX * 32 + ARCHIVE_FIXED_BYTES_MAX,
            Op::Holders => NAMED_HOLDERS_MAX * 50 + ASKED_SLICES_MAX * 4 + ARCHIVE_FIXED_BYTES_MAX,
            Op::Chunk => CHUNK_BYTES_MAX + ARCHIVE_FIXED_BYTES_MAX,
            Op::Hello => NAME_BYTES_MAX + 2 * TEXT_BYTES_MAX + ARCHIVE_FIXED_BYTES_MAX,
            Op::CallRefused | Op::Placed | Op::Health | Op::Goodbye | Op::WeightsRefused => {
                TEXT_BYTES_MAX + ARCHIVE_FIXED_BYTES_MAX
            }
        }
    }
}

/// The first bytes of a frame, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    op: Op,
    body_bytes: usize,
}

impl Header {
    /// The header of a frame about to be written.
    pub fn new(op: Op, body_bytes: usize) -> Result<Header, FrameError> {
        let max = op.body_bytes_max();
        if body_bytes > max {
            return Err(FrameError::TooLong { op, bytes: body_bytes, max });
        }
        Ok(Header { op, body_bytes })
    }

    /// Reads a header that came from a peer. Only operations in `allowed` are taken, so that each side of each
    /// stream accepts what belongs there and nothing else.
    pub fn parse(bytes: [u8; HEADER_BYTES], allowed: &[Op]) -> Result<Header, FrameError> {
        let [l0, l1, l2, l3, o0, o1, r0, r1] = bytes;
        let code = u16::from_le_bytes([o0, o1]);
        let op = Op::from_code(code).ok_or(FrameError::UnknownOp(code))?;
        if !allowed.contains(&op) {
            return Err(FrameError::UnexpectedOp(op));
        }
        let reserved = u16::from_le_bytes([r0, r1]);
        if reserved != 0 {
            return Err(FrameError::Reserved(reserved));
        }
        let bytes = u32::from_le_bytes([l0, l1, l2, l3]);
        Header::new(op, usize::try_from(bytes).unwrap_or(usize::MAX))
    }

    /// The bytes to send.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        // `new` has checked the length against a cap far below 4 GiB.
        let length = (self.body_bytes as u32).to_le_bytes();
        let op = (self.op as u16).to_le_bytes();
        [length[0], length[1], length[2], length[3], op[0], op[1], 0, 0]
    }

    /// What the frame is.
    pub fn op(self) -> Op {
        self.op
    }

    /// Bytes that follow the header.
    pub fn body_bytes(self) -> usize {
        self.body_bytes
    }
}

/// Why bytes are not a frame, or values cannot become one. Sent by a peer, it means that the peer is broken, of
/// another version, or hostile: the stream it came on is reset and the peer is named in the log.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum FrameError {
    /// No operation has this code.
    #[error("operation code {0} is unknown; the peer speaks a later version, update this machine")]
    UnknownOp(u16),
    /// The operation does not belong on this stream or in this direction.
    #[error("{0:?} does not belong on this stream")]
    UnexpectedOp(Op),
    /// The header's reserved bits are set.
    #[error("reserved header bits {0:#06x} are set; the peer speaks a later version, update this machine")]
    Reserved(u16),
    /// The body is longer than its operation may have.
    #[error("a {op:?} of {bytes} bytes; the limit is {max}")]
    TooLong {
        /// What the frame is.
        op: Op,
        /// Announced or wanted bytes.
        bytes: usize,
        /// The cap.
        max: usize,
    },
    /// The body does not start at a multiple of 64.
    #[error("the body is not aligned to 64 bytes")]
    Misaligned,
    /// The body is not an archive of the operation's type: truncated, corrupt, or pointing outside itself.
    #[error("the body is not a valid {0:?}")]
    Archive(Op),
    /// No rows, or too many.
    #[error("{0} rows; a frame has 1 to {ROWS_MAX}")]
    Rows(u32),
    /// No hidden size, or too large a one.
    #[error("hidden size {0}; it is 1 to {HIDDEN_MAX}")]
    Hidden(u32),
    /// The row format has no such code.
    #[error("row format {0} is unknown")]
    Format(u8),
    /// A reply's row has no such width.
    #[error("row {row} has the unknown width code {code}")]
    Width {
        /// The row.
        row: usize,
        /// Its flag.
        code: u8,
    },
    /// No assignments, or more than the rows can have.
    #[error("{count} assignments; this call may have 1 to {max}")]
    Assignments {
        /// How many there are.
        count: usize,
        /// How many there may be.
        max: usize,
    },
    /// An assignment names a row that is not there, or uses bits kept for later.
    #[error("assignment {index} names row {row} or uses reserved bits")]
    Assignment {
        /// Its position.
        index: usize,
        /// The row it names.
        row: u32,
    },
    /// A gate weight is not finite.
    #[error("assignment {0} has a weight that is not finite")]
    Weight(usize),
    /// No budget, or too long a one.
    #[error("a budget of {0} us; it is 1 to {BUDGET_US_MAX}")]
    Budget(u32),
    /// The payload is not as long as rows, format and hidden size say.
    #[error("a payload of {bytes} bytes where {expected} are needed")]
    Payload {
        /// Bytes there are.
        bytes: usize,
        /// Bytes there should be.
        expected: usize,
    },
    /// A scale of a row is negative or not finite.
    #[error("row {row}: the scale of group {group} is negative or not finite")]
    Scale {
        /// The row.
        row: usize,
        /// The group of 32 values.
        group: usize,
    },
    /// A value of a row is not finite.
    #[error("row {row}: value {column} is not finite")]
    Value {
        /// The row.
        row: usize,
        /// The position in it.
        column: usize,
    },
    /// The flags of a reply are not one per row.
    #[error("{flags} row flags for {rows} rows")]
    Flags {
        /// Flags there are.
        flags: usize,
        /// Rows there are.
        rows: u32,
    },
    /// A reply answers another call than the one expected.
    #[error("a reply to call {actual} where call {expected} was expected")]
    Call {
        /// The call waited for.
        expected: u64,
        /// The call answered.
        actual: u64,
    },
    /// A reply has another shape than its call.
    #[error("a reply of {rows} x {hidden} where {expected_rows} x {expected_hidden} was expected")]
    Shape {
        /// Rows of the reply.
        rows: u32,
        /// Hidden size of the reply.
        hidden: u32,
        /// Rows of the call.
        expected_rows: u32,
        /// Hidden size of the call.
        expected_hidden: u32,
    },
    /// A text is too long, not UTF-8 or has control characters.
    #[error("the {field} is longer than {max} bytes, not UTF-8 or has control characters")]
    Text {
        /// Which one.
        field: &'static str,
        /// Its limit.
        max: usize,
    },
    /// A placement lists too many experts, or not in strictly ascending order.
    #[error(
        "a placement lists its experts strictly ascending, at most {PLACED_EXPERTS_MAX} of them, none empty"
    )]
    Experts,
    /// A message about weights says what no correct peer says.
    #[error("{0}")]
    Weights(&'static str),
    /// A code in a control message is not one of the known.
    #[error("the {field} has the unknown value {value}")]
    Code {
        /// Which one.
        field: &'static str,
        /// Its value.
        value: u8,
    },
    /// The pool has no room for the frame.
    #[error("no buffer of {0} bytes left; more frames are under way than this process allows")]
    PoolExhausted(usize),
}

/// Checks rows and hidden size against their limits; the size of a payload of them cannot overflow then.
pub(crate) fn check_shape(rows: u32, hidden: u32) -> Result<(), FrameError> {
    if rows == 0 || rows as usize > ROWS_MAX {
        return Err(FrameError::Rows(rows));
    }
    if hidden == 0 || hidden as usize > HIDDEN_MAX {
        return Err(FrameError::Hidden(hidden));
    }
    Ok(())
}

// A widest row must fit a call, or such a model would be impossible; and all rows of a smallest model should.
const _: () = assert!(HIDDEN_MAX * 4 <= CALL_PAYLOAD_BYTES_MAX);
const _: () = assert!(ROWS_MAX * (256 + 256 / GROUP * 4) <= 2 * CALL_PAYLOAD_BYTES_MAX);
const _: () = assert!(BODY_BYTES_MAX <= u32::MAX as usize && RowFormat::Int8 as u8 == 1);
