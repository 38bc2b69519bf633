//! Makes the table of a placement that is decided in outline: whose share is how large, and in how many parts.
//!
//! A token passes through every layer in turn and waits in each for the slowest node, so what has to be right is not
//! the bytes per node but its share of every single layer. So a node's number of units (whole experts, or blocks of
//! 128 intermediate values) is fixed first, in proportion to its weight and never above its memory, and then spread
//! over the layers so that no two layers of a node differ by more than one. What memory is left takes copies, spread
//! as evenly. Integers only, ties to the lower index: the same input gives the same table on every machine.
//!
//! With a previous table, a node keeps of whole experts what its new number per layer allows, so that a node that is
//! added costs about the experts it receives. The price: per layer an expert more or less may change hands than an
//! exact minimum would have it (that is a min-cost flow; loading a few megabytes is cheaper), and slices move whenever
//! shares do. Refuses to cut what does not fit: then experts stay whole, and the rest is the router's.

use std::cmp::Reverse;

use crate::facts::ModelFacts;
use crate::machine::Capacity;
use crate::routes::{NodeIndex, Part, ROUTER, Table};

/// A placement in outline.
#[derive(Clone, Debug)]
pub struct Layout<'a> {
    /// The model.
    pub facts: &'a ModelFacts,
    /// Who can take how much.
    pub nodes: &'a [Capacity],
    /// By node: what its share is in proportion to. Who has 0 gets what fits nowhere else, and copies.
    pub weights: &'a [u64],
    /// Parts of an expert; 1 leaves experts whole.
    pub cuts: u16,
    /// Holders that each part should have, if memory allows.
    pub copies: u8,
    /// So many experts of each layer, the first ones, are in the router's memory.
    pub router_experts: u16,
    /// What is to be changed little.
    pub previous: Option<&'a Table>,
}

/// What is given away: whole experts, or blocks of them.
#[derive(Clone, Copy, Debug)]
struct Unit {
    per_expert: u16,
    bytes: u64,
}

