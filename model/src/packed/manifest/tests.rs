//! Rung: pure. Manifests that were tampered with are refused.

use std::path::Path;

use serde_json::{Value, json};

use super::*;

const NO_PROGRESS: fn(u64, u64, &str) = |_, _, _| {};

/// A packed directory of a tiny model, with files of the right sizes and hashes of zeros.
fn packed() -> (tempfile::TempDir, Value) {
    let text = json!({"model_type": "qwen2_moe", "hidden_size": 32, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 20, "intermediate_size": 32,
        "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 2,
        "num_experts_per_tok": 1, "mlp_only_layers": [0]});
    let config = crate::config::parse::parse(&text.to_string()).unwrap();
    let mut blobs = serde_json::Map::new();
    let mut end = 0u64;
    let names =
        router_tensors(&config).into_iter().chain((0..2).flat_map(|layer| expert_tensors(&config, layer)));
    for name in names {
        let bytes = kind(&config, name).unwrap().bytes(Format::Q4);
        let hash = blake3::hash(&vec![0; bytes]).to_hex().to_string();
        blobs.insert(name.to_string(), json!({"file": 0, "offset": end, "bytes": bytes, "blake3": hash}));
        end = (end + bytes as u64).next_multiple_of(BLOB_ALIGN);
    }
    let manifest = json!({"version": VERSION, "source": "ab", "format": "q4", "config": config,
        "steps_log2": [null, -12], "files": [{"name": "router.bin", "bytes": end}], "blobs": blobs});
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("router.bin"), vec![0; end as usize]).unwrap();
    (directory, manifest)
}

fn open(directory: &Path, manifest: &Value) -> Result<Found, ManifestError> {
    std::fs::write(directory.join(MANIFEST_FILE), manifest.to_string()).unwrap();
    PackedFiles::open(directory)
}

#[test]
fn a_correct_directory_opens_and_verifies() {
    let (directory, manifest) = packed();
    let Ok(Found::Model(model)) = open(directory.path(), &manifest) else { panic!("must open") };
    assert_eq!(
        model.tensor(TensorName::Expert(1, 1)).unwrap().unwrap().len(),
        Format::Q4.expert_bytes(32, 32)
    );
    assert!(model.tensor(TensorName::Expert(0, 0)).unwrap().is_none());
    model.verify(&mut { NO_PROGRESS }).unwrap();
    assert!(matches!(PackedFiles::open(Path::new("/nonexistent")), Ok(Found::Nothing)));
    let mut other = manifest;
    other["version"] = json!(VERSION + 1);
    assert!(matches!(open(directory.path(), &other), Ok(Found::OtherVersion)));
}

#[test]
fn tampering_is_named() {
    let changes: [(&str, Value, &str); 18] = [
        ("/version", json!("1"), "manifest.json: invalid type"),
        ("/format", json!("q5"), "unknown variant `q5`"),
        ("/format", json!("q8"), "layers.0.qkv has 1152 bytes, the config demands 2176"),
        ("/config/hidden", json!(0), "hidden_size = 0 is out of range"),
        ("/config/kv_heads", json!(3), "is not a multiple of"),
        ("/config/moe/experts", json!(3), "layers.1.gate has 256 bytes, the config demands 384"),
        ("/config/extra", json!(3), "blobs"),
        ("/steps_log2", json!([-3, -12]), "the combine steps do not fit the layers"),
        ("/steps_log2", json!([null, null]), "the combine steps do not fit the layers"),
        ("/steps_log2", json!([null, 101]), "the combine steps do not fit the layers"),
        ("/steps_log2", json!([null]), "the combine steps do not fit the layers"),
        ("/files/0/name", json!("../router.bin"), "file '../router.bin' is outside the directory"),
        ("/files/0/name", json!("/etc/passwd"), "file '/etc/passwd' is outside the directory"),
        ("/files/0/name", json!("gone.bin"), "gone.bin"),
        ("/files/0/bytes", json!(1u64 << 40), "bytes long, expected 1099511627776"),
        ("/blobs/final_norm/file", json!(7), "final_norm is in file 7, there are 1"),
        ("/blobs/final_norm/offset", json!(64), "final_norm starts at 64, not at a multiple of 4096"),
        ("/blobs/final_norm/offset", json!(u64::MAX - 4095), "reaches past the"),
    ];
    let (directory, manifest) = packed();
    for (pointer, value, part) in changes {
        let mut tampered = manifest.clone();
        match tampered.pointer_mut(pointer) {
            Some(slot) => *slot = value,
            // An unknown key in the config is not read, an unknown blob is.
            None => drop(
                tampered["blobs"]
                    .as_object_mut()
                    .unwrap()
                    .insert("extra".into(), manifest["blobs"]["head"].clone()),
            ),
        }
        let message = open(directory.path(), &tampered).unwrap_err().to_string();
        assert!(message.contains(part), "{part}\n{message}");
        assert!(message.contains("is damaged") && message.contains("delete"), "{message}");
    }
}

#[test]
fn missing_and_overlapping_blobs_are_named() {
    let (directory, manifest) = packed();
    let mut missing = manifest.clone();
    missing["blobs"].as_object_mut().unwrap().remove("layers.1.experts.1");
    let message = open(directory.path(), &missing).unwrap_err().to_string();
    assert!(message.contains("layers.1.experts.1 is missing"), "{message}");
    let mut overlapping = manifest.clone();
    overlapping["blobs"]["final_norm"]["offset"] = manifest["blobs"]["embedding"]["offset"].clone();
    let message = open(directory.path(), &overlapping).unwrap_err().to_string();
    assert!(message.contains("overlap"), "{message}");
    let mut hash = manifest.clone();
    hash["blobs"]["head"]["blake3"] = json!("00");
    assert!(open(directory.path(), &hash).unwrap_err().to_string().contains("head has no valid hash"));
    for text in ["", "{", "[]", "null", r#"{"version": 1, "version": 1}"#] {
        std::fs::write(directory.path().join(MANIFEST_FILE), text).unwrap();
        assert!(
            PackedFiles::open(directory.path()).unwrap_err().to_string().contains("is damaged"),
            "{text}"
        );
    }
}

