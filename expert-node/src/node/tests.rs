//! Nodes behind real QUIC on loopback, called as a router does.

use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use mesh_net::authority::Authority;
use mesh_net::hub::{Hub, HubConfig, Lane};
use mesh_net::identity::Identity;
use mesh_net::membership::Admission;
use mesh_net::pending::CallError;
use mesh_proto::cluster::{NodeState, Policy};
use mesh_proto::facts::ModelFacts;
use mesh_wire::call::{Assignment as WireAssignment, CallDraft, CallHead};
use mesh_wire::payload::{RowFormat, row_bytes};
use mesh_wire::reply::{Reply, Row};
use model::activations::Activations;
use model::format::Format;
use model::kernel::native::{Native, NativeConfig};
use model::kernel::paced::paced;
use model::kernel::{Assignment, PartialSums};
use model::open::Model;
use model::region;

use super::*;
use crate::fixture::{EXPERT_BYTES, FAILS, FakeKernels, FakeSource};

/// Far beyond what anything here takes; only a hang gets there.
const PATIENCE: Duration = Duration::from_secs(120);

struct Mesh {
    hub: Hub,
    identities: Vec<Identity>,
    source: Arc<dyn Source>,
    calls: AtomicU64,
}

fn identity(seed: u8) -> Identity {
    Identity::from_seed([seed; 32]).unwrap()
}

/// A router for `count` nodes that plans once `plan_at` of them are here.
fn mesh(count: u8, plan_at: usize, source: Arc<dyn Source>) -> Mesh {
    let identities: Vec<_> = (1..=count).map(identity).collect();
    let authority = Arc::new(Authority::in_memory().unwrap());
    for (index, node) in identities.iter().enumerate() {
        authority.admit(&format!("node{index}"), node.id()).unwrap();
    }
    let shape = source.shape();
    let facts = ModelFacts {
        fingerprint: source.fingerprint(),
        moe_layers: shape.layers,
        experts: shape.experts,
        expert_bytes: shape.expert_bytes,
        top_k: 2,
        blocks: 1,
        ..ModelFacts::default()
    };
    let config = HubConfig {
        listen: ([127, 0, 0, 1], 0).into(),
        policy: Policy { plan_at_nodes: plan_at, plan_after: PATIENCE, ..Policy::default() },
        ..HubConfig::new(authority, facts)
    };
    let hub = Hub::start(config).unwrap();
    Mesh { hub, identities, source, calls: AtomicU64::new(1) }
}

impl Mesh {
    fn membership(&self, identity: &Identity, node: usize) -> Arc<Membership> {
        let authority = self.hub.authority();
        let (cluster, router) = (authority.cluster(), authority.identity().id());
        let admission = Admission { cluster, router, name: format!("node{node}"), addresses: Vec::new() };
        Arc::new(Membership::in_memory(identity.clone(), admission))
    }

    fn config(&self, node: usize, kernels: Arc<dyn Kernels>) -> NodeConfig {
        NodeConfig {
            sysfs: "/nowhere".into(),
            membership: self.membership(&self.identities[node], node),
            routers: vec![self.hub.local_addr()],
            model: Arc::clone(&self.source),
            kernels,
            threads: 1,
            memory_bytes: u64::MAX,
            spin: Duration::ZERO,
            pool_bytes_max: StationConfig::POOL_BYTES_MAX,
        }
    }

    fn start(&self, node: usize, kernels: Arc<dyn Kernels>) -> ExpertNode {
        ExpertNode::start(self.config(node, kernels)).unwrap()
    }

    fn call(
        &self,
        node: u16,
        (epoch, layer): (u64, u16),
        rows: &[u8],
        assignments: &[WireAssignment],
    ) -> Result<Reply, CallError> {
        let shape = self.source.shape();
        let stride = row_bytes(RowFormat::Int8, shape.hidden);
        let head = CallHead {
            call: self.calls.fetch_add(1, Ordering::Relaxed),
            step: 0,
            epoch,
            budget_us: 30_000_000,
            layer,
            format: RowFormat::Int8,
            hidden: shape.hidden as u32,
            rows: (rows.len() / stride) as u32,
        };
        let mut draft = CallDraft::new(self.hub.pool(), head, assignments).unwrap();
        draft.payload_mut().copy_from_slice(rows);
        self.hub.send(node, Lane::Decode, draft.finish()).wait()
    }

