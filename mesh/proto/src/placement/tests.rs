//! Placement: what holds for every input.

use proptest::prelude::*;

use super::*;

fn facts(layers: u16, experts: u16) -> ModelFacts {
    ModelFacts {
        fingerprint: [7; 32],
        // Every second layer, so that layer numbers and positions differ.
        moe_layers: (0..layers).map(|layer| 2 * layer + 1).collect(),
        experts,
        expert_bytes: 10,
        top_k: 2,
        blocks: 1,
        ..ModelFacts::default()
    }
}

fn node(node: NodeIndex, memory_bytes: u64, weight_mb_s: u32) -> Capacity {
    Capacity { node, memory_bytes, weight_mb_s }
}

/// By layer with experts and expert, its holder.
fn owners(plan: &Plan) -> Vec<Vec<Option<NodeIndex>>> {
    (0..plan.table.layers())
        .map(|layer| plan.owners(layer).collect())
        .filter(|owners: &Vec<_>| !owners.is_empty())
        .collect()
}

/// `[node][layer]`.
fn counts(plan: &Plan, nodes: &[Capacity]) -> Vec<Vec<usize>> {
    let of = |node: NodeIndex| {
        owners(plan)
            .iter()
            .map(|owners| owners.iter().filter(|owner| **owner == Some(node)).count())
            .collect()
    };
    nodes.iter().map(|capacity| of(capacity.node)).collect()
}

fn any_nodes() -> impl Strategy<Value = Vec<Capacity>> {
    let speed = prop_oneof![Just(0_u32), 1..30_000_u32];
    prop::collection::vec((0..4000_u64, speed), 1..8).prop_map(|nodes| {
        (0..).zip(nodes).map(|(index, (memory, speed))| node(index, memory, speed)).collect()
    })
}

/// Experts that change hands, or come from the router.
fn gained(before: &Plan, after: &Plan, node: NodeIndex) -> usize {
    let (before, after) = (owners(before), owners(after));
    let pairs = before.iter().flatten().zip(after.iter().flatten());
    pairs.filter(|(before, after)| **after == Some(node) && before != after).count()
}

proptest! {
    #[test]
    fn never_above_memory_and_whole_when_it_fits(nodes in any_nodes(), layers in 1..12_u16, experts in 1..40_u16) {
        let facts = facts(layers, experts);
        let plan = plan(&facts, &nodes, None);
        let mut placed = 0;
        for capacity in &nodes {
            let keys = plan.experts(capacity.node);
            prop_assert!(keys.len() as u64 * facts.expert_bytes <= capacity.memory_bytes);
            prop_assert!(keys.is_sorted());
            prop_assert_eq!(keys.len(), plan.load(capacity.node).experts);
            placed += keys.len();
        }
        let all = usize::from(layers) * usize::from(experts);
        let room: u64 = nodes.iter().map(|node| node.experts(&facts)).sum();
        prop_assert_eq!(placed as u64, room.min(all as u64));
        prop_assert_eq!(plan.unplaced(), all - placed);
    }

    #[test]
    fn every_layer_is_spread_like_the_whole(nodes in any_nodes(), layers in 1..12_u16, experts in 1..40_u16) {
        let facts = facts(layers, experts);
        let plan = plan(&facts, &nodes, None);
        for per_layer in counts(&plan, &nodes) {
            let (least, most) = (per_layer.iter().min().unwrap(), per_layer.iter().max().unwrap());
            prop_assert!(most - least <= 1, "{per_layer:?}");
        }
        let on_router: Vec<_> = owners(&plan).iter()
            .map(|owners| owners.iter().filter(|owner| owner.is_none()).count()).collect();
        prop_assert!(on_router.iter().max().unwrap() - on_router.iter().min().unwrap() <= 1, "{on_router:?}");
    }

    #[test]
    fn equal_nodes_differ_by_one(count in 1..9_u16, memory in 0..4000_u64, layers in 1..12_u16, experts in 1..40_u16) {
        let facts = facts(layers, experts);
        let nodes: Vec<_> = (0..count).map(|index| node(index, memory, 0)).collect();
        let counts = counts(&plan(&facts, &nodes, None), &nodes);
        for layer in 0..usize::from(layers) {
            let most = counts.iter().map(|per_layer| per_layer[layer]).max().unwrap();
            let least = counts.iter().map(|per_layer| per_layer[layer]).min().unwrap();
            prop_assert!(most - least <= 1, "layer {layer}: {counts:?}");
        }
    }

    #[test]
    fn with_room_the_share_follows_the_speed(speeds in prop::collection::vec(1..30_000_u32, 1..6), experts in 8..64_u16) {
        let facts = facts(6, experts);
        let nodes: Vec<_> = (0..).zip(&speeds).map(|(index, speed)| node(index, 1 << 40, *speed)).collect();
        let plan = plan(&facts, &nodes, None);
        let load = |node: &Capacity| plan.load(node.node).experts as f64;
        for (a, b) in nodes.iter().flat_map(|a| nodes.iter().map(move |b| (a, b))) {
            let fastest = *speeds.iter().max().unwrap();
            // Nobody counts as slower than an eighth of the fastest.
            let counted = |node: &Capacity| f64::from(node.weight_mb_s.max(fastest / 8).max(1));
            let ratio = counted(a) / counted(b);
            // Levelling moves a ratio by a factor of 3/2 at most, rounding each side by less than an expert.
            let most = ratio * 1.5 * (load(b) + 1.0) + 1.0;
            prop_assert!(load(a) <= most, "{} of {speeds:?}: {} to {}", ratio, load(a), load(b));
        }
    }

    #[test]
    fn an_added_node_moves_little_else(nodes in any_nodes(), added in 0..4000_u64, layers in 1..12_u16, experts in 1..40_u16) {
        let facts = facts(layers, experts);
        let before: Vec<_> = nodes.iter().map(|old| node(old.node, old.memory_bytes, 0)).collect();
        let mut after = before.clone();
        after.push(node(99, added, 0));
        let (old, fresh) = (plan(&facts, &before, None), plan(&facts, &after, None));
        let new = plan(&facts, &after, Some(&old));
        // The same sizes as a plan from nothing ...
        for capacity in &after {
            prop_assert_eq!(new.load(capacity.node).experts, fresh.load(capacity.node).experts);
        }
        // ... and nobody but the new node gains, except one expert per layer for rounding.
        for capacity in &before {
            prop_assert!(gained(&old, &new, capacity.node) <= usize::from(layers));
        }
        prop_assert_eq!(plan(&facts, &after, Some(&new)), new);
    }

    #[test]
    fn an_added_equal_node_is_the_only_one_to_gain(count in 1..5_u16, layers in 1..12_u16, experts in 20..40_u16) {
        let facts = facts(layers, experts);
        let nodes: Vec<_> = (0..=count).map(|index| node(index, 1 << 30, 0)).collect();
        let old = plan(&facts, &nodes[..usize::from(count)], None);
        let new = plan(&facts, &nodes, Some(&old));
        for capacity in &nodes[..usize::from(count)] {
            prop_assert_eq!(gained(&old, &new, capacity.node), 0);
        }
    }
}