impl Layout<'_> {
    /// The table; `None` where experts were to be cut and do not fit.
    pub fn table(&self) -> Option<Table> {
        let facts = self.facts;
        let unit = if self.cuts > 1 && facts.blocks > 1 {
            Unit { per_expert: facts.blocks, bytes: facts.slice_bytes(0, 1) }
        } else {
            Unit { per_expert: 1, bytes: facts.expert_bytes }
        };
        let layers = facts.moe_layers.len();
        let per_layer = u64::from(facts.experts) * u64::from(unit.per_expert);
        let wanted = layers as u64 * per_layer;
        let room: Vec<u64> = self.nodes.iter().map(|node| node.memory_bytes / unit.bytes.max(1)).collect();
        let quotas = self.quotas(&room, wanted);
        if unit.per_expert > 1 && quotas.iter().sum::<u64>() < wanted {
            return None;
        }
        let shares = self.spread(per_layer, &quotas);
        let mut table = Table::empty(facts);
        let mut copier = Copier::new(self, unit, &room, &quotas);
        for (slot, layer) in facts.moe_layers.iter().enumerate() {
            let counts: Vec<u64> = shares.iter().map(|per_layer| per_layer[slot]).collect();
            let mut experts = if unit.per_expert > 1 {
                self.cut(unit, counts)
            } else {
                let whole = |node: Option<NodeIndex>| {
                    vec![Part { from: 0, to: facts.blocks, holders: node.into_iter().collect() }]
                };
                self.assign(*layer, counts).into_iter().map(whole).collect()
            };
            for expert in &mut experts[..usize::from(self.router_experts.min(facts.experts))] {
                expert.iter_mut().for_each(|part| {
                    part.holders.add(ROUTER);
                });
            }
            copier.fill(*layer, slot, &mut experts);
            table.set_layer(*layer, experts.iter());
        }
        Some(table)
    }

    /// Units per node in all: `wanted` in proportion to the weights, no node above its room. What is left over goes
    /// to those without weight.
    fn quotas(&self, room: &[u64], wanted: u64) -> Vec<u64> {
        let room: Vec<u64> = room.iter().map(|room| (*room).min(wanted)).collect();
        let mut quotas = shared_out(wanted, self.weights, &room);
        let left = wanted - quotas.iter().sum::<u64>();
        let idle = self.nodes.iter().zip(self.weights);
        let speeds: Vec<u64> = idle
            .map(|(node, weight)| if *weight > 0 { 0 } else { u64::from(node.machine.weight_mb_s[0]).max(1) })
            .collect();
        let more = shared_out(left, &speeds, &room);
        quotas.iter_mut().zip(more).for_each(|(quota, more)| *quota += more);
        quotas
    }

    /// `[node][slot of moe_layers]`: each node's quota spread over the layers, floor or ceiling of the mean in each,
    /// so that no layer is promised more units than it has.
    ///
    /// What is left after the floors is handed out node by node to the layers that are still owed most. Owing starts
    /// level and stays level within one, so it ends level: every layer gets exactly its units. Among layers owed the
    /// same, one where the node already held more comes first.
    fn spread(&self, per_layer: u64, quotas: &[u64]) -> Vec<Vec<u64>> {
        let layers = self.facts.moe_layers.len();
        let mut owed = vec![per_layer; layers];
        let mut shares = Vec::with_capacity(self.nodes.len());
        for quota in quotas {
            let floor = quota / layers.max(1) as u64;
            owed.iter_mut().for_each(|units| *units -= floor);
            shares.push(vec![floor; layers]);
        }
        for ((node, quota), share) in self.nodes.iter().zip(quotas).zip(&mut shares) {
            let held = |slot: usize| {
                let owners = self.owners(self.facts.moe_layers[slot]);
                owners.filter(|owner| *owner == Some(node.node)).count()
            };
            let mut slots: Vec<usize> = (0..layers).collect();
            slots.sort_by_cached_key(|slot| (Reverse((owed[*slot], held(*slot))), *slot));
            for slot in slots.into_iter().take((quota % layers.max(1) as u64) as usize) {
                share[slot] += 1;
                owed[slot] -= 1;
            }
        }
        shares
    }

    /// By expert of a layer, who of these nodes held it first in the previous table.
    fn owners(&self, layer: u16) -> impl Iterator<Item = Option<NodeIndex>> {
        let experts = self.previous.map_or(0, |table| table.experts(layer));
        (0..experts).map(move |expert| {
            let part = self.previous?.parts(layer, expert).first()?;
            // Where the first is away, whoever stood in for it.
            let is_here = |node: &NodeIndex| self.nodes.iter().any(|known| known.node == *node);
            part.holders.as_slice().iter().copied().find(is_here)
        })
    }

    /// The owners of whole experts: everyone keeps what it had up to its count, then takes the free experts in
    /// ascending order (neighbours in the packed file, so loading reads long runs). What the router holds comes last:
    /// if anything has to stay with it, then that.
    fn assign(&self, layer: u16, mut counts: Vec<u64>) -> Vec<Option<NodeIndex>> {
        let mut owners = vec![None; usize::from(self.facts.experts)];
        let own = usize::from(self.router_experts.min(self.facts.experts));
        let position = |node: Option<NodeIndex>| self.nodes.iter().position(|known| Some(known.node) == node);
        let before: Vec<_> = self.owners(layer).collect();
        let (kept, rest) = before.split_at(own.min(before.len()));
        let inner = (own..).zip(rest);
        for (expert, had) in inner.chain((0..).zip(kept)) {
            let Some(slot) = position(*had) else { continue };
            if counts[slot] > 0 {
                counts[slot] -= 1;
                owners[expert] = *had;
            }
        }
        let takers = self.nodes.iter().zip(counts).flat_map(|(node, count)| (0..count).map(|_| node.node));
        let (first, last) = owners.split_at_mut(own);
        let free = last.iter_mut().chain(first).filter(|owner| owner.is_none());
        for (owner, node) in free.zip(takers) {
            *owner = Some(node);
        }
        owners
    }

    /// The parts of the experts of a layer: each is cut among the `cuts` nodes that are owed most so far, in
    /// proportion to what they are owed, so that every few experts everyone has its share. The last expert takes
    /// what is left of everyone.
    fn cut(&self, unit: Unit, totals: Vec<u64>) -> Vec<Vec<Part>> {
        let (experts, blocks) = (u64::from(self.facts.experts), u64::from(unit.per_expert));
        let mut given = vec![0_u64; totals.len()];
        let mut layer = Vec::with_capacity(experts as usize);
        for expert in 1..=experts {
            let left = |node: usize, given: &[u64]| totals[node] - given[node];
            let owed = |node: usize| (totals[node] * expert).saturating_sub(given[node] * experts);
            let mut takers: Vec<usize> = (0..totals.len()).filter(|node| left(*node, &given) > 0).collect();
            takers.sort_by_key(|node| (Reverse(owed(*node)), *node));
            if expert < experts {
                takers.truncate(usize::from(self.cuts));
                // What they may still take has to be enough.
                let short = |takers: &[usize]| {
                    takers.iter().map(|node| left(*node, &given).min(blocks)).sum::<u64>() < blocks
                };
                let mut others = (0..totals.len()).filter(|node| left(*node, &given) > 0);
                while short(&takers) {
                    let Some(other) = others.next() else { break };
                    if !takers.contains(&other) {
                        takers.push(other);
                    }
                }
            }
            let weights: Vec<u64> = takers.iter().map(|node| owed(*node).max(1)).collect();
            let room: Vec<u64> = takers.iter().map(|node| left(*node, &given).min(blocks)).collect();
            let mut sizes: Vec<(usize, u64)> =
                takers.into_iter().zip(shared_out(blocks, &weights, &room)).collect();
            sizes.sort_unstable();
            let mut from = 0;
            let mut parts = Vec::with_capacity(sizes.len());
            for (node, size) in sizes.into_iter().filter(|(_, size)| *size > 0) {
                given[node] += size;
                let to = from + size as u16;
                parts.push(Part { from, to, holders: [self.nodes[node].node].into_iter().collect() });
                from = to;
            }
            layer.push(parts);
        }
        layer
    }
}

