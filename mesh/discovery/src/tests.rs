//! Sessions over real TCP on loopback, without multicast, against peers that say anything. What a LAN adds, spoofed and
//! flooding mDNS, is in `tests/lab/discovery.py`.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use libp2p::core::ConnectedPoint;
use libp2p::futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, StreamExt};
use libp2p::identity::Keypair;
use libp2p::request_response::{self, Message, ProtocolSupport};
use libp2p::swarm::{NetworkBehaviour, SwarmEvent};
use libp2p::{StreamProtocol, Swarm, SwarmBuilder, identify, noise, ping, tcp, yamux};
use mesh_net::authority::Authority;
use mesh_net::identity::Identity;
use mesh_net::membership::{Admission, Membership};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::address::to_multiaddr;
use crate::circle::{Circle, keypair_of, peer_of};
use crate::question::{ANSWER_BYTES_MAX, PROTOCOL};
use crate::session::{Over, Session};
use crate::swarm::{CONNECTIONS_PER_PEER_MAX, Multicast, swarm};
use crate::tally::{Seen, Tally};

/// Longer than anything here takes, on the slowest machine: reached only where a test fails.
const LONG: Duration = Duration::from_secs(60);

const MESH_PORT: u16 = 8621;
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// A router's authority and the identities of its nodes.
struct Keys {
    authority: Arc<Authority>,
    nodes: Vec<Identity>,
}

fn keys(nodes: usize) -> Keys {
    let authority = Arc::new(Authority::in_memory().unwrap());
    let nodes: Vec<_> = (0..nodes).map(|_| Identity::generate().unwrap()).collect();
    for (at, node) in nodes.iter().enumerate() {
        authority.admit(&format!("node-{at}"), node.id()).unwrap();
    }
    Keys { authority, nodes }
}

impl Keys {
    fn membership(&self, node: usize) -> Arc<Membership> {
        let (cluster, router) = (self.authority.cluster(), self.authority.identity().id());
        let admission = Admission { cluster, router, name: "node".into(), addresses: Vec::new() };
        Arc::new(Membership::in_memory(self.nodes[node].clone(), admission))
    }

    fn router_pair(&self) -> Keypair {
        keypair_of(self.authority.identity()).unwrap()
    }

    fn node_pair(&self, node: usize) -> Keypair {
        keypair_of(&self.nodes[node]).unwrap()
    }
}

/// A session that runs as a task.
struct Running {
    stop: watch::Sender<bool>,
    tally: Tally,
    task: JoinHandle<Over>,
}

impl Running {
    fn start(session: Session, tally: Tally) -> Running {
        let (stop, mut stopped) = watch::channel(false);
        let task = tokio::spawn(async move { session.run(&mut stopped).await });
        Running { stop, tally, task }
    }

    /// The router's, and where it answers.
    async fn router(keys: &Keys, mesh_port: u16) -> (Running, SocketAddr) {
        let tally = Tally::default();
        let circle = Circle::Router(Arc::clone(&keys.authority));
        let protocols = swarm(keys.router_pair(), Multicast::None).unwrap();
        let mut session = Session::new(protocols, circle, mesh_port, tally.clone());
        session.listen(HERE, 0).unwrap();
        let address = listening(&mut session.swarm).await;
        (Running::start(session, tally), address)
    }

    /// A node's that was told where the router might be.
    fn node(membership: &Arc<Membership>, claims: &[SocketAddr]) -> Running {
        let tally = Tally::default();
        let pair = keypair_of(membership.identity()).unwrap();
        let protocols = swarm(pair, Multicast::None).unwrap();
        let circle = Circle::Node(Arc::clone(membership));
        let mut session = Session::new(protocols, circle, 0, tally.clone());
        claims.iter().for_each(|claim| session.candidates.hear(*claim));
        Running::start(session, tally)
    }

    fn seen(&self) -> Seen {
        self.tally.seen()
    }