    /// The experts of `layer` that `node` serves now.
    fn experts(&self, node: u16, layer: u16) -> Vec<u16> {
        let routes = self.hub.routes();
        let held = routes.table.held_by(node).filter(|slice| slice.key.layer == layer);
        held.map(|slice| slice.key.expert).collect()
    }
}

/// Rows of the fixture's width, every value as given.
fn fake_rows(values: &[i8]) -> Vec<u8> {
    values.iter().flat_map(|value| [vec![*value as u8; 32], vec![0; 32]].concat()).collect()
}

fn refused(outcome: Result<Reply, CallError>) -> Refusal {
    match outcome {
        Err(CallError::Refused { refusal, .. }) => refusal,
        other => panic!("{other:?}"),
    }
}

fn first_sum(outcome: Result<Reply, CallError>) -> i32 {
    let reply = outcome.unwrap();
    let row = reply.view().rows().next();
    match row.unwrap() {
        Row::I16(sums) => i32::from(sums[0]),
        Row::I32(sums) => sums[0],
        Row::Overflow => panic!("overflow"),
    }
}

#[test]
fn a_node_that_joins_late_takes_over_while_both_epochs_are_served() {
    let mesh = mesh(2, 1, Arc::new(FakeSource::default()));
    // At a pace that both reach, so that they are equally fast and share equally.
    let start = |node| {
        let kernels = paced(Arc::new(FakeKernels::default()), Some(0.001));
        ExpertNode::start(mesh.config(node, kernels)).unwrap()
    };
    let first = start(0);
    assert_eq!(first.hello().weight_mb_s[0], 1);
    assert!(mesh.hub.wait_ready(1, PATIENCE));
    assert_eq!(mesh.experts(0, 1), (0..8).collect::<Vec<_>>());
    let old = mesh.hub.routes().epoch;
    let ask = |node, epoch, layer, expert, weight| {
        mesh.call(node, (epoch, layer), &fake_rows(&[2]), &[WireAssignment::new(0, expert, weight)])
    };
    // Expert 7 of layer 1 is seventeens.
    assert_eq!(first_sum(ask(0, old, 1, 7, 1.0)), 34);

    let second = start(1);
    assert!(mesh.hub.wait_until(PATIENCE, |cluster| cluster.epoch() > old && cluster.settled()));
    let new = mesh.hub.routes().epoch;
    assert_eq!((mesh.experts(0, 1).len(), mesh.experts(1, 1).len()), (4, 4));
    let moved = mesh.experts(1, 1)[0];
    assert_eq!(first_sum(ask(1, new, 1, moved, 1.0)), 2 * (10 + i32::from(moved)));
    // Calls that were on their way when the epoch changed.
    assert_eq!(first_sum(ask(0, old, 1, moved, 3.0)), 6 * (10 + i32::from(moved)));
    assert_eq!(refused(ask(0, new, 1, moved, 1.0)), Refusal::UnknownExpert);
    assert_eq!(refused(ask(1, old, 1, moved, 1.0)), Refusal::UnknownEpoch);
    assert_eq!(refused(ask(1, new, 2, 0, 1.0)), Refusal::UnknownExpert);
    assert_eq!(refused(ask(1, new, 1, moved, FAILS)), Refusal::Failed);
    let snapshot = second.snapshot();
    assert_eq!((snapshot.epoch, snapshot.calls, snapshot.refused), (new, 1, 3));
    assert_eq!(snapshot.weight_bytes, 8 * EXPERT_BYTES);
    first.shutdown();
    first.join().unwrap();
    second.shutdown();
    second.join().unwrap();
}

#[test]
fn a_node_leaves_with_a_goodbye_and_returns_with_a_new_process() {
    let mesh = mesh(1, 1, Arc::new(FakeSource::default()));
    let node = mesh.start(0, Arc::new(FakeKernels::default()));
    assert!(mesh.hub.wait_ready(1, PATIENCE));
    node.stop().trigger();
    node.join().unwrap();
    let state = |cluster: &mesh_proto::cluster::Cluster| cluster.status(0).unwrap().state;
    assert!(mesh.hub.wait_until(PATIENCE, |cluster| state(cluster) == NodeState::Absent));
    assert!(mesh.experts(0, 1).is_empty());
    let node = mesh.start(0, Arc::new(FakeKernels::default()));
    assert!(mesh.hub.wait_until(PATIENCE, |cluster| state(cluster) == NodeState::Serving));
    assert_eq!(mesh.experts(0, 1).len(), 8);
    // Dropped without a word: its threads end by themselves, and the router hears of it.
    drop(node);
    assert!(mesh.hub.wait_until(PATIENCE, |cluster| state(cluster) == NodeState::Absent));
}

