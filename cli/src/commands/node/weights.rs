//! Where a node's experts come from: its own model, or the router and other nodes; and what is shown of it. Either way
//! it lends what it has to other nodes.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use expert_node::remote::Remote;
use expert_node::shard::{Fetching, Source};
use expert_node::store::Store;
use mesh_net::borrower::Patience;
use mesh_net::exchange::{Exchange, ExchangeConfig};
use mesh_net::membership::Membership;
use mesh_net::shelf::{Blob, NotLent, Shelf};
use mesh_net::station::Stop;
use mesh_wire::id::Slice;
use mesh_wire::weights::{Catalogue, Hash, Reason};
use model::kernel::Kernels;
use model::open::Model;
use router::shelf::ModelShelf;
use tokio::runtime::Runtime;

use crate::model_options::{ModelOptions, Products, check_isa};
use crate::output::{self, Progress};
use crate::{signals, state};

/// How often to look how much was fetched, and to say so where no bar can be drawn.
const LOOK_EVERY: Duration = Duration::from_millis(250);
const SAY_EVERY: Duration = Duration::from_secs(5);

/// Largest quota, GiB: more than any disk.
const DISK_GIB_MAX: f64 = 1e6;

/// Options about weights that are fetched.
#[derive(Args, Clone, Debug)]
pub(super) struct Options {
    /// Folder in which fetched experts are kept [default: weights in the state folder]
    #[arg(long, env = "MOEMESH_STORE")]
    store: Option<PathBuf>,
    /// Most GiB of the disk that fetched experts may take [default: nine tenths of what is free]
    #[arg(long, value_name = "GIB", value_parser = parse_gib)]
    disk: Option<f64>,
    /// UDP address at which other nodes get experts from this one; a fixed port for machines with a firewall
    #[arg(long, default_value = "0.0.0.0:0")]
    lend_at: SocketAddr,
    /// Most MB/s of weights that are sent to other nodes, to all together [default: as many as the link takes]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    weights_mb_s: Option<u64>,
}

/// Reads `--disk`.
fn parse_gib(text: &str) -> Result<f64, String> {
    let gib: f64 = text.parse().map_err(|_| format!("'{text}' is no number"))?;
    if gib > 0.0 && gib <= DISK_GIB_MAX { Ok(gib) } else { Err("a quota is above 0 GiB".to_owned()) }
}

/// A model, here or at the router.
#[derive(Clone, Debug)]
pub(super) enum Weights {
    /// On this machine's disk.
    Local {
        /// All of it.
        model: Arc<Model>,
        /// By which others get experts of it.
        _exchange: Arc<Exchange>,
    },
    /// Fetched.
    Fetched {
        /// What is known of it.
        remote: Arc<Remote>,
        /// With whom it is exchanged.
        exchange: Arc<Exchange>,
        /// Where it is kept.
        store: Arc<Store>,
        /// Set when the router runs another model.
        outdated: Arc<AtomicBool>,
    },
}

/// What is needed to get at a model.
#[derive(Debug)]
pub(super) enum Depot {
    /// Nothing: it is on this machine's disk.
    Here(Weights),
    /// Somebody to get it from and a place to keep it.
    Fetching(Arc<Exchange>, Arc<Store>),
}

