//! The way back: waiting for answers, doing something about those that do not come, adding up.

use std::time::{Duration, Instant};

use mesh_net::pending::{CallError, PendingCall, wait_any};
use mesh_proto::attempts::{Call, Step, Units, Why};
use mesh_proto::routes::NodeIndex;
use mesh_wire::reply::{Reply, Row};
use model::decoder::workspace::Workspace;
use model::home::Home;
use model::kernel::Assignment;

use super::flight::{Outstanding, Piece, unreadable};
use super::{Dispatch, Flight, LINGERING_MAX, LayerError, Lingering, Unreachable, hidden, micros};
use crate::cost::{StepCost, lap};
use crate::metrics::NodeCall;
use crate::share::node_place;

/// The layer that is being added up.
struct Layer<'a> {
    index: usize,
    work: &'a Workspace,
    home: &'a mut Home,
    sums: &'a mut [i64],
}

impl Layer<'_> {
    /// Adds these blocks of experts, computed here.
    fn add(&mut self, blocks: (u16, u16), assignments: &[Assignment]) -> Result<(), LayerError> {
        let x = self.work.input.view();
        self.home
            .add_slice(self.index, blocks, (x, assignments), self.sums)
            .map_err(|error| unreadable(self.index, assignments, error))
    }
}

impl Dispatch {
    /// Waits for the replies of `send`, does what is to be done about those that do not come, and adds everything to
    /// `sums` (`[rows, hidden]`).
    ///
    /// # Errors
    /// Experts that nobody can compute any more; the flight is to be cleared then.
    pub fn collect(
        &mut self,
        layer: usize,
        (work, flight): (&Workspace, &mut Flight),
        (home, sums): (&mut Home, &mut [i64]),
        cost: &mut StepCost,
    ) -> Result<(), LayerError> {
        let mut clock = Instant::now();
        let mut layer = Layer { index: layer, work, home, sums };
        loop {
            let now = self.peers.now();
            let (peers, hub) = (&self.peers, self.hub.as_deref());
            let standing = |node| peers.standing(hub, node, now);
            match flight.attempts.next(now, &standing, &mut self.hedges) {
                Step::Wait(until) => self.wait(flight, until, (&mut clock, cost)),
                Step::Add(call) => {
                    self.add(flight, call, &mut layer)?;
                    lap(&mut clock, &mut cost.combine);
                }
                Step::Done => break,
                Step::Overdue(_, node) => {
                    self.peers.doubts.overdue(node, now);
                    // Whom to ask depends on who serves.
                    self.refresh();
                }
                Step::Send { call, node, units, hedge } => {
                    self.send_again(flight, (call, node, units), &layer, cost);
                    let late = flight.attempts.rival_of(call).filter(|_| hedge);
                    if let Some(late) = late.and_then(|late| flight.out.get_mut(late as usize)) {
                        self.note_hedged(late);
                    }
                }
                Step::Drop(call, why) => self.let_go(flight, call, why),
                Step::Compute { units, .. } => {
                    cost.fallbacks += 1;
                    self.compute_again(flight, units, &mut layer)?;
                    lap(&mut clock, &mut cost.combine);
                }
                Step::Lost(units) => {
                    let units = flight.attempts.list(units).iter().copied();
                    flight.rows_of(units, &mut self.some);
                    let lost = Unreachable::lost(layer.index, &flight.routes, &self.some);
                    return Err(LayerError::Unreachable(lost));
                }
            }
        }
        let counts = flight.attempts.counts();
        cost.hedges += counts.hedges;
        cost.hedges_won += counts.hedges_won;
        cost.retries += counts.retries;
        if let Some(metrics) = self.metrics.as_ref().filter(|_| counts.hedges + counts.retries > 0) {
            metrics.calls_repeated(&counts);
        }
        Ok(())
    }

