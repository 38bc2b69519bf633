//! Fuzz target: experts on a node's disk. What must hold is in `moemesh_tests::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    moemesh_tests::fuzz::check("store", bytes);
});
