//! An expert node: holds experts and runs them.
//!
//! A call walks through the modules in this order: `batch` queues it and puts together what reads the same weights,
//! `worker` computes it on its thread, `shard` is where the experts are. `measure` times the machine once at start.
//!
//! A module imports only modules listed after it (tests: tidy).

pub mod worker;

pub mod batch;

pub mod measure;

pub mod shard;

#[cfg(test)]
mod fixture;
