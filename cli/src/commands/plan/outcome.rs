//! The answers of a plan, as figures: what `story` tells and `--json` prints.
//!
//! Everything comes from the router's own planner and cost model, asked more than once: with all machines, without each
//! of them (is somebody making it slower?), and with the table as it is when one is lost. What no node holds is read by
//! the router from its packed model: from memory where the page cache can hold it, else from a disk.

use mesh_proto::cost::{Cap, DRAWS, Prefill, Scene};
use mesh_proto::facts::ModelFacts;
use mesh_proto::machine::{Capacity, Machine};
use mesh_proto::placement::{Plan, Wishes, by_speed, plan};
use mesh_proto::routes::{NodeIndex, Table};
use model::format::Format;
use serde_json::{Value, json};

use super::machines::{Machines, Node};

/// MB/s of experts read from a disk: an NVMe drive, megabytes at a time, the router computing meanwhile.
const DISK_MB_S: u32 = 1500;

/// Memory that the router needs besides weights: its KV cache (`--kv-memory`) and itself.
const ROUTER_SPARE_BYTES: u64 = 1_500_000_000;

/// Rows of a step while nobody else waits: two chunks of the router's default.
const STEP_ROWS: u32 = 512;

/// A machine makes it slower if it is faster without it by this much; less is less than the prediction knows.
const SLOWER: f64 = 1.02;

/// Most nodes of which each is left out once: every time is a plan.
const EACH_MAX: usize = 24;

/// Machines like this one that are tried where there is only this one.
const MORE_MAX: u16 = 4;

/// What is asked.
#[derive(Debug)]
pub(super) struct Question {
    pub(super) name: String,
    pub(super) weights: Format,
    pub(super) facts: ModelFacts,
    /// The same model in formats that take less memory.
    pub(super) smaller: Vec<(Format, ModelFacts)>,
    pub(super) machines: Machines,
    pub(super) wishes: Wishes,
    /// Tokens.
    pub(super) prompt: u32,
}

/// What is answered.
#[derive(Debug)]
pub(super) struct Outcome {
    pub(super) plan: Plan,
    pub(super) tok_s: f64,
    /// Of a token: router and its work, experts. Milliseconds.
    pub(super) token_ms: [f64; 2],
    pub(super) prefill_tok_s: f64,
    /// What bounds it.
    pub(super) cap: String,
    pub(super) first_token_s: f64,
    /// Bytes of experts that fit nowhere.
    pub(super) missing_bytes: u64,
    /// Smallest changes that would make it fit.
    pub(super) remedies: Vec<String>,
    /// Bytes of memory that no expert needs.
    pub(super) spare_bytes: u64,
    pub(super) nodes: Vec<NodeOutcome>,
    /// Experts and slices with one holder.
    pub(super) single: usize,
    /// Parts in all.
    pub(super) parts: usize,
    /// With so many machines like this one: tokens per second, and whether everything fits.
    pub(super) more: Vec<(u16, f64, bool)>,
    /// Whether the router's own weights fit in its memory; `None` where that is not known.
    pub(super) router_fits: Option<bool>,
}

/// What a node holds and does, and what its loss would do.
#[derive(Debug)]
pub(super) struct NodeOutcome {
    pub(super) name: String,
    pub(super) primaries: usize,
    pub(super) copies: usize,
    pub(super) bytes: u64,
    /// Of the experts' bytes of a token.
    pub(super) share: f64,
    /// Of the layers, those that wait for it last.
    pub(super) last: f64,
    pub(super) calls: f64,
    pub(super) wire_bytes: u64,
    pub(super) left_out: bool,
    /// Without it, where that is faster.
    pub(super) without_tok_s: Option<f64>,
    /// Where it is left out: if it had a share by its speed.
    pub(super) forced_tok_s: Option<f64>,
    /// When it is lost.
    pub(super) lost_tok_s: f64,
    /// Bytes that the router then computes from its own files.
    pub(super) lost_bytes: u64,
}

impl Outcome {
    pub(super) fn find(question: &Question) -> Outcome {
        let Question { facts, machines, wishes, .. } = question;
        let capacities = capacities(&machines.nodes);
        let plan = plan(facts, &capacities, wishes, None);
        let missing_bytes = held_nowhere(facts, &plan.table);
        let token_ns = question.token_ns(&plan.table, None);
        let tok_s = 1e9 / token_ns as f64;
        let (prefill, first_ns) = question.prompt(&plan.table);
        let copies_held = plan.capacities.iter().map(|node| plan.bytes(node.node, facts)).sum::<u64>();
        let all_memory: u64 = machines.nodes.iter().map(|node| node.memory_bytes).sum();
        let parts: Vec<usize> = plan.table.all().map(|(_, part)| part.holders.as_slice().len()).collect();
        let router_memory = machines.router.memory_bytes;
        Outcome {
            tok_s,
            token_ms: [plan.predicted.router_ns, token_ns.saturating_sub(plan.predicted.router_ns)]
                .map(|ns| ns as f64 / 1e6),
            prefill_tok_s: f64::from(STEP_ROWS) * 1e9 / prefill.step_ns.max(1) as f64,
            cap: question.cap(prefill.cap),
            first_token_s: first_ns as f64 / 1e9,
            missing_bytes,
            remedies: question.remedies(missing_bytes),
            spare_bytes: all_memory.saturating_sub(copies_held),
            nodes: question.nodes(&plan, tok_s),
            single: parts.iter().filter(|holders| **holders == 1).count(),
            parts: parts.len(),
            more: question.more(),
            router_fits: (router_memory > 0).then(|| {
                router_memory >= facts.router_bytes + machines.router.experts_bytes.min(experts_bytes(facts))
            }),
            plan,
        }
    }

