//! How experts travel: which model it is, what the hashes of its experts are, who has them, and their bytes.
//!
//! Weights have connections of their own, so that gigabytes of them never stand in the flow-control windows of a call.
//! Whoever wants something opens a stream, says one of the questions here and reads the answer; bytes of an expert
//! come as chunks, one after the other, from where the asker wants them to begin. What is asked for is an expert or a
//! slice of one, by place and by BLAKE3 hash: the place is what the router finds it by, the hash is what a node finds
//! it by, and what the asker checks. The price of asking for slices as such: their hashes are not in the manifest, the
//! router computes them when it is asked.
//!
//! Refuses lists beyond their limits, addresses without a port, chunks without bytes.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use rkyv::bytecheck::CheckBytes;
use rkyv::rend::u16_le;
use rkyv::{Archive, Portable, Serialize};

use crate::archive::{self, Reserve, range_in};
use crate::buffer::{Buffer, Pool};
use crate::frame::{
    ASKED_SLICES_MAX, CATALOGUE_LAYERS_MAX, CHUNK_BYTES_MAX, FrameError, HIDDEN_MAX, NAMED_HOLDERS_MAX, Op,
    TEXT_BYTES_MAX,
};
use crate::id::{NodeId, Slice};
use crate::message::{Key, fill, shortened, text, write_keys};

/// Holders that are named for one expert or slice: `HOLDERS_MAX` of the routes.
pub const HOLDERS_EACH_MAX: usize = 4;

/// No holder in a list of them.
const NOBODY: u8 = u8::MAX;

/// BLAKE3 of an expert's or a slice's bytes.
pub type Hash = [u8; 32];

/// The model a cluster runs, as far as a node has to know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Catalogue {
    /// BLAKE3 of its manifest.
    pub fingerprint: Hash,
    /// What it is called.
    pub name: String,
    /// Code of the format of its weights; what it means is the model's.
    pub format: u8,
    /// Values of a row.
    pub hidden: u32,
    /// Intermediate values of an expert.
    pub inter: u32,
    /// Experts of each layer that has any.
    pub experts: u16,
    /// Those layers, ascending, each with its combine step as a power of two.
    pub layers: Vec<(u16, i8)>,
}

/// A machine that has an expert or slice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its key.
    pub id: NodeId,
    /// Where it lends.
    pub address: SocketAddr,
}

/// Machines, and by expert or slice which of them have it, as positions in that list.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holders {
    /// At most `NAMED_HOLDERS_MAX`.
    pub machines: Vec<Holder>,
    /// At most `HOLDERS_EACH_MAX` for each slice that was asked about.
    pub of: Vec<Vec<u8>>,
}

/// What is to be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// Which expert, or which part of it.
    pub slice: Slice,
    /// Of its bytes.
    pub hash: Hash,
    /// Bytes of it that are there already.
    pub from: u64,
}

/// Why something is not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Reason {
    /// Whoever was asked does not have it.
    Absent = 1,
    /// Too much is being sent already; ask again, or somebody else.
    Busy = 2,
    /// It could not be read.
    Failed = 3,
    /// The question makes no sense.
    Malformed = 4,
}

impl Reason {
    fn from_code(code: u8) -> Option<Reason> {
        let all = [Reason::Absent, Reason::Busy, Reason::Failed, Reason::Malformed];
        all.into_iter().find(|reason| *reason as u8 == code)
    }
}

/// A question about weights, or an answer. Chunks are `Chunk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Weights {
    /// Which model is it? Whoever asks lends what it has at this UDP port, 0 for nowhere.
    AskCatalogue {
        /// The port.
        port: u16,
    },
    /// This one.
    Catalogue(Catalogue),
    /// What are the hashes of these?
    AskHashes(Vec<Slice>),
    /// In that order.
    Hashes(Vec<Hash>),
    /// Who has these?
    AskHolders(Vec<Slice>),
    /// In that order.
    Holders(Holders),
    /// Send this.
    Fetch(Fetch),
    /// No.
    Refused(Reason, String),
}

