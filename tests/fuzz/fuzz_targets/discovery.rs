//! Fuzz target: what machines on the LAN say of where they are. What must hold is in `moemesh_tests::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    moemesh_tests::fuzz::check("discovery", bytes);
});
