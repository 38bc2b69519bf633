//! The small JSON files beside a model's weights, as far as prompts need them.
//!
//! Which file wins: the chat template is `chat_template.jinja`, else `chat_template.json`, else
//! `tokenizer_config.json` (a string, or a list of named ones of which `default` is taken). Stop tokens are those
//! of `generation_config.json` and `config.json` and the tokenizer's `eos_token` together: releases disagree, and
//! every one of them means the end. Files may be missing; a file that is there must be valid and within
//! [`FILE_BYTES_MAX`].

use std::path::Path;

use serde_json::{Map, Value};

use super::PromptError;

/// Largest JSON or template file read, in bytes; real ones have some kilobytes (a tokenizer_config.json with
/// thousands of added tokens about one megabyte).
const FILE_BYTES_MAX: u64 = 16 << 20;

/// Sampling recommended by `generation_config.json`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Defaults {
    /// Temperature.
    pub temperature: Option<f32>,
    /// Top-p.
    pub top_p: Option<f32>,
    /// Top-k.
    pub top_k: Option<u32>,
    /// Min-p.
    pub min_p: Option<f32>,
    /// Repetition penalty.
    pub repetition_penalty: Option<f32>,
}

/// Names and contents of special tokens (`bos_token`, `eos_token`, ...), as templates see them.
#[derive(Clone, Debug, Default)]
pub struct SpecialTokens(pub Map<String, Value>);

impl SpecialTokens {
    /// The end-of-sequence token's text.
    pub fn eos(&self) -> Option<&str> {
        self.0.get("eos_token").and_then(Value::as_str)
    }
}

/// What the files say.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) template: Option<String>,
    pub(super) special: SpecialTokens,
    pub(super) defaults: Defaults,
    pub(super) stop_tokens: Vec<u32>,
}

const SPECIAL_NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Reads what is there.
pub(super) fn read(directory: &Path) -> Result<Files, PromptError> {
    let tokenizer_config = json(directory, "tokenizer_config.json")?;
    let generation = json(directory, "generation_config.json")?;
    let config = json(directory, "config.json")?;
    let mut special = Map::new();
    for source in [json(directory, "special_tokens_map.json")?, tokenizer_config.clone()] {
        for name in SPECIAL_NAMES {
            if let Some(text) = token_text(&source[name]) {
                special.insert(name.to_owned(), Value::from(text));
            }
        }
    }
    let mut stop_tokens = Vec::new();
    for (file, source) in [("generation_config.json", &generation), ("config.json", &config)] {
        stop_tokens.extend(token_ids(file, &source["eos_token_id"])?);
    }
    Ok(Files {
        template: template(directory, &tokenizer_config)?,
        special: SpecialTokens(special),
        defaults: defaults(&generation),
        stop_tokens,
    })
}

fn text(directory: &Path, name: &str) -> Result<Option<String>, PromptError> {
    let path = directory.join(name);
    let size = match std::fs::metadata(&path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(PromptError(format!("{}: {error}", path.display()))),
    };
    if size > FILE_BYTES_MAX {
        let message = format!("{}: {size} bytes; at most {FILE_BYTES_MAX} are read", path.display());
        return Err(PromptError(message));
    }
    let read = std::fs::read_to_string(&path);
    read.map(Some).map_err(|error| PromptError(format!("{}: {error}", path.display())))
}

fn json(directory: &Path, name: &str) -> Result<Value, PromptError> {
    let Some(text) = text(directory, name)? else { return Ok(Value::Null) };
    let path = directory.join(name);
    serde_json::from_str(&text)
        .map_err(|error| PromptError(format!("{}: {error}; download the file again", path.display())))
}

fn template(directory: &Path, tokenizer_config: &Value) -> Result<Option<String>, PromptError> {
    if let Some(source) = text(directory, "chat_template.jinja")? {
        return Ok(Some(source));
    }
    for value in
        [&json(directory, "chat_template.json")?["chat_template"], &tokenizer_config["chat_template"]]
    {
        match value {
            Value::String(source) => return Ok(Some(source.clone())),
            Value::Array(named) => {
                let default = named.iter().find(|entry| entry["name"] == "default").or(named.first());
                if let Some(source) = default.and_then(|entry| entry["template"].as_str()) {
                    return Ok(Some(source.to_owned()));
                }
            }
            _ => {}
        }
    }
    Ok(None)
}

/// A token as a string or as `{"content": ...}`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

/// One id or a list of them.
fn token_ids(file: &str, value: &Value) -> Result<Vec<u32>, PromptError> {
    let values = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(values) => values.clone(),
        one => vec![one.clone()],
    };
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids: Option<Vec<u32>> = values.iter().map(id).collect();
    ids.ok_or_else(|| {
        PromptError(format!("{file}: eos_token_id {value} is not a token id or a list of them"))
    })
}

fn defaults(generation: &Value) -> Defaults {
    // Values out of range are ignored: they are recommendations, and requests are checked on their own.
    let number = |name: &str, valid: fn(f64) -> bool| {
        generation[name].as_f64().filter(|value| valid(*value)).map(|value| value as f32)
    };
    Defaults {
        temperature: number("temperature", |value| (0.0..=2.0).contains(&value)),
        top_p: number("top_p", |value| value > 0.0 && value <= 1.0),
        top_k: generation["top_k"].as_u64().and_then(|value| u32::try_from(value).ok()),
        min_p: number("min_p", |value| (0.0..=1.0).contains(&value)),
        repetition_penalty: number("repetition_penalty", |value| value > 0.0 && value <= 10.0),
    }
}
