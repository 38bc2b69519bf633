//! The OpenAI-compatible API.
//!
//! Problem: many clients in many languages expect OpenAI's endpoints to the letter, tools for studies expect
//! vLLM's extensions, and everything that comes in is untrusted. Idea: bodies are taken apart field by field with
//! a range for each (`fields`, `parameters`), prompts are made on blocking threads (`service`), sequences run in
//! the engine and come back as updates (`generate`), which `chat` and `completions` turn into JSON, at once or as
//! server-sent events (`sse`). All failures go through one table (`error`). A client that goes away drops the
//! answer's future or body, and with it the engine's streams: that is the cancellation, streaming or not.
//!
//! Not served, and refused by name: tools, constrained output, images, fill-in-the-middle. No CORS headers are
//! sent, so web pages of other origins cannot read answers.

mod serve;

mod text;

mod door;

mod chat;

mod completions;

mod status;

mod sse;

mod report;

mod generate;

mod parameters;

mod fields;

mod service;

mod keys;

mod error;

use std::future::Future;
use std::sync::Arc;
use std::time::Instant;

use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode};
use tokio::net::TcpListener;

pub use door::{Door, Starting, Waiting};
pub use error::ApiError;
pub use keys::{ApiKeys, OpenBind};
pub use service::{BODY_BYTES_MAX, Cluster, Identity, Service};

/// Bytes of a client's `X-Request-Id` that are kept.
const REQUEST_ID_MAX: usize = 128;
/// Bytes of `X-Moemesh-Warnings`.
const WARNINGS_BYTES_MAX: usize = 1024;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const EXACT: HeaderName = HeaderName::from_static("x-moemesh-exact");
const WARNINGS: HeaderName = HeaderName::from_static("x-moemesh-warnings");

/// Serves the API on `listener` until `shutdown` is ready and every answer under way is finished; what is asked before
/// the door is opened is told what is waited for. Check the address with [`ApiKeys::check_bind`] before binding;
/// drain the engine afterwards.
pub async fn serve(listener: TcpListener, door: Arc<Door>, shutdown: impl Future<Output = ()>) {
    serve::run(listener, Router::new().fallback(knock).with_state(door), shutdown).await;
}

async fn knock(State(door): State<Arc<Door>>, request: Request) -> Response<Body> {
    if let Some(service) = door.service() {
        return respond(service, request).await;
    }
    let headers = request.headers();
    let mut response = match Route::of(request.uri().path()) {
        Route::Health => door.health(),
        _ if !door.keys.admit(headers) => ApiError::key().response(),
        Route::Nodes => door.nodes(),
        _ => door.refusal().response(),
    };
    response.headers_mut().insert(REQUEST_ID, request_id(headers));
    response
}

/// The paths, for routing and as a bounded label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Route<'a> {
    Chat,
    Completions,
    Models,
    Model(&'a str),
    Tokenize,
    Detokenize,
    Health,
    Version,
    Metrics,
    Nodes,
    Unknown,
}

impl<'a> Route<'a> {
    fn of(path: &'a str) -> Route<'a> {
        match path {
            "/v1/chat/completions" => Route::Chat,
            "/v1/completions" => Route::Completions,
            "/v1/models" => Route::Models,
            "/tokenize" => Route::Tokenize,
            "/detokenize" => Route::Detokenize,
            "/health" => Route::Health,
            "/version" => Route::Version,
            "/metrics" => Route::Metrics,
            "/api/v1/nodes" => Route::Nodes,
            _ => path.strip_prefix("/v1/models/").map_or(Route::Unknown, Route::Model),
        }
    }

    fn label(self) -> &'static str {
        match self {
            Route::Chat => "/v1/chat/completions",
            Route::Completions => "/v1/completions",
            Route::Models | Route::Model(_) => "/v1/models",
            Route::Tokenize => "/tokenize",
            Route::Detokenize => "/detokenize",
            Route::Health => "/health",
            Route::Version => "/version",
            Route::Metrics => "/metrics",
            Route::Nodes => "/api/v1/nodes",
            Route::Unknown => "other",
        }
    }

    fn takes(self, method: &Method) -> bool {
        match self {
            Route::Chat | Route::Completions | Route::Tokenize | Route::Detokenize => method == Method::POST,
            Route::Unknown => true,
            _ => method == Method::GET || method == Method::HEAD,
        }
    }
}

