//! Placement: what holds for every input, and what the planner chooses.

use proptest::prelude::*;

use super::*;
use crate::routes::{Part, ROUTER};

fn facts(layers: u16, experts: u16) -> ModelFacts {
    ModelFacts {
        fingerprint: [7; 32],
        // Every second layer, so that layer numbers and positions differ.
        moe_layers: (0..layers).map(|layer| 2 * layer + 1).collect(),
        experts,
        expert_bytes: 600_000,
        top_k: 2,
        blocks: 6,
        block_bytes: 100_000,
        hidden: 64,
        int8_rows: true,
        ..ModelFacts::default()
    }
}

/// Qwen3-30B-A3B: 48 layers of 128 experts of 768 values, 8 of them per token.
fn qwen() -> ModelFacts {
    ModelFacts {
        expert_bytes: 2_654_208,
        block_bytes: 442_368,
        top_k: 8,
        hidden: 2048,
        router_bytes: 690_000_000,
        ..facts(48, 128)
    }
}

const EXPERT: u64 = 600_000;

fn node(node: NodeIndex, experts: u64, mb_s: u32) -> Capacity {
    let machine = Machine { weight_mb_s: [mb_s; 5], ..Machine::default() };
    Capacity { node, memory_bytes: experts * EXPERT, machine }
}

fn with_room(speeds: &[u32]) -> Vec<Capacity> {
    (0..)
        .zip(speeds)
        .map(|(index, speed)| Capacity { memory_bytes: 1 << 40, ..node(index, 0, *speed) })
        .collect()
}

fn wishes(copies: u8, slices: bool) -> Wishes {
    Wishes { copies: Copies::Exactly(copies), slices, ..Wishes::default() }
}

fn plain(facts: &ModelFacts, nodes: &[Capacity], previous: Option<&Plan>) -> Plan {
    plan(facts, nodes, &Wishes::default(), previous)
}

/// By layer with experts and expert, its first holder.
fn owners(plan: &Plan) -> Vec<Vec<Option<NodeIndex>>> {
    let owner = |layer, expert| plan.table.parts(layer, expert).first()?.holders.as_slice().first().copied();
    (0..plan.table.layers())
        .map(|layer| (0..plan.table.experts(layer)).map(|expert| owner(layer, expert)).collect())
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
    let link = (0..3000_u32, prop_oneof![Just(0_u32), 1..2000_u32]);
    prop::collection::vec((0..400_u64, speed, link), 1..8).prop_map(|nodes| {
        let capacity = |(index, (memory, speed, (round_trip_us, mb_s)))| {
            let mut node = node(index, 0, speed);
            node.memory_bytes = memory * EXPERT + memory * 1000;
            node.machine.link = LinkSpeed { round_trip_us, mb_s };
            node
        };
        (0..).zip(nodes).map(capacity).collect()
    })
}

fn any_wishes() -> impl Strategy<Value = Wishes> {
    (0..=4_u8, any::<bool>(), 0..50_u16).prop_map(|(copies, slices, router_experts)| Wishes {
        copies: if copies == 0 { Copies::Auto } else { Copies::Exactly(copies) },
        slices,
        router_experts,
        ..Wishes::default()
    })
}

