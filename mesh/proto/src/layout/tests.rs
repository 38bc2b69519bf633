//! What `placement` does not already show of tables.

use super::*;

#[test]
fn shares_are_whole_and_add_up() {
    assert_eq!(shared_out(10, &[1, 1, 1], &[100; 3]), [4, 3, 3]);
    assert_eq!(shared_out(10, &[3, 1, 0], &[4, 100, 100]), [4, 6, 0]);
    assert_eq!(shared_out(10, &[1, 1], &[2, 3]), [2, 3], "no more than there is room for");
    assert_eq!(shared_out(u64::MAX, &[u64::MAX, u64::MAX], &[u64::MAX; 2]), [u64::MAX / 2 + 1, u64::MAX / 2]);
    assert_eq!(shared_out(5, &[], &[]), [0; 0]);
}

#[test]
fn a_stride_visits_everyone_once() {
    for count in 1..200 {
        let step = stride(count);
        let mut seen: Vec<_> = (0..count).map(|turn| turn * step % count).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..count).collect::<Vec<_>>());
    }
}

#[test]
fn experts_are_cut_in_proportion_and_as_often_as_asked() {
    let facts = ModelFacts {
        moe_layers: vec![0, 1],
        experts: 10,
        expert_bytes: 600,
        blocks: 6,
        block_bytes: 100,
        ..ModelFacts::default()
    };
    let nodes: Vec<_> = (0..3)
        .map(|node| Capacity { node, memory_bytes: 1 << 30, machine: crate::machine::Machine::default() })
        .collect();
    let layout = Layout {
        facts: &facts,
        nodes: &nodes,
        weights: &[3, 2, 1],
        cuts: 3,
        copies: 1,
        router_experts: 0,
        previous: None,
    };
    let table = layout.table().unwrap();
    let sizes = |expert| table.parts(0, expert).iter().map(|part| part.to - part.from).collect::<Vec<_>>();
    for expert in 0..10 {
        assert_eq!(sizes(expert), [3, 2, 1]);
    }
    let two = Layout { cuts: 2, ..layout.clone() }.table().unwrap();
    let blocks = |node| two.held_by(node).map(|slice| u32::from(slice.to - slice.from)).sum::<u32>();
    assert_eq!([0, 1, 2].map(blocks), [60, 40, 20]);
    assert!((0..9).all(|expert| two.parts(0, expert).len() == 2));
    // 119 of 120 blocks are not enough.
    let small: Vec<_> = nodes
        .iter()
        .map(|node| Capacity { memory_bytes: 4000 - 100 * u64::from(node.node == 2), ..*node })
        .collect();
    assert_eq!(Layout { nodes: &small, ..layout }.table(), None);
}
