//! The router as a process: puts mesh, model, engine and API together, and takes them apart in order.
//!
//! Start: listen (so that nodes can dial while weights load), load, wait for the nodes, serve. Stop: no new
//! requests, finish what runs, say goodbye to the nodes.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mesh_net::hub::{Hub, HubConfig, HubError, NodeStatus};
use mesh_net::identity::Identity;
use mesh_net::roster::Roster;
use mesh_proto::cluster::{NodeState, Policy};
use mesh_proto::facts::ModelFacts;
use mesh_proto::machine::Machine;
use mesh_proto::placement::{Copies, Outlook, Share, Wishes};
use mesh_proto::routes::Routes;
use model::decoder::LoadError;
use model::format::{COMBINE_BLOCK, Format};
use model::home;
use model::kernel::Kernels;
use model::kernel::measure::ROWS;
use model::kernel::native::Native;
use model::kernel::native::kv::{KV_BLOCK, KvCache};
use model::open::Model;
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::dispatch::PlacesView;
use crate::engine::{Engine, EngineConfig, EngineStatus, StatusView};
use crate::forward::{Experts, Forward};
use crate::http::{self, ApiKeys};
use crate::metrics::Metrics;
use crate::prompt::{Prompt, PromptError};
use crate::request::{EngineFacts, EngineHandle, GenerateError, name_experts};
use crate::scheduler::LimitsError;
use crate::share::Place;

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
    /// This machine's key.
    pub identity: Identity,
    /// The cluster.
    pub roster: Roster,
    /// UDP address that nodes dial.
    pub listen: SocketAddr,
    /// Longest wait for the nodes of the roster before the first plan is made without the missing ones.
    pub wait: Duration,
    /// Watch for replies this long before sleeping.
    pub spin: Duration,
    /// Holders that each expert shall have.
    pub copies: Copies,
    /// Whether experts may be cut.
    pub slices: bool,
    /// Where the plan is kept, so that nodes keep their shards when the router starts again.
    pub placement_file: Option<PathBuf>,
}

