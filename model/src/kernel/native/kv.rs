//! The key-value cache: blocks of a fixed number of tokens, handed out by whoever schedules.
//!
//! Keys and values are kept as f16 in quantized models and as f32 in bf16 ones (where f16 would be the largest
//! error of all: target Q2), and attention reads what was rounded, at prefill and decode alike, so neither chunk
//! borders nor preemption change a bit. Within a block keys are transposed, so that one vector
//! register holds one dimension of many keys and scores need no horizontal sums.
//!
//! This module only owns memory. Which block belongs to which sequence is the scheduler's business: a sequence
//! brings its block table, and position `p` lives in entry `p / KV_BLOCK`.

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
    narrow: Vec<u16>,
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
        KvCache { shape, blocks, layers: (0..layers).map(store).collect(), narrow: Vec::new() }
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
        let shape = self.shape;
        match &mut self.layers[layer] {
            Store::F16(data) => {
                self.narrow.resize(row.len(), 0);
                ops.narrow_f16(row, &mut self.narrow);
                shape.place(data, slot, &self.narrow);
            }
            Store::F32(data) => shape.place(data, slot, row),
        }
    }
}

impl KvShape {
    fn place<T: Copy>(self, data: &mut [T], slot: Slot, row: &[T]) {
        let (head_dim, tile) = (self.head_dim, self.tile());
        let block = &mut data[slot.block as usize * self.block()..][..self.block()];
        let (keys, values) = block.split_at_mut(self.heads * tile);
        let (key, value) = row.split_at(self.heads * head_dim);
        for head in 0..self.heads {
            let source = &key[head * head_dim..][..head_dim];
            let columns = keys[head * tile..][..tile].chunks_exact_mut(KV_BLOCK);
            for (column, value) in columns.zip(source) {
                column[slot.offset] = *value;
            }
            values[head * tile + slot.offset * head_dim..][..head_dim]
                .copy_from_slice(&value[head * head_dim..][..head_dim]);
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
