//! The thread that owns the model: takes requests, plans steps, runs them, chooses tokens, tells the streams.
//!
//! One thread, one loop, no locks around the model: commands come in over a bounded queue, events go out over
//! channels sized so that sending never waits. A stream that was dropped is noticed at the next step. A row that
//! is not finite ends its own request only: the step is planned again without it, and since nothing counts as
//! computed before a step succeeds, the others lose nothing but time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use model::decoder::DecodeError;
use model::kernel::native::attend::Run;
use model::kernel::native::kv::KV_BLOCK;
use tokio::sync::mpsc::{self, error::TryRecvError};
use tokio::sync::oneshot;

use crate::audit::AuditView;
use crate::cost::StepCost;
use crate::dispatch::{LayerError, PlacesView};
use crate::forward::{Forward, ForwardError, Step};
use crate::metrics::{Load, Metrics};
use crate::pace::{Pace, Paces};
use crate::request::{Command, Event, FinishReason, GenerateError, Submission, Timing, TokenLogprobs};
use crate::sampler::{self, Sampler, Scratch};
use crate::scheduler::{Limits, LimitsError, NewSequence, Occupancy, Scheduler, SequenceId, Slice, StepPlan};

/// How long a step waits for experts that nodes are loading, or that one holds who is tried again shortly, before its
/// requests end: longer than a node takes for a few experts more, shorter than clients wait for a first answer.
pub const HOLD_MAX: Duration = Duration::from_secs(5);

/// After so long it is tried again at the latest, and clients that went away are noticed.
pub const HOLD_SLICE: Duration = Duration::from_millis(100);

/// How the engine divides its time and memory.
#[derive(Clone, Copy, Debug)]
pub struct EngineConfig {
    /// KV blocks of the cache.
    pub kv_blocks: usize,
    /// Rows per step at most, decode and prefill together.
    pub rows: usize,
    /// Prefill rows of one sequence per step while others wait for their next token (`scheduler::Limits`).
    pub chunk: usize,
    /// Sequences that run at a time.
    pub sequences: usize,
}

/// What the engine has done since it started.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineStatus {
    /// Steps run.
    pub steps: u64,
    /// Rows computed.
    pub rows: u64,
    /// Rows that were one token of a running sequence.
    pub decode_rows: u64,
    /// Time in steps that only decoded, and how many tokens those gave.
    pub decode_time: Duration,
    /// Time in steps with prefill.
    pub prefill_time: Duration,
    /// Time choosing tokens and telling streams.
    pub sample_time: Duration,
    /// Time planning.
    pub plan_time: Duration,
    /// Sum of the costs of all steps.
    pub cost: StepCost,
    /// Sequences and blocks now.
    pub occupancy: Occupancy,
    /// Sequences that gave up their blocks.
    pub preemptions: u64,
    /// Bytes of experts the router holds itself.
    pub home_bytes: u64,
    /// Bytes of the router's own weights that are in memory of its own.
    pub weight_bytes: u64,
    /// Bytes of the KV blocks that were ever in use at a time; others were never touched.
    pub kv_peak_bytes: u64,
    /// Tokens per second before and after the last change of the placement.
    pub paces: Paces,
}

/// A view of the engine's counters, updated after every step.
#[derive(Clone, Debug, Default)]
pub struct StatusView(Arc<Mutex<EngineStatus>>);

impl StatusView {
    /// The counters as of the last step.
    pub fn read(&self) -> EngineStatus {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self, status: EngineStatus) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = status;
    }
}

/// The engine, before its thread runs.
#[derive(Debug)]
pub struct Engine {
    forward: Forward,
    scheduler: Scheduler,
    commands: mpsc::Receiver<Command>,
    sequences: BTreeMap<SequenceId, Live>,
    next_id: SequenceId,
    draining: Option<oneshot::Sender<()>>,
    status: EngineStatus,
    view: StatusView,
    metrics: Option<Arc<Metrics>>,
    block_bytes: u64,
    scratch: Scratch,
    tokens: Vec<u32>,
    logits: Vec<f32>,
    /// Since when steps fail for want of experts that nodes are loading.
    held_since: Option<Instant>,
    pace: Pace,
}

