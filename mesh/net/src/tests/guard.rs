//! A cluster's guard: revocation, copied keys, second routers, floods of strangers.

use std::path::Path;
use std::sync::Arc;

use mesh_proto::cluster::NodeState;
use mesh_wire::frame::Op;
use mesh_wire::id::NodeId;
use mesh_wire::message::Message;
use quinn::ConnectionError;

use super::harness::{
    Keys, LONG, LONG_US, RawNode, Running, call_and_check, hello, hub, hub_config, keys, layer,
    listen_anywhere, runtime, send,
};
use crate::authority::Authority;
use crate::endpoint::{self, Close};
use crate::hub::Hub;
use crate::identity::Identity;
use crate::pending::CallError;
use crate::roster::Machine;
use crate::seats::{
    GREETING_MAX, GREETING_PER_ADDRESS_MAX, GREETING_UNPROVEN_MAX, GREETING_UNPROVEN_PER_ADDRESS_MAX,
    Greeters, SEATS_MAX, Seats, Welcome,
};
use crate::station::StationError;
use crate::tls::SERVER_NAME;

fn closed_with(raw: &RawNode, close: Close) -> String {
    let closing = async { tokio::time::timeout(LONG, raw.connection.closed()).await };
    let closed = raw.runtime.block_on(closing).expect("it is closed");
    match &closed {
        ConnectionError::ApplicationClosed(frame) if frame.error_code == close.into() => {
            String::from_utf8_lossy(&frame.reason).into_owned()
        }
        other => panic!("{other:?} instead of {close:?}"),
    }
}

#[test]
fn a_revoked_node_is_cut_at_once_and_cannot_return() {
    let keys = keys(2);
    let hub = hub(&keys);
    // Both are waited for before there is a plan.
    let mut other = Running::start(&keys, 1, vec![hub.local_addr()]);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(2, LONG));
    let pending = send(&hub, layer::ANSWER, 1, LONG_US);
    let _taken = raw.accept_call();
    let epoch = keys.authority.roster().roster().epoch;
    assert_eq!(hub.revoke("node-0").unwrap().key, keys.nodes[0].id());
    // Calls under way fail now, not when their budget ends.
    assert_eq!(pending.wait().unwrap_err(), CallError::Gone);
    assert!(closed_with(&raw, Close::Revoked).contains("revoked"));
    assert!(hub.wait_until(LONG, |cluster| cluster.status(0).unwrap().state == NodeState::Revoked));
    assert!(hub.routes().table.all().all(|(_, part)| !part.holders.as_slice().contains(&0)));
    assert_eq!(keys.authority.roster().roster().epoch, epoch + 1);
    // Again, with the same key: turned away in TLS, and it knows that it is final.
    let mut back = Running::start(&keys, 0, vec![hub.local_addr()]);
    assert!(matches!(back.join().unwrap_err(), StationError::Revoked));
    // Shut out while it is connected, a node ends as well.
    hub.revoke(&keys.nodes[1].id().to_hex()[..8]).unwrap();
    let error = other.join().unwrap_err();
    assert!(error.to_string().contains("join with a new token"), "{error}");
    assert!(hub.revoke("node-1").is_err());
}

#[test]
fn every_node_is_shown_the_roster_first_and_at_every_change() {
    let keys = keys(2);
    let hub = hub(&keys);
    let mut raw = RawNode::connect(&keys, 0, hub.local_addr());
    raw.say(&Message::Hello(hello()));
    let membership = keys.membership(&keys.nodes[0]);
    let epoch = keys.authority.roster().roster().epoch;
    let hear = |raw: &mut RawNode| {
        let Message::Roster(shown) = raw.hear(Op::Roster) else { panic!("not a roster") };
        membership.hear(&shown).unwrap();
        membership.epoch()
    };
    assert_eq!(hear(&mut raw), epoch);
    hub.revoke("node-1").unwrap();
    assert_eq!(hear(&mut raw), epoch + 1);
    // Nobody else is waited for any more, so a plan was made meanwhile.
    drop(raw.hear(Op::Placement));
    let token = hub.authority().issue(LONG, vec![hub.local_addr()]).unwrap();
    crate::join::join(&Identity::generate().unwrap(), &token, "pi").unwrap();
    assert_eq!(hear(&mut raw), epoch + 2);
}

