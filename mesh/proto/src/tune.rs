//! Suits a placement to what is wanted of it: few experts change places, nobody holds more than before.
//!
//! How many experts of a layer each node holds is decided for experts that are all alike (`layout`). If some are
//! wanted more often, the node that has most of those is the last in most layers. So per layer, while it helps, the
//! node that takes longest on average gives a popular expert to another one and takes a rarer one for it; and a copy of
//! an expert that is hardly wanted gives way to a copy of one that is, whose only holder is busy. Exchanges of one for one
//! keep memory as it is, and bound what is moved. The price: it finds a good exchange, not the best set of them; and
//! experts that are cut stay as they are, because all nodes share each of them anyway. Refuses to decide whether it
//! is worth it: the prediction does.

use crate::facts::ModelFacts;
use crate::machine::{Machine, scaled};
use crate::placement::Plan;
use crate::popularity::{EVEN, Popularity};
use crate::routes::{Holders, NodeIndex, Part, ROUTER, Table};

/// Least gain, in hundredths of a token's time, for which a placement is changed because of frequencies alone: more
/// than predictions are wrong by, and more than frequencies wander within minutes.
pub const GAIN_MIN: u64 = 5;

/// Most experts that change places at a time, in hundredths of all: of 60 GB on four nodes that is 1.5 GB for each.
pub const MOVE_MAX: u64 = 10;

/// An exchange has to take off this much of the longest time, in hundredths, or noise would be exchanged.
const WORTH: u64 = 2;

/// One expert is so many times as popular as another before it takes the place of its copy.
const COPY_WORTH: u64 = 2;

/// The table with at most `move_max` hundredths of the experts elsewhere.
pub fn tuned(facts: &ModelFacts, plan: &Plan, popularity: &Popularity, move_max: u64) -> Table {
    let mut table = plan.table.clone();
    let per_layer = u64::from(facts.experts) * move_max / 100;
    if plan.cuts > 1 || popularity.batches() == 0 {
        return table;
    }
    for (slot, layer) in facts.moe_layers.iter().enumerate() {
        let parts = |expert: u16| table.parts(*layer, expert).to_vec();
        let experts: Vec<Vec<Part>> = (0..facts.experts).map(parts).collect();
        if experts.iter().any(|parts| parts.len() != 1) {
            continue;
        }
        let mut work = LayerWork::new(facts, plan, &experts, popularity.layer(slot));
        // A small layer may make one exchange.
        let mut moves = per_layer.max(2);
        while moves >= 2 && work.exchange() {
            moves -= 2;
        }
        while moves >= 1 && work.copy() {
            moves -= 1;
        }
        table.set_layer(*layer, work.parts(&experts).iter());
    }
    table
}

/// One layer.
struct LayerWork<'a> {
    shares: &'a [u32],
    holders: Vec<Holders>,
    nodes: Vec<(NodeIndex, Machine)>,
    /// By node: nanoseconds of a call, and of one expert that every token wants, in thousandths of an even share.
    call_ns: Vec<u64>,
    expert_ns: Vec<u64>,
    /// By node: thousandths of even shares that it is asked for.
    mass: Vec<u64>,
    /// Experts that a token wants of so many.
    top_k: (u64, u64),
}

