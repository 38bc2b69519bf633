//! Frames from peers that are broken or hostile, and from honest ones: what is honest comes out as it went in, and
//! everything else ends in an error, never in a panic.

use proptest::prelude::*;

use crate::buffer::{Buffer, Pool};
use crate::call::{Assignment, Call, CallDraft, CallHead, CallView};
use crate::control::{
    CallRefused, Goodbye, Health, Hello, Loading, Placed, Placement, Probe, Probed, Refusal, Vitals,
};
use crate::frame::{
    ASSIGNMENTS_MAX, BODY_BYTES_MAX, FrameError, HEADER_BYTES, HIDDEN_MAX, Header, NAME_BYTES_MAX, Op,
    PLACED_EXPERTS_MAX, PROBE_BYTES_MAX, ROSTER_BYTES_MAX, ROWS_MAX, TEXT_BYTES_MAX, TOP_K_MAX,
};
use crate::id::{ExpertKey, Slice};
use crate::message::Message;
use crate::payload::{RowFormat, SumWidth, row_bytes};
use crate::reply::{Reply, ReplyDraft, ReplyHead, ReplyView, Row, encode_sums};
use crate::weights::{Chunk, Weights};

fn pool() -> Pool {
    Pool::new(64 << 20)
}

fn head(format: RowFormat, hidden: u32, rows: u32) -> CallHead {
    CallHead { call: 7, step: 3, epoch: 5, budget_us: 20_000, layer: 2, format, hidden, rows }
}

/// A valid call whose payload is small finite numbers whatever way one reads them.
fn call(format: RowFormat, hidden: u32, rows: u32) -> Buffer {
    let assignments: Vec<_> = (0..rows).map(|row| Assignment::new(row, 1, 0.5)).collect();
    let mut draft = CallDraft::new(&pool(), head(format, hidden, rows), &assignments).unwrap();
    for (at, byte) in draft.payload_mut().iter_mut().enumerate() {
        *byte = (at % 61) as u8;
    }
    draft.finish().into_buffer()
}

fn reply(hidden: u32) -> Buffer {
    let narrow = vec![-3; hidden as usize];
    let wide = vec![1 << 20; hidden as usize];
    let head = ReplyHead { call: 7, service_us: 12, hidden };
    encode_sums(&pool(), head, &[Some(&narrow), None, Some(&wide)]).unwrap()
}

/// The same frame with another body, as if it had come over the network.
fn received(op: Op, body: &[u8]) -> Buffer {
    let mut buffer = pool().take(Header::new(op, body.len()).unwrap()).unwrap();
    buffer.body_mut().copy_from_slice(body);
    buffer
}

fn parse(op: Op, body: &[u8]) -> Result<(), FrameError> {
    let buffer = received(op, body);
    match op {
        Op::Call => Call::parse(buffer).map(drop).map_err(|bad| bad.error),
        Op::Reply => Reply::parse(buffer).map(drop),
        _ => Message::decode(&buffer).map(drop),
    }
}

fn slice(layer: u16, expert: u16) -> Slice {
    Slice { key: ExpertKey { layer, expert }, from: 0, to: 6 }
}

fn messages() -> Vec<Message> {
    let hello = Hello {
        name: "köln".into(),
        version: "0.1.0".into(),
        model: [9; 32],
        memory_bytes: 1 << 33,
        threads: 8,
        exact: true,
        kernels: "native avx512-vnni".into(),
        weight_mb_s: [1, 2, 3, 4, 5],
        held_epoch: 4,
        instance: u64::MAX,
    };
    let experts = vec![slice(0, 3), Slice { from: 2, to: 6, ..slice(1, 0) }];
    let vitals = Vitals {
        temperature_mc: Some(-12_500),
        throttled: Some(true),
        power_mw: Some(0),
        energy_mj: Some(u64::MAX - 1),
    };
    let health = Health { epoch: 1, calls: 2, rows: 3, busy_us: 4, queued: 5, resident_bytes: 6, vitals };
    let dark = Health { vitals: Vitals::default(), ..health };
    let refused = CallRefused { call: 9, refusal: Refusal::UnknownEpoch, detail: "epoch 3, not 4".into() };
    vec![
        Message::Hello(hello),
        Message::Placement(Placement { epoch: 8, model: [1; 32], experts }),
        Message::Placed(Placed { epoch: 8, weight_bytes: 99, refusal: String::new() }),
        Message::Health(health),
        Message::Health(dark),
        Message::Goodbye(Goodbye { reason: "stopped by its operator".into() }),
        Message::CallRefused(refused),
        Message::Probe(Probe { id: 3, answer_bytes: 4, padding: vec![5; 6] }),
        Message::Probed(Probed { id: 3, padding: vec![0; 4] }),
        Message::Leaving,
        Message::Ping(u64::MAX),
        Message::Pong(1),
        Message::Roster(vec![7; 900]),
        Message::Loading(Loading { done_bytes: 1 << 40, total_bytes: 3, peer_bytes: 4 }),
    ]
}

