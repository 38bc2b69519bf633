//! The key-value cache in blocks.