    /// Waits for any call, and takes in what came.
    fn wait(&mut self, flight: &mut Flight, until: Duration, (clock, cost): (&mut Instant, &mut StepCost)) {
        let waits = !flight.out.iter().filter_map(|call| call.pending.as_ref()).any(PendingCall::is_done);
        let until = self.peers.started.checked_add(until).unwrap_or(*clock);
        wait_any(flight.out.iter().filter_map(|call| call.pending.as_ref()), until);
        let before = *clock;
        lap(clock, &mut cost.wait);
        let waited = waits.then(|| *clock - before);
        for index in 0..flight.out.len() {
            let call = &mut flight.out[index];
            let Some(pending) = call.pending.take_if(|pending| pending.is_done()) else { continue };
            match pending.finish() {
                Ok(reply) => {
                    cost.bytes_in += reply.frame_bytes() as u64;
                    self.peers.doubts.answered(call.batch.node);
                    self.learn(&flight.out[index], flight.overlapped, &reply, waited);
                    self.count(&flight.out[index], Ok(reply.frame_bytes() as u64));
                    if flight.attempts.answered(index as Call) {
                        flight.out[index].reply = Some(reply);
                    }
                }
                Err(error) => {
                    self.count(&flight.out[index], Err(&error));
                    tracing::info!(%error, node = flight.out[index].batch.node, "a call failed");
                    flight.attempts.failed(index as Call);
                    self.refresh();
                }
            }
        }
    }

    /// Adds an answer. Rows it has no sums for are computed here, in i64, whole experts or slices as they were asked for.
    fn add(&mut self, flight: &mut Flight, call: Call, layer: &mut Layer<'_>) -> Result<(), LayerError> {
        let out = &mut flight.out[call as usize];
        let Some(reply) = out.reply.take() else { return Ok(()) };
        let hidden = hidden(layer.work);
        self.some.clear();
        for (row, sent) in reply.view().rows().zip(&out.batch.rows) {
            let sums = &mut layer.sums[*sent as usize * hidden..][..hidden];
            match row {
                Row::I16(part) => sums.iter_mut().zip(part).for_each(|(s, p)| *s += i64::from(*p)),
                Row::I32(part) => sums.iter_mut().zip(part).for_each(|(s, p)| *s += i64::from(*p)),
                Row::Overflow => {
                    self.some.extend(out.batch.assignments.iter().filter(|a| a.row == *sent));
                }
            }
        }
        let counted = (self.step, self.calls);
        self.calls += self.inspection.look(flight, call, (&reply, layer.index, layer.work), counted);
        if self.some.is_empty() {
            return Ok(());
        }
        let overflowed = std::mem::take(&mut self.some);
        let of = |piece: Piece| overflowed.iter().copied().filter(move |a| a.expert == piece.expert);
        for unit in &flight.out[call as usize].batch.units {
            let piece = flight.pieces[*unit as usize];
            let own: Vec<Assignment> = of(piece).collect();
            layer.add(piece.blocks, &own)?;
        }
        self.some = overflowed;
        Ok(())
    }

    /// Asks somebody else for pieces of work that were sent before.
    fn send_again(
        &mut self,
        flight: &mut Flight,
        (call, node, units): (Call, NodeIndex, Units),
        layer: &Layer<'_>,
        cost: &mut StepCost,
    ) {
        let mut batch = self.spare.pop().unwrap_or_default();
        batch.begin(node);
        let mut rows = std::mem::take(&mut self.some);
        flight.rows_of(flight.attempts.list(units).iter().copied(), &mut rows);
        for assignment in &rows {
            batch.add(assignment);
        }
        self.some = rows;
        for unit in flight.attempts.list(units) {
            batch.name(flight.pieces[*unit as usize].expert, *unit);
        }
        let what = (layer.index as u16, flight.routes.epoch);
        let sent = self.hub.clone().map(|hub| self.call(&hub, what, (&batch, layer.work), cost));
        let Some((out, budget)) = sent else { return flight.attempts.failed(call) };
        if out.pending.is_some() {
            flight.attempts.started(call, self.peers.now(), budget);
        } else {
            flight.attempts.failed(call);
        }
        flight.out.push(Outstanding { batch, ..out });
    }

