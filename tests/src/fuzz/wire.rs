//! Frames: headers, calls, replies and everything else that is said, whatever operations there are.

use std::time::Duration;

use mesh_proto::claims::{Claims, MEMORY_BYTES_MAX, WEIGHT_MB_S_MAX, believable, bounded};
use mesh_proto::heat::Heat;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::call::{Call, CallDraft, CallView};
use mesh_wire::frame::{FrameError, HEADER_BYTES, Header, Op};
use mesh_wire::message::Message;
use mesh_wire::payload::{RowFormat, SumWidth, padded, row_bytes};
use mesh_wire::reply::{Reply, ReplyDraft, ReplyView, Row, RowMut};

use super::{Verdict, says_why, weights};

/// Bytes of the pool that every frame here has to do with: three of the largest frames and their copies.
const POOL_BYTES: usize = 48 << 20;

thread_local! {
    static POOL: Pool = Pool::new(POOL_BYTES);
}

fn pool() -> Pool {
    POOL.with(Pool::clone)
}

/// A stream as a peer sends it: frames one after the other, read as `mesh_net` reads them.
pub(super) fn frame(bytes: &[u8]) -> Verdict {
    let (mut rest, mut taken) = (bytes, Verdict::Refused);
    while let Some((header, body)) = rest.split_first_chunk::<HEADER_BYTES>() {
        let parsed = match Header::parse(*header, &Op::ALL) {
            Ok(parsed) => parsed,
            Err(error) => return says_why(&error),
        };
        assert_eq!(parsed.to_bytes(), *header, "a header has one form");
        assert!(parsed.body_bytes() <= parsed.op().body_bytes_max(), "{parsed:?} is above its cap");
        refused_where_it_does_not_belong(*header, parsed.op());
        let mut buffer = pool().take(parsed).expect("the pool has room for one frame at a time");
        let Some((body, next)) = body.split_at_checked(parsed.body_bytes()) else { return Verdict::Refused };
        buffer.body_mut().copy_from_slice(body);
        if let Err(error) = read(buffer) {
            return says_why(&error);
        }
        (rest, taken) = (next, Verdict::Taken);
    }
    taken
}

fn refused_where_it_does_not_belong(header: [u8; HEADER_BYTES], op: Op) {
    let others: Vec<Op> = Op::ALL.into_iter().filter(|other| *other != op).collect();
    assert_eq!(Header::parse(header, &others), Err(FrameError::UnexpectedOp(op)));
}

/// The body of a call.
pub(super) fn call(body: &[u8]) -> Verdict {
    one(Op::Call, body)
}

/// The body of a reply.
pub(super) fn reply(body: &[u8]) -> Verdict {
    one(Op::Reply, body)
}

/// The body of any operation. The first byte is its code, or, where no operation has that, counts through all of them.
pub(super) fn control(bytes: &[u8]) -> Verdict {
    let Some((first, body)) = bytes.split_first() else { return Verdict::Refused };
    let counted = Op::ALL[usize::from(*first) % Op::ALL.len()];
    one(Op::from_code(u16::from(*first)).unwrap_or(counted), body)
}

fn one(op: Op, body: &[u8]) -> Verdict {
    match received(op, body).and_then(read) {
        Ok(()) => Verdict::Taken,
        Err(error) => says_why(&error),
    }
}

/// A frame with this body, as if it had come over the network.
fn received(op: Op, body: &[u8]) -> Result<Buffer, FrameError> {
    let mut buffer = pool().take(Header::new(op, body.len())?)?;
    buffer.body_mut().copy_from_slice(body);
    Ok(buffer)
}

fn read(buffer: Buffer) -> Result<(), FrameError> {
    let before = pool().counters();
    assert!(before.bytes <= POOL_BYTES as u64, "the pool is above its limit: {before:?}");
    match buffer.op() {
        Op::Call => {
            let call = Call::parse(buffer).map_err(|bad| bad.error)?;
            keeps_promises_of_calls(&call.view());
            again_as_a_call(&call.view());
        }
        Op::Reply => {
            let reply = Reply::parse(buffer)?;
            keeps_promises_of_replies(&reply.view());
            again_as_a_reply(&reply.view());
        }
        Op::AskCatalogue
        | Op::Catalogue
        | Op::AskHashes
        | Op::Hashes
        | Op::AskHolders
        | Op::Holders
        | Op::Fetch
        | Op::Chunk
        | Op::WeightsRefused => weights::read(buffer, &pool())?,
        op => {
            let message = Message::decode(&buffer)?;
            drop(buffer);
            keeps_promises_of_claims(&message);
            let encoded = message.encode(&pool()).expect("what was read can be written");
            assert_eq!(encoded.op(), op, "{message:?}");
            assert_eq!(Message::decode(&encoded), Ok(message), "out of its encoder another one came");
        }
    }
    Ok(())
}

