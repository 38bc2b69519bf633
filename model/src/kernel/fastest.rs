//! Several backends over the same packed bytes, and the one that was fastest here for each number of rows.
//!
//! Problem: which kernel wins depends on the machine and on how many rows an expert gets: streaming code for one row,
//! matrix units for hundreds. Idea: at start, in under a second, time every candidate on experts and on a matrix of the
//! model's shapes at the row counts of `ROWS`, one after the other in rounds so that a noisy neighbour disturbs all of
//! them; from then on each call goes, expert by expert, to the winner for its number of rows. Only backends that won
//! somewhere load weights; those that compute from packed bytes share them.
//!
//! Price: candidates differ in their last bits, so results depend on the machine, the day and the batch: `exact` is
//! false unless every winner is exact. Shapes other than the timed ones follow the same table. Refuses: nothing of its
//! own; the candidates do.

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::bench::{Arena, ExpertRunner, LinearRunner, ROWS, Subject, median};
use super::{Assignment, KernelError, Kernels, LayerExperts, Linear, PartialSums};
use crate::activations::Activations;
use crate::format::{Format, GROUP};
use crate::packed::{PackedExpert, PackedMatrix};

/// Time for the table of experts, loading the sample included.
const EXPERTS_TIME: Duration = Duration::from_millis(600);

/// Time for the table of matrices.
const MATRICES_TIME: Duration = Duration::from_millis(350);

/// Weights that each table is measured on: a few times a second-level cache. More would take longer to repack for
/// libtorch's operators than there is time.
const SAMPLE_BYTES: usize = 12 << 20;

/// Weights of one expert or matrix of the sample; wider ones are measured on a part, since kernels are as fast per
/// weight from here on.
const WEIGHTS_MAX: usize = 5 << 20;

/// Rounds with a median that one disturbed round does not move; more are not taken.
const ROUNDS: usize = 5;

/// What a model asks of its kernels.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// Weight format.
    pub format: Format,
    /// An expert: hidden, inter.
    pub expert: (usize, usize),
    /// A typical matrix: outputs, inputs.
    pub matrix: (usize, usize),
}

/// The winner for one number of rows.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choice {
    /// Rows that one expert or matrix computes.
    pub rows: usize,
    /// Backend and instruction set, device or operators.
    pub chosen: String,
    /// Packed weight bytes per second (10^9) of every candidate, in the order of `Choices::candidates`.
    pub weight_gb_s: Vec<f64>,
    /// Whether that was measured, or follows from fewer rows because the time was up.
    pub measured: bool,
    #[serde(skip)]
    winner: usize,
}

/// What was measured and chosen.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Choices {
    /// Names of the candidates.
    pub candidates: Vec<String>,
    /// For experts, in the order of `ROWS`.
    pub experts: Vec<Choice>,
    /// For matrices, in the order of `ROWS`.
    pub matrices: Vec<Choice>,
    /// Milliseconds that measuring took.
    pub measured_ms: f64,
}

/// Which entry of a table serves `rows` rows: the nearest by ratio.
fn entry(rows: usize) -> usize {
    ROWS.windows(2).take_while(|pair| rows * rows >= pair[0] * pair[1]).count()
}

/// Several backends and a table.
#[derive(Debug)]
pub struct Fastest {
    name: &'static str,
    candidates: Vec<Arc<dyn Kernels>>,
    choices: Choices,
    space: Arc<Mutex<Space>>,
}

/// Memory that calls which are split between backends reuse.
#[derive(Debug, Default)]
struct Space {
    /// Rows per expert, by index.
    counts: Vec<u32>,
    parts: Vec<Vec<Assignment>>,
    sums: PartialSums,
    wide: Vec<i64>,
}

fn title(kernels: &dyn Kernels) -> String {
    format!("{} {}", kernels.name(), kernels.isa())
}

/// Seconds per step of every candidate, by row count, and whether they were measured.
type Times = Vec<(Vec<f64>, bool)>;

