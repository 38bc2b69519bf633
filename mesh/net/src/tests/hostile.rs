//! A node that was admitted and then says anything: every frame ends in an error, and the router goes on.

use std::time::Duration;

use mesh_proto::cluster::NodeState;
use mesh_wire::call::Call;
use mesh_wire::control::Health;
use mesh_wire::frame::{HEADER_BYTES, Op};
use mesh_wire::message::Message;
use mesh_wire::reply::{ReplyHead, encode_sums};
use quinn::ConnectionError;

use super::harness::{LONG, LONG_US, RawNode, Shaken, frame, hello, hub, keys, layer, reply_to, send};
use crate::hub::Hub;
use crate::pending::CallError;
use crate::stream::read_frame;

/// Sends `answer(call)` to a call and returns what the router made of it.
fn answered_with(hub: &Hub, raw: &RawNode, answer: impl FnOnce(&Call) -> Vec<u8>) -> CallError {
    let pending = send(hub, layer::ANSWER, 2, LONG_US);
    let (mut stream, _recv, call) = raw.accept_call();
    raw.write(&mut stream, &answer(&call));
    pending.wait().unwrap_err()
}

fn rejected(error: CallError, part: &str) {
    let CallError::Rejected { reason } = error else { panic!("{error:?} instead of a rejection") };
    assert!(reason.contains(part), "{reason:?} does not contain {part:?}");
}

#[test]
fn malformed_replies_are_refused_by_name_and_the_node_goes_on() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let pool = &raw.pool;
    let with_rows = |call: &Call, rows: usize, hidden: u32| {
        let sums = vec![1; hidden as usize];
        let head = ReplyHead { call: call.head().call, service_us: 1, hidden };
        encode_sums(pool, head, &vec![Some(&sums[..]); rows]).unwrap().frame().to_vec()
    };
    let raw = &raw;
    let hub = &hub;
    rejected(answered_with(hub, raw, |call| with_rows(call, 3, 100)), "a reply of 3 x 100");
    rejected(answered_with(hub, raw, |call| with_rows(call, 2, 101)), "a reply of 2 x 101");
    rejected(answered_with(hub, raw, |_| frame(Op::Reply, &[0xff; 200])), "not a valid Reply");
    rejected(answered_with(hub, raw, |_| frame(Op::Reply, &[])), "not a valid Reply");
    rejected(answered_with(hub, raw, |_| frame(Op::Health, &[0; 64])), "does not belong");
    rejected(answered_with(hub, raw, |_| vec![0xff; HEADER_BYTES]), "operation code 65535");
    rejected(answered_with(hub, raw, |_| vec![1, 0, 0, 0, 2, 0, 1, 0]), "reserved header bits");
    let pool_before = hub.counters().pool;
    rejected(answered_with(hub, raw, |_| vec![0xff, 0xff, 0xff, 0xff, 2, 0, 0, 0]), "the limit is");
    // The call took a buffer; the four gigabytes announced did not.
    let pool_after = hub.counters().pool;
    assert!(pool_after.bytes <= pool_before.bytes + (8 << 10), "{pool_before:?} {pool_after:?}");
    let cut = answered_with(hub, raw, |call| {
        let reply = reply_to(pool, call);
        let mut bytes = reply.frame().to_vec();
        let length = bytes.len() as u32 - HEADER_BYTES as u32 - 64;
        bytes[..4].copy_from_slice(&length.to_le_bytes());
        bytes
    });
    rejected(cut, "not a valid Reply");
    // Still trusted with the next frame, as long as the cluster trusts it with calls.
    let pending = send(hub, layer::ANSWER, 2, LONG_US);
    let (mut stream, _recv, call) = raw.accept_call();
    raw.write(&mut stream, reply_to(pool, &call).frame());
    pending.wait().unwrap();
    let counters = hub.nodes()[0].counters;
    assert_eq!((counters.rejected, counters.answered), (9, 1));
    assert_eq!(hub.nodes()[0].cluster.state, NodeState::Quarantined, "it gets no more by the routes");
    assert_eq!(hub.routes().node(0, 0), None);
}

