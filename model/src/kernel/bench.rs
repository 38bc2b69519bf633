//! How fast backends run experts whose weights are cold, and how that compares with plain reading.
//!
//! Decoding touches every chosen expert once per token, so weights come from memory, not from a cache: the
//! benchmark walks cyclically through an arena of distinct experts several times the size of the last-level
//! cache. Machines swing with their neighbours by a factor of two, so nothing is measured for long: read, one
//! contender, read, the next contender, and again from the start. A contender's ratio is taken against the reads just
//! before and just after it; comparisons between contenders are of samples of the same round; medians of all
//! rounds count. A neighbour then disturbs both sides or one round of many.
//!
//! `fastest` holds the quick version for a program that starts.

mod arena;

use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

pub use self::arena::Subject;
pub(super) use self::arena::{Arena, ExpertRunner, LinearRunner};
use super::native::stream::read_gb_s;
use super::{KernelError, Kernels, measure};
use crate::format::Format;
use crate::region::Buffer;

/// Row counts of the tables: those of `measure`.
pub const ROWS: [usize; measure::ROWS.len()] = {
    let [a, b, c, d, e] = measure::ROWS;
    [a as usize, b as usize, c as usize, d as usize, e as usize]
};

/// A sample runs whole experts until it has lasted this long, so that the clock does not matter.
const SAMPLE: Duration = Duration::from_millis(10);

/// Rounds of one format and row count take at most this long, unless that would leave fewer than `ROUNDS_MIN`.
const LINE_TIME: Duration = Duration::from_millis(3000);

/// The fewest rounds with a median that one disturbed round does not move.
const ROUNDS_MIN: usize = 3;

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchConfig {
    /// Width of a row.
    pub hidden: usize,
    /// Width of an expert.
    pub inter: usize,
    /// Formats.
    pub formats: Vec<Format>,
    /// Rows per expert.
    pub rows: Vec<usize>,
    /// Bytes of distinct experts: several times the last-level cache.
    pub arena_bytes: usize,
    /// Rounds per format and row count.
    pub rounds: usize,
    /// Threads of the backends, for the bandwidth beside them.
    pub threads: usize,
}

impl Default for BenchConfig {
    /// One core, the expert shape of Qwen3-30B-A3B.
    fn default() -> BenchConfig {
        BenchConfig {
            hidden: 2048,
            inter: 768,
            formats: vec![Format::Q4, Format::Q8, Format::Bf16],
            rows: ROWS.to_vec(),
            arena_bytes: 320 << 20,
            rounds: 11,
            threads: 1,
        }
    }
}

/// Makes the yardstick for experts of a shape from so many bytes of weights.
pub type MakeSubject = Box<dyn Fn((usize, usize), usize) -> Result<Box<dyn Subject>, KernelError>>;

#[cfg(feature = "torch")]
impl Subject for super::libtorch::PlainMatmul {
    fn set_rows(&mut self, rows: usize) -> Result<(), KernelError> {
        super::libtorch::PlainMatmul::set_rows(self, rows)
    }

    fn step(&mut self) -> Result<Duration, KernelError> {
        super::libtorch::PlainMatmul::step(self)
    }
}

/// What takes part.
pub enum Contender {
    /// A backend, for every format.
    Backend(Arc<dyn Kernels>),
    /// Bare products of bf16 weights with an expert's shapes, measured beside the first format for comparison.
    Plain {
        /// As printed in the column of backends.
        name: String,
        /// Makes it.
        make: MakeSubject,
    },
}

impl std::fmt::Debug for Contender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.names().0)
    }
}

impl Contender {
    fn names(&self) -> (String, String) {
        match self {
            Contender::Backend(kernels) => (kernels.name().to_owned(), kernels.isa()),
            Contender::Plain { name, .. } => (name.clone(), "-".to_owned()),
        }
    }
}

/// One measured line.
#[derive(Clone, Debug, Serialize)]
pub struct BenchLine {
    /// Backend.
    pub backend: String,
    /// Instruction set, device or operators.
    pub isa: String,
    /// Weight format.
    pub format: Format,
    /// Rows that one expert computes.
    pub rows: usize,
    /// Packed weight bytes per second, 10^9.
    pub weight_gb_s: f64,
    /// 6 hidden inter rows operations per expert, 10^9 per second.
    pub gflops: f64,
    /// Bandwidth measured around this line.
    pub read_gb_s: f64,
    /// `weight_gb_s / read_gb_s`, the median of the rounds' ratios.
    pub ratio: f64,
    /// Seconds per expert in each round, for comparisons between lines of one format and row count.
    #[serde(skip)]
    pub seconds: Vec<f64>,
}

