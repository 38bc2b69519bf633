//! The router as a process: puts mesh, model, engine and API together, and takes them apart in order.
//!
//! Start: listen (so that nodes can dial while weights load, and whoever asks hears what is waited for), load, wait for
//! the nodes, serve. Stop: no new requests, finish what runs, say goodbye to the nodes.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use mesh_net::authority::Authority;
use mesh_net::hub::{Hub, HubConfig, HubError, Lending, NodeStatus};
use mesh_net::keys::random;
use mesh_proto::cluster::{NodeState, Patience, Policy};
use mesh_proto::facts::ModelFacts;
use mesh_proto::machine::Machine;
use mesh_proto::placement::{Copies, Wishes};
use model::config::ModelConfig;
use model::decoder::LoadError;
use model::format::{COMBINE_BLOCK, Format};
use model::home;
use model::kernel::Kernels;
use model::kernel::measure::ROWS;
use model::kernel::native::Native;
use model::kernel::native::kv::{KV_BLOCK, KvCache};
use model::open::Model;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use crate::admin::{Admin, AdminError};
use crate::audit::{Audit, AuditConfig};
use crate::energy::{self, Energy};
use crate::engine::{Engine, EngineConfig};
use crate::forward::{Experts, Forward};
use crate::http::{self, ApiKeys};
use crate::metrics::Metrics;
use crate::prompt::{Prompt, PromptError};
use crate::request::{EngineFacts, EngineHandle};
use crate::scheduler::LimitsError;
use crate::shelf::ModelShelf;
use crate::view::{ClusterView, Measured, Startup};

/// How long a plan waits for the link of a node that just joined to be measured.
const MEASURE_WITHIN: Duration = Duration::from_millis(500);

/// Longest time that running sequences get to finish when the router stops.
const DRAIN_WITHIN: Duration = Duration::from_secs(30);

/// What the router needs to run.
#[derive(Clone, Debug)]
pub struct RouterConfig {
    /// The mesh; `None` computes every expert in this process.
    pub mesh: Option<MeshConfig>,
    /// Which experts the router holds besides the nodes, to compute its share of each layer.
    pub resident: Resident,
    /// Whether the router computes experts that no node can be asked for, from its packed model.
    pub fallback: bool,
    /// Bytes of memory that weights and KV cache may take; `None` where the system does not say.
    pub memory_bytes: Option<u64>,
    /// The share of nodes' answers that is computed again and compared, 0 for none.
    pub audit: f64,
    /// Whether nodes whose kernels do not compute the bits of the definition are turned away.
    pub require_exact: bool,
    /// Address of the API.
    pub http: SocketAddr,
    /// Keys that clients must show one of; empty asks for none.
    pub api_keys: Vec<String>,
    /// The model.
    pub model: Arc<Model>,
    /// Kernels for products.
    pub kernels: Arc<dyn Kernels>,
    /// Kernels for everything else.
    pub native: Arc<Native>,
    /// Bytes of KV cache.
    pub kv_bytes: u64,
    /// Rows per step at most.
    pub rows: usize,
    /// Prefill rows of one sequence per step while others wait for their next token (`scheduler::Limits`).
    pub chunk: usize,
    /// Sequences that run at a time.
    pub sequences: usize,
}

/// Which experts a router of a mesh holds in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resident {
    /// None; what no node computes is read from the files.
    None,
    /// As many of every layer as fit in so many bytes.
    Bytes(u64),
    /// All.
    All,
}

impl Resident {
    /// Experts of every layer.
    pub fn per_layer(self, facts: &ModelFacts) -> u16 {
        let layer = facts.expert_bytes * facts.moe_layers.len() as u64;
        match self {
            Resident::None => 0,
            Resident::Bytes(bytes) => {
                let fit = bytes.checked_div(layer).unwrap_or(0);
                u16::try_from(fit).unwrap_or(u16::MAX).min(facts.experts)
            }
            Resident::All => facts.experts,
        }
    }
}

/// The router's side of the mesh.
#[derive(Clone, Debug)]
pub struct MeshConfig {
    /// The cluster: its keys, and who belongs to it.
    pub authority: Arc<Authority>,
    /// Nodes to wait for before the first plan; `None`: all of the roster.
    pub expect: Option<usize>,
    /// UDP address that nodes dial.
    pub listen: SocketAddr,
    /// Longest wait for those nodes before the first plan is made without the missing ones.
    pub wait: Duration,
    /// Watch for replies this long before sleeping.
    pub spin: Duration,
    /// Holders that each expert shall have.
    pub copies: Copies,
    /// Whether experts may be cut.
    pub slices: bool,
    /// Bytes of weights per second that are sent to nodes, to all together; `None`: as many as the link takes.
    pub weights_bytes_s: Option<u64>,
}

