//! Predictions that can be reckoned by hand.

use super::*;
use crate::facts::LinkSpeed;
use crate::routes::{Part, ROUTER};

const EXPERT: u64 = 1_000_000;

fn facts(experts: u16, top_k: u16) -> ModelFacts {
    ModelFacts {
        moe_layers: vec![0, 1, 2],
        experts,
        top_k,
        expert_bytes: EXPERT,
        blocks: 4,
        block_bytes: EXPERT / 4,
        hidden: 2048,
        int8_rows: true,
        router_bytes: 10_000_000,
        head_bytes: 4_000_000,
        ..ModelFacts::default()
    }
}

fn machine(mb_s: u32, round_trip_us: u32, link_mb_s: u32) -> Machine {
    Machine { weight_mb_s: [mb_s; 5], link: LinkSpeed { round_trip_us, mb_s: link_mb_s } }
}

/// Expert `e` is held by `holders(e)`, whole.
fn table(facts: &ModelFacts, holders: impl Fn(u16) -> Vec<NodeIndex>) -> Table {
    let mut table = Table::empty(facts);
    for layer in &facts.moe_layers {
        let part =
            |expert| [Part { from: 0, to: facts.blocks, holders: holders(expert).into_iter().collect() }];
        table.set_layer(*layer, (0..facts.experts).map(part));
    }
    table
}

fn decode(facts: &ModelFacts, nodes: &[(NodeIndex, Machine)], table: &Table) -> Decode {
    Scene { facts, router: machine(1000, 0, 0), fallback_mb_s: 0, nodes, popularity: None }
        .decode(table, DRAWS)
}

/// What the router needs for itself, with so many calls per token.
fn own_ns(calls: u64) -> u64 {
    10_000_000 + TOKEN_NS + 3 * LAYER_NS + calls * SEND_NS
}

#[test]
fn one_place_reads_all_bytes_of_a_token() {
    let facts = facts(16, 4);
    let here = decode(&facts, &[], &table(&facts, |_| vec![ROUTER]));
    assert_eq!((here.token_ns, here.experts_ns), (own_ns(0) + 12_000_000, 12_000_000));
    let nodes = [(5, machine(2000, 100, 100))];
    let there = decode(&facts, &nodes, &table(&facts, |_| vec![5]));
    // 2304 bytes of values and scales out, 4096 of sums back, each way in a frame.
    let wire_ns = (2304 + 4096 + 2 * FRAME_BYTES) * 10;
    assert_eq!(there.experts_ns, 3 * (4 * 500_000 + 100_000 + CALL_NS + wire_ns));
    assert_eq!(there.router_ns, own_ns(3));
    let node = there.nodes[0];
    assert_eq!((node.busy_ns, node.calls_milli, node.last_milli), (6_000_000, 3000, 1000));
    assert_eq!((node.weight_bytes, node.bytes_in), (12 * EXPERT, 3 * (4096 + FRAME_BYTES)));
    assert_eq!(node.bytes_out, 3 * (2304 + FRAME_BYTES + 4 * ASSIGNMENT_BYTES));
}

#[test]
fn what_nobody_holds_is_read_by_the_router_from_its_files() {
    let facts = facts(16, 4);
    let scene = Scene {
        facts: &facts,
        router: machine(1000, 0, 0),
        fallback_mb_s: 100,
        nodes: &[],
        popularity: None,
    };
    let empty = table(&facts, |_| vec![]);
    assert_eq!(scene.decode(&empty, DRAWS).experts_ns, 12 * 10_000_000);
    assert_eq!(scene.decode(&table(&facts, |_| vec![ROUTER]), DRAWS).experts_ns, 12_000_000);
    // Holders that are not here are no holders.
    assert_eq!(scene.decode(&table(&facts, |_| vec![3]), DRAWS).experts_ns, 12 * 10_000_000);
}

