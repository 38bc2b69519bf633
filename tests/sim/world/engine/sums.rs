//! The end of a layer: answers are added up, and every sum, and what is said to be lost, is checked.

use super::*;

impl World {
    /// Adds the reply of a call to the sums of its rows. Rows that it has no sums for are computed here.
    pub(super) fn add(&mut self, part: usize, call: Attempt) {
        let flight = &mut self.engine.flights[part];
        let pass = self.engine.pass.as_mut().expect("a step is under way");
        let reply = flight.replies.remove(&call).expect("an answer that is to be added has come");
        let units = flight.attempts.units_of(call).to_vec();
        for unit in &units {
            flight.work[*unit as usize].added += 1;
        }
        for (values, row) in reply.view().rows().zip(&flight.rows[&call]) {
            let StepRow { x, sums, .. } = &mut pass.rows[*row];
            match values {
                Sums::I16(values) => {
                    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += i64::from(*value))
                }
                Sums::I32(values) => {
                    sums.iter_mut().zip(values).for_each(|(sum, value)| *sum += i64::from(*value))
                }
                Sums::Overflow => {
                    for unit in &units {
                        let work = &flight.work[*unit as usize];
                        if work.rows.contains(row) {
                            let own = self.toy.part((flight.layer, work.expert), work.blocks, x);
                            sums.iter_mut().zip(own).for_each(|(sum, own)| *sum += own);
                        }
                    }
                }
            }
        }
    }

    /// Units are lost only where the router may not compute them, and holders were asked often enough or cannot be.
    pub(super) fn check_lost(&mut self, part: usize, units: Units) {
        assert!(!self.profile.fallback, "the router could have computed it");
        let flight = &self.engine.flights[part];
        let mut slow = 0;
        for unit in flight.attempts.list(units) {
            let work = &flight.work[*unit as usize];
            assert_eq!(work.added, 0, "what is lost was added");
            let asked = |attempt: &&Attempt| flight.attempts.units_of(**attempt).contains(unit);
            let asked = flight.rows.keys().filter(asked).count();
            for node in work.holders.as_slice() {
                let serves = self.standing(*node) != Standing::Out;
                assert!(asked >= ASKS_MAX.into() || !serves, "{node} could have been asked once more");
                slow += u64::from(serves);
            }
        }
        self.summary.unanswered += u64::from(slow > 0);
    }

    /// Every part of every expert was added once, and the sums are right.
    pub(super) fn finish_layer(&mut self, layer: u16, part: usize) {
        let range = self.range(part);
        if self.engine.flights[part].open {
            for work in &self.engine.flights[part].work {
                assert_eq!(
                    work.added, 1,
                    "expert {} of layer {layer}, blocks {:?}",
                    work.expert, work.blocks
                );
            }
            let counts = self.engine.flights[part].attempts.counts();
            self.summary.hedges += counts.hedges;
            self.summary.hedges_won += counts.hedges_won;
            self.summary.retries += counts.retries;
            self.summary.ignored += counts.ignored;
            self.engine.close_flight(part);
        }
        let pass = self.engine.pass.as_mut().expect("a step is under way");
        for row in &mut pass.rows[range] {
            assert_eq!(row.sums, row.right, "wrong sums of a row of layer {layer}");
            self.toy.finish(layer, &mut row.x, &row.sums);
        }
    }
}
