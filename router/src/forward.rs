//! One step of the model over the mesh: the walk of a batch of rows through all layers.
//!
//! Per layer: attention, gate, one call per node with the rows it must process, the router's own work while the
//! calls are out (its share of the experts, dense and shared blocks), then the replies are added up. The sum over
//! experts is an integer sum, so it does not matter who computed what or who answered first; an expert whose node
//! fails is computed by another or here, and the step goes on with the same bits.
//!
//! A step with many rows is cut into parts that take turns: while the nodes compute the experts of one part, the
//! router is busy with the attention of the next. A part's attention in a layer runs after that of the part before
//! it, which has stored its keys by then, so the cut changes no bit either. The price: every part reads the weights
//! again, which is why small steps stay in one piece.

use std::ops::{Range, RangeInclusive};
use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_net::hub::Hub;
use model::decoder::workspace::Workspace;
use model::decoder::{DecodeError, Decoder, LoadError};
use model::format::Format;
use model::home::{Home, HomeError, Residency};
use model::kernel::Kernels;
use model::kernel::native::Native;
use model::kernel::native::attend::Run;
use model::kernel::native::kv::KvCache;
use model::open::Model;
use model::packed::TensorName;

use crate::audit::{Audit, AuditView};
use crate::cost::{StepCost, lap};
use crate::dispatch::{Busy, Dispatch, Flight, LayerError, PlacesView, Shape, Unreachable};
use crate::metrics::Metrics;

/// Rows from which a step over nodes is cut into parts: below, an expert has so few rows that reading its weights
/// once per part costs more than the overlap gains (benches/RESULTS.md).
pub const OVERLAP_ROWS: usize = 128;

/// Rows per part that are aimed at: more parts hide a round trip better, smaller ones read the weights more often.
/// Steps of 512 rows in 2, 3 and 4 parts gave 831, 923 and 955 tokens per second (3 layers, two cores).
const PART_ROWS: usize = 128;

/// Parts of a step over nodes: at least two, or nothing overlaps.
const PARTS: RangeInclusive<usize> = 2..=4;

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// The router's own stages; `DecodeError::NotFinite` names the row whose request must end.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// Experts cannot be computed.
    #[error(transparent)]
    Layer(LayerError),
}

/// The rows of one step.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// Tokens, those of `runs` in order.
    pub tokens: &'a [u32],
    /// Which sequences they belong to, and where.
    pub runs: &'a [Run<'a>],
    /// Rows whose logits are needed.
    pub wanted: &'a [usize],
}

/// Where routed experts are computed.
#[derive(Clone, Debug)]
pub enum Experts {
    /// In this process.
    Here,
    /// On nodes; here only those of nodes that fail.
    Nodes(Arc<Hub>),
    /// On both: the first so many experts of every layer are held here, too, and every layer's rows are shared out so
    /// that all finish together. Takes memory for them.
    Shared(Arc<Hub>, u16),
}

/// The model as the router runs it.
#[derive(Debug)]
pub struct Forward {
    decoder: Decoder,
    kv: KvCache,
    parts: Vec<Part>,
    experts: Remote,
    model: Arc<Model>,
    kv_block_bytes: u64,
    weight_bytes: u64,
    /// Experts per layer that are held here from the start.
    resident: u16,
}

/// The way to the experts.
#[derive(Debug)]
struct Remote {
    home: Home,
    dispatch: Dispatch,
}

/// Rows that walk through the layers together, and the memory for that.
#[derive(Debug)]
struct Part {
    /// First of its rows in the step.
    first_row: usize,
    rows: usize,
    work: Workspace,
    flight: Flight,
    sums: Vec<i64>,
    /// Time of its stages in the layer before that the router must do before it can turn to the experts again.
    busy: Duration,
}

impl Part {
    fn new(format: Format) -> Part {
        Part {
            first_row: 0,
            rows: 0,
            work: Workspace::new(format),
            flight: Flight::default(),
            sums: Vec::new(),
            busy: Duration::ZERO,
        }
    }
}