/// Times the subjects against each other until `deadline`. Where the time does not allow another row count, times are
/// extrapolated as limited by arithmetic: the same operations per second as at the last count.
fn race(subjects: &mut [Box<dyn Subject>], deadline: Instant) -> Result<Times, KernelError> {
    let mut times: Times = Vec::new();
    for (index, &rows) in ROWS.iter().enumerate() {
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / (ROWS.len() - index) as u32;
        if let Some((last, _)) = times.last() {
            let grown = |seconds: &f64| seconds * rows as f64 / ROWS[index - 1] as f64;
            let expected: Vec<f64> = last.iter().map(grown).collect();
            // One round to warm up, one that counts.
            if 2.0 * expected.iter().sum::<f64>() > left.as_secs_f64() {
                times.push((expected, false));
                continue;
            }
        }
        for subject in &mut *subjects {
            subject.set_rows(rows)?;
            subject.step()?;
        }
        let (start, mut samples) = (Instant::now(), vec![Vec::new(); subjects.len()]);
        for round in 0..ROUNDS {
            if round > 0 && start.elapsed() > share {
                break;
            }
            for (subject, samples) in subjects.iter_mut().zip(&mut samples) {
                samples.push(subject.step()?.as_secs_f64());
            }
        }
        times.push((samples.iter_mut().map(|samples| median(samples)).collect(), true));
    }
    Ok(times)
}

/// The table of one kind of product with `bytes` of weights per step.
fn choose(names: &[String], times: Times, bytes: usize) -> Vec<Choice> {
    let choice = |(rows, (seconds, measured)): (&usize, (Vec<f64>, bool))| {
        let winner = (0..seconds.len()).min_by(|a, b| seconds[*a].total_cmp(&seconds[*b])).unwrap_or(0);
        let weight_gb_s = seconds.iter().map(|seconds| bytes as f64 / seconds / 1e9).collect();
        Choice { rows: *rows, chosen: names[winner].clone(), weight_gb_s, measured, winner }
    };
    ROWS.iter().zip(times).map(choice).collect()
}

/// `(rows, columns)` with fewer rows (at least one group) where it has more than `WEIGHTS_MAX` weights.
fn reduced(rows: usize, columns: usize, per_row: usize) -> usize {
    let most = WEIGHTS_MAX / (columns * per_row).max(1);
    rows.min((most / GROUP * GROUP).max(GROUP))
}

impl Fastest {
    /// Times `candidates` (at least one; the first wins ties) on `workload`. Takes up to a second; `name` is what the
    /// result calls itself.
    ///
    /// # Errors
    /// What a candidate says when it does not take the sample or fails on it.
    pub fn measure(
        name: &'static str,
        candidates: Vec<Arc<dyn Kernels>>,
        workload: Workload,
    ) -> Result<Fastest, KernelError> {
        let start = Instant::now();
        if candidates.is_empty() {
            return Err(KernelError::Backend {
                backend: name,
                reason: "no backend to choose from".to_owned(),
            });
        }
        let names: Vec<String> = candidates.iter().map(|kernels| title(&**kernels)).collect();
        let Workload { format, expert: (hidden, inter), matrix: (outputs, inputs) } = workload;

        let expert = (hidden, reduced(inter, hidden, 3));
        let bytes = format.expert_bytes(expert.0, expert.1);
        let arena = Arena::new(format, bytes, SAMPLE_BYTES);
        let runner = |kernels: &Arc<dyn Kernels>| -> Result<Box<dyn Subject>, KernelError> {
            Ok(Box::new(ExpertRunner::new(&**kernels, &arena, expert)?))
        };
        let mut subjects = candidates.iter().map(runner).collect::<Result<Vec<_>, _>>()?;
        let experts = choose(&names, race(&mut subjects, start + EXPERTS_TIME)?, bytes);
        drop(subjects);

        let begin = Instant::now();
        let matrix = (reduced(outputs, inputs, 1), inputs);
        let bytes = format.matrix_bytes(matrix.0, matrix.1);
        let arena = Arena::new(format, bytes, SAMPLE_BYTES);
        let runner = |kernels: &Arc<dyn Kernels>| -> Result<Box<dyn Subject>, KernelError> {
            Ok(Box::new(LinearRunner::new(&**kernels, &arena, matrix)?))
        };
        let mut subjects = candidates.iter().map(runner).collect::<Result<Vec<_>, _>>()?;
        let matrices = choose(&names, race(&mut subjects, begin + MATRICES_TIME)?, bytes);
        drop(subjects);

        let measured_ms = start.elapsed().as_secs_f64() * 1e3;
        let choices = Choices { candidates: names, experts, matrices, measured_ms };
        let fastest = Fastest { name, candidates, choices, space: Arc::default() };
        tracing::info!(ms = measured_ms as u64, "{name}: {}", fastest.isa());
        Ok(fastest)
    }

