//! Tests that cross crates, in one program: one link, one start.

mod equivalence;

mod golden;

mod tidy;
