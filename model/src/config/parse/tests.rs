//! Rung: pure. Configs of every family, both spellings, and what is refused by name.

use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::config::{Rope, RopeScaling};

fn tiny(model_type: &str) -> Value {
    json!({"model_type": model_type, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
           "num_hidden_layers": 4, "vocab_size": 100, "intermediate_size": 48})
}

/// `base` with the keys of `changes` set.
fn with(base: &Value, changes: Value) -> String {
    let mut all = base.clone();
    for (key, value) in changes.as_object().unwrap() {
        all[key] = value.clone();
    }
    all.to_string()
}

fn message(text: &str) -> String {
    parse(text).unwrap_err().to_string()
}

#[test]
fn the_demo_model_is_what_its_readme_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tale-moe/config.json");
    let config = parse(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(
        (config.family, config.hidden, config.vocab, config.context),
        (Family::Qwen3Moe, 256, 4096, 2048)
    );
    assert_eq!((config.heads, config.kv_heads, config.head_dim), (8, 2, 64));
    assert_eq!((config.moe.experts, config.moe.top_k, config.moe.inter), (24, 4, 128));
    assert!(config.moe.routing.renormalise && config.tied_embeddings && config.qk_norm == QkNorm::PerHead);
    assert_eq!(config.layers, vec![LayerConfig { window: None, ffn: Ffn::Moe }; 6]);
    assert_eq!(config.rope, Rope { theta: 1e4, scaling: RopeScaling::Default });
}

#[test]
fn missing_keys_have_the_defaults_of_their_class() {
    let of = |model_type: &str| parse(&json!({ "model_type": model_type }).to_string()).unwrap();
    let qwen3 = of("qwen3_moe");
    assert_eq!((qwen3.layers.len(), qwen3.heads, qwen3.kv_heads, qwen3.head_dim), (24, 32, 4, 64));
    assert_eq!((qwen3.moe.experts, qwen3.moe.top_k, qwen3.moe.inter), (128, 8, 768));
    assert!(!qwen3.moe.routing.renormalise && !qwen3.qkv_bias && !qwen3.tied_embeddings);
    let qwen2 = of("qwen2_moe");
    assert_eq!((qwen2.heads, qwen2.kv_heads, qwen2.moe.experts, qwen2.moe.top_k), (16, 16, 60, 4));
    assert_eq!((qwen2.moe.inter, qwen2.moe.shared_inter, qwen2.moe.shared_gated), (1408, Some(5632), true));
    assert!(qwen2.qkv_bias && !qwen2.moe.routing.renormalise && qwen2.qk_norm == QkNorm::None);
    let mixtral = of("mixtral");
    assert_eq!((mixtral.hidden, mixtral.moe.inter, mixtral.kv_heads), (4096, 14336, 8));
    assert_eq!((mixtral.rope.theta, mixtral.norm_eps), (1e6, 1e-5));
    assert!(mixtral.moe.routing.renormalise && mixtral.layers[0].window.is_none());
    let olmoe = of("olmoe");
    assert_eq!((olmoe.heads, olmoe.kv_heads, olmoe.moe.experts, olmoe.moe.top_k), (16, 16, 64, 8));
    assert_eq!((olmoe.qk_norm, olmoe.clip_qkv, olmoe.moe.inter), (QkNorm::FullWidth, None, 2048));
}

#[test]
fn old_and_new_spellings_mean_the_same() {
    let base = tiny("qwen3_moe");
    let expected = parse(&with(
        &base,
        json!({"num_experts": 6, "num_experts_per_tok": 3, "rope_theta": 5e5,
               "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "bfloat16"}),
    ));
    let expected = expected.unwrap();
    assert_eq!(expected.rope, Rope { theta: 5e5, scaling: RopeScaling::Linear { factor: 2.0 } });
    for experts in ["num_local_experts", "n_routed_experts", "moe_num_experts"] {
        for top_k in ["moe_k", "moe_topk", "top_k_experts"] {
            let rope = json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5});
            let text =
                with(&base, json!({experts: 6, top_k: 3, "rope_parameters": rope, "dtype": "bfloat16"}));
            assert_eq!(parse(&text).unwrap(), expected, "{experts} {top_k}");
        }
    }
    let both = with(&base, json!({"num_experts": 6, "num_local_experts": 8}));
    assert!(message(&both).contains("num_experts = 6 and num_local_experts = 8 mean the same; remove one"));
    assert!(parse(&with(&base, json!({"num_experts": 16, "num_local_experts": 16}))).is_ok());
    // The value inside rope_parameters wins, as in transformers.
    let text = with(
        &base,
        json!({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}),
    );
    assert_eq!(parse(&text).unwrap().rope.theta, 7e5);
}