/// Experts that change hands, or come from the router.
fn gained(before: &Plan, after: &Plan, node: NodeIndex) -> usize {
    let (before, after) = (owners(before), owners(after));
    let pairs = before.iter().flatten().zip(after.iter().flatten());
    pairs.filter(|(before, after)| **after == Some(node) && before != after).count()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn never_above_memory_and_whole_when_it_fits(
        nodes in any_nodes(), wishes in any_wishes(), layers in 1..8_u16, experts in 1..40_u16,
    ) {
        let facts = facts(layers, experts);
        let plan = plan(&facts, &nodes, &wishes, None);
        for capacity in &nodes {
            let held = plan.experts(capacity.node);
            prop_assert!(plan.bytes(capacity.node, &facts) <= capacity.memory_bytes);
            // Sorted, and no expert twice: a call names experts, not slices.
            prop_assert!(held.windows(2).all(|pair| pair[0].key < pair[1].key));
            prop_assert_eq!(held.len(), plan.load(capacity.node).experts);
        }
        let copies = usize::from(wishes.copies.wanted()).max(1);
        for (key, part) in plan.table.all() {
            let own = key.expert < wishes.router_experts;
            prop_assert_eq!(part.holders.contains(ROUTER), own);
            prop_assert!(part.holders.as_slice().len() <= copies + usize::from(own));
        }
        for layer in &facts.moe_layers {
            for expert in 0..experts {
                let parts = plan.table.parts(*layer, expert);
                prop_assert!(parts.first().unwrap().from == 0 && parts.last().unwrap().to == facts.blocks);
                prop_assert!(parts.windows(2).all(|pair| pair[0].to == pair[1].from));
                prop_assert!(parts.len() == 1 || wishes.slices);
            }
        }
        let all = usize::from(layers) * usize::from(experts);
        let room: u64 = nodes.iter().map(|node| node.memory_bytes / facts.expert_bytes).sum();
        let router = usize::from(layers) * usize::from(wishes.router_experts.min(experts));
        if room >= all as u64 {
            prop_assert_eq!(plan.unplaced(), 0);
        } else if plan.cuts == 1 {
            prop_assert_eq!(plan.unplaced(), (all - room as usize).saturating_sub(router));
        }
    }

    #[test]
    fn every_layer_is_spread_like_the_whole(nodes in any_nodes(), layers in 1..8_u16, experts in 1..40_u16) {
        let facts = facts(layers, experts);
        let plan = plain(&facts, &nodes, None);
        for per_layer in counts(&plan, &nodes) {
            let (least, most) = (per_layer.iter().min().unwrap(), per_layer.iter().max().unwrap());
            prop_assert!(most - least <= 1, "{per_layer:?}");
        }
        let on_router: Vec<_> = owners(&plan).iter()
            .map(|owners| owners.iter().filter(|owner| owner.is_none()).count()).collect();
        prop_assert!(on_router.iter().max().unwrap() - on_router.iter().min().unwrap() <= 1, "{on_router:?}");
    }

    #[test]
    fn equal_nodes_differ_by_one(count in 1..9_u16, memory in 0..400_u64, layers in 1..8_u16, experts in 1..40_u16) {
        let facts = facts(layers, experts);
        let nodes: Vec<_> = (0..count).map(|index| node(index, memory, 0)).collect();
        let plan = plain(&facts, &nodes, None);
        // Some may be left out, where a call costs more than they would help.
        let mut counts = counts(&plan, &nodes);
        counts.retain(|per_layer| per_layer.iter().any(|experts| *experts > 0));
        for layer in 0..usize::from(layers) {
            let most = counts.iter().map(|per_layer| per_layer[layer]).max().unwrap_or(0);
            let least = counts.iter().map(|per_layer| per_layer[layer]).min().unwrap_or(0);
            prop_assert!(most - least <= 1 || plan.unplaced() > 0, "layer {layer}: {counts:?}");
        }
    }

    #[test]
    fn the_same_input_gives_the_same_plan_and_a_plan_stays(
        nodes in any_nodes(), wishes in any_wishes(), noise in prop::collection::vec(67..150_u32, 8),
        layers in 1..8_u16, experts in 1..40_u16,
    ) {
        let facts = facts(layers, experts);
        let first = plan(&facts, &nodes, &wishes, None);
        prop_assert_eq!(&plan(&facts, &nodes, &wishes, None), &first);
        // As measured at another start.
        let mut again = nodes.clone();
        for (node, noise) in again.iter_mut().zip(&noise) {
            let speed = node.machine.weight_mb_s[0];
            node.machine.weight_mb_s = [(speed * noise / 100).max(speed.min(1)); 5];
        }
        let noisy = nodes.iter().zip(&again).all(|(node, again)| is_about(&node.machine, &again.machine));
        if noisy {
            prop_assert_eq!(plan(&facts, &again, &wishes, Some(&first)), first);
        }
    }

    #[test]
    fn an_added_node_moves_little_else(nodes in any_nodes(), added in 0..400_u64, layers in 1..8_u16, experts in 1..40_u16) {
        let facts = facts(layers, experts);
        let before: Vec<_> = nodes.iter().map(|old| Capacity { machine: Machine::default(), ..*old }).collect();
        let mut after = before.clone();
        after.push(node(99, added, 0));
        let (old, fresh) = (plain(&facts, &before, None), plain(&facts, &after, None));
        let new = plain(&facts, &after, Some(&old));
        // The same sizes as a plan from nothing ...
        for capacity in &after {
            prop_assert_eq!(new.load(capacity.node).experts, fresh.load(capacity.node).experts);
        }
        // ... and nobody but the new node gains more than the sizes differ, except one expert per layer for rounding.
        for capacity in &before {
            let more = new.load(capacity.node).experts.saturating_sub(old.load(capacity.node).experts);
            prop_assert!(gained(&old, &new, capacity.node) <= usize::from(layers) + more);
        }
        prop_assert_eq!(plain(&facts, &after, Some(&new)), new);
    }
}

