//! Rung: equivalence. A cluster gives the bits of one process: tokens and raw logits, whatever the number of
//! nodes, the chunks, the company, preemption, or a node that goes away.

use std::sync::{Arc, LazyLock};

use model::format::Format;
use model::open::Model;
use model::reference::{Reference, Want};
use moemesh_tests::cluster::{Cluster, Outcome, Shape, finish, generate, native, open};
use router::forward::OVERLAP_ROWS;
use router::request::{FinishReason, GenerateRequest, Sampling};
use router::sampler::{Sampler, Scratch};

/// Packed once for all tests of this program.
static CACHE: LazyLock<tempfile::TempDir> = LazyLock::new(|| tempfile::tempdir().unwrap());

const AMPLE: Shape = Shape { nodes: 3, chunk: 64, kv_blocks: 512, replicate: false };

fn tale(format: Format) -> Arc<Model> {
    open(&moemesh_tests::tale_moe(), format, CACHE.path())
}

/// A prompt of arbitrary tokens; different numbers give different ones.
pub(super) fn prompt(number: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * 131 + number * 977 + 17) % 4000).collect()
}

pub(super) fn request(prompt: Vec<u32>, temperature: f32, max_tokens: u32) -> GenerateRequest {
    GenerateRequest {
        prompt,
        sampling: Sampling { temperature, top_p: 0.95, seed: 42, ..Sampling::default() },
        max_tokens,
        min_tokens: 0,
        stop_tokens: Vec::new(),
        logprobs: None,
        prompt_logprobs: None,
        logits_digest: true,
    }
}

/// The yardstick: one process, one sequence, token by token.
pub(super) fn alone(model: &Arc<Model>, request: &GenerateRequest) -> Outcome {
    let native = native();
    let capacity = request.prompt.len() + request.max_tokens as usize;
    let mut reference =
        Reference::load(Arc::clone(model), Arc::<_>::clone(&native) as _, native, capacity).unwrap();
    let mut sampler = Sampler::new(request.sampling.clone(), &request.prompt, &[], 0);
    let (mut scratch, mut digest) = (Scratch::default(), blake3::Hasher::new());
    let (mut tokens, mut next) = (Vec::new(), request.prompt.clone());
    while tokens.len() < request.max_tokens as usize {
        let logits = reference.feed(&next, Want::Last).unwrap();
        logits.iter().for_each(|logit| {
            digest.update(&logit.to_le_bytes());
        });
        let id = sampler.choose(logits, &mut scratch).unwrap();
        tokens.push(id);
        next = vec![id];
    }
    Outcome { tokens, digest: Some(digest.finalize().to_hex().to_string()), reason: FinishReason::Length }
}

#[test]
fn one_two_three_and_five_nodes_give_the_same_bits() {
    for format in [Format::Q4, Format::Q8, Format::Bf16] {
        let model = tale(format);
        let requests = [request(prompt(1, 40), 0.0, 256), request(prompt(2, 40), 0.8, 256)];
        let expected: Vec<Outcome> = requests.iter().map(|request| alone(&model, request)).collect();
        let counts: &[usize] = if format == Format::Q4 { &[1, 2, 3, 5] } else { &[3] };
        for nodes in counts {
            let cluster = Cluster::start(&model, Shape { nodes: *nodes, ..AMPLE });
            for (request, expected) in requests.iter().zip(&expected) {
                let (outcome, timing) = generate(&cluster.engine, request.clone());
                assert_eq!(&outcome, expected, "{format}, {nodes} nodes");
                assert!(timing.wire_bytes > 0, "nothing crossed the wire");
            }
            let shares: Vec<u64> = cluster.hub.nodes().iter().map(|node| node.counters.answered).collect();
            assert!(shares.iter().all(|calls| *calls > 0), "{nodes} nodes answered {shares:?} calls");
        }
    }
}

