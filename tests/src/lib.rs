//! Harness for tests that cross crates.
