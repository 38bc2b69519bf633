//! A request body, field by field.
//!
//! Problem: clients send dozens of fields. Silently ignoring one that changes the answer makes people believe in
//! output they did not get; refusing every unknown one breaks clients. Idea: each field is taken out by the code
//! that honours it, with its range; fields known to change nothing are dropped; fields known to change the answer
//! are refused by name; what is left over is reported in a warning. `null` means absent everywhere.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use super::error::ApiError;

/// Fields that change nothing here.
const IGNORED: [&str; 21] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "verbosity",
    "prediction",
    "moderation",
    "request_id",
    "priority",
    "cache_salt",
    "parallel_tool_calls",
    "reasoning_effort",
    "spaces_between_special_tokens",
    "timeout",
    "prompt_cache_retention",
    "session_id",
    "stream_interval",
    "n_probs",
    "cache_prompt",
];

/// Fields that would change the answer, and what to do instead.
const REFUSED: [(&str, &str); 29] = [
    ("tools", "leave it out"),
    ("functions", "leave it out"),
    ("function_call", "leave it out"),
    ("guided_json", "leave it out"),
    ("guided_regex", "leave it out"),
    ("guided_choice", "leave it out"),
    ("guided_grammar", "leave it out"),
    ("structured_outputs", "leave it out"),
    ("grammar", "leave it out"),
    ("json_schema", "leave it out"),
    ("audio", "only text is served"),
    ("web_search_options", "leave it out"),
    ("suffix", "fill-in-the-middle is not served"),
    ("best_of", "ask for n and choose yourself"),
    ("use_beam_search", "leave it out"),
    ("prompt_embeds", "send text or token ids"),
    ("prompt_logprobs", "use echo with logprobs on /v1/completions"),
    ("chat_template", "the model's own template is used"),
    ("continue_final_message", "use /v1/completions"),
    ("bad_words", "use logit_bias"),
    ("allowed_token_ids", "use logit_bias"),
    ("truncate_prompt_tokens", "shorten the prompt"),
    ("logits_processors", "leave it out"),
    ("thinking_token_budget", "use max_tokens"),
    ("documents", "put them into a message"),
    ("typical_p", "use top_p or min_p"),
    ("mirostat", "leave it out"),
    ("samplers", "leave it out"),
    ("mm_processor_kwargs", "only text is served"),
];

/// Unknown fields named in a warning at most.
const WARNED_MAX: usize = 16;

/// A JSON object being taken apart.
#[derive(Debug)]
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses a body. The parser's own limit of 128 levels bounds nesting.
    pub(super) fn parse(body: &[u8]) -> Result<Fields, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(fields)) => Ok(Fields(fields)),
            Ok(_) => Err(ApiError::body("the body must be a JSON object")),
            Err(error) => Err(ApiError::body(format!("the body is not valid JSON: {error}"))),
        }
    }

    /// The value of a field, unless absent or null.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.0.remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn number(&mut self, name: &str, range: RangeInclusive<f64>) -> Result<Option<f32>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_f64().filter(|number| range.contains(number));
        let (least, most) = (range.start(), range.end());
        let wrong = || ApiError::invalid(name, format!("{name} must be a number from {least} to {most}"));
        number.map(|number| Some(number as f32)).ok_or_else(wrong)
    }

    pub(super) fn integer(
        &mut self,
        name: &str,
        range: RangeInclusive<i64>,
    ) -> Result<Option<i64>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let number = value.as_i64().filter(|number| range.contains(number));
        let (least, most) = (range.start(), range.end());
        let wrong = || ApiError::invalid(name, format!("{name} must be an integer from {least} to {most}"));
        number.map(Some).ok_or_else(wrong)
    }

    /// A non-negative count.
    pub(super) fn count(&mut self, name: &str, range: RangeInclusive<u32>) -> Result<Option<u32>, ApiError> {
        let wide = i64::from(*range.start())..=i64::from(*range.end());
        Ok(self.integer(name, wide)?.map(|count| count as u32))
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>, ApiError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        value
            .as_bool()
            .map(Some)
            .ok_or_else(|| ApiError::invalid(name, format!("{name} must be true or false")))
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(ApiError::invalid(name, format!("{name} must be a string"))),
        }
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Fields>, ApiError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Fields(fields))),
            Some(_) => Err(ApiError::invalid(name, format!("{name} must be an object"))),
        }
    }

    /// Takes everything as a map.
    pub(super) fn into_map(self) -> Map<String, Value> {
        self.0
    }

    /// Refuses what would change the answer, drops what would not, and returns the rest as warnings.
    pub(super) fn finish(mut self) -> Result<Vec<String>, ApiError> {
        if let Some(format) = self.take("response_format").filter(|format| format["type"] != "text") {
            let kind = format["type"].as_str().unwrap_or("this").chars().take(40).collect::<String>();
            let remedy = format!("{kind:?} answers cannot be enforced; leave it out or use type text");
            return Err(ApiError::unsupported("response_format", &remedy));
        }
        if self.take("tool_choice").is_some_and(|choice| choice != "none" && choice != "auto") {
            return Err(ApiError::unsupported("tool_choice", "tools are not served; leave it out"));
        }
        let modalities = self.take("modalities");
        if modalities
            .is_some_and(|kinds| kinds.as_array().is_none_or(|kinds| kinds.iter().any(|k| k != "text")))
        {
            return Err(ApiError::unsupported("modalities", "only text is served"));
        }
        for (name, remedy) in REFUSED {
            let asks = |value: &Value| match value {
                Value::Bool(asks) => *asks,
                Value::Array(items) => !items.is_empty(),
                Value::String(text) => !text.is_empty(),
                // best_of: 1 is what we do.
                Value::Number(number) => !(name == "best_of" && number.as_u64() == Some(1)),
                _ => true,
            };
            if self.take(name).as_ref().is_some_and(asks) {
                return Err(ApiError::unsupported(name, remedy));
            }
        }
        let unknown =
            self.0.iter().filter(|(name, value)| !value.is_null() && !IGNORED.contains(&name.as_str()));
        let warned = unknown.take(WARNED_MAX).map(|(name, _)| {
            let name: String = name.chars().filter(|c| c.is_ascii_graphic()).take(64).collect();
            format!("unknown field {name} was ignored")
        });
        Ok(warned.collect())
    }
}