#[test]
fn other_requests_never_change_bits() {
    let model = tale(Format::Q4);
    let cluster = Cluster::start(&model, AMPLE);
    let requests: Vec<GenerateRequest> = (0..8)
        .map(|i| request(prompt(i, 5 + 37 * i), if i % 2 == 0 { 0.0 } else { 0.9 }, 40 + 8 * i))
        .collect();
    let streams: Vec<_> =
        requests.iter().map(|request| cluster.engine.submit(request.clone()).unwrap()).collect();
    for (request, stream) in requests.iter().zip(streams) {
        assert_eq!(finish(stream).0, alone(&model, request));
    }
    let status = cluster.status.read();
    assert!(status.decode_rows > status.steps, "requests never shared a step: {status:?}");
}

#[test]
fn chunk_sizes_never_change_bits() {
    let model = tale(Format::Q4);
    let request = request(prompt(3, 333), 0.0, 24);
    let expected = alone(&model, &request);
    for chunk in [1, 5, 32, 100, 512] {
        let cluster = Cluster::start(&model, Shape { nodes: 2, chunk, ..AMPLE });
        assert_eq!(generate(&cluster.engine, request.clone()).0, expected, "chunks of {chunk}");
    }
}

#[test]
fn experts_shared_with_the_router_give_the_same_bits() {
    let model = tale(Format::Q4);
    let requests = [request(prompt(1, 40), 0.0, 128), request(prompt(2, 300), 0.8, 64)];
    let expected: Vec<Outcome> = requests.iter().map(|request| alone(&model, request)).collect();
    for nodes in [1, 2, 3] {
        let cluster = Cluster::start(&model, Shape { nodes, replicate: true, chunk: 256, ..AMPLE });
        for (request, expected) in requests.iter().zip(&expected) {
            assert_eq!(&generate(&cluster.engine, request.clone()).0, expected, "{nodes} nodes");
        }
        let cost = cluster.status.read().cost;
        let here = cost.assignments_here;
        assert!(0 < here && here < cost.assignments, "{nodes} nodes: {here} of {} here", cost.assignments);
        let shares: Vec<u64> = cluster.hub.nodes().iter().map(|node| node.counters.answered).collect();
        assert!(shares.iter().all(|calls| *calls > 0), "{nodes} nodes answered {shares:?} calls");
    }
}

#[test]
fn shared_experts_and_other_requests_never_change_bits() {
    let model = tale(Format::Q4);
    let cluster = Cluster::start(&model, Shape { nodes: 2, replicate: true, chunk: 256, ..AMPLE });
    let requests: Vec<GenerateRequest> = (0..8)
        .map(|i| request(prompt(i, 5 + 67 * i), if i % 2 == 0 { 0.0 } else { 0.9 }, 40 + 8 * i))
        .collect();
    let streams: Vec<_> =
        requests.iter().map(|request| cluster.engine.submit(request.clone()).unwrap()).collect();
    for (request, stream) in requests.iter().zip(streams) {
        assert_eq!(finish(stream).0, alone(&model, request));
    }
}

#[test]
fn a_prompt_in_two_parts_has_the_same_bits() {
    let model = tale(Format::Q4);
    for replicate in [false, true] {
        let cluster = Cluster::start(&model, Shape { nodes: 2, chunk: 512, replicate, ..AMPLE });
        for len in [OVERLAP_ROWS - 1, OVERLAP_ROWS, OVERLAP_ROWS + 1, 511, 700] {
            let request = request(prompt(len as u32, len as u32), 0.0, 4);
            let expected = alone(&model, &request);
            let (outcome, _) = generate(&cluster.engine, request);
            assert_eq!(outcome, expected, "{len} rows, replicate {replicate}");
        }
    }
}

