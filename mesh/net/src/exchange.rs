//! A node's exchange of weights: with the router, from which it learns what there is, and with other nodes.
//!
//! One thread and one runtime of their own, so that gigabytes of weights never stand between a call and its answer.
//! It keeps a connection to the router for as long as the node runs: over it the node hears which model the cluster
//! runs, and says where it lends what it has. To other nodes it connects when something is to be fetched. Members get
//! in by the same keys and the same checks as at the router. Whoever fetches does so on threads that may wait; nothing
//! here decides whom to ask. The price: two connections to the router, and a UDP port that other nodes must reach; where
//! they do not, they ask the router.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_wire::buffer::Pool;
use mesh_wire::frame::Op;
use mesh_wire::id::{NodeId, Slice};
use mesh_wire::weights::{Catalogue, Fetch, Hash, Holder, Holders, Weights};
use quinn::{ConnectError, Connection, Endpoint, Incoming};
use thiserror::Error;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::{Mutex, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::borrower::{self, BorrowError, Patience};
use crate::endpoint::{self, Close, EndpointError, Listener, is_goodbye, is_revocation};
use crate::lender::Lender;
use crate::membership::Membership;
use crate::seats::{Greeters, Greeting};
use crate::shelf::{Directory, Shelf};
use crate::station::{DIAL_WITHIN, PAUSE_MAX, SERVED_MIN, explain, pause};
use crate::throttle::Throttle;
use crate::tls::SERVER_NAME;

/// Time to reach another node: on a LAN three milliseconds. One that was unplugged costs this once per placement.
const PEER_WITHIN: Duration = Duration::from_secs(1);

/// Time for the router to answer a question: it may have to compute hashes of a thousand slices.
const ANSWER_WITHIN: Duration = Duration::from_secs(60);

/// Time the router may be away while something is fetched.
const ROUTER_WITHIN: Duration = Duration::from_secs(10);

/// Connections to other nodes that are kept while something is fetched.
const PEERS_MAX: usize = 32;

/// Bytes of frames that are received at a time: chunks of all streams, an answer about a thousand holders.
const POOL_BYTES_MAX: usize = 32 << 20;

/// What an exchange needs to run.
#[derive(Clone, Debug)]
pub struct ExchangeConfig {
    /// This machine's key, and whom it trusts.
    pub membership: Arc<Membership>,
    /// Where the router may be, tried in order; none: where it was when the machine joined.
    pub routers: Vec<SocketAddr>,
    /// UDP address to lend at; port 0 for any.
    pub listen: SocketAddr,
    /// What it lends.
    pub shelf: Arc<dyn Shelf>,
    /// Bytes per second that it lends to all others together; `None`: as many as the link takes.
    pub lend_bytes_s: Option<u64>,
    /// How long other nodes are waited for.
    pub patience: Patience,
}

/// Why there is no exchange.
#[derive(Debug, Error)]
pub enum ExchangeError {
    /// No socket.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// No thread or no runtime.
    #[error("starting the thread that exchanges weights: {0}")]
    Thread(#[from] std::io::Error),
    /// There is nowhere to dial.
    #[error("no address of the router is known; say where it is with --router HOST:PORT")]
    NoAddress,
}

/// Where weights may come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The router, which has everything.
    Router,
    /// Another node.
    Peer(Holder),
}

impl std::fmt::Display for Origin {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Origin::Router => write!(f, "the router"),
            Origin::Peer(holder) => write!(f, "node {} at {}", holder.id, holder.address),
        }
    }
}

/// What is known of the router.
#[derive(Clone, Debug, Default)]
struct Router {
    connection: Option<Connection>,
    catalogue: Option<Catalogue>,
    revoked: bool,
}

struct Shared {
    config: ExchangeConfig,
    pool: Pool,
    /// Where others reach what this node lends.
    port: u16,
    router: watch::Sender<Router>,
    /// Connections to other nodes.
    peers: Mutex<BTreeMap<NodeId, Connection>>,
    /// Sockets that connections are dialed over, of IPv4 and IPv6, as soon as one is needed.
    sockets: std::sync::Mutex<[Option<Endpoint>; 2]>,
    silence: Throttle,
}

/// See the module. Dropping it ends its thread; whoever waits for it must be done by then.
pub struct Exchange {
    shared: Arc<Shared>,
    runtime: Handle,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

/// Names where it lends.
impl std::fmt::Debug for Exchange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Exchange({})", self.shared.port)
    }
}

/// A node knows of nobody.
struct Nobody;

