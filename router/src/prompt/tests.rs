//! Templates and tokens against transformers, and damaged files.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use serde_json::{Value, json};

use super::*;
use crate::stream::Detokenizer;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn tale() -> Prompt {
    Prompt::open(&root().join("models/tale-moe"), 4096).unwrap()
}

fn render(template: &str, chat: &Chat) -> Result<String, TemplateError> {
    ChatTemplate::new(template)?.render(chat, &SpecialTokens::default())
}

fn user(content: &str) -> Vec<Value> {
    vec![json!({"role": "user", "content": content})]
}

/// Files of `tests/fixtures/templates`, rendered by transformers (`tests/oracle/templates.py`).
#[test]
fn templates_render_as_transformers_renders_them() {
    let directory = root().join("tests/fixtures/templates");
    let mut cases = 0;
    let mut failures = String::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let case: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let mut variables = case["kwargs"].as_object().unwrap().clone();
        let add_generation_prompt = variables.remove("add_generation_prompt").unwrap() == true;
        if !case["tools"].is_null() {
            variables.insert("tools".into(), case["tools"].clone());
        }
        let messages = case["messages"].as_array().unwrap().clone();
        let chat = Chat { add_generation_prompt, variables, ..Chat::new(messages) };
        let rendered = render(case["template"].as_str().unwrap(), &chat);
        match case.get("error") {
            Some(error) => {
                let refused = rendered.unwrap_err().to_string();
                assert!(refused.starts_with(error.as_str().unwrap()), "{}: {refused}", path.display());
            }
            None => {
                let rendered = rendered.unwrap_or_else(|error| error.to_string());
                if case["rendered"] != rendered {
                    failures += &format!("{}\n{rendered:?}\n{}\n", path.display(), case["rendered"]);
                }
            }
        }
        cases += 1;
    }
    assert!(failures.is_empty(), "ours, then transformers':\n{failures}");
    assert!(cases >= 36, "only {cases} cases");
}

#[test]
fn a_real_tokenizer_opens_and_round_trips() {
    let prompt = tale();
    assert_eq!(prompt.stop_tokens(), [4093, 4095]);
    assert_eq!(prompt.defaults().temperature, Some(0.8));
    assert_eq!(prompt.defaults().top_p, Some(0.95));
    assert!(prompt.warnings().is_empty());
    let chat = Chat::new(user("Once upon a time"));
    let text = prompt.render(&chat).unwrap();
    assert_eq!(text, "<|im_start|>user\nOnce upon a time<|im_end|>\n<|im_start|>assistant\n");
    let tokens = prompt.encode(&text, false).unwrap();
    assert_eq!(tokens[0], 4094);
    assert_eq!(prompt.decode(&tokens, false), text);
    assert_eq!(prompt.decode(&tokens, true), "user\nOnce upon a time\nassistant\n");
    let odd = "héllo\t 😀  «x»\r\n\u{1}\u{fffd}";
    assert_eq!(prompt.decode(&prompt.encode(odd, true).unwrap(), false), odd);
}

/// `tests/fixtures/tale-moe/tokenizer-cases.json`: ids and texts of the tokenizers library.
#[test]
fn token_ids_and_streams_equal_those_of_the_tokenizers_library() {
    let path = root().join("tests/fixtures/tale-moe/tokenizer-cases.json");
    let file: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    let prompt = tale();
    for case in file["cases"].as_array().unwrap() {
        let name = &case["name"];
        let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
        if let Some(text) = case["text"].as_str() {
            assert_eq!(prompt.encode(text, false).unwrap(), ids, "{name}");
        }
        assert_eq!(case["decoded"], prompt.decode(&ids, true), "{name}");
        if let Some(whole) = case["decoded_with_special"].as_str() {
            assert_eq!(prompt.decode(&ids, false), whole, "{name}");
        }
        let mut detokenizer = Detokenizer::new(prompt.vocabulary().clone(), true);
        let pieces: Vec<String> = ids.iter().map(|id| detokenizer.push(*id)).collect();
        if case["text"].is_string() {
            let expected: Vec<String> = serde_json::from_value(case["stream"].clone()).unwrap();
            assert_eq!(pieces, expected, "{name}");
        }
        assert_eq!(prompt.decode(&ids, true), pieces.concat() + &detokenizer.finish(), "{name}");
    }
}

