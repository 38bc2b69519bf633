//! The commands: what `--json` says, that cluster and single process agree, and what bad input is told.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tempfile::TempDir;

use super::harness::{Cluster, Shape, fixture, folder, moemesh, moemesh_with, tale_moe, turn};

fn positive(value: &Value, key: &str) {
    assert!(value[key].as_f64().is_some_and(|number| number > 0.0), "{key} of {value}");
}

/// Runs `demo` and `reference` with these flags and checks that they agree to the last bit; the demo's report.
#[track_caller]
fn agree(nodes: &str, flags: &[&str]) -> Value {
    let _turn = turn();
    let run = |command: &[&str]| {
        let ended = moemesh(&[command, &["--json"], flags].concat());
        let report = ended.json();
        let text = report["text"].as_str().expect("there is text").to_owned();
        assert!(text.len() > 50 && ended.stdout.starts_with(&text), "the story is streamed: {ended:?}");
        report
    };
    let (demo, reference) = (run(&["demo", "--nodes", nodes]), run(&["reference"]));
    for key in ["token_ids", "text", "logits_digest", "weights"] {
        assert!(!demo[key].is_null(), "no {key}");
        assert_eq!(demo[key], reference[key], "{key}");
    }
    assert_eq!(demo["equals_reference"], true);
    for report in [&demo, &reference] {
        ["decode_tok_s", "ttft_ms"].iter().for_each(|key| positive(report, key));
    }
    demo
}

#[test]
fn demo_reports_the_story_and_the_nodes_shares() {
    let demo = agree("3", &["--max-tokens", "80"]);
    assert_eq!(demo["token_ids"].as_array().map(Vec::len), Some(80));
    positive(&demo, "wire_bytes_per_token");
    let nodes = demo["nodes"].as_array().expect("nodes");
    assert_eq!(nodes.len(), 3);
    let mut experts = 0;
    for (index, node) in nodes.iter().enumerate() {
        assert_eq!(node["name"], format!("node-{}", index + 1));
        assert_eq!(node["state"], "serving");
        assert_eq!(node["missed"], 0);
        for key in ["calls", "assignments", "rows", "bytes_out", "bytes_in", "weight_bytes"] {
            positive(node, key);
        }
        experts += node["experts"].as_u64().expect("a count");
    }
    // 24 experts in each of 6 layers, each on one node.
    assert_eq!(experts, 24 * 6);
    // Four experts per token and layer: those of the prompt and of every token that was fed back.
    let assignments: u64 = nodes.iter().filter_map(|node| node["assignments"].as_u64()).sum();
    assert_eq!(assignments % (4 * 6), 0);
    assert!(assignments / (4 * 6) >= 79, "{assignments} assignments");
}

#[test]
fn drawn_tokens_agree_with_the_single_process() {
    let seventh = agree("3", &["--max-tokens", "60", "--temperature", "0.8", "--seed", "7"]);
    let eighth = agree("1", &["--max-tokens", "60", "--temperature", "0.8", "--seed", "8"]);
    assert_ne!(seventh["token_ids"], eighth["token_ids"]);
}

#[test]
fn every_weight_format_agrees_with_the_single_process() {
    let digests = ["q8", "bf16"].map(|weights| {
        let report = agree("2", &["--max-tokens", "40", "--weights", weights]);
        assert_eq!(report["weights"], weights);
        report["logits_digest"].clone()
    });
    assert_ne!(digests[0], digests[1], "the formats are different weights");
}

#[test]
fn a_chat_agrees_with_the_single_process() {
    let question = ["--prompt", "Tell me of a wolf.", "--max-tokens", "40", "--ignore-eos"];
    let chat = agree("3", &[&question[..], &["--chat"]].concat());
    let plain = moemesh(&[&["reference", "--json"], &question[..]].concat()).json();
    assert_ne!(chat["token_ids"], plain["token_ids"], "the template changes the prompt");
}

#[test]
fn perplexity_is_the_same_through_a_cluster() {
    let _turn = turn();
    let flags = ["eval", "perplexity", "--windows", "2", "--json"];
    let alone = moemesh(&flags).json();
    let cluster = moemesh(&[&flags[..], &["--nodes", "2"]].concat()).json();
    assert_eq!(alone["tokens"], 2 * 511);
    assert_eq!(cluster["tokens"], alone["tokens"]);
    assert_eq!(cluster["perplexity"], alone["perplexity"]);
    let perplexity = alone["perplexity"].as_f64().expect("a number");
    // 4096 would be a guess; the model has learnt, and has not seen this text.
    assert!((5.0..200.0).contains(&perplexity), "{perplexity}");
}