    /// What was measured and chosen.
    pub fn choices(&self) -> &Choices {
        &self.choices
    }

    fn winners(choices: &[Choice]) -> [usize; ROWS.len()] {
        std::array::from_fn(|index| choices.get(index).map_or(0, |choice| choice.winner))
    }
}

/// `native avx512 to 16 rows, libtorch to bf16 from 64`.
fn described(choices: &[Choice]) -> String {
    let runs: Vec<&[Choice]> = choices.chunk_by(|a, b| a.winner == b.winner).collect();
    let last = runs.len().saturating_sub(1);
    let part = |(index, run): (usize, &&[Choice])| match (run.first(), run.last()) {
        (Some(first), _) if index == last && index > 0 => format!("{} from {}", first.chosen, first.rows),
        (Some(first), Some(_)) if last == 0 => first.chosen.clone(),
        (Some(first), Some(end)) => format!("{} to {} rows", first.chosen, end.rows),
        _ => String::new(),
    };
    runs.iter().enumerate().map(part).collect::<Vec<_>>().join(", ")
}

impl Kernels for Fastest {
    fn name(&self) -> &'static str {
        self.name
    }

    fn isa(&self) -> String {
        let (experts, matrices) = (described(&self.choices.experts), described(&self.choices.matrices));
        if experts == matrices {
            return format!("({experts})");
        }
        format!("(experts: {experts}; matrices: {matrices})")
    }

    fn exact(&self) -> bool {
        let all = self.choices.experts.iter().chain(&self.choices.matrices);
        all.into_iter()
            .all(|choice| self.candidates.get(choice.winner).is_some_and(|kernels| kernels.exact()))
    }

    fn linear(&self, matrix: PackedMatrix) -> Result<Box<dyn Linear>, KernelError> {
        let winners = Fastest::winners(&self.choices.matrices);
        let outputs = matrix.outputs;
        let load = |kernels: &dyn Kernels| kernels.linear(matrix.clone());
        let loaded = load_winners(&self.candidates, &winners, load)?;
        Ok(Box::new(FastestLinear { outputs, winners, loaded }))
    }

    fn experts(
        &self,
        experts: Vec<(u16, PackedExpert)>,
        step_log2: i8,
    ) -> Result<Arc<dyn LayerExperts>, KernelError> {
        let winners = Fastest::winners(&self.choices.experts);
        let load = |kernels: &dyn Kernels| kernels.experts(experts.clone(), step_log2);
        let loaded = load_winners(&self.candidates, &winners, load)?;
        Ok(Arc::new(FastestExperts { winners, loaded, space: Arc::clone(&self.space) }))
    }
}

/// Loads weights into every candidate that won somewhere, in their order.
fn load_winners<T>(
    candidates: &[Arc<dyn Kernels>],
    winners: &[usize],
    load: impl Fn(&dyn Kernels) -> Result<T, KernelError>,
) -> Result<Vec<Option<T>>, KernelError> {
    let one = |(index, kernels): (usize, &Arc<dyn Kernels>)| {
        winners.contains(&index).then(|| load(&**kernels)).transpose()
    };
    candidates.iter().enumerate().map(one).collect()
}

/// A table without the backend it names: a bug, but no reason to end the process.
fn lost() -> KernelError {
    KernelError::Backend { backend: "fastest", reason: "the chosen backend holds no weights".to_owned() }
}