/// Fills memory that is left with copies.
struct Copier<'a> {
    layout: &'a Layout<'a>,
    unit: Unit,
    /// By node: units that are left in all.
    spare: Vec<u64>,
    /// By node: what its turns are in proportion to.
    turns: Vec<i64>,
    /// By first holder (the router last) and node: how far it is from its turn (smooth weighted round robin). So what
    /// a node holds is copied to all others, who share its work when it is lost.
    credits: Vec<Vec<i64>>,
    /// By `NodeIndex`: its position.
    positions: Vec<Option<usize>>,
}

impl<'a> Copier<'a> {
    fn new(layout: &'a Layout<'a>, unit: Unit, room: &[u64], quotas: &[u64]) -> Copier<'a> {
        let spare: Vec<u64> =
            room.iter().zip(quotas).map(|(room, quota)| room.saturating_sub(*quota)).collect();
        let most = layout.weights.iter().copied().max().unwrap_or(0).max(1);
        // A thousandth of the fastest for those that are too slow for anything else: theirs is the last turn.
        let turn = |weight: &u64| ((u128::from(*weight) * 1000 / u128::from(most)) as i64).max(1);
        let mut positions = Vec::new();
        for (position, node) in layout.nodes.iter().enumerate() {
            let at = usize::from(node.node);
            if positions.len() <= at {
                positions.resize(at + 1, None);
            }
            positions[at] = Some(position);
        }
        let turns: Vec<i64> = layout.weights.iter().map(turn).collect();
        let credits = vec![vec![0; turns.len()]; turns.len() + 1];
        Copier { layout, unit, spare, turns, credits, positions }
    }

    /// Gives the parts of a layer further holders, at most what the layer may take of the memory that is left.
    fn fill(&mut self, layer: u16, slot: usize, experts: &mut [Vec<Part>]) {
        let layers = self.layout.facts.moe_layers.len() as u64;
        let (slot, copies) = (slot as u64, usize::from(self.layout.copies));
        // So that the layers' shares add up to what there is.
        let share = |spare: u64| {
            let upto = |slot: u64| (u128::from(spare) * u128::from(slot) / u128::from(layers.max(1))) as u64;
            upto(slot + 1) - upto(slot)
        };
        let mut left: Vec<u64> = self.spare.iter().map(|spare| share(*spare)).collect();
        self.keep(layer, experts, &mut left);
        let count = experts.len();
        let step = stride(count);
        for copy in 2..=copies {
            for turn in 0..count {
                let expert = &mut experts[turn * step % count.max(1)];
                for index in 0..expert.len() {
                    if expert[index].holders.as_slice().len() >= copy || expert[index].holders.is_empty() {
                        continue;
                    }
                    if let Some(node) = self.next(expert, index, &left) {
                        left[node] -= self.units(&expert[index]);
                        expert[index].holders.add(self.layout.nodes[node].node);
                    }
                }
            }
        }
    }

    /// Copies that were there before stay, where the part is the same and its node has room.
    fn keep(&self, layer: u16, experts: &mut [Vec<Part>], left: &mut [u64]) {
        let Some(previous) = self.layout.previous else { return };
        for (expert, parts) in (0..).zip(experts) {
            for index in 0..parts.len() {
                let (part, before) = (parts[index], previous.parts(layer, expert));
                let same = before.iter().find(|old| (old.from, old.to) == (part.from, part.to));
                for node in same.iter().flat_map(|old| old.holders.as_slice()) {
                    let full = parts[index].holders.as_slice().len() >= usize::from(self.layout.copies);
                    let position = self.positions.get(usize::from(*node)).copied().flatten();
                    let Some(position) = position.filter(|_| !full && !part.holders.is_empty()) else {
                        continue;
                    };
                    let taken = parts.iter().any(|part| part.holders.contains(*node));
                    if !taken && left[position] >= self.units(&part) {
                        left[position] -= self.units(&part);
                        parts[index].holders.add(*node);
                    }
                }
            }
        }
    }

    /// Whose turn it is to hold a copy of a part: nobody that holds any of the expert already, or has no room.
    fn next(&mut self, expert: &[Part], index: usize, left: &[u64]) -> Option<usize> {
        let units = self.units(&expert[index]);
        let held = |node: NodeIndex| expert.iter().any(|part| part.holders.contains(node));
        let able = |node: &usize| left[*node] >= units && !held(self.layout.nodes[*node].node);
        let able: Vec<usize> = (0..left.len()).filter(able).collect();
        let first = expert[index].holders.as_slice().first();
        let first = first.and_then(|node| *self.positions.get(usize::from(*node))?).unwrap_or(left.len());
        let credits = &mut self.credits[first];
        let all: i64 = able.iter().map(|node| self.turns[*node]).sum();
        able.iter().for_each(|node| credits[*node] += self.turns[*node]);
        let chosen = able.into_iter().max_by_key(|node| (credits[*node], Reverse(*node)))?;
        credits[chosen] -= all;
        Some(chosen)
    }

    fn units(&self, part: &Part) -> u64 {
        if self.unit.per_expert > 1 { u64::from(part.to - part.from) } else { 1 }
    }
}

