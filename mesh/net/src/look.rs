//! What a router looks like from outside, for people who ask why two machines do not talk (`moemesh doctor net`).
//!
//! Three looks, each telling what the one before cannot. `knock` sends one packet of a QUIC version that does not exist:
//! whoever speaks QUIC must answer with the versions it has (RFC 9000 section 6), without a handshake, a key or a
//! trace in a log; no answer, or what the system says instead, tells a closed port from a firewall. `introduce` shakes
//! hands as a stranger who might join, and reads which cluster the router signs for. `enter` shakes hands with this
//! machine's own key and stops before the hello, so that a node that is connected at the same time is not disturbed:
//! whether the key is taken, how large packets get. Nothing is ever asked for, and nothing is kept.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use mesh_wire::id::NodeId;
use quinn::{Connection, ConnectionError, Endpoint};
use tokio::time::{sleep, timeout};

use crate::endpoint::{self, Close, EndpointError, TLS_ALERTS, any_port, is_revocation, peer_key};
use crate::identity::Identity;
use crate::join::{STATEMENT_BYTES, read_statement};
use crate::keys::{KeyError, random};
use crate::tls::SERVER_NAME;

/// Times a packet is sent; on a LAN one in ten thousand is lost, on bad Wi-Fi one in ten.
const KNOCKS: u32 = 3;

/// Wait for each answer: a hundred round trips of a LAN.
const ANSWER_WITHIN: Duration = Duration::from_millis(400);

/// Time for a handshake, or for a router to say what it has to.
const SHAKE_WITHIN: Duration = Duration::from_secs(3);

/// How long packet sizes are tried. A lost one takes half a second to be noticed.
const GROW_WITHIN: Duration = Duration::from_millis(2500);

/// Smallest packet with which QUIC begins (RFC 9000 section 14.1).
pub const PACKET_BYTES_MIN: usize = 1200;

/// A version reserved for this very purpose: nobody has it (RFC 9000 section 15).
const NO_VERSION: [u8; 4] = [0x1a, 0x2a, 0x3a, 0x4a];

/// The alert for having no protocol in common.
const ALERT_NO_PROTOCOL: u64 = TLS_ALERTS + 120;

/// What is behind a UDP port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Port {
    /// Something that speaks QUIC.
    Quic {
        /// Of one packet and its answer.
        round_trip: Duration,
    },
    /// Something that answers otherwise.
    Other,
    /// The machine says that nobody listens.
    Closed,
    /// The system knows no way to it, or one on the way says so.
    Unreachable(String),
    /// Packets of the size with which QUIC begins do not fit through.
    TooSmall,
    /// This machine's own system does not let it out.
    Forbidden(String),
    /// Nothing comes back.
    Silent,
}

/// Looks at a UDP port. Blocks for `KNOCKS` times `ANSWER_WITHIN` at most.
pub fn knock(address: SocketAddr) -> Port {
    match try_knock(address) {
        Ok(port) => port,
        Err(error) => judge_io(&error),
    }
}

fn judge_io(error: &std::io::Error) -> Port {
    // Linux, macOS: EMSGSIZE is 90 and 40.
    let too_big = matches!(error.raw_os_error(), Some(90 | 40));
    match error.kind() {
        _ if too_big => Port::TooSmall,
        ErrorKind::ConnectionRefused => Port::Closed,
        ErrorKind::PermissionDenied => Port::Forbidden(error.to_string()),
        _ => Port::Unreachable(error.to_string()),
    }
}

fn try_knock(address: SocketAddr) -> std::io::Result<Port> {
    let socket = UdpSocket::bind(any_port(address.is_ipv6()))?;
    // Only answers of this very address arrive then, and what ICMP says about it.
    socket.connect(address)?;
    socket.set_read_timeout(Some(ANSWER_WITHIN))?;
    let ids: [u8; 16] = random().map_err(|error: KeyError| std::io::Error::other(error.to_string()))?;
    let packet = strange_packet(ids);
    for _ in 0..KNOCKS {
        let sent = Instant::now();
        socket.send(&packet)?;
        let mut answer = [0; 2048];
        match socket.recv(&mut answer) {
            Ok(length) if is_negotiation(&answer[..length], ids) => {
                return Ok(Port::Quic { round_trip: sent.elapsed() });
            }
            Ok(_) => return Ok(Port::Other),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Port::Silent)
}

/// A first packet of no version: long header, both connection ids, padding (RFC 8999 section 5.1).
fn strange_packet(ids: [u8; 16]) -> Vec<u8> {
    let (to, from) = ids.split_at(8);
    let mut packet = [&[0xc0][..], &NO_VERSION, &[8], to, &[8], from].concat();
    packet.resize(PACKET_BYTES_MIN, 0);
    packet
}

/// Whether this answers that packet: version 0, and the ids the other way round.
fn is_negotiation(answer: &[u8], ids: [u8; 16]) -> bool {
    let (to, from) = ids.split_at(8);
    let expected = [&[0, 0, 0, 0, 8][..], from, &[8], to].concat();
    answer.first().is_some_and(|first| first & 0x80 != 0) && answer[1..].starts_with(&expected)
}

/// Whether a machine is switched on and reachable at all, as far as TCP tells: its system refuses a connection, or takes
/// it. `None`: silence, which a firewall makes as well as an empty address.
pub fn is_there(address: SocketAddr) -> Option<bool> {
    match TcpStream::connect_timeout(&address, 2 * ANSWER_WITHIN) {
        Ok(_) => Some(true),
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Some(true),
        Err(error) if error.kind() == ErrorKind::TimedOut => None,
        Err(_) => Some(false),
    }
}

/// Address of this machine that packets to there leave from; nothing is sent.
pub fn leaves_from(address: SocketAddr) -> std::io::Result<IpAddr> {
    let socket = UdpSocket::bind(any_port(address.is_ipv6()))?;
    socket.connect(address)?;
    Ok(socket.local_addr()?.ip())
}

/// Which cluster a router is of, by its own and its cluster's signature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stated {
    /// Public half of the cluster's key.
    pub cluster: NodeId,
    /// The router's key.
    pub router: NodeId,
}

