//! Who gets in: only a peer that owns a key of the roster, speaks this version, and proves both in TLS 1.3.

use std::sync::Arc;

use mesh_wire::frame::ALPN;
use quinn::{Connection, ConnectionError, Endpoint};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{ClientConfig, ServerConfig};

use super::harness::{Keys, LONG, RawNode, Running, hub, keys, listen_anywhere, runtime};
use crate::endpoint::{self, Listener, dialer_with, peer_key, wants_to_join};
use crate::identity::Identity;
use crate::tls::{self, Gate, JOIN_ALPN, SERVER_NAME};

/// Presents a certificate and signs with some other key.
#[derive(Debug)]
struct Thief(Arc<CertifiedKey>);

impl Thief {
    fn new(stolen: CertificateDer<'static>, own: PrivateKeyDer<'static>) -> Thief {
        Thief(Arc::new(Thief::key(stolen, own)))
    }

    fn key(stolen: CertificateDer<'static>, own: PrivateKeyDer<'static>) -> CertifiedKey {
        let key: Arc<dyn SigningKey> = rustls::crypto::ring::sign::any_eddsa_type(&match own {
            PrivateKeyDer::Pkcs8(key) => key,
            _ => panic!("keys are PKCS #8"),
        })
        .unwrap();
        CertifiedKey::new(vec![stolen], key)
    }
}

impl rustls::client::ResolvesClientCert for Thief {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// What the router does with this client: the error that ends the connection, seen from either side.
fn dialed(keys: &Keys, client: ClientConfig) -> Result<(), String> {
    handshake(keys, gate(keys), client).map(drop)
}

fn gate(keys: &Keys) -> Gate {
    Gate::new(keys.authority.identity(), keys.authority.members()).unwrap()
}

/// A client of node 0 or any other key.
fn client(keys: &Keys, identity: &Identity) -> ClientConfig {
    tls::client(identity, keys.router()).unwrap()
}

fn handshake(keys: &Keys, gate: Gate, client: ClientConfig) -> Result<(Connection, Connection), String> {
    let runtime = runtime();
    runtime.block_on(async {
        let listener = Listener::behind(gate, keys.authority.identity(), listen_anywhere()).unwrap();
        let dialer = dialer_with(&keys.nodes[0], client, false).unwrap();
        let address = listener.endpoint.local_addr().unwrap();
        let accepting = async {
            let incoming = listener.endpoint.accept().await.unwrap();
            listener.accept(incoming).await
        };
        let dialing = async { dialer.connect(address, SERVER_NAME).unwrap().await };
        let (accepted, dialed) = tokio::join!(accepting, dialing);
        Ok((accepted?, dialed.map_err(|error| error.to_string())?))
    })
}

#[test]
fn a_key_of_the_roster_gets_in_and_is_recognized() {
    let keys = keys(2);
    let (at_router, at_node) = handshake(&keys, gate(&keys), client(&keys, &keys.nodes[1])).unwrap();
    assert_eq!(peer_key(&at_router), Some(keys.nodes[1].id()));
    assert_eq!(peer_key(&at_node), Some(keys.router()));
    assert!(!wants_to_join(&at_router));
}

#[test]
fn an_unknown_key_does_not() {
    let keys = keys(1);
    let stranger = Identity::generate().unwrap();
    let error = dialed(&keys, client(&keys, &stranger)).unwrap_err();
    assert!(error.contains("certificate"), "{error}");
    // The router's own key is no node's.
    dialed(&keys, client(&keys, keys.authority.identity())).unwrap_err();
}

#[test]
fn a_revoked_key_does_not_and_is_told() {
    let keys = keys(2);
    // The same gate, before and after.
    let gate = gate(&keys);
    handshake(&keys, gate.clone(), client(&keys, &keys.nodes[1])).unwrap();
    keys.authority.revoke("node-1").unwrap();
    let error = handshake(&keys, gate.clone(), client(&keys, &keys.nodes[1])).unwrap_err();
    assert!(error.contains("Revoked"), "{error}");
    handshake(&keys, gate, client(&keys, &keys.nodes[0])).unwrap();
}

#[test]
fn a_stranger_may_join_and_nothing_else_and_a_stranger_who_offers_both_may_nothing() {
    let keys = keys(1);
    let stranger = Identity::generate().unwrap();
    let mut joiner = tls::joiner(&stranger).unwrap();
    let (at_router, _) = handshake(&keys, gate(&keys), joiner.clone()).unwrap();
    assert!(wants_to_join(&at_router));
    for both in [[ALPN, JOIN_ALPN], [JOIN_ALPN, ALPN]] {
        joiner.alpn_protocols = both.map(<[u8]>::to_vec).to_vec();
        let error = dialed(&keys, joiner.clone()).unwrap_err();
        assert!(error.contains("certificate"), "{error}");
    }
    // A member may offer both and is a member.
    let mut member = client(&keys, &keys.nodes[0]);
    member.alpn_protocols = vec![JOIN_ALPN.to_vec(), ALPN.to_vec()];
    let (at_router, _) = handshake(&keys, gate(&keys), member).unwrap();
    assert!(!wants_to_join(&at_router));
    // Joining takes a signature, too.
    let mut thief = tls::joiner(&stranger).unwrap();
    let certificate = keys.nodes[0].certificate();
    thief.client_auth_cert_resolver = Arc::new(Thief::new(certificate, stranger.private_key()));
    let error = dialed(&keys, thief).unwrap_err();
    assert!(error.contains("BadSignature"), "{error}");
}

#[test]
fn a_copied_certificate_without_its_key_does_not() {
    let keys = keys(1);
    let mut client = client(&keys, &keys.nodes[0]);
    let stranger = Identity::generate().unwrap();
    client.client_auth_cert_resolver =
        Arc::new(Thief::new(keys.nodes[0].certificate(), stranger.private_key()));
    let error = dialed(&keys, client).unwrap_err();
    assert!(error.contains("BadSignature"), "{error}");
}

#[test]
fn no_certificate_does_not() {
    let keys = keys(1);
    let mut client = client(&keys, &keys.nodes[0]);
    #[derive(Debug)]
    struct Nobody;
    impl rustls::client::ResolvesClientCert for Nobody {
        fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
            None
        }
        fn has_certs(&self) -> bool {
            false
        }
    }
    client.client_auth_cert_resolver = Arc::new(Nobody);
    let error = dialed(&keys, client).unwrap_err();
    assert!(error.contains("certificate"), "{error}");
}

