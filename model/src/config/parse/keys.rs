//! The keys of a `config.json` while they are being understood.
//!
//! Every access takes its key out; what is left at the end is either known not to matter, null, or refused.

use std::ops::RangeInclusive;

use serde_json::{Map, Value};

use crate::json::shown;

/// Why a `config.json` was refused; names the key, what was found and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("config.json: {}", shown(.0))]
pub struct ConfigError(pub String);

/// Keys that change nothing in inference: training, dropout, caches, ids, labels, versions, output options and
/// the generation defaults that old configs carry (`generation_config.json` rules).
const IRRELEVANT: &[&str] = &[
    // Training.
    "attention_dropout",
    "hidden_dropout",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "classifier_dropout",
    "initializer_range",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "router_z_loss_coef",
    "gradient_checkpointing",
    "pruned_heads",
    "ep_size",
    "seed",
    // Caches, types of weights on disk (read from the files), tokens, names, versions.
    "use_cache",
    "keys_to_ignore_at_inference",
    "dtype",
    "torch_dtype",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "sep_token_id",
    "decoder_start_token_id",
    "tokenizer_class",
    "prefix",
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "transformers_version",
    "unsloth_version",
    "unsloth_fixed",
    "attn_implementation",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "experts_implementation",
    "pretraining_tp",
    "torchscript",
    "is_decoder",
    "transformers_weights",
    "use_bfloat16",
    "tf_legacy_loss",
    "cross_attention_hidden_size",
    // What is returned.
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "output_scores",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "num_labels",
    "problem_type",
    "finetuning_task",
    "task_specific_params",
    "return_dict_in_generate",
    "tie_encoder_decoder",
    // Generation.
    "max_length",
    "min_length",
    "do_sample",
    "early_stopping",
    "num_beams",
    "num_beam_groups",
    "diversity_penalty",
    "temperature",
    "top_k",
    "top_p",
    "typical_p",
    "repetition_penalty",
    "length_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "num_return_sequences",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
];

/// What is left of the document, and for whom it is read.
pub(super) struct Keys {
    pub(super) family: &'static str,
    left: Map<String, Value>,
}

impl Keys {
    pub(super) fn new(left: Map<String, Value>) -> Keys {
        Keys { family: "this model", left }
    }

    /// The value of `name`, once; null is as good as absent.
    pub(super) fn take(&mut self, name: &str) -> Option<Value> {
        self.left.shift_remove(name).filter(|value| !value.is_null())
    }

    pub(super) fn is_present(&self, name: &str) -> bool {
        self.left.contains_key(name)
    }

    /// Whether `name` is there and null.
    pub(super) fn is_null(&self, name: &str) -> bool {
        self.left.get(name).is_some_and(Value::is_null)
    }

    pub(super) fn size(
        &mut self,
        name: &str,
        default: usize,
        range: RangeInclusive<usize>,
    ) -> Result<usize, ConfigError> {
        let found = self.optional_size(name, range.clone())?;
        if found.is_none() && !range.contains(&default) {
            return Err(ConfigError(format!("{name} is missing")));
        }
        Ok(found.unwrap_or(default))
    }

    pub(super) fn optional_size(
        &mut self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, ConfigError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        let size = value.as_u64().and_then(|size| usize::try_from(size).ok());
        match size.filter(|size| range.contains(size)) {
            Some(size) => Ok(Some(size)),
            None => {
                let (low, high) = range.into_inner();
                let shown = shorten(&value);
                Err(ConfigError(format!(
                    "{name} = {shown} is out of range, it must be a whole number from {low} to {high}"
                )))
            }
        }
    }

    pub(super) fn number(&mut self, name: &str, default: f64) -> Result<f64, ConfigError> {
        Ok(self.optional_number(name)?.unwrap_or(default))
    }

    pub(super) fn optional_number(&mut self, name: &str) -> Result<Option<f64>, ConfigError> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => Err(ConfigError(format!("{name} = {} must be a number", shorten(&value)))),
        }
    }

    pub(super) fn flag(&mut self, name: &str, default: bool) -> Result<bool, ConfigError> {
        match self.take(name) {
            None => Ok(default),
            Some(Value::Bool(flag)) => Ok(flag),
            Some(value) => Err(ConfigError(format!("{name} = {} must be true or false", shorten(&value)))),
        }
    }

    pub(super) fn text(&mut self, name: &str) -> Result<Option<String>, ConfigError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(value) => Err(ConfigError(format!("{name} = {} must be a string", shorten(&value)))),
        }
    }

    pub(super) fn object(&mut self, name: &str) -> Result<Option<Map<String, Value>>, ConfigError> {
        match self.take(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok((!map.is_empty()).then_some(map)),
            Some(value) => Err(ConfigError(format!("{name} = {} must be an object", shorten(&value)))),
        }
    }

    /// The one of several spellings that is there (the first where none is). Two that disagree are refused.
    pub(super) fn alias<'n>(&mut self, names: &[&'n str]) -> Result<&'n str, ConfigError> {
        let present: Vec<&str> =
            names.iter().copied().filter(|name| self.left.get(*name).is_some_and(|v| !v.is_null())).collect();
        let Some((first, rest)) = present.split_first() else { return Ok(names[0]) };
        for other in rest {
            if self.left[*first] != self.left[*other] {
                let (a, b) = (shorten(&self.left[*first]), shorten(&self.left[*other]));
                return Err(ConfigError(format!(
                    "{first} = {a} and {other} = {b} mean the same; remove one"
                )));
            }
            self.left.shift_remove(*other);
        }
        Ok(first)
    }

    /// `layer_types`: for each layer, whether its attention slides.
    pub(super) fn layer_types(&mut self, count: usize) -> Result<Option<Vec<bool>>, ConfigError> {
        let Some(value) = self.take("layer_types") else { return Ok(None) };
        let known = |item: &Value| match item.as_str() {
            Some("full_attention") => Some(false),
            Some("sliding_attention") => Some(true),
            _ => None,
        };
        let types: Option<Vec<bool>> = value.as_array().and_then(|list| list.iter().map(known).collect());
        match types.filter(|types| types.len() == count) {
            Some(types) => Ok(Some(types)),
            None => Err(self.refuse(
                "layer_types",
                &value,
                &format!("it must list full_attention or sliding_attention for each of {count} layers"),
            )),
        }
    }

    /// The refusal of a value that is understood and not supported.
    pub(super) fn refuse(&self, name: &str, found: &Value, remedy: &str) -> ConfigError {
        ConfigError(format!("{name} = {} is not supported for {}: {remedy}", shorten(found), self.family))
    }

    /// What nobody asked for.
    pub(super) fn into_left(self) -> Map<String, Value> {
        self.left
    }

    /// Refuses what nobody asked for, unless it is known not to matter or null.
    pub(super) fn finish(mut self) -> Result<(), ConfigError> {
        self.left.retain(|name, value| !value.is_null() && !IRRELEVANT.contains(&name.as_str()));
        match self.left.iter().next() {
            None => Ok(()),
            Some((name, value)) => Err(ConfigError(format!(
                "{} = {} is not known for {}, and it may change what the model computes; \
                 if it does not matter for inference, remove it from config.json",
                name.escape_debug(),
                shorten(value),
                self.family
            ))),
        }
    }
}

/// A value as messages show it: at most 60 characters on one line.
pub(super) fn shorten(value: &Value) -> String {
    const SHOWN: usize = 60;
    let text = value.to_string();
    if text.chars().count() <= SHOWN { text } else { text.chars().take(SHOWN).chain("...".chars()).collect() }
}