#[test]
fn an_added_equal_node_is_the_only_one_to_gain() {
    let facts = qwen();
    for count in 1..5_u16 {
        let nodes = with_room(&[20_000; 5][..usize::from(count) + 1]);
        let old = plain(&facts, &nodes[..usize::from(count)], None);
        let new = plain(&facts, &nodes, Some(&old));
        assert_eq!(new.left_out(&facts, &new.members()), [] as [NodeIndex; 0]);
        for capacity in &nodes[..usize::from(count)] {
            assert_eq!(gained(&old, &new, capacity.node), 0);
        }
    }
}

#[test]
fn a_departed_node_leaves_the_others_what_they_have() {
    let facts = qwen();
    let nodes = with_room(&[20_000; 3]);
    let old = plain(&facts, &nodes, None);
    let new = plain(&facts, &nodes[1..], Some(&old));
    assert_eq!(new.unplaced(), 0);
    for index in 1..3 {
        let (before, after) = (old.experts(index), new.experts(index));
        assert!(before.iter().all(|key| after.contains(key)), "node {index} gave something away");
    }
}

#[test]
fn absurd_figures_neither_overflow_nor_panic() {
    let mut facts = ModelFacts { moe_layers: vec![1, 3, 5], ..facts(3, 2000) };
    facts.expert_bytes = 0;
    facts.block_bytes = 0;
    let mut nodes = with_room(&[u32::MAX; 5]);
    nodes.iter_mut().for_each(|node| {
        node.memory_bytes = u64::MAX;
        node.machine.link = LinkSpeed { round_trip_us: u32::MAX, mb_s: 1 };
    });
    let wishes = wishes(4, true);
    assert_eq!(plan(&facts, &nodes, &wishes, None).unplaced(), 0);
    facts.expert_bytes = u64::MAX;
    assert_eq!(plan(&facts, &nodes, &wishes, None).unplaced(), 6000 - 5);
    facts.moe_layers.clear();
    assert_eq!(plan(&facts, &nodes, &wishes, None).unplaced(), 0);
    assert_eq!(owners(&plan(&facts, &[], &wishes, None)), Vec::<Vec<_>>::new());
    facts.blocks = 0;
    facts.top_k = 0;
    facts.experts = 0;
    plan(&facts, &nodes, &wishes, None);
}

#[test]
fn speeds_count_beyond_the_noise_of_measuring_them() {
    let facts = qwen();
    let split = |speeds: &[u32]| {
        let nodes = with_room(speeds);
        let plan = plain(&facts, &nodes, None);
        nodes.iter().map(|node| plan.load(node.node).experts / 48).collect::<Vec<_>>()
    };
    assert_eq!(split(&[9000, 7300, 8000, 9100]), [32, 32, 32, 32]);
    assert_eq!(split(&[9000, 0]), [64, 64], "not measured everywhere: as the slowest that was");
    let shares = split(&[9000, 3000]);
    assert!((90..=108).contains(&shares[0]), "{shares:?}");
    let shares = split(&[8000, 8000, 4000, 4000]);
    assert!(shares[0] == shares[1] && shares[2] == shares[3] && shares[0] > 3 * shares[2] / 2, "{shares:?}");
}

