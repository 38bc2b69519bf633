//! A synthetic model as a Hugging Face directory: what loading, packing and serving real files is tested with.
//!
//! Tensors stream into bf16 safetensors shards through a buffer of a megabyte; nothing else is kept. The index or
//! the single file is renamed into place last, so an interrupted run leaves a directory that does not open. An
//! existing model is not overwritten.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::noise::Stream;
use super::scale::{centre, rms};
use super::spec::{Spec, SyntheticError};
use super::tokenizer;
use crate::checkpoint::{INDEX_FILE, SINGLE_FILE};
use crate::config::ModelConfig;
use crate::pack::{Progress, Source, source_tensors};
use crate::packed::TensorName;

/// Largest shard, bytes, as usual on Hugging Face.
const SHARD_BYTES: u64 = 4 << 30;
/// Bytes made at once.
const CHUNK_BYTES: usize = 1 << 20;

/// One tensor to write.
struct Planned {
    name: String,
    shape: Vec<usize>,
    centre: f32,
    rms: f32,
}

impl Planned {
    fn bytes(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64 * 2
    }
}

/// Writes the model of `spec` (as for `Synthetic::parse`) into `directory`, with a tokenizer.
pub fn write_checkpoint(spec: &str, directory: &Path, progress: Progress<'_>) -> Result<(), SyntheticError> {
    write(&Spec::parse(spec)?, (directory, SHARD_BYTES), progress)
}

/// As `write_checkpoint`, with shards of at most `limit` bytes (but never less than one tensor).
pub(super) fn write(
    spec: &Spec,
    (directory, limit): (&Path, u64),
    progress: Progress<'_>,
) -> Result<(), SyntheticError> {
    let config = spec.model_config()?;
    std::fs::create_dir_all(directory).map_err(|error| failed(directory, &error))?;
    for name in [SINGLE_FILE, INDEX_FILE] {
        let path = directory.join(name);
        if path.exists() {
            return Err(SyntheticError(format!("{} exists; give an empty directory", path.display())));
        }
    }
    let mut config_json = spec.config_json()?;
    config_json["eos_token_id"] = tokenizer::MESSAGE_END_ID.into();
    config_json["pad_token_id"] = tokenizer::END_OF_TEXT_ID.into();
    let generation = json!({"eos_token_id": [tokenizer::MESSAGE_END_ID, tokenizer::END_OF_TEXT_ID]});
    text(directory, "config.json", &pretty(&config_json))?;
    text(directory, "generation_config.json", &pretty(&generation))?;
    text(directory, "tokenizer.json", &pretty(&tokenizer::tokenizer(config.vocab)))?;
    text(directory, "tokenizer_config.json", &pretty(&tokenizer::tokenizer_config(config.context)))?;
    text(directory, "chat_template.jinja", tokenizer::CHAT_TEMPLATE)?;
    shards(&config, spec.seed, (directory, limit), progress)
}

fn shards(
    config: &ModelConfig,
    seed: u64,
    (directory, limit): (&Path, u64),
    progress: Progress<'_>,
) -> Result<(), SyntheticError> {
    let mut shards: Vec<Vec<Planned>> = vec![Vec::new()];
    let (mut total, mut filled) = (0, 0);
    for (name, part, source) in source_tensors(config) {
        let planned = plan(config, name, part, source);
        let bytes = planned.bytes();
        if filled + bytes > limit && filled > 0 {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += bytes;
        total += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(planned);
        }
    }
    let count = shards.len();
    let (mut done, mut map) = (0, Map::new());
    for (index, shard) in shards.iter().enumerate() {
        let name = match count {
            1 => SINGLE_FILE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
        };
        let temporary = directory.join(format!(".{name}.part"));
        write_shard(&temporary, shard, seed, &mut |bytes, what| {
            done += bytes;
            progress(done, total, what);
        })?;
        let path = directory.join(&name);
        std::fs::rename(&temporary, &path).map_err(|error| failed(&path, &error))?;
        map.extend(shard.iter().map(|planned| (planned.name.clone(), Value::from(name.as_str()))));
    }
    if count > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": map});
        let temporary = format!(".{INDEX_FILE}.part");
        text(directory, &temporary, &pretty(&index))?;
        let path = directory.join(INDEX_FILE);
        std::fs::rename(directory.join(temporary), &path).map_err(|error| failed(&path, &error))?;
    }
    Ok(())
}

fn plan(config: &ModelConfig, name: TensorName, part: usize, source: Source) -> Planned {
    let [first, down] = rms(config, name);
    let is_down = matches!(name, TensorName::Expert(..)) && part == 2;
    Planned {
        name: source.name,
        shape: source.shape,
        centre: centre(name),
        rms: if is_down { down } else { first },
    }
}

fn write_shard(
    path: &Path,
    shard: &[Planned],
    seed: u64,
    report: &mut dyn FnMut(u64, &str),
) -> Result<(), SyntheticError> {
    let mut offset = 0;
    let mut header = Map::new();
    header.insert("__metadata__".to_string(), json!({"format": "pt"}));
    for planned in shard {
        let end = offset + planned.bytes();
        let entry = json!({"dtype": "BF16", "shape": planned.shape, "data_offsets": [offset, end]});
        header.insert(planned.name.clone(), entry);
        offset = end;
    }
    let mut header = Value::Object(header).to_string();
    // Readers that map the file like its tensors aligned.
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let file = File::create(path).map_err(|error| failed(path, &error))?;
    let mut out = BufWriter::with_capacity(CHUNK_BYTES, file);
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(|error| failed(path, &error));
    put(&(header.len() as u64).to_le_bytes())?;
    put(header.as_bytes())?;
    let mut chunk = vec![0; CHUNK_BYTES];
    for planned in shard {
        let mut stream = Stream::new(seed, &planned.name);
        let mut left = planned.bytes();
        while left > 0 {
            let now = left.min(CHUNK_BYTES as u64) as usize;
            stream.bf16(&mut chunk[..now], planned.rms);
            shift(&mut chunk[..now], planned.centre);
            put(&chunk[..now])?;
            report(now as u64, &planned.name);
            left -= now as u64;
        }
    }
    let file = out.into_inner().map_err(|error| failed(path, error.error()))?;
    file.sync_all().map_err(|error| failed(path, &error))
}

/// Adds `centre` to bf16 values.
fn shift(values: &mut [u8], centre: f32) {
    if centre == 0.0 {
        return;
    }
    for slot in values.as_chunks_mut::<2>().0 {
        *slot = half::bf16::from_f32(half::bf16::from_le_bytes(*slot).to_f32() + centre).to_le_bytes();
    }
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

fn text(directory: &Path, name: &str, contents: &str) -> Result<(), SyntheticError> {
    let path = directory.join(name);
    std::fs::write(&path, contents).map_err(|error| failed(&path, &error))
}

fn failed(path: &Path, error: &std::io::Error) -> SyntheticError {
    SyntheticError(format!("cannot write {}: {error}", path.display()))
}