#[test]
fn the_mean_of_the_slowest_is_more_than_the_slowest_mean() {
    let facts = facts(128, 8);
    let nodes: Vec<_> = (0..4).map(|node| (node, machine(1000, 1, 1_000_000))).collect();
    let spread = decode(&facts, &nodes, &table(&facts, |expert| vec![expert % 4]));
    let experts = (spread.experts_ns / 3 - CALL_NS) as f64 / 1e6;
    // Balls into bins: 8 experts on 4 nodes of 32 each; exactly 3.48 by enumeration.
    assert!((3.4..3.6).contains(&experts), "{experts}");
    // With a copy elsewhere the two choices nearly even it out; cut into four it is even.
    let twice =
        decode(&facts, &nodes, &table(&facts, |expert| vec![expert % 4, (expert + 1 + expert / 4 % 3) % 4]));
    let experts = (twice.experts_ns / 3 - CALL_NS) as f64 / 1e6;
    assert!((2.0..2.4).contains(&experts), "{experts}");
    let mut cut = Table::empty(&facts);
    let parts: Vec<Part> =
        (0..4).map(|node| Part { from: node, to: node + 1, holders: [node].into_iter().collect() }).collect();
    for layer in &facts.moe_layers {
        cut.set_layer(*layer, (0..128).map(|_| &parts));
    }
    let even = decode(&facts, &nodes, &cut);
    let experts = (even.experts_ns / 3 - CALL_NS) as f64 / 1e6;
    assert!((2.0..2.1).contains(&experts), "{experts}");
}

#[test]
fn answers_queue_for_the_routers_link() {
    let facts = facts(8, 8);
    // Every node is called in every layer; a megabyte per second makes the wire all there is.
    let with = |count: u16| {
        let nodes: Vec<_> = (0..count).map(|node| (node, machine(1_000_000, 1, 1))).collect();
        decode(&facts, &nodes, &table(&facts, |expert| vec![expert % count])).experts_ns / 3
    };
    let answer_ns = (4096 + FRAME_BYTES) * 1000;
    assert!((with(8) - with(4)).abs_diff(4 * answer_ns) < answer_ns / 10, "{} {}", with(8), with(4));
}

#[test]
fn the_router_takes_its_share_of_what_it_holds_too() {
    let facts = facts(16, 8);
    let nodes = [(0, machine(1000, 1, 1_000_000))];
    let both = decode(&facts, &nodes, &table(&facts, |_| vec![0, ROUTER]));
    assert_eq!(both.experts_ns / 3 / 1_000_000, 4);
    assert_eq!(both.nodes[0].weight_bytes, 3 * 4 * EXPERT);
}

#[test]
fn a_prompt_is_as_fast_as_its_busiest_resource() {
    let facts = facts(16, 4);
    let placed = table(&facts, |expert| vec![expert % 2]);
    let step = |router: u32, nodes: [Machine; 2], rows| {
        let nodes = [(0, nodes[0]), (1, nodes[1])];
        Scene {
            facts: &facts,
            router: machine(router, 0, 0),
            fallback_mb_s: 0,
            nodes: &nodes,
            popularity: None,
        }
        .prefill(&placed, rows)
    };
    let (fast, slow) = (machine(1_000_000, 100, 100_000), machine(100, 100, 100_000));
    assert_eq!(step(1, [fast, fast], 256).cap, Cap::Router);
    let node = step(1_000_000, [fast, slow], 256);
    assert_eq!(node.cap, Cap::Node(1));
    // Two parts, each of which takes all eight experts of the slow node through 10 ms, in three layers.
    assert_eq!(node.step_ns / 10_000_000, 3 * 2 * 8);
    let wire = machine(1_000_000, 100, 1);
    assert_eq!(step(1_000_000, [fast, wire], 256).cap, Cap::Link(1));
    // Nearly every row goes to both nodes: 4 KB back per row and node.
    let joint = step(1_000_000, [wire, wire], 256);
    assert_eq!(joint.cap, Cap::RouterLink);
    let ms = joint.step_ns / 1_000_000;
    assert!((3 * 256 * 2 * 4096 * 85 / 100_000..3 * 256 * 2 * 4096 / 1000).contains(&ms), "{ms}");
}

#[test]
fn rows_meet_a_place_unless_all_their_picks_miss_it() {
    assert_eq!(rows_hit(0, 1024, (128, 8)), 0);
    assert_eq!(rows_hit(1024, 1024, (128, 8)), 128);
    // 128 x (1 - (3/4)^8) = 115.2
    assert_eq!(rows_hit(256, 1024, (128, 8)), 115);
}
