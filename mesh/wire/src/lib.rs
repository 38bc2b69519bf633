//! The frames that travel between router and expert nodes: bytes and limits, no logic.
//!
//! A frame is a fixed header (length, operation code) and one flat rkyv archive: plain integers and blobs, no
//! strings, maps or recursion. A payload is a vector of 64-byte blocks in a 64-byte aligned buffer, so a tensor
//! is a view of the buffer the network filled. Bytes from a peer are validated here, once, against named limits,
//! into types that cannot be wrong; nothing behind this crate checks again.

pub mod control;

pub mod id;
