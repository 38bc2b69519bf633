//! What the API refuses: status, code and the field at fault; and that it serves on.

use serde_json::{Value, json};

use super::api::api;
use super::harness::{Alone, Shape, moemesh};

const COMPLETIONS: &str = "/v1/completions";
const CHAT: &str = "/v1/chat/completions";

/// The body of a request that would succeed, with some fields replaced.
fn with(mut body: Value, fields: &Value) -> Value {
    body.as_object_mut().expect("an object").extend(fields.as_object().expect("an object").clone());
    body
}

fn still_serves() {
    let answer = api().complete(&json!({"prompt": "The", "max_tokens": 2, "ignore_eos": true}));
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    assert_eq!(api().get("/health").status, 200);
}

type Wrong = Vec<(&'static str, Value)>;

/// Parameters of both endpoints, each with a value out of its range.
fn wrong_anywhere() -> Wrong {
    let many: Vec<String> = (0..17).map(|index| format!("stop {index}")).collect();
    vec![
        ("temperature", json!(2.1)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("warm")),
        ("top_p", json!(0)),
        ("top_p", json!(1.01)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(-0.1)),
        ("min_p", json!(2)),
        ("repetition_penalty", json!(0)),
        ("frequency_penalty", json!(2.5)),
        ("presence_penalty", json!(-2.5)),
        ("seed", json!("x")),
        ("seed", json!(1.5)),
        ("n", json!(0)),
        ("n", json!(9)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!("all")),
        ("max_completion_tokens", json!(-1)),
        ("min_tokens", json!(-1)),
        ("stop", json!("")),
        ("stop", json!(5)),
        ("stop", json!(many)),
        ("stop", json!([1])),
        ("stop_token_ids", json!("x")),
        ("stop_token_ids", json!([-1])),
        ("logit_bias", json!({"4096": 1})),
        ("logit_bias", json!({"1": 101})),
        ("logit_bias", json!([1])),
        ("ignore_eos", json!("yes")),
        ("stream", json!(1)),
        ("stream_options", json!(true)),
    ]
}

fn wrong_completions() -> Wrong {
    vec![
        ("prompt", Value::Null),
        ("prompt", json!("")),
        ("prompt", json!([])),
        ("prompt", json!({"a": 1})),
        ("prompt", json!([-1])),
        ("prompt", json!(["a", 1])),
        ("prompt", json!([[1], []])),
        ("logprobs", json!(21)),
        ("logprobs", json!(-1)),
        ("echo", json!("yes")),
    ]
}

fn wrong_chats() -> Wrong {
    vec![
        ("messages", Value::Null),
        ("messages", json!([])),
        ("messages", json!("hello")),
        ("messages", json!([1])),
        ("messages", json!([{"role": "wolf", "content": "x"}])),
        ("messages", json!([{"role": "user"}])),
        ("messages", json!([{"role": "user", "content": [{"type": "image_url"}]}])),
        ("top_logprobs", json!(21)),
        ("top_logprobs", json!(3)),
        ("logprobs", json!(3)),
    ]
}

#[test]
fn every_parameter_out_of_range_is_named() {
    let ask = |path: &str, body: Value, param: &str| {
        let answer = api().post(path, &body);
        let message = answer.error(400, "invalid_value");
        let error: Value = serde_json::from_str(&answer.text).expect("JSON");
        assert_eq!(error["error"]["param"], param, "{body}");
        assert_eq!(error["error"]["type"], "invalid_request_error");
        assert!(message.contains(param), "{message:?} does not name {param}");
    };
    let complete = json!({"prompt": "The", "max_tokens": 1});
    let talk = json!({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1});
    for (param, value) in wrong_anywhere().into_iter().chain(wrong_completions()) {
        ask(COMPLETIONS, with(complete.clone(), &json!({param: value})), param);
    }
    for (param, value) in wrong_anywhere().into_iter().chain(wrong_chats()) {
        ask(CHAT, with(talk.clone(), &json!({param: value})), param);
    }
    still_serves();
}

#[test]
fn bodies_that_are_no_objects_are_refused() {
    for path in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
        let deep = "[".repeat(100_000);
        let broken: [&[u8]; 8] = [
            b"",
            b"{",
            b"[]",
            b"null",
            b"{\"prompt\": \"a\"} x",
            b"{\"prompt\": \"\xff\"}",
            deep.as_bytes(),
            b"\0",
        ];
        for body in broken {
            api().post_bytes(path, body).error(400, "invalid_json");
        }
    }
    still_serves();
}

