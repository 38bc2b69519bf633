//! How long liars last: calls until an audit finds them, by way of lying and share of calls that is audited.
//!
//! No network: what would be kept of an answer is handed to the router's own judge, with the demo model's experts and
//! rows of noise, and other holders are functions. So draws, comparisons and kernels are those of a router, and a run is
//! repeatable (`--seed`). First honest nodes, on every instruction set that this machine has, in batches that differ
//! from the judge's: none of their audits may fail. Then each lie, alone and told by two replicas alike.
//!
//! `cargo run --release -p moemesh-tests --bin audit-study -- --honest 100000 --trials 500`
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for studies")]

use std::sync::Arc;
use std::time::Instant;

use mesh_proto::routes::{NodeIndex, Part, Routes, Table};
use model::activations::{Activations, row_bytes};
use model::format::Format;
use model::home::{Home, Residency};
use model::kernel::native::{Isa, Native, NativeConfig};
use model::kernel::{Assignment, Kernels};
use model::open::Model;
use model::region::Buffer;
use moemesh_tests::lies::{Lie, mix};
use moemesh_tests::{cluster, tale_moe};
use router::audit::draws::{Draws, Share};
use router::audit::judge::{Judge, Others, Outcome};
use router::audit::sample::{Answer, Piece, Sample};
use router::serve::model_facts;

/// Shares of calls that are audited.
const SHARES: [f64; 3] = [0.001, 0.01, 0.1];
/// Rows of an honest call at most: decode calls, and what is kept of larger ones.
const ROWS_MAX: u64 = 16;
/// Calls that a liar is never found within: beyond any story, and far beyond the least likely of these.
const CALLS_MAX: u64 = 100_000_000;
/// Calls of which one is computed by the slowest instruction set.
const SLOW_EVERY: u64 = 32;
const LIAR: NodeIndex = 0;
const REPLICA: NodeIndex = 1;

struct Options {
    honest: u64,
    trials: u64,
    seed: u64,
}

fn options() -> Result<Options, String> {
    let mut options = Options { honest: 20_000, trials: 200, seed: 1 };
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let value = arguments.next().and_then(|value| value.parse().ok());
        let value = value.ok_or(format!("{argument} needs a number"))?;
        match argument.as_str() {
            "--honest" => options.honest = value,
            "--trials" => options.trials = value,
            "--seed" => options.seed = value,
            _ => return Err(format!("{argument}? --honest N, --trials N, --seed N")),
        }
    }
    Ok(options)
}

/// The model with what is needed to compute it in several ways.
struct Study {
    model: Arc<Model>,
    routes: Arc<Routes>,
    /// By instruction set.
    homes: Vec<(Isa, Home)>,
    /// The same checkpoint in four bits.
    poor: (Arc<Model>, Home),
}

/// A random number of a call.
struct Noise(u64);

impl Noise {
    fn below(&mut self, count: u64) -> u64 {
        self.0 = mix(self.0);
        self.0 % count.max(1)
    }
}

impl Study {
    fn new(cache: &std::path::Path) -> Result<Study, String> {
        let model = cluster::open(&tale_moe(), Format::Q8, cache);
        let small = cluster::open(&tale_moe(), Format::Q4, cache);
        let facts = model_facts(&model);
        let mut table = Table::empty(&facts);
        let holders = || [LIAR, REPLICA].into_iter().collect();
        for layer in &facts.moe_layers {
            let whole = |_| [Part { from: 0, to: facts.blocks, holders: holders() }];
            table.set_layer(*layer, (0..facts.experts).map(whole));
        }
        let home = |model: &Arc<Model>, isa: Option<Isa>| {
            let native = Native::new(NativeConfig { isa, ..NativeConfig::threads(1) });
            let kernels: Arc<dyn Kernels> = Arc::new(native.map_err(|error| error.to_string())?);
            Ok::<Home, String>(Home::new(Arc::clone(model), kernels, Residency::Mapped))
        };
        let homes: Result<Vec<_>, String> =
            Isa::available_here().map(|isa| Ok((isa, home(&model, Some(isa))?))).collect();
        let poor = home(&small, None)?;
        let routes = Arc::new(Routes { epoch: 1, table, spared: Vec::new() });
        Ok(Study { homes: homes?, routes, poor: (small, poor), model })
    }

    fn judge(&self, seed: u64) -> Result<Judge, String> {
        let kernels = Native::new(NativeConfig::threads(1)).map_err(|error| error.to_string())?;
        Ok(Judge::new(Arc::clone(&self.model), Arc::new(kernels), Draws::new(&secret(seed))))
    }