#[test]
fn yarn_infers_what_is_not_given() {
    let base = tiny("qwen3_moe");
    let rope = |scaling: Value| {
        parse(&with(&base, json!({"max_position_embeddings": 131072, "rope_scaling": scaling})))
            .unwrap()
            .rope
            .scaling
    };
    let RopeScaling::Yarn { factor, original_context, beta_fast, beta_slow, attention_factor, truncate } =
        rope(json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}))
    else {
        panic!("not yarn")
    };
    assert_eq!((factor, original_context, beta_fast, beta_slow, truncate), (4.0, 32768, 32.0, 1.0, true));
    assert!((attention_factor - 1.138_629_436_111_989).abs() < 1e-15, "{attention_factor}");
    let RopeScaling::Yarn { attention_factor, factor, .. } = rope(json!({"type": "yarn", "factor": null,
        "original_max_position_embeddings": 65536, "mscale": 0.5, "mscale_all_dim": 1.0, "beta_fast": 0}))
    else {
        panic!("not yarn")
    };
    let ln = |x: f64| 0.1 * x * 2.0_f64.ln() + 1.0;
    assert_eq!(factor, 2.0);
    assert!((attention_factor - ln(0.5) / ln(1.0)).abs() < 1e-15);
}

#[test]
fn windows_follow_the_family() {
    let windows = |model_type: &str, changes: Value| -> Vec<Option<usize>> {
        let config = parse(&with(&tiny(model_type), changes)).unwrap();
        config.layers.iter().map(|layer| layer.window).collect()
    };
    assert_eq!(windows("mixtral", json!({"sliding_window": 9})), [Some(9); 4]);
    assert_eq!(windows("mixtral", json!({"sliding_window": null})), [None; 4]);
    assert_eq!(windows("qwen3_moe", json!({"sliding_window": 9})), [None; 4]);
    assert_eq!(windows("qwen3_moe", json!({"sliding_window": 9, "use_sliding_window": true})), [Some(9); 4]);
    assert_eq!(windows("qwen3_moe", json!({"use_sliding_window": true})), [Some(4096); 4]);
    assert_eq!(windows("qwen3_moe", json!({"use_sliding_window": true, "sliding_window": null})), [None; 4]);
    assert_eq!(windows("qwen2_moe", json!({"sliding_window": 9})), [None; 4]);
    let sliding = json!({"sliding_window": 9, "use_sliding_window": true});
    assert_eq!(windows("qwen2_moe", sliding), [Some(9), None, Some(9), None]);
    let limited = json!({"sliding_window": 9, "use_sliding_window": true, "max_window_layers": 1});
    assert_eq!(windows("qwen2_moe", limited), [Some(9), None, None, None]);
    let listed = json!({"sliding_window": 9, "use_sliding_window": true, "layer_types":
        ["full_attention", "full_attention", "sliding_attention", "full_attention"]});
    assert_eq!(windows("qwen2_moe", listed), [None, None, Some(9), None]);
}

#[test]
fn dense_layers_follow_step_and_list() {
    let ffns = |changes: Value| -> Vec<Ffn> {
        parse(&with(&tiny("qwen2_moe"), changes)).unwrap().layers.iter().map(|layer| layer.ffn).collect()
    };
    let dense = Ffn::Dense(48);
    assert_eq!(ffns(json!({"decoder_sparse_step": 2})), [dense, Ffn::Moe, dense, Ffn::Moe]);
    assert_eq!(ffns(json!({"mlp_only_layers": [0, 3, 77]})), [dense, Ffn::Moe, Ffn::Moe, dense]);
    assert_eq!(
        ffns(json!({"mlp_only_layers": [1], "decoder_sparse_step": 2})),
        [dense, dense, dense, Ffn::Moe]
    );
}

