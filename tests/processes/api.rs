//! The API over plain HTTP, against a router and three nodes: what the Python client does, and what studies need.

use std::sync::LazyLock;

use serde_json::{Value, json};

use super::harness::{Alone, Api, Cluster, OPENING, Shape};

/// One cluster for all questions; it ends with this process.
static SHARED: LazyLock<Cluster> = LazyLock::new(|| Cluster::start(&Shape::nodes(3)));

/// The API of the shared cluster.
pub(crate) fn api() -> &'static Api {
    &SHARED.api
}

const CHAT: &str = "/v1/chat/completions";

fn text(answer: &Value) -> &str {
    answer["choices"][0]["text"].as_str().expect("a completion has text")
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().expect("a message has content")
}

fn ids(value: &Value) -> Vec<u64> {
    let list = value.as_array().unwrap_or_else(|| panic!("no list: {value}"));
    list.iter().map(|id| id.as_u64().expect("a token id")).collect()
}

fn question() -> Value {
    json!([{"role": "system", "content": "You tell tales."}, {"role": "user", "content": "Tell me of a wolf."}])
}

/// A completion of the opening at temperature 0.
fn greedy(more: Value) -> Value {
    let mut body = json!({"prompt": OPENING, "temperature": 0, "max_tokens": 24, "ignore_eos": true});
    body.as_object_mut().expect("an object").extend(more.as_object().expect("an object").clone());
    body
}

#[test]
fn models_lists_the_one_model() {
    let models = api().get("/v1/models").ok();
    assert_eq!(models["object"], "list");
    assert_eq!(models["data"][0]["id"], "tale-moe");
    assert_eq!(models["data"][0]["max_model_len"], 2048);
    assert_eq!(models["data"].as_array().map(Vec::len), Some(1));
    assert_eq!(api().get("/v1/models/tale-moe").ok(), models["data"][0]);
}

#[test]
fn a_chat_is_answered_whole_and_streamed_alike() {
    let mut body = json!({
        "model": "tale-moe", "messages": question(), "temperature": 0, "max_tokens": 40, "ignore_eos": true,
        "logprobs": true, "top_logprobs": 3,
    });
    let answer = api().post(CHAT, &body);
    assert_eq!(answer.header("x-moemesh-exact"), "native");
    let answer = answer.ok();
    assert_eq!(answer["object"], "chat.completion");
    assert_eq!(answer["choices"][0]["message"]["role"], "assistant");
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 40);
    let entries = answer["choices"][0]["logprobs"]["content"].as_array().expect("log-probabilities");
    assert_eq!(entries.len(), 40);
    for entry in entries {
        let top = entry["top_logprobs"].as_array().expect("alternatives");
        assert_eq!(top.len(), 3);
        // The greedy choice is the most probable one.
        assert_eq!(top[0]["token"], entry["token"]);
        assert_eq!(top[0]["logprob"], entry["logprob"]);
        let of = |entry: &Value| entry["logprob"].as_f64().expect("a number");
        assert!(of(&top[0]) >= of(&top[1]) && of(&top[1]) >= of(&top[2]) && of(&top[0]) <= 0.0, "{entry}");
    }
    let spelled: Vec<u8> =
        entries.iter().flat_map(|entry| ids(&entry["bytes"])).map(|byte| byte as u8).collect();
    assert_eq!(String::from_utf8_lossy(&spelled), content(&answer));

    body["stream"] = json!(true);
    body["stream_options"] = json!({"include_usage": true});
    let events: Vec<Value> = api().stream(CHAT, &body).collect();
    assert!(events.iter().all(|event| event["object"] == "chat.completion.chunk"));
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let (usage, chunks) = events.split_last().expect("there are events");
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"], answer["usage"]);
    assert!(chunks.iter().all(|chunk| chunk["usage"].is_null()), "usage comes last");
    // The role, one per token, the end.
    assert_eq!(chunks.len(), 1 + 40 + 1);
    assert_eq!(chunks[41]["choices"][0]["finish_reason"], "length");
    assert!(chunks[..41].iter().all(|chunk| chunk["choices"][0]["finish_reason"].is_null()));
    let pieces: Vec<&str> =
        chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str()).collect();
    assert_eq!(pieces.concat(), content(&answer));
    let streamed: Vec<&Value> =
        chunks[1..41].iter().map(|chunk| &chunk["choices"][0]["logprobs"]["content"][0]).collect();
    assert_eq!(streamed, entries.iter().collect::<Vec<_>>());
}

