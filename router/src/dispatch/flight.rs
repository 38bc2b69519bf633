//! What is under way of one layer: which rows went where, and which expert's part each piece of work is.

use std::sync::Arc;
use std::time::Instant;

use mesh_net::pending::PendingCall;
use mesh_proto::attempts::{Attempts, Unit};
use mesh_proto::routes::{Holders, NodeIndex, Routes};
use mesh_wire::reply::Reply;
use model::home::HomeError;
use model::kernel::Assignment;

use super::LayerError;
use crate::request::name_experts;
use crate::share::Predicted;

/// Experts that nobody who can be reached holds, and who needs them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unreachable {
    layer: u16,
    /// Ascending, each once.
    experts: Vec<u16>,
    /// Rows that need one of them, ascending, each once.
    pub rows: Vec<u32>,
    why: String,
    /// Who was to be asked.
    pub(super) routes: Arc<Routes>,
}

impl Unreachable {
    /// What these assignments need nobody has who is named by these routes.
    pub(super) fn lost(layer: usize, routes: &Arc<Routes>, assignments: &[Assignment]) -> Unreachable {
        Unreachable { routes: Arc::clone(routes), ..Unreachable::new(layer, assignments, String::new()) }
    }

    /// What these assignments need is not to be had. `why` is for the case that the router should have it.
    fn new(layer: usize, assignments: &[Assignment], why: String) -> Unreachable {
        let mut experts: Vec<u16> = assignments.iter().map(|assignment| assignment.expert).collect();
        let mut rows: Vec<u32> = assignments.iter().map(|assignment| assignment.row).collect();
        experts.sort_unstable();
        experts.dedup();
        rows.sort_unstable();
        rows.dedup();
        Unreachable { layer: layer as u16, experts, rows, why, routes: Arc::default() }
    }
}

/// As `3/17, 3/20 and 5 more`.
impl std::fmt::Display for Unreachable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&name_experts(self.experts.iter().map(|expert| (self.layer, *expert))))?;
        if !self.why.is_empty() {
            write!(f, " (the router cannot read its own copy: {})", self.why)?;
        }
        Ok(())
    }
}

/// The router's copy of experts cannot be used: without weights these rows cannot be computed.
pub(super) fn unreadable(layer: usize, assignments: &[Assignment], error: HomeError) -> LayerError {
    match error {
        HomeError::Open(error) => {
            LayerError::Unreachable(Unreachable::new(layer, assignments, error.to_string()))
        }
        error @ HomeError::Kernel(_) => LayerError::Home(error),
    }
}

/// What one node gets in one call.
#[derive(Debug, Default)]
pub(super) struct Batch {
    pub(super) node: NodeIndex,
    /// Rows of the part, ascending; a call's row is an index into this.
    pub(super) rows: Vec<u32>,
    /// Rows as in the part.
    pub(super) assignments: Vec<Assignment>,
    /// The pieces of work it consists of: one per expert, as a node holds one part of each.
    pub(super) units: Vec<Unit>,
    /// The experts of `units`.
    experts: Vec<u16>,
}

impl Batch {
    pub(super) fn begin(&mut self, node: NodeIndex) {
        self.node = node;
        self.rows.clear();
        self.assignments.clear();
        self.units.clear();
        self.experts.clear();
    }

    /// Adds an assignment; rows come in ascending order. The unit of its expert, if it has one yet.
    pub(super) fn add(&mut self, assignment: &Assignment) -> Option<Unit> {
        if self.rows.last() != Some(&assignment.row) {
            self.rows.push(assignment.row);
        }
        self.assignments.push(*assignment);
        // A few for a token, a hundred for a prompt, in a few cache lines.
        let known = self.experts.iter().position(|expert| *expert == assignment.expert)?;
        self.units.get(known).copied()
    }

    pub(super) fn name(&mut self, expert: u16, unit: Unit) {
        self.experts.push(expert);
        self.units.push(unit);
    }
}

