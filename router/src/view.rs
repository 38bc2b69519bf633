//! What the API tells of the cluster: its nodes, what is planned and measured, and why it cannot serve if it cannot.
//!
//! Everything here is read from what the hub and the engine publish; nothing is asked of them, so a question costs
//! them nothing and is answered while they are busy, or not there yet: a router that still loads, or waits for its
//! nodes, says so (`Startup`), and shows the nodes as they come.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_net::hub::{Hub, NodeStatus};
use mesh_proto::cluster::{Change, NodeState};
use mesh_proto::placement::{Outlook, Share};
use mesh_proto::routes::{NodeIndex, Routes};
use model::kernel::measure::ROWS;
use serde_json::{Value, json};

use crate::audit::{AuditCounts, AuditView};
use crate::dispatch::PlacesView;
use crate::energy::{Energy, NodeEnergy};
use crate::engine::{EngineStatus, StatusView};
use crate::http;
use crate::metrics::Metrics;
use crate::pace::{Paces, Rate};
use crate::request::{EngineHandle, GenerateError, name_experts};
use crate::share::Place;

/// A router that does not serve yet.
pub(crate) struct Startup {
    hub: Option<Arc<Hub>>,
    /// Nodes that are waited for; `None`: all of the roster.
    expect: Option<usize>,
    measured: Measured,
    /// Bytes of experts loaded and in all; `None` where everything is loaded.
    loading: Mutex<Option<(u64, u64)>>,
}

impl Startup {
    /// At its beginning.
    pub(crate) fn new(hub: Option<Arc<Hub>>, expect: Option<usize>, own: [u32; ROWS.len()]) -> Startup {
        let measured = Measured { own, ..Measured::default() };
        Startup { hub, expect, measured, loading: Mutex::new(Some((0, 0))) }
    }

    /// How far loading is; `None` when it is done.
    pub(crate) fn load(&self, progress: Option<(u64, u64)>) {
        *self.loading.lock().unwrap_or_else(PoisonError::into_inner) = progress;
    }
}

impl http::Starting for Startup {
    fn nodes(&self) -> Value {
        nodes_json(self.hub.as_deref(), &EngineStatus::default(), &[], &self.measured)
    }

    fn waits_for(&self) -> http::Waiting {
        let nodes: Vec<NodeStatus> = self.hub.iter().flat_map(|hub| hub.nodes()).collect();
        let here = nodes.iter().filter(|node| node.cluster.state.is_here()).count();
        let members = nodes.iter().filter(|node| node.cluster.state != NodeState::Revoked).count();
        let wanted = self.expect.unwrap_or(members);
        let loading = *self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        let reason = match loading {
            Some((_, 0)) => "the model is loading".to_owned(),
            Some((done, total)) => {
                format!("the model is loading ({} of {} MB)", done / 1_000_000, total / 1_000_000)
            }
            None if here < wanted => format!("the router is waiting for nodes ({here} of {wanted})"),
            None => {
                let loading = nodes.iter().filter_map(|node| node.cluster.loading);
                let (done, total) = loading.fold((0, 0), |(done, total), loading| {
                    (done + loading.done_bytes / 1_000_000, total + loading.total_bytes / 1_000_000)
                });
                let bytes = if total == 0 { String::new() } else { format!(", {done} of {total} MB") };
                format!("the nodes are loading their experts ({here} of {wanted} nodes are here{bytes})")
            }
        };
        http::Waiting { reason, here, wanted }
    }
}

/// What is measured beside the engine.
#[derive(Default)]
pub(crate) struct Measured {
    /// What the router measured of itself, MB/s of weights.
    pub(crate) own: [u32; ROWS.len()],
    /// What came of audits; none where there are none.
    pub(crate) audits: Option<AuditView>,
    /// What nodes used.
    pub(crate) energy: Energy,
}

/// What the API tells of the cluster.
pub(crate) struct ClusterView {
    pub(crate) hub: Option<Arc<Hub>>,
    pub(crate) status: StatusView,
    pub(crate) places: PlacesView,
    pub(crate) engine: EngineHandle,
    pub(crate) measured: Measured,
    /// Whether the router can compute every expert.
    pub(crate) fallback: bool,
    /// By the routes it was found in: the experts that nobody can compute.
    pub(crate) unreachable: Mutex<Option<(Arc<Routes>, Option<String>)>>,
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
        nodes_json(self.hub.as_deref(), &self.status.read(), &self.places.read(), &self.measured)
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
        let audits = self.measured.audits.as_ref().map(AuditView::read).unwrap_or_default();
        for (index, node) in self.hub.iter().flat_map(|hub| hub.nodes()).enumerate() {
            let present = node.cluster.state != NodeState::Revoked;
            let vitals = node.cluster.health.filter(|_| present).map(|health| health.vitals);
            metrics.node_vitals(&node.name, &vitals.unwrap_or_default());
            if let Some(counts) = audits.get(index) {
                metrics.node_audits(&node.name, counts);
            }
            if present {
                metrics.node_up(&node.name, node.cluster.state == NodeState::Serving);
                metrics.node_quarantined(&node.name, node.cluster.state == NodeState::Quarantined);
                metrics.node_nonsense(&node.name, node.counters.rejected, node.counters.stale);
            }
        }
        if let Some(hub) = &self.hub {
            metrics.strangers(&hub.counters());
        }
    }
}

