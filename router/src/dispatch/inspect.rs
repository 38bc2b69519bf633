//! What is kept of answers for audits: a draw per call, and a copy of what was drawn.
//!
//! Runs on the compute thread, so it does nothing else: without audits one test of an option per call, with them a draw,
//! and for one call in a hundred some kilobytes are copied.

use std::ops::Range;
use std::sync::Arc;

use mesh_proto::attempts::Call;
use mesh_wire::reply::Reply;
use model::decoder::workspace::Workspace;

use super::flight::{Flight, Outstanding};
use crate::audit::Audit;
use crate::audit::sample::{Answer, Piece, Sample};

/// The compute thread's part of audits.
#[derive(Debug, Default)]
pub(super) struct Inspection {
    pub(super) audit: Option<Audit>,
    /// Requests that are served now: the oldest, and the next.
    pub(super) requests: Range<u64>,
    /// By node: the oldest request that was served when it first took part.
    since: Vec<Option<u64>>,
    /// By node: whether its kernels promise the bits of the definition.
    exact: Arc<[bool]>,
}

impl Inspection {
    /// A step begins.
    pub(super) fn begin_step(&self) {
        self.audit.iter().for_each(Audit::begin_step);
    }

    /// Takes in who serves, and who promises to compute exactly.
    pub(super) fn meet(&mut self, serving: &[bool], exact: Arc<[bool]>) {
        self.exact = exact;
        self.since.resize(serving.len().max(self.since.len()), None);
        for (since, _) in self.since.iter_mut().zip(serving).filter(|(_, serving)| **serving) {
            since.get_or_insert(self.requests.start);
        }
    }

    /// An answer was added to the sums: draws whether it is audited, and then keeps it. How many numbers of calls,
    /// following `calls`, the audit may use.
    pub(super) fn look(
        &mut self,
        flight: &Flight,
        call: Call,
        (reply, layer, work): (&Reply, usize, &Workspace),
        (step, calls): (u64, u64),
    ) -> u64 {
        let (Some(audit), Some(out)) = (&mut self.audit, flight.out.get(call as usize)) else { return 0 };
        let node = usize::from(out.batch.node);
        if !self.exact.get(node).copied().unwrap_or(false) {
            return 0;
        }
        let Some(places) = audit.draw(out.batch.rows.len()) else { return 0 };
        let numbers = self.exact.len() as u64;
        let since = self.since.get(node).copied().flatten().unwrap_or(0);
        let kept = places.iter().map(|place| work.input.row(out.batch.rows[*place] as usize));
        let x = work.input.view();
        let shape = (x.format(), x.inputs(), places.len());
        let mut sample = Sample::new(shape, kept, Arc::clone(&flight.routes));
        (sample.node, sample.step, sample.layer) = (out.batch.node, step, layer as u16);
        sample.pieces = pieces(flight, out, &places);
        sample.answer = Answer::of(&reply.view(), &places);
        sample.exact = Arc::clone(&self.exact);
        sample.numbers = calls + 1..calls + 1 + numbers;
        sample.requests = self.requests.end.saturating_sub(since);
        audit.keep(sample);
        numbers
    }
}

/// What a call asked for of these of its rows.
fn pieces(flight: &Flight, out: &Outstanding, places: &[usize]) -> Vec<Piece> {
    let units = out.batch.units.iter().map(|unit| flight.pieces[*unit as usize]);
    let blocks: Vec<(u16, (u16, u16))> = units.map(|piece| (piece.expert, piece.blocks)).collect();
    let kept = out.batch.assignments.iter().filter_map(|assignment| {
        // Rows of a call ascend, and so do places.
        let at = places.binary_search_by_key(&assignment.row, |place| out.batch.rows[*place]).ok()?;
        let (_, blocks) = blocks.iter().find(|(expert, _)| *expert == assignment.expert)?;
        let assignment = model::kernel::Assignment { row: at as u32, ..*assignment };
        Some(Piece { assignment, blocks: *blocks })
    });
    kept.collect()
}
