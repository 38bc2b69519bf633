//! Further holders for what lost or leaving nodes hold, and nothing else moved.
//!
//! A plan from nothing would be a little better and move more, and a node that came back would find its place taken. So
//! the table stays, the absent nodes stay in it, and each part that nobody else can answer gets one more holder among
//! those who have memory left: the one that is done with its layer first, so that the work is divided as bandwidth
//! is. Whoever comes back finds what it holds still asked of it. After that come copies of what has lost one. A step is
//! bounded in bytes per node; what is open after it waits for the next. The price: copies that are left over after a
//! return stay until the next plan. Refuses to take anything away from anybody, so where there is no room nothing
//! happens.

use std::cmp::Reverse;

use crate::facts::ModelFacts;
use crate::machine::{Capacity, bytes_ns};
use crate::placement::Plan;
use crate::popularity::Popularity;
use crate::routes::{HOLDERS_MAX, NodeIndex, Part, ROUTER, Table};

/// Who is away, and who may stand in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Nodes that nothing may depend on.
    pub out: Vec<NodeIndex>,
    /// Those of them whose copies are to be made again.
    pub gone: Vec<NodeIndex>,
    /// Who may hold more.
    pub able: Vec<Capacity>,
    /// Bytes that a node may get by this.
    pub step_bytes: u64,
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoodIn {
    /// The table with more holders.
    pub table: Table,
    /// Bytes they have to load.
    pub moved_bytes: u64,
    /// Whether there would be room for more, but for the bound of a step.
    pub more: bool,
    /// Blocks of experts that still only nodes hold which are out, or nobody.
    pub open: u64,
}

/// A place of the table that lacks a holder.
#[derive(Clone, Copy, Debug)]
struct Need {
    slot: usize,
    expert: u16,
    part: usize,
}

struct StandIns<'a> {
    facts: &'a ModelFacts,
    loss: &'a Loss,
    /// By layer with experts and expert: its parts.
    experts: Vec<Vec<Vec<Part>>>,
    /// By able node: bytes it may still take in all, and in this step.
    room: Vec<u64>,
    step: Vec<u64>,
    /// By able node: whether it makes decoding slower, and is asked last.
    slow: Vec<bool>,
    /// By layer with experts and able node: bytes that it is asked for first.
    busy: Vec<Vec<u64>>,
    moved_bytes: u64,
    more: bool,
}

/// Finds stand-ins.
pub fn stand_in(facts: &ModelFacts, plan: &Plan, loss: &Loss, popularity: Option<&Popularity>) -> StoodIn {
    let mut work = StandIns::new(facts, plan, loss);
    let wanted = usize::from(plan.wishes.copies.wanted());
    let (mut urgent, mut copies) = (Vec::new(), Vec::new());
    for (slot, experts) in work.experts.iter().enumerate() {
        for (expert, parts) in (0..).zip(experts) {
            for (part, held) in parts.iter().enumerate() {
                let holders = held.holders.as_slice();
                let alive = holders.iter().filter(|node| !loss.out.contains(node)).count();
                let need = Need { slot, expert, part };
                if alive == 0 && !holders.is_empty() {
                    urgent.push(need);
                } else if alive < wanted && holders.iter().any(|node| loss.gone.contains(node)) {
                    copies.push(need);
                }
            }
        }
    }
    for mut needs in [urgent, copies] {
        // What is wanted most first; else as they lie.
        if let Some(popularity) = popularity {
            needs.sort_by_key(|need| Reverse(popularity.level(need.slot, need.expert)));
        }
        needs.into_iter().for_each(|need| work.fill(need));
    }
    let mut table = plan.table.clone();
    for (layer, experts) in facts.moe_layers.iter().zip(&work.experts) {
        table.set_layer(*layer, experts.iter());
    }
    let open = table.open_blocks(&loss.out);
    StoodIn { table, moved_bytes: work.moved_bytes, more: work.more, open }
}