#[test]
fn a_copied_key_is_noticed_and_the_machine_that_was_there_stays() {
    let keys = keys(1);
    let hub = hub(&keys);
    let station = Running::start(&keys, 0, vec![hub.local_addr()]);
    assert!(hub.wait_ready(1, LONG));
    for _ in 0..2 {
        let mut clone = RawNode::connect(&keys, 0, hub.local_addr());
        clone.say(&Message::Hello(hello()));
        let reason = closed_with(&clone, Close::Cloned);
        assert!(reason.contains("in use by another machine at 127.0.0.1"), "{reason}");
        assert!(reason.contains("join it again"), "{reason}");
        call_and_check(&hub, 1);
    }
    let node = &hub.nodes()[0];
    assert!(node.cluster.note.contains("another machine at 127.0.0.1"), "{}", node.cluster.note);
    assert_eq!((node.counters.connections, hub.counters().clones), (1, 2));
    assert_eq!(node.cluster.state, NodeState::Serving);
    drop(station);
}

#[test]
fn a_process_that_was_killed_and_started_again_is_no_copy() {
    let keys = keys(1);
    let hub = hub(&keys);
    // It answers no ping, as a dead one.
    let dead = RawNode::join_as(&keys, 0, hub.local_addr(), 8);
    assert!(hub.wait_ready(1, LONG));
    let _back = Running::start(&keys, 0, vec![hub.local_addr()]);
    closed_with(&dead, Close::Replaced);
    assert!(hub.wait_ready(1, LONG));
    call_and_check(&hub, 1);
    assert_eq!(hub.counters().clones, 0);
    assert_eq!(hub.nodes()[0].cluster.note, "");
}

#[test]
fn a_node_that_answers_pings_nobody_sent_is_stopped() {
    let keys = keys(1);
    let hub = hub(&keys);
    let mut raw = RawNode::join(&keys, 0, hub.local_addr());
    raw.say(&Message::Pong(u64::MAX));
    let closed = raw.runtime.block_on(raw.connection.closed());
    assert!(matches!(closed, ConnectionError::ApplicationClosed(_)), "{closed:?}");
}

