//! What every endpoint shares: the engine, the model's prompt files, keys, counters, identity.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::http::Response;
use axum::http::{HeaderValue, StatusCode, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde_json::Value;
use tokio::sync::Semaphore;

use super::error::ApiError;
use super::keys::ApiKeys;
use crate::metrics::Metrics;
use crate::prompt::Prompt;
use crate::request::{EngineHandle, GenerateError};

/// Largest request body, in bytes: a 128k-token prompt is under 1 MB as text or ids.
pub const BODY_BYTES_MAX: usize = 2 << 20;
/// Seconds in which a body must have arrived.
const BODY_SECONDS_MAX: u64 = 30;
/// Texts tokenized and templates rendered at a time; more wait their turn.
const BLOCKING_MAX: usize = 4;

/// What only the cluster knows.
pub trait Cluster: Send + Sync {
    /// The body of `GET /api/v1/nodes`.
    fn nodes(&self) -> Value;
    /// Why requests cannot be served now, if so: the body of a 503 of `/health`.
    fn trouble(&self) -> Option<String>;
    /// Why a request would fail now, if it would: experts that it may need and that nobody can compute.
    fn refusal(&self) -> Option<GenerateError>;
    /// Brings gauges of the cluster up to date, before they are read.
    fn refresh(&self, metrics: &Metrics);
}

/// Who answers.
#[derive(Clone, Debug)]
pub struct Identity {
    /// Name of the served model.
    pub model: String,
    /// `system_fingerprint` of every answer: equal ones promise equal bits.
    pub fingerprint: String,
    /// `X-Moemesh-Exact` of every answer: which promise of exactness holds (`native`, `tolerance`, ...).
    pub exact: String,
    /// Version of the program.
    pub version: String,
}

/// Shared by all requests.
pub struct Service {
    /// Generates.
    pub engine: EngineHandle,
    /// Text and tokens.
    pub prompt: Arc<Prompt>,
    /// Counts.
    pub metrics: Arc<Metrics>,
    /// Who may ask.
    pub keys: ApiKeys,
    /// Who answers.
    pub identity: Identity,
    /// What the cluster says.
    pub cluster: Arc<dyn Cluster>,
    started: SystemTime,
    blocking: Arc<Semaphore>,
}

impl std::fmt::Debug for Service {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Service").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Service {
    /// A service without keys; set `keys` to have some.
    pub fn new(
        engine: EngineHandle,
        prompt: Arc<Prompt>,
        metrics: Arc<Metrics>,
        identity: Identity,
        cluster: Arc<dyn Cluster>,
    ) -> Service {
        Service {
            engine,
            prompt,
            metrics,
            keys: ApiKeys::default(),
            identity,
            cluster,
            started: SystemTime::now(),
            blocking: Arc::new(Semaphore::new(BLOCKING_MAX)),
        }
    }

    /// Seconds since 1970 at which serving began.
    pub(super) fn started(&self) -> u64 {
        unix_seconds(self.started)
    }

    /// Runs CPU work of prompts on a blocking thread, a few at a time.
    pub(super) async fn compute<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Prompt) -> Result<T, ApiError> + Send + 'static,
    ) -> Result<T, ApiError> {
        let prompt = self.prompt.clone();
        let permit = self.blocking.clone().acquire_owned().await;
        let done = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&prompt)
        });
        done.await.map_err(|_| ApiError::internal("preparing the prompt failed; the log says why"))?
    }

    /// Refuses a request for another model.
    pub(super) fn check_model(&self, asked: Option<&str>) -> Result<(), ApiError> {
        match asked.filter(|asked| *asked != self.identity.model) {
            Some(other) => Err(ApiError::model(other, &self.identity.model)),
            None => Ok(()),
        }
    }
}

/// Reads a body within [`BODY_BYTES_MAX`] and [`BODY_SECONDS_MAX`].
pub(super) async fn read_body(body: Body) -> Result<axum::body::Bytes, ApiError> {
    let read = Limited::new(body, BODY_BYTES_MAX).collect();
    match tokio::time::timeout(Duration::from_secs(BODY_SECONDS_MAX), read).await {
        Err(_) => Err(ApiError::slow_body(BODY_SECONDS_MAX)),
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.downcast_ref::<LengthLimitError>().is_some() => {
            Err(ApiError::too_large(BODY_BYTES_MAX))
        }
        Ok(Err(_)) => Err(ApiError::body("the body ended early")),
    }
}

/// A JSON answer with status 200.
pub(super) fn json_response(value: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(value.to_string()));
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Seconds since 1970.
pub(super) fn unix_seconds(at: SystemTime) -> u64 {
    at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