#[derive(Debug)]
struct FastestLinear {
    outputs: usize,
    winners: [usize; ROWS.len()],
    loaded: Vec<Option<Box<dyn Linear>>>,
}

impl Linear for FastestLinear {
    fn outputs(&self) -> usize {
        self.outputs
    }

    fn apply(&self, x: Activations<'_>, y: &mut [f32]) -> Result<(), KernelError> {
        let winner = self.winners[entry(x.rows())];
        self.loaded.get(winner).and_then(Option::as_ref).ok_or_else(lost)?.apply(x, y)
    }
}

#[derive(Debug)]
struct FastestExperts {
    winners: [usize; ROWS.len()],
    loaded: Vec<Option<Arc<dyn LayerExperts>>>,
    space: Arc<Mutex<Space>>,
}

impl FastestExperts {
    fn of(&self, winner: usize) -> Result<&dyn LayerExperts, KernelError> {
        self.loaded.get(winner).and_then(Option::as_deref).ok_or_else(lost)
    }

    /// The backend for all assignments, if it is one; else `parts` holds those of each.
    fn split(&self, assignments: &[Assignment], space: &mut Space) -> Option<usize> {
        let Space { counts, parts, .. } = space;
        let most = assignments.iter().map(|a| usize::from(a.expert) + 1).max().unwrap_or(0);
        counts.clear();
        counts.resize(most, 0);
        assignments.iter().for_each(|a| counts[usize::from(a.expert)] += 1);
        let winner = |a: &Assignment| self.winners[entry(counts[usize::from(a.expert)] as usize)];
        let first = assignments.first().map_or(self.winners[0], winner);
        if assignments.iter().all(|a| winner(a) == first) {
            return Some(first);
        }
        parts.iter_mut().for_each(Vec::clear);
        parts.resize_with(self.loaded.len(), Vec::new);
        assignments.iter().for_each(|a| parts[winner(a)].push(*a));
        None
    }
}

/// Adds `part` to `sums`; a row that leaves i32 is flagged like one that a backend flagged.
fn merge(sums: &mut PartialSums, part: &PartialSums, hidden: usize) {
    let rows = sums.sums.chunks_exact_mut(hidden).zip(part.sums.chunks_exact(hidden));
    let flags = sums.overflowed.iter_mut().zip(&part.overflowed);
    for ((to, from), (flag, other)) in rows.zip(flags) {
        let mut wrapped = *flag | other;
        for (to, from) in to.iter_mut().zip(from) {
            let (sum, over) = to.overflowing_add(*from);
            *to = sum;
            wrapped |= over;
        }
        if wrapped {
            *flag = true;
            to.fill(0);
        }
    }
}

impl LayerExperts for FastestExperts {
    fn holds(&self, index: u16) -> bool {
        self.loaded.iter().flatten().next().is_some_and(|experts| experts.holds(index))
    }

    fn run(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut PartialSums,
    ) -> Result<(), KernelError> {
        let mut space = self.space.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(winner) = self.split(assignments, &mut space) {
            drop(space);
            return self.of(winner)?.run(x, assignments, out);
        }
        let Space { parts, sums, .. } = &mut *space;
        out.reset(x.rows(), x.inputs());
        for (winner, part) in parts.iter().enumerate().filter(|(_, part)| !part.is_empty()) {
            self.of(winner)?.run(x, part, sums)?;
            merge(out, sums, x.inputs());
        }
        Ok(())
    }

    fn run_wide(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut Vec<i64>,
    ) -> Result<(), KernelError> {
        let mut space = self.space.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(winner) = self.split(assignments, &mut space) {
            drop(space);
            return self.of(winner)?.run_wide(x, assignments, out);
        }
        let Space { parts, wide, .. } = &mut *space;
        out.clear();
        out.resize(x.rows() * x.inputs(), 0);
        for (winner, part) in parts.iter().enumerate().filter(|(_, part)| !part.is_empty()) {
            self.of(winner)?.run_wide(x, part, wide)?;
            out.iter_mut().zip(wide.iter()).for_each(|(to, from)| *to = to.saturating_add(*from));
        }
        Ok(())
    }
}
