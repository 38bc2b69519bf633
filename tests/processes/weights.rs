//! Nodes that start with nothing: they fetch their experts, keep them, and tell the same story.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::harness::{Alone, Cluster, OPENING, Shape, Story, moemesh, turn};

const TOKENS: usize = 60;

fn number(state: &Value, key: &str) -> u64 {
    state[key].as_u64().unwrap_or_else(|| panic!("no {key} in {state}"))
}

/// Bytes that the router has sent to each of two nodes since it started.
fn lent(cluster: &Cluster) -> [u64; 2] {
    [0, 1].map(|node| number(&cluster.node(node), "lent_bytes"))
}

/// A story of the cluster, which must be that of one process.
#[track_caller]
fn story(cluster: &Cluster) -> Story {
    story_of(cluster, &[])
}

/// The same of a model in another format.
#[track_caller]
fn story_of(cluster: &Cluster, format: &[&str]) -> Story {
    let fallbacks = || cluster.api.nodes()["router"]["fallbacks"].clone();
    let before = fallbacks();
    let story = cluster.api.story(TOKENS, |_| ());
    let tokens = TOKENS.to_string();
    let flags = ["reference", "--prompt", OPENING, "--max-tokens", &tokens, "--ignore-eos", "--json"];
    let alone = moemesh(&[&flags[..], format].concat()).json();
    assert_eq!(alone["token_ids"], json!(story.token_ids), "{}", cluster.logs());
    assert_eq!(alone["logits_digest"], story.digest);
    assert_eq!(fallbacks(), before, "nodes did not compute\n{}", cluster.logs());
    story
}

/// Starts a killed node again once it is missed, and waits until it serves.
fn restarted(cluster: &mut Cluster, node: usize) {
    cluster.until("it is missed", |state| state["nodes"][node]["state"] == "absent");
    cluster.start_node(node);
    cluster.until("it serves again", |state| state["nodes"][node]["state"] == "serving");
}

#[test]
fn empty_nodes_fetch_their_experts_once_and_tell_the_same_story() {
    let shape = Shape { empty: true, router: &["--replicas", "1"], ..Shape::nodes(2) };
    let mut cluster = Alone::start(&shape);
    let told = story(&cluster);
    let first = lent(&cluster);
    for (node, lent) in first.into_iter().enumerate() {
        let state = cluster.node(node);
        assert_eq!(lent, number(&state, "weight_bytes"), "just what it holds\n{}", cluster.logs());
        assert!(lent > 0 && state["loading"].is_null(), "{state}");
        let stored: u64 =
            cluster.stored(node).iter().map(|path| path.metadata().expect("it is there").len()).sum();
        assert_eq!(stored, lent);
    }

    // Everything is on disk: killed and started again, the node fetches nothing.
    cluster.kill_node(0);
    restarted(&mut cluster, 0);
    story(&cluster).assert_equals(&told);
    assert_eq!(lent(&cluster)[0], first[0], "{}", cluster.logs());

    // A flipped bit and a lost expert are found when they are loaded, named, and fetched again.
    cluster.kill_node(0);
    let stored = cluster.stored(0);
    let mut rotten = std::fs::read(&stored[0]).unwrap();
    let (at, length) = (rotten.len() / 2, rotten.len() as u64);
    rotten[at] ^= 8;
    std::fs::write(&stored[0], &rotten).unwrap();
    std::fs::remove_file(&stored[1]).unwrap();
    restarted(&mut cluster, 0);
    story(&cluster).assert_equals(&told);
    assert_eq!(lent(&cluster)[0], first[0] + 2 * length, "{}", cluster.logs());
    rotten[at] ^= 8;
    assert!(std::fs::read(&stored[0]).unwrap() == rotten);
    let name = stored[0].file_name().unwrap().to_string_lossy().into_owned();
    assert!(cluster.logs().contains(&name), "the damaged file is not named\n{}", cluster.logs());
}

