//! A plan as text, so that a router that starts again asks its nodes for what they hold already.
//!
//! Nodes are named by their keys, because their positions are those of one run. Reading believes nothing: the text must
//! be about this model, and every expert of it must be there exactly once, cut as it can be cut. Machines that are no
//! longer in the roster are left out; what only they held is the router's until the next plan. The price is half a
//! megabyte for the largest models. Refuses other versions of the format: then a plan is made anew.

use mesh_wire::id::NodeId;

use crate::cost::{DRAWS, Scene};
use crate::facts::{LinkSpeed, Member, ModelFacts};
use crate::machine::{Capacity, Machine};
use crate::placement::{Copies, Plan, Wishes};
use crate::routes::{Holders, NodeIndex, Part, ROUTER, Table};

/// First line; the number grows when old texts cannot be read any more.
const TITLE: &str = "moemesh placement 1";

/// How the router is called in a list of holders.
const HERE: &str = "r";

/// A plan and its epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    /// Version of the placement.
    pub epoch: u64,
    /// Who holds what.
    pub plan: Plan,
}

/// Why a text is no plan for this cluster.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoredError {
    /// Another program or version wrote it.
    #[error("it does not begin with '{TITLE}'")]
    Title,
    /// It is about another model, or the same in another format.
    #[error("it is about another model")]
    Model,
    /// It is damaged.
    #[error("line {line} is not {expected}")]
    Line {
        /// Counted from 1.
        line: usize,
        /// What should have been there.
        expected: &'static str,
    },
}

impl Stored {
    /// The text. `members` are the roster, by `NodeIndex`.
    pub fn to_text(&self, facts: &ModelFacts, members: &[Member]) -> String {
        let Wishes { copies, slices, router_experts, router } = self.plan.wishes;
        let copies = match copies {
            Copies::Auto => 0,
            Copies::Exactly(copies) => copies,
        };
        let mut text = format!(
            "{TITLE}\nmodel {}\nepoch {}\nwishes {copies} {} {router_experts} {}\ncuts {}\n",
            NodeId(facts.fingerprint).to_hex(),
            self.epoch,
            u8::from(slices),
            figures(&router),
            self.plan.cuts,
        );
        let mut places = vec![None; members.len()];
        let mut place = 0;
        for capacity in &self.plan.capacities {
            let Some(member) = members.get(usize::from(capacity.node)) else { continue };
            places[usize::from(capacity.node)] = Some(place);
            place += 1;
            let (key, figures) = (member.id.to_hex(), figures(&capacity.machine));
            text.push_str(&format!("node {key} {} {figures}\n", capacity.memory_bytes));
        }
        for layer in &facts.moe_layers {
            text.push_str(&format!("layer {layer}\n"));
            for expert in 0..facts.experts {
                let parts = self.plan.table.parts(*layer, expert).iter().map(|part| {
                    let name = |node: &NodeIndex| match *node {
                        ROUTER => Some(HERE.to_owned()),
                        node => places
                            .get(usize::from(node))
                            .copied()
                            .flatten()
                            .map(|place: u16| place.to_string()),
                    };
                    let holders: Vec<_> = part.holders.as_slice().iter().filter_map(name).collect();
                    format!("{}:{}", part.to, holders.join(","))
                });
                text.push_str(&parts.collect::<Vec<_>>().join(" "));
                text.push('\n');
            }
        }
        text
    }

