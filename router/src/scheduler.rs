//! Which sequences take part in the next step, and which KV blocks they own.
//!
//! Problem: many sequences share one forward pass and one budget of KV memory. Idea: a pure state machine over
//! token counts. The engine tells it what arrives, what was computed and what ended; it answers with a
//! [`StepPlan`]. Running sequences that only need their next token get one row each; the rest of the row budget
//! goes to prefill chunks, oldest sequence first. Results do not depend on any of this (the kernels are exact),
//! so the only questions are memory and fairness:
//!
//! * A sequence is admitted, in order of arrival, when the blocks for all its known tokens are free, and one more
//!   for each sequence that runs (or the next steps would throw it out again).
//! * When a running sequence needs a block and none is free, the youngest running one gives up all of its blocks
//!   and waits at its place in the order of arrival; it is computed again from prompt and output.
//! * So the oldest sequence always advances, and since every sequence ends, every sequence gets its turn.
//!
//! Price: a preempted sequence is computed twice. It refuses a sequence that could never fit alone. No clock, no
//! IO, no tensors.

use std::collections::BTreeMap;
use std::ops::Range;

/// Names a sequence; the engine chooses it, unique among those present.
pub type SequenceId = u64;

/// What the scheduler may hand out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Tokens per KV block.
    pub block_tokens: usize,
    /// KV blocks there are.
    pub blocks: usize,
    /// Rows per step, decode and prefill together.
    pub rows: usize,
    /// Prefill rows of one sequence per step while others wait for their next token; while nobody does, a sequence
    /// may take all rows, because large chunks read each weight for more rows.
    pub chunk: usize,
    /// Sequences that run at a time; at most `rows`, so that each can always have its decode row.
    pub sequences: usize,
}

/// Limits that cannot work.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitsError {
    /// A limit is zero.
    #[error("{0} must be at least 1")]
    Zero(&'static str),
    /// Some decode rows would never fit.
    #[error("{sequences} sequences need at least as many rows per step, not {rows}; raise rows")]
    FewRows {
        /// Sequences that may run.
        sequences: usize,
        /// Rows per step.
        rows: usize,
    },
}

/// A sequence that could never run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddError {
    /// Needs more blocks than there are.
    #[error("the sequence may grow to {tokens} tokens but the KV cache holds {capacity}; raise --kv-memory")]
    TooLong {
        /// Tokens it may reach.
        tokens: usize,
        /// Tokens of cache.
        capacity: usize,
    },
    /// No tokens to compute.
    #[error("the sequence has no tokens")]
    Empty,
    /// The name is taken.
    #[error("sequence {0} is present already")]
    Present(SequenceId),
}

/// A sequence as it arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewSequence {
    /// Its name.
    pub id: SequenceId,
    /// Prompt tokens; at least one.
    pub prompt: usize,
    /// Tokens it may have in all, prompt included.
    pub longest: usize,
    /// Whether the logits of every prompt row are needed (log-probabilities of the prompt), not only the last.
    pub prompt_logits: bool,
}

/// What one sequence does in a step: compute tokens `tokens` at the positions of the same numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Which.
    pub id: SequenceId,
    /// Tokens (prompt followed by output) to compute; their numbers are their positions.
    pub tokens: Range<usize>,
    /// The sequence's block table: block `i` holds positions `i * block_tokens ..`. Covers `tokens.end`.
    pub blocks: Vec<u32>,
    /// Positions whose logits are needed, a possibly empty tail of `tokens`. The logits of the last known
    /// token's row choose the next token; logits already delivered before a preemption are not asked again,
    /// except for that row.
    pub logits: Range<usize>,
    /// Whether the last known token is among `tokens`: its row of logits chooses the next token.
    pub samples: bool,
}

/// What the next step computes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Decode rows first, then prefill chunks; at most `Limits::rows` tokens in all.
    pub slices: Vec<Slice>,
    /// Sequences that gave up their blocks to make this plan.
    pub preempted: Vec<SequenceId>,
    /// Sequences that run now for the first time.
    pub started: Vec<SequenceId>,
}

impl StepPlan {
    /// Tokens computed by the step.
    pub fn rows(&self) -> usize {
        self.slices.iter().map(|slice| slice.tokens.len()).sum()
    }
}

