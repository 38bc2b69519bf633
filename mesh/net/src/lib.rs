//! QUIC between router and expert nodes.
//!
//! Nodes dial the router and prove their key in TLS; the router sends calls over lanes, streams that it opens and
//! reuses. Read in this order: `hub` is the router's side and `station` a node's, `lane` and `pending` are the way
//! of one call. `lender`, `borrower` and `exchange` carry weights. Who may talk at all: `join` is how a machine gets in, `authority` what the router keeps about it and
//! `membership` what the machine keeps, `endpoint` sets up QUIC for a LAN, `tls` checks keys, `roster` and `token` are
//! what is signed and handed over. `bench_link` measures what all this costs.
//!
//! Both sides have a network thread and a current-thread tokio runtime, which the thread that computes drives while
//! it waits (`helm`); compute never runs inside of it. Everything that queues is bounded. A module imports only modules listed after it (tests: tidy).

pub mod bench_link;

pub mod hub;

pub mod exchange;

mod seats;

mod link;

mod lane;

mod plan_file;

mod probe;

pub mod station;

pub mod drain;

pub mod pending;

pub mod helm;

mod lender;

pub mod borrower;

pub mod shelf;

mod tally;

mod stream;

pub mod look;

pub mod join;

pub mod authority;

pub mod tickets;

pub mod membership;

pub mod suggestions;

pub mod token;

pub mod endpoint;

pub mod tls;

pub mod members;

pub mod roster;

mod throttle;

pub mod identity;

pub mod keys;

pub mod disk;

#[cfg(test)]
mod tests;
