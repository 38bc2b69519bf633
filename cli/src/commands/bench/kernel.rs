//! `moemesh bench kernel`: expert kernels against the machine's reads and against each other.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::ensure;
use clap::Args;
use model::format::{Format, GROUP};
use model::kernel::Kernels;
use model::kernel::bench::{BenchConfig, BenchLine, BenchReport, Contender, bench};
use model::kernel::fastest::{Choices, Fastest, Workload};
use model::kernel::native::{ISA_VARIABLE, Isa, Native, NativeConfig};
#[cfg(feature = "torch")]
use model::kernel::{bench::MakeSubject, libtorch::PlainMatmul};
use serde::Serialize;

use crate::model_options::{threads, warn_if_crowded};
use crate::output;

/// Widths of rows and experts at most: beyond any model, and an arena still fits into memory.
const WIDTH_MAX: usize = 65536;

/// Rows per expert at most: a longer batch is cut before it reaches an expert.
const ROWS_MAX: usize = 4096;

/// Name of the yardstick for many rows.
#[cfg(feature = "torch")]
const PLAIN: &str = "torch bf16 matmul";

/// Options of `moemesh bench kernel`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Threads per backend; pin the process with taskset for figures of one core
    #[arg(long, default_value_t = 1, value_parser = threads())]
    threads: usize,
    /// Formats to measure
    #[arg(long, value_delimiter = ',', default_value = "q4,q8,bf16")]
    formats: Vec<Format>,
    /// Rows per expert to measure
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64,256")]
    rows: Vec<usize>,
    /// Instruction sets of the native kernels [default: that of MOEMESH_ISA, else all this machine has
    /// but scalar]
    #[arg(long, value_delimiter = ',', value_parser = isa)]
    isa: Vec<Isa>,
    /// Leave libtorch out
    #[arg(long)]
    no_libtorch: bool,
    /// Width of a row
    #[arg(long, default_value_t = 2048)]
    hidden: usize,
    /// Width of an expert
    #[arg(long, default_value_t = 768)]
    inter: usize,
    /// Rounds per line, as far as its time allows; the median counts
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u16).range(1..=1000))]
    rounds: u16,
    /// MiB of distinct experts per format: several times the last-level cache
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..=16384))]
    arena: u32,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

/// Everything measured.
#[derive(Serialize)]
struct Report {
    #[serde(flatten)]
    bench: BenchReport,
    targets: Targets,
    fastest: Vec<Table>,
}

/// The ratios that `TARGETS` asks for; those whose lines were not measured are left out.
#[derive(Debug, Default, Serialize)]
struct Targets {
    /// q4, one row: native weight bandwidth over the memory's.
    #[serde(skip_serializing_if = "Option::is_none")]
    k1_native_over_read: Option<f64>,
    /// q4, 256 rows: native over libtorch's bf16 matmul of the same shape.
    #[serde(skip_serializing_if = "Option::is_none")]
    k2_native_over_torch_matmul: Option<f64>,
    /// q4, one row: native over libtorch's int4 operator.
    #[serde(skip_serializing_if = "Option::is_none")]
    k3_native_over_torch_int4: Option<f64>,
}

/// What `--kernels fastest` would choose.
#[derive(Serialize)]
struct Table {
    format: Format,
    #[serde(flatten)]
    choices: Choices,
}

fn isa(text: &str) -> Result<Isa, String> {
    let here: Vec<&str> = Isa::available_here().map(Isa::name).collect();
    let isa = text.parse::<Isa>().ok().filter(|isa| isa.available());
    isa.ok_or_else(|| format!("this machine has no instruction set '{text}': it has {}", here.join(", ")))
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    check(options)?;
    let config = BenchConfig {
        hidden: options.hidden,
        inter: options.inter,
        formats: options.formats.clone(),
        rows: options.rows.clone(),
        threads: options.threads,
        rounds: usize::from(options.rounds),
        arena_bytes: (options.arena as usize) << 20,
    };
    println!(
        "expert of {} x {}, {} threads, weights cold in memory",
        options.hidden, options.inter, options.threads
    );
    println!(
        "{:<17} {:<9} {:<5} {:>5} {:>9} {:>9} {:>9} {:>6}",
        "backend", "isa", "fmt", "rows", "GB/s", "GFLOP/s", "read", "ratio"
    );
    let best = Arc::new(native(options, isas(options)?.last().copied().unwrap_or_else(Isa::best))?);
    let bench = bench(&contenders(options, &best)?, &config, &mut print)?;
    println!("memory reads {:.1} GB/s", bench.read_gb_s);
    let targets = targets(&bench, &best.isa());
    print_targets(&targets);
    let fastest = tables(options, &best)?;
    fastest.iter().for_each(print_table);
    if options.json {
        output::json(&Report { bench, targets, fastest })?;
    }
    Ok(ExitCode::SUCCESS)
}

fn check(options: &Options) -> anyhow::Result<()> {
    for (flag, width) in [("--hidden", options.hidden), ("--inter", options.inter)] {
        ensure!(
            (GROUP..=WIDTH_MAX).contains(&width) && width.is_multiple_of(GROUP),
            "{flag} {width}: give a multiple of {GROUP} from {GROUP} to {WIDTH_MAX}"
        );
    }
    for rows in &options.rows {
        ensure!((1..=ROWS_MAX).contains(rows), "--rows {rows}: give 1 to {ROWS_MAX}");
    }
    warn_if_crowded(options.threads);
    Ok(())
}

