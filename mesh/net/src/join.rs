//! How a machine gets into the cluster: one exchange, both sides of it.
//!
//! The router speaks first: the cluster's public key, and a statement signed by it that names the router's key. The
//! machine checks that the key is the one its token is about (by the full hash), that the signature is right, and
//! that the peer it shook hands with owns the router's key. Only then does it prove the token, by a signature over
//! the connection's exported keying material, its own key and what it wants to be. A proof is worth nothing on any
//! other connection, and nobody but the cluster's router ever gets one: someone in the middle with a certificate of
//! his own is noticed before. The router answers with the name it gives, or with a reason.
//!
//! Until then the peer is a stranger, so it gets one small message each way, a few seconds, and a place among a few;
//! beyond a rate it is told to come back later, which the other side here does by itself. Nothing else is served on
//! such a connection. The price of the order: the router tells any stranger its cluster's public key.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use mesh_wire::id::NodeId;
use quinn::{Connection, ConnectionError, RecvStream, SendStream};
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout};

use crate::authority::Authority;
use crate::endpoint::{self, Close, EndpointError, has_left, peer_key};
use crate::identity::Identity;
use crate::keys::{KeyError, SIGNATURE_BYTES, random, verify};
use crate::membership::Admission;
use crate::roster::{Machine, check_name};
use crate::throttle::Throttle;
use crate::tickets::{Now, Refused};
use crate::tls::SERVER_NAME;
use crate::token::{Token, cluster_hash};

/// Bytes either side may say.
pub const MESSAGE_BYTES_MAX: usize = 1024;

/// Time for the whole exchange.
pub const EXCHANGE_WITHIN: Duration = Duration::from_secs(5);

/// Exchanges under way at a time.
pub const JOINS_MAX: usize = 4;

/// Exchanges that may begin per second in the long run, and at once after a pause. Each costs the router three
/// signatures and two synced files, and no operator adds machines faster.
pub const JOINS_PER_SECOND: f64 = 10.0;
const JOINS_BURST: f64 = 20.0;

/// Time to reach one address.
const DIAL_WITHIN: Duration = Duration::from_secs(3);

/// How long a machine goes on trying where the router is busy.
const TRY_FOR: Duration = Duration::from_secs(20);

/// Rounds through all addresses after which a router that is not busy counts as not there.
const SILENT_ROUNDS_MAX: u32 = 3;

/// First pause between such attempts, and the longest one; each doubled and drawn anew between half and whole.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Version of the exchange, in every message's first bytes.
const STATEMENT_TAG: &[u8; 20] = b"moemesh-statement-1\n";
const PROOF_TAG: &[u8; 16] = b"moemesh-proof-1\n";
const ANSWER_TAG: &[u8; 17] = b"moemesh-answer-1\n";

/// What the keying material is exported for.
pub(crate) const EXPORTER_LABEL: &[u8] = b"EXPORTER moemesh join";

/// Bytes of a statement: tag, cluster, router, epoch, signature.
pub const STATEMENT_BYTES: usize = STATEMENT_TAG.len() + 32 + 32 + 8 + SIGNATURE_BYTES;

/// Bytes of a request before the name: tag, role, token, proof.
const REQUEST_HEAD_BYTES: usize = PROOF_TAG.len() + 1 + 32 + SIGNATURE_BYTES;