impl<'a> LayerWork<'a> {
    fn new(facts: &ModelFacts, plan: &Plan, experts: &[Vec<Part>], shares: &'a [u32]) -> LayerWork<'a> {
        let nodes: Vec<_> = plan.capacities.iter().map(|node| (node.node, node.machine)).collect();
        let holders =
            experts.iter().map(|parts| parts.first().map_or(Holders::default(), |part| part.holders));
        let mut work = LayerWork {
            shares,
            holders: holders.collect(),
            call_ns: nodes.iter().map(|(_, machine)| machine.round_trip_ns()).collect(),
            expert_ns: nodes.iter().map(|(_, machine)| machine.weights_ns(facts.expert_bytes, 1)).collect(),
            mass: vec![0; nodes.len()],
            nodes,
            top_k: (facts.top_k.into(), facts.experts.into()),
        };
        work.weigh();
        work
    }

    /// An expert's rows are divided evenly over its holders.
    fn weigh(&mut self) {
        self.mass.fill(0);
        for (holders, share) in self.holders.iter().zip(self.shares) {
            let count = holders.as_slice().len().max(1) as u64;
            for (at, (node, _)) in self.nodes.iter().enumerate() {
                if holders.contains(*node) {
                    self.mass[at] += u64::from(*share) / count;
                }
            }
        }
    }

    /// Nanoseconds of a layer at a node that is asked for so much.
    fn time(&self, node: usize, mass: u64) -> u64 {
        if mass == 0 {
            return 0;
        }
        let wanted = scaled(self.expert_ns[node], mass * self.top_k.0, self.top_k.1 * u64::from(EVEN));
        self.call_ns[node].saturating_add(wanted)
    }

    fn busiest(&self) -> Option<(usize, u64)> {
        let times = (0..self.nodes.len()).map(|node| (node, self.time(node, self.mass[node])));
        times.max_by_key(|(node, time)| (*time, std::cmp::Reverse(*node)))
    }

    /// What an expert counts at each of its holders.
    fn weight(&self, expert: usize) -> u64 {
        u64::from(self.shares[expert]) / self.holders[expert].as_slice().len().max(1) as u64
    }

    /// Exchanges two experts between the busiest node and another; false where none helps.
    fn exchange(&mut self) -> bool {
        let Some((busy, longest)) = self.busiest() else { return false };
        let mut best: Option<(u64, usize, usize, usize)> = None;
        for other in (0..self.nodes.len()).filter(|other| *other != busy) {
            let only = |expert: &usize, at: usize, not: usize| {
                let holders = &self.holders[*expert];
                holders.contains(self.nodes[at].0) && !holders.contains(self.nodes[not].0)
            };
            let count = self.holders.len();
            for give in (0..count).filter(|expert| only(expert, busy, other)) {
                for take in (0..count).filter(|expert| only(expert, other, busy)) {
                    let (out, back) = (self.weight(give), self.weight(take));
                    if out <= back {
                        continue;
                    }
                    let here = self.time(busy, self.mass[busy] + back - out);
                    let there = self.time(other, self.mass[other] + out - back);
                    let after = here.max(there);
                    if best.is_none_or(|best| after < best.0) {
                        best = Some((after, other, give, take));
                    }
                }
            }
        }
        let Some((_, other, give, take)) = best.filter(|best| self.is_worth(longest, best.0)) else {
            return false;
        };
        let (busy, other) = (self.nodes[busy].0, self.nodes[other].0);
        self.holders[give] = replaced(&self.holders[give], busy, other);
        self.holders[take] = replaced(&self.holders[take], other, busy);
        self.weigh();
        true
    }

    /// Puts a copy of an expert of the busiest node in the place of a copy that is wanted less; false where none helps.
    fn copy(&mut self) -> bool {
        let Some((busy, longest)) = self.busiest() else { return false };
        let node = self.nodes[busy].0;
        let alone = |expert: &usize| self.holders[*expert].as_slice() == [node];
        let Some(hot) = (0..self.holders.len()).filter(alone).max_by_key(|expert| self.shares[*expert])
        else {
            return false;
        };
        let share = u64::from(self.shares[hot]);
        let mut best: Option<(u64, usize, usize)> = None;
        for other in (0..self.nodes.len()).filter(|other| *other != busy) {
            for cold in 0..self.holders.len() {
                let holders = self.holders[cold].as_slice();
                let spare = holders.len() > 1 && holders[1..].contains(&self.nodes[other].0);
                if !spare || holders.contains(&ROUTER) || u64::from(self.shares[cold]) * COPY_WORTH >= share {
                    continue;
                }
                // The busiest may hold the other copy of what gives way, and is asked for it more often then.
                let count = holders.len() as u64;
                let cold_share = u64::from(self.shares[cold]);
                let more =
                    if holders.contains(&node) { cold_share / (count - 1) - cold_share / count } else { 0 };
                let here = self.time(busy, (self.mass[busy] + more).saturating_sub(share / 2));
                let mass = self.mass[other] + share / 2;
                let there = self.time(other, mass.saturating_sub(cold_share / count));
                let after = here.max(there);
                if best.is_none_or(|best| after < best.0) {
                    best = Some((after, other, cold));
                }
            }
        }
        let Some((_, other, cold)) = best.filter(|best| self.is_worth(longest, best.0)) else { return false };
        let other = self.nodes[other].0;
        self.holders[cold] =
            self.holders[cold].as_slice().iter().copied().filter(|node| *node != other).collect();
        self.holders[hot].add(other);
        self.weigh();
        true
    }

    fn is_worth(&self, before: u64, after: u64) -> bool {
        u128::from(after) * 100 < u128::from(before) * u128::from(100 - WORTH)
    }

    fn parts(&self, experts: &[Vec<Part>]) -> Vec<Vec<Part>> {
        let part = |(parts, holders): (&Vec<Part>, &Holders)| {
            parts.iter().map(|part| Part { holders: *holders, ..*part }).collect()
        };
        experts.iter().zip(&self.holders).map(part).collect()
    }
}

/// The same holders with one in the place of another.
fn replaced(holders: &Holders, from: NodeIndex, to: NodeIndex) -> Holders {
    holders.as_slice().iter().map(|node| if *node == from { to } else { *node }).collect()
}

#[cfg(test)]
mod tests;
