//! Every endpoint over real sockets, with a scripted engine in place of the model.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::Path;
use std::sync::{Mutex, mpsc};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::*;
use crate::metrics::Metrics;
use crate::prompt::Prompt;
use crate::request::{
    Command, EngineFacts, EngineHandle, Event, FinishReason, GenerateError, GenerateRequest, Submission,
    Timing, TokenLogprobs,
};

/// What the engine does with a request.
#[derive(Clone)]
enum Plan {
    /// These tokens, then a stop token.
    Tokens(Vec<u32>),
    /// One token, then nothing until the client is gone.
    Stall,
    /// Nothing until the client is gone.
    Silence,
    /// Some tokens, then this.
    Fail(usize, GenerateError),
}

/// A start that waits for its second node.
struct Late;

impl Starting for Late {
    fn waits_for(&self) -> Waiting {
        Waiting { reason: "the router is waiting for nodes (1 of 2)".to_owned(), here: 1, wanted: 2 }
    }

    fn nodes(&self) -> Value {
        json!({"nodes": [{"name": "early"}]})
    }
}

/// Why they cannot compute everything.
#[derive(Default)]
struct Nodes(Option<GenerateError>);

impl Cluster for Nodes {
    fn nodes(&self) -> Value {
        json!({"nodes": [{"name": "a"}]})
    }

    fn trouble(&self) -> Option<String> {
        self.refusal().map(|refusal| refusal.to_string())
    }

    fn refusal(&self) -> Option<GenerateError> {
        self.0.clone()
    }

    fn refresh(&self, _: &Metrics) {}
}

struct Server {
    address: SocketAddr,
    prompt: Arc<Prompt>,
    metrics: Arc<Metrics>,
    /// Requests as the engine got them.
    requests: Mutex<mpsc::Receiver<GenerateRequest>>,
    /// One message per sequence whose stream was dropped.
    cancelled: Mutex<mpsc::Receiver<()>>,
    stop: Option<oneshot::Sender<()>>,
    runtime: Option<tokio::runtime::Runtime>,
    task: Option<tokio::task::JoinHandle<()>>,
}

/// Longer than anything here takes; only a hanging test meets it.
const PATIENCE: Duration = Duration::from_secs(30);

impl Server {
    fn start(plan: Plan, keys: &[&str]) -> Server {
        Server::start_with(plan, keys, Nodes::default())
    }

    fn start_with(plan: Plan, keys: &[&str], nodes: Nodes) -> Server {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let prompt = Arc::new(Prompt::open(&root.join("models/tale-moe"), 4096).unwrap());
        let metrics = Arc::new(Metrics::new().unwrap());
        let facts = EngineFacts { context: 256, vocab: 4096, kv_tokens: 4096 };
        let (engine, mut queue) = EngineHandle::new(facts);
        let (seen, requests) = mpsc::channel();
        let (gone, cancelled) = mpsc::channel();
        std::thread::spawn(move || {
            while let Some(Command::Generate(submission)) = queue.blocking_recv() {
                seen.send(submission.request.clone()).ok();
                let (plan, gone) = (plan.clone(), gone.clone());
                std::thread::spawn(move || generate(&plan, &submission, &gone));
            }
        });
        let identity = Identity {
            model: "tale-moe".into(),
            fingerprint: "fp".into(),
            exact: "native".into(),
            version: "0.1.0".into(),
        };
        let mut service = Service::new(engine, prompt.clone(), metrics.clone(), identity, Arc::new(nodes));
        service.keys = ApiKeys::new(keys);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = oneshot::channel();
        let door = Door::new(service.keys.clone(), Arc::new(Late));
        door.open(Arc::new(service));
        let task = runtime.spawn(serve(listener, Arc::new(door), async {
            stopped.await.ok();
        }));
        Server {
            address,
            prompt,
            metrics,
            requests: Mutex::new(requests),
            cancelled: Mutex::new(cancelled),
            stop: Some(stop),
            runtime: Some(runtime),
            task: Some(task),
        }
    }

    fn tale(text: &str) -> Server {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let prompt = Prompt::open(&root.join("models/tale-moe"), 4096).unwrap();
        Server::start(Plan::Tokens(prompt.encode(text, false).unwrap()), &[])
    }