#[test]
fn every_token_decodes_as_the_tokenizers_crate_decodes_it() {
    let tokenizer = tokenizers::Tokenizer::from_file(root().join("models/tale-moe/tokenizer.json")).unwrap();
    let prompt = tale();
    for token in 0..4096 {
        assert_eq!(prompt.decode(&[token], false), tokenizer.decode(&[token], false).unwrap(), "{token}");
    }
    let all: Vec<u32> = (0..4096).map(|index| (index * 2654435761u64 % 4096) as u32).collect();
    assert_eq!(prompt.decode(&all, true), tokenizer.decode(&all, true).unwrap());
}

#[test]
fn sentence_piece_decoders_are_understood() {
    let file = json!({
        "version": "1.0", "added_tokens": [
            {"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
             "normalized": false, "special": true}],
        "normalizer": null, "pre_tokenizer": null, "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "vocab": {"<s>": 0, "<0xE2>": 1, "<0x82>": 2, "<0xAC>": 3, "▁a": 4, "b": 5},
            "merges": [], "byte_fallback": true},
    });
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("tokenizer.json"), file.to_string()).unwrap();
    let prompt = Prompt::open(directory.path(), 6).unwrap();
    assert_eq!(prompt.warnings().len(), 2, "no template, no end of sequence");
    let tokenizer = tokenizers::Tokenizer::from_bytes(file.to_string()).unwrap();
    for tokens in [vec![4, 5, 4], vec![0, 4, 1, 2, 3, 5], vec![1, 2, 3], vec![5, 4]] {
        assert_eq!(prompt.decode(&tokens, true), tokenizer.decode(&tokens, true).unwrap(), "{tokens:?}");
    }
    assert_eq!(prompt.vocabulary().piece(4), " a", "a continuation keeps its space");
    let small = Prompt::open(directory.path(), 5).unwrap_err().to_string();
    assert!(small.contains("\"b\" has id 5") && small.contains("do not belong together"), "{small}");
}

#[test]
fn damaged_files_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let open = || Prompt::open(directory.path(), 4096).unwrap_err().to_string();
    assert!(open().contains("tokenizer.json"), "{}", open());
    let good = fs::read(root().join("models/tale-moe/tokenizer.json")).unwrap();
    for cut in [0, 1, 100, good.len() / 2, good.len() - 2] {
        fs::write(directory.path().join("tokenizer.json"), &good[..cut]).unwrap();
        assert!(open().contains("tokenizer.json"), "{}", open());
    }
    let mut wrong: Value = serde_json::from_slice(&good).unwrap();
    wrong["decoder"] = json!({"type": "CTC", "pad_token": "", "word_delimiter_token": "|", "cleanup": true});
    fs::write(directory.path().join("tokenizer.json"), wrong.to_string()).unwrap();
    assert!(open().contains("decoder CTC is not supported"), "{}", open());
    fs::write(directory.path().join("tokenizer.json"), &good).unwrap();
    fs::write(directory.path().join("generation_config.json"), "{").unwrap();
    assert!(open().contains("generation_config.json"), "{}", open());
    fs::write(directory.path().join("generation_config.json"), r#"{"eos_token_id": "end"}"#).unwrap();
    assert!(open().contains("eos_token_id"), "{}", open());
    fs::write(directory.path().join("generation_config.json"), "{}").unwrap();
    fs::write(directory.path().join("chat_template.jinja"), "{% for %}").unwrap();
    assert!(open().contains("chat template"), "{}", open());
    fs::write(directory.path().join("chat_template.jinja"), [0xff, 0xfe]).unwrap();
    assert!(open().contains("chat_template.jinja"), "{}", open());
}

