//! What is done with what is heard: one life of the protocols, until the end or a flood.
//!
//! mDNS claims go to `candidates`; once a second the next candidate is dialed, under the key it is supposed to have, so
//! that anybody else fails in the Noise handshake. Who passes is asked the question, and port and proven address
//! become a suggestion. Whoever of the roster asks is answered. Nothing here outlives the session but suggestions,
//! and a session that hears too many records or takes too much time says so and ends: its mDNS tables, which the
//! library does not bound, go with it.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use libp2p::core::ConnectedPoint;
use libp2p::core::transport::ListenerId;
use libp2p::futures::StreamExt;
use libp2p::request_response::{self, Message};
use libp2p::swarm::dial_opts::{DialOpts, PeerCondition};
use libp2p::swarm::{ConnectionId, SwarmEvent};
use libp2p::{Multiaddr, PeerId, Swarm, identify, mdns, ping};
use mesh_net::token::cluster_hash;
use mesh_wire::id::NodeId;
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

use crate::address::{to_multiaddr, to_socket};
use crate::budget;
use crate::candidates::Candidates;
use crate::circle::{Circle, peer_of};
use crate::question::{Answer, Does};
use crate::swarm::{Protocols, ProtocolsEvent};
use crate::tally::Tally;

/// How often the roster is looked at, a candidate is dialed, and time spent is counted.
const TICK: Duration = Duration::from_secs(1);

/// Records of mDNS that are kept, of all libp2p programs on the LAN, at some 250 bytes each. An office full of other
/// people's has a few hundred; ten thousand are a flood.
pub(crate) const RECORDS_MAX: usize = 1024;

/// Longest name of a program that is written to the log.
const AGENT_CHARS_MAX: usize = 64;

/// How a session ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Over {
    /// It was told to.
    Stopped,
    /// Too much came in; what, for the log.
    Flooded(String),
}

/// See the module.
pub(crate) struct Session {
    pub(crate) swarm: Swarm<Protocols>,
    circle: Circle,
    answer: Answer,
    /// The machine that is looked for.
    sought: Option<(NodeId, PeerId)>,
    pub(crate) candidates: Candidates,
    /// Connections that this machine dialed, and where.
    dialed: HashMap<ConnectionId, SocketAddr>,
    /// Roster that the allow-list follows.
    epoch: Option<u64>,
    tally: Tally,
}

impl Session {
    /// Of a machine of this circle that serves QUIC at this port, 0 for none.
    pub(crate) fn new(swarm: Swarm<Protocols>, circle: Circle, mesh_port: u16, tally: Tally) -> Session {
        let does = if matches!(circle, Circle::Router(_)) { Does::Router } else { Does::Node };
        let cluster = cluster_hash(circle.cluster());
        let version = env!("CARGO_PKG_VERSION").to_owned();
        let sought = circle.sought().and_then(|(key, _)| Some((key, peer_of(key)?)));
        let mut session = Session {
            swarm,
            circle,
            answer: Answer { cluster, does, port: mesh_port, version },
            sought,
            candidates: Candidates::default(),
            dialed: HashMap::new(),
            epoch: None,
            tally,
        };
        session.follow_roster();
        session
    }

    /// Takes connections at this address; at any port where this one is taken.
    ///
    /// # Errors
    /// What the system says, where no port is free.
    pub(crate) fn listen(&mut self, ip: IpAddr, port: u16) -> Result<ListenerId, String> {
        let wanted = self.swarm.listen_on(to_multiaddr(SocketAddr::new(ip, port)));
        wanted
            .or_else(|error| {
                tracing::warn!(port, %error, "discovery answers at another TCP port; --libp2p-port chooses one");
                self.swarm.listen_on(to_multiaddr(SocketAddr::new(ip, 0)))
            })
            .map_err(|error| error.to_string())
    }

