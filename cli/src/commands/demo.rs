//! `moemesh demo`: a private cluster in a temporary directory, a story through it, and what it took.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use comfy_table::{Table, presets};
use serde::Serialize;
use serde_json::{Value, json};

use crate::children::Process;
use crate::client::Client;
use crate::cluster::{Cluster, ClusterOptions};
use crate::model_options::ModelOptions;
use crate::output;
use crate::story::{self, Story, StoryOptions};

/// Options of `moemesh demo`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    story: StoryOptions,
    /// Node processes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    nodes: u16,
    /// Leave the cluster up after the story, until Ctrl-C
    #[arg(long)]
    serve: bool,
    /// Do not compare with a single process (spares loading the model a second time)
    #[arg(long)]
    no_compare: bool,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

/// The result, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    weights: String,
    text: String,
    token_ids: Vec<u32>,
    logits_digest: Option<String>,
    decode_tok_s: f64,
    ttft_ms: f64,
    wire_bytes_per_token: u64,
    /// Whether token ids and logits equal the single process's, bit for bit; absent if not compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    equals_reference: Option<bool>,
    nodes: Vec<Value>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let model = options.model.open()?;
    let name = model.name.clone();
    drop(model);
    eprintln!(
        "starting a router and {} node processes for {name} ({})",
        options.nodes, options.model.weights
    );
    // One copy of each expert: every node of the demonstration is needed, and is seen to be.
    let router_arguments = ["--replicas", "1"].map(str::to_owned).to_vec();
    let cluster_options =
        ClusterOptions { nodes: options.nodes, router_arguments, ..ClusterOptions::default() };
    let mut cluster = Cluster::start(&options.model, &cluster_options)?;
    let client = Client::new(cluster.http(), None);

    let story = through_cluster(&client, &options.story)?;
    let nodes = client.fetch("/api/v1/nodes")?;
    let reference = if options.no_compare { None } else { Some(alone(options)?) };
    let equal = reference
        .as_ref()
        .map(|alone| alone.token_ids == story.token_ids && alone.logits_digest == story.logits_digest);

    if options.json && !options.serve {
        cluster.stop()?;
    }
    println!("\n\n{}", super::nodes::table(&nodes));
    println!("{}", summary(&story, reference.as_ref(), verdict(equal, options.model.require_exact())));
    if options.json {
        output::json(&report(options, &name, story, equal, &nodes))?;
    }
    if options.serve {
        serve(&client, &mut cluster, &name)?;
    } else {
        cluster.stop()?;
    }
    // Kernels that are equal within tolerance only may choose another token without anything being wrong.
    let broken = equal == Some(false) && options.model.require_exact();
    Ok(if broken { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Streams the story through the API, as any client would.
fn through_cluster(client: &Client, options: &StoryOptions) -> anyhow::Result<Story> {
    let (path, body) = options.request();
    let mut story = Story::default();
    let (started, mut first, mut last) = (Instant::now(), None, Instant::now());
    client.stream(path, &body, |chunk| {
        let ids = chunk.pointer("/choices/0/token_ids").and_then(Value::as_array);
        let ids: Vec<u32> = ids.into_iter().flatten().filter_map(Value::as_u64).map(|id| id as u32).collect();
        if !ids.is_empty() {
            last = Instant::now();
            first.get_or_insert(last);
        }
        story.token_ids.extend(ids);
        if let Some(text) = story::delta(chunk) {
            output::stream_text(text)?;
            story.text.push_str(text);
        }
        if let Some(digest) = chunk.pointer("/choices/0/logits_digest").and_then(Value::as_str) {
            story.logits_digest = Some(digest.to_owned());
        }
        if let Some(bytes) = chunk.pointer("/metrics/moemesh/wire_bytes").and_then(Value::as_u64) {
            story.wire_bytes = bytes;
        }
        Ok(true)
    })?;
    story.ttft = first.map_or(Duration::ZERO, |first| first - started);
    story.decode = first.map_or(Duration::ZERO, |first| last - first);
    Ok(story)
}

fn alone(options: &Options) -> anyhow::Result<Story> {
    story::reference(&options.model, &options.story, |_| Ok(()))
        .context("run the single process to compare with")
}

fn verdict(equal: Option<bool>, exact: bool) -> &'static str {
    match (equal, exact) {
        (Some(true), _) => "every token and every logit equals the single process, bit for bit",
        (Some(false), true) => "DIFFERS from the single process",
        (Some(false), false) => "differs from the single process, as kernels that are not exact may",
        (None, _) => "not compared with a single process",
    }
}

fn summary(story: &Story, alone: Option<&Story>, verdict: &str) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.add_row(["tokens".to_owned(), story.token_ids.len().to_string()]);
    table.add_row(["decode".to_owned(), format!("{:.1} tokens/s", story.decode_tok_s())]);
    table.add_row(["time to first token".to_owned(), format!("{:.0} ms", output::ms(story.ttft))]);
    table.add_row([
        "on the wire".to_owned(),
        format!("{} per token", output::bytes(story.wire_bytes_per_token())),
    ]);
    if let Some(alone) = alone {
        table.add_row(["single process".to_owned(), format!("{:.1} tokens/s", alone.decode_tok_s())]);
    }
    table.add_row(["text".to_owned(), verdict.to_owned()]);
    table
}

fn report(options: &Options, name: &str, story: Story, equal: Option<bool>, nodes: &Value) -> Report {
    Report {
        model: name.to_owned(),
        weights: options.model.weights.to_string(),
        decode_tok_s: story.decode_tok_s(),
        ttft_ms: output::ms(story.ttft),
        wire_bytes_per_token: story.wire_bytes_per_token(),
        text: story.text,
        token_ids: story.token_ids,
        logits_digest: story.logits_digest,
        equals_reference: equal,
        nodes: nodes["nodes"].as_array().cloned().unwrap_or_default(),
    }
}

fn serve(client: &Client, cluster: &mut Cluster, name: &str) -> anyhow::Result<()> {
    let body =
        json!({"model": name, "messages": [{"role": "user", "content": "Once upon a time"}], "stream": true});
    println!("\nThe cluster stays up at {} - try:\n", client.base());
    println!(
        "  curl -N {}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'",
        client.base()
    );
    println!("  moemesh run --router {}", client.base());
    println!("\nCtrl-C ends it.");
    let processes: Vec<String> = cluster.processes().map(Process::describe).collect();
    eprintln!("processes: {}", processes.join(", "));
    crate::signals::wait_for_stop()?;
    cluster.stop()
}
