//! `moemesh bench decode`: a private cluster of real processes, driven over its API.
//!
//! Requests, one after the other: one to warm up, one that mostly decodes, and some that are all prefill. Stage times
//! are what the router's engine counted between them. Quantizing rows is no stage of its own: it is fused with the
//! norm before it, so it counts as attention and gate. What is left of a token when every stage is taken off (the
//! API, channels, the loop itself) is printed as `other`. Beside it stand what memory allows and what the processes'
//! own measurements predict (`limits`).

mod limits;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use clap::Args;
use comfy_table::{Table, presets};
use model::kernel::bench::read_bandwidth_gb_s;
use model::kernel::measure::ROWS;
use router::serve::model_facts;
use serde_json::{Map, Value, json};

use self::limits::{Arrangement, Bandwidth, memory_limit, predicted_alone};
use crate::client::Client;
use crate::cluster::{Cluster, ClusterOptions, number};
use crate::commands::router::Replicate;
use crate::model_options::{ModelOptions, parse_pace};
use crate::output;

/// Prompt of the decode request: enough for a token to attend to, too little to weigh.
const DECODE_PROMPT: usize = 16;

/// Prefill requests; the median counts. The first also teaches the router how fast everybody is.
const PREFILLS: usize = 3;

/// Stages that are the router's overhead: neither kernels nor waiting (target S3).
const OVERHEAD_STAGES: [&str; 4] = ["send", "combine", "scheduler", "other"];

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
    /// all: the router holds every expert too and computes its share of each layer
    #[arg(long, value_enum, default_value_t = Replicate::None)]
    replicate: Replicate,
    /// Machines that hold each expert: 1 to 4, or auto
    #[arg(long, default_value = "1")]
    replicas: String,
    /// Whether experts may be cut: auto or off
    #[arg(long, default_value = "off")]
    slices: String,
    /// Tokens of the prefill request
    #[arg(long, default_value_t = 512)]
    prompt: usize,
    /// Tokens of the decode request
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=4096))]
    max_tokens: u32,
    /// Prompt tokens per step of the router [default: the router's]
    #[arg(long)]
    chunk: Option<usize>,
    /// Make every process as slow as a machine that reads this many GB/s of weights; or one number per process,
    /// router first: 10,5,20
    #[arg(long, value_delimiter = ',', value_parser = parse_pace)]
    pace_gb_s: Vec<f64>,
    /// Print the stages of a token and of a prompt
    #[arg(long)]
    profile: bool,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

impl Options {
    fn arrangement(&self) -> Arrangement {
        match (self.nodes, self.replicate) {
            (0, _) => Arrangement::Alone,
            (nodes, Replicate::None) => Arrangement::Nodes(nodes),
            (nodes, Replicate::All) => Arrangement::Shared(nodes),
        }
    }

    /// One pace per process, or none at all.
    fn paces(&self) -> anyhow::Result<Vec<f64>> {
        let processes = usize::from(self.nodes) + 1;
        match self.pace_gb_s.as_slice() {
            [all] => Ok(vec![*all; processes]),
            each if each.is_empty() || each.len() == processes => Ok(each.to_vec()),
            each => bail!(
                "--pace-gb-s has {} numbers for {processes} processes: give one for all, or one for each, router first",
                each.len()
            ),
        }
    }

    fn router_arguments(&self) -> Vec<String> {
        let mut arguments: Vec<String> = Vec::new();
        if self.nodes > 0 {
            let plan = ["--replicas", &self.replicas, "--slices", &self.slices];
            arguments.extend(plan.map(str::to_owned));
        }
        if self.nodes > 0 && self.replicate == Replicate::All {
            arguments.extend(["--replicate".to_owned(), "all".to_owned()]);
        }
        if let Some(chunk) = self.chunk {
            arguments.extend(["--chunk".to_owned(), chunk.to_string()]);
        }
        arguments
    }
}

/// One streamed request, seen from outside.
#[derive(Clone, Copy, Debug, Default)]
struct Timed {
    tokens: usize,
    first: Duration,
    total: Duration,
    wire_bytes: u64,
}

/// What was measured of a running cluster.
struct Measurement {
    decode: Timed,
    prefill: Timed,
    /// `/api/v1/nodes` before and after decoding, and after the prefills.
    reports: [Value; 3],
    /// Name, resident bytes, anonymous bytes.
    memory: Vec<(String, u64, u64)>,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let paces = options.paces()?;
    let model = options.model.open()?;
    let (vocab, name) = (model.config.vocab, model.name.clone());
    let (bytes, facts) = (model.config.token_bytes(model.format), model_facts(&model));
    let layers = model.config.layers.len();
    drop(model);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let processes = usize::from(options.nodes) + 1;
    let threads = match options.cores_per_process {
        Some(threads) => threads,
        None if processes > 1 => (cores / processes).max(1),
        None => options.model.thread_count(),
    };
    let computing =
        if options.arrangement() == Arrangement::Nodes(options.nodes) { processes - 1 } else { processes };
    let free = Bandwidth {
        router: read_bandwidth_gb_s(threads.min(cores)),
        experts: read_bandwidth_gb_s((threads * computing).min(cores)),
    };
    let bandwidth = free.paced(&paces, options.arrangement());
    let measured = measure(options, vocab, paces.clone())?;

