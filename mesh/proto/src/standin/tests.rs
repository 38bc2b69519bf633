//! Who stands in for whom, and that nothing else changes.

use super::*;
use crate::machine::Machine;
use crate::placement::{Copies, Wishes, plan};

const EXPERT: u64 = 1000;

fn facts() -> ModelFacts {
    ModelFacts {
        moe_layers: vec![0, 2, 5],
        experts: 24,
        expert_bytes: EXPERT,
        top_k: 2,
        blocks: 4,
        block_bytes: EXPERT / 4,
        ..ModelFacts::default()
    }
}

fn nodes(experts: [u64; 4], mb_s: [u32; 4]) -> Vec<Capacity> {
    let node = |node: usize| Capacity {
        node: node as NodeIndex,
        memory_bytes: experts[node] * EXPERT,
        machine: Machine { weight_mb_s: [mb_s[node]; 5], ..Machine::default() },
    };
    (0..4).map(node).collect()
}

fn made(nodes: &[Capacity], copies: u8) -> Plan {
    plan(&facts(), nodes, &Wishes { copies: Copies::Exactly(copies), ..Wishes::default() }, None)
}

fn without(nodes: &[Capacity], out: &[NodeIndex], gone: bool, step_bytes: u64) -> Loss {
    let able = nodes.iter().filter(|node| !out.contains(&node.node)).copied().collect();
    Loss { out: out.to_vec(), gone: if gone { out.to_vec() } else { Vec::new() }, able, step_bytes }
}

fn gained(before: &Plan, after: &StoodIn, node: NodeIndex) -> usize {
    after.table.held_by(node).count() - before.table.held_by(node).count()
}

#[test]
fn what_only_the_lost_node_held_is_shared_out_evenly_and_all_else_stays() {
    let nodes = nodes([100; 4], [8000; 4]);
    let plan = made(&nodes, 1);
    assert_eq!(plan.load(1).experts, 18);
    let stood_in = stand_in(&facts(), &plan, &without(&nodes, &[1], false, u64::MAX), None);
    assert_eq!((stood_in.open, stood_in.more, stood_in.moved_bytes), (0, false, 18 * EXPERT));
    assert_eq!([0, 2, 3].map(|node| gained(&plan, &stood_in, node)), [6; 3]);
    for ((key, before), (_, after)) in plan.table.all().zip(stood_in.table.all()) {
        let (before, after) = (before.holders.as_slice(), after.holders.as_slice());
        assert_eq!(&after[..before.len()], before, "{key:?}: whoever held it holds it still");
        assert_eq!(after.len(), if before == [1] { 2 } else { 1 });
    }
    // Two at once, nothing on each other.
    let both = stand_in(&facts(), &plan, &without(&nodes, &[1, 2], false, u64::MAX), None);
    assert_eq!((both.open, gained(&plan, &both, 1), gained(&plan, &both, 2)), (0, 0, 0));
    assert_eq!([0, 3].map(|node| gained(&plan, &both, node)), [18; 2]);
}

#[test]
fn a_faster_node_takes_more_and_nobody_more_than_it_has_room_for() {
    let fast = nodes([100; 4], [8000, 8000, 32_000, 8000]);
    let plan = made(&fast, 1);
    let loss = without(&fast, &[1], false, u64::MAX);
    let stood_in = stand_in(&facts(), &plan, &loss, None);
    let more = [0, 2, 3].map(|node| gained(&plan, &stood_in, node));
    assert!(more[1] > more[0] && more[1] > more[2] && stood_in.open == 0, "{more:?}");
    // 19 experts of room in all, two of them free.
    let mut tight = loss.clone();
    for able in &mut tight.able {
        able.memory_bytes = plan.bytes(able.node, &facts()) + u64::from(able.node != 3) * (EXPERT + 999);
    }
    let some = stand_in(&facts(), &plan, &tight, None);
    assert_eq!([0, 2, 3].map(|node| gained(&plan, &some, node)), [1, 1, 0]);
    assert_eq!((some.open, some.more), (4 * (plan.load(1).experts as u64 - 2), false));
}