#[test]
fn a_call_comes_out_as_it_went_in() {
    let assignments = [Assignment::new(0, 3, 0.25), Assignment::new(1, 511, -1.5)];
    let head = head(RowFormat::Int8, 100, 2);
    let mut draft = CallDraft::new(&pool(), head, &assignments).unwrap();
    let payload = draft.payload_mut();
    assert!(payload.as_ptr().addr().is_multiple_of(64));
    assert_eq!(payload.len(), 2 * row_bytes(RowFormat::Int8, 100));
    payload.fill(1);
    let buffer = draft.finish().into_buffer();
    assert!(buffer.body().as_ptr().addr().is_multiple_of(64));
    assert_eq!(buffer.frame().len(), HEADER_BYTES + buffer.body().len());
    let copy = received(Op::Call, buffer.body());
    let call = Call::parse(copy).unwrap();
    assert_eq!(*call.head(), head);
    assert_eq!(call.view().assignments(), assignments);
    assert!(call.view().payload().iter().all(|byte| *byte == 1));
    assert!(call.view().payload().as_ptr().addr().is_multiple_of(64));
}

#[test]
fn rows_are_copied_in_or_refused() {
    let one = [Assignment::new(0, 0, 1.0)];
    let row = vec![2; row_bytes(RowFormat::F32, 40)];
    let mut draft = CallDraft::new(&pool(), head(RowFormat::F32, 40, 2), &one).unwrap();
    assert_eq!(row_bytes(RowFormat::F32, 40), 256);
    assert!(matches!(draft.copy_rows([&row[..]]), Err(FrameError::Payload { bytes: 256, expected: 512 })));
    assert!(draft.copy_rows([&row[..], &row[..8]]).is_err());
    assert!(draft.copy_rows([&row[..], &row[..], &row[..]]).is_err());
    draft.copy_rows([&row[..], &row[..]]).unwrap();
    assert!(draft.payload_mut().iter().all(|byte| *byte == 2));
}

#[test]
fn a_reply_comes_out_as_it_went_in_and_is_checked_against_its_call() {
    let buffer = received(Op::Reply, reply(70).body());
    let reply = Reply::parse(buffer).unwrap();
    let rows: Vec<_> = reply.view().rows().collect();
    assert_eq!(rows[0], Row::I16(&[-3; 70]));
    assert_eq!(rows[1], Row::Overflow);
    assert_eq!(rows[2], Row::I32(&[1 << 20; 70]));
    let view = reply.view();
    view.check_against(7, 3, 70).unwrap();
    assert_eq!(view.check_against(8, 3, 70), Err(FrameError::Call { expected: 8, actual: 7 }));
    assert!(matches!(view.check_against(7, 2, 70), Err(FrameError::Shape { rows: 3, .. })));
    assert!(matches!(view.check_against(7, 3, 71), Err(FrameError::Shape { hidden: 70, .. })));
}

#[test]
fn the_narrowest_width_that_fits_is_chosen() {
    assert_eq!(SumWidth::of(&[32_767, -32_768]), SumWidth::I16);
    assert_eq!(SumWidth::of(&[32_768]), SumWidth::I32);
    assert_eq!(SumWidth::of(&[-32_769]), SumWidth::I32);
    let head = ReplyHead { call: 1, service_us: 0, hidden: 3 };
    let error = encode_sums(&pool(), head, &[Some(&[1, 2])]).unwrap_err();
    assert!(matches!(error, FrameError::Shape { hidden: 2, expected_hidden: 3, .. }));
}