/// Counts a request until its last byte is sent or its client is gone.
struct Counted {
    service: Arc<Service>,
    route: &'static str,
    status: u16,
    started: Instant,
}

impl Counted {
    fn finish(&mut self, status: u16) {
        self.status = status;
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.service.metrics.http_finished(self.route, self.status, self.started.elapsed());
    }
}

/// Status recorded when the client went away before the answer was complete (nginx's convention).
const CLIENT_GONE: u16 = 499;

/// The answer to one request, once the service is there: the whole API without a socket. Dropping the future or the
/// body cancels the work.
pub async fn respond(service: Arc<Service>, request: Request) -> Response<Body> {
    let (head, body) = request.into_parts();
    let route = Route::of(head.uri.path());
    service.metrics.http_started();
    let mut counted = Counted {
        service: service.clone(),
        route: route.label(),
        status: CLIENT_GONE,
        started: Instant::now(),
    };
    let request_id = request_id(&head.headers);
    let answered = if route != Route::Health && !service.keys.admit(&head.headers) {
        Err(ApiError::key())
    } else if !route.takes(&head.method) {
        Err(ApiError::method())
    } else {
        dispatch(service.clone(), route, body).await
    };
    let (mut response, warnings) = answered.unwrap_or_else(|error| (error.response(), Vec::new()));
    if response.status() == StatusCode::INTERNAL_SERVER_ERROR {
        tracing::error!(route = counted.route, "request failed inside; see the messages before");
    }
    let headers = response.headers_mut();
    headers.insert(REQUEST_ID, request_id);
    if let Ok(exact) = HeaderValue::from_str(&service.identity.exact) {
        headers.insert(EXACT, exact);
    }
    let mut warnings = warnings.join("; ");
    warnings.truncate(WARNINGS_BYTES_MAX);
    if let Some(warnings) = HeaderValue::from_str(&warnings).ok().filter(|warnings| !warnings.is_empty()) {
        headers.insert(WARNINGS, warnings);
    }
    let status = response.status().as_u16();
    response.map(|body| {
        // A body of known length is complete already; a stream counts as answered when it has ended.
        if body.size_hint().exact().is_some() {
            counted.finish(status);
            return body;
        }
        watched(body, counted, status)
    })
}

/// A streaming body that counts its request when it ends or is dropped.
fn watched(body: Body, counted: Counted, status: u16) -> Body {
    let stream = body.into_data_stream();
    Body::from_stream(futures_util::stream::unfold(
        (stream, counted),
        move |(mut stream, mut counted)| async move {
            match futures_util::StreamExt::next(&mut stream).await {
                Some(item) => Some((item, (stream, counted))),
                None => {
                    counted.finish(status);
                    None
                }
            }
        },
    ))
}

async fn dispatch(
    service: Arc<Service>,
    route: Route<'_>,
    body: Body,
) -> Result<(Response<Body>, Vec<String>), ApiError> {
    let plain = |response| Ok((response, Vec::new()));
    match route {
        Route::Chat => chat::answer(service, &service::read_body(body).await?).await,
        Route::Completions => completions::answer(service, &service::read_body(body).await?).await,
        Route::Tokenize => text::tokenize(service, &service::read_body(body).await?).await,
        Route::Detokenize => text::detokenize(&service, &service::read_body(body).await?),
        Route::Models => plain(status::models(&service)),
        Route::Model(id) => plain(status::model(&service, id)?),
        Route::Health => plain(status::health(&service)),
        Route::Version => plain(status::version(&service)),
        Route::Metrics => plain(status::metrics(&service)?),
        Route::Nodes => plain(status::nodes(&service)),
        Route::Unknown => Err(ApiError::route()),
    }
}

/// The client's id if it is short printable ASCII, else a new one.
fn request_id(headers: &HeaderMap) -> HeaderValue {
    let asked = headers.get(REQUEST_ID).filter(|value| {
        let bytes = value.as_bytes();
        !bytes.is_empty() && bytes.len() <= REQUEST_ID_MAX && bytes.iter().all(u8::is_ascii_graphic)
    });
    asked.cloned().unwrap_or_else(|| {
        let fresh = format!("req-{:016x}", parameters::random());
        HeaderValue::from_str(&fresh).unwrap_or(HeaderValue::from_static("req"))
    })
}

#[cfg(test)]
mod tests;