    fn open(&self, request: &str) -> TcpStream {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        stream
    }

    fn exchange(&self, request: &str) -> Answer {
        let mut bytes = Vec::new();
        self.open(request).read_to_end(&mut bytes).unwrap();
        Answer::parse(&bytes)
    }

    fn get(&self, path: &str) -> Answer {
        self.exchange(&format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        self.exchange(&post(path, &body.to_string()))
    }

    fn completion(&self, mut body: Value) -> Answer {
        body["prompt"] = json!("Once upon a time");
        self.post("/v1/completions", &body)
    }

    fn chat(&self, mut body: Value) -> Answer {
        body["messages"] = json!([{"role": "user", "content": "Tell me a story."}]);
        self.post("/v1/chat/completions", &body)
    }

    fn request(&self) -> GenerateRequest {
        self.requests.lock().unwrap().recv_timeout(PATIENCE).unwrap()
    }

    fn await_cancellation(&self) {
        self.cancelled.lock().unwrap().recv_timeout(PATIENCE).expect("the engine was not told");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.take();
        let (runtime, task) = (self.runtime.take().unwrap(), self.task.take().unwrap());
        if !std::thread::panicking() {
            runtime.block_on(async { tokio::time::timeout(PATIENCE, task).await }).unwrap().unwrap();
        }
    }
}

fn post(path: &str, body: &str) -> String {
    let length = body.len();
    format!("POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}")
}

fn fake_logprobs(token: u32, top: u32) -> TokenLogprobs {
    let top = (0..top).map(|rank| ((token + rank) % 4096, -0.5 - rank as f32)).collect();
    TokenLogprobs { logprob: -0.5, top }
}

fn generate(plan: &Plan, submission: &Submission, gone: &mpsc::Sender<()>) {
    let (request, events) = (&submission.request, &submission.events);
    let send = |event| events.try_send(event).is_ok();
    if let Some(top) = request.prompt_logprobs {
        let mut logprobs: Vec<_> =
            request.prompt.iter().map(|token| Some(fake_logprobs(*token, top))).collect();
        logprobs[0] = None;
        send(Event::Prompt(logprobs));
    }
    let token = |id| Event::Token { id, logprobs: request.logprobs.map(|top| fake_logprobs(id, top)) };
    let await_client = || {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(events.closed());
        gone.send(()).ok();
    };
    match plan {
        Plan::Tokens(tokens) => {
            let count = tokens.len().min(request.max_tokens as usize);
            if !tokens[..count].iter().all(|id| send(token(*id))) {
                gone.send(()).ok();
                return;
            }
            let reason = if count < tokens.len() { FinishReason::Length } else { FinishReason::Stop };
            let timing = Timing {
                queued: Duration::from_millis(1),
                prefill: Duration::from_millis(20),
                decode: Duration::from_millis(100),
                wire_bytes: 1000,
                ..Timing::default()
            };
            let logits_digest = request.logits_digest.then(|| "ab".repeat(32));
            send(Event::Finished { reason, timing, logits_digest });
        }
        Plan::Stall => {
            send(token(5));
            await_client();
        }
        Plan::Silence => await_client(),
        Plan::Fail(after, error) => {
            (0..*after).for_each(|_| assert!(send(token(5))));
            send(Event::Failed(error.clone()));
        }
    }
}

struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Answer {
        let split = bytes.windows(4).position(|window| window == b"\r\n\r\n").expect("a head");
        let head = String::from_utf8(bytes[..split].to_vec()).unwrap().to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let rest = &bytes[split + 4..];
        let chunked = head.contains("transfer-encoding: chunked");
        let body = if chunked { dechunk(rest) } else { rest.to_vec() };
        Answer { status, head, body }
    }

    fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    fn header(&self, name: &str) -> Option<&str> {
        let prefix = format!("{name}: ");
        self.head.lines().find_map(|line| line.strip_prefix(prefix.as_str()))
    }