/// A step that visits each of `count` once, neighbours far apart: so that what memory is left for covers all nodes'
/// experts alike.
fn stride(count: usize) -> usize {
    let common = |a: usize, b: usize| {
        let (mut a, mut b) = (a, b);
        while b > 0 {
            (a, b) = (b, a % b);
        }
        a
    };
    (count * 5 / 8..=count).find(|step| *step > 0 && common(*step, count) == 1).unwrap_or(1)
}

/// `wanted` in proportion to the weights, none above its room.
///
/// Those whose fair share exceeds their room are filled, and what they leave is shared again by the others, until
/// nobody overflows (water-filling). Fractions go to the largest remainders.
fn shared_out(wanted: u64, weights: &[u64], room: &[u64]) -> Vec<u64> {
    let mut shares = vec![0; weights.len()];
    let mut open: Vec<usize> =
        (0..weights.len()).filter(|node| room[*node] > 0 && weights[*node] > 0).collect();
    let mut left = wanted;
    loop {
        let total: u128 = open.iter().map(|node| u128::from(weights[*node])).sum();
        if total == 0 {
            return shares;
        }
        let share = |node: usize| u128::from(left) * u128::from(weights[node]);
        // Compared without multiplying by `total`, which might not fit.
        let (full, rest): (Vec<usize>, Vec<usize>) =
            open.iter().partition(|node| share(**node) / total >= u128::from(room[**node]));
        if full.is_empty() {
            let mut given = 0;
            for node in &rest {
                // Below the room, which is a u64.
                shares[*node] = (share(*node) / total) as u64;
                given += shares[*node];
            }
            let mut by_remainder = rest;
            by_remainder.sort_by_key(|node| (Reverse(share(*node) % total), *node));
            for node in by_remainder.into_iter().take((left - given) as usize) {
                shares[node] += 1;
            }
            return shares;
        }
        for node in full {
            shares[node] = room[node].min(left);
            left -= shares[node];
        }
        open = rest;
    }
}

#[cfg(test)]
mod tests;