    /// Waits until something was seen.
    async fn until(&self, what: &str, wanted: impl Fn(&Seen) -> bool) {
        let waiting = async {
            while !wanted(&self.seen()) {
                assert!(!self.task.is_finished(), "{what}: the session is over");
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        assert!(timeout(LONG, waiting).await.is_ok(), "never: {what}; {:?}", self.seen());
    }

    async fn end(self) {
        self.stop.send(true).unwrap();
        assert_eq!(self.task.await.unwrap(), Over::Stopped);
    }
}

async fn listening<B: NetworkBehaviour>(swarm: &mut Swarm<B>) -> SocketAddr {
    loop {
        if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await {
            let text = address.to_string();
            return SocketAddr::new(HERE, text.rsplit('/').next().unwrap().parse().unwrap());
        }
    }
}

/// Says these bytes where the protocol has a question or an answer.
#[derive(Clone, Debug, Default)]
struct Raw {
    question: Vec<u8>,
    answer: Vec<u8>,
}

impl request_response::Codec for Raw {
    type Protocol = StreamProtocol;
    type Request = ();
    type Response = Vec<u8>;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<()>
    where
        T: AsyncRead + Unpin + Send,
    {
        io.read_to_end(&mut Vec::new()).await.map(drop)
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        let mut bytes = Vec::new();
        io.read_to_end(&mut bytes).await?;
        Ok(bytes)
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, _: ()) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        io.write_all(&self.question).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, _: Vec<u8>) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        io.write_all(&self.answer).await
    }
}

/// A peer that speaks all protocols and says anything.
#[derive(NetworkBehaviour)]
#[behaviour(prelude = "libp2p::swarm::derive_prelude")]
struct Hostile {
    raw: request_response::Behaviour<Raw>,
    identify: identify::Behaviour,
    ping: ping::Behaviour,
}

