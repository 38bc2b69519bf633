//! Answers as server-sent events.
//!
//! Problem: clients measure the time between events and expect one per token, a proxy in between drops silent
//! connections, and an error after the headers can only be told in the stream. Idea: an answer is a [`Script`]
//! that turns updates into JSON objects; this module frames them (`data: {...}`), fills silence with comments,
//! ends with `[DONE]`, or with an error frame and nothing after it. The first update is awaited before the
//! headers are sent, for a few seconds at most, so that early failures still have an HTTP status. Dropping the
//! body cancels the work.

use std::collections::VecDeque;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, Response, header};
use serde_json::{Map, Value};

use super::error::ApiError;
use super::generate::{Running, Update};

/// Silence after which a comment is sent, and for which the headers wait at most; proxies give up after 30 to 60
/// seconds.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Turns updates into the objects of one answer.
pub(super) trait Script: Send + 'static {
    /// Objects that come first.
    fn opening(&mut self) -> Vec<Map<String, Value>>;
    /// Objects for one update (never `Failed`).
    fn update(&mut self, running: &Running, update: Update) -> Vec<Map<String, Value>>;
    /// Objects after the last update.
    fn closing(&mut self, running: &Running) -> Vec<Map<String, Value>>;
}

struct Events<S> {
    running: Running,
    script: S,
    ready: VecDeque<Bytes>,
    ended: bool,
}

impl<S: Script> Events<S> {
    fn push(&mut self, objects: Vec<Map<String, Value>>) {
        for object in objects {
            self.ready.push_back(frame(&Value::Object(object).to_string()));
        }
    }

    fn take(&mut self, update: Option<Update>) {
        match update {
            Some(Update::Failed(error)) => {
                self.ready.push_back(frame(&ApiError::from(error).json().to_string()));
                self.ended = true;
            }
            Some(update) => {
                let objects = self.script.update(&self.running, update);
                self.push(objects);
            }
            None => {
                let objects = self.script.closing(&self.running);
                self.push(objects);
                self.ready.push_back(Bytes::from_static(b"data: [DONE]\n\n"));
                self.ended = true;
            }
        }
    }

    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.ready.pop_front() {
                return Some(bytes);
            }
            if self.ended {
                return None;
            }
            match tokio::time::timeout(KEEP_ALIVE, self.running.next()).await {
                Ok(update) => self.take(update),
                Err(_) => return Some(Bytes::from_static(b": keep-alive\n\n")),
            }
        }
    }
}

fn frame(json: &str) -> Bytes {
    // JSON has no raw line ends, so one `data:` line is enough.
    Bytes::from(format!("data: {json}\n\n"))
}

/// The streamed answer. Fails with a status of its own if the first thing that happens is a failure.
pub(super) async fn respond(mut running: Running, script: impl Script) -> Result<Response<Body>, ApiError> {
    let first = tokio::time::timeout(KEEP_ALIVE, running.next()).await;
    if let Ok(Some(Update::Failed(error))) = first {
        return Err(error.into());
    }
    let mut events = Events { running, script, ready: VecDeque::new(), ended: false };
    let opening = events.script.opening();
    events.push(opening);
    if let Ok(update) = first {
        events.take(update);
    }
    let stream = futures_util::stream::unfold(events, |mut events| async move {
        let bytes = events.next().await?;
        Some((Ok::<_, std::convert::Infallible>(bytes), events))
    });
    let mut response = Response::new(Body::from_stream(stream));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx buffers otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(response)
}

/// The whole answer at once: the script sees every update.
pub(super) async fn collect(running: &mut Running, mut each: impl FnMut(Update)) -> Result<(), ApiError> {
    while let Some(update) = running.next().await {
        match update {
            Update::Failed(error) => return Err(error.into()),
            update => each(update),
        }
    }
    Ok(())
}