    /// `(status, param, code)` of an error, whose object is complete.
    fn error(&self) -> (u16, Value, String) {
        let error = self.json()["error"].clone();
        assert!(error["message"].as_str().is_some_and(|message| message.len() > 10), "{error}");
        assert!(error["type"].is_string() && error.get("param").is_some(), "{error}");
        (self.status, error["param"].clone(), error["code"].as_str().expect("a string code").to_owned())
    }

    /// Events of a stream, `[DONE]` as a string.
    fn events(&self) -> Vec<Value> {
        assert_eq!(self.status, 200, "{}", self.text());
        assert_eq!(self.header("content-type"), Some("text/event-stream; charset=utf-8"));
        let frames = self.text().split_terminator("\n\n");
        let data = frames.map(|frame| frame.strip_prefix("data: ").unwrap());
        data.map(|data| serde_json::from_str(data).unwrap_or_else(|_| json!(data))).collect()
    }
}

fn dechunk(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    loop {
        let line = bytes.windows(2).position(|window| window == b"\r\n").expect("a chunk size");
        let size = usize::from_str_radix(std::str::from_utf8(&bytes[..line]).unwrap(), 16).unwrap();
        if size == 0 {
            return body;
        }
        body.extend_from_slice(&bytes[line + 2..line + 2 + size]);
        bytes = &bytes[line + 4 + size..];
    }
}

#[test]
fn a_chat_is_answered_at_once() {
    let server = Server::tale(" there was a fox.");
    let answer = server.chat(json!({"seed": -1, "temperature": 0.5, "n": 2, "model": "tale-moe",
        "logits_digest": true, "return_token_ids": true}));
    let body = answer.json();
    assert_eq!(answer.status, 200, "{body}");
    assert_eq!(body["object"], "chat.completion");
    assert!(body["id"].as_str().unwrap().starts_with("chatcmpl-"));
    assert_eq!(body["system_fingerprint"], "fp");
    assert_eq!(answer.header("x-moemesh-exact"), Some("native"));
    for index in 0..2 {
        let choice = &body["choices"][index];
        assert_eq!(choice["index"], index);
        assert_eq!(choice["message"]["role"], "assistant");
        assert_eq!(choice["message"]["content"], " there was a fox.");
        assert_eq!(choice["finish_reason"], "stop");
        assert_eq!(choice["logprobs"], Value::Null);
        assert_eq!(choice["logits_digest"].as_str().unwrap().len(), 64);
        let ids: Vec<u32> = serde_json::from_value(choice["token_ids"].clone()).unwrap();
        assert_eq!(server.prompt.decode(&ids, true), " there was a fox.");
    }
    let (first, second) = (server.request(), server.request());
    let text = "<|im_start|>user\nTell me a story.<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(server.prompt.decode(&first.prompt, false), text);
    assert_eq!((first.sampling.seed, second.sampling.seed), (u64::MAX, 0), "seed + i");
    assert_eq!((first.sampling.temperature, first.sampling.top_p), (0.5, 0.95), "the model's default top_p");
    assert_eq!(first.stop_tokens, [4093, 4095]);
    assert_eq!(first.max_tokens as usize, 256 - first.prompt.len(), "the rest of the context");
    let generated = 2 * server.prompt.encode(" there was a fox.", false).unwrap().len();
    assert_eq!(body["usage"]["prompt_tokens"], first.prompt.len());
    assert_eq!(body["usage"]["completion_tokens"], generated);
    assert_eq!(body["usage"]["total_tokens"], first.prompt.len() + generated);
    assert_eq!(body["metrics"]["queue_time_ms"], 1.0);
    assert_eq!(body["metrics"]["time_to_first_token_ms"], 21.0);
    assert_eq!(body["metrics"]["moemesh"]["wire_bytes"], 2000);
}

