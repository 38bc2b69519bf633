//! All experts of a layer that a process holds, in two parallel phases.
//!
//! Assignments are sorted by expert and cut into segments of rows that share weights. Phase one: gate and up of
//! 32 intermediate values of a segment, SwiGLU, requantization; split over (segment, group). Phase two: down and
//! combine, split over output blocks, so that no two threads add to the same sum. One expert with one row thus uses
//! all threads. Price: rows are copied into tiles once per expert that reads them.
//!
//! Integer sums make the order irrelevant. Per row the largest addend is tracked; where the number of addends
//! times that could leave i32, the row is flagged (and zeroed, so that replicas answer the same bytes), and
//! `run_wide` computes it in i64.
#![allow(unsafe_code, reason = "threads write disjoint groups and columns")]

use std::ops::Range;
use std::sync::Arc;

use super::block::{Added, GateUp, Terms};
use super::columns::{Columns, copy_blocks};
use super::definition::LANES;
use super::engine::{Crew, Engine, Space, ThreadSpace, forged_row, lock, on_rows, part};
use super::plan::{Plan, Segment};
use super::pool::Pool;
use super::scalar::combine_wide;
use super::tiles::{Tiles, TilesWriter, View};
use super::weights::ExpertWeights;
use crate::activations::Activations;
use crate::format::{BLOCK_OUTPUTS, Format, GROUP, padded_inputs, padded_outputs};
use crate::kernel::call::{Expected, beyond_f32, check_call, combine_scale, may_overflow};
use crate::kernel::{Assignment, KernelError, LayerExperts, PartialSums};
use crate::packed::PackedExpert;

/// Addends per sum in the wide combine: 2^11 of at most 2^52 stay inside i64.
const MAX_WIDE_ADDENDS: usize = 1 << 11;

/// Rows that move together from sums kept block by block to rows of the result: 256 bytes in a row are read, and as
/// many lines written side by side as the ways of a first-level cache set can hold twice over.
const COPIED_ROWS: usize = 4;

/// The experts of a layer, loaded.
#[derive(Debug)]
pub(super) struct NativeExperts {
    engine: Arc<Engine>,
    format: Format,
    hidden: usize,
    /// `2^-step_log2`.
    scale: f32,
    /// By expert index.
    experts: Vec<Option<ExpertWeights>>,
}

impl NativeExperts {
    pub(super) fn new(
        engine: Arc<Engine>,
        experts: Vec<(u16, PackedExpert)>,
        step_log2: i8,
    ) -> Result<NativeExperts, KernelError> {
        let scale = combine_scale(step_log2)?;
        let (format, hidden) = experts.first().map_or((Format::Q8, 0), |(_, e)| (e.format, e.hidden));
        let mut held: Vec<Option<ExpertWeights>> = Vec::new();
        for (index, expert) in experts {
            if expert.format != format || expert.hidden != hidden || hidden == 0 || expert.inter == 0 {
                return Err(KernelError::Weights(format!(
                    "expert {index} is {} x {} in {} beside experts of width {hidden} in {format}",
                    expert.hidden, expert.inter, expert.format
                )));
            }
            let slot = usize::from(index);
            if held.len() <= slot {
                held.resize_with(slot + 1, || None);
            }
            if held[slot].replace(ExpertWeights::new(index, expert)?).is_some() {
                return Err(KernelError::Weights(format!("expert {index} was given twice")));
            }
        }
        Ok(NativeExperts { engine, format, hidden, scale, experts: held })
    }

    fn expert(&self, index: u16) -> Option<&ExpertWeights> {
        self.experts.get(usize::from(index)).and_then(Option::as_ref)
    }

    fn check(&self, x: &Activations<'_>, assignments: &[Assignment]) -> Result<(), KernelError> {
        let expected = Expected { format: self.format, hidden: self.hidden, holds: &|e| self.holds(e) };
        check_call(expected, x, assignments)
    }

    /// Sorts a checked call into `plan`.
    fn plan(&self, plan: &mut Plan, batch: usize, assignments: &[Assignment]) {
        let shape = (batch, padded_inputs(self.hidden) / GROUP);
        plan.fill(shape, assignments, &|e| self.expert(e).map_or(0, ExpertWeights::inter_groups));
    }

    /// Copies every row to the tiles of its segments. False for a row that no quantizer made.
    fn gather(&self, pool: &mut Pool, space: &mut Space, x: &Activations<'_>) -> bool {
        let plan = &space.plan;
        let (x_cells, h_cells) = plan.cells();
        space.x.reserve(x_cells, self.format.is_quantized());
        space.h.reserve(h_cells, self.format.is_quantized());
        let writer = space.x.writer();
        on_rows(pool, plan.rows.len(), &|at| {
            let segment = &plan.segments[plan.segment_of[at] as usize];
            // SAFETY: the storage was reserved above, and each position is copied by one thread.
            unsafe { writer.copy_row(segment.x, at - segment.first, x, plan.rows[at] as usize) }
        })
    }

