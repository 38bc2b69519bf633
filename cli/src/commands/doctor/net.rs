//! `moemesh doctor net`: why machines do not see or trust each other.
//!
//! On a node it goes the way of a connection, step by step, and stops at each address with the first step that fails:
//! membership, name, route, UDP port, protocol, cluster, trust, packet size. Then it asks the LAN by multicast, which is
//! a convenience and so never a failure. On the router's machine it asks the running router. It looks beside the
//! processes that run there, and disturbs neither them nor the router: nothing is joined, kept or locked.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Args;
use mesh_discovery::discovery::{Discovery, Seen};
use mesh_net::keys::CLUSTER_FILE;
use mesh_net::look::{self, Entered, PACKET_BYTES_MIN, Port, Turned};
use mesh_net::membership::Membership;
use router::admin::{self, Answer, Question};

use super::Report;
use super::places::{interfaces, resolve};
use crate::{discovery, state};

/// How long the LAN is listened to: a router answers within a second, and one packet may be lost.
const LISTEN_FOR: Duration = Duration::from_secs(4);

/// Between two looks at what was heard.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// Bytes of headers before a QUIC packet, IPv6 and UDP; 20 fewer with IPv4.
const HEADER_BYTES: usize = 48;

const START_ROUTER: &str = "on the router's machine: is `moemesh router` running, with --listen 0.0.0.0:PORT (the \
                            default 127.0.0.1 takes nodes of its own machine only), and is this the port?";
const OPEN_PORT: &str = "let UDP to that port through its firewall (`ufw allow PORT/udp`, or `nft add rule inet filter \
                         input udp dport PORT accept`)";
const JOIN: &str = "run `moemesh token` on the router, then `moemesh node --join TOKEN` here";

/// Options of `moemesh doctor net`.
#[derive(Args, Debug)]
#[command(after_help = "Exit status: 0 nothing is wrong, 1 a check fails, 2 wrong usage.")]
pub(crate) struct Options {
    /// The router, HOST or HOST:PORT [default: where it was when this machine joined]
    host: Option<String>,
    /// State folder of the node or router on this machine [default: the node's, or else the router's]
    #[arg(long, env = "MOEMESH_STATE")]
    state: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(super) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let (node, router) =
        (state::folder(options.state.clone(), "node")?, state::folder(options.state.clone(), "router")?);
    let mut report = Report::default();
    let is_node = matches!(Membership::peek(&node), Ok(Some(_)) | Err(_));
    if !is_node && options.host.is_none() && router.join(CLUSTER_FILE).exists() {
        look_at_cluster(&mut report, &router);
    } else {
        look_at_router(&mut report, &node, options.host.as_deref());
    }
    report.tell(options.json)
}

/// A node's side.
fn look_at_router(report: &mut Report, state: &Path, host: Option<&str>) {
    let membership = member(report, state);
    let known = membership.as_ref().map_or(&[][..], |membership| membership.admission().addresses.as_slice());
    let addresses = match host {
        None if known.is_empty() => {
            let what = "no address of the router is known";
            report.fail("name", what, "say where it is: `moemesh doctor net HOST:PORT`");
            return;
        }
        None => known.to_vec(),
        Some(host) => match resolve(host) {
            Ok(found) if !found.is_empty() => {
                let list: Vec<String> = found.iter().map(SocketAddr::to_string).collect();
                report.pass("name", format!("{host} is {}", list.join(", ")));
                found
            }
            Ok(_) | Err(_) => {
                let what = format!("the name '{host}' has no address");
                report.fail("name", what, "check the spelling, or the DNS server, or give the IP address");
                return;
            }
        },
    };
    let reached: Vec<bool> =
        addresses.iter().map(|address| look_at(report, *address, membership.as_deref())).collect();
    if addresses.iter().all(|address| address.ip().is_loopback()) {
        return report.unknown("multicast", "not needed: the router is on this machine", "");
    }
    let seen = listen(report, membership.as_ref(), &addresses);
    if !reached.contains(&true) {
        judge_direction(report, seen);
    }
}

