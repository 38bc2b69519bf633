//! Decides who shall hold what: whole experts, slices of them and copies, for the least predicted time per token.
//!
//! The space is too large to search and the prediction is cheap, so outlines are compared (`layout`): the nodes,
//! best first, as a whole or without the slowest ones; experts whole or cut in so many parts; shares in proportion to
//! the rows a node can finish in the time of a layer, or bent towards the fast or the slow; then each node's share a
//! little more or less. Each outline is laid out for a few layers and predicted on the same draws (`cost`). Whole
//! experts on all nodes are preferred: what is to replace them must be better by more than the prediction is wrong.
//! A node that is left out of the best outline makes decoding slower; it only holds copies.
//!
//! What is predicted of a plan is by the figures as they were measured; what is decided is by figures within bounds, so
//! that a node that lies or was disturbed neither gets nor loses everything (`counted`).
//!
//! Start-up measurements are noisy, and a plan by noise would move experts at every restart. So nodes that are about
//! equally fast count as equal, and figures that are about those of the previous plan count as those: then the plan
//! stays what it is. The price: the best of these outlines is not the best plan there could be. What fits nowhere
//! stays on the router.

use std::collections::BTreeSet;

use mesh_wire::id::Slice;

use crate::cost::{DRAWS, Decode, NodeUse, Scene};
use crate::facts::{LinkSpeed, ModelFacts};
use crate::layout::Layout;
pub use crate::machine::Capacity;
use crate::machine::{Machine, UNMEASURED_MB_S, bytes_ns, scaled};
use crate::routes::{HOLDERS_MAX, NodeIndex, Part, ROUTER, Table};

/// Figures at least this fraction (2/3) of those of the previous plan, and not more than their inverse, count as
/// the same: a bandwidth measured in a few milliseconds varies by as much between two starts of the same machine.
const LEVEL: (u64, u64) = (2, 3);

/// Nodes at least this fraction (4/5) as fast as the fastest of their group count as equally fast: it is a tenth of a
/// token's time at most, and equal machines get equal shares.
const EQUAL: (u64, u64) = (4, 5);

/// Round trips that differ by less are the same, in nanoseconds: what a probe's threads wait for their cores.
const ROUND_TRIP_NOISE_NS: u64 = 100_000;

/// The same for models whose experts take less time than a call: theirs are tests and demonstrations, several nodes
/// on one busy machine, and no node is to be without work because a thread was late.
const ROUND_TRIP_NOISE_LIGHT_NS: u64 = 2_000_000;

/// Better by less than this, in hundredths, is not better: predictions are not as exact as that.
const BETTER: u64 = 3;

/// Nodes that have work are left out for no less than this, in hundredths: a machine that was measured in a bad moment
/// would idle until the next plan.
const BETTER_FEWER: u64 = 10;

/// What is decided counts no machine as more than this many times faster than the one in the middle, nor as more than
/// this many times slower than the fastest. Figures are a node's own and of a moment: one that lies must not get
/// everything, and one that was disturbed must not get nothing. Machines without accelerators that serve one model are
/// closer together than this (memory of 10 and of 80 GB/s).
const APART_MAX: u32 = 8;

/// Where figures are further apart than this, one of them cannot be: being slower is then no reason to leave a node
/// out. A disturbed measurement can be off by a factor of hundreds; a machine that is as slow would not be brought.
const PLAUSIBLE_MAX: u64 = 64;

/// What is given for a full set of copies where they are left to the planner, in hundredths of a token's time: a
/// lost node then costs a retry and not the router's help for as long as it is away.
const COPIES_WORTH: u64 = 10;

/// The same where the operator asked for copies.
const COPIES_WISHED: u64 = 300;

/// Layers that are laid out and predicted per outline: they are alike.
const SAMPLE_LAYERS: usize = 6;

/// Layers drawn per outline, in the coarse search and in the fine one.
const COARSE_DRAWS: u32 = 256;
const FINE_DRAWS: u32 = 768;

