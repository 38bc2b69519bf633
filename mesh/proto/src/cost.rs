//! How long a token, or a prompt, would take if experts lay as a table says.
//!
//! A token is the router's own weights, then per layer whatever place is last (roofline models of expert parallelism:
//! a step costs what its slowest shard costs). Which place is last depends on which experts the gate picks, and the
//! mean of a maximum is not the maximum of the means: of eight experts on four equal nodes one has not two but
//! three. So layers are drawn and divided over the holders as the router does it (`draws`), and the mean counts. A
//! node costs its weights over its measured bandwidth, the round trip of its link, the bytes both ways, and the work
//! of a call; answers queue for the router's link. For a prompt, calls overlap with the router's own work and only
//! throughput counts: the busiest resource.
//!
//! Whole nanoseconds, so that every machine finds the same. Experts are drawn by
//! how often they are wanted, where that is known. The price: attention over a long context is left out, and experts
//! are taken to be picked independently. Refuses to know anything of plans.

use mesh_wire::payload::{RowFormat, SumWidth, row_bytes};

use crate::draws::{Draws, Place};
use crate::facts::ModelFacts;
use crate::machine::{Machine, bytes_ns, scaled};
use crate::popularity::Popularity;
use crate::routes::{NodeIndex, Table};

/// Work of a call beside computing and the round trip of a small message: waking the worker, reading and validating
/// the call, starting the threads, writing sums.
const CALL_NS: u64 = 40_000;

/// The router's work per call: building, sealing and sending it, adding up the answer.
const SEND_NS: u64 = 25_000;

/// The router's work per layer beside reading weights: norms, top-k, attention over a short context, threads.
const LAYER_NS: u64 = 60_000;

/// The router's work per token beside layers: sampling, scheduling, the API.
const TOKEN_NS: u64 = 300_000;

/// Bytes of a frame around its rows: header, archive, QUIC and UDP headers.
const FRAME_BYTES: u64 = 200;

/// Bytes of an assignment in a call.
const ASSIGNMENT_BYTES: u64 = 12;

/// Layers drawn for a prediction that is shown or kept: the mean is then known to about one percent.
pub const DRAWS: u32 = 1024;

/// Rows of a step from which the router cuts it into parts whose calls overlap (`router::forward::OVERLAP_ROWS`).
const OVERLAP_ROWS: u32 = 128;

/// Most parts of such a step.
const PARTS_MAX: u32 = 4;

/// Layers drawn for a step of many rows: each has hundreds of assignments, so they hardly differ.
const PREFILL_DRAWS: u32 = 4;

/// What a node does for a token.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeUse {
    /// Nanoseconds of reading weights.
    pub busy_ns: u64,
    /// Bytes of them.
    pub weight_bytes: u64,
    /// Calls, in thousandths.
    pub calls_milli: u64,
    /// Bytes it is sent.
    pub bytes_out: u64,
    /// Bytes it answers.
    pub bytes_in: u64,
    /// Share of the layers in which it is the last, in thousandths.
    pub last_milli: u64,
}

/// The time of a token.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decode {
    /// All of it.
    pub token_ns: u64,
    /// The router's own weights, and its work per call, layer and token.
    pub router_ns: u64,
    /// Of all layers, until the last place is done.
    pub experts_ns: u64,
    /// Nodes, as in `Scene::nodes`.
    pub nodes: Vec<NodeUse>,
}

/// What bounds the speed of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cap {
    /// The router's computing.
    Router,
    /// The computing of the node at this position.
    Node(usize),
    /// The link of the node at this position.
    Link(usize),
    /// The router's own link.
    RouterLink,
}

/// The time of a step of many rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prefill {
    /// All of it.
    pub step_ns: u64,
    /// What it waits for most.
    pub cap: Cap,
}

/// The machines, and the model they run.
#[derive(Clone, Copy, Debug)]
pub struct Scene<'a> {
    /// The model.
    pub facts: &'a ModelFacts,
    /// The router.
    pub router: Machine,
    /// MB/s at which the router reads experts that it does not hold in memory; 0 for as fast as those that it holds,
    /// which is what the page cache gives.
    pub fallback_mb_s: u32,
    /// The nodes.
    pub nodes: &'a [(NodeIndex, Machine)],
    /// How often each expert is wanted; `None` for all alike.
    pub popularity: Option<&'a Popularity>,
}