#[test]
fn a_chat_streams_one_event_per_token() {
    let text = "é 😀 done";
    let server = Server::tale(text);
    let tokens = server.prompt.encode(text, false).unwrap();
    let answer = server.chat(json!({"stream": true, "stream_options": {"include_usage": true},
        "logprobs": true, "top_logprobs": 2}));
    let mut events = answer.events();
    assert_eq!(events.pop().unwrap(), "[DONE]");
    let usage = events.pop().unwrap();
    assert_eq!(usage["choices"], json!([]));
    assert_eq!(usage["usage"]["completion_tokens"], tokens.len());
    assert_eq!(usage["metrics"]["queue_time_ms"], 1.0);
    let last = events.pop().unwrap();
    assert_eq!(last["choices"][0]["finish_reason"], "stop");
    assert_eq!(last["choices"][0]["delta"], json!({}));
    let role = events.remove(0);
    assert_eq!(role["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert_eq!(events.len(), tokens.len(), "one event per token, also where a code point is unfinished");
    let mut streamed = String::new();
    for (event, token) in events.iter().zip(&tokens) {
        assert_eq!(event["object"], "chat.completion.chunk");
        assert_eq!(event["id"], usage["id"]);
        let choice = &event["choices"][0];
        assert_eq!(choice["finish_reason"], Value::Null);
        streamed += choice["delta"]["content"].as_str().unwrap();
        let entry = &choice["logprobs"]["content"][0];
        assert_eq!(entry["token"], server.prompt.vocabulary().piece(*token));
        assert_eq!(entry["bytes"], json!(server.prompt.vocabulary().bytes(*token)));
        assert_eq!(entry["logprob"], -0.5);
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
    }
    assert_eq!(streamed, text);
}

#[test]
fn stop_strings_end_the_work() {
    for stream in [false, true] {
        let server = Server::tale(" there was a STOP and much more that nobody wants");
        let answer = server.completion(json!({"stop": ["STOP", "x"], "stream": stream, "max_tokens": 100}));
        let (text, last) = if stream {
            let events = answer.events();
            let choices = events.iter().map(|event| &event["choices"][0]);
            let text: String = choices.filter_map(|choice| choice["text"].as_str()).collect();
            (text, events[events.len() - 2]["choices"][0].clone())
        } else {
            let choice = answer.json()["choices"][0].clone();
            (choice["text"].as_str().unwrap().to_owned(), choice)
        };
        assert_eq!(text, " there was a ");
        assert_eq!(last["finish_reason"], "stop");
        assert_eq!(last["stop_reason"], "STOP");
    }
}

#[test]
fn completions_take_all_four_shapes_of_prompt() {
    let server = Server::tale(" there");
    let shapes =
        [(json!("ab"), 1), (json!(["ab", "cd", "ef"]), 3), (json!([5, 6, 7]), 1), (json!([[5, 6], [7]]), 2)];
    for (prompt, count) in shapes {
        let body = server.post("/v1/completions", &json!({"prompt": prompt, "n": 2})).json();
        let choices = body["choices"].as_array().unwrap();
        assert_eq!(choices.len(), 2 * count, "{body}");
        for (index, choice) in choices.iter().enumerate() {
            assert_eq!(choice["index"], index);
            assert_eq!(choice["text"], " there");
        }
        assert_eq!(server.request().max_tokens, 16);
        (1..2 * count).for_each(|_| drop(server.request()));
    }
    for prompt in
        [json!([]), json!(""), json!([""]), json!([[]]), json!([1, "a"]), json!({}), json!([-1]), Value::Null]
    {
        let answer = server.post("/v1/completions", &json!({"prompt": prompt}));
        assert_eq!(answer.error(), (400, json!("prompt"), "invalid_value".into()), "{prompt}");
    }
    let answer = server.post("/v1/completions", &json!({"prompt": [5, 4096]}));
    assert_eq!(answer.error(), (400, json!("prompt"), "unknown_token".into()));
}

#[test]
fn echo_scores_the_prompt() {
    let server = Server::tale(" there was");
    let prompt = server.prompt.encode("Once é upon", false).unwrap();
    for (max_tokens, stream) in [(1, false), (0, false), (1, true), (0, true)] {
        let body = json!({"prompt": [prompt], "echo": true, "logprobs": 2, "max_tokens": max_tokens,
            "temperature": 0, "stream": stream});
        let answer = server.post("/v1/completions", &body);
        let choice = if stream {
            let events = answer.events();
            let mut whole = events[0]["choices"][0].clone();
            for event in &events[1..events.len() - 1] {
                let piece = &event["choices"][0];
                whole["text"] =
                    json!(whole["text"].as_str().unwrap().to_owned() + piece["text"].as_str().unwrap());
                whole["finish_reason"] = piece["finish_reason"].clone();
                for name in ["text_offset", "tokens", "token_logprobs", "top_logprobs"] {
                    if let Some(more) = piece["logprobs"][name].as_array() {
                        whole["logprobs"][name].as_array_mut().unwrap().extend(more.clone());
                    }
                }
            }
            whole
        } else {
            answer.json()["choices"][0].clone()
        };
        let expected = if max_tokens == 1 { "Once é upon there" } else { "Once é upon" };
        assert_eq!(choice["text"], expected);
        assert_eq!(choice["finish_reason"], "length");
        let logprobs = &choice["logprobs"];
        let count = prompt.len() + max_tokens;
        for name in ["text_offset", "tokens", "token_logprobs", "top_logprobs"] {
            assert_eq!(logprobs[name].as_array().unwrap().len(), count, "{name}");
        }
        assert_eq!(logprobs["token_logprobs"][0], Value::Null);
        assert_eq!(logprobs["top_logprobs"][0], Value::Null);
        for index in 1..count {
            let token = logprobs["tokens"][index].as_str().unwrap();
            assert_eq!(logprobs["token_logprobs"][index], logprobs["top_logprobs"][index][token]);
            let offset = logprobs["text_offset"][index].as_u64().unwrap() as usize;
            let rest: String = expected.chars().skip(offset).collect();
            assert!(rest.starts_with(token) || token.contains('\u{fffd}'), "{rest:?} {token:?}");
        }
    }
    let echoed = server.completion(json!({"echo": true, "max_tokens": 1})).json();
    assert_eq!(echoed["choices"][0]["text"], "Once upon a time there");
    assert_eq!(echoed["choices"][0]["logprobs"], Value::Null);
}

#[test]
fn parameters_out_of_range_are_named() {
    let server = Server::tale(" x");
    let wrong = [
        ("temperature", json!(2.1)),
        ("temperature", json!(-0.1)),
        ("temperature", json!("1")),
        ("top_p", json!(0)),
        ("top_p", json!(1.5)),
        ("top_k", json!(-2)),
        ("top_k", json!(1.5)),
        ("min_p", json!(-1)),
        ("repetition_penalty", json!(0)),
        ("frequency_penalty", json!(3)),
        ("presence_penalty", json!(-3)),
        ("max_tokens", json!(-1)),
        ("max_tokens", json!("5")),
        ("max_completion_tokens", json!(4294967296u64)),
        ("n", json!(0)),
        ("n", json!(9)),
        ("n", json!(1e9)),
        ("seed", json!(1.5)),
        ("seed", json!(1e30)),
        ("stop", json!("")),
        ("stop", json!([""])),
        ("stop", json!(vec!["a"; 17])),
        ("stop", json!("x".repeat(2000))),
        ("stop", json!(7)),
        ("logit_bias", json!({"9999": 1})),
        ("logit_bias", json!({"1": 101})),
        ("logit_bias", json!({"a": 1})),
        ("logit_bias", json!([])),
        ("stream", json!("yes")),
        ("stream_options", json!(true)),
        ("stop_token_ids", json!([-1])),
        ("min_tokens", json!(-1)),
        ("ignore_eos", json!(1)),
        ("model", json!(7)),
    ];
    for (name, value) in wrong {
        for answer in [server.completion(json!({name: value})), server.chat(json!({name: value}))] {
            assert_eq!(answer.error(), (400, json!(name), "invalid_value".into()), "{name}: {value}");
        }
    }
    assert_eq!(server.completion(json!({"logprobs": 21})).error().1, "logprobs");
    assert_eq!(server.chat(json!({"logprobs": true, "top_logprobs": 21})).error().1, "top_logprobs");
    assert_eq!(server.chat(json!({"top_logprobs": 2})).error().1, "top_logprobs");
    for (name, value) in [
        ("tools", json!([{"type": "function"}])),
        ("response_format", json!({"type": "json_object"})),
        ("guided_json", json!({})),
        ("suffix", json!("x")),
        ("best_of", json!(2)),
        ("chat_template", json!("x")),
        ("modalities", json!(["audio"])),
        ("tool_choice", json!("required")),
    ] {
        let answer = server.chat(json!({name: value}));
        assert_eq!(answer.error(), (400, json!(name), "unsupported_parameter".into()));
    }
    let fine = server
        .chat(json!({"response_format": {"type": "text"}, "tools": [], "best_of": 1, "suffix": null,
        "user": "me", "top_k": -1, "tool_choice": "auto", "stop": null, "max_tokens": 3}));
    assert_eq!(fine.status, 200, "{}", fine.text());
    assert_eq!(fine.header("x-moemesh-warnings"), None);
    assert_eq!(fine.json().get("warnings"), None);
}

#[test]
fn unknown_fields_are_warned_about() {
    let server = Server::tale(" x");
    let answer = server.chat(json!({"temprature": 1, "bad\r\nname": 2}));
    assert_eq!(
        answer.json()["warnings"],
        json!(["unknown field temprature was ignored", "unknown field badname was ignored"])
    );
    let header = answer.header("x-moemesh-warnings").unwrap();
    assert!(header.contains("temprature") && header.contains("badname"), "{header}");
}

#[test]
fn parameters_reach_the_engine() {
    let server = Server::tale(" x");
    server.completion(
        json!({"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1,
        "frequency_penalty": 0.2, "presence_penalty": 0.3, "logit_bias": {"5": -100}, "seed": 9,
        "max_tokens": 4, "min_tokens": 2, "ignore_eos": true, "stop_token_ids": [8], "logprobs": 3,
        "logits_digest": true}),
    );
    let request = server.request();
    let sampling = &request.sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p), (0.0, 0.5, 7, 0.1));
    assert_eq!(sampling.repetition_penalty, 1.1);
    assert_eq!((sampling.frequency_penalty, sampling.presence_penalty), (0.2, 0.3));
    assert_eq!((sampling.logit_bias.clone(), sampling.seed), (vec![(5, -100.0)], 9));
    assert_eq!((request.max_tokens, request.min_tokens, request.stop_tokens), (4, 2, vec![8]));
    assert_eq!((request.logprobs, request.prompt_logprobs, request.logits_digest), (Some(3), None, true));
    server.completion(json!({}));
    server.completion(json!({}));
    assert_ne!(server.request().sampling.seed, server.request().sampling.seed, "random without a seed");
}