/// Why a router does not start.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// The mesh.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// The operator's socket.
    #[error(transparent)]
    Admin(#[from] AdminError),
    /// The weights.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Tokenizer or template.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// Rows, chunk or sequences.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// An address that needs an API key.
    #[error(transparent)]
    OpenBind(#[from] http::OpenBind),
    /// The address of the API.
    #[error("listen on {address}: {source}; choose another address with --http")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: std::io::Error,
    },
    /// The cache is smaller than one block.
    #[error("{bytes} bytes of KV cache hold less than {KV_BLOCK} tokens ({needed} bytes); raise --kv-memory")]
    KvBytes {
        /// Bytes asked for.
        bytes: u64,
        /// Bytes of one block.
        needed: u64,
    },
    /// Not enough memory for all experts beside everything else.
    #[error(
        "the experts that the router is to hold take {experts} MB and all weights with the KV cache {needed} MB, \
         available are {available} MB; start it without --replicate all, or with less --memory or --kv-memory, or with \
         --weights q4"
    )]
    Memory {
        /// Megabytes of weights and KV cache.
        needed: u64,
        /// Of these, experts.
        experts: u64,
        /// Megabytes there are.
        available: u64,
    },
    /// A thread or the metrics could not be made.
    #[error("start the engine: {0}")]
    Start(String),
}

/// What has been reached, in this order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Milestone {
    /// Both addresses are bound; nodes may dial.
    Listening {
        /// Of the mesh, if there is one.
        mesh: Option<SocketAddr>,
        /// Of the API.
        http: SocketAddr,
    },
    /// Experts are being loaded.
    Loading {
        /// Bytes so far.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// Weights are loaded, the nodes that came serve their experts, the API answers.
    Ready {
        /// Nodes that serve.
        nodes: usize,
    },
}

/// Runs a router until `stop` resolves, also while it loads or waits for nodes; then a blocking task of the runtime
/// may still be loading: end the runtime with a timeout. The API answers from the first milestone on: until the last
/// one with what is waited for.
///
/// # Errors
/// What keeps it from starting.
pub async fn run(
    config: RouterConfig,
    mut reached: impl FnMut(Milestone),
    stop: impl Future<Output = ()>,
) -> Result<(), RouterError> {
    check_memory(&config)?;
    let keys = ApiKeys::new(&config.api_keys);
    keys.check_bind(config.http)?;
    let prompt = open_prompt(&config.model)?;
    prompt.warnings().iter().for_each(|warning| tracing::warn!("{warning}"));
    let bound =
        TcpListener::bind(config.http).await.and_then(|listener| Ok((listener.local_addr()?, listener)));
    let (address, listener) = bound.map_err(|source| RouterError::Bind { address: config.http, source })?;
    let own = measure_own(&config).await?;
    let hub = start_hub(&config, own)?;
    let mesh = hub.as_ref().map(|hub| hub.local_addr());
    let _admin = serve_operator(&config, hub.as_ref())?;
    let expect = config.mesh.as_ref().and_then(|mesh| mesh.expect);
    let startup = Arc::new(Startup::new(hub.clone(), expect, own));
    let api = Api::open(listener, http::Door::new(keys.clone(), Arc::clone(&startup) as _));
    reached(Milestone::Listening { mesh, http: address });

    tokio::pin!(stop);
    let progress = |done, total| {
        startup.load(Some((done, total)));
        reached(Milestone::Loading { done, total });
    };
    let loaded = tokio::select! {
        loaded = load_beside(&config, hub.clone(), progress) => loaded,
        () = &mut stop => return Ok(()),
    };
    let metrics = Arc::new(Metrics::new().map_err(|error| RouterError::Start(error.to_string()))?);
    let (handle, engine) = loaded?;
    let engine = engine.counting(Arc::clone(&metrics));
    let (status, places, audits) = (engine.status(), engine.places(), engine.audits());
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || engine.run());
    let thread = thread.map_err(|error| RouterError::Start(error.to_string()))?;
    startup.load(None);
    let nodes = tokio::select! {
        nodes = wait_for_nodes(&config, hub.clone()) => nodes,
        () = &mut stop => return Ok(()),
    };
    // Without fallback nobody but the nodes computes; without nodes every expert is within reach, always.
    let fallback = config.fallback || hub.is_none();
    let (engine, hub_seen, unreachable) = (handle.clone(), hub.clone(), Mutex::default());
    let energy = Energy::default();
    let _noting = EndOnDrop(tokio::spawn(note_energy(hub.clone(), Arc::clone(&metrics), energy.clone())));
    let measured = Measured { own, audits, energy };
    let view = ClusterView { hub: hub_seen, status, places, engine, measured, fallback, unreachable };
    let identity = identity(&config);
    let mut service = http::Service::new(handle.clone(), Arc::new(prompt), metrics, identity, Arc::new(view));
    service.keys = keys;
    api.door.open(Arc::new(service));
    reached(Milestone::Ready { nodes });
    stop.await;
    api.close().await;
    finish(handle, thread, hub).await;
    Ok(())
}