fn hostile(pair: Keypair, raw: Raw, agent: &str) -> Swarm<Hostile> {
    let protocols = [(PROTOCOL, ProtocolSupport::Full)];
    let identify = identify::Config::new("/moemesh/discovery/1".into(), pair.public())
        .with_agent_version(agent.to_owned());
    let behaviour = Hostile {
        raw: request_response::Behaviour::with_codec(raw, protocols, request_response::Config::default()),
        identify: identify::Behaviour::new(identify),
        ping: ping::Behaviour::default(),
    };
    SwarmBuilder::with_existing_identity(pair)
        .with_tokio()
        .with_tcp(tcp::Config::default(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|_| behaviour)
        .unwrap()
        .with_swarm_config(|config| config.with_idle_connection_timeout(LONG))
        .build()
}

/// What a hostile peer came to see.
#[derive(Debug, Default, PartialEq, Eq)]
struct Spied {
    answers: Vec<Vec<u8>>,
    failures: usize,
    identified: usize,
    pinged: usize,
    connected: usize,
    closed: usize,
}

/// Lets it live until it has seen enough.
async fn spy(swarm: &mut Swarm<Hostile>, enough: impl Fn(&Spied) -> bool) -> Spied {
    let mut spied = Spied::default();
    let living = async {
        while !enough(&spied) {
            match swarm.select_next_some().await {
                SwarmEvent::Behaviour(HostileEvent::Raw(event)) => match event {
                    request_response::Event::Message {
                        message: Message::Response { response, .. }, ..
                    } => {
                        spied.answers.push(response);
                    }
                    request_response::Event::Message {
                        message: Message::Request { channel, .. }, ..
                    } => drop(swarm.behaviour_mut().raw.send_response(channel, Vec::new())),
                    request_response::Event::OutboundFailure { .. } => spied.failures += 1,
                    _ => {}
                },
                SwarmEvent::Behaviour(HostileEvent::Identify(identify::Event::Received { .. })) => {
                    spied.identified += 1;
                }
                SwarmEvent::Behaviour(HostileEvent::Ping(ping::Event { result: Ok(_), .. })) => {
                    spied.pinged += 1
                }
                SwarmEvent::ConnectionEstablished { .. } => spied.connected += 1,
                SwarmEvent::ConnectionClosed { .. } => spied.closed += 1,
                _ => {}
            }
        }
    };
    assert!(timeout(LONG, living).await.is_ok(), "not within {LONG:?}");
    spied
}

#[test]
fn a_node_finds_its_router_where_it_proves_its_key() {
    runtime().block_on(async {
        let keys = keys(1);
        let (router, address) = Running::router(&keys, MESH_PORT).await;
        let membership = keys.membership(0);
        let node = Running::node(&membership, &[address]);
        node.until("found", |seen| seen.proven == 1).await;
        let found = membership.suggestions().of(membership.admission().router);
        assert_eq!(found, [SocketAddr::new(HERE, MESH_PORT)], "the proven address, the port of QUIC");
        assert_eq!((router.seen().answered, router.seen().refused), (1, 0));
        router.end().await;
        node.end().await;
    });
}

#[test]
fn the_victims_name_at_an_attackers_address_leads_nobody_there() {
    runtime().block_on(async {
        let keys = keys(2);
        let (router, honest) = Running::router(&keys, MESH_PORT).await;
        // A machine of the cluster is no router either.
        let mut rogues = [
            hostile(Keypair::generate_ed25519(), Raw::default(), "x"),
            hostile(keys.node_pair(1), Raw::default(), "x"),
        ];
        let mut claims = Vec::new();
        for rogue in &mut rogues {
            rogue
                .listen_on(to_multiaddr(SocketAddr::from(([127, 0, 0, 2 + claims.len() as u8], 0))))
                .unwrap();
            let port = listening(rogue).await.port();
            claims.push(SocketAddr::from(([127, 0, 0, 2 + claims.len() as u8], port)));
        }
        claims.push(honest);
        let membership = keys.membership(0);
        let node = Running::node(&membership, &claims);
        let [mut one, mut other] = rogues;
        let tasks = [
            tokio::spawn(async move { spy(&mut one, |_| false).await }),
            tokio::spawn(async move { spy(&mut other, |_| false).await }),
        ];
        node.until("the honest one is found", |seen| seen.proven == 1).await;
        assert_eq!(node.seen().failed, 2, "both were dialed, and failed");
        let found = membership.suggestions().of(membership.admission().router);
        assert_eq!(found, [SocketAddr::new(HERE, MESH_PORT)]);
        tasks.iter().for_each(JoinHandle::abort);
        router.end().await;
        node.end().await;
    });
}

#[test]
fn a_stranger_gets_a_handshake_and_no_protocol() {
    runtime().block_on(async {
        let keys = keys(1);
        let (router, address) = Running::router(&keys, MESH_PORT).await;
        for pair in [Keypair::generate_ed25519(), keys.router_pair()] {
            let mut stranger = hostile(pair, Raw::default(), "x");
            let peer = peer_of(keys.authority.identity().id()).unwrap();
            let own = *stranger.local_peer_id() == peer;
            if own {
                // The router's own key, copied, is no node's: libp2p itself refuses to talk to itself.
                assert!(stranger.dial(to_multiaddr(address)).is_ok());
                let refused = async {
                    while !matches!(
                        stranger.select_next_some().await,
                        SwarmEvent::OutgoingConnectionError { .. }
                    ) {}
                };
                assert!(timeout(LONG, refused).await.is_ok());
                continue;
            }
            stranger.dial(to_multiaddr(address)).unwrap();
            let connected = spy(&mut stranger, |spied| spied.connected == 1).await;
            assert_eq!(connected.connected, 1, "Noise is done before anybody is judged");
            stranger.behaviour_mut().raw.send_request(&peer, ());
            let spied = spy(&mut stranger, |spied| spied.closed == 1 && spied.failures == 1).await;
            assert_eq!((spied.identified, spied.pinged, spied.answers.len()), (0, 0, 0), "{spied:?}");
        }
        router.until("it was refused", |seen| seen.refused >= 1).await;
        assert_eq!(router.seen().answered, 0);
        router.end().await;
    });
}

/// A member's connection to the router; the router's peer id.
async fn connect(swarm: &mut Swarm<Hostile>, keys: &Keys, address: SocketAddr) -> libp2p::PeerId {
    swarm.dial(to_multiaddr(address)).unwrap();
    loop {
        if let SwarmEvent::ConnectionEstablished { endpoint: ConnectedPoint::Dialer { .. }, .. } =
            swarm.select_next_some().await
        {
            return peer_of(keys.authority.identity().id()).unwrap();
        }
    }
}

#[test]
fn what_a_member_says_too_much_of_is_not_read_and_others_are_served() {
    runtime().block_on(async {
        let keys = keys(2);
        let (router, address) = Running::router(&keys, MESH_PORT).await;
        // A megabyte as a question, a megabyte as the name of a program, thousands of addresses.
        let raw = Raw { question: vec![b'x'; 1 << 20], answer: Vec::new() };
        let mut rogue = hostile(keys.node_pair(0), raw, &"x".repeat(1 << 20));
        for port in 1..5000 {
            rogue.add_external_address(to_multiaddr(SocketAddr::from(([10, 0, 0, 1], port))));
        }
        let peer = connect(&mut rogue, &keys, address).await;
        for _ in 0..20 {
            rogue.behaviour_mut().raw.send_request(&peer, ());
        }
        let spied = spy(&mut rogue, |spied| spied.failures + spied.answers.len() == 20).await;
        assert!(spied.answers.iter().all(Vec::is_empty), "no answer to what is no question: {spied:?}");
        assert_eq!(router.seen().answered, 0);
        // The same machine, asking as it should, and another one.
        let mut honest = hostile(keys.node_pair(1), Raw::default(), "x");
        let peer = connect(&mut honest, &keys, address).await;
        honest.behaviour_mut().raw.send_request(&peer, ());
        let spied =
            spy(&mut honest, |spied| spied.answers.len() == 1 && spied.identified > 0 && spied.pinged > 0)
                .await;
        assert!((1..=ANSWER_BYTES_MAX).contains(&spied.answers[0].len()));
        router.end().await;
    });
}

#[test]
fn answers_that_are_none_suggest_nothing() {
    runtime().block_on(async {
        let keys = keys(1);
        // What a right answer looks like, from the right one.
        let right = {
            let (router, address) = Running::router(&keys, MESH_PORT).await;
            let mut asker = hostile(keys.node_pair(0), Raw::default(), "x");
            let peer = connect(&mut asker, &keys, address).await;
            asker.behaviour_mut().raw.send_request(&peer, ());
            let answer = spy(&mut asker, |spied| !spied.answers.is_empty()).await.answers.remove(0);
            router.end().await;
            answer
        };
        let mut other_cluster = right.clone();
        other_cluster[0] ^= 1;
        let mut no_port = right.clone();
        no_port[33..35].fill(0);
        let wrong = [
            Vec::new(),
            right[..right.len() - 1].to_vec(),
            [&right[..], b"x"].concat(),
            vec![0; 1 << 20],
            other_cluster,
            no_port,
        ];
        for (at, answer) in wrong.into_iter().enumerate() {
            // The router's own key, in the hands of a program that says anything.
            let mut router = hostile(keys.router_pair(), Raw { question: Vec::new(), answer }, "x");
            router.listen_on(to_multiaddr(SocketAddr::new(HERE, 0))).unwrap();
            let address = listening(&mut router).await;
            let membership = keys.membership(0);
            let node = Running::node(&membership, &[address]);
            let served = tokio::spawn(async move { spy(&mut router, |spied| spied.closed > 0).await });
            // The node hangs up when its question is over.
            assert_eq!(served.await.unwrap().connected, 1);
            assert_eq!((node.seen().asked, node.seen().proven), (1, 0), "answer {at}");
            assert!(membership.suggestions().of(membership.admission().router).is_empty(), "answer {at}");
            node.end().await;
        }
    });
}

#[test]
fn one_member_has_a_few_connections_and_none_once_it_is_revoked() {
    runtime().block_on(async {
        let keys = keys(1);
        let (router, address) = Running::router(&keys, MESH_PORT).await;
        let mut rogue = hostile(keys.node_pair(0), Raw::default(), "x");
        let many = 3 * CONNECTIONS_PER_PEER_MAX as usize;
        for _ in 0..many {
            rogue.dial(to_multiaddr(address)).unwrap();
        }
        let limit = CONNECTIONS_PER_PEER_MAX as usize;
        let spied = spy(&mut rogue, |spied| spied.closed == many - limit).await;
        assert_eq!(spied.connected, many, "{spied:?}");
        assert_eq!(rogue.network_info().connection_counters().num_established() as usize, limit);
        keys.authority.revoke("node-0").unwrap();
        let spied = spy(&mut rogue, |spied| spied.closed == limit).await;
        assert_eq!(spied.closed, limit);
        router.end().await;
    });
}
