//! The protocol logic under a seeded simulation with virtual time: thousands of clusters in which everything goes wrong.
//!
//! A test of one fault after the other cannot find what two of them do together. So each seed draws a cluster (nodes,
//! memories, a toy model, requests) and rates of faults: messages lost, late, twice, out of order; partitions, one-way
//! ones too; crashes, restarts, frozen and slow machines; machines that join, leave, or are gone for good; frequencies
//! that change; a router that restarts; nodes that lie. The logic is the
//! program's own (`Cluster`, the planner, `Attempts`, `Scheduler`); only threads, sockets and clocks are replaced. Then the
//! faults end, and the cluster has to recover.
//!
//! What must be true of every seed: each request ends once, with the text of the model run without any cluster, or with
//! the error that nobody could compute an expert, and then nobody could; each part of an expert is added once to every
//! row; hedges stay within their share; only nodes that are here, trusted, and said that they hold an epoch are routed to;
//! no node is given more than its memory; KV blocks have one owner and none is lost; after the last fault everything ends
//! within a bounded time and whatever fits is placed and served. A seed replays to the same trace.
//!
//! ```text
//! MOEMESH_SIM_SEEDS=100000 cargo test --release -p moemesh-tests --no-default-features --test sim -- --nocapture
//! MOEMESH_SIM_SEED=17 ...     one seed, with its trace on standard error
//! ```
//!
//! The price: it is as good as the model of the network in it, and sees neither threads nor bytes. The lab does.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "figures and traces are what a run is for")]

mod world;

mod machine;

mod faults;

mod trace;

mod toy;

mod dice;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use mesh_proto::facts::ModelFacts;
use mesh_proto::machine::{Capacity, Machine};
use mesh_proto::placement::{Plan, Wishes};
use mesh_proto::planner::{Task, Work};
use mesh_proto::popularity::{Counts, Popularity};
use mesh_proto::standin::Loss;
use world::{Summary, World};

/// Seeds of `make test`: seconds, not minutes.
const SEEDS: u64 = 1500;

fn variable(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty())?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is a number, not '{text}'")))
}

/// Runs one seed; the error names what was wrong and how to see it again.
fn run(seed: u64, prints: bool) -> Result<Summary, String> {
    catch_unwind(AssertUnwindSafe(|| World::new(seed, prints).run())).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("a panic without words");
        format!("seed {seed}: {text}\n    see it: make sim SEED={seed}")
    })
}

/// Adds the figures of many runs.
fn add(total: &mut Summary, one: &Summary) {
    total.events += one.events;
    total.complete += one.complete;
    total.unavailable += one.unavailable;
    total.unanswered += one.unanswered;
    total.calls += one.calls;
    total.hedges += one.hedges;
    total.hedges_won += one.hedges_won;
    total.retries += one.retries;
    total.computed_here += one.computed_here;
    total.ignored += one.ignored;
    total.malformed += one.malformed;
    total.quarantined += one.quarantined;
    total.preemptions += one.preemptions;
    total.newcomers_planned += one.newcomers_planned;
    total.stand_ins += one.stand_ins;
    total.handovers += one.handovers;
    total.tuned += one.tuned;
    total.trace ^= one.trace;
}

#[test]
fn whatever_happens_nothing_is_lost() {
    if let Some(seed) = variable("MOEMESH_SIM_SEED") {
        match run(seed, true) {
            Ok(summary) => eprintln!("seed {seed} is well: {summary:?}"),
            Err(error) => panic!("{error}"),
        }
        return;
    }
    let seeds = variable("MOEMESH_SIM_SEEDS").unwrap_or(SEEDS);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicU64::new(0);
    let work = || {
        let (mut total, mut failed) = (Summary::default(), Vec::new());
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds || failed.len() >= 5 {
                return (total, failed);
            }
            match run(seed, false) {
                Ok(summary) => add(&mut total, &summary),
                Err(error) => failed.push(error),
            }
        }
    };
    let mut total = Summary::default();
    let mut failed = Vec::new();
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for worker in workers {
            let (summary, errors) = worker.join().expect("seeds do not panic out of their run");
            add(&mut total, &summary);
            failed.extend(errors);
        }
    });
    println!("{seeds} seeds: {total:?}");
    assert!(failed.is_empty(), "\n{}\n", failed.join("\n"));
    // A run in which nothing went wrong would show nothing.
    for (what, count) in [
        ("requests completed", total.complete),
        ("requests that nobody could compute", total.unavailable),
        ("retries", total.retries),
        ("hedges", total.hedges),
        ("hedges that were faster", total.hedges_won),
        ("parts computed by the router", total.computed_here),
        ("late or double answers", total.ignored),
        ("malformed replies", total.malformed),
        ("nodes in quarantine", total.quarantined),
        ("preemptions", total.preemptions),
        ("newcomers that were planned for", total.newcomers_planned),
        ("stand-ins for lost nodes", total.stand_ins),
        ("handovers of leaving nodes", total.handovers),
        ("changes by frequencies", total.tuned),
    ] {
        assert!(count > 0 || seeds < 100, "no {what} in {seeds} seeds");
    }
}

/// Prints how long plans take for the largest cluster that is meant: 94 layers of 128 experts on 16 nodes.
#[test]
fn plans_of_large_clusters_are_timed() {
    let facts = ModelFacts {
        moe_layers: (0..94).collect(),
        experts: 128,
        expert_bytes: 2_654_208,
        top_k: 8,
        blocks: 12,
        block_bytes: 2_654_208 / 12,
        hidden: 4096,
        int8_rows: true,
        ..ModelFacts::default()
    };
    let node = |node: u16| Capacity {
        node,
        memory_bytes: 1 << 40,
        machine: Machine { weight_mb_s: [9000 + 700 * u32::from(node); 5], ..Machine::default() },
    };
    let nodes: Vec<Capacity> = (0..16).map(node).collect();
    let mut popularity = Popularity::even(&facts);
    let rows: Vec<u32> = (1..=128).map(|rank| 40_000 / rank).collect();
    assert!(popularity.learn(&Counts { tokens: 100_000, rows: vec![rows; 94] }));
    let task = |before: Option<Plan>, work| Task {
        ticket: 1,
        facts: facts.clone(),
        wishes: Wishes::default(),
        before,
        serving: (0..15).collect(),
        popularity: Some(popularity.clone()),
        work,
    };
    let timed = |what: &str, task: Task| {
        let started = std::time::Instant::now();
        let proposal = task.work();
        println!(
            "{what}: {:.1} ms, {} MB moved",
            started.elapsed().as_secs_f64() * 1e3,
            proposal.moved_bytes / 1_000_000
        );
        proposal.plan
    };
    let first = timed("a first plan", task(None, Work::Anew(nodes[..15].to_vec())));
    assert!(first.is_some());
    assert!(timed("a node more", task(first.clone(), Work::Anew(nodes.clone()))).is_some());
    let loss = Loss { out: vec![14], gone: vec![14], able: nodes[..14].to_vec(), step_bytes: u64::MAX };
    assert!(timed("stand-ins for a lost node", task(first.clone(), Work::StandIns(loss))).is_some());
    timed("a look at frequencies", task(first, Work::Tune));
}

#[test]
fn a_seed_replays_to_the_same_trace() {
    for seed in 0..20 {
        let (first, again) = (run(seed, false), run(seed, false));
        assert_eq!(first, again, "seed {seed}");
    }
    assert_ne!(run(1, false).map(|run| run.trace), run(2, false).map(|run| run.trace));
}