#[test]
fn echo_with_logprobs_scores_the_prompt() {
    let answer = api().complete(&json!({"prompt": OPENING, "max_tokens": 0, "echo": true, "logprobs": 2}));
    assert_eq!(text(&answer), OPENING);
    let logprobs = &answer["choices"][0]["logprobs"];
    let list = |name: &str| logprobs[name].as_array().unwrap_or_else(|| panic!("no {name}")).clone();
    let scores = list("token_logprobs");
    assert!(scores[0].is_null(), "nothing precedes the first token");
    assert!(scores[1..].iter().all(|score| score.as_f64().is_some_and(|score| score <= 0.0)), "{scores:?}");
    for name in ["tokens", "top_logprobs", "text_offset"] {
        assert_eq!(list(name).len(), scores.len(), "{name}");
    }
    assert_eq!(answer["usage"]["prompt_tokens"], scores.len());
    let pieces: String = list("tokens").iter().filter_map(Value::as_str).collect();
    assert_eq!(pieces, OPENING);

    // What follows is scored the same whether it was generated or given.
    let told = api().complete(&greedy(json!({"logprobs": 0, "echo": true, "return_token_ids": true})));
    let generated = told["choices"][0]["logprobs"]["token_logprobs"].clone();
    let mut all = ids(&told["choices"][0]["prompt_token_ids"]);
    all.extend(ids(&told["choices"][0]["token_ids"]));
    let given = api().complete(&json!({"prompt": all, "max_tokens": 0, "logprobs": 0, "echo": true}));
    assert_eq!(given["choices"][0]["logprobs"]["token_logprobs"], generated);
    assert_eq!(generated.as_array().map(Vec::len), Some(all.len()));
}

#[test]
fn prompts_are_strings_ids_and_lists_of_either() {
    let alone = |prompt: Value| api().complete(&greedy(json!({"prompt": prompt})));
    let (first, second) = ("The king said", "In a dark forest");
    let as_ids = |prompt: &str| api().post("/tokenize", &json!({"prompt": prompt})).ok()["tokens"].clone();
    let expected = [text(&alone(json!(first))).to_owned(), text(&alone(json!(second))).to_owned()];
    assert_ne!(expected[0], expected[1]);
    assert_eq!(text(&alone(as_ids(first))), expected[0]);
    for list in [json!([first, second]), json!([as_ids(first), as_ids(second)])] {
        let answer = alone(list);
        let choices = answer["choices"].as_array().expect("choices");
        assert_eq!(choices.len(), 2);
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["text"], expected[index]);
        }
        assert_eq!(answer["usage"]["completion_tokens"], 48);
    }
}

#[test]
fn a_seed_repeats_and_another_does_not() {
    let drawn = |seed: u64, more: Value| {
        let mut body = greedy(more);
        body["temperature"] = json!(0.9);
        body["seed"] = json!(seed);
        api().complete(&body)
    };
    let seventh = drawn(7, json!({}));
    assert_eq!(text(&drawn(7, json!({}))), text(&seventh));
    assert_ne!(text(&drawn(8, json!({}))), text(&seventh));
    assert_ne!(text(&api().complete(&greedy(json!({})))), text(&seventh), "a draw is not the greedy text");

    let two = drawn(7, json!({"n": 2}));
    let choice = |index: usize| two["choices"][index]["text"].as_str().expect("text").to_owned();
    assert_eq!(two["choices"].as_array().map(Vec::len), Some(2));
    assert_ne!(choice(0), choice(1));
    assert_eq!(drawn(7, json!({"n": 2}))["choices"], two["choices"]);
    assert_eq!(choice(0), text(&seventh), "the first of several is what one alone would be");
}