/// A sequence in progress.
#[derive(Debug)]
struct Live {
    submission: Submission,
    /// Prompt and output.
    tokens: Vec<u32>,
    sampler: Sampler,
    digest: Option<blake3::Hasher>,
    prompt_scores: Vec<Option<TokenLogprobs>>,
    prompt_told: bool,
    timing: Timing,
    started: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

/// Whether the loop goes on.
enum Next {
    Step,
    End,
}

impl Engine {
    /// An engine that reads `commands`.
    pub fn new(
        forward: Forward,
        config: EngineConfig,
        commands: mpsc::Receiver<Command>,
    ) -> Result<Engine, LimitsError> {
        let scheduler = Scheduler::new(Limits {
            block_tokens: KV_BLOCK,
            blocks: config.kv_blocks,
            rows: config.rows,
            chunk: config.chunk,
            sequences: config.sequences,
        })?;
        Ok(Engine {
            block_bytes: forward.kv_block_bytes(),
            metrics: None,
            forward,
            scheduler,
            commands,
            sequences: BTreeMap::new(),
            next_id: 0,
            draining: None,
            status: EngineStatus::default(),
            view: StatusView::default(),
            scratch: Scratch::default(),
            tokens: Vec::new(),
            logits: Vec::new(),
            held_since: None,
            pace: Pace::default(),
        })
    }

    /// Counts what it does in `metrics`, too.
    pub fn counting(mut self, metrics: Arc<Metrics>) -> Engine {
        self.forward.count_in(Arc::clone(&metrics));
        self.metrics = Some(metrics);
        self
    }

    /// The counters, readable from other threads.
    pub fn status(&self) -> StatusView {
        self.view.clone()
    }

    /// What is known of the speed of router and nodes, readable from other threads.
    pub fn places(&self) -> PlacesView {
        self.forward.places()
    }

    /// What came of audits, readable from other threads; none without them.
    pub fn audits(&self) -> Option<AuditView> {
        self.forward.audits()
    }

    /// Runs until every handle is gone or a drain is complete.
    pub fn run(mut self) {
        while let Next::Step = self.take_commands() {
            self.drop_cancelled();
            let planning = Instant::now();
            let plan = self.scheduler.plan();
            self.note_plan(&plan, planning);
            if plan.rows() > 0 {
                self.step(&plan);
            }
            self.publish();
        }
        if let Some(done) = self.draining.take() {
            done.send(()).ok();
        }
    }

    /// Takes what has arrived; with nothing to compute, waits for it.
    fn take_commands(&mut self) -> Next {
        loop {
            let idle = self.sequences.is_empty();
            if idle && self.draining.is_some() {
                return Next::End;
            }
            let command = if idle {
                match self.commands.blocking_recv() {
                    Some(command) => command,
                    None => return Next::End,
                }
            } else {
                match self.commands.try_recv() {
                    Ok(command) => command,
                    Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Next::Step,
                }
            };
            match command {
                Command::Generate(submission) => self.add(submission),
                Command::Drain(done) => {
                    // No new sequences from here on; senders see the queue closed.
                    self.commands.close();
                    self.draining = Some(done);
                }
            }
        }
    }

