//! A call, sorted by expert and cut into segments of rows that share weights.

use std::ops::Range;

use super::block::COMBINE_GROUPS;
use super::tiles::Span;
use crate::kernel::Assignment;

/// Rows that meet a row block together: their int8 groups (256 rows of 2048 take 0.6 MB) fit the second cache
/// level, and the weights are then read once per 256 rows, which is 3 % of the time these take.
pub(super) const SEGMENT_ROWS: usize = 256;

/// Cost of reading a group's weights, in rows computed with them: how work is shared out between threads.
const READ_COST_ROWS: usize = 8;

/// Rows of one expert that are computed together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) expert: u16,
    /// Position of its first row in the sorted order.
    pub(super) first: usize,
    /// Its rows among the gathered inputs.
    pub(super) x: Span,
    /// Its rows among the intermediate values.
    pub(super) h: Span,
    /// Cost of the segments before it, and of one of its groups.
    cost_before: usize,
    group_cost: usize,
}

/// A call, sorted: kept in `Space` so that its memory is reused.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// Assignments by expert, then row.
    order: Vec<u32>,
    pub(super) segments: Vec<Segment>,
    /// Row of the batch and routing weight, in that order.
    pub(super) rows: Vec<u32>,
    pub(super) weights: Vec<f32>,
    /// Segment of each position.
    pub(super) segment_of: Vec<u32>,
    /// Addends that each sum of a batch row takes.
    pub(super) addends: Vec<u32>,
    pub(super) cost: usize,
}

impl Segment {
    /// The groups of intermediate values whose cost begins inside `share` of the call's cost.
    pub(super) fn groups_in(&self, share: Range<usize>) -> Range<usize> {
        let index = |cost: usize| {
            let groups = cost.saturating_sub(self.cost_before).div_ceil(self.group_cost);
            groups.min(self.h.groups)
        };
        index(share.start)..index(share.end)
    }
}

impl Plan {
    /// Sorts a checked call on a batch of `batch` rows of `hidden_groups` groups. `inter_groups` says how many
    /// groups of intermediate values an expert has.
    pub(super) fn fill(
        &mut self,
        (batch, hidden_groups): (usize, usize),
        assignments: &[Assignment],
        inter_groups: &dyn Fn(u16) -> usize,
    ) {
        self.clear(batch);
        let order = &mut self.order;
        order.extend(0..assignments.len() as u32);
        order.sort_unstable_by_key(|&i| {
            let a = &assignments[i as usize];
            (a.expert, a.row, a.weight.to_bits())
        });
        let (mut x_cell, mut h_cell) = (0, 0);
        for run in order.chunk_by(|&a, &b| assignments[a as usize].expert == assignments[b as usize].expert) {
            let expert = assignments[run[0] as usize].expert;
            let groups = inter_groups(expert);
            for piece in run.chunks(SEGMENT_ROWS) {
                let x = Span { start: x_cell, rows: piece.len(), groups: hidden_groups };
                let h = Span { start: h_cell, rows: piece.len(), groups };
                (x_cell, h_cell) = (x.end(), h.end());
                let (first, cost_before) = (self.rows.len(), self.cost);
                let group_cost = READ_COST_ROWS + piece.len();
                self.segment_of.extend(piece.iter().map(|_| self.segments.len() as u32));
                self.segments.push(Segment { expert, first, x, h, cost_before, group_cost });
                self.cost += groups * group_cost;
                for &i in piece {
                    let a = &assignments[i as usize];
                    self.rows.push(a.row);
                    self.weights.push(a.weight);
                    self.addends[a.row as usize] += groups.div_ceil(COMBINE_GROUPS) as u32;
                }
            }
        }
    }

    fn clear(&mut self, batch: usize) {
        self.order.clear();
        self.segments.clear();
        self.rows.clear();
        self.weights.clear();
        self.segment_of.clear();
        self.addends.clear();
        self.addends.resize(batch, 0);
        self.cost = 0;
    }

    /// Cells that the gathered inputs and the intermediate values take.
    pub(super) fn cells(&self) -> (usize, usize) {
        self.segments.last().map_or((0, 0), |s| (s.x.end(), s.h.end()))
    }
}