impl Directory for Nobody {
    fn announce(&self, _: NodeId, _: Option<SocketAddr>) {}

    fn holders(&self, _: (NodeId, SocketAddr), slices: &[Slice]) -> Holders {
        Holders { machines: Vec::new(), of: vec![Vec::new(); slices.len()] }
    }

    fn lent(&self, machine: NodeId, bytes: u64) {
        tracing::trace!(%machine, bytes, "lent weights to another node");
    }
}

impl Exchange {
    /// Listens and starts the thread. The router is dialed from then on.
    ///
    /// # Errors
    /// `ExchangeError`.
    pub fn start(config: ExchangeConfig) -> Result<Exchange, ExchangeError> {
        if config.routers.is_empty() && config.membership.admission().addresses.is_empty() {
            return Err(ExchangeError::NoAddress);
        }
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let (membership, address) = (Arc::clone(&config.membership), config.listen);
        let listener = {
            let _entered = runtime.enter();
            Listener::lending(membership.identity(), membership.members(), address)?
        };
        let local = listener.endpoint.local_addr();
        let port = local.map_err(|source| EndpointError::Bind { address, source })?.port();
        let (shelf, rate) = (Arc::clone(&config.shelf), config.lend_bytes_s);
        let lender = Arc::new(Lender::new(shelf, Arc::new(Nobody), membership.members(), rate));
        let shared = Arc::new(Shared {
            config,
            pool: Pool::new(POOL_BYTES_MAX),
            port,
            router: watch::Sender::default(),
            peers: Mutex::default(),
            sockets: std::sync::Mutex::default(),
            silence: Throttle::default(),
        });
        let (stop, stopped) = watch::channel(false);
        let (handle, there) = (runtime.handle().clone(), Arc::clone(&shared));
        let thread = std::thread::Builder::new()
            .name("weights".into())
            .spawn(move || keep(&runtime, &there, &listener, (&lender, stopped)))?;
        Ok(Exchange { shared, runtime: handle, stop, thread: Some(thread) })
    }

    /// Port at which this node lends.
    pub fn port(&self) -> u16 {
        self.shared.port
    }

    /// Waits until the router has said which model it is.
    ///
    /// # Errors
    /// `Revoked`.
    pub async fn catalogue(&self) -> Result<Catalogue, BorrowError> {
        let mut router = self.shared.router.subscribe();
        let known = router.wait_for(|router| router.revoked || router.catalogue.is_some()).await;
        let known = known.map_err(|_| BorrowError::Gone("the exchange has ended".to_owned()))?;
        known.catalogue.clone().ok_or(BorrowError::Revoked)
    }

