//! `moemesh bench decode`: a private cluster of real processes, driven over its API.
//!
//! Three requests: one to warm up, one that mostly decodes, one that is all prefill. Stage times are what the
//! router's engine counted between the first and the second.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::ensure;
use clap::Args;
use comfy_table::{Table, presets};
use model::kernel::bench::read_bandwidth_gb_s;
use serde_json::{Map, Value, json};

use crate::client::Client;
use crate::cluster::{Cluster, ClusterOptions, number};
use crate::model_options::ModelOptions;
use crate::output;

/// Prompt of the decode request: enough for a token to attend to, too little to weigh.
const DECODE_PROMPT: usize = 16;

/// Options of `moemesh bench decode`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// Node processes; 0 runs everything in the router
    #[arg(long, default_value_t = 0)]
    nodes: u16,
    /// Pin each process to this many cores of its own, with as many threads
    #[arg(long)]
    cores_per_process: Option<usize>,
    /// Tokens of the prefill request
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Tokens of the decode request
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=4096))]
    max_tokens: u32,
    /// Make every process as slow as a machine that reads this many GB/s of weights
    #[arg(long)]
    pace_gb_s: Option<f64>,
    /// Print the stages of a token
    #[arg(long)]
    profile: bool,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

/// One streamed request, seen from outside.
#[derive(Clone, Copy, Debug, Default)]
struct Timed {
    tokens: usize,
    first: Duration,
    total: Duration,
    wire_bytes: u64,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let model = options.model.open()?;
    let (vocab, name) = (model.config.vocab, model.name.clone());
    let bytes = model.config.token_bytes(model.format);
    drop(model);
    let threads = options.cores_per_process.unwrap_or_else(|| options.model.thread_count());
    let read_gb_s = read_bandwidth_gb_s(threads);
    let pace =
        options.pace_gb_s.map(|pace| vec!["--pace-gb-s".to_owned(), pace.to_string()]).unwrap_or_default();
    let cluster_options = ClusterOptions {
        nodes: options.nodes,
        cores_per_process: options.cores_per_process,
        node_arguments: pace,
        router_arguments: Vec::new(),
    };
    let mut cluster = Cluster::start(&options.model, &cluster_options)?;
    let client = Client::new(cluster.http(), None);
    timed(&client, vocab, DECODE_PROMPT, 4)?;
    let before = client.fetch("/api/v1/nodes")?;
    let decode = timed(&client, vocab, DECODE_PROMPT, options.max_tokens)?;
    let after = client.fetch("/api/v1/nodes")?;
    let prefill = timed(&client, vocab, options.prompt, 1)?;
    let rss: Map<String, Value> = cluster
        .processes()
        .filter_map(|process| Some((process.name().to_owned(), json!(process.resident_bytes()?))))
        .collect();
    cluster.stop()?;

    let decode_tok_s = (decode.tokens - 1) as f64 / (decode.total - decode.first).as_secs_f64();
    let prefill_tok_s = options.prompt as f64 / prefill.first.as_secs_f64();
    let weights = bytes.router + bytes.experts;
    let report = json!({
        "model": name,
        "weights": options.model.weights,
        "nodes": options.nodes,
        "threads": threads,
        "decode_tok_s": decode_tok_s,
        "prefill_tok_s": prefill_tok_s,
        "weights_bytes_per_token": weights,
        "router_bytes_per_token": bytes.router,
        "read_gb_s": read_gb_s,
        "memory_limit_tok_s": read_gb_s * 1e9 / weights as f64,
        "wire_bytes_per_token": decode.wire_bytes / decode.tokens as u64,
        "rss_bytes": rss,
        "stages_us": stages(&before, &after, decode.tokens),
    });
    print(&report, options.profile);
    if options.json {
        output::json(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Microseconds per token and stage between two reports of the router.
fn stages(before: &Value, after: &Value, tokens: usize) -> Map<String, Value> {
    let stages = after.pointer("/router/stages_us").and_then(Value::as_object);
    let per_token = |name: &String| {
        let pointer = format!("/router/stages_us/{name}");
        (number(after, &pointer) - number(before, &pointer)) / tokens as f64
    };
    stages
        .into_iter()
        .flat_map(Map::keys)
        .map(|name| (name.clone(), json!(per_token(name).round())))
        .collect()
}

/// Sends a prompt of arbitrary tokens and times the stream.
fn timed(client: &Client, vocab: usize, prompt: usize, max_tokens: u32) -> anyhow::Result<Timed> {
    // Any tokens do: routing of random weights does not care, and a trained model sees noise either way.
    let tokens: Vec<usize> = (0..prompt).map(|index| (index * 7919 + 13) % vocab).collect();
    let body = json!({
        "prompt": tokens, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": true, "stream": true,
        "stream_options": {"include_usage": true}, "return_token_ids": true,
    });
    let (started, mut timed) = (Instant::now(), Timed::default());
    client.stream("/v1/completions", &body, |chunk| {
        let ids = chunk.pointer("/choices/0/token_ids").and_then(Value::as_array).map_or(0, Vec::len);
        if ids > 0 {
            timed.tokens += ids;
            timed.total = started.elapsed();
            if timed.first.is_zero() {
                timed.first = timed.total;
            }
        }
        if let Some(bytes) = chunk.pointer("/metrics/moemesh/wire_bytes").and_then(Value::as_u64) {
            timed.wire_bytes = bytes;
        }
        Ok(true)
    })?;
    ensure!(timed.tokens == max_tokens as usize, "{} of {max_tokens} tokens came", timed.tokens);
    Ok(timed)
}

fn print(report: &Value, profile: bool) {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let value = |name: &str| report[name].as_f64().unwrap_or(0.0);
    let limit = value("memory_limit_tok_s");
    table.add_row(["decode".to_owned(), format!("{:.2} tokens/s", value("decode_tok_s"))]);
    table.add_row(["prefill".to_owned(), format!("{:.1} tokens/s", value("prefill_tok_s"))]);
    table.add_row([
        "memory limit".to_owned(),
        format!(
            "{limit:.1} tokens/s at {:.1} GB/s ({:.0} %)",
            value("read_gb_s"),
            100.0 * value("decode_tok_s") / limit
        ),
    ]);
    table.add_row([
        "weights".to_owned(),
        format!("{} per token", output::bytes(value("weights_bytes_per_token") as u64)),
    ]);
    table.add_row([
        "wire".to_owned(),
        format!("{} per token", output::bytes(value("wire_bytes_per_token") as u64)),
    ]);
    for (name, bytes) in report["rss_bytes"].as_object().into_iter().flatten() {
        table.add_row([format!("memory of {name}"), output::bytes(bytes.as_u64().unwrap_or(0))]);
    }
    if profile {
        for (name, us) in report["stages_us"].as_object().into_iter().flatten() {
            table.add_row([format!("  {name}"), format!("{us} us per token")]);
        }
    }
    println!("{table}");
}
