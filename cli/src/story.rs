//! One prompt and its continuation, through a cluster or in one process: what `demo`, `run` and `reference`
//! share.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::Args;
use model::reference::{Reference, Want};
use router::prompt::Chat;
use router::request::Sampling;
use router::sampler::{Sampler, Scratch};
use router::serve::open_prompt;
use router::stream::Detokenizer;
use serde_json::{Value, json};

use crate::model_options::ModelOptions;

/// Opening of the story that `demo` tells.
const OPENING: &str = "Once upon a time there was a poor woodcutter who lived with his wife";

/// What to generate.
#[derive(Args, Clone, Debug)]
pub(crate) struct StoryOptions {
    /// Text to continue
    #[arg(long, default_value = OPENING)]
    pub(crate) prompt: String,
    /// Treat the prompt as a chat message, through the model's chat template
    #[arg(long)]
    pub(crate) chat: bool,
    /// Tokens to generate at most
    #[arg(long, default_value_t = 160)]
    pub(crate) max_tokens: u32,
    /// 0 always takes the most probable token; higher is more varied
    #[arg(long, default_value_t = 0.0, value_parser = temperature)]
    pub(crate) temperature: f32,
    /// Keep the most probable tokens that together reach this probability
    #[arg(long, default_value_t = 1.0, value_parser = probability)]
    pub(crate) top_p: f32,
    /// Keep this many most probable tokens (0: all)
    #[arg(long, default_value_t = 0)]
    pub(crate) top_k: u32,
    /// Seed of the draws
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// Go on past the end-of-text token
    #[arg(long)]
    pub(crate) ignore_eos: bool,
}

fn temperature(text: &str) -> Result<f32, String> {
    in_range(text, 0.0, 2.0)
}

fn probability(text: &str) -> Result<f32, String> {
    in_range(text, f32::MIN_POSITIVE, 1.0)
}

fn in_range(text: &str, low: f32, high: f32) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| format!("'{text}' is not a number"))?;
    if (low..=high).contains(&value) {
        Ok(value)
    } else {
        Err(format!("{value} is not between {low} and {high}"))
    }
}

/// A continuation and what it took.
#[derive(Clone, Debug, Default)]
pub(crate) struct Story {
    pub(crate) text: String,
    pub(crate) token_ids: Vec<u32>,
    /// BLAKE3 over the raw logits every token was chosen from.
    pub(crate) logits_digest: Option<String>,
    pub(crate) ttft: Duration,
    /// First token to last.
    pub(crate) decode: Duration,
    pub(crate) wire_bytes: u64,
}

impl Story {
    /// Tokens per second after the first.
    pub(crate) fn decode_tok_s(&self) -> f64 {
        let seconds = self.decode.as_secs_f64();
        if seconds == 0.0 { 0.0 } else { self.token_ids.len().saturating_sub(1) as f64 / seconds }
    }

    pub(crate) fn wire_bytes_per_token(&self) -> u64 {
        self.wire_bytes / self.token_ids.len().max(1) as u64
    }
}

impl StoryOptions {
    /// The API path and body that ask a router for this story, streamed.
    pub(crate) fn request(&self) -> (&'static str, Value) {
        let mut body = json!({
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "seed": self.seed,
            "ignore_eos": self.ignore_eos,
            "stream": true,
            "stream_options": {"include_usage": true},
            "logits_digest": true,
            "return_token_ids": true,
        });
        if self.chat {
            body["messages"] = json!([{"role": "user", "content": self.prompt}]);
            ("/v1/chat/completions", body)
        } else {
            body["prompt"] = json!(self.prompt);
            ("/v1/completions", body)
        }
    }

    fn sampling(&self) -> Sampling {
        Sampling {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            seed: self.seed,
            ..Sampling::default()
        }
    }
}

/// The text in one streamed chunk of either endpoint.
pub(crate) fn delta(chunk: &Value) -> Option<&str> {
    let choice = chunk.pointer("/choices/0")?;
    choice["text"].as_str().or_else(|| choice.pointer("/delta/content").and_then(Value::as_str))
}

/// Tells the story in this process, without a mesh.
pub(crate) fn reference(
    model_options: &ModelOptions,
    options: &StoryOptions,
    mut on_text: impl FnMut(&str) -> anyhow::Result<()>,
) -> anyhow::Result<Story> {
    let model = model_options.open()?;
    let (kernels, native) = model_options.load_kernels(&model)?;
    let prompts = open_prompt(&model)?;
    let prompt = if options.chat {
        let chat = Chat::new(vec![json!({"role": "user", "content": options.prompt})]);
        prompts.encode(&prompts.render(&chat)?, false)?
    } else {
        prompts.encode(&options.prompt, true)?
    };
    let stop_tokens = if options.ignore_eos { Vec::new() } else { prompts.stop_tokens().to_vec() };
    let capacity = prompt.len() + options.max_tokens as usize;
    let mut reference = Reference::load(model, kernels, native, capacity)?;
    reference.preload()?;
    let mut sampler = Sampler::new(options.sampling(), &prompt, &stop_tokens, 0);
    let (mut scratch, mut digest) = (Scratch::default(), blake3::Hasher::new());
    let mut detokenizer = Detokenizer::new(Arc::clone(prompts.vocabulary()), true);
    let mut story = Story::default();
    let (started, mut first, mut last) = (Instant::now(), None, Instant::now());
    let mut next = prompt;
    while story.token_ids.len() < options.max_tokens as usize {
        let logits = reference.feed(&next, Want::Last).context("run the model")?;
        for logit in logits {
            digest.update(&logit.to_le_bytes());
        }
        let id = sampler.choose(logits, &mut scratch)?;
        if stop_tokens.contains(&id) {
            break;
        }
        last = Instant::now();
        first.get_or_insert(last);
        story.token_ids.push(id);
        let text = detokenizer.push(id);
        on_text(&text)?;
        story.text.push_str(&text);
        next = vec![id];
    }
    let rest = detokenizer.finish();
    on_text(&rest)?;
    story.text.push_str(&rest);
    story.ttft = first.map_or(Duration::ZERO, |first| first - started);
    story.decode = first.map_or(Duration::ZERO, |first| last - first);
    story.logits_digest = Some(digest.finalize().to_hex().to_string());
    Ok(story)
}
