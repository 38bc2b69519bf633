//! Every way a request fails, as HTTP status and OpenAI error object: the one table.
//!
//! `{"error": {"message", "type", "param", "code"}}` with string codes, as OpenAI's clients expect them. Clients
//! retry on 408, 409, 429 and 5xx, so what would fail again is a 4xx. Messages name the field and the remedy and
//! never repeat prompts.

use axum::body::Body;
use axum::http::{HeaderValue, Response, StatusCode, header};
use serde_json::{Value, json};

use crate::request::GenerateError;

/// An answer that is an error.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// OpenAI's `code`.
    pub code: Option<&'static str>,
    /// The field at fault.
    pub param: Option<String>,
    /// For people.
    pub message: String,
    /// Seconds after which trying again makes sense.
    pub retry_after: Option<u32>,
}

const INVALID: &str = "invalid_request_error";

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: Option<&'static str>, message: String) -> ApiError {
        ApiError { status, kind, code, param: None, message, retry_after: None }
    }

    fn at(mut self, param: &str) -> ApiError {
        self.param = Some(param.to_owned());
        self
    }

    fn again_in(mut self, seconds: u32) -> ApiError {
        self.retry_after = Some(seconds);
        self
    }

    /// A field's value is wrong.
    pub fn invalid(param: &str, message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, INVALID, Some("invalid_value"), message.into()).at(param)
    }

    /// A field that would change the answer is not implemented.
    pub fn unsupported(param: &str, remedy: &str) -> ApiError {
        let message = format!("{param} is not supported; {remedy}");
        ApiError::new(StatusCode::BAD_REQUEST, INVALID, Some("unsupported_parameter"), message).at(param)
    }

    /// The body is not a JSON object.
    pub fn body(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, INVALID, Some("invalid_json"), message.into())
    }

    /// The body is larger than `limit` bytes.
    pub fn too_large(limit: usize) -> ApiError {
        let message = format!("the body exceeds {limit} bytes; send less at a time");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, INVALID, Some("body_too_large"), message)
    }

    /// The body did not arrive in time.
    pub fn slow_body(seconds: u64) -> ApiError {
        let message = format!("the body did not arrive within {seconds} seconds");
        ApiError::new(StatusCode::REQUEST_TIMEOUT, INVALID, Some("request_timeout"), message)
    }

    /// The model is not the one served.
    pub fn model(asked: &str, served: &str) -> ApiError {
        let shown: String = asked.chars().take(100).collect();
        let message = format!("the model {shown:?} is not served here; {served:?} is");
        ApiError::new(StatusCode::NOT_FOUND, INVALID, Some("model_not_found"), message).at("model")
    }

    /// No such path.
    pub fn route() -> ApiError {
        let message = "no such path; see /v1/models, /v1/chat/completions, /v1/completions".into();
        ApiError::new(StatusCode::NOT_FOUND, INVALID, Some("not_found"), message)
    }

    /// The path exists, the method does not.
    pub fn method() -> ApiError {
        let message = "this path does not take this method".into();
        ApiError::new(StatusCode::METHOD_NOT_ALLOWED, INVALID, Some("method_not_allowed"), message)
    }

    /// Key missing or wrong.
    pub fn key() -> ApiError {
        let message = "missing or wrong API key; send `Authorization: Bearer KEY`".into();
        ApiError::new(StatusCode::UNAUTHORIZED, "authentication_error", Some("invalid_api_key"), message)
    }

    /// The router does not serve yet.
    pub fn starting(reason: &str) -> ApiError {
        let message = format!("{reason}; try again");
        let status = StatusCode::SERVICE_UNAVAILABLE;
        ApiError::new(status, "unavailable_error", Some("starting"), message).again_in(2)
    }

    /// Something broke on our side.
    pub fn internal(message: impl Into<String>) -> ApiError {
        let status = StatusCode::INTERNAL_SERVER_ERROR;
        ApiError::new(status, "server_error", Some("internal_error"), message.into())
    }

    /// The error object.
    pub fn json(&self) -> Value {
        json!({"error": {
            "message": self.message, "type": self.kind, "param": self.param, "code": self.code,
        }})
    }

    /// The whole answer.
    pub fn response(&self) -> Response<Body> {
        let mut response = Response::new(Body::from(self.json().to_string()));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

impl From<GenerateError> for ApiError {
    fn from(error: GenerateError) -> ApiError {
        let message = error.to_string();
        let of = |status, kind, code| ApiError::new(status, kind, Some(code), message);
        match error {
            GenerateError::ContextLength { .. } => {
                of(StatusCode::BAD_REQUEST, INVALID, "context_length_exceeded")
            }
            GenerateError::QueueFull { .. } => {
                of(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full").again_in(1)
            }
            GenerateError::KvCapacity { .. } => of(StatusCode::BAD_REQUEST, INVALID, "kv_capacity_exceeded"),
            GenerateError::UnknownToken { .. } => {
                of(StatusCode::BAD_REQUEST, INVALID, "unknown_token").at("prompt")
            }
            GenerateError::ExpertsUnavailable { .. } => {
                of(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "expert_unavailable").again_in(5)
            }
            GenerateError::Numeric(_) => {
                of(StatusCode::INTERNAL_SERVER_ERROR, "server_error", "numeric_error")
            }
            GenerateError::Stopping => {
                of(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "shutting_down").again_in(5)
            }
        }
    }
}
