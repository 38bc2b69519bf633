//! QUIC set up for a LAN.
//!
//! quinn's defaults suit the internet: a third of a second as first guess of the round trip, 12 kB as first window,
//! acknowledgements up to 25 ms late, 250 MB of buffers per peer, connections that follow a moving phone. Between
//! machines on one switch each of these is wrong by a factor of ten to a thousand. Every setting below says what it
//! is for. The price: over a long or thin link the window starts a little too large and acknowledgements cost
//! more packets. Refuses migration, datagrams and one-way streams: nothing here uses them.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use mesh_wire::id::NodeId;
use quinn::congestion::CubicConfig;
use quinn::crypto::rustls::{HandshakeData, QuicClientConfig};
use quinn::{
    AckFrequencyConfig, ClientConfig, Connection, ConnectionError, ConnectionId, ConnectionIdGenerator,
    Endpoint, EndpointConfig, IdleTimeout, Incoming, MtuDiscoveryConfig, ServerConfig, TransportConfig,
    VarInt,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::pki_types::CertificateDer;
use thiserror::Error;

use crate::identity::Identity;
use crate::members::Members;
use crate::tls::{self, Gate, JOIN_ALPN, TlsError, WEIGHTS_ALPN};

/// First guess of the round trip: above what Wi-Fi and a busy machine add, a thirtieth of the internet's default, so
/// that a lost first packet is repeated after 30 ms and not after a second.
const INITIAL_RTT: Duration = Duration::from_millis(10);

/// Bytes that may be under way before the first acknowledgement: what 10 Gb/s carry in 0.2 ms. The default of 12 kB
/// does not grow as long as calls are smaller than it, so the first larger one would need several round trips.
/// Not more, as it is also about what a stock Linux receive buffer takes in one burst.
const INITIAL_WINDOW_BYTES: u64 = 256 << 10;

/// How long the peer may wait before it acknowledges. The loss of a message's last packet is noticed about this much
/// after a round trip; the default of 25 ms would stall a token for 27 ms. Timers have steps of 1 ms.
const ACK_DELAY_MAX: Duration = Duration::from_millis(2);

/// Packets after which the peer acknowledges at once: a decode call (two packets) does not cause a packet back before
/// its reply does.
const ACK_AFTER_PACKETS: u32 = 10;

/// Bytes a peer may send on one stream before they are read: half of the largest reply.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;

/// Bytes a peer may send on all its streams before they are read; the default has no limit. Three streams' windows, where
/// a gigabit at 10 ms has 1.25 MB under way: whoever leaves holes in its streams, so that nothing can be read, makes this
/// process hold that, and what the pieces of it waste. With `SEND_WINDOW_BYTES` a peer takes 22 MB at most.
const CONNECTION_WINDOW_BYTES: u32 = 6 << 20;

/// Bytes that wait to be acknowledged by one peer.
const SEND_WINDOW_BYTES: u64 = 16 << 20;

/// Streams the router may have open towards a node: its lanes, and as many again that are being replaced.
pub(crate) const LANE_STREAMS_MAX: u32 = 16;

/// Streams a node may have open towards the router: control.
const CONTROL_STREAMS_MAX: u32 = 1;

/// Silence after which a connection is given up. Not the failure detector, that is the budget of each call; it frees
/// what a vanished peer held.
const IDLE_MAX: Duration = Duration::from_secs(3);

/// How often an otherwise silent connection is touched: five losses in a row are survived.
const KEEP_ALIVE_EVERY: Duration = Duration::from_millis(500);

/// Largest packet that is tried. With segmentation offload the kernel takes ten packets in one call of at most 65507
/// bytes: larger ones fail in a way quinn takes for loss (measured: slower than 1200 bytes).
const PACKET_BYTES_MAX: u16 = 6500;

/// Connections waiting to be accepted, before any key is known.
const INCOMING_MAX: usize = 64;

/// Bytes kept of each such connection, and of all of them.
const INCOMING_BYTES_MAX: u64 = 64 << 10;
const INCOMING_BYTES_TOTAL_MAX: u64 = 1 << 20;

/// Kernel buffers asked for. The kernel gives what `net.core.rmem_max` and `wmem_max` allow; a burst that does not
/// fit is lost and repeated.
const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Why there is no endpoint.
#[derive(Debug, Error)]
pub enum EndpointError {
    /// The socket cannot be had.
    #[error("UDP {address}: {source}; is another process listening there, is the address this machine's?")]
    Bind {
        /// Wanted address.
        address: SocketAddr,
        /// What the system says.
        source: std::io::Error,
    },
    /// The identity does not yield a TLS set-up.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// A constant is out of QUIC's range.
    #[error("setting up QUIC: {0}")]
    Quic(#[from] quinn::ConfigError),
}

/// The transport of both sides; they differ in which streams the peer may open.
fn transport(peer_streams: u32) -> Result<TransportConfig, EndpointError> {
    let idle = IdleTimeout::from(VarInt::from_u32(IDLE_MAX.as_millis() as u32));
    let mut cubic = CubicConfig::default();
    cubic.initial_window(INITIAL_WINDOW_BYTES);
    let mut acks = AckFrequencyConfig::default();
    acks.max_ack_delay(Some(ACK_DELAY_MAX)).ack_eliciting_threshold(ACK_AFTER_PACKETS.into());
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(PACKET_BYTES_MAX);
    let mut transport = TransportConfig::default();
    transport
        .initial_rtt(INITIAL_RTT)
        .congestion_controller_factory(Arc::new(cubic))
        .ack_frequency_config(Some(acks))
        .mtu_discovery_config(Some(mtu))
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(CONNECTION_WINDOW_BYTES.into())
        .send_window(SEND_WINDOW_BYTES)
        .max_concurrent_bidi_streams(peer_streams.into())
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(Some(KEEP_ALIVE_EVERY));
    Ok(transport)
}

/// Random connection ids. quinn's own generator refuses ids of an earlier process and so never answers those with
/// a stateless reset, which is what tells nodes at once that the router was restarted.
#[derive(Debug)]
struct RandomIds(SystemRandom);

/// Bytes of a connection id: enough that two of them never meet.
const CONNECTION_ID_BYTES: usize = 8;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; CONNECTION_ID_BYTES];
        // Where the system has no randomness, TLS fails before this matters.
        if self.0.fill(&mut id).is_err() {
            tracing::error!("the system's source of random numbers failed");
        }
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

fn endpoint_config(identity: &Identity) -> Result<EndpointConfig, EndpointError> {
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &identity.reset_key());
    let mut config = EndpointConfig::new(Arc::new(key));
    config
        .cid_generator(|| Box::new(RandomIds(SystemRandom::new())))
        .max_udp_payload_size(PACKET_BYTES_MAX)?;
    Ok(config)
}

