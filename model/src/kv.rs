//! The key-value cache: blocks of a fixed number of tokens, handed out by whoever schedules.
//!
//! Keys and values are kept as f16, and attention reads what was rounded, at prefill and decode alike, so
//! neither chunk borders nor preemption change a bit. Within a block keys are transposed, so that one vector
//! register holds one dimension of many keys and scores need no horizontal sums.
//!
//! This module only owns memory. Which block belongs to which sequence is the scheduler's business: a sequence
//! brings its block table, and position `p` lives in entry `p / KV_BLOCK`.

use crate::config::ModelConfig;

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
    /// f16 values of one head's keys (or values) in one block.
    pub fn tile(self) -> usize {
        self.head_dim * KV_BLOCK
    }

    /// f16 values of one block in one layer: keys of all heads, then values.
    fn block(self) -> usize {
        2 * self.heads * self.tile()
    }
}

/// Memory for `blocks` blocks in every layer.
#[derive(Debug)]
pub struct KvCache {
    shape: KvShape,
    blocks: usize,
    layers: Vec<Vec<u16>>,
}

impl KvCache {
    /// A cache of `blocks` blocks. The memory is zeroed lazily by the system, so an unused budget costs nothing.
    pub fn new(config: &ModelConfig, blocks: usize) -> KvCache {
        let shape = KvShape { heads: config.kv_heads, head_dim: config.head_dim };
        let layers = config.layers.iter().map(|_| vec![0; blocks * shape.block()]).collect();
        KvCache { shape, blocks, layers }
    }

    /// Bytes of one block over all layers.
    pub fn block_bytes(config: &ModelConfig) -> usize {
        let shape = KvShape { heads: config.kv_heads, head_dim: config.head_dim };
        config.layers.len() * shape.block() * size_of::<u16>()
    }

    /// Blocks there are.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Shape of a block.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// One layer, to read.
    pub fn layer(&self, layer: usize) -> KvLayer<'_> {
        KvLayer { shape: self.shape, data: &self.layers[layer] }
    }

    /// Stores the key and value of one token, already rounded to f16: `[heads, head_dim]` each.
    pub fn store(&mut self, layer: usize, slot: Slot, key: &[u16], value: &[u16]) {
        let KvShape { heads, head_dim } = self.shape;
        let tile = self.shape.tile();
        let block = &mut self.layers[layer][slot.block as usize * self.shape.block()..][..self.shape.block()];
        let (keys, values) = block.split_at_mut(heads * tile);
        for head in 0..heads {
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
    data: &'a [u16],
}

impl<'a> KvLayer<'a> {
    /// Shape of a block.
    pub fn shape(&self) -> KvShape {
        self.shape
    }

    /// Keys of one head in one block: `[head_dim, KV_BLOCK]` f16.
    pub fn keys(&self, block: u32, head: usize) -> &'a [u16] {
        let tile = self.shape.tile();
        &self.data[block as usize * self.shape.block() + head * tile..][..tile]
    }

    /// Values of one head in one block: `[KV_BLOCK, head_dim]` f16.
    pub fn values(&self, block: u32, head: usize) -> &'a [u16] {
        let tile = self.shape.tile();
        &self.data[block as usize * self.shape.block() + (self.shape.heads + head) * tile..][..tile]
    }
}
