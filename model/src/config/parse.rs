//! Reads `config.json`, refusing by name whatever it cannot honour.
//!
//! The reference is transformers 5.23 (`configuration_*.py` for defaults, `modeling_*.py` for meaning): a key that
//! is missing has the default of its class there. Every key must be understood, be known not to matter for
//! inference (`IRRELEVANT`), or be null; any other key is refused, because ignoring it may silently compute
//! another model. The price is that a harmless new key needs a release or an edit of the file; the message
//! says so. Sizes have limits (constants below) so that no product of them overflows and no allocation is absurd.

mod keys;
pub mod limits;
mod rope;

use serde_json::Value;

use super::{Family, Ffn, LayerConfig, ModelConfig, MoeConfig, QkNorm, RoutingSpec, Scoring, WeightOn};
use crate::json;
pub use keys::ConfigError;
use keys::Keys;
use limits::*;

/// Model types that load, as `model_type` spells them.
const FAMILIES: [(&str, &str, Family); 4] = [
    ("qwen3_moe", "Qwen3MoeForCausalLM", Family::Qwen3Moe),
    ("qwen2_moe", "Qwen2MoeForCausalLM", Family::Qwen2Moe),
    ("mixtral", "MixtralForCausalLM", Family::Mixtral),
    ("olmoe", "OlmoeForCausalLM", Family::Olmoe),
];

/// Class defaults of transformers for the keys that every family has.
struct Defaults {
    vocab: usize,
    hidden: usize,
    inter: usize,
    layers: usize,
    heads: usize,
    kv_heads: Option<usize>,
    context: usize,
    norm_eps: f64,
    theta: f64,
    experts: usize,
    top_k: usize,
}

impl Family {
    /// `model_type` of this family.
    pub fn model_type(self) -> &'static str {
        FAMILIES[self as usize].0
    }

    fn defaults(self) -> Defaults {
        let qwen3 = Defaults {
            vocab: 151936,
            hidden: 2048,
            inter: 6144,
            layers: 24,
            heads: 32,
            kv_heads: Some(4),
            context: 32768,
            norm_eps: 1e-6,
            theta: 1e4,
            experts: 128,
            top_k: 8,
        };
        match self {
            Family::Qwen3Moe => qwen3,
            Family::Qwen2Moe => {
                Defaults { inter: 5632, heads: 16, kv_heads: Some(16), experts: 60, top_k: 4, ..qwen3 }
            }
            Family::Mixtral => Defaults {
                vocab: 32000,
                hidden: 4096,
                inter: 14336,
                layers: 32,
                kv_heads: Some(8),
                context: 131072,
                norm_eps: 1e-5,
                theta: 1e6,
                experts: 8,
                top_k: 2,
                ..qwen3
            },
            Family::Olmoe => Defaults {
                vocab: 50304,
                inter: 2048,
                layers: 16,
                heads: 16,
                kv_heads: None,
                context: 4096,
                norm_eps: 1e-5,
                experts: 64,
                ..qwen3
            },
        }
    }
}

/// Parses and checks the text of a `config.json`.
pub fn parse(text: &str) -> Result<ModelConfig, ConfigError> {
    if text.len() > MAX_CONFIG_BYTES {
        let len = text.len();
        return Err(ConfigError(format!(
            "{len} bytes long, at most {MAX_CONFIG_BYTES} are read; is this the right file?"
        )));
    }
    let document =
        json::parse(text.as_bytes()).map_err(|error| ConfigError(format!("not valid JSON: {error}")))?;
    let Value::Object(map) = document else {
        return Err(ConfigError("must be a JSON object with a model_type".to_string()));
    };
    let mut keys = Keys::new(map);
    let family = family(&mut keys)?;
    let config = build(family, &mut keys)?;
    keys.finish()?;
    check(&config)?;
    Ok(config)
}

fn family(keys: &mut Keys) -> Result<Family, ConfigError> {
    let supported = FAMILIES.map(|(name, _, _)| name).join(", ");
    let Some(model_type) = keys.text("model_type")? else {
        return Err(ConfigError(format!("model_type is missing; supported are {supported}")));
    };
    let Some((name, architecture, family)) = FAMILIES.into_iter().find(|(name, _, _)| *name == model_type)
    else {
        let shown = model_type.escape_debug();
        return Err(ConfigError(format!("model_type '{shown}' is not supported; supported are {supported}")));
    };
    keys.family = name;
    match keys.take("architectures") {
        None => {}
        Some(Value::Array(list)) if list.iter().all(|item| item == architecture) => {}
        Some(found) => {
            return Err(keys.refuse(
                "architectures",
                &found,
                &format!("only [\"{architecture}\"] generates text here"),
            ));
        }
    }
    Ok(family)
}