    pub(super) fn to_json(&self, question: &Question) -> Value {
        let node = |node: &NodeOutcome| {
            json!({
                "name": node.name, "experts": node.primaries, "copies": node.copies, "bytes": node.bytes,
                "share": node.share, "last": node.last, "calls_per_token": node.calls,
                "wire_bytes_per_token": node.wire_bytes, "left_out": node.left_out,
                "without_tok_s": node.without_tok_s, "forced_tok_s": node.forced_tok_s,
                "lost_tok_s": node.lost_tok_s, "lost_fallback_bytes": node.lost_bytes,
            })
        };
        let facts = &question.facts;
        json!({
            "model": question.name,
            "weights": question.weights,
            "experts_bytes": experts_bytes(facts),
            "router_bytes": facts.router_bytes,
            "fits": self.missing_bytes == 0,
            "missing_bytes": self.missing_bytes,
            "remedies": self.remedies,
            "spare_bytes": self.spare_bytes,
            "parts_per_expert": self.plan.cuts,
            "decode_tok_s": self.tok_s,
            "router_ms": self.token_ms[0],
            "experts_ms": self.token_ms[1],
            "prefill_tok_s": self.prefill_tok_s,
            "prefill_cap": self.cap,
            "prompt": question.prompt,
            "first_token_s": self.first_token_s,
            "single_copies": self.single,
            "nodes": self.nodes.iter().map(node).collect::<Vec<_>>(),
            "more": self.more.iter().map(|(machines, tok_s, fits)| json!({"nodes": machines, "decode_tok_s": tok_s, "fits": fits})).collect::<Vec<_>>(),
            "router_fits": self.router_fits,
            "assumed": question.machines.assumed,
        })
    }
}

impl Question {
    /// Nanoseconds of a token, with the nodes but `lost`.
    fn token_ns(&self, table: &Table, lost: Option<NodeIndex>) -> u64 {
        let nodes: Vec<(NodeIndex, Machine)> = (0..)
            .zip(&self.machines.nodes)
            .filter(|(index, _)| Some(*index) != lost)
            .map(|(index, node)| (index, node.machine))
            .collect();
        let table = table.filtered(|node| Some(node) != lost);
        self.scene(&nodes, &table).decode(&table, DRAWS).token_ns.max(1)
    }

    /// The step of a prompt, and the time of all of it.
    fn prompt(&self, table: &Table) -> (Prefill, u64) {
        let nodes: Vec<_> =
            (0..).zip(&self.machines.nodes).map(|(index, node)| (index, node.machine)).collect();
        let scene = self.scene(&nodes, table);
        let full = scene.prefill(table, STEP_ROWS);
        let rest = match self.prompt % STEP_ROWS {
            0 => 0,
            rows => scene.prefill(table, rows).step_ns,
        };
        (full, full.step_ns.saturating_mul(u64::from(self.prompt / STEP_ROWS)).saturating_add(rest))
    }

    fn scene<'a>(&'a self, nodes: &'a [(NodeIndex, Machine)], table: &Table) -> Scene<'a> {
        let router = &self.machines.router;
        let taken = self.facts.router_bytes + router.experts_bytes + ROUTER_SPARE_BYTES;
        let cached = router.memory_bytes == 0
            || held_nowhere(&self.facts, table) <= router.memory_bytes.saturating_sub(taken);
        let fallback_mb_s = if cached { 0 } else { DISK_MB_S };
        Scene { facts: &self.facts, router: router.machine, fallback_mb_s, nodes, popularity: None }
    }

    fn cap(&self, cap: Cap) -> String {
        let name = |node: usize| self.machines.nodes.get(node).map_or("?", |node| node.name.as_str());
        match cap {
            Cap::Router => "the router's computing".to_owned(),
            Cap::Node(node) => format!("the computing of {}", name(node)),
            Cap::Link(node) => format!("the link of {}", name(node)),
            Cap::RouterLink => "the router's link".to_owned(),
        }
    }

