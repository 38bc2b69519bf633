//! How large a model may claim to be: generous against any real model, small enough that no product of sizes
//! overflows 64 bits and no table built from them is absurd.

/// Largest `config.json`, bytes. Real ones are under 10 KB.
pub const MAX_CONFIG_BYTES: usize = 1 << 20;
/// Largest row width. The widest open models have 7 to 16 thousand.
pub const MAX_HIDDEN: usize = 1 << 16;
/// Most decoder layers; layer numbers travel as u16, and real models have up to about 130.
pub const MAX_LAYERS: usize = 1024;
/// Most tokens in a vocabulary; the largest in use have 262 thousand.
pub const MAX_VOCAB: usize = 1 << 22;
/// Longest context in tokens; the longest advertised is ten million.
pub const MAX_CONTEXT: usize = 1 << 24;
/// Most attention heads.
pub const MAX_HEADS: usize = 1024;
/// Widest head.
pub const MAX_HEAD_DIM: usize = 1024;
/// Widest feed-forward block, routed, shared or dense.
pub const MAX_INTER: usize = 1 << 18;
/// Most experts per layer; expert numbers travel as u16, and real models have up to 512.
pub const MAX_EXPERTS: usize = 4096;
/// Most experts per token; real models have up to 22.
pub const MAX_TOP_K: usize = 64;
