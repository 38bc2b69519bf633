//! What the API says before there is a model to ask.
//!
//! A router may load for minutes and wait for its nodes as long. Connections that are accepted and not answered look
//! like a hang, and a balancer cannot tell them from one. So the socket is served from the start: `/health` says what
//! is waited for, `/api/v1/nodes` shows the nodes as they come, and everything else is refused with a time after which
//! to try again, as OpenAI's clients do by themselves. Once the service is there, the same connections reach it.

use std::sync::{Arc, OnceLock};

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use super::error::ApiError;
use super::keys::ApiKeys;
use super::service::{Service, json_response};

/// What a router that starts waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// For people.
    pub reason: String,
    /// Nodes that are connected.
    pub here: usize,
    /// Nodes that are waited for.
    pub wanted: usize,
}

/// What is known while a router starts.
pub trait Starting: Send + Sync {
    /// What is waited for.
    fn waits_for(&self) -> Waiting;
    /// The body of `GET /api/v1/nodes`.
    fn nodes(&self) -> Value;
}

/// See the module.
pub struct Door {
    pub(super) keys: ApiKeys,
    starting: Arc<dyn Starting>,
    service: OnceLock<Arc<Service>>,
}

impl std::fmt::Debug for Door {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Door").field("is_open", &self.service.get().is_some()).finish_non_exhaustive()
    }
}

impl Door {
    /// A closed one.
    pub fn new(keys: ApiKeys, starting: Arc<dyn Starting>) -> Door {
        Door { keys, starting, service: OnceLock::new() }
    }

    /// From now on `service` answers. Only the first call does anything.
    pub fn open(&self, service: Arc<Service>) {
        // Fails where it is open.
        drop(self.service.set(service));
    }

    pub(super) fn service(&self) -> Option<Arc<Service>> {
        self.service.get().cloned()
    }

    /// The answer to everything that needs the model.
    pub(super) fn refusal(&self) -> ApiError {
        ApiError::starting(&self.starting.waits_for().reason)
    }

    /// `GET /health`: 503, and what is waited for.
    pub(super) fn health(&self) -> Response<Body> {
        let Waiting { reason, here, wanted } = self.starting.waits_for();
        let nodes = json!({"here": here, "wanted": wanted});
        let mut response = json_response(&json!({"status": "starting", "reason": reason, "nodes": nodes}));
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
        if let Some(seconds) = self.refusal().retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }

    /// `GET /api/v1/nodes`: those that are here so far.
    pub(super) fn nodes(&self) -> Response<Body> {
        json_response(&self.starting.nodes())
    }
}