#[test]
fn a_node_that_makes_it_slower_gets_no_work_but_copies() {
    let facts = ModelFacts { expert_bytes: 4 * 2_654_208, block_bytes: 4 * 442_368, ..qwen() };
    let router = Machine { weight_mb_s: [200_000; 5], ..Machine::default() };
    let wishes = |copies, slices| Wishes { router, ..wishes(copies, slices) };
    let mut nodes = with_room(&[20_000, 20_000, 20_000]);
    nodes[1].machine.weight_mb_s = [400; 5];
    let one = plan(&facts, &nodes, &wishes(1, false), None);
    assert_eq!(one.left_out(&facts, &one.members()), [1]);
    assert_eq!(one.load(1), Load::default());
    let two = plan(&facts, &nodes[..2], &wishes(2, false), None);
    assert_eq!((two.load(1).experts, two.copies()), (48 * 128, (2, 2)));
    let alone = plan(&facts, &nodes[..1], &wishes(1, false), None);
    let times = [&two, &alone].map(|plan| plan.predicted.token_ns);
    assert!(times[0] * 100 < times[1] * 102, "its copies cost nothing: {times:?}");
    // Without room elsewhere it has to take what is left.
    nodes[0].memory_bytes = 2000 * facts.expert_bytes;
    nodes[2].memory_bytes = 2000 * facts.expert_bytes;
    let full = plan(&facts, &nodes, &wishes(1, false), None);
    assert_eq!((full.unplaced(), full.load(1).primaries), (0, 48 * 128 - 4000));
    // A link that takes longer than everybody else needs for the layer is as bad.
    let mut far = with_room(&[20_000, 20_000]);
    far[1].machine.link.round_trip_us = 30_000;
    let far = plain(&facts, &far, None);
    assert_eq!(far.left_out(&facts, &far.members()), [1]);
}

#[test]
fn no_figure_gets_a_node_everything_or_nothing() {
    let facts = qwen();
    let with = |speeds: &[u32]| {
        let plan = plain(&facts, &with_room(speeds), None);
        let per_layer: Vec<usize> =
            (0..).take(speeds.len()).map(|node| plan.load(node).experts / 48).collect();
        (plan, per_layer)
    };
    // Measured in a bad moment: it counts as a slow machine.
    for speeds in [[20_000, 162, 20_000], [20_000, 1, 20_000]] {
        let (disturbed, shares) = with(&speeds);
        assert!(shares[1] >= 4 && shares[0] > 3 * shares[1], "{shares:?}");
        assert_eq!(disturbed.left_out(&facts, &disturbed.members()), [] as [NodeIndex; 0]);
        // What is predicted is by what was measured.
        assert_eq!(disturbed.capacities[1].machine.weight_mb_s, [speeds[1]; 5]);
        assert!(disturbed.predicted.token_ns > 2 * with(&[20_000; 3]).0.predicted.token_ns);
    }
    let (_, shares) = with(&[20_000, 162]);
    assert!(shares[1] >= 8, "{shares:?}");
    // An exaggeration that machines could have: no more than a fast one.
    let (exaggerated, shares) = with(&[9_000_000, 20_000, 20_000]);
    assert!(
        exaggerated.left_out(&facts, &exaggerated.members()).is_empty() && shares[1] + shares[2] >= 8,
        "{shares:?}"
    );
    let figures = |speeds: &[u32], router| {
        counted(&with_room(speeds), &Machine { weight_mb_s: [router; 5], ..Machine::default() })
    };
    assert_eq!(figures(&[800, 100, 0], 0), [(800, false), (100, false), (100, false)]);
    assert_eq!(figures(&[90_000, 1000], 2000), [(16_000, false), (2000, true)]);
    assert_eq!(
        figures(&[64_000, 64_000, 999, 1000], 64_000)[1..],
        [(64_000, false), (8000, true), (8000, false)]
    );
}

#[test]
fn large_experts_of_few_per_layer_are_cut() {
    // Mixtral: two experts of 99 MB per token, so half of four nodes would do nothing.
    let mixtral = ModelFacts {
        expert_bytes: 99_090_432,
        blocks: 112,
        block_bytes: 884_736,
        top_k: 2,
        hidden: 4096,
        ..facts(32, 8)
    };
    let nodes = with_room(&[20_000; 4]);
    let cut = plan(&mixtral, &nodes, &wishes(1, true), None);
    assert_eq!((cut.cuts, cut.unplaced()), (4, 0));
    let whole = plan(&mixtral, &nodes, &wishes(1, false), None);
    assert_eq!(whole.cuts, 1);
    let times = [&cut, &whole].map(|plan| plan.predicted.experts_ns as f64);
    assert!((0.45..0.55).contains(&(times[0] / times[1])), "{times:?}");
    // In proportion to the speed.
    let nodes = with_room(&[20_000, 10_000]);
    let cut = plan(&mixtral, &nodes, &wishes(1, true), None);
    let part = cut.table.parts(1, 0);
    assert!(part.len() == 2 && (72..=77).contains(&part[0].to), "{part:?}");
    // Small experts over a slow link are not: every node would be called for every layer.
    let mut far = with_room(&[50_000; 4]);
    far.iter_mut().for_each(|node| node.machine.link = LinkSpeed { round_trip_us: 200, mb_s: 30 });
    assert_eq!(plan(&qwen(), &far, &wishes(1, true), None).cuts, 1);
}