/// Why a machine did not get in.
#[derive(Debug, Error)]
pub enum JoinError {
    /// The router says why.
    #[error("the router refused: {0}")]
    Refused(Refused),
    /// Whoever answered is not the router of the token's cluster.
    #[error(
        "{address} is not a router of this token's cluster ({what}); nothing was given away. Check the address, and \
         make a new token with `moemesh token` if the cluster is new"
    )]
    Impostor {
        /// Where it answered.
        address: SocketAddr,
        /// What is wrong.
        what: &'static str,
    },
    /// None of the addresses answers.
    #[error(
        "no router was reached: {0}; is it running, is UDP to that port let through, is the address right?"
    )]
    Unreachable(String),
    /// Its name is not one.
    #[error(transparent)]
    Name(#[from] crate::roster::RosterError),
    /// No key can be had.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No socket can be had.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// No runtime.
    #[error("starting the network: {0}")]
    Runtime(#[from] std::io::Error),
}

/// How many join at this moment, and whether more may.
#[derive(Debug)]
pub(crate) struct Doorway {
    inside: Arc<AtomicUsize>,
    /// Exchanges that may begin now, and since when that number holds.
    allowed: (f64, Instant),
}

/// A place among those that join, while it lives.
#[derive(Debug)]
pub(crate) struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Doorway {
    pub(crate) fn new(now: Instant) -> Doorway {
        Doorway { inside: Arc::default(), allowed: (JOINS_BURST, now) }
    }

    /// A place for one more; `None` where too many join.
    pub(crate) fn enter(&mut self, now: Instant) -> Option<Place> {
        let (allowed, since) = self.allowed;
        let grown = now.saturating_duration_since(since).as_secs_f64() * JOINS_PER_SECOND;
        let allowed = (allowed + grown).min(JOINS_BURST);
        let is_free = self.inside.load(Ordering::Relaxed) < JOINS_MAX && allowed >= 1.0;
        self.allowed = (if is_free { allowed - 1.0 } else { allowed }, now);
        is_free.then(|| {
            self.inside.fetch_add(1, Ordering::Relaxed);
            Place(Arc::clone(&self.inside))
        })
    }
}

/// The router's side: one exchange with a stranger. The machine that was let in, if it was.
/// Refusals are written down as `refusals` allows.
pub(crate) async fn serve(
    connection: &Connection,
    authority: &Arc<Authority>,
    refusals: &Throttle,
) -> Option<Machine> {
    let outcome = timeout(EXCHANGE_WITHIN, exchange(connection, authority)).await;
    let (admitted, reason) = match outcome {
        Ok(Ok(admitted)) => (admitted, "the exchange is over".to_owned()),
        Ok(Err(reason)) => (None, reason),
        Err(_) => (None, format!("joining takes at most {} s", EXCHANGE_WITHIN.as_secs())),
    };
    let address = connection.remote_address();
    match &admitted {
        Some(machine) => {
            let (name, key) = (&machine.name, machine.key.to_hex());
            tracing::info!(%address, name, key, "a machine joined the cluster");
        }
        None if !has_left(connection) && refusals.admits(std::time::Instant::now()) => {
            tracing::warn!(%address, reason, "a machine did not join the cluster");
        }
        None => tracing::debug!(%address, reason, "a machine did not join the cluster"),
    }
    connection.close(Close::Goodbye.into(), reason.as_bytes());
    admitted
}

async fn exchange(connection: &Connection, authority: &Arc<Authority>) -> Result<Option<Machine>, String> {
    let broken = |error: &dyn std::fmt::Display| error.to_string();
    let key = peer_key(connection).ok_or("no key")?;
    let (mut send, mut recv) = connection.open_bi().await.map_err(|error| broken(&error))?;
    send.write_all(&statement(authority)).await.map_err(|error| broken(&error))?;
    let request = recv.read_to_end(MESSAGE_BYTES_MAX).await.map_err(|error| broken(&error))?;
    let exported = export(connection)?;
    let deciding = Arc::clone(authority);
    // Saving is for a thread that may wait.
    let decided = tokio::task::spawn_blocking(move || decide(&deciding, &request, &exported, key));
    let decided = decided.await.unwrap_or(Err(Refused::Failed));
    send.write_all(&answer(&decided)).await.map_err(|error| broken(&error))?;
    if send.finish().is_ok() {
        // Either it has the answer, or the connection broke: it is over in any case.
        drop(send.stopped().await);
    }
    match decided {
        Ok(machine) => Ok(Some(machine)),
        Err(refused) => Err(refused.to_string()),
    }
}

/// What the router says first: tag, cluster, router, epoch of its roster, the cluster's signature.
pub fn statement(authority: &Authority) -> Vec<u8> {
    let roster = authority.roster();
    let mut bytes = Vec::with_capacity(STATEMENT_BYTES);
    bytes.extend(STATEMENT_TAG);
    bytes.extend(authority.cluster().0);
    bytes.extend(authority.identity().id().0);
    bytes.extend(roster.roster().epoch.to_le_bytes());
    bytes.extend(authority.sign(&bytes));
    bytes
}

fn export(connection: &Connection) -> Result<[u8; 32], String> {
    let mut material = [0; 32];
    let exported = connection.export_keying_material(&mut material, EXPORTER_LABEL, b"");
    exported.map(|()| material).map_err(|_| "no keying material".to_owned())
}

/// What a machine signs with its token's key.
fn proof_message(exported: &[u8; 32], key: NodeId, role: u8, name: &str) -> Vec<u8> {
    [&PROOF_TAG[..], exported, &key.0, &[role], name.as_bytes()].concat()
}

/// The router's side of a request that came over a connection with this keying material from a peer with this key:
/// the machine that is in now.
///
/// # Errors
/// Why it is not let in; then nothing has changed.
pub fn decide(
    authority: &Authority,
    request: &[u8],
    exported: &[u8; 32],
    key: NodeId,
) -> Result<Machine, Refused> {
    let (head, name) = request.split_first_chunk::<REQUEST_HEAD_BYTES>().ok_or(Refused::Version)?;
    let (tag, head) = head.split_at(PROOF_TAG.len());
    let (role, ticket, proof) = (head[0], &head[1..33], &head[33..]);
    let ticket = NodeId(ticket.try_into().map_err(|_| Refused::Version)?);
    if tag != PROOF_TAG {
        return Err(Refused::Version);
    }
    let name = std::str::from_utf8(name).map_err(|_| Refused::Name)?;
    if !verify(ticket, &proof_message(exported, key, role, name), proof) {
        return Err(Refused::Proof);
    }
    authority.redeem(ticket, role, (name, key), Now::read())
}

/// What the machine is told: code 0 and the name that was given, or the code of a reason.
pub fn answer(decided: &Result<Machine, Refused>) -> Vec<u8> {
    let (code, text) = match decided {
        Ok(machine) => (0, machine.name.as_str()),
        Err(refused) => (*refused as u8, ""),
    };
    [&ANSWER_TAG[..], &[code], text.as_bytes()].concat()
}

/// The machine's side of an answer: the name it is given.
///
/// # Errors
/// Why it is not let in; `Version` for what is no answer.
pub fn read_answer(bytes: &[u8]) -> Result<String, Refused> {
    let rest = bytes.strip_prefix(ANSWER_TAG).ok_or(Refused::Version)?;
    match rest.split_first() {
        Some((0, name)) => match std::str::from_utf8(name) {
            Ok(name) if check_name(name).is_ok() => Ok(name.to_owned()),
            _ => Err(Refused::Version),
        },
        Some((code, _)) => Err(Refused::from_code(*code).unwrap_or(Refused::Version)),
        None => Err(Refused::Version),
    }
}

/// How an attempt to join ended without success.
enum Failure {
    /// The router has no place right now.
    Busy(String),
    /// Another attempt may do better.
    Again(String),
    /// It will not.
    Final(JoinError),
}

impl Failure {
    fn broken(error: impl std::fmt::Display) -> Failure {
        Failure::Again(error.to_string())
    }

    /// What the end of a connection means.
    fn closed(error: ConnectionError) -> Failure {
        let busy = match &error {
            ConnectionError::ApplicationClosed(closed) => closed.error_code == Close::Busy.into(),
            // Turned away before the handshake.
            ConnectionError::ConnectionClosed(closed) => {
                closed.error_code == quinn::TransportErrorCode::CONNECTION_REFUSED
            }
            _ => false,
        };
        if busy { Failure::Busy("too many machines join at once".to_owned()) } else { Failure::broken(error) }
    }
}

/// The machine's side: joins with this key, called `name` if that is free. Blocks for some seconds at most, on a
/// runtime of its own.
///
/// # Errors
/// `JoinError`.
pub fn join(identity: &Identity, token: &Token, name: &str) -> Result<Admission, JoinError> {
    check_name(name)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(try_addresses(identity, token, name))
}

async fn try_addresses(identity: &Identity, token: &Token, name: &str) -> Result<Admission, JoinError> {
    let mut whys = Vec::new();
    let mut impostor = None;
    let started = Instant::now();
    let mut silent = 0;
    for attempt in 0_u32.. {
        whys.clear();
        let mut busy = false;
        for address in &token.addresses {
            match attempt_at(*address, identity, token, name).await {
                Ok(admission) => return Ok(admission),
                // The next address may be the right one.
                Err(Failure::Final(error @ JoinError::Impostor { .. })) => impostor = Some(error),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(why)) => whys.push(format!("{address}: {why}")),
                Err(Failure::Busy(why)) => {
                    busy = true;
                    whys.push(format!("{address}: {why}"));
                }
            }
        }
        silent += u32::from(!busy);
        if whys.is_empty() || silent >= SILENT_ROUNDS_MAX || started.elapsed() >= TRY_FOR {
            break;
        }
        let pause = PAUSE_FIRST.saturating_mul(1 << attempt.min(10)).min(PAUSE_MAX);
        let [dice] = random()?;
        sleep(pause.mul_f64(0.5 + f64::from(dice) / 510.0)).await;
    }
    Err(impostor.unwrap_or_else(|| JoinError::Unreachable(whys.join(", "))))
}