    /// Waits until the router runs another model than this one, which may never be.
    pub async fn changed(&self, fingerprint: Hash) {
        let mut router = self.shared.router.subscribe();
        let other = |router: &Router| {
            router.catalogue.as_ref().is_some_and(|catalogue| catalogue.fingerprint != fingerprint)
        };
        if router.wait_for(other).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Hashes of these, as the router says. Waits; not for threads that drive a runtime.
    ///
    /// # Errors
    /// `BorrowError`.
    pub fn hashes(&self, slices: &[Slice]) -> Result<Vec<Hash>, BorrowError> {
        let question = Weights::AskHashes(slices.to_vec());
        match self.runtime.block_on(self.shared.ask_router((&question, Op::Hashes)))? {
            Weights::Hashes(hashes) if hashes.len() == slices.len() => Ok(hashes),
            _ => Err(BorrowError::Wrong("another number of hashes than was asked for".to_owned())),
        }
    }

    /// Who else has these, as the router says. Waits, as `hashes`.
    ///
    /// # Errors
    /// `BorrowError`.
    pub fn holders(&self, slices: &[Slice]) -> Result<Holders, BorrowError> {
        let question = Weights::AskHolders(slices.to_vec());
        match self.runtime.block_on(self.shared.ask_router((&question, Op::Holders)))? {
            Weights::Holders(holders) if holders.of.len() == slices.len() => Ok(holders),
            _ => Err(BorrowError::Wrong("another number of experts than was asked about".to_owned())),
        }
    }

    /// Orders an expert of `bytes` bytes. Waits, as `hashes`.
    ///
    /// # Errors
    /// `BorrowError`.
    pub fn order(&self, origin: Origin, fetch: Fetch, bytes: u64) -> Result<Delivery, BorrowError> {
        let patience = match origin {
            Origin::Router => Patience::LAST,
            Origin::Peer(_) => self.shared.config.patience,
        };
        let ordering = async {
            let connection = match origin {
                Origin::Router => self.shared.router().await?,
                Origin::Peer(holder) => self.shared.peer(holder).await?,
            };
            borrower::Delivery::order(&connection, &self.shared.pool, (fetch, bytes), patience).await
        };
        let delivery = self.runtime.block_on(ordering)?;
        Ok(Delivery { delivery, runtime: self.runtime.clone() })
    }

    /// Waits so long.
    pub fn pause(&self, time: Duration) {
        self.runtime.block_on(async { tokio::time::sleep(time).await });
    }

    /// Lets go of connections to other nodes: there is nothing more to fetch for now.
    pub fn rest(&self) {
        let peers = self.runtime.block_on(async { std::mem::take(&mut *self.shared.peers.lock().await) });
        for peer in peers.into_values() {
            peer.close(Close::Goodbye.into(), b"that was all");
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that exchanges weights panicked");
        }
    }
}

/// The bytes of an expert on their way.
#[derive(Debug)]
pub struct Delivery {
    delivery: borrower::Delivery,
    runtime: Handle,
}

impl Delivery {
    /// Replaces what is in `out` by the next bytes; false when all have come. Waits; not for threads that drive a
    /// runtime.
    ///
    /// # Errors
    /// `BorrowError`; then there will be no more.
    pub fn next(&mut self, out: &mut Vec<u8>) -> Result<bool, BorrowError> {
        out.clear();
        let chunk = self.runtime.block_on(self.delivery.next())?;
        out.extend_from_slice(chunk.as_ref().map_or(&[][..], |chunk| chunk.bytes()));
        Ok(chunk.is_some())
    }
}

/// The thread: keeps the router's connection and serves other nodes, until it is told to stop.
fn keep(
    runtime: &Runtime,
    shared: &Arc<Shared>,
    listener: &Listener,
    (lender, mut stopped): (&Arc<Lender>, watch::Receiver<bool>),
) {
    runtime.block_on(async {
        tokio::select! {
            () = shared.stay_linked() => {}
            () = lend(listener, lender) => {}
            _ = stopped.wait_for(|stopped| *stopped) => {}
        }
        let sockets = std::mem::take(&mut *shared.sockets());
        for endpoint in sockets.iter().flatten().chain([&listener.endpoint]) {
            endpoint.close(Close::Goodbye.into(), b"the node is stopping");
        }
    });
}

/// Serves other nodes.
async fn lend(listener: &Listener, lender: &Arc<Lender>) {
    let greeters = Arc::new(Greeters::default());
    let mut guests = JoinSet::new();
    loop {
        tokio::select! {
            incoming = listener.endpoint.accept() => {
                let Some(incoming) = incoming else { return };
                if let Some((incoming, greeting)) = greeters.let_in(incoming) {
                    guests.spawn(serve(listener.clone(), Arc::clone(lender), incoming, greeting));
                }
            }
            Some(_) = guests.join_next() => {}
        }
    }
}

async fn serve(listener: Listener, lender: Arc<Lender>, incoming: Incoming, greeting: Greeting) {
    let address = incoming.remote_address();
    let shaken = timeout(DIAL_WITHIN, listener.accept(incoming)).await;
    match shaken.unwrap_or_else(|_| Err("the handshake took too long".to_owned())) {
        Ok(connection) => {
            drop(greeting);
            lender.serve(connection).await;
        }
        Err(error) => tracing::debug!(%address, error, "a machine that wanted weights did not get in"),
    }
}

impl Shared {
    /// Dials the router for as long as the node runs.
    async fn stay_linked(&self) {
        let membership = &self.config.membership;
        let mut attempt = 0_u32;
        loop {
            // Looked up again in every round: the router may have moved.
            for address in membership.places(&self.config.routers) {
                match self.link(address).await {
                    Ok(()) => attempt = 0,
                    Err(BorrowError::Revoked) => {
                        self.router.send_modify(|router| router.revoked = true);
                        // Nothing will change; the station ends the node.
                        std::future::pending::<()>().await;
                    }
                    Err(error) => {
                        // A node that has the model needs nothing from the router, and its station says how that is.
                        let needed = self.router.receiver_count() > 0;
                        if needed && self.silence.admits(std::time::Instant::now()) {
                            tracing::warn!(%address, "no weights from the router: {error}; this node goes on trying");
                        } else {
                            tracing::debug!(%address, %error, "no weights from the router");
                        }
                    }
                }
            }
            tokio::time::sleep(pause(membership.identity().id(), attempt, PAUSE_MAX)).await;
            attempt = attempt.saturating_add(1);
        }
    }

