//! Fuzz target: what nodes say and do, event by event. What must hold is in `moemesh_tests::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    moemesh_tests::fuzz::check("cluster", bytes);
});