/// This machine's membership, if it has one.
fn member(report: &mut Report, state: &Path) -> Option<Arc<Membership>> {
    match Membership::peek(state) {
        Ok(Some(membership)) => {
            let admission = membership.admission();
            report.pass(
                "membership",
                format!(
                    "this machine is {} of cluster {}, its key is {}; the router's key is {}",
                    admission.name,
                    admission.cluster,
                    membership.identity().id(),
                    admission.router
                ),
            );
            Some(Arc::new(membership))
        }
        Ok(None) => {
            let what = format!("this machine is in no cluster (state {})", state.display());
            report.fail("membership", what, JOIN);
            None
        }
        Err(error) => {
            report.fail(
                "membership",
                error.to_string(),
                "give the right folder with --state, as the right user",
            );
            None
        }
    }
}

/// One address, as far as it goes; whether there is a router of moemesh.
fn look_at(report: &mut Report, address: SocketAddr, membership: Option<&Membership>) -> bool {
    match look::leaves_from(address) {
        Ok(from) => report.pass("route", format!("packets to {address} leave from {from}")),
        Err(error) => {
            let what = format!("there is no way to {address}: {error}");
            report.fail(
                "route",
                what,
                "is the cable in, has this machine an address of that network (`ip address`)?",
            );
            return false;
        }
    }
    if !knock(report, address) {
        return false;
    }
    let stated = match look::introduce(address) {
        Ok(stated) => stated,
        Err(turned) => {
            explain(report, "protocol", address, &turned);
            return turned != Turned::Silent;
        }
    };
    report.pass("protocol", format!("{address} is a router of moemesh of a version that fits"));
    let Some(membership) = membership else {
        let what = format!("{address} is the router of cluster {}, this machine is in none", stated.cluster);
        report.unknown("cluster", what, JOIN);
        return true;
    };
    let admission = membership.admission();
    if stated.cluster != admission.cluster || stated.router != admission.router {
        let what = format!(
            "{address} is router {} of cluster {}, this machine joined router {} of cluster {}",
            stated.router, stated.cluster, admission.router, admission.cluster
        );
        let remedy = "is that the right address? If the cluster was made anew, join it with a token and another --state";
        report.fail("cluster", what, remedy);
        return true;
    }
    report.pass("cluster", format!("{address} is the router that this machine joined"));
    match look::enter(address, membership.identity(), admission.router) {
        Ok(entered) => trusted(report, address, entered),
        Err(turned) => explain(report, "trust", address, &turned),
    }
    true
}

fn trusted(report: &mut Report, address: SocketAddr, entered: Entered) {
    let Entered { packet_bytes, round_trip } = entered;
    report.pass("trust", format!("{address} takes this machine's key"));
    let ms = crate::output::ms(round_trip);
    let what = format!("packets of {packet_bytes} bytes get through to {address}; round trip {ms:.2} ms");
    report.pass("mtu", what);
}

/// The UDP port; whether QUIC is spoken there.
fn knock(report: &mut Report, address: SocketAddr) -> bool {
    let with_port = |text: &str| text.replace("PORT", &address.port().to_string());
    match look::knock(address) {
        Port::Quic { round_trip } => {
            let ms = crate::output::ms(round_trip);
            report.pass("port", format!("UDP {address} speaks QUIC, and answers within {ms:.2} ms"));
            return true;
        }
        Port::Closed => {
            let what = format!("{address} is there and says that nothing listens on UDP {}", address.port());
            let remedy = format!("{}; a firewall that rejects says the same", with_port(START_ROUTER));
            report.fail("port", what, remedy);
        }
        Port::Silent => silent(report, address),
        Port::TooSmall => too_small(report, address),
        Port::Other => {
            let what = format!("UDP {address} answers something that is not QUIC");
            report.fail("port", what, "another program has that port; is it the right one?");
        }
        Port::Unreachable(error) => {
            let what = format!("{address} cannot be reached: {error}");
            report.fail("port", what, "is the machine on, and is this its address now (`ip address` there)?");
        }
        Port::Forbidden(error) => {
            let what = format!("this machine does not let packets to {address} out: {error}");
            report.fail(
                "port",
                what,
                "look at the output rules of this machine's firewall (`nft list ruleset`)",
            );
        }
    }
    false
}

