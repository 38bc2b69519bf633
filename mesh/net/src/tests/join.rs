//! Joining over sockets: what a token opens, and what everything that looks like it does not.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use quinn::{Connection, ConnectionError, Endpoint, RecvStream, SendStream};
use tokio::runtime::Runtime;
use tokio::time::Instant;

use super::harness::{Keys, LONG, Running, call_and_check, hub, keys, listen_anywhere, runtime};
use crate::authority::Authority;
use crate::endpoint::{self, Close, Listener};
use crate::hub::Hub;
use crate::identity::Identity;
use crate::join::{
    self, Doorway, EXPORTER_LABEL, JOINS_MAX, JoinError, MESSAGE_BYTES_MAX, STATEMENT_BYTES, join,
};
use crate::membership::Membership;
use crate::roster::Role;
use crate::tickets::Refused;
use crate::tls::{Gate, SERVER_NAME};
use crate::token::Token;

const HOUR: Duration = Duration::from_secs(3600);

fn token(hub: &Hub) -> Token {
    hub.authority().issue(HOUR, vec![hub.local_addr()]).unwrap()
}

/// A token of this authority with another's address.
fn token_for(authority: &Authority, address: SocketAddr) -> Token {
    authority.issue(HOUR, vec![address]).unwrap()
}

fn identity() -> Identity {
    Identity::generate().unwrap()
}

fn refusal(outcome: Result<crate::membership::Admission, JoinError>) -> Refused {
    match outcome.unwrap_err() {
        JoinError::Refused(refused) => refused,
        other => panic!("{other}"),
    }
}

#[test]
fn a_machine_joins_a_running_router_with_a_token_and_serves() {
    let keys = keys(0);
    let hub = hub(&keys);
    let (first, token) = (identity(), token(&hub));
    let text = format!(" {}\n", token.to_string().to_uppercase());
    let admission = join(&first, &text.parse().unwrap(), "küche").unwrap();
    assert_eq!((admission.cluster, admission.router), (keys.authority.cluster(), keys.router()));
    assert_eq!((admission.name.as_str(), &admission.addresses[..]), ("küche", &[hub.local_addr()][..]));
    // The addresses are those of the token.
    let _station = Running::of(Arc::new(Membership::in_memory(first.clone(), admission.clone())), vec![]);
    assert!(hub.wait_ready(1, LONG));
    call_and_check(&hub, 2);
    assert_eq!((hub.nodes()[0].name.as_str(), hub.nodes()[0].id), ("küche", first.id()));
    // Another machine with the same token, and with another one and the same name, while calls go on.
    assert_eq!(refusal(join(&identity(), &token, "pi")), Refused::Used);
    let second = identity();
    let admission = join(&second, &self::token(&hub), "küche").unwrap();
    assert_eq!(admission.name, "küche-2");
    let _other = Running::of(Arc::new(Membership::in_memory(second, admission)), vec![]);
    assert!(hub.wait_ready(2, LONG));
    call_and_check(&hub, 2);
    // The first machine may ask again: it is told the same.
    assert_eq!(join(&first, &token, "küche").unwrap().name, "küche");
    assert_eq!(keys.authority.roster().roster().nodes.len(), 2);
}

#[test]
fn a_hundred_machines_join_at_once_with_one_token_and_one_gets_in() {
    let keys = keys(0);
    let hub = hub(&keys);
    let token = token(&hub);
    let threads: Vec<_> = (0..100)
        .map(|_| {
            let token = token.clone();
            std::thread::spawn(move || join(&identity(), &token, "pi"))
        })
        .collect();
    let outcomes: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
    for outcome in outcomes {
        // Told that it is used, or so often that too many come at once that it gave up.
        let known = |error| matches!(error, JoinError::Refused(Refused::Used) | JoinError::Unreachable(_));
        assert!(outcome.is_ok() || known(outcome.unwrap_err()));
    }
    assert_eq!(keys.authority.roster().roster().nodes.len(), 1);
    assert_eq!(hub.nodes().len(), 1);
}

#[test]
fn tokens_of_nobody_and_of_other_clusters_are_refused_by_the_right_side() {
    let keys = keys(0);
    let hub = hub(&keys);
    let invented =
        Token::generate(keys.authority.cluster(), Role::Node, u64::MAX, vec![hub.local_addr()]).unwrap();
    assert_eq!(refusal(join(&identity(), &invented, "pi")), Refused::Unknown);
    let other = Authority::in_memory().unwrap();
    let foreign = token_for(&other, hub.local_addr());
    let error = join(&identity(), &foreign, "pi").unwrap_err();
    assert!(matches!(&error, JoinError::Impostor { what, .. } if what.contains("another key")), "{error}");
    assert!(error.to_string().contains("nothing was given away"), "{error}");
    assert!(matches!(join(&identity(), &token(&hub), "a b").unwrap_err(), JoinError::Name(_)));
    let revoked = identity();
    keys.authority.admit("gone", revoked.id()).unwrap();
    hub.revoke("gone").unwrap();
    assert_eq!(refusal(join(&revoked, &token(&hub), "back")), Refused::Revoked);
    // Each of them counts, once its connection has ended.
    while hub.counters().joins_refused < 3 {
        std::thread::yield_now();
    }
    assert_eq!(hub.counters().joined, 0);
}