impl Weights {
    /// Writes it as a frame into a buffer of the pool.
    ///
    /// # Errors
    /// `Weights` for lists beyond their limits, `PoolExhausted`.
    pub fn encode(&self, pool: &Pool) -> Result<Buffer, FrameError> {
        match self {
            Weights::AskCatalogue { port } => {
                archive::write(pool, Op::AskCatalogue, 0, &PortArchive { port: *port })
            }
            Weights::Catalogue(catalogue) => encode_catalogue(pool, catalogue),
            Weights::AskHashes(slices) => encode_slices(pool, Op::AskHashes, slices),
            Weights::Hashes(hashes) => encode_hashes(pool, hashes),
            Weights::AskHolders(slices) => encode_slices(pool, Op::AskHolders, slices),
            Weights::Holders(holders) => encode_holders(pool, holders),
            Weights::Fetch(fetch) => encode_fetch(pool, fetch),
            Weights::Refused(reason, detail) => {
                let detail = shortened(detail, TEXT_BYTES_MAX);
                let value = RefusedArchive { reason: *reason as u8, detail: Reserve::new(detail.len()) };
                let mut buffer = archive::write(pool, Op::WeightsRefused, detail.len(), &value)?;
                fill(&mut buffer, &value.detail, &detail);
                Ok(buffer)
            }
        }
    }

    /// Reads a received frame.
    ///
    /// # Errors
    /// What is wrong with it; `UnexpectedOp` for a chunk, too.
    pub fn decode(buffer: &Buffer) -> Result<Weights, FrameError> {
        let body = buffer.body();
        match buffer.op() {
            Op::AskCatalogue => {
                let archived = archive::read::<ArchivedPortArchive>(Op::AskCatalogue, body)?;
                Ok(Weights::AskCatalogue { port: archived.port.to_native() })
            }
            Op::Catalogue => decode_catalogue(body).map(Weights::Catalogue),
            Op::AskHashes => decode_slices(Op::AskHashes, body).map(Weights::AskHashes),
            Op::Hashes => decode_hashes(body).map(Weights::Hashes),
            Op::AskHolders => decode_slices(Op::AskHolders, body).map(Weights::AskHolders),
            Op::Holders => decode_holders(body).map(Weights::Holders),
            Op::Fetch => decode_fetch(body).map(Weights::Fetch),
            Op::WeightsRefused => {
                let archived = archive::read::<ArchivedRefusedArchive>(Op::WeightsRefused, body)?;
                let unknown = FrameError::Code { field: "reason", value: archived.reason };
                let detail = text("detail", &archived.detail, TEXT_BYTES_MAX)?;
                Ok(Weights::Refused(Reason::from_code(archived.reason).ok_or(unknown)?, detail))
            }
            op => Err(FrameError::UnexpectedOp(op)),
        }
    }
}

#[derive(Archive, Serialize)]
struct PortArchive {
    port: u16,
}

#[derive(Archive, Serialize)]
struct RefusedArchive {
    reason: u8,
    detail: Reserve<u8>,
}

/// A layer and its combine step as they travel.
#[derive(Clone, Copy, Debug, CheckBytes, Portable)]
#[bytecheck(crate = rkyv::bytecheck)]
#[repr(C)]
struct Step {
    layer: u16_le,
    step_log2: i8,
    _zero: u8,
}

#[derive(Archive, Serialize)]
struct CatalogueArchive {
    fingerprint: Hash,
    hidden: u32,
    inter: u32,
    experts: u16,
    format: u8,
    name: Reserve<u8>,
    layers: Reserve<Step>,
}

