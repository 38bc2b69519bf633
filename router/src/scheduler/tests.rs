//! Properties of the schedule under random arrivals, cancellations and shortage.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn limits() -> Limits {
    Limits { block_tokens: 4, blocks: 8, rows: 16, chunk: 8, sequences: 4 }
}

fn new(id: SequenceId, prompt: usize, longest: usize) -> NewSequence {
    NewSequence { id, prompt, longest, prompt_logits: false }
}

/// What a sequence should have experienced, kept apart from the scheduler.
#[derive(Debug)]
struct Expected {
    new: NewSequence,
    known: usize,
    computed: usize,
    scored: BTreeSet<usize>,
}

/// Drives a scheduler as the engine does and checks every plan.
struct Driver {
    scheduler: Scheduler,
    limits: Limits,
    present: BTreeMap<SequenceId, Expected>,
    preemptions: usize,
}

impl Driver {
    fn check(&mut self, plan: &StepPlan) {
        assert!(plan.rows() <= self.limits.rows, "row budget");
        let mut owned = BTreeSet::new();
        for sequence in self.scheduler.sequences.values() {
            assert_eq!(sequence.running, !sequence.blocks.is_empty());
            sequence.blocks.iter().for_each(|block| assert!(owned.insert(*block), "shared block"));
        }
        for block in &self.scheduler.free {
            assert!(owned.insert(*block), "a free block is owned or free twice");
        }
        assert_eq!(owned.len(), self.limits.blocks, "leaked block");
        assert!(owned.iter().all(|block| (*block as usize) < self.limits.blocks));
        assert!(self.scheduler.occupancy().running <= self.limits.sequences);
        for id in &plan.preempted {
            self.present.get_mut(id).unwrap().computed = 0;
        }
        self.preemptions += plan.preempted.len();
        let waits = |slice: &Slice| {
            let sequence = &self.present[&slice.id];
            sequence.known - sequence.computed == 1
        };
        let waited_for = plan.slices.iter().any(waits);
        let mut decoding = true;
        let mut named = BTreeSet::new();
        for slice in &plan.slices {
            assert!(named.insert(slice.id), "one slice per sequence");
            let most = if waited_for { self.limits.chunk } else { self.limits.rows };
            assert!(!slice.tokens.is_empty() && slice.tokens.len() <= most);
            let expected = &self.present[&slice.id];
            let decodes = expected.known - expected.computed == 1;
            assert!(decoding || !decodes, "decode rows come first");
            decoding &= decodes;
            assert!(slice.blocks.len() * self.limits.block_tokens >= slice.tokens.end);
            assert_eq!(slice.tokens.start, expected.computed, "computed in order, nothing skipped");
            assert_eq!(slice.samples, slice.tokens.end == expected.known);
        }
    }

    /// One step. Returns whether anything was computed.
    fn step(&mut self) -> bool {
        let plan = self.scheduler.plan();
        self.check(&plan);
        for slice in &plan.slices {
            self.scheduler.advance(slice);
            let expected = self.present.get_mut(&slice.id).unwrap();
            expected.computed = slice.tokens.end;
            expected.scored.extend(slice.logits.clone());
            if slice.samples {
                assert_eq!(slice.logits.end, expected.known);
                assert!(slice.logits.contains(&(expected.known - 1)), "the choosing row");
                if expected.known == expected.new.longest {
                    self.finish(slice.id);
                } else {
                    expected.known += 1;
                    self.scheduler.append(slice.id);
                }
            }
        }
        !plan.slices.is_empty()
    }

    fn finish(&mut self, id: SequenceId) {
        let expected = self.present.remove(&id).unwrap();
        let first = if expected.new.prompt_logits { 0 } else { expected.new.prompt - 1 };
        let scored: Vec<usize> = expected.scored.into_iter().collect();
        assert_eq!(scored, (first..expected.known).collect::<Vec<_>>(), "every needed row, no other");
        assert!(self.scheduler.remove(id));
    }
}

#[derive(Clone, Debug)]
enum Action {
    Add { prompt: usize, output: usize, prompt_logits: bool },
    Step,
    Cancel(usize),
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        2 => (1usize..30, 1usize..30, any::<bool>())
            .prop_map(|(prompt, output, prompt_logits)| Action::Add { prompt, output, prompt_logits }),
        5 => Just(Action::Step),
        1 => (0usize..8).prop_map(Action::Cancel),
    ]
}

fn any_limits() -> impl Strategy<Value = Limits> {
    (1usize..9, 1usize..40, 1usize..6, 0usize..20, 1usize..40).prop_map(
        |(block_tokens, blocks, sequences, extra, chunk)| Limits {
            block_tokens,
            blocks,
            rows: sequences + extra,
            chunk,
            sequences,
        },
    )
}

