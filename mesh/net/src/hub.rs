//! The router's side: a thread that keeps the nodes connected and carries calls for the compute thread.
//!
//! The compute thread is synchronous. It reads the routes (one short read lock), asks for a budget, hands calls to
//! `send` and waits for any `PendingCall`. A current-thread tokio runtime accepts connections, runs one task per
//! lane, and drives the cluster's pure logic: whatever happens is fed to `Cluster::handle`, and its actions are
//! carried out. Nothing else decides about placement or trust.
//!
//! The hub's thread drives that runtime, but for decode calls, which are short and many: those the compute thread
//! sends itself, and it drives while it waits for their replies, so no thread is woken on the way (`helm`). Prefill
//! calls are handed to the hub's thread, as their megabytes are to move while the compute thread computes. Refuses
//! to start for an identity that is not the roster's router.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_proto::cluster::{self, Action, Cluster, Event, NodeState, Policy};
use mesh_proto::facts::{Member, ModelFacts};
use mesh_proto::health::Budget;
use mesh_proto::placement::Outlook;
use mesh_proto::routes::{NodeIndex, Routes};
use mesh_wire::buffer::{Pool, PoolCounters};
use mesh_wire::call::OutgoingCall;
use mesh_wire::control::Goodbye;
use mesh_wire::id::NodeId;
use mesh_wire::message::Message;
use quinn::{Endpoint, Incoming};
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::endpoint::{self, Close, EndpointError};
use crate::helm::{Helm, SEND_HERE_BYTES_MAX};
use crate::identity::Identity;
use crate::lane::Job;
pub use crate::lane::Lane;
use crate::link::{GOODBYE_WITHIN, Link, Outgoing, Session, introduce};
use crate::pending::{CallError, PendingCall, Slot};
use crate::plan_file::PlanFile;
use crate::roster::{Machine, Roster, RosterError};
pub use crate::tally::NodeCounters;
use crate::tally::{Feed, Tally};

/// How often the cluster's logic is told that time passed.
const TICK: Duration = Duration::from_millis(100);

/// Time a peer has to complete the handshake; on a LAN it takes three milliseconds.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(3);

/// Connections that may be between first packet and hello at a time.
const GREETING_MAX: usize = 64;

/// From this many on, a peer must first prove that it receives at the address it sends from: a flood of forged
/// first packets then costs one small packet each and no memory.
const GREETING_UNPROVEN_MAX: usize = 16;

/// Commands from other threads that may wait.
const COMMANDS_MAX: usize = 16;

/// What a hub needs to start.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// This machine's key; the roster's router.
    pub identity: Identity,
    /// Who belongs to the cluster.
    pub roster: Roster,
    /// Address to listen on; loopback unless the operator says otherwise (`HubConfig::LISTEN`).
    pub listen: SocketAddr,
    /// The model.
    pub facts: ModelFacts,
    /// When plans are made and who takes part.
    pub policy: Policy,
    /// How long a thread that waits for a decode call looks for packets before it sleeps; zero where threads share
    /// cores.
    pub spin: Duration,
    /// Bytes of frames that may be under way.
    pub pool_bytes_max: usize,
    /// Where plans are kept, so that nodes keep their shards when the router starts again.
    pub placement_file: Option<PathBuf>,
}

impl HubConfig {
    /// Default address to listen on.
    pub const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8621);

    /// Default of `pool_bytes_max`: 64 calls of 1 MiB, and as many replies of 2 MiB.
    pub const POOL_BYTES_MAX: usize = 256 << 20;

    /// A configuration with the defaults.
    pub fn new(identity: Identity, roster: Roster, facts: ModelFacts) -> HubConfig {
        HubConfig {
            identity,
            roster,
            listen: HubConfig::LISTEN,
            facts,
            policy: Policy::default(),
            spin: Duration::ZERO,
            pool_bytes_max: HubConfig::POOL_BYTES_MAX,
            placement_file: None,
        }
    }
}

/// Why a hub does not start.
#[derive(Debug, Error)]
pub enum HubError {
    /// The roster is not usable.
    #[error(transparent)]
    Roster(#[from] RosterError),
    /// This machine is not the roster's router.
    #[error(
        "this machine's key is {key}, the roster's router `{router}` has another; use the router's key file, or put this key into every machine's roster"
    )]
    NotTheRouter {
        /// Key of this machine.
        key: String,
        /// Name of the roster's router.
        router: String,
    },
    /// No endpoint.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// No thread or no runtime.
    #[error("starting the network thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// One node, as `moemesh nodes` shows it.
