//! Splits whole experts over nodes by memory, and by speed where it was measured.
//!
//! A token passes through every layer in turn and waits in each for the slowest node, so what has to be even is
//! not the bytes per node but the share of every single layer. The plan therefore fixes how many experts each
//! node gets in all (in proportion to its weight, never above its memory) and spreads that number over the
//! layers so that no two layers of a node differ by more than one expert. Integers only, ties to the lower
//! index: the same input gives the same plan on every machine.
//!
//! With a previous plan, a node keeps what it holds as far as its new number per layer allows, so a node that is
//! added costs about the experts it receives. The price: per layer an expert more or less may change hands that
//! an exact minimum would have left (finding that is a min-cost flow; a load of a few megabytes is cheaper).
//!
//! What fits nowhere stays on the router. This module refuses to split or replicate an expert.

use mesh_wire::id::Slice;

use crate::facts::ModelFacts;
use crate::routes::{NodeIndex, Part, Table};

/// A node counts as at most this many times slower than the fastest. A start-up measurement that was disturbed
/// (several nodes start at once on a small machine) can be off by a factor of hundreds, and a node without any
/// expert helps nobody; one that really is slower than this should rather not join.
const SLOWEST: u64 = 8;

/// Nodes at least this fraction (2/3) as fast as the fastest count as equally fast: a bandwidth measured in
/// a few milliseconds varies by as much between equal machines, and between two starts of the same one. A split by
/// noise would only move experts about.
const LEVEL: (u64, u64) = (2, 3);

/// What a node can take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Which node.
    pub node: NodeIndex,
    /// Bytes it will spend on weights.
    pub memory_bytes: u64,
    /// Weight bandwidth at one row in MB/s; 0 where not measured. One row, because that is decoding, where the
    /// time goes into streaming weights.
    pub weight_mb_s: u32,
}

impl Capacity {
    /// Whole experts that fit into the memory.
    pub fn experts(&self, facts: &ModelFacts) -> u64 {
        self.memory_bytes / facts.expert_bytes.max(1)
    }
}

/// Who shall hold what.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The nodes it was made for.
    pub capacities: Vec<Capacity>,
    /// Who shall hold what.
    pub table: Table,
}

impl Plan {
    /// Experts of `node`, ascending.
    pub fn experts(&self, node: NodeIndex) -> Vec<Slice> {
        self.table.held_by(node).collect()
    }

    /// By expert of a layer, its first holder.
    fn owners(&self, layer: u16) -> impl Iterator<Item = Option<NodeIndex>> {
        (0..self.table.experts(layer))
            .map(move |expert| self.table.parts(layer, expert).first()?.holders.as_slice().first().copied())
    }

    /// How many experts `node` holds, in all and at most in one layer.
    pub fn load(&self, node: NodeIndex) -> Load {
        let mut per_layer = vec![0; usize::from(self.table.layers())];
        self.table.held_by(node).for_each(|slice| per_layer[usize::from(slice.key.layer)] += 1);
        per_layer.into_iter().fold(Load::default(), |load, n| Load {
            experts: load.experts + n,
            per_layer: load.per_layer.max(n),
        })
    }

    /// Experts that stay on the router.
    pub fn unplaced(&self) -> usize {
        self.table.all().filter(|(_, part)| part.holders.is_empty()).count()
    }

    /// What the plan was told about `node`, if it takes part.
    pub fn capacity(&self, node: NodeIndex) -> Option<&Capacity> {
        self.capacities.iter().find(|capacity| capacity.node == node)
    }
}

/// A node's part of a plan, counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Experts of all layers.
    pub experts: usize,
    /// Experts of the layer that has most.
    pub per_layer: usize,
}

/// Splits the experts over `nodes` (each node once), changing little of `previous`.
///
/// All experts are placed if and only if the nodes have room for them. The split follows the measured bandwidth
/// if every node has one, else the memory. Cost: layers x (experts + nodes^2), well below a millisecond for
/// the largest models.
pub fn plan(facts: &ModelFacts, nodes: &[Capacity], previous: Option<&Plan>) -> Plan {
    let layers = facts.moe_layers.len();
    let wanted = layers as u64 * u64::from(facts.experts);
    let quotas = quotas(facts, nodes, wanted);
    let mut table = Table::empty(facts);
    let shares = spread(facts, nodes, &quotas, previous);
    for (slot, layer) in facts.moe_layers.iter().enumerate() {
        let before: Vec<_> = previous.iter().flat_map(|plan| plan.owners(*layer)).collect();
        let counts: Vec<u64> = shares.iter().map(|per_layer| per_layer[slot]).collect();
        let mut owners = vec![None; usize::from(facts.experts)];
        assign(&mut owners, nodes, counts, &before);
        let whole = |owner: Option<NodeIndex>| {
            [Part { from: 0, to: facts.blocks, holders: owner.into_iter().collect() }]
        };
        table.set_layer(*layer, owners.into_iter().map(whole));
    }
    Plan { capacities: nodes.to_vec(), table }
}