/// The instruction sets to measure, slowest first.
fn isas(options: &Options) -> anyhow::Result<Vec<Isa>> {
    let mut isas = options.isa.clone();
    if isas.is_empty() && std::env::var_os(ISA_VARIABLE).is_some() {
        isas.push(Isa::chosen().map_err(anyhow::Error::msg)?);
    }
    if isas.is_empty() {
        isas = Isa::available_here().filter(|isa| *isa != Isa::Scalar).collect();
    }
    if isas.is_empty() {
        isas.push(Isa::Scalar);
    }
    isas.sort();
    isas.dedup();
    Ok(isas)
}

fn native(options: &Options, isa: Isa) -> anyhow::Result<Native> {
    Ok(Native::new(NativeConfig { isa: Some(isa), ..NativeConfig::threads(options.threads) })?)
}

fn contenders(options: &Options, best: &Arc<Native>) -> anyhow::Result<Vec<Contender>> {
    let mut contenders = Vec::new();
    for isa in isas(options)? {
        let kernels: Arc<dyn Kernels> = if best.isa() == isa.name() {
            Arc::<Native>::clone(best)
        } else {
            Arc::new(native(options, isa)?)
        };
        contenders.push(Contender::Backend(kernels));
    }
    #[cfg(feature = "torch")]
    if !options.no_libtorch {
        let backends = crate::model_options::libtorch_backends("cpu", Format::Q4, best)?;
        contenders.extend(backends.into_iter().map(Contender::Backend));
        let threads = options.threads;
        let make: MakeSubject =
            Box::new(move |shape, bytes| Ok(Box::new(PlainMatmul::new(shape, bytes, threads)?)));
        contenders.push(Contender::Plain { name: PLAIN.to_owned(), make });
    }
    Ok(contenders)
}

fn targets(bench: &BenchReport, best: &str) -> Targets {
    let line = |backend: &str, isa: &str, rows: usize| {
        bench.results.iter().find(|line| {
            line.backend == backend
                && line.isa == isa
                && line.rows == rows
                && (line.format == Format::Q4 || isa == "-")
        })
    };
    let over = |rows, backend: &str, isa: &str| {
        BenchReport::speedup(line("native", best, rows)?, line(backend, isa, rows)?)
    };
    // The yardstick was measured beside the first format.
    let first = bench.results.first().is_some_and(|line| line.format == Format::Q4);
    Targets {
        k1_native_over_read: line("native", best, 1).map(|line| line.ratio),
        #[cfg(feature = "torch")]
        k2_native_over_torch_matmul: over(256, PLAIN, "-").filter(|_| first),
        #[cfg(not(feature = "torch"))]
        k2_native_over_torch_matmul: None.filter(|_: &f64| first),
        k3_native_over_torch_int4: over(1, "libtorch", "operators"),
    }
}

fn tables(options: &Options, native: &Arc<Native>) -> anyhow::Result<Vec<Table>> {
    let mut tables = Vec::new();
    for &format in &options.formats {
        #[cfg_attr(not(feature = "torch"), expect(unused_mut, reason = "libtorch would join"))]
        let mut candidates: Vec<Arc<dyn Kernels>> = vec![Arc::<Native>::clone(native)];
        #[cfg(feature = "torch")]
        if !options.no_libtorch {
            candidates.extend(crate::model_options::libtorch_backends("cpu", format, native)?);
        }
        let shape = (options.hidden, options.inter);
        let workload = Workload { format, expert: shape, matrix: (options.hidden, options.hidden) };
        let fastest = Fastest::measure("fastest", candidates, workload)?;
        tables.push(Table { format, choices: fastest.choices().clone() });
    }
    Ok(tables)
}

fn print(line: &BenchLine) {
    let BenchLine { backend, isa, format, rows, weight_gb_s, gflops, read_gb_s, ratio, .. } = line;
    let format = format.name();
    println!(
        "{backend:<17} {isa:<9} {format:<5} {rows:>5} {weight_gb_s:>9.2} {gflops:>9.1} {read_gb_s:>9.2} {ratio:>6.2}"
    );
}

fn print_targets(targets: &Targets) {
    for (what, ratio) in [
        ("K1  native over memory reads, q4, 1 row", targets.k1_native_over_read),
        ("K2  native over torch bf16 matmul, q4, 256 rows", targets.k2_native_over_torch_matmul),
        ("K3  native over torch int4, q4, 1 row", targets.k3_native_over_torch_int4),
    ] {
        if let Some(ratio) = ratio {
            println!("{what:<48} {ratio:>6.2}");
        }
    }
}

fn print_table(table: &Table) {
    let Choices { candidates, experts, matrices, measured_ms } = &table.choices;
    println!("--kernels fastest, {}: {} ({measured_ms:.0} ms)", table.format, candidates.join(" | "));
    for (what, choices) in [("expert", experts), ("matrix", matrices)] {
        for choice in choices {
            let speeds: Vec<String> =
                choice.weight_gb_s.iter().map(|speed| format!("{speed:>7.2}")).collect();
            let mark = if choice.measured { "" } else { " (extrapolated)" };
            println!("  {what} {:>5} rows {} GB/s  {}{mark}", choice.rows, speeds.join(" "), choice.chosen);
        }
    }
}
