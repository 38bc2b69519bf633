//! Rung: pure. Damaged safetensors end in an error that names file and tensor, never in a panic.

use std::path::Path;

use proptest::prelude::*;
use serde_json::json;

use super::*;

/// A safetensors file with this header and so many bytes after it.
fn file_with(header: &str, body: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), body].concat()
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, CheckpointError> {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join(SINGLE_FILE), bytes).unwrap();
    Checkpoint::open(directory.path())
}

fn message(bytes: &[u8]) -> String {
    open_bytes(bytes).unwrap_err().to_string()
}

fn valid() -> Vec<u8> {
    let header = json!({"__metadata__": {"format": "pt"},
        "a": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [8, 12]},
        "c": {"dtype": "F16", "shape": [2], "data_offsets": [12, 16]},
        "d": {"dtype": "I64", "shape": [], "data_offsets": [16, 24]},
        "e": {"dtype": "F32", "shape": [0, 5], "data_offsets": [24, 24]}});
    let mut body = Vec::new();
    for value in [1.0f32, -2.5, 0.0, f32::INFINITY] {
        body.extend(bf16::from_f32(value).to_le_bytes());
    }
    body.extend(1e-30f32.to_le_bytes());
    body.extend([f16::from_f32(0.1), f16::from_f32(-6e-8)].into_iter().flat_map(f16::to_le_bytes));
    body.extend([0; 8]);
    file_with(&header.to_string(), &body)
}

#[test]
fn tensors_convert_exactly_from_every_type() {
    let checkpoint = open_bytes(&valid()).unwrap();
    let a = checkpoint.tensor("a", &[2, 2]).unwrap();
    assert_eq!((a.dtype, a.row_len(), a.bytes.len()), (DType::BF16, 2, 8));
    let mut row = [9.0; 3];
    a.row_to_f32(1, &mut row);
    assert_eq!(row, [0.0, f32::INFINITY, 9.0]);
    assert_eq!(a.to_f32(), [1.0, -2.5, 0.0, f32::INFINITY]);
    assert_eq!(checkpoint.tensor("b", &[1]).unwrap().to_f32(), [1e-30]);
    let c = checkpoint.tensor("c", &[2]).unwrap().to_f32();
    assert_eq!(c, [f16::from_f32(0.1).to_f32(), -5.960_464_5e-8]);
    assert!(checkpoint.tensor("e", &[0, 5]).unwrap().to_f32().is_empty());
}

#[test]
fn asking_for_what_is_not_there_names_tensor_and_file() {
    let checkpoint = open_bytes(&valid()).unwrap();
    for (name, shape, part) in [
        ("z", vec![2, 2], "tensor z is missing from"),
        ("a", vec![4], "tensor a has shape [2, 2], config.json demands [4]"),
        ("a", vec![2, 3], "tensor a has shape [2, 2], config.json demands [2, 3]"),
        ("d", vec![], "tensor d is I64; weights must be F32, F16 or BF16"),
    ] {
        let message = checkpoint.tensor(name, &shape).unwrap_err().to_string();
        assert!(message.contains(part) && message.contains(SINGLE_FILE), "{message}");
    }
}

#[test]
fn malformed_headers_are_refused_by_name() {
    let one = |tensor: Value| file_with(&json!({ "t": tensor }).to_string(), &[0; 8]);
    let two = |a: [u64; 2], b: [u64; 2]| {
        let tensor =
            |range: [u64; 2]| json!({"dtype": "U8", "shape": [range[1] - range[0]], "data_offsets": range});
        file_with(&json!({"a": tensor(a), "b": tensor(b)}).to_string(), &[0; 8])
    };
    let max = u64::MAX;
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "0 bytes long, too short"),
        (vec![0; 7], "7 bytes long, too short"),
        (vec![0; 8], "the header is not valid"),
        (max.to_le_bytes().to_vec(), "the header claims 18446744073709551615 bytes, at most 100000000"),
        (100_000_001u64.to_le_bytes().to_vec(), "the header claims 100000001 bytes"),
        (
            file_with("{}", &[])[..9].to_vec(),
            "the header claims 2 bytes, only 1 follow: the file is truncated",
        ),
        (file_with("{", &[]), "the header is not valid"),
        (file_with("[]", &[]), "the header is not valid"),
        (file_with("\u{feff}{}", &[]), "the header is not valid"),
        (file_with(&"[".repeat(100_000), &[]), "the header is not valid"),
        (file_with("{}", &[0; 3]), "3 bytes follow the last tensor"),
        (one(json!({"dtype": "F32", "shape": [2]})), "missing field `data_offsets`"),
        (one(json!({"dtype": "F32", "shape": [2], "data_offsets": [0, 8], "x": 1})), "unknown field `x`"),
        (
            one(json!({"dtype": "Q4", "shape": [2], "data_offsets": [0, 8]})),
            "tensor t: dtype 'Q4' is unknown",
        ),
        (one(json!({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]})), "the header is not valid"),
        (
            one(json!({"dtype": "F32", "shape": [3], "data_offsets": [0, 8]})),
            "shape [3] of F32 takes 12 bytes",
        ),
        (one(json!({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]})), "data_offsets are [8, 0]"),
        (one(json!({"dtype": "F32", "shape": [max, max], "data_offsets": [0, 8]})), "overflows"),
        (one(json!({"dtype": "F32", "shape": [1u64 << 62, 4], "data_offsets": [0, 8]})), "overflows"),
        (one(json!({"dtype": "U8", "shape": [max], "data_offsets": [0, max]})), "overflows"),
        (
            one(json!({"dtype": "U8", "shape": [8], "data_offsets": [max - 8, max]})),
            "expected 0: the file has a hole",
        ),
        (
            one(json!({"dtype": "U8", "shape": [9], "data_offsets": [0, 9]})),
            "tensor t ends at 9, but only 8 bytes",
        ),
        (one(json!({"dtype": "U8", "shape": vec![1; 9], "data_offsets": [0, 1]})), "9 dimensions, at most 8"),
        (two([0, 4], [5, 8]), "tensor b starts at 5, expected 4: the file has a hole or an overlap"),
        (two([0, 4], [3, 8]), "tensor b starts at 3, expected 4: the file has a hole or an overlap"),
        (two([0, 4], [4, 7]), "1 bytes follow the last tensor"),
        (
            file_with(
                r#"{"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"t":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}"#,
                &[0],
            ),
            "tensor t appears twice",
        ),
    ];
    for (bytes, part) in cases {
        let found = message(&bytes);
        assert!(found.contains(part) && found.contains(SINGLE_FILE), "{part}\n{found}");
    }
}

