//! Rung: pure. Packing: layout, combine steps, killed and simultaneous packers.

use std::path::{Path, PathBuf};
use std::sync::Barrier;

use half::bf16;
use serde_json::{Value, json};

use super::*;
use crate::format::{BLOCK_OUTPUTS, GROUP, padded_inputs};
use crate::packed::manifest::BLOB_ALIGN;

/// Tensors to write: name, shape and values.
type Tensors = Vec<Part>;

type Part = (String, Vec<usize>, Vec<f32>);

fn config(family: &str) -> Value {
    // Nothing is a multiple of 32 or 16, so that every kind of padding occurs.
    let mut config = json!({"model_type": family, "hidden_size": 40, "num_attention_heads": 2,
        "num_key_value_heads": 1, "num_hidden_layers": 2, "vocab_size": 21, "intermediate_size": 20,
        "num_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": false});
    match family {
        "qwen3_moe" => config["moe_intermediate_size"] = json!(20),
        "qwen2_moe" => {
            config["moe_intermediate_size"] = json!(20);
            config["shared_expert_intermediate_size"] = json!(22);
            config["intermediate_size"] = json!(18);
            config["mlp_only_layers"] = json!([0]);
        }
        _ => {}
    }
    config
}

/// The value of element `index` of a tensor: different everywhere, exact in bf16.
fn value(tensor: usize, index: usize) -> f32 {
    bf16::from_f32(((tensor * 31 + index * 7) % 253) as f32 / 128.0 - 1.0).to_f32()
}

fn tensors(config: &Value) -> Tensors {
    let config = parse::parse(&config.to_string()).unwrap();
    let fill = |(tensor, (_, _, Source { name, shape })): (usize, (TensorName, usize, Source))| {
        let values = (0..shape.iter().product()).map(|index| value(tensor, index)).collect();
        (name, shape, values)
    };
    source_tensors(&config).enumerate().map(fill).collect()
}

fn write(directory: &Path, config: &Value, tensors: &Tensors) {
    std::fs::write(directory.join("config.json"), config.to_string()).unwrap();
    let (mut header, mut body) = (serde_json::Map::new(), Vec::new());
    for (name, shape, values) in tensors {
        let start = body.len();
        body.extend(values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes()));
        header.insert(
            name.clone(),
            json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, body.len()]}),
        );
    }
    let header = Value::Object(header).to_string();
    let file = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &body].concat();
    std::fs::write(directory.join("model.safetensors"), file).unwrap();
}

struct Case {
    root: tempfile::TempDir,
}

impl Case {
    fn new(config: &Value, tensors: &Tensors) -> Case {
        let case = Case { root: tempfile::tempdir().unwrap() };
        std::fs::create_dir(case.model()).unwrap();
        write(&case.model(), config, tensors);
        case
    }

    fn model(&self) -> PathBuf {
        self.root.path().join("tiny model")
    }

    fn cache(&self) -> PathBuf {
        self.root.path().join("cache")
    }

    fn open(&self, format: Format) -> Result<PackedFiles, PackError> {
        open_or_pack(&self.model(), format, &self.cache(), &mut |_, _, _| {})
    }

    fn refusal(&self) -> String {
        self.open(Format::Q4).unwrap_err().to_string()
    }

    /// The directories in the cache of the one model.
    fn home(&self) -> PathBuf {
        let entries = std::fs::read_dir(self.cache()).unwrap().flatten().map(|entry| entry.path());
        let homes: Vec<PathBuf> = entries.filter(|path| !path.ends_with("identities")).collect();
        assert_eq!(homes.len(), 1, "{homes:?}");
        homes[0].clone()
    }
}

/// Element `(output, input)` of a packed matrix, found by the documented layout alone.
fn element(format: Format, bytes: &[u8], inputs: usize, (output, input): (usize, usize)) -> f32 {
    let padded = padded_inputs(inputs);
    if format == Format::Bf16 {
        let at = 2 * (output * padded + input);
        return bf16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32();
    }
    let group = output / BLOCK_OUTPUTS * (padded / GROUP) + input / GROUP;
    let mut values = [[0.0; BLOCK_OUTPUTS]; GROUP];
    quantize::dequantize(format, &bytes[group * format.group_bytes()..][..format.group_bytes()], &mut values);
    values[input % GROUP][output % BLOCK_OUTPUTS]
}