/// A call; its place in `Flight::out` is its number in `Flight::attempts`.
#[derive(Debug)]
pub(super) struct Outstanding {
    pub(super) batch: Batch,
    pub(super) sent: Instant,
    pub(super) sent_bytes: u64,
    pub(super) pending: Option<PendingCall>,
    /// An answer that is kept back.
    pub(super) reply: Option<Reply>,
    /// What its node's table says; none where the node got more than one call of this layer.
    pub(super) predicted: Option<Predicted>,
    /// Somebody else was asked as well.
    pub(super) hedged: bool,
}

impl Default for Outstanding {
    fn default() -> Outstanding {
        Outstanding {
            batch: Batch::default(),
            sent: Instant::now(),
            sent_bytes: 0,
            pending: None,
            reply: None,
            predicted: None,
            hedged: false,
        }
    }
}

/// A piece of work: what `Unit` stands for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    pub(super) expert: u16,
    pub(super) blocks: (u16, u16),
    /// The call it was sent with first, which has its rows.
    pub(super) origin: u32,
}

/// What is under way of one layer of one part of a step. Dropping or clearing it cancels its calls.
#[derive(Debug, Default)]
pub struct Flight {
    /// Whom its calls go to.
    pub(super) routes: Arc<Routes>,
    /// Whole experts that are the router's own.
    pub(super) home: Vec<Assignment>,
    /// Slices of experts that are: their blocks, and who needs them.
    pub(super) slices: Vec<((u16, u16), Vec<Assignment>)>,
    /// What nobody can compute.
    pub(super) lost: Vec<Assignment>,
    pub(super) predicted: Predicted,
    pub(super) overlapped: bool,
    pub(super) attempts: Attempts,
    pub(super) out: Vec<Outstanding>,
    pub(super) pieces: Vec<Piece>,
}

impl Flight {
    /// Forgets everything; calls that are out are cancelled.
    pub fn clear(&mut self) {
        self.recycle(true).for_each(drop);
    }

    /// As `clear`, for the next layer; what may be used again comes back.
    pub(super) fn recycle(&mut self, fallback: bool) -> impl Iterator<Item = Batch> + '_ {
        self.home.clear();
        self.slices.iter_mut().for_each(|(_, assignments)| assignments.clear());
        self.lost.clear();
        self.pieces.clear();
        self.attempts.clear(fallback);
        self.out.drain(..).map(|call| call.batch)
    }

    /// Assignments, whole or of slices, that are the router's own.
    pub(super) fn kept(&self) -> u64 {
        let slices: usize = self.slices.iter().map(|(_, assignments)| assignments.len()).sum();
        (self.home.len() + slices) as u64
    }

    /// A slice of this assignment's expert is the router's own.
    pub(super) fn keep_slice(&mut self, blocks: (u16, u16), assignment: Assignment) {
        match self.slices.iter_mut().find(|(known, _)| *known == blocks) {
            Some((_, assignments)) => assignments.push(assignment),
            None => self.slices.push((blocks, vec![assignment])),
        }
    }

    /// A new piece of work of one row so far.
    pub(super) fn unit(&mut self, expert: u16, blocks: (u16, u16), holders: Holders) -> Unit {
        self.pieces.push(Piece { expert, blocks, origin: 0 });
        self.attempts.unit(holders, 1)
    }

    /// Notes with which call each piece of work was sent, and that of several calls to one node none tells its speed.
    pub(super) fn tell_origins(&mut self) {
        for (index, call) in self.out.iter().enumerate() {
            for unit in &call.batch.units {
                self.pieces[*unit as usize].origin = index as u32;
            }
        }
        for index in 1..self.out.len() {
            let (before, this) = self.out.split_at_mut(index);
            if let Some(same) = before.iter_mut().find(|call| call.batch.node == this[0].batch.node) {
                (same.predicted, this[0].predicted) = (None, None);
            }
        }
    }

    /// The rows of these pieces of work, ascending.
    pub(super) fn rows_of(&self, units: impl Iterator<Item = Unit>, rows: &mut Vec<Assignment>) {
        rows.clear();
        for unit in units {
            let piece = self.pieces[unit as usize];
            let all = &self.out[piece.origin as usize].batch.assignments;
            rows.extend(all.iter().filter(|assignment| assignment.expert == piece.expert));
        }
        rows.sort_by_key(|assignment| assignment.row);
    }
}