#[test]
fn damaged_bodies_and_paths_are_answered_in_json() {
    let server = Server::tale(" x");
    let raw = |body: &str| server.exchange(&post("/v1/chat/completions", body)).error();
    let deep = "[".repeat(10_000);
    for body in [
        "",
        "{",
        "[]",
        "null",
        "7",
        "{\"messages\": [}",
        "{\"a\": 1e400}",
        "\u{feff}{}",
        deep.as_str(),
        "{\"a\": \"\\ud800\"}",
    ] {
        assert_eq!(raw(body), (400, Value::Null, "invalid_json".into()), "{body:.40}");
    }
    let messages =
        |messages: Value| server.post("/v1/chat/completions", &json!({"messages": messages})).error();
    for wrong in [
        json!([]),
        json!("hi"),
        json!([7]),
        json!([{"role": "king", "content": "x"}]),
        json!([{"role": "user"}]),
        json!([{"role": "user", "content": null}]),
        json!([{"role": "user", "content": 7}]),
        json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]),
    ] {
        assert_eq!(messages(wrong.clone()), (400, json!("messages"), "invalid_value".into()), "{wrong}");
    }
    assert_eq!(
        server.chat(json!({"model": "gpt-4"})).error(),
        (404, json!("model"), "model_not_found".into())
    );
    assert_eq!(server.get("/v1/models/nope").error().2, "model_not_found");
    assert_eq!(server.get("/v1/nothing").error(), (404, Value::Null, "not_found".into()));
    assert_eq!(server.get("/v1/chat/completions").error(), (405, Value::Null, "method_not_allowed".into()));
    let large = format!("{{\"a\": \"{}\"}}", "x".repeat(BODY_BYTES_MAX));
    assert_eq!(raw(&large), (413, Value::Null, "body_too_large".into()));
    let long = server.post("/v1/completions", &json!({"prompt": vec![5; 250]}));
    assert_eq!(long.error(), (400, Value::Null, "context_length_exceeded".into()));
    assert!(long.text().contains("250"), "{}", long.text());
    let chat = server.post(
        "/v1/chat/completions",
        &json!({"messages": [{"role": "user", "content": "word ".repeat(300)}]}),
    );
    assert_eq!(chat.error().2, "context_length_exceeded");
    assert_eq!(server.chat(json!({})).status, 200, "still serving");
}