#[test]
fn a_node_that_lost_its_disk_gets_experts_from_a_node_that_has_them() {
    let shape = Shape { empty: true, router: &["--replicas", "2"], ..Shape::nodes(2) };
    let mut cluster = Alone::start(&shape);
    let (told, before) = (story(&cluster), lent(&cluster));
    let held = number(&cluster.node(1), "weight_bytes");
    assert_eq!(
        held,
        number(&cluster.node(0), "weight_bytes"),
        "{:#}\n{}",
        cluster.api.nodes(),
        cluster.logs()
    );

    cluster.kill_node(1);
    for path in cluster.stored(1) {
        std::fs::remove_file(path).unwrap();
    }
    restarted(&mut cluster, 1);
    let after = lent(&cluster);
    // Two streams went to the other node, the others to the router.
    assert!(after[1] - before[1] < held, "the router lent {after:?} of {held} bytes\n{}", cluster.logs());
    let stored: u64 = cluster.stored(1).iter().map(|path| path.metadata().expect("it is there").len()).sum();
    assert_eq!(stored, held);
    // What came from the node is what the router has.
    cluster.kill_node(0);
    cluster.until("it is missed", |state| state["nodes"][0]["state"] != "serving");
    cluster.api.story(TOKENS, |_| ()).assert_equals(&told);
}

#[test]
fn a_node_holds_no_more_than_its_quota_of_the_disk() {
    // Of the model's 8 MB.
    let node = ["--disk", "0.001"];
    let shape = Shape { empty: true, node: &node, router: &["--replicas", "1"], ..Shape::nodes(1) };
    let cluster = Alone::start(&shape);
    let stored: u64 = cluster.stored(0).iter().map(|path| path.metadata().expect("it is there").len()).sum();
    let (held, quota) = (number(&cluster.node(0), "weight_bytes"), 1 << 30);
    assert!(0 < held && held == stored && stored <= quota / 1000, "{held} held, {stored} stored");
    cluster.api.complete(&json!({"prompt": OPENING, "max_tokens": 3, "temperature": 0}));
}

/// The model takes eight seconds at this rate.
const SLOWLY: [&str; 4] = ["--replicas", "1", "--weights-mb-s", "1"];
const SLOWLY_BYTES_S: f64 = 1e6;

/// Longer than any of this takes.
const HANGS_AFTER: Duration = Duration::from_secs(120);

/// Waits until an empty node, the only one, has got this share of what it fetches; bytes it fetches in all.
fn fetched(cluster: &Cluster, share: f64) -> u64 {
    let began = Instant::now();
    loop {
        let node = cluster.node(0);
        if let Some(total) = node["loading"]["total_bytes"].as_u64()
            && number(&node, "lent_bytes") as f64 >= share * total as f64
        {
            return total;
        }
        assert!(began.elapsed() < HANGS_AFTER, "{node}\n{}", cluster.logs());
    }
}

/// Bytes of the largest expert that a node keeps.
fn largest(cluster: &Cluster, node: usize) -> u64 {
    let sizes = cluster.stored(node).into_iter().map(|path| path.metadata().expect("it is there").len());
    sizes.max().expect("it keeps experts")
}

#[cfg(target_os = "linux")]
#[test]
fn a_node_that_is_killed_while_it_fetches_goes_on_where_it_was() {
    let _turn = turn();
    let mut cluster = Cluster::open(&Shape { empty: true, router: &SLOWLY, ..Shape::nodes(1) });
    cluster.join_node(0);
    let total = fetched(&cluster, 0.4);
    cluster.kill_node(0);
    let before = number(&cluster.node(0), "lent_bytes");
    assert!(before < total, "it was done already");
    let shown = cluster.start_node_on_terminal(0);
    assert_eq!(cluster.ready(), json!(1), "{}", cluster.logs());
    let (lent, held) = (number(&cluster.node(0), "lent_bytes"), number(&cluster.node(0), "weight_bytes"));
    assert_eq!(held, total);
    assert!(before * 5 > total, "{before} of {total} bytes came before it was killed");
    assert!(held <= lent && lent * 5 < held * 6, "{lent} bytes were sent for {held}");
    story(&cluster);
    // Who watches sees a bar.
    let shown = std::fs::read_to_string(shown).unwrap();
    assert!(shown.contains("fetching ") && shown.contains(" experts [") && shown.contains("iB/"), "{shown}");
}