fn socket(address: SocketAddr) -> Result<UdpSocket, EndpointError> {
    let socket = UdpSocket::bind(address).map_err(|source| EndpointError::Bind { address, source })?;
    let options = socket2::SockRef::from(&socket);
    for outcome in
        [options.set_recv_buffer_size(SOCKET_BUFFER_BYTES), options.set_send_buffer_size(SOCKET_BUFFER_BYTES)]
    {
        if let Err(error) = outcome {
            tracing::debug!(%error, "the system does not enlarge the socket's buffers");
        }
    }
    Ok(socket)
}

/// The router's endpoint.
#[derive(Clone, Debug)]
pub struct Listener {
    /// The socket and its connections.
    pub endpoint: Endpoint,
    gate: Gate,
    config: ServerConfig,
}

impl Listener {
    /// Listens, for members and for those who want to join. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// `Bind` where the address is taken or foreign; the others would be defects.
    pub fn bind(
        identity: &Identity,
        members: Arc<Members>,
        address: SocketAddr,
    ) -> Result<Listener, EndpointError> {
        Listener::behind(Gate::new(identity, members)?, identity, address)
    }

    /// Listens for members that borrow weights, and for nobody else.
    ///
    /// # Errors
    /// As `bind`.
    pub(crate) fn lending(
        identity: &Identity,
        members: Arc<Members>,
        address: SocketAddr,
    ) -> Result<Listener, EndpointError> {
        Listener::behind(Gate::lending(identity, members)?, identity, address)
    }

