//! The key-value cache: blocks of a fixed number of tokens, handed out by whoever schedules.
//!
//! Keys and values are kept as f16 in quantized models and as f32 in bf16 ones (where f16 would be the largest
//! error of all: target Q2), and attention reads what was rounded, at prefill and decode alike, so neither chunk
//! borders nor preemption change a bit. Within a block keys are transposed, so that one vector
//! register holds one dimension of many keys and scores need no horizontal sums.
//!
//! This module only owns memory. Which block belongs to which sequence is the scheduler's business: a sequence
//! brings its block table, and position `p` lives in entry `p / KV_BLOCK`.

#![allow(unsafe_code, reason = "threads write disjoint parts of one layer")]

use super::Native;
use super::engine::part;
use super::ops::Ops;
use crate::config::ModelConfig;
use crate::format::Format;

/// Tokens per block. 32 keys fill two 512-bit registers of scores; half of a block per sequence is lost on
/// average, 16 tokens.
pub const KV_BLOCK: usize = 32;

/// Shape of one block in one layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Key and value heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
}

impl KvShape {
    /// Values of one head's keys (or values) in one block.
    pub fn tile(self) -> usize {
        self.head_dim * KV_BLOCK
    }

    /// Values of one block in one layer: keys of all heads, then values.
    fn block(self) -> usize {
        2 * self.heads * self.tile()
    }
}

/// One layer's memory.
#[derive(Debug)]
enum Store {
    F16(Vec<u16>),
    F32(Vec<f32>),
}

/// Memory for `blocks` blocks in every layer.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    blocks: usize,
    layers: Vec<Store>,
}

impl KvCache {
    /// A cache of `blocks` blocks for a model with weights in `format`. The memory is zeroed lazily by the system,
    /// so an unused budget costs nothing.
    pub fn new(config: &ModelConfig, format: Format, blocks: usize) -> KvCache {
        let shape = KvShape { heads: config.kv_heads, head_dim: config.head_dim };
        KvCache::of_shape(shape, config.layers.len(), format, blocks)
    }

    /// A cache of `blocks` blocks of `shape` in each of `layers` layers.
    pub fn of_shape(shape: KvShape, layers: usize, format: Format, blocks: usize) -> KvCache {
        let len = blocks * shape.block();
        let store =
            |_| if format.is_quantized() { Store::F16(vec![0; len]) } else { Store::F32(vec![0.0; len]) };
        KvCache { shape, blocks, layers: (0..layers).map(store).collect() }
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(config: &ModelConfig, format: Format) -> usize {
        let shape = KvShape { heads: config.kv_heads, head_dim: config.head_dim };
        let value = if format.is_quantized() { size_of::<u16>() } else { size_of::<f32>() };
        config.layers.len() * shape.block() * value
    }

    /// Blocks there are.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// One layer, to read.
    pub fn layer(&self, layer: usize) -> KvLayer<'_> {
        KvLayer { shape: self.shape, store: &self.layers[layer] }
    }

    /// Stores one token: `row` is its key, then its value, `[heads, head_dim]` each.
    pub fn store(&mut self, layer: usize, slot: Slot, row: &[f32], ops: Ops) {
        let writer = self.writer(layer);
        for head in 0..writer.shape.heads {
            // SAFETY: the cache is borrowed exclusively, and this thread does it all.
            unsafe { writer.store_head(slot, head, row, ops) };
        }
    }

    fn writer(&mut self, layer: usize) -> Writer {
        let shape = self.shape;
        match &mut self.layers[layer] {
            Store::F16(data) => {
                Writer { shape, half: Some(data.as_mut_ptr()), single: None, len: data.len() }
            }
            Store::F32(data) => {
                Writer { shape, half: None, single: Some(data.as_mut_ptr()), len: data.len() }
            }
        }
    }
}

/// The tokens of one step and where they go.
#[derive(Clone, Copy, Debug)]
pub struct NewTokens<'a> {
    /// Row of a token in `rows`, and its slot.
    pub slots: &'a [(usize, Slot)],
    /// Rows of the step.
    pub rows: &'a [f32],
    /// Values from one row to the next.
    pub stride: usize,
    /// Where a row's key begins; its value follows.
    pub first: usize,
}

/// Tokens from which other threads are woken to store: with half a microsecond each, more work than the waking.
const PARALLEL_TOKENS: usize = 16;