#[test]
fn a_body_beyond_the_limit_is_refused() {
    let huge = json!({"prompt": "a".repeat(2 << 20)}).to_string();
    for path in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
        let message = api().post_bytes(path, huge.as_bytes()).error(413, "body_too_large");
        assert!(message.contains("2097152"), "{message}");
    }
    still_serves();
}

#[test]
fn a_prompt_beyond_the_context_is_refused() {
    let answer = api().post(COMPLETIONS, &json!({"prompt": vec![5; 2049], "max_tokens": 1}));
    let message = answer.error(400, "context_length_exceeded");
    assert!(message.contains("2048") && message.contains("2049"), "{message}");
    let long = "wolf ".repeat(3000);
    let chat = json!({"messages": [{"role": "user", "content": long}], "stream": true});
    api().post(CHAT, &chat).error(400, "context_length_exceeded");
    let outside = api().post(COMPLETIONS, &json!({"prompt": [4096], "max_tokens": 1}));
    assert!(outside.error(400, "unknown_token").contains("4096"));
    api().post("/detokenize", &json!({"tokens": [4096]})).error(400, "invalid_value");
    still_serves();
}

#[test]
fn another_model_path_or_method_is_refused() {
    for (path, body) in [
        (COMPLETIONS, json!({"model": "gpt-4", "prompt": "a"})),
        (CHAT, json!({"model": "gpt-4", "messages": [{"role": "user", "content": "a"}]})),
        ("/tokenize", json!({"model": "gpt-4", "prompt": "a"})),
    ] {
        let message = api().post(path, &body).error(404, "model_not_found");
        assert!(message.contains("gpt-4") && message.contains("tale-moe"), "{message}");
    }
    api().get("/v1/models/gpt-4").error(404, "model_not_found");
    api().get("/v1/nothing").error(404, "not_found");
    for path in [COMPLETIONS, CHAT, "/tokenize", "/detokenize"] {
        api().get(path).error(405, "method_not_allowed");
    }
    for path in ["/v1/models", "/health", "/metrics", "/version", "/api/v1/nodes"] {
        api().delete(path).error(405, "method_not_allowed");
    }
    still_serves();
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    for (param, value) in [
        ("tools", tool),
        ("response_format", json!({"type": "json_object"})),
        ("echo", json!(true)),
        ("best_of", json!(3)),
    ] {
        let body = with(json!({"messages": [{"role": "user", "content": "a"}]}), &json!({param: value}));
        let message = api().post(CHAT, &body).error(400, "unsupported_parameter");
        assert!(message.contains(param), "{message:?} does not name {param}");
    }
    let answer = api().post(COMPLETIONS, &json!({"prompt": "a", "max_tokens": 1, "temprature": 0}));
    assert!(answer.header("x-moemesh-warnings").contains("temprature"), "{answer:?}");
    assert_eq!(answer.status, 200);
}

#[test]
fn a_router_with_keys_lets_nobody_else_in() {
    let shape = Shape { router: &["--api-key", "sesame", "--api-key", "mellon"], ..Shape::nodes(1) };
    let cluster = Alone::start(&shape);
    let api = &cluster.api;
    api.get("/v1/models").error(401, "invalid_api_key");
    api.get("/metrics").error(401, "invalid_api_key");
    api.post(COMPLETIONS, &json!({"prompt": "a"})).error(401, "invalid_api_key");
    let message = api.read_with_key("/v1/models", "wrong").error(401, "invalid_api_key");
    assert!(message.contains("Authorization: Bearer"), "{message}");
    assert!(!message.contains("wrong key: wrong") && !message.contains("sesame"), "{message}");
    for key in ["sesame", "mellon"] {
        assert_eq!(api.read_with_key("/v1/models", key).ok()["data"][0]["id"], "tale-moe");
    }
    // Probes have no key.
    assert_eq!(api.get("/health").status, 200);
    let nodes = moemesh(&["nodes", "--router", &api.base, "--api-key", "sesame", "--json"]).json();
    assert_eq!(nodes["nodes"][0]["state"], "serving");
    moemesh(&["nodes", "--router", &api.base]).refused(&["API key", "401"]);
    assert!(!cluster.logs().contains("sesame"), "keys do not belong into logs");
}

#[test]
fn an_open_address_needs_a_key() {
    for address in ["0.0.0.0:0", "[::]:0"] {
        let refused = moemesh(&["router", "--http", address]);
        refused.refused(&[address, "no API key", "--api-key", "127.0.0.1"]);
        assert!(
            !refused.stderr.contains("--api-key-"),
            "the remedy must be a flag there is: {}",
            refused.stderr
        );
    }
}