    /// Gate, up and activation of one group of a segment.
    fn gate_up_group(&self, segment: &Segment, group: usize, phase: GateUpPhase<'_>) {
        let GateUpPhase { tiles, writer, slot } = phase;
        let (table, view) = (self.engine.table, tiles.view(segment.x));
        let Some(expert) = self.expert(segment.expert) else { return };
        let [g0, u0, g1, u1] = &mut slot.products;
        for (half, (gate, up)) in [(&mut *g0, &mut *u0), (&mut *g1, &mut *u1)].into_iter().enumerate() {
            let (gate_block, up_block) = expert.gate_up(2 * group + half, view.rows);
            table.product(gate_block, view, &mut gate[..view.rows]);
            table.product(up_block, view, &mut up[..view.rows]);
        }
        let products =
            GateUp { gate: [&g0[..view.rows], &g1[..view.rows]], up: [&u0[..view.rows], &u1[..view.rows]] };
        // SAFETY: the storage was reserved in `gather`, and each group of a segment has one thread.
        table.activate(products, &unsafe { writer.slots(segment.h, group) });
    }

    /// Phase one, the share of one thread: groups whose cost begins inside it.
    fn gate_up(&self, plan: &Plan, thread: usize, threads: usize, mut phase: GateUpPhase<'_>) {
        let share = part(plan.cost, thread, threads);
        for segment in &plan.segments {
            for group in segment.groups_in(share.clone()) {
                self.gate_up_group(segment, group, phase.again());
            }
        }
    }

    /// Phase two, the share of one thread: some output blocks of all segments. Sums are kept block by block until all
    /// experts are added: in the result, rows lie kilobytes apart and lines would chase each other out of the cache.
    fn down(&self, plan: &Plan, tiles: &Tiles, mine: Range<usize>, to: DownPhase<'_>) {
        let DownPhase { slot, sums } = to;
        let batch = plan.addends.len();
        slot.row_peaks.clear();
        slot.row_peaks.resize(batch, 0);
        slot.totals.clear();
        slot.totals.resize(mine.len() * batch, [0; LANES]);
        for segment in &plan.segments {
            self.down_segment(plan, segment, tiles.view(segment.h), (mine.clone(), slot));
        }
        for first in (0..batch).step_by(COPIED_ROWS) {
            let rows = first..batch.min(first + COPIED_ROWS);
            for (block, totals) in mine.clone().zip(slot.totals.chunks_exact(batch)) {
                for row in rows.clone() {
                    // SAFETY: this thread alone computes these blocks of columns; the sums outlive the phase.
                    let to = unsafe { sums.row(row, block..block + 1) };
                    copy_blocks(std::iter::once(&totals[row]), to);
                }
            }
        }
    }

    /// Down and combine of one segment, for the output blocks `mine`.
    fn down_segment(
        &self,
        plan: &Plan,
        segment: &Segment,
        view: View<'_>,
        (mine, slot): (Range<usize>, &mut ThreadSpace),
    ) {
        let Some(expert) = self.expert(segment.expert) else { return };
        let batch = plan.addends.len();
        let weights = &plan.weights[segment.first..][..view.rows];
        let rows = &plan.rows[segment.first..][..view.rows];
        let peaks = &mut slot.peaks[..view.rows];
        peaks.fill([0; LANES]);
        let adjacent = rows.windows(2).all(|pair| pair[1] == pair[0] + 1);
        for (index, block) in mine.enumerate() {
            let totals = &mut slot.totals[index * batch..][..batch];
            let block = expert.down(block, view.rows);
            let terms = Terms { weights, scale: self.scale };
            if adjacent {
                let sums = &mut totals[rows[0] as usize..][..view.rows];
                self.engine.table.combine(block, view, terms, Added { sums, peaks });
                continue;
            }
            let sums = &mut slot.sums[..view.rows];
            sums.fill([0; LANES]);
            self.engine.table.combine(block, view, terms, Added { sums, peaks });
            for (row, addends) in rows.iter().zip(&slot.sums) {
                let to = &mut totals[*row as usize];
                for n in 0..LANES {
                    to[n] = to[n].wrapping_add(addends[n]);
                }
            }
        }
        for (row, peaks) in rows.iter().zip(peaks) {
            let peak = peaks.iter().fold(0, |peak, p| peak.max(*p));
            let at = &mut slot.row_peaks[*row as usize];
            *at = (*at).max(peak);
        }
    }

