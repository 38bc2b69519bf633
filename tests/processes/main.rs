//! Tests of the program as users run it: processes, sockets, signals.
//!
//! Everything below the process is tested closer to its code; here a router and its nodes are started as
//! separate processes on ports the system picks, and spoken to over HTTP. That costs a second per cluster, so
//! the questions to the API share one. Nothing waits for time: tests wait for lines of output and for answers.

mod harness;

mod api;
mod commands;
mod doctor;
mod errors;
mod failover;
mod health;
mod kernels;
#[cfg(feature = "torch")]
mod libtorch;
mod trust;
mod weights;
