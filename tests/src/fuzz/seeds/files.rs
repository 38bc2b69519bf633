//! Seeds of a model's files: configs, checkpoints, manifests.

use std::collections::BTreeMap;

use model::config::{ModelConfig, parse};
use model::format::Format;
use model::packed::manifest::{BLOB_ALIGN, Blob, Manifest, PackedFile, VERSION};
use model::packed::{expert_tensors, kind, router_tensors};

use super::super::files::{SHARDS, WEIGHTS};
use super::Seed;

/// Fixtures whose config is taken as it is.
const CONFIGS: [&str; 6] =
    ["mixtral", "olmoe", "qwen2_moe", "qwen2_moe-window-linear", "qwen3_moe-dense-tied", "qwen3_moe-yarn"];

/// The smallest model that has everything a manifest can have.
const SMALL: &str = r#"{"model_type":"qwen2_moe","hidden_size":32,"num_attention_heads":2,"num_key_value_heads":1,
"num_hidden_layers":2,"vocab_size":8,"intermediate_size":16,"moe_intermediate_size":16,"num_experts":2,
"num_experts_per_tok":1,"shared_expert_intermediate_size":16,"mlp_only_layers":[0],"max_position_embeddings":64}"#;

pub(super) fn seeds() -> Vec<Seed> {
    [configs(), checkpoints(), indices(), manifests()].concat()
}

