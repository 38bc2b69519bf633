//! A node whose device has no room for some calls: it refuses those, the router computes them itself, and the node
//! serves the rest.
//!
//! The limit is the one `Libtorch` keeps of its device, on the CPU, where a test can run; a GPU's own refusal takes the
//! same way from the first operator that fails.

use std::sync::Arc;

use model::format::Format;
use model::kernel::libtorch::{Libtorch, LibtorchConfig, Route};
use moemesh_tests::cluster::{Cluster, Shape, generate, open};
use router::request::{FinishReason, GenerateRequest, Sampling};

/// Bytes a call may take on the device: twenty rows of the demo model's width, say, but not a chunk of a prompt.
const ROOM: u64 = 50_000;

/// Requests until the router trusts the node again; each takes milliseconds, the pause a second.
const TRIES_MAX: usize = 10_000;

fn request(prompt: u32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt: (0..prompt).map(|i| (i * 131 + 17) % 4000).collect(),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        max_tokens,
        min_tokens: 0,
        stop_tokens: Vec::new(),
        logprobs: None,
        prompt_logprobs: None,
        logits_digest: false,
    }
}

#[test]
fn a_node_without_room_for_a_call_refuses_it_and_serves_on() {
    let cache = tempfile::tempdir().unwrap();
    let model = open(&moemesh_tests::tale_moe(), Format::Q4, cache.path());
    let config = LibtorchConfig { memory_bytes: Some(ROOM), ..LibtorchConfig::cpu(1, Route::Dequantized) };
    let cluster =
        Cluster::start_with(&model, Shape { nodes: 1, chunk: 64, kv_blocks: 64, replicate: false }, &|| {
            Arc::new(Libtorch::new(&config).unwrap())
        });
    let state = || cluster.snapshot(0).unwrap();

    let (short, _) = generate(&cluster.engine, request(3, 8));
    assert_eq!((short.tokens.len(), short.reason), (8, FinishReason::Length));
    let before = state();
    assert_eq!(before.refused, 0, "{before:?}");
    assert!(before.calls > 0, "{before:?}");
    assert_eq!(cluster.status.read().home_bytes, 0, "the router held no experts until it had to");

    let (long, _) = generate(&cluster.engine, request(200, 8));
    assert_eq!((long.tokens.len(), long.reason), (8, FinishReason::Length));
    let full = state();
    assert!(full.refused > 0, "{full:?}");
    assert_eq!(full.panics, 0);
    assert!(cluster.status.read().home_bytes > 0, "the router computed what was refused");

    // After several refusals in a row the router leaves the node alone for a while, then tries it again.
    let mut tries = 0;
    while state().calls == full.calls {
        tries += 1;
        assert!(tries < TRIES_MAX, "{:?} after {full:?}", state());
        generate(&cluster.engine, request(3, 8));
    }
    assert_eq!(state().panics, 0);
}