#[test]
fn a_node_that_drains_answers_what_is_under_way_and_refuses_afterwards() {
    let mesh = mesh(1, 1, Arc::new(FakeSource::default()));
    // A pace of 0.1 MB/s: a call of one expert takes a tenth of a second.
    let kernels = paced(Arc::new(FakeKernels::default()), Some(0.000_1));
    let node = ExpertNode::start(mesh.config(0, kernels)).unwrap();
    assert!(mesh.hub.wait_ready(1, PATIENCE));
    let epoch = mesh.hub.routes().epoch;
    let state = |cluster: &mesh_proto::cluster::Cluster| cluster.status(0).unwrap().state;
    let under_way = std::thread::scope(|scope| {
        let call = || mesh.call(0, (epoch, 1), &fake_rows(&[2]), &[WireAssignment::new(0, 7, 1.0)]);
        let calls = [scope.spawn(call), scope.spawn(call)];
        while node.snapshot().under_way < 2 {
            std::thread::yield_now();
        }
        node.drain();
        assert!(mesh.hub.wait_until(PATIENCE, |cluster| state(cluster) == NodeState::Leaving));
        // Nobody can take over from it, so it is let go at once.
        let released =
            |cluster: &mesh_proto::cluster::Cluster| cluster.routes().table.held_by(0).next().is_none();
        assert!(mesh.hub.wait_until(PATIENCE, released) && node.snapshot().leaving);
        // Sent before word came.
        let late = call();
        let queue = Arc::clone(&node.queue);
        node.join().unwrap();
        // Whatever still held a call is told, not kept waiting.
        let (job, answers, _) = crate::fixture::job(crate::fixture::call(
            &Pool::new(1 << 20),
            (1, epoch, 1),
            &[1],
            &[(0, 7, 1.0)],
        ));
        let (job, rejected) = queue.push(job).unwrap_err();
        assert_eq!(rejected, crate::batch::Rejected::Closed);
        drop((job, answers));
        let [first, second] = calls.map(|call| call.join().unwrap());
        [first, second, late]
    });
    for outcome in under_way {
        assert_eq!(first_sum(outcome), 34);
    }
    assert!(mesh.hub.wait_until(PATIENCE, |cluster| state(cluster) == NodeState::Absent));
}

#[test]
fn memory_bounds_what_a_node_is_given() {
    let mesh = mesh(1, 1, Arc::new(FakeSource::default()));
    let config = mesh.config(0, Arc::new(FakeKernels::default()));
    let node = ExpertNode::start(NodeConfig { memory_bytes: 5 * EXPERT_BYTES + 1, ..config }).unwrap();
    assert!(mesh.hub.wait_ready(1, PATIENCE));
    assert_eq!(mesh.experts(0, 1).len() + mesh.experts(0, 3).len(), 5);
    assert_eq!(node.snapshot().weight_bytes, 5 * EXPERT_BYTES);
}

#[test]
fn a_node_that_cannot_load_keeps_its_experts_on_the_router() {
    let broken = FakeSource { broken: Some(crate::fixture::key(3, 7)), ..FakeSource::default() };
    let mesh = mesh(1, 1, Arc::new(broken));
    let _node = mesh.start(0, Arc::new(FakeKernels::default()));
    let status = |cluster: &mesh_proto::cluster::Cluster| cluster.status(0).unwrap();
    assert!(mesh.hub.wait_until(PATIENCE, |cluster| status(cluster).state == NodeState::Refused));
    let note = mesh.hub.nodes()[0].cluster.note.clone();
    assert!(note.contains("expert 7 of layer 3 cannot be read"), "{note}");
    assert!(mesh.experts(0, 1).is_empty());
}

#[test]
fn what_can_never_work_is_an_error_of_join() {
    let mesh = mesh(1, 1, Arc::new(FakeSource::default()));
    mesh.hub.revoke("node0").unwrap();
    let revoked = mesh.start(0, Arc::new(FakeKernels::default()));
    let error = revoked.join().unwrap_err();
    assert!(matches!(error, NodeError::Station(StationError::Revoked)), "{error}");
    let unreadable = FakeSource { broken: Some(crate::fixture::key(1, 0)), ..FakeSource::default() };
    let config =
        NodeConfig { model: Arc::new(unreadable), ..mesh.config(0, Arc::new(FakeKernels::default())) };
    assert!(matches!(ExpertNode::start(config), Err(NodeError::Measure(_))));
}

