//! Micro benches of the leaves of a step, in the order of its walk: `cargo bench -p moemesh-benches --bench leaves`.
//!
//! Shapes of Qwen3-30B-A3B. Weights are small enough to stay in a cache, so these show what the code costs, not what
//! memory does: `moemesh bench kernel` measures that. Absolute times on a shared machine mean little; compare two runs
//! of one command. All of it takes about a minute.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]
#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use mesh_wire::buffer::Pool;
use mesh_wire::call::{Assignment as WireAssignment, CallDraft, CallHead, CallView};
use mesh_wire::payload::RowFormat;
use mesh_wire::reply::{ReplyHead, ReplyView, encode_sums};
use model::activations::{Activations, row_bytes};
use model::format::{BLOCK_OUTPUTS, Format};
use model::kernel::native::ops::Ops;
use model::kernel::native::{Native, NativeConfig};
use model::kernel::{Assignment, Kernels, PartialSums};
use model::packed::{PackedExpert, PackedMatrix};
use model::region::Buffer;
use router::prompt::{Chat, Prompt};
use router::request::Sampling;
use router::sampler::{Sampler, Scratch};
use router::scheduler::{Limits, NewSequence, Scheduler};
use router::stream::Detokenizer;
use serde_json::json;

/// Width of a row.
const HIDDEN: usize = 2048;
/// Width of an expert.
const INTER: usize = 768;
/// Experts per layer.
const EXPERTS: usize = 128;
/// Experts of a row.
const TOP: u16 = 8;
/// Tokens there are.
const VOCAB: usize = 151_936;
/// Memory for frames under way.
const POOL_BYTES: usize = 64 << 20;

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect()
}

/// Packed weights with sane scales.
fn weights(format: Format, bytes: usize) -> Buffer {
    let mut buffer = Buffer::zeroed(bytes);
    buffer.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i * 89 % 251) as u8);
    for group in buffer.chunks_exact_mut(format.group_bytes()) {
        let scales = group.len() - 2 * BLOCK_OUTPUTS;
        group[scales..].as_chunks_mut().0.iter_mut().for_each(|scale| *scale = 0x1e00u16.to_le_bytes());
    }
    buffer
}

/// `rows` rows of `HIDDEN`, quantized.
fn batch(rows: usize) -> Buffer {
    let mut buffer = Buffer::zeroed(rows * row_bytes(Format::Q4, HIDDEN));
    Ops::default().fill_rows(Format::Q4, HIDDEN, &values(rows * HIDDEN), &mut buffer).unwrap();
    buffer
}

fn rows(criterion: &mut Criterion) {
    let ops = Ops::default();
    let (x, weight) = (values(HIDDEN), values(HIDDEN));
    let mut out = vec![0.0; HIDDEN];
    criterion.bench_function("rms_norm 2048", |b| b.iter(|| ops.rms_norm(&x, &weight, 1e-6, &mut out)));

    let gate = values(EXPERTS * HIDDEN);
    let mut logits = vec![0.0; EXPERTS];
    criterion.bench_function("gate 128 x 2048", |b| b.iter(|| ops.dot16_rows(&gate, &x, &mut logits)));
    criterion.bench_function("softmax 128", |b| b.iter(|| ops.softmax(&mut logits)));

    let mut row = Buffer::zeroed(row_bytes(Format::Q4, HIDDEN));
    criterion.bench_function("quantize a row of 2048", |b| {
        b.iter(|| ops.fill_rows(Format::Q4, HIDDEN, &x, &mut row).unwrap());
    });
}

fn products(criterion: &mut Criterion) {
    let native = Native::new(NativeConfig::threads(1)).unwrap();
    for format in [Format::Q4, Format::Q8] {
        let bytes = weights(format, format.matrix_bytes(HIDDEN, HIDDEN)).into();
        let linear = native.linear(PackedMatrix { format, outputs: HIDDEN, inputs: HIDDEN, bytes }).unwrap();
        for rows in [1, 16] {
            let buffer = batch(rows);
            let x = Activations::new(format, rows, HIDDEN, &buffer).unwrap();
            let mut y = vec![0.0; rows * HIDDEN];
            let name = format!("product 2048 x 2048 {format}, {rows} rows");
            criterion.bench_function(&name, |b| b.iter(|| linear.apply(x, &mut y).unwrap()));
        }
    }
}

