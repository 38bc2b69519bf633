//! What proposals say of themselves, and how long they take.

use super::*;
use crate::machine::Machine;
use crate::placement::Copies;

fn facts(layers: u16, experts: u16) -> ModelFacts {
    ModelFacts {
        moe_layers: (0..layers).collect(),
        experts,
        expert_bytes: 2_654_208,
        top_k: 8,
        blocks: 6,
        block_bytes: 442_368,
        hidden: 2048,
        int8_rows: true,
        router_bytes: 690_000_000,
        ..ModelFacts::default()
    }
}

fn nodes(count: u16) -> Vec<Capacity> {
    let node = |node: NodeIndex| Capacity {
        node,
        memory_bytes: 1 << 40,
        machine: Machine { weight_mb_s: [9000 + 700 * u32::from(node); 5], ..Machine::default() },
    };
    (0..count).map(node).collect()
}

fn task(before: Option<Plan>, serving: &[NodeIndex], work: Work) -> Task {
    let facts = facts(6, 32);
    Task {
        ticket: 7,
        facts,
        wishes: Wishes::default(),
        before,
        serving: serving.to_vec(),
        popularity: None,
        work,
    }
}

fn first() -> Plan {
    task(None, &[], Work::Anew(nodes(3))).work().plan.unwrap()
}

#[test]
fn a_new_node_is_said_to_make_it_faster_and_to_cost_what_it_loads() {
    let first = first();
    let proposal = task(Some(first.clone()), &[0, 1, 2], Work::Anew(nodes(4))).work();
    let plan = proposal.plan.unwrap();
    assert_eq!((proposal.ticket, proposal.more), (7, false));
    assert_eq!(proposal.before_ns, Some(first.predicted.token_ns));
    assert!(plan.predicted.token_ns < first.predicted.token_ns);
    let facts = facts(6, 32);
    assert!(proposal.moved_bytes >= plan.bytes(3, &facts) && plan.bytes(3, &facts) > 0);
    assert!(proposal.moved_bytes < 2 * plan.bytes(3, &facts), "the others keep what they have");
}

#[test]
fn what_is_missing_counts_before_and_is_made_good_after() {
    let first = first();
    let able = vec![nodes(3)[0], nodes(3)[2]];
    let loss = Loss { out: vec![1], gone: Vec::new(), able, step_bytes: u64::MAX };
    let mut task = task(Some(first.clone()), &[0, 2], Work::StandIns(loss));
    // A router that reads experts more slowly than a node.
    let mut slow = first.clone();
    slow.wishes.router.weight_mb_s = [1000; 5];
    task.before = Some(slow);
    let proposal = task.work();
    let plan = proposal.plan.unwrap();
    assert!(plan.predicted.token_ns < proposal.before_ns.unwrap(), "better than the router");
    assert_eq!(plan.capacities, first.capacities, "it keeps its place");
    assert_eq!((plan.predicted.nodes.len(), plan.predicted.nodes[1]), (3, NodeUse::default()));
    assert_eq!(proposal.moved_bytes, first.bytes(1, &facts(6, 32)));
}

#[test]
fn without_room_nothing_is_proposed() {
    let first = first();
    let facts = facts(6, 32);
    let full =
        |node: usize| Capacity { memory_bytes: first.bytes(node as NodeIndex, &facts), ..nodes(3)[node] };
    let loss = Loss { out: vec![1], gone: Vec::new(), able: vec![full(0), full(2)], step_bytes: u64::MAX };
    let proposal = task(Some(first.clone()), &[0, 2], Work::StandIns(loss)).work();
    assert_eq!((proposal.plan, proposal.moved_bytes, proposal.more), (None, 0, false));
}

#[test]
fn copies_of_others_give_way_to_what_nobody_holds() {
    let facts = facts(6, 32);
    let wishes = Wishes { copies: Copies::Exactly(2), ..Wishes::default() };
    // Room for a third more than all: some have copies, others not, and nobody has room for more.
    let of = |node: Capacity| Capacity { memory_bytes: 86 * facts.expert_bytes, ..node };
    let all: Vec<Capacity> = nodes(3).into_iter().map(of).collect();
    let before = plan(&facts, &all, &wishes, None);
    let loss = Loss { out: vec![1], gone: Vec::new(), able: vec![all[0], all[2]], step_bytes: u64::MAX };
    let open = before.table.open_blocks(&[1]);
    assert!(open > 0);
    let task = Task { wishes, ..task(Some(before), &[0, 2], Work::StandIns(loss)) };
    let plan = task.work().plan.unwrap();
    assert!(plan.table.open_blocks(&[1]) <= 6 * (192 - 172), "as many as fit");
}

#[test]
fn what_is_cut_stays_where_it_lies_if_a_new_plan_would_hold_less() {
    let facts = ModelFacts { block_bytes: 30_000_000, expert_bytes: 60_000_000, blocks: 2, ..facts(3, 1) };
    let wishes = Wishes { slices: true, ..Wishes::default() };
    let blocks = |node: Capacity, count: u64| Capacity { memory_bytes: count * facts.block_bytes, ..node };
    let all: Vec<Capacity> =
        nodes(4).into_iter().zip([3, 3, 1, 1]).map(|(node, of)| blocks(node, of)).collect();
    let before = plan(&facts, &all, &wishes, None);
    assert_eq!((before.cuts, before.unplaced()), (2, 0));
    let lost = open_of(&before, &[0]);
    let able = vec![all[1], all[2], all[3]];
    let base =
        Task { facts: facts.clone(), wishes, ..task(Some(before), &[1, 2, 3], Work::Anew(able.clone())) };
    let anew = base.work();
    let plan = anew.plan.unwrap();
    assert_eq!((open_of(&plan, &[0]), plan.cuts), (1, 2), "there is room for five of the six blocks");
    assert_eq!(anew.moved_bytes, (lost - 1) * facts.block_bytes, "nothing else moves");
    // A machine that comes takes what is open, and nothing else moves.
    let more = [able, vec![blocks(nodes(5)[4], 3)]].concat();
    let joined = Task { work: Work::Anew(more), ..base }.work();
    let (plan, present) = (joined.plan.unwrap(), joined.present);
    assert_eq!((open_of(&plan, &[0]), &present[..]), (0, &[1, 2, 3, 4][..]));
    assert!(plan.left_out(&facts, &present).is_empty(), "whoever stands in is asked first");
}

fn open_of(plan: &Plan, out: &[NodeIndex]) -> u64 {
    plan.table.open_blocks(out)
}

#[test]
fn planning_for_the_largest_clusters_takes_moments() {
    let facts = facts(94, 128);
    let mut popularity = Popularity::even(&facts);
    let rows: Vec<u32> = (1..=128).map(|rank| 40_000 / rank).collect();
    popularity.learn(&crate::popularity::Counts { tokens: 100_000, rows: vec![rows; 94] });
    let base = Task { facts, popularity: Some(popularity), ..task(None, &[], Work::Anew(nodes(15))) };
    let first = base.work().plan.unwrap();
    let serving: Vec<NodeIndex> = (0..15).collect();
    let joined = Task { before: Some(first.clone()), serving, work: Work::Anew(nodes(16)), ..base.clone() };
    let joined = joined.work();
    let able = nodes(15).into_iter().skip(1).collect();
    let loss = Loss { out: vec![0], gone: Vec::new(), able, step_bytes: u64::MAX };
    let lost = Task { before: Some(first), work: Work::StandIns(loss), ..base }.work();
    assert!(joined.plan.is_some() && lost.plan.is_some_and(|plan| plan.table.open_blocks(&[0]) == 0));
}
