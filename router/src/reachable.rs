//! Where other machines can reach this one: the addresses that a join token carries.
//!
//! A router that listens on one address is reached there. One that listens on all of them has as many as it has
//! networks, and which of them the new machine shares is for that machine to find out. The list comes from the
//! kernel's tables, best guess first: the address that packets for the rest of the world would leave from. The price:
//! addresses behind a translator are not known here; the operator gives those.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use mesh_net::look::leaves_from;
use mesh_net::token::ADDRESSES_MAX;

/// Addresses for documentation (RFC 5737, RFC 3849): nobody has them, and nothing is sent there.
const ELSEWHERE: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

/// Where a router that listens here can be reached, best guess first.
pub(crate) fn addresses(listen: SocketAddr) -> Vec<SocketAddr> {
    if !listen.ip().is_unspecified() {
        return vec![listen];
    }
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let mut found = outward();
    found.extend(ipv4_of(&read("/proc/net/fib_trie")));
    found.extend(ipv6_of(&read("/proc/net/if_inet6")));
    // A socket on [::] takes both kinds, one on 0.0.0.0 only its own.
    found.retain(|ip| !ip.is_loopback() && !ip.is_unspecified() && (listen.is_ipv6() || ip.is_ipv4()));
    let mut unique = Vec::new();
    for ip in found {
        if !unique.contains(&ip) {
            unique.push(ip);
        }
    }
    if unique.is_empty() {
        // No network at all: this machine itself is all that is left.
        unique.push(if listen.is_ipv6() { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() });
    }
    unique.into_iter().take(ADDRESSES_MAX).map(|ip| SocketAddr::new(ip, listen.port())).collect()
}

/// The addresses that the system would send from.
fn outward() -> Vec<IpAddr> {
    let from = |there: &IpAddr| leaves_from(SocketAddr::new(*there, 9)).ok();
    ELSEWHERE.iter().filter_map(from).collect()
}

/// This machine's addresses in the kernel's routing trie: leaves, each followed by what it is.
fn ipv4_of(trie: &str) -> Vec<IpAddr> {
    let mut leaf = None;
    let mut found = Vec::new();
    for line in trie.lines() {
        if let Some(address) = line.trim_start().strip_prefix("|-- ") {
            leaf = address.parse().ok();
        } else if line.contains("/32 host LOCAL") {
            found.extend(leaf.map(IpAddr::V4));
        }
    }
    found
}

/// Global addresses of the kernel's list: digits, interface, length of the prefix, scope (0 is global), flags.
fn ipv6_of(list: &str) -> Vec<IpAddr> {
    let address = |line: &str| {
        let mut words = line.split_whitespace();
        let bits = u128::from_str_radix(words.next()?, 16).ok()?;
        (words.nth(2)? == "00").then_some(IpAddr::V6(bits.into()))
    };
    list.lines().filter_map(address).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_tables_are_read() {
        let trie = "Main:\n  +-- 0.0.0.0/0 3 0 5\n     |-- 0.0.0.0\n        /0 universe UNICAST\n\
                    \x20    +-- 10.7.0.0/24 2 0 2\n        |-- 10.7.0.0\n           /24 link UNICAST\n\
                    \x20       |-- 10.7.0.5\n           /32 host LOCAL\n        |-- 10.7.0.255\n           \
                    /32 link BROADCAST\n     |-- 127.0.0.1\n        /32 host LOCAL\n";
        let found: Vec<String> = ipv4_of(trie).iter().map(IpAddr::to_string).collect();
        assert_eq!(found, ["10.7.0.5", "127.0.0.1"]);
        let list = "fe800000000000000000000000000001 02 40 20 80 eth0\nfd000000000000000000000000000007 02 40 00 80 \
                    eth0\n00000000000000000000000000000001 01 80 10 80 lo\nnonsense\n";
        assert_eq!(ipv6_of(list), ["fd00::7".parse::<IpAddr>().unwrap()]);
    }

    #[test]
    fn a_router_on_one_address_is_there_and_one_on_all_is_somewhere() {
        let one = "127.0.0.1:8621".parse().unwrap();
        assert_eq!(addresses(one), [one]);
        for all in ["0.0.0.0:8621", "[::]:8621"] {
            let listen: SocketAddr = all.parse().unwrap();
            let found = addresses(listen);
            assert!((1..=ADDRESSES_MAX).contains(&found.len()), "{found:?}");
            assert!(found.iter().all(|address| address.port() == 8621 && !address.ip().is_unspecified()));
            assert!(listen.is_ipv6() || found.iter().all(SocketAddr::is_ipv4), "{found:?}");
        }
    }
}