#[test]
fn template_sources_are_taken_in_order() {
    let directory = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(directory.path().join(name), text).unwrap();
    fs::copy(root().join("models/tale-moe/tokenizer.json"), directory.path().join("tokenizer.json")).unwrap();
    let rendered = || {
        let prompt = Prompt::open(directory.path(), 4096).unwrap();
        (prompt.render(&Chat::new(user("x"))).unwrap(), prompt.stop_tokens().to_vec())
    };
    assert_eq!(rendered().0, "<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n");
    write(
        "tokenizer_config.json",
        r#"{"eos_token": {"content": "<|im_end|>"}, "bos_token": "<b>", "chat_template":
            [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ bos_token }}list"}]}"#,
    );
    assert_eq!(rendered(), ("<b>list".into(), vec![4095]));
    write("chat_template.json", r#"{"chat_template": "json {{ eos_token }}"}"#);
    assert_eq!(rendered().0, "json <|im_end|>");
    write("chat_template.jinja", "jinja");
    write("config.json", r#"{"eos_token_id": 7}"#);
    write("generation_config.json", r#"{"eos_token_id": [9, 4095, 5000], "temperature": 9}"#);
    assert_eq!(rendered(), ("jinja".into(), vec![7, 9, 4095]));
    assert_eq!(Prompt::open(directory.path(), 4096).unwrap().defaults().temperature, None);
}

#[test]
fn hostile_templates_are_stopped() {
    let chat = Chat::new(user("x"));
    let long = "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}";
    for template in [
        long,
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ '-' * 10000000000 }}",
        "{% for i in range(1000) %}{{ 'x' * 1000000 }}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ messages.x.y }}",
        "{% for i in range(100000) %}{% set x = ([messages] * 100000)|tojson %}{% endfor %}",
        "{{ ('x' * 100000000)|tojson }}",
        "{{ {'x' * 100000000: 1}|tojson }}",
        "{{ [1]|tojson(separators=('x' * 100000000, ':')) }}{{ [1, 2]|tojson(separators=('x' * 100000000, ':')) }}",
    ] {
        let error = render(template, &chat).unwrap_err().to_string();
        assert!(!error.is_empty() && error.len() < 500, "{template}: {error}");
    }
    for tag in ["{%}", "{%%}", "{%", "{%-%}", "{% generation %}{%}", "\u{e9}{%}"] {
        let error = render(tag, &chat).unwrap_err().to_string();
        assert!(!error.contains("thread"), "{tag}: {error}");
    }
    assert!(ChatTemplate::new(&"(".repeat(200_000)).is_ok(), "text");
    assert!(ChatTemplate::new(&format!("{{{{ {} }}}}", "(".repeat(200_000))).is_err());
    let many: Vec<Value> = (0..4096).map(|_| user("x")[0].clone()).collect();
    let accumulating = "{% set ns = namespace(all=[]) %}{% for m in messages %}{% set ns.all = ns.all + [m] %}\
        {% endfor %}{{ ns.all | length }}";
    assert_eq!(render(accumulating, &Chat::new(many)).unwrap(), "4096");
    assert!(render("x", &Chat::new(vec![])).is_err());
}

#[test]
fn times_are_those_of_python() {
    let now = UNIX_EPOCH + Duration::from_secs(1_709_214_305); // 2024-02-29 13:45:05 UTC, a Thursday
    let at = |format: &str| {
        let template = format!("{{{{ strftime_now('{format}') }}}}");
        render(&template, &Chat { now, ..Chat::new(user("x")) })
    };
    assert_eq!(at("%Y-%m-%d %H:%M:%S").unwrap(), "2024-02-29 13:45:05");
    assert_eq!(
        at("%d %b %Y|%B|%A|%a|%j|%y|%I|%p|%-d|%-m|%e|%%").unwrap(),
        "29 Feb 2024|February|Thursday|Thu|060|24|01|PM|29|2|29|%"
    );
    assert!(at("%Q").unwrap_err().to_string().contains("%Q"));
    let old = Chat { now: UNIX_EPOCH, ..Chat::new(user("x")) };
    assert_eq!(render("{{ strftime_now('%F %T %a %j') }}", &old).unwrap(), "1970-01-01 00:00:00 Thu 001");
}

#[test]
fn bytes_are_tokens_of_synthetic_models() {
    let prompt = Prompt::bytes(1000).unwrap();
    let tokens = prompt.encode("é!", true).unwrap();
    assert_eq!(tokens, [0xc3, 0xa9, 0x21]);
    assert_eq!(prompt.decode(&[0xc3, 0xa9, 999], true), "é\u{fffd}");
    assert!(prompt.render(&Chat::new(user("x"))).unwrap().ends_with("assistant\n"));
    assert!(Prompt::bytes(100).is_err());
}