/// Notes every few seconds what the nodes used and what came of it.
async fn note_energy(hub: Option<Arc<Hub>>, metrics: Arc<Metrics>, energy: Energy) {
    let Some(hub) = hub else { return };
    let mut ticks = tokio::time::interval(energy::EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let reported = |node: &NodeStatus| node.cluster.health.and_then(|health| health.vitals.energy_mj);
        let nodes = hub.nodes();
        energy.note(metrics.generated(), &nodes.iter().map(reported).collect::<Vec<_>>());
        for (node, energy) in nodes.iter().zip(energy.read()) {
            metrics.node_energy(&node.name, energy.joules);
        }
    }
}

/// Ends the engine and says goodbye to the nodes.
async fn finish(handle: EngineHandle, engine: std::thread::JoinHandle<()>, hub: Option<Arc<Hub>>) {
    if tokio::time::timeout(DRAIN_WITHIN, handle.drain()).await.is_err() {
        tracing::warn!("sequences still run after {} s; they end with the router", DRAIN_WITHIN.as_secs());
    } else if tokio::task::spawn_blocking(move || engine.join()).await.is_err() {
        tracing::error!("the engine thread could not be joined");
    }
    if let Some(hub) = hub {
        // Blocks half a second at most, and nothing else runs here any more.
        let goodbye = tokio::task::spawn_blocking(move || hub.shutdown("the router stops"));
        goodbye.await.ok();
    }
}

/// The API's socket, served by a task of its own.
struct Api {
    door: Arc<http::Door>,
    closing: oneshot::Sender<()>,
    task: EndOnDrop,
}

impl Api {
    fn open(listener: TcpListener, door: http::Door) -> Api {
        let (door, (closing, closed)) = (Arc::new(door), oneshot::channel());
        // The sender ends with the `Api`, and the task with it.
        let serving = http::serve(listener, Arc::clone(&door), async { drop(closed.await) });
        Api { door, closing, task: EndOnDrop(tokio::spawn(serving)) }
    }

    /// No new requests; answers under way get `DRAIN_WITHIN` to end.
    async fn close(mut self) {
        // Fails only where the task has ended.
        self.closing.send(()).ok();
        match tokio::time::timeout(DRAIN_WITHIN, &mut self.task.0).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(%error, "the API ended by itself"),
            Err(_) => {
                tracing::warn!("answers still run after {} s; they are cut off", DRAIN_WITHIN.as_secs());
            }
        }
    }
}

/// `load`, on a thread that may wait.
async fn load_beside(
    config: &RouterConfig,
    hub: Option<Arc<Hub>>,
    mut progress: impl FnMut(u64, u64),
) -> Result<(EngineHandle, Engine), RouterError> {
    let config = config.clone();
    let (tell, mut told) = tokio::sync::watch::channel((0, 0));
    let mut task = tokio::task::spawn_blocking(move || {
        load(&config, hub, &mut |done, total| {
            tell.send_replace((done, total));
        })
    });
    loop {
        tokio::select! {
            loaded = &mut task => {
                return loaded.map_err(|error| RouterError::Start(error.to_string()))?;
            }
            Ok(()) = told.changed() => {
                let (done, total) = *told.borrow_and_update();
                progress(done, total);
            }
        }
    }
}

/// Tokenizer and template of a model; a synthetic one gets bytes as tokens.
pub fn open_prompt(model: &Model) -> Result<Prompt, PromptError> {
    match &model.directory {
        Some(directory) => Prompt::open(directory, model.config.vocab),
        None => Prompt::bytes(model.config.vocab),
    }
}