fn write(directory: &Path, name: &str, tensor: &str) {
    let header = json!({tensor: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).to_string();
    std::fs::write(directory.join(name), file_with(&header, &[0])).unwrap();
}

fn open_index(map: &Value, prepare: impl FnOnce(&Path)) -> Result<Checkpoint, CheckpointError> {
    let directory = tempfile::tempdir().unwrap();
    let model = directory.path().join("model");
    std::fs::create_dir(&model).unwrap();
    write(directory.path(), "outside.safetensors", "a");
    prepare(&model);
    std::fs::write(model.join(INDEX_FILE), json!({ "weight_map": map }).to_string()).unwrap();
    Checkpoint::open(&model)
}

#[test]
fn shards_are_found_through_the_index() {
    let map = json!({"a": "one.safetensors", "b": "two.safetensors"});
    let checkpoint = open_index(&map, |model| {
        write(model, "one.safetensors", "a");
        write(model, "two.safetensors", "b");
    });
    assert_eq!(checkpoint.unwrap().names().count(), 2);
}

#[test]
fn an_index_cannot_lead_elsewhere() {
    for name in [
        "../outside.safetensors",
        "/etc/passwd",
        "..",
        ".",
        "",
        "sub/one.safetensors",
        "./one.safetensors",
        "one.safetensors/",
    ] {
        let found =
            open_index(&json!({ "a": name }), |model| write(model, "one.safetensors", "a")).unwrap_err().0;
        assert!(found.contains("files must lie beside the index"), "{name}: {found}");
    }
    for (map, part) in [
        (json!({}), "weight_map is empty"),
        (json!(null), "weight_map is missing"),
        (json!({"a": 1}), "weight_map gives 1 for tensor a"),
        (json!({"a": "gone.safetensors"}), "gone.safetensors is missing, but"),
        (json!({"z": "one.safetensors"}), "tensor z is not in one.safetensors, where"),
    ] {
        let found = open_index(&map, |model| write(model, "one.safetensors", "a")).unwrap_err().0;
        assert!(found.contains(part), "{part}\n{found}");
    }
    let twice = open_index(&json!({"a": "one.safetensors", "b": "two.safetensors"}), |model| {
        write(model, "one.safetensors", "a");
        write(model, "two.safetensors", "a");
    });
    assert!(twice.unwrap_err().0.contains("tensor a is also in"));
}

#[test]
fn only_regular_files_are_opened() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(SINGLE_FILE);
    std::fs::create_dir(&path).unwrap();
    assert!(Checkpoint::open(directory.path()).unwrap_err().0.contains("is not a regular file"));
    std::fs::remove_dir(&path).unwrap();
    std::os::unix::fs::symlink("/dev/zero", &path).unwrap();
    assert!(Checkpoint::open(directory.path()).unwrap_err().0.contains("is not a regular file"));
}

#[test]
fn a_directory_without_weights_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let message = || Checkpoint::open(directory.path()).unwrap_err().0;
    assert!(message().contains("has neither model.safetensors nor model.safetensors.index.json; download"));
    std::fs::write(directory.path().join("pytorch_model.bin"), "").unwrap();
    assert!(message().contains("convert them to safetensors"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    /// A file cut anywhere is refused.
    #[test]
    fn truncation_is_refused(cut in 0usize..1000) {
        let valid = valid();
        let cut = cut % valid.len();
        prop_assert!(header::parse(&valid[..cut]).is_err());
    }

    /// A file with any bytes changed is read within its bounds or refused.
    #[test]
    fn damage_never_leads_outside(flips in prop::collection::vec((any::<usize>(), any::<u8>()), 1..6)) {
        let mut bytes = valid();
        for (at, value) in flips {
            let at = at % bytes.len();
            bytes[at] = value;
        }
        if let Ok((start, entries)) = header::parse(&bytes) {
            for (_, entry) in entries {
                prop_assert!(entry.begin <= entry.end && start + entry.end <= bytes.len());
                let elements: u64 = entry.shape.iter().product();
                if let Some(width) = entry.dtype.float_bytes() {
                    prop_assert_eq!((entry.end - entry.begin) as u64, elements * width as u64);
                }
            }
        }
    }
}