async fn attempt_at(
    address: SocketAddr,
    identity: &Identity,
    token: &Token,
    name: &str,
) -> Result<Admission, Failure> {
    let endpoint =
        endpoint::joiner(identity, address.is_ipv6()).map_err(|error| Failure::Final(error.into()))?;
    let connecting = endpoint.connect(address, SERVER_NAME).map_err(Failure::broken)?;
    let connection = match timeout(DIAL_WITHIN, connecting).await {
        Ok(connected) => connected.map_err(Failure::closed)?,
        Err(_) => return Err(Failure::Again(format!("no answer within {} s", DIAL_WITHIN.as_secs()))),
    };
    let asking = timeout(EXCHANGE_WITHIN, ask(&connection, identity, token, name));
    let asked = asking.await.unwrap_or_else(|_| Err(Failure::Again("the router said nothing".to_owned())));
    connection.close(Close::Goodbye.into(), b"");
    // Lets the close leave; a peer that is gone does not hold us up.
    drop(timeout(Duration::from_millis(200), endpoint.wait_idle()).await);
    asked
}

async fn ask(
    connection: &Connection,
    identity: &Identity,
    token: &Token,
    name: &str,
) -> Result<Admission, Failure> {
    let address = connection.remote_address();
    let (send, mut recv) = connection.accept_bi().await.map_err(Failure::closed)?;
    let mut stated = [0; STATEMENT_BYTES];
    recv.read_exact(&mut stated).await.map_err(Failure::broken)?;
    let impostor = |what| Failure::Final(JoinError::Impostor { address, what });
    let (cluster, router) = check_statement(&stated, token, peer_key(connection)).map_err(impostor)?;
    let exported = export(connection).map_err(Failure::Again)?;
    let given = prove(send, recv, identity, (token, name, &exported)).await?;
    Ok(Admission { cluster, router, name: given, addresses: token.addresses.clone() })
}

