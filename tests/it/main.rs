//! Tests that cross crates, in one program: one link, one start.

mod golden;

mod tidy;