fn check_layers(layers: &[(u16, i8)]) -> Result<(), FrameError> {
    let ascending = layers.is_sorted_by(|a, b| a.0 < b.0);
    if ascending && layers.len() <= CATALOGUE_LAYERS_MAX {
        Ok(())
    } else {
        Err(FrameError::Weights("the layers of a catalogue are strictly ascending and at most 1024"))
    }
}

fn encode_catalogue(pool: &Pool, catalogue: &Catalogue) -> Result<Buffer, FrameError> {
    check_layers(&catalogue.layers)?;
    let name = shortened(&catalogue.name, TEXT_BYTES_MAX);
    let value = CatalogueArchive {
        fingerprint: catalogue.fingerprint,
        hidden: catalogue.hidden,
        inter: catalogue.inter,
        experts: catalogue.experts,
        format: catalogue.format,
        name: Reserve::new(name.len()),
        layers: Reserve::new(catalogue.layers.len()),
    };
    let vectors = name.len() + value.layers.bytes();
    let mut buffer = archive::write(pool, Op::Catalogue, vectors, &value)?;
    fill(&mut buffer, &value.name, &name);
    let room = buffer.body_mut()[value.layers.range()].chunks_exact_mut(size_of::<Step>());
    for (to, (layer, step_log2)) in room.zip(&catalogue.layers) {
        let [low, high] = layer.to_le_bytes();
        to.copy_from_slice(&[low, high, *step_log2 as u8, 0]);
    }
    Ok(buffer)
}

fn decode_catalogue(body: &[u8]) -> Result<Catalogue, FrameError> {
    let archived = archive::read::<ArchivedCatalogueArchive>(Op::Catalogue, body)?;
    let (hidden, inter) = (archived.hidden.to_native(), archived.inter.to_native());
    if hidden == 0 || hidden as usize > HIDDEN_MAX {
        return Err(FrameError::Hidden(hidden));
    }
    if archived.layers.len() > CATALOGUE_LAYERS_MAX || inter == 0 || archived.experts.to_native() == 0 {
        return Err(FrameError::Weights("a catalogue without experts, or of more than 1024 layers"));
    }
    let layers: Vec<_> =
        archived.layers.iter().map(|step| (step.layer.to_native(), step.step_log2)).collect();
    check_layers(&layers)?;
    Ok(Catalogue {
        fingerprint: archived.fingerprint,
        name: text("name", &archived.name, TEXT_BYTES_MAX)?,
        format: archived.format,
        hidden,
        inter,
        experts: archived.experts.to_native(),
        layers,
    })
}

#[derive(Archive, Serialize)]
struct SlicesArchive {
    slices: Reserve<Key>,
}

const SLICES: FrameError =
    FrameError::Weights("1 to 1024 experts are asked about at a time, none of them empty");

fn check_slices(slices: &[Slice]) -> Result<(), FrameError> {
    let some = (1..=ASKED_SLICES_MAX).contains(&slices.len());
    if some && slices.iter().all(|slice| slice.from < slice.to) { Ok(()) } else { Err(SLICES) }
}

fn encode_slices(pool: &Pool, op: Op, slices: &[Slice]) -> Result<Buffer, FrameError> {
    check_slices(slices)?;
    let value = SlicesArchive { slices: Reserve::new(slices.len()) };
    let mut buffer = archive::write(pool, op, value.slices.bytes(), &value)?;
    write_keys(&mut buffer.body_mut()[value.slices.range()], slices);
    Ok(buffer)
}

fn decode_slices(op: Op, body: &[u8]) -> Result<Vec<Slice>, FrameError> {
    let archived = archive::read::<ArchivedSlicesArchive>(op, body)?;
    if archived.slices.len() > ASKED_SLICES_MAX {
        return Err(SLICES);
    }
    let slices: Vec<_> = archived.slices.iter().map(|key| key.to_slice()).collect();
    check_slices(&slices)?;
    Ok(slices)
}

#[derive(Archive, Serialize)]
struct HashesArchive {
    hashes: Reserve<Hash>,
}