fn copy(from: &Path, to: &Path) {
    for file in std::fs::read_dir(from).unwrap().flatten() {
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

#[test]
fn a_node_stays_with_the_first_of_two_routers_of_one_state() {
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let node = Identity::generate().unwrap();
    Authority::open(here.path()).unwrap().admit("pi", node.id()).unwrap();
    copy(here.path(), there.path());
    let open = |path: &Path| Keys { authority: Arc::new(Authority::open(path).unwrap()), nodes: vec![] };
    let (first, second) = (open(here.path()), open(there.path()));
    assert_eq!(first.authority.term().0, second.authority.term().0);
    let membership = first.membership(&node);
    let hub = Hub::start(hub_config(&first, listen_anywhere())).unwrap();
    let address = hub.local_addr();
    let station = Running::of(Arc::clone(&membership), vec![address]);
    assert!(hub.wait_ready(1, LONG));
    hub.shutdown("its cable is pulled");
    drop(hub);
    // The other one takes its address.
    let twin = Hub::start(hub_config(&second, address)).unwrap();
    let left = |twin: &Hub| {
        let came = || twin.counters().connections > 0;
        twin.wait_until(LONG, |cluster| came() && cluster.status(0).unwrap().state == NodeState::Absent)
    };
    assert!(left(&twin));
    assert_eq!((twin.nodes()[0].cluster.epoch, twin.nodes()[0].counters.calls), (0, 0));
    assert!(station.goes_on());
    twin.shutdown("it is stopped");
    // The first one comes back, or is started anew.
    let hub = Hub::start(hub_config(&first, address)).unwrap();
    assert!(hub.wait_ready(1, LONG));
    hub.shutdown("restarting");
    drop((hub, first));
    let restarted = open(here.path());
    let hub = Hub::start(hub_config(&restarted, address)).unwrap();
    assert!(hub.wait_ready(1, LONG));
    call_and_check(&hub, 1);
}

#[test]
fn a_node_whose_key_the_router_does_not_know_keeps_asking() {
    let keys = keys(1);
    let hub = hub(&keys);
    let stranger = Identity::generate().unwrap();
    let station = Running::of(keys.membership(&stranger), vec![hub.local_addr()]);
    let member = Running::start(&keys, 0, vec![hub.local_addr()]);
    assert!(hub.wait_until(LONG, |_| hub.counters().handshakes_failed >= 2));
    assert!(station.goes_on());
    drop(member);
    // And one that knows no address says so.
    let mut lost = Running::start(&keys, 0, vec![]);
    assert!(matches!(lost.join().unwrap_err(), StationError::NoAddress));
}

#[test]
fn floods_of_strangers_do_not_stop_a_member() {
    let keys = keys(1);
    let hub = hub(&keys);
    let _station = Running::start(&keys, 0, vec![hub.local_addr()]);
    assert!(hub.wait_ready(1, LONG));
    let (runtime, router) = (runtime(), keys.router());
    let address = hub.local_addr();
    let flood = |joins: bool| async move {
        loop {
            let stranger = Identity::generate().unwrap();
            let endpoint = match joins {
                true => endpoint::joiner(&stranger, false).unwrap(),
                false => endpoint::dialer(&stranger, router, false).unwrap(),
            };
            for _ in 0..50 {
                let Ok(connection) = endpoint.connect(address, SERVER_NAME).unwrap().await else { continue };
                // As many streams and bytes as the transport lets through.
                let Ok((mut send, _recv)) = connection.open_bi().await else { continue };
                while send.write_all(&[0; 4096]).await.is_ok() {}
            }
        }
    };
    for joins in [true, false, true, false] {
        runtime.spawn(flood(joins));
    }
    let strangers = || hub.counters().handshakes_failed + hub.counters().deferred;
    let mut calls = 0;
    while strangers() < 100 {
        call_and_check(&hub, 1);
        calls += 1;
    }
    assert!(calls > 0);
    assert_eq!((hub.nodes()[0].counters.answered, hub.nodes()[0].counters.connections), (calls, 1));
    assert_eq!(hub.counters().joined, 0);
    runtime.shutdown_background();
}

#[test]
fn a_process_has_so_many_seats_and_nobody_loses_one() {
    let seats = Seats::default();
    let key = |at: usize| NodeId(std::array::from_fn(|place| (at >> (8 * place.min(2))) as u8));
    let machine = |at: usize| Machine::node(&format!("n{at}"), key(at));
    assert!((0..SEATS_MAX).all(|at| seats.add(machine(at))));
    assert!(!seats.add(machine(SEATS_MAX)));
    let (node, seat) = seats.of(key(7)).unwrap();
    assert_eq!((node, &*seat.machine.name), (7, "n7"));
    assert!(seat.revoke().is_none() && seats.of(key(7)).is_none());
    assert!(seats.at(7).unwrap().is_revoked() && seats.at(8).is_some());
    assert_eq!(seats.all().len(), SEATS_MAX);
}

#[test]
fn one_address_cannot_take_all_places() {
    let greeters = Arc::new(Greeters::default());
    let from = |text: &str| greeters.welcome(text.parse().unwrap());
    let mut kept = Vec::new();
    let mut proofs = 0;
    for at in 0..GREETING_PER_ADDRESS_MAX {
        match from("10.0.0.1:7") {
            Welcome::Greet(greeting) => kept.push(greeting),
            Welcome::Prove(greeting) => {
                assert!(at >= GREETING_UNPROVEN_PER_ADDRESS_MAX);
                proofs += 1;
                kept.push(greeting);
            }
            Welcome::Refuse => panic!("refused at {at}"),
        }
    }
    assert_eq!(proofs, GREETING_PER_ADDRESS_MAX - GREETING_UNPROVEN_PER_ADDRESS_MAX);
    assert!(matches!(from("10.0.0.1:8"), Welcome::Refuse));
    assert!(matches!(from("[::ffff:10.0.0.1]:8"), Welcome::Refuse));
    // Others still get in, with a proof of address, up to the limit of all; an IPv6 network counts as one.
    for host in 0..GREETING_PER_ADDRESS_MAX {
        let Welcome::Prove(greeting) = from(&format!("[fd00::{host:x}]:7")) else { panic!("{host}") };
        kept.push(greeting);
    }
    assert!(matches!(from("[fd00::ffff]:7"), Welcome::Refuse));
    for host in kept.len()..GREETING_MAX {
        let Welcome::Prove(greeting) = from(&format!("10.0.1.{host}:7")) else { panic!("{host}") };
        kept.push(greeting);
    }
    assert!(matches!(from("10.0.2.1:7"), Welcome::Refuse));
    // Whoever is through makes room.
    drop(kept);
    let all: Vec<_> = (0..GREETING_UNPROVEN_MAX).map(|host| from(&format!("10.0.3.{host}:7"))).collect();
    assert!(all.iter().all(|welcome| matches!(welcome, Welcome::Greet(_))));
    assert!(matches!(from("10.0.4.1:7"), Welcome::Prove(_)));
}
