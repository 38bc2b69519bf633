//! Sampling, stopping and reporting parameters of a request, checked.
//!
//! Ranges are OpenAI's where it has the parameter and vLLM's where it does not. Defaults come from the model's
//! `generation_config.json`, then from OpenAI. A request without a seed gets a random one.

use std::hash::{BuildHasher, RandomState};

use serde_json::Value;

use super::error::ApiError;
use super::fields::Fields;
use crate::prompt::Prompt;
use crate::request::Sampling;
use crate::stream::Stops;

/// Answers to one prompt at most.
const N_MAX: u32 = 8;
/// Stop strings at most; OpenAI takes 4.
const STOPS_MAX: usize = 16;
/// Bytes of one stop string; text of that length may be held back.
const STOP_BYTES_MAX: usize = 1024;
/// Stop tokens a request may add.
const STOP_TOKENS_MAX: usize = 64;
/// Entries of `logit_bias`; OpenAI takes 300.
const LOGIT_BIAS_MAX: usize = 1024;
/// Alternatives reported per token; OpenAI's and vLLM's limit.
pub(super) const TOP_LOGPROBS_MAX: u32 = 20;

/// Everything about a request but its prompt.
#[derive(Clone, Debug)]
pub(super) struct Parameters {
    pub(super) sampling: Sampling,
    pub(super) max_tokens: Option<u32>,
    pub(super) min_tokens: u32,
    pub(super) stops: Stops,
    pub(super) stop_tokens: Vec<u32>,
    pub(super) n: u32,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) continuous_usage: bool,
    pub(super) skip_special: bool,
    pub(super) return_token_ids: bool,
    pub(super) tokens_as_ids: bool,
    pub(super) logits_digest: bool,
}

impl Parameters {
    /// Takes them out of a body, for a model of `vocab` tokens.
    pub(super) fn take(fields: &mut Fields, prompt: &Prompt, vocab: usize) -> Result<Parameters, ApiError> {
        let most = i64::from(u32::MAX);
        let max_tokens = fields.integer("max_tokens", 0..=most)?;
        let max_completion_tokens = fields.integer("max_completion_tokens", 0..=most)?;
        let ignore_eos = fields.flag("ignore_eos")?.unwrap_or(false);
        let mut stop_tokens = if ignore_eos { Vec::new() } else { prompt.stop_tokens().to_vec() };
        stop_tokens.extend(stop_token_ids(fields)?);
        let min_tokens = fields.count("min_tokens", 0..=u32::MAX)?.unwrap_or(0);
        let stream = fields.flag("stream")?.unwrap_or(false);
        let mut options = fields.object("stream_options")?;
        let mut option = |name: &str| match options.as_mut() {
            Some(options) => options.flag(name).map(|flag| flag.unwrap_or(false)),
            None => Ok(false),
        };
        let (include_usage, continuous_usage) = (option("include_usage")?, option("continuous_usage_stats")?);
        Ok(Parameters {
            sampling: sampling(fields, prompt, vocab)?,
            max_tokens: max_completion_tokens.or(max_tokens).map(|tokens| tokens as u32),
            min_tokens,
            stops: Stops {
                strings: stop_strings(fields)?,
                include: fields.flag("include_stop_str_in_output")?.unwrap_or(false),
                min_tokens,
            },
            stop_tokens,
            n: fields.count("n", 1..=N_MAX)?.unwrap_or(1),
            stream,
            include_usage,
            continuous_usage,
            skip_special: fields.flag("skip_special_tokens")?.unwrap_or(true),
            return_token_ids: fields.flag("return_token_ids")?.unwrap_or(false),
            tokens_as_ids: fields.flag("return_tokens_as_token_ids")?.unwrap_or(false),
            logits_digest: fields.flag("logits_digest")?.unwrap_or(false),
        })
    }
}