#[test]
fn a_false_router_is_noticed_by_the_node() {
    let keys = keys(1);
    let stranger = Identity::generate().unwrap();
    let false_router = Gate::new(&stranger, keys.authority.members()).unwrap();
    handshake(&keys, false_router, client(&keys, &keys.nodes[0])).unwrap_err();
    let router = keys.authority.identity().certificate();
    let thief = gate(&keys).showing(Thief::key(router, stranger.private_key()));
    let error = handshake(&keys, thief, client(&keys, &keys.nodes[0])).unwrap_err();
    assert!(error.contains("BadSignature"), "{error}");
}

#[test]
fn another_version_or_none_does_not_get_in() {
    let keys = keys(1);
    assert_eq!(ALPN, b"moemesh/3");
    for protocols in [vec![b"moemesh/1".to_vec()], vec![b"moemesh/2".to_vec()], vec![b"h3".to_vec()], vec![]]
    {
        let mut client = client(&keys, &keys.nodes[0]);
        client.alpn_protocols = protocols;
        let error = dialed(&keys, client).unwrap_err();
        assert!(error.contains("protocol"), "{error}");
    }
}

#[test]
fn tls_12_is_neither_offered_nor_taken() {
    let keys = keys(1);
    let old: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS12];
    let provider = || Arc::new(rustls::crypto::ring::default_provider());
    let server = Arc::new(gate(&keys).server().unwrap());
    let client = Arc::new(client(&keys, &keys.nodes[0]));
    // A client that speaks 1.2 only, against our server.
    let old_client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(old)
        .unwrap()
        .with_root_certificates(rustls::RootCertStore::empty())
        .with_no_client_auth();
    let name = ServerName::try_from(SERVER_NAME).unwrap();
    let mut dialing = rustls::ClientConnection::new(Arc::new(old_client), name.clone()).unwrap();
    let mut listening = rustls::ServerConnection::new(server).unwrap();
    let mut flight = Vec::new();
    dialing.write_tls(&mut flight).unwrap();
    listening.read_tls(&mut &flight[..]).unwrap();
    let error = listening.process_new_packets().unwrap_err();
    assert!(matches!(error, rustls::Error::PeerIncompatible(_)), "{error}");
    // Our client against a server that speaks 1.2 only.
    let router = keys.authority.identity();
    let old_server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(old)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![router.certificate()], router.private_key())
        .unwrap();
    let mut dialing = rustls::ClientConnection::new(client, name).unwrap();
    let mut listening = rustls::ServerConnection::new(Arc::new(old_server)).unwrap();
    let mut flight = Vec::new();
    dialing.write_tls(&mut flight).unwrap();
    listening.read_tls(&mut &flight[..]).unwrap();
    let error = listening.process_new_packets().unwrap_err();
    assert!(matches!(error, rustls::Error::PeerIncompatible(_)), "{error}");
}

#[test]
fn a_stranger_is_counted_and_the_router_serves_on() {
    let known = keys(1);
    let hub = hub(&known);
    let stranger = Identity::generate().unwrap();
    let runtime = runtime();
    let closed = runtime.block_on(async {
        let dialer: Endpoint = endpoint::dialer(&stranger, known.router(), false).unwrap();
        // In TLS 1.3 the client is done before the server has looked at its certificate.
        match dialer.connect(hub.local_addr(), SERVER_NAME).unwrap().await {
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        }
    });
    assert!(matches!(closed, ConnectionError::ConnectionClosed(_)), "{closed:?}");
    let _station = Running::start(&known, 0, vec![hub.local_addr()]);
    assert!(hub.wait_ready(1, LONG));
    let counters = hub.counters();
    assert_eq!((counters.connections, counters.handshakes_failed), (1, 1));
}

#[test]
fn a_router_that_died_and_was_restarted_tells_its_old_peers_at_once() {
    let keys = keys(1);
    // A process that is killed sends nothing: its runtime goes with the endpoint's driver, the socket closes.
    let (first, second) = (runtime(), runtime());
    let listen = |runtime: &tokio::runtime::Runtime, address| {
        let authority = &keys.authority;
        runtime
            .block_on(async { Listener::bind(authority.identity(), authority.members(), address).unwrap() })
    };
    let listener = listen(&first, listen_anywhere());
    let address = listener.endpoint.local_addr().unwrap();
    let accepting = first.spawn({
        let listener = listener.clone();
        async move { listener.accept(listener.endpoint.accept().await.unwrap()).await.unwrap() }
    });
    let raw = RawNode::connect(&keys, 0, address);
    let accepted = first.block_on(accepting).unwrap();
    // Without their runtime these cannot send a polite close any more; dropped, they free the port.
    first.shutdown_timeout(LONG);
    drop((accepted, listener));
    let _listener = listen(&second, address);
    let closed = raw.runtime.block_on(raw.connection.closed());
    assert!(matches!(closed, ConnectionError::Reset), "{closed:?}");
}