#[test]
fn stop_strings_end_the_text_also_across_tokens() {
    let whole = api().complete(&greedy(json!({"logprobs": 0})));
    let story = text(&whole).to_owned();
    assert!(story.is_ascii(), "offsets below are bytes: {story}");
    let offsets = ids(&whole["choices"][0]["logprobs"]["text_offset"]);
    let border = offsets[10] as usize;
    let across = &story[border - 2..border + 2];
    let at = story.find(across).expect("it is a part");
    assert!(at > 0 && offsets.contains(&(at as u64 + 2)), "{across:?} is across a border in {story:?}");

    for stop in [json!(across), json!(["never seen", across, "\u{1F43A}"])] {
        let stopped = api().complete(&greedy(json!({"stop": stop})));
        assert_eq!(text(&stopped), &story[..at]);
        assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
        assert_eq!(stopped["choices"][0]["stop_reason"], across);
        let body = greedy(json!({"stop": stop, "stream": true}));
        let pieces: Vec<String> = api()
            .stream("/v1/completions", &body)
            .filter_map(|event| event["choices"][0]["text"].as_str().map(str::to_owned))
            .collect();
        assert_eq!(pieces.concat(), &story[..at]);
    }
    let included = api().complete(&greedy(json!({"stop": across, "include_stop_str_in_output": true})));
    assert_eq!(text(&included), &story[..at + across.len()]);
    let unseen = api().complete(&greedy(json!({"stop": ["never seen"]})));
    assert_eq!(text(&unseen), story, "text held back for a stop that did not come is given out");
}

#[test]
fn max_tokens_and_the_end_token_end_the_text() {
    for count in [1, 5, 17] {
        let answer = api().complete(&greedy(json!({"max_tokens": count, "return_token_ids": true})));
        assert_eq!(ids(&answer["choices"][0]["token_ids"]).len(), count);
        assert_eq!(answer["usage"]["completion_tokens"], count);
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    }
    // A bias makes the end token (4095) certain.
    let end = json!({"logit_bias": {"4095": 100}, "ignore_eos": false, "return_token_ids": true});
    let ended = api().complete(&greedy(end.clone()));
    assert_eq!(ended["choices"][0]["finish_reason"], "stop");
    assert_eq!(text(&ended), "");
    let mut ignored = greedy(end);
    ignored["ignore_eos"] = json!(true);
    let ignored = api().complete(&ignored);
    assert_eq!(ignored["choices"][0]["finish_reason"], "length");
    assert_eq!(ids(&ignored["choices"][0]["token_ids"]), [4095; 24]);
}

#[test]
fn text_survives_the_way_to_tokens_and_back() {
    for prompt in
        [OPENING, "", "  two  spaces\n\tand a tab", "na\u{ef}ve \u{1F43A} \u{4f60}\u{597d} <|im_start|>"]
    {
        let tokens = api().post("/tokenize", &json!({"prompt": prompt})).ok();
        assert_eq!(tokens["count"], ids(&tokens["tokens"]).len());
        let back = api().post("/detokenize", &json!({"tokens": tokens["tokens"]})).ok();
        assert_eq!(back["prompt"], prompt);
    }
    let chat = api().post("/tokenize", &json!({"messages": question()})).ok();
    let rendered = api().post("/detokenize", &json!({"tokens": chat["tokens"]})).ok();
    let expected = "<|im_start|>system\nYou tell tales.<|im_end|>\n<|im_start|>user\nTell me of a wolf.<|im_end|>\n\
                    <|im_start|>assistant\n";
    assert_eq!(rendered["prompt"], expected);
}

#[test]
fn health_and_version_answer() {
    assert_eq!(api().get("/health").ok(), json!({"status": "ok"}));
    let version = api().get("/version").ok();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(version["model"], "tale-moe");
    assert_eq!(version["exact"], "native");
    let fingerprint = version["system_fingerprint"].as_str().expect("a fingerprint");
    assert!(fingerprint.starts_with("moemesh-q4-native-"), "{fingerprint}");
    let answer = api().complete(&greedy(json!({})));
    assert_eq!(answer["system_fingerprint"], fingerprint);
}

/// Splits `name{labels} value`; the value must be a number.
fn sample(line: &str) -> Sample<'_> {
    let (series, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("no value: {line}"));
    let value = value.parse().unwrap_or_else(|_| panic!("no number: {line}"));
    match series.split_once('{') {
        None => (series, "", value),
        Some((name, labels)) => {
            (name, labels.strip_suffix('}').unwrap_or_else(|| panic!("labels stay open: {line}")), value)
        }
    }
}

/// Every series of the API.
const SERIES: [&str; 26] = [
    "requests_running",
    "requests_waiting",
    "requests_finished_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "steps_total",
    "step_rows",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "queue_duration_seconds",
    "prefill_duration_seconds",
    "decode_duration_seconds",
    "expert_wait_seconds",
    "preemptions_total",
    "kv_cache_used_bytes",
    "kv_cache_capacity_bytes",
    "wire_bytes_total",
    "node_calls_total",
    "node_rows_total",
    "node_call_duration_seconds",
    "node_up",
    "fallback_calls_total",
    "fallback_rows_total",
    "http_requests_total",
    "http_requests_in_flight",
    "http_request_duration_seconds",
];