impl Depot {
    /// Opens the node's model, or the store for what it fetches, and dials the router.
    pub(super) fn open(
        options: &super::Options,
        membership: &Arc<Membership>,
        routers: &[SocketAddr],
    ) -> anyhow::Result<Depot> {
        let exchange = |shelf: Arc<dyn Shelf>| {
            let (membership, listen) = (Arc::clone(membership), options.weights.lend_at);
            let routers = routers.to_vec();
            let lend_bytes_s = options.weights.weights_mb_s.map(|mb_s| mb_s.saturating_mul(1_000_000));
            let patience = Patience::LAN;
            let exchange = ExchangeConfig { membership, routers, listen, shelf, lend_bytes_s, patience };
            Exchange::start(exchange).map(Arc::new)
        };
        // An empty variable is how containers and units say that there is none.
        if options.model.model.as_ref().is_some_and(|model| !model.is_empty()) {
            let model = options.model.open()?;
            let exchange = exchange(Arc::new(Owned(ModelShelf::new(Arc::clone(&model)))))?;
            tracing::info!("experts are lent at UDP port {}", exchange.port());
            return Ok(Depot::Here(Weights::Local { model, _exchange: exchange }));
        }
        // Before the router is waited for.
        check_isa()?;
        let quota = options.weights.disk.map(|gib| (gib * f64::from(1 << 30)) as u64);
        let store = Arc::new(Store::open(&folder(options)?, quota)?);
        let exchange = exchange(Arc::<Store>::clone(&store))?;
        let (has, quota) = (output::bytes(store.bytes()), output::bytes(store.quota()));
        let (path, port) = (store.path().display(), exchange.port());
        tracing::info!("experts are kept in {path}: {has} of {quota}, lent at UDP port {port}");
        Ok(Depot::Fetching(exchange, store))
    }

    /// The node's model, or the router's once it has said which one it is; `None` where the process is to end meanwhile.
    pub(super) fn model(
        &self,
        options: &super::Options,
        runtime: &Runtime,
    ) -> anyhow::Result<Option<Weights>> {
        let (exchange, store) = match self {
            Depot::Here(weights) => return Ok(Some(weights.clone())),
            Depot::Fetching(exchange, store) => (exchange, store),
        };
        let asked = runtime.block_on(async {
            tokio::select! {
                said = exchange.catalogue() => Some(said),
                stopped = signals::stop(options.stop_with_parent) => { drop(stopped); None }
            }
        });
        let Some(said) = asked else { return Ok(None) };
        let supply = Arc::<Exchange>::clone(exchange);
        let remote = Arc::new(Remote::new(said?, supply, Arc::clone(store))?);
        let exchange = Arc::clone(exchange);
        let store = Arc::clone(store);
        Ok(Some(Weights::Fetched { remote, exchange, store, outdated: Arc::default() }))
    }
}

/// What a node lends that has the model itself. It goes by the name of an expert; whoever asked compares the hash. The
/// router names this node to nobody unless both have the same model.
#[derive(Debug)]
struct Owned(ModelShelf);

impl Shelf for Owned {
    fn catalogue(&self) -> Option<Catalogue> {
        None
    }

    fn hashes(&self, _: &[Slice]) -> Result<Vec<Hash>, NotLent> {
        Err(NotLent::new(Reason::Absent, "hashes are for the router to say"))
    }

    fn open(&self, slice: Slice, hash: Hash) -> Result<Box<dyn Blob>, NotLent> {
        self.0.open(slice, hash)
    }
}

/// Where fetched experts are kept.
fn folder(options: &super::Options) -> anyhow::Result<PathBuf> {
    if let Some(store) = &options.weights.store {
        return Ok(store.clone());
    }
    Ok(state::folder(options.state.clone(), "node")?.join("weights"))
}

impl Weights {
    /// What people call the model.
    pub(super) fn name(&self) -> &str {
        match self {
            Weights::Local { model, .. } => &model.name,
            Weights::Fetched { remote, .. } => remote.name(),
        }
    }

    /// Where experts are read from.
    pub(super) fn source(&self) -> Arc<dyn Source> {
        match self {
            Weights::Local { model, .. } => Arc::<Model>::clone(model),
            Weights::Fetched { remote, .. } => Arc::<Remote>::clone(remote),
        }
    }

