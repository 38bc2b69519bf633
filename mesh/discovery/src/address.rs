//! Addresses of libp2p and of everybody else.
//!
//! What mDNS says is any chain of protocols that libp2p can name. Only an IP address and a TCP port are dialed here: names
//! would be looked up wherever a stranger likes, relays and other transports are refused on purpose.

use std::net::{IpAddr, SocketAddr};

use libp2p::Multiaddr;
use libp2p::multiaddr::Protocol;

/// `/ip4/10.0.0.1/tcp/8622`.
pub fn to_multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// An address that is an IP address and a TCP port, whatever follows is the peer's name.
pub fn to_socket(address: &Multiaddr) -> Option<SocketAddr> {
    let mut parts = address.iter();
    let ip = match parts.next()? {
        Protocol::Ip4(ip) => IpAddr::V4(ip),
        Protocol::Ip6(ip) => IpAddr::V6(ip),
        _ => return None,
    };
    let Protocol::Tcp(port) = parts.next()? else { return None };
    let plain = matches!((parts.next(), parts.next()), (None | Some(Protocol::P2p(_)), None));
    (plain && port != 0 && !ip.is_unspecified()).then(|| SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_tcp_addresses_are_dialed() {
        let peer = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";
        for (text, socket) in [
            ("/ip4/10.0.0.1/tcp/8622".to_owned(), Some("10.0.0.1:8622")),
            (format!("/ip4/10.0.0.1/tcp/8622/p2p/{peer}"), Some("10.0.0.1:8622")),
            (format!("/ip6/fd00::1/tcp/1/p2p/{peer}"), Some("[fd00::1]:1")),
            ("/ip4/10.0.0.1/tcp/0".to_owned(), None),
            ("/ip4/0.0.0.0/tcp/1".to_owned(), None),
            ("/ip4/10.0.0.1/udp/8622".to_owned(), None),
            ("/ip4/10.0.0.1/tcp/80/ws".to_owned(), None),
            ("/dns4/evil.example/tcp/80".to_owned(), None),
            (format!("/ip4/10.0.0.1/tcp/1/p2p/{peer}/p2p-circuit"), None),
            ("/ip4/10.0.0.1".to_owned(), None),
        ] {
            let address: Multiaddr = text.parse().unwrap();
            assert_eq!(to_socket(&address), socket.map(|socket| socket.parse().unwrap()), "{text}");
        }
    }
}