impl Forward {
    /// Loads the router's weights; `kv_blocks` blocks of cache.
    pub fn load(
        model: Arc<Model>,
        kernels: Arc<dyn Kernels>,
        native: Arc<Native>,
        kv_blocks: usize,
        experts: Experts,
    ) -> Result<Forward, LoadError> {
        let decoder = Decoder::load(&model, &*kernels, native)?;
        // Mapped: only those of a node that fails are used.
        let (residency, hub, resident) = match experts {
            Experts::Here => (Residency::Resident, None, u16::MAX),
            Experts::Nodes(hub) => (Residency::Mapped, Some(hub), 0),
            Experts::Shared(hub, resident) => (Residency::Mapped, Some(hub), resident),
        };
        let replicated = hub.is_some() && usize::from(resident) >= model.config.moe.experts;
        let expert_bytes = model.format.expert_bytes(model.config.hidden, model.config.moe.inter) as u64;
        let shape = Shape { format: model.format, expert_bytes };
        Ok(Forward {
            kv_block_bytes: KvCache::block_bytes(&model.config, model.format) as u64,
            weight_bytes: weight_bytes(&model),
            kv: KvCache::new(&model.config, model.format, kv_blocks),
            parts: (0..*PARTS.end()).map(|_| Part::new(model.format)).collect(),
            resident,
            experts: Remote {
                dispatch: Dispatch::new(hub, shape, replicated),
                home: Home::new(Arc::clone(&model), kernels, residency),
            },
            decoder,
            model,
        })
    }

    /// The router's part of the model.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Loads the experts that are used all the time, if there are any, and measures how fast they are computed;
    /// `progress` gets bytes done and bytes in all.
    ///
    /// # Errors
    /// The first expert that cannot be had.
    pub fn preload(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), HomeError> {
        if self.resident > 0 {
            let Remote { home, dispatch } = &mut self.experts;
            home.load_resident(self.resident, progress)?;
            dispatch.set_own_speed(&home.weight_mb_s()?);
        }
        Ok(())
    }

    /// Whether experts that no node can be asked for may be computed here, from mapped files.
    pub fn set_fallback(&mut self, fallback: bool) {
        self.experts.dispatch.set_fallback(fallback);
    }

    /// Counts calls in `metrics`.
    pub fn count_in(&mut self, metrics: Arc<Metrics>) {
        self.experts.dispatch.count_in(metrics);
    }

    /// Epoch of the placement that the last layer was computed by.
    pub fn epoch(&self) -> u64 {
        self.experts.dispatch.epoch()
    }

    /// What is known of the speed of router and nodes, readable from other threads.
    pub fn places(&self) -> PlacesView {
        self.experts.dispatch.view()
    }

    /// Keeps some of what nodes answer for `audit`.
    pub fn audit_with(&mut self, audit: Audit) {
        self.experts.dispatch.audit_with(audit);
    }

    /// What came of audits, readable from other threads; none without them.
    pub fn audits(&self) -> Option<AuditView> {
        self.experts.dispatch.audits()
    }

    /// As `Dispatch::serves`.
    pub fn serves(&mut self, requests: Range<u64>) {
        self.experts.dispatch.serves(requests);
    }

    /// Bytes of one block of KV cache.
    pub fn kv_block_bytes(&self) -> u64 {
        self.kv_block_bytes
    }

    /// As `Dispatch::await_loading`.
    pub fn await_loading(&self, lost: &Unreachable, timeout: Duration) -> bool {
        self.experts.dispatch.await_loading(lost, timeout)
    }

    /// Bytes of experts the router holds by now.
    pub fn home_bytes(&self) -> u64 {
        self.experts.home.weight_bytes()
    }

    /// Bytes of the router's own weights, experts aside.
    pub fn weight_bytes(&self) -> u64 {
        self.weight_bytes
    }

