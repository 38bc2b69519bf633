//! An expert node: holds experts and runs them.
//!
//! A call walks through the modules in this order: `serve` takes it from the network, `batch` queues it and puts
//! together what reads the same weights, `worker` computes it on its thread, `shard` is where the experts are. `node`
//! puts these together, `measure` times the machine once at start. A node without a model gets its experts by `remote`,
//! which has `fetch` bring them into the `store`.
//!
//! A module imports only modules listed after it (tests: tidy).

pub mod node;

pub mod serve;

pub mod worker;

pub mod batch;

pub mod sensors;

pub mod measure;

pub mod remote;

pub mod shard;

pub mod fetch;

pub mod store;

#[cfg(test)]
mod fixture;