/// How fast this machine streams experts, which is about how fast it streams the router's own weights; zeros without
/// a mesh, where nothing is planned.
async fn measure_own(config: &RouterConfig) -> Result<[u32; ROWS.len()], RouterError> {
    if config.mesh.is_none() {
        return Ok([0; ROWS.len()]);
    }
    let (model, kernels) = (Arc::clone(&config.model), Arc::clone(&config.kernels));
    let measured = tokio::task::spawn_blocking(move || home::weight_mb_s(&model, &*kernels)).await;
    let measured = measured.map_err(|error| RouterError::Start(error.to_string()))?;
    measured.map_err(|error| RouterError::Start(format!("measure this machine: {error}")))
}

fn start_hub(config: &RouterConfig, weight_mb_s: [u32; ROWS.len()]) -> Result<Option<Arc<Hub>>, RouterError> {
    let Some(mesh) = &config.mesh else { return Ok(None) };
    let facts = model_facts(&config.model);
    let wishes = Wishes {
        copies: mesh.copies,
        slices: mesh.slices,
        router_experts: config.resident.per_layer(&facts),
        router: Machine { weight_mb_s, ..Machine::default() },
    };
    let policy = Policy {
        plan_at_nodes: mesh.expect.unwrap_or(usize::MAX),
        plan_after: mesh.wait,
        require_exact: config.require_exact,
        measure_within: MEASURE_WITHIN,
        patience: Patience::default(),
        wishes,
    };
    let hub = HubConfig {
        listen: mesh.listen,
        policy,
        spin: mesh.spin,
        weights: Some(Lending {
            shelf: Arc::new(ModelShelf::new(Arc::clone(&config.model))),
            bytes_s: mesh.weights_bytes_s,
        }),
        placement_file: mesh.authority.folder().map(|folder| folder.join("placement")),
        ..HubConfig::new(Arc::clone(&mesh.authority), facts)
    };
    Ok(Some(Arc::new(Hub::start(hub)?)))
}