#[test]
fn what_would_change_the_computation_is_refused_by_name() {
    for (family, changes, part) in [
        (
            "qwen3_moe",
            json!({"attention_bias": true}),
            "attention_bias = true is not supported for qwen3_moe",
        ),
        ("olmoe", json!({"attention_bias": true}), "attention_bias = true is not supported for olmoe"),
        ("mixtral", json!({"qkv_bias": true}), "qkv_bias = true is not supported for mixtral"),
        ("mixtral", json!({"use_qk_norm": true}), "use_qk_norm = true is not supported for mixtral"),
        ("qwen3_moe", json!({"use_qk_norm": false}), "use_qk_norm = false is not supported for qwen3_moe"),
        ("qwen3_moe", json!({"shared_expert_intermediate_size": 64}), "shared_expert_intermediate_size = 64"),
        (
            "qwen3_moe",
            json!({"hidden_act": "gelu"}),
            "hidden_act = \"gelu\" is not supported for qwen3_moe: only silu",
        ),
        ("qwen3_moe", json!({"quantization_config": {"bits": 4}}), "quantization_config = {\"bits\":4}"),
        ("qwen3_moe", json!({"auto_map": {"AutoModel": "x.Y"}}), "auto_map"),
        ("qwen3_moe", json!({"logit_softcap": 30.0}), "logit_softcap = 30.0 is not known for qwen3_moe"),
        ("qwen3_moe", json!({"new_feature": false}), "new_feature = false is not known"),
        ("mixtral", json!({"norm_topk_prob": false}), "norm_topk_prob = false is not known for mixtral"),
        ("olmoe", json!({"sliding_window": 10}), "sliding_window is not supported for olmoe"),
        ("mixtral", json!({"sliding_window": 0}), "sliding_window = 0 is not supported for mixtral"),
        (
            "mixtral",
            json!({"layer_types": ["sliding_attention", "full_attention", "full_attention", "full_attention"]}),
            "layer_types disagrees with sliding_window",
        ),
        (
            "qwen2_moe",
            json!({"layer_types": ["sliding_attention", "full_attention", "full_attention", "full_attention"]}),
            "layer_types has sliding_attention, but use_sliding_window is false",
        ),
        ("qwen2_moe", json!({"layer_types": ["chunked_attention"]}), "layer_types"),
        ("mixtral", json!({"architectures": ["MixtralForSequenceClassification"]}), "architectures"),
        (
            "mixtral",
            json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
            "rope_type = \"dynamic\" is not supported",
        ),
        (
            "mixtral",
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}),
            "rope_type = \"llama3\"",
        ),
        (
            "mixtral",
            json!({"rope_scaling": {"type": "linear", "factor": 2.0, "odd": 1}}),
            "rope parameter odd = 1",
        ),
        (
            "mixtral",
            json!({"rope_parameters": {"rope_type": "default", "factor": 2.0}}),
            "rope parameter factor",
        ),
        (
            "mixtral",
            json!({"rope_parameters": {"partial_rotary_factor": 0.5}}),
            "partial_rotary_factor = 0.5",
        ),
        ("mixtral", json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor = 0.5"),
        (
            "llama",
            json!({}),
            "model_type 'llama' is not supported; supported are qwen3_moe, qwen2_moe, mixtral, olmoe",
        ),
    ] {
        let found = message(&with(&tiny(family), changes));
        assert!(found.starts_with("config.json: ") && found.contains(part), "{part}\n{found}");
    }
}