/// All lines.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// Median of all bandwidth measurements.
    pub read_gb_s: f64,
    /// One per format, row count and contender.
    pub results: Vec<BenchLine>,
}

impl BenchReport {
    /// How many times as many operations per second `ours` does as `theirs`: the median over the rounds in which both
    /// were measured. `None` unless both are lines of one format and row count.
    pub fn speedup(ours: &BenchLine, theirs: &BenchLine) -> Option<f64> {
        if ours.rows != theirs.rows || ours.seconds.is_empty() || theirs.seconds.is_empty() {
            return None;
        }
        let mut ratios: Vec<f64> =
            ours.seconds.iter().zip(&theirs.seconds).map(|(ours, theirs)| theirs / ours).collect();
        Some(median(&mut ratios))
    }
}

/// The middle value; the mean of the middle two of an even number, 0 of none.
pub(super) fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

/// Seconds per step over at least `at_least`.
fn sample(subject: &mut dyn Subject, at_least: Duration) -> Result<f64, KernelError> {
    let (mut total, mut steps) = (Duration::ZERO, 0);
    while total < at_least || steps == 0 {
        total += subject.step()?;
        steps += 1;
    }
    Ok(total.as_secs_f64() / f64::from(steps))
}

/// A contender with its weights loaded, and its samples at one row count.
struct Entry<'a> {
    contender: &'a Contender,
    format: Format,
    subject: Box<dyn Subject>,
    seconds: Vec<f64>,
    reads: Vec<f64>,
}

/// Measures all contenders against each other. Takes seconds per format and row count. `progress` gets each line as
/// it is measured.
///
/// # Errors
/// What a backend says when it does not take the weights or fails.
pub fn bench(
    contenders: &[Contender],
    config: &BenchConfig,
    progress: &mut dyn FnMut(&BenchLine),
) -> Result<BenchReport, KernelError> {
    let mut reads = Vec::new();
    let mut results = Vec::new();
    let shape = (config.hidden, config.inter);
    for (index, &format) in config.formats.iter().enumerate() {
        let arena = Arena::new(format, format.expert_bytes(shape.0, shape.1), config.arena_bytes);
        let mut entries = Vec::new();
        for contender in contenders {
            let (subject, format): (Box<dyn Subject>, Format) = match contender {
                Contender::Backend(kernels) => {
                    (Box::new(ExpertRunner::new(&**kernels, &arena, shape)?), format)
                }
                Contender::Plain { .. } if index > 0 => continue,
                Contender::Plain { make, .. } => (make(shape, config.arena_bytes)?, Format::Bf16),
            };
            entries.push(Entry { contender, format, subject, seconds: Vec::new(), reads: Vec::new() });
        }
        for &rows in &config.rows {
            rounds(&mut entries, &arena, rows, config)?;
            for entry in &mut entries {
                reads.extend(&entry.reads);
                let line = line(entry, config, rows);
                progress(&line);
                results.push(line);
            }
        }
    }
    Ok(BenchReport { read_gb_s: median(&mut reads), results })
}

