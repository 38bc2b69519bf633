//! The way of a call: answered, refused, late, cancelled, lost.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use mesh_wire::buffer::Pool;
use mesh_wire::control::Refusal;
use mesh_wire::frame::Op;
use mesh_wire::message::Message;
use quinn::ConnectionError;

use super::harness::{
    LONG, LONG_US, RawNode, Running, call_and_check, hub, hub_config, keys, layer, listen_anywhere, outgoing,
    pair, read_call, reply_to, send,
};
use crate::endpoint::{Close, LaneReset};
use crate::hub::{Hub, Lane};
use crate::pending::{CallError, wait_any};

/// Short enough to wait for, long enough to be sent first.
const SHORT_US: u32 = 150_000;

#[test]
fn a_call_is_answered_with_every_number_right() {
    let (hub, _station) = pair();
    call_and_check(&hub, 1);
    call_and_check(&hub, 300);
    let status = &hub.nodes()[0];
    assert!(status.is_connected() && status.path_rtt.is_some() && status.address.is_some());
    let counters = status.counters;
    assert_eq!((counters.calls, counters.answered, counters.rows), (2, 2, 301));
    assert_eq!(counters.assignments, 602);
    assert!(counters.bytes_out > 301 * 128 && counters.bytes_in > 301 * 200);
}

#[test]
fn a_call_of_the_largest_size_is_answered() {
    let (hub, _station) = pair();
    call_and_check(&hub, 4096);
}

#[test]
fn calls_on_both_lanes_and_two_on_one_are_under_way_at_once() {
    let (hub, _station) = pair();
    // Each of a pair is answered only when the other has arrived: one after the other, neither would be.
    for (first, second) in [(1, 200), (1, 2), (200, 300)] {
        let first = send(&hub, layer::PAIR, first, LONG_US);
        let second = send(&hub, layer::PAIR, second, LONG_US);
        first.wait().unwrap();
        second.wait().unwrap();
    }
}

#[test]
fn a_call_that_is_not_answered_is_late_and_the_next_one_works() {
    let (hub, _station) = pair();
    for _ in 0..3 {
        let error = send(&hub, layer::SILENT, 1, SHORT_US).wait().unwrap_err();
        assert_eq!(error, CallError::Late);
        call_and_check(&hub, 1);
    }
    // The last miss may still be on its way into the counters; a further late call comes after it.
    let counters = hub.nodes()[0].counters;
    assert!(counters.late >= 2 && counters.answered == 3, "{counters:?}");
}

#[test]
fn whoever_waits_for_several_calls_is_woken_by_the_first_that_is_done() {
    let (hub, _station) = pair();
    // Decode calls, for which the waiting thread drives the network, and prefill calls, for which it sleeps.
    for rows in [1, 40] {
        let calls = [send(&hub, layer::SILENT, rows, LONG_US), send(&hub, layer::ANSWER, rows, LONG_US)];
        assert!(wait_any(calls.iter(), Instant::now() + LONG));
        assert!(!calls[0].is_done() && calls[1].is_done());
        let [silent, answered] = calls;
        assert!(!wait_any([&silent].into_iter(), Instant::now() + Duration::from_millis(5)), "until then");
        assert_eq!(answered.finish().unwrap().view().row_count(), rows as usize);
        assert_eq!(silent.finish().unwrap_err(), CallError::Late);
    }
    assert!(!wait_any(std::iter::empty(), Instant::now()));
    // One of them is over because its own time is.
    let (long, short) = (send(&hub, layer::SILENT, 1, LONG_US), send(&hub, layer::SILENT, 1, 20_000));
    assert!(wait_any([&long, &short].into_iter(), Instant::now() + LONG));
    assert!(!long.is_done() && short.is_done());
}

#[test]
fn a_call_that_is_given_up_still_tells_whether_the_node_was_in_time() {
    let (hub, station) = pair();
    let pending = send(&hub, layer::PAIR, 1, LONG_US);
    while station.service.calls.load(Ordering::SeqCst) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(pending.finish().unwrap_err(), CallError::Late, "nobody waits for it");
    send(&hub, layer::PAIR, 1, LONG_US).wait().unwrap();
    call_and_check(&hub, 1);
    call_and_check(&hub, 1);
    // Both lanes have had a call since, so the first answer has been counted.
    let counters = hub.nodes()[0].counters;
    assert_eq!((counters.answered, counters.late, counters.cancelled), (4, 0, 0), "{counters:?}");
}

