//! How fast a backend runs experts whose weights are cold, and how that compares with plain reading.
//!
//! Decoding touches every chosen expert once per token, so weights come from memory, not from a cache: the
//! benchmark walks cyclically through an arena of distinct experts several times the size of the last-level
//! cache. Machines swing with their neighbours, so every line is paired with the read bandwidth measured over
//! the same arena just before and just after it, and reports the ratio. Medians of several samples.
//!
//! `autotable` is the quick version for a node that starts: one number per row count, within a time budget.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::native::ops::Ops;
use super::native::stream::read_gb_s;
use super::{Assignment, KernelError, Kernels, LayerExperts, PartialSums};
use crate::activations::{Activations, row_bytes};
use crate::format::{BLOCK_OUTPUTS, Format};
use crate::packed::PackedExpert;
use crate::region::{Buffer, Bytes};

/// Row counts of the tables.
pub const ROWS: [usize; 5] = [1, 4, 16, 64, 256];

/// Combine step of the made-up experts: small enough for fine sums, far from overflow.
const STEP_LOG2: i8 = -10;

/// A sample runs whole experts until it has lasted this long, so that the clock does not matter.
const SAMPLE: Duration = Duration::from_millis(20);

/// Weights of the quick table: twice a large last-level cache would take longer to make than there is time; this
/// is a few times the cache per core of desktop machines.
const AUTOTABLE_BYTES: usize = 64 << 20;

/// Time the quick table may take, making the weights included.
pub const AUTOTABLE_BUDGET: Duration = Duration::from_millis(200);

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
    /// Samples per line; the median counts.
    pub samples: usize,
    /// Threads of the backends, for the bandwidth beside them.
    pub threads: usize,
}

impl Default for BenchConfig {
    /// One core, the expert shape of TARGETS.md.
    fn default() -> BenchConfig {
        BenchConfig {
            hidden: 2048,
            inter: 768,
            formats: vec![Format::Q4, Format::Q8, Format::Bf16],
            rows: ROWS.to_vec(),
            arena_bytes: 640 << 20,
            samples: 15,
            threads: 1,
        }
    }
}

/// One measured line.
#[derive(Clone, Debug, Serialize)]
pub struct BenchLine {
    /// Backend.
    pub backend: String,
    /// Instruction set or device.
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
    /// `weight_gb_s / read_gb_s`.
    pub ratio: f64,
}

/// All lines.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// Median of all bandwidth measurements.
    pub read_gb_s: f64,
    /// One per format and row count.
    pub results: Vec<BenchLine>,
}

/// Speed at one row count, for a node's report.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RowSpeed {
    /// Rows that one expert computes.
    pub rows: usize,
    /// Packed weight bytes per second, 10^9.
    pub weight_gb_s: f64,
}

/// Distinct experts with random weights.
struct Arena {
    bytes: Bytes,
    format: Format,
    shape: (usize, usize),
    count: usize,
}

impl Arena {
    fn new(format: Format, shape: (usize, usize), bytes: usize) -> Arena {
        let each = format.expert_bytes(shape.0, shape.1);
        let count = bytes.div_ceil(each).clamp(2, usize::from(u16::MAX));
        let mut buffer = Buffer::zeroed(count * each);
        fill(format, &mut buffer);
        Arena { bytes: buffer.into(), format, shape, count }
    }

    fn experts(&self) -> Vec<(u16, PackedExpert)> {
        let (hidden, inter) = self.shape;
        let each = self.format.expert_bytes(hidden, inter);
        let expert = |index: usize| {
            let bytes = self.bytes.slice(index * each, each)?;
            Some((index as u16, PackedExpert { format: self.format, hidden, inter, bytes }))
        };
        (0..self.count).filter_map(expert).collect()
    }
}