const HASHES: FrameError = FrameError::Weights("an answer has at most 1024 hashes");

fn encode_hashes(pool: &Pool, hashes: &[Hash]) -> Result<Buffer, FrameError> {
    if hashes.len() > ASKED_SLICES_MAX {
        return Err(HASHES);
    }
    let value = HashesArchive { hashes: Reserve::new(hashes.len()) };
    let mut buffer = archive::write(pool, Op::Hashes, value.hashes.bytes(), &value)?;
    buffer.body_mut()[value.hashes.range()].copy_from_slice(hashes.as_flattened());
    Ok(buffer)
}

fn decode_hashes(body: &[u8]) -> Result<Vec<Hash>, FrameError> {
    let archived = archive::read::<ArchivedHashesArchive>(Op::Hashes, body)?;
    if archived.hashes.len() > ASKED_SLICES_MAX { Err(HASHES) } else { Ok(archived.hashes.to_vec()) }
}

/// A holder as it travels; IPv4 addresses are mapped.
#[derive(Clone, Copy, Debug, CheckBytes, Portable)]
#[bytecheck(crate = rkyv::bytecheck)]
#[repr(C)]
struct Machine {
    id: [u8; 32],
    ip: [u8; 16],
    port: u16_le,
}

#[derive(Archive, Serialize)]
struct HoldersArchive {
    machines: Reserve<Machine>,
    of: Reserve<[u8; HOLDERS_EACH_MAX]>,
}

const HOLDERS: FrameError = FrameError::Weights(
    "holders are at most 255 machines with a port, and 4 of them for each of 1024 experts",
);

impl Holders {
    fn check(&self) -> Result<(), FrameError> {
        let listed = |positions: &Vec<u8>| {
            positions.len() <= HOLDERS_EACH_MAX
                && positions.iter().all(|position| usize::from(*position) < self.machines.len())
        };
        let bounded = self.machines.len() <= NAMED_HOLDERS_MAX && self.of.len() <= ASKED_SLICES_MAX;
        let reachable = self.machines.iter().all(|machine| machine.address.port() != 0);
        if bounded && reachable && self.of.iter().all(listed) { Ok(()) } else { Err(HOLDERS) }
    }

    /// Who has the expert or slice at this position of the question.
    pub fn holders_of(&self, position: usize) -> impl Iterator<Item = Holder> {
        let positions = self.of.get(position).into_iter().flatten();
        positions.filter_map(|position| self.machines.get(usize::from(*position)).copied())
    }
}

fn encode_holders(pool: &Pool, holders: &Holders) -> Result<Buffer, FrameError> {
    holders.check()?;
    let value =
        HoldersArchive { machines: Reserve::new(holders.machines.len()), of: Reserve::new(holders.of.len()) };
    let vectors = value.machines.bytes() + value.of.bytes();
    let mut buffer = archive::write(pool, Op::Holders, vectors, &value)?;
    let room = buffer.body_mut()[value.machines.range()].chunks_exact_mut(size_of::<Machine>());
    for (to, machine) in room.zip(&holders.machines) {
        let ip = match machine.address.ip() {
            IpAddr::V4(ip) => ip.to_ipv6_mapped(),
            IpAddr::V6(ip) => ip,
        };
        to[..32].copy_from_slice(&machine.id.0);
        to[32..48].copy_from_slice(&ip.octets());
        to[48..].copy_from_slice(&machine.address.port().to_le_bytes());
    }
    let room = buffer.body_mut()[value.of.range()].chunks_exact_mut(HOLDERS_EACH_MAX);
    for (to, positions) in room.zip(&holders.of) {
        to.fill(NOBODY);
        to[..positions.len()].copy_from_slice(positions);
    }
    Ok(buffer)
}

