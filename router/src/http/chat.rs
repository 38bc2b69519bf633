//! `POST /v1/chat/completions`.
//!
//! Messages become the text of the model's chat template, without whatever the tokenizer would add around it (the
//! template has it). Content may be a string or a list of text parts, which are joined by line ends; images and
//! audio are refused. A `developer` is a `system` for templates that do not know that role.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Response;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::generate::{End, Job, Running, Update};
use super::parameters::{Parameters, TOP_LOGPROBS_MAX};
use super::report::{Envelope, TokenNames, Totals};
use super::service::{Service, json_response};
use super::sse::{self, Script};
use crate::prompt::{Chat, Prompt};

/// Messages of a conversation at most; a rendering's fuel bounds the rest.
const MESSAGES_MAX: usize = 4096;
const ROLES: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// Answers, and what to warn about.
pub(super) async fn answer(
    service: Arc<Service>,
    body: &[u8],
) -> Result<(Response<Body>, Vec<String>), ApiError> {
    let mut fields = Fields::parse(body)?;
    service.check_model(fields.text("model")?.as_deref())?;
    let facts = service.engine.facts().clone();
    let parameters = Parameters::take(&mut fields, &service.prompt, facts.vocab)?;
    let logprobs = logprobs(&mut fields)?;
    let add_special = fields.flag("add_special_tokens")?.unwrap_or(false);
    if fields.flag("echo")? == Some(true) {
        return Err(ApiError::unsupported("echo", "use /v1/completions"));
    }
    let chat = conversation(&mut fields, &service.prompt)?;
    let warnings = fields.finish()?;
    let tokens = service.compute(move |prompt| tokens(prompt, &chat, add_special)).await?;
    // Unless told otherwise an answer may fill the context; one token at least, or the engine says why not.
    let room = facts.context.min(facts.kv_tokens).saturating_sub(tokens.len()).max(1);
    let max_tokens = parameters.max_tokens.unwrap_or(u32::try_from(room).unwrap_or(u32::MAX));
    let job = Job {
        prompts: vec![tokens],
        parameters,
        max_tokens: vec![max_tokens],
        logprobs,
        prompt_logprobs: None,
    };
    let mut running = Running::start(&service, &job)?;
    if job.parameters.stream {
        return Ok((sse::respond(running, ChatScript::new(service, job)).await?, warnings));
    }
    let mut totals = Totals::new(&job.prompts);
    let names = TokenNames::new(&service, &job.parameters);
    let mut answers: Vec<Answer> = (0..job.parameters.n).map(|_| Answer::default()).collect();
    sse::collect(&mut running, |update| match update {
        Update::Token { choice, id, text, logprobs, .. } => {
            answers[choice].text.push_str(&text);
            answers[choice].ids.push(id);
            answers[choice].logprobs.extend(logprobs.map(|logprobs| names.chat(id, &logprobs)));
        }
        Update::End { choice, end } => {
            totals.add(&end);
            answers[choice].text.push_str(&end.text);
            answers[choice].end = Some(end);
        }
        Update::Prompt { .. } | Update::Failed(_) => {}
    })
    .await?;
    let choices = answers.into_iter().enumerate().map(|(index, answer)| answer.json(index, &job)).collect();
    let mut object = Envelope::new(&service, "chatcmpl", "chat.completion").with(choices);
    object.insert("usage".into(), totals.usage(&running));
    object.insert("metrics".into(), totals.metrics(&running));
    if job.parameters.return_token_ids {
        object.insert("prompt_token_ids".into(), json!(job.prompts[0]));
    }
    if !warnings.is_empty() {
        object.insert("warnings".into(), json!(warnings));
    }
    Ok((json_response(&Value::Object(object)), warnings))
}

/// Tokens of a conversation.
pub(super) fn tokens(prompt: &Prompt, chat: &Chat, add_special: bool) -> Result<Vec<u32>, ApiError> {
    let text = prompt.render(chat).map_err(|error| {
        ApiError::invalid("messages", format!("the chat template refuses the messages: {error}"))
    })?;
    prompt.encode(&text, add_special).map_err(|error| ApiError::invalid("messages", error.to_string()))
}

