//! Chat templates, tokenizers and the small files beside them: written by whoever published the model.

use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use router::prompt::{Chat, ChatTemplate, Limits, Prompt, SpecialTokens};
use router::stream::Detokenizer;
use serde_json::{Map, Value, json};

use super::files::{folder, put};
use super::{Verdict, says_why};

/// Tokens of the model that all these tokenizers are for.
pub(super) const VOCAB: usize = 300;

/// Most that a template may render, bytes: four times the largest request body.
const RENDERED_BYTES_MAX: usize = 8 << 20;

/// Texts that are tokenized: nothing, words, numbers, several scripts, odd white space, control characters, a long run.
const TEXTS: [&str; 6] = [
    "",
    "Once upon a time, 12345 little\r\n\tfoxes <|im_end|> [UNK] </s> ran.",
    "h\u{e9}llo \u{1f600}\u{200d}\u{1f525} \u{4f60}\u{597d} \u{5e2}\u{5d1} a\u{301}\u{301} \u{2581}\u{2581} \u{fb01}",
    "\u{0}\u{1b}[31m\u{7f}\u{feff}\u{fffd}\u{10ffff}",
    "                                                                     x",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab",
];

/// The files beside `tokenizer.json`, in the order in which the bytes give them, with a zero byte between.
pub(super) const FILES: [&str; 5] = [
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.json",
    "special_tokens_map.json",
    "config.json",
];

fn special() -> SpecialTokens {
    let mut tokens = Map::new();
    tokens.insert("bos_token".into(), "<s>".into());
    tokens.insert("eos_token".into(), "<|im_end|>".into());
    SpecialTokens(tokens)
}

fn chats() -> [Chat; 2] {
    let message = |role: &str, content: &str| json!({"role": role, "content": content});
    let thought = json!({"role": "assistant", "content": "4", "reasoning_content": "2 and 2", "name": null});
    let long = vec![
        message("system", "Be brief. \u{1b}{{ messages }}"),
        message("user", "2 + 2?\n"),
        thought,
        message("user", "<|im_end|> and\u{a0}3?"),
    ];
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": {"a": [1, 2.5, true]}}}]);
    let variables =
        Map::from_iter([("enable_thinking".to_owned(), Value::Bool(false)), ("tools".into(), tools)]);
    let now = UNIX_EPOCH + Duration::from_secs(1_800_000_000);
    [
        Chat { now, ..Chat::new(vec![message("user", "Hi")]) },
        Chat { now, variables, add_generation_prompt: false, ..Chat::new(long) },
    ]
}

/// What a template may take here: a fortieth of a request's, because sanitizers make everything ten times as slow.
const LIMITS: Limits = Limits { instructions: 50_000, output_bytes: 200_000 };

/// The source of a chat template.
pub(super) fn template(bytes: &[u8]) -> Verdict {
    let Ok(source) = std::str::from_utf8(bytes) else { return Verdict::Refused };
    let template = match ChatTemplate::within(source, LIMITS) {
        Ok(template) => template,
        Err(error) => return says_why(&error),
    };
    assert_eq!(template.source(), source);
    let mut verdict = Verdict::Taken;
    for chat in chats() {
        match template.render(&chat, &special()) {
            Ok(text) => assert!(text.len() <= LIMITS.output_bytes, "{} bytes were rendered", text.len()),
            Err(error) => verdict = says_why(&error),
        }
    }
    verdict
}

/// A `tokenizer.json`.
pub(super) fn tokenizer(bytes: &[u8]) -> Verdict {
    let folder = folder("tokenizer");
    put(&folder, "tokenizer.json", bytes);
    opened(&folder)
}

/// The files beside a tokenizer that is right.
pub(super) fn prompt_files(bytes: &[u8]) -> Verdict {
    let folder = folder("prompt");
    if !folder.join("tokenizer.json").exists() {
        put(&folder, "tokenizer.json", &byte_tokenizer());
    }
    let mut parts = bytes.split(|byte| *byte == 0);
    for name in FILES {
        match parts.next().unwrap_or_default() {
            // An error means that it was not there.
            [] => drop(std::fs::remove_file(folder.join(name))),
            content => put(&folder, name, content),
        }
    }
    opened(&folder)
}

/// A byte-level tokenizer with a few special tokens.
pub(super) fn byte_tokenizer() -> Vec<u8> {
    let path = crate::fixtures().join("qwen3_moe/tokenizer.json");
    std::fs::read(path).expect("the fixture is there")
}

fn opened(folder: &Path) -> Verdict {
    let prompt = match Prompt::open(folder, VOCAB) {
        Ok(prompt) => prompt,
        Err(error) => {
            assert!(error.0.contains(".json") || error.0.contains("template"), "which file? {error}");
            return says_why(&error);
        }
    };
    let vocabulary = prompt.vocabulary();
    assert!(vocabulary.len() <= VOCAB, "{} tokens", vocabulary.len());
    assert!(prompt.stop_tokens().is_sorted());
    assert!(prompt.stop_tokens().iter().all(|token| (*token as usize) < VOCAB));
    let defaults = prompt.defaults();
    assert!(defaults.temperature.is_none_or(|value| (0.0..=2.0).contains(&value)), "{defaults:?}");
    assert!(defaults.top_p.is_none_or(|value| value > 0.0 && value <= 1.0), "{defaults:?}");
    assert!(defaults.repetition_penalty.is_none_or(|value| value > 0.0 && value <= 10.0), "{defaults:?}");
    for warning in prompt.warnings() {
        says_why(warning);
    }
    let mut verdict = Verdict::Taken;
    for (text, add_special) in TEXTS.into_iter().flat_map(|text| [(text, false), (text, true)]) {
        match prompt.encode(text, add_special) {
            Ok(tokens) => reads_as_streamed(&prompt, &tokens),
            Err(error) => verdict = says_why(&error),
        }
    }
    let all: Vec<u32> = (0..VOCAB as u32 + 2).collect();
    reads_as_streamed(&prompt, &all[..VOCAB]);
    drop(prompt.decode(&all, true));
    for chat in chats() {
        match prompt.render(&chat) {
            Ok(text) => assert!(text.len() <= RENDERED_BYTES_MAX),
            Err(error) => verdict = says_why(&error),
        }
    }
    verdict
}

/// All tokens are the model's, and the pieces of a stream add up to the whole (which may lose a space in front).
fn reads_as_streamed(prompt: &Prompt, tokens: &[u32]) {
    let beyond = tokens.iter().find(|token| **token as usize >= VOCAB);
    assert_eq!(beyond, None, "a token that the model does not have");
    for skip_special in [false, true] {
        let mut detokenizer = Detokenizer::new(prompt.vocabulary().clone(), skip_special);
        let mut streamed: String = tokens.iter().map(|token| detokenizer.push(*token)).collect();
        streamed.push_str(&detokenizer.finish());
        let whole = prompt.decode(tokens, skip_special);
        assert!(
            whole == streamed || streamed.strip_prefix(' ') == Some(whole.as_str()),
            "{whole:?} was {streamed:?}"
        );
    }
}
