//! Whether and how router and node take part in discovery. It is a convenience: what keeps it from starting is said, and
//! the process goes on with the addresses it was given.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use clap::ValueEnum;
use mesh_discovery::circle::Circle;
use mesh_discovery::discovery::{Discovery, DiscoveryConfig};
use mesh_net::authority::Authority;
use mesh_net::membership::Membership;

/// `--discovery`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// Multicast on the LAN.
    Mdns,
    /// Only addresses that were given.
    Off,
}

/// A router that serves nodes at this address is announced, and says at this TCP port where it is. By default not where
/// only its own machine can reach it.
pub(crate) fn of_router(
    mode: Option<Mode>,
    port: u16,
    authority: &Arc<Authority>,
    mesh: SocketAddr,
) -> Option<Discovery> {
    let wanted = mode.map_or(!mesh.ip().is_loopback(), |mode| mode == Mode::Mdns);
    // QUIC on [::] takes IPv4 as well, and that is where every LAN has mDNS.
    let ip = if mesh.ip().is_unspecified() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { mesh.ip() };
    let circle = Circle::Router(Arc::clone(authority));
    let config =
        DiscoveryConfig { circle, answer_at: Some((ip, port)), mesh_port: mesh.port(), ipv6: ip.is_ipv6() };
    wanted.then(|| start(config)).flatten()
}

/// A node looks for its router. By default not where the router is on its own machine, and stays there.
pub(crate) fn of_node(
    mode: Option<Mode>,
    membership: &Arc<Membership>,
    routers: &[SocketAddr],
) -> Option<Discovery> {
    let known = if routers.is_empty() { &membership.admission().addresses } else { routers };
    let elsewhere = known.iter().any(|address| !address.ip().is_loopback());
    let wanted = mode.map_or(elsewhere, |mode| mode == Mode::Mdns);
    wanted.then(|| start(asking(membership, known))).flatten()
}

/// What a node needs that asks and does not answer.
pub(crate) fn asking(membership: &Arc<Membership>, known: &[SocketAddr]) -> DiscoveryConfig {
    let ipv6 = !known.is_empty() && known.iter().all(SocketAddr::is_ipv6);
    DiscoveryConfig { circle: Circle::Node(Arc::clone(membership)), answer_at: None, mesh_port: 0, ipv6 }
}

fn start(config: DiscoveryConfig) -> Option<Discovery> {
    match Discovery::start(config) {
        Ok(discovery) => Some(discovery),
        Err(error) => {
            tracing::warn!(%error, "no discovery");
            None
        }
    }
}