/// Counts for gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Occupancy {
    /// Sequences with blocks.
    pub running: usize,
    /// Sequences without.
    pub waiting: usize,
    /// Blocks owned.
    pub blocks_used: usize,
    /// Blocks there are.
    pub blocks: usize,
}

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    /// Tokens known: prompt and output.
    known: usize,
    /// Tokens whose keys and values are in the cache.
    computed: usize,
    /// Positions below this have had their logits delivered, or never need them.
    scored: usize,
    /// Block table; empty while waiting.
    blocks: Vec<u32>,
    running: bool,
    started: bool,
}

impl Sequence {
    fn slice(&self, rows: usize) -> Slice {
        let end = self.computed + rows;
        let samples = end == self.known;
        let first = if samples { self.scored.min(self.known - 1) } else { self.scored };
        Slice {
            id: self.id,
            tokens: self.computed..end,
            blocks: self.blocks.clone(),
            logits: first.clamp(self.computed, end)..end,
            samples,
        }
    }

    fn decodes(&self) -> bool {
        self.known - self.computed == 1
    }
}

/// The state. Sequences are ordered by arrival everywhere.
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    free: Vec<u32>,
    arrivals: u64,
    sequences: BTreeMap<u64, Sequence>,
    arrival_of: BTreeMap<SequenceId, u64>,
}

impl Scheduler {
    /// An empty schedule over `limits`.
    pub fn new(limits: Limits) -> Result<Scheduler, LimitsError> {
        let named = [
            (limits.block_tokens, "tokens per KV block"),
            (limits.blocks, "the number of KV blocks"),
            (limits.rows, "rows per step"),
            (limits.chunk, "the prefill chunk"),
            (limits.sequences, "the number of sequences"),
        ];
        if let Some((_, name)) = named.iter().find(|(value, _)| *value == 0) {
            return Err(LimitsError::Zero(name));
        }
        if limits.sequences > limits.rows {
            return Err(LimitsError::FewRows { sequences: limits.sequences, rows: limits.rows });
        }
        Ok(Scheduler {
            limits,
            // Taken from the end: low numbers first.
            free: (0..limits.blocks as u32).rev().collect(),
            arrivals: 0,
            sequences: BTreeMap::new(),
            arrival_of: BTreeMap::new(),
        })
    }

    /// Takes a sequence in; it waits for its turn.
    pub fn add(&mut self, new: NewSequence) -> Result<(), AddError> {
        let tokens = new.longest.max(new.prompt);
        if new.prompt == 0 {
            return Err(AddError::Empty);
        }
        if self.blocks_for(tokens) > self.limits.blocks {
            let capacity = self.limits.blocks * self.limits.block_tokens;
            return Err(AddError::TooLong { tokens, capacity });
        }
        if self.arrival_of.contains_key(&new.id) {
            return Err(AddError::Present(new.id));
        }
        self.arrivals += 1;
        self.arrival_of.insert(new.id, self.arrivals);
        self.sequences.insert(
            self.arrivals,
            Sequence {
                id: new.id,
                known: new.prompt,
                computed: 0,
                scored: if new.prompt_logits { 0 } else { new.prompt - 1 },
                blocks: Vec::new(),
                running: false,
                started: false,
            },
        );
        Ok(())
    }

    /// Plans the next step, handing out blocks and taking them back as needed. Nothing counts as computed
    /// until [`Scheduler::advance`].
    pub fn plan(&mut self) -> StepPlan {
        let mut plan = StepPlan::default();
        self.grow(&mut plan);
        if plan.preempted.is_empty() {
            self.admit(&mut plan);
        }
        let running = || self.sequences.values().filter(|sequence| sequence.running);
        plan.slices.extend(running().filter(|sequence| sequence.decodes()).map(|sequence| sequence.slice(1)));
        let chunk = if plan.slices.is_empty() { self.limits.rows } else { self.limits.chunk };
        let mut rows = self.limits.rows - plan.slices.len();
        for sequence in running().filter(|sequence| !sequence.decodes()) {
            let take = (sequence.known - sequence.computed).min(chunk).min(rows);
            if take == 0 {
                break;
            }
            rows -= take;
            plan.slices.push(sequence.slice(take));
        }
        plan
    }

