//! A machine that has a node's certificate, which is no secret, and not its key.
//!
//! It shows the certificate of the node whose state folder it is given and signs with a key of its own, as often as it
//! is told, and prints how each attempt ended as one line of JSON: `{"refused": {reason: times}, "let_in": times}`. With
//! `--own-key` it signs with the node's key: then it must get as far as any node does, which shows that the signature is
//! what the others failed by. It is for tests; no release contains it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for tests")]

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use mesh_net::identity::Identity;
use mesh_net::membership::{Membership, Opened};
use mesh_net::tls;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, Endpoint};
use rustls::client::ResolvesClientCert;
use rustls::sign::CertifiedKey;

/// A router that lets somebody in says nothing until it is spoken to; one that does not ends the connection at once.
const LET_IN_AFTER: Duration = Duration::from_secs(2);

/// Shows one machine's certificate and signs with another's key.
#[derive(Debug)]
struct Thief(Arc<CertifiedKey>);

impl ResolvesClientCert for Thief {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

/// What came of one attempt: the reason of the refusal, if it was one.
async fn attempt(endpoint: &Endpoint, router: SocketAddr) -> Result<(), String> {
    let connecting = endpoint.connect(router, "moemesh").map_err(|error| error.to_string())?;
    let reason = match connecting.await {
        Err(error) => error,
        // A client is done with its side of the handshake before the router has seen its signature.
        Ok(connection) => match tokio::time::timeout(LET_IN_AFTER, connection.closed()).await {
            Err(_) => return Ok(()),
            Ok(reason) => reason,
        },
    };
    Err(match reason {
        ConnectionError::ConnectionClosed(close) => format!("TLS: {}", close.error_code),
        ConnectionError::ApplicationClosed(close) => format!("closed with {}", close.error_code),
        other => other.to_string(),
    })
}

async fn run(state: &Path, router: SocketAddr, times: u32, own_key: bool) -> Result<(), String> {
    let say = |error: &dyn std::fmt::Display| error.to_string();
    let Opened::Member(membership) = Membership::open(state).map_err(|error| say(&error))? else {
        return Err(format!("{} is no member's folder", state.display()));
    };
    let victim = membership.identity();
    let own = Identity::generate().map_err(|error| say(&error))?;
    let mut tls = tls::client(if own_key { victim } else { &own }, membership.admission().router)
        .map_err(|error| say(&error))?;
    let key = tls.client_auth_cert_resolver.resolve(&[], &[]).ok_or("no key of its own")?;
    let shown = CertifiedKey::new(vec![victim.certificate()], Arc::clone(&key.key));
    tls.client_auth_cert_resolver = Arc::new(Thief(Arc::new(shown)));
    let quic = QuicClientConfig::try_from(tls).map_err(|error| say(&error))?;
    let mut endpoint =
        Endpoint::client(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))).map_err(|error| say(&error))?;
    endpoint.set_default_client_config(ClientConfig::new(Arc::new(quic)));
    let (mut refused, mut let_in) = (BTreeMap::<String, u32>::new(), 0);
    for _ in 0..times {
        match attempt(&endpoint, router).await {
            Ok(()) => let_in += 1,
            Err(reason) => *refused.entry(reason).or_default() += 1,
        }
    }
    println!("{}", serde_json::json!({"refused": refused, "let_in": let_in}));
    Ok(())
}

fn main() -> Result<(), String> {
    const USAGE: &str = "thief STATE-OF-A-NODE ROUTER TIMES [--own-key]";
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [state, router, times, more @ ..] = &arguments[..] else { return Err(USAGE.into()) };
    let router = router.parse().map_err(|_| USAGE)?;
    let times = times.parse().map_err(|_| USAGE)?;
    let own_key = more == ["--own-key"];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| error.to_string())?.block_on(run(Path::new(state), router, times, own_key))
}