#[derive(Clone, Debug)]
pub struct NodeStatus {
    /// Its name in the roster.
    pub name: String,
    /// Its key.
    pub id: NodeId,
    /// Where it is connected from.
    pub address: Option<SocketAddr>,
    /// QUIC's estimate of the round trip, while it is connected.
    pub path_rtt: Option<Duration>,
    /// State, epoch, experts, hello, last health report and mean times of calls.
    pub cluster: cluster::NodeStatus,
    /// What was counted.
    pub counters: NodeCounters,
}

impl NodeStatus {
    /// Whether it is connected.
    pub fn is_connected(&self) -> bool {
        self.cluster.state != NodeState::Absent
    }
}

/// What was counted beyond the nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HubCounters {
    /// Connections that got as far as a hello.
    pub connections: u64,
    /// Handshakes that failed: unknown keys, other protocols, time-outs.
    pub handshakes_failed: u64,
    /// First packets answered with a demand for proof of address, or turned away, because too many came at once.
    pub deferred: u64,
    /// The frame pool.
    pub pool: PoolCounters,
}

struct Seat {
    machine: Machine,
    tally: Arc<Tally>,
    link: Mutex<Option<Arc<Link>>>,
}

impl Seat {
    fn link(&self) -> MutexGuard<'_, Option<Arc<Link>>> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What other threads want of the network thread.
enum Command {
    Plan,
}

struct Shared {
    seats: Vec<Seat>,
    started: Instant,
    cluster: Mutex<Cluster>,
    changed: Condvar,
    plan_file: Option<Arc<PlanFile>>,
    routes: RwLock<Arc<Routes>>,
    pool: Pool,
    connections: AtomicU64,
    handshakes_failed: AtomicU64,
    deferred: AtomicU64,
    /// Goodbye was said: nodes that leave from now on do what they were told.
    closing: AtomicBool,
}

/// See the module. Dropping it shuts it down.
pub struct Hub {
    shared: Arc<Shared>,
    local: SocketAddr,
    helm: Arc<Helm>,
    commands: mpsc::Sender<Command>,
    /// Set once, to the reason; not a command, as a queue may be full.
    stop: watch::Sender<Option<String>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Names the address.
impl std::fmt::Debug for Hub {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Hub({})", self.local)
    }
}

impl Hub {
    /// Listens and starts the network thread.
    ///
    /// # Errors
    /// `HubError`: roster, key, address or thread.
    pub fn start(config: HubConfig) -> Result<Hub, HubError> {
        config.roster.check()?;
        let router = &config.roster.router;
        if router.key != config.identity.id() {
            let key = config.identity.id().to_hex();
            return Err(HubError::NotTheRouter { key, router: router.name.clone() });
        }
        let helm = Arc::new(Helm::new(config.spin)?);
        let endpoint = {
            let _entered = helm.enter();
            endpoint::listen(&config.identity, &config.roster, config.listen)?
        };
        let local =
            endpoint.local_addr().map_err(|source| EndpointError::Bind { address: config.listen, source })?;
        let shared = Arc::new(Shared::new(config));
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let (stop, stopped) = watch::channel(None);
        let server = Server { shared: Arc::clone(&shared), endpoint, sessions: JoinSet::new() };
        let network = Arc::clone(&helm);
        let thread = std::thread::Builder::new()
            .name("mesh-hub".into())
            .spawn(move || network.keep(server.serve(inbox, stopped)))?;
        Ok(Hub { shared, local, helm, commands, stop, thread: Mutex::new(Some(thread)) })
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local
    }

    /// The pool calls are to be built in.
    pub fn pool(&self) -> &Pool {
        &self.shared.pool
    }

