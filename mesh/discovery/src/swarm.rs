//! The protocols, and what each of them may take.
//!
//! The order of the fields is the order in which a connection is judged: the allow-list first, so that nobody whose key
//! is not in the roster gets as far as any protocol (of such a peer the Noise handshake is all that is read), then the
//! limits. Everything behind has its own: `identify` reads 4 KiB at most and nothing of it is used but the name of the
//! program for the log; `ping` tells the round trip; `questions` is the one that matters.

use std::num::NonZeroU8;
use std::time::Duration;

use libp2p::allow_block_list::{self, AllowedPeers};
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::identity::Keypair;
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::NetworkBehaviour;
use libp2p::swarm::behaviour::toggle::Toggle;
use libp2p::{Swarm, SwarmBuilder, identify, mdns, noise, ping, tcp, yamux};

use crate::question::{Codec, PROTOCOL};

/// Connections whose keys are not known yet: each is one Noise handshake. Of a cluster that starts at once the rest
/// asks again a second later.
pub(crate) const PENDING_MAX: u32 = 16;

/// Connections of members at a time; each lives for seconds.
pub(crate) const CONNECTIONS_MAX: u32 = 64;

/// Of one member: a node, the doctor beside it, and the connection before that is still closing.
pub(crate) const CONNECTIONS_PER_PEER_MAX: u32 = 4;

/// Streams of one connection: one each for identify, ping and the question, both ways.
const STREAMS_MAX: usize = 8;

/// Time for TCP, Noise and Yamux together; on a LAN it takes three milliseconds.
const CONNECT_WITHIN: Duration = Duration::from_secs(5);

/// Time a question has to be answered.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// A connection on which nothing is going on is closed.
const IDLE_MAX: Duration = Duration::from_secs(5);

/// What identify calls all of this.
const IDENTIFY: &str = "/moemesh/discovery/1";

/// How long what this machine announces is good for.
const ANNOUNCED_FOR: Duration = Duration::from_secs(120);

/// How often to ask the LAN; the answers of others to somebody else's question count, too. A multicast packet per
/// machine and half minute is nothing even on Wi-Fi, where multicast is slow.
pub(crate) const QUERY_EVERY: Duration = Duration::from_secs(30);

/// Over which of the two mDNS is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Multicast {
    /// Where every LAN has it.
    Ipv4,
    /// Where the router listens on an IPv6 address.
    Ipv6,
    /// Nowhere.
    None,
}

/// See the module. Fields are asked in this order.
#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
pub(crate) struct Protocols {
    pub(crate) allowed: allow_block_list::Behaviour<AllowedPeers>,
    limits: connection_limits::Behaviour,
    pub(crate) questions: request_response::Behaviour<Codec>,
    pub(crate) mdns: Toggle<mdns::tokio::Behaviour>,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
}

/// A machine that takes part with this key; nobody is allowed yet. Must be called within a tokio runtime.
///
/// # Errors
/// Where the system does not tell about its network interfaces.
pub(crate) fn swarm(keypair: Keypair, multicast: Multicast) -> Result<Swarm<Protocols>, String> {
    let failed = |what: &str, error: &dyn std::fmt::Display| format!("{what}: {error}");
    let key = keypair.public();
    let mdns = match multicast {
        Multicast::Ipv4 | Multicast::Ipv6 => {
            let enable_ipv6 = multicast == Multicast::Ipv6;
            let config = mdns::Config { ttl: ANNOUNCED_FOR, query_interval: QUERY_EVERY, enable_ipv6 };
            let mdns = mdns::tokio::Behaviour::new(config, key.to_peer_id());
            Some(mdns.map_err(|error| failed("mDNS", &error))?)
        }
        Multicast::None => None,
    };
    let limits = ConnectionLimits::default()
        .with_max_pending_incoming(Some(PENDING_MAX))
        .with_max_pending_outgoing(Some(PENDING_MAX))
        .with_max_established(Some(CONNECTIONS_MAX))
        .with_max_established_per_peer(Some(CONNECTIONS_PER_PEER_MAX));
    let identify = identify::Config::new(IDENTIFY.to_owned(), key)
        .with_agent_version(format!("moemesh/{}", env!("CARGO_PKG_VERSION")))
        .with_hide_listen_addrs(true)
        .with_cache_size(0);
    let question = request_response::Config::default()
        .with_request_timeout(ANSWER_WITHIN)
        .with_max_concurrent_streams(STREAMS_MAX);
    let protocols = Protocols {
        allowed: allow_block_list::Behaviour::default(),
        limits: connection_limits::Behaviour::new(limits),
        questions: request_response::Behaviour::new([(PROTOCOL, ProtocolSupport::Full)], question),
        mdns: Toggle::from(mdns),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::default(),
    };
    let muxer = || {
        let mut config = yamux::Config::default();
        config.set_max_num_streams(STREAMS_MAX);
        config
    };
    let builder = SwarmBuilder::with_existing_identity(keypair).with_tokio();
    let builder = builder.with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, muxer);
    let builder = builder.map_err(|error| failed("Noise", &error))?;
    let builder = builder.with_behaviour(|_| protocols).map_err(|error| failed("protocols", &error))?;
    let one = NonZeroU8::MIN;
    Ok(builder
        .with_swarm_config(|config| {
            config
                .with_idle_connection_timeout(IDLE_MAX)
                .with_max_negotiating_inbound_streams(STREAMS_MAX)
                .with_dial_concurrency_factor(one)
        })
        .with_connection_timeout(CONNECT_WITHIN)
        .build())
}