/// What came of shaking hands with this machine's key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entered {
    /// Bytes of the largest UDP payload that got through within `GROW_WITHIN`.
    pub packet_bytes: u16,
    /// As QUIC estimates it.
    pub round_trip: Duration,
}

/// Why a handshake came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Turned {
    /// It does not speak this version of our protocol.
    #[error("it speaks QUIC but no protocol of this version of moemesh")]
    Version,
    /// This machine's key was revoked.
    #[error("it says that this machine's key was revoked")]
    Revoked,
    /// It does not know this machine's key.
    #[error("it does not know this machine's key")]
    Stranger,
    /// It has another key than expected.
    #[error("it is not the router this machine joined: it has another key")]
    OtherKey,
    /// It says that it is busy.
    #[error("it is busy: too many machines shake hands or join at once")]
    Busy,
    /// It did not go on.
    #[error("the handshake began and was never completed")]
    Silent,
    /// Something else, as it says.
    #[error("{0}")]
    Broken(String),
}

fn broken(error: impl std::fmt::Display) -> Turned {
    Turned::Broken(error.to_string())
}

impl From<ConnectionError> for Turned {
    fn from(error: ConnectionError) -> Turned {
        match &error {
            error if is_revocation(error) => Turned::Revoked,
            ConnectionError::TimedOut => Turned::Silent,
            ConnectionError::TransportError(inner) if inner.reason.contains("certificate") => {
                Turned::OtherKey
            }
            ConnectionError::ConnectionClosed(close) => match u64::from(close.error_code) {
                ALERT_NO_PROTOCOL => Turned::Version,
                code if code == u64::from(quinn::TransportErrorCode::CONNECTION_REFUSED) => Turned::Busy,
                code if code & 0xff00 == TLS_ALERTS => Turned::Stranger,
                _ => broken(error),
            },
            ConnectionError::ApplicationClosed(closed) if closed.error_code == Close::Busy.into() => {
                Turned::Busy
            }
            _ => broken(error),
        }
    }
}

impl From<EndpointError> for Turned {
    fn from(error: EndpointError) -> Turned {
        broken(error)
    }
}

/// Looks which cluster the router at this address is of, as a stranger. Blocks for a few seconds at most.
///
/// # Errors
/// `Turned`.
pub fn introduce(address: SocketAddr) -> Result<Stated, Turned> {
    let stranger = Identity::generate().map_err(broken)?;
    on_runtime(async {
        let endpoint = endpoint::joiner(&stranger, address.is_ipv6())?;
        let connection = shake(&endpoint, address).await?;
        let stated = timeout(SHAKE_WITHIN, read_stated(&connection)).await.unwrap_or(Err(Turned::Silent));
        leave(&endpoint, &connection).await;
        stated
    })
}

async fn read_stated(connection: &Connection) -> Result<Stated, Turned> {
    let (_, mut recv) = connection.accept_bi().await?;
    let mut stated = [0; STATEMENT_BYTES];
    recv.read_exact(&mut stated).await.map_err(broken)?;
    let (cluster, router) = read_statement(&stated).map_err(broken)?;
    if peer_key(connection) != Some(router) {
        return Err(broken("it passes on what another router says"));
    }
    Ok(Stated { cluster, router })
}

/// Shakes hands with this machine's key and stops there. Blocks for a few seconds at most.
///
/// # Errors
/// `Turned`.
pub fn enter(address: SocketAddr, identity: &Identity, router: NodeId) -> Result<Entered, Turned> {
    on_runtime(async {
        let endpoint = endpoint::dialer(identity, router, address.is_ipv6())?;
        let connection = shake(&endpoint, address).await?;
        let entered = timeout(SHAKE_WITHIN, confirmed(&connection)).await.unwrap_or(Err(Turned::Silent));
        if entered.is_ok() {
            // Sizes are tried while the connection lives; nothing tells when the last one was.
            drop(timeout(GROW_WITHIN, connection.closed()).await);
        }
        let seen = connection.stats().path;
        leave(&endpoint, &connection).await;
        entered.map(|()| Entered { packet_bytes: seen.current_mtu, round_trip: seen.rtt })
    })
}

/// Waits until the router has judged this machine's key: in TLS 1.3 a client is done before it is judged.
async fn confirmed(connection: &Connection) -> Result<(), Turned> {
    while connection.stats().frame_rx.handshake_done == 0 {
        if let Some(error) = connection.close_reason() {
            return Err(error.into());
        }
        sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

async fn shake(endpoint: &Endpoint, address: SocketAddr) -> Result<Connection, Turned> {
    let connecting = endpoint.connect(address, SERVER_NAME).map_err(broken)?;
    timeout(SHAKE_WITHIN, connecting).await.map_err(|_| Turned::Silent)?.map_err(Turned::from)
}

async fn leave(endpoint: &Endpoint, connection: &Connection) {
    connection.close(Close::Goodbye.into(), b"moemesh doctor has seen enough");
    drop(timeout(Duration::from_millis(200), endpoint.wait_idle()).await);
}

fn on_runtime<T>(looking: impl Future<Output = Result<T, Turned>>) -> Result<T, Turned> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(broken)?;
    runtime.block_on(looking)
}
