//! Rung: pure. Synthetic models are the same everywhere and keep activations in range.

use super::*;
use crate::checkpoint::Checkpoint;
use crate::config::parse::parse;
use crate::format::{BLOCK_OUTPUTS, GROUP};
use crate::packed::{expert_tensors, router_tensors};

const SMALLEST: &str = "synthetic:olmoe-1b-7b?layers=1&seed=7";

#[test]
fn every_shape_parses_and_needs_no_padding() {
    for (shape, layers, experts) in [
        ("qwen3-30b-a3b", 48, 128),
        ("qwen3-235b-a22b", 94, 128),
        ("mixtral-8x7b", 32, 8),
        ("olmoe-1b-7b", 16, 64),
    ] {
        let spec = Spec::parse(&format!("synthetic:{shape}")).unwrap();
        let config = spec.model_config().unwrap();
        assert_eq!((config.layers.len(), config.moe.experts), (layers, experts), "{shape}");
        let expert = expert_tensors(&config, 0);
        for name in router_tensors(&config).into_iter().chain(expert) {
            match kind(&config, name).unwrap() {
                TensorKind::Matrix { outputs, inputs } => {
                    assert_eq!((outputs % BLOCK_OUTPUTS, inputs % GROUP), (0, 0))
                }
                TensorKind::Expert { hidden, inter } => assert_eq!((hidden % GROUP, inter % GROUP), (0, 0)),
                TensorKind::Vector(_) | TensorKind::Embedding { .. } => {}
            }
        }
    }
}

#[test]
fn what_is_unknown_is_refused_with_the_list() {
    for (spec, part) in [
        (
            "synthetic:gpt-oss-20b",
            "there is no shape 'gpt-oss-20b'; shapes are qwen3-30b-a3b, qwen3-235b-a22b, mixtral-8x7b",
        ),
        ("synthetic:", "there is no shape ''"),
        ("synthetic:olmoe-1b-7b?layer=2", "there is no key 'layer'; keys are layers and seed"),
        ("synthetic:olmoe-1b-7b?layers=0", "layers must be a number from 1"),
        ("synthetic:olmoe-1b-7b?layers=99999999999999999999", "layers must be a number from 1"),
        ("synthetic:olmoe-1b-7b?layers", "layers must be a number from 1"),
        ("synthetic:olmoe-1b-7b?seed=-1", "seed must be a whole number"),
        ("synthetic:olmoe-1b-7b?seed=1&seed=1", "seed is given twice"),
        ("olmoe-1b-7b", "a synthetic model is named synthetic:<shape>"),
    ] {
        let message = Synthetic::parse(spec, Format::Q4).unwrap_err().to_string();
        assert!(message.contains(part), "{spec}: {message}");
    }
}

#[test]
fn spellings_of_one_model_are_one_model() {
    let of = |spec: &str| Synthetic::parse(spec, Format::Q4).unwrap();
    let canonical = "synthetic:olmoe-1b-7b?layers=16&seed=0";
    for spec in ["synthetic:olmoe-1b-7b", "synthetic:olmoe-1b-7b?", "synthetic:olmoe-1b-7b?seed=0&layers=16"]
    {
        assert_eq!(
            (of(spec).canonical().as_str(), of(spec).fingerprint()),
            (canonical, of(canonical).fingerprint())
        );
    }
    assert_ne!(of(canonical).fingerprint(), of("synthetic:olmoe-1b-7b?seed=1").fingerprint());
    assert_ne!(of(canonical).fingerprint(), of("synthetic:olmoe-1b-7b?layers=2").fingerprint());
    assert_ne!(of(canonical).fingerprint(), Synthetic::parse(canonical, Format::Q8).unwrap().fingerprint());
}

/// Two machines must make the same bytes: these hashes were printed once and may change only with the generator's
/// version ("1" in the key derivation), which changes the fingerprint too.
#[test]
fn bytes_are_the_same_everywhere() {
    let hash = |format: Format, name: TensorName| {
        let bytes = Synthetic::parse(SMALLEST, format).unwrap().tensor(name).unwrap();
        blake3::hash(&bytes).to_hex()[..16].to_string()
    };
    let found = [
        hash(Format::Q4, TensorName::Expert(0, 5)),
        hash(Format::Q8, TensorName::Expert(0, 5)),
        hash(Format::Bf16, TensorName::Expert(0, 5)),
        hash(Format::Q4, TensorName::Gate(0)),
        hash(Format::Q4, TensorName::FfnNorm(0)),
    ];
    assert_eq!(found, PINNED);
}

const PINNED: [&str; 5] =
    ["3753dba86b9bff5a", "2ce5ab799b41f96b", "234e705d0b2f3798", "9ffa772a105da712", "deb4217711cf941f"];