impl<'a> StandIns<'a> {
    fn new(facts: &'a ModelFacts, plan: &Plan, loss: &'a Loss) -> StandIns<'a> {
        let layer = |layer: &u16| -> Vec<Vec<Part>> {
            (0..facts.experts).map(|expert| plan.table.parts(*layer, expert).to_vec()).collect()
        };
        let experts: Vec<Vec<Vec<Part>>> = facts.moe_layers.iter().map(layer).collect();
        let left_out = plan.left_out(facts, &plan.members());
        let position = |node: NodeIndex| loss.able.iter().position(|able| able.node == node);
        let mut busy = vec![vec![0; loss.able.len()]; experts.len()];
        for (busy, layer) in busy.iter_mut().zip(&experts) {
            for part in layer.iter().flatten() {
                let first = part.holders.as_slice().iter().find(|node| !loss.out.contains(node));
                if let Some(at) = first.and_then(|node| position(*node)) {
                    busy[at] += facts.slice_bytes(part.from, part.to);
                }
            }
        }
        let able = loss.able.iter();
        StandIns {
            facts,
            loss,
            experts,
            room: able
                .clone()
                .map(|able| able.memory_bytes.saturating_sub(plan.bytes(able.node, facts)))
                .collect(),
            step: vec![loss.step_bytes; loss.able.len()],
            slow: able.map(|able| left_out.contains(&able.node)).collect(),
            busy,
            moved_bytes: 0,
            more: false,
        }
    }

    /// Gives a part one more holder, if somebody has room for it.
    fn fill(&mut self, need: Need) {
        let Need { slot, expert, part: at } = need;
        let parts = &self.experts[slot][usize::from(expert)];
        let part = parts[at];
        let bytes = self.facts.slice_bytes(part.from, part.to);
        let holds = |node: NodeIndex| parts.iter().any(|part| part.holders.contains(node));
        let fits = |able: &usize| self.room[*able] >= bytes && !holds(self.loss.able[*able].node);
        let fitting: Vec<usize> = (0..self.loss.able.len()).filter(fits).collect();
        // A node that may get anything at all may get one part, however large.
        let fresh = |able: usize| self.step[able] == self.loss.step_bytes;
        let within = |able: &&usize| self.step[**able] >= bytes || fresh(**able);
        let finish = |able: &usize| {
            let mb_s = self.loss.able[*able].machine.weight_mb_s[0];
            let mb_s = if mb_s == 0 { crate::machine::UNMEASURED_MB_S } else { mb_s };
            (self.slow[*able], bytes_ns(self.busy[slot][*able].saturating_add(bytes), mb_s), *able)
        };
        let Some(chosen) = fitting.iter().filter(within).min_by_key(|able| finish(able)).copied() else {
            self.more |= !fitting.is_empty();
            return;
        };
        let node = self.loss.able[chosen].node;
        if !self.add(need, node) {
            return;
        }
        self.room[chosen] -= bytes;
        self.step[chosen] = self.step[chosen].saturating_sub(bytes);
        self.busy[slot][chosen] = self.busy[slot][chosen].saturating_add(bytes);
        self.moved_bytes = self.moved_bytes.saturating_add(bytes);
    }

    /// Where a part has all the holders it may have, the place of one that is out is taken.
    fn add(&mut self, need: Need, node: NodeIndex) -> bool {
        let part = &mut self.experts[need.slot][usize::from(need.expert)][need.part];
        let mut holders: Vec<NodeIndex> = part.holders.as_slice().to_vec();
        if holders.len() == HOLDERS_MAX {
            let absent = |node: &NodeIndex| *node != ROUTER && self.loss.out.contains(node);
            let Some(last) = holders.iter().rposition(absent) else { return false };
            holders.remove(last);
        }
        holders.push(node);
        part.holders = holders.into_iter().collect();
        true
    }
}

#[cfg(test)]
mod tests;