    fn add(&mut self, submission: Submission) {
        if self.draining.is_some() {
            submission.events.try_send(Event::Failed(GenerateError::Stopping)).ok();
            return;
        }
        let request = &submission.request;
        let id = self.next_id;
        self.next_id += 1;
        let new = NewSequence {
            id,
            prompt: request.prompt.len(),
            longest: request.prompt.len() + request.max_tokens as usize,
            prompt_logits: request.prompt_logprobs.is_some(),
        };
        if self.scheduler.add(new).is_err() {
            let (needed, blocks) = (new.longest, self.scheduler.occupancy().blocks);
            let error = GenerateError::KvCapacity { needed, capacity: blocks * KV_BLOCK };
            submission.events.try_send(Event::Failed(error)).ok();
            return;
        }
        let sampler =
            Sampler::new(request.sampling.clone(), &request.prompt, &request.stop_tokens, request.min_tokens);
        let live = Live {
            tokens: request.prompt.clone(),
            sampler,
            digest: request.logits_digest.then(blake3::Hasher::new),
            prompt_scores: vec![None],
            prompt_told: false,
            timing: Timing::default(),
            started: None,
            first_token: None,
            last_token: None,
            submission,
        };
        self.sequences.insert(id, live);
    }

    fn drop_cancelled(&mut self) {
        let gone = self.sequences.iter().filter(|(_, live)| live.submission.events.is_closed());
        for id in gone.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.forget(id);
        }
    }

    fn forget(&mut self, id: SequenceId) -> Option<Live> {
        self.scheduler.remove(id);
        self.sequences.remove(&id)
    }

    fn note_plan(&mut self, plan: &StepPlan, planning: Instant) {
        self.status.plan_time += planning.elapsed();
        self.status.preemptions += plan.preempted.len() as u64;
        if let Some(metrics) = &self.metrics {
            plan.preempted.iter().for_each(|_| metrics.preempted());
        }
        for id in &plan.preempted {
            if let Some(live) = self.sequences.get_mut(id) {
                live.timing.preemptions += 1;
            }
        }
        for id in &plan.started {
            if let Some(live) = self.sequences.get_mut(id) {
                let now = Instant::now();
                live.timing.queued = now - live.submission.submitted;
                live.started = Some(now);
            }
        }
    }

    fn step(&mut self, plan: &StepPlan) {
        let started = Instant::now();
        let mut runs = Vec::with_capacity(plan.slices.len());
        let mut wanted = Vec::new();
        self.tokens.clear();
        for slice in &plan.slices {
            let Some(live) = self.sequences.get(&slice.id) else { continue };
            let first_row = self.tokens.len();
            self.tokens.extend_from_slice(&live.tokens[slice.tokens.clone()]);
            wanted.extend(slice.logits.clone().map(|position| first_row + position - slice.tokens.start));
            let (len, position) = (slice.tokens.len(), slice.tokens.start);
            runs.push(Run { first_row, len, position, table: &slice.blocks });
        }
        let mut cost = StepCost::default();
        let oldest = self.sequences.keys().next().copied().unwrap_or(self.next_id);
        self.forward.serves(oldest..self.next_id);
        let step = Step { tokens: &self.tokens, runs: &runs, wanted: &wanted };
        let result = self.forward.step(&step, &mut self.logits, &mut cost);
        match result {
            Ok(()) => {
                self.held_since = None;
                self.deliver(plan, &cost, started);
            }
            Err(error) if self.holds(&error) => {}
            Err(error) => self.fail(plan, &error),
        }
    }

    /// Hands out what a step computed.
    fn deliver(&mut self, plan: &StepPlan, cost: &StepCost, started: Instant) {
        let sampling = Instant::now();
        let (rows, vocab) = (plan.rows(), self.forward.decoder().config().vocab);
        let bytes = cost.bytes_out + cost.bytes_in;
        let logits = std::mem::take(&mut self.logits);
        let mut delivered = 0;
        for slice in &plan.slices {
            let own = &logits[delivered * vocab..(delivered + slice.logits.len()) * vocab];
            delivered += slice.logits.len();
            self.scheduler.advance(slice);
            let Some(live) = self.sequences.get_mut(&slice.id) else { continue };
            live.timing.waiting += cost.wait;
            live.timing.wire_bytes += bytes * slice.tokens.len() as u64 / rows as u64;
            if let Some(end) = live.take(slice, own, &mut self.scratch, self.metrics.as_deref()) {
                let live = self.forget(slice.id);
                if let Some(live) = live {
                    live.end(end);
                }
            } else if slice.samples {
                self.scheduler.append(slice.id);
            }
        }
        self.logits = logits;
        self.account(plan, cost, sampling - started, sampling.elapsed());
    }