/// Random bytes with sane floats: scales of 0.004 to 0.008 (quantized), weights of magnitude below 2^-6 (bf16).
fn fill(format: Format, bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let (keep, set) = match format {
        Format::Bf16 => (0x807f_807f_807f_807f, 0x3c00_3c00_3c00_3c00),
        Format::Q8 | Format::Q4 => (u64::MAX, 0),
    };
    for word in bytes.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = (state & keep | set).to_le_bytes();
    }
    if format.is_quantized() {
        let size = format.group_bytes();
        for group in bytes.chunks_exact_mut(size) {
            for scale in group[size - 2 * BLOCK_OUTPUTS..].as_chunks_mut::<2>().0 {
                let bits = u16::from_le_bytes(*scale);
                *scale = (0x1c00 | bits & 0x3ff).to_le_bytes();
            }
        }
    }
}

/// A loaded arena and a batch of rows to send through its experts, one after the other.
struct Runner {
    experts: std::sync::Arc<dyn LayerExperts>,
    count: usize,
    next: usize,
    format: Format,
    hidden: usize,
    batch: Buffer,
    assignments: Vec<Assignment>,
    sums: PartialSums,
}

impl Runner {
    fn new(kernels: &dyn Kernels, arena: &Arena) -> Result<Runner, KernelError> {
        Ok(Runner {
            experts: kernels.experts(arena.experts(), STEP_LOG2)?,
            count: arena.count,
            next: 0,
            format: arena.format,
            hidden: arena.shape.0,
            batch: Buffer::zeroed(0),
            assignments: Vec::new(),
            sums: PartialSums::default(),
        })
    }

    fn set_rows(&mut self, rows: usize) -> Result<(), KernelError> {
        let values: Vec<f32> =
            (0..rows * self.hidden).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();
        self.batch = Buffer::zeroed(rows * row_bytes(self.format, self.hidden));
        Ops::default()
            .fill_rows(self.format, self.hidden, &values, &mut self.batch)
            .map_err(|e| KernelError::Call(e.to_string()))?;
        self.assignments = (0..rows as u32).map(|row| Assignment { row, expert: 0, weight: 0.125 }).collect();
        Ok(())
    }

    /// Runs the next expert and returns the time it took.
    fn step(&mut self) -> Result<Duration, KernelError> {
        self.next = (self.next + 1) % self.count;
        self.assignments.iter_mut().for_each(|a| a.expert = self.next as u16);
        let rows = self.assignments.len();
        let x = Activations::new(self.format, rows, self.hidden, &self.batch)
            .ok_or_else(|| KernelError::Call("the benchmark's rows do not fit".to_owned()))?;
        let start = Instant::now();
        self.experts.run(x, &self.assignments, &mut self.sums)?;
        Ok(start.elapsed())
    }

    /// Seconds per expert over at least `at_least`, and how many ran.
    fn sample(&mut self, at_least: Duration) -> Result<f64, KernelError> {
        let (mut total, mut runs) = (Duration::ZERO, 0);
        while total < at_least || runs == 0 {
            total += self.step()?;
            runs += 1;
        }
        Ok(total.as_secs_f64() / f64::from(runs))
    }
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}

/// Measures one backend. Takes seconds per line. `progress` gets each line as it is measured.
pub fn bench(
    kernels: &dyn Kernels,
    config: &BenchConfig,
    progress: &mut dyn FnMut(&BenchLine),
) -> Result<BenchReport, KernelError> {
    let mut reads = Vec::new();
    let mut results = Vec::new();
    for &format in &config.formats {
        let arena = Arena::new(format, (config.hidden, config.inter), config.arena_bytes);
        let mut runner = Runner::new(kernels, &arena)?;
        let read = || median(&mut [(); 3].map(|()| read_gb_s(&arena.bytes, config.threads)));
        let mut before = read();
        reads.push(before);
        for &rows in &config.rows {
            runner.set_rows(rows)?;
            runner.step()?;
            let mut samples = Vec::new();
            let start = Instant::now();
            // Slow backends (scalar code) get fewer samples: their noise is small beside their time.
            while samples.len() < config.samples && (samples.len() < 3 || start.elapsed() < SAMPLE * 100) {
                samples.push(runner.sample(SAMPLE)?);
            }
            let after = read();
            reads.push(after);
            let line = line(kernels, config, (format, rows), (median(&mut samples), (before + after) / 2.0));
            progress(&line);
            results.push(line);
            before = after;
        }
    }
    Ok(BenchReport { read_gb_s: median(&mut reads), results })
}

