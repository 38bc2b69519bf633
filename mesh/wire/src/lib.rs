//! The frames that travel between router and expert nodes: bytes and limits, no logic.
//!
//! A frame is a fixed header (length, operation code) and one flat rkyv archive: plain integers and blobs, no
//! strings, maps or recursion. A payload is a vector of 64-byte blocks in a 64-byte aligned buffer, so a tensor
//! is a view of the buffer the network filled. Bytes from a peer are validated here, once, against named limits,
//! into types that cannot be wrong; nothing behind this crate checks again.
//!
//! Read in this order: `frame` is the header, the operation codes and every error, `buffer` where a frame lies,
//! `call` and `reply` are the hot path, `message` is everything that is said a few times per second at most, `weights`
//! how experts travel.
//!
//! A module imports only modules listed after it (tests: tidy).

#[cfg(target_endian = "big")]
compile_error!("frames are little-endian and viewed in place; a big-endian machine cannot take part");

pub mod call;

pub mod reply;

pub mod weights;

pub mod message;

mod archive;

pub mod buffer;

pub mod frame;

pub mod payload;

pub mod control;

pub mod id;

#[cfg(test)]
mod tests;