    /// The table to dispatch by. Costs a read lock that is only ever held to swap a pointer.
    pub fn routes(&self) -> Arc<Routes> {
        Arc::clone(&self.shared.routes.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// How long a call with this many assignments may take at this node now, given what is already out to it.
    pub fn budget(&self, node: NodeIndex, assignments: u32) -> Budget {
        let out = self.outstanding(node);
        self.shared.cluster().budget(node, assignments.saturating_add(out))
    }

    /// Assignments that are out to this node.
    pub fn outstanding(&self, node: NodeIndex) -> u32 {
        self.shared.seats.get(usize::from(node)).map_or(0, |seat| seat.tally.outstanding())
    }

    /// Hands a call over; its budget (`CallHead::budget_us`) runs from now. A decode call has left the machine when
    /// this returns, if the node's lanes and the link are free. Never waits for the node: where the call cannot be
    /// sent, `wait` says so at once.
    pub fn send(&self, node: NodeIndex, lane: Lane, call: OutgoingCall) -> PendingCall {
        let slot = Slot::new(&call, Instant::now());
        let here = lane == Lane::Decode && call.frame_bytes() <= SEND_HERE_BYTES_MAX;
        let pending = PendingCall::new(Arc::clone(&slot), here.then(|| Arc::clone(&self.helm)));
        let seat = self.shared.seats.get(usize::from(node));
        match seat.and_then(|seat| Some((seat.link().clone()?, &seat.tally))) {
            Some((link, tally)) => {
                let job = Job::new(slot, call, Arc::clone(tally));
                if here {
                    self.helm.now(|| link.queue(lane).push(job));
                } else {
                    link.queue(lane).push(job);
                    self.helm.release();
                }
            }
            None => drop(slot.complete(Err(CallError::Gone))),
        }
        pending
    }

    /// Counts a call of this node that others were asked to answer as well.
    pub fn note_hedged(&self, node: NodeIndex) {
        if let Some(seat) = self.shared.seats.get(usize::from(node)) {
            seat.tally.update(|counters| counters.hedged += 1);
        }
    }

    /// Waits until at least `nodes` nodes are connected and everyone who is part of the plan serves it.
    /// False where that is not so within `timeout`.
    pub fn wait_ready(&self, nodes: usize, timeout: Duration) -> bool {
        self.wait_until(timeout, |cluster| {
            let present = |status: &cluster::NodeStatus| status.state != NodeState::Absent;
            cluster.settled() && cluster.statuses().iter().filter(|status| present(status)).count() >= nodes
        })
    }

    /// Waits until the cluster is as wanted; false where it is not within `timeout`.
    pub fn wait_until(&self, timeout: Duration, wanted: impl Fn(&Cluster) -> bool) -> bool {
        let until = Instant::now() + timeout;
        let mut cluster = self.shared.cluster();
        loop {
            if wanted(&cluster) {
                return true;
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let woken = self.shared.changed.wait_timeout(cluster, left);
            cluster = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Makes a plan for the nodes that are here now, without waiting for more.
    pub fn plan_now(&self) {
        // A full queue holds sixteen such commands; closed, there is nobody to plan for.
        drop(self.commands.try_send(Command::Plan));
    }

    /// The plan in use, in short.
    pub fn outlook(&self) -> Option<Outlook> {
        self.shared.cluster().outlook()
    }

    /// Every node of the roster, in the order of `NodeIndex`.
    pub fn nodes(&self) -> Vec<NodeStatus> {
        let statuses = self.shared.cluster().statuses();
        let node = |(seat, cluster): (&Seat, cluster::NodeStatus)| {
            let link = seat.link().clone();
            NodeStatus {
                name: seat.machine.name.clone(),
                id: seat.machine.key,
                address: link.as_ref().map(|link| link.connection.remote_address()),
                path_rtt: link.as_ref().map(|link| link.connection.rtt()),
                cluster,
                counters: seat.tally.snapshot(),
            }
        };
        self.shared.seats.iter().zip(statuses).map(node).collect()
    }

    /// What was counted beyond the nodes.
    pub fn counters(&self) -> HubCounters {
        HubCounters {
            connections: self.shared.connections.load(Ordering::Relaxed),
            handshakes_failed: self.shared.handshakes_failed.load(Ordering::Relaxed),
            deferred: self.shared.deferred.load(Ordering::Relaxed),
            pool: self.shared.pool.counters(),
        }
    }

    /// Says goodbye to the nodes, closes, and waits for the thread: half a second at most. Calls still out fail with
    /// `Gone`. Only the first call does anything.
    pub fn shutdown(&self, reason: &str) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(thread) = thread else { return };
        self.stop.send_replace(Some(reason.to_owned()));
        if thread.join().is_err() {
            tracing::error!("the network thread panicked");
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.shutdown("the router is stopping");
    }
}

impl Shared {
    fn new(config: HubConfig) -> Shared {
        let member = |node: &Machine| Member { id: node.key, name: node.name.clone() };
        let members = config.roster.nodes.iter().map(member).collect();
        let mut cluster = Cluster::with_policy(members, config.facts, config.policy);
        let plan_file = config.placement_file.map(|path| Arc::new(PlanFile::new(path)));
        let stored = plan_file.as_ref().and_then(|file| file.read(cluster.facts(), cluster.members()));
        if let Some(stored) = stored {
            tracing::info!(epoch = stored.epoch, "the last plan is taken up again");
            cluster.restore(stored);
        }
        let routes = RwLock::new(cluster.routes());
        let seat = |machine| Seat { machine, tally: Arc::default(), link: Mutex::new(None) };
        Shared {
            seats: config.roster.nodes.into_iter().map(seat).collect(),
            started: Instant::now(),
            cluster: Mutex::new(cluster),
            changed: Condvar::new(),
            plan_file,
            routes,
            pool: Pool::new(config.pool_bytes_max),
            connections: AtomicU64::new(0),
            handshakes_failed: AtomicU64::new(0),
            deferred: AtomicU64::new(0),
            closing: AtomicBool::new(false),
        }
    }

    /// Keeps a new plan for the next start.
    fn keep_plan(&self, file: &Arc<PlanFile>) {
        let cluster = self.cluster();
        let Some(stored) = cluster.newest() else { return };
        let (facts, members) = (cluster.facts().clone(), cluster.members().to_vec());
        drop(cluster);
        let file = Arc::clone(file);
        let write = move || file.write(stored.epoch, &stored.to_text(&facts, &members));
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(write)),
            Err(_) => write(),
        }
    }

    fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self, action: Action) {
        match action {
            Action::Place(node, placement) => {
                let Some(seat) = self.seats.get(usize::from(node)) else { return };
                let Some(link) = seat.link().clone() else { return };
                match Message::Placement(placement).encode(&self.pool) {
                    Ok(frame) => link.tell(Outgoing::Frame(frame)),
                    Err(error) => {
                        tracing::error!(node = seat.machine.name, %error, "a placement cannot be sent");
                        link.close(Close::Unwanted, "its placement cannot be sent");
                    }
                }
            }
            Action::Disconnect(node, reason) => {
                let Some(seat) = self.seats.get(usize::from(node)) else { return };
                tracing::warn!(node = seat.machine.name, reason, "a node is disconnected");
                if let Some(link) = seat.link().take() {
                    link.close(Close::Unwanted, &reason);
                }
            }
            Action::RoutesChanged => {
                let routes = self.cluster().routes();
                *self.routes.write().unwrap_or_else(PoisonError::into_inner) = routes;
            }
            Action::Report(node, text) => {
                let name = self.seats.get(usize::from(node)).map(|seat| seat.machine.name.as_str());
                tracing::warn!(node = name, "{text}");
            }
        }
    }
}

/// Only the runtime's tasks feed, one at a time, so actions are carried out in the order they were decided in.
impl Feed for Shared {
    fn feed(&self, event: Event) {
        let quiet = matches!(event, Event::Answered { .. } | Event::Tick);
        let (actions, planned) = {
            let mut cluster = self.cluster();
            let before = cluster.newest_epoch();
            let actions = cluster.handle(self.started.elapsed(), event);
            (actions, cluster.newest_epoch() > before)
        };
        if let Some(file) = self.plan_file.as_ref().filter(|_| planned) {
            self.keep_plan(file);
        }
        let wake = !quiet || !actions.is_empty();
        for action in actions {
            self.carry_out(action);
        }
        if wake {
            self.changed.notify_all();
        }
    }
}

/// The task that everything else of the hub hangs on.
struct Server {
    shared: Arc<Shared>,
    endpoint: Endpoint,
    sessions: JoinSet<()>,
}

impl Server {
    async fn serve(mut self, mut inbox: mpsc::Receiver<Command>, mut stop: watch::Receiver<Option<String>>) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let greeting = Arc::new(AtomicU64::new(0));
        let reason = loop {
            tokio::select! {
                reason = stop.wait_for(Option::is_some) => {
                    break reason.ok().and_then(|reason| reason.clone()).unwrap_or_default();
                }
                Some(Command::Plan) = inbox.recv() => self.shared.feed(Event::Plan),
                _ = ticks.tick() => self.shared.feed(Event::Tick),
                incoming = self.endpoint.accept() => match incoming {
                    Some(incoming) => self.greet(incoming, &greeting),
                    None => break String::new(),
                },
                Some(_) = self.sessions.join_next() => {}
            }
        };
        self.close(reason).await;
    }

    /// Starts a session with a new peer, or puts it off where too many come at once.
    fn greet(&mut self, incoming: Incoming, greeting: &Arc<AtomicU64>) {
        let now = greeting.load(Ordering::Relaxed) as usize;
        if now >= GREETING_MAX {
            self.shared.deferred.fetch_add(1, Ordering::Relaxed);
            incoming.refuse();
        } else if now >= GREETING_UNPROVEN_MAX && incoming.may_retry() {
            self.shared.deferred.fetch_add(1, Ordering::Relaxed);
            // Fails only where `may_retry` is false.
            drop(incoming.retry());
        } else {
            greeting.fetch_add(1, Ordering::Relaxed);
            let shared = Arc::clone(&self.shared);
            let greeting = Greeting(Arc::clone(greeting));
            self.sessions.spawn(session(shared, incoming, greeting));
        }
    }

    /// Tells every node, waits a moment for it to arrive, and closes the endpoint.
    async fn close(mut self, reason: String) {
        self.endpoint.set_server_config(None);
        self.shared.closing.store(true, Ordering::Relaxed);
        for seat in &self.shared.seats {
            let Some(link) = seat.link().clone() else { continue };
            match Message::Goodbye(Goodbye { reason: reason.clone() }).encode(&self.shared.pool) {
                Ok(frame) => link.tell(Outgoing::Last(frame)),
                Err(_) => link.close(Close::Goodbye, &reason),
            }
        }
        let all = async { while self.sessions.join_next().await.is_some() {} };
        // Sessions that are still shaking hands do not end by themselves.
        drop(timeout(GOODBYE_WITHIN, all).await);
        self.endpoint.close(Close::Goodbye.into(), reason.as_bytes());
        drop(timeout(GOODBYE_WITHIN, self.endpoint.wait_idle()).await);
        self.sessions.shutdown().await;
        // Whoever still holds a `PendingCall` learns that its node is gone.
        self.shared.seats.iter().for_each(|seat| drop(seat.link().take()));
    }
}

/// Counts a peer as being greeted while it lives.
struct Greeting(Arc<AtomicU64>);

impl Drop for Greeting {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One connection, from its first packet to its end.
async fn session(shared: Arc<Shared>, incoming: Incoming, greeting: Greeting) {
    let address = incoming.remote_address();
    let handshake = async { incoming.accept()?.await };
    let connection = match timeout(HANDSHAKE_WITHIN, handshake).await {
        Ok(Ok(connection)) => connection,
        Ok(Err(error)) => {
            shared.handshakes_failed.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(%address, %error, "a peer did not get in");
            return;
        }
        Err(_) => {
            shared.handshakes_failed.fetch_add(1, Ordering::Relaxed);
            return;
        }
    };
    let key = endpoint::peer_key(&connection);
    let seated = key.and_then(|key| (0..).zip(&shared.seats).find(|(_, seat)| seat.machine.key == key));
    let Some((node, seat)) = seated else {
        connection.close(Close::Unwanted.into(), b"this key is not in the router's roster");
        return;
    };
    let introduction = match introduce(&connection, &shared.pool).await {
        Ok(introduction) => introduction,
        Err(reason) => {
            tracing::warn!(node = seat.machine.name, %address, reason, "a node did not introduce itself");
            connection.close(Close::Protocol.into(), reason.as_bytes());
            return;
        }
    };
    drop(greeting);
    let hello = introduction.hello.clone();
    let feed: Arc<dyn Feed> = Arc::clone(&shared) as Arc<dyn Feed>;
    let tools = (shared.pool.clone(), Arc::clone(&seat.tally), feed);
    let (session, link) = Session::new(connection, introduction, node, tools);
    shared.connections.fetch_add(1, Ordering::Relaxed);
    seat.tally.update(|counters| counters.connections += 1);
    let replaced = seat.link().replace(Arc::clone(&link));
    if let Some(old) = replaced {
        tracing::warn!(node = seat.machine.name, %address, "a new connection replaces the node's old one");
        old.close(Close::Replaced, "a newer connection with the same key took its place");
    }
    tracing::info!(node = seat.machine.name, %address, "a node joined");
    shared.feed(Event::Joined(node, hello));
    let reason = session.run(Arc::clone(&link)).await;
    let present = {
        let mut current = seat.link();
        let present = current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &link));
        current.take_if(|_| present);
        present
    };
    if present {
        if shared.closing.load(Ordering::Relaxed) || reason.contains("goodbye") {
            tracing::info!(node = seat.machine.name, reason, "a node left");
        } else {
            tracing::warn!(node = seat.machine.name, reason, "a node is gone");
        }
        shared.feed(Event::Lost(node));
    }
}