/// Numbers of parts that are tried, beside one per node and one per block.
const CUTS: [u16; 5] = [2, 3, 4, 6, 8];

/// Most nodes whose shares are tried one by one.
const TUNED_MAX: usize = 8;

/// Rows of the prompt step that decides between outlines that decode alike.
const PREFILL_ROWS: u32 = 256;

/// How many holders a part shall have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copies {
    /// Two, where memory is left.
    Auto,
    /// So many (at most `HOLDERS_MAX`), even at the price of speed, where there is the memory.
    Exactly(u8),
}

impl Copies {
    /// Holders that are aimed at.
    pub fn wanted(self) -> u8 {
        match self {
            Copies::Auto => 2,
            Copies::Exactly(copies) => copies.clamp(1, HOLDERS_MAX as u8),
        }
    }
}

/// What the operator wants of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wishes {
    /// Holders of each part.
    pub copies: Copies,
    /// Whether experts may be cut.
    pub slices: bool,
    /// So many experts of each layer, the first ones, are in the router's memory.
    pub router_experts: u16,
    /// How fast the router is.
    pub router: Machine,
}

/// Whole experts, one of each, none on the router.
impl Default for Wishes {
    fn default() -> Wishes {
        Wishes { copies: Copies::Exactly(1), slices: false, router_experts: 0, router: Machine::default() }
    }
}

/// Who shall hold what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The nodes it was made for, with the figures it was made from.
    pub capacities: Vec<Capacity>,
    /// What it was made to be.
    pub wishes: Wishes,
    /// Parts of an expert that were aimed at; 1 for whole ones.
    pub cuts: u16,
    /// Who shall hold what.
    pub table: Table,
    /// What was predicted of it; `nodes` as in `capacities`.
    pub predicted: Decode,
}

impl Plan {
    /// What `node` shall hold, ascending.
    pub fn experts(&self, node: NodeIndex) -> Vec<Slice> {
        self.table.held_by(node).collect()
    }

    /// Bytes of that.
    pub fn bytes(&self, node: NodeIndex, facts: &ModelFacts) -> u64 {
        self.table.held_by(node).map(|slice| facts.slice_bytes(slice.from, slice.to)).sum()
    }

    /// Bytes that `node` holds by this plan and another one together; what is in both counts once.
    pub fn bytes_with(&self, other: &Plan, node: NodeIndex, facts: &ModelFacts) -> u64 {
        let held: BTreeSet<Slice> = self.table.held_by(node).collect();
        let more = other.table.held_by(node).filter(|slice| !held.contains(slice));
        self.bytes(node, facts) + more.map(|slice| facts.slice_bytes(slice.from, slice.to)).sum::<u64>()
    }

    /// How much `node` holds, in all and at most in one layer.
    pub fn load(&self, node: NodeIndex) -> Load {
        let mut per_layer = vec![0; usize::from(self.table.layers())];
        let mut load = Load::default();
        for (key, part) in self.table.all().filter(|(_, part)| part.holders.contains(node)) {
            per_layer[usize::from(key.layer)] += 1;
            load.experts += 1;
            load.primaries += usize::from(part.holders.as_slice().first() == Some(&node));
        }
        Load { per_layer: per_layer.into_iter().max().unwrap_or(0), ..load }
    }

    /// Parts that stay on the router, read from its files.
    pub fn unplaced(&self) -> usize {
        self.table.all().filter(|(_, part)| part.holders.is_empty()).count()
    }

    /// Fewest holders of a part that has any, and the most.
    pub fn copies(&self) -> (usize, usize) {
        let counts =
            self.table.all().map(|(_, part)| part.holders.as_slice().len()).filter(|count| *count > 0);
        counts.fold((usize::MAX, 0), |(least, most), count| (least.min(count), most.max(count)))
    }

