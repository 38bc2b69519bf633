//! Text to tokens: tokenizer and chat template.
//!
//! Problem: a model understands only the tokens and the chat format it was trained with, and both come as files
//! written by others. Idea: [`Prompt`] opens what lies in the model's directory (`tokenizer.json`,
//! `tokenizer_config.json`, `chat_template.jinja`, `generation_config.json`) once, at start-up, and afterwards
//! only converts. A synthetic model has no files: its tokens 0..256 are bytes. Price: tokenizing is CPU work;
//! callers on async threads hand it to a blocking one.
//!
//! It refuses tokenizers whose ids exceed the model's vocabulary and decoders whose tokens have no bytes of
//! their own. Rendered chats and token ids equal those of transformers.

mod files;
mod template;
mod tokenizer;

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use model::json::shown;
use serde_json::{Map, Value};

use crate::stream::Vocabulary;
pub use files::{Defaults, SpecialTokens};
pub use template::{ChatTemplate, Limits, TemplateError};
use tokenizer::Encoder;

/// Why the files of a model cannot be used. Names the file and what to do.
#[derive(Debug, thiserror::Error)]
#[error("{}", shown(.0))]
pub struct PromptError(pub String);

/// A conversation to render.
#[derive(Clone, Debug)]
pub struct Chat {
    /// Message objects with `role` and string `content`.
    pub messages: Vec<Value>,
    /// Whether the answer's header is appended.
    pub add_generation_prompt: bool,
    /// Further variables of the template (`enable_thinking`, ...).
    pub variables: Map<String, Value>,
    /// What `strftime_now` shows, in UTC.
    pub now: SystemTime,
}

impl Chat {
    /// A conversation whose answer is to be generated.
    pub fn new(messages: Vec<Value>) -> Chat {
        Chat { messages, add_generation_prompt: true, variables: Map::new(), now: SystemTime::now() }
    }
}

/// Everything between text and tokens of one model.
#[derive(Debug)]
pub struct Prompt {
    encoder: Encoder,
    vocabulary: Arc<Vocabulary>,
    template: ChatTemplate,
    defaults: Defaults,
    special: SpecialTokens,
    stop_tokens: Vec<u32>,
    warnings: Vec<String>,
}

impl Prompt {
    /// Reads the files in `directory` for a model of `vocab` tokens.
    pub fn open(directory: &Path, vocab: usize) -> Result<Prompt, PromptError> {
        let files = files::read(directory)?;
        let mut warnings = Vec::new();
        let (encoder, vocabulary) = tokenizer::open(directory, vocab)?;
        let source = files.template.unwrap_or_else(|| {
            warnings.push(format!(
                "{}: no chat template; chats are written in ChatML, which the model may not know",
                directory.display()
            ));
            template::CHATML.to_owned()
        });
        let template = ChatTemplate::new(&source)
            .map_err(|error| PromptError(format!("{}: chat template: {error}", directory.display())))?;
        let mut stop_tokens = files.stop_tokens;
        stop_tokens.extend(files.special.eos().and_then(|token| encoder.token_id(token)));
        stop_tokens.sort_unstable();
        stop_tokens.dedup();
        stop_tokens.retain(|token| (*token as usize) < vocab);
        if stop_tokens.is_empty() {
            warnings.push(format!(
                "{}: no end-of-sequence token; answers end at max_tokens",
                directory.display()
            ));
        }
        Ok(Prompt {
            encoder,
            vocabulary: Arc::new(vocabulary),
            template,
            defaults: files.defaults,
            special: files.special,
            stop_tokens,
            warnings,
        })
    }

    /// For a synthetic model of `vocab` tokens: tokens 0..256 are bytes, the others read as U+FFFD, chats are
    /// ChatML, nothing ends a sequence.
    pub fn bytes(vocab: usize) -> Result<Prompt, PromptError> {
        if vocab < 256 {
            let message = format!("a byte vocabulary needs 256 tokens, the model has {vocab}");
            return Err(PromptError(message));
        }
        let template = ChatTemplate::new(template::CHATML).map_err(|error| PromptError(error.to_string()))?;
        let tokens = (0..=255u8).map(|byte| (vec![byte], false));
        Ok(Prompt {
            encoder: Encoder::Bytes,
            vocabulary: Arc::new(Vocabulary::new(tokens, false)),
            template,
            defaults: Defaults::default(),
            special: SpecialTokens::default(),
            stop_tokens: Vec::new(),
            warnings: Vec::new(),
        })
    }

    /// Tokens of `text`. `add_special`: with what the tokenizer puts around a text (a beginning-of-sequence
    /// token, usually); chats have that in their template.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, PromptError> {
        self.encoder.encode(text, add_special)
    }

    /// Text of `tokens`.
    pub fn decode(&self, tokens: &[u32], skip_special: bool) -> String {
        self.vocabulary.decode(tokens, skip_special)
    }

    /// A conversation as the text the model was trained on.
    pub fn render(&self, chat: &Chat) -> Result<String, TemplateError> {
        self.template.render(chat, &self.special)
    }

    /// Bytes of every token, for detokenizers.
    pub fn vocabulary(&self) -> &Arc<Vocabulary> {
        &self.vocabulary
    }

    /// Whether the template knows a word, such as a role.
    pub fn template_mentions(&self, word: &str) -> bool {
        self.template.source().contains(word)
    }

    /// Sampling the model's authors recommend.
    pub fn defaults(&self) -> &Defaults {
        &self.defaults
    }

    /// Tokens that end a sequence, ascending.
    pub fn stop_tokens(&self) -> &[u32] {
        &self.stop_tokens
    }

    /// Things the operator should know.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

#[cfg(test)]
mod tests;
