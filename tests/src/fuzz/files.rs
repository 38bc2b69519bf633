//! Files of models: `config.json`, checkpoints and packed directories, as strangers may have written them.

use std::cell::OnceCell;
use std::path::{Path, PathBuf};

use model::checkpoint::{Checkpoint, INDEX_FILE, SINGLE_FILE};
use model::config::parse::limits::{MAX_EXPERTS, MAX_HIDDEN, MAX_INTER, MAX_LAYERS, MAX_TOP_K, MAX_VOCAB};
use model::config::{ModelConfig, parse};
use model::format::Format;
use model::packed::manifest::{Found, MANIFEST_FILE, PackedFiles};
use model::packed::{TensorName, expert_tensors, kind, router_tensors};
use serde_json::Value;
use tempfile::TempDir;

use super::{Verdict, says_why};

/// Tensors of a model that are looked at one by one: a config may ask for millions.
const TENSORS_MAX: usize = 20_000;

/// Elements that are converted: a tensor without bytes may claim any number of rows.
const ELEMENTS_MAX: usize = 1 << 16;

/// Name and bytes of the file that a manifest finds beside it; zeros, none of which lie on the disk.
pub(super) const WEIGHTS: (&str, u64) = ("weights.bin", 1 << 20);

/// Files that an index finds beside it, each with one tensor of the name and two bytes.
pub(super) const SHARDS: [(&str, &str); 2] = [("a.safetensors", "a.weight"), ("b.safetensors", "b.weight")];

/// Where folders are made if it is set: libFuzzer ends its process without any clean-up.
const FOLDER_VARIABLE: &str = "MOEMESH_FUZZ_FOLDER";

/// A folder of this thread, in memory where there is such a place, which is removed with the thread.
pub(super) fn folder(what: &str) -> PathBuf {
    thread_local! {
        static ROOT: OnceCell<TempDir> = const { OnceCell::new() };
    }
    let memory = Path::new("/dev/shm");
    let usual = || if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
    let place = std::env::var_os(FOLDER_VARIABLE).map_or_else(usual, PathBuf::from);
    let made =
        || tempfile::Builder::new().prefix("moemesh-fuzz-").tempdir_in(place).expect("a folder can be made");
    let folder = ROOT.with(|root| root.get_or_init(made).path().join(what));
    std::fs::create_dir_all(&folder).expect("a folder can be made");
    folder
}

/// Writes a file whole, in place of what was there.
pub(super) fn put(folder: &Path, name: &str, content: &[u8]) {
    std::fs::write(folder.join(name), content).expect("the folder can be written to");
}

/// The text of a `config.json`.
pub(super) fn config(bytes: &[u8]) -> Verdict {
    let Ok(text) = std::str::from_utf8(bytes) else { return Verdict::Refused };
    let config = match parse::parse(text) {
        Ok(config) => config,
        Err(error) => {
            assert!(error.to_string().starts_with("config.json: "), "{error}");
            return says_why(&error);
        }
    };
    keeps_limits(&config);
    let written = serde_json::to_string(&config).expect("a config can be written");
    let read: ModelConfig = serde_json::from_str(&written).expect("what was written can be read");
    assert_eq!(read, config);
    parse::check(&read).expect("it passed before");
    let names = router_tensors(&config).into_iter();
    let experts = (0..config.layers.len()).flat_map(|layer| expert_tensors(&config, layer));
    for name in names.chain(experts).take(TENSORS_MAX) {
        let kind = kind(&config, name).expect("a tensor of the model is of some kind");
        assert!(Format::ALL.iter().all(|format| kind.bytes(*format) > 0), "{name} has no bytes");
    }
    for format in Format::ALL {
        assert!(config.token_bytes(format).router > 0);
    }
    Verdict::Taken
}

fn keeps_limits(config: &ModelConfig) {
    let sizes = [
        (config.hidden, MAX_HIDDEN),
        (config.vocab, MAX_VOCAB),
        (config.layers.len(), MAX_LAYERS),
        (config.moe.experts, MAX_EXPERTS),
        (config.moe.inter, MAX_INTER),
        (config.moe.top_k, MAX_TOP_K.min(config.moe.experts)),
    ];
    assert!(sizes.iter().all(|(size, limit)| (1..=*limit).contains(size)), "{sizes:?}");
    assert!(config.heads.is_multiple_of(config.kv_heads) && config.head_dim.is_multiple_of(2));
    assert!(config.rope.theta.is_finite() && config.norm_eps > 0.0);
}

