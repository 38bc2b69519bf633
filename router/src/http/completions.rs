//! `POST /v1/completions`: the endpoint of studies and benchmarks.
//!
//! A prompt is a string, a list of strings, token ids, or a list of lists of token ids. `echo` with `logprobs`
//! scores the prompt, also with `max_tokens` 0 or 1, which is how evaluation harnesses measure likelihoods.

use std::sync::Arc;

use axum::body::Body;
use axum::http::Response;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::Fields;
use super::generate::{End, Job, Running, Update};
use super::parameters::{Parameters, TOP_LOGPROBS_MAX};
use super::report::{Envelope, LegacyLogprobs, TokenNames, Totals};
use super::service::{Service, json_response};
use super::sse::{self, Script};
use crate::prompt::Prompt;
use crate::request::TokenLogprobs;
use crate::stream::Detokenizer;

/// Sequences of one request at most, prompts times `n`: half of the engine's submission queue.
const CHOICES_MAX: usize = 128;
/// Tokens to generate unless told otherwise; OpenAI's default.
const MAX_TOKENS_DEFAULT: u32 = 16;

/// Prompts as texts and tokens.
#[derive(Debug)]
struct Prompts {
    texts: Vec<String>,
    tokens: Vec<Vec<u32>>,
}

/// Answers, and what to warn about.
pub(super) async fn answer(
    service: Arc<Service>,
    body: &[u8],
) -> Result<(Response<Body>, Vec<String>), ApiError> {
    let mut fields = Fields::parse(body)?;
    service.check_model(fields.text("model")?.as_deref())?;
    let vocab = service.engine.facts().vocab;
    let parameters = Parameters::take(&mut fields, &service.prompt, vocab)?;
    let echo = fields.flag("echo")?.unwrap_or(false);
    let logprobs = fields.count("logprobs", 0..=TOP_LOGPROBS_MAX)?;
    let add_special = fields.flag("add_special_tokens")?.unwrap_or(true);
    let asked = fields
        .take("prompt")
        .ok_or_else(|| ApiError::invalid("prompt", "prompt is missing; send a string or token ids"))?;
    let warnings = fields.finish()?;
    let prompts = service.compute(move |prompt| prompts(prompt, asked, add_special)).await?;
    if prompts.tokens.len() * parameters.n as usize > CHOICES_MAX {
        let message = format!("prompts times n may be {CHOICES_MAX} at most");
        return Err(ApiError::invalid("prompt", message));
    }
    let max_tokens = parameters.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT);
    let job = Job {
        max_tokens: vec![max_tokens; prompts.tokens.len()],
        prompts: prompts.tokens,
        parameters,
        logprobs,
        prompt_logprobs: logprobs.filter(|_| echo),
    };
    let mut running = Running::start(&service, &job)?;
    let mut script = CompletionScript {
        envelope: Envelope::new(&service, "cmpl", "text_completion"),
        totals: Totals::new(&job.prompts),
        service,
        texts: if echo { prompts.texts } else { Vec::new() },
        job,
    };
    if script.job.parameters.stream {
        return Ok((sse::respond(running, script).await?, warnings));
    }
    let count = script.job.prompts.len() * script.job.parameters.n as usize;
    let mut answers: Vec<Answer> = (0..count).map(|index| script.answer(index)).collect();
    sse::collect(&mut running, |update| {
        if let Some(choice) = update.choice() {
            script.add(&mut answers[choice], update);
        }
    })
    .await?;
    let choices =
        answers.into_iter().enumerate().map(|(index, answer)| script.choice(index, answer)).collect();
    let mut object = script.envelope.with(choices);
    object.insert("usage".into(), script.totals.usage(&running));
    object.insert("metrics".into(), script.totals.metrics(&running));
    if !warnings.is_empty() {
        object.insert("warnings".into(), json!(warnings));
    }
    Ok((json_response(&Value::Object(object)), warnings))
}

/// The four shapes of a prompt.
fn prompts(prompt: &Prompt, asked: Value, add_special: bool) -> Result<Prompts, ApiError> {
    let wrong = || {
        let shapes = "a string, a list of strings, token ids, or a list of lists of token ids";
        ApiError::invalid("prompt", format!("prompt must be {shapes}, none of them empty"))
    };
    let one = |value: Value| -> Result<(String, Vec<u32>), ApiError> {
        let (text, tokens) = match value {
            Value::String(text) => {
                let tokens = prompt.encode(&text, add_special);
                let tokens = tokens.map_err(|error| ApiError::invalid("prompt", error.to_string()))?;
                (text, tokens)
            }
            list => {
                let tokens: Vec<u32> = serde_json::from_value(list).map_err(|_| wrong())?;
                (prompt.decode(&tokens, false), tokens)
            }
        };
        if tokens.is_empty() { Err(wrong()) } else { Ok((text, tokens)) }
    };
    let several = match asked {
        Value::Array(items) if items.first().is_some_and(|item| !item.is_number()) => items,
        single => vec![single],
    };
    if several.len() > CHOICES_MAX {
        let message = format!("{} prompts at once; at most {CHOICES_MAX}", several.len());
        return Err(ApiError::invalid("prompt", message));
    }
    let (texts, tokens) = several.into_iter().map(one).collect::<Result<Vec<_>, _>>()?.into_iter().unzip();
    Ok(Prompts { texts, tokens })
}