/// Nothing comes back: a firewall that drops, or nobody there.
fn silent(report: &mut Report, address: SocketAddr) {
    let port = address.port().to_string();
    match look::is_there(address) {
        Some(true) => {
            let what = format!(
                "{address} is there (it answers TCP), but nothing comes back from UDP {port}: dropped by a firewall, or \
                 by a program that has the port and is stuck"
            );
            report.fail("port", what, format!("on that machine: {}", OPEN_PORT.replace("PORT", &port)));
        }
        Some(false) | None => {
            let what = format!("nothing at all comes back from {address}");
            let remedy = format!(
                "is it on, is this its address now? If so, a firewall drops everything, or Wi-Fi keeps its clients \
                 apart; on that machine: {}",
                OPEN_PORT.replace("PORT", &port)
            );
            report.fail("port", what, remedy);
        }
    }
}

fn too_small(report: &mut Report, address: SocketAddr) {
    let needed = PACKET_BYTES_MIN + HEADER_BYTES;
    let narrow: Vec<String> = interfaces()
        .unwrap_or_default()
        .iter()
        .filter(|interface| (interface.mtu as usize) < needed)
        .map(|interface| format!("{} has {}", interface.name, interface.mtu))
        .collect();
    let which = if narrow.is_empty() { "a link on the way".to_owned() } else { narrow.join(", ") };
    let what = format!(
        "packets of {PACKET_BYTES_MIN} bytes, which QUIC begins with, do not fit through to {address}"
    );
    report.fail(
        "mtu",
        what,
        format!("raise the MTU to {needed} or more: {which} (`ip link set DEVICE mtu 1500`)"),
    );
}

/// A handshake that came to nothing.
fn explain(report: &mut Report, name: &'static str, address: SocketAddr, turned: &Turned) {
    let remedy = match turned {
        Turned::Version => "run the same version of moemesh on both machines (`moemesh version`)",
        Turned::Revoked => {
            "the operator shut this machine out; to bring it back, delete its state folder and join with a new token"
        }
        Turned::Stranger => {
            "the router's state was lost or restored from a backup: join again with a new token and another --state"
        }
        Turned::OtherKey => "is it the right address? If the cluster was made anew, join it with a token",
        Turned::Busy => "try again in a minute",
        Turned::Silent => {
            "larger or later packets are lost on the way: a firewall that looks into QUIC, or a link with a small MTU"
        }
        Turned::Broken(_) => "look into the router's log",
    };
    report.fail(name, format!("{address}: {turned}"), remedy);
}

