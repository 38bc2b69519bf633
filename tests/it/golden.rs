//! Rung: equivalence with an outside oracle. Logits and greedy tokens of Hugging Face transformers in float32
//! (tests/oracle) against ours, for every family and for the demo model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::format::Format;
use model::kernel::native::{Native, NativeConfig};
use model::open::Model;
use model::reference::{Reference, Want};
use serde_json::Value;

/// A folder of golden values.
struct Golden {
    values: Value,
    logits: Vec<f32>,
}

impl Golden {
    fn read(folder: &str) -> Golden {
        let folder = moemesh_tests::fixtures().join(folder);
        let text = std::fs::read_to_string(folder.join("golden.json")).unwrap();
        let bytes = std::fs::read(folder.join("logits.f32")).unwrap();
        let logits = bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        Golden { values: serde_json::from_str(&text).unwrap(), logits }
    }

    fn tokens(&self, key: &str) -> Vec<Vec<u32>> {
        let rows = self.values[key].as_array().unwrap();
        rows.iter()
            .map(|row| row.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect())
            .collect()
    }

    fn tolerance(&self) -> f32 {
        self.values["tolerance"].as_f64().unwrap() as f32
    }
}

fn load(directory: &Path, format: Format, cache: &Path) -> Reference {
    let model = Model::open(directory.to_str().unwrap(), format, cache, &mut |_, _, _| {}).unwrap();
    let native = Arc::new(Native::new(NativeConfig::threads(2)).unwrap());
    Reference::load(Arc::new(model), Arc::<Native>::clone(&native), native, 2048).unwrap()
}

fn largest_difference(ours: &[f32], golden: &[f32]) -> f32 {
    assert_eq!(ours.len(), golden.len());
    ours.iter().zip(golden).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

fn greedy(reference: &mut Reference, prompt: &[u32], count: usize) -> Vec<u32> {
    reference.rewind(0);
    let mut tokens = vec![argmax(reference.feed(prompt, Want::Last).unwrap())];
    while tokens.len() < count {
        let next = argmax(reference.feed(&tokens[tokens.len() - 1..], Want::Last).unwrap());
        tokens.push(next);
    }
    tokens
}

/// Target Q2: largest error at most 2e-3 standard deviations, the same 64 greedy tokens.
fn check_family(folder: &str) {
    let cache = tempfile::tempdir().unwrap();
    let golden = Golden::read(folder);
    let directory: PathBuf = moemesh_tests::fixtures().join(folder);
    let mut reference = load(&directory, Format::Bf16, cache.path());
    let (prompts, continuations) = (golden.tokens("prompts"), golden.tokens("greedy"));
    let per_prompt = golden.logits.len() / prompts.len();
    for ((prompt, continuation), logits) in
        prompts.iter().zip(&continuations).zip(golden.logits.chunks(per_prompt))
    {
        reference.rewind(0);
        let worst = largest_difference(reference.feed(prompt, Want::All).unwrap(), logits);
        println!("{folder}: largest error {:.2} tolerances", worst / golden.tolerance());
        assert!(worst <= golden.tolerance(), "{folder}: {worst} is more than {}", golden.tolerance());
        assert_eq!(&greedy(&mut reference, prompt, continuation.len()), continuation, "{folder}");
    }
}

#[test]
fn qwen3_moe() {
    check_family("qwen3_moe");
}

#[test]
fn qwen3_moe_with_dense_layers_and_tied_embeddings() {
    check_family("qwen3_moe-dense-tied");
}

#[test]
fn qwen3_moe_with_yarn() {
    check_family("qwen3_moe-yarn");
}

#[test]
fn qwen2_moe() {
    check_family("qwen2_moe");
}

#[test]
fn qwen2_moe_with_window_and_linear_scaling() {
    check_family("qwen2_moe-window-linear");
}

#[test]
fn mixtral() {
    check_family("mixtral");
}

#[test]
fn olmoe() {
    check_family("olmoe");
}

#[test]
fn olmoe_with_grouped_keys() {
    check_family("olmoe-gqa");
}

/// Every config in the old spelling of transformers 4 means the same model.
#[test]
fn old_spelling_of_configs() {
    let mut seen = 0;
    for entry in std::fs::read_dir(moemesh_tests::fixtures()).unwrap() {
        let folder = entry.unwrap().path();
        let old = folder.join("config.transformers4.json");
        if !old.is_file() {
            continue;
        }
        let parse =
            |path: PathBuf| model::config::parse::parse(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(parse(old), parse(folder.join("config.json")), "{}", folder.display());
        seen += 1;
    }
    assert!(seen >= 8, "only {seen} checkpoints with an old config");
}

/// However a sequence is cut into steps, its logits are the same bits, in every weight format.
#[test]
fn chunks_never_change_bits() {
    let cache = tempfile::tempdir().unwrap();
    let directory = moemesh_tests::tale_moe();
    for format in Format::ALL {
        let mut reference = load(&directory, format, cache.path());
        let tokens: Vec<u32> = (0..150).map(|i| (i * 37 + 11) % 4000).collect();
        let whole = reference.feed(&tokens, Want::All).unwrap().to_vec();
        for chunk in [1, 7, 31, 32, 33, 64, 149] {
            reference.rewind(0);
            let mut parts = Vec::new();
            for piece in tokens.chunks(chunk) {
                parts.extend_from_slice(reference.feed(piece, Want::All).unwrap());
            }
            let same = parts.iter().zip(&whole).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same && parts.len() == whole.len(), "{format} in chunks of {chunk}");
        }
    }
}