impl Scene<'_> {
    /// A token on its own. Time: `draws` times the experts of a token times their holders.
    pub fn decode(&self, table: &Table, draws: u32) -> Decode {
        let facts = self.facts;
        let layers = facts.moe_layers.len() as u64;
        let draws = if layers == 0 { 0 } else { u64::from(draws) };
        let places = self.places(1);
        let mut drawn = self.draws();
        let mut all = Decode { nodes: vec![NodeUse::default(); self.nodes.len()], ..Decode::default() };
        let mut calls = 0_u64;
        for draw in 0..draws {
            // The layers in turn, so that all count alike.
            let slot = (draw % layers) as usize;
            let layer = facts.moe_layers[slot];
            drawn.pick(1, facts.top_k, self.shares(slot));
            drawn.divide(
                (table, layer),
                &places,
                &|from, to| facts.slice_bytes(from, to),
                self.fallback_mb_s,
            );
            let (ns, last) = self.layer_ns(&drawn, &places, 1);
            all.experts_ns = all.experts_ns.saturating_add(ns);
            for (index, (node, load)) in all.nodes.iter_mut().zip(&drawn.loads()[1..]).enumerate() {
                if load.parts > 0 {
                    calls += 1;
                    node.calls_milli += 1000;
                    node.busy_ns = node.busy_ns.saturating_add(load.ns);
                    node.weight_bytes = node.weight_bytes.saturating_add(load.bytes);
                    node.bytes_out += self.out_bytes(1) + load.assignments * ASSIGNMENT_BYTES;
                    node.bytes_in += self.in_bytes(1);
                    node.last_milli += if last == Some(index) { 1000 } else { 0 };
                }
            }
        }
        let per_token = |sum: u64| scaled(sum, layers, draws);
        for node in &mut all.nodes {
            node.busy_ns = per_token(node.busy_ns);
            node.weight_bytes = per_token(node.weight_bytes);
            node.calls_milli = per_token(node.calls_milli);
            node.bytes_out = per_token(node.bytes_out);
            node.bytes_in = per_token(node.bytes_in);
            node.last_milli = scaled(node.last_milli, 1, draws);
        }
        all.experts_ns = per_token(all.experts_ns);
        let work = TOKEN_NS + layers * LAYER_NS + per_token(calls * SEND_NS);
        all.router_ns = self.router.weights_ns(facts.router_bytes, 1).saturating_add(work);
        all.token_ns = all.router_ns.saturating_add(all.experts_ns);
        all
    }

    /// A step of `rows` rows of prompts, its calls overlapped as the router does it.
    pub fn prefill(&self, table: &Table, rows: u32) -> Prefill {
        let facts = self.facts;
        let layers = facts.moe_layers.len() as u64;
        let overlapped = !self.nodes.is_empty() && rows >= OVERLAP_ROWS;
        let parts = if overlapped { (rows / OVERLAP_ROWS).clamp(2, PARTS_MAX) } else { 1 };
        let part_rows = (rows / parts).max(1);
        let places = self.places(if overlapped { 0 } else { rows });
        let body = facts.router_bytes.saturating_sub(facts.head_bytes);
        let own_ns = self.router.weights_ns(body / layers.max(1), part_rows).saturating_add(LAYER_NS);
        let mut drawn = self.draws();
        let mut work = vec![0_u64; 2 * self.nodes.len() + 2];
        let mut sum = 0_u64;
        let draws = if layers == 0 { 0 } else { u64::from(PREFILL_DRAWS) };
        for draw in 0..draws {
            let slot = (draw * layers / draws) as usize;
            let layer = facts.moe_layers[slot];
            drawn.pick(part_rows, facts.top_k, self.shares(slot));
            drawn.divide(
                (table, layer),
                &places,
                &|from, to| facts.slice_bytes(from, to),
                self.fallback_mb_s,
            );
            let stages = self.stages(&drawn, own_ns, part_rows);
            let layer_ns = if overlapped {
                stages.iter().copied().max().unwrap_or(0).saturating_mul(u64::from(parts))
            } else {
                own_ns.saturating_add(self.layer_ns(&drawn, &places, rows).0)
            };
            sum = sum.saturating_add(layer_ns);
            work.iter_mut().zip(stages).for_each(|(all, stage)| *all = all.saturating_add(stage));
        }
        let layers_ns =
            if draws == 0 { self.router.weights_ns(body, rows) } else { scaled(sum, layers, draws) };
        let head_ns = self.router.weights_ns(facts.head_bytes, 1);
        // Of equals the first.
        let last = (0..work.len()).rev().max_by_key(|stage| work[*stage]).unwrap_or(0);
        Prefill { step_ns: layers_ns.saturating_add(head_ns).saturating_add(TOKEN_NS), cap: self.cap(last) }
    }

    /// How popular the experts of a layer are; nothing where that is not known.
    fn shares(&self, slot: usize) -> &[u32] {
        self.popularity.map_or(&[], |popularity| popularity.layer(slot))
    }

    fn draws(&self) -> Draws {
        Draws::new(self.facts.experts, self.nodes.iter().map(|(node, _)| *node))
    }

    /// The router and the nodes; calls of `rows` rows that are waited for, none for calls that overlap.
    fn places(&self, rows: u32) -> Vec<Place> {
        let start_ns = |node: &Machine| {
            let bytes = self.out_bytes(rows) + self.in_bytes(rows);
            let call = node.round_trip_ns() + CALL_NS + bytes_ns(bytes, node.link_mb_s());
            if rows == 0 { 0 } else { call }
        };
        let nodes = self.nodes.iter().map(|(_, node)| Place { machine: *node, start_ns: start_ns(node) });
        std::iter::once(Place { machine: self.router, start_ns: 0 }).chain(nodes).collect()
    }

    /// Nanoseconds until the last place of a divided layer is done, and the node if it is one. Answers come in one
    /// after the other over the router's link.
    fn layer_ns(&self, drawn: &Draws, places: &[Place], rows: u32) -> (u64, Option<usize>) {
        let in_ns = bytes_ns(self.in_bytes(rows), self.link_mb_s());
        let mut ready: Vec<(u64, usize)> = (1..places.len())
            .filter(|place| drawn.loads()[*place].parts > 0)
            .map(|place| (drawn.finish(places, place as u16), place - 1))
            .collect();
        ready.sort_unstable();
        let mut link_free = 0;
        let mut end = (drawn.finish(places, 0), None);
        for (ns, node) in ready {
            // Its own crossing of the link is part of its time.
            link_free = ns.max(link_free + in_ns);
            if link_free > end.0 {
                end = (link_free, Some(node));
            }
        }
        end
    }

    /// Nanoseconds of a part of a step at each resource: the router, the nodes, their links, the router's link.
    fn stages(&self, drawn: &Draws, own_ns: u64, rows: u32) -> Vec<u64> {
        let loads = drawn.loads();
        let picks = u64::from(rows) * u64::from(self.facts.top_k);
        let mut calls = 0;
        let (mut out, mut back) = (0_u64, 0_u64);
        let mut links = Vec::with_capacity(self.nodes.len());
        for ((_, node), load) in self.nodes.iter().zip(&loads[1..]) {
            let rows = rows_hit(load.assignments, picks, (rows, self.facts.top_k));
            let one_way = (self.out_bytes(rows) + load.assignments * ASSIGNMENT_BYTES, self.in_bytes(rows));
            let one_way = if load.parts == 0 { (0, 0) } else { one_way };
            calls += u64::from(load.parts > 0);
            (out, back) = (out + one_way.0, back + one_way.1);
            links.push(bytes_ns(one_way.0.max(one_way.1), node.link_mb_s()));
        }
        let router = own_ns.saturating_add(loads[0].ns).saturating_add(calls * SEND_NS);
        let nodes = loads[1..].iter().map(|load| load.ns + if load.parts > 0 { CALL_NS } else { 0 });
        let joint = if self.nodes.is_empty() { 0 } else { bytes_ns(out.max(back), self.link_mb_s()) };
        std::iter::once(router).chain(nodes).chain(links).chain([joint]).collect()
    }

    /// The resource at a position of `stages`.
    fn cap(&self, stage: usize) -> Cap {
        let nodes = self.nodes.len();
        match stage {
            0 => Cap::Router,
            stage if stage <= nodes => Cap::Node(stage - 1),
            stage if stage <= 2 * nodes => Cap::Link(stage - 1 - nodes),
            _ => Cap::RouterLink,
        }
    }

    /// The router's link is as good as the best of the nodes', or that one would be slower.
    fn link_mb_s(&self) -> u32 {
        self.nodes.iter().map(|(_, node)| node.link_mb_s()).max().unwrap_or(u32::MAX)
    }

    /// Bytes of a call of so many rows, without its assignments.
    fn out_bytes(&self, rows: u32) -> u64 {
        let format = if self.facts.int8_rows { RowFormat::Int8 } else { RowFormat::F32 };
        FRAME_BYTES + u64::from(rows) * row_bytes(format, self.facts.hidden as usize) as u64
    }

    /// Bytes of its answer, whose sums nearly always fit in 16 bits.
    fn in_bytes(&self, rows: u32) -> u64 {
        FRAME_BYTES + u64::from(rows) * SumWidth::I16.row_bytes(self.facts.hidden as usize) as u64
    }
}

/// How many of `rows` rows meet a place that gets `assignments` of `picks`: each of a row's picks misses it with the
/// same probability.
fn rows_hit(assignments: u64, picks: u64, (rows, top_k): (u32, u16)) -> u32 {
    const ONE: u64 = 1 << 32;
    let missed = ONE - scaled(assignments, ONE, picks).min(ONE);
    let none = (0..top_k).fold(ONE, |all, _| scaled(all, missed, ONE));
    scaled(u64::from(rows), ONE - none, ONE) as u32
}

#[cfg(test)]
mod tests;