#[test]
fn what_is_not_a_config_is_refused() {
    assert!(message("{}").contains("model_type is missing"));
    assert!(message("[]").contains("must be a JSON object"));
    assert!(message("{\"model_type\": ").contains("not valid JSON"));
    assert!(
        message(r#"{"model_type": "olmoe", "vocab_size": 3, "vocab_size": 4}"#)
            .contains("'vocab_size' appears twice")
    );
    assert!(message(&" ".repeat(MAX_CONFIG_BYTES + 1)).contains("at most 1048576 are read"));
}

#[test]
fn what_does_not_matter_is_let_through() {
    let changes = json!({"attention_dropout": 0.5, "use_cache": false, "transformers_version": "9.9",
        "bos_token_id": 5, "eos_token_id": [1, 2], "router_aux_loss_coef": 0.1, "some_future_key": null,
        "qkv_bias": false, "use_qk_norm": true, "shared_expert_intermediate_size": 0, "temperature": 0.3,
        "max_window_layers": 28, "rope_scaling": null, "architectures": ["Qwen3MoeForCausalLM"]});
    let base = tiny("qwen3_moe");
    assert_eq!(parse(&with(&base, changes)), parse(&base.to_string()));
}

#[test]
fn sizes_out_of_range_are_refused_by_name() {
    for (key, value, part) in [
        ("hidden_size", json!(0), "hidden_size = 0 is out of range"),
        ("hidden_size", json!(1u64 << 40), "hidden_size = 1099511627776 is out of range"),
        ("hidden_size", json!(-1), "hidden_size = -1 is out of range"),
        ("hidden_size", json!(64.5), "hidden_size = 64.5 is out of range"),
        ("hidden_size", json!("64"), "hidden_size = \"64\" is out of range"),
        (
            "num_attention_heads",
            json!(3),
            "num_attention_heads = 3 is not a multiple of num_key_value_heads = 2",
        ),
        ("num_key_value_heads", json!(null), "num_key_value_heads = null"),
        ("head_dim", json!(7), "head_dim = 7 is odd"),
        ("num_hidden_layers", json!(0), "num_hidden_layers = 0"),
        ("num_hidden_layers", json!(100_000), "num_hidden_layers = 100000"),
        ("num_experts", json!(0), "num_experts = 0"),
        ("num_experts", json!(1u64 << 31), "num_experts = 2147483648"),
        ("num_experts", json!(4), "the number of experts per token = 8 is out of range, it must be 1 to 4"),
        ("num_experts_per_tok", json!(65), "num_experts_per_tok = 65"),
        ("vocab_size", json!(0), "vocab_size = 0"),
        ("max_position_embeddings", json!(0), "max_position_embeddings = 0"),
        ("moe_intermediate_size", json!(1 << 19), "moe_intermediate_size = 524288"),
        ("decoder_sparse_step", json!(0), "decoder_sparse_step = 0"),
        ("decoder_sparse_step", json!(9), "no layer has routed experts"),
        ("mlp_only_layers", json!([-1]), "mlp_only_layers = [-1]"),
        ("rms_norm_eps", json!(0), "rms_norm_eps = 0"),
        ("rms_norm_eps", json!("x"), "rms_norm_eps = \"x\" must be a number"),
        ("rope_theta", json!(1.0), "rope_theta = 1 is out of range"),
        ("rope_theta", json!(1e300), "rope_theta"),
        ("rope_scaling", json!({"type": "linear"}), "rope factor = NaN is out of range"),
        ("rope_scaling", json!({"type": "yarn", "factor": 1e9}), "rope factor"),
        ("rope_scaling", json!(7), "rope_scaling = 7 must be an object"),
        ("tie_word_embeddings", json!(1), "tie_word_embeddings = 1 must be true or false"),
    ] {
        let found = message(&with(&tiny("qwen3_moe"), json!({ key: value })));
        assert!(found.contains(part), "{part}\n{found}");
    }
    let text = with(&tiny("olmoe"), json!({"clip_qkv": -1.0}));
    assert!(message(&text).contains("clip_qkv must be a positive number"));
    let text = with(&tiny("olmoe"), json!({"head_dim": 32}));
    assert!(message(&text).contains("must equal hidden_size"));
}

fn any_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-3i64..300).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "[a-z_]{0,12}".prop_map(Value::from),
    ];
    leaf.prop_recursive(2, 12, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::hash_map("[a-z_]{1,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever the values, the parser answers; and what it accepts passes its own check.
    #[test]
    fn any_value_of_any_key_is_answered(
        family in prop::sample::select(vec!["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"]),
        changes in prop::collection::vec((prop::sample::select(KEYS.to_vec()), any_value()), 0..4),
    ) {
        let mut json = tiny(family);
        for (key, value) in changes {
            json[key] = value;
        }
        if let Ok(config) = parse(&json.to_string()) {
            prop_assert_eq!(check(&config), Ok(()));
            let text = serde_json::to_string(&config).unwrap();
            prop_assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), config);
        }
    }

    #[test]
    fn any_bytes_are_answered(text in "\\PC{0,200}", cut in 0usize..400) {
        prop_assert!(parse(&text).is_err());
        let mut valid = tiny("qwen3_moe").to_string();
        valid.truncate(cut);
        let expected = cut >= tiny("qwen3_moe").to_string().len();
        prop_assert_eq!(parse(&valid).is_ok(), expected);
    }
}

const KEYS: [&str; 34] = [
    "model_type",
    "architectures",
    "hidden_size",
    "vocab_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "qkv_bias",
    "clip_qkv",
    "tie_word_embeddings",
    "num_hidden_layers",
    "num_experts",
    "num_local_experts",
    "moe_k",
    "num_experts_per_tok",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "norm_topk_prob",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "decoder_sparse_step",
    "mlp_only_layers",
    "hidden_act",
    "attention_bias",
    "partial_rotary_factor",
    "unknown",
];