    let decode_tok_s =
        (measured.decode.tokens - 1) as f64 / (measured.decode.total - measured.decode.first).as_secs_f64();
    let [before, after, last] = &measured.reports;
    let stages = stages((before, after), measured.decode.tokens, 1e6 / decode_tok_s);
    let overhead: f64 = OVERHEAD_STAGES.iter().filter_map(|stage| stages.get(*stage)?.as_f64()).sum();
    let predicted = match options.arrangement() {
        Arrangement::Alone => predicted_alone(&facts, table(&after["router"])),
        _ => after.pointer("/plan/predicted_tok_s").and_then(Value::as_f64),
    };
    let limit = memory_limit(bytes, bandwidth);
    let report = json!({
        "model": name,
        "weights": options.model.weights,
        "nodes": options.nodes,
        "replicate": options.arrangement() == Arrangement::Shared(options.nodes),
        "threads": threads,
        "cores": cores,
        "crowded": processes * threads > cores,
        "pace_gb_s": paces,
        "decode_tok_s": decode_tok_s,
        "prefill_tok_s": options.prompt as f64 / measured.prefill.first.as_secs_f64(),
        "prompt": options.prompt,
        "weights_bytes_per_token": bytes.router + bytes.experts,
        "router_bytes_per_token": bytes.router,
        "read_gb_s": bandwidth.router,
        "joint_read_gb_s": bandwidth.experts,
        "memory_limit_tok_s": limit,
        "memory_limit_ratio": decode_tok_s / limit,
        "predicted_tok_s": predicted,
        "plan": after["plan"],
        "wire_bytes_per_token": measured.decode.wire_bytes / measured.decode.tokens as u64,
        "experts_here": share_here(before, after),
        "experts_here_prefill": share_here(after, last),
        "speeds": speed_report(after),
        "planned_shares": shares(after, "planned_share"),
        "links": shares(after, "link"),
        "memory": memory(&measured),
        "overhead_us_per_layer": overhead / layers as f64,
        "stages_us": stages,
        "prefill_stages_us": self::stages((after, last), PREFILLS, measured.prefill.first.as_secs_f64() * 1e6),
    });
    print(&report, options.profile);
    if options.json {
        output::json(&report)?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Starts the cluster, asks it, and stops it.
fn measure(options: &Options, vocab: usize, paces: Vec<f64>) -> anyhow::Result<Measurement> {
    let cluster_options = ClusterOptions {
        nodes: options.nodes,
        cores_per_process: options.cores_per_process,
        node_arguments: Vec::new(),
        router_arguments: options.router_arguments(),
        paces,
    };
    let mut cluster = Cluster::start(&options.model, &cluster_options)?;
    let client = Client::new(cluster.http(), None);
    timed(&client, vocab, DECODE_PROMPT, 8)?;
    let before = client.fetch("/api/v1/nodes")?;
    let decode = timed(&client, vocab, DECODE_PROMPT, options.max_tokens)?;
    let after = client.fetch("/api/v1/nodes")?;
    let mut prefills = Vec::new();
    for _ in 0..PREFILLS {
        prefills.push(timed(&client, vocab, options.prompt, 1)?);
    }
    prefills.sort_by_key(|prefill| prefill.first);
    let last = client.fetch("/api/v1/nodes")?;
    let memory = cluster.processes().filter_map(|process| {
        Some((process.name().to_owned(), process.resident_bytes()?, process.anonymous_bytes()?))
    });
    let memory = memory.collect();
    cluster.stop()?;
    Ok(Measurement { decode, prefill: prefills[PREFILLS / 2], reports: [before, after, last], memory })
}

/// Microseconds per stage between two reports of the router, each divided by `count`; `wall_us` is what one took in
/// all, and what no stage accounts for is `other`.
fn stages((before, after): (&Value, &Value), count: usize, wall_us: f64) -> Map<String, Value> {
    let stages = after.pointer("/router/stages_us").and_then(Value::as_object);
    let each = |name: &String| {
        let pointer = format!("/router/stages_us/{name}");
        (number(after, &pointer) - number(before, &pointer)) / count as f64
    };
    let mut stages: Map<String, Value> =
        stages.into_iter().flat_map(Map::keys).map(|name| (name.clone(), json!(each(name)))).collect();
    let known: f64 = stages.values().filter_map(Value::as_f64).sum();
    stages.insert("other".to_owned(), json!((wall_us - known).max(0.0)));
    stages
}

/// Fraction of the experts' work between two reports that the router did itself.
fn share_here(before: &Value, after: &Value) -> f64 {
    let grown = |name: &str| {
        let pointer = format!("/router/{name}");
        number(after, &pointer) - number(before, &pointer)
    };
    grown("assignments_here") / grown("assignments").max(1.0)
}

/// What a process measured of itself, MB/s at `ROWS`.
fn table(process: &Value) -> [u32; ROWS.len()] {
    let mut table = [0; ROWS.len()];
    for (index, mb_s) in table.iter_mut().enumerate() {
        *mb_s = number(process, &format!("/weight_mb_s/{index}")) as u32;
    }
    table
}

/// One figure of every node.
fn shares(report: &Value, key: &str) -> Value {
    report["nodes"].as_array().into_iter().flatten().map(|node| node[key].clone()).collect()
}

/// Tables, and what calls have shown since, router first.
fn speed_report(report: &Value) -> Value {
    let one = |process: &Value| {
        let [table, correction, call_us] =
            ["weight_mb_s", "correction", "call_overhead_us"].map(|key| process[key].clone());
        json!({"weight_mb_s": table, "correction": correction, "call_overhead_us": call_us})
    };
    let nodes = report["nodes"].as_array().into_iter().flatten();
    std::iter::once(&report["router"]).chain(nodes).map(one).collect()
}

/// Per process: resident bytes, weights, KV cache, and what is left of its own memory (target M1).
fn memory(measured: &Measurement) -> Value {
    let last = &measured.reports[2];
    let one = |(index, (name, resident, anonymous)): (usize, &(String, u64, u64))| {
        let (weights, kv) = match index.checked_sub(1) {
            None => {
                let weights = number(last, "/router/weight_bytes") + number(last, "/router/home_bytes");
                (weights, number(last, "/router/kv_peak_bytes"))
            }
            Some(node) => (number(last, &format!("/nodes/{node}/weight_bytes")), 0.0),
        };
        let (weights, kv) = (weights as u64, kv as u64);
        let beyond = anonymous.saturating_sub(weights + kv);
        json!({"name": name, "rss_bytes": resident, "weight_bytes": weights, "kv_bytes": kv, "beyond_bytes": beyond})
    };
    measured.memory.iter().enumerate().map(one).collect()
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
    let mut row = |name: &str, text: String| {
        table.add_row([name.to_owned(), text]);
    };
    let value = |name: &str| report[name].as_f64().unwrap_or(0.0);
    let (decode, limit) = (value("decode_tok_s"), value("memory_limit_tok_s"));
    row("decode", format!("{decode:.2} tokens/s"));
    row("prefill", format!("{:.1} tokens/s of a prompt of {}", value("prefill_tok_s"), value("prompt")));
    let (one, joint) = (value("read_gb_s"), value("joint_read_gb_s"));
    row(
        "memory limit",
        format!(
            "{limit:.1} tokens/s: router's weights at {one:.1} GB/s, experts at {joint:.1} GB/s together"
        ),
    );
    row("decode over limit", format!("{:.2}", value("memory_limit_ratio")));
    match report["predicted_tok_s"].as_f64() {
        Some(predicted) => row(
            "predicted",
            format!("{predicted:.1} tokens/s (measured {:+.0} %)", 100.0 * (decode / predicted - 1.0)),
        ),
        None => row("predicted", "nothing: no process measured its speed".to_owned()),
    }
    row("weights", format!("{} per token", output::bytes(value("weights_bytes_per_token") as u64)));
    row("wire", format!("{} per token", output::bytes(value("wire_bytes_per_token") as u64)));
    let here = (100.0 * value("experts_here"), 100.0 * value("experts_here_prefill"));
    row("experts on the router", format!("{:.0} % of decoding, {:.0} % of prefill", here.0, here.1));
    row("router overhead", format!("{:.0} us per layer and token", value("overhead_us_per_layer")));
    for process in report["memory"].as_array().into_iter().flatten() {
        let bytes = |name: &str| output::bytes(process[name].as_u64().unwrap_or(0));
        row(
            &format!("memory of {}", process["name"].as_str().unwrap_or_default()),
            format!(
                "{} ({} weights, {} KV cache, {} beyond)",
                bytes("rss_bytes"),
                bytes("weight_bytes"),
                bytes("kv_bytes"),
                bytes("beyond_bytes")
            ),
        );
    }
    if profile {
        for (name, us) in report["stages_us"].as_object().into_iter().flatten() {
            let prefill = report["prefill_stages_us"][name].as_f64().unwrap_or(0.0) / 1e3;
            let us = us.as_f64().unwrap_or(0.0);
            row(&format!("  {name}"), format!("{us:.0} us per token, {prefill:.1} ms per prompt"));
        }
    }
    if report["crowded"] == true {
        let (threads, cores) = (&report["threads"], &report["cores"]);
        row("note", format!("processes of {threads} threads share {cores} cores: they slow each other down"));
    }
    println!("{table}");
}