/// One answer being put together: all of it, or one chunk.
#[derive(Debug, Default)]
struct Answer {
    text: String,
    ids: Vec<u32>,
    logprobs: Option<LegacyLogprobs>,
    end: Option<End>,
}

struct CompletionScript {
    service: Arc<Service>,
    job: Job,
    envelope: Envelope,
    totals: Totals,
    /// The prompts, if echoed.
    texts: Vec<String>,
}

impl CompletionScript {
    fn prompt_of(&self, choice: usize) -> usize {
        choice / self.job.parameters.n as usize
    }

    fn echoed(&self, choice: usize) -> Option<&str> {
        self.texts.get(self.prompt_of(choice)).map(String::as_str)
    }

    /// An answer with nothing generated: the prompt, if echoed.
    fn answer(&self, choice: usize) -> Answer {
        let text = self.echoed(choice).unwrap_or_default().to_owned();
        Answer { text, logprobs: self.job.logprobs.map(|_| LegacyLogprobs::default()), ..Answer::default() }
    }

    fn prompt_logprobs(&self, choice: usize, into: &mut LegacyLogprobs, logprobs: &[Option<TokenLogprobs>]) {
        let names = TokenNames::new(&self.service, &self.job.parameters);
        let mut detokenizer = Detokenizer::new(self.service.prompt.vocabulary().clone(), false);
        let mut offset = 0;
        for (token, logprobs) in self.job.prompts[self.prompt_of(choice)].iter().zip(logprobs) {
            into.push(&names, *token, offset, logprobs.as_ref());
            offset += detokenizer.push(*token).chars().count();
        }
    }

    fn add(&mut self, answer: &mut Answer, update: Update) {
        match update {
            Update::Prompt { choice, logprobs } => {
                if let Some(into) = answer.logprobs.as_mut() {
                    self.prompt_logprobs(choice, into, &logprobs);
                }
            }
            Update::Token { choice, id, text, offset, logprobs } => {
                let before = self.echoed(choice).map_or(0, |text| text.chars().count());
                let names = TokenNames::new(&self.service, &self.job.parameters);
                answer.text.push_str(&text);
                answer.ids.push(id);
                if let (Some(into), Some(logprobs)) = (answer.logprobs.as_mut(), logprobs) {
                    into.push(&names, id, before + offset, Some(&logprobs));
                }
            }
            Update::End { end, .. } => {
                self.totals.add(&end);
                answer.text.push_str(&end.text);
                answer.end = Some(end);
            }
            Update::Failed(_) => {}
        }
    }

    fn choice(&self, index: usize, answer: Answer) -> Value {
        let end = answer.end.as_ref();
        let mut choice = json!({
            "index": index,
            "text": answer.text,
            "logprobs": answer.logprobs.map(LegacyLogprobs::json),
            "finish_reason": end.map(|end| end.reason),
            "stop_reason": end.and_then(|end| end.stop.clone()),
        });
        if self.job.parameters.return_token_ids {
            choice["token_ids"] = json!(answer.ids);
            choice["prompt_token_ids"] = json!(self.job.prompts[self.prompt_of(index)]);
        }
        if self.job.parameters.logits_digest && end.is_some() {
            choice["logits_digest"] = json!(end.and_then(|end| end.digest.clone()));
        }
        choice
    }

    fn chunk(&self, running: Option<&Running>, index: usize, answer: Answer) -> Map<String, Value> {
        let mut chunk = self.envelope.with(json!([self.choice(index, answer)]));
        match running.filter(|_| self.job.parameters.continuous_usage) {
            Some(running) => {
                chunk.insert("usage".into(), self.totals.usage(running));
            }
            None if self.job.parameters.include_usage => {
                chunk.insert("usage".into(), Value::Null);
            }
            None => {}
        }
        chunk
    }
}

impl Script for CompletionScript {
    fn opening(&mut self) -> Vec<Map<String, Value>> {
        // With log-probabilities the prompt comes when they do.
        if self.texts.is_empty() || self.job.prompt_logprobs.is_some() {
            return Vec::new();
        }
        let count = self.job.prompts.len() * self.job.parameters.n as usize;
        let prompt = |index| Answer { logprobs: None, ..self.answer(index) };
        (0..count).map(|index| self.chunk(None, index, prompt(index))).collect()
    }

    fn update(&mut self, running: &Running, update: Update) -> Vec<Map<String, Value>> {
        let Some(choice) = update.choice() else { return Vec::new() };
        let ends = matches!(update, Update::End { .. });
        let mut piece = match update {
            Update::Prompt { .. } => self.answer(choice),
            _ => Answer {
                logprobs: self.job.logprobs.filter(|_| !ends).map(|_| LegacyLogprobs::default()),
                ..Answer::default()
            },
        };
        self.add(&mut piece, update);
        vec![self.chunk(Some(running), choice, piece)]
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
