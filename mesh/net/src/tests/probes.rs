//! Links are measured over real QUIC, and a node that answers probes as it likes is not believed.

use std::time::Duration;

use mesh_proto::cluster::{Cluster, MALFORMED_MAX, NodeState};
use mesh_proto::facts::LinkSpeed;
use mesh_wire::control::{Probe, Probed};
use mesh_wire::frame::Op;
use mesh_wire::message::Message;
use quinn::{RecvStream, SendStream};

use super::harness::{
    Keys, LONG, LONG_US, RawNode, Running, call_and_check, frame, hub_config, keys, layer, listen_anywhere,
    reply_to, send,
};
use crate::hub::{Hub, HubConfig};
use crate::stream::read_frame;

fn probing_hub(keys: &Keys) -> Hub {
    Hub::start(HubConfig { probe_links: true, ..hub_config(keys, listen_anywhere()) }).unwrap()
}

fn link(cluster: &Cluster) -> LinkSpeed {
    cluster.status(0).unwrap().link
}

#[test]
fn a_link_is_measured_when_its_node_joins() {
    let keys = keys(1);
    let hub = probing_hub(&keys);
    let station = Running::start(&keys, 0, vec![hub.local_addr()]);
    assert!(hub.wait_ready(1, LONG));
    assert!(hub.wait_until(LONG, |cluster| link(cluster).round_trip_us > 0 && link(cluster).mb_s > 0));
    call_and_check(&hub, 2);
    let counters = hub.nodes()[0].counters;
    assert!(counters.probes >= 11 && counters.probes_failed == 0, "{counters:?}");
    assert_eq!((station.stop.calls_under_way(), counters.calls), (0, 1), "probes are no calls");
}

/// The stream of the router's probes, and the first of them.
fn accept_probe(raw: &RawNode) -> (SendStream, RecvStream, Probe) {
    raw.runtime.block_on(async {
        let (send, mut recv) = raw.connection.accept_bi().await.unwrap();
        let probe = next_probe(raw, &mut recv).await;
        (send, recv, probe)
    })
}

async fn next_probe(raw: &RawNode, recv: &mut RecvStream) -> Probe {
    let frame = read_frame(recv, &raw.pool, &[Op::Probe]).await.unwrap().unwrap();
    let Message::Probe(probe) = Message::decode(&frame).unwrap() else { panic!("not a probe") };
    probe
}

fn probed(raw: &RawNode, id: u64, bytes: usize) -> Vec<u8> {
    let message = Message::Probed(Probed { id, padding: vec![0; bytes] });
    message.encode(&raw.pool).unwrap().frame().to_vec()
}

fn failed(hub: &Hub) -> u64 {
    hub.nodes()[0].counters.probes_failed
}

/// Calls are served whatever became of the probes.
fn still_serves(hub: &Hub, raw: &RawNode) {
    let pending = send(hub, layer::ANSWER, 2, LONG_US);
    let (mut stream, _recv, call) = raw.accept_call();
    raw.write(&mut stream, reply_to(&raw.pool, &call).frame());
    pending.wait().unwrap();
}

fn wait_for_failure(hub: &Hub, before: u64) {
    while failed(hub) == before {
        std::thread::yield_now();
    }
    assert_eq!(failed(hub), before + 1, "one failure ends the measurement");
}

#[test]
fn answers_that_no_correct_node_gives_are_counted_and_not_believed() {
    let keys = keys(1);
    let hub = probing_hub(&keys);
    type Answer = fn(&RawNode, &Probe) -> Vec<u8>;
    let wrong: [Answer; MALFORMED_MAX as usize] = [
        |raw, probe| probed(raw, probe.id ^ 1, 0),
        |raw, probe| probed(raw, probe.id, 1),
        |_, _| frame(Op::Health, &[0; 64]),
    ];
    for (times, answer) in wrong.into_iter().enumerate() {
        let raw = RawNode::join(&keys, 0, hub.local_addr());
        assert!(hub.wait_ready(1, LONG));
        let (mut send, mut recv, probe) = accept_probe(&raw);
        assert_eq!((probe.answer_bytes, probe.padding.len()), (0, 0), "the small ones come first");
        raw.write(&mut send, &answer(&raw, &probe));
        // Reset: the stream is replaced by a new one, next time.
        let ended = raw.runtime.block_on(recv.read_to_end(1));
        assert!(ended.is_err(), "{ended:?}");
        wait_for_failure(&hub, times as u64);
        assert!(hub.wait_until(LONG, |cluster| link(cluster) == LinkSpeed::default()));
        if times + 1 < wrong.len() {
            still_serves(&hub, &raw);
        }
    }
    assert!(hub.wait_until(LONG, |cluster| cluster.status(0).unwrap().state == NodeState::Quarantined));
}

#[test]
fn answers_that_do_not_come_hold_nothing_up() {
    let keys = keys(1);
    let hub = probing_hub(&keys);
    // Never, and a byte now and then.
    for (times, drips) in [(0, false), (1, true)] {
        let raw = RawNode::join(&keys, 0, hub.local_addr());
        assert!(hub.wait_ready(1, LONG));
        let (mut send, mut recv, probe) = accept_probe(&raw);
        still_serves(&hub, &raw);
        let answer = probed(&raw, probe.id, 0);
        let mut rest = answer[..answer.len() - 1].chunks(1).filter(|_| drips);
        let drip = async {
            while failed(&hub) == times {
                if let Some(byte) = rest.next() {
                    // Fails once the router has given up.
                    drop(send.write_all(byte).await);
                }
                // How such a node drips: the only thing here that takes its time.
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        raw.runtime.block_on(drip);
        assert!(raw.runtime.block_on(recv.read_to_end(1)).is_err(), "reset");
        assert!(hub.wait_until(LONG, |cluster| link(cluster) == LinkSpeed::default()));
    }
    assert_eq!(hub.nodes()[0].cluster.state, NodeState::Serving, "slow is not malformed");
}

#[test]
fn an_answer_sent_before_it_was_asked_for_is_none() {
    let keys = keys(1);
    let hub = probing_hub(&keys);
    let raw = RawNode::join(&keys, 0, hub.local_addr());
    assert!(hub.wait_ready(1, LONG));
    let (mut send, _recv, probe) = accept_probe(&raw);
    // The next number would be this one, if numbers were counted.
    let both = [probed(&raw, probe.id, 0), probed(&raw, probe.id.wrapping_add(1), 0)].concat();
    raw.write(&mut send, &both);
    wait_for_failure(&hub, 0);
    assert_eq!(hub.nodes()[0].counters.probes, 1);
    assert!(hub.wait_until(LONG, |cluster| link(cluster) == LinkSpeed::default()));
}