#[test]
fn what_is_fetched_is_shown_at_both_ends_and_comes_no_faster_than_it_may() {
    let _turn = turn();
    let began = Instant::now();
    let mut cluster = Cluster::open(&Shape { empty: true, router: &SLOWLY, ..Shape::nodes(1) });
    cluster.join_node(0);
    let total = fetched(&cluster, 0.2);
    let nodes = moemesh(&["nodes", "--router", &cluster.api.base]);
    let loading = nodes.stdout.lines().find(|line| line.contains("loading ")).unwrap_or_default();
    assert!(loading.contains(" % of ") && loading.contains("MB"), "{nodes:?}");
    assert_eq!(cluster.ready(), json!(1), "{}", cluster.logs());
    let (lent, took) = (number(&cluster.node(0), "lent_bytes"), began.elapsed().as_secs_f64());
    // The last chunk of each of four streams leaves at once.
    let most = SLOWLY_BYTES_S * took + 4.0 * largest(&cluster, 0) as f64;
    assert!(lent == total && (lent as f64) < most, "{lent} bytes in {took} s");
    // Who reads a log finds lines; the last one comes a moment after the node serves.
    cluster.until("the log tells the end", |_| cluster.logs().contains("fetched "));
    let logs = cluster.logs();
    for line in ["fetching experts: ", " MB/s, ", "fetched ", " from the router, 0 B from other nodes"] {
        assert!(logs.contains(line), "no {line:?} in {logs}");
    }
}

#[test]
fn a_node_follows_a_router_that_runs_another_model_and_keeps_what_it_had() {
    let shape = Shape { empty: true, router: &["--replicas", "1"], ..Shape::nodes(1) };
    let mut cluster = Alone::start(&shape);
    let first = story(&cluster);
    for (format, new) in [(&["--weights", "q8"][..], true), (&[][..], false)] {
        cluster.restart_router(format);
        assert_eq!(cluster.ready(), json!(1), "{}", cluster.logs());
        let told = story_of(&cluster, format);
        assert_eq!(told.digest == first.digest, !new, "another format computes other logits");
        let node = cluster.node(0);
        let expected = if new { number(&node, "weight_bytes") } else { 0 };
        assert_eq!(number(&node, "lent_bytes"), expected, "{}", cluster.logs());
    }
    let followed = cluster.logs().matches("the router runs another model now; this node follows it").count();
    assert_eq!(followed, 2, "{}", cluster.logs());
}

#[test]
fn a_node_with_the_model_lends_to_one_without() {
    let _turn = turn();
    let node = ["--weights-mb-s", "1"];
    let shape = Shape { router: &["--replicas", "2"], node: &node, ..Shape::nodes(2) };
    let mut cluster = Cluster::open(&shape);
    cluster.join_node(0);
    cluster.join_empty(1);
    assert_eq!(cluster.ready(), json!(2), "{}", cluster.logs());
    // It had to fetch before the other one served. Now the other one does.
    cluster.kill_node(1);
    for path in cluster.stored(1) {
        std::fs::remove_file(path).unwrap();
    }
    let (before, held) = (lent(&cluster), number(&cluster.node(0), "weight_bytes"));
    cluster.until("it is missed", |state| state["nodes"][1]["state"] == "absent");
    let began = Instant::now();
    cluster.start_node(1);
    cluster.until("it serves again", |state| state["nodes"][1]["state"] == "serving");
    let (after, took) = (lent(&cluster), began.elapsed().as_secs_f64());
    assert_eq!(after[0], 0, "it has the model");
    let by_node = held.checked_sub(after[1] - before[1]).expect("nothing twice");
    assert!(by_node > 0, "the router lent {after:?} of {held} bytes\n{}", cluster.logs());
    // The last chunk of each of two streams leaves at once.
    let most = SLOWLY_BYTES_S * took + 2.0 * largest(&cluster, 1) as f64;
    assert!((by_node as f64) < most, "{by_node} bytes in {took} s");
    story(&cluster);
}