/// The messages and template variables of a body.
pub(super) fn conversation(fields: &mut Fields, prompt: &Prompt) -> Result<Chat, ApiError> {
    let messages = match fields.take("messages") {
        Some(Value::Array(messages)) if !messages.is_empty() && messages.len() <= MESSAGES_MAX => messages,
        _ => {
            let message = format!("messages must be a list of 1 to {MESSAGES_MAX} messages");
            return Err(ApiError::invalid("messages", message));
        }
    };
    let knows_developer = prompt.template_mentions("developer");
    let messages: Result<Vec<Value>, ApiError> = messages
        .into_iter()
        .enumerate()
        .map(|(index, message)| normalised(message, index, knows_developer))
        .collect();
    let mut chat = Chat::new(messages?);
    chat.add_generation_prompt = fields.flag("add_generation_prompt")?.unwrap_or(true);
    if let Some(variables) = fields.object("chat_template_kwargs")? {
        chat.variables = variables.into_map();
        let reserved = ["messages", "tools", "documents", "add_generation_prompt", "chat_template"];
        if let Some(name) = reserved.iter().find(|name| chat.variables.contains_key(**name)) {
            let message = format!("chat_template_kwargs may not set {name}");
            return Err(ApiError::invalid("chat_template_kwargs", message));
        }
    }
    Ok(chat)
}

/// A message with a known role and string content.
fn normalised(message: Value, index: usize, knows_developer: bool) -> Result<Value, ApiError> {
    let at = |field: &str| format!("messages[{index}]{field}");
    let Value::Object(mut message) = message else {
        return Err(ApiError::invalid("messages", format!("{} must be an object", at(""))));
    };
    let role = message.get("role").and_then(Value::as_str).unwrap_or_default().to_owned();
    if !ROLES.contains(&role.as_str()) {
        let known = ROLES.join(", ");
        return Err(ApiError::invalid("messages", format!("{} must be one of {known}", at(".role"))));
    }
    if role == "developer" && !knows_developer {
        message.insert("role".into(), "system".into());
    }
    let content = match message.remove("content") {
        Some(Value::String(text)) => Some(text),
        Some(Value::Array(parts)) => Some(joined(&parts, index)?),
        None | Some(Value::Null) if role == "assistant" && message.contains_key("tool_calls") => None,
        _ => {
            let message = format!("{} must be a string or a list of text parts", at(".content"));
            return Err(ApiError::invalid("messages", message));
        }
    };
    // Templates expect the role first when they walk through a message.
    let mut ordered = Map::new();
    ordered.insert("role".into(), message.remove("role").unwrap_or_default());
    if let Some(content) = content {
        ordered.insert("content".into(), content.into());
    }
    ordered.extend(message);
    if let Some(calls) = ordered.get_mut("tool_calls").and_then(Value::as_array_mut) {
        calls.iter_mut().for_each(parse_arguments);
    }
    Ok(Value::Object(ordered))
}

/// OpenAI sends a call's arguments as JSON text; templates expect the object.
fn parse_arguments(call: &mut Value) {
    if let Some(arguments) = call.pointer_mut("/function/arguments") {
        let parsed = arguments.as_str().and_then(|text| serde_json::from_str::<Value>(text).ok());
        if let Some(object) = parsed.filter(Value::is_object) {
            *arguments = object;
        }
    }
}

fn joined(parts: &[Value], index: usize) -> Result<String, ApiError> {
    let text = |part: &Value| match (part["type"].as_str(), part["text"].as_str()) {
        (Some("text"), Some(text)) => Ok(text.to_owned()),
        (kind, _) => {
            let kind: String = kind.unwrap_or("untyped").chars().take(40).collect();
            let message =
                format!("messages[{index}].content has a part of type {kind:?}; only text is served");
            Err(ApiError::invalid("messages", message))
        }
    };
    let texts: Result<Vec<String>, ApiError> = parts.iter().map(text).collect();
    Ok(texts?.join("\n"))
}