    fn account(&mut self, plan: &StepPlan, cost: &StepCost, step: Duration, sample: Duration) {
        let status = &mut self.status;
        let decode_rows = plan.slices.iter().filter(|slice| slice.samples && slice.tokens.len() == 1).count();
        status.steps += 1;
        status.rows += plan.rows() as u64;
        status.decode_rows += decode_rows as u64;
        if decode_rows == plan.rows() {
            status.decode_time += step;
            self.pace.step(self.forward.epoch(), decode_rows as u64, step + sample);
            status.paces = self.pace.paces();
        } else {
            status.prefill_time += step;
        }
        status.sample_time += sample;
        status.cost.add(cost);
        if let Some(metrics) = &self.metrics {
            let generated = plan.slices.iter().filter(|slice| slice.samples).count();
            metrics.step(plan.rows(), plan.rows() - decode_rows, generated);
        }
    }

    /// Whether a step that failed is to be computed again rather than to end requests: experts were out of reach for a
    /// moment only (`Dispatch::await_loading`). Waits for that moment, then.
    fn holds(&mut self, error: &ForwardError) -> bool {
        let ForwardError::Layer(LayerError::Unreachable(lost)) = error else { return false };
        let since = *self.held_since.get_or_insert_with(Instant::now);
        let holds = since.elapsed() < HOLD_MAX && self.forward.await_loading(lost, HOLD_SLICE);
        if !holds {
            self.held_since = None;
        }
        holds
    }

    /// Ends the requests that made a step fail.
    fn fail(&mut self, plan: &StepPlan, error: &ForwardError) {
        let (guilty, failure) = match error {
            ForwardError::Decode(DecodeError::NotFinite { row, .. }) => {
                let owner = plan.owner(*row).map_or_else(|| plan.ids(), |id| vec![id]);
                (owner, GenerateError::Numeric(error.to_string()))
            }
            // Only those whose rows need what cannot be had; the others' rows are computed again.
            ForwardError::Layer(LayerError::Unreachable(experts)) => {
                let owners: BTreeSet<_> =
                    experts.rows.iter().filter_map(|row| plan.owner(*row as usize)).collect();
                let failure = GenerateError::ExpertsUnavailable { experts: experts.to_string() };
                (owners.into_iter().collect(), failure)
            }
            ForwardError::Decode(DecodeError::Kernel(_) | DecodeError::Open(_))
            | ForwardError::Layer(LayerError::Home(_)) => {
                (plan.ids(), GenerateError::Numeric(error.to_string()))
            }
        };
        // Nobody would be to blame for a row that nobody owns, and the step would fail for ever.
        let guilty = if guilty.is_empty() { plan.ids() } else { guilty };
        tracing::error!(%error, requests = guilty.len(), "a step failed; its requests end");
        for id in guilty {
            if let Some(live) = self.forget(id) {
                live.submission.events.try_send(Event::Failed(failure.clone())).ok();
            }
        }
    }

    fn publish(&mut self) {
        self.status.occupancy = self.scheduler.occupancy();
        self.status.home_bytes = self.forward.home_bytes();
        self.status.weight_bytes = self.forward.weight_bytes();
        let used = self.status.occupancy.blocks_used as u64 * self.block_bytes;
        self.status.kv_peak_bytes = self.status.kv_peak_bytes.max(used);
        self.view.write(self.status);
        if let Some(metrics) = &self.metrics {
            let occupancy = self.status.occupancy;
            metrics.load(Load {
                running: occupancy.running,
                waiting: occupancy.waiting,
                kv_used_bytes: occupancy.blocks_used as u64 * self.block_bytes,
                kv_capacity_bytes: occupancy.blocks as u64 * self.block_bytes,
            });
        }
    }
}

/// How a sequence ended.
enum End {
    Finished(FinishReason),
    Failed(GenerateError),
}