/// Ends a task when it is dropped.
struct EndOnDrop(tokio::task::JoinHandle<()>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Answers the operator, where there is a folder to do so in.
fn serve_operator(config: &RouterConfig, hub: Option<&Arc<Hub>>) -> Result<Option<EndOnDrop>, AdminError> {
    let folder = config.mesh.as_ref().and_then(|mesh| mesh.authority.folder());
    let (Some(folder), Some(hub)) = (folder, hub) else { return Ok(None) };
    let admin = Admin::bind(folder)?;
    Ok(Some(EndOnDrop(tokio::spawn(admin.serve(Arc::clone(hub))))))
}

/// What the mesh has to know of a model.
pub fn model_facts(model: &Model) -> ModelFacts {
    ModelFacts { fingerprint: model.fingerprint, ..shape_facts(&model.config, model.format) }
}

/// The same of a model whose weights are not here; its fingerprint is zero.
pub fn shape_facts(config: &ModelConfig, format: Format) -> ModelFacts {
    let expert = |inter| format.expert_bytes(config.hidden, inter) as u64;
    ModelFacts {
        fingerprint: [0; 32],
        moe_layers: config.moe_layers().map(|layer| layer as u16).collect(),
        experts: config.moe.experts as u16,
        expert_bytes: expert(config.moe.inter),
        top_k: config.moe.top_k as u16,
        blocks: config.moe.inter.div_ceil(COMBINE_BLOCK) as u16,
        block_bytes: expert(config.moe.inter.min(COMBINE_BLOCK)),
        hidden: config.hidden as u32,
        int8_rows: format.is_quantized(),
        router_bytes: config.token_bytes(format).router,
        head_bytes: format.matrix_bytes(config.vocab, config.hidden) as u64,
    }
}

/// KV blocks that fit in `bytes`.
fn kv_blocks(config: &RouterConfig) -> Result<usize, RouterError> {
    let needed = KvCache::block_bytes(&config.model.config, config.model.format) as u64;
    let whole = config.model.config.context.div_ceil(KV_BLOCK) * config.sequences;
    // More than every sequence at full length is never used.
    match (config.kv_bytes / needed).min(whole as u64) {
        0 => Err(RouterError::KvBytes { bytes: config.kv_bytes, needed }),
        blocks => Ok(blocks as usize),
    }
}

/// Whether the experts that are to be held fit.
fn check_memory(config: &RouterConfig) -> Result<(), RouterError> {
    let facts = model_facts(&config.model);
    let per_layer = u64::from(config.resident.per_layer(&facts));
    let (Some(available), true) = (config.memory_bytes, per_layer > 0) else { return Ok(()) };
    let experts = facts.moe_layers.len() as u64 * per_layer * facts.expert_bytes;
    let router = config.model.config.token_bytes(config.model.format).router;
    let needed = experts + router + config.kv_bytes;
    if needed <= available {
        return Ok(());
    }
    let [needed, experts, available] = [needed, experts, available].map(|bytes| bytes / 1_000_000);
    Err(RouterError::Memory { needed, experts, available })
}

fn load(
    config: &RouterConfig,
    hub: Option<Arc<Hub>>,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(EngineHandle, Engine), RouterError> {
    let blocks = kv_blocks(config)?;
    let (model, kernels) = (Arc::clone(&config.model), Arc::clone(&config.kernels));
    let audit = hub.clone().map(|hub| start_audit(config, hub)).transpose()?.flatten();
    let experts = match hub {
        None => Experts::Here,
        Some(hub) => match config.resident.per_layer(&model_facts(&config.model)) {
            0 => Experts::Nodes(hub),
            resident => Experts::Shared(hub, resident),
        },
    };
    let mut forward = Forward::load(model, kernels, Arc::clone(&config.native), blocks, experts)?;
    forward.set_fallback(config.fallback);
    audit.into_iter().for_each(|audit| forward.audit_with(audit));
    forward.preload(progress).map_err(|error| RouterError::Start(error.to_string()))?;
    let facts = EngineFacts {
        context: config.model.config.context,
        vocab: config.model.config.vocab,
        kv_tokens: blocks * KV_BLOCK,
    };
    let (handle, commands) = EngineHandle::new(facts);
    let (rows, chunk, sequences) = (config.rows, config.chunk, config.sequences);
    let engine_config = EngineConfig { kv_blocks: blocks, rows, chunk, sequences };
    Ok((handle, Engine::new(forward, engine_config, commands)?))
}

/// Audits what nodes answer, as far as that is wanted.
fn start_audit(config: &RouterConfig, hub: Arc<Hub>) -> Result<Option<Audit>, RouterError> {
    if config.audit <= 0.0 {
        return Ok(None);
    }
    let failed = |error: &dyn std::fmt::Display| RouterError::Start(error.to_string());
    let secret = random().map_err(|error| failed(&error))?;
    let wanted = AuditConfig { share: config.audit, secret };
    Audit::start(wanted, Arc::clone(&config.model), hub).map(Some).map_err(|error| failed(&error))
}

/// Waits until the nodes of the first plan serve; how many do.
async fn wait_for_nodes(config: &RouterConfig, hub: Option<Arc<Hub>>) -> usize {
    let (Some(mesh), Some(hub)) = (&config.mesh, hub) else { return 0 };
    // Loading takes as long as it takes; what is bounded is the wait for nodes that do not come.
    let known = mesh.authority.roster().roster().nodes.len();
    let (wanted, wait) = (mesh.expect.unwrap_or(known), mesh.wait);
    let waiting = tokio::task::spawn_blocking(move || {
        let started = Instant::now();
        let came = hub.wait_until(wait, |cluster| {
            cluster.statuses().iter().filter(|status| status.state.is_here()).count() >= wanted
        });
        if !came {
            tracing::warn!("not all of {wanted} nodes came within {} s; going on", wait.as_secs());
            // An earlier plan stays: who is missing may only be late.
            if hub.routes().epoch == 0 {
                hub.plan_now();
            }
        }
        hub.wait_until(mesh_proto::cluster::SWITCH_WAIT_MAX, |cluster| {
            // With nobody here there is nothing to wait for: whoever comes later is planned for then.
            cluster.settled() || cluster.statuses().iter().all(|status| !status.state.is_here())
        });
        tracing::info!("nodes are ready after {:.1} s", started.elapsed().as_secs_f64());
        hub.nodes().iter().filter(|node| node.cluster.state == NodeState::Serving).count()
    });
    waiting.await.unwrap_or(0)
}

fn identity(config: &RouterConfig) -> http::Identity {
    let model = &config.model;
    let exact = if config.require_exact { "native" } else { "tolerance" };
    let hash: String = model.fingerprint[..4].iter().map(|byte| format!("{byte:02x}")).collect();
    http::Identity {
        model: model.name.clone(),
        fingerprint: format!("moemesh-{}-{exact}-{hash}", Format::name(model.format)),
        exact: exact.to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    }
}
