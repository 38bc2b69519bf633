//! Micro benches of what a forward pass does between matrix products: `cargo bench -p moemesh-benches`.
//!
//! Absolute times on a shared machine mean little; compare two runs of one command, or use `moemesh bench` for
//! figures beside the machine's own reads.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]
#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

use criterion::{Criterion, criterion_group, criterion_main};
use model::activations::row_bytes;
use model::format::Format;
use model::kernel::native::ops::Ops;
use model::region::Buffer;

/// Width of a row of Qwen3-30B-A3B.
const HIDDEN: usize = 2048;
/// Its experts per layer.
const EXPERTS: usize = 128;

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect()
}

fn leaves(criterion: &mut Criterion) {
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

criterion_group!(benches, leaves);
criterion_main!(benches);