#[test]
fn the_second_address_is_tried_where_the_first_is_another_clusters_router() {
    let (keys, others) = (keys(0), keys(0));
    let (hub, other) = [&keys, &others].map(hub).into();
    let addresses = vec![other.local_addr(), hub.local_addr()];
    let token = keys.authority.issue(HOUR, addresses).unwrap();
    join(&identity(), &token, "pi").unwrap();
    assert_eq!((hub.counters().joined, other.counters().joined), (1, 0));
}

/// A router that says what the test wants, on a key of its own, and counts what it is told.
fn impostor(statement: Vec<u8>) -> (SocketAddr, std::thread::JoinHandle<usize>) {
    let runtime = runtime();
    let (own, members) = (identity(), keys(0).authority.members());
    let listener = {
        let _entered = runtime.enter();
        Listener::behind(Gate::new(&own, members).unwrap(), &own, listen_anywhere()).unwrap()
    };
    let address = listener.endpoint.local_addr().unwrap();
    let heard = std::thread::spawn(move || {
        runtime.block_on(async {
            let connection = listener.accept(listener.endpoint.accept().await.unwrap()).await.unwrap();
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            send.write_all(&statement).await.unwrap();
            let mut heard = 0;
            let mut buffer = [0; 64];
            // On the stream it opened, and on any the machine might open.
            loop {
                tokio::select! {
                    read = recv.read(&mut buffer) => match read {
                        Ok(Some(count)) => heard += count,
                        _ => break heard,
                    },
                    opened = connection.accept_bi() => match opened {
                        Ok(_) => heard += 1,
                        Err(_) => break heard,
                    },
                }
            }
        })
    });
    (address, heard)
}

#[test]
fn someone_in_the_middle_never_gets_a_proof() {
    let keys = keys(0);
    let real = join::statement(&keys.authority);
    let own = Authority::in_memory().unwrap();
    let mut forged = real.clone();
    // The real cluster, this peer's router key, the real signature.
    forged[52] ^= 1;
    for (statement, part) in [
        // Word for word what the real router says.
        (real.clone(), "passes on"),
        (join::statement(&own), "another key"),
        (forged, "signature is missing"),
        (vec![0; STATEMENT_BYTES], "another version"),
    ] {
        let (address, heard) = impostor(statement);
        let error = join(&identity(), &token_for(&keys.authority, address), "pi").unwrap_err();
        assert!(matches!(&error, JoinError::Impostor { what, .. } if what.contains(part)), "{error}");
        assert_eq!(heard.join().unwrap(), 0, "something was told to an impostor that {part}");
    }
}

/// A machine that joins and whose every byte the test writes.
struct RawJoiner {
    runtime: Runtime,
    endpoint: Endpoint,
    identity: Identity,
    connection: Connection,
    streams: (SendStream, RecvStream),
}

impl RawJoiner {
    /// Connects as soon as there is a place.
    fn connect(router: SocketAddr) -> RawJoiner {
        let (runtime, identity) = (runtime(), identity());
        let (endpoint, connection, streams) = runtime.block_on(async {
            let endpoint = endpoint::joiner(&identity, false).unwrap();
            loop {
                let connection = endpoint.connect(router, SERVER_NAME).unwrap().await.unwrap();
                let Ok(mut streams) = connection.accept_bi().await else { continue };
                let mut statement = [0; STATEMENT_BYTES];
                streams.1.read_exact(&mut statement).await.unwrap();
                break (endpoint, connection, streams);
            }
        });
        RawJoiner { runtime, endpoint, identity, connection, streams }
    }

    /// What this machine would have to say on this connection.
    fn request(&self, token: &Token, role: u8) -> Vec<u8> {
        let mut exported = [0; 32];
        self.connection.export_keying_material(&mut exported, EXPORTER_LABEL, b"").unwrap();
        join::request(&self.identity, (token, role, "pi"), &exported).unwrap()
    }