    /// Runs a step through the model: into `logits` the logits of its wanted rows, `[wanted.len(), vocab]`.
    pub fn step(
        &mut self,
        step: &Step<'_>,
        logits: &mut Vec<f32>,
        cost: &mut StepCost,
    ) -> Result<(), ForwardError> {
        self.experts.dispatch.begin_step();
        let rows = step.tokens.len();
        let overlapped = self.experts.dispatch.is_served() && rows >= OVERLAP_ROWS;
        let parts = if overlapped { (rows / PART_ROWS).clamp(*PARTS.start(), *PARTS.end()) } else { 1 };
        let result = self.run(step, parts, cost);
        if result.is_err() {
            // Nobody waits for these any more.
            self.parts.iter_mut().for_each(|part| part.flight.clear());
        }
        result?;
        let mut clock = Instant::now();
        logits.clear();
        if !step.wanted.is_empty() {
            let (whole, rest) = self.parts.split_at_mut(1);
            for part in &rest[..parts - 1] {
                whole[0].work.residual.extend_from_slice(&part.work.residual);
            }
            self.decoder.logits(step.wanted, &mut whole[0].work, logits)?;
        }
        lap(&mut clock, &mut cost.head);
        Ok(())
    }

    /// The layers, part after part in each.
    fn run(&mut self, step: &Step<'_>, parts: usize, cost: &mut StepCost) -> Result<(), ForwardError> {
        let runs = cut(step.runs, step.tokens.len(), parts);
        let mut clock = Instant::now();
        let mut first_row = 0;
        // The one tensor of the decoder's that stays where it is mapped.
        self.model.check_length(TensorName::Embedding).map_err(DecodeError::from)?;
        for (part, runs) in self.parts.iter_mut().zip(&runs) {
            (part.first_row, part.rows) = (first_row, runs.iter().map(|run| run.len).sum());
            first_row += part.rows;
            part.busy = Duration::ZERO;
            let positions = runs.iter().flat_map(|run| run.position..run.position + run.len);
            self.decoder.begin(&step.tokens[part.first_row..first_row], positions, &mut part.work);
        }
        lap(&mut clock, &mut cost.attention);
        let layers = self.decoder.config().layers.len();
        for layer in 0..=layers {
            for (index, runs) in runs.iter().enumerate() {
                let started = Instant::now();
                if layer > 0 {
                    self.settle(layer - 1, index, cost)?;
                }
                if layer < layers {
                    self.begin_layer(layer, (index, runs), (parts > 1).then_some(started), cost)?;
                }
            }
        }
        Ok(())
    }

    /// A layer of one part, up to where its calls are out and the router's share is done. `started` is when this
    /// part's turn began, if others take turns with it.
    fn begin_layer(
        &mut self,
        layer: usize,
        (index, runs): (usize, &[Run<'_>]),
        started: Option<Instant>,
        cost: &mut StepCost,
    ) -> Result<(), ForwardError> {
        let Forward { decoder, kv, parts, experts, .. } = self;
        let Part { first_row, rows, work, flight, sums, busy } = &mut parts[index];
        let mut clock = Instant::now();
        decoder.attention(layer, runs, kv, work).map_err(|error| in_step(error, *first_row))?;
        lap(&mut clock, &mut cost.attention);
        decoder.route(layer, work).map_err(|error| in_step(error, *first_row))?;
        lap(&mut clock, &mut cost.gate);
        let Remote { home, dispatch } = experts;
        sums.clear();
        if decoder.is_moe(layer) {
            sums.resize(*rows * decoder.config().hidden, 0);
            let own = Busy {
                time: started.map_or(Duration::ZERO, |started| started.elapsed()) + *busy,
                overlapped: started.is_some(),
            };
            dispatch.send(layer, work, (flight, own), cost).map_err(|error| of_step(error, *first_row))?;
            lap(&mut clock, &mut cost.send);
            let computing = clock;
            dispatch
                .compute(layer, (work, flight), (home, sums))
                .map_err(|error| of_step(error, *first_row))?;
            lap(&mut clock, &mut cost.experts);
            dispatch.computed_here(flight, clock - computing);
        }
        let local = clock;
        decoder.local_ffn(layer, work).map_err(|error| in_step(error, *first_row))?;
        lap(&mut clock, &mut cost.ffn);
        *busy = clock - local;
        Ok(())
    }

    /// Ends a layer of one part: waits for its calls and adds everything up.
    fn settle(&mut self, layer: usize, index: usize, cost: &mut StepCost) -> Result<(), ForwardError> {
        let Forward { decoder, parts, experts, .. } = self;
        let Part { first_row, work, flight, sums, .. } = &mut parts[index];
        let Remote { home, dispatch } = experts;
        if decoder.is_moe(layer) {
            dispatch
                .collect(layer, (work, flight), (home, sums), cost)
                .map_err(|error| of_step(error, *first_row))?;
        }
        let mut clock = Instant::now();
        decoder.finish(layer, sums, work);
        lap(&mut clock, &mut cost.combine);
        Ok(())
    }
}

/// Bytes of the router's own weights in memory of its own. The embedding of a model in files stays mapped.
fn weight_bytes(model: &Model) -> u64 {
    let config = &model.config;
    let embedding = (config.vocab * config.hidden * size_of::<u16>()) as u64;
    let made = if model.directory.is_none() { embedding } else { 0 };
    config.token_bytes(model.format).router + made
}

/// Cuts runs into parts of equally many rows, each with rows of its own counted from 0. A run that lies across the
/// cut goes on in the next part.
fn cut<'a>(runs: &[Run<'a>], rows: usize, parts: usize) -> Vec<Vec<Run<'a>>> {
    let mut left = runs.iter().copied();
    let mut open = left.next();
    let mut taken = 0;
    let part = |index: usize| {
        let until = rows * (index + 1) / parts;
        let (mut cut, mut first_row) = (Vec::new(), 0);
        while let Some(run) = open.filter(|_| taken < until) {
            let len = run.len.min(until - taken);
            cut.push(Run { first_row, len, ..run });
            (taken, first_row) = (taken + len, first_row + len);
            let rest = Run { len: run.len - len, position: run.position + len, ..run };
            open = if rest.len > 0 { Some(rest) } else { left.next() };
        }
        cut
    };
    (0..parts).map(part).collect()
}

