//! Model formats, kernels and the forward pass of sparse Mixture-of-Experts language models.
//!
//! Knows tensors and nothing of networks. Read in this order: `config` says what a model is, `packed` how
//! its weights lie in memory and on disk, `kernel` computes with them, `decoder` is what the router runs,
//! `reference` is the whole model in one process, the yardstick of every other way of running it.
//!
//! A module imports only modules listed after it (tests: tidy).

pub mod reference;

pub mod home;

pub mod decoder;

pub mod open;

pub mod synthetic;

pub mod pack;

pub mod kernel;

pub mod packed;

pub mod activations;

pub mod checkpoint;

pub mod config;

pub mod format;

pub mod region;

pub mod json;
