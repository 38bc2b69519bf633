//! What is wanted often is shared, and little is moved for it.

use super::*;
use crate::cost::{DRAWS, Scene};
use crate::machine::Capacity;
use crate::placement::{Copies, Wishes, plan};
use crate::popularity::Counts;

fn facts() -> ModelFacts {
    ModelFacts {
        moe_layers: (0..8).collect(),
        experts: 64,
        expert_bytes: 10_000_000,
        top_k: 6,
        blocks: 6,
        block_bytes: 10_000_000 / 6,
        hidden: 2048,
        int8_rows: true,
        ..ModelFacts::default()
    }
}

fn nodes(speeds: &[u32], memory: u64) -> Vec<Capacity> {
    let node = |(node, mb_s): (NodeIndex, &u32)| Capacity {
        node,
        memory_bytes: memory,
        machine: Machine { weight_mb_s: [*mb_s; 5], ..Machine::default() },
    };
    (0..).zip(speeds).map(node).collect()
}

/// The first experts are wanted most: as a trained gate has it (Zipf's law).
fn skewed(facts: &ModelFacts) -> Popularity {
    let mut popularity = Popularity::even(facts);
    let rows: Vec<u32> = (1..=u32::from(facts.experts)).map(|rank| 40_000 / rank).collect();
    assert!(popularity.learn(&Counts { tokens: 100_000, rows: vec![rows; facts.moe_layers.len()] }));
    popularity
}

fn token_ns(facts: &ModelFacts, plan: &Plan, table: &Table, popularity: &Popularity) -> u64 {
    let machines: Vec<_> = plan.capacities.iter().map(|node| (node.node, node.machine)).collect();
    let scene = Scene {
        facts,
        router: plan.wishes.router,
        fallback_mb_s: 0,
        nodes: &machines,
        popularity: Some(popularity),
    };
    scene.decode(table, DRAWS).token_ns
}

fn moved(plan: &Plan, table: &Table) -> usize {
    let pairs = plan.table.all().zip(table.all());
    let new = |(before, after): (&Part, &Part)| {
        after.holders.as_slice().iter().filter(|node| !before.holders.contains(**node)).count()
    };
    pairs.map(|((_, before), (_, after))| new((before, after))).sum()
}

#[test]
fn hot_experts_are_shared_out_and_everyone_holds_as_many_as_before() {
    let facts = facts();
    let nodes = nodes(&[8000; 4], 1 << 40);
    let plan = plan(&facts, &nodes, &Wishes::default(), None);
    let popularity = skewed(&facts);
    let table = tuned(&facts, &plan, &popularity, 100);
    for node in 0..4 {
        assert_eq!(table.held_by(node).count(), plan.table.held_by(node).count());
    }
    let (before, after) =
        (token_ns(&facts, &plan, &plan.table, &popularity), token_ns(&facts, &plan, &table, &popularity));
    assert!(after * 100 < before * 95, "{before} -> {after}");
    // Some of that for a tenth of the experts, and no more than that.
    let some = tuned(&facts, &plan, &popularity, MOVE_MAX);
    assert!(moved(&plan, &some) <= 8 * 6 && moved(&plan, &some) > 0, "{}", moved(&plan, &some));
    assert!(token_ns(&facts, &plan, &some, &popularity) < before);
    // What is good stays.
    let again = Plan { table: table.clone(), ..plan.clone() };
    assert!(moved(&again, &tuned(&facts, &again, &popularity, 100)) <= 8);
}

#[test]
fn a_fast_node_with_little_memory_holds_what_is_wanted_most() {
    let facts = facts();
    let mut nodes = nodes(&[32_000, 4000, 4000], 1 << 40);
    nodes[0].memory_bytes = 8 * 8 * facts.expert_bytes;
    let plan = plan(&facts, &nodes, &Wishes::default(), None);
    assert_eq!(plan.load(0).experts, 64);
    let popularity = skewed(&facts);
    let table = tuned(&facts, &plan, &popularity, 100);
    let mass = |table: &Table| -> u32 {
        table
            .held_by(0)
            .filter(|slice| slice.key.layer == 0)
            .map(|slice| popularity.share(0, slice.key.expert))
            .sum()
    };
    assert!(mass(&table) > 2 * 8 * EVEN, "{} of {}", mass(&table), 64 * EVEN);
}

#[test]
fn copies_are_of_what_is_wanted() {
    let facts = facts();
    // Room for a copy of one expert in four.
    let nodes = nodes(&[8000; 2], 8 * 40 * facts.expert_bytes);
    let wishes = Wishes { copies: Copies::Auto, ..Wishes::default() };
    let plan = plan(&facts, &nodes, &wishes, None);
    assert_eq!(plan.copies(), (1, 2));
    let popularity = skewed(&facts);
    let table = tuned(&facts, &plan, &popularity, 100);
    let copies = |table: &Table| table.all().map(|(_, part)| part.holders.as_slice().len()).sum::<usize>();
    assert_eq!(copies(&table), copies(&plan.table));
    assert!(table.all().all(|(_, part)| !part.holders.is_empty()), "nothing is left without a holder");
    assert!(token_ns(&facts, &plan, &table, &popularity) < token_ns(&facts, &plan, &plan.table, &popularity));
}

#[test]
fn without_counts_or_with_slices_nothing_moves() {
    let facts = facts();
    let nodes = nodes(&[8000; 4], 1 << 40);
    let plan = plan(&facts, &nodes, &Wishes::default(), None);
    assert_eq!(tuned(&facts, &plan, &Popularity::even(&facts), 100), plan.table);
    let mut even = Popularity::even(&facts);
    assert!(even.learn(&Counts { tokens: 9999, rows: vec![vec![100; 64]; 8] }));
    assert_eq!(tuned(&facts, &plan, &even, 100), plan.table, "all are alike");
    let cut = Plan { cuts: 2, ..plan };
    assert_eq!(tuned(&facts, &cut, &skewed(&facts), 100), cut.table);
}