#[test]
fn lanes_are_replaced_however_often_they_are_reset() {
    let (hub, _station) = pair();
    // More than the streams a node allows at a time.
    let late: Vec<_> = (0..40).map(|_| send(&hub, layer::SILENT, 1, 20_000)).collect();
    for pending in late {
        assert_eq!(pending.wait().unwrap_err(), CallError::Late);
    }
    for _ in 0..40 {
        assert_eq!(send(&hub, layer::SILENT, 1, 2_000).wait().unwrap_err(), CallError::Late);
    }
    call_and_check(&hub, 1);
}

#[test]
fn a_refusal_says_why() {
    let (hub, _station) = pair();
    let error = send(&hub, layer::REFUSE, 1, LONG_US).wait().unwrap_err();
    let detail = "expert 3 of layer 1 is not here".to_owned();
    assert_eq!(error, CallError::Refused { refusal: Refusal::UnknownExpert, detail });
    let error = send(&hub, layer::DROP, 1, LONG_US).wait().unwrap_err();
    assert!(matches!(error, CallError::Refused { refusal: Refusal::Failed, .. }));
    // The lane goes on.
    call_and_check(&hub, 1);
    assert_eq!(hub.nodes()[0].counters.refused, 2);
}

#[test]
fn a_node_that_goes_in_the_middle_of_a_call_fails_it_at_once() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let on_its_way = send(&hub, layer::ANSWER, 1, LONG_US);
    let (_send, _recv, call) = raw.accept_call();
    assert_eq!(call.head().call, on_its_way.call());
    raw.endpoint.close(0u32.into(), b"");
    assert_eq!(on_its_way.wait().unwrap_err(), CallError::Gone);
    assert!(hub.wait_until(LONG, |cluster| !cluster.settled() || !has_node(cluster)));
    assert_eq!(send(&hub, layer::ANSWER, 1, LONG_US).wait().unwrap_err(), CallError::Gone);
}

fn has_node(cluster: &mesh_proto::cluster::Cluster) -> bool {
    cluster.status(0).is_some_and(|status| status.state != mesh_proto::cluster::NodeState::Absent)
}

#[test]
fn a_lane_the_node_resets_fails_its_call_at_once_and_no_other() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let first = send(&hub, layer::ANSWER, 1, LONG_US);
    let (mut first_send, _first_recv, call) = raw.accept_call();
    assert_eq!(call.head().call, first.call());
    let second = send(&hub, layer::ANSWER, 1, LONG_US);
    let (mut second_send, _second_recv, call) = raw.accept_call();
    first_send.reset(LaneReset::Busy.into()).unwrap();
    assert_eq!(first.wait().unwrap_err(), CallError::Gone);
    raw.write(&mut second_send, reply_to(&raw.pool, &call).frame());
    second.wait().unwrap();
}

#[test]
fn a_cancelled_call_resets_its_lane() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let pending = send(&hub, layer::ANSWER, 1, LONG_US);
    let (send_stream, mut recv, _call) = raw.accept_call();
    drop(pending);
    let reset = raw.runtime.block_on(recv.read(&mut [0]));
    let code = LaneReset::Cancelled.into();
    assert!(matches!(reset, Err(quinn::ReadError::Reset(reason)) if reason == code));
    assert_eq!(raw.runtime.block_on(send_stream.stopped()).unwrap(), Some(code));
    let counters = hub.nodes()[0].counters;
    assert_eq!((counters.cancelled, counters.late), (1, 0));
}

#[test]
fn a_late_call_resets_its_lane_with_that_reason() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let pending = send(&hub, layer::ANSWER, 1, SHORT_US);
    let (_send, mut recv, _call) = raw.accept_call();
    let reset = raw.runtime.block_on(recv.read(&mut [0]));
    let code = LaneReset::Late.into();
    assert!(matches!(reset, Err(quinn::ReadError::Reset(reason)) if reason == code));
    assert_eq!(pending.wait().unwrap_err(), CallError::Late);
    assert_eq!(hub.nodes()[0].counters.late, 1);
}

#[test]
fn more_calls_than_may_wait_are_refused_at_once() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let mut pending = vec![send(&hub, layer::ANSWER, 1, LONG_US), send(&hub, layer::ANSWER, 1, LONG_US)];
    // Both lanes are taken: everything else waits.
    let _taken = (raw.accept_call(), raw.accept_call());
    pending.extend((0..64).map(|_| send(&hub, layer::ANSWER, 1, LONG_US)));
    assert_eq!(send(&hub, layer::ANSWER, 1, LONG_US).wait().unwrap_err(), CallError::Full);
    assert!(pending.iter().all(|pending| !pending.is_done()));
    drop(raw);
    for pending in pending {
        assert_eq!(pending.wait().unwrap_err(), CallError::Gone);
    }
}