fn build(family: Family, keys: &mut Keys) -> Result<ModelConfig, ConfigError> {
    let defaults = family.defaults();
    let hidden = keys.size("hidden_size", defaults.hidden, 1..=MAX_HIDDEN)?;
    let heads = keys.size("num_attention_heads", defaults.heads, 1..=MAX_HEADS)?;
    let kv_heads = kv_heads(family, keys, &defaults, heads)?;
    let head_dim = head_dim(keys, hidden, heads)?;
    let context = keys.size("max_position_embeddings", defaults.context, 1..=MAX_CONTEXT)?;
    let count = keys.size("num_hidden_layers", defaults.layers, 1..=MAX_LAYERS)?;
    let moe = moe(family, keys, &defaults)?;
    let ffns = ffns(family, keys, &defaults, count)?;
    let windows = windows(family, keys, count)?;
    let qkv_bias = family == Family::Qwen2Moe && keys.flag("qkv_bias", true)?;
    refuse_other_computations(family, keys)?;
    Ok(ModelConfig {
        family,
        hidden,
        vocab: keys.size("vocab_size", defaults.vocab, 1..=MAX_VOCAB)?,
        context,
        heads,
        kv_heads,
        head_dim,
        norm_eps: keys.number("rms_norm_eps", defaults.norm_eps)? as f32,
        rope: rope::rope(keys, defaults.theta, context)?,
        qkv_bias,
        qk_norm: match family {
            Family::Qwen3Moe => QkNorm::PerHead,
            Family::Olmoe => QkNorm::FullWidth,
            Family::Qwen2Moe | Family::Mixtral => QkNorm::None,
        },
        clip_qkv: match family {
            Family::Olmoe => keys.optional_number("clip_qkv")?.map(|clip| clip as f32),
            _ => None,
        },
        tied_embeddings: keys.flag("tie_word_embeddings", false)?,
        layers: windows.into_iter().zip(ffns).map(|(window, ffn)| LayerConfig { window, ffn }).collect(),
        moe,
    })
}

/// Mixtral and OLMoE read null as "as many as query heads".
fn kv_heads(
    family: Family,
    keys: &mut Keys,
    defaults: &Defaults,
    heads: usize,
) -> Result<usize, ConfigError> {
    let null_means_heads = matches!(family, Family::Mixtral | Family::Olmoe);
    let default = match keys.is_null("num_key_value_heads") {
        true if null_means_heads => heads,
        true => {
            return Err(keys.refuse(
                "num_key_value_heads",
                &Value::Null,
                "give the number of key/value heads",
            ));
        }
        false => defaults.kv_heads.unwrap_or(heads),
    };
    keys.size("num_key_value_heads", default, 1..=MAX_HEADS)
}

fn head_dim(keys: &mut Keys, hidden: usize, heads: usize) -> Result<usize, ConfigError> {
    if keys.is_null("head_dim") && !hidden.is_multiple_of(heads) {
        return Err(ConfigError(format!(
            "hidden_size = {hidden} is not a multiple of num_attention_heads = {heads}; give head_dim"
        )));
    }
    keys.size("head_dim", hidden / heads, 1..=MAX_HEAD_DIM)
}