/// Name, labels and value of a sample.
type Sample<'a> = (&'a str, &'a str, f64);

/// The names that have a TYPE, and the samples; each must come right after the TYPE of its name.
fn parsed(text: &str) -> (Vec<&str>, Vec<Sample<'_>>) {
    let (mut typed, mut samples) = (Vec::new(), Vec::new());
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let words: Vec<&str> = comment.splitn(3, ' ').collect();
            assert!(matches!(words[..], ["HELP" | "TYPE", _, _]), "{line}");
            if words[0] == "TYPE" {
                assert!(["counter", "gauge", "histogram"].contains(&words[2]), "{line}");
                typed.push(words[1]);
            }
            continue;
        }
        let (name, labels, value) = sample(line);
        let of_typed = |typed: &&str| {
            name == *typed
                || name.strip_prefix(*typed).is_some_and(|end| ["_bucket", "_sum", "_count"].contains(&end))
        };
        assert!(typed.last().is_some_and(of_typed), "{line} comes without its TYPE");
        samples.push((name, labels, value));
    }
    (typed, samples)
}

#[test]
fn metrics_are_well_formed_and_count() {
    let cluster = Alone::start(&Shape::nodes(3));
    let prompt = ids(&cluster.api.post("/tokenize", &json!({"prompt": OPENING})).ok()["tokens"]).len();
    cluster.api.complete(&greedy(json!({})));
    let answer = cluster.api.get("/metrics");
    assert_eq!(answer.status, 200);
    assert!(answer.header("content-type").starts_with("text/plain; version=0.0.4"));

    let (typed, samples) = parsed(&answer.text);
    for series in SERIES {
        assert!(
            typed.contains(&format!("moemesh_{series}").as_str()),
            "no moemesh_{series}\n{}",
            answer.text
        );
    }
    let sum = |name: &str| -> f64 {
        let found: Vec<f64> = samples.iter().filter(|(n, _, _)| *n == name).map(|(_, _, v)| *v).collect();
        assert!(!found.is_empty(), "no {name}");
        found.iter().sum()
    };
    assert_eq!(sum("moemesh_prompt_tokens_total"), prompt as f64);
    assert_eq!(sum("moemesh_generation_tokens_total"), 24.0);
    assert_eq!(sum("moemesh_requests_finished_total"), 1.0);
    assert_eq!(sum("moemesh_node_up"), 3.0);
    assert_eq!(sum("moemesh_requests_running"), 0.0);
    assert_eq!(sum("moemesh_fallback_calls_total"), 0.0);
    let calls: u64 = (0..3).map(|node| cluster.node(node)["calls"].as_u64().expect("calls")).sum();
    assert_eq!(sum("moemesh_node_calls_total"), calls as f64);
    assert!(calls > 0);
}

#[test]
fn a_client_that_goes_away_frees_its_sequence() {
    let cluster = Alone::start(&Shape::nodes(3));
    let body = greedy(json!({"max_tokens": 1900, "stream": true}));
    let mut events = cluster.api.stream("/v1/completions", &body);
    assert!(events.by_ref().take(5).count() == 5);
    assert_eq!(cluster.api.nodes()["router"]["running"], 1);
    drop(events);
    let state = cluster.until("the sequence is freed", |state| state["router"]["running"] == 0);
    assert_eq!(state["router"]["kv_blocks_used"], 0);
    // It was cut off, not told to its end.
    let metrics = cluster.api.get("/metrics").text;
    let generated = metrics.lines().find_map(|line| line.strip_prefix("moemesh_generation_tokens_total "));
    let generated: f64 = generated.and_then(|value| value.parse().ok()).expect("tokens are counted");
    assert!(generated < 1900.0, "{generated} tokens were generated for nobody");
}

#[test]
fn a_router_that_stops_finishes_and_says_goodbye() {
    let mut cluster = Alone::start(&Shape::nodes(2));
    cluster.api.complete(&greedy(json!({})));
    assert_eq!(cluster.stop_router(), Some(0), "{}", cluster.logs());
    assert!(!cluster.logs().contains("panicked"), "{}", cluster.logs());
}