    /// One connection to the router, to its end. An error is one that kept it from being of use.
    async fn link(&self, address: SocketAddr) -> Result<(), BorrowError> {
        let router = self.config.membership.admission().router;
        let connection = self.dial((router, address), DIAL_WITHIN).await?;
        let question = Weights::AskCatalogue { port: self.port };
        let asked = borrower::ask(&connection, &self.pool, (&question, Op::Catalogue), DIAL_WITHIN).await;
        let catalogue = match asked {
            Ok(Weights::Catalogue(catalogue)) => catalogue,
            Ok(_) => return Err(BorrowError::Wrong("no catalogue".to_owned())),
            Err(error) => {
                return Err(match connection.close_reason() {
                    Some(reason) if is_revocation(&reason) => BorrowError::Revoked,
                    Some(reason) => BorrowError::Gone(explain(&reason)),
                    None => error,
                });
            }
        };
        tracing::info!(%address, model = catalogue.name, "the router lends weights");
        let linked =
            Router { connection: Some(connection.clone()), catalogue: Some(catalogue), revoked: false };
        self.router.send_replace(linked);
        let since = Instant::now();
        let closed = connection.closed().await;
        self.router.send_modify(|router| router.connection = None);
        match closed {
            closed if is_revocation(&closed) => Err(BorrowError::Revoked),
            closed if is_goodbye(&closed) => Ok(()),
            // Two machines with one key would take turns.
            closed if since.elapsed() < SERVED_MIN => Err(BorrowError::Gone(explain(&closed))),
            _ => Ok(()),
        }
    }

    /// A connection for weights.
    async fn dial(
        &self,
        (id, address): (NodeId, SocketAddr),
        within: Duration,
    ) -> Result<Connection, BorrowError> {
        let gone = |error: String| BorrowError::Gone(format!("{address}: {error}"));
        let setup = endpoint::borrowing(self.config.membership.identity(), id);
        let setup = setup.map_err(|error| gone(error.to_string()))?;
        let endpoint = self.socket(address.is_ipv6()).map_err(|error| gone(error.to_string()))?;
        let connecting = endpoint.connect_with(setup, address, SERVER_NAME).inspect_err(|error| {
            // Its socket broke; the next one has another.
            if matches!(error, ConnectError::EndpointStopping) {
                self.sockets()[usize::from(address.is_ipv6())] = None;
            }
        });
        match timeout(within, connecting.map_err(|error| gone(error.to_string()))?).await {
            Ok(Ok(connection)) => Ok(connection),
            Ok(Err(error)) => Err(gone(explain(&error))),
            Err(_) => Err(gone(format!("no answer within {} s", within.as_secs()))),
        }
    }

    fn sockets(&self) -> std::sync::MutexGuard<'_, [Option<Endpoint>; 2]> {
        self.sockets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn socket(&self, ipv6: bool) -> Result<Endpoint, EndpointError> {
        let place = &mut self.sockets()[usize::from(ipv6)];
        match place {
            Some(endpoint) => Ok(endpoint.clone()),
            None => Ok(place.insert(endpoint::outward(self.config.membership.identity(), ipv6)?).clone()),
        }
    }

    /// The router's connection, as soon as there is one.
    async fn router(&self) -> Result<Connection, BorrowError> {
        let mut router = self.router.subscribe();
        let linked = router.wait_for(|router| router.connection.is_some() || router.revoked);
        let gone = || BorrowError::Gone("the router cannot be reached".to_owned());
        match timeout(ROUTER_WITHIN, linked).await {
            Ok(Ok(router)) => router.connection.clone().ok_or(BorrowError::Revoked),
            _ => Err(gone()),
        }
    }

    async fn ask_router(&self, question: (&Weights, Op)) -> Result<Weights, BorrowError> {
        let connection = self.router().await?;
        borrower::ask(&connection, &self.pool, question, ANSWER_WITHIN).await
    }

    /// A connection to another node: the one there is, or a new one.
    async fn peer(&self, holder: Holder) -> Result<Connection, BorrowError> {
        let mut peers = self.peers.lock().await;
        if let Some(peer) = peers.get(&holder.id)
            && peer.close_reason().is_none()
        {
            return Ok(peer.clone());
        }
        let connection = self.dial((holder.id, holder.address), PEER_WITHIN).await?;
        peers.retain(|_, peer| peer.close_reason().is_none());
        if peers.len() >= PEERS_MAX {
            peers.pop_first();
        }
        peers.insert(holder.id, connection.clone());
        Ok(connection)
    }
}
