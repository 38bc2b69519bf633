//! Seeds of what people write: requests, chat templates, tokenizers and the files beside them.

use serde_json::{Value, json};

use super::super::http::PATHS;
use super::super::prompt::{FILES, byte_tokenizer};
use super::Seed;

pub(super) fn seeds() -> Vec<Seed> {
    [requests(), templates(), tokenizers(), prompt_files()].concat()
}

/// Requests, by their path's place in `PATHS`.
fn requests() -> Vec<Seed> {
    [chats(), completions(), others()].concat()
}

fn request(name: &str, path: usize, body: &str) -> Seed {
    Seed::new("http", name, [&[path as u8][..], body.as_bytes()].concat())
}

/// The messages of a chat.
const HI: &str = r#""messages":[{"role":"user","content":"Hi"}]"#;

fn chats() -> Vec<Seed> {
    let seed = |name: &str, body: &str| request(name, 0, body);
    let (open, close) = ("[".repeat(3000), "]".repeat(3000));
    vec![
        seed("chat", &format!("{{{HI}}}")),
        seed(
            "chat-stream",
            &format!(
                r#"{{{HI},"stream":true,"stream_options":{{"include_usage":true}},"logprobs":true,"top_logprobs":3}}"#
            ),
        ),
        seed(
            "chat-parts",
            r#"{"messages":[{"role":"developer","content":[{"type":"text","text":"a"}]},{"role":"user","content":"é"}],"n":3,"max_tokens":4,"stop":["i"]}"#,
        ),
        seed(
            "chat-kwargs",
            &format!(
                r#"{{{HI},"chat_template_kwargs":{{"enable_thinking":false,"eos_token":{{"a":[]}}}},"seed":-1}}"#
            ),
        ),
        seed(
            "chat-image",
            r#"{"messages":[{"role":"user","content":[{"type":"image_url","image_url":{"url":"x"}}]}]}"#,
        ),
        seed("chat-role", r#"{"messages":[{"role":"\u001b","content":null}]}"#),
        seed("chat-tools", &format!(r#"{{{HI},"tools":[{{}}]}}"#)),
        seed(
            "chat-numbers",
            &format!(r#"{{{HI},"temperature":1e308,"max_tokens":18446744073709551616,"top_p":-0.0}}"#),
        ),
        seed("chat-long", &format!(r#"{{"messages":[{{"role":"user","content":"{}"}}]}}"#, "x".repeat(600))),
        seed("chat-lone-surrogate", r#"{"messages":[{"role":"user","content":"\ud800"}]}"#),
        seed("chat-unknown-fields", &format!(r#"{{{HI},"é\u001b":1,"{}":2}}"#, "y".repeat(300))),
        seed("deep", &format!(r#"{{"messages":{open}{close}}}"#)),
    ]
}

fn completions() -> Vec<Seed> {
    let seed = |name: &str, body: &str| request(name, 1, body);
    vec![
        seed("completion", r#"{"prompt":"Once upon a time","max_tokens":9,"temperature":0}"#),
        seed(
            "completion-ids",
            r#"{"prompt":[[72,105],[195,169,255]],"echo":true,"logprobs":2,"n":2,"return_token_ids":true,"stream":true}"#,
        ),
        seed(
            "completion-scored",
            r#"{"prompt":["a","bc"],"max_tokens":0,"echo":true,"logprobs":0,"logits_digest":true}"#,
        ),
        seed(
            "completion-sampled",
            r#"{"prompt":"a","top_k":-1,"min_p":0.5,"repetition_penalty":1.5,"frequency_penalty":-2,"presence_penalty":2,"logit_bias":{"5":-100},"stop_token_ids":[7],"min_tokens":3,"ignore_eos":true,"include_stop_str_in_output":true,"stop":"a"}"#,
        ),
        seed("completion-unknown-token", r#"{"prompt":[400]}"#),
        seed("completion-huge-token", r#"{"prompt":[4294967296]}"#),
        seed("completion-empty", r#"{"prompt":[]}"#),
        seed("completion-many", &format!(r#"{{"prompt":[{}"a"]}}"#, r#""a","#.repeat(128))),
        seed("completion-context", r#"{"prompt":"a","max_tokens":4294967295}"#),
        seed("completion-bias", r#"{"prompt":"a","logit_bias":{"\u001b\"":1}}"#),
        seed("completion-format", r#"{"prompt":"a","response_format":{"type":"json_object"}}"#),
        seed("completion-model", r#"{"model":"é\u0000","prompt":"a"}"#),
        seed(
            "deep-objects",
            &format!(r#"{{"prompt":"a","user":{}1{}}}"#, r#"{"a":"#.repeat(120), "}".repeat(120)),
        ),
        seed("no-object", "[]"),
        seed("no-json", "\u{feff}{"),
    ]
}

fn others() -> Vec<Seed> {
    let (tokenize, detokenize, model) = (2, 3, PATHS.len());
    vec![
        request("tokenize", tokenize, r#"{"prompt":"héllo","with_pieces":true,"return_token_strs":true}"#),
        request("tokenize-chat", tokenize, &format!("{{{HI}}}")),
        request("detokenize", detokenize, r#"{"tokens":[72,105,255]}"#),
        request("detokenize-beyond", detokenize, r#"{"tokens":[400]}"#),
        request("detokenize-wrong", detokenize, r#"{"tokens":"a"}"#),
        request("model", model, "m"),
        request("model-unknown", model, "\u{1b}../m%00"),
        request("nothing", tokenize, ""),
    ]
}

fn templates() -> Vec<Seed> {
    let folder = crate::fixtures().join("templates");
    let files = std::fs::read_dir(folder).expect("the fixtures are there");
    let mut known: Vec<(String, String)> = files
        .map(|file| {
            let path = file.expect("the fixtures are there").path();
            let text = std::fs::read(&path).expect("the fixture is there");
            let case: Value = serde_json::from_slice(&text).expect("the fixture is JSON");
            let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
            (case["template"].as_str().expect("the fixture has a template").to_owned(), name)
        })
        .collect();
    known.sort();
    // Several cases share a template.
    known.dedup_by(|a, b| a.0 == b.0);
    let mut seeds: Vec<Seed> =
        known.into_iter().map(|(source, name)| Seed::new("template", &name, source)).collect();
    let ours = [
        ("nothing", ""),
        (
            "endless",
            "{% if messages|length == 1 %}{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}{% endif %}",
        ),
        ("recursion", "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"),
        ("long", "{% for a in range(100000) %}{{ 'x' * 1000 }}{% endfor %}"),
        ("long-json", "{{ ([messages] * 1000000)|tojson }}"),
        ("json-again", "{% for i in range(9) %}{% set x = ([1] * 100000)|tojson(indent=9) %}{% endfor %}"),
        ("indented-json", "{{ messages|tojson(indent='x' * 1000000) }}"),
        ("separated-json", "{{ ([1] * 1000)|tojson(separators=('x' * 1000000, 'y')) }}"),
        (
            "deep-json",
            "{% set ns = namespace(x=[]) %}{% for i in range(300) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x|tojson }}",
        ),
        (
            "deep-print",
            "{% set ns = namespace(x=[]) %}{% for i in range(20000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
        ),
        ("refuses", "{{ raise_exception('no\u{1b}[2J ' ~ 'x' * 10000) }}"),
        ("unknown-filter", "{{ messages|nofilter }}"),
        ("open", "{% for m in messages %}"),
        ("deep", "{% if 1 %}{{ ((((((((((1)))))))))) }}{% endif %}"),
        ("include", "{% include '/etc/passwd' %}{% import 'x' as y %}"),
        ("times", "{{ strftime_now('%d %B %Y %H:%M:%S %j %-d %e %%') }}{{ strftime_now('%q') }}"),
        (
            "methods",
            "{{ 'a,b,c'.rsplit(',', 1) }}{{ 'abc'.partition('b') }}{{ '-7'.zfill(4) }}{{ 'x'.removeprefix('x') }}{{ 'é'.split('é') }}",
        ),
        (
            "floats",
            "{{ 1e400 }}{{ 0.1 + 0.2 }}{{ 1e16 }}{{ 1/3 }}{{ (2**0.5)|tojson }}{{ 10**30 }}{{ -7 // 2 }}{{ -7 % 2 }}",
        ),
        ("generation", "{%- generation -%}a{%- endgeneration -%}{% generation %}{%"),
    ];
    seeds.extend(ours.map(|(name, source)| Seed::new("template", name, source)));
    let deep = format!("{}1{}", "(".repeat(5000), ")".repeat(5000));
    seeds.push(Seed::new("template", "deep-parentheses", format!("{{{{ {deep} }}}}")));
    seeds.push(Seed::new("template", "deep-ifs", "{% if 1 %}".repeat(3000)));
    seeds.push(Seed::new("template", "deep-minus", format!("{{{{ {}1 }}}}", "-".repeat(20_000))));
    seeds.push(Seed::new("template", "deep-not", format!("{{{{ {}1 }}}}", "not ".repeat(20_000))));
    seeds.push(Seed::new("template", "no-text", [0xff_u8, 0xfe]));
    seeds
}

/// A small tokenizer of this model; `rest` are its other parts.
fn tokenizer(model: &Value, rest: &Value) -> String {
    let mut file = json!({
        "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
        "use_regex": true}, "model": model,
        "added_tokens": [{"id": 0, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true}],
    });
    for (key, value) in rest.as_object().into_iter().flatten() {
        file[key] = value.clone();
    }
    file.to_string()
}

fn bpe() -> Value {
    json!({"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
        "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": {"<s>": 0, "a": 1, "b": 2, "ab": 3, "abb": 4, "Ġ": 5}, "merges": ["a b", "ab b"]})
}

fn pieces() -> Value {
    json!([
        ["<unk>", 0.0],
        ["<s>", 0.0],
        ["\u{2581}", -1.5],
        ["a", -2.0],
        ["<0x0A>", -9.0],
        ["\u{2581}once", -3.0]
    ])
}

fn unigram() -> Value {
    json!({"type": "Unigram", "unk_id": 0, "vocab": pieces(), "byte_fallback": true})
}

/// A decoder as SentencePiece has it.
fn sentence() -> Value {
    json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "}, {"type": "ByteFallback"},
        {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]})
}

/// Puts a special token in front, of this id.
fn around(id: u64) -> Value {
    json!({"type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [id], "tokens": ["<s>"]}}})
}

fn split(regex: &str) -> Value {
    json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
}

fn tokenizers() -> Vec<Seed> {
    let texts = [families(), beyond_limits(), odd_parts()].concat();
    let seed = |(name, text): (&str, String)| Seed::new("tokenizer", name, text);
    let mut seeds: Vec<Seed> = texts.into_iter().map(seed).collect();
    seeds.push(Seed::new("tokenizer", "byte-level", byte_tokenizer()));
    seeds
}

/// Names and texts of one tokenizer of each kind.
fn families() -> Vec<(&'static str, String)> {
    let words =
        json!({"type": "WordLevel", "vocab": {"<s>": 0, "upon": 1, "[UNK]": 2}, "unk_token": "[UNK]"});
    let bits = json!({"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {"<s>": 0, "[UNK]": 1, "up": 2, "##on": 3}});
    let metaspace =
        json!({"type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true});
    let nfkc = json!({"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Prepend", "prepend": "\u{2581}"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u{2581}"}]});
    let sentence = sentence();
    let regex = split("\\p{L}+|\\s+(?!\\S)|\\d{1,3}");
    vec![
        ("merges", tokenizer(&bpe(), &json!({"pre_tokenizer": regex, "post_processor": around(0)}))),
        ("unigram", tokenizer(&unigram(), &json!({"decoder": sentence, "normalizer": nfkc}))),
        ("metaspace", tokenizer(&unigram(), &json!({"decoder": metaspace, "pre_tokenizer": metaspace}))),
        ("words", tokenizer(&words, &json!({"pre_tokenizer": {"type": "Whitespace"}}))),
        (
            "word-pieces",
            tokenizer(&bits, &json!({"pre_tokenizer": {"type": "BertPreTokenizer"}, "decoder": sentence})),
        ),
    ]
}

/// Names and texts of tokenizers with numbers that no model has.
fn beyond_limits() -> Vec<(&'static str, String)> {
    let added = json!({"added_tokens": [{"id": 9_999_999, "content": "<x>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}]});
    let ids = json!({"type": "WordLevel", "vocab": {"a\u{1b}": 4_294_967_295_u32}, "unk_token": "a\u{1b}"});
    let unknown = json!({"type": "Unigram", "unk_id": 77, "vocab": pieces()});
    let none = json!({"type": "Unigram", "unk_id": null, "vocab": []});
    let padding = json!({"padding": {"strategy": {"Fixed": 1_u64 << 60}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}, "truncation": {"max_length": 0, "stride": 9, "strategy": "LongestFirst", "direction": "Right"}});
    let strip = json!({"decoder": {"type": "Strip", "content": " ", "start": 99, "stop": 0}});
    let decoder = json!({"decoder": sentence()});
    vec![
        ("beyond-the-model", tokenizer(&bpe(), &json!({"post_processor": around(1 << 31)}))),
        ("added-beyond-the-model", tokenizer(&bpe(), &added)),
        ("id-beyond-the-model", tokenizer(&ids, &json!({}))),
        ("unknown-piece", tokenizer(&unknown, &decoder)),
        ("no-pieces", tokenizer(&none, &json!({"decoder": sentence(), "added_tokens": []}))),
        ("not-finite", tokenizer(&unigram(), &decoder).replace("-1.5", "-1e999")),
        ("strip", tokenizer(&bpe(), &strip)),
        ("padding", tokenizer(&bpe(), &padding)),
    ]
}

/// Names and texts of tokenizers with parts that are slow, wrong or unknown.
fn odd_parts() -> Vec<(&'static str, String)> {
    let precompiled =
        json!({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, "decoder": sentence()});
    let missing = json!({"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "[UNK]"});
    let other = json!({"decoder": {"type": "CTC\u{1b}", "pad_token": "a", "word_delimiter_token": "|", "cleanup": true}});
    let nested = (0..60)
        .fold(json!({"type": "Lowercase"}), |inner, _| json!({"type": "Sequence", "normalizers": [inner]}));
    let split = |regex: &str| tokenizer(&bpe(), &json!({"pre_tokenizer": split(regex)}));
    vec![
        ("slow-regex", split("(a|a)*\\Kc|(?=(a+)+$)\\1x")),
        ("bad-regex", split("(((")),
        ("charsmap", tokenizer(&unigram(), &precompiled)),
        ("missing-unknown", tokenizer(&missing, &json!({}))),
        ("other-decoder", tokenizer(&bpe(), &other)),
        ("model-acts-on-terminals", tokenizer(&json!({"type": "\u{1b}[2J", "vocab": {}}), &json!({}))),
        ("nested", tokenizer(&bpe(), &json!({"normalizer": nested}))),
        ("no-json", "{\"version\": \"1.0\u{7}".to_owned()),
        ("nothing", String::new()),
    ]
}

fn prompt_files() -> Vec<Seed> {
    let seed = |name: &str, files: [&str; FILES.len()]| Seed::new("prompt_files", name, files.join("\0"));
    let chatml = r#"{"chat_template":"{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}","eos_token":{"content":"<|im_end|>"}}"#;
    let sampling = r#"{"temperature":0.8,"top_p":0.95,"top_k":20,"min_p":0,"repetition_penalty":1.05,"eos_token_id":[258,256]}"#;
    vec![
        seed("all", [chatml, sampling, "", r#"{"bos_token":"<|endoftext|>"}"#, r#"{"eos_token_id":256}"#]),
        seed("none", [""; FILES.len()]),
        seed(
            "named",
            [
                r#"{"chat_template":[{"name":"rag","template":"x"},{"name":"default","template":"{{ messages[0].content }}"}]}"#,
                "",
                "",
                "",
                "",
            ],
        ),
        seed(
            "own-file",
            [
                "",
                "",
                r#"{"chat_template":"{{ bos_token }}{{ messages }}"}"#,
                r#"{"bos_token":{"content":"<s>"}}"#,
                "",
            ],
        ),
        seed(
            "out-of-range",
            [
                "{}",
                r#"{"temperature":1e308,"top_p":0,"top_k":-1,"min_p":"x","repetition_penalty":0}"#,
                "",
                "",
                "",
            ],
        ),
        seed("stop-beyond", ["", r#"{"eos_token_id":[4294967295,300]}"#, "", "", ""]),
        seed("stop-wrong", ["", r#"{"eos_token_id":["\u001b[2J"]}"#, "", "", ""]),
        seed("stop-long", ["", &format!(r#"{{"eos_token_id":"{}"}}"#, "x".repeat(9000)), "", "", ""]),
        seed("template-wrong", [r#"{"chat_template":"{% for \u001b"}"#, "", "", "", ""]),
        seed("lists", ["[]", "7", "null", "\"a\"", "true"]),
        seed("no-json", ["{\u{1b}", "", "", "", ""]),
        seed("no-text", ["{\"a\":\"\u{7f}\"}", "}", "", "", ""]),
    ]
}
