//! A liar among honest nodes, as a process of its own over real QUIC: whatever it says, no text changes.
//!
//! Each test starts a router's hub and engine and two honest nodes in this process, and the program `liar` beside them in
//! one of its modes, generates, and compares tokens and digest of the logits with a run without any cluster. What the
//! liar's answers were counted as, and what became of it, is asked afterwards. Sums that only look right are not for the
//! protocol to find: those change text until an audit finds them, and none after that.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use expert_node::node::{ExpertNode, NodeConfig};
use mesh_net::authority::Authority;
use mesh_net::hub::{Hub, HubConfig, NodeStatus};
use mesh_net::identity::Identity;
use mesh_net::membership::{Admission, Membership, Opened};
use mesh_net::station::StationConfig;
use mesh_proto::cluster::{MALFORMED_MAX, NodeState, Policy};
use model::format::Format;
use model::open::Model;
use moemesh_tests::cluster::{
    Outcome, Shape, even, generate, native, open, start_audited_engine, start_engine, written,
};
use moemesh_tests::lies::Lie;
use moemesh_tests::tale_moe;
use router::request::{GenerateRequest, Sampling};
use router::serve::model_facts;

/// For whatever happens as soon as the machine has the time.
const LONG: Duration = Duration::from_secs(60);
/// Honest nodes.
const HONEST: usize = 2;
const SHAPE: Shape = Shape { nodes: HONEST + 1, chunk: 64, kv_blocks: 64, replicate: false };

static MODEL: LazyLock<(Arc<Model>, tempfile::TempDir)> = LazyLock::new(|| {
    let cache = tempfile::tempdir().expect("a folder");
    (open(&tale_moe(), Format::Q4, cache.path()), cache)
});

/// What the request comes to without any cluster.
static ALONE: LazyLock<Outcome> = LazyLock::new(|| {
    let (engine, _) = start_engine(&MODEL.0, SHAPE, None);
    generate(&engine, request()).0
});

