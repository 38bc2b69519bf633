//! Options that say how to compute: bad ones are told what to do, odd ones work.

use serde_json::{Value, json};

use super::harness::{moemesh, moemesh_with, turn};

const SHORT: [&str; 4] = ["--max-tokens", "8", "--prompt", "The wolf"];

/// A benchmark of a tiny expert that takes a moment.
const TINY: [&str; 13] = [
    "bench", "kernel", "--hidden", "64", "--inter", "64", "--rows", "1,256", "--rounds", "3", "--arena", "1",
    "--json",
];

#[test]
fn thread_counts_out_of_range_are_refused() {
    for command in ["reference", "router", "demo"] {
        moemesh(&[command, "--threads", "0"]).refused(&["--threads", "0 is not in 1..=1024"]);
    }
    moemesh(&["bench", "kernel", "--threads", "0"]).refused(&["--threads", "1..=1024"]);
    moemesh(&["reference", "--threads", "many"]).refused(&["--threads", "many"]);
    moemesh_with(&["reference"], &[("MOEMESH_THREADS", "0")]).refused(&["--threads", "1..=1024"]);
}

#[test]
fn more_threads_than_cores_are_warned_about_and_work() {
    let _turn = turn();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let run = |threads: usize| {
        moemesh(&[&["reference", "--json", "--threads", &threads.to_string()], &SHORT[..]].concat())
    };
    let (few, many) = (run(1), run(cores + 3));
    assert!(!few.stderr.contains("threads on"), "{}", few.stderr);
    let warning = format!("{} threads on {cores} cores", cores + 3);
    assert!(many.stderr.contains(&warning), "{}", many.stderr);
    assert!(many.stderr.contains(&format!("--threads {cores} or leave it out")), "{}", many.stderr);
    assert_eq!(few.json()["logits_digest"], many.json()["logits_digest"]);
}

#[test]
fn instruction_sets_to_measure_are_those_of_the_machine() {
    let version = moemesh(&["version", "--json"]).json();
    let here: Vec<&str> =
        version["isa"].as_array().expect("a list").iter().filter_map(Value::as_str).collect();
    for lacking in ["avx2", "avx512", "amx", "neon"].into_iter().filter(|isa| !here.contains(isa)) {
        moemesh(&["bench", "kernel", "--isa", lacking]).refused(&["--isa", lacking, here[0]]);
    }
    moemesh(&["bench", "kernel", "--isa", "avx9"]).refused(&["--isa", "'avx9'", here[0]]);
}

#[test]
fn shapes_that_cannot_be_measured_are_refused() {
    let refuse = |flags: &[&str], words: &[&str]| {
        moemesh(&[&["bench", "kernel"], flags].concat()).refused(words);
    };
    refuse(&["--rows", "0"], &["--rows 0", "1 to 4096"]);
    refuse(&["--rows", "1,5000"], &["--rows 5000", "1 to 4096"]);
    refuse(&["--hidden", "100"], &["--hidden 100", "multiple of 32"]);
    refuse(&["--hidden", "0"], &["--hidden 0", "multiple of 32"]);
    refuse(&["--inter", "48"], &["--inter 48", "multiple of 32"]);
    refuse(&["--inter", "1048576"], &["--inter 1048576", "65536"]);
    refuse(&["--formats", "q3"], &["q3", "bf16, q8 or q4"]);
    refuse(&["--rounds", "0"], &["--rounds", "1..=1000"]);
    refuse(&["--arena", "0"], &["--arena", "1..=16384"]);
}

#[test]
fn bench_kernel_reports_lines_targets_and_the_table() {
    let _turn = turn();
    let report = moemesh(&TINY).json();
    let lines = report["results"].as_array().expect("lines");
    for line in lines {
        for key in ["weight_gb_s", "gflops", "read_gb_s", "ratio"] {
            assert!(line[key].as_f64().is_some_and(|v| v > 0.0), "{key} of {line}");
        }
    }
    let count = |backend: &str| lines.iter().filter(|line| line["backend"] == backend).count();
    assert!(count("native") >= 6, "three formats at two row counts: {report}");
    let targets = report["targets"].as_object().expect("targets");
    let mut expected = vec!["k1_native_over_read"];
    if cfg!(feature = "torch") {
        assert_eq!(count("libtorch"), 2 * 6, "two ways through libtorch");
        assert_eq!(count("torch bf16 matmul"), 2);
        expected.extend(["k2_native_over_torch_matmul", "k3_native_over_torch_int4"]);
    }
    assert_eq!(targets.keys().collect::<Vec<_>>(), expected);
    let tables = report["fastest"].as_array().expect("tables");
    assert_eq!(tables.iter().map(|table| &table["format"]).collect::<Vec<_>>(), ["q4", "q8", "bf16"]);
    for choice in tables.iter().flat_map(|table| table["experts"].as_array().expect("choices")) {
        let candidates = tables[0]["candidates"].as_array().expect("names");
        assert!(candidates.contains(&choice["chosen"]), "{choice}");
    }
    let mut flags = TINY.to_vec();
    flags.extend(["--no-libtorch", "--formats", "q8"]);
    let without = moemesh(&flags).json();
    let lines = without["results"].as_array().expect("lines");
    assert!(lines.iter().all(|line| line["backend"] == "native" && line["format"] == "q8"), "{without}");
    assert_eq!(without["targets"], json!({}), "the targets are about q4");
}

#[test]
fn devices_need_libtorch_and_have_to_be_there() {
    let on = |device: &str, flags: &[&str]| {
        moemesh(&[&["reference", "--max-tokens", "2", "--device", device], flags].concat())
    };
    on("cuda", &[]).refused(&["--device cuda", "--kernels fastest", "--backend libtorch"]);
    on("cuda", &["--kernels", "exact"]).refused(&["--device cuda", "--kernels fastest"]);
    if cfg!(feature = "torch") {
        for flags in [["--kernels", "fastest"], ["--backend", "libtorch"]] {
            on("cuda:99", &flags).refused(&["device 'cuda:99' is not here", "libtorch finds cpu"]);
            on("toaster", &flags).refused(&["unknown device 'toaster'", "cpu, cuda, cuda:N or mps"]);
        }
    } else {
        on("cuda", &["--kernels", "fastest"]).refused(&["--device cuda", "no libtorch", "--device cpu"]);
        on("cpu", &["--backend", "libtorch"]).refused(&["--backend libtorch", "leave --backend out"]);
    }
}

#[test]
fn the_fastest_kernels_tell_a_story_and_say_what_they_are() {
    let _turn = turn();
    let told = moemesh(&[&["-v", "reference", "--json", "--kernels", "fastest"], &SHORT[..]].concat());
    assert_eq!(told.json()["token_ids"].as_array().map(Vec::len), Some(8));
    let chosen = if cfg!(feature = "torch") { "kernels: fastest (" } else { "this build has no libtorch" };
    assert!(told.stderr.contains(chosen), "{}", told.stderr);
}