#[test]
fn a_step_is_bounded_and_says_that_there_is_more() {
    let nodes = nodes([100; 4], [8000; 4]);
    let mut plan = made(&nodes, 1);
    let mut steps = 0;
    loop {
        let stood_in = stand_in(&facts(), &plan, &without(&nodes, &[1], false, 2 * EXPERT), None);
        assert!(stood_in.moved_bytes <= 6 * EXPERT);
        steps += 1;
        plan.table = stood_in.table;
        if !stood_in.more {
            assert_eq!(stood_in.open, 0);
            break;
        }
    }
    assert_eq!(steps, 3);
    // One expert at least, however small a step is.
    let small = stand_in(&facts(), &made(&nodes, 1), &without(&nodes, &[1], false, 1), None);
    assert_eq!((small.moved_bytes, small.more), (3 * EXPERT, true));
}

#[test]
fn copies_are_made_again_of_what_is_gone_for_good_only() {
    let nodes = nodes([60, 60, 60, 60], [8000; 4]);
    let plan = made(&nodes, 2);
    assert_eq!(plan.copies(), (2, 2));
    let away = stand_in(&facts(), &plan, &without(&nodes, &[1], false, u64::MAX), None);
    assert_eq!((away.open, away.moved_bytes), (0, 0), "others hold all of it");
    let gone = stand_in(&facts(), &plan, &without(&nodes, &[1], true, u64::MAX), None);
    assert_eq!(gone.moved_bytes, plan.load(1).experts as u64 * EXPERT);
    for (key, part) in gone.table.all() {
        let alive = part.holders.as_slice().iter().filter(|node| **node != 1).count();
        assert_eq!(alive, 2, "{key:?}");
    }
    // With four holders there is no place left: that of one who is gone is taken.
    let four = made(&nodes, 4);
    let gone = stand_in(&facts(), &four, &without(&nodes, &[1], true, u64::MAX), None);
    assert!(gone.table.all().all(|(_, part)| part.holders.as_slice().len() <= HOLDERS_MAX));
}

#[test]
fn popular_experts_come_first_where_room_is_short() {
    let nodes = nodes([100; 4], [8000; 4]);
    let plan = made(&nodes, 1);
    let own: Vec<_> = plan.table.held_by(1).filter(|slice| slice.key.layer == 5).collect();
    let hot = own.last().unwrap().key.expert;
    let mut rows = vec![vec![100; 24]; 3];
    rows[2][usize::from(hot)] = 5000;
    let mut popularity = Popularity::even(&facts());
    assert!(popularity.learn(&crate::popularity::Counts { tokens: 5000, rows }));
    let mut loss = without(&nodes, &[1], false, u64::MAX);
    loss.able.iter_mut().for_each(|able| {
        able.memory_bytes = plan.bytes(able.node, &facts()) + u64::from(able.node == 0) * EXPERT;
    });
    let stood_in = stand_in(&facts(), &plan, &loss, Some(&popularity));
    assert_eq!(stood_in.table.parts(5, hot)[0].holders.as_slice(), [1, 0]);
}

#[test]
fn slices_go_to_who_holds_nothing_else_of_the_expert() {
    let nodes = nodes([100; 4], [8000; 4]);
    let large = ModelFacts { expert_bytes: 99_000_000, block_bytes: 24_750_000, ..facts() };
    let nodes: Vec<_> = nodes.into_iter().map(|node| Capacity { memory_bytes: 1 << 40, ..node }).collect();
    let wishes = |copies| Wishes { copies: Copies::Exactly(copies), slices: true, ..Wishes::default() };
    let whole = plan(&large, &nodes, &wishes(1), None);
    assert_eq!(whole.cuts, 4);
    // Every node holds a part of every expert: nobody can take another one.
    let loss = without(&nodes, &[1], false, u64::MAX);
    let stood_in = stand_in(&large, &whole, &loss, None);
    assert_eq!((stood_in.open, stood_in.moved_bytes), (3 * 24, 0));
    let halves = plan(&large, &nodes, &wishes(2), None);
    assert_eq!((halves.cuts, halves.copies()), (2, (2, 2)));
    let loss = without(&nodes, &[1], true, u64::MAX);
    let stood_in = stand_in(&large, &halves, &loss, None);
    for layer in &large.moe_layers {
        for expert in 0..large.experts {
            let parts = stood_in.table.parts(*layer, expert);
            for node in 0..4 {
                assert!(parts.iter().filter(|part| part.holders.contains(node)).count() <= 1);
            }
        }
    }
}