fn decode_holders(body: &[u8]) -> Result<Holders, FrameError> {
    let archived = archive::read::<ArchivedHoldersArchive>(Op::Holders, body)?;
    if archived.machines.len() > NAMED_HOLDERS_MAX || archived.of.len() > ASKED_SLICES_MAX {
        return Err(HOLDERS);
    }
    let machine = |machine: &Machine| Holder {
        id: NodeId(machine.id),
        address: SocketAddr::new(Ipv6Addr::from(machine.ip).to_canonical(), machine.port.to_native()),
    };
    let named = |positions: &[u8; HOLDERS_EACH_MAX]| {
        positions.iter().copied().filter(|position| *position != NOBODY).collect()
    };
    let holders = Holders {
        machines: archived.machines.iter().map(machine).collect(),
        of: archived.of.iter().map(named).collect(),
    };
    holders.check()?;
    Ok(holders)
}

#[derive(Archive, Serialize)]
struct FetchArchive {
    hash: Hash,
    from: u64,
    slice: Reserve<Key>,
}

fn encode_fetch(pool: &Pool, fetch: &Fetch) -> Result<Buffer, FrameError> {
    check_slices(&[fetch.slice])?;
    let value = FetchArchive { hash: fetch.hash, from: fetch.from, slice: Reserve::new(1) };
    let mut buffer = archive::write(pool, Op::Fetch, value.slice.bytes(), &value)?;
    write_keys(&mut buffer.body_mut()[value.slice.range()], &[fetch.slice]);
    Ok(buffer)
}

fn decode_fetch(body: &[u8]) -> Result<Fetch, FrameError> {
    let archived = archive::read::<ArchivedFetchArchive>(Op::Fetch, body)?;
    let [key] = &archived.slice[..] else { return Err(SLICES) };
    let slice = key.to_slice();
    check_slices(&[slice])?;
    Ok(Fetch { slice, hash: archived.hash, from: archived.from.to_native() })
}

#[derive(Archive, Serialize)]
struct ChunkArchive {
    from: u64,
    bytes: Reserve<u8>,
}

/// Bytes of an expert that have come.
#[derive(Debug)]
pub struct Chunk {
    buffer: Buffer,
    range: std::ops::Range<usize>,
    from: u64,
}

impl Chunk {
    /// A frame with `len` bytes that begin at `from`, which `write` fills in.
    ///
    /// # Errors
    /// `Weights` where there are none or too many, `PoolExhausted`, or what `write` says.
    pub fn write<E: From<FrameError>>(
        pool: &Pool,
        (from, len): (u64, usize),
        write: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<Buffer, E> {
        if len == 0 || len > CHUNK_BYTES_MAX {
            return Err(CHUNK.into());
        }
        let value = ChunkArchive { from, bytes: Reserve::new(len) };
        let mut buffer = archive::write(pool, Op::Chunk, len, &value)?;
        write(&mut buffer.body_mut()[value.bytes.range()])?;
        Ok(buffer)
    }

    /// Reads a received frame.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(buffer: Buffer) -> Result<Chunk, FrameError> {
        if buffer.op() != Op::Chunk {
            return Err(FrameError::UnexpectedOp(buffer.op()));
        }
        let archived = archive::read::<ArchivedChunkArchive>(Op::Chunk, buffer.body())?;
        if archived.bytes.is_empty() || archived.bytes.len() > CHUNK_BYTES_MAX {
            return Err(CHUNK);
        }
        let range = range_in(buffer.body(), &archived.bytes).ok_or(FrameError::Archive(Op::Chunk))?;
        let from = archived.from.to_native();
        Ok(Chunk { buffer, range, from })
    }

    /// Where in the expert they begin.
    pub fn from(&self) -> u64 {
        self.from
    }

    /// The bytes, at least one.
    pub fn bytes(&self) -> &[u8] {
        self.buffer.body().get(self.range.clone()).unwrap_or_default()
    }
}

const CHUNK: FrameError = FrameError::Weights("a chunk has 1 to 261120 bytes");

#[cfg(test)]
mod tests;
