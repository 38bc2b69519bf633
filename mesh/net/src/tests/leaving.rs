//! A node that stops: what is under way is served, what comes afterwards refused, and nobody waits for it in vain.

use mesh_proto::cluster::{Cluster, NodeState};
use mesh_wire::control::Refusal;
use mesh_wire::message::Message;

use super::harness::{
    LONG, LONG_US, RawNode, Running, call_and_check, hub, hub_config, keys, layer, listen_anywhere, pair,
    send,
};
use crate::hub::Hub;
use crate::pending::CallError;

fn is(state: NodeState) -> impl Fn(&Cluster) -> bool {
    move |cluster| cluster.status(0).unwrap().state == state
}

#[test]
fn a_node_that_leaves_serves_what_is_under_way_and_what_is_on_its_way() {
    let (hub, mut station) = pair();
    call_and_check(&hub, 2);
    let first = send(&hub, layer::PAIR, 2, LONG_US);
    while station.stop.calls_under_way() == 0 {
        std::thread::yield_now();
    }
    station.stop.leave();
    assert!(hub.wait_until(LONG, is(NodeState::Leaving)));
    let released = |cluster: &Cluster| cluster.routes().table.held_by(0).next().is_none();
    assert!(hub.wait_until(LONG, released), "nothing new goes there, as nobody can take over");
    assert_eq!(station.stop.calls_under_way(), 1);
    // Sent by whoever had not heard of it. The first call is answered only now.
    let second = send(&hub, layer::PAIR, 3, LONG_US);
    assert_eq!(first.wait().unwrap().view().row_count(), 2);
    assert_eq!(second.wait().unwrap().view().row_count(), 3);
    station.join().unwrap();
    assert!(hub.wait_until(LONG, is(NodeState::Absent)));
    let counters = hub.nodes()[0].counters;
    assert_eq!((counters.answered, counters.gone, counters.late, counters.refused), (3, 0, 0, 0));
}

#[test]
fn the_second_word_ends_a_node_at_once() {
    let (hub, mut station) = pair();
    let silent = send(&hub, layer::SILENT, 2, LONG_US);
    while station.stop.calls_under_way() == 0 {
        std::thread::yield_now();
    }
    station.stop.leave();
    assert!(hub.wait_until(LONG, is(NodeState::Leaving)));
    station.stop.leave();
    station.join().unwrap();
    assert_eq!(silent.wait().unwrap_err(), CallError::Gone);
}

#[test]
fn a_node_that_has_left_refuses_and_is_not_blamed() {
    let (hub, station) = pair();
    station.stop.close();
    for _ in 0..3 {
        let error = send(&hub, layer::ANSWER, 2, LONG_US).wait().unwrap_err();
        assert!(matches!(error, CallError::Refused { refusal: Refusal::Stopping, .. }), "{error:?}");
    }
    assert!(hub.wait_until(LONG, is(NodeState::Serving)), "not suspected");
    assert_eq!(station.stop.calls_under_way(), 0);
}

#[test]
fn a_node_without_a_router_leaves_at_once() {
    let keys = keys(1);
    let gone = hub(&keys).local_addr();
    let mut station = Running::start(&keys, 0, vec![gone]);
    station.stop.leave();
    station.join().unwrap();
}

#[test]
fn a_router_that_goes_takes_no_node_with_it() {
    let keys = keys(1);
    let first = hub(&keys);
    let address = first.local_addr();
    let station = Running::start(&keys, 0, vec![address]);
    assert!(first.wait_ready(1, LONG));
    first.shutdown("the router is stopping");
    drop(first);
    assert!(!station.stop.is_triggered());
    let second = Hub::start(hub_config(&keys, address)).unwrap();
    assert!(second.wait_ready(1, LONG));
    call_and_check(&second, 2);
}

#[test]
fn leaving_again_and_again_is_leaving_once() {
    let keys = keys(1);
    let hub = Hub::start(hub_config(&keys, listen_anywhere())).unwrap();
    let mut raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    for _ in 0..100 {
        raw.say(&Message::Leaving);
    }
    assert!(hub.wait_until(LONG, is(NodeState::Leaving)));
    // It may come back: that was another process's word.
    drop(raw);
    let _raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_until(LONG, is(NodeState::Serving)));
}