#[test]
fn calls_to_a_node_that_is_not_there_fail_at_once() {
    let keys = keys(1);
    let hub = hub(&keys);
    assert_eq!(send(&hub, layer::ANSWER, 1, LONG_US).wait().unwrap_err(), CallError::Gone);
    let call = outgoing(hub.pool(), layer::ANSWER, 1, LONG_US);
    assert_eq!(hub.send(7, Lane::Decode, call).wait().unwrap_err(), CallError::Gone);
    assert!(!hub.wait_ready(1, Duration::ZERO));
}

#[test]
fn stale_and_repeated_replies_are_dropped_and_counted() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let first = send(&hub, layer::ANSWER, 1, LONG_US);
    let (mut stream, mut recv, call) = raw.accept_call();
    let reply = reply_to(&raw.pool, &call);
    // The reply twice: the second is still in the lane when the next call comes to it. The kinds of lane have two
    // streams each, used in turn, so the lane's next call is one of the next two.
    raw.write(&mut stream, &[reply.frame(), reply.frame()].concat());
    first.wait().unwrap();
    let second = send(&hub, layer::ANSWER, 2, LONG_US);
    let call = raw.runtime.block_on(async {
        tokio::select! {
            call = read_call(&mut recv, &raw.pool) => Ok(call),
            other = raw.connection.accept_bi() => Err(other.unwrap()),
        }
    });
    let pending = match call {
        Ok(call) => {
            raw.write(&mut stream, reply_to(&raw.pool, &call).frame());
            second
        }
        Err((mut send_stream, mut recv_stream)) => {
            // It took the other lane: keep that one busy, and the next comes here.
            let _call = raw.runtime.block_on(read_call(&mut recv_stream, &raw.pool));
            let third = send(&hub, layer::ANSWER, 2, LONG_US);
            let call = raw.runtime.block_on(read_call(&mut recv, &raw.pool));
            raw.write(&mut stream, reply_to(&raw.pool, &call).frame());
            let reply = third.wait().unwrap();
            assert_eq!(reply.view().row_count(), 2);
            raw.write(&mut send_stream, reply_to(&raw.pool, &_call).frame());
            second
        }
    };
    assert_eq!(pending.wait().unwrap().view().row_count(), 2);
    assert_eq!(hub.nodes()[0].counters.stale, 1);
}

#[test]
fn ten_thousand_calls_take_no_more_memory_than_a_few() {
    let (hub, station) = pair();
    let warm = 100;
    for _ in 0..warm {
        call_and_check(&hub, 2);
    }
    let before = (hub.counters().pool, station.pool.counters());
    for _ in 0..10_000 {
        call_and_check(&hub, 2);
    }
    let after = (hub.counters().pool, station.pool.counters());
    // A frame returns to its pool when QUIC has its acknowledgement, so a few are out at any time.
    for (before, after) in [(before.0, after.0), (before.1, after.1)] {
        assert!(after.reused >= before.reused + 20_000 - 100, "{before:?} {after:?}");
        assert!(after.allocated <= before.allocated + 100, "{before:?} {after:?}");
        assert!(after.bytes <= 2 << 20, "{after:?}");
        assert_eq!(after.refused, 0);
    }
    assert_eq!(station.service.calls.load(Ordering::SeqCst), 10_000 + warm);
    assert_eq!(hub.nodes()[0].counters.answered, 10_000 + warm);
}

#[test]
fn a_new_connection_of_the_same_key_replaces_the_old_one_at_once() {
    let keys = keys(1);
    let hub = hub(&keys);
    let old = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let pending = send(&hub, layer::ANSWER, 1, LONG_US);
    let _taken = old.accept_call();
    let new = RawNode::join(&keys, 0, hub.local_addr());
    let closed = old.runtime.block_on(old.connection.closed());
    let replaced = quinn::VarInt::from(Close::Replaced);
    assert!(matches!(closed, ConnectionError::ApplicationClosed(close) if close.error_code == replaced));
    assert_eq!(pending.wait().unwrap_err(), CallError::Gone);
    assert!(hub.wait_ready(1, LONG));
    let pending = send(&hub, layer::ANSWER, 1, LONG_US);
    let (mut stream, _recv, call) = new.accept_call();
    new.write(&mut stream, reply_to(&new.pool, &call).frame());
    pending.wait().unwrap();
    assert_eq!(hub.nodes()[0].counters.connections, 2);
}

#[test]
fn several_nodes_are_told_apart() {
    let keys = keys(3);
    let hub = hub(&keys);
    let stations: Vec<_> = (0..3).map(|node| Running::start(&keys, node, vec![hub.local_addr()])).collect();
    assert!(hub.wait_ready(3, LONG));
    for node in 0..3 {
        for _ in 0..=node {
            let call = outgoing(hub.pool(), layer::ANSWER, 1, LONG_US);
            hub.send(node, Lane::Decode, call).wait().unwrap();
        }
    }
    for (node, station) in (1..).zip(&stations) {
        assert_eq!(station.service.calls.load(Ordering::SeqCst), node);
    }
    let routes = hub.routes();
    let owners: std::collections::BTreeSet<_> =
        routes.table.all().flat_map(|(_, part)| part.holders.as_slice()).copied().collect();
    assert_eq!(owners, [0, 1, 2].into());
}

