//! Attention by itself: `cargo bench -p moemesh-benches --bench attention`.
//!
//! Two shapes (32 query heads on 4 key heads of 128, and 16 on 16), prefill of whole prompts and decode at growing
//! contexts, on one thread. Throughput is printed as fused multiply-adds, for prefill and decode alike.
//! `MOEMESH_ISA` chooses the instruction set. Absolute times on a shared machine mean little; compare two runs.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]
#![allow(clippy::unwrap_used, reason = "a bench that cannot go on has failed")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use model::format::Format;
use model::kernel::native::attend::{Attend, AttendScratch, Run};
use model::kernel::native::kv::{KV_BLOCK, KvCache, KvShape, Slot};
use model::kernel::native::{Native, NativeConfig};

const HEAD_DIM: usize = 128;

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect()
}

/// `new` tokens attend to themselves and to `old` ones before them.
fn attend(criterion: &mut Criterion, (heads, kv_heads): (usize, usize), old: usize, new: usize) {
    let native = Native::new(NativeConfig::threads(1)).unwrap();
    let shape = KvShape { heads: kv_heads, head_dim: HEAD_DIM };
    let blocks = (old + new).div_ceil(KV_BLOCK);
    let mut cache = KvCache::of_shape(shape, 1, Format::Q4, blocks);
    let table: Vec<u32> = (0..blocks as u32).collect();
    let row = values(2 * kv_heads * HEAD_DIM);
    (0..old + new).for_each(|position| cache.store(0, Slot::of(position, &table), &row, native.ops()));
    let queries = values(new * heads * HEAD_DIM);
    let runs = [Run { first_row: 0, len: new, position: old, table: &table }];
    let (mut out, mut scratch) = (vec![0.0; queries.len()], AttendScratch::default());
    let kv = cache.layer(0);
    let task = Attend { kv, heads, window: None, queries: &queries, stride: heads * HEAD_DIM };
    let keys: usize = (old..old + new).map(|position| position + 1).sum();
    let mut group = criterion.benchmark_group(format!("{heads} heads on {kv_heads}"));
    group.sample_size(10).throughput(Throughput::Elements((keys * heads * HEAD_DIM * 2) as u64));
    group.bench_function(format!("{new} tokens after {old}"), |b| {
        b.iter(|| native.attend(&task, &runs, &mut out, &mut scratch));
    });
}

fn attention(criterion: &mut Criterion) {
    for shape in [(32, 4), (16, 16)] {
        for (old, new) in [(0, 512), (0, 1024), (50, 1), (1024, 1), (8192, 1)] {
            attend(criterion, shape, old, new);
        }
    }
}

criterion_group!(benches, attention);
criterion_main!(benches);
