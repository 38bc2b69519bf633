//! The HTTP API: whatever body comes, the answer is one, or an error that names the field. Requests take the way of the
//! program from behind its socket, with a scripted engine in place of the model.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{HeaderValue, Request, Response, StatusCode};
use router::http::{Cluster, Identity, Service, respond};
use router::metrics::Metrics;
use router::prompt::Prompt;
use router::request::{
    Command, EngineFacts, EngineHandle, Event, FinishReason, GenerateError, Submission, Timing, TokenLogprobs,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use super::Verdict;

/// Paths that take a body, by the first byte; what is beyond them asks for a model of the name that follows.
pub(super) const PATHS: [&str; 4] = ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"];

/// Tokens of the served model; the first 256 are bytes.
const VOCAB: usize = 400;

/// Tokens of its context.
const CONTEXT: usize = 512;

/// Tokens that the engine answers with at most.
const ANSWERED_MAX: usize = 12;

/// Bytes of an answer: the largest take a few megabytes.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Longer than any answer takes; only one that hangs meets it.
const PATIENCE: Duration = Duration::from_secs(60);

/// Nodes that are all there.
struct Healthy;

impl Cluster for Healthy {
    fn nodes(&self) -> Value {
        json!({"nodes": []})
    }

    fn trouble(&self) -> Option<String> {
        None
    }

    fn refusal(&self) -> Option<GenerateError> {
        None
    }

    fn refresh(&self, _: &Metrics) {}
}

struct Server {
    runtime: Runtime,
    service: Arc<Service>,
}

impl Server {
    /// A service whose engine thread ends with it.
    fn start() -> Server {
        let facts = EngineFacts { context: CONTEXT, vocab: VOCAB, kv_tokens: CONTEXT };
        let (engine, mut queue) = EngineHandle::new(facts);
        std::thread::spawn(move || {
            while let Some(Command::Generate(submission)) = queue.blocking_recv() {
                generate(&submission);
            }
        });
        let prompt = Arc::new(Prompt::bytes(VOCAB).expect("all bytes have room"));
        let metrics = Arc::new(Metrics::new().expect("the counters have different names"));
        let text = |text: &str| text.to_owned();
        let (model, fingerprint) = (text("m"), text("fp"));
        let identity = Identity { model, fingerprint, exact: text("native"), version: text("0.1.0") };
        let service = Arc::new(Service::new(engine, prompt, metrics, identity, Arc::new(Healthy)));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Server { runtime: runtime.expect("a runtime starts"), service }
    }

    fn ask(&self, request: Request<Body>) -> (StatusCode, String, Vec<u8>) {
        self.runtime.block_on(async {
            let answered = async {
                let response = respond(Arc::clone(&self.service), request).await;
                let (status, kind) = (response.status(), content_type(&response));
                let body = to_bytes(response.into_body(), ANSWER_BYTES_MAX).await;
                (status, kind, body.expect("an answer is whole and bounded").to_vec())
            };
            tokio::time::timeout(PATIENCE, answered).await.expect("an answer comes")
        })
    }
}

fn content_type(response: &Response<Body>) -> String {
    let kind = response.headers().get("content-type").and_then(|kind| kind.to_str().ok());
    kind.unwrap_or_default().to_owned()
}

/// Answers with the prompt's own tokens, upside down, in which bytes of code points are in the wrong order.
fn generate(submission: &Submission) {
    let (request, events) = (&submission.request, &submission.events);
    // A client that is gone is none of the engine's business.
    let send = |event| drop(events.try_send(event));
    let scored = |top: u32| TokenLogprobs { logprob: -0.5, top: (0..top).map(|id| (id, -1.0)).collect() };
    if let Some(top) = request.prompt_logprobs {
        let mut logprobs: Vec<_> = request.prompt.iter().map(|_| Some(scored(top))).collect();
        logprobs[0] = None;
        send(Event::Prompt(logprobs));
    }
    let count = (request.max_tokens as usize).min(ANSWERED_MAX);
    for id in request.prompt.iter().rev().cycle().take(count) {
        send(Event::Token { id: *id, logprobs: request.logprobs.map(scored) });
    }
    let reason = if count < request.max_tokens as usize { FinishReason::Stop } else { FinishReason::Length };
    let logits_digest = request.logits_digest.then(|| "ab".repeat(32));
    send(Event::Finished { reason, timing: Timing::default(), logits_digest });
}

/// First byte: which path (`PATHS`). The rest: the body, or else the name of a model and, as far as headers may have
/// them, the request's id and key.
pub(super) fn http(bytes: &[u8]) -> Verdict {
    thread_local! {
        // For good: there is one per thread that fuzzes, and it has threads of its own.
        static SERVER: &'static Server = Box::leak(Box::new(Server::start()));
    }
    let Some((first, rest)) = bytes.split_first() else { return Verdict::Refused };
    let request = match PATHS.get(usize::from(*first) % (PATHS.len() + 1)) {
        Some(path) => {
            Request::post(*path).header("content-type", "application/json").body(Body::from(rest.to_vec()))
        }
        None => {
            let name: String = rest.iter().take(200).map(|byte| format!("%{byte:02X}")).collect();
            let value = HeaderValue::from_bytes(rest).unwrap_or(HeaderValue::from_static("x"));
            Request::get(format!("/v1/models/{name}"))
                .header("x-request-id", &value)
                .header("authorization", value)
                .body(Body::empty())
        }
    };
    let (status, kind, body) = SERVER.with(|server| server.ask(request.expect("a request of these parts")));
    if !status.is_success() {
        refused_by_name(status, &body);
        return Verdict::Refused;
    }
    let text = String::from_utf8(body).expect("an answer is text");
    if kind.starts_with("text/event-stream") {
        is_a_whole_stream(&text);
    } else {
        let value: Value = serde_json::from_str(&text).expect("an answer is JSON");
        assert!(value.is_object(), "{text}");
    }
    Verdict::Taken
}

fn refused_by_name(status: StatusCode, body: &[u8]) {
    let text = String::from_utf8_lossy(body);
    assert!(status.is_client_error(), "{status}: {text}");
    let error = serde_json::from_slice::<Value>(body).expect("a refusal is JSON")["error"].take();
    let message = error["message"].as_str().expect("a refusal has a message");
    assert!(!message.is_empty() && error["type"].is_string() && error["code"].is_string(), "{text}");
    if matches!(error["code"].as_str(), Some("invalid_value" | "unsupported_parameter")) {
        let field = error["param"].as_str().expect("what is wrong with a field names it");
        assert!(!field.is_empty(), "{text}");
    }
}

/// Every event is an object, and the last one says that it is.
fn is_a_whole_stream(text: &str) {
    let events: Vec<&str> = text.split_terminator("\n\n").collect();
    let (last, before) = events.split_last().expect("a stream has events");
    assert_eq!(*last, "data: [DONE]", "{text}");
    for event in before.iter().filter(|event| !event.starts_with(':')) {
        let json = event.strip_prefix("data: ").expect("an event is data");
        let value: Value = serde_json::from_str(json).expect("an event is JSON");
        assert!(value.is_object() && value["error"].is_null(), "{event}");
    }
}
