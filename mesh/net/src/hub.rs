//! The router's side: a thread that keeps the nodes connected and carries calls for the compute thread.
//!
//! The compute thread is synchronous. It reads the routes (one short read lock), asks for a budget, hands calls to
//! `send` and waits for any `PendingCall`. A current-thread tokio runtime accepts connections, runs one task per
//! lane, and drives the cluster's pure logic: whatever happens is fed to `Cluster::handle`, and its actions are
//! carried out. Nothing else decides about placement or trust.
//!
//! The hub's thread drives that runtime, but for decode calls, which are short and many: those the compute thread
//! sends itself, and it drives while it waits for their replies, so no thread is woken on the way (`helm`). Prefill
//! calls are handed to the hub's thread, as their megabytes are to move while the compute thread computes.
//!
//! Who belongs to the cluster changes while it runs: machines join (`join`), others are revoked. The roster is the
//! `Authority`'s; this module makes the seats agree with it, cuts off who is no longer in it, and shows it to all
//! nodes. Of two processes with one key it keeps the one that is alive and was first.
//!
//! `reception` is who comes and goes. Beside calls the hub lends weights, to nodes that have none (`lender`), and tells
//! them which others have them (`directory`).

mod directory;
mod reception;

mod plans;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_proto::cluster::{self, Action, Cluster, Event, Policy};
use mesh_proto::facts::{Member, ModelFacts};
use mesh_proto::health::Budget;
use mesh_proto::placement::Outlook;
use mesh_proto::routes::{NodeIndex, Routes};
use mesh_wire::buffer::{Pool, PoolCounters};
use mesh_wire::call::OutgoingCall;
use mesh_wire::id::NodeId;
use mesh_wire::message::Message;
use thiserror::Error;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::authority::{Authority, AuthorityError};
use crate::endpoint::{Close, EndpointError, Listener};
use crate::helm::{Helm, SEND_HERE_BYTES_MAX};
use crate::join::Doorway;
use crate::lane::Job;
pub use crate::lane::Lane;
use crate::lender::Lender;
use crate::link::{Link, Outgoing};
use crate::membership;
use crate::pending::{CallError, PendingCall, Slot};
use crate::plan_file::PlanFile;
use crate::roster::{Machine, Roster};
use crate::seats::{Seat, Seats};
use crate::shelf::{Directory, Shelf};
use crate::tally::Feed;
pub use crate::tally::NodeCounters;
use crate::throttle::Throttle;

/// Commands from other threads that may wait.
const COMMANDS_MAX: usize = 16;

/// What a hub needs to start.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// The cluster: its keys, and who belongs to it.
    pub authority: Arc<Authority>,
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
    /// Whether the links to the nodes are measured, when they join and every minute.
    pub probe_links: bool,
    /// What nodes without a model get their experts from; `None` lends none.
    pub weights: Option<Lending>,
}

/// What a router lends to its nodes.
#[derive(Clone, Debug)]
pub struct Lending {
    /// The experts.
    pub shelf: Arc<dyn Shelf>,
    /// Bytes per second to all nodes together; `None`: as many as the link takes.
    pub bytes_s: Option<u64>,
}

impl HubConfig {
    /// Default address to listen on.
    pub const LISTEN: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(std::net::Ipv4Addr::LOCALHOST), 8621);

    /// Default of `pool_bytes_max`: 64 calls of 1 MiB, and as many replies of 2 MiB.
    pub const POOL_BYTES_MAX: usize = 256 << 20;

    /// A configuration with the defaults.
    pub fn new(authority: Arc<Authority>, facts: ModelFacts) -> HubConfig {
        HubConfig {
            authority,
            listen: HubConfig::LISTEN,
            facts,
            policy: Policy::default(),
            spin: Duration::ZERO,
            pool_bytes_max: HubConfig::POOL_BYTES_MAX,
            placement_file: None,
            probe_links: true,
            weights: None,
        }
    }
}

/// Why a hub does not start.
#[derive(Debug, Error)]
pub enum HubError {
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
    /// State, epoch, experts, hello, last health report, progress of loading and mean times of calls.
    pub cluster: cluster::NodeStatus,
    /// What was counted.
    pub counters: NodeCounters,
}