/// Asks the LAN. Whatever comes of it, addresses work without.
fn listen(report: &mut Report, membership: Option<&Arc<Membership>>, known: &[SocketAddr]) -> Seen {
    let without =
        "nodes find the router at the addresses they have; `moemesh node --router HOST:PORT` gives another";
    if let Some(interfaces) = interfaces() {
        let names = |multicast: bool| -> Vec<&str> {
            let those = interfaces.iter().filter(|interface| interface.multicast == multicast);
            those.map(|interface| interface.name.as_str()).collect()
        };
        if names(true).is_empty() {
            let what =
                format!("no interface of this machine has multicast ({} has none)", names(false).join(", "));
            report.unknown("multicast", what, format!("`ip link set DEVICE multicast on`; {without}"));
            return Seen::default();
        }
        report.pass("multicast", format!("{} can", names(true).join(", ")));
    }
    let Some(membership) = membership else { return Seen::default() };
    let discovery = match Discovery::start(discovery::asking(membership, known)) {
        Ok(discovery) => discovery,
        Err(error) => {
            report.unknown("mdns", error.to_string(), without);
            return Seen::default();
        }
    };
    let found = wait_for_router(membership);
    let seen = discovery.seen();
    match found {
        Some((address, took)) => {
            let ms = took.as_millis();
            report.pass(
                "mdns",
                format!("the router answers, and proved its key, at {address} (after {ms} ms)"),
            );
            if !known.contains(&address) {
                let what = format!("the router is at {address} now, where this machine does not expect it");
                report.unknown("moved", what, "with discovery on, `moemesh node` finds it there by itself");
            }
        }
        None if seen.asked > 0 => {
            let what = format!(
                "{} claims to be the router, {} of them wrong or out of reach",
                seen.asked, seen.failed
            );
            report.unknown("mdns", what, format!("open TCP 8622 on the router's machine; {without}"));
        }
        None if seen.records > 0 => {
            let what = format!("{} other programs answer, the router does not", seen.others);
            report.unknown("mdns", what, format!("is it on, with discovery (`--discovery mdns`)? {without}"));
        }
        None => {
            let what =
                "nobody answers: multicast is blocked on the way, or no router with discovery is there";
            report.unknown("mdns", what, without);
        }
    }
    seen
}

/// Where the router was found, and after how long.
fn wait_for_router(membership: &Membership) -> Option<(SocketAddr, Duration)> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().ok()?;
    let began = Instant::now();
    runtime.block_on(async {
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        while began.elapsed() < LISTEN_FOR {
            ticks.tick().await;
            let found = membership.suggestions().of(membership.admission().router);
            if let Some(address) = found.first() {
                return Some((*address, began.elapsed()));
            }
        }
        None
    })
}

/// Nothing was reached, yet something may have been heard.
fn judge_direction(report: &mut Report, seen: Seen) {
    if seen.proven > 0 {
        let what = "TCP gets to the router and back, UDP does not";
        report.fail(
            "direction",
            what,
            "a firewall on the way or on the router drops UDP; let its port through",
        );
    } else if seen.asked > 0 {
        let what =
            "the router's multicast arrives here, and nothing that is sent to it is answered: a one-way path";
        report.fail(
            "direction",
            what,
            "run `moemesh doctor net` on the router's machine, and look at its firewall",
        );
    } else {
        let what = "whether packets get lost on the way there or on the way back cannot be seen from here";
        report.unknown("direction", what, "run `moemesh doctor net` on the router's machine as well");
    }
}

/// The router's side.
fn look_at_cluster(report: &mut Report, state: &Path) {
    let (listen, addresses, nodes) = match admin::ask(state, &Question::Where) {
        Ok(Answer::Where { listen, addresses, nodes }) => (listen, addresses, nodes),
        Ok(_) => {
            return report.fail(
                "router",
                "the router answers something else",
                "restart it with this version",
            );
        }
        Err(error) => return report.fail("router", error.to_string(), "start it, and ask again"),
    };
    report.pass("router", format!("it runs and listens on UDP {listen}"));
    if listen.ip().is_loopback() {
        let what = "it takes nodes of this machine only";
        report.unknown("listen", what, "for nodes on other machines: `moemesh router --listen 0.0.0.0:8621`");
    }
    for address in addresses {
        knock(report, address);
    }
    for node in nodes {
        match node.address {
            Some(address) => {
                report.pass("node", format!("{} is connected from {address}, {}", node.name, node.state))
            }
            None => {
                let what = format!("{} is not connected ({})", node.name, node.state);
                report.fail(
                    "node",
                    what,
                    "run `moemesh doctor net` on that machine; is `moemesh node` running there?",
                );
            }
        }
    }
}