/// The packed matrix has these rows, then zeros.
fn assert_rows(format: Format, bytes: &[u8], inputs: usize, rows: &[&[f32]]) {
    assert_eq!(bytes.len() % format.matrix_bytes(1, inputs), 0);
    let outputs = bytes.len() / format.matrix_bytes(BLOCK_OUTPUTS, inputs) * BLOCK_OUTPUTS;
    let tolerance = match format {
        Format::Bf16 => 0.0,
        Format::Q8 => 0.5 / 127.0 + 1e-3,
        Format::Q4 => 0.15,
    };
    for output in 0..outputs {
        for input in 0..padded_inputs(inputs) {
            let expected = rows.get(output).and_then(|row| row.get(input)).copied();
            let found = element(format, bytes, inputs, (output, input));
            let error = (found - expected.unwrap_or(0.0)).abs();
            assert!(
                error <= if expected.is_some() { tolerance } else { 0.0 },
                "{format} {output} {input}: {found}"
            );
        }
    }
}

#[test]
fn every_tensor_lies_where_the_documentation_says() {
    for family in ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"] {
        let config = config(family);
        let tensors = tensors(&config);
        let case = Case::new(&config, &tensors);
        let parsed = parse::parse(&config.to_string()).unwrap();
        for format in Format::ALL {
            let packed = case.open(format).unwrap();
            let find = |name: &str| tensors.iter().find(|(known, ..)| known == name).unwrap();
            for name in
                router_tensors(&parsed).into_iter().chain((0..2).flat_map(|l| expert_tensors(&parsed, l)))
            {
                let sources = names::sources(&parsed, name);
                let bytes = packed.tensor(name).unwrap().unwrap();
                let parts: Vec<_> = sources.iter().map(|source| find(&source.name)).collect();
                check(format, kind(&parsed, name).unwrap(), &bytes, &parts);
            }
        }
    }
}

/// The rows of stacked tensors.
fn rows(parts: &[&Part]) -> Vec<Vec<f32>> {
    let rows = |part: &Part| -> Vec<Vec<f32>> { part.2.chunks(part.1[1]).map(<[f32]>::to_vec).collect() };
    parts.iter().flat_map(|part| rows(part)).collect()
}

fn check(format: Format, kind: TensorKind, bytes: &[u8], parts: &[&Part]) {
    match kind {
        TensorKind::Vector(len) => {
            let expected: Vec<u8> =
                parts.iter().flat_map(|part| &part.2).flat_map(|v| v.to_le_bytes()).collect();
            assert_eq!((bytes, len * 4), (expected.as_slice(), bytes.len()));
        }
        TensorKind::Embedding { .. } => {
            let expected = parts[0].2.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes());
            assert_eq!(bytes, expected.collect::<Vec<u8>>());
        }
        TensorKind::Matrix { inputs, .. } => {
            let rows = rows(parts);
            assert_rows(format, bytes, inputs, &rows.iter().map(Vec::as_slice).collect::<Vec<_>>());
        }
        TensorKind::Expert { hidden, inter } => {
            let [gate, up, down] = [0, 1, 2].map(|part| rows(&parts[part..=part]));
            let padded = padded_inputs(inter);
            let zero = vec![0.0; hidden];
            let row = |matrix: &[Vec<f32>], index: usize| matrix.get(index).unwrap_or(&zero).clone();
            let both: Vec<Vec<f32>> = (0..2 * padded)
                .map(|output| match (format, output / BLOCK_OUTPUTS, output % BLOCK_OUTPUTS) {
                    (Format::Bf16, ..) if output < padded => row(&gate, output),
                    (Format::Bf16, ..) => row(&up, output - padded),
                    (_, block, rest) if block % 2 == 0 => row(&gate, block / 2 * BLOCK_OUTPUTS + rest),
                    (_, block, rest) => row(&up, block / 2 * BLOCK_OUTPUTS + rest),
                })
                .collect();
            let (first, second) = bytes.split_at(format.matrix_bytes(2 * padded, hidden));
            assert_rows(format, first, hidden, &both.iter().map(Vec::as_slice).collect::<Vec<_>>());
            assert_rows(format, second, inter, &down.iter().map(Vec::as_slice).collect::<Vec<_>>());
            let x: Vec<f32> = (0..hidden).map(|index| value(99, index)).collect();
            let found = &probe::run(format, (hidden, inter), bytes, &[&x])[0];
            let dot = |row: &[f32], x: &[f32]| -> f32 { row.iter().zip(x).map(|(a, b)| a * b).sum() };
            let h = |i: usize| {
                let g = dot(&gate[i], &x);
                g / (1.0 + (-g).exp()) * dot(&up[i], &x)
            };
            let h: Vec<f32> = (0..inter).map(h).collect();
            let expected: Vec<f32> = down.iter().map(|row| dot(row, &h)).collect();
            let size = expected.iter().map(|v| v * v).sum::<f32>().sqrt();
            let error = found.iter().zip(&expected).map(|(a, b)| (a - b) * (a - b)).sum::<f32>().sqrt();
            let allowed = [1e-5, 0.03, 0.4][format as usize];
            assert!(error < allowed * size, "{format}: {error} of {size}");
        }
    }
}