/// Experts per node in all: `wanted` in proportion to the weights, no node above its room.
///
/// Nodes whose fair share exceeds their room are filled, and what they leave is shared again by the others, until
/// nobody overflows (water-filling). Fractions go to the largest remainders.
fn quotas(facts: &ModelFacts, nodes: &[Capacity], wanted: u64) -> Vec<u64> {
    let weights = weights(nodes);
    let weight = |node: usize| weights[node];
    let room: Vec<u64> = nodes.iter().map(|node| node.experts(facts).min(wanted)).collect();
    let mut quotas = vec![0; nodes.len()];
    let mut open: Vec<usize> = (0..nodes.len()).filter(|node| room[*node] > 0).collect();
    let mut left = wanted;
    loop {
        let total: u128 = open.iter().map(|node| weight(*node)).sum();
        if total == 0 {
            return quotas;
        }
        let share = |node: usize| u128::from(left) * weight(node);
        let (full, rest): (Vec<usize>, Vec<usize>) =
            open.iter().partition(|node| share(**node) >= u128::from(room[**node]) * total);
        if full.is_empty() {
            let mut by_remainder = rest;
            let mut given = 0;
            for node in &by_remainder {
                // Below the room, which is a u64.
                quotas[*node] = (share(*node) / total) as u64;
                given += quotas[*node];
            }
            by_remainder.sort_by_key(|node| (std::cmp::Reverse(share(*node) % total), *node));
            for node in by_remainder.into_iter().take((left - given) as usize) {
                quotas[node] += 1;
            }
            return quotas;
        }
        for node in full {
            quotas[node] = room[node];
            left -= room[node];
        }
        open = rest;
    }
}

/// What the split is in proportion to: the bandwidths where every node has one, else the memories.
fn weights(nodes: &[Capacity]) -> Vec<u128> {
    let fastest = nodes.iter().map(|node| u64::from(node.weight_mb_s)).max().unwrap_or(0);
    let level = |speed: u64| {
        if speed * LEVEL.1 >= fastest * LEVEL.0 { fastest } else { speed.max(fastest / SLOWEST) }
    };
    let measured = nodes.iter().all(|node| node.weight_mb_s > 0);
    let weight = |node: &Capacity| if measured { level(node.weight_mb_s.into()) } else { node.memory_bytes };
    nodes.iter().map(|node| u128::from(weight(node))).collect()
}

/// `[node][slot of moe_layers]`: each node's quota spread over the layers, floor or ceiling of the mean in each,
/// so that no layer is promised more experts than it has.
///
/// What is left after the floors is handed out node by node to the layers that are still owed most. Owing starts
/// level and stays level within one, so it ends level: every layer gets exactly its experts. Among layers owed
/// the same, one where the node already held more comes first.
fn spread(facts: &ModelFacts, nodes: &[Capacity], quotas: &[u64], previous: Option<&Plan>) -> Vec<Vec<u64>> {
    let layers = facts.moe_layers.len();
    let mut owed = vec![u64::from(facts.experts); layers];
    let mut shares = Vec::with_capacity(nodes.len());
    for quota in quotas {
        let floor = quota / layers.max(1) as u64;
        owed.iter_mut().for_each(|experts| *experts -= floor);
        shares.push(vec![floor; layers]);
    }
    for ((node, quota), share) in nodes.iter().zip(quotas).zip(&mut shares) {
        let held = |slot: usize| {
            let owners = previous.iter().flat_map(|plan| plan.owners(facts.moe_layers[slot]));
            owners.filter(|owner| *owner == Some(node.node)).count()
        };
        let mut slots: Vec<usize> = (0..layers).collect();
        slots.sort_by_cached_key(|slot| (std::cmp::Reverse((owed[*slot], held(*slot))), *slot));
        for slot in slots.into_iter().take((quota % layers.max(1) as u64) as usize) {
            share[slot] += 1;
            owed[slot] -= 1;
        }
    }
    shares
}

/// Fills one layer: everyone keeps what it had up to its count, then takes the free experts in ascending order
/// (neighbours in the packed file, so loading reads long runs).
fn assign(
    owners: &mut [Option<NodeIndex>],
    nodes: &[Capacity],
    mut counts: Vec<u64>,
    before: &[Option<NodeIndex>],
) {
    for (owner, had) in owners.iter_mut().zip(before) {
        let Some(slot) = nodes.iter().position(|node| Some(node.node) == *had) else { continue };
        if counts[slot] > 0 {
            counts[slot] -= 1;
            *owner = *had;
        }
    }
    let takers = nodes.iter().zip(counts).flat_map(|(node, count)| (0..count).map(|_| node.node));
    let free = owners.iter_mut().filter(|owner| owner.is_none());
    for (owner, node) in free.zip(takers) {
        *owner = Some(node);
    }
}

#[cfg(test)]
mod tests;
