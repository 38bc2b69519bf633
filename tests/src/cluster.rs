//! A whole cluster in one process: router engine and nodes on threads, real QUIC over loopback between them.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use expert_node::node::{ExpertNode, NodeConfig, NodeSnapshot};
use mesh_net::authority::Authority;
use mesh_net::hub::{Hub, HubConfig};
use mesh_net::identity::Identity;
use mesh_net::membership::{Admission, Membership};
use mesh_net::roster::Roster;
use mesh_net::station::StationConfig;
use mesh_proto::cluster::Policy;
use mesh_proto::facts::{Member, ModelFacts};
use mesh_proto::machine::{Capacity, Machine};
use mesh_proto::placement::{Plan, Wishes, plan};
use mesh_proto::routes::{Part, Table};
use mesh_proto::stored::Stored;
use model::format::Format;
use model::kernel::Kernels;
use model::kernel::native::kv::KV_BLOCK;
use model::kernel::native::{Native, NativeConfig};
use model::open::Model;
use router::audit::{Audit, AuditConfig, AuditView};
use router::engine::{Engine, EngineConfig, StatusView};
use router::forward::{Experts, Forward};
use router::request::{EngineFacts, EngineHandle, Event, FinishReason, GenerateRequest, Timing};
use router::serve::model_facts;
use tokio::sync::mpsc::Receiver;

/// Longest wait for the nodes to serve, on a machine that is busy with other tests.
pub(crate) const READY_WITHIN: Duration = Duration::from_secs(60);

/// How the router's engine is set up.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Expert nodes.
    pub nodes: usize,
    /// Prefill rows of one sequence per step.
    pub chunk: usize,
    /// KV blocks of the cache.
    pub kv_blocks: usize,
    /// Whether the router holds every expert too.
    pub replicate: bool,
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    /// The way into the engine.
    pub engine: EngineHandle,
    /// Its counters.
    pub status: StatusView,
    /// The router's side of the mesh.
    pub hub: Arc<Hub>,
    nodes: Vec<Option<ExpertNode>>,
}

/// What a request came to.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    /// Generated tokens.
    pub tokens: Vec<u32>,
    /// Digest of the logits they were chosen from.
    pub digest: Option<String>,
    /// Why it ended.
    pub reason: FinishReason,
}

/// One thread of native kernels.
pub fn native() -> Arc<Native> {
    Arc::new(Native::new(NativeConfig::threads(1)).expect("one thread starts"))
}

/// Opens the demo model, packed under `cache`.
pub fn open(directory: &Path, format: Format, cache: &Path) -> Arc<Model> {
    let spec = directory.to_str().expect("the path is text");
    Arc::new(Model::open(spec, format, cache, &mut |_, _, _| {}).expect("the model opens"))
}

impl Cluster {
    /// Starts hub, nodes and engine with the experts divided evenly, and returns when every node serves.
    pub fn start(model: &Arc<Model>, shape: Shape) -> Cluster {
        Cluster::start_with(model, shape, &|| native())
    }

    /// As `start`, with other kernels in the nodes, which may be inexact.
    pub fn start_with(model: &Arc<Model>, shape: Shape, kernels: &dyn Fn() -> Arc<dyn Kernels>) -> Cluster {
        let policy = Policy { require_exact: kernels().exact(), ..Policy::default() };
        let (hub, memberships) = start_hub(model, shape.nodes, policy, even(model, shape.nodes as u16, 1));
        let start = |membership| start_node(model, membership, hub.local_addr(), kernels());
        let nodes: Vec<_> = memberships.into_iter().map(|membership| Some(start(membership))).collect();
        assert!(hub.wait_ready(shape.nodes, READY_WITHIN), "the nodes did not get ready");
        let (engine, status) = start_engine(model, shape, Some(Arc::clone(&hub)));
        Cluster { engine, status, hub, nodes }
    }

    /// How a node is doing; `None` after its end.
    pub fn snapshot(&self, index: usize) -> Option<NodeSnapshot> {
        self.nodes.get(index)?.as_ref().map(ExpertNode::snapshot)
    }

    /// Ends a node without a word to the router's engine.
    pub fn end_node(&mut self, index: usize) {
        if let Some(node) = self.nodes[index].take() {
            node.shutdown();
            node.join().expect("the node ends well");
        }
    }
}

/// A hub with so many members, and what makes nodes of them. Its first plan is `table`, as if it had been made before a
/// restart.
pub fn start_hub(
    model: &Arc<Model>,
    nodes: usize,
    policy: Policy,
    table: Table,
) -> (Arc<Hub>, Vec<Arc<Membership>>) {
    let authority = Arc::new(Authority::in_memory().expect("keys"));
    let memberships = (0..nodes).map(|index| member(&authority, index)).collect();
    let policy = Policy { plan_at_nodes: nodes, ..policy };
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut config =
        HubConfig { listen, policy, ..HubConfig::new(Arc::clone(&authority), model_facts(model)) };
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("plan");
    let text = written(authority.roster().roster(), &config.facts, table);
    std::fs::write(&file, text).expect("the plan is written");
    config.placement_file = Some(file);
    (Arc::new(Hub::start(config).expect("the hub starts")), memberships)
}