    /// A call with rows of noise, some of which are kept, unanswered.
    fn call(&self, noise: &mut Noise, rows: u64) -> Sample {
        let config = &self.model.config;
        let (hidden, stride) = (config.hidden, row_bytes(Format::Q8, config.hidden));
        let mut bytes = vec![0; stride * rows as usize];
        for row in bytes.chunks_exact_mut(stride) {
            row[..hidden].iter_mut().for_each(|value| *value = (noise.below(255) as i64 - 127) as i8 as u8);
            for scale in row[hidden..].chunks_exact_mut(4).take(hidden / 32) {
                let value = (1 + noise.below(1000)) as f32 * 1e-4;
                scale.copy_from_slice(&value.to_le_bytes());
            }
        }
        let layers: Vec<usize> = config.moe_layers().collect();
        let shape = (Format::Q8, hidden, rows as usize);
        let mut sample = Sample::new(shape, bytes.chunks_exact(stride), Arc::clone(&self.routes));
        sample.layer = layers[noise.below(layers.len() as u64) as usize] as u16;
        let blocks = (0, config.moe.inter.div_ceil(128) as u16);
        for row in 0..rows as u32 {
            let first = noise.below(config.moe.experts as u64) as u16;
            // Different ones, as a gate chooses them.
            for next in 0..1 + noise.below(config.moe.top_k as u64) as u16 {
                let expert = (first + next * 5) % config.moe.experts as u16;
                let weight = (1 + noise.below(1000)) as f32 * 1e-3;
                sample.pieces.push(Piece { assignment: Assignment { row, expert, weight }, blocks });
            }
        }
        sample.exact = [true, true].into();
        sample.numbers = 0..2;
        sample
    }

    /// What a node answers to some pieces of a call.
    fn answer(&mut self, sample: &Sample, pieces: &[Piece], (lie, call): (Option<Lie>, u64)) -> Answer {
        let experts = self.model.config.moe.experts as u16;
        let strikes = lie.filter(|lie| lie.strikes(call));
        let exchanged = |piece: &Piece| {
            let expert =
                strikes.map_or(piece.assignment.expert, |lie| lie.expert(piece.assignment.expert, experts));
            Assignment { expert, ..piece.assignment }
        };
        let assignments: Vec<Assignment> = pieces.iter().map(exchanged).collect();
        let mut sums = vec![0; sample.row_count() * sample.hidden()];
        let layer = usize::from(sample.layer);
        if strikes == Some(Lie::FewerBits) {
            let mut bytes = Buffer::zeroed(sample.row_count() * row_bytes(Format::Q4, sample.hidden()));
            let all: Vec<u8> = sample.row_bytes().flatten().copied().collect();
            bytes.copy_from_slice(&all);
            let x = Activations::new(Format::Q4, sample.row_count(), sample.hidden(), &bytes);
            let (small, home) = &mut self.poor;
            home.add(layer, x.expect("rows of both are the same"), &assignments, &mut sums)
                .expect("it computes");
            // In multiples of the step that was promised.
            let shift = i32::from(small.step_log2(layer)) - i32::from(self.model.step_log2(layer));
            let scale = 2_f64.powi(shift);
            sums.iter_mut().for_each(|sum| *sum = (*sum as f64 * scale).round() as i64);
        } else {
            let index = set_for(call, self.homes.len());
            let x = sample.activations().expect("rows fit");
            self.homes[index].1.add(layer, x, &assignments, &mut sums).expect("it computes");
        }
        lie.into_iter().for_each(|lie| lie.bend(call, &mut sums));
        Answer::new(sample.hidden(), sums)
    }

    /// Calls of a liar until it is found.
    fn until_found(
        &mut self,
        (lie, colludes, share): (Lie, bool, f64),
        judge: &mut Judge,
        seed: u64,
    ) -> Result<u64, String> {
        let (mut draws, mut noise) = (Draws::new(&secret(seed)), Noise(seed));
        let wanted = Share::new(share);
        for call in 1..CALLS_MAX {
            // What is not drawn, or is no lie, cannot find it; `honest` is about those.
            if !draws.happens(wanted) || !lie.strikes(call) {
                continue;
            }
            let mut sample = self.call(&mut noise, 1);
            sample.answer = self.answer(&sample, &sample.pieces, (Some(lie), call));
            let told = colludes.then_some(lie);
            let outcomes = judge.check(&sample, &mut Replica { study: self, told, call });
            match outcomes.first() {
                Some((LIAR, Outcome::Wrong(_))) => return Ok(call),
                Some((LIAR, Outcome::Right)) => {}
                other => return Err(format!("an audit came to {other:?}")),
            }
        }
        Err(format!("{} was not found within {CALLS_MAX} calls", lie.name()))
    }
}

