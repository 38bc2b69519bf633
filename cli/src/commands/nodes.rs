//! `moemesh nodes`: what a running router says of its nodes, and whom it is to shut out or let back in.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Subcommand};
use comfy_table::{Cell, CellAlignment, Table, presets};
use router::admin::{self, Answer, Question};
use serde_json::{Value, json};

use crate::client::Client;
use crate::{output, state};

/// Options of `moemesh nodes`.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Options {
    #[command(subcommand)]
    change: Option<Change>,
    /// The router's address
    #[arg(long, env = "MOEMESH_ROUTER", default_value = "http://127.0.0.1:8620")]
    router: String,
    /// API key, if the router wants one
    #[arg(long, env = "MOEMESH_API_KEY", hide_env_values = true)]
    api_key: Option<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What to change; asked of the router on this machine, over a socket in its state folder.
#[derive(Debug, Subcommand)]
enum Change {
    /// Shut a node out for good: its connection is cut, its key is refused from now on
    Revoke(Target),
    /// Let a node back in that was quarantined: for sending what no correct node sends, or for computing wrongly
    Pardon(Target),
}

#[derive(Args, Debug)]
struct Target {
    /// Name of the node; for `revoke`, the first digits of its key do as well
    node: String,
    /// State folder of the router [default: as `moemesh router` has it]
    #[arg(long, env = "MOEMESH_STATE")]
    state: Option<PathBuf>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

fn change(change: &Change) -> anyhow::Result<ExitCode> {
    let (target, question, done) = match change {
        Change::Revoke(target) => (target, Question::Revoke { node: target.node.clone() }, "revoked"),
        Change::Pardon(target) => (target, Question::Pardon { node: target.node.clone() }, "pardoned"),
    };
    let state = state::folder(target.state.clone(), "router")?;
    let Answer::Done { node, epoch } = admin::ask(&state, &question)? else {
        bail!("the router answered something else; is it of this version?");
    };
    if target.json {
        output::json(&json!({done: node, "roster": epoch}))?;
    } else {
        println!("{node} is {done} (roster {epoch})");
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    if let Some(wanted) = &options.change {
        return change(wanted);
    }
    let client = Client::new(&options.router, options.api_key.clone());
    let nodes = client.fetch("/api/v1/nodes")?;
    if options.json {
        output::json(&nodes)?;
    } else {
        println!("{}", table(&nodes));
        if !has_sensors(&nodes) {
            println!("temperature, throttling and power: unavailable on all machines");
        }
        for node in nodes["nodes"].as_array().into_iter().flatten() {
            if let (Some(name), Some(note)) =
                (node["name"].as_str(), node["note"].as_str().filter(|n| !n.is_empty()))
            {
                println!("{name}: {note}");
            }
        }
        promise(&nodes).into_iter().for_each(|line| println!("{line}"));
        for (key, what) in [("change", "last change"), ("loading", "being loaded")] {
            change_line(&nodes[key], what).into_iter().for_each(|line| println!("{line}"));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What machines show of themselves, where any does.
const MACHINE: [&str; 4] = ["temp", "throttled", "power", "J/token"];

/// The nodes as a table: who they are, what they hold, what they did, and, as far as there are audits and sensors, what
/// those show.
pub(crate) fn table(nodes: &Value) -> Table {
    let list = nodes["nodes"].as_array().map(Vec::as_slice).unwrap_or_default();
    let (audits, sensors) = (list.iter().any(|node| !node["audits"].is_null()), has_sensors(nodes));
    let mut header = vec![
        "node", "state", "experts", "weights", "link", "rate", "planned", "share", "calls", "out", "in",
        "service", "trip", "missed",
    ];
    header.extend(audits.then_some("audited"));
    header.extend(MACHINE.iter().filter(|_| sensors));
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(header);
    for column in table.column_iter_mut().skip(2) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let calls: u64 = list.iter().map(|node| number(node, "assignments")).sum::<u64>().max(1);
    for node in list {
        let share = 100.0 * number(node, "assignments") as f64 / calls as f64;
        let mut row = vec![
            Cell::new(node["name"].as_str().unwrap_or("?")),
            Cell::new(state_of(node)),
            Cell::new(number(node, "experts")),
            Cell::new(output::bytes(number(node, "weight_bytes"))),
            Cell::new(measured(number(&node["link"], "round_trip_us"), "us")),
            Cell::new(measured(number(&node["link"], "mb_s"), "MB/s")),
            Cell::new(
                node["planned_share"]
                    .as_f64()
                    .map_or_else(String::new, |share| format!("{:.0} %", 100.0 * share)),
            ),
            Cell::new(format!("{share:.0} %")),
            Cell::new(number(node, "calls")),
            Cell::new(output::bytes(number(node, "bytes_out"))),
            Cell::new(output::bytes(number(node, "bytes_in"))),
            Cell::new(format!("{} us", number(node, "service_us"))),
            Cell::new(format!("{} us", number(node, "round_trip_us"))),
            Cell::new(number(node, "missed")),
        ];
        row.extend(audits.then(|| Cell::new(audited(&node["audits"]))));
        let machine = [
            shown(&node["temperature_celsius"], 0, " C"),
            throttled(node),
            shown(&node["power_watts"], 0, " W"),
            shown(&node["joules_per_token"], 1, ""),
        ];
        row.extend(machine.into_iter().filter(|_| sensors).map(Cell::new));
        table.add_row(row);
    }
    table
}

/// Whether any machine shows anything of its temperature, throttling or power.
fn has_sensors(nodes: &Value) -> bool {
    let shows = |node: &Value| {
        ["temperature_celsius", "throttled", "power_watts"].iter().any(|figure| !node[figure].is_null())
    };
    nodes["nodes"].as_array().into_iter().flatten().any(shows)
}

/// How a node is doing; of one that is loading, how far it is.
fn state_of(node: &Value) -> String {
    let state = node["state"].as_str().unwrap_or("?");
    let (done, total) = (number(&node["loading"], "done_bytes"), number(&node["loading"], "total_bytes"));
    match (done.saturating_mul(100)).checked_div(total) {
        Some(percent) => format!("{state} {percent} % of {}", output::bytes(total)),
        None => state.to_owned(),
    }
}

/// A figure that may not have been measured yet.
fn measured(figure: u64, unit: &str) -> String {
    if figure == 0 { String::new() } else { format!("{figure} {unit}") }
}

/// Answers that were audited, and how many of them were wrong, if any was; nothing where none are.
fn audited(audits: &Value) -> String {
    let (right, wrong) = (number(audits, "right"), number(audits, "wrong"));
    match (audits.is_null(), wrong) {
        (true, _) => "-".to_owned(),
        (false, 0) => right.to_string(),
        (false, wrong) => format!("{}, {wrong} wrong", right + wrong),
    }
}

/// Whether a machine slows itself down, and whether it is spared for that or for being hot.
fn throttled(node: &Value) -> String {
    let throttled = match node["throttled"].as_bool() {
        Some(true) => "yes",
        Some(false) => "no",
        None => "-",
    };
    let spared = if node["spared"].as_bool() == Some(true) { ", spared" } else { "" };
    format!("{throttled}{spared}")
}

/// A figure that a machine may not show.
fn shown(figure: &Value, digits: usize, unit: &str) -> String {
    figure.as_f64().map_or_else(|| "-".to_owned(), |figure| format!("{figure:.digits$}{unit}"))
}

/// What the plan in use promised, in a line; nothing without one.
pub(crate) fn promise(report: &Value) -> Option<String> {
    let plan = &report["plan"];
    let tok_s = plan["predicted_tok_s"].as_f64()?;
    let left = match number(plan, "unplaced") {
        0 => String::new(),
        unplaced => format!(", {unplaced} experts or slices on the router for want of memory"),
    };
    let (epoch, copies) = (number(plan, "epoch"), number(plan, "copies"));
    let holders = if copies == 1 { "holder" } else { "holders" };
    Some(format!(
        "plan {epoch}: {tok_s:.1} tokens/s predicted, at least {copies} {holders} of what is held{left}"
    ))
}

/// What a change of the placement did, in a line; nothing without one.
fn change_line(change: &Value, what: &str) -> Option<String> {
    let reason = change["reason"].as_str()?;
    let names: Vec<&str> = change["nodes"].as_array()?.iter().filter_map(Value::as_str).collect();
    let who = if names.is_empty() { String::new() } else { format!(" {}", names.join(", ")) };
    let predicted = |key: &str| change[key].as_f64().map(|tok_s| format!("{tok_s:.1}"));
    let to = |before: Option<String>, after: String| match before {
        Some(before) => format!("{before} -> {after}"),
        None => after,
    };
    let after = predicted("predicted_tok_s")?;
    let predicted = to(predicted("predicted_tok_s_before"), after);
    let rate = |key: &str| {
        let rate = &change[key];
        Some(format!("{:.1} ({:.1} at a time)", rate["tok_s"].as_f64()?, rate["rows_per_step"].as_f64()?))
    };
    let unmeasured = "not enough load".to_owned();
    let measured = match (rate("measured_before"), rate("measured")) {
        (None, None) => unmeasured,
        (before, now) => to(Some(before.unwrap_or_else(|| unmeasured.clone())), now.unwrap_or(unmeasured)),
    };
    Some(format!(
        "{what}, plan {}: {reason}{who}; tokens/s predicted {predicted}, measured {measured}; {} moved",
        number(change, "epoch"),
        output::bytes(number(change, "moved_bytes")),
    ))
}

fn number(node: &Value, key: &str) -> u64 {
    node[key].as_u64().unwrap_or(0)
}