proptest! {
    #[test]
    fn blocks_are_conserved_and_everything_ends(
        limits in any_limits(),
        actions in prop::collection::vec(action(), 1..120),
    ) {
        let scheduler = Scheduler::new(limits).unwrap();
        let mut driver = Driver { scheduler, limits, present: BTreeMap::new(), preemptions: 0 };
        let mut work = 0;
        for (id, action) in actions.into_iter().enumerate() {
            match action {
                Action::Add { prompt, output, prompt_logits } => {
                    let new = NewSequence { id: id as u64, prompt, longest: prompt + output, prompt_logits };
                    let fits = (prompt + output).div_ceil(limits.block_tokens) <= limits.blocks;
                    prop_assert_eq!(driver.scheduler.add(new).is_ok(), fits);
                    if fits {
                        work += prompt + output;
                        driver.present.insert(
                            new.id,
                            Expected { new, known: prompt, computed: 0, scored: BTreeSet::new() },
                        );
                    }
                }
                Action::Step => { driver.step(); }
                Action::Cancel(which) => {
                    if let Some(id) = driver.present.keys().nth(which).copied() {
                        driver.present.remove(&id);
                        prop_assert!(driver.scheduler.remove(id));
                        prop_assert!(!driver.scheduler.remove(id));
                    }
                }
            }
        }
        // The oldest advances in every step in which nothing else does, so this is a generous bound.
        let bound = (work + 1) * (work + 2);
        let mut steps = 0;
        while !driver.present.is_empty() {
            // A plan may be empty only if it preempted; the next one may not.
            prop_assert!(driver.step() || driver.step(), "stuck");
            steps += 1;
            prop_assert!(steps <= bound, "starved");
        }
        prop_assert!(driver.scheduler.is_empty());
        prop_assert_eq!(driver.scheduler.occupancy().blocks_used, 0);
    }
}

#[test]
fn decode_rows_come_before_prefill_chunks() {
    let mut scheduler = Scheduler::new(Limits { rows: 6, chunk: 4, ..limits() }).unwrap();
    scheduler.add(new(1, 2, 8)).unwrap();
    let first = scheduler.plan();
    assert_eq!(first.slices.len(), 1);
    assert_eq!((first.slices[0].tokens.clone(), first.slices[0].logits.clone()), (0..2, 1..2));
    assert_eq!(first.started, [1]);
    scheduler.advance(&first.slices[0]);
    scheduler.append(1);
    scheduler.add(new(2, 10, 12)).unwrap();
    let plan = scheduler.plan();
    let rows: Vec<_> = plan.slices.iter().map(|slice| (slice.id, slice.tokens.clone())).collect();
    assert_eq!(rows, [(1, 2..3), (2, 0..4)]);
    assert_eq!(plan.slices[1].logits, 4..4, "a chunk in the middle needs no logits");
    assert!(!plan.slices[1].samples);
}

#[test]
fn the_youngest_is_preempted_and_resumes_with_its_output() {
    // Eight blocks of four: both are admitted with three blocks each and grow until blocks run out.
    let mut scheduler = Scheduler::new(limits()).unwrap();
    scheduler.add(new(1, 9, 30)).unwrap();
    scheduler.add(new(2, 9, 30)).unwrap();
    let mut known = BTreeMap::from([(1, 9), (2, 9)]);
    let mut preempted_at = None;
    while preempted_at.is_none() {
        let plan = scheduler.plan();
        for slice in &plan.slices {
            scheduler.advance(slice);
            if slice.samples {
                scheduler.append(slice.id);
                *known.get_mut(&slice.id).unwrap() += 1;
            }
        }
        if !plan.preempted.is_empty() {
            assert_eq!(plan.preempted, [2]);
            preempted_at = Some(known[&2]);
        }
    }
    scheduler.remove(1);
    let plan = scheduler.plan();
    assert!(plan.started.is_empty(), "it started long ago");
    assert_eq!((plan.slices[0].id, plan.slices[0].tokens.start), (2, 0));
    let known = preempted_at.unwrap();
    let mut slice = plan.slices[0].clone();
    while !slice.samples {
        assert!(slice.logits.is_empty(), "logits were delivered before");
        scheduler.advance(&slice);
        slice = scheduler.plan().slices[0].clone();
    }
    assert_eq!((slice.tokens.end, slice.logits), (known, known - 1..known));
}

#[test]
fn arrivals_are_not_overtaken() {
    let mut scheduler = Scheduler::new(limits()).unwrap();
    scheduler.add(new(1, 20, 21)).unwrap();
    scheduler.plan();
    scheduler.add(new(2, 20, 21)).unwrap();
    scheduler.add(new(3, 1, 2)).unwrap();
    let plan = scheduler.plan();
    assert!(plan.slices.iter().all(|slice| slice.id == 1), "3 would fit but came after 2");
    assert_eq!(scheduler.occupancy(), Occupancy { running: 1, waiting: 2, blocks_used: 5, blocks: 8 });
}

#[test]
fn what_can_never_run_is_refused() {
    let mut scheduler = Scheduler::new(limits()).unwrap();
    assert_eq!(scheduler.add(new(1, 5, 33)), Err(AddError::TooLong { tokens: 33, capacity: 32 }));
    assert_eq!(scheduler.add(new(1, 0, 3)), Err(AddError::Empty));
    scheduler.add(new(1, 5, 32)).unwrap();
    assert_eq!(scheduler.add(new(1, 5, 32)), Err(AddError::Present(1)));
    assert_eq!(
        Scheduler::new(Limits { chunk: 0, ..limits() }).unwrap_err(),
        LimitsError::Zero("the prefill chunk")
    );
    assert_eq!(
        Scheduler::new(Limits { rows: 3, ..limits() }).unwrap_err(),
        LimitsError::FewRows { sequences: 4, rows: 3 }
    );
}