    /// What the plan was told about `node`, if it takes part.
    pub fn capacity(&self, node: NodeIndex) -> Option<&Capacity> {
        self.capacities.iter().find(|capacity| capacity.node == node)
    }

    /// Whether what `node` shall hold still suits it: it fits, and more memory than then would change nothing.
    pub fn suits(&self, node: NodeIndex, memory_bytes: u64, facts: &ModelFacts) -> bool {
        let Some(then) = self.capacity(node) else { return false };
        let room = |bytes: u64| bytes / facts.expert_bytes.max(1);
        self.bytes(node, facts) <= memory_bytes
            && (self.unplaced() == 0 || room(memory_bytes) <= room(then.memory_bytes))
    }

    /// Nodes that it was made for.
    pub fn members(&self) -> Vec<NodeIndex> {
        self.capacities.iter().map(|capacity| capacity.node).collect()
    }

    /// What there is to say of it in short. `present`: nodes that what is predicted counts on.
    pub fn outlook(&self, epoch: u64, facts: &ModelFacts, present: &[NodeIndex]) -> Outlook {
        let experts = facts.moe_layers.len() as u64 * u64::from(facts.top_k) * facts.expert_bytes;
        let left_out: Vec<NodeIndex> = self.left_out(facts, present);
        let share = |(node, used): (&Capacity, &NodeUse)| Share {
            node: node.node,
            share: used.weight_bytes as f64 / experts.max(1) as f64,
            left_out: left_out.contains(&node.node),
        };
        let shares = self.capacities.iter().zip(&self.predicted.nodes).map(share).collect();
        let (unplaced, token_ns) = (self.unplaced(), self.predicted.token_ns);
        Outlook { epoch, token_ns, copies: self.copies(), unplaced, shares }
    }

    /// Those of the nodes that are `present` whose share of the work makes decoding slower, though they have room for some:
    /// they hold copies at most of what others of them hold.
    pub fn left_out(&self, facts: &ModelFacts, present: &[NodeIndex]) -> Vec<NodeIndex> {
        let here = |node: &&NodeIndex| **node == ROUTER || present.contains(node);
        let first = |part: &Part| part.holders.as_slice().iter().find(here).copied();
        let asked: BTreeSet<NodeIndex> = self.table.all().filter_map(|(_, part)| first(part)).collect();
        let able = self.capacities.iter().filter(|node| node.memory_bytes >= facts.slice_bytes(0, 1));
        let able = able.map(|node| node.node).filter(|node| present.contains(node));
        able.filter(|node| !asked.contains(node)).collect()
    }
}

/// A plan in short.
#[derive(Clone, Debug, PartialEq)]
pub struct Outlook {
    /// Its version.
    pub epoch: u64,
    /// Predicted nanoseconds of a token on its own.
    pub token_ns: u64,
    /// Fewest holders of an expert or slice that has any, and most.
    pub copies: (usize, usize),
    /// Experts and slices that nobody holds.
    pub unplaced: usize,
    /// By node that it was made for.
    pub shares: Vec<Share>,
}

/// What a node is to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Share {
    /// Which.
    pub node: NodeIndex,
    /// Share of the experts' bytes of a token that it is expected to read.
    pub share: f64,
    /// Whether it would make decoding slower, and holds copies at most.
    pub left_out: bool,
}

/// A node's part of a plan, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Experts, or slices of them, of all layers.
    pub experts: usize,
    /// Those of which it is the first holder.
    pub primaries: usize,
    /// Experts of the layer that has most.
    pub per_layer: usize,
}