/// `logprobs` and `top_logprobs`.
fn logprobs(fields: &mut Fields) -> Result<Option<u32>, ApiError> {
    let top = fields.count("top_logprobs", 0..=TOP_LOGPROBS_MAX)?;
    match (fields.flag("logprobs")?.unwrap_or(false), top) {
        (true, top) => Ok(Some(top.unwrap_or(0))),
        (false, None | Some(0)) => Ok(None),
        (false, Some(_)) => Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs to be true")),
    }
}

#[derive(Debug, Default)]
struct Answer {
    text: String,
    ids: Vec<u32>,
    logprobs: Vec<Value>,
    end: Option<End>,
}

impl Answer {
    fn json(self, index: usize, job: &Job) -> Value {
        let end = self.end.as_ref();
        let mut choice = json!({
            "index": index,
            "message": {"role": "assistant", "content": self.text, "refusal": null},
            "logprobs": job.logprobs.map(|_| json!({"content": self.logprobs, "refusal": null})),
            "finish_reason": end.map(|end| end.reason),
            "stop_reason": end.and_then(|end| end.stop.clone()),
        });
        if job.parameters.return_token_ids {
            choice["token_ids"] = json!(self.ids);
        }
        if job.parameters.logits_digest {
            choice["logits_digest"] = json!(end.and_then(|end| end.digest.clone()));
        }
        choice
    }
}

struct ChatScript {
    service: Arc<Service>,
    job: Job,
    envelope: Envelope,
    totals: Totals,
}

impl ChatScript {
    fn new(service: Arc<Service>, job: Job) -> ChatScript {
        let envelope = Envelope::new(&service, "chatcmpl", "chat.completion.chunk");
        let totals = Totals::new(&job.prompts);
        ChatScript { service, job, envelope, totals }
    }

    fn chunk(&self, running: &Running, choice: Value) -> Vec<Map<String, Value>> {
        let mut chunk = self.envelope.with(json!([choice]));
        if self.job.parameters.continuous_usage {
            chunk.insert("usage".into(), self.totals.usage(running));
        } else if self.job.parameters.include_usage {
            chunk.insert("usage".into(), Value::Null);
        }
        vec![chunk]
    }
}

impl Script for ChatScript {
    fn opening(&mut self) -> Vec<Map<String, Value>> {
        let delta = json!({"role": "assistant", "content": ""});
        let role = |index| json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
        (0..self.job.parameters.n).map(|index| self.envelope.with(json!([role(index)]))).collect()
    }

    fn update(&mut self, running: &Running, update: Update) -> Vec<Map<String, Value>> {
        match update {
            Update::Token { choice, id, text, logprobs, .. } => {
                let names = TokenNames::new(&self.service, &self.job.parameters);
                let logprobs =
                    logprobs.map(|logprobs| json!({"content": [names.chat(id, &logprobs)], "refusal": null}));
                let mut object = json!({
                    "index": choice, "delta": {"content": text}, "logprobs": logprobs, "finish_reason": null,
                });
                if self.job.parameters.return_token_ids {
                    object["token_ids"] = json!([id]);
                }
                self.chunk(running, object)
            }
            Update::End { choice, end } => {
                self.totals.add(&end);
                let delta = if end.text.is_empty() { json!({}) } else { json!({"content": end.text}) };
                let mut object = json!({
                    "index": choice, "delta": delta, "logprobs": null,
                    "finish_reason": end.reason, "stop_reason": end.stop,
                });
                if self.job.parameters.logits_digest {
                    object["logits_digest"] = json!(end.digest);
                }
                self.chunk(running, object)
            }
            Update::Prompt { .. } | Update::Failed(_) => Vec::new(),
        }
    }

    fn closing(&mut self, running: &Running) -> Vec<Map<String, Value>> {
        if !self.job.parameters.include_usage {
            return Vec::new();
        }
        let mut chunk = self.envelope.with(json!([]));
        chunk.insert("usage".into(), self.totals.usage(running));
        chunk.insert("metrics".into(), self.totals.metrics(running));
        vec![chunk]
    }
}