    /// Records that the tokens of `slice` are in the cache and its logits delivered. Unknown names (cancelled
    /// during the step) are passed over.
    pub fn advance(&mut self, slice: &Slice) {
        if let Some(sequence) = self.sequence_mut(slice.id) {
            sequence.computed = slice.tokens.end;
            sequence.scored = sequence.scored.max(slice.tokens.end);
        }
    }

    /// Records one more known token of a sequence: the one just chosen, to be computed next.
    pub fn append(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequence_mut(id) {
            sequence.known += 1;
        }
    }

    /// Forgets a sequence that ended or was cancelled, and frees its blocks. False if it is not present.
    pub fn remove(&mut self, id: SequenceId) -> bool {
        let Some(arrival) = self.arrival_of.remove(&id) else { return false };
        if let Some(sequence) = self.sequences.remove(&arrival) {
            self.free.extend(sequence.blocks.into_iter().rev());
        }
        true
    }

    /// Whether no sequence is present.
    pub fn is_empty(&self) -> bool {
        self.sequences.is_empty()
    }

    /// How full it is.
    pub fn occupancy(&self) -> Occupancy {
        let running = self.sequences.values().filter(|sequence| sequence.running).count();
        Occupancy {
            running,
            waiting: self.sequences.len() - running,
            blocks_used: self.limits.blocks - self.free.len(),
            blocks: self.limits.blocks,
        }
    }

    fn sequence_mut(&mut self, id: SequenceId) -> Option<&mut Sequence> {
        let arrival = self.arrival_of.get(&id)?;
        self.sequences.get_mut(arrival)
    }

    fn blocks_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.limits.block_tokens)
    }

    /// Gives every running sequence the blocks for its known tokens, oldest first, at the youngest's cost.
    fn grow(&mut self, plan: &mut StepPlan) {
        let arrivals: Vec<u64> = self.running_arrivals();
        for arrival in arrivals {
            while let Some(missing) = self.missing_blocks(arrival) {
                if missing == 0 {
                    break;
                }
                match self.free.pop() {
                    Some(block) => {
                        if let Some(sequence) = self.sequences.get_mut(&arrival) {
                            sequence.blocks.push(block);
                        }
                    }
                    None => self.preempt_youngest(plan),
                }
            }
        }
    }

    fn running_arrivals(&self) -> Vec<u64> {
        let running = self.sequences.iter().filter(|(_, sequence)| sequence.running);
        running.map(|(arrival, _)| *arrival).collect()
    }

    /// Blocks a running sequence lacks; `None` once it was preempted itself.
    fn missing_blocks(&self, arrival: u64) -> Option<usize> {
        let sequence = self.sequences.get(&arrival).filter(|sequence| sequence.running)?;
        Some(self.blocks_for(sequence.known).saturating_sub(sequence.blocks.len()))
    }

    fn preempt_youngest(&mut self, plan: &mut StepPlan) {
        let youngest = self.sequences.values_mut().rev().find(|sequence| sequence.running);
        if let Some(sequence) = youngest {
            sequence.running = false;
            sequence.computed = 0;
            plan.preempted.push(sequence.id);
            self.free.extend(sequence.blocks.drain(..).rev());
        }
    }

    /// Admits waiting sequences in order of arrival; the first that does not fit ends it, so none is overtaken.
    fn admit(&mut self, plan: &mut StepPlan) {
        let before = self.sequences.values().filter(|sequence| sequence.running).count();
        let waiting = self.sequences.values_mut().filter(|sequence| !sequence.running);
        for (running, sequence) in (before..).zip(waiting) {
            let needed = sequence.known.div_ceil(self.limits.block_tokens);
            if running >= self.limits.sequences || self.free.len() < needed + running {
                break;
            }
            sequence.running = true;
            let kept = self.free.len() - needed;
            sequence.blocks.extend(self.free.drain(kept..).rev());
            if !sequence.started {
                sequence.started = true;
                plan.started.push(sequence.id);
            }
        }
    }
}

#[cfg(test)]
mod tests;