/// Plans for `nodes` (each node once), changing little of `previous`.
///
/// All experts are placed if and only if the nodes have room for them. Cost: some 100 outlines of `SAMPLE_LAYERS`
/// layers and `FINE_DRAWS` drawn ones (tens of milliseconds for 16 nodes), and a table of all layers.
pub fn plan(facts: &ModelFacts, nodes: &[Capacity], wishes: &Wishes, previous: Option<&Plan>) -> Plan {
    let nodes = settled(nodes, previous);
    let wishes = settled_wishes(*wishes, previous);
    if let Some(plan) = previous.filter(|plan| stays(plan, facts, &nodes, &wishes)) {
        return plan.clone();
    }
    let search = Search::new(facts, &nodes, wishes);
    let outline = search.best(previous.map(|plan| plan.cuts));
    let layout = Layout {
        facts,
        nodes: &nodes,
        weights: &outline.weights,
        cuts: outline.cuts,
        copies: wishes.copies.wanted(),
        router_experts: wishes.router_experts,
        previous: previous.map(|plan| &plan.table),
    };
    // Experts that fit a few layers when cut may not fit all of them by a rounding.
    let laid_out = match layout.table() {
        Some(table) => (table, outline.cuts),
        None => (Layout { cuts: 1, ..layout.clone() }.table().unwrap_or_else(|| Table::empty(facts)), 1),
    };
    let settled = nodes.clone();
    predict(facts, settled, wishes, laid_out)
}

/// What a split by bandwidth over all nodes would give: to be compared with, where a plan leaves a node out.
pub fn by_speed(facts: &ModelFacts, nodes: &[Capacity], wishes: &Wishes) -> Plan {
    let weights: Vec<u64> = nodes.iter().map(|node| u64::from(node.machine.weight_mb_s[0].max(1))).collect();
    let layout = Layout {
        facts,
        nodes,
        weights: &weights,
        cuts: 1,
        copies: 1,
        router_experts: wishes.router_experts,
        previous: None,
    };
    let table = layout.table().unwrap_or_else(|| Table::empty(facts));
    predict(facts, nodes.to_vec(), *wishes, (table, 1))
}

/// A plan with its prediction.
fn predict(facts: &ModelFacts, nodes: Vec<Capacity>, wishes: Wishes, (table, cuts): (Table, u16)) -> Plan {
    let machines: Vec<_> = nodes.iter().map(|node| (node.node, node.machine)).collect();
    let scene = Scene { facts, router: wishes.router, fallback_mb_s: 0, nodes: &machines, popularity: None };
    let predicted = scene.decode(&table, DRAWS);
    Plan { capacities: nodes, wishes, cuts, table, predicted }
}

/// Whether the previous plan is still the plan.
fn stays(plan: &Plan, facts: &ModelFacts, nodes: &[Capacity], wishes: &Wishes) -> bool {
    let machines =
        |nodes: &[Capacity]| nodes.iter().map(|node| (node.node, node.machine)).collect::<Vec<_>>();
    plan.wishes == *wishes
        && machines(&plan.capacities) == machines(nodes)
        && nodes.iter().all(|node| plan.suits(node.node, node.memory_bytes, facts))
        && !nodes.iter().any(|node| {
            let before = plan.capacity(node.node).map_or(0, |node| node.memory_bytes);
            // Memory for more copies, where some are missing.
            node.memory_bytes > before && plan.copies().0 < usize::from(wishes.copies.wanted())
        })
}

/// The figures of the nodes, those of the previous plan where they are about the same.
fn settled(nodes: &[Capacity], previous: Option<&Plan>) -> Vec<Capacity> {
    let settle = |node: &Capacity| {
        let before = previous.and_then(|plan| plan.capacity(node.node)).map(|before| before.machine);
        let machine = before.filter(|before| is_about(before, &node.machine)).unwrap_or(node.machine);
        Capacity { machine, ..*node }
    };
    nodes.iter().map(settle).collect()
}

fn settled_wishes(wishes: Wishes, previous: Option<&Plan>) -> Wishes {
    let before = previous.map(|plan| plan.wishes.router);
    let router = before.filter(|before| is_about(before, &wishes.router)).unwrap_or(wishes.router);
    Wishes { router, ..wishes }
}

