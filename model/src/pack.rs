//! Packing a checkpoint into canonical bytes.