    /// Lives until it is told to end, or hears too much.
    pub(crate) async fn run(mut self, stop: &mut watch::Receiver<bool>) -> Over {
        // Here, as the time is that of the thread which runs this.
        let spent = Spent::begin();
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = stop.wait_for(|stop| *stop) => return Over::Stopped,
                _ = ticks.tick() => {
                    if let Some(flood) = spent.too_much() {
                        return flood;
                    }
                    self.follow_roster();
                    self.ask_next();
                }
                event = self.swarm.select_next_some() => {
                    if let Some(flood) = self.take(event) {
                        return flood;
                    }
                }
            }
        }
    }

    /// Makes the allow-list the roster; who is no longer in it is cut off.
    fn follow_roster(&mut self) {
        let epoch = self.circle.epoch();
        if self.epoch.replace(epoch) == Some(epoch) {
            return;
        }
        let keys = self.circle.keys();
        let peers: Vec<PeerId> = keys.iter().copied().filter_map(peer_of).collect();
        let allowed = &mut self.swarm.behaviour_mut().allowed;
        let gone: Vec<PeerId> =
            allowed.allowed_peers().iter().filter(|peer| !peers.contains(peer)).copied().collect();
        for peer in gone {
            allowed.disallow_peer(peer);
        }
        for peer in peers {
            allowed.allow_peer(peer);
        }
        if let Some((_, suggestions)) = self.circle.sought() {
            suggestions.keep(|key| keys.contains(&key));
        }
    }

    /// Dials the next candidate, under the key it is supposed to have.
    fn ask_next(&mut self) {
        let Some((_, peer)) = self.sought else { return };
        let Some(address) = self.candidates.next(Instant::now()) else { return };
        let dial = DialOpts::peer_id(peer)
            .condition(PeerCondition::Always)
            .addresses(vec![to_multiaddr(address)])
            .allocate_new_port()
            .build();
        self.tally.update(|seen| seen.asked += 1);
        if let Err(error) = self.swarm.dial(dial) {
            tracing::debug!(%address, %error, "a candidate cannot be dialed");
        }
    }

    /// What to do about an event; `Some` where it was one too many.
    fn take(&mut self, event: SwarmEvent<ProtocolsEvent>) -> Option<Over> {
        match event {
            SwarmEvent::Behaviour(ProtocolsEvent::Mdns(mdns::Event::Discovered(list))) => {
                return self.hear(list);
            }
            SwarmEvent::Behaviour(ProtocolsEvent::Questions(event)) => self.talk(event),
            SwarmEvent::Behaviour(ProtocolsEvent::Identify(identify::Event::Received { info, .. })) => {
                let agent: String = info.agent_version.chars().take(AGENT_CHARS_MAX).collect();
                tracing::debug!(?agent, "a machine of the cluster says what it runs");
            }
            SwarmEvent::Behaviour(ProtocolsEvent::Ping(ping::Event { result: Ok(round_trip), .. })) => {
                tracing::debug!(?round_trip, "a machine of the cluster answers");
            }
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                self.meet(peer_id, connection_id, &endpoint);
            }
            SwarmEvent::ConnectionClosed { connection_id, .. } => {
                self.dialed.remove(&connection_id);
            }
            SwarmEvent::OutgoingConnectionError { error, .. } => {
                self.tally.update(|seen| seen.failed += 1);
                tracing::debug!(%error, "whoever claims to be the router there did not prove it");
            }
            SwarmEvent::IncomingConnectionError { error, .. } => {
                self.tally.update(|seen| seen.refused += 1);
                tracing::debug!(%error, "a stranger was not let in");
            }
            SwarmEvent::NewListenAddr { address, .. } => tracing::info!(%address, "discovery answers here"),
            SwarmEvent::ListenerClosed { reason: Err(error), .. } => {
                tracing::warn!(%error, "discovery does not answer any more");
            }
            _ => {}
        }
        None
    }

    /// Claims of mDNS.
    fn hear(&mut self, list: Vec<(PeerId, Multiaddr)>) -> Option<Over> {
        let known = self.swarm.behaviour().mdns.as_ref().map_or(0, |mdns| mdns.discovered_nodes().len());
        self.tally.update(|seen| {
            seen.records = seen.records.saturating_add(list.len() as u64);
            seen.others = known;
        });
        for (peer, address) in list {
            if self.sought.is_some_and(|(_, sought)| sought == peer)
                && let Some(address) = to_socket(&address)
            {
                tracing::debug!(%address, "somebody claims to be the router there");
                self.candidates.hear(address);
            }
        }
        (known > RECORDS_MAX).then(|| Over::Flooded(format!("{known} mDNS records: a flood?")))
    }

    /// A connection: who was dialed is asked.
    fn meet(&mut self, peer: PeerId, connection: ConnectionId, endpoint: &ConnectedPoint) {
        let ConnectedPoint::Dialer { address, .. } = endpoint else { return };
        let Some(address) = to_socket(address) else { return };
        self.dialed.insert(connection, address);
        self.swarm.behaviour_mut().questions.send_request(&peer, ());
    }

    /// Questions and answers. A connection is for one question, and closed when that is over.
    fn talk(&mut self, event: request_response::Event<(), Answer>) {
        match event {
            request_response::Event::Message { message: Message::Request { channel, .. }, .. } => {
                self.tally.update(|seen| seen.answered += 1);
                // Fails only where the asker has gone.
                drop(self.swarm.behaviour_mut().questions.send_response(channel, self.answer.clone()));
            }
            request_response::Event::Message {
                peer,
                connection_id,
                message: Message::Response { response, .. },
            } => {
                self.learn(peer, connection_id, &response);
                self.swarm.close_connection(connection_id);
            }
            request_response::Event::OutboundFailure { connection_id, error, .. } => {
                tracing::debug!(%error, "a question was not answered");
                self.swarm.close_connection(connection_id);
            }
            request_response::Event::InboundFailure { error, .. } => {
                tracing::debug!(%error, "a question was none");
            }
            request_response::Event::ResponseSent { .. } => {}
        }
    }

    /// An answer: the port is what it says, the address is where it was proven.
    fn learn(&mut self, peer: PeerId, connection: ConnectionId, answer: &Answer) {
        let (Some((key, sought)), Some(place)) = (self.sought, self.dialed.get(&connection).copied()) else {
            return;
        };
        if peer != sought || answer.cluster != self.answer.cluster || answer.port == 0 {
            tracing::warn!(address = %place, ?answer, "the router's key answers for something else");
            return;
        }
        self.candidates.prove(place);
        let address = SocketAddr::new(place.ip(), answer.port);
        let Some((_, suggestions)) = self.circle.sought() else { return };
        self.tally.update(|seen| seen.proven += 1);
        if suggestions.suggest(key, address) {
            tracing::info!(%address, version = answer.version, does = ?answer.does, "found the router");
        }
    }
}

/// What this thread had used when a session began on it.
struct Spent(Instant, Option<Duration>);

impl Spent {
    fn begin() -> Spent {
        Spent(Instant::now(), budget::used())
    }

    /// The end of a session that took more than its share since.
    fn too_much(&self) -> Option<Over> {
        let used = budget::used()?.checked_sub(self.1?)?;
        let lived = self.0.elapsed();
        (!budget::allows(lived, used)).then(|| {
            let (used, lived) = (used.as_millis(), lived.as_secs());
            Over::Flooded(format!("{used} ms of CPU time within {lived} s: a flood?"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn a_session_that_takes_too_much_of_a_core_ends() {
        let spent = Spent::begin();
        assert_eq!(spent.too_much(), None);
        let mut number = 1_u64;
        let over = loop {
            (0..100_000).for_each(|_| number = std::hint::black_box(number.wrapping_mul(3)));
            if let Some(over) = spent.too_much() {
                break over;
            }
        };
        assert!(matches!(over, Over::Flooded(what) if what.contains("CPU time")));
    }
}
