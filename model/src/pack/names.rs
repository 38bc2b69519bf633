//! What packed tensors are made of: names and shapes in a Hugging Face checkpoint, per family.

use crate::config::{Family, Ffn, ModelConfig, QkNorm};
use crate::packed::{self, TensorName};

/// One tensor of a checkpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Its name there.
    pub name: String,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

/// The tensors that `name` is stacked from, in order (an expert: gate, up, down). Empty where there is none.
pub(crate) fn sources(config: &ModelConfig, name: TensorName) -> Vec<Source> {
    use TensorName as N;
    let (hidden, head) =
        (config.hidden, if config.tied_embeddings { "model.embed_tokens" } else { "lm_head" });
    let (q, kv) = (config.q_width(), config.kv_width());
    let of = |name: String, shape: &[usize]| Source { name, shape: shape.to_vec() };
    let attention = |l: u16, part: &str| format!("model.layers.{l}.self_attn.{part}");
    let layer = |l: u16, part: &str| format!("model.layers.{l}.{part}.weight");
    let (q_norm, k_norm) =
        if config.qk_norm == QkNorm::FullWidth { (q, kv) } else { (config.head_dim, config.head_dim) };
    match name {
        N::Embedding => vec![of("model.embed_tokens.weight".to_string(), &[config.vocab, hidden])],
        N::Head => vec![of(format!("{head}.weight"), &[config.vocab, hidden])],
        N::FinalNorm => vec![of("model.norm.weight".to_string(), &[hidden])],
        N::AttentionNorm(l) => vec![of(layer(l, "input_layernorm"), &[hidden])],
        N::FfnNorm(l) => vec![of(layer(l, "post_attention_layernorm"), &[hidden])],
        N::Qkv(l) => [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
            .map(|(part, width)| of(attention(l, &format!("{part}.weight")), &[width, hidden]))
            .to_vec(),
        N::QkvBias(l) => [("q_proj", q), ("k_proj", kv), ("v_proj", kv)]
            .map(|(part, width)| of(attention(l, &format!("{part}.bias")), &[width]))
            .to_vec(),
        N::QNorm(l) => vec![of(attention(l, "q_norm.weight"), &[q_norm])],
        N::KNorm(l) => vec![of(attention(l, "k_norm.weight"), &[k_norm])],
        N::AttentionOut(l) => vec![of(attention(l, "o_proj.weight"), &[hidden, q])],
        N::Gate(l) => vec![of(layer(l, &format!("{}.gate", block(config))), &[config.moe.experts, hidden])],
        N::SharedGate(l) => vec![of(layer(l, "mlp.shared_expert_gate"), &[1, hidden])],
        N::LocalGateUp(l) | N::LocalDown(l) => {
            let [gate, up, down] = local(config, l).unwrap_or_default();
            if matches!(name, N::LocalDown(_)) { vec![down] } else { vec![gate, up] }
        }
        N::Expert(l, e) => {
            let parts = match config.family {
                Family::Mixtral => ["w1", "w3", "w2"],
                _ => ["gate_proj", "up_proj", "down_proj"],
            };
            gated(&format!("model.layers.{l}.{}.experts.{e}", block(config)), parts, hidden, config.moe.inter)
                .to_vec()
        }
    }
}

/// Every tensor a checkpoint of this config has, with what it becomes part of and which part it is.
pub(crate) fn all(config: &ModelConfig) -> impl Iterator<Item = (TensorName, usize, Source)> + '_ {
    let router = packed::router_tensors(config).into_iter();
    let experts = (0..config.layers.len()).flat_map(|layer| packed::expert_tensors(config, layer));
    let tied_head = |name: &TensorName| config.tied_embeddings && *name == TensorName::Head;
    let parts =
        |name| sources(config, name).into_iter().enumerate().map(move |(part, source)| (name, part, source));
    router.filter(move |name| !tied_head(name)).chain(experts).flat_map(parts)
}

fn block(config: &ModelConfig) -> &'static str {
    if config.family == Family::Mixtral { "block_sparse_moe" } else { "mlp" }
}

fn local(config: &ModelConfig, l: u16) -> Option<[Source; 3]> {
    let inter = packed::local_inter(config, l.into())?;
    let shared = config.layers[usize::from(l)].ffn == Ffn::Moe;
    let prefix = format!("model.layers.{l}.mlp{}", if shared { ".shared_expert" } else { "" });
    Some(gated(&prefix, ["gate_proj", "up_proj", "down_proj"], config.hidden, inter))
}

fn gated(prefix: &str, [gate, up, down]: [&str; 3], hidden: usize, inter: usize) -> [Source; 3] {
    let of = |part: &str, shape: [usize; 2]| Source {
        name: format!("{prefix}.{part}.weight"),
        shape: shape.to_vec(),
    };
    [of(gate, [inter, hidden]), of(up, [inter, hidden]), of(down, [hidden, inter])]
}