#[test]
fn rows_keep_their_size() {
    for format in Format::ALL {
        let model = Synthetic::parse(SMALLEST, format).unwrap();
        let row: Vec<f32> = (0..2048).map(|i| if i % 3 == 0 { 1.2 } else { [-0.9, 0.88][i % 2] }).collect();
        let size = |values: &[f32]| (values.iter().map(|v| v * v).sum::<f32>() / values.len() as f32).sqrt();
        let qkv = model.tensor(TensorName::Qkv(0)).unwrap();
        let qkv = probe::product(format, (3 * 2048, 2048), &qkv, &[&row]);
        let expert = model.tensor(TensorName::Expert(0, 3)).unwrap();
        let expert = probe::run(format, (2048, 1024), &expert, &[&row]);
        let (qkv, expert) = (size(&qkv[0]) / size(&row), size(&expert[0]));
        assert!((0.85..1.15).contains(&qkv), "{format}: {qkv}");
        assert!((0.15..0.25).contains(&expert), "{format}: {expert}");
    }
}

#[test]
fn the_step_is_what_the_probe_of_a_real_model_finds() {
    for format in Format::ALL {
        let model = Synthetic::parse(SMALLEST, format).unwrap();
        let floats = |name| -> Vec<f32> {
            let bytes = model.tensor(name).unwrap();
            bytes.as_chunks::<4>().0.iter().map(|bits| f32::from_le_bytes(*bits)).collect()
        };
        let (norm, gate) = (floats(TensorName::FfnNorm(0)), floats(TensorName::Gate(0)));
        let view = LayerView { index: 0, norm: &norm, gate: &gate };
        let probed = probe::step(model.config(), format, view, |expert| {
            Ok(model.tensor(TensorName::Expert(0, expert as u16)).unwrap().to_vec())
        });
        let difference = i32::from(probed.unwrap()) - i32::from(model.step_log2());
        assert!(difference.abs() <= 1, "{format}: off by 2^{difference}");
    }
}

/// A family whose norms, gates and stacked tensors all exist, in a size for tests.
const TINY: &str = r#"{"model_type": "mixtral", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_hidden_layers": 9, "num_local_experts": 8, "vocab_size": 300}"#;

#[test]
fn a_written_checkpoint_is_a_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let spec = Spec { shape: "tiny", config: TINY, layers: Some(2), seed: 3 };
    let mut last = (0, 0);
    write::write(&spec, (directory.path(), 1 << 20), &mut |done, total, _| last = (done, total)).unwrap();
    assert!(last.0 == last.1 && last.0 > 600_000, "{last:?}");
    let config = parse(&std::fs::read_to_string(directory.path().join("config.json")).unwrap()).unwrap();
    assert_eq!(config, spec.model_config().unwrap());
    let checkpoint = Checkpoint::open(directory.path()).unwrap();
    assert_eq!(checkpoint.files().count(), 1);
    let mut count = 0;
    for (_, _, crate::pack::Source { name, shape }) in crate::pack::source_tensors(&config) {
        let view = checkpoint.tensor(&name, &shape).unwrap();
        let mut row = vec![0.0; view.row_len()];
        view.row_to_f32(view.shape[0] as usize - 1, &mut row);
        assert!(row.iter().all(|value| value.is_finite() && value.abs() < 2.0), "{name}");
        count += 1;
    }
    assert_eq!(count, checkpoint.names().count());
    let norm = checkpoint.tensor("model.norm.weight", &[64]).unwrap().to_f32();
    assert!(norm.iter().all(|value| (0.9..1.1).contains(value)) && norm[0] != norm[1]);
    let message =
        write::write(&spec, (directory.path(), 1 << 20), &mut |_, _, _| {}).unwrap_err().to_string();
    assert!(message.contains("model.safetensors exists; give an empty directory"), "{message}");
}

#[test]
fn shards_hold_the_same_tensors_as_one_file() {
    let (one, many) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let spec = Spec { shape: "tiny", config: TINY, layers: Some(1), seed: 3 };
    write::write(&spec, (one.path(), 1 << 20), &mut |_, _, _| {}).unwrap();
    write::write(&spec, (many.path(), 100_000), &mut |_, _, _| {}).unwrap();
    let (one, many) = (Checkpoint::open(one.path()).unwrap(), Checkpoint::open(many.path()).unwrap());
    assert_eq!((one.files().count(), many.files().count()), (1, 5));
    for (_, _, crate::pack::Source { name, shape }) in
        crate::pack::source_tensors(&spec.model_config().unwrap())
    {
        assert_eq!(
            one.tensor(&name, &shape).unwrap().bytes,
            many.tensor(&name, &shape).unwrap().bytes,
            "{name}"
        );
    }
}

#[test]
fn the_tokenizer_has_every_id_once() {
    let json = tokenizer::tokenizer(50304);
    let vocab = json["model"]["vocab"].as_object().unwrap();
    let ids: std::collections::BTreeSet<u64> = vocab.values().filter_map(serde_json::Value::as_u64).collect();
    assert_eq!((vocab.len(), ids.len(), ids.last()), (50304, 50304, Some(&50303)));
    assert_eq!(vocab["A"], 65);
    assert_eq!(vocab["\u{120}"], 32);
    assert_eq!(vocab["\u{10a}"], 10);
}
