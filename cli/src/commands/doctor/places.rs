//! Where to look: hosts that people write down, and the interfaces of this machine.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::path::Path;

use mesh_net::hub::HubConfig;

/// Addresses that a name may have and that are looked at.
const ADDRESSES_MAX: usize = 8;

/// Bits of an interface's flags, as Linux shows them: up, loopback, multicast.
const UP: u32 = 0x1;
const LOOPBACK: u32 = 0x8;
const MULTICAST: u32 = 0x1000;

/// The addresses of `HOST`, `HOST:PORT`, `[IPV6]:PORT` or `IPV6`; without a port, the router's default.
///
/// # Errors
/// What the system says of the name.
pub(super) fn resolve(text: &str) -> std::io::Result<Vec<SocketAddr>> {
    let default = HubConfig::LISTEN.port();
    let bare = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let found: Vec<SocketAddr> = match bare.parse::<IpAddr>() {
        Ok(ip) => vec![SocketAddr::new(ip, default)],
        Err(_) if text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) => {
            text.to_socket_addrs()?.collect()
        }
        Err(_) => (text, default).to_socket_addrs()?.collect(),
    };
    let mut unique = Vec::new();
    for address in found {
        if !unique.contains(&address) {
            unique.push(address);
        }
    }
    unique.truncate(ADDRESSES_MAX);
    Ok(unique)
}

/// An interface of this machine that is up and is no loopback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) multicast: bool,
    pub(super) mtu: u32,
}

/// Those of this machine; `None` where the system does not list them as Linux does.
pub(super) fn interfaces() -> Option<Vec<Interface>> {
    listed(Path::new("/sys/class/net"))
}

fn listed(folder: &Path) -> Option<Vec<Interface>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).ok()?.flatten() {
        let read = |name: &str| std::fs::read_to_string(entry.path().join(name)).unwrap_or_default();
        let flags = read("flags");
        let flags = u32::from_str_radix(flags.trim().trim_start_matches("0x"), 16).unwrap_or(0);
        if flags & UP != 0 && flags & LOOPBACK == 0 {
            let name = entry.file_name().to_string_lossy().into_owned();
            let mtu = read("mtu").trim().parse().unwrap_or(0);
            found.push(Interface { name, multicast: flags & MULTICAST != 0, mtu });
        }
    }
    found.sort_by(|one, other| one.name.cmp(&other.name));
    Some(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_may_have_ports() {
        for (text, address) in [
            ("10.0.0.1", "10.0.0.1:8621"),
            ("10.0.0.1:1", "10.0.0.1:1"),
            ("fd00::7", "[fd00::7]:8621"),
            ("[fd00::7]", "[fd00::7]:8621"),
            ("[fd00::7]:1", "[fd00::7]:1"),
        ] {
            assert_eq!(resolve(text).unwrap(), [address.parse::<SocketAddr>().unwrap()], "{text}");
        }
        assert!(resolve("localhost").unwrap().iter().all(|a| a.ip().is_loopback() && a.port() == 8621));
        assert!(resolve("no.such.host.invalid").is_err() && resolve("").is_err());
    }

    #[test]
    fn interfaces_are_those_that_are_up_and_lead_elsewhere() {
        let folder = tempfile::tempdir().unwrap();
        for (name, flags, mtu) in [
            ("lo", "0x9\n", "65536\n"),
            ("eth0", "0x1003\n", "1500\n"),
            ("tun0", "0x1\n", "1280\n"),
            ("down", "0x1002\n", "1500\n"),
        ] {
            let entry = folder.path().join(name);
            std::fs::create_dir(&entry).unwrap();
            std::fs::write(entry.join("flags"), flags).unwrap();
            std::fs::write(entry.join("mtu"), mtu).unwrap();
        }
        let interface = |name: &str, multicast, mtu| Interface { name: name.to_owned(), multicast, mtu };
        let found = listed(folder.path()).unwrap();
        assert_eq!(found, [interface("eth0", true, 1500), interface("tun0", false, 1280)]);
        assert_eq!(listed(&folder.path().join("none")), None);
    }
}