#[test]
fn a_reply_that_drips_is_late_however_alive_it_looks() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let pending = send(&hub, layer::ANSWER, 2, 300_000);
    let (mut stream, _recv, call) = raw.accept_call();
    let reply = reply_to(&raw.pool, &call).frame().to_vec();
    let drip = raw.runtime.spawn(async move {
        let mut every = tokio::time::interval(Duration::from_millis(10));
        for byte in reply {
            every.tick().await;
            // Fails once the router has had enough.
            if stream.write_all(&[byte]).await.is_err() {
                return true;
            }
        }
        false
    });
    assert_eq!(pending.wait().unwrap_err(), CallError::Late);
    assert!(raw.runtime.block_on(drip).unwrap(), "the reply was read to its end");
    let counters = hub.nodes()[0].counters;
    assert_eq!((counters.late, counters.rejected), (1, 0));
}

#[test]
fn a_stream_that_ends_within_a_reply_fails_the_call() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    for keep in [0, 1, HEADER_BYTES, HEADER_BYTES + 40] {
        let pending = send(&hub, layer::ANSWER, 2, LONG_US);
        let (mut stream, _recv, call) = raw.accept_call();
        raw.write(&mut stream, &reply_to(&raw.pool, &call).frame()[..keep]);
        stream.finish().unwrap();
        let error = pending.wait().unwrap_err();
        let expected = if keep == 0 { matches!(error, CallError::Gone) } else { true };
        assert!(expected && !matches!(error, CallError::Late), "{keep}: {error:?}");
    }
}