#[test]
fn messages_come_out_as_they_went_in() {
    for message in messages() {
        let buffer = message.encode(&pool()).unwrap();
        let copy = received(buffer.op(), buffer.body());
        assert_eq!(Message::decode(&copy).unwrap(), message);
    }
}

#[test]
fn frames_truncated_at_any_byte_are_refused() {
    let mut frames = vec![call(RowFormat::Int8, 40, 2), call(RowFormat::F32, 33, 1), reply(33)];
    frames.extend(messages().iter().map(|message| message.encode(&pool()).unwrap()));
    for frame in frames {
        let body = frame.body();
        for length in 0..body.len() {
            assert!(parse(frame.op(), &body[..length]).is_err(), "{:?} cut to {length}", frame.op());
        }
        parse(frame.op(), body).unwrap();
    }
}

#[test]
fn no_flipped_bit_makes_anything_panic_or_break_a_promise() {
    for (op, original) in [
        (Op::Call, call(RowFormat::Int8, 40, 2)),
        (Op::Call, call(RowFormat::F32, 33, 2)),
        (Op::Reply, reply(33)),
        (Op::Hello, messages()[0].encode(&pool()).unwrap()),
        (Op::Placement, messages()[1].encode(&pool()).unwrap()),
    ] {
        let mut body = received(op, original.body());
        let mut refused = 0;
        for bit in 0..original.body().len() * 8 {
            body.body_mut()[bit / 8] ^= 1 << (bit % 8);
            match op {
                Op::Call => CallView::parse(body.body()).map_or_else(|_| refused += 1, check_call),
                Op::Reply => ReplyView::parse(body.body()).map_or_else(|_| refused += 1, check_reply),
                _ => Message::decode(&body).map_or_else(|_| refused += 1, |_| ()),
            }
            body.body_mut()[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(refused > 64, "{op:?}: only {refused} flips were noticed");
    }
}

/// What the rest of the program relies on.
fn check_call(view: CallView<'_>) {
    let head = view.head();
    let row = row_bytes(head.format, head.hidden as usize);
    assert_eq!(view.payload().len(), row * head.rows as usize);
    for assignment in view.assignments() {
        assert!(assignment.row < head.rows && assignment.weight.is_finite());
    }
    let padded = (head.hidden as usize).next_multiple_of(32);
    for bytes in view.payload().chunks(row) {
        let scales = if head.format == RowFormat::Int8 { padded..padded + padded / 8 } else { 0..padded * 4 };
        let numbers: &[f32] = bytemuck::cast_slice(&bytes[scales]);
        assert!(numbers.iter().all(|number| number.is_finite()));
    }
}

fn check_reply(view: ReplyView<'_>) {
    assert_eq!(view.rows().count(), view.row_count());
    for row in view.rows() {
        let length = match row {
            Row::I16(sums) => sums.len(),
            Row::I32(sums) => sums.len(),
            Row::Overflow => view.head().hidden as usize,
        };
        assert_eq!(length, view.head().hidden as usize);
    }
}

#[test]
fn a_misaligned_body_is_refused() {
    let frame = call(RowFormat::Int8, 64, 1);
    let body = frame.body();
    let mut room = received(Op::Reply, &vec![0; body.len() + 64]);
    for offset in 1..64 {
        let bytes = &mut room.body_mut()[offset..offset + body.len()];
        bytes.copy_from_slice(body);
        assert_eq!(CallView::parse(bytes).unwrap_err().error, FrameError::Misaligned);
    }
}

#[test]
fn numbers_that_are_not_finite_are_refused() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0] {
        let mut frame = call(RowFormat::Int8, 64, 3);
        // The payload begins where the first row does: find it by its pattern, the second row's second scale.
        let start = payload_start(&frame);
        let at = start + row_bytes(RowFormat::Int8, 64) + 64 + 4;
        frame.body_mut()[at..at + 4].copy_from_slice(&bad.to_le_bytes());
        let error = Call::parse(frame).unwrap_err();
        assert_eq!(error.error, FrameError::Scale { row: 1, group: 1 });
        assert_eq!(error.call, Some(7));
    }
    let mut frame = call(RowFormat::F32, 64, 3);
    let at = payload_start(&frame) + 2 * 256 + 12;
    frame.body_mut()[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    assert_eq!(Call::parse(frame).unwrap_err().error, FrameError::Value { row: 2, column: 3 });
    let weight = [Assignment::new(0, 0, f32::NAN)];
    let error = CallDraft::new(&pool(), head(RowFormat::F32, 32, 1), &weight).unwrap_err();
    assert_eq!(error, FrameError::Weight(0));
}

fn payload_start(frame: &Buffer) -> usize {
    let payload = CallView::parse(frame.body()).unwrap().payload();
    payload.as_ptr().addr() - frame.body().as_ptr().addr()
}

#[test]
fn shapes_beyond_the_limits_are_refused_by_the_sender_too() {
    let new = |head: CallHead, assignments: &[Assignment]| {
        CallDraft::new(&pool(), head, assignments).map(drop).unwrap_err()
    };
    let one = [Assignment::new(0, 0, 1.0)];
    assert_eq!(new(head(RowFormat::Int8, 64, 0), &one), FrameError::Rows(0));
    assert_eq!(new(head(RowFormat::Int8, 0, 1), &one), FrameError::Hidden(0));
    let rows = ROWS_MAX as u32 + 1;
    assert_eq!(new(head(RowFormat::Int8, 64, rows), &one), FrameError::Rows(rows));
    let hidden = HIDDEN_MAX as u32 + 1;
    assert_eq!(new(head(RowFormat::Int8, hidden, 1), &one), FrameError::Hidden(hidden));
    assert_eq!(new(head(RowFormat::Int8, u32::MAX, u32::MAX), &one), FrameError::Rows(u32::MAX));
    assert!(matches!(new(head(RowFormat::F32, 16_384, 17), &one), FrameError::Payload { .. }));
    let small = head(RowFormat::Int8, 64, 1);
    assert!(matches!(new(small, &[]), FrameError::Assignments { count: 0, .. }));
    let many = vec![one[0]; TOP_K_MAX + 1];
    assert_eq!(new(small, &many), FrameError::Assignments { count: 33, max: 32 });
    assert_eq!(new(small, &[Assignment::new(1, 0, 1.0)]), FrameError::Assignment { index: 0, row: 1 });
    assert_eq!(new(CallHead { budget_us: 0, ..small }, &one), FrameError::Budget(0));
    assert!(matches!(new(CallHead { budget_us: u32::MAX, ..small }, &one), FrameError::Budget(_)));
}

#[test]
fn the_largest_calls_and_replies_fit_their_caps() {
    for (format, hidden) in [(RowFormat::Int8, 2048), (RowFormat::Int8, 16_384), (RowFormat::F32, 32)] {
        let rows = CallHead::rows_max(format, hidden);
        let per_row = (ASSIGNMENTS_MAX / rows as usize).min(TOP_K_MAX);
        let assignments: Vec<_> = (0..rows)
            .flat_map(|row| (0..per_row).map(move |e| Assignment::new(row, e as u16, 1.0)))
            .collect();
        let draft = CallDraft::new(&pool(), head(format, hidden, rows), &assignments).unwrap();
        Call::parse(draft.finish().into_buffer()).unwrap();
        let widths = vec![SumWidth::I32; rows as usize];
        let head = ReplyHead { call: 1, service_us: 1, hidden };
        let draft = ReplyDraft::new(&pool(), head, &widths).unwrap();
        Reply::parse(draft.finish()).unwrap();
    }
}

#[test]
fn headers_of_a_wrong_operation_version_or_length_are_refused_before_anything_is_allocated() {
    let bytes = |length: u32, op: u16, reserved: u16| {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes[4..6].copy_from_slice(&op.to_le_bytes());
        bytes[6..].copy_from_slice(&reserved.to_le_bytes());
        bytes
    };
    let parse = |bytes| Header::parse(bytes, &[Op::Call, Op::Health]);
    assert_eq!(parse(bytes(10, 1, 0)).unwrap().body_bytes(), 10);
    assert_eq!(parse(bytes(10, 0, 0)), Err(FrameError::UnknownOp(0)));
    assert_eq!(parse(bytes(10, 999, 0)), Err(FrameError::UnknownOp(999)));
    assert_eq!(parse(bytes(10, 2, 0)), Err(FrameError::UnexpectedOp(Op::Reply)));
    assert_eq!(parse(bytes(10, 1, 1)), Err(FrameError::Reserved(1)));
    for op in Op::ALL {
        let max = op.body_bytes_max();
        assert!(max <= BODY_BYTES_MAX);
        assert!(Header::parse(bytes(max as u32, op as u16, 0), &[op]).is_ok());
        for length in [max as u32 + 1, u32::MAX] {
            let error = Header::parse(bytes(length, op as u16, 0), &[op]).unwrap_err();
            assert_eq!(error, FrameError::TooLong { op, bytes: length as usize, max });
        }
        let header = Header::new(op, max).unwrap();
        assert_eq!(Header::parse(header.to_bytes(), &[op]), Ok(header));
    }
}

#[test]
fn an_operation_is_not_read_as_another() {
    let call = call(RowFormat::Int8, 40, 2);
    let reply = reply(40);
    let wrong = [
        Reply::parse(received(Op::Call, call.body())).map(drop),
        Call::parse(received(Op::Reply, reply.body())).map(drop).map_err(|bad| bad.error),
        Message::decode(&call).map(drop),
        Message::decode(&reply).map(drop),
    ];
    assert!(wrong.iter().all(|outcome| matches!(outcome, Err(FrameError::UnexpectedOp(_)))));
}

#[test]
fn texts_are_shortened_on_the_way_out_and_checked_on_the_way_in() {
    let long = "ä".repeat(TEXT_BYTES_MAX);
    let buffer =
        Message::Goodbye(Goodbye { reason: format!("a\nb\u{1b}[31m{long}") }).encode(&pool()).unwrap();
    let Message::Goodbye(goodbye) = Message::decode(&buffer).unwrap() else { panic!("not a goodbye") };
    assert!(goodbye.reason.starts_with("a b [31mää") && goodbye.reason.len() > TEXT_BYTES_MAX - 2);
    for bad in [&b"\xff\xfe"[..], b"a\nb", b"\x1b[2J"] {
        let Message::Hello(mut hello) = messages().remove(0) else { panic!("not a hello") };
        hello.name = "x".repeat(bad.len());
        let mut buffer = Message::Hello(hello).encode(&pool()).unwrap();
        buffer.body_mut()[..bad.len()].copy_from_slice(bad);
        let error = Message::decode(&buffer).unwrap_err();
        assert_eq!(error, FrameError::Text { field: "name", max: NAME_BYTES_MAX });
    }
    // A goodbye by hand: its text, then distance to it and length. This also holds the encoding in place.
    for (length, fine) in [(TEXT_BYTES_MAX, true), (TEXT_BYTES_MAX + 4, false)] {
        let mut body = vec![b'x'; length];
        body.extend((-(length as i32)).to_le_bytes());
        body.extend((length as u32).to_le_bytes());
        let outcome = Message::decode(&received(Op::Goodbye, &body));
        let too_long = FrameError::Text { field: "reason", max: TEXT_BYTES_MAX };
        assert_eq!(outcome.is_ok(), fine);
        assert!(fine || outcome == Err(too_long));
    }
}

#[test]
fn placements_are_ascending_and_bounded() {
    let key = slice;
    let encode =
        |experts| Message::Placement(Placement { epoch: 1, model: [0; 32], experts }).encode(&pool());
    let empty = Slice { from: 3, to: 3, ..key(0, 0) };
    let twice = vec![Slice { to: 3, ..key(0, 1) }, Slice { from: 3, ..key(0, 1) }];
    for experts in [vec![key(1, 0), key(0, 0)], vec![key(0, 1), key(0, 1)], vec![empty], twice] {
        assert_eq!(encode(experts).map(drop), Err(FrameError::Experts));
    }
    let all: Vec<_> = (0..=u16::MAX).map(|expert| key(3, expert)).collect();
    assert_eq!(all.len(), PLACED_EXPERTS_MAX);
    let buffer = encode(all.clone()).unwrap();
    let Message::Placement(placement) = Message::decode(&buffer).unwrap() else { panic!("not a placement") };
    assert_eq!(placement.experts, all);
    let more = all.into_iter().chain([key(4, 0)]).collect();
    assert_eq!(encode(more).map(drop), Err(FrameError::Experts));
    // The first two keys swapped, as a hostile router might send them.
    let mut buffer = encode(vec![key(0, 1), key(0, 2)]).unwrap();
    let (at, other) = (2, 10);
    assert_eq!((buffer.body()[at], buffer.body()[other]), (1, 2));
    buffer.body_mut().swap(at, other);
    assert_eq!(Message::decode(&buffer), Err(FrameError::Experts));
}

#[test]
fn a_pool_reuses_its_buffers_and_never_exceeds_its_bytes() {
    let pool = Pool::new(1 << 20);
    let header = Header::new(Op::Reply, 100_000).unwrap();
    let held: Vec<_> = (0..8).map(|_| pool.take(header).unwrap()).collect();
    assert_eq!(pool.counters().bytes, 1 << 20);
    assert_eq!(pool.take(header).map(drop), Err(FrameError::PoolExhausted(128 << 10)));
    drop(held);
    assert_eq!(pool.counters().bytes, 1 << 18, "a quarter is kept, the rest given back");
    for _ in 0..1000 {
        drop(pool.take(header).unwrap());
    }
    let counters = pool.counters();
    assert_eq!((counters.allocated, counters.reused, counters.refused), (8, 1000, 1));
    // Idle buffers of one size make room for another.
    let large = Header::new(Op::Reply, 900_000).unwrap();
    assert!(pool.take(large).is_ok());
    assert!(pool.counters().bytes <= 1 << 20);
}

#[test]
fn a_reused_buffer_does_not_carry_an_earlier_frame_to_a_peer() {
    let pool = Pool::new(1 << 20);
    let mut first = pool.take(Header::new(Op::Reply, 4000).unwrap()).unwrap();
    first.body_mut().fill(0xab);
    drop(first);
    let one = [Assignment::new(0, 0, 1.0)];
    let draft = CallDraft::new(&pool, head(RowFormat::Int8, 40, 1), &one).unwrap();
    assert_eq!(pool.counters().reused, 1);
    assert!(!draft.finish().into_buffer().frame().contains(&0xab));
}

fn any_call() -> impl Strategy<Value = (CallHead, Vec<Assignment>, Vec<u8>)> {
    let shape = (any::<bool>(), 1..300u32, 1..9u32, 1..=4usize);
    let ids = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u16>(), 1..1_000_000u32);
    (shape, ids, any::<u64>()).prop_map(|((int8, hidden, rows, per_row), ids, seed)| {
        let format = if int8 { RowFormat::Int8 } else { RowFormat::F32 };
        let (call, step, epoch, layer, budget_us) = ids;
        let head = CallHead { call, step, epoch, budget_us, layer, format, hidden, rows };
        let pick = |at: u64| seed.rotate_left((at % 64) as u32) ^ at;
        let assignment = |at| {
            let value = pick(at);
            Assignment::new((value % u64::from(rows)) as u32, value as u16, (value % 1000) as f32 / 500.0)
        };
        let assignments = (0..u64::from(rows) * per_row as u64).map(assignment).collect();
        let bytes = head.payload_bytes().unwrap() as u64;
        // Bytes below 0x3f: every four of them are a finite, non-negative number.
        let payload = (0..bytes).map(|at| (pick(at) % 0x3f) as u8).collect();
        (head, assignments, payload)
    })
}