/// The demo's checkpoint, packed once for all tests.
fn tale_moe() -> Arc<Model> {
    static MODEL: OnceLock<(tempfile::TempDir, Arc<Model>)> = OnceLock::new();
    let (_, model) = MODEL.get_or_init(|| {
        let cache = tempfile::tempdir().unwrap();
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tale-moe");
        let model = Model::open(directory, Format::Q4, cache.path(), &mut |_, _, _| {}).unwrap();
        (cache, Arc::new(model))
    });
    Arc::clone(model)
}

/// Rows that look like activations: int8 values of every size and scales that differ.
fn rows(count: usize, hidden: usize) -> region::Buffer {
    let stride = row_bytes(RowFormat::Int8, hidden);
    let mut bytes = region::Buffer::zeroed(count * stride);
    for (index, row) in bytes.chunks_exact_mut(stride).enumerate() {
        let (values, scales) = row.split_at_mut(hidden);
        for (at, value) in values.iter_mut().enumerate() {
            *value = ((index * 131 + at * at * 7 + at * 57) % 255) as u8 ^ 0x80;
            *value = if *value == 0x80 { 0x81 } else { *value };
        }
        for (at, scale) in scales[..hidden / 32 * 4].chunks_exact_mut(4).enumerate() {
            scale.copy_from_slice(&(0.002 * (1 + (at + index) % 9) as f32).to_le_bytes());
        }
    }
    bytes
}

/// Sums over the network, node by node, against one run of all experts in this process.
#[test]
fn the_sums_of_two_nodes_are_bit_for_bit_those_of_one_process() {
    let model = tale_moe();
    let mesh = mesh(2, 2, Arc::clone(&model) as _);
    let native = |threads| Arc::new(Native::new(NativeConfig::threads(threads)).unwrap());
    let _nodes = [mesh.start(0, native(1)), mesh.start(1, native(2))];
    assert!(mesh.hub.wait_ready(2, PATIENCE));
    let shape = mesh.source.shape();
    let epoch = mesh.hub.routes().epoch;
    let kernels = native(1);
    for layer in [shape.layers[0], *shape.layers.last().unwrap()] {
        let experts = (0..shape.experts)
            .map(|expert| (expert, Model::expert(&model, layer.into(), expert.into()).unwrap()))
            .collect();
        let all = kernels.experts(experts, Model::step_log2(&model, layer.into())).unwrap();
        for count in [1, 5, 40] {
            let bytes = rows(count, shape.hidden);
            let chosen: Vec<_> = (0..count as u32)
                .flat_map(|row| [(row, (row * 5 + 1) % 24, 0.625), (row, (row * 7 + 12) % 24, 0.375)])
                .map(|(row, expert, weight)| Assignment { row, expert: expert as u16, weight })
                .collect();
            let x = Activations::new(Format::Q4, count, shape.hidden, &bytes).unwrap();
            let mut expected = PartialSums::default();
            all.run(x, &chosen, &mut expected).unwrap();
            assert!(expected.sums.iter().any(|sum| *sum != 0) && !expected.overflowed.contains(&true));

            let mut sums = vec![0; expected.sums.len()];
            for node in 0..2 {
                let here = mesh.experts(node, layer);
                let part = chosen.iter().filter(|assignment| here.contains(&assignment.expert));
                let part: Vec<_> =
                    part.map(|from| WireAssignment::new(from.row, from.expert, from.weight)).collect();
                if part.is_empty() {
                    continue;
                }
                let reply = mesh.call(node, (epoch, layer), &bytes, &part).unwrap();
                for (sums, row) in sums.chunks_exact_mut(shape.hidden).zip(reply.view().rows()) {
                    match row {
                        Row::I16(row) => {
                            sums.iter_mut().zip(row).for_each(|(sum, more)| *sum += i32::from(*more))
                        }
                        Row::I32(row) => sums.iter_mut().zip(row).for_each(|(sum, more)| *sum += more),
                        Row::Overflow => panic!("overflow"),
                    }
                }
            }
            assert!(sums == expected.sums, "layer {layer}, {count} rows");
        }
    }
}
