//! Endpoints that report: models, health, version, metrics, nodes.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use super::error::ApiError;
use super::service::{Service, json_response};

fn card(service: &Service) -> Value {
    let facts = service.engine.facts();
    json!({
        "id": service.identity.model,
        "object": "model",
        "created": service.started(),
        "owned_by": "moemesh",
        "root": service.identity.model,
        "parent": null,
        "max_model_len": facts.context,
        "context_length": facts.context,
    })
}

/// `GET /v1/models`.
pub(super) fn models(service: &Service) -> Response<Body> {
    json_response(&json!({"object": "list", "data": [card(service)]}))
}

/// `GET /v1/models/{id}`; ids may contain slashes.
pub(super) fn model(service: &Service, id: &str) -> Result<Response<Body>, ApiError> {
    service.check_model(Some(id))?;
    Ok(json_response(&card(service)))
}

/// `GET /health`: 200, or 503 with the reason.
pub(super) fn health(service: &Service) -> Response<Body> {
    match service.cluster.trouble() {
        None => json_response(&json!({"status": "ok"})),
        Some(reason) => {
            let mut response = json_response(&json!({"status": "unavailable", "reason": reason}));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            response
        }
    }
}

/// `GET /version`.
pub(super) fn version(service: &Service) -> Response<Body> {
    json_response(&json!({
        "version": service.identity.version,
        "model": service.identity.model,
        "system_fingerprint": service.identity.fingerprint,
        "exact": service.identity.exact,
    }))
}

/// `GET /metrics`.
pub(super) fn metrics(service: &Service) -> Result<Response<Body>, ApiError> {
    let text = service.metrics.render().map_err(|error| ApiError::internal(error.to_string()))?;
    let mut response = Response::new(Body::from(text));
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    Ok(response)
}

/// `GET /api/v1/nodes`.
pub(super) fn nodes(service: &Service) -> Response<Body> {
    json_response(&service.cluster.nodes())
}