#[test]
fn version_says_what_this_machine_can_do() {
    let version = moemesh(&["version", "--json"]).json();
    assert_eq!(version["version"], env!("CARGO_PKG_VERSION"));
    assert_eq!(version["isa"][0], "scalar");
    assert_eq!(version["libtorch"], cfg!(feature = "torch"));
    assert_eq!(version["wire"], "moemesh/3");
}

#[test]
fn bench_link_reports_calls_and_echoes() {
    let _turn = turn();
    let report = moemesh(&["bench", "link", "--calls", "200", "--json"]).json();
    assert_eq!(report["calls"], 200);
    for what in ["call", "quinn_echo", "tcp_echo"] {
        let percentile = |name: &str| report[format!("{what}_us_{name}")].as_f64().expect("a number");
        assert!(percentile("p50") > 0.0 && percentile("p50") <= percentile("p99"), "{report}");
    }
}

/// A copy of a tiny checkpoint that a test may damage.
fn damaged(damage: impl FnOnce(&Path)) -> TempDir {
    let copy = folder();
    for file in fs::read_dir(fixture("qwen3_moe")).expect("the fixture is there").flatten() {
        fs::copy(file.path(), copy.path().join(file.file_name())).expect("copy a file");
    }
    damage(copy.path());
    copy
}

#[track_caller]
fn refused_model(damage: impl FnOnce(&Path), words: &[&str]) {
    let model = damaged(damage);
    let path = model.path().to_string_lossy();
    let refused = moemesh(&["reference", "--model", &path, "--max-tokens", "2"]);
    refused.refused(words);
    refused.refused(&[&path]);
}

#[test]
fn damaged_models_are_refused_with_a_remedy() {
    let whole = damaged(|_| ());
    let path = whole.path().to_string_lossy();
    let fine =
        moemesh(&["reference", "--model", &path, "--max-tokens", "2", "--ignore-eos", "--json"]).json();
    assert_eq!(fine["token_ids"].as_array().map(Vec::len), Some(2), "undamaged it works");

    let weights = |folder: &Path| folder.join("model.safetensors");
    let cut = |folder: &Path, bytes: u64| {
        let file = fs::File::options().write(true).open(weights(folder)).expect("open the weights");
        let length = file.metadata().expect("it has a length").len();
        file.set_len(length.saturating_sub(bytes).max(4)).expect("cut it");
    };
    refused_model(|folder| cut(folder, 1), &["model.safetensors", "truncated", "download it again"]);
    refused_model(|folder| cut(folder, u64::MAX), &["model.safetensors"]);
    refused_model(|folder| fs::remove_file(weights(folder)).expect("remove"), &["neither model.safetensors"]);
    let huge_header = |folder: &Path| {
        let mut bytes = fs::read(weights(folder)).expect("read the weights");
        bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
        fs::write(weights(folder), bytes).expect("write them");
    };
    refused_model(huge_header, &["model.safetensors", "header"]);

    let config = |folder: &Path, key: &str, value: Value| {
        let file = folder.join("config.json");
        let text = fs::read_to_string(&file).expect("read the config");
        let mut config: Value = serde_json::from_str(&text).expect("it is JSON");
        config[key] = value;
        fs::write(file, config.to_string()).expect("write it");
    };
    refused_model(
        |folder| config(folder, "model_type", json!("llama9_moe")),
        &["config.json", "'llama9_moe'", "qwen3_moe, qwen2_moe, mixtral, olmoe"],
    );
    refused_model(|folder| config(folder, "hidden_size", json!(72)), &["72"]);
    refused_model(|folder| config(folder, "hidden_act", json!("tanh")), &["hidden_act", "tanh"]);
    refused_model(|folder| fs::write(folder.join("config.json"), "{").expect("write"), &["config.json"]);
    refused_model(|folder| fs::remove_file(folder.join("config.json")).expect("remove"), &["config.json"]);
    refused_model(
        |folder| fs::write(folder.join("tokenizer.json"), "[]").expect("write"),
        &["tokenizer.json"],
    );
}

#[test]
fn models_that_do_not_exist_are_refused_with_a_remedy() {
    let missing = tale_moe().join("not-here");
    let missing = missing.to_string_lossy();
    moemesh(&["reference", "--model", &missing]).refused(&[&missing, "synthetic:<shape>"]);
    moemesh(&["demo", "--model", &missing]).refused(&[&missing]);
    let unknown = ["reference", "--model", "synthetic:unknown"];
    moemesh(&unknown).refused(&["'synthetic:unknown'", "qwen3-30b-a3b", "olmoe-1b-7b"]);
    moemesh(&["reference", "--model", "synthetic:olmoe-1b-7b?layers=many"]).refused(&["layers", "many"]);
    moemesh(&["reference", "--weights", "q5"]).refused(&["q5", "q4", "q8", "bf16"]);
    moemesh(&["reference", "--temperature", "2.5"]).refused(&["--temperature", "2.5"]);
    moemesh(&["demo", "--nodes", "0"]).refused(&["--nodes", "1..=64"]);
}

