//! Fuzz target: `tokenizer.json`. What must hold is in `moemesh_tests::fuzz`.
#![no_main]

libfuzzer_sys::fuzz_target!(
    init: {
        // The program catches panics of the tokenizers crate; libFuzzer's own hook would end the process at the first.
        std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    },
    |bytes: &[u8]| {
        moemesh_tests::fuzz::check("tokenizer", bytes);
    }
);
