//! Everything that is said besides calls and replies, to and from bytes.
//!
//! Each message has a flat archive of integers and byte blobs. Texts are checked on both sides: outgoing ones are
//! shortened to their limit (a long path in an error must not keep the error from arriving), incoming ones must be
//! UTF-8 without control characters, because they end up on terminals and in logs.

use rkyv::bytecheck::CheckBytes;
use rkyv::rend::u16_le;
use rkyv::vec::ArchivedVec;
use rkyv::{Archive, Portable, Serialize};

use crate::archive::{self, Reserve};
use crate::buffer::{Buffer, Pool};
use crate::control::{
    CallRefused, Goodbye, Health, Hello, Loading, Placed, Placement, Probe, Probed, Refusal, Vitals,
};
use crate::frame::{
    FrameError, NAME_BYTES_MAX, Op, PLACED_EXPERTS_MAX, PROBE_BYTES_MAX, ROSTER_BYTES_MAX, TEXT_BYTES_MAX,
};
use crate::id::{ExpertKey, Slice};

/// Bytes of a `Hello`'s version and kernel texts.
const LABEL_BYTES_MAX: usize = TEXT_BYTES_MAX / 2;

/// One message, owned.
#[derive(Clone, Debug, PartialEq)]
pub enum Message {
    /// See `control::CallRefused`.
    CallRefused(CallRefused),
    /// See `control::Hello`.
    Hello(Hello),
    /// See `control::Placement`.
    Placement(Placement),
    /// See `control::Placed`.
    Placed(Placed),
    /// See `control::Health`.
    Health(Health),
    /// See `control::Goodbye`.
    Goodbye(Goodbye),
    /// See `control::Probe`.
    Probe(Probe),
    /// See `control::Probed`.
    Probed(Probed),
    /// The node is going to stop: it wants no more calls and serves those under way.
    Leaving,
    /// Are you there? With a number of the asker's.
    Ping(u64),
    /// Yes, with that number.
    Pong(u64),
    /// A signed roster, as bytes; what they mean is not this crate's.
    Roster(Vec<u8>),
    /// See `control::Loading`.
    Loading(Loading),
}

impl Message {
    /// Writes it as a frame into a buffer of the pool.
    ///
    /// # Errors
    /// `Experts` for a placement that is not strictly ascending or too long, `TooLong` for a blob, `PoolExhausted`.
    pub fn encode(&self, pool: &Pool) -> Result<Buffer, FrameError> {
        match self {
            Message::CallRefused(refused) => encode_refused(pool, refused),
            Message::Hello(hello) => encode_hello(pool, hello),
            Message::Placement(placement) => encode_placement(pool, placement),
            Message::Placed(placed) => encode_placed(pool, placed),
            Message::Health(health) => encode_health(pool, *health),
            Message::Goodbye(goodbye) => encode_goodbye(pool, goodbye),
            Message::Probe(Probe { id, answer_bytes, padding }) => {
                encode_blob(pool, Op::Probe, (*id, *answer_bytes), padding)
            }
            Message::Probed(Probed { id, padding }) => encode_blob(pool, Op::Probed, (*id, 0), padding),
            Message::Leaving => encode_blob(pool, Op::Leaving, (0, 0), &[]),
            Message::Ping(id) => encode_blob(pool, Op::Ping, (*id, 0), &[]),
            Message::Pong(id) => encode_blob(pool, Op::Pong, (*id, 0), &[]),
            Message::Roster(bytes) => encode_blob(pool, Op::Roster, (0, 0), bytes),
            Message::Loading(loading) => encode_loading(pool, *loading),
        }
    }

    /// Reads a received frame.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(buffer: &Buffer) -> Result<Message, FrameError> {
        Message::decode_body(buffer.op(), buffer.body())
    }

    /// Reads the body of a frame; it must lie at a multiple of 64.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode_body(op: Op, body: &[u8]) -> Result<Message, FrameError> {
        match op {
            Op::CallRefused => decode_refused(body).map(Message::CallRefused),
            Op::Hello => decode_hello(body).map(Message::Hello),
            Op::Placement => decode_placement(body).map(Message::Placement),
            Op::Placed => decode_placed(body).map(Message::Placed),
            Op::Health => decode_health(body).map(Message::Health),
            Op::Goodbye => decode_goodbye(body).map(Message::Goodbye),
            Op::Probe | Op::Probed | Op::Leaving | Op::Ping | Op::Pong | Op::Roster => decode_blob(op, body),
            Op::Loading => decode_loading(body).map(Message::Loading),
            // Calls are `call` and `reply`, weights are `weights`.
            _ => Err(FrameError::UnexpectedOp(op)),
        }
    }
}

#[derive(Archive, Serialize)]
struct RefusedArchive {
    call: u64,
    refusal: u8,
    detail: Reserve<u8>,
}