/// Why a router does not start.
#[derive(Debug, thiserror::Error)]
pub enum RouterError {
    /// The mesh.
    #[error(transparent)]
    Hub(#[from] HubError),
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
/// may still be loading: end the runtime with a timeout.
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
    reached(Milestone::Listening { mesh, http: address });

    tokio::pin!(stop);
    let loading = (config.clone(), hub.clone());
    let (tell, mut told) = tokio::sync::watch::channel((0, 0));
    let mut task = tokio::task::spawn_blocking(move || {
        load(&loading.0, loading.1, &mut |done, total| {
            tell.send_replace((done, total));
        })
    });
    let loaded = loop {
        tokio::select! {
            loaded = &mut task => break loaded,
            Ok(()) = told.changed() => {
                let (done, total) = *told.borrow_and_update();
                reached(Milestone::Loading { done, total });
            }
            () = &mut stop => return Ok(()),
        }
    };
    let metrics = Arc::new(Metrics::new().map_err(|error| RouterError::Start(error.to_string()))?);
    let (handle, engine) = loaded.map_err(|error| RouterError::Start(error.to_string()))??;
    let engine = engine.counting(Arc::clone(&metrics));
    let (status, places) = (engine.status(), engine.places());
    let thread = std::thread::Builder::new().name("engine".into()).spawn(move || engine.run());
    let thread = thread.map_err(|error| RouterError::Start(error.to_string()))?;
    let nodes = tokio::select! {
        nodes = wait_for_nodes(&config, hub.clone()) => nodes,
        () = &mut stop => return Ok(()),
    };
    let view = ClusterView {
        hub: hub.clone(),
        status,
        places,
        engine: handle.clone(),
        own,
        // Else every expert is within reach, always.
        fallback: config.fallback || hub.is_none(),
        unreachable: Mutex::default(),
    };
    let identity = identity(&config);
    let mut service = http::Service::new(handle.clone(), Arc::new(prompt), metrics, identity, Arc::new(view));
    service.keys = keys;
    reached(Milestone::Ready { nodes });
    serve_until(listener, service, stop).await;

    if tokio::time::timeout(DRAIN_WITHIN, handle.drain()).await.is_err() {
        tracing::warn!("sequences still run after {} s; they end with the router", DRAIN_WITHIN.as_secs());
    } else if tokio::task::spawn_blocking(move || thread.join()).await.is_err() {
        tracing::error!("the engine thread could not be joined");
    }
    if let Some(hub) = hub.and_then(Arc::into_inner) {
        // Blocks half a second at most, and nothing else runs here any more.
        let goodbye = tokio::task::spawn_blocking(move || hub.shutdown("the router stops"));
        goodbye.await.ok();
    }
    Ok(())
}

/// Serves the API; once `stop` resolves, answers under way get `DRAIN_WITHIN` to end.
async fn serve_until(listener: TcpListener, service: http::Service, stop: impl Future<Output = ()>) {
    let stopped = tokio::sync::Notify::new();
    let stop = async {
        stop.await;
        stopped.notify_one();
    };
    let patience = async {
        stopped.notified().await;
        tokio::time::sleep(DRAIN_WITHIN).await;
    };
    tokio::select! {
        () = http::serve(listener, Arc::new(service), stop) => {}
        () = patience => tracing::warn!("answers still run after {} s; they are cut off", DRAIN_WITHIN.as_secs()),
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
        plan_at_nodes: mesh.roster.nodes.len(),
        plan_after: mesh.wait,
        require_exact: config.require_exact,
        measure_within: MEASURE_WITHIN,
        wishes,
    };
    let hub = HubConfig {
        listen: mesh.listen,
        policy,
        spin: mesh.spin,
        placement_file: mesh.placement_file.clone(),
        ..HubConfig::new(mesh.identity.clone(), mesh.roster.clone(), facts)
    };
    Ok(Some(Arc::new(Hub::start(hub)?)))
}

/// What the mesh has to know of a model.
pub fn model_facts(model: &Model) -> ModelFacts {
    let block =
        model.format.expert_bytes(model.config.hidden, model.config.moe.inter.min(COMBINE_BLOCK)) as u64;
    ModelFacts {
        fingerprint: model.fingerprint,
        moe_layers: model.config.moe_layers().map(|layer| layer as u16).collect(),
        experts: model.config.moe.experts as u16,
        expert_bytes: model.format.expert_bytes(model.config.hidden, model.config.moe.inter) as u64,
        top_k: model.config.moe.top_k as u16,
        blocks: model.config.moe.inter.div_ceil(COMBINE_BLOCK) as u16,
        block_bytes: block,
        hidden: model.config.hidden as u32,
        int8_rows: model.format.is_quantized(),
        router_bytes: model.config.token_bytes(model.format).router,
        head_bytes: model.format.matrix_bytes(model.config.vocab, model.config.hidden) as u64,
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
    let experts = match hub {
        None => Experts::Here,
        Some(hub) => match config.resident.per_layer(&model_facts(&config.model)) {
            0 => Experts::Nodes(hub),
            resident => Experts::Shared(hub, resident),
        },
    };
    let mut forward = Forward::load(model, kernels, Arc::clone(&config.native), blocks, experts)?;
    forward.set_fallback(config.fallback);
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

/// Waits until the nodes of the first plan serve; how many do.
async fn wait_for_nodes(config: &RouterConfig, hub: Option<Arc<Hub>>) -> usize {
    let (Some(mesh), Some(hub)) = (&config.mesh, hub) else { return 0 };
    // Loading takes as long as it takes; what is bounded is the wait for nodes that do not come.
    let (wanted, wait) = (mesh.roster.nodes.len(), mesh.wait);
    let waiting = tokio::task::spawn_blocking(move || {
        let started = Instant::now();
        let came = hub.wait_until(wait, |cluster| {
            cluster.statuses().iter().filter(|status| status.state != NodeState::Absent).count() >= wanted
        });
        if !came {
            tracing::warn!("not all {wanted} nodes of the roster came within {} s; going on", wait.as_secs());
            // An earlier plan stays: who is missing may only be late.
            if hub.routes().epoch == 0 {
                hub.plan_now();
            }
        }
        hub.wait_until(mesh_proto::cluster::SWITCH_WAIT_MAX, |cluster| {
            // With nobody here there is nothing to wait for: whoever comes later is planned for then.
            cluster.settled() || cluster.statuses().iter().all(|status| status.state == NodeState::Absent)
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

/// What the API tells of the cluster.
struct ClusterView {
    hub: Option<Arc<Hub>>,
    status: StatusView,
    places: PlacesView,
    engine: EngineHandle,
    /// What the router measured of itself.
    own: [u32; ROWS.len()],
    /// Whether the router can compute every expert.
    fallback: bool,
    /// By the routes it was found in: the experts that nobody can compute.
    unreachable: Mutex<Option<(Arc<Routes>, Option<String>)>>,
}

impl ClusterView {
    /// The experts that nobody can compute at the moment, named; looked for once per table.
    fn unreachable(&self) -> Option<String> {
        let hub = self.hub.as_ref().filter(|_| !self.fallback)?;
        let routes = hub.routes();
        let mut known = self.unreachable.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, named)) = known.as_ref().filter(|(of, _)| Arc::ptr_eq(of, &routes)) {
            return named.clone();
        }
        let nobodys = routes.table.all().filter(|(_, part)| part.holders.is_empty());
        let mut keys: Vec<(u16, u16)> = nobodys.map(|(key, _)| (key.layer, key.expert)).collect();
        keys.dedup();
        let named = (!keys.is_empty()).then(|| name_experts(keys.into_iter()));
        *known = Some((routes, named.clone()));
        named
    }
}

impl http::Cluster for ClusterView {
    fn nodes(&self) -> Value {
        let places = self.places.read();
        let outlook = self.hub.as_ref().and_then(|hub| hub.outlook());
        let nodes: Vec<NodeStatus> = self.hub.iter().flat_map(|hub| hub.nodes()).collect();
        let planned = |node: usize| {
            let shares = outlook.iter().flat_map(|outlook| &outlook.shares);
            shares.copied().find(|share| usize::from(share.node) == node)
        };
        let mut router = router_json(&self.status.read(), places.first());
        if router["weight_mb_s"][0].as_u64().unwrap_or(0) == 0 {
            router["weight_mb_s"] = json!(self.own);
        }
        let counters = || nodes.iter().map(|node| &node.counters);
        router["malformed"] = counters().map(|counters| counters.rejected).sum::<u64>().into();
        router["stale"] = counters().map(|counters| counters.stale).sum::<u64>().into();
        let nodes: Vec<Value> = (0..)
            .zip(&nodes)
            .map(|(index, node)| node_json(node, places.get(index + 1), planned(index)))
            .collect();
        json!({"nodes": nodes, "router": router, "plan": outlook.as_ref().map(plan_json)})
    }

    fn trouble(&self) -> Option<String> {
        if self.engine.is_closed() {
            return Some("the engine has ended; restart the router".to_owned());
        }
        let experts = self.unreachable()?;
        let serving = |node: &NodeStatus| node.cluster.state == NodeState::Serving;
        if !self.hub.iter().flat_map(|hub| hub.nodes()).any(|node| serving(&node)) {
            return Some(
                "no node serves, and the router computes no experts itself (--no-fallback)".to_owned(),
            );
        }
        Some(GenerateError::ExpertsUnavailable { experts }.to_string())
    }

    fn refusal(&self) -> Option<GenerateError> {
        self.unreachable().map(|experts| GenerateError::ExpertsUnavailable { experts })
    }

    fn refresh(&self, metrics: &Metrics) {
        for node in self.hub.iter().flat_map(|hub| hub.nodes()) {
            metrics.node_up(&node.name, node.cluster.state == NodeState::Serving);
            metrics.node_nonsense(&node.name, node.counters.rejected, node.counters.stale);
        }
    }
}

/// The plan in use, to be compared with what is measured.
fn plan_json(outlook: &Outlook) -> Value {
    json!({
        "epoch": outlook.epoch,
        "predicted_tok_s": 1e9 / outlook.token_ns.max(1) as f64,
        "copies": outlook.copies.0,
        "copies_max": outlook.copies.1,
        "unplaced": outlook.unplaced,
    })
}

/// What is known of a node; `place` is what the router has learned of its speed, `planned` what it is to do.
fn node_json(node: &NodeStatus, place: Option<&Place>, planned: Option<Share>) -> Value {
    let (status, counters) = (&node.cluster, &node.counters);
    let micros = |time: Option<Duration>| time.map_or(0, |time| time.as_micros() as u64);
    let hello = status.hello.as_ref();
    json!({
        "name": node.name,
        "id": node.id.to_hex(),
        "state": status.state.to_string(),
        "address": node.address.map(|address| address.to_string()),
        "epoch": status.epoch,
        "experts": status.experts,
        "weight_bytes": status.weight_bytes,
        "memory_bytes": hello.map(|hello| hello.memory_bytes),
        "threads": hello.map(|hello| hello.threads),
        "kernels": hello.map(|hello| hello.kernels.clone()),
        "version": hello.map(|hello| hello.version.clone()),
        "weight_mb_s": hello.map(|hello| hello.weight_mb_s),
        "calls": counters.calls,
        "assignments": counters.assignments,
        "rows": counters.rows,
        "bytes_out": counters.bytes_out,
        "bytes_in": counters.bytes_in,
        "missed": counters.late + counters.gone + counters.refused + counters.rejected,
        "late": counters.late,
        "gone": counters.gone,
        "refused": counters.refused,
        "rejected": counters.rejected,
        "malformed": counters.rejected,
        "hedged": counters.hedged,
        "stale": counters.stale,
        "connections": counters.connections,
        "service_us": micros(status.call_means.map(|means| means.0)),
        "round_trip_us": micros(status.call_means.map(|means| means.1)),
        "path_rtt_us": micros(node.path_rtt),
        "link": {"round_trip_us": status.link.round_trip_us, "mb_s": status.link.mb_s},
        "planned_share": planned.map(|planned| planned.share),
        "left_out": planned.is_some_and(|planned| planned.left_out),
        "correction": place.map(|place| place.learned.corrections()),
        "call_overhead_us": place.map(|place| place.learned.call_us()),
        "resident_bytes": status.health.map(|health| health.resident_bytes),
        "note": status.note,
    })
}

fn router_json(status: &EngineStatus, place: Option<&Place>) -> Value {
    let us = |time: Duration| time.as_micros() as u64;
    let cost = &status.cost;
    json!({
        "steps": status.steps,
        "rows": status.rows,
        "decode_rows": status.decode_rows,
        "preemptions": status.preemptions,
        "calls": cost.calls,
        "fallbacks": cost.fallbacks,
        "hedges": cost.hedges,
        "hedges_won": cost.hedges_won,
        "retries": cost.retries,
        "bytes_out": cost.bytes_out,
        "bytes_in": cost.bytes_in,
        "home_bytes": status.home_bytes,
        "weight_mb_s": place.map(|place| place.weight_mb_s),
        "correction": place.map(|place| place.learned.corrections()),
        "assignments": cost.assignments,
        "assignments_here": cost.assignments_here,
        "weight_bytes": status.weight_bytes,
        "kv_peak_bytes": status.kv_peak_bytes,
        "decode_us": us(status.decode_time),
        "prefill_us": us(status.prefill_time),
        "running": status.occupancy.running,
        "waiting": status.occupancy.waiting,
        "kv_blocks_used": status.occupancy.blocks_used,
        "kv_blocks": status.occupancy.blocks,
        "stages_us": {
            "attention": us(cost.attention),
            "gate": us(cost.gate),
            "send": us(cost.send),
            "experts": us(cost.experts),
            "ffn": us(cost.ffn),
            "wait": us(cost.wait),
            "combine": us(cost.combine),
            "head": us(cost.head),
            "sample": us(status.sample_time),
            "scheduler": us(status.plan_time),
        },
    })
}
