//! QUIC between router and expert nodes.
//!
//! Nodes dial the router and prove their key in TLS; the router sends calls over lanes, streams that it opens and
//! reuses. Read in this order: `hub` is the router's side and `station` a node's, `lane` and `pending` are the way
//! of one call, `endpoint` sets up QUIC for a LAN, `tls` decides who may talk at all, `roster` and `identity` are
//! the files behind that. `bench_link` measures what all this costs.
//!
//! Both sides have a network thread and a current-thread tokio runtime, which the thread that computes drives while
//! it waits (`helm`); compute never runs inside of it. Everything that queues is bounded. A module imports only modules listed after it (tests: tidy).

pub mod bench_link;

pub mod hub;

mod link;

mod lane;

mod plan_file;

pub mod station;

pub mod pending;

pub mod helm;

mod tally;

mod stream;

pub mod endpoint;

pub mod tls;

pub mod roster;

pub mod identity;

#[cfg(test)]
mod tests;
