//! `moemesh eval`: how well a model in some weight format predicts a text.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::{Args, Subcommand};
use model::reference::{Reference, Want};
use router::sampler;
use router::serve::open_prompt;
use serde_json::{Value, json};

use crate::client::Client;
use crate::cluster::{Cluster, ClusterOptions};
use crate::model_options::ModelOptions;
use crate::output;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Perplexity over consecutive windows of a text, every token but a window's first scored
    Perplexity(Perplexity),
}

/// Options of `moemesh eval perplexity`.
#[derive(Args, Debug)]
pub(crate) struct Perplexity {
    #[command(flatten)]
    model: ModelOptions,
    /// Text to predict [default: valid.txt of the model's directory]
    #[arg(long)]
    text: Option<PathBuf>,
    /// Tokens per window
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..=65536))]
    window: u32,
    /// Stop after this many windows
    #[arg(long)]
    windows: Option<usize>,
    /// Run through a cluster of this many node processes instead of one process
    #[arg(long)]
    nodes: Option<u16>,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    let Command::Perplexity(options) = command;
    let model = options.model.open()?;
    let prompts = open_prompt(&model)?;
    let text = match (&options.text, &model.directory) {
        (Some(path), _) => path.clone(),
        (None, Some(directory)) => directory.join("valid.txt"),
        (None, None) => bail!("a synthetic model has no text of its own; say --text FILE"),
    };
    let text = std::fs::read_to_string(&text)
        .with_context(|| format!("read {}; name another text with --text", text.display()))?;
    let tokens = prompts.encode(&text, false)?;
    let windows: Vec<&[u32]> =
        tokens.chunks(options.window as usize).filter(|window| window.len() > 1).collect();
    let windows = &windows[..options.windows.unwrap_or(windows.len()).min(windows.len())];
    ensure!(!windows.is_empty(), "the text is shorter than two tokens");
    drop(model);

    let started = Instant::now();
    let score = match options.nodes {
        None => alone(options, windows)?,
        Some(nodes) => through_cluster(options, nodes, windows)?,
    };
    let perplexity = (-score.log_likelihood / score.tokens as f64).exp();
    let seconds = started.elapsed().as_secs_f64();
    println!("perplexity {perplexity:.4} over {} tokens ({seconds:.0} s)", score.tokens);
    if options.json {
        output::json(&json!({
            "model": options.model.spec()?,
            "weights": options.model.weights,
            "perplexity": perplexity,
            "tokens": score.tokens,
            "window": options.window,
            "nodes": options.nodes.unwrap_or(0),
            "seconds": seconds,
        }))?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Default)]
struct Score {
    log_likelihood: f64,
    tokens: usize,
}

fn alone(options: &Perplexity, windows: &[&[u32]]) -> anyhow::Result<Score> {
    let model = options.model.open()?;
    let vocab = model.config.vocab;
    let (kernels, native) = options.model.load_kernels(&model)?;
    let mut reference = Reference::load(model, kernels, native, options.window as usize)?;
    let (mut score, mut bar) = (Score::default(), output::Progress::new());
    for (index, window) in windows.iter().enumerate() {
        reference.rewind(0);
        let logits = reference.feed(window, Want::All)?;
        for (row, next) in logits.chunks_exact(vocab).zip(&window[1..]) {
            score.log_likelihood += f64::from(sampler::logprobs(row, *next, 0)?.logprob);
            score.tokens += 1;
        }
        bar.show(index as u64 + 1, windows.len() as u64, "windows");
    }
    bar.finish();
    Ok(score)
}

fn through_cluster(options: &Perplexity, nodes: u16, windows: &[&[u32]]) -> anyhow::Result<Score> {
    let mut cluster = Cluster::start(&options.model, &ClusterOptions { nodes, ..ClusterOptions::default() })?;
    let client = Client::new(cluster.http(), None);
    let (mut score, mut bar) = (Score::default(), output::Progress::new());
    for (index, window) in windows.iter().enumerate() {
        let body = json!({"prompt": window, "max_tokens": 0, "echo": true, "logprobs": 0});
        let answer = client.post("/v1/completions", &body)?;
        let scores = answer.pointer("/choices/0/logprobs/token_logprobs").and_then(Value::as_array);
        for logprob in scores.context("the router sent no log-probabilities")?.iter().skip(1) {
            score.log_likelihood += logprob.as_f64().context("a log-probability is missing")?;
            score.tokens += 1;
        }
        bar.show(index as u64 + 1, windows.len() as u64, "windows");
    }
    bar.finish();
    cluster.stop()?;
    Ok(score)
}