fn sampling(fields: &mut Fields, prompt: &Prompt, vocab: usize) -> Result<Sampling, ApiError> {
    let defaults = prompt.defaults();
    let positive = f64::MIN_POSITIVE;
    let temperature = fields.number("temperature", 0.0..=2.0)?;
    let top_p = fields.number("top_p", positive..=1.0)?;
    // -1 is vLLM's way of saying "all".
    let top_k = fields.integer("top_k", -1..=i64::from(u32::MAX))?.map(|k| k.max(0) as u32);
    let min_p = fields.number("min_p", 0.0..=1.0)?;
    let repetition_penalty = fields.number("repetition_penalty", 0.01..=10.0)?;
    Ok(Sampling {
        temperature: temperature.or(defaults.temperature).unwrap_or(1.0),
        top_p: top_p.or(defaults.top_p).unwrap_or(1.0),
        top_k: top_k.or(defaults.top_k).unwrap_or(0),
        min_p: min_p.or(defaults.min_p).unwrap_or(0.0),
        repetition_penalty: repetition_penalty.or(defaults.repetition_penalty).unwrap_or(1.0),
        frequency_penalty: fields.number("frequency_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        presence_penalty: fields.number("presence_penalty", -2.0..=2.0)?.unwrap_or(0.0),
        logit_bias: logit_bias(fields, vocab)?,
        seed: seed(fields)?,
    })
}

fn seed(fields: &mut Fields) -> Result<u64, ApiError> {
    let Some(value) = fields.take("seed") else { return Ok(random()) };
    let seed = value.as_u64().or_else(|| value.as_i64().map(|seed| seed as u64));
    seed.ok_or_else(|| ApiError::invalid("seed", "seed must be a 64-bit integer"))
}

/// 64 bits nobody can foresee: the standard library seeds its hash keys from the system.
pub(super) fn random() -> u64 {
    RandomState::new().hash_one(0u8)
}

fn logit_bias(fields: &mut Fields, vocab: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let Some(entries) = fields.object("logit_bias")? else { return Ok(Vec::new()) };
    let entries = entries.into_map();
    if entries.len() > LOGIT_BIAS_MAX {
        let message = format!("logit_bias has {} entries; at most {LOGIT_BIAS_MAX}", entries.len());
        return Err(ApiError::invalid("logit_bias", message));
    }
    let mut biases = Vec::with_capacity(entries.len());
    for (token, bias) in &entries {
        let id = token.parse::<u32>().ok().filter(|id| (*id as usize) < vocab);
        let value = bias.as_f64().filter(|bias| (-100.0..=100.0).contains(bias));
        let (Some(id), Some(value)) = (id, value) else {
            let message = format!(
                "logit_bias maps token ids below {vocab} to numbers from -100 to 100, unlike {:?}: {bias}",
                token.chars().take(40).collect::<String>()
            );
            return Err(ApiError::invalid("logit_bias", message));
        };
        biases.push((id, value as f32));
    }
    Ok(biases)
}

fn stop_strings(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    let values = match fields.take("stop") {
        None => return Ok(Vec::new()),
        Some(Value::Array(values)) => values,
        Some(one) => vec![one],
    };
    if values.len() > STOPS_MAX {
        let message = format!("stop has {} strings; at most {STOPS_MAX}", values.len());
        return Err(ApiError::invalid("stop", message));
    }
    let text = |value: &Value| {
        let text = value.as_str().filter(|text| !text.is_empty() && text.len() <= STOP_BYTES_MAX);
        text.map(str::to_owned).ok_or_else(|| {
            let message = format!("stop must be strings of 1 to {STOP_BYTES_MAX} bytes");
            ApiError::invalid("stop", message)
        })
    };
    values.iter().map(text).collect()
}

fn stop_token_ids(fields: &mut Fields) -> Result<Vec<u32>, ApiError> {
    let Some(value) = fields.take("stop_token_ids") else { return Ok(Vec::new()) };
    let ids: Option<Vec<u32>> = serde_json::from_value(value).ok();
    ids.filter(|ids| ids.len() <= STOP_TOKENS_MAX).ok_or_else(|| {
        let message = format!("stop_token_ids must be at most {STOP_TOKENS_MAX} token ids");
        ApiError::invalid("stop_token_ids", message)
    })
}
