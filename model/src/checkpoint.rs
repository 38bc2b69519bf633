//! Memory-mapped safetensors with index.