proptest! {
    #[test]
    fn any_valid_call_survives_the_trip((head, assignments, payload) in any_call()) {
        let mut draft = CallDraft::new(&pool(), head, &assignments).unwrap();
        draft.payload_mut().copy_from_slice(&payload);
        let frame = draft.finish().into_buffer();
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(&frame.frame()[..HEADER_BYTES]);
        let header = Header::parse(bytes, &[Op::Call]).unwrap();
        prop_assert_eq!(header.body_bytes(), frame.body().len());
        let call = Call::parse(received(Op::Call, frame.body())).unwrap();
        prop_assert_eq!(call.head(), &head);
        prop_assert_eq!(call.view().assignments(), &assignments[..]);
        prop_assert_eq!(call.view().payload(), &payload[..]);
        check_call(call.view());
    }

    #[test]
    fn any_valid_reply_survives_the_trip(
        hidden in 1..200u32,
        rows in proptest::collection::vec(proptest::option::of(any::<(i32, bool)>()), 1..12),
    ) {
        let sums: Vec<Option<Vec<i32>>> = rows.iter().map(|row| row.map(|(first, small)| {
            let value = |at: i32| first.wrapping_mul(at + 1);
            (0..hidden as i32).map(|at| if small { value(at) % 30_000 } else { value(at) }).collect()
        })).collect();
        let slices: Vec<_> = sums.iter().map(Option::as_deref).collect();
        let head = ReplyHead { call: 1, service_us: 2, hidden };
        let frame = encode_sums(&pool(), head, &slices).unwrap();
        let reply = Reply::parse(received(Op::Reply, frame.body())).unwrap();
        reply.view().check_against(1, rows.len() as u32, hidden).unwrap();
        for (row, sums) in reply.view().rows().zip(&sums) {
            match (row, sums) {
                (Row::I16(row), Some(sums)) => prop_assert!(row.iter().map(|v| i32::from(*v)).eq(sums.iter().copied())),
                (Row::I32(row), Some(sums)) => prop_assert_eq!(row, &sums[..]),
                (Row::Overflow, None) => {}
                (row, sums) => prop_assert!(false, "{row:?} came from {sums:?}"),
            }
        }
    }

    #[test]
    fn any_bytes_are_refused_or_keep_every_promise(
        mut body in proptest::collection::vec(any::<u8>(), 0..600),
        op in proptest::sample::select(&Op::ALL[..]),
        small in any::<bool>(),
    ) {
        if small {
            // Mostly zeros get further: pointers and lengths become plausible.
            body.iter_mut().for_each(|byte| if *byte < 230 { *byte = 0 });
        }
        // More than its operation may have is refused with the header.
        body.truncate(op.body_bytes_max());
        let buffer = received(op, &body);
        match op {
            Op::Call => CallView::parse(buffer.body()).map_or_else(|_| (), check_call),
            Op::Reply => ReplyView::parse(buffer.body()).map_or_else(|_| (), check_reply),
            Op::Chunk => Chunk::parse(buffer).map_or_else(|_| (), |chunk| assert!(!chunk.bytes().is_empty())),
            _ => drop((Message::decode(&buffer), Weights::decode(&buffer))),
        }
    }

    #[test]
    fn overwritten_words_are_refused_or_keep_every_promise(
        at in 0..400usize, word in any::<u32>(), high in any::<bool>(), as_reply in any::<bool>(),
    ) {
        let mut frame = if as_reply { reply(33) } else { call(RowFormat::Int8, 40, 2) };
        let length = frame.body().len();
        let at = length.saturating_sub(4 + at % length.min(120));
        let word = if high { word | 0xffff_0000 } else { word & 0xffff };
        frame.body_mut()[at..at + 4].copy_from_slice(&word.to_le_bytes());
        if as_reply {
            ReplyView::parse(frame.body()).map_or_else(|_| (), check_reply);
        } else {
            CallView::parse(frame.body()).map_or_else(|_| (), check_call);
        }
    }

    #[test]
    fn any_header_is_refused_or_within_its_cap(bytes in any::<[u8; HEADER_BYTES]>()) {
        if let Ok(header) = Header::parse(bytes, &Op::ALL) {
            prop_assert!(header.body_bytes() <= header.op().body_bytes_max());
        }
    }
}