fn encode_refused(pool: &Pool, refused: &CallRefused) -> Result<Buffer, FrameError> {
    let detail = shortened(&refused.detail, TEXT_BYTES_MAX);
    let value = RefusedArchive {
        call: refused.call,
        refusal: refused.refusal as u8,
        detail: Reserve::new(detail.len()),
    };
    let mut buffer = archive::write(pool, Op::CallRefused, detail.len(), &value)?;
    fill(&mut buffer, &value.detail, &detail);
    Ok(buffer)
}

fn decode_refused(body: &[u8]) -> Result<CallRefused, FrameError> {
    let archived = archive::read::<ArchivedRefusedArchive>(Op::CallRefused, body)?;
    let unknown = FrameError::Code { field: "refusal", value: archived.refusal };
    Ok(CallRefused {
        call: archived.call.to_native(),
        refusal: Refusal::from_code(archived.refusal).ok_or(unknown)?,
        detail: text("detail", &archived.detail, TEXT_BYTES_MAX)?,
    })
}

#[derive(Archive, Serialize)]
struct HelloArchive {
    model: [u8; 32],
    memory_bytes: u64,
    held_epoch: u64,
    instance: u64,
    weight_mb_s: [u32; 5],
    threads: u16,
    exact: u8,
    name: Reserve<u8>,
    version: Reserve<u8>,
    kernels: Reserve<u8>,
}

fn encode_hello(pool: &Pool, hello: &Hello) -> Result<Buffer, FrameError> {
    let name = shortened(&hello.name, NAME_BYTES_MAX);
    let version = shortened(&hello.version, LABEL_BYTES_MAX);
    let kernels = shortened(&hello.kernels, LABEL_BYTES_MAX);
    let value = HelloArchive {
        model: hello.model,
        memory_bytes: hello.memory_bytes,
        held_epoch: hello.held_epoch,
        instance: hello.instance,
        weight_mb_s: hello.weight_mb_s,
        threads: hello.threads,
        exact: u8::from(hello.exact),
        name: Reserve::new(name.len()),
        version: Reserve::new(version.len()),
        kernels: Reserve::new(kernels.len()),
    };
    let vectors = name.len() + version.len() + kernels.len();
    let mut buffer = archive::write(pool, Op::Hello, vectors, &value)?;
    fill(&mut buffer, &value.name, &name);
    fill(&mut buffer, &value.version, &version);
    fill(&mut buffer, &value.kernels, &kernels);
    Ok(buffer)
}

fn decode_hello(body: &[u8]) -> Result<Hello, FrameError> {
    let archived = archive::read::<ArchivedHelloArchive>(Op::Hello, body)?;
    Ok(Hello {
        name: text("name", &archived.name, NAME_BYTES_MAX)?,
        version: text("version", &archived.version, LABEL_BYTES_MAX)?,
        model: archived.model,
        memory_bytes: archived.memory_bytes.to_native(),
        threads: archived.threads.to_native(),
        exact: match archived.exact {
            0 => false,
            1 => true,
            value => return Err(FrameError::Code { field: "exactness", value }),
        },
        kernels: text("kernels", &archived.kernels, LABEL_BYTES_MAX)?,
        weight_mb_s: archived.weight_mb_s.map(|rate| rate.to_native()),
        held_epoch: archived.held_epoch.to_native(),
        instance: archived.instance.to_native(),
    })
}

/// Everything that is a number or two and some bytes.
#[derive(Archive, Serialize)]
struct BlobArchive {
    id: u64,
    wanted: u32,
    bytes: Reserve<u8>,
}

/// Most bytes a blob of this operation carries, and of an answer it may ask for.
const fn blob_bytes_max(op: Op) -> usize {
    match op {
        Op::Probe | Op::Probed => PROBE_BYTES_MAX,
        Op::Roster => ROSTER_BYTES_MAX,
        _ => 0,
    }
}

fn encode_blob(pool: &Pool, op: Op, (id, wanted): (u64, u32), bytes: &[u8]) -> Result<Buffer, FrameError> {
    let max = blob_bytes_max(op);
    if bytes.len().max(wanted as usize) > max {
        return Err(FrameError::TooLong { op, bytes: bytes.len().max(wanted as usize), max });
    }
    let value = BlobArchive { id, wanted, bytes: Reserve::new(bytes.len()) };
    let mut buffer = archive::write(pool, op, bytes.len(), &value)?;
    buffer.body_mut()[value.bytes.range()].copy_from_slice(bytes);
    Ok(buffer)
}

