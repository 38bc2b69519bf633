//! Nodes that die, hang and come back while a story is told: the story does not change by a bit.

use serde_json::{Value, json};

use super::harness::{Alone, Cluster, OPENING, POLLS_MAX, Shape, Story, moemesh, turn};

/// Long enough that most of it is told after the node is lost.
const TOKENS: usize = 300;
/// Without copies on other nodes, so that the router has to stand in.
const ALONE: [&str; 2] = ["--replicas", "1"];
/// The node is lost after this token.
const LOST_AT: usize = 20;

fn number(state: &Value, pointer: &str) -> u64 {
    state.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("no {pointer} in {state}"))
}

/// The undisturbed story: of the cluster, equal to that of a single process.
fn undisturbed(cluster: &Cluster) -> Story {
    let story = cluster.api.story(TOKENS, |_| ());
    let tokens = TOKENS.to_string();
    let flags = ["reference", "--prompt", OPENING, "--max-tokens", &tokens, "--ignore-eos", "--json"];
    let alone = moemesh(&flags).json();
    assert_eq!(alone["token_ids"], serde_json::json!(story.token_ids));
    assert_eq!(alone["logits_digest"], story.digest);
    assert_eq!(number(&cluster.api.nodes(), "/router/fallbacks"), 0, "{}", cluster.logs());
    story
}

fn serving(state: &Value, node: usize) -> bool {
    state["nodes"][node]["state"] == "serving"
}

/// Checks that the router stood in for a lost node, and says how long the story stood still.
fn assert_fell_back(cluster: &Cluster, what: &str, story: &Story) {
    let fallbacks = number(&cluster.api.nodes(), "/router/fallbacks");
    eprintln!("{what}: longest gap {:?}, {fallbacks} fallbacks", story.longest_gap);
    assert!(fallbacks > 0, "the loss of the node went unnoticed\n{}", cluster.logs());
}

/// Checks that a node takes part in the next story, and that the story is still the same.
fn assert_used_again(cluster: &Cluster, node: usize, expected: &Story) {
    let pointer = format!("/nodes/{node}/calls");
    let state = cluster.until("the node serves again", |state| serving(state, node));
    let before = number(&state, &pointer);
    cluster.api.story(TOKENS, |_| ()).assert_equals(expected);
    let after = number(&cluster.api.nodes(), &pointer);
    assert!(after > before, "the node was called {before} times before and {after} after");
}

/// The story, during which a node is killed; it must be the expected one.
#[track_caller]
fn told_despite_a_kill(cluster: &mut Cluster, node: usize, expected: &Story) -> Story {
    let api = cluster.api.clone();
    let disturbed = api.story(TOKENS, |token| {
        if token == LOST_AT {
            cluster.kill_node(node);
        }
    });
    disturbed.assert_equals(expected);
    disturbed
}

#[test]
fn a_killed_node_changes_no_bit_and_serves_again_once_restarted() {
    let mut cluster = Alone::start(&Shape { router: &ALONE, ..Shape::nodes(3) });
    let expected = undisturbed(&cluster);

    let disturbed = told_despite_a_kill(&mut cluster, 1, &expected);
    assert_fell_back(&cluster, "kill -9", &disturbed);
    cluster.until("the dead node is missed", |state| !serving(state, 1));

    cluster.start_node(1);
    assert_used_again(&cluster, 1, &expected);
}

#[test]
fn a_stopped_node_changes_no_bit_and_serves_again_once_continued() {
    let cluster = Alone::start(&Shape { router: &ALONE, ..Shape::nodes(3) });
    let expected = undisturbed(&cluster);

    let disturbed = cluster.api.story(TOKENS, |token| {
        if token == LOST_AT {
            cluster.signal_node(0, "STOP");
        }
    });
    disturbed.assert_equals(&expected);
    assert_fell_back(&cluster, "SIGSTOP", &disturbed);

    cluster.signal_node(0, "CONT");
    assert_used_again(&cluster, 0, &expected);
}