#[test]
fn blobs_are_aligned_and_files_split_by_layer() {
    let config = config("qwen2_moe");
    let case = Case::new(&config, &tensors(&config));
    let packed = case.open(Format::Q4).unwrap();
    let manifest = packed.manifest();
    let files: Vec<&str> = manifest.files.iter().map(|file| file.name.as_str()).collect();
    assert_eq!(files, ["router.bin", "layer-001.bin"]);
    assert!(manifest.blobs.values().all(|blob| blob.offset % BLOB_ALIGN == 0));
    assert_eq!(manifest.blobs["layers.1.experts.2"].file, 1);
    assert!(manifest.steps_log2[0].is_none() && manifest.steps_log2[1].is_some());
    assert_eq!(
        case.home().file_name().unwrap().to_string_lossy(),
        format!("tiny_model-{}", &manifest.source[..16])
    );
    packed.verify(&mut |_, _, _| {}).unwrap();
}

#[test]
fn equal_content_packs_to_equal_bytes_and_other_content_elsewhere() {
    let config = config("olmoe");
    let mut tensors = tensors(&config);
    let (a, b) = (Case::new(&config, &tensors), Case::new(&config, &tensors));
    let (first, second) = (a.open(Format::Q4).unwrap(), b.open(Format::Q4).unwrap());
    assert_eq!(first.fingerprint(), second.fingerprint());
    // One weight differs, in a file of the same length: the old packing must not be used.
    tensors[5].2[3] += 1.0;
    write(&a.model(), &config, &tensors);
    let changed = a.open(Format::Q4).unwrap();
    assert_ne!(changed.manifest().source, first.manifest().source);
    assert_ne!(changed.fingerprint(), first.fingerprint());
    assert_eq!(std::fs::read_dir(a.cache()).unwrap().count(), 2);
}

#[test]
fn a_settled_checkpoint_is_hashed_once() {
    let config = config("olmoe");
    let mut tensors = tensors(&config);
    let case = Case::new(&config, &tensors);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    let identify = |now_s: i64| {
        let checkpoint = Checkpoint::open(&case.model()).unwrap();
        let memory = identity::Memory { cache: &case.cache(), now_s };
        let mut hashed = false;
        let text = std::fs::read_to_string(case.model().join("config.json")).unwrap();
        let hash =
            identity::identify(&case.model(), &text, &checkpoint, &memory, &mut |_, _, _| hashed = true);
        (hash.unwrap(), hashed)
    };
    let (hash, hashed) = identify(now);
    // Young files are not trusted: their times could not show another change.
    assert!(hashed && identify(now) == (hash.clone(), true));
    assert_eq!(identify(now + 100), (hash.clone(), true));
    assert_eq!(identify(now + 100), (hash.clone(), false));
    tensors[0].2[0] += 1.0;
    write(&case.model(), &config, &tensors);
    let (changed, hashed) = identify(now + 100);
    assert!(hashed && changed != hash);
    let mut other = config.clone();
    other["rope_theta"] = json!(77.0);
    write(&case.model(), &other, &tensors);
    assert_ne!(identify(now + 100).0, changed);
}

#[test]
fn what_a_killed_pack_left_is_cleared() {
    let config = config("mixtral");
    let case = Case::new(&config, &tensors(&config));
    let fingerprint = case.open(Format::Q4).unwrap().fingerprint();
    let (home, target) = (case.home(), case.home().join("q4"));
    // As if the process had died before the manifest was written, and another before the rename.
    std::fs::remove_file(target.join(MANIFEST_FILE)).unwrap();
    std::fs::create_dir(home.join(".q4-99999")).unwrap();
    std::fs::write(home.join(".q4-99999").join("router.bin"), "half").unwrap();
    assert_eq!(case.open(Format::Q4).unwrap().fingerprint(), fingerprint);
    let mut names: Vec<_> =
        std::fs::read_dir(&home).unwrap().flatten().map(|entry| entry.file_name()).collect();
    names.sort();
    assert_eq!(names, ["q4", "q4.lock"]);
}

#[test]
fn a_damaged_packing_is_not_used_and_says_what_to_delete() {
    let config = config("mixtral");
    let case = Case::new(&config, &tensors(&config));
    drop(case.open(Format::Q4).unwrap());
    let file = case.home().join("q4").join("layer-001.bin");
    let length = std::fs::metadata(&file).unwrap().len();
    File::options().write(true).open(&file).unwrap().set_len(length - 1).unwrap();
    let message = case.refusal();
    assert!(message.contains("is damaged: layer-001.bin") && message.contains("delete"), "{message}");
}