/// What a node says of itself is cut to what machines have, once and for all.
fn keeps_promises_of_claims(message: &Message) {
    match message {
        Message::Hello(hello) => {
            let (counted, claims) = bounded(hello.clone());
            assert!(counted.memory_bytes <= MEMORY_BYTES_MAX);
            assert!(counted.weight_mb_s.iter().all(|mb_s| *mb_s <= WEIGHT_MB_S_MAX));
            assert_eq!(claims == Claims::Sound || matches!(claims, Claims::Unmeasured(_)), counted == *hello);
            match &claims {
                Claims::Sound => {}
                Claims::Unmeasured(note) | Claims::Cut(note) => {
                    says_why(note);
                }
            }
            let (again, claims) = bounded(counted.clone());
            assert!(again == counted && !matches!(claims, Claims::Cut(_)), "{again:?}");
        }
        Message::Health(health) => {
            let vitals = believable(health.vitals);
            assert_eq!(believable(vitals), vitals);
            assert!(vitals.temperature_mc.is_none_or(|mc| (-100_000..200_000).contains(&mc)), "{vitals:?}");
            assert!(vitals.power_mw.is_none_or(|mw| mw < 100_000_000), "{vitals:?}");
            let mut heat = Heat::default();
            heat.report(Duration::ZERO, vitals);
            assert!(!heat.is_hot() || vitals.temperature_mc.is_some() || vitals.throttled == Some(true));
        }
        _ => {}
    }
}

fn keeps_promises_of_calls(call: &CallView<'_>) {
    let head = call.head();
    let row = row_bytes(head.format, head.hidden as usize);
    assert_eq!(call.payload().len(), row * head.rows as usize);
    assert!(call.payload().as_ptr().addr().is_multiple_of(64));
    for assignment in call.assignments() {
        assert!(assignment.row < head.rows && assignment.weight.is_finite(), "{assignment:?}");
    }
    let values = padded(head.hidden as usize);
    for bytes in call.payload().chunks(row) {
        let numbers = match head.format {
            RowFormat::Int8 => &bytes[values..values + values / 8],
            RowFormat::F32 => &bytes[..values * 4],
        };
        let (numbers, _) = numbers.as_chunks::<4>();
        assert!(numbers.iter().all(|number| f32::from_le_bytes(*number).is_finite()));
    }
}

fn again_as_a_call(call: &CallView<'_>) {
    let mut draft = CallDraft::new(&pool(), *call.head(), call.assignments()).expect("it was a call");
    draft.payload_mut().copy_from_slice(call.payload());
    let again = Call::parse(draft.finish().into_buffer()).expect("it was a call");
    assert_eq!(again.head(), call.head());
    assert_eq!(again.view().assignments(), call.assignments());
    assert_eq!(again.view().payload(), call.payload());
}

fn keeps_promises_of_replies(reply: &ReplyView<'_>) {
    let hidden = reply.head().hidden as usize;
    assert_eq!(reply.rows().count(), reply.row_count());
    for row in reply.rows() {
        let length = match row {
            Row::I16(sums) => sums.len(),
            Row::I32(sums) => sums.len(),
            Row::Overflow => hidden,
        };
        assert_eq!(length, hidden);
    }
    let rows = reply.row_count() as u32;
    assert_eq!(reply.check_against(reply.head().call, rows, reply.head().hidden), Ok(()));
    assert!(reply.check_against(reply.head().call, rows + 1, reply.head().hidden).is_err());
}

fn again_as_a_reply(reply: &ReplyView<'_>) {
    let width = |row: Row<'_>| match row {
        Row::I16(_) => SumWidth::I16,
        Row::I32(_) => SumWidth::I32,
        Row::Overflow => SumWidth::Overflow,
    };
    let widths: Vec<SumWidth> = reply.rows().map(width).collect();
    let mut draft = ReplyDraft::new(&pool(), *reply.head(), &widths).expect("it was a reply");
    for (to, from) in draft.rows_mut().zip(reply.rows()) {
        match (to, from) {
            (RowMut::I16(to), Row::I16(from)) => to.copy_from_slice(from),
            (RowMut::I32(to), Row::I32(from)) => to.copy_from_slice(from),
            (to, from) => assert_eq!((to, from), (RowMut::Overflow, Row::Overflow)),
        }
    }
    let again = Reply::parse(draft.finish()).expect("it was a reply");
    assert_eq!(again.head(), reply.head());
    assert!(again.view().rows().eq(reply.rows()));
}