/// The cluster's and the router's key, if whoever stated them is the router of the token's cluster.
///
/// # Errors
/// What shows that it is not, or that it cannot be told.
pub fn check_statement(
    stated: &[u8; STATEMENT_BYTES],
    token: &Token,
    peer: Option<NodeId>,
) -> Result<(NodeId, NodeId), &'static str> {
    let (cluster, router) = read_statement(stated)?;
    if cluster_hash(cluster) != token.cluster {
        return Err("its cluster has another key");
    }
    if peer != Some(router) {
        return Err("it passes on what the real router says");
    }
    Ok((cluster, router))
}

/// The cluster's and the router's key in a statement that the cluster's key has signed.
pub(crate) fn read_statement(stated: &[u8; STATEMENT_BYTES]) -> Result<(NodeId, NodeId), &'static str> {
    let (message, signature) = stated.split_at(STATEMENT_BYTES - SIGNATURE_BYTES);
    let fields = message.strip_prefix(STATEMENT_TAG).ok_or("it speaks another version of joining")?;
    let field = |at: usize| fields[at..at + 32].try_into().map(NodeId).map_err(|_| "it is cut");
    let (cluster, router) = (field(0)?, field(32)?);
    if !verify(cluster, message, signature) {
        return Err("the cluster's signature is missing");
    }
    Ok((cluster, router))
}

/// What a machine says to become `role` and be called `name`: tag, role, token, proof, name.
///
/// # Errors
/// `Random`; there is no token for which that happens.
pub fn request(
    identity: &Identity,
    (token, role, name): (&Token, u8, &str),
    exported: &[u8; 32],
) -> Result<Vec<u8>, KeyError> {
    let key = token.key()?;
    let proof = key.sign(&proof_message(exported, identity.id(), role, name));
    Ok([&PROOF_TAG[..], &[role], &key.public().0, &proof, name.as_bytes()].concat())
}

async fn prove(
    mut send: SendStream,
    mut recv: RecvStream,
    identity: &Identity,
    (token, name, exported): (&Token, &str, &[u8; 32]),
) -> Result<String, Failure> {
    let request = request(identity, (token, token.role as u8, name), exported)
        .map_err(|error| Failure::Final(error.into()))?;
    send.write_all(&request).await.map_err(Failure::broken)?;
    // Fails on a closed stream only, which the read notices.
    drop(send.finish());
    let answered = recv.read_to_end(MESSAGE_BYTES_MAX).await.map_err(Failure::broken)?;
    read_answer(&answered).map_err(|refused| Failure::Final(JoinError::Refused(refused)))
}