fn is_about(before: &Machine, now: &Machine) -> bool {
    let level = |a: u64, b: u64| a.min(b) * LEVEL.1 >= a.max(b) * LEVEL.0;
    let speed = |machine: &Machine| u64::from(machine.weight_mb_s[0]);
    let trip = |machine: &Machine| machine.round_trip_ns();
    let rate = |machine: &Machine| u64::from(machine.link_mb_s());
    // Nothing measured now says nothing against what was measured then.
    let unknown = now.weight_mb_s[0] == 0;
    let unlinked = now.link == LinkSpeed::default();
    (unknown || level(speed(before), speed(now)))
        && (unlinked || level(rate(before), rate(now)))
        && (unlinked
            || trip(before).abs_diff(trip(now)) <= ROUND_TRIP_NOISE_NS
            || level(trip(before), trip(now)))
}

/// A plan in outline.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Outline {
    weights: Vec<u64>,
    cuts: u16,
}

impl Outline {
    /// Nodes that get something.
    fn used(&self) -> usize {
        self.weights.iter().filter(|weight| **weight > 0).count()
    }
}

/// How good an outline is.
#[derive(Clone, Copy, Debug)]
struct Score {
    /// Blocks of experts that nobody holds.
    unplaced: u64,
    /// Nanoseconds per token, and what missing copies count.
    token_ns: u64,
    prefill_ns: u64,
}

impl Score {
    /// Whether it is better than `other` by more than `margin` hundredths; of those alike, whether prompts are.
    fn beats(&self, other: &Score, margin: u64) -> bool {
        let less = |a: u64, b: u64, margin: u64| {
            u128::from(a) * 100 < u128::from(b) * u128::from(100_u64.saturating_sub(margin))
        };
        if self.unplaced != other.unplaced {
            return self.unplaced < other.unplaced;
        }
        less(self.token_ns, other.token_ns, margin)
            || (!less(other.token_ns, self.token_ns, 0) && less(self.prefill_ns, other.prefill_ns, margin))
    }
}

struct Search<'a> {
    /// The model with a few of its layers.
    facts: ModelFacts,
    /// The nodes with as much less memory.
    nodes: Vec<Capacity>,
    machines: Vec<(NodeIndex, Machine)>,
    wishes: Wishes,
    /// Nanoseconds of a call without experts and of one expert, by node, those about equal made equal.
    costs: Vec<(u64, u64)>,
    /// By node: whether it is much too slow to be true.
    implausible: Vec<bool>,
    /// Whether a layer's experts take the best node less time than a call.
    light: bool,
    /// Nodes, best first.
    order: Vec<usize>,
    whole: &'a ModelFacts,
}