    /// The kernels for it.
    pub(super) fn load_kernels(&self, options: &ModelOptions) -> anyhow::Result<Arc<dyn Kernels>> {
        let (kernels, _) = match self {
            Weights::Local { model, .. } => options.load_kernels(model)?,
            Weights::Fetched { remote, .. } => {
                let shape = remote.shape();
                let (hidden, inter) = (shape.hidden, shape.inter);
                // A node multiplies by experts alone; any matrix will do for the rest.
                let products =
                    Products { format: shape.format, expert: (hidden, inter), matrix: (hidden, hidden) };
                options.load_kernels_for(products)?
            }
        };
        Ok(kernels)
    }

    /// Bytes of experts that can be kept on disk, where they have to be.
    pub(super) fn disk_bytes(&self) -> Option<u64> {
        match self {
            Weights::Local { .. } => None,
            Weights::Fetched { store, .. } => Some(store.quota()),
        }
    }

    /// Whether the router runs another model.
    pub(super) fn is_outdated(&self) -> bool {
        matches!(self, Weights::Fetched { outdated, .. } if outdated.load(Ordering::Relaxed))
    }

    /// Lets the node leave when the router runs another model.
    pub(super) async fn other_model(&self, stop: &Stop) {
        let Weights::Fetched { remote, exchange, outdated, .. } = self else {
            return std::future::pending().await;
        };
        exchange.changed(remote.fingerprint()).await;
        outdated.store(true, Ordering::Relaxed);
        stop.leave();
    }

    /// Shows what is being fetched, for as long as it is waited for.
    pub(super) async fn show(&self) {
        let Weights::Fetched { remote, .. } = self else { return std::future::pending().await };
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        let mut shown: Option<Shown> = None;
        loop {
            ticks.tick().await;
            match remote.fetching() {
                Some(fetching) => shown.get_or_insert_with(|| Shown::new(fetching)).tell(fetching),
                None => shown.take().into_iter().for_each(|shown| shown.finish(remote)),
            }
        }
    }
}

/// What was said of a fetch that goes on.
struct Shown {
    bar: Progress,
    said: Instant,
    before: Fetching,
    began: (Instant, Fetching),
}

impl Shown {
    fn new(fetching: Fetching) -> Shown {
        let now = Instant::now();
        Shown { bar: Progress::new(), said: now, before: fetching, began: (now, fetching) }
    }

    fn tell(&mut self, fetching: Fetching) {
        let ((experts, of), (bytes, all)) = (fetching.experts, fetching.bytes);
        if std::io::stderr().is_terminal() {
            self.bar.show(bytes, all, &format!("fetching {experts} of {of} experts"));
            return;
        }
        if self.said.elapsed() < SAY_EVERY {
            return;
        }
        let came = |fetching: Fetching| fetching.router_bytes + fetching.peer_bytes;
        let mb_s = (came(fetching) - came(self.before)) as f64 / 1e6 / self.said.elapsed().as_secs_f64();
        let (done, all) = (output::bytes(bytes), output::bytes(all));
        let from = origin(self.before, fetching);
        eprintln!("fetching experts: {experts} of {of}, {done} of {all}, {mb_s:.1} MB/s, {from}");
        (self.said, self.before) = (Instant::now(), fetching);
    }

    fn finish(self, remote: &Remote) {
        self.bar.finish();
        let (began, before) = self.began;
        let load = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        let counts = remote.counts();
        let (router_bytes, peer_bytes) = (load(&counts.router_bytes), load(&counts.peer_bytes));
        let from = origin(before, Fetching { router_bytes, peer_bytes, ..before });
        let (experts, seconds) = (load(&counts.experts_done), began.elapsed().as_secs_f64());
        eprintln!("fetched {experts} experts in {seconds:.1} s, {from}");
    }
}

/// From whom the bytes between two looks came.
fn origin(before: Fetching, now: Fetching) -> String {
    let router = output::bytes(now.router_bytes - before.router_bytes);
    let peers = output::bytes(now.peer_bytes - before.peer_bytes);
    format!("{router} from the router, {peers} from other nodes")
}