fn moe(family: Family, keys: &mut Keys, defaults: &Defaults) -> Result<MoeConfig, ConfigError> {
    let experts = keys.alias(&["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])?;
    let experts = keys.size(experts, defaults.experts, 1..=MAX_EXPERTS)?;
    let top_k = keys.alias(&["num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"])?;
    let top_k = keys.size(top_k, defaults.top_k, 1..=MAX_TOP_K)?;
    let inter = match family {
        Family::Qwen3Moe => keys.size("moe_intermediate_size", 768, 1..=MAX_INTER)?,
        Family::Qwen2Moe => keys.size("moe_intermediate_size", 1408, 1..=MAX_INTER)?,
        Family::Mixtral | Family::Olmoe => keys.size("intermediate_size", defaults.inter, 1..=MAX_INTER)?,
    };
    let shared_inter = match family {
        Family::Qwen2Moe => Some(keys.size("shared_expert_intermediate_size", 5632, 1..=MAX_INTER)?),
        _ => None,
    };
    let renormalise = match family {
        // MixtralTopKRouter always divides by the sum.
        Family::Mixtral => true,
        _ => keys.flag("norm_topk_prob", false)?,
    };
    let routing = RoutingSpec {
        scoring: Scoring::Softmax,
        router_bias: false,
        selection_bias: false,
        groups: None,
        renormalise,
        scale: 1.0,
        weight_on: WeightOn::Output,
    };
    Ok(MoeConfig { experts, top_k, inter, routing, shared_inter, shared_gated: shared_inter.is_some() })
}

/// A Qwen layer has experts unless `mlp_only_layers` lists it or `decoder_sparse_step` skips it.
fn ffns(family: Family, keys: &mut Keys, defaults: &Defaults, count: usize) -> Result<Vec<Ffn>, ConfigError> {
    if matches!(family, Family::Mixtral | Family::Olmoe) {
        return Ok(vec![Ffn::Moe; count]);
    }
    let inter = keys.size("intermediate_size", defaults.inter, 0..=MAX_INTER)?;
    let step = keys.size("decoder_sparse_step", 1, 1..=usize::MAX)?;
    let dense_only = match keys.take("mlp_only_layers") {
        None => Vec::new(),
        Some(Value::Array(list)) if list.iter().all(Value::is_u64) => {
            list.iter().filter_map(Value::as_u64).collect()
        }
        Some(found) => {
            return Err(keys.refuse("mlp_only_layers", &found, "it must be a list of layer numbers"));
        }
    };
    let dense = |layer: usize| dense_only.contains(&(layer as u64)) || !(layer + 1).is_multiple_of(step);
    if inter == 0 && (0..count).any(dense) {
        return Err(ConfigError(
            "intermediate_size = 0, but there are dense layers; give their width".to_string(),
        ));
    }
    Ok((0..count).map(|layer| if dense(layer) { Ffn::Dense(inter) } else { Ffn::Moe }).collect())
}

/// Sliding windows per layer, which each family decides in its own way.
fn windows(family: Family, keys: &mut Keys, count: usize) -> Result<Vec<Option<usize>>, ConfigError> {
    let window = match (family, keys.is_present("sliding_window")) {
        (Family::Qwen2Moe | Family::Qwen3Moe, false) => Some(4096),
        _ => keys.optional_size("sliding_window", 0..=usize::MAX)?,
    };
    let sliding = |keys: &mut Keys| match family {
        Family::Mixtral => Ok(true),
        Family::Olmoe => Ok(false),
        Family::Qwen2Moe | Family::Qwen3Moe => keys.flag("use_sliding_window", false),
    };
    let used = sliding(keys)?;
    if used && window == Some(0) {
        return Err(keys.refuse(
            "sliding_window",
            &Value::from(0),
            "a query sees at least itself; use null for no window",
        ));
    }
    if family == Family::Olmoe && window.is_some() {
        return Err(ConfigError(
            "sliding_window is not supported for olmoe; remove it or set it to null".to_string(),
        ));
    }
    let window = if used { window } else { None };
    let first_full = keys.size("max_window_layers", 28, 0..=usize::MAX)?;
    let listed = keys.layer_types(count)?;
    match (family, listed) {
        // Qwen2MoeConfig: every other layer below max_window_layers slides, unless layer_types says otherwise.
        (Family::Qwen2Moe, None) => {
            let slides = |layer: usize| used && layer.is_multiple_of(2) && layer < first_full;
            Ok((0..count).map(|layer| if slides(layer) { window } else { None }).collect())
        }
        (Family::Qwen2Moe, Some(types)) => {
            if window.is_none() && types.contains(&true) {
                return Err(ConfigError(
                    "layer_types has sliding_attention, but use_sliding_window is false or sliding_window null; \
                     give both or use full_attention"
                        .to_string(),
                ));
            }
            Ok(types.into_iter().map(|slides| if slides { window } else { None }).collect())
        }
        (_, types) => {
            if types.is_some_and(|types| types.iter().any(|slides| *slides != window.is_some())) {
                return Err(ConfigError(format!(
                    "layer_types disagrees with sliding_window, which {} uses for all layers alike; remove layer_types",
                    family.model_type()
                )));
            }
            Ok(vec![window; count])
        }
    }
}

/// Keys that are understood, and supported with one value only.
fn refuse_other_computations(family: Family, keys: &mut Keys) -> Result<(), ConfigError> {
    for name in ["hidden_act", "hidden_activation"] {
        if let Some(act) = keys.text(name)?.filter(|act| act != "silu" && act != "swish") {
            return Err(keys.refuse(name, &Value::from(act), "only silu is"));
        }
    }
    let has_qk_norm = matches!(family, Family::Qwen3Moe | Family::Olmoe);
    let fixed = [
        ("attention_bias", Value::Bool(false)),
        ("mlp_bias", Value::Bool(false)),
        ("is_encoder_decoder", Value::Bool(false)),
        ("add_cross_attention", Value::Bool(false)),
        ("use_qk_norm", Value::Bool(has_qk_norm)),
        ("qkv_bias", Value::Bool(false)),
        ("shared_expert_intermediate_size", Value::from(0)),
    ];
    // Qwen2-MoE has taken its qkv_bias and its shared expert before this; what is taken is not seen here.
    for (name, only) in fixed {
        if let Some(found) = keys.take(name).filter(|found| *found != only) {
            return Err(keys.refuse(name, &found, &format!("only {only} is")));
        }
    }
    for name in ["quantization_config", "compression_config", "auto_map", "text_config", "per_layer_config"] {
        if let Some(found) = keys.take(name) {
            let remedy = match name {
                "auto_map" => {
                    "code that comes with a model is not run; remove the key if the standard class computes it"
                }
                "text_config" => "take the text model's own config and tensors",
                "per_layer_config" => "all layers must share one configuration",
                _ => "use the original bf16, f16 or f32 checkpoint: weights are quantized here",
            };
            return Err(keys.refuse(name, &found, remedy));
        }
    }
    Ok(())
}

/// Checks what must hold between the values, wherever they came from (`config.json` or a manifest).
pub fn check(config: &ModelConfig) -> Result<(), ConfigError> {
    let fail = |message: String| Err(ConfigError(message));
    let sizes = [
        ("hidden_size", config.hidden, MAX_HIDDEN),
        ("vocab_size", config.vocab, MAX_VOCAB),
        ("max_position_embeddings", config.context, MAX_CONTEXT),
        ("num_attention_heads", config.heads, MAX_HEADS),
        ("num_key_value_heads", config.kv_heads, MAX_HEADS),
        ("head_dim", config.head_dim, MAX_HEAD_DIM),
        ("num_hidden_layers", config.layers.len(), MAX_LAYERS),
        ("the number of experts", config.moe.experts, MAX_EXPERTS),
        ("the width of an expert", config.moe.inter, MAX_INTER),
        ("the width of the shared expert", config.moe.shared_inter.unwrap_or(1), MAX_INTER),
        ("the number of experts per token", config.moe.top_k, MAX_TOP_K.min(config.moe.experts)),
    ];
    if let Some((name, size, limit)) = sizes.into_iter().find(|(_, size, limit)| *size == 0 || size > limit) {
        return fail(format!("{name} = {size} is out of range, it must be 1 to {limit}"));
    }
    let (heads, kv_heads, head_dim) = (config.heads, config.kv_heads, config.head_dim);
    if heads % kv_heads != 0 {
        return fail(format!(
            "num_attention_heads = {heads} is not a multiple of num_key_value_heads = {kv_heads}"
        ));
    }
    if head_dim % 2 != 0 {
        return fail(format!("head_dim = {head_dim} is odd; rotary embedding turns pairs"));
    }
    if config.qk_norm == QkNorm::FullWidth && config.q_width() != config.hidden {
        return fail(format!("head_dim = {head_dim} times {heads} heads must equal hidden_size for olmoe"));
    }
    if !(config.norm_eps > 0.0 && config.norm_eps <= 1.0) {
        return fail(format!("rms_norm_eps = {} must be above 0 and at most 1", config.norm_eps));
    }
    if config.clip_qkv.is_some_and(|clip| !(clip > 0.0 && clip.is_finite())) {
        return fail("clip_qkv must be a positive number or null".to_string());
    }
    if !(config.moe.routing.scale.is_finite() && config.moe.routing.scale > 0.0) {
        return fail("the routing scale must be a positive number".to_string());
    }
    for (index, layer) in config.layers.iter().enumerate() {
        if matches!(layer.ffn, Ffn::Dense(inter) if inter == 0 || inter > MAX_INTER)
            || layer.window == Some(0)
        {
            return fail(format!("layer {index} has a feed-forward width or window out of range"));
        }
    }
    if config.moe_layers().next().is_none() {
        return fail("no layer has routed experts; dense models are not served".to_string());
    }
    rope::check(&config.rope)
}

#[cfg(test)]
mod tests;