#[test]
fn content_parts_and_template_variables_are_taken() {
    let server = Server::tale(" x");
    server.post(
        "/v1/chat/completions",
        &json!({"add_generation_prompt": false, "messages": [
        {"role": "developer", "content": "Be brief."},
        {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "role": "user"}]}),
    );
    assert_eq!(
        server.prompt.decode(&server.request().prompt, false),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n"
    );
    let reserved = server.chat(json!({"chat_template_kwargs": {"messages": []}}));
    assert_eq!(reserved.error().1, "chat_template_kwargs");
}

#[test]
fn a_client_that_goes_away_cancels_its_work() {
    // Streaming: after some bytes arrived.
    let server = Server::start(Plan::Stall, &[]);
    let body = json!({"prompt": "a", "stream": true, "n": 2}).to_string();
    let mut stream = server.open(&post("/v1/completions", &body));
    let mut some = [0; 16];
    stream.read_exact(&mut some).unwrap();
    stream.shutdown(Shutdown::Both).unwrap();
    drop(stream);
    server.await_cancellation();
    server.await_cancellation();
    // Not streaming, before anything was answered.
    let server = Server::start(Plan::Silence, &[]);
    let stream = server.open(&post("/v1/completions", &json!({"prompt": "a"}).to_string()));
    server.request();
    drop(stream);
    server.await_cancellation();
    // It is counted when its connection ends, and the server ends after all of them.
    let metrics = server.metrics.clone();
    drop(server);
    let metrics = metrics.render().unwrap();
    let gone = "moemesh_http_requests_total{route=\"/v1/completions\",status=\"499\"} 1";
    assert!(metrics.contains(gone), "{metrics}");
}