#[test]
fn a_departed_node_leaves_the_others_what_they_have() {
    let facts = facts(4, 24);
    let nodes: Vec<_> = (0..3).map(|index| node(index, 1 << 30, 0)).collect();
    let old = plan(&facts, &nodes, None);
    let new = plan(&facts, &nodes[1..], Some(&old));
    assert_eq!(new.unplaced(), 0);
    for index in 1..3 {
        let (before, after) = (old.experts(index), new.experts(index));
        assert!(before.iter().all(|key| after.contains(key)), "node {index} gave something away");
    }
}

#[test]
fn absurd_figures_neither_overflow_nor_panic() {
    let mut facts = facts(3, u16::MAX);
    facts.expert_bytes = 0;
    let nodes: Vec<_> = (0..5).map(|index| node(index, u64::MAX, u32::MAX)).collect();
    assert_eq!(plan(&facts, &nodes, None).unplaced(), 0);
    // Room times weight is 2^128 here.
    let nodes: Vec<_> = (0..4).map(|index| node(index, 1 << 63, 0)).collect();
    let shared = plan(&facts, &nodes, None);
    assert_eq!(nodes.iter().map(|node| shared.load(node.node).experts).min(), Some(3 * 65_535 / 4));
    facts.moe_layers.clear();
    assert_eq!(plan(&facts, &nodes, None).unplaced(), 0);
    assert_eq!(owners(&plan(&facts, &[], None)), Vec::<Vec<_>>::new());
}

#[test]
fn speeds_count_beyond_the_noise_of_measuring_them() {
    let facts = facts(4, 24);
    let split = |speeds: &[u32]| {
        let nodes: Vec<_> = (0..).zip(speeds).map(|(index, speed)| node(index, 1 << 40, *speed)).collect();
        let plan = plan(&facts, &nodes, None);
        nodes.iter().map(|node| plan.load(node.node).experts).collect::<Vec<_>>()
    };
    assert_eq!(split(&[9000, 6000, 8000]), [32, 32, 32]);
    assert_eq!(split(&[9000, 3000]), [72, 24]);
    assert_eq!(split(&[9000, 6000, 4500, 4500]), [32, 32, 16, 16]);
    assert_eq!(split(&[9000, 0]), [48, 48], "not measured everywhere: by memory");
}

#[test]
fn a_disturbed_measurement_does_not_leave_a_node_without_work() {
    let facts = facts(6, 24);
    let nodes: Vec<Capacity> = [9000, 9100, 12, 8800, 9050]
        .iter()
        .enumerate()
        .map(|(node, speed)| Capacity { node: node as u16, memory_bytes: 1 << 40, weight_mb_s: *speed })
        .collect();
    let plan = plan(&facts, &nodes, None);
    assert!(plan.experts(2).len() >= 2, "{} experts", plan.experts(2).len());
}