fn experts(criterion: &mut Criterion) {
    let native = Native::new(NativeConfig::threads(1)).unwrap();
    let format = Format::Q4;
    let bytes = weights(format, format.expert_bytes(HIDDEN, INTER));
    let bytes: model::region::Bytes = bytes.into();
    let expert = |index| (index, PackedExpert { format, hidden: HIDDEN, inter: INTER, bytes: bytes.clone() });
    let layer = native.experts((0..TOP).map(expert).collect(), -10).unwrap();
    for rows in [1, 16] {
        let buffer = batch(rows as usize);
        let x = Activations::new(format, rows as usize, HIDDEN, &buffer).unwrap();
        let all: Vec<Assignment> = (0..rows * u32::from(TOP))
            .map(|i| Assignment { row: i / u32::from(TOP), expert: i as u16 % TOP, weight: 0.125 })
            .collect();
        let mut sums = PartialSums::default();
        let name = format!("8 experts 2048 x 768 q4, {rows} rows");
        criterion.bench_function(&name, |b| b.iter(|| layer.run(x, &all, &mut sums).unwrap()));
    }
}

fn frames(criterion: &mut Criterion) {
    let pool = Pool::new(POOL_BYTES);
    let payload = batch(1);
    let assignments: Vec<_> = (0..TOP).map(|expert| WireAssignment::new(0, expert, 0.125)).collect();
    let head = CallHead {
        call: 1,
        step: 1,
        epoch: 1,
        budget_us: 20_000,
        layer: 0,
        format: RowFormat::Int8,
        hidden: HIDDEN as u32,
        rows: 1,
    };
    let call = || {
        let mut draft = CallDraft::new(&pool, head, &assignments).unwrap();
        draft.payload_mut().copy_from_slice(&payload);
        draft.finish().into_buffer()
    };
    criterion.bench_function("encode a call of one row", |b| b.iter(call));
    let frame = call();
    criterion.bench_function("parse a call of one row", |b| {
        b.iter(|| CallView::parse(black_box(frame.body())).unwrap().payload().len());
    });

    let sums: Vec<i32> = (0..HIDDEN as i32).map(|i| i * 7 % 2001 - 1000).collect();
    let head = ReplyHead { call: 1, service_us: 100, hidden: HIDDEN as u32 };
    let reply = || encode_sums(&pool, head, &[Some(&sums)]).unwrap();
    criterion.bench_function("encode a reply of one row", |b| b.iter(reply));
    let frame = reply();
    criterion.bench_function("parse a reply of one row", |b| {
        b.iter(|| ReplyView::parse(black_box(frame.body())).unwrap().row_count());
    });
}

fn choices(criterion: &mut Criterion) {
    let logits: Vec<f32> =
        (0..VOCAB).map(|i| ((i * 7919 % 100_003) as f32 / 100_003.0).powi(8) * 20.0).collect();
    let mut scratch = Scratch::default();
    for (name, temperature, top_p) in
        [("sample greedily of 151936", 0.0, 1.0), ("sample top-p 0.95 of 151936", 0.8, 0.95)]
    {
        let sampling = Sampling { temperature, top_p, seed: 7, ..Sampling::default() };
        let mut sampler = Sampler::new(sampling, &[1, 2, 3], &[], 0);
        criterion.bench_function(name, |b| b.iter(|| sampler.choose(&logits, &mut scratch).unwrap()));
    }

    let limits = Limits { block_tokens: 16, blocks: 4096, rows: 288, chunk: 256, sequences: 32 };
    let mut scheduler = Scheduler::new(limits).unwrap();
    for id in 0..32 {
        scheduler.add(NewSequence { id, prompt: 512, longest: 1024, prompt_logits: false }).unwrap();
    }
    // Prompts first, so that what is measured is 32 sequences decoding.
    for _ in 0..100 {
        let plan = scheduler.plan();
        for slice in &plan.slices {
            scheduler.advance(slice);
        }
        plan.slices.iter().filter(|slice| slice.samples).for_each(|slice| scheduler.append(slice.id));
    }
    criterion.bench_function("plan a step of 32 sequences", |b| b.iter(|| scheduler.plan()));
}

fn text(criterion: &mut Criterion) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tale-moe");
    let prompt = Prompt::open(&model, 4096).unwrap();
    let tokens = prompt.encode("Once upon a time there was a poor woodcutter who lived with his wife.", true);
    let tokens = tokens.unwrap();
    let mut detokenizer = Detokenizer::new(Arc::clone(prompt.vocabulary()), true);
    let mut next = tokens.iter().cycle();
    criterion.bench_function("a token to text", |b| b.iter(|| detokenizer.push(*next.next().unwrap())));
    let turn = |i: usize| json!({"role": if i.is_multiple_of(2) { "user" } else { "assistant" }, "content": "Tell me more."});
    let chat = Chat::new((0..9).map(turn).collect());
    criterion.bench_function("render a chat of 9 turns", |b| b.iter(|| prompt.render(&chat).unwrap()));
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(30)
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    targets = rows, products, experts, frames, choices, text
}
criterion_main!(benches);