#[test]
fn a_node_killed_during_a_prompt_changes_no_bit_of_shared_experts() {
    // Chunks of 128 rows are cut in two parts, so that calls of both are out when the node dies.
    let router = ["--replicate", "all", "--chunk", "128", "--pace-gb-s", "0.2"];
    let mut cluster = Alone::start(&Shape { router: &router, ..Shape::nodes(2) });
    let prompt = [OPENING; 90].join(". ");
    let flags = ["reference", "--prompt", &prompt, "--max-tokens", "8", "--ignore-eos", "--json"];
    let alone = moemesh(&flags).json();

    let rows = |cluster: &Cluster| number(&cluster.api.nodes(), "/router/rows");
    let before = rows(&cluster);
    let (api, text) = (cluster.api.clone(), prompt.clone());
    let telling = std::thread::spawn(move || {
        api.complete(&json!({
            "prompt": text, "max_tokens": 8, "temperature": 0, "ignore_eos": true, "logits_digest": true,
            "return_token_ids": true,
        }))
    });
    // A step or more is over, most are to come.
    let begun = (0..POLLS_MAX).map(|_| rows(&cluster)).find(|rows| *rows > before);
    cluster.kill_node(1);
    let at = rows(&cluster);
    let told = telling.join().expect("the prompt is answered");
    let in_all = rows(&cluster) - before;
    assert!(begun.is_some() && at - before < in_all - 128, "killed after {} of {in_all} rows", at - before);
    assert_eq!(told["choices"][0]["token_ids"], alone["token_ids"], "{}", cluster.logs());
    assert_eq!(told["choices"][0]["logits_digest"], alone["logits_digest"]);
    let state = cluster.api.nodes();
    assert!(number(&state, "/router/fallbacks") > 0, "no call was out\n{}", cluster.logs());
    let (here, all) = (number(&state, "/router/assignments_here"), number(&state, "/router/assignments"));
    assert!(0 < here && here < all, "{here} of {all} on the router");
}

#[test]
fn without_any_node_left_the_router_tells_the_same_story() {
    let mut cluster = Alone::start(&Shape { router: &ALONE, ..Shape::nodes(3) });
    let expected = undisturbed(&cluster);

    let api = cluster.api.clone();
    let disturbed = api.story(TOKENS, |token| {
        // One by one, so that the last is lost to a router that has lost others.
        if token % LOST_AT == 0 && token / LOST_AT <= 3 {
            cluster.kill_node(token / LOST_AT - 1);
        }
    });
    disturbed.assert_equals(&expected);
    assert_fell_back(&cluster, "kill -9 of all", &disturbed);
    cluster.api.story(TOKENS, |_| ()).assert_equals(&expected);
    cluster.until("all are missed", |state| (0..3).all(|node| !serving(state, node)));

    cluster.start_node(2);
    assert_used_again(&cluster, 2, &expected);
}

#[test]
fn a_killed_node_with_a_replica_leaves_nothing_to_the_router() {
    let mut cluster = Alone::start(&Shape { router: &["--replicas", "2"], ..Shape::nodes(3) });
    let expected = undisturbed(&cluster);

    let disturbed = told_despite_a_kill(&mut cluster, 1, &expected);
    let state = cluster.api.nodes();
    let of = |name: &str| number(&state, &format!("/router/{name}"));
    eprintln!(
        "kill -9 with a replica: longest gap {:?}, {} hedges, {} won, {} retries, {} fallbacks of {} calls",
        disturbed.longest_gap,
        of("hedges"),
        of("hedges_won"),
        of("retries"),
        of("fallbacks"),
        of("calls"),
    );
    assert_eq!(of("fallbacks"), 0, "{}", cluster.logs());
    assert!(of("hedges_won") + of("retries") > 0, "no call was out\n{}", cluster.logs());
    // Once it is back, another may go: what those two held is asked of it.
    cluster.start_node(1);
    // One late call alone does not change its state: its second connection tells that it is back.
    let back = |state: &Value| state["nodes"][1]["connections"] == 2 && serving(state, 1);
    cluster.until("the node serves again", back);
    cluster.kill_node(0);
    assert_used_again(&cluster, 1, &expected);
    assert_eq!(number(&cluster.api.nodes(), "/router/fallbacks"), 0, "{}", cluster.logs());
}

/// Asks for tokens, whether or not there are any to be had, until the cluster's state is as wanted.
#[track_caller]
fn until_refused(cluster: &Cluster, wanted: impl Fn(&Value) -> bool) {
    // A refusal takes a tenth of the time that an answer takes.
    for _ in 0..10 * POLLS_MAX {
        if wanted(&cluster.api.nodes()) {
            return;
        }
        let answer = cluster.api.post("/v1/completions", &json!({"prompt": "The", "max_tokens": 1}));
        assert!([200, 503].contains(&answer.status), "{}", answer.text);
    }
    panic!("never: {:#}\n{}", cluster.api.nodes(), cluster.logs());
}