fn decode_blob(op: Op, body: &[u8]) -> Result<Message, FrameError> {
    let archived = archive::read::<ArchivedBlobArchive>(op, body)?;
    let (id, answer_bytes) = (archived.id.to_native(), archived.wanted.to_native());
    let (bytes, max) = (archived.bytes.len().max(answer_bytes as usize), blob_bytes_max(op));
    if bytes > max {
        return Err(FrameError::TooLong { op, bytes, max });
    }
    let padding = archived.bytes.to_vec();
    Ok(match op {
        Op::Probe => Message::Probe(Probe { id, answer_bytes, padding }),
        Op::Probed => Message::Probed(Probed { id, padding }),
        Op::Leaving => Message::Leaving,
        Op::Ping => Message::Ping(id),
        Op::Pong => Message::Pong(id),
        Op::Roster => Message::Roster(padding),
        _ => return Err(FrameError::UnexpectedOp(op)),
    })
}

/// `Slice` as it travels.
#[derive(Clone, Copy, Debug, CheckBytes, Portable)]
#[bytecheck(crate = rkyv::bytecheck)]
#[repr(C)]
pub(crate) struct Key {
    layer: u16_le,
    expert: u16_le,
    from: u16_le,
    to: u16_le,
}

impl Key {
    /// As the rest of the program has it.
    pub(crate) fn to_slice(self) -> Slice {
        Slice {
            key: ExpertKey { layer: self.layer.to_native(), expert: self.expert.to_native() },
            from: self.from.to_native(),
            to: self.to.to_native(),
        }
    }
}

/// Writes slices as `Key`s into their reserved room.
pub(crate) fn write_keys(room: &mut [u8], slices: &[Slice]) {
    for (to, slice) in room.chunks_exact_mut(size_of::<Key>()).zip(slices) {
        let fields = [slice.key.layer, slice.key.expert, slice.from, slice.to];
        to.chunks_exact_mut(2).zip(fields).for_each(|(to, field)| to.copy_from_slice(&field.to_le_bytes()));
    }
}

#[derive(Archive, Serialize)]
struct PlacementArchive {
    epoch: u64,
    model: [u8; 32],
    experts: Reserve<Key>,
}

fn encode_placement(pool: &Pool, placement: &Placement) -> Result<Buffer, FrameError> {
    check_experts(&placement.experts)?;
    let value = PlacementArchive {
        epoch: placement.epoch,
        model: placement.model,
        experts: Reserve::new(placement.experts.len()),
    };
    let mut buffer = archive::write(pool, Op::Placement, value.experts.bytes(), &value)?;
    write_keys(&mut buffer.body_mut()[value.experts.range()], &placement.experts);
    Ok(buffer)
}

fn decode_placement(body: &[u8]) -> Result<Placement, FrameError> {
    let archived = archive::read::<ArchivedPlacementArchive>(Op::Placement, body)?;
    if archived.experts.len() > PLACED_EXPERTS_MAX {
        return Err(FrameError::Experts);
    }
    let experts: Vec<_> = archived.experts.iter().map(|key| key.to_slice()).collect();
    check_experts(&experts)?;
    Ok(Placement { epoch: archived.epoch.to_native(), model: archived.model, experts })
}

fn check_experts(experts: &[Slice]) -> Result<(), FrameError> {
    let ascending = experts.is_sorted_by(|a, b| a.key < b.key);
    if ascending && experts.iter().all(|slice| slice.from < slice.to) && experts.len() <= PLACED_EXPERTS_MAX {
        Ok(())
    } else {
        Err(FrameError::Experts)
    }
}

#[derive(Archive, Serialize)]
struct PlacedArchive {
    epoch: u64,
    weight_bytes: u64,
    refusal: Reserve<u8>,
}

fn encode_placed(pool: &Pool, placed: &Placed) -> Result<Buffer, FrameError> {
    let refusal = shortened(&placed.refusal, TEXT_BYTES_MAX);
    let value = PlacedArchive {
        epoch: placed.epoch,
        weight_bytes: placed.weight_bytes,
        refusal: Reserve::new(refusal.len()),
    };
    let mut buffer = archive::write(pool, Op::Placed, refusal.len(), &value)?;
    fill(&mut buffer, &value.refusal, &refusal);
    Ok(buffer)
}

fn decode_placed(body: &[u8]) -> Result<Placed, FrameError> {
    let archived = archive::read::<ArchivedPlacedArchive>(Op::Placed, body)?;
    Ok(Placed {
        epoch: archived.epoch.to_native(),
        weight_bytes: archived.weight_bytes.to_native(),
        refusal: text("refusal", &archived.refusal, TEXT_BYTES_MAX)?,
    })
}

#[derive(Archive, Serialize)]
struct HealthArchive {
    epoch: u64,
    calls: u64,
    rows: u64,
    busy_us: u64,
    resident_bytes: u64,
    queued: u32,
    temperature_mc: i32,
    power_mw: u32,
    throttled: u8,
    energy_mj: u64,
}