impl<'a> Search<'a> {
    fn new(whole: &'a ModelFacts, nodes: &[Capacity], wishes: Wishes) -> Search<'a> {
        let layers = whole.moe_layers.len();
        let sample = layers.min(SAMPLE_LAYERS);
        let less = |bytes: u64| (u128::from(bytes) * sample as u128 / layers.max(1) as u128) as u64;
        let facts = ModelFacts { moe_layers: whole.moe_layers[..sample].to_vec(), ..whole.clone() };
        let shrunk = |node: &Capacity| Capacity { memory_bytes: less(node.memory_bytes), ..*node };
        let nodes: Vec<Capacity> = nodes.iter().map(shrunk).collect();
        let (speeds, implausible): (Vec<u32>, Vec<bool>) =
            counted(&nodes, &wishes.router).into_iter().unzip();
        let calls: Vec<_> = nodes.iter().map(|node| node.machine.round_trip_ns()).collect();
        let experts: Vec<_> = speeds.iter().map(|mb_s| bytes_ns(whole.expert_bytes, *mb_s).max(1)).collect();
        let least = |costs: &[u64]| costs.iter().copied().min().unwrap_or(0);
        let light = least(&experts).saturating_mul(whole.top_k.into()) < least(&calls);
        let noise = if light { ROUND_TRIP_NOISE_LIGHT_NS } else { ROUND_TRIP_NOISE_NS };
        // Small experts are measured in moments, one of which is easily disturbed.
        let noise_experts = if light { noise / u64::from(whole.top_k.max(1)) } else { 0 };
        let (calls, experts) = (levelled(&calls, noise), levelled(&experts, noise_experts));
        // What is compared is free of noise, too.
        let level = |((node, speed), (call, expert)): ((&Capacity, &u32), (&u64, &u64))| {
            let mut machine = node.machine.at(*speed);
            machine.link.round_trip_us = u32::try_from(call / 1000).unwrap_or(u32::MAX).max(1);
            let mb_s = whole.expert_bytes.saturating_mul(1000) / expert;
            machine.weight_mb_s[0] = u32::try_from(mb_s).unwrap_or(u32::MAX).max(1);
            (node.node, machine)
        };
        let machines = nodes.iter().zip(&speeds).zip(calls.iter().zip(&experts)).map(level).collect();
        let costs: Vec<_> = calls.into_iter().zip(experts).collect();
        let mut order: Vec<usize> = (0..nodes.len()).collect();
        order.sort_by_key(|node| (costs[*node].0.saturating_add(costs[*node].1), *node));
        Search { facts, nodes, machines, wishes, costs, implausible, light, order, whole }
    }

    fn best(&self, cuts_before: Option<u16>) -> Outline {
        let all = self.nodes.len();
        let most = (self.whole.blocks.min(all as u16)).max(1);
        let mut cuts: Vec<u16> = vec![1];
        if self.wishes.slices {
            let more = CUTS.into_iter().chain([most]).filter(|cuts| (2..=most).contains(cuts));
            cuts.extend(more);
            cuts.sort_unstable();
            cuts.dedup();
        }
        // What was is tried first, and given up only for something better.
        if let Some(before) = cuts_before.and_then(|before| cuts.iter().position(|cuts| *cuts == before)) {
            cuts[..=before].rotate_right(1);
        }
        let mut best = self.scored(self.outline(all, cuts[0]), COARSE_DRAWS);
        for first in prefixes(all) {
            for cuts in cuts.iter().filter(|cuts| usize::from(**cuts) <= first.max(1)) {
                let outline = self.outline(first, *cuts);
                if !self.leaves_idle(first) {
                    self.improve(&mut best, outline, COARSE_DRAWS);
                }
            }
        }
        self.refine(best.0)
    }

    /// Tries what is near an outline: a node less or more, shares bent, single shares moved.
    fn refine(&self, outline: Outline) -> Outline {
        if self.light {
            // Shares do not matter, and fewer calls would always look better.
            return outline;
        }
        let used = outline.used();
        let mut best = self.scored(outline, FINE_DRAWS);
        for first in [used + 1, used.saturating_sub(1)] {
            if (1..=self.nodes.len()).contains(&first) {
                let outline = self.outline(first, best.0.cuts);
                self.improve(&mut best, outline, FINE_DRAWS);
            }
        }
        let used = best.0.used();
        for slack in SLACKS {
            let outline = Outline { weights: self.weights(used, slack), cuts: best.0.cuts };
            self.improve(&mut best, outline, FINE_DRAWS);
        }
        let plain = best.0.clone();
        for bend in [Bend::Root, Bend::Square, Bend::Cube] {
            let weights = plain.weights.iter().map(|weight| bend.apply(*weight)).collect();
            self.improve(&mut best, Outline { weights, ..plain }, FINE_DRAWS);
        }
        if self.nodes.len() <= TUNED_MAX {
            for node in 0..self.nodes.len() {
                for (times, of) in [(5, 4), (4, 5)] {
                    let mut outline = best.0.clone();
                    outline.weights[node] = outline.weights[node].saturating_mul(times) / of;
                    self.improve(&mut best, outline, FINE_DRAWS);
                }
            }
        }
        best.0
    }

    /// The first so many nodes, whole experts with slack: the last of the nodes finishes late by about as much again.
    fn outline(&self, first: usize, cuts: u16) -> Outline {
        Outline { weights: self.weights(first, if cuts > 1 { 1 } else { 2 }), cuts }
    }

    /// Whether the first so many nodes leave out one without need. With large experts that may be right (answers queue
    /// for the router's link); with small ones a token takes next to nothing anywhere, what tells machines apart is noise
    /// of their measurements, and leaving one out only leaves it idle.
    fn leaves_idle(&self, first: usize) -> bool {
        self.light && first < self.order.len()
    }

    /// Whether a node would get next to nothing only because of a figure that cannot be.
    fn leaves_out_unheard(&self, outline: &Outline) -> bool {
        let near =
            self.costs.iter().map(|(call, _)| *call).min().unwrap_or(0).saturating_mul(APART_MAX.into());
        let most = outline.weights.iter().copied().max().unwrap_or(0);
        let nodes = outline.weights.iter().zip(&self.costs).zip(&self.implausible);
        nodes.into_iter().any(|((weight, (call, _)), implausible)| {
            *implausible && *call <= near && weight.saturating_mul(2 * u64::from(APART_MAX)) < most
        })
    }

    fn improve(&self, best: &mut (Outline, Option<Score>), outline: Outline, draws: u32) {
        if outline == best.0 || self.leaves_out_unheard(&outline) {
            return;
        }
        let margin = if outline.used() < best.0.used() { BETTER_FEWER } else { BETTER };
        let scored = self.scored(outline, draws);
        let better = match (&scored.1, &best.1) {
            (Some(score), Some(before)) => score.beats(before, margin),
            (Some(_), None) => true,
            (None, _) => false,
        };
        if better {
            *best = scored;
        }
    }

    /// `None` for what cannot be laid out.
    fn scored(&self, outline: Outline, draws: u32) -> (Outline, Option<Score>) {
        let layout = Layout {
            facts: &self.facts,
            nodes: &self.nodes,
            weights: &outline.weights,
            cuts: outline.cuts,
            copies: self.wishes.copies.wanted(),
            router_experts: self.wishes.router_experts,
            previous: None,
        };
        let Some(table) = layout.table() else { return (outline, None) };
        let scene = Scene {
            facts: &self.facts,
            router: self.wishes.router,
            fallback_mb_s: 0,
            nodes: &self.machines,
            popularity: None,
        };
        let wanted = usize::from(self.wishes.copies.wanted());
        let (mut parts, mut missing) = (0_u64, 0_u64);
        for (_, part) in table.all() {
            let holders = part.holders.as_slice().len();
            parts += 1;
            missing += u64::from(holders < wanted);
        }
        let worth = if self.wishes.copies == Copies::Auto { COPIES_WORTH } else { COPIES_WISHED };
        let token_ns = scene.decode(&table, draws).token_ns;
        let without = scaled(token_ns, missing * worth, parts.max(1) * 100);
        let score = Score {
            unplaced: table.open_blocks(&[]),
            token_ns: token_ns.saturating_add(without),
            prefill_ns: scene.prefill(&table, PREFILL_ROWS).step_ns,
        };
        (outline, Some(score))
    }

    /// What each of the first nodes of the order can finish of a layer in the time in which they finish it together:
    /// the time less its call, over that of an expert. Who is not done with the call by then gets nothing. `slack` is
    /// how many layers that time is for: with more, calls count less and bandwidth more.
    fn weights(&self, first: usize, slack: u64) -> Vec<u64> {
        const SCALE: u128 = 1 << 40;
        let mut open: Vec<usize> = self.order[..first].to_vec();
        let mut weights = vec![0; self.nodes.len()];
        let wanted = u128::from(u64::from(self.whole.top_k.max(1)) * slack) * SCALE;
        loop {
            let rate = |node: usize| SCALE / u128::from(self.costs[node].1);
            let rates: u128 = open.iter().map(|node| rate(*node)).sum();
            let head: u128 = open.iter().map(|node| u128::from(self.costs[*node].0) * rate(*node)).sum();
            let Some(time) = (wanted + head).checked_div(rates) else { return weights };
            let before = open.len();
            open.retain(|node| self.light || u128::from(self.costs[*node].0) < time);
            if open.len() == before {
                let worth = |node: usize| time.saturating_sub(self.costs[node].0.into()) * rate(node);
                let most = open.iter().map(|node| worth(*node)).max().unwrap_or(1).max(1);
                let least = if self.light { WEIGHT_MAX / u128::from(APART_MAX) } else { 0 };
                for node in open {
                    // A millionth of the best is nothing.
                    weights[node] = (worth(node) * WEIGHT_MAX / most).max(least) as u64;
                }
                return weights;
            }
        }
    }
}

/// The speed that each node counts with, in MB/s, and whether its figure cannot be (`APART_MAX`, `PLAUSIBLE_MAX`). One
/// that has none counts as the machine in the middle; the router is one of them, where it was measured.
fn counted(nodes: &[Capacity], router: &Machine) -> Vec<(u32, bool)> {
    let figure = |machine: &Machine| Some(machine.weight_mb_s[0]).filter(|mb_s| *mb_s > 0);
    let measured = || nodes.iter().filter_map(|node| figure(&node.machine));
    let mut known: Vec<u32> = measured().chain(figure(router)).collect();
    known.sort_unstable();
    // Of two the slower one: it is easier to measure too little than to lie well.
    let middle = known.get(known.len().saturating_sub(1) / 2).copied().unwrap_or(UNMEASURED_MB_S);
    let most = middle.saturating_mul(APART_MAX);
    let claimed = measured().max().unwrap_or(middle);
    let fastest = claimed.min(most);
    let count = |node: &Capacity| match figure(&node.machine) {
        None => (middle, false),
        Some(mb_s) => {
            let implausible = u64::from(mb_s) * PLAUSIBLE_MAX < u64::from(claimed);
            (mb_s.clamp((fastest / APART_MAX).max(1), most), implausible)
        }
    };
    nodes.iter().map(count).collect()
}

/// Weights of outlines lie between 0 and this, so that their cubes fit.
const WEIGHT_MAX: u128 = 1 << 20;

/// Slacks that are tried in the fine search.
const SLACKS: [u64; 4] = [1, 2, 4, 16];

/// Shares that favour the slow, or the fast.
#[derive(Clone, Copy, Debug)]
enum Bend {
    Root,
    Square,
    Cube,
}

impl Bend {
    fn apply(self, weight: u64) -> u64 {
        match self {
            Bend::Root => (weight << 20).isqrt(),
            Bend::Square => (weight * weight) >> 20,
            Bend::Cube => (((weight * weight) >> 20) * weight) >> 20,
        }
    }
}

/// Numbers of nodes that are tried in the coarse search: all, then fewer.
fn prefixes(all: usize) -> impl Iterator<Item = usize> {
    let fewer = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128];
    std::iter::once(all).chain(fewer.into_iter().rev().filter(move |first| *first < all))
}

/// Costs, those of a group of about equal ones made equal: the least of each group counts for all of it.
fn levelled(costs: &[u64], noise: u64) -> Vec<u64> {
    let mut order: Vec<usize> = (0..costs.len()).collect();
    order.sort_by_key(|node| (costs[*node], *node));
    let mut level = costs.to_vec();
    let mut group: Option<u64> = None;
    for node in order {
        let within = |least: u64| {
            costs[node] <= least.saturating_add(noise)
                || u128::from(costs[node]) * u128::from(EQUAL.0) <= u128::from(least) * u128::from(EQUAL.1)
        };
        let least = group.filter(|least| within(*least)).unwrap_or(costs[node]);
        (group, level[node]) = (Some(least), least);
    }
    level
}

#[cfg(test)]
mod tests;