impl NodeStatus {
    /// Whether it is connected.
    pub fn is_connected(&self) -> bool {
        self.address.is_some()
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
    /// Machines that joined the cluster.
    pub joined: u64,
    /// Machines that came to join and were refused, or went away.
    pub joins_refused: u64,
    /// Connections turned away because their key was in use by another machine.
    pub clones: u64,
    /// The frame pool.
    pub pool: PoolCounters,
}

/// What other threads want of the network thread.
enum Command {
    Feed(Event),
    /// The roster has changed.
    Roster,
}

struct Shared {
    authority: Arc<Authority>,
    seats: Seats,
    started: Instant,
    cluster: Mutex<Cluster>,
    changed: Condvar,
    plan_file: Option<Arc<PlanFile>>,
    routes: RwLock<Arc<Routes>>,
    pool: Pool,
    doorway: Mutex<Doorway>,
    connections: AtomicU64,
    handshakes_failed: AtomicU64,
    deferred: AtomicU64,
    probe_links: bool,
    joined: AtomicU64,
    joins_refused: AtomicU64,
    clones: AtomicU64,
    /// To the network's thread, from those that plan.
    commands: mpsc::Sender<Command>,
    /// Goodbye was said: nodes that leave from now on do what they were told.
    closing: AtomicBool,
    /// What is written down of peers that did not get in, did not join, did not introduce themselves.
    strangers: [Throttle; 3],
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
    /// `HubError`: address or thread.
    pub fn start(config: HubConfig) -> Result<Hub, HubError> {
        let helm = Arc::new(Helm::new(config.spin)?);
        let listener = {
            let _entered = helm.enter();
            Listener::bind(config.authority.identity(), config.authority.members(), config.listen)?
        };
        let local = listener.endpoint.local_addr();
        let local = local.map_err(|source| EndpointError::Bind { address: config.listen, source })?;
        let weights = config.weights.clone();
        let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
        let shared = Arc::new(Shared::new(config, commands.clone()));
        let lender = weights.map(|Lending { shelf, bytes_s }| {
            let directory = Arc::clone(&shared) as Arc<dyn Directory>;
            Arc::new(Lender::new(shelf, directory, shared.authority.members(), bytes_s))
        });
        let (stop, stopped) = watch::channel(None);
        let server =
            reception::Server { shared: Arc::clone(&shared), listener, lender, sessions: JoinSet::new() };
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
        self.shared.routes()
    }

    /// How long a call with this many assignments may take at this node now, given what is already out to it.
    pub fn budget(&self, node: NodeIndex, assignments: u32) -> Budget {
        let out = self.outstanding(node);
        self.shared.cluster().budget(node, assignments.saturating_add(out))
    }

    /// Assignments that are out to this node.
    pub fn outstanding(&self, node: NodeIndex) -> u32 {
        self.shared.seats.at(node).map_or(0, |seat| seat.tally.outstanding())
    }

