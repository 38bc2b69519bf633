//! What chat and completion answers say alike: usage, timing, log-probabilities, envelope.

use serde_json::{Map, Value, json};

use super::generate::{End, Running};
use super::parameters::{Parameters, random};
use super::service::{Service, unix_seconds};
use crate::request::{Timing, TokenLogprobs};
use crate::stream::Vocabulary;

/// Log-probability written where JSON has no number (as vLLM does).
const LEAST_LOGPROB: f32 = -9999.0;

/// The fields every object of one answer carries.
#[derive(Clone, Debug)]
pub(super) struct Envelope {
    fields: Map<String, Value>,
}

impl Envelope {
    /// `kind` is the `object`, `prefix` begins the `id`.
    pub(super) fn new(service: &Service, prefix: &str, kind: &str) -> Envelope {
        let mut fields = Map::new();
        fields.insert("id".into(), format!("{prefix}-{:016x}{:016x}", random(), random()).into());
        fields.insert("object".into(), kind.into());
        fields.insert("created".into(), unix_seconds(std::time::SystemTime::now()).into());
        fields.insert("model".into(), service.identity.model.clone().into());
        fields.insert("system_fingerprint".into(), service.identity.fingerprint.clone().into());
        Envelope { fields }
    }

    /// An object with these choices.
    pub(super) fn with(&self, choices: Value) -> Map<String, Value> {
        let mut fields = self.fields.clone();
        fields.insert("choices".into(), choices);
        fields
    }
}

/// Sums over the answers of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Totals {
    prompt_tokens: u64,
    first: Option<Timing>,
    wire_bytes: u64,
    preemptions: u64,
    longest: f64,
}

impl Totals {
    pub(super) fn new(prompts: &[Vec<u32>]) -> Totals {
        let prompt_tokens = prompts.iter().map(|prompt| prompt.len() as u64).sum();
        Totals { prompt_tokens, ..Totals::default() }
    }

    /// Adds an answer that ended.
    pub(super) fn add(&mut self, end: &End) {
        self.first.get_or_insert(end.timing);
        self.wire_bytes += end.timing.wire_bytes;
        self.preemptions += u64::from(end.timing.preemptions);
        self.longest = self.longest.max(end.timing.decode.as_secs_f64());
    }

    pub(super) fn usage(&self, running: &Running) -> Value {
        let generated = running.generated();
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": 0},
        })
    }

    /// vLLM's timing names, of the first answer; ours under `moemesh`.
    pub(super) fn metrics(&self, running: &Running) -> Value {
        let timing = self.first.unwrap_or_default();
        let milliseconds = |duration: std::time::Duration| duration.as_secs_f64() * 1e3;
        let generated = running.generated();
        let gaps = generated.saturating_sub(1) as f64;
        let decode = self.longest;
        json!({
            "time_to_first_token_ms": milliseconds(timing.queued + timing.prefill),
            "queue_time_ms": milliseconds(timing.queued),
            "generation_time_ms": milliseconds(timing.prefill + timing.decode),
            "mean_itl_ms": if gaps > 0.0 { decode * 1e3 / gaps } else { 0.0 },
            "tokens_per_second": if decode > 0.0 { gaps / decode } else { 0.0 },
            "moemesh": {
                "prefill_ms": milliseconds(timing.prefill),
                "expert_wait_ms": milliseconds(timing.waiting),
                "wire_bytes": self.wire_bytes,
                "preemptions": self.preemptions,
            },
        })
    }
}

/// How tokens are shown in log-probabilities.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenNames<'a> {
    pub(super) vocabulary: &'a Vocabulary,
    pub(super) as_ids: bool,
}

impl<'a> TokenNames<'a> {
    pub(super) fn new(service: &'a Service, parameters: &Parameters) -> TokenNames<'a> {
        TokenNames { vocabulary: service.prompt.vocabulary(), as_ids: parameters.tokens_as_ids }
    }

    pub(super) fn name(&self, token: u32) -> String {
        if self.as_ids { format!("token_id:{token}") } else { self.vocabulary.piece(token) }
    }

    /// An entry of a chat answer's `logprobs.content`.
    pub(super) fn chat(&self, token: u32, logprobs: &TokenLogprobs) -> Value {
        let entry = |token: u32, logprob: f32| {
            json!({
                "token": self.name(token), "logprob": finite(logprob), "bytes": self.vocabulary.bytes(token),
            })
        };
        let mut shown = entry(token, logprobs.logprob);
        shown["top_logprobs"] = logprobs.top.iter().map(|(token, logprob)| entry(*token, *logprob)).collect();
        shown
    }
}

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { LEAST_LOGPROB }
}

/// The legacy `logprobs` object of completions, being filled.
#[derive(Debug, Default)]
pub(super) struct LegacyLogprobs {
    text_offset: Vec<usize>,
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<Map<String, Value>>>,
}

impl LegacyLogprobs {
    /// Adds one token; `None` is the first of a prompt, which nothing precedes.
    pub(super) fn push(
        &mut self,
        names: &TokenNames<'_>,
        token: u32,
        offset: usize,
        logprobs: Option<&TokenLogprobs>,
    ) {
        let name = names.name(token);
        self.text_offset.push(offset);
        self.token_logprobs.push(logprobs.map(|logprobs| finite(logprobs.logprob)));
        self.top_logprobs.push(logprobs.map(|logprobs| {
            let mut top = Map::new();
            for (token, logprob) in &logprobs.top {
                // Two tokens may read alike (parts of code points): the more probable one is shown.
                top.entry(names.name(*token)).or_insert_with(|| finite(*logprob).into());
            }
            top.insert(name.clone(), finite(logprobs.logprob).into());
            top
        }));
        self.tokens.push(name);
    }

    pub(super) fn json(self) -> Value {
        json!({
            "text_offset": self.text_offset, "tokens": self.tokens,
            "token_logprobs": self.token_logprobs, "top_logprobs": self.top_logprobs,
        })
    }
}
