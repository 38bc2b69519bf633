//! A tokenizer for models that have no language: bytes, three special tokens, and made-up words for the rest.
//!
//! Text is encoded byte by byte (a byte-level BPE without merges), so every text can be a prompt. A random model
//! answers with any id of its vocabulary; ids beyond the bytes decode to words of three syllables, so that answers
//! can be seen and told apart.

use serde_json::{Map, Value, json};

/// Ends a text.
const END_OF_TEXT: &str = "<|endoftext|>";
/// Starts a message.
const MESSAGE_START: &str = "<|im_start|>";
/// Ends a message.
const MESSAGE_END: &str = "<|im_end|>";
/// First id after the bytes.
const FIRST_SPECIAL: usize = 256;
/// Id that ends an answer.
pub(super) const MESSAGE_END_ID: usize = FIRST_SPECIAL + 2;
/// Id that ends a text.
pub(super) const END_OF_TEXT_ID: usize = FIRST_SPECIAL;

/// The chat template: one block per message.
pub(super) const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

/// `tokenizer.json` for a vocabulary of `vocab` ids (at least 259).
pub(super) fn tokenizer(vocab: usize) -> Value {
    let specials = [END_OF_TEXT, MESSAGE_START, MESSAGE_END];
    let added: Vec<Value> = specials
        .iter()
        .enumerate()
        .map(|(index, content)| {
            json!({"id": FIRST_SPECIAL + index, "content": content, "single_word": false, "lstrip": false,
                   "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let mut ids: Map<String, Value> =
        byte_characters().into_iter().map(String::from).zip((0..).map(Value::from)).collect();
    for (index, content) in specials.iter().enumerate() {
        ids.insert((*content).to_string(), (FIRST_SPECIAL + index).into());
    }
    for id in FIRST_SPECIAL + specials.len()..vocab {
        ids.insert(word(id), id.into());
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
                  "vocab": ids, "merges": []}
    })
}

/// `tokenizer_config.json`.
pub(super) fn tokenizer_config(context: usize) -> Value {
    json!({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": MESSAGE_END, "pad_token": END_OF_TEXT,
           "clean_up_tokenization_spaces": false, "model_max_length": context})
}

/// The characters that stand for the bytes 0 to 255 (GPT-2's `bytes_to_unicode`).
fn byte_characters() -> Vec<char> {
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256..;
    (0..256u32)
        .filter_map(|byte| if printable(byte) { Some(byte) } else { others.next() })
        .filter_map(char::from_u32)
        .collect()
}

/// A space (as byte-level tokenizers write it) and three syllables, different for every id below a million.
fn word(id: usize) -> String {
    const CONSONANTS: &[u8; 20] = b"bcdfghjklmnpqrstvwxz";
    const VOWELS: &[u8; 5] = b"aeiou";
    let syllable = |digit: usize| [CONSONANTS[digit / 5] as char, VOWELS[digit % 5] as char];
    let digits = [id / 10_000 % 100, id / 100 % 100, id % 100];
    std::iter::once('\u{120}').chain(digits.into_iter().flat_map(syllable)).collect()
}