#[test]
fn packs_at_once_agree() {
    let config = config("qwen3_moe");
    let case = Case::new(&config, &tensors(&config));
    let barrier = Barrier::new(4);
    let fingerprints: Vec<[u8; 32]> = std::thread::scope(|scope| {
        let open = || {
            barrier.wait();
            case.open(Format::Q4).unwrap().fingerprint()
        };
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(open)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    assert!(fingerprints.iter().all(|fingerprint| *fingerprint == fingerprints[0]));
}

#[test]
fn tied_heads_come_from_the_embedding() {
    let mut config = config("qwen3_moe");
    config["tie_word_embeddings"] = json!(true);
    let tensors = tensors(&config);
    assert!(tensors.iter().all(|(name, ..)| name != "lm_head.weight"));
    let case = Case::new(&config, &tensors);
    let packed = case.open(Format::Bf16).unwrap();
    let rows: Vec<&[f32]> = tensors[0].2.chunks(40).collect();
    assert_rows(Format::Bf16, &packed.tensor(TensorName::Head).unwrap().unwrap(), 40, &rows);
}

#[test]
fn bad_checkpoints_are_refused_by_name() {
    let config = config("olmoe");
    let good = tensors(&config);
    let expert =
        good.iter().position(|(name, ..)| name == "model.layers.1.mlp.experts.2.up_proj.weight").unwrap();
    let refusal = |change: &dyn Fn(&mut Tensors)| {
        let mut tensors = good.clone();
        change(&mut tensors);
        Case::new(&config, &tensors).refusal()
    };
    let missing = refusal(&|tensors| drop(tensors.remove(expert)));
    assert!(
        missing.contains("tensor model.layers.1.mlp.experts.2.up_proj.weight is missing from"),
        "{missing}"
    );
    let shape = refusal(&|tensors| tensors[expert].1 = vec![40, 20]);
    assert!(shape.contains("has shape [40, 20], config.json demands [20, 40]"), "{shape}");
    let extra = refusal(&|tensors| {
        tensors.push(("model.layers.2.input_layernorm.weight".into(), vec![1], vec![1.0]))
    });
    assert!(
        extra.contains("tensor model.layers.2.input_layernorm.weight and 0 others have no meaning"),
        "{extra}"
    );
    let nan = refusal(&|tensors| tensors[expert].2[47] = f32::NAN);
    assert!(nan.contains("experts.2.up_proj.weight, row 1: a weight is not finite"), "{nan}");
    let huge = refusal(&|tensors| tensors[expert].2[0] = 1e30);
    assert!(huge.contains("row 0: a weight is not finite or too large for q4"), "{huge}");
    let norm = refusal(&|tensors| tensors[1].2[3] = f32::INFINITY);
    assert!(norm.contains("input_layernorm.weight, element 3: not finite"), "{norm}");
}

#[test]
fn bad_directories_are_refused_by_name() {
    let config = config("olmoe");
    let case = Case::new(&config, &tensors(&config));
    let path = case.model().join("config.json");
    std::fs::write(&path, "{\"model_type\": \"gpt2\"}").unwrap();
    assert!(case.refusal().contains("config.json: model_type 'gpt2' is not supported"), "{}", case.refusal());
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(case.refusal().contains("is not UTF-8"));
    std::fs::remove_file(&path).unwrap();
    assert!(case.refusal().contains("cannot read"));
    std::fs::create_dir(&path).unwrap();
    assert!(case.refusal().contains("is not a regular file"));
}

#[test]
fn a_full_disk_names_file_and_need() {
    let full = std::io::Error::from(std::io::ErrorKind::StorageFull);
    let message = PackError::write(Path::new("/cache/router.bin"), 123, &full).to_string();
    assert_eq!(
        message,
        "no space left for /cache/router.bin: the packed model takes 123 bytes; free some or set another cache directory"
    );
}

#[test]
fn steps_are_the_power_of_two_below() {
    for (rms, expected) in [(1.0, 0), (1.99, 0), (2.0, 1), (0.5, -1), (0.499, -2)] {
        assert_eq!(probe::step_for(Format::Q4, rms), expected - 11, "{rms}");
        assert_eq!(probe::step_for(Format::Bf16, rms), expected - 14, "{rms}");
    }
    assert_eq!((probe::step_for(Format::Q4, 1e-30), probe::step_for(Format::Q4, f32::MAX)), (-60, 60));
    assert_eq!(probe::step_for(Format::Q4, 0.0), -40);
}
