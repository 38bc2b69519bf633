//! `moemesh synth`: a model of a real shape with random weights, as a Hugging Face directory.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use model::synthetic;

use crate::output::Progress;

/// Options of `moemesh synth`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// synthetic:SHAPE?layers=N&seed=S, with a SHAPE of qwen3-30b-a3b, qwen3-235b-a22b, mixtral-8x7b,
    /// olmoe-1b-7b
    #[arg(long)]
    model: String,
    /// Directory to write; must not exist or be empty
    #[arg(long)]
    write: PathBuf,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut progress = Progress::new();
    let mut show = |done, total, what: &str| progress.show(done, total, what);
    synthetic::write_checkpoint(&options.model, &options.write, &mut show)?;
    progress.finish();
    println!("wrote {}; serve it with `moemesh demo --model {0}`", options.write.display());
    Ok(ExitCode::SUCCESS)
}
