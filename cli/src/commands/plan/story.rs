//! A plan, told to people: first whether it works and how fast, then who does what, then what could go wrong.

use comfy_table::{Cell, CellAlignment, Table, presets};

use super::outcome::{NodeOutcome, Outcome, Question, experts_bytes};
use crate::output::bytes;

/// Nodes of which each is told what its loss does; of more, the worst.
const LOSSES_MAX: usize = 8;

/// The whole story.
pub(super) fn tell(question: &Question, outcome: &Outcome) -> String {
    let mut text = String::new();
    let mut say = |line: String| {
        text.push_str(&line);
        text.push('\n');
    };
    let facts = &question.facts;
    let layers = facts.moe_layers.len();
    say(format!(
        "{}, {}: {} of experts ({layers} layers of {}, {} each, {} per token) and {} on the router",
        question.name,
        question.weights,
        bytes(experts_bytes(facts)),
        facts.experts,
        bytes(facts.expert_bytes),
        facts.top_k,
        bytes(facts.router_bytes),
    ));
    say(String::new());
    fit(outcome, &mut say);
    speed(question, outcome, &mut say);
    if !outcome.nodes.is_empty() {
        say(String::new());
        say(machines(question, outcome).to_string());
        say(String::new());
        losses(outcome, &mut say);
    }
    slower(outcome, &mut say);
    if !outcome.more.is_empty() {
        say(String::new());
        for (count, tok_s, fits) in &outcome.more {
            let machines =
                if *count == 1 { "one more machine".to_owned() } else { format!("{count} more machines") };
            let fits = if *fits { "" } else { ", though not all experts fit" };
            say(format!("with {machines} like this one  {tok_s:.1} tokens/s{fits}"));
        }
    }
    if !question.machines.assumed.is_empty() {
        say(String::new());
    }
    for assumed in &question.machines.assumed {
        say(format!("assumed        {assumed}"));
    }
    text.truncate(text.trim_end().len());
    text
}

fn fit(outcome: &Outcome, say: &mut impl FnMut(String)) {
    if outcome.missing_bytes == 0 {
        let spare = match outcome.nodes.len() {
            0 => String::new(),
            _ => format!(", {} of the nodes' memory to spare", bytes(outcome.spare_bytes)),
        };
        say(format!("fits           yes{spare}"));
    } else {
        say(format!(
            "fits           no: {} of experts would be read from the router's files, token by token",
            bytes(outcome.missing_bytes)
        ));
        say(format!("to make it fit {}", outcome.remedies.join(", or ")));
    }
    if outcome.router_fits == Some(false) {
        say("               and the router has less memory than its own weights take".to_owned());
    }
}

fn speed(question: &Question, outcome: &Outcome, say: &mut impl FnMut(String)) {
    let [router, experts] = outcome.token_ms;
    say(format!(
        "decode         {:.1} tokens/s: {router:.1} ms of the router and {experts:.1} ms of experts per token",
        outcome.tok_s
    ));
    say(format!("prefill        up to {:.0} tokens/s, bounded by {}", outcome.prefill_tok_s, outcome.cap));
    say(format!(
        "first token    {:.1} s after a prompt of {} tokens",
        outcome.first_token_s, question.prompt
    ));
    if outcome.nodes.is_empty() {
        return;
    }
    let shape = match outcome.plan.cuts {
        1 => "experts stay whole".to_owned(),
        cuts => format!("experts are cut into {cuts} parts each, on as many nodes"),
    };
    let copies = match (outcome.single, outcome.plan.copies()) {
        (0, (least, _)) => format!("every one has {least} holders"),
        (single, _) if single == outcome.parts => "every one has one holder".to_owned(),
        (single, _) => format!("{single} of {} have only one holder", outcome.parts),
    };
    say(format!("placement      {shape}; {copies}"));
}

fn machines(question: &Question, outcome: &Outcome) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header([
        "",
        "memory",
        "reads",
        "link",
        "holds",
        "of that copies",
        "work",
        "last",
        "wire per token",
    ]);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let speed = |mb_s: u32| match mb_s {
        0 => "?".to_owned(),
        mb_s => format!("{:.1} GB/s", f64::from(mb_s) / 1e3),
    };
    let router = &question.machines.router;
    let own = match router.memory_bytes {
        0 => String::new(),
        memory => bytes(memory),
    };
    let row = ["router".to_owned(), own, speed(router.machine.weight_mb_s[0])];
    table.add_row(row.map(Cell::new));
    for (node, machine) in outcome.nodes.iter().zip(&question.machines.nodes) {
        let link = machine.machine.link;
        let link = format!("{:.2} ms {:.0} MB/s", f64::from(link.round_trip_us) / 1e3, f64::from(link.mb_s));
        let held = node.primaries + node.copies;
        let copies = 100.0 * node.copies as f64 / held.max(1) as f64;
        table.add_row([
            Cell::new(&node.name),
            Cell::new(bytes(machine.memory_bytes)),
            Cell::new(speed(machine.machine.weight_mb_s[0])),
            Cell::new(link),
            Cell::new(format!("{held} = {}", bytes(node.bytes))),
            Cell::new(format!("{copies:.0} %")),
            Cell::new(format!("{:.0} %", 100.0 * node.share)),
            Cell::new(format!("{:.0} %", 100.0 * node.last)),
            Cell::new(bytes(node.wire_bytes)),
        ]);
    }
    table
}

/// What each loss does, the worst first.
fn losses(outcome: &Outcome, say: &mut impl FnMut(String)) {
    let mut nodes: Vec<&NodeOutcome> = outcome.nodes.iter().collect();
    nodes.sort_by(|a, b| a.lost_tok_s.total_cmp(&b.lost_tok_s));
    for node in nodes.iter().take(LOSSES_MAX) {
        let rest = match node.lost_bytes {
            0 => "others hold copies of all it has".to_owned(),
            lost => format!("the router computes {} from its own files, slowly at first", bytes(lost)),
        };
        say(format!("if {} is lost  {:.1} tokens/s: {rest}", node.name, node.lost_tok_s));
    }
    if let Some(more) = nodes.len().checked_sub(LOSSES_MAX).filter(|more| *more > 0) {
        say(format!("               the other {more} matter less"));
    }
    say("if the router is lost  nothing answers until it is back; the nodes wait for it".to_owned());
}

fn slower(outcome: &Outcome, say: &mut impl FnMut(String)) {
    let mut first = true;
    for node in &outcome.nodes {
        let line = match (node.without_tok_s, node.forced_tok_s) {
            (Some(without), _) => {
                format!("without {}: {without:.1} tokens/s instead of {:.1}", node.name, outcome.tok_s)
            }
            (None, Some(forced)) if forced < outcome.tok_s => format!(
                "{} would make it slower: with shares by speed alone {forced:.1} tokens/s; it only {}",
                node.name,
                if node.copies > 0 { "holds copies" } else { "stands by" },
            ),
            _ => continue,
        };
        if std::mem::take(&mut first) {
            say(String::new());
        }
        say(line);
    }
}