#[test]
fn without_fallback_what_is_lost_is_named_and_comes_back_with_its_node() {
    let mut cluster =
        Alone::start(&Shape { router: &["--no-fallback", "--replicas", "1"], ..Shape::nodes(2) });
    let ask = |cluster: &Cluster, tokens: usize| {
        let body = json!({"prompt": OPENING, "max_tokens": tokens, "temperature": 0, "ignore_eos": true});
        cluster.api.post("/v1/completions", &body)
    };
    ask(&cluster, 8).ok();

    // A stream that has begun ends with an error that names experts.
    let body = json!({
        "prompt": OPENING, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true, "stream": true,
    });
    let mut last = Value::Null;
    for (index, event) in cluster.api.stream("/v1/completions", &body).enumerate() {
        if index == LOST_AT {
            cluster.kill_node(1);
        }
        last = event;
        if last["error"].is_object() {
            break;
        }
    }
    assert_eq!(last["error"]["code"], "expert_unavailable", "{last}");
    let message = last["error"]["message"].as_str().unwrap_or_default().to_owned();
    assert!(message.contains("(layer/expert) ") && message.contains('/'), "{message}");

    until_refused(&cluster, |state| !serving(state, 1));
    let refused = ask(&cluster, 8);
    let message = refused.error(503, "expert_unavailable");
    assert!(message.contains("more; bring a node back"), "a bounded list: {message}");
    assert!(refused.header("retry-after").parse::<u32>().is_ok(), "{:?}", refused.headers);
    assert_eq!(cluster.api.get("/health").status, 503);

    cluster.kill_node(0);
    // Not only suspect: those are tried again.
    until_refused(&cluster, |state| (0..2).all(|node| state["nodes"][node]["state"] == "absent"));
    let health = cluster.api.get("/health");
    assert!(health.status == 503 && health.text.contains("no node serves"), "{}", health.text);
    ask(&cluster, 8).error(503, "expert_unavailable");
    assert_eq!(number(&cluster.api.nodes(), "/router/fallbacks"), 0);

    (0..2).for_each(|node| cluster.start_node(node));
    until_refused(&cluster, |state| serving(state, 0) && serving(state, 1));
    ask(&cluster, 8).ok();
    assert_eq!(cluster.api.get("/health").status, 200);
}

#[test]
fn a_router_that_waits_for_its_nodes_says_so_and_serves_once_they_are_there() {
    let _turn = turn();
    let mut cluster = Cluster::open(&Shape::nodes(2));
    let api = cluster.api.clone();
    let waits = |count: &str| {
        let named = format!("waiting for nodes ({count})");
        (0..POLLS_MAX).map(|_| api.get("/health")).find(|health| health.text.contains(&named))
    };
    // At once, whatever it waits for; loading comes first.
    let health = api.get("/health");
    assert_eq!((health.status, health.header("retry-after")), (503, "2"), "{}", health.text);
    let waiting = waits("0 of 2").expect("it waits for its nodes");
    let body: Value = serde_json::from_str(&waiting.text).expect("JSON");
    assert_eq!((waiting.status, &body["status"]), (503, &json!("starting")));
    assert_eq!(body["nodes"], json!({"here": 0, "wanted": 2}));
    let asked = json!({"prompt": "The", "max_tokens": 1});
    let refused = api.post("/v1/completions", &asked);
    assert!(refused.error(503, "starting").contains("waiting for nodes (0 of 2)"), "{}", refused.text);
    assert_eq!(refused.header("retry-after"), "2");
    api.get("/v1/models").error(503, "starting");
    assert_eq!(api.nodes()["nodes"], json!([]));
    cluster.join_node(0);
    waits("1 of 2").expect("it waits for the second node");
    assert_eq!(api.nodes()["nodes"][0]["name"], "node-1");
    cluster.join_node(1);
    assert_eq!(cluster.ready(), json!(2), "{}", cluster.logs());
    assert_eq!(api.get("/health").ok(), json!({"status": "ok"}));
    api.complete(&asked);
}

#[test]
fn whoever_says_goodbye_is_no_cause_for_warnings() {
    let mut cluster = Alone::start(&Shape { all: &["-v"], ..Shape::nodes(2) });
    assert_eq!(cluster.stop_node(1), Some(0));
    cluster.until("it has left", |nodes| nodes["nodes"][1]["state"] == "absent");
    assert_eq!(cluster.stop_router(), Some(0));
    assert_eq!(cluster.stop_node(0), Some(0));
    let logs = cluster.logs();
    let about = |words: &str| logs.lines().filter(|line| line.contains(words)).count();
    // What the first node does next, dialing in vain, is worth a warning.
    assert!(about("the connection to the router ended") >= 1 && about("a node left") >= 1, "{logs}");
    let warnings = ["WARN", "ERROR"].map(|level| {
        let lines = logs.lines().filter(|line| line.contains(level));
        lines.filter(|line| !line.contains("the router cannot be reached")).count()
    });
    assert_eq!(warnings, [0, 0], "{logs}");
}