#[test]
fn a_node_that_answers_calls_nobody_made_is_stopped() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let invented = encode_sums(&raw.pool, ReplyHead { call: 0, service_us: 1, hidden: 1 }, &[Some(&[1])]);
    let invented = invented.unwrap().frame().to_vec();
    rejected(answered_with(&hub, &raw, |_| invented.repeat(9)), "calls that nobody made");
    let counters = hub.nodes()[0].counters;
    assert_eq!((counters.stale, counters.rejected), (9, 1));
    // One after the other it comes to the same, as lanes remember: of four calls on two of them, at least one lane
    // has carried two, and ten such replies.
    let (connection, pool) = (raw.connection.clone(), raw.pool.clone());
    raw.runtime.spawn(async move {
        while let Ok((mut stream, mut recv)) = connection.accept_bi().await {
            let (invented, pool) = (invented.repeat(5), pool.clone());
            tokio::spawn(async move {
                while let Ok(Some(call)) = read_frame(&mut recv, &pool, &[Op::Call]).await {
                    let reply = reply_to(&pool, &Call::parse(call).unwrap());
                    if stream.write_all(&[&invented, reply.frame()].concat()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    let outcomes: Vec<_> = (0..4).map(|_| send(&hub, layer::ANSWER, 2, LONG_US).wait()).collect();
    let refused =
        outcomes.iter().filter(|outcome| matches!(outcome, Err(CallError::Rejected { .. }))).count();
    assert!((1..=2).contains(&refused), "{outcomes:?}");
    assert_eq!(hub.nodes()[0].counters.rejected, 1 + refused as u64);
}

#[test]
fn nonsense_on_the_control_stream_ends_the_connection_and_nothing_else() {
    let keys = keys(2);
    let hub = hub(&keys);
    let garbage = [
        frame(Op::Placed, &[0xff; 100]),
        frame(Op::Hello, &[0; 8]),
        frame(Op::Placement, &[0; 64]),
        vec![0xff; 64],
        // Longer than a health report may be.
        vec![0xff, 0xff, 0, 0, Op::Health as u8, 0, 0, 0],
    ];
    for bytes in garbage {
        let mut raw = RawNode::connect(&keys, 0, hub.local_addr());
        raw.say(&Message::Hello(hello()));
        raw.runtime.block_on(raw.control.0.write_all(&bytes)).unwrap();
        let closed = raw.runtime.block_on(raw.connection.closed());
        assert!(matches!(closed, ConnectionError::ApplicationClosed(_)), "{closed:?}");
    }
    // And as the very first message.
    for bytes in [frame(Op::Health, &[0; 64]), frame(Op::Hello, &[1; 64]), vec![0xff; 64]] {
        let mut raw = RawNode::connect(&keys, 0, hub.local_addr());
        raw.runtime.block_on(raw.control.0.write_all(&bytes)).unwrap();
        let closed = raw.runtime.block_on(raw.connection.closed());
        assert!(matches!(closed, ConnectionError::ApplicationClosed(_)), "{closed:?}");
    }
    let mut raw = RawNode::connect(&keys, 0, hub.local_addr());
    raw.say(&Message::Hello(hello()));
    let health =
        Health { epoch: 0, calls: 1, rows: 2, busy_us: 3, queued: 4, resident_bytes: 5, ..Health::default() };
    raw.say(&Message::Health(health));
    let heard = |cluster: &mesh_proto::cluster::Cluster| cluster.status(0).unwrap().health == Some(health);
    assert!(hub.wait_until(LONG, heard));
    // Said more than twice after it had introduced itself.
    assert_eq!(hub.nodes()[0].cluster.state, NodeState::Quarantined);
    assert!(hub.nodes()[0].cluster.note.contains("pardon"));
}

#[test]
fn a_control_message_that_drips_in_ends_the_connection_and_silence_does_not() {
    let keys = keys(2);
    let hub = hub(&keys);
    let silent = RawNode::join(&keys, 0, hub.local_addr());
    for begun in [&[1][..], &frame(Op::Health, &[0; 64])[..HEADER_BYTES + 1]] {
        let mut raw = RawNode::connect(&keys, 1, hub.local_addr());
        raw.say(&Message::Hello(hello()));
        raw.runtime.block_on(raw.control.0.write_all(begun)).unwrap();
        let ConnectionError::ApplicationClosed(closed) = raw.runtime.block_on(raw.connection.closed()) else {
            panic!("{:?}", raw.connection.close_reason())
        };
        assert!(String::from_utf8_lossy(&closed.reason).contains("a frame was begun"), "{closed:?}");
    }
    // It has said nothing for twice as long.
    assert!(silent.connection.close_reason().is_none());
    assert_ne!(hub.nodes()[1].cluster.state, NodeState::Quarantined, "slow is not malformed");
}

#[test]
fn of_a_machine_that_does_not_introduce_itself_there_are_two_connections_at_a_time() {
    let keys = keys(2);
    let hub = hub(&keys);
    let closed = |(runtime, _, connection): &Shaken| match runtime.block_on(connection.closed()) {
        ConnectionError::ApplicationClosed(closed) => String::from_utf8_lossy(&closed.reason).into_owned(),
        other => panic!("{other:?}"),
    };
    let many: Vec<_> = (0..6).map(|_| RawNode::shake(&keys, 0, hub.local_addr())).collect();
    // They take no place of another machine's.
    let other = RawNode::join(&keys, 1, hub.local_addr());
    let reasons: Vec<_> = many.iter().map(closed).collect();
    let busy = reasons.iter().filter(|reason| reason.contains("do not introduce themselves")).count();
    let late = reasons.iter().filter(|reason| reason.contains("no hello")).count();
    assert!(busy >= 1 && late >= 2 && busy + late == 6, "{reasons:?}");
    drop(many);
    RawNode::join(&keys, 0, hub.local_addr());
    assert!(other.connection.close_reason().is_none());
}

#[test]
fn a_node_that_never_reads_its_lanes_is_late_and_cannot_grow_the_router() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    // More bytes than windows hold and more streams than there are.
    for _ in 0..30 {
        let error = send(&hub, layer::ANSWER, 4096, 10_000).wait().unwrap_err();
        assert_eq!(error, CallError::Late);
    }
    let pool = hub.counters().pool;
    assert!(pool.bytes <= 64 << 20, "{pool:?}");
    assert!(raw.connection.close_reason().is_none());
}