    /// Flags and zeroes rows whose sums may have left i32.
    fn flag_overflow(&self, space: &Space, threads: usize, out: &mut PartialSums) {
        for (row, addends) in space.plan.addends.iter().enumerate() {
            let peak = space.threads[..threads]
                .iter()
                .fold(0, |peak, slot| peak.max(lock(slot).row_peaks.get(row).copied().unwrap_or(0)));
            if may_overflow(peak, *addends) {
                out.overflowed[row] = true;
                out.sums[row * self.hidden..(row + 1) * self.hidden].fill(0);
            }
        }
    }

    /// One assignment in i64: `to` is the row's sums.
    fn add_wide(
        &self,
        space: &mut Space,
        a: &Assignment,
        x: &Activations<'_>,
        to: &mut [i64],
    ) -> Result<(), KernelError> {
        let Some(expert) = self.expert(a.expert) else { return Ok(()) };
        self.plan(&mut space.plan, x.rows(), std::slice::from_ref(a));
        let segment = space.plan.segments[0];
        space.x.reserve(segment.x.end(), self.format.is_quantized());
        space.h.reserve(segment.h.end(), self.format.is_quantized());
        // SAFETY: reserved just above; nobody else has the space.
        if !unsafe { space.x.writer().copy_row(segment.x, 0, x, a.row as usize) } {
            return Err(forged_row());
        }
        let Space { x: tiles, h, threads, plan } = space;
        let writer = h.writer();
        let mut slot = lock(&threads[0]);
        self.gate_up(plan, 0, 1, GateUpPhase { tiles, writer, slot: &mut slot });
        for (block, to) in to.chunks_mut(BLOCK_OUTPUTS).enumerate() {
            let terms = Terms { weights: &[a.weight], scale: self.scale };
            if !combine_wide(expert.down(block, 1), h.view(segment.h), terms, to) {
                return Err(beyond_f32(a));
            }
        }
        Ok(())
    }
}

/// What phase one of a thread works with.
struct GateUpPhase<'a> {
    tiles: &'a Tiles,
    writer: TilesWriter,
    slot: &'a mut ThreadSpace,
}

impl GateUpPhase<'_> {
    fn again(&mut self) -> GateUpPhase<'_> {
        GateUpPhase { tiles: self.tiles, writer: self.writer, slot: self.slot }
    }
}

/// What phase two of a thread works with.
struct DownPhase<'a> {
    slot: &'a mut ThreadSpace,
    sums: Columns<i32>,
}

impl LayerExperts for NativeExperts {
    fn holds(&self, index: u16) -> bool {
        self.expert(index).is_some()
    }

    fn run(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut PartialSums,
    ) -> Result<(), KernelError> {
        self.check(&x, assignments)?;
        out.reset(x.rows(), x.inputs());
        if assignments.is_empty() {
            return Ok(());
        }
        let mut crew = self.engine.crew();
        let Crew { pool, space } = &mut *crew;
        self.plan(&mut space.plan, x.rows(), assignments);
        if !self.gather(pool, space, &x) {
            return Err(forged_row());
        }
        let threads = pool.threads();
        let writer = space.h.writer();
        let (plan, tiles, slots) = (&space.plan, &space.x, &space.threads);
        pool.run(&|thread| {
            let mut slot = lock(&slots[thread]);
            self.gate_up(plan, thread, threads, GateUpPhase { tiles, writer, slot: &mut slot });
        });
        let (tiles, sums) = (&space.h, Columns::new(&mut out.sums, self.hidden));
        let blocks = padded_outputs(self.hidden) / BLOCK_OUTPUTS;
        pool.run(&|thread| {
            let mut slot = lock(&slots[thread]);
            self.down(plan, tiles, part(blocks, thread, threads), DownPhase { slot: &mut slot, sums });
        });
        self.flag_overflow(space, threads, out);
        Ok(())
    }

    fn run_wide(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut Vec<i64>,
    ) -> Result<(), KernelError> {
        self.check(&x, assignments)?;
        out.clear();
        out.resize(x.rows() * x.inputs(), 0);
        let mut crew = self.engine.crew();
        let space = &mut crew.space;
        self.plan(&mut space.plan, x.rows(), assignments);
        if let Some(row) = space.plan.addends.iter().position(|&n| n as usize > MAX_WIDE_ADDENDS) {
            return Err(KernelError::Call(format!("row {row} has more than {MAX_WIDE_ADDENDS} addends")));
        }
        for a in assignments {
            let row = a.row as usize;
            self.add_wide(space, a, &x, &mut out[row * self.hidden..(row + 1) * self.hidden])?;
        }
        Ok(())
    }
}
