//! Fuzz target: requests to the HTTP API. What must hold is in `moemesh_tests::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    moemesh_tests::fuzz::check("http", bytes);
});