    /// Hands a call over; its budget (`CallHead::budget_us`) runs from now. A decode call has left the machine when
    /// this returns, if the node's lanes and the link are free. Never waits for the node: where the call cannot be
    /// sent, `wait` says so at once.
    pub fn send(&self, node: NodeIndex, lane: Lane, call: OutgoingCall) -> PendingCall {
        let slot = Slot::new(&call, Instant::now());
        let here = lane == Lane::Decode && call.frame_bytes() <= SEND_HERE_BYTES_MAX;
        let pending = PendingCall::new(Arc::clone(&slot), here.then(|| Arc::clone(&self.helm)));
        let seat = self.shared.seats.at(node);
        match seat.and_then(|seat| Some((seat.link().clone()?, Arc::clone(&seat.tally)))) {
            Some((link, tally)) => {
                let job = Job::new(slot, call, tally);
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
        if let Some(seat) = self.shared.seats.at(node) {
            seat.tally.update(|counters| counters.hedged += 1);
        }
    }

    /// Waits until at least `nodes` nodes are connected and everyone who is part of the plan serves it.
    /// False where that is not so within `timeout`.
    pub fn wait_ready(&self, nodes: usize, timeout: Duration) -> bool {
        self.wait_until(timeout, |cluster| {
            let present = cluster.statuses().iter().filter(|status| status.state.is_here()).count();
            cluster.settled() && present >= nodes
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
        drop(self.commands.try_send(Command::Feed(Event::Plan)));
    }

    /// The plan in use, in short.
    pub fn outlook(&self) -> Option<Outlook> {
        self.shared.cluster().outlook()
    }

    /// The cluster's keys, roster and tokens.
    pub fn authority(&self) -> &Arc<Authority> {
        &self.shared.authority
    }

    /// Shuts a node out for good, by its name or the first digits of its key: its connection is cut, its experts run
    /// elsewhere, and its key gets in nowhere any more. Writes to disk; not for the network's thread.
    ///
    /// # Errors
    /// `NoSuchNode`, `Ambiguous`, or what keeps it from being saved; then nothing has changed.
    pub fn revoke(&self, which: &str) -> Result<Machine, AuthorityError> {
        let machine = self.shared.authority.revoke(which)?;
        // Closed only where the hub has ended, and all connections with it.
        drop(self.commands.blocking_send(Command::Roster));
        Ok(machine)
    }

    /// Lets a quarantined node back in, by its name. Not for the network's thread.
    ///
    /// # Errors
    /// `NoSuchNode`.
    pub fn pardon(&self, name: &str) -> Result<(), AuthorityError> {
        let all = self.shared.seats.all();
        let mut named =
            (0..).zip(all.iter()).filter(|(_, seat)| !seat.is_revoked() && seat.machine.name == name);
        let (node, _) = named.next().ok_or_else(|| AuthorityError::NoSuchNode(name.to_owned()))?;
        drop(self.commands.blocking_send(Command::Feed(Event::Pardon(node))));
        Ok(())
    }

    /// A node's answer was proven wrong, as `how` says (`Event::Lied`). Not for the network's thread.
    pub fn convict(&self, node: NodeIndex, how: String) {
        drop(self.commands.blocking_send(Command::Feed(Event::Lied(node, how))));
    }

    /// Every node there has been since the start, in the order of `NodeIndex`.
    pub fn nodes(&self) -> Vec<NodeStatus> {
        let statuses = self.shared.cluster().statuses();
        let node = |(seat, mut cluster): (&Arc<Seat>, cluster::NodeStatus)| {
            let link = seat.link().clone();
            let note = seat.note().clone();
            if !note.is_empty() {
                cluster.note = note;
            }
            NodeStatus {
                name: seat.machine.name.clone(),
                id: seat.machine.key,
                address: link.as_ref().map(|link| link.connection.remote_address()),
                path_rtt: link.as_ref().map(|link| link.connection.rtt()),
                cluster,
                counters: seat.tally.snapshot(),
            }
        };
        self.shared.seats.all().iter().zip(statuses).map(node).collect()
    }

    /// What was counted beyond the nodes.
    pub fn counters(&self) -> HubCounters {
        HubCounters {
            connections: self.shared.connections.load(Ordering::Relaxed),
            handshakes_failed: self.shared.handshakes_failed.load(Ordering::Relaxed),
            deferred: self.shared.deferred.load(Ordering::Relaxed),
            joined: self.shared.joined.load(Ordering::Relaxed),
            joins_refused: self.shared.joins_refused.load(Ordering::Relaxed),
            clones: self.shared.clones.load(Ordering::Relaxed),
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
    fn new(config: HubConfig, commands: mpsc::Sender<Command>) -> Shared {
        let cluster = Cluster::with_policy(Vec::new(), config.facts, config.policy);
        let plan_file = config.placement_file.map(|path| Arc::new(PlanFile::new(path)));
        let routes = RwLock::new(cluster.routes());
        let shared = Shared {
            authority: config.authority,
            seats: Seats::default(),
            started: Instant::now(),
            cluster: Mutex::new(cluster),
            changed: Condvar::new(),
            plan_file,
            routes,
            pool: Pool::new(config.pool_bytes_max),
            doorway: Mutex::new(Doorway::new(tokio::time::Instant::now())),
            connections: AtomicU64::new(0),
            handshakes_failed: AtomicU64::new(0),
            deferred: AtomicU64::new(0),
            probe_links: config.probe_links,
            joined: AtomicU64::new(0),
            joins_refused: AtomicU64::new(0),
            clones: AtomicU64::new(0),
            commands,
            closing: AtomicBool::new(false),
            strangers: Default::default(),
        };
        shared.seat_newcomers(shared.authority.roster().roster());
        shared.take_up_plan();
        shared
    }

    /// Goes on with the plan of the router's last run, if there is one and its machines are still members.
    fn take_up_plan(&self) {
        let Some(file) = &self.plan_file else { return };
        let mut cluster = self.cluster();
        let Some(stored) = file.read(cluster.facts(), cluster.members()) else { return };
        tracing::info!(epoch = stored.epoch, "the last plan is taken up again");
        cluster.restore(stored);
        *self.routes.write().unwrap_or_else(PoisonError::into_inner) = cluster.routes();
    }

    /// Gives a seat to every machine of the roster that has none.
    fn seat_newcomers(&self, roster: &Roster) {
        for machine in &roster.nodes {
            if self.seats.of(machine.key).is_some() {
                continue;
            }
            let member = Member { id: machine.key, name: machine.name.clone() };
            if self.seats.add(machine.clone()) {
                // Nobody else adds to either, so both have the same length.
                self.cluster().admit(member);
            } else {
                tracing::error!(name = machine.name, "too many machines came and went; restart the router");
            }
        }
    }

    /// Makes seats agree with the roster, and shows it to everyone.
    fn follow_roster(&self) {
        let signed = self.authority.roster();
        let roster = signed.roster();
        for (node, seat) in (0..).zip(self.seats.all().iter()) {
            if seat.is_revoked() || roster.nodes.iter().any(|machine| machine.key == seat.machine.key) {
                continue;
            }
            tracing::warn!(node = seat.machine.name, "a node was revoked");
            if let Some(link) = seat.revoke() {
                link.close(Close::Revoked, "the operator revoked this machine's key");
            }
            self.feed(Event::Revoked(node));
        }
        self.seat_newcomers(roster);
        for seat in self.seats.all().iter() {
            if let Some(link) = seat.link().clone() {
                self.show_roster(&link);
            }
        }
        self.changed.notify_all();
    }

    /// Shows a node the roster, and which start of the router this is.
    fn show_roster(&self, link: &Link) {
        let shown = membership::shown(self.authority.term(), &self.authority.roster());
        match Message::Roster(shown).encode(&self.pool) {
            Ok(frame) => link.tell(Outgoing::Frame(frame)),
            Err(error) => {
                tracing::error!(%error, "the roster cannot be sent");
                link.close(Close::Unwanted, "the roster cannot be sent");
            }
        }
    }

    /// Says how many lines about strangers were not written.
    fn sum_up(&self, now: Instant) {
        let [handshakes, joins, hellos] = &self.strangers;
        for (kind, what) in [
            (&self.authority.members().refusals, "peers were turned away for their key"),
            (handshakes, "peers did not get in"),
            (joins, "machines did not join the cluster"),
            (hellos, "nodes did not introduce themselves"),
        ] {
            if let Some(more) = kind.due(now) {
                tracing::warn!("and {more} more {what} in the last minute");
            }
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

    fn routes(&self) -> Arc<Routes> {
        Arc::clone(&self.routes.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn cluster(&self) -> MutexGuard<'_, Cluster> {
        self.cluster.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn carry_out(&self, action: Action) {
        match action {
            Action::Place(node, placement) => {
                let Some(seat) = self.seats.at(node) else { return };
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
                let Some(seat) = self.seats.at(node) else { return };
                tracing::warn!(node = seat.machine.name, reason, "a node is disconnected");
                if let Some(link) = seat.link().take() {
                    link.close(Close::Unwanted, &reason);
                }
            }
            Action::RoutesChanged => {
                let routes = self.cluster().routes();
                *self.routes.write().unwrap_or_else(PoisonError::into_inner) = routes;
            }
            Action::Plan(task) => self.plan_elsewhere(task),
            Action::Report(node, text) => {
                let seat = self.seats.at(node);
                tracing::warn!(node = seat.map(|seat| seat.machine.name.clone()), "{text}");
            }
        }
    }
}

/// Only the runtime's tasks feed, one at a time, so actions are carried out in the order they were decided in.
impl Feed for Shared {
    fn feed(&self, event: Event) {
        let quiet = matches!(event, Event::Answered { .. } | Event::Loading(..) | Event::Tick);
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
