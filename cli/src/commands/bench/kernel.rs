//! `moemesh bench kernel`: expert kernels against the machine's reads.

use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use model::format::Format;
use model::kernel::Kernels;
use model::kernel::bench::{BenchConfig, BenchLine, BenchReport, bench};
use model::kernel::native::{DEFAULT_SPIN, ISA_VARIABLE, Isa, Native, NativeConfig};

use crate::output;

/// Options of `moemesh bench kernel`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Threads per backend; pin the process with taskset for figures of one core
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Formats to measure
    #[arg(long, value_delimiter = ',', default_value = "q4,q8,bf16")]
    formats: Vec<Format>,
    /// Rows per expert to measure
    #[arg(long, value_delimiter = ',', default_value = "1,4,16,64,256")]
    rows: Vec<usize>,
    /// Instruction sets of the native kernels [default: that of MOEMESH_ISA, else all this machine has
    /// but scalar]
    #[arg(long, value_delimiter = ',')]
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
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let config = BenchConfig {
        hidden: options.hidden,
        inter: options.inter,
        formats: options.formats.clone(),
        rows: options.rows.clone(),
        threads: options.threads,
        ..BenchConfig::default()
    };
    println!(
        "expert of {} x {}, {} threads, weights cold in memory",
        options.hidden, options.inter, options.threads
    );
    println!(
        "{:<9} {:<8} {:<5} {:>5} {:>9} {:>9} {:>9} {:>6}",
        "backend", "isa", "fmt", "rows", "GB/s", "GFLOP/s", "read", "ratio"
    );
    let mut report = BenchReport { read_gb_s: 0.0, results: Vec::new() };
    let mut reads = Vec::new();
    for kernels in backends(options)? {
        let part = bench(&*kernels, &config, &mut print)?;
        reads.push(part.read_gb_s);
        report.results.extend(part.results);
    }
    report.read_gb_s = reads.iter().sum::<f64>() / reads.len().max(1) as f64;
    println!("memory reads {:.1} GB/s", report.read_gb_s);
    if options.json {
        output::json(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn backends(options: &Options) -> anyhow::Result<Vec<Arc<dyn Kernels>>> {
    let mut isas = options.isa.clone();
    if isas.is_empty() && std::env::var_os(ISA_VARIABLE).is_some() {
        isas.push(Isa::chosen().map_err(anyhow::Error::msg)?);
    }
    if isas.is_empty() {
        isas = Isa::available_here().filter(|isa| *isa != Isa::Scalar).collect();
        if isas.is_empty() {
            isas.push(Isa::Scalar);
        }
    }
    let mut backends: Vec<Arc<dyn Kernels>> = Vec::new();
    for isa in isas {
        let threads = options.threads;
        let config = NativeConfig { threads, isa: Some(isa), cores: Vec::new(), spin: DEFAULT_SPIN };
        backends.push(Arc::new(Native::new(config)?));
    }
    #[cfg(feature = "torch")]
    if !options.no_libtorch {
        use model::kernel::libtorch::{Libtorch, LibtorchConfig};
        let config = LibtorchConfig { device: "cpu".to_owned(), threads: options.threads };
        backends.push(Arc::new(Libtorch::new(&config)?));
    }
    Ok(backends)
}

fn print(line: &BenchLine) {
    let BenchLine { backend, isa, format, rows, weight_gb_s, gflops, read_gb_s, ratio } = line;
    let format = format.name();
    println!(
        "{backend:<9} {isa:<8} {format:<5} {rows:>5} {weight_gb_s:>9.2} {gflops:>9.1} {read_gb_s:>9.2} {ratio:>6.2}"
    );
}
