//! Tests that cross crates, in one program: one link, one start.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that cannot go on has failed; figures help"
)]

mod corpus;
#[cfg(feature = "torch")]
mod device;
mod failures;

mod audits;

mod equivalence;

mod golden;

mod tidy;
