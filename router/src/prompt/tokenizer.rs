//! `tokenizer.json` through the tokenizers crate, and the bytes of each of its tokens.
//!
//! The crate panics on some damaged files and was never meant for hostile ones, so it runs behind
//! `catch_unwind`. Its decoders work on whole sequences; ours needs bytes per token (see `stream`), which follow
//! from the two decoders that every supported family uses: byte-level (GPT-2's alphabet of printable stand-ins
//! for bytes) and SentencePiece with byte fallback. Anything else is refused by name.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use serde_json::Value;
use tokenizers::Tokenizer;

use super::PromptError;
use crate::stream::Vocabulary;

/// Largest `tokenizer.json` read, in bytes; those of 250 000-token vocabularies have about 35 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// Text to tokens.
#[derive(Debug)]
pub(super) enum Encoder {
    /// Tokens are bytes.
    Bytes,
    /// As the file says, for a model of so many tokens.
    File(Box<Tokenizer>, usize),
}

impl Encoder {
    pub(super) fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, PromptError> {
        let (tokenizer, vocab) = match self {
            Encoder::Bytes => return Ok(text.bytes().map(u32::from).collect()),
            Encoder::File(tokenizer, vocab) => (tokenizer, *vocab),
        };
        let encoding = guarded("tokenizing", || tokenizer.encode_fast(text, add_special))?;
        let encoding =
            encoding.map_err(|error| PromptError(format!("the text cannot be tokenized: {error}")))?;
        // What is put around a text has ids of its own in the file, which no vocabulary vouches for.
        if let Some(id) = encoding.get_ids().iter().find(|id| **id as usize >= vocab) {
            return Err(PromptError(format!(
                "tokenizer.json adds token {id}, but the model's vocabulary has {vocab}; the files do not belong together"
            )));
        }
        Ok(encoding.get_ids().to_vec())
    }

    pub(super) fn token_id(&self, token: &str) -> Option<u32> {
        match self {
            Encoder::Bytes => None,
            Encoder::File(tokenizer, _) => tokenizer.token_to_id(token),
        }
    }
}

/// Turns a panic of the tokenizers crate into an error.
fn guarded<T>(what: &str, work: impl FnOnce() -> T) -> Result<T, PromptError> {
    catch_unwind(AssertUnwindSafe(work))
        .map_err(|_| PromptError(format!("{what}: the tokenizers crate panicked; tokenizer.json is damaged")))
}

/// Reads `tokenizer.json` for a model of `vocab` tokens.
pub(super) fn open(directory: &Path, vocab: usize) -> Result<(Encoder, Vocabulary), PromptError> {
    let path = directory.join("tokenizer.json");
    let failed = |error: &dyn std::fmt::Display| PromptError(format!("{}: {error}", path.display()));
    let size = std::fs::metadata(&path)
        .map_err(|error| failed(&format!("{error}; the model's directory needs this file")))?
        .len();
    if size > TOKENIZER_BYTES_MAX {
        return Err(failed(&format!("{size} bytes; at most {TOKENIZER_BYTES_MAX} are read")));
    }
    let bytes = std::fs::read(&path).map_err(|error| failed(&error))?;
    let mut tokenizer = guarded("loading tokenizer.json", || Tokenizer::from_bytes(&bytes))?
        .map_err(|error| failed(&format!("{error}; download the file again")))?;
    // As transformers: what the file says about padding and truncation is for training.
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|error| failed(&error))?;
    let decoder: Value = serde_json::from_slice::<Value>(&bytes)
        .map(|file| file["decoder"].clone())
        .map_err(|error| failed(&error))?;
    let decoding = Decoding::of(&decoder).map_err(|error| failed(&error))?;
    let vocabulary = guarded("reading the vocabulary", || vocabulary(&tokenizer, &decoding, vocab))?
        .map_err(|error| failed(&error))?;
    Ok((Encoder::File(Box::new(tokenizer), vocab), vocabulary))
}

/// How tokens spell bytes.
#[derive(Debug, PartialEq)]
enum Decoding {
    /// Each character stands for a byte.
    ByteLevel,
    /// U+2581 is a space, `<0x0A>` a byte; a decoded text may lose its leading space.
    SentencePiece { leading_space: bool },
}

impl Decoding {
    fn of(decoder: &Value) -> Result<Decoding, String> {
        let parts = match decoder["decoders"].as_array() {
            Some(parts) => parts.clone(),
            None => vec![decoder.clone()],
        };
        let mut byte_level = false;
        let mut leading_space = false;
        for part in &parts {
            match part["type"].as_str().unwrap_or("none") {
                "ByteLevel" => byte_level = true,
                "Fuse" | "ByteFallback" => {}
                "Replace" if part["pattern"]["String"] == "\u{2581}" && part["content"] == " " => {}
                "Strip" if part["content"] == " " && part["stop"] == 0 => leading_space = part["start"] == 1,
                "Metaspace" if part["replacement"] == "\u{2581}" => {
                    leading_space = part["prepend_scheme"] != "never";
                }
                other => {
                    return Err(format!(
                        "decoder {other} is not supported; byte-level and SentencePiece ones are"
                    ));
                }
            }
        }
        Ok(if byte_level { Decoding::ByteLevel } else { Decoding::SentencePiece { leading_space } })
    }

    fn bytes(&self, token: &str) -> Vec<u8> {
        match self {
            Decoding::ByteLevel => {
                let bytes: Option<Vec<u8>> = token.chars().map(byte_of).collect();
                bytes.unwrap_or_else(|| token.as_bytes().to_vec())
            }
            Decoding::SentencePiece { .. } => {
                let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                match digits.filter(|digits| digits.len() == 2).map(|digits| u8::from_str_radix(digits, 16)) {
                    Some(Ok(byte)) => vec![byte],
                    _ => token.replace('\u{2581}', " ").into_bytes(),
                }
            }
        }
    }
}

/// The byte a character of the byte-level alphabet stands for: printable Latin-1 characters are themselves, the
/// 68 other bytes are U+0100 and following in order (GPT-2's `bytes_to_unicode`).
fn byte_of(character: char) -> Option<u8> {
    let is_itself = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    let code = u32::from(character);
    match u8::try_from(code) {
        Ok(byte) => Some(byte).filter(is_itself),
        Err(_) => (0..=255u8).filter(|byte| !is_itself(byte)).nth((code - 0x100) as usize),
    }
}

fn vocabulary(tokenizer: &Tokenizer, decoding: &Decoding, vocab: usize) -> Result<Vocabulary, String> {
    let names = tokenizer.get_vocab(true);
    if let Some((token, id)) =
        names.iter().max_by_key(|(_, id)| **id).filter(|(_, id)| **id as usize >= vocab)
    {
        return Err(format!(
            "token {token:?} has id {id}, but the model's vocabulary has {vocab}; the files do not belong together"
        ));
    }
    let added = tokenizer.get_added_vocabulary();
    let highest = names.values().copied().max().map_or(0, |id| id as usize + 1);
    let mut tokens = vec![("\u{fffd}".as_bytes().to_vec(), false); highest];
    for (token, id) in &names {
        tokens[*id as usize] = (decoding.bytes(token), added.is_special_token(token));
    }
    let leading_space = matches!(decoding, Decoding::SentencePiece { leading_space: true });
    Ok(Vocabulary::new(tokens, leading_space))
}