    /// Computes pieces of work that were sent to nodes.
    fn compute_again(
        &mut self,
        flight: &Flight,
        units: Units,
        layer: &mut Layer<'_>,
    ) -> Result<(), LayerError> {
        let units = flight.attempts.list(units);
        let blocks = |unit: u32| flight.pieces[unit as usize].blocks;
        let mut rows = std::mem::take(&mut self.some);
        if let Some(metrics) = &self.metrics {
            flight.rows_of(units.iter().copied(), &mut rows);
            metrics.fallback(rows.chunk_by(|a, b| a.row == b.row).count());
        }
        for (index, unit) in units.iter().enumerate() {
            let part = blocks(*unit);
            if units[..index].iter().any(|before| blocks(*before) == part) {
                continue;
            }
            let same = units.iter().copied().filter(|unit| blocks(*unit) == part);
            flight.rows_of(same, &mut rows);
            layer.add(part, &rows)?;
        }
        self.some = rows;
        Ok(())
    }

    /// Others were asked to answer this call as well.
    fn note_hedged(&self, late: &mut Outstanding) {
        if !std::mem::replace(&mut late.hedged, true)
            && let Some(hub) = &self.hub
        {
            hub.note_hedged(late.batch.node);
        }
    }

    /// A call whose answer is not wanted any more.
    fn let_go(&mut self, flight: &mut Flight, call: Call, why: Why) {
        let Some(out) = flight.out.get_mut(call as usize) else { return };
        out.reply = None;
        let pending = out.pending.take();
        match (why, pending) {
            (Why::GaveUp, Some(pending)) => {
                // It may have come this moment: that is too late.
                drop(pending.finish());
                self.count(&flight.out[call as usize], Err(&CallError::Late));
                self.refresh();
            }
            (Why::Beaten, Some(pending)) => {
                self.note_hedged(out);
                if self.lingering.len() < LINGERING_MAX {
                    let (node, predicted) = (out.batch.node, out.predicted);
                    self.lingering.push(Lingering { node, pending, predicted });
                }
            }
            // Dropping it cancels it.
            (Why::Spare, pending) => drop(pending),
            (_, None) => {}
        }
    }

    /// Takes in the answers of calls that others have beaten: their nodes are alive, and this slow.
    pub(super) fn look_after(&mut self) {
        let mut index = 0;
        while let Some(call) = self.lingering.get(index) {
            if !call.pending.is_done() {
                index += 1;
                continue;
            }
            let Lingering { node, pending, predicted } = self.lingering.swap_remove(index);
            let Ok(reply) = pending.finish() else { continue };
            self.peers.doubts.answered(node);
            let place = self.places.get_mut(usize::from(node_place(node)));
            if let (Some(place), Some(predicted)) = (place, predicted) {
                place.learned.served(predicted, reply.head().service_us as f32);
            }
        }
    }

    /// Learns from a reply, for which the router waited so long, if it had to.
    fn learn(&mut self, call: &Outstanding, overlapped: bool, reply: &Reply, waited: Option<Duration>) {
        let place = self.places.get_mut(usize::from(node_place(call.batch.node)));
        let (Some(place), Some(predicted)) = (place, call.predicted) else { return };
        let took_us = micros(call.sent.elapsed());
        // What a node says it took is believed as far as it can be.
        let service_us = (reply.head().service_us as f32).min(took_us);
        let rows = call.batch.rows.len() as u32;
        place.learned.served(predicted, service_us);
        if overlapped {
            place.learned.lagged(rows, waited.map_or(0.0, micros));
        } else {
            let beside = took_us - service_us;
            place.learned.travelled(predicted, rows, (beside, waited.map_or(0.0, micros)));
        }
    }

    fn count(&self, call: &Outstanding, outcome: Result<u64, &CallError>) {
        let (Some(metrics), Some(name)) = (&self.metrics, self.names.get(usize::from(call.batch.node)))
        else {
            return;
        };
        match outcome {
            Ok(received_bytes) => {
                let (sent_bytes, duration) = (call.sent_bytes, call.sent.elapsed());
                let rows = call.batch.rows.len();
                metrics.node_call(name, NodeCall { rows, sent_bytes, received_bytes, duration });
            }
            Err(error) => {
                let reason = match error {
                    CallError::Gone => "gone",
                    CallError::Late => "late",
                    CallError::Refused { .. } => "refused",
                    CallError::Rejected { .. } => "rejected",
                    CallError::Full => "full",
                };
                metrics.node_failed(name, reason);
            }
        }
    }
}