    /// What would make everything fit.
    fn remedies(&self, missing_bytes: u64) -> Vec<String> {
        if missing_bytes == 0 {
            return Vec::new();
        }
        let size = crate::output::bytes;
        let nodes = if self.machines.nodes.is_empty() { "this machine" } else { "any node" };
        let mut remedies = vec![format!("{} more memory on {nodes}", size(missing_bytes))];
        let room: u64 = self.machines.nodes.iter().map(|node| node.memory_bytes).sum();
        let router = self.machines.router.experts_bytes;
        let fit = |(_, facts): &&(Format, ModelFacts)| experts_bytes(facts) <= room.saturating_add(router);
        // The largest that fits: the closest to what was wanted.
        if let Some((format, _)) = self.smaller.iter().filter(fit).max_by_key(|(_, facts)| facts.expert_bytes)
        {
            remedies.push(format!("--weights {format}"));
        }
        if let Some(largest) = self.machines.nodes.iter().max_by_key(|node| node.memory_bytes) {
            let count = missing_bytes.div_ceil(largest.memory_bytes.max(1));
            let machines =
                if count == 1 { "one more machine".to_owned() } else { format!("{count} more machines") };
            remedies.push(format!("{machines} like {}", largest.name));
        }
        remedies
    }

    fn nodes(&self, plan: &Plan, tok_s: f64) -> Vec<NodeOutcome> {
        let facts = &self.facts;
        let outlook = plan.outlook(0, facts, &plan.members());
        let all = capacities(&self.machines.nodes);
        let forced = outlook.shares.iter().any(|share| share.left_out).then(|| {
            let forced = by_speed(facts, &all, &self.wishes);
            1e9 / forced.predicted.token_ns.max(1) as f64
        });
        let one = |(index, node): (NodeIndex, &Node)| {
            let at = usize::from(index);
            let used = plan.predicted.nodes.get(at).copied().unwrap_or_default();
            let share = outlook.shares.get(at);
            let load = plan.load(index);
            let left_out = share.is_some_and(|share| share.left_out);
            let lost = plan.table.filtered(|node| node != index);
            let before = held_nowhere(facts, &plan.table);
            NodeOutcome {
                name: node.name.clone(),
                primaries: load.primaries,
                copies: load.experts - load.primaries,
                bytes: plan.bytes(index, facts),
                share: share.map_or(0.0, |share| share.share),
                last: used.last_milli as f64 / 1e3,
                calls: used.calls_milli as f64 / 1e3,
                wire_bytes: used.bytes_out + used.bytes_in,
                left_out,
                without_tok_s: if left_out { None } else { self.without(&all, index, tok_s) },
                forced_tok_s: forced.filter(|_| left_out),
                lost_tok_s: 1e9 / self.token_ns(&plan.table, Some(index)) as f64,
                lost_bytes: held_nowhere(facts, &lost).saturating_sub(before),
            }
        };
        (0..).zip(&self.machines.nodes).map(one).collect()
    }

    /// Tokens per second without a node, if that is faster and everything still fits.
    fn without(&self, all: &[Capacity], node: NodeIndex, tok_s: f64) -> Option<f64> {
        if all.len() > EACH_MAX || all.len() < 2 {
            return None;
        }
        let others: Vec<Capacity> = all.iter().copied().filter(|other| other.node != node).collect();
        let plan = plan(&self.facts, &others, &self.wishes, None);
        let without = 1e9 / plan.predicted.token_ns.max(1) as f64;
        (plan.unplaced() == 0 && without > tok_s * SLOWER).then_some(without)
    }

    /// With more machines like this one.
    fn more(&self) -> Vec<(u16, f64, bool)> {
        if !self.machines.alone {
            return Vec::new();
        }
        let router = &self.machines.router;
        let wishes = Wishes { router_experts: 0, ..self.wishes };
        let with = |count: u16| {
            let alike = |node| Capacity { node, memory_bytes: router.experts_bytes, machine: router.machine };
            let nodes: Vec<Capacity> = (0..count).map(alike).collect();
            let plan = plan(&self.facts, &nodes, &wishes, None);
            (count, 1e9 / plan.predicted.token_ns.max(1) as f64, plan.unplaced() == 0)
        };
        (1..=MORE_MAX).map(with).collect()
    }
}

fn capacities(nodes: &[Node]) -> Vec<Capacity> {
    let capacity = |(node, named): (NodeIndex, &Node)| Capacity {
        node,
        memory_bytes: named.memory_bytes,
        machine: named.machine,
    };
    (0..).zip(nodes).map(capacity).collect()
}

/// Bytes of all routed experts.
pub(super) fn experts_bytes(facts: &ModelFacts) -> u64 {
    facts.moe_layers.len() as u64 * u64::from(facts.experts) * facts.expert_bytes
}

/// Bytes of what has no holder.
fn held_nowhere(facts: &ModelFacts, table: &Table) -> u64 {
    let nobodys = table.all().filter(|(_, part)| part.holders.is_empty());
    nobodys.map(|(_, part)| facts.slice_bytes(part.from, part.to)).sum()
}
