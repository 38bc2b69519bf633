//! What a router looks like from outside, and everything else that may be behind a port.

use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::mpsc::channel;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, ServerConfig};

use super::harness::{Keys, LONG, Running, call_and_check, hub, keys, listen_anywhere, runtime};
use crate::identity::Identity;
use crate::look::{Port, Stated, Turned, enter, introduce, is_there, knock, leaves_from};
use crate::tls::Gate;

#[test]
fn a_router_is_recognized_and_members_get_in() {
    let keys = keys(1);
    let hub = hub(&keys);
    let address = hub.local_addr();
    assert!(matches!(knock(address), Port::Quic { .. }), "{:?}", knock(address));
    let stated = Stated { cluster: keys.authority.cluster(), router: keys.router() };
    assert_eq!(introduce(address), Ok(stated));
    let entered = enter(address, &keys.nodes[0], keys.router()).unwrap();
    assert!(entered.packet_bytes > 1200, "loopback carries more: {entered:?}");
    // Nothing of it counts as a node that came, or as a machine that joined.
    assert_eq!((hub.counters().connections, hub.counters().joined), (0, 0));
    assert_eq!(leaves_from(address).unwrap(), address.ip());
}

#[test]
fn a_node_that_is_connected_is_not_disturbed() {
    let keys = keys(1);
    let hub = hub(&keys);
    let _node = Running::start(&keys, 0, vec![hub.local_addr()]);
    assert!(hub.wait_ready(1, LONG));
    call_and_check(&hub, 1);
    enter(hub.local_addr(), &keys.nodes[0], keys.router()).unwrap();
    call_and_check(&hub, 1);
    assert_eq!((hub.counters().connections, hub.counters().clones), (1, 0));
}

#[test]
fn who_does_not_belong_learns_why() {
    let keys = keys(2);
    let hub = hub(&keys);
    let (address, router) = (hub.local_addr(), keys.router());
    let stranger = Identity::generate().unwrap();
    assert_eq!(enter(address, &stranger, router), Err(Turned::Stranger));
    assert_eq!(enter(address, &keys.nodes[0], stranger.id()), Err(Turned::OtherKey));
    hub.revoke("node-1").unwrap();
    assert_eq!(enter(address, &keys.nodes[1], router), Err(Turned::Revoked));
    enter(address, &keys.nodes[0], router).unwrap();
}

/// An endpoint of this cluster's router whose protocols have other names.
fn of_another_version(keys: &Keys) -> Endpoint {
    let gate = Gate::new(keys.authority.identity(), keys.authority.members()).unwrap();
    let mut tls = gate.server().unwrap();
    tls.alpn_protocols = vec![b"moemesh/999".to_vec(), b"moemesh-join/999".to_vec()];
    let config = ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(tls).unwrap()));
    Endpoint::server(config, listen_anywhere()).unwrap()
}

#[test]
fn another_version_is_told_from_another_program() {
    let keys = keys(1);
    let runtime = runtime();
    let endpoint = {
        let _inside = runtime.enter();
        of_another_version(&keys)
    };
    let address = endpoint.local_addr().unwrap();
    let accepting = async move {
        while let Some(incoming) = endpoint.accept().await {
            incoming.await.unwrap_err();
        }
    };
    let (found, answered) = channel();
    std::thread::spawn({
        let (node, router) = (keys.nodes[0].clone(), keys.router());
        move || {
            let seen = (knock(address), introduce(address), enter(address, &node, router));
            found.send(seen).is_ok()
        }
    });
    let waited = runtime.block_on(async {
        tokio::select! {
            () = accepting => None,
            found = tokio::task::spawn_blocking(move || answered.recv()) => found.unwrap().ok(),
        }
    });
    let (port, introduced, entered) = waited.unwrap();
    assert!(matches!(port, Port::Quic { .. }), "{port:?}");
    assert_eq!((introduced, entered), (Err(Turned::Version), Err(Turned::Version)));
}

/// A bound socket that does with each packet what `answer` says; its address.
fn socket(answer: impl Fn(&[u8]) -> Option<Vec<u8>> + Send + 'static) -> SocketAddr {
    let socket = UdpSocket::bind(listen_anywhere()).unwrap();
    let address = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut packet = [0; 2048];
        while let Ok((length, from)) = socket.recv_from(&mut packet) {
            if let Some(answer) = answer(&packet[..length]) {
                socket.send_to(&answer, from).unwrap();
            }
        }
    });
    address
}

#[test]
fn a_closed_port_a_black_hole_and_another_program_are_told_apart() {
    let closed = UdpSocket::bind(listen_anywhere()).unwrap().local_addr().unwrap();
    assert_eq!(knock(closed), Port::Closed);
    assert_eq!(is_there(closed), Some(true), "the machine refuses TCP");
    let hole = socket(|_| None);
    assert_eq!(knock(hole), Port::Silent);
    let keys = keys(1);
    assert_eq!(introduce(hole), Err(Turned::Silent));
    assert_eq!(enter(hole, &keys.nodes[0], keys.router()), Err(Turned::Silent));
    let echo = socket(|packet| Some(packet.to_vec()));
    assert_eq!(knock(echo), Port::Other);
    // A version negotiation for somebody else's packet is no answer to this one; nor are bits of one.
    let guess =
        socket(|_| Some([&[0x80, 0, 0, 0, 0, 8][..], &[7; 8], &[8], &[7; 8], &[0, 0, 0, 1]].concat()));
    assert_eq!(knock(guess), Port::Other);
    assert_eq!(knock(socket(|_| Some(Vec::new()))), Port::Other);
    let large = socket(|packet| (packet.len() >= 1200).then(|| vec![0x80; 1400]));
    assert_eq!(knock(large), Port::Other, "the packet is as large as QUIC's first one");
}
