//! How often experts are wanted, of all requests together: what plans are made by.
//!
//! One number per expert, added to while a batch of thousands of tokens is collected, then handed over and begun anew:
//! nothing here or later knows which request a row was of. The price: an addition per assignment.

use mesh_proto::popularity::{BATCH_TOKENS_MIN, Counts};
use mesh_proto::routes::Table;
use model::kernel::Assignment;

/// The batch that is being collected.
#[derive(Debug, Default)]
pub(super) struct Usage {
    counts: Counts,
    /// By layer: its position among those with experts.
    slots: Vec<Option<usize>>,
    /// By position: rows that passed.
    passed: Vec<u64>,
}

impl Usage {
    /// Counts a layer's rows.
    pub(super) fn count(
        &mut self,
        (layer, table): (u16, &Table),
        (rows, assignments): (usize, &[Assignment]),
    ) {
        if self.slots.len() != usize::from(table.layers()) {
            self.begin(table);
        }
        let Some(slot) = self.slots.get(usize::from(layer)).copied().flatten() else { return };
        self.passed[slot] += rows as u64;
        let counts = &mut self.counts.rows[slot];
        for assignment in assignments {
            if let Some(rows) = counts.get_mut(usize::from(assignment.expert)) {
                *rows = rows.saturating_add(1);
            }
        }
    }

    /// The batch, once it is large enough.
    pub(super) fn take(&mut self) -> Option<Counts> {
        let tokens = self.passed.iter().copied().min().filter(|tokens| *tokens >= BATCH_TOKENS_MIN)?;
        let counts = Counts { tokens, ..self.counts.clone() };
        self.passed.fill(0);
        self.counts.rows.iter_mut().for_each(|rows| rows.fill(0));
        Some(counts)
    }

    fn begin(&mut self, table: &Table) {
        let mut count = 0;
        let slot = |layer: u16| {
            let slot = (table.experts(layer) > 0).then_some(count);
            count += usize::from(slot.is_some());
            slot
        };
        self.slots = (0..table.layers()).map(slot).collect();
        let experts = (0..table.layers()).map(|layer| usize::from(table.experts(layer)));
        let rows: Vec<Vec<u32>> =
            experts.filter(|experts| *experts > 0).map(|experts| vec![0; experts]).collect();
        self.passed = vec![0; rows.len()];
        self.counts = Counts { tokens: 0, rows };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_proto::facts::ModelFacts;

    #[test]
    fn a_batch_is_handed_over_whole_and_begun_anew() {
        let facts = ModelFacts { moe_layers: vec![1, 3], experts: 4, blocks: 1, ..ModelFacts::default() };
        let table = Table::empty(&facts);
        let work: Vec<_> =
            (0..2048).map(|row| Assignment { row, expert: (row % 2) as u16, weight: 1.0 }).collect();
        let mut usage = Usage::default();
        for (layer, ready) in [(1, false), (3, false), (0, false), (1, false), (3, true)] {
            usage.count((layer, &table), (2048, &work));
            let taken = usage.take();
            assert_eq!(taken.is_some(), ready);
            let Some(counts) = taken else { continue };
            assert_eq!((counts.tokens, counts.rows), (4096, vec![vec![2048, 2048, 0, 0]; 2]));
        }
        assert_eq!(usage.counts.rows, vec![vec![0; 4]; 2]);
        // Nothing is left of what was handed over.
        usage.count((1, &table), (2048, &work));
        assert_eq!(usage.take(), None);
    }
}