#[test]
fn failures_have_a_status_before_the_first_byte_and_a_frame_after() {
    let lost = || GenerateError::ExpertsUnavailable { experts: "layer 3 expert 5".into() };
    let server = Server::start(Plan::Fail(0, lost()), &[]);
    for stream in [false, true] {
        let answer = server.chat(json!({"stream": stream}));
        assert_eq!(answer.error(), (503, Value::Null, "expert_unavailable".into()));
        assert_eq!(answer.header("retry-after"), Some("5"));
        assert!(answer.text().contains("layer 3 expert 5"));
    }
    let server = Server::start(Plan::Fail(2, lost()), &[]);
    assert_eq!(server.chat(json!({})).error().0, 503);
    let events = server.chat(json!({"stream": true})).events();
    let last = events.last().unwrap();
    assert_eq!(last["error"]["code"], "expert_unavailable", "and no [DONE]");
    assert_eq!(events.len(), 4, "role, two tokens, error");
}

#[test]
fn while_experts_are_out_of_reach_requests_are_refused_before_they_reach_the_engine() {
    let lost = GenerateError::ExpertsUnavailable { experts: "3/5, 3/9 and 12 more".into() };
    let server = Server::start_with(Plan::Tokens(vec![5]), &[], Nodes(Some(lost)));
    for stream in [false, true] {
        let answer = server.completion(json!({"stream": stream}));
        assert_eq!(answer.error(), (503, Value::Null, "expert_unavailable".into()));
        assert_eq!(answer.header("retry-after"), Some("5"));
        assert!(answer.text().contains("(layer/expert) 3/5, 3/9 and 12 more;"), "{}", answer.text());
    }
    assert!(server.requests.lock().unwrap().try_recv().is_err(), "it came through");
    let health = server.get("/health");
    assert!(health.text().contains("\"unavailable\"") && health.text().contains("3/5"), "{}", health.text());
    assert_eq!(health.status, 503);
}