fn request() -> GenerateRequest {
    GenerateRequest {
        prompt: (10..40).collect(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens: 24,
        min_tokens: 24,
        stop_tokens: Vec::new(),
        logprobs: None,
        prompt_logprobs: None,
        logits_digest: true,
    }
}

/// The program, ended when dropped.
struct Liar(Child);

impl Drop for Liar {
    fn drop(&mut self) {
        // Fails where it has ended already.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn start_liar(mode: &str, state: &std::path::Path) -> Liar {
    let mut command = Command::new(env!("CARGO_BIN_EXE_liar"));
    command.args(["node", "--mode", mode, "--state"]).arg(state);
    command.arg("--model").arg(tale_moe()).arg("--cache").arg(MODEL.1.path());
    let child = command.arg("--stop-with-parent").stdin(Stdio::piped()).stdout(Stdio::null()).spawn();
    Liar(child.expect("the liar starts"))
}

/// Generates with a liar among the nodes, again and again until it was noticed as it should be, checks every text, and
/// tells how the router sees the liar then.
fn among(mode: &str, noticed: impl Fn(&NodeStatus) -> bool) -> NodeStatus {
    among_audited(mode, 0.0, noticed).pop().expect("the liar is in the roster")
}

/// As `among`, with audits of this share: then text may be wrong until the liar was noticed. All nodes, the liar last.
fn among_audited(mode: &str, share: f64, noticed: impl Fn(&NodeStatus) -> bool) -> Vec<NodeStatus> {
    let model = &MODEL.0;
    let authority = Arc::new(Authority::in_memory().expect("keys"));
    let policy = Policy { plan_at_nodes: SHAPE.nodes, ..Policy::default() };
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let admit = |name: &str, identity: &Identity| {
        let machine = authority.admit(name, identity.id()).expect("a free name");
        let (cluster, router) = (authority.cluster(), authority.identity().id());
        Admission { cluster, router, name: machine.name, addresses: Vec::new() }
    };
    let members: Vec<_> = (0..HONEST)
        .map(|index| {
            let identity = Identity::generate().expect("a key");
            let admission = admit(&format!("honest-{index}"), &identity);
            Arc::new(Membership::in_memory(identity, admission))
        })
        .collect();
    let folder = tempfile::tempdir().expect("a folder");
    let state = folder.path().join("liar");
    let Opened::Stranger(kept, identity) = Membership::open(&state).expect("a state folder") else {
        panic!("a new folder belongs to no cluster")
    };
    let admission = admit("liar", &identity);
    let mut config =
        HubConfig { listen, policy, ..HubConfig::new(Arc::clone(&authority), model_facts(model)) };
    // The liar has its share, whatever the honest ones measure on a busy machine.
    let (plan, table) = (folder.path().join("plan"), even(model, SHAPE.nodes as u16, 1));
    let text = written(authority.roster().roster(), &config.facts, table);
    std::fs::write(&plan, text).expect("the plan is written");
    config.placement_file = Some(plan);
    let hub = Arc::new(Hub::start(config).expect("the hub starts"));
    let admission = Admission { addresses: vec![hub.local_addr()], ..admission };
    Membership::enter(kept, identity, admission).expect("the state is saved");

    let _liar = start_liar(mode, &state);
    let nodes: Vec<ExpertNode> = members.into_iter().map(|member| start_node(model, member, &hub)).collect();
    let all_here = |hub: &Hub| hub.wait_until(LONG, |cluster| cluster.epoch() > 0);
    assert!(all_here(&hub), "{mode}: no plan was made");
    let honest = |cluster: &mesh_proto::cluster::Cluster| {
        (0..HONEST as u16)
            .all(|node| cluster.status(node).is_some_and(|node| node.state == NodeState::Serving))
    };
    assert!(hub.wait_until(LONG, honest), "{mode}: the honest nodes do not serve");
    let (engine, _, _) = start_audited_engine(model, SHAPE, Some(Arc::clone(&hub)), (true, share));
    let until = Instant::now() + LONG;
    let seen = loop {
        let (outcome, _) = generate(&engine, request());
        assert!(share > 0.0 || outcome == *ALONE, "{mode}: the text changed");
        let seen = hub.nodes();
        // What is suspect is tried again only after a pause.
        if noticed(&seen[HONEST]) || Instant::now() > until {
            break seen;
        }
    };
    assert_eq!(generate(&engine, request()).0, *ALONE, "{mode}: the text is still another");
    for node in nodes {
        node.shutdown();
        node.join().expect("an honest node ends well");
    }
    seen
}

fn start_node(model: &Arc<Model>, membership: Arc<Membership>, hub: &Hub) -> ExpertNode {
    ExpertNode::start(NodeConfig {
        membership,
        routers: vec![hub.local_addr()],
        model: Arc::<Model>::clone(model),
        kernels: native(),
        threads: 1,
        memory_bytes: 1 << 30,
        spin: Duration::ZERO,
        pool_bytes_max: StationConfig::POOL_BYTES_MAX,
        sysfs: "/nowhere".into(),
    })
    .expect("the node starts")
}

/// Answers that no correct node gives: each is counted, none reaches the sums, and after three the node is left out.
#[test]
fn nonsense_is_counted_and_its_sender_quarantined() {
    for mode in ["short", "long", "hidden", "width", "garbage", "truncated", "oversized", "foreign"] {
        let seen = among(mode, |seen| seen.counters.rejected >= u64::from(MALFORMED_MAX));
        let counters = seen.counters;
        assert_eq!(counters.answered, 0, "{mode}: an answer was taken");
        assert!(counters.rejected >= u64::from(MALFORMED_MAX), "{mode}: {counters:?}");
        assert_eq!(seen.cluster.state, NodeState::Quarantined, "{mode}");
    }
}

/// Answers to other calls than the one that was made are dropped, however many there are.
#[test]
fn answers_to_other_calls_are_dropped() {
    for mode in ["another", "flood"] {
        let counters = among(mode, |seen| seen.counters.stale > 0).counters;
        assert_eq!(counters.answered, 0, "{mode}: an answer was taken");
        assert!(counters.stale > 0, "{mode}: {counters:?}");
    }
    let counters = among("twice", |seen| seen.counters.stale > 0).counters;
    assert!(counters.answered > 0 && counters.stale > 0, "{counters:?}");
}

/// Nodes that say little, late or nothing cost time, and no text.
#[test]
fn silence_dripping_and_boasting_cost_time_only() {
    for mode in ["silence", "drip", "boast", "stale"] {
        let seen = among(mode, |_| true);
        assert_eq!(seen.counters.answered, 0, "{mode}: an answer was taken");
    }
    assert!(
        among("honest", |seen| seen.counters.answered > 0).counters.answered > 0,
        "even the liar can be honest"
    );
}

/// Answers that look right: an audit proves them wrong, the liar is left out, the honest ones are not, and from then on
/// the text is right again.
#[test]
fn plausible_liars_are_quarantined_by_audits_and_nobody_else() {
    for lie in [Lie::Scaled, Lie::Noise, Lie::OtherExperts, Lie::Zeros, Lie::Seldom] {
        let mode = lie.name();
        let seen = among_audited(mode, 0.5, |liar| liar.cluster.state == NodeState::Quarantined);
        let (liar, honest) = seen.split_last().expect("nodes");
        assert_eq!(liar.cluster.state, NodeState::Quarantined, "{mode}: {}", liar.cluster.note);
        assert!(liar.cluster.note.contains("computed wrongly in layer"), "{mode}: {}", liar.cluster.note);
        assert!(liar.cluster.note.contains("cannot be taken back"), "{mode}: {}", liar.cluster.note);
        assert_eq!(liar.counters.rejected, 0, "{mode}: it was found by its frames");
        let well = |node: &NodeStatus| node.cluster.state == NodeState::Serving;
        assert!(honest.iter().all(well), "{mode}: {honest:?}");
    }
}