    /// `bind` with a given gate.
    pub(crate) fn behind(
        gate: Gate,
        identity: &Identity,
        address: SocketAddr,
    ) -> Result<Listener, EndpointError> {
        let mut config = ServerConfig::with_crypto(Arc::new(gate.session()?));
        config
            .transport_config(Arc::new(transport(CONTROL_STREAMS_MAX)?))
            .migration(false)
            .max_incoming(INCOMING_MAX)
            .incoming_buffer_size(INCOMING_BYTES_MAX)
            .incoming_buffer_size_total(INCOMING_BYTES_TOTAL_MAX);
        let runtime = Arc::new(quinn::TokioRuntime);
        let endpoint =
            Endpoint::new(endpoint_config(identity)?, Some(config.clone()), socket(address)?, runtime)
                .map_err(|source| EndpointError::Bind { address, source })?;
        Ok(Listener { endpoint, gate, config })
    }

    /// Shakes hands. The peer is a member, or it wants to join (`wants_to_join`); nothing else gets through.
    ///
    /// # Errors
    /// Why not, for the log.
    pub async fn accept(&self, incoming: Incoming) -> Result<Connection, String> {
        let mut config = self.config.clone();
        config.crypto = Arc::new(self.gate.session().map_err(|error| error.to_string())?);
        let connecting = incoming.accept_with(Arc::new(config)).map_err(|error| error.to_string())?;
        connecting.await.map_err(|error| error.to_string())
    }
}

/// Whether the peer of this connection came to join, and may do nothing else.
pub fn wants_to_join(connection: &Connection) -> bool {
    speaks(connection, JOIN_ALPN)
}

/// Whether the peer of this connection came for weights.
pub(crate) fn wants_weights(connection: &Connection) -> bool {
    speaks(connection, WEIGHTS_ALPN)
}

fn speaks(connection: &Connection, protocol: &[u8]) -> bool {
    let handshake = connection.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    handshake.is_some_and(|handshake| handshake.protocol.as_deref() == Some(protocol))
}

/// A node's endpoint: dials the router and takes no connections. Must be called within a tokio runtime.
/// `ipv6` says which kind of address it will dial.
///
/// # Errors
/// `Bind` where the machine has no free port or no such network; the others would be defects.
pub fn dialer(identity: &Identity, router: NodeId, ipv6: bool) -> Result<Endpoint, EndpointError> {
    dialer_with(identity, tls::client(identity, router)?, ipv6)
}

/// How a connection is set up on which weights are borrowed of the machine with this key.
///
/// # Errors
/// None that would not be a defect.
pub(crate) fn borrowing(identity: &Identity, lender: NodeId) -> Result<ClientConfig, EndpointError> {
    client(tls::borrower(identity, lender)?)
}

/// The endpoint of a machine that joins.
///
/// # Errors
/// As `dialer`.
pub(crate) fn joiner(identity: &Identity, ipv6: bool) -> Result<Endpoint, EndpointError> {
    dialer_with(identity, tls::joiner(identity)?, ipv6)
}

/// `dialer` with a given TLS set-up.
pub(crate) fn dialer_with(
    identity: &Identity,
    tls: rustls::ClientConfig,
    ipv6: bool,
) -> Result<Endpoint, EndpointError> {
    let mut endpoint = outward(identity, ipv6)?;
    endpoint.set_default_client_config(client(tls)?);
    Ok(endpoint)
}

