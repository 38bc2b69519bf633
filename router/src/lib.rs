//! The router: HTTP -> prompt -> engine (scheduler) -> forward -> dispatch -> combine -> sampler -> stream.
//!
//! A module imports only modules listed after it (tests: tidy).

pub mod serve;

pub mod admin;

mod view;

mod reachable;

pub mod shelf;

pub mod http;

pub mod prompt;

pub mod stream;

pub mod engine;

pub mod forward;

pub mod dispatch;

pub mod share;

pub mod scheduler;

pub mod sampler;

mod energy;

pub mod cost;

pub mod pace;

pub mod metrics;

pub mod audit;

pub mod request;
