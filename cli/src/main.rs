//! The one binary of moemesh.
fn main() {}