#[test]
fn keys_are_asked_for() {
    let server = Server::start(Plan::Tokens(vec![5]), &["one", "two"]);
    let with = |headers: &str| {
        let request = format!("GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n");
        server.exchange(&request)
    };
    for good in ["Authorization: Bearer one\r\n", "authorization: bearer two\r\n"] {
        assert_eq!(with(good).status, 200);
    }
    for bad in [
        "",
        "Authorization: Bearer three\r\n",
        "Authorization: Bearer\r\n",
        "Authorization: Basic one\r\n",
        "Authorization: Bearer one\r\nAuthorization: Bearer two\r\n",
        "Authorization: Bearer \r\n",
    ] {
        assert_eq!(with(bad).error(), (401, Value::Null, "invalid_api_key".into()), "{bad}");
    }
    assert_eq!(server.get("/metrics").status, 401);
    assert_eq!(server.get("/nothing").status, 401);
    assert_eq!(server.get("/health").status, 200);
    let keys = ApiKeys::new(["", " "]);
    assert!(keys.is_empty());
    assert!(keys.check_bind("127.0.0.1:1".parse().unwrap()).is_ok());
    assert!(keys.check_bind("[::1]:1".parse().unwrap()).is_ok());
    assert!(keys.check_bind("[::ffff:127.0.0.1]:1".parse().unwrap()).is_ok());
    for open in ["0.0.0.0:1", "[::]:1", "192.168.0.2:1"] {
        assert!(keys.check_bind(open.parse().unwrap()).unwrap_err().to_string().contains("--api-key"));
        assert!(ApiKeys::new(["k"]).check_bind(open.parse().unwrap()).is_ok());
    }
}

#[test]
fn reports_are_served() {
    let server = Server::tale(" x");
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "tale-moe");
    assert_eq!(models["data"][0]["max_model_len"], 256);
    assert_eq!(server.get("/v1/models/tale-moe").json()["id"], "tale-moe");
    assert_eq!(server.get("/health").json()["status"], "ok");
    assert_eq!(server.get("/version").json()["version"], "0.1.0");
    assert_eq!(server.get("/api/v1/nodes").json()["nodes"][0]["name"], "a");
    let metrics = server.get("/metrics");
    assert!(metrics.text().contains("moemesh_http_requests_total{route=\"/v1/models\",status=\"200\"} 2"));
    let own = server
        .exchange("GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\nX-Request-Id: abc-1\r\n\r\n");
    assert_eq!(own.header("x-request-id"), Some("abc-1"));
    assert!(server.get("/health").header("x-request-id").unwrap().starts_with("req-"));
}

#[test]
fn text_and_tokens_convert() {
    let server = Server::tale(" x");
    let tokens = server.prompt.encode("Once é", true).unwrap();
    let answer = server.post("/tokenize", &json!({"prompt": "Once é", "return_token_strs": true})).json();
    assert_eq!(answer["tokens"], json!(tokens));
    assert_eq!((&answer["count"], &answer["max_model_len"]), (&json!(tokens.len()), &json!(256)));
    assert_eq!(answer["token_strs"].as_array().unwrap().len(), tokens.len());
    let pieces = server.post("/tokenize", &json!({"content": "Once é", "with_pieces": true})).json();
    assert_eq!(pieces["tokens"][0]["id"], tokens[0]);
    let chat = server.post("/tokenize", &json!({"messages": [{"role": "user", "content": "a"}]})).json();
    assert_eq!(chat["tokens"][0], 4094);
    let text = server.post("/detokenize", &json!({"tokens": tokens})).json();
    assert_eq!((&text["prompt"], &text["content"]), (&json!("Once é"), &json!("Once é")));
    assert_eq!(server.post("/detokenize", &json!({"tokens": "a"})).error().1, "tokens");
    assert_eq!(server.post("/detokenize", &json!({"tokens": [4096]})).error().1, "tokens");
    assert_eq!(server.post("/tokenize", &json!({})).error().1, "messages");
}