fn configs() -> Vec<Seed> {
    let read = |name: &str| {
        let path = crate::fixtures().join(name).join("config.json");
        std::fs::read(path).expect("the fixture is there")
    };
    let mut seeds: Vec<Seed> = CONFIGS.iter().map(|name| Seed::new("config", name, read(name))).collect();
    let texts = [
        ("small", SMALL),
        ("nothing", "{}"),
        ("no-json", "{"),
        ("a-list", "[1, 2]"),
        ("twice", r#"{"model_type":"olmoe","model_type":"mixtral"}"#),
        ("other-family", r#"{"model_type":"llama\u001b[2J"}"#),
        ("unknown-key", r#"{"model_type":"olmoe","new\u001bkey":{"a":[1,2,3]}}"#),
        ("unknown-value", r#"{"model_type":"olmoe","auto_map":"\u0007\u009b31m"}"#),
        ("largest", r#"{"model_type":"olmoe","num_hidden_layers":18446744073709551615}"#),
        ("infinite", r#"{"model_type":"olmoe","rope_theta":1e400}"#),
        (
            "wide",
            r#"{"model_type":"mixtral","num_hidden_layers":1024,"num_local_experts":4096,"hidden_size":65536,"num_attention_heads":64,"intermediate_size":262144,"vocab_size":4194304}"#,
        ),
        ("two-names", r#"{"model_type":"qwen3_moe","num_experts":8,"num_local_experts":9}"#),
        (
            "windows",
            r#"{"model_type":"qwen2_moe","use_sliding_window":true,"sliding_window":18446744073709551615,"max_window_layers":3}"#,
        ),
        (
            "yarn",
            r#"{"model_type":"qwen3_moe","rope_scaling":{"type":"yarn","factor":0.5,"mscale":1e308,"mscale_all_dim":1e-308,"beta_fast":0}}"#,
        ),
        (
            "odd-heads",
            r#"{"model_type":"qwen3_moe","hidden_size":30,"num_attention_heads":4,"head_dim":null}"#,
        ),
    ];
    seeds.extend(texts.map(|(name, text)| Seed::new("config", name, text)));
    let (open, close) = ("{\"a\":[".repeat(100), "]}".repeat(100));
    seeds.push(Seed::new("config", "deep", format!("{{\"model_type\":\"olmoe\",\"x\":{open}{close}}}")));
    seeds
}

fn checkpoints() -> Vec<Seed> {
    let seed = |name: &str, zeros: u16, header: &str| {
        let bytes = [&[1][..], &zeros.to_le_bytes(), header.as_bytes()].concat();
        Seed::new("safetensors", name, bytes)
    };
    let one = |rest: &str| format!(r#"{{"a":{{"dtype":{rest}}}}}"#);
    let whole = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},
"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]},"c":{"dtype":"F16","shape":[],"data_offsets":[22,24]},
"d":{"dtype":"I64","shape":[1,1],"data_offsets":[24,32]}}"#;
    let raw = [&(whole.len() as u64).to_le_bytes()[..], whole.as_bytes(), &[9; 32]].concat();
    vec![
        seed("whole", 32, whole),
        Seed::new("safetensors", "raw", [&[0][..], &raw[..]].concat()),
        Seed::new("safetensors", "raw-cut", [&[0][..], &raw[..raw.len() - 1]].concat()),
        Seed::new(
            "safetensors",
            "raw-header-of-exabytes",
            [0_u8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
        ),
        seed("empty", 0, "{}"),
        seed("no-rows", 0, &one(r#""F32","shape":[0,3],"data_offsets":[0,0]"#)),
        seed(
            "no-rows-of-exabytes",
            0,
            &one(r#""F32","shape":[0,1099511627776,1099511627776],"data_offsets":[0,0]"#),
        ),
        seed("overflow", 0, &one(r#""F32","shape":[4294967296,4294967296],"data_offsets":[0,0]"#)),
        seed("four-bits", 2, &one(r#""F4","shape":[4],"data_offsets":[0,2]"#)),
        seed("hole", 8, &one(r#""F32","shape":[1],"data_offsets":[4,8]"#)),
        seed("backwards", 8, &one(r#""F32","shape":[1],"data_offsets":[8,4]"#)),
        seed("beyond", 4, &one(r#""F32","shape":[2],"data_offsets":[0,8]"#)),
        seed("unknown-type", 4, &one(r#""F\u001b33","shape":[1],"data_offsets":[0,4]"#)),
        seed("unknown-field", 4, &one(r#""F32","shape":[1],"data_offsets":[0,4],"\u001b[2J":1"#)),
        seed("wrong-type", 4, &one(r#""F32","shape":"\u009b31m","data_offsets":[0,4]"#)),
        seed(
            "name-acts-on-terminals",
            5,
            r#"{"\u001b]0;x\u0007":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
        ),
        seed(
            "long-name",
            5,
            &format!(r#"{{"{}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#, "n".repeat(9000)),
        ),
        seed(
            "long-shape",
            5,
            &one(&format!(r#""F32","shape":[{}1],"data_offsets":[0,4]"#, "1,".repeat(3000))),
        ),
    ]
}

fn indices() -> Vec<Seed> {
    let [(a, first), (b, second)] = SHARDS;
    let seed = |name: &str, text: String| Seed::new("checkpoint_index", name, text);
    let map = |text: &str| format!(r#"{{"metadata":{{"total_size":4}},"weight_map":{{{text}}}}}"#);
    let pair = |tensor: &str, file: &str| map(&format!(r#""{tensor}":"{file}""#));
    vec![
        seed("both", map(&format!(r#""{first}":"{a}","{second}":"{b}""#))),
        seed("one", pair(first, a)),
        seed("swapped", map(&format!(r#""{first}":"{b}","{second}":"{a}""#))),
        seed("missing-file", pair(first, "c.safetensors")),
        seed("way-up", pair(first, "../a.safetensors")),
        seed("absolute", pair(first, "/dev/zero")),
        seed("here", pair(first, ".")),
        seed("acts-on-terminals", pair("\\u001b[2J", "\\u0007\\u009b.safetensors")),
        seed("missing-acts-on-terminals", pair("a", "\\u0007\\u009b")),
        seed("no-name", map(&format!(r#""{first}":["\u001b", 1]"#))),
        seed("long-name", pair(&"n".repeat(9000), "a.safetensors")),
        seed("long-value", map(&format!(r#""{first}":[{}1]"#, "1,".repeat(3000)))),
        seed("empty", map("")),
        seed("none", "{}".to_owned()),
        seed("twice", map(&format!(r#""{first}":"{a}","{first}":"{b}""#))),
    ]
}

fn manifest_of(config: ModelConfig, format: Format) -> Manifest {
    let experts = (0..config.layers.len()).flat_map(|layer| expert_tensors(&config, layer));
    let (mut blobs, mut offset) = (BTreeMap::new(), 0);
    for name in router_tensors(&config).into_iter().chain(experts) {
        let bytes = kind(&config, name).expect("a tensor of the model is of some kind").bytes(format);
        let blake3 = blake3::hash(&vec![0; bytes]).to_hex().to_string();
        blobs.insert(name.to_string(), Blob { file: 0, offset, bytes: bytes as u64, blake3 });
        offset = (offset + bytes as u64).next_multiple_of(BLOB_ALIGN);
    }
    let step = |moe: bool| moe.then_some(-12);
    let moe_layers: Vec<usize> = config.moe_layers().collect();
    let steps_log2 = (0..config.layers.len()).map(|layer| step(moe_layers.contains(&layer))).collect();
    let files = vec![PackedFile { name: WEIGHTS.0.into(), bytes: WEIGHTS.1 }];
    Manifest { version: VERSION, source: "ab".repeat(32), format, config, steps_log2, files, blobs }
}

fn manifests() -> Vec<Seed> {
    let small = parse::parse(SMALL).expect("it is right");
    let text =
        |format| serde_json::to_string(&manifest_of(small.clone(), format)).expect("it can be written");
    let seed = |name: &str, text: String| Seed::new("manifest", name, text);
    let whole = text(Format::Q8);
    vec![
        seed("q8", whole.clone()),
        seed("bf16", text(Format::Bf16)),
        seed("cut", whole[..whole.len() / 2].to_owned()),
        seed("version", whole.replacen("\"version\":1", "\"version\":2", 1)),
        seed("overlap", whole.replacen("\"offset\":4096", "\"offset\":0", 1)),
        seed("beyond", whole.replacen("\"offset\":4096", "\"offset\":18446744073709547520", 1)),
        seed("off-by-one", whole.replacen("\"offset\":4096", "\"offset\":4097", 1)),
        seed("other-hash", whole.replacen("\"blake3\":\"", "\"blake3\":\"0", 1)),
        seed("wrong-hash", whole.replace(&blake3::hash(&[0; 512]).to_hex().to_string(), &"ab".repeat(32))),
        seed("file-1", whole.replacen("\"file\":0", "\"file\":1", 1)),
        seed("way-up", whole.replace("weights.bin", "../weights.bin")),
        seed("missing", whole.replace("weights.bin", "other\\u001b.bin")),
        seed("layers", whole.replacen("\"window\":null", "\"window\":0", 1)),
        seed("unknown-field", whole.replacen('{', "{\"\\u001b[2J\":1,", 1)),
        seed("unknown-family", whole.replacen("qwen2_moe", "\\u009b31m", 1)),
        seed("format", whole.replacen("\"format\":\"q8\"", "\"format\":\"q\\u001b8\"", 1)),
        seed("heads", whole.replacen("\"heads\":2", "\"heads\":18446744073709551615", 1)),
        seed("layer-widths", whole.replacen("\"dense\":16", "\"dense\":18446744073709551615", 1)),
        seed("long-name", whole.replace("weights.bin", &"n".repeat(9000))),
    ]
}