fn line(
    kernels: &dyn Kernels,
    config: &BenchConfig,
    (format, rows): (Format, usize),
    (seconds, read_gb_s): (f64, f64),
) -> BenchLine {
    let weight_gb_s = format.expert_bytes(config.hidden, config.inter) as f64 / seconds / 1e9;
    BenchLine {
        backend: kernels.name().to_owned(),
        isa: kernels.isa(),
        format,
        rows,
        weight_gb_s,
        gflops: 6.0 * (config.hidden * config.inter * rows) as f64 / seconds / 1e9,
        read_gb_s,
        ratio: weight_gb_s / read_gb_s,
    }
}

/// Speed at the row counts of `ROWS`, in at most about `AUTOTABLE_BUDGET`. Where the time is up (slow machines,
/// many rows) the rest is extrapolated as limited by arithmetic: the same operations per second as the last
/// measured count.
pub fn autotable(
    kernels: &dyn Kernels,
    shape: (usize, usize),
    format: Format,
) -> Result<[RowSpeed; ROWS.len()], KernelError> {
    let start = Instant::now();
    let arena = Arena::new(format, shape, AUTOTABLE_BYTES);
    let mut runner = Runner::new(kernels, &arena)?;
    let bytes = format.expert_bytes(shape.0, shape.1) as f64;
    let mut table = [RowSpeed { rows: 0, weight_gb_s: 0.0 }; ROWS.len()];
    let mut per_row = 0.0;
    for (index, &rows) in ROWS.iter().enumerate() {
        let left = AUTOTABLE_BUDGET.saturating_sub(start.elapsed()).as_secs_f64();
        let predicted = per_row * rows as f64;
        let seconds = if index > 0 && 2.0 * predicted > left {
            predicted
        } else {
            runner.set_rows(rows)?;
            runner.step()?;
            let share = Duration::from_secs_f64(left / (2 * (ROWS.len() - index)) as f64);
            let (begin, mut steps) = (Instant::now(), Vec::new());
            while steps.is_empty() || begin.elapsed() < share {
                steps.push(runner.step()?.as_secs_f64());
            }
            median(&mut steps)
        };
        per_row = seconds / rows as f64;
        table[index] = RowSpeed { rows, weight_gb_s: bytes / seconds / 1e9 };
    }
    Ok(table)
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

    #[test]
    fn a_report_has_every_line_and_consistent_figures() {
        let native = Native::new(NativeConfig::threads(1)).unwrap();
        let config = BenchConfig {
            hidden: 64,
            inter: 64,
            rows: vec![1, 3],
            arena_bytes: 1 << 20,
            samples: 1,
            ..BenchConfig::default()
        };
        let mut seen = 0;
        let report = bench(&native, &config, &mut |_| seen += 1).unwrap();
        assert_eq!((report.results.len(), seen), (6, 6));
        for line in &report.results {
            let operations = 6.0 * (64 * 64 * line.rows) as f64;
            let bytes = line.format.expert_bytes(64, 64) as f64;
            assert!((line.gflops / line.weight_gb_s - operations / bytes).abs() < 1e-6 * operations / bytes);
            assert!((line.ratio - line.weight_gb_s / line.read_gb_s).abs() < 1e-9);
        }
    }

    #[test]
    fn the_quick_table_covers_all_row_counts() {
        let native = Native::new(NativeConfig::threads(1)).unwrap();
        let table = autotable(&native, (96, 64), Format::Q4).unwrap();
        assert_eq!(table.map(|speed| speed.rows), ROWS);
        assert!(table.iter().all(|speed| speed.weight_gb_s > 0.0 && speed.weight_gb_s.is_finite()));
    }
}