/// Even first byte: a whole safetensors file. Odd: its header, to which the length in front is added, and behind it as
/// many zeros as the two bytes after the first say.
pub(super) fn safetensors(bytes: &[u8]) -> Verdict {
    let file = match bytes {
        [mode, rest @ ..] if mode % 2 == 0 => rest.to_vec(),
        [_, low, high, header @ ..] => {
            let zeros = vec![0; u16::from_le_bytes([*low, *high]).into()];
            [&(header.len() as u64).to_le_bytes()[..], header, &zeros].concat()
        }
        _ => return Verdict::Refused,
    };
    let folder = folder("safetensors");
    put(&folder, SINGLE_FILE, &file);
    let checkpoint = match Checkpoint::open(&folder) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            assert!(error.0.contains(SINGLE_FILE), "which file? {error}");
            return says_why(&error);
        }
    };
    let Some((length, rest)) = file.split_first_chunk::<8>() else {
        panic!("a file without a header is taken")
    };
    let header = &rest[..u64::from_le_bytes(*length) as usize];
    let header: Value = serde_json::from_slice(header).expect("a header that is taken is JSON");
    let mut total = 0;
    for name in checkpoint.names() {
        let sizes = header[name]["shape"].as_array().expect("a tensor has a shape");
        let shape: Vec<usize> = sizes.iter().filter_map(Value::as_u64).map(|size| size as usize).collect();
        let range = &header[name]["data_offsets"];
        total += range[1].as_u64().unwrap_or(0) - range[0].as_u64().unwrap_or(0);
        tensor(&checkpoint, name, &shape);
    }
    assert_eq!(
        total as usize,
        rest.len() - u64::from_le_bytes(*length) as usize,
        "every byte is some tensor's"
    );
    Verdict::Taken
}

fn tensor(checkpoint: &Checkpoint, name: &str, shape: &[usize]) {
    let view = match checkpoint.tensor(name, shape) {
        Ok(view) => view,
        Err(error) => {
            assert!(error.0.contains("weights must be F32, F16 or BF16"), "{error}");
            return;
        }
    };
    let elements: usize = shape.iter().product();
    assert_eq!(view.bytes.len(), elements * view.dtype.float_bytes().unwrap_or(0), "{name}");
    if elements > ELEMENTS_MAX || view.row_len() > ELEMENTS_MAX {
        return;
    }
    let all = view.to_f32();
    let rows = shape.first().copied().unwrap_or(1);
    if rows > 0 && elements > 0 {
        let mut row = vec![0.0; view.row_len()];
        view.row_to_f32(rows - 1, &mut row);
        let last = &all[all.len() - row.len()..];
        assert!(row.iter().zip(last).all(|(a, b)| a.to_bits() == b.to_bits()), "{name}");
    }
    let wrong: Vec<usize> = shape.iter().copied().chain([1]).collect();
    assert!(checkpoint.tensor(name, &wrong).is_err(), "{name} has every shape");
}

/// The index of a checkpoint of several files (`SHARDS`).
pub(super) fn checkpoint_index(bytes: &[u8]) -> Verdict {
    let folder = folder("index");
    for (file, tensor) in SHARDS {
        put(&folder, file, &shard(tensor));
    }
    put(&folder, INDEX_FILE, bytes);
    let checkpoint = match Checkpoint::open(&folder) {
        Ok(checkpoint) => checkpoint,
        Err(error) => {
            assert!(error.0.contains("safetensors"), "which file? {error}");
            return says_why(&error);
        }
    };
    for (path, _) in checkpoint.files() {
        assert_eq!(path.parent(), Some(folder.as_path()), "a file from elsewhere");
    }
    for name in checkpoint.names() {
        checkpoint.tensor(name, &[1]).expect("a tensor of a file that the index names");
    }
    Verdict::Taken
}

fn shard(tensor: &str) -> Vec<u8> {
    let header = format!(r#"{{"{tensor}":{{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}}}"#);
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &[0, 0]].concat()
}

/// The manifest of a packed directory beside its one file of weights.
pub(super) fn manifest(bytes: &[u8]) -> Verdict {
    let folder = folder("packed");
    let weights = folder.join(WEIGHTS.0);
    if !weights.exists() {
        let file = std::fs::File::create(&weights).expect("the folder can be written to");
        file.set_len(WEIGHTS.1).expect("a file of zeros takes no room");
    }
    put(&folder, MANIFEST_FILE, bytes);
    let packed = match PackedFiles::open(&folder) {
        Ok(Found::Model(packed)) => packed,
        Ok(Found::Nothing) => panic!("there is a manifest, and it is not seen"),
        Ok(Found::OtherVersion) => return Verdict::Refused,
        Err(error) => {
            assert!(error.0.contains(MANIFEST_FILE) || error.0.contains("damaged"), "which file? {error}");
            return says_why(&error);
        }
    };
    let manifest = packed.manifest();
    keeps_limits(&manifest.config);
    let config = &manifest.config;
    let experts = (0..config.layers.len()).flat_map(|layer| expert_tensors(config, layer));
    for name in router_tensors(config).into_iter().chain(experts) {
        let demanded =
            kind(config, name).expect("a tensor of the model is of some kind").bytes(manifest.format);
        // The bytes are what they are; those that do not have their hash are not given out.
        match packed.tensor(name) {
            Ok(bytes) => {
                let bytes = bytes.expect("a manifest that is taken has every tensor");
                assert_eq!(bytes.len(), demanded, "{name}");
                assert!(bytes.as_ptr().addr().is_multiple_of(64), "{name}");
            }
            Err(error) => {
                says_why(&error);
            }
        }
    }
    assert!(matches!(packed.tensor(TensorName::Expert(u16::MAX, 0)), Ok(None)));
    assert_eq!(packed.fingerprint(), *blake3::hash(bytes).as_bytes());
    if let Err(error) = packed.verify(&mut |_, _, _| {}) {
        says_why(&error);
    }
    let written = serde_json::to_vec(manifest).expect("a manifest can be written");
    let read: model::packed::manifest::Manifest =
        serde_json::from_slice(&written).expect("what was written can be read");
    assert_eq!(&read, manifest);
    Verdict::Taken
}