impl Native {
    /// Stores many tokens. Threads divide the heads among themselves, since a head's part of a block belongs to no
    /// other head, whatever the slots.
    pub fn store_tokens(&self, kv: &mut KvCache, layer: usize, tokens: NewTokens<'_>) {
        let writer = kv.writer(layer);
        let store = |head: usize| {
            for (row, slot) in tokens.slots {
                let row = &tokens.rows[row * tokens.stride + tokens.first..(row + 1) * tokens.stride];
                // SAFETY: the cache is borrowed exclusively, and each head has one thread.
                unsafe { writer.store_head(*slot, head, row, self.ops()) };
            }
        };
        let heads = writer.shape.heads;
        if tokens.slots.len() < PARALLEL_TOKENS {
            return (0..heads).for_each(store);
        }
        self.parallel(&|thread| part(heads, thread, self.threads()).for_each(store));
    }
}

/// One layer, to be written by several threads, each its own heads.
#[derive(Clone, Copy)]
struct Writer {
    shape: KvShape,
    half: Option<*mut u16>,
    single: Option<*mut f32>,
    len: usize,
}

// SAFETY: plain pointers to numbers; who writes what is the contract of `store_head`.
unsafe impl Sync for Writer {}

/// Values narrowed at a time, on the stack.
const NARROW: usize = 64;

impl Writer {
    /// Stores key and value of one head of `row`, which is a key, then a value, `[heads, head_dim]` each.
    ///
    /// # Safety
    /// The cache outlives the call, and no other thread uses this head's part of this layer meanwhile.
    unsafe fn store_head(&self, slot: Slot, head: usize, row: &[f32], ops: Ops) {
        let KvShape { heads, head_dim } = self.shape;
        let (tile, block) = (self.shape.tile(), slot.block as usize * self.shape.block());
        assert!(head < heads && slot.offset < KV_BLOCK && block + self.shape.block() <= self.len);
        let (keys, values) = row.split_at(heads * head_dim);
        let key = &keys[head * head_dim..][..head_dim];
        let value = &values[head * head_dim..][..head_dim];
        let key_at = block + head * tile + slot.offset;
        let value_at = block + (heads + head) * tile + slot.offset * head_dim;
        // SAFETY: both places lie in the head's part of the block, which lies in the layer by the assertion.
        unsafe {
            if let Some(data) = self.half {
                let mut narrow = [0u16; NARROW];
                for (index, part) in key.chunks(NARROW).enumerate() {
                    ops.narrow_f16(part, &mut narrow[..part.len()]);
                    let at = data.add(key_at + index * NARROW * KV_BLOCK);
                    (0..part.len()).for_each(|d| *at.add(d * KV_BLOCK) = narrow[d]);
                }
                ops.narrow_f16(value, std::slice::from_raw_parts_mut(data.add(value_at), head_dim));
            }
            if let Some(data) = self.single {
                (0..head_dim).for_each(|d| *data.add(key_at + d * KV_BLOCK) = key[d]);
                std::slice::from_raw_parts_mut(data.add(value_at), head_dim).copy_from_slice(value);
            }
        }
    }
}

/// Where one token lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Index of the block in the cache.
    pub block: u32,
    /// Token in the block.
    pub offset: usize,
}

impl Slot {
    /// The slot of `position` in a sequence with this block table.
    ///
    /// # Panics
    /// If the table is too short: the scheduler assigned too few blocks.
    pub fn of(position: usize, table: &[u32]) -> Slot {
        Slot { block: table[position / KV_BLOCK], offset: position % KV_BLOCK }
    }
}

/// One layer of the cache.
#[derive(Clone, Copy, Debug)]
pub struct KvLayer<'a> {
    shape: KvShape,
    store: &'a Store,
}

/// Keys or values of one head in one block.
#[derive(Clone, Copy, Debug)]
pub enum KvPart<'a> {
    /// f16 bits, in quantized models.
    F16(&'a [u16]),
    /// In bf16 models.
    F32(&'a [f32]),
}

impl<'a> KvLayer<'a> {
    /// Shape of a block.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Keys (`[head_dim, KV_BLOCK]`) and values (`[KV_BLOCK, head_dim]`) of one head in one block, in the same form.
    pub fn head(&self, block: u32, head: usize) -> [KvPart<'a>; 2] {
        [head, self.shape.heads + head].map(|part| {
            let start = block as usize * self.shape.block() + part * self.shape.tile();
            let range = start..start + self.shape.tile();
            match self.store {
                Store::F16(data) => KvPart::F16(&data[range]),
                Store::F32(data) => KvPart::F32(&data[range]),
            }
        })
    }
}