/// The other holder.
struct Replica<'a> {
    study: &'a mut Study,
    told: Option<Lie>,
    call: u64,
}

impl Others for Replica<'_> {
    fn can_be_asked(&self, _: &Sample, node: NodeIndex) -> bool {
        node == REPLICA
    }

    fn ask(&mut self, sample: &Sample, _: NodeIndex, pieces: &[Piece], _: usize) -> Option<Answer> {
        Some(self.study.answer(sample, pieces, (self.told, self.call)))
    }
}

/// Which of so many instruction sets, the slowest first, computes a call: the definition itself is too slow to have an
/// equal part.
fn set_for(call: u64, sets: usize) -> usize {
    let fast = sets.saturating_sub(1) as u64;
    if fast == 0 || call.is_multiple_of(SLOW_EVERY) { 0 } else { 1 + (call % fast) as usize }
}

fn secret(seed: u64) -> [u8; 32] {
    let mut secret = [0; 32];
    for (at, bytes) in secret.chunks_exact_mut(8).enumerate() {
        bytes.copy_from_slice(&mix(seed.wrapping_mul(4).wrapping_add(at as u64)).to_le_bytes());
    }
    secret
}

/// Audits of honest nodes: how many failed. Some rows of a larger call are kept, as of prompts.
fn honest(study: &mut Study, options: &Options) -> Result<u64, String> {
    let (mut judge, mut noise) = (study.judge(options.seed)?, Noise(options.seed));
    let (mut failed, mut sums, began) = (0, 0, Instant::now());
    for call in 0..options.honest {
        let rows = 1 + noise.below(ROWS_MAX);
        let mut sample = study.call(&mut noise, rows);
        sample.answer = study.answer(&sample, &sample.pieces, (None, call));
        sums += (sample.row_count() * sample.hidden()) as u64;
        // The replica has another instruction set.
        let outcomes = judge.check(&sample, &mut Replica { study, told: None, call: call + 1 });
        failed += u64::from(outcomes != [(LIAR, Outcome::Right)]);
    }
    let sets: Vec<&str> = study.homes.iter().map(|(isa, _)| isa.name()).collect();
    println!(
        "honest: {failed} of {} audits failed ({sums} sums, nodes on {}, judge on {}; {:.0} s)",
        options.honest,
        sets.join(", "),
        Isa::best().name(),
        began.elapsed().as_secs_f64()
    );
    Ok(failed)
}

fn run() -> Result<bool, String> {
    let options = options()?;
    let cache = tempfile::tempdir().map_err(|error| error.to_string())?;
    let mut study = Study::new(cache.path())?;
    let failed = honest(&mut study, &options)?;
    println!("calls of the liar until it is found, {} trials each:", options.trials);
    println!("{:<28} {:>7} {:>9} {:>9} {:>9} {:>9}", "lie", "audited", "expected", "mean", "p50", "p99");
    for (lie, colludes) in Lie::ALL.into_iter().map(|lie| (lie, false)).chain([(Lie::Scaled, true)]) {
        for share in SHARES {
            let seed = mix(options.seed ^ (lie as u64) << 8 ^ u64::from(colludes) << 16 ^ share.to_bits());
            let mut judge = study.judge(seed)?;
            let mut calls = Vec::new();
            for trial in 0..options.trials {
                calls.push(study.until_found(
                    (lie, colludes, share),
                    &mut judge,
                    seed.wrapping_add(trial),
                )?);
            }
            calls.sort_unstable();
            let at = |part: f64| calls[((calls.len() - 1) as f64 * part).round() as usize];
            let local = if colludes { router::audit::judge::HOME_SHARE } else { 1.0 };
            let expected = lie.every() as f64 / (share * local);
            let mean = calls.iter().sum::<u64>() as f64 / calls.len().max(1) as f64;
            let name = format!("{}{}", lie.name(), if colludes { ", two replicas alike" } else { "" });
            println!("{name:<28} {share:>7} {expected:>9.0} {mean:>9.0} {:>9} {:>9}", at(0.5), at(0.99));
        }
    }
    Ok(failed == 0)
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(true) => std::process::ExitCode::SUCCESS,
        Ok(false) => std::process::ExitCode::FAILURE,
        Err(error) => {
            eprintln!("audit-study: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
