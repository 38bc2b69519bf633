//! Bends the packets of an otherwise correct QUIC client, between what it wrote and their encryption.
//!
//! quinn lets the cryptography be replaced, and whoever encrypts sees every packet in the clear. So this is its own
//! TLS with another `encrypt`: streams get holes that are never filled, data arrives as crumbs, the client's half of the
//! handshake stays unreadable, or frames are nonsense. quinn itself believes that all went well: it has acknowledgements.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::BytesMut;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::crypto::{
    ClientConfig, CryptoError, ExportKeyingMaterialError, HeaderKey, KeyPair, Keys, PacketKey, Session,
};
use quinn::{ConnectError, ConnectionId, Side};
use quinn_proto::TransportError;
use quinn_proto::transport_parameters::TransportParameters;

use crate::dice::Dice;

/// How packets are bent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Nothing of the client's after its first packet can be read: the handshake never ends.
    Half,
    /// The first bytes of every stream never come.
    Hole,
    /// Every other byte of a stream, each in a frame of its own.
    Crumbs,
    /// A part of all packets is nonsense.
    Fuzz(u64),
}

/// See the module.
pub(crate) struct Bending {
    honest: Arc<QuicClientConfig>,
    way: Way,
}

impl Bending {
    pub(crate) fn new(honest: Arc<QuicClientConfig>, way: Way) -> Bending {
        Bending { honest, way }
    }
}

impl ClientConfig for Bending {
    fn start_session(
        self: Arc<Self>,
        version: u32,
        server_name: &str,
        params: &TransportParameters,
    ) -> Result<Box<dyn Session>, ConnectError> {
        let honest = Arc::clone(&self.honest).start_session(version, server_name, params)?;
        let seed = if let Way::Fuzz(seed) = self.way { seed } else { 1 };
        let state = Arc::new(Mutex::new(State { dice: Dice::new(seed), crumbs: 0 }));
        Ok(Box::new(Bent { honest, way: self.way, state, is_handshake: true }))
    }
}

#[derive(Debug)]
struct State {
    dice: Dice,
    /// Crumbs sent so far.
    crumbs: u64,
}

struct Bent {
    honest: Box<dyn Session>,
    way: Way,
    state: Arc<Mutex<State>>,
    /// The next keys are those of the handshake.
    is_handshake: bool,
}

impl Bent {
    fn bend(&self, honest: Box<dyn PacketKey>, is_handshake: bool) -> Box<dyn PacketKey> {
        if is_handshake != (self.way == Way::Half) {
            return honest;
        }
        Box::new(Key { honest, way: self.way, state: Arc::clone(&self.state) })
    }
}

impl Session for Bent {
    fn initial_keys(&self, dst_cid: &ConnectionId, side: Side) -> Keys {
        self.honest.initial_keys(dst_cid, side)
    }

    fn handshake_data(&self) -> Option<Box<dyn Any>> {
        self.honest.handshake_data()
    }

    fn peer_identity(&self) -> Option<Box<dyn Any>> {
        self.honest.peer_identity()
    }

    fn early_crypto(&self) -> Option<(Box<dyn HeaderKey>, Box<dyn PacketKey>)> {
        self.honest.early_crypto()
    }

    fn early_data_accepted(&self) -> Option<bool> {
        self.honest.early_data_accepted()
    }

    fn is_handshaking(&self) -> bool {
        self.honest.is_handshaking()
    }

    fn read_handshake(&mut self, buf: &[u8]) -> Result<bool, TransportError> {
        self.honest.read_handshake(buf)
    }

    fn transport_parameters(&self) -> Result<Option<TransportParameters>, TransportError> {
        self.honest.transport_parameters()
    }

    fn write_handshake(&mut self, buf: &mut Vec<u8>) -> Option<Keys> {
        let Keys { header, packet } = self.honest.write_handshake(buf)?;
        let local = self.bend(packet.local, self.is_handshake);
        self.is_handshake = false;
        Some(Keys { header, packet: KeyPair { local, remote: packet.remote } })
    }

    fn next_1rtt_keys(&mut self) -> Option<KeyPair<Box<dyn PacketKey>>> {
        let KeyPair { local, remote } = self.honest.next_1rtt_keys()?;
        Some(KeyPair { local: self.bend(local, false), remote })
    }

    fn is_valid_retry(&self, orig_dst_cid: &ConnectionId, header: &[u8], payload: &[u8]) -> bool {
        self.honest.is_valid_retry(orig_dst_cid, header, payload)
    }

    fn export_keying_material(
        &self,
        output: &mut [u8],
        label: &[u8],
        context: &[u8],
    ) -> Result<(), ExportKeyingMaterialError> {
        self.honest.export_keying_material(output, label, context)
    }
}

struct Key {
    honest: Box<dyn PacketKey>,
    way: Way,
    state: Arc<Mutex<State>>,
}

impl PacketKey for Key {
    fn encrypt(&self, packet: u64, buf: &mut [u8], header_len: usize) {
        let end = buf.len().saturating_sub(self.honest.tag_len());
        if self.way != Way::Half
            && let Some(payload) = buf.get_mut(header_len..end)
        {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            match self.way {
                Way::Half => {}
                Way::Hole => drop_start(payload),
                Way::Crumbs => crumble(payload, &mut state.crumbs),
                Way::Fuzz(_) => nonsense(payload, &mut state.dice),
            }
        }
        self.honest.encrypt(packet, buf, header_len);
        if self.way == Way::Half
            && let Some(last) = buf.last_mut()
        {
            *last ^= 1;
        }
    }

    fn decrypt(&self, packet: u64, header: &[u8], payload: &mut BytesMut) -> Result<(), CryptoError> {
        self.honest.decrypt(packet, header, payload)
    }