impl Live {
    /// Takes the logits of one slice. Some if the sequence is over.
    fn take(
        &mut self,
        slice: &Slice,
        logits: &[f32],
        scratch: &mut Scratch,
        metrics: Option<&Metrics>,
    ) -> Option<End> {
        let vocab = logits.len() / slice.logits.len().max(1);
        let rows = slice.logits.clone().zip(logits.chunks_exact(vocab.max(1)));
        let prompt = self.submission.request.prompt.len();
        let mut last = None;
        for (position, logits) in rows {
            if position + 1 < prompt
                && let Some(top) = self.submission.request.prompt_logprobs
            {
                match sampler::logprobs(logits, self.tokens[position + 1], top) {
                    Ok(scores) => self.prompt_scores.push(Some(scores)),
                    Err(error) => return Some(End::Failed(GenerateError::Numeric(error.to_string()))),
                }
            }
            last = Some(logits);
        }
        if !slice.samples {
            return None;
        }
        if self.submission.request.prompt_logprobs.is_some() && !self.prompt_told {
            self.prompt_told = true;
            let scores = std::mem::take(&mut self.prompt_scores);
            self.tell(Event::Prompt(scores));
        }
        let now = Instant::now();
        if self.first_token.is_none() {
            self.timing.prefill = self.started.map_or(Duration::ZERO, |started| now - started);
            self.first_token = Some(now);
        }
        if self.submission.request.max_tokens == 0 {
            return Some(End::Finished(FinishReason::Length));
        }
        match (metrics, self.last_token.replace(now)) {
            (Some(metrics), None) => metrics.first_token(now - self.submission.submitted),
            (Some(metrics), Some(last)) => metrics.next_token(now - last),
            (None, _) => {}
        }
        self.choose(last?, scratch)
    }

    fn choose(&mut self, logits: &[f32], scratch: &mut Scratch) -> Option<End> {
        let failed =
            |error: sampler::SampleError| Some(End::Failed(GenerateError::Numeric(error.to_string())));
        if let Some(digest) = &mut self.digest {
            logits.iter().for_each(|logit| {
                digest.update(&logit.to_le_bytes());
            });
        }
        let id = match self.sampler.choose(logits, scratch) {
            Ok(id) => id,
            Err(error) => return failed(error),
        };
        if self.submission.request.stop_tokens.contains(&id) {
            return Some(End::Finished(FinishReason::Stop));
        }
        let logprobs = match self.submission.request.logprobs.map(|top| sampler::logprobs(logits, id, top)) {
            None => None,
            Some(Ok(scores)) => Some(scores),
            Some(Err(error)) => return failed(error),
        };
        self.tokens.push(id);
        self.tell(Event::Token { id, logprobs });
        let request = &self.submission.request;
        let generated = self.tokens.len() - request.prompt.len();
        (generated >= request.max_tokens as usize).then_some(End::Finished(FinishReason::Length))
    }

    /// The channel has room for every event of a request; a closed one is noticed before the next step.
    fn tell(&self, event: Event) {
        self.submission.events.try_send(event).ok();
    }

    fn end(mut self, end: End) {
        self.timing.decode = self.first_token.map_or(Duration::ZERO, |first| first.elapsed());
        let event = match end {
            End::Failed(error) => Event::Failed(error),
            End::Finished(reason) => Event::Finished {
                reason,
                timing: self.timing,
                logits_digest: self.digest.take().map(|digest| digest.finalize().to_hex().to_string()),
            },
        };
        self.tell(event);
    }
}

impl StepPlan {
    /// The sequence that batch row `row` belongs to.
    fn owner(&self, row: usize) -> Option<SequenceId> {
        let mut first = 0;
        self.slices.iter().find_map(|slice| {
            first += slice.tokens.len();
            (row < first).then_some(slice.id)
        })
    }

    fn ids(&self) -> Vec<SequenceId> {
        self.slices.iter().map(|slice| slice.id).collect()
    }
}
