//! Nodes that start with nothing: they fetch their experts, keep them, and tell the same story.

use serde_json::{Value, json};

use super::harness::{Alone, Cluster, OPENING, Shape, Story, moemesh};

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
    let fallbacks = || cluster.api.nodes()["router"]["fallbacks"].clone();
    let before = fallbacks();
    let story = cluster.api.story(TOKENS, |_| ());
    let tokens = TOKENS.to_string();
    let flags = ["reference", "--prompt", OPENING, "--max-tokens", &tokens, "--ignore-eos", "--json"];
    let alone = moemesh(&flags).json();
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
        let stored: u64 = cluster.stored(node).iter().map(|path| path.metadata().unwrap().len()).sum();
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
    let stored: u64 = cluster.stored(1).iter().map(|path| path.metadata().unwrap().len()).sum();
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
    let stored: u64 = cluster.stored(0).iter().map(|path| path.metadata().unwrap().len()).sum();
    let (held, quota) = (number(&cluster.node(0), "weight_bytes"), 1 << 30);
    assert!(0 < held && held == stored && stored <= quota / 1000, "{held} held, {stored} stored");
    cluster.api.complete(&json!({"prompt": OPENING, "max_tokens": 3, "temperature": 0}));
}