/// The body of `/api/v1/nodes`. What the router measured of itself is shown until it has learned better.
fn nodes_json(hub: Option<&Hub>, status: &EngineStatus, places: &[Place], measured: &Measured) -> Value {
    let outlook = hub.and_then(Hub::outlook);
    let nodes: Vec<NodeStatus> = hub.iter().flat_map(|hub| hub.nodes()).collect();
    let planned = |node: usize| {
        let shares = outlook.iter().flat_map(|outlook| &outlook.shares);
        shares.copied().find(|share| usize::from(share.node) == node)
    };
    let mut router = router_json(status, places.first());
    if router["weight_mb_s"][0].as_u64().unwrap_or(0) == 0 {
        router["weight_mb_s"] = json!(measured.own);
    }
    let counters = || nodes.iter().map(|node| &node.counters);
    router["malformed"] = counters().map(|counters| counters.rejected).sum::<u64>().into();
    router["stale"] = counters().map(|counters| counters.stale).sum::<u64>().into();
    // A revoked machine's row gives way to the one that has its name now.
    let is_shadow = |row: &NodeStatus| {
        let same = |other: &NodeStatus| other.name == row.name && other.id != row.id;
        row.cluster.state == NodeState::Revoked && nodes.iter().any(same)
    };
    let shown = (0..).zip(&nodes).filter(|(_, node)| !is_shadow(node));
    let audits = measured.audits.as_ref().map(AuditView::read);
    let energy = measured.energy.read();
    let row = |(index, node): (usize, &NodeStatus)| {
        let mut row = node_json(node, places.get(index + 1), planned(index));
        row["audits"] = json!(audits.as_ref().map(|audits| audits_json(audits.get(index))));
        let machine = machine_json(&node.cluster, energy.get(index).copied().unwrap_or_default());
        if let (Value::Object(row), Value::Object(machine)) = (&mut row, machine) {
            row.extend(machine);
        }
        row
    };
    let rows: Vec<Value> = shown.map(row).collect();
    let name =
        |node: NodeIndex| nodes.get(usize::from(node)).map(|node| node.name.clone()).unwrap_or_default();
    let change = hub.and_then(Hub::last_change).map(|change| change_json(&change, name, status.paces));
    let loading = hub.and_then(Hub::coming_change).map(|change| change_json(&change, name, Paces::default()));
    json!({
        "nodes": rows,
        "router": router,
        "plan": outlook.as_ref().map(plan_json),
        "change": change,
        "loading": loading,
    })
}

/// What a node's machine shows; null where it does not.
fn machine_json(status: &mesh_proto::cluster::NodeStatus, used: NodeEnergy) -> Value {
    let vitals = status.health.map(|health| health.vitals).unwrap_or_default();
    json!({
        "temperature_celsius": vitals.temperature_mc.map(|mc| f64::from(mc) / 1000.0),
        "throttled": vitals.throttled,
        "power_watts": vitals.power_mw.map(|mw| f64::from(mw) / 1000.0),
        "spared": status.spared,
        "energy_joules": used.joules,
        "joules_per_token": used.per_token,
    })
}

fn audits_json(counts: Option<&AuditCounts>) -> Value {
    let AuditCounts { right, wrong, unchecked, skipped } = counts.copied().unwrap_or_default();
    json!({"right": right, "wrong": wrong, "unchecked": unchecked, "skipped": skipped})
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

/// What a change of the placement was, and what it gave; `null` where there was not enough load to measure it.
fn change_json(change: &Change, name: impl Fn(NodeIndex) -> String, paces: Paces) -> Value {
    let tok_s = |ns: u64| 1e9 / ns.max(1) as f64;
    let rate = |rate: Option<Rate>| {
        rate.filter(|_| paces.epoch == change.epoch)
            .map(|rate| json!({"tok_s": rate.tok_s, "rows_per_step": rate.rows_per_step}))
    };
    json!({
        "epoch": change.epoch,
        "reason": change.why.to_string(),
        "nodes": change.nodes.iter().map(|node| name(*node)).collect::<Vec<_>>(),
        "predicted_tok_s_before": change.before_ns.map(tok_s),
        "predicted_tok_s": tok_s(change.after_ns),
        "measured_before": rate(paces.before),
        "measured": rate(paces.now),
        "moved_bytes": change.moved_bytes,
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
        "probes": counters.probes,
        "probes_failed": counters.probes_failed,
        "correction": place.map(|place| place.learned.corrections()),
        "call_overhead_us": place.map(|place| place.learned.call_us()),
        "loading": node.cluster.loading.map(|loading| json!({
            "done_bytes": loading.done_bytes,
            "total_bytes": loading.total_bytes,
            "peer_bytes": loading.peer_bytes,
        })),
        "lent_bytes": counters.lent_bytes,
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