/// A machine that has joined.
fn member(authority: &Authority, index: usize) -> Arc<Membership> {
    let identity = Identity::generate().expect("a key");
    let machine = authority.admit(&format!("node-{index}"), identity.id()).expect("a free name");
    let (cluster, router) = (authority.cluster(), authority.identity().id());
    let admission = Admission { cluster, router, name: machine.name, addresses: Vec::new() };
    Arc::new(Membership::in_memory(identity, admission))
}

/// Every expert on so many of the nodes, next to each other. Made by hand: the experts of test models are small, and what
/// a planner makes of measurements on a busy machine may be to use one node.
pub fn even(model: &Arc<Model>, nodes: u16, copies: u16) -> Table {
    let facts = model_facts(model);
    let mut table = Table::empty(&facts);
    for layer in &facts.moe_layers {
        let holders = |expert: u16| (0..copies).map(move |copy| (expert + copy) % nodes).collect();
        let whole = |expert| [Part { from: 0, to: facts.blocks, holders: holders(expert) }];
        table.set_layer(*layer, (0..facts.experts).map(whole));
    }
    table
}

/// The text of a plan that says who holds what.
pub fn written(roster: &Roster, facts: &ModelFacts, table: Table) -> String {
    let members: Vec<Member> =
        roster.nodes.iter().map(|node| Member { id: node.key, name: node.name.clone() }).collect();
    let capacity = |node| Capacity { node, memory_bytes: 1 << 40, machine: Machine::default() };
    let capacities: Vec<Capacity> = (0..members.len() as u16).map(capacity).collect();
    let plan = Plan { table, ..plan(facts, &capacities, &Wishes::default(), None) };
    Stored { epoch: 1, plan }.to_text(facts, &members)
}

/// An engine on a thread of its own, as the router has it.
pub fn start_engine(model: &Arc<Model>, shape: Shape, hub: Option<Arc<Hub>>) -> (EngineHandle, StatusView) {
    start_engine_with(model, shape, hub, true)
}

/// As `start_engine`; `fallback`: whether the router computes what no node can be asked for.
pub fn start_engine_with(
    model: &Arc<Model>,
    shape: Shape,
    hub: Option<Arc<Hub>>,
    fallback: bool,
) -> (EngineHandle, StatusView) {
    let (handle, status, _) = start_audited_engine(model, shape, hub, (fallback, 0.0));
    (handle, status)
}

/// As `start_engine_with`; this share of what nodes answer is audited, drawn by a secret that is always the same.
pub fn start_audited_engine(
    model: &Arc<Model>,
    shape: Shape,
    hub: Option<Arc<Hub>>,
    (fallback, share): (bool, f64),
) -> (EngineHandle, StatusView, Option<AuditView>) {
    let audited = hub.clone().filter(|_| share > 0.0);
    let native = native();
    let kernels = Arc::<Native>::clone(&native);
    let experts = match hub {
        None => Experts::Here,
        Some(hub) if shape.replicate => Experts::Shared(hub, u16::MAX),
        Some(hub) => Experts::Nodes(hub),
    };
    let mut forward =
        Forward::load(Arc::clone(model), kernels, native, shape.kv_blocks, experts).expect("weights load");
    forward.set_fallback(fallback);
    if let Some(hub) = audited {
        let wanted = AuditConfig { share, secret: *b"a secret that is always the same" };
        forward.audit_with(Audit::start(wanted, Arc::clone(model), hub).expect("audits start"));
    }
    if shape.replicate {
        forward.preload(&mut |_, _| ()).expect("experts load");
    }
    let facts = EngineFacts {
        context: model.config.context,
        vocab: model.config.vocab,
        kv_tokens: shape.kv_blocks * KV_BLOCK,
    };
    let (handle, commands) = EngineHandle::new(facts);
    let config = EngineConfig {
        kv_blocks: shape.kv_blocks,
        rows: shape.chunk + 16,
        chunk: shape.chunk,
        sequences: 16,
    };
    let engine = Engine::new(forward, config, commands).expect("the limits work");
    let (status, audits) = (engine.status(), engine.audits());
    std::thread::spawn(move || engine.run());
    (handle, status, audits)
}

/// Runs a request to its end. Fails the test if it fails.
pub fn generate(engine: &EngineHandle, request: GenerateRequest) -> (Outcome, Timing) {
    let stream = engine.submit(request).expect("the request is taken");
    finish(stream)
}

/// Reads a stream to its end.
pub fn finish(mut stream: Receiver<Event>) -> (Outcome, Timing) {
    let mut tokens = Vec::new();
    loop {
        match stream.blocking_recv() {
            Some(Event::Token { id, .. }) => tokens.push(id),
            Some(Event::Prompt(_)) => {}
            Some(Event::Finished { reason, timing, logits_digest: digest }) => {
                return (Outcome { tokens, digest, reason }, timing);
            }
            Some(Event::Failed(error)) => panic!("the request failed: {error}"),
            None => panic!("the engine ended"),
        }
    }
}

fn start_node(
    model: &Arc<Model>,
    membership: Arc<Membership>,
    router: SocketAddr,
    kernels: Arc<dyn Kernels>,
) -> ExpertNode {
    ExpertNode::start(NodeConfig {
        membership,
        routers: vec![router],
        model: Arc::<Model>::clone(model),
        kernels,
        threads: 1,
        memory_bytes: 1 << 30,
        spin: Duration::ZERO,
        pool_bytes_max: StationConfig::POOL_BYTES_MAX,
        sysfs: "/nowhere".into(),
    })
    .expect("the node starts")
}