    /// Says this and hears the code of the answer; `None` where the router closed instead.
    fn ask(mut self, request: &[u8]) -> Option<u8> {
        self.runtime.block_on(async {
            self.streams.0.write_all(request).await.ok()?;
            self.streams.0.finish().ok()?;
            let answer = self.streams.1.read_to_end(MESSAGE_BYTES_MAX).await.ok()?;
            answer.strip_prefix(b"moemesh-answer-1\n")?.first().copied()
        })
    }
}

impl Drop for RawJoiner {
    fn drop(&mut self) {
        self.connection.close(Close::Goodbye.into(), b"");
        self.runtime.block_on(self.endpoint.wait_idle());
    }
}

#[test]
fn a_proof_is_worth_nothing_on_another_connection_or_with_another_word_in_it() {
    let keys = keys(0);
    let hub = hub(&keys);
    let token = token(&hub);
    let overheard = RawJoiner::connect(hub.local_addr()).request(&token, 1);
    let again = RawJoiner::connect(hub.local_addr());
    assert_eq!(again.ask(&overheard), Some(Refused::Proof as u8));
    // Role, token, proof, name.
    for at in [16, 17, 49, 112, 113] {
        let raw = RawJoiner::connect(hub.local_addr());
        let mut changed = raw.request(&token, 1);
        changed[at] ^= 1;
        assert_eq!(raw.ask(&changed), Some(Refused::Proof as u8), "{at}");
    }
    let raw = RawJoiner::connect(hub.local_addr());
    let other_role = raw.request(&token, 2);
    assert_eq!(raw.ask(&other_role), Some(Refused::Role as u8));
    for cut in [0, 1, 112] {
        let raw = RawJoiner::connect(hub.local_addr());
        let request = raw.request(&token, 1);
        assert_eq!(raw.ask(&request[..cut]), Some(Refused::Version as u8), "{cut}");
    }
    let raw = RawJoiner::connect(hub.local_addr());
    assert_eq!(raw.ask(&[b'x'; MESSAGE_BYTES_MAX + 1]), None);
    assert!(keys.authority.roster().roster().nodes.is_empty());
    let raw = RawJoiner::connect(hub.local_addr());
    let right = raw.request(&token, 1);
    assert_eq!(raw.ask(&right), Some(0));
}

#[test]
fn strangers_who_say_nothing_are_cut_off_and_do_not_keep_others_out() {
    let keys = keys(0);
    let hub = hub(&keys);
    let silent: Vec<_> = (0..JOINS_MAX).map(|_| RawJoiner::connect(hub.local_addr())).collect();
    // All places are taken: one more is told so at once.
    let runtime = runtime();
    let closed = runtime.block_on(async {
        let endpoint = endpoint::joiner(&identity(), false).unwrap();
        match endpoint.connect(hub.local_addr(), SERVER_NAME).unwrap().await {
            Ok(connection) => connection.closed().await,
            Err(error) => error,
        }
    });
    let busy = quinn::VarInt::from(Close::Busy);
    assert!(matches!(closed, ConnectionError::ApplicationClosed(close) if close.error_code == busy));
    // It only has to wait until they are cut off.
    join(&identity(), &token(&hub), "pi").unwrap();
    for raw in silent {
        let closed = raw.runtime.block_on(raw.connection.closed());
        assert!(matches!(closed, ConnectionError::ApplicationClosed(_)), "{closed:?}");
    }
}

#[test]
fn joins_are_bounded_at_a_time_and_per_second() {
    let start = Instant::now();
    let mut doorway = Doorway::new(start);
    let places: Vec<_> = (0..JOINS_MAX).map(|_| doorway.enter(start).unwrap()).collect();
    assert!(doorway.enter(start).is_none());
    drop(places);
    // Sixteen are left of the first twenty.
    for _ in 0..16 {
        assert!(doorway.enter(start).is_some());
    }
    assert!(doorway.enter(start).is_none());
    assert!(doorway.enter(start + Duration::from_millis(99)).is_none());
    assert!(doorway.enter(start + Duration::from_millis(201)).is_some());
    assert!(doorway.enter(start + Duration::from_millis(201)).is_some());
    assert!(doorway.enter(start + Duration::from_millis(201)).is_none());
    let long_after = start + LONG;
    assert_eq!((0..100).filter(|_| doorway.enter(long_after).is_some()).count(), 20);
}

#[test]
fn a_wrong_address_is_named() {
    let keys: Keys = keys(0);
    let nowhere = std::net::UdpSocket::bind(listen_anywhere()).unwrap();
    let address = nowhere.local_addr().unwrap();
    // Nobody listens there once it is closed, so the system says so, or nobody answers.
    let error = join(&identity(), &token_for(&keys.authority, address), "pi").unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&address.to_string()) && text.contains("is it running"), "{text}");
}