#[test]
fn decode_rows_beside_a_prompt_in_two_parts_keep_their_bits() {
    let model = tale(Format::Q4);
    for replicate in [false, true] {
        let cluster = Cluster::start(&model, Shape { nodes: 2, chunk: 300, replicate, ..AMPLE });
        let long: Vec<GenerateRequest> = (0..3).map(|i| request(prompt(i, 20), 0.7, 120)).collect();
        let mut streams: Vec<_> =
            long.iter().map(|request| cluster.engine.submit(request.clone()).unwrap()).collect();
        let mut begun = Vec::new();
        for stream in &mut streams {
            // It decodes from here on.
            match stream.blocking_recv() {
                Some(router::request::Event::Token { id, .. }) => begun.push(id),
                other => panic!("{other:?}"),
            }
        }
        let before = cluster.status.read();
        let late = request(prompt(9, 901), 0.0, 8);
        assert_eq!(generate(&cluster.engine, late.clone()).0, alone(&model, &late), "replicate {replicate}");
        let after = cluster.status.read();
        assert!(after.decode_rows > before.decode_rows, "nobody decoded beside the prompt");
        for ((request, stream), first) in long.iter().zip(streams).zip(begun) {
            let (mut outcome, _) = finish(stream);
            outcome.tokens.insert(0, first);
            assert_eq!(outcome, alone(&model, request), "replicate {replicate}");
        }
    }
}

#[test]
fn losing_a_node_never_changes_bits_of_shared_experts() {
    let model = tale(Format::Q4);
    let mut cluster = Cluster::start(&model, Shape { nodes: 2, replicate: true, chunk: 128, ..AMPLE });
    // Prompts of several steps of two parts each: the node is lost in one of them or between.
    let requests: Vec<GenerateRequest> = (0..3).map(|i| request(prompt(i, 900), 0.0, 100)).collect();
    let mut streams: Vec<_> =
        requests.iter().map(|request| cluster.engine.submit(request.clone()).unwrap()).collect();
    let mut first = Vec::new();
    match streams[0].blocking_recv() {
        Some(router::request::Event::Token { id, .. }) => first.push(id),
        other => panic!("{other:?}"),
    }
    cluster.end_node(1);
    for (index, (request, stream)) in requests.iter().zip(streams).enumerate() {
        let (mut outcome, _) = finish(stream);
        if index == 0 {
            outcome.tokens.insert(0, first[0]);
        }
        assert_eq!(outcome, alone(&model, request), "request {index}");
    }
    let calls = || cluster.hub.nodes()[0].counters.answered;
    let before = calls();
    assert_eq!(generate(&cluster.engine, requests[1].clone()).0, alone(&model, &requests[1]));
    assert!(calls() > before, "the node that is left is not used");
}

#[test]
fn preempted_requests_resume_with_the_same_bits() {
    let model = tale(Format::Q4);
    // Room for a little more than one of the four at full length (7 blocks each).
    let cluster = Cluster::start(&model, Shape { nodes: 2, chunk: 64, kv_blocks: 10, replicate: false });
    let requests: Vec<GenerateRequest> = (0..4).map(|i| request(prompt(i, 50), 0.7, 150)).collect();
    let streams: Vec<_> =
        requests.iter().map(|request| cluster.engine.submit(request.clone()).unwrap()).collect();
    let mut preemptions = 0;
    for (request, stream) in requests.iter().zip(streams) {
        let (outcome, timing) = finish(stream);
        assert_eq!(outcome, alone(&model, request));
        preemptions += timing.preemptions;
    }
    assert!(preemptions > 0, "nothing was preempted, so nothing was tested");
}

#[test]
fn losing_a_node_never_changes_bits() {
    let model = tale(Format::Q4);
    let mut cluster = Cluster::start(&model, AMPLE);
    let request = request(prompt(4, 30), 0.0, 400);
    let expected = alone(&model, &request);
    let mut stream = cluster.engine.submit(request).unwrap();
    let mut tokens = Vec::new();
    while tokens.len() < 20 {
        match stream.blocking_recv() {
            Some(router::request::Event::Token { id, .. }) => tokens.push(id),
            other => panic!("{other:?}"),
        }
    }
    cluster.end_node(1);
    let (rest, _) = finish(stream);
    tokens.extend(rest.tokens);
    assert_eq!((tokens, rest.digest), (expected.tokens, expected.digest));
    assert!(cluster.status.read().home_bytes > 0, "the router computed no expert of the lost node");
}