#[test]
fn shutdown_says_goodbye_and_both_sides_end() {
    let keys = keys(2);
    let hub = hub(&keys);
    let mut station = Running::start(&keys, 0, vec![hub.local_addr()]);
    let mut raw = RawNode::connect(&keys, 1, hub.local_addr());
    raw.say(&Message::Hello(super::harness::hello()));
    drop(raw.hear(Op::Placement));
    let pending = hub.send(1, Lane::Decode, outgoing(hub.pool(), layer::SILENT, 1, LONG_US));
    // Also from within a runtime, as a server that ends does.
    raw.runtime.block_on(async { hub.shutdown("it is late") });
    assert_eq!(pending.wait().unwrap_err(), CallError::Gone);
    let Message::Goodbye(goodbye) = raw.hear(Op::Goodbye) else { panic!("not a goodbye") };
    assert_eq!(goodbye.reason, "it is late");
    station.stop.trigger();
    station.join().unwrap();
}

#[test]
fn a_node_that_stops_says_goodbye() {
    let keys = keys(1);
    let hub = hub(&keys);
    let mut station = Running::start(&keys, 0, vec![hub.local_addr()]);
    assert!(hub.wait_ready(1, LONG));
    station.stop.trigger();
    station.join().unwrap();
    assert!(hub.wait_until(LONG, |cluster| !has_node(cluster)));
}

#[test]
fn a_node_comes_back_to_a_router_that_was_restarted() {
    let keys = keys(1);
    let first = hub(&keys);
    let address = first.local_addr();
    // The first address leads nowhere: it must not keep the node from the second.
    let nowhere = std::net::UdpSocket::bind(listen_anywhere()).unwrap().local_addr().unwrap();
    let _station = Running::start(&keys, 0, vec![nowhere, address]);
    assert!(first.wait_ready(1, LONG));
    first.shutdown("restarting");
    let second = Hub::start(hub_config(&keys, address)).unwrap();
    assert!(second.wait_ready(1, LONG));
    call_and_check(&second, 1);
}

#[test]
fn an_address_that_is_taken_is_named() {
    let keys = keys(1);
    let first = hub(&keys);
    let error = Hub::start(hub_config(&keys, first.local_addr())).unwrap_err();
    assert!(error.to_string().contains(&first.local_addr().to_string()), "{error}");
}

#[test]
fn budgets_count_what_is_already_out() {
    let keys = keys(1);
    let hub = hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    // Two answers: when the second is here, the cluster has taken in the first, and can tell from it how long a
    // call takes.
    let pending = send(&hub, layer::ANSWER, 1, LONG_US);
    let (mut stream, mut recv, call) = raw.accept_call();
    raw.write(&mut stream, reply_to(&raw.pool, &call).frame());
    pending.wait().unwrap();
    let pending = send(&hub, layer::ANSWER, 1, LONG_US);
    raw.runtime.block_on(async {
        let (mut stream, call) = tokio::select! {
            call = read_call(&mut recv, &raw.pool) => (stream, call),
            lane = raw.connection.accept_bi() => {
                let (stream, mut recv) = lane.unwrap();
                (stream, read_call(&mut recv, &raw.pool).await)
            }
        };
        stream.write_all(reply_to(&raw.pool, &call).frame()).await.unwrap();
        assert!(pending.wait().is_ok());
        // The lane stays open until here.
        drop(stream);
    });
    let idle = hub.budget(0, 2);
    let pool = Pool::new(64 << 20);
    let many: Vec<_> =
        (0..8).map(|_| hub.send(0, Lane::Prefill, outgoing(&pool, layer::ANSWER, 3000, LONG_US))).collect();
    let busy = hub.budget(0, 2);
    assert!(busy.total > idle.total && busy.hedge > idle.hedge, "{idle:?} {busy:?}");
    assert_eq!(hub.outstanding(0), 8 * 6000);
    drop(raw);
    for pending in many {
        assert_eq!(pending.wait().unwrap_err(), CallError::Gone);
    }
}

#[test]
fn the_link_bench_measures_every_way() {
    let bench = crate::bench_link::bench_link(50, Duration::ZERO).unwrap();
    assert_eq!(bench.calls, 50);
    for way in [bench.call, bench.tcp_call, bench.quinn_echo, bench.tcp_echo] {
        assert!(way.p50_us > 0.0 && way.p50_us <= way.p99_us, "{bench:?}");
    }
}