#[test]
fn changed_bytes_are_found_by_verify() {
    let (directory, manifest) = packed();
    let path = directory.path().join("router.bin");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[manifest["blobs"]["layers.1.experts.0"]["offset"].as_u64().unwrap() as usize + 5] = 1;
    std::fs::write(&path, &bytes).unwrap();
    let Ok(Found::Model(model)) = open(directory.path(), &manifest) else {
        panic!("hashes are not compared at open")
    };
    let message = model.verify(&mut { NO_PROGRESS }).unwrap_err().to_string();
    assert!(message.contains("router.bin: layers.1.experts.0 does not have the hash"), "{message}");
    // Before they are used, too; what is next to them is not to blame.
    let expert = TensorName::Expert(1, 0);
    let message = model.tensor(expert).unwrap_err().to_string();
    assert!(message.contains("router.bin: layers.1.experts.0 does not have the hash"), "{message}");
    model.tensor(TensorName::Expert(1, 1)).unwrap();
    bytes.pop();
    std::fs::write(&path, &bytes).unwrap();
    assert!(open(directory.path(), &manifest).unwrap_err().to_string().contains("bytes long, expected"));
}

/// All of an expert of the tiny model, into memory.
fn read(model: &PackedFiles, expert: u16) -> Result<Vec<u8>, ManifestError> {
    let mut out = vec![1; Format::Q4.expert_bytes(32, 32)];
    let whole = 0..out.len();
    assert!(model.read(TensorName::Expert(1, expert), std::iter::once(whole), &mut out)?);
    Ok(out)
}

#[test]
fn each_of_1000_flipped_bits_is_found_when_the_expert_is_loaded() {
    let (directory, manifest) = packed();
    let path = directory.path().join("router.bin");
    let mut bytes = std::fs::read(&path).unwrap();
    let bits = Format::Q4.expert_bytes(32, 32) * 8;
    let mut found = 0;
    for flip in 0..1000 {
        let (expert, bit) = (flip % 2, flip * ((bits / 1000) | 1) % bits);
        let at = manifest["blobs"][format!("layers.1.experts.{expert}")]["offset"].as_u64().unwrap() as usize;
        bytes[at + bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, &bytes).unwrap();
        let Ok(Found::Model(model)) = open(directory.path(), &manifest) else { panic!("must open") };
        let whole = read(&model, expert as u16).unwrap_err().to_string();
        let name = TensorName::Expert(1, expert as u16);
        let part = model.read(name, std::iter::once(0..64), &mut [0; 64]).unwrap_err().to_string();
        let wanted = format!("router.bin: layers.1.experts.{expert} does not have the hash");
        found += usize::from(whole.contains(&wanted) && part == whole);
        assert!(read(&model, 1 - expert as u16).unwrap().iter().all(|byte| *byte == 0));
        bytes[at + bit / 8] ^= 1 << (bit % 8);
    }
    assert_eq!(found, 1000);
}

#[test]
fn a_file_that_became_shorter_is_named_and_its_map_not_touched() {
    let (directory, manifest) = packed();
    let Ok(Found::Model(model)) = open(directory.path(), &manifest) else { panic!("must open") };
    let (checked, other) = (TensorName::Expert(1, 0), TensorName::Expert(1, 1));
    model.tensor(checked).unwrap();
    model.check_length(checked).unwrap();
    let path = directory.path().join("router.bin");
    File::options().write(true).open(&path).unwrap().set_len(0).unwrap();
    let reasons = [
        model.check_length(checked).unwrap_err(),
        model.tensor(checked).unwrap_err(),
        model.tensor(other).unwrap_err(),
        read(&model, 0).unwrap_err(),
        model.verify(&mut { NO_PROGRESS }).unwrap_err(),
    ];
    for reason in reasons {
        assert!(reason.0.contains("router.bin") && reason.0.contains("became shorter"), "{reason}");
    }
    // Whoever deletes it takes its name only.
    let (directory, manifest) = packed();
    let Ok(Found::Model(model)) = open(directory.path(), &manifest) else { panic!("must open") };
    std::fs::remove_file(directory.path().join("router.bin")).unwrap();
    model.tensor(other).unwrap();
    assert_eq!(read(&model, 1).unwrap().len(), Format::Q4.expert_bytes(32, 32));
}

#[test]
fn only_runs_that_fill_the_place_and_lie_in_the_tensor_are_read() {
    let (directory, manifest) = packed();
    let Ok(Found::Model(model)) = open(directory.path(), &manifest) else { panic!("must open") };
    let bytes = Format::Q4.expert_bytes(32, 32);
    let read = |name, runs: &[(usize, usize)], len: usize| {
        model.read(name, runs.iter().map(|(from, to)| *from..*to), &mut vec![1; len]).unwrap()
    };
    let name = TensorName::Expert(1, 0);
    assert!(read(name, &[(0, 8), (16, 24)], 16));
    assert!(!read(name, &[(0, 8), (16, 24)], 17), "not filled");
    assert!(!read(name, &[(0, 8), (16, 24)], 15), "no room");
    assert!(!read(name, &[(bytes - 8, bytes + 8)], 16), "beyond the tensor");
    assert!(!read(TensorName::Expert(0, 0), &[(0, 8)], 8), "no such tensor");
}