    /// Reads a text that `to_text` wrote, for a roster that may have changed since.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(text: &str, facts: &ModelFacts, members: &[Member]) -> Result<Stored, StoredError> {
        let mut lines = Lines { lines: text.lines(), line: 0 };
        if lines.next() != Some(TITLE) {
            return Err(StoredError::Title);
        }
        if lines.after("model ")? != NodeId(facts.fingerprint).to_hex() {
            return Err(StoredError::Model);
        }
        let epoch = lines.numbers("epoch ", 1)?[0];
        let wishes = lines.numbers("wishes ", 10)?;
        let small = |number: u64| u16::try_from(number).map_err(|_| lines.wrong("numbers in their range"));
        let copies = match u8::try_from(wishes[0]) {
            Ok(0) => Copies::Auto,
            Ok(copies) => Copies::Exactly(copies),
            Err(_) => return Err(lines.wrong("numbers in their range")),
        };
        let router = machine(&wishes[3..]);
        let wishes = Wishes { copies, slices: wishes[1] != 0, router_experts: small(wishes[2])?, router };
        let cuts = lines.numbers("cuts ", 1)?[0];
        let cuts = u16::try_from(cuts).map_err(|_| lines.wrong("a number in its range"))?;
        let mut capacities = Vec::new();
        // By the text's number of a node, its position here.
        let mut nodes: Vec<Option<NodeIndex>> = Vec::new();
        let mut line = lines.next();
        while let Some(node) = line.and_then(|line| line.strip_prefix("node ")) {
            let (key, rest) = node.split_once(' ').unwrap_or((node, ""));
            let rest = numbers(rest, 8).ok_or_else(|| lines.wrong("a node's key and figures"))?;
            let known = members.iter().position(|member| member.id.to_hex() == key);
            let known = known.map(|known| known as NodeIndex);
            if known.is_some() && nodes.contains(&known) {
                return Err(lines.wrong("a node that was not there before"));
            }
            nodes.push(known);
            capacities.extend(known.map(|node| Capacity {
                node,
                memory_bytes: rest[0],
                machine: machine(&rest[1..]),
            }));
            line = lines.next();
        }
        let mut table = Table::empty(facts);
        for layer in &facts.moe_layers {
            if line != Some(&format!("layer {layer}")) {
                return Err(lines.wrong("the next layer"));
            }
            let mut experts = Vec::with_capacity(usize::from(facts.experts));
            for _ in 0..facts.experts {
                let expert = lines.next().and_then(|line| parts(line, facts.blocks, &nodes));
                experts.push(expert.ok_or_else(|| lines.wrong("the parts of an expert"))?);
            }
            table.set_layer(*layer, experts.iter());
            line = lines.next();
        }
        if line.is_some() {
            return Err(lines.wrong("the end"));
        }
        let machines: Vec<_> = capacities.iter().map(|node| (node.node, node.machine)).collect();
        let scene = Scene { facts, router, fallback_mb_s: 0, nodes: &machines, popularity: None };
        let predicted = scene.decode(&table, DRAWS);
        Ok(Stored { epoch, plan: Plan { capacities, wishes, cuts, table, predicted } })
    }
}

/// The parts of an expert, `to:holders` each; together the whole, no node twice.
fn parts(line: &str, blocks: u16, nodes: &[Option<NodeIndex>]) -> Option<Vec<Part>> {
    let (mut parts, mut from) = (Vec::new(), 0);
    let mut seen = Vec::new();
    for part in line.split(' ') {
        let (to, holders) = part.split_once(':')?;
        let to: u16 = to.parse().ok()?;
        if to <= from || to > blocks {
            return None;
        }
        let mut part = Part { from, to, holders: Holders::default() };
        for holder in holders.split(',').filter(|holder| !holder.is_empty()) {
            let node = match holder {
                HERE => Some(ROUTER),
                number => *nodes.get(number.parse::<usize>().ok()?)?,
            };
            let Some(node) = node else { continue };
            if node != ROUTER && seen.contains(&node) || !part.holders.add(node) {
                return None;
            }
            seen.push(node);
        }
        parts.push(part);
        from = to;
    }
    (from == blocks).then_some(parts)
}

fn figures(machine: &Machine) -> String {
    let link = [machine.link.round_trip_us, machine.link.mb_s];
    let all = machine.weight_mb_s.iter().chain(&link);
    all.map(u32::to_string).collect::<Vec<_>>().join(" ")
}

/// Seven figures; those too large to be any count as the largest.
fn machine(figures: &[u64]) -> Machine {
    let figure = |at: usize| u32::try_from(figures[at]).unwrap_or(u32::MAX);
    Machine {
        weight_mb_s: [0, 1, 2, 3, 4].map(figure),
        link: LinkSpeed { round_trip_us: figure(5), mb_s: figure(6) },
    }
}

/// Exactly so many numbers.
fn numbers(text: &str, count: usize) -> Option<Vec<u64>> {
    let numbers: Option<Vec<u64>> = text.split(' ').map(|number| number.parse().ok()).collect();
    numbers.filter(|numbers| numbers.len() == count)
}

struct Lines<'a> {
    lines: std::str::Lines<'a>,
    line: usize,
}

impl<'a> Lines<'a> {
    fn next(&mut self) -> Option<&'a str> {
        self.line += 1;
        self.lines.next()
    }

    fn wrong(&self, expected: &'static str) -> StoredError {
        StoredError::Line { line: self.line, expected }
    }

    fn after(&mut self, start: &str) -> Result<&'a str, StoredError> {
        let line = self.next().and_then(|line| line.strip_prefix(start));
        line.ok_or_else(|| self.wrong("what has to come here"))
    }

    fn numbers(&mut self, start: &str, count: usize) -> Result<Vec<u64>, StoredError> {
        let line = self.after(start)?;
        numbers(line, count).ok_or_else(|| self.wrong("as many numbers as belong here"))
    }
}

#[cfg(test)]
mod tests;