/// An error of a part, its row counted in the step.
fn in_step(error: DecodeError, first_row: usize) -> DecodeError {
    match error {
        DecodeError::NotFinite { layer, stage, row } => {
            DecodeError::NotFinite { layer, stage, row: first_row + row }
        }
        other @ (DecodeError::Kernel(_) | DecodeError::Open(_)) => other,
    }
}

/// The same for a layer that cannot be computed.
fn of_step(error: LayerError, first_row: usize) -> ForwardError {
    ForwardError::Layer(match error {
        LayerError::Unreachable(mut experts) => {
            experts.rows.iter_mut().for_each(|row| *row += first_row as u32);
            LayerError::Unreachable(experts)
        }
        other @ LayerError::Home(_) => other,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first_row: usize, len: usize, position: usize) -> Run<'static> {
        Run { first_row, len, position, table: &[] }
    }

    fn shape(parts: &[Vec<Run<'_>>]) -> Vec<Vec<(usize, usize, usize)>> {
        let of = |run: &Run<'_>| (run.first_row, run.len, run.position);
        parts.iter().map(|part| part.iter().map(of).collect()).collect()
    }

    #[test]
    fn a_run_across_the_cut_goes_on_in_the_next_part() {
        let runs = [run(0, 1, 70), run(1, 1, 9), run(2, 7, 30)];
        assert_eq!(shape(&cut(&runs, 9, 2)), [vec![(0, 1, 70), (1, 1, 9), (2, 2, 30)], vec![(0, 5, 32)]]);
        assert_eq!(shape(&cut(&runs, 9, 1)), [vec![(0, 1, 70), (1, 1, 9), (2, 7, 30)]]);
        assert_eq!(
            shape(&cut(&runs, 9, 3)),
            [vec![(0, 1, 70), (1, 1, 9), (2, 1, 30)], vec![(0, 3, 31)], vec![(0, 3, 34)]]
        );
    }

    #[test]
    fn a_cut_between_runs_leaves_them_whole() {
        assert_eq!(shape(&cut(&[run(0, 2, 0), run(2, 2, 5)], 4, 2)), [vec![(0, 2, 0)], vec![(0, 2, 5)]]);
        assert_eq!(shape(&cut(&[], 0, 1)), [vec![]]);
    }

    #[test]
    fn errors_name_the_row_of_the_step() {
        let error = DecodeError::NotFinite { layer: 3, stage: "attention", row: 4 };
        assert!(matches!(in_step(error, 10), DecodeError::NotFinite { layer: 3, row: 14, .. }));
    }
}