    fn tag_len(&self) -> usize {
        self.honest.tag_len()
    }

    fn confidentiality_limit(&self) -> u64 {
        self.honest.confidentiality_limit()
    }

    fn integrity_limit(&self) -> u64 {
        self.honest.integrity_limit()
    }
}

/// A number as QUIC writes it, and the bytes it takes (RFC 9000 section 16).
fn number(bytes: &[u8]) -> Option<(u64, usize)> {
    let first = *bytes.first()?;
    let length = 1 << (first >> 6);
    let rest = bytes.get(1..length)?;
    Some((rest.iter().fold(u64::from(first & 0x3f), |value, byte| value << 8 | u64::from(*byte)), length))
}

/// A STREAM frame: where it lies in its packet, and what it says.
#[derive(Debug, PartialEq, Eq)]
struct StreamFrame {
    begin: usize,
    end: usize,
    stream: u64,
    offset: u64,
}

/// The first STREAM frame of a packet, behind whatever a client sends besides (RFC 9000 section 19).
fn first_stream(payload: &[u8]) -> Option<StreamFrame> {
    let mut at = 0;
    loop {
        let begin = at;
        let kind = *payload.get(at)?;
        at += 1;
        let next = |at: &mut usize| {
            let (value, length) = number(payload.get(*at..)?)?;
            *at += length;
            Some(value)
        };
        let numbers = match kind {
            0x00 | 0x01 | 0x1e | 0x1f => 0,
            0x02 | 0x03 => {
                next(&mut at)?;
                next(&mut at)?;
                let ranges = next(&mut at)?;
                1 + 2 * ranges + if kind == 0x03 { 3 } else { 0 }
            }
            0x04 => 3,
            0x05 | 0x11 | 0x15 => 2,
            0x10 | 0x12..=0x14 | 0x16 | 0x17 | 0x19 => 1,
            0x18 => {
                next(&mut at)?;
                next(&mut at)?;
                at += 1 + usize::from(*payload.get(at)?) + 16;
                0
            }
            0x1a | 0x1b => {
                at += 8;
                0
            }
            // ACK_FREQUENCY, a number of two bytes.
            0x40 if payload.get(at) == Some(&0xaf) => {
                at += 1;
                4
            }
            0x08..=0x0f => {
                let stream = next(&mut at)?;
                let offset = if kind & 4 != 0 { next(&mut at)? } else { 0 };
                let length = if kind & 2 != 0 { Some(next(&mut at)?) } else { None };
                let end = length.map_or(payload.len(), |length| at.saturating_add(length as usize));
                return (end <= payload.len()).then_some(StreamFrame { begin, end, stream, offset });
            }
            _ => return None,
        };
        for _ in 0..numbers {
            next(&mut at)?;
        }
    }
}

/// Padding in place of a stream's first frame.
fn drop_start(payload: &mut [u8]) {
    if let Some(frame) = first_stream(payload)
        && frame.offset == 0
    {
        payload[frame.begin..frame.end].fill(0);
    }
}

/// Crumbs in place of a stream's frame: one byte each, with gaps between them, and padding where none fits any more.
fn crumble(payload: &mut [u8], crumbs: &mut u64) {
    let Some(StreamFrame { begin, end, stream, .. }) = first_stream(payload) else { return };
    let Ok(stream @ 0..64) = u8::try_from(stream) else { return };
    let mut frames = payload[begin..end].chunks_exact_mut(8);
    for frame in &mut frames {
        let offset = (2 * *crumbs + 1) as u32 | 0x8000_0000;
        *crumbs += 1;
        let [a, b, c, d] = offset.to_be_bytes();
        frame.copy_from_slice(&[0x0e, stream, a, b, c, d, 1, 7]);
    }
    frames.into_remainder().fill(0);
}

/// One packet in four has some bytes that are not what they were.
fn nonsense(payload: &mut [u8], dice: &mut Dice) {
    if dice.below(4) != 0 || payload.is_empty() {
        return;
    }
    for _ in 0..=dice.below(8) {
        let at = dice.below(payload.len());
        payload[at] = dice.next() as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// PING, ACK with a range, MAX_DATA, then 20 bytes of stream 4 at offset 300.
    fn packet() -> Vec<u8> {
        let mut bytes = vec![1, 2, 9, 0, 1, 3, 1, 1, 0x10, 0x44, 0];
        bytes.extend([0x0e, 4, 0x41, 0x2c, 20]);
        bytes.extend([b'x'; 20]);
        bytes
    }

    #[test]
    fn the_stream_is_found_behind_other_frames() {
        let bytes = packet();
        assert_eq!(
            first_stream(&bytes),
            Some(StreamFrame { begin: 11, end: bytes.len(), stream: 4, offset: 300 })
        );
        assert_eq!(first_stream(&bytes[..11]), None);
        assert_eq!(first_stream(&bytes[..20]), None, "it ends early");
        assert_eq!(first_stream(&[0x30, 1, 2]), None);
    }

    #[test]
    fn holes_are_made_at_the_start_only_and_crumbs_fill_the_frame() {
        let mut bytes = packet();
        drop_start(&mut bytes);
        assert_eq!(bytes, packet());
        let mut start = vec![1, 0x0a, 4, 3, b'a', b'b', b'c'];
        drop_start(&mut start);
        assert_eq!(start, [1, 0, 0, 0, 0, 0, 0]);
        let mut crumbs = 5;
        crumble(&mut bytes, &mut crumbs);
        assert_eq!(crumbs, 8);
        assert_eq!(bytes[..11], packet()[..11]);
        assert_eq!(bytes[11..19], [0x0e, 4, 0x80, 0, 0, 11, 1, 7]);
        assert_eq!(bytes[35..], [0], "padding");
    }
}