/// An endpoint that takes no connections, and dials with whatever each is set up with. It keeps megabytes to receive into:
/// who dials often keeps it.
///
/// # Errors
/// As `dialer`.
pub(crate) fn outward(identity: &Identity, ipv6: bool) -> Result<Endpoint, EndpointError> {
    let address = any_port(ipv6);
    let runtime = Arc::new(quinn::TokioRuntime);
    Endpoint::new(endpoint_config(identity)?, None, socket(address)?, runtime)
        .map_err(|source| EndpointError::Bind { address, source })
}

fn client(tls: rustls::ClientConfig) -> Result<ClientConfig, EndpointError> {
    let quic = QuicClientConfig::try_from(tls).map_err(TlsError::from)?;
    let mut client = ClientConfig::new(Arc::new(quic));
    client.transport_config(Arc::new(transport(LANE_STREAMS_MAX)?));
    Ok(client)
}

/// Every address of this machine, and a port that the system chooses.
pub(crate) fn any_port(ipv6: bool) -> SocketAddr {
    match ipv6 {
        true => SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)),
        false => SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)),
    }
}

/// The key a connected peer has proven to own.
pub fn peer_key(connection: &Connection) -> Option<NodeId> {
    let identity = connection.peer_identity()?;
    let chain = identity.downcast_ref::<Vec<CertificateDer<'static>>>()?;
    tls::key_of(chain.first()?)
}

/// Why a connection is closed by us, as the peer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Close {
    /// The side that closes is stopping.
    Goodbye = 1,
    /// A newer connection of the same key took its place.
    Replaced = 2,
    /// It did not say what it had to, in time.
    Protocol = 3,
    /// The cluster does not want it; the reason says why.
    Unwanted = 4,
    /// Its key is in use by another machine.
    Cloned = 5,
    /// The operator shut it out for good.
    Revoked = 6,
    /// It came to join, and too many do at once; it may try again.
    Busy = 7,
    /// The node does not believe this router; the reason says why.
    Distrusted = 8,
    /// Something broke on the connection; the reason says what. Another one may do better.
    Broken = 9,
}

impl From<Close> for VarInt {
    fn from(close: Close) -> VarInt {
        VarInt::from_u32(close as u32)
    }
}

/// How a connection that was served ended: `Ok` says who said goodbye, `Err` what broke.
pub(crate) type Parting = Result<String, String>;

/// Where QUIC puts TLS alerts among its error codes (RFC 9001 section 4.8), and the alert for a revoked certificate.
pub(crate) const TLS_ALERTS: u64 = 0x100;
const ALERT_REVOKED: u64 = TLS_ALERTS + 44;

/// Whether the connection ended because this machine's key was shut out for good. To be asked only of connections
/// whose peer has proven whose key it has.
pub(crate) fn is_revocation(error: &ConnectionError) -> bool {
    match error {
        ConnectionError::ConnectionClosed(close) => u64::from(close.error_code) == ALERT_REVOKED,
        ConnectionError::ApplicationClosed(closed) => closed.error_code == Close::Revoked.into(),
        _ => false,
    }
}

/// Whether the peer closed the connection in order.
pub(crate) fn is_goodbye(error: &ConnectionError) -> bool {
    matches!(error, ConnectionError::ApplicationClosed(closed) if closed.error_code == Close::Goodbye.into())
}

/// Whether the peer has closed it in order: it wanted nothing more, as `look` does.
pub(crate) fn has_left(connection: &Connection) -> bool {
    connection.close_reason().is_some_and(|reason| is_goodbye(&reason))
}

/// Why a lane is reset by us, as the peer sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum LaneReset {
    /// The call's budget ran out.
    Late = 1,
    /// Nobody waits for the call any more.
    Cancelled = 2,
    /// A frame on it was refused.
    Frame = 3,
    /// There is no buffer for what comes on it.
    Busy = 4,
}

impl From<LaneReset> for VarInt {
    fn from(reset: LaneReset) -> VarInt {
        VarInt::from_u32(reset as u32)
    }
}