/// Takes the samples of all entries at one row count.
fn rounds(
    entries: &mut [Entry<'_>],
    arena: &Arena,
    rows: usize,
    config: &BenchConfig,
) -> Result<(), KernelError> {
    for entry in &mut *entries {
        entry.subject.set_rows(rows)?;
        entry.subject.step()?;
        (entry.seconds, entry.reads) = (Vec::new(), Vec::new());
    }
    let start = Instant::now();
    let mut before = read_gb_s(&arena.bytes, config.threads);
    for round in 0..config.rounds {
        if round >= ROUNDS_MIN && start.elapsed() > LINE_TIME {
            break;
        }
        for entry in &mut *entries {
            entry.seconds.push(sample(&mut *entry.subject, SAMPLE)?);
            let after = read_gb_s(&arena.bytes, config.threads);
            entry.reads.push(f64::midpoint(before, after));
            before = after;
        }
    }
    Ok(())
}

fn line(entry: &mut Entry<'_>, config: &BenchConfig, rows: usize) -> BenchLine {
    let (backend, isa) = entry.contender.names();
    let bytes = entry.format.expert_bytes(config.hidden, config.inter) as f64;
    let mut ratios: Vec<f64> =
        entry.seconds.iter().zip(&entry.reads).map(|(seconds, read)| bytes / seconds / 1e9 / read).collect();
    let seconds = median(&mut entry.seconds.clone());
    BenchLine {
        backend,
        isa,
        format: entry.format,
        rows,
        weight_gb_s: bytes / seconds / 1e9,
        gflops: 6.0 * (config.hidden * config.inter * rows) as f64 / seconds / 1e9,
        read_gb_s: median(&mut entry.reads.clone()),
        ratio: median(&mut ratios),
        seconds: std::mem::take(&mut entry.seconds),
    }
}

/// Bytes that `read_bandwidth_gb_s` reads: several times the last-level cache.
const READ_BYTES: usize = 512 << 20;

/// Gigabytes (10^9) per second that `threads` threads read from memory: the limit of decoding. The median of five
/// passes over half a gigabyte.
pub fn read_bandwidth_gb_s(threads: usize) -> f64 {
    let mut buffer = Buffer::zeroed(READ_BYTES);
    // Written once: pages that were never touched are all the same zero page, which lies in the cache.
    buffer.fill(1);
    median(&mut [(); 5].map(|()| read_gb_s(&buffer, threads)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::native::{Native, NativeConfig};

    struct Fixed(Duration);

    impl Subject for Fixed {
        fn set_rows(&mut self, _: usize) -> Result<(), KernelError> {
            Ok(())
        }

        fn step(&mut self) -> Result<Duration, KernelError> {
            Ok(self.0)
        }
    }

    fn config() -> BenchConfig {
        BenchConfig {
            hidden: 64,
            inter: 64,
            rows: vec![1, 3],
            arena_bytes: 1 << 20,
            rounds: 2,
            ..BenchConfig::default()
        }
    }

    #[test]
    fn a_report_has_every_line_and_consistent_figures() {
        let native = Arc::new(Native::new(NativeConfig::threads(1)).unwrap());
        let make: MakeSubject = Box::new(|_, _| Ok(Box::new(Fixed(Duration::from_millis(40)))));
        let contenders =
            [Contender::Backend(native), Contender::Plain { name: "forty milliseconds".to_owned(), make }];
        let mut seen = 0;
        let report = bench(&contenders, &config(), &mut |_| seen += 1).unwrap();
        // Three formats of two row counts, and the yardstick beside the first format.
        assert_eq!((report.results.len(), seen), (8, 8));
        for line in &report.results {
            let operations = 6.0 * (64 * 64 * line.rows) as f64;
            let bytes = line.format.expert_bytes(64, 64) as f64;
            assert!((line.gflops / line.weight_gb_s - operations / bytes).abs() < 1e-6 * operations / bytes);
            assert_eq!(line.seconds.len(), 2);
        }
        for pair in report.results[..4].chunks_exact(2) {
            assert_eq!((pair[0].rows, pair[1].format), (pair[1].rows, Format::Bf16));
            assert_eq!(pair[1].seconds, [0.04; 2]);
            let operations = 6.0 * (64 * 64 * pair[1].rows) as f64;
            assert!((pair[1].gflops - operations / 0.04e9).abs() < 1e-9 * operations);
            let speedup = BenchReport::speedup(&pair[0], &pair[1]).unwrap();
            let mut by_hand: Vec<f64> = pair[0].seconds.iter().map(|s| 0.04 / s).collect();
            assert!((speedup - median(&mut by_hand)).abs() < 1e-9 * speedup);
        }
        assert_eq!(BenchReport::speedup(&report.results[0], &report.results[2]), None, "other row counts");
    }

    #[test]
    fn the_median_is_not_moved_by_one_of_three() {
        assert_eq!(median(&mut [3.0, 1000.0, 1.0]), 3.0);
        assert_eq!(median(&mut [1.0, 2.0]), 1.5);
        assert_eq!(median(&mut []), 0.0);
    }
}
