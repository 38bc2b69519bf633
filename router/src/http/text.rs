//! `POST /tokenize` and `POST /detokenize`, in vLLM's shapes with llama-server's names accepted.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Response;
use serde_json::{Value, json};

use super::chat;
use super::error::ApiError;
use super::fields::Fields;
use super::service::{Service, json_response};

/// Text or messages to tokens.
pub(super) async fn tokenize(
    service: Arc<Service>,
    body: &[u8],
) -> Result<(Response<Body>, Vec<String>), ApiError> {
    let mut fields = Fields::parse(body)?;
    service.check_model(fields.text("model")?.as_deref())?;
    let pieces = fields.flag("with_pieces")?.unwrap_or(false);
    let strings = fields.flag("return_token_strs")?.unwrap_or(false);
    let add_special = match fields.flag("add_special_tokens")? {
        Some(add) => Some(add),
        None => fields.flag("add_special")?,
    };
    let content = match fields.text("prompt")? {
        Some(text) => Some(text),
        None => fields.text("content")?,
    };
    let tokens = match content {
        Some(text) => {
            let add_special = add_special.unwrap_or(true);
            let encode = service.compute(move |prompt| {
                prompt
                    .encode(&text, add_special)
                    .map_err(|error| ApiError::invalid("prompt", error.to_string()))
            });
            encode.await?
        }
        None => {
            let chat = chat::conversation(&mut fields, &service.prompt)?;
            service.compute(move |prompt| chat::tokens(prompt, &chat, add_special.unwrap_or(false))).await?
        }
    };
    let warnings = fields.finish()?;
    let vocabulary = service.prompt.vocabulary();
    let strings = strings.then(|| tokens.iter().map(|token| vocabulary.piece(*token)).collect::<Vec<_>>());
    let shown = if pieces {
        tokens.iter().map(|token| json!({"id": token, "piece": vocabulary.piece(*token)})).collect()
    } else {
        json!(tokens)
    };
    let answer = json!({
        "count": tokens.len(),
        "max_model_len": service.engine.facts().context,
        "tokens": shown,
        "token_strs": strings,
    });
    Ok((json_response(&answer), warnings))
}

/// Tokens to text.
pub(super) fn detokenize(service: &Service, body: &[u8]) -> Result<(Response<Body>, Vec<String>), ApiError> {
    let mut fields = Fields::parse(body)?;
    service.check_model(fields.text("model")?.as_deref())?;
    let tokens = fields.take("tokens").unwrap_or(Value::Null);
    let tokens: Vec<u32> = serde_json::from_value(tokens)
        .map_err(|_| ApiError::invalid("tokens", "tokens must be a list of token ids"))?;
    let vocab = service.engine.facts().vocab;
    if let Some(token) = tokens.iter().find(|token| **token as usize >= vocab) {
        let message = format!("token {token} is outside the vocabulary of {vocab}");
        return Err(ApiError::invalid("tokens", message));
    }
    let warnings = fields.finish()?;
    let text = service.prompt.decode(&tokens, false);
    Ok((json_response(&json!({"prompt": text, "content": text})), warnings))
}