#[test]
fn spare_memory_takes_copies_evenly() {
    let facts = facts(4, 24);
    let mut nodes = with_room(&[9000; 3]);
    let full = plan(&facts, &nodes, &wishes(2, false), None);
    assert_eq!(full.copies(), (2, 2));
    assert_eq!([0, 1, 2].map(|node| full.load(node).experts), [64; 3]);
    // What one node holds is spread over both others, so that they share its work when it is lost.
    let copied = |on: NodeIndex| {
        let of = |part: &Part| part.holders.as_slice() == [0, on];
        full.table.all().filter(|(_, part)| of(part)).count()
    };
    assert_eq!((copied(1), copied(2)), (16, 16));
    // Room for a quarter of the copies: every layer gets as many.
    nodes.iter_mut().for_each(|node| node.memory_bytes = 40 * EXPERT);
    let some = plan(&facts, &nodes, &wishes(2, false), None);
    for layer in &facts.moe_layers {
        let twice = |expert: &u16| some.table.parts(*layer, *expert)[0].holders.as_slice().len() == 2;
        assert_eq!((0..24).filter(twice).count(), 6);
    }
    // Slices have copies too, on other nodes than those of the rest of the expert.
    let mixtral = ModelFacts { expert_bytes: 99_000_000, block_bytes: 16_500_000, ..facts.clone() };
    let cut = plan(&mixtral, &with_room(&[9000; 4]), &wishes(2, true), None);
    assert_eq!((cut.cuts, cut.copies()), (2, (2, 2)));
}

#[test]
fn copies_that_were_wished_for_count_more_than_speed_and_others_little() {
    let mixtral = ModelFacts { expert_bytes: 99_000_000, block_bytes: 16_500_000, ..facts(4, 8) };
    let nodes = with_room(&[9000; 4]);
    let cuts =
        |copies| plan(&mixtral, &nodes, &Wishes { copies, slices: true, ..Wishes::default() }, None).cuts;
    // Four parts use all nodes, but leave none for a copy; two with copies are about as fast.
    assert_eq!((cuts(Copies::Exactly(1)), cuts(Copies::Exactly(2)), cuts(Copies::Auto)), (4, 2, 2));
    // On two nodes whole experts on both are as fast as halves, and safe.
    let nodes = &nodes[..2];
    let cuts =
        |copies| plan(&mixtral, nodes, &Wishes { copies, slices: true, ..Wishes::default() }, None).cuts;
    assert_eq!((cuts(Copies::Exactly(2)), cuts(Copies::Auto)), (1, 1));
}

#[test]
fn the_router_counts_as_a_holder() {
    let facts = facts(4, 24);
    let wishes = Wishes { router_experts: 8, ..wishes(2, false) };
    let plan = plan(&facts, &with_room(&[9000; 3]), &wishes, None);
    for (key, part) in plan.table.all() {
        assert_eq!((part.holders.contains(ROUTER), part.holders.as_slice().len()), (key.expert < 8, 2));
    }
    // Where memory is short, what the router holds needs no node.
    let short = super::plan(&facts, &[node(0, 64, 9000)], &wishes, None);
    assert_eq!((short.unplaced(), short.load(0).experts), (0, 64));
}

#[test]
fn a_plan_gives_way_to_real_changes() {
    let facts = qwen();
    let nodes = with_room(&[20_000, 20_000, 20_000]);
    let before = plain(&facts, &nodes, None);
    let mut slower = nodes.clone();
    slower[0].machine.weight_mb_s = [8000; 5];
    let after = plain(&facts, &slower, Some(&before));
    assert!(after.load(0).experts < before.load(0).experts * 2 / 3);
    let more = plan(&facts, &nodes, &wishes(2, false), Some(&before));
    assert_eq!(more.copies(), (2, 2));
    assert_eq!(owners(&more), owners(&before));
}
