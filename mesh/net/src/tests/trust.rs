//! Who gets in: only a peer that owns a key of the roster, speaks this version, and proves both in TLS 1.3.

use std::sync::Arc;

use mesh_wire::frame::ALPN;
use quinn::{Connection, ConnectionError, Endpoint};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{ClientConfig, ServerConfig};

use super::harness::{Keys, LONG, RawNode, Running, hub, keys, listen_anywhere, runtime};
use crate::endpoint::{self, dialer_with, listen_with, peer_key};
use crate::identity::Identity;
use crate::tls::{self, SERVER_NAME};

/// Presents a certificate and signs with some other key.
#[derive(Debug)]
struct Thief(Arc<CertifiedKey>);

impl Thief {
    fn new(stolen: CertificateDer<'static>, own: PrivateKeyDer<'static>) -> Thief {
        let key: Arc<dyn SigningKey> = rustls::crypto::ring::sign::any_eddsa_type(&match own {
            PrivateKeyDer::Pkcs8(key) => key,
            _ => panic!("keys are PKCS #8"),
        })
        .unwrap();
        Thief(Arc::new(CertifiedKey::new(vec![stolen], key)))
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

impl rustls::server::ResolvesServerCert for Thief {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

/// What the router does with this client: the error that ends the connection, seen from either side.
fn dialed(keys: &Keys, client: ClientConfig) -> Result<(), ConnectionError> {
    let server = tls::server(&keys.router, keys.roster.nodes.iter().map(|node| node.key).collect()).unwrap();
    handshake(keys, server, client).map(drop)
}

fn handshake(
    keys: &Keys,
    server: ServerConfig,
    client: ClientConfig,
) -> Result<(Connection, Connection), ConnectionError> {
    let runtime = runtime();
    runtime.block_on(async {
        let listener = listen_with(&keys.router, server, listen_anywhere()).unwrap();
        let dialer = dialer_with(&keys.nodes[0], client, false).unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = async { listener.accept().await.unwrap().await };
        let dialing = async { dialer.connect(address, SERVER_NAME).unwrap().await };
        let (accepted, dialed) = tokio::join!(accepting, dialing);
        Ok((accepted?, dialed?))
    })
}

#[test]
fn a_key_of_the_roster_gets_in_and_is_recognized() {
    let keys = keys(2);
    let server = tls::server(&keys.router, keys.roster.nodes.iter().map(|node| node.key).collect()).unwrap();
    let client = tls::client(&keys.nodes[1], keys.router.id()).unwrap();
    let (at_router, at_node) = handshake(&keys, server, client).unwrap();
    assert_eq!(peer_key(&at_router), Some(keys.nodes[1].id()));
    assert_eq!(peer_key(&at_node), Some(keys.router.id()));
}

#[test]
fn an_unknown_key_does_not() {
    let keys = keys(1);
    let stranger = Identity::generate().unwrap();
    let error = dialed(&keys, tls::client(&stranger, keys.router.id()).unwrap()).unwrap_err();
    assert!(error.to_string().contains("certificate"), "{error}");
    // The router's own key is no node's.
    dialed(&keys, tls::client(&keys.router, keys.router.id()).unwrap()).unwrap_err();
}

#[test]
fn a_copied_certificate_without_its_key_does_not() {
    let keys = keys(1);
    let mut client = tls::client(&keys.nodes[0], keys.router.id()).unwrap();
    let stranger = Identity::generate().unwrap();
    client.client_auth_cert_resolver =
        Arc::new(Thief::new(keys.nodes[0].certificate(), stranger.private_key()));
    let error = dialed(&keys, client).unwrap_err();
    assert!(error.to_string().contains("BadSignature"), "{error}");
}

#[test]
fn no_certificate_does_not() {
    let keys = keys(1);
    let mut client = tls::client(&keys.nodes[0], keys.router.id()).unwrap();
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
    assert!(error.to_string().contains("certificate"), "{error}");
}

#[test]
fn a_false_router_is_noticed_by_the_node() {
    let keys = keys(1);
    let nodes = || keys.roster.nodes.iter().map(|node| node.key).collect::<Vec<_>>();
    let stranger = Identity::generate().unwrap();
    let client = || tls::client(&keys.nodes[0], keys.router.id()).unwrap();
    let false_router = tls::server(&stranger, nodes()).unwrap();
    handshake(&keys, false_router, client()).unwrap_err();
    let mut thief = tls::server(&keys.router, nodes()).unwrap();
    thief.cert_resolver = Arc::new(Thief::new(keys.router.certificate(), stranger.private_key()));
    let error = handshake(&keys, thief, client()).unwrap_err();
    assert!(error.to_string().contains("BadSignature"), "{error}");
}

#[test]
fn another_version_or_none_does_not_get_in() {
    let keys = keys(1);
    assert_eq!(ALPN, b"moemesh/2");
    for protocols in [vec![b"moemesh/1".to_vec()], vec![b"h3".to_vec()], vec![]] {
        let mut client = tls::client(&keys.nodes[0], keys.router.id()).unwrap();
        client.alpn_protocols = protocols;
        let error = dialed(&keys, client).unwrap_err();
        assert!(error.to_string().contains("protocol"), "{error}");
    }
}

#[test]
fn tls_12_is_neither_offered_nor_taken() {
    let keys = keys(1);
    let old: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS12];
    let provider = || Arc::new(rustls::crypto::ring::default_provider());
    let server = Arc::new(tls::server(&keys.router, vec![keys.nodes[0].id()]).unwrap());
    let client = Arc::new(tls::client(&keys.nodes[0], keys.router.id()).unwrap());
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
    let old_server = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(old)
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![keys.router.certificate()], keys.router.private_key())
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
    let mut strangers = keys(1);
    strangers.roster.router = known.roster.router.clone();
    let runtime = runtime();
    let closed = runtime.block_on(async {
        let dialer: Endpoint = endpoint::dialer(&strangers.nodes[0], known.router.id(), false).unwrap();
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
    let first = runtime();
    let listener =
        first.block_on(async { endpoint::listen(&keys.router, &keys.roster, listen_anywhere()).unwrap() });
    let address = listener.local_addr().unwrap();
    let accepting = first.spawn({
        let listener = listener.clone();
        async move { listener.accept().await.unwrap().await.unwrap() }
    });
    let raw = RawNode::connect(&keys, 0, address);
    let accepted = first.block_on(accepting).unwrap();
    // Without their runtime these cannot send a polite close any more; dropped, they free the port.
    first.shutdown_timeout(LONG);
    drop((accepted, listener));
    let second = runtime();
    let _listener = second.block_on(async { endpoint::listen(&keys.router, &keys.roster, address).unwrap() });
    let closed = raw.runtime.block_on(raw.connection.closed());
    assert!(matches!(closed, ConnectionError::Reset), "{closed:?}");
}