#[test]
fn probes_and_rosters_are_bounded() {
    let long = |op: Op, max: usize| FrameError::TooLong { op, bytes: max + 1, max };
    let probe =
        |answer_bytes, padding| Message::Probe(Probe { id: 1, answer_bytes, padding: vec![0; padding] });
    let outcome = |message: Message| message.encode(&pool()).map(drop);
    assert_eq!(outcome(probe(PROBE_BYTES_MAX as u32, PROBE_BYTES_MAX)), Ok(()));
    assert_eq!(outcome(probe(PROBE_BYTES_MAX as u32 + 1, 0)), Err(long(Op::Probe, PROBE_BYTES_MAX)));
    assert_eq!(outcome(probe(0, PROBE_BYTES_MAX + 1)), Err(long(Op::Probe, PROBE_BYTES_MAX)));
    assert_eq!(outcome(Message::Roster(vec![0; ROSTER_BYTES_MAX])), Ok(()));
    assert_eq!(
        outcome(Message::Roster(vec![0; ROSTER_BYTES_MAX + 1])),
        Err(long(Op::Roster, ROSTER_BYTES_MAX))
    );
    // A ping has no room for anything, whatever its archive says.
    let mut stuffed = Message::Roster(vec![1; 8]).encode(&pool()).unwrap();
    let body = stuffed.body_mut().to_vec();
    assert!(Message::decode(&received(Op::Ping, &body)).is_err());
}