#[test]
fn an_instruction_set_that_is_unknown_or_lacking_is_refused_by_every_process() {
    let folder = folder();
    let file = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    let cluster = Cluster::start(&Shape::nodes(0));
    let (router, node) = (file("router"), file("node"));
    // It joins before it finds that it cannot compute.
    let join = ["node", "--state", &node, "--join", &cluster.token(), "--stop-with-parent"];
    moemesh_with(&join, &[("MOEMESH_ISA", "bogus")]).refused(&["'bogus'"]);
    let ports = ["--http", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--wait", "1", "--stop-with-parent"];
    let commands = [
        &["reference", "--max-tokens", "2"][..],
        &["demo", "--nodes", "1"],
        &["bench", "kernel", "--rows", "1", "--no-libtorch"],
        &["bench", "decode"],
        &["node", "--state", &node, "--stop-with-parent"],
        &[&["router", "--state", &router], &ports[..]].concat(),
    ];
    // No machine has the instructions of both families.
    let lacking = if cfg!(target_arch = "x86_64") { "neon" } else { "avx512" };
    for command in commands {
        let refused = |isa| moemesh_with(command, &[("MOEMESH_ISA", isa)]);
        refused("bogus").refused(&["'bogus'", "MOEMESH_ISA", "scalar, neon, avx2, avx512, amx"]);
        refused(lacking).refused(&["this machine has no", lacking, "MOEMESH_ISA", "scalar"]);
    }
    moemesh(&["bench", "kernel", "--isa", lacking]).refused(&["this machine has no", lacking, "scalar"]);
}

#[test]
fn a_plan_needs_no_cluster_and_says_what_is_missing() {
    let example = moemesh(&["plan", "--example"]).stdout;
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("machines.toml");
    fs::write(&file, &example).expect("written");
    let file = file.to_string_lossy().into_owned();
    let plan = |model: &str, more: &[&str]| {
        let model = format!("synthetic:{model}");
        moemesh(&[&["plan", "--model", &model, "--nodes", &file], more].concat())
    };
    let small = plan("qwen3-30b-a3b", &["--json"]).json();
    assert_eq!((&small["fits"], &small["missing_bytes"]), (&json!(true), &json!(0)));
    for key in ["decode_tok_s", "prefill_tok_s", "first_token_s", "spare_bytes"] {
        positive(&small, key);
    }
    assert_eq!(small["nodes"].as_array().map(Vec::len), Some(4));
    let share: f64 =
        small["nodes"].as_array().into_iter().flatten().filter_map(|node| node["share"].as_f64()).sum();
    assert!((0.99..1.01).contains(&share), "all of the work is somebody's: {share}");
    // Two holders of each are more than half the room for the larger model; its experts alone do not fit.
    let large = plan("qwen3-235b-a22b", &["--json"]).json();
    assert_eq!(large["fits"], false);
    positive(&large, "missing_bytes");
    let said = plan("qwen3-235b-a22b", &[]).stdout;
    for part in ["fits           no", "more memory on any node", "if tower is lost", "if the router is lost"]
    {
        assert!(said.contains(part), "no '{part}' in\n{said}");
    }
    let whole = plan("mixtral-8x7b", &["--json", "--slices", "off", "--replicas", "1"]).json();
    let cut = plan("mixtral-8x7b", &["--json", "--replicas", "1"]).json();
    assert_eq!(whole["parts_per_expert"], 1);
    assert!(
        cut["parts_per_expert"].as_u64() > Some(1)
            && cut["decode_tok_s"].as_f64() > whole["decode_tok_s"].as_f64()
    );
}

#[test]
fn a_plan_refuses_what_it_cannot_read() {
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("machines.toml");
    fs::write(&file, "[router]\ngb_s = 10\nspeed = 3\n").expect("written");
    let file = file.to_string_lossy().into_owned();
    let model = "synthetic:olmoe-1b-7b";
    for (arguments, told) in [
        (vec!["plan", "--model", model, "--nodes", &file], "line 3"),
        (vec!["plan", "--model", model, "--nodes", "/does/not/exist"], "moemesh plan --example"),
        (vec!["plan", "--model", model, "--nodes", &file, "--replicas", "5"], "from 1 to 4"),
        (vec!["plan", "--model", "synthetic:gpt-9"], "qwen3-30b-a3b"),
    ] {
        let ended = moemesh(&arguments);
        assert!(ended.code != Some(0) && ended.stderr.contains(told), "{arguments:?}: {ended:?}");
    }
}