/// What a sensor that is not there shows: figures that none can show.
const NO_TEMPERATURE: i32 = i32::MIN;
const NO_POWER: u32 = u32::MAX;
const NO_ENERGY: u64 = u64::MAX;
const NO_THROTTLE: u8 = 2;

fn encode_health(pool: &Pool, health: Health) -> Result<Buffer, FrameError> {
    let Health { epoch, calls, rows, busy_us, queued, resident_bytes, vitals } = health;
    let value = HealthArchive {
        epoch,
        calls,
        rows,
        busy_us,
        resident_bytes,
        queued,
        temperature_mc: vitals.temperature_mc.unwrap_or(NO_TEMPERATURE),
        power_mw: vitals.power_mw.unwrap_or(NO_POWER),
        throttled: vitals.throttled.map_or(NO_THROTTLE, u8::from),
        energy_mj: vitals.energy_mj.unwrap_or(NO_ENERGY),
    };
    archive::write(pool, Op::Health, 0, &value)
}

fn decode_health(body: &[u8]) -> Result<Health, FrameError> {
    let archived = archive::read::<ArchivedHealthArchive>(Op::Health, body)?;
    Ok(Health {
        epoch: archived.epoch.to_native(),
        calls: archived.calls.to_native(),
        rows: archived.rows.to_native(),
        busy_us: archived.busy_us.to_native(),
        queued: archived.queued.to_native(),
        resident_bytes: archived.resident_bytes.to_native(),
        vitals: Vitals {
            temperature_mc: Some(archived.temperature_mc.to_native()).filter(|mc| *mc != NO_TEMPERATURE),
            throttled: match archived.throttled {
                0 => Some(false),
                1 => Some(true),
                NO_THROTTLE => None,
                value => return Err(FrameError::Code { field: "throttle flag", value }),
            },
            power_mw: Some(archived.power_mw.to_native()).filter(|mw| *mw != NO_POWER),
            energy_mj: Some(archived.energy_mj.to_native()).filter(|mj| *mj != NO_ENERGY),
        },
    })
}

#[derive(Archive, Serialize)]
struct LoadingArchive {
    done_bytes: u64,
    total_bytes: u64,
    peer_bytes: u64,
}

fn encode_loading(pool: &Pool, loading: Loading) -> Result<Buffer, FrameError> {
    let Loading { done_bytes, total_bytes, peer_bytes } = loading;
    archive::write(pool, Op::Loading, 0, &LoadingArchive { done_bytes, total_bytes, peer_bytes })
}

fn decode_loading(body: &[u8]) -> Result<Loading, FrameError> {
    let archived = archive::read::<ArchivedLoadingArchive>(Op::Loading, body)?;
    Ok(Loading {
        done_bytes: archived.done_bytes.to_native(),
        total_bytes: archived.total_bytes.to_native(),
        peer_bytes: archived.peer_bytes.to_native(),
    })
}

#[derive(Archive, Serialize)]
struct GoodbyeArchive {
    reason: Reserve<u8>,
}

fn encode_goodbye(pool: &Pool, goodbye: &Goodbye) -> Result<Buffer, FrameError> {
    let reason = shortened(&goodbye.reason, TEXT_BYTES_MAX);
    let value = GoodbyeArchive { reason: Reserve::new(reason.len()) };
    let mut buffer = archive::write(pool, Op::Goodbye, reason.len(), &value)?;
    fill(&mut buffer, &value.reason, &reason);
    Ok(buffer)
}

fn decode_goodbye(body: &[u8]) -> Result<Goodbye, FrameError> {
    let archived = archive::read::<ArchivedGoodbyeArchive>(Op::Goodbye, body)?;
    Ok(Goodbye { reason: text("reason", &archived.reason, TEXT_BYTES_MAX)? })
}

pub(crate) fn fill(buffer: &mut Buffer, room: &Reserve<u8>, text: &str) {
    buffer.body_mut()[room.range()].copy_from_slice(text.as_bytes());
}

/// `text` with control characters replaced by spaces, cut at a character border to at most `max` bytes.
pub(crate) fn shortened(text: &str, max: usize) -> String {
    let mut short = String::new();
    for letter in text.chars().map(|letter| if letter.is_control() { ' ' } else { letter }) {
        if short.len() + letter.len_utf8() > max {
            break;
        }
        short.push(letter);
    }
    short
}

pub(crate) fn text(field: &'static str, bytes: &ArchivedVec<u8>, max: usize) -> Result<String, FrameError> {
    let wrong = FrameError::Text { field, max };
    if bytes.len() > max {
        return Err(wrong);
    }
    let text = std::str::from_utf8(bytes).map_err(|_| wrong.clone())?;
    if text.chars().any(char::is_control) { Err(wrong) } else { Ok(text.to_owned()) }
}
