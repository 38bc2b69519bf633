//! The fuzz targets on stable: every input of their corpora, those that the seeds are made of now included.
//!
//! The corpora are files so that cargo-fuzz can begin with them. Whoever adds a seed writes them anew with
//! `MOEMESH_SEEDS=write`; whoever finds a crash adds its input, under a name that says what it is.

use std::collections::BTreeSet;
use std::panic::catch_unwind;
use std::path::PathBuf;

use moemesh_tests::fuzz::seeds::{Seed, seeds};
use moemesh_tests::fuzz::{TARGETS, Verdict, check};
use moemesh_tests::project;

/// Inputs a target has at least, and of these taken and refused ones.
const INPUTS_MIN: usize = 8;
const EACH_MIN: usize = 2;

/// All corpora together, bytes: they are in the repository for good.
const CORPORA_BYTES_MAX: u64 = 1 << 20;

fn folder(target: &str) -> PathBuf {
    project().join("tests/fuzz/corpus").join(target)
}

fn file_of(seed: &Seed) -> PathBuf {
    folder(seed.target).join(format!("seed-{}", seed.name))
}

/// Names and inputs, the corpus first.
fn inputs(target: &str, seeds: &[Seed]) -> Vec<(String, Vec<u8>)> {
    let files = std::fs::read_dir(folder(target)).unwrap().map(|file| file.unwrap().path());
    let mut inputs: Vec<_> =
        files.map(|path| (path.display().to_string(), std::fs::read(&path).unwrap())).collect();
    inputs.sort();
    let own = seeds.iter().filter(|seed| seed.target == target);
    inputs.extend(own.map(|seed| (format!("seed {}", seed.name), seed.bytes.clone())));
    // Most files are what their seed is.
    let mut known = BTreeSet::new();
    inputs.retain(|(_, bytes)| known.insert(bytes.clone()));
    inputs
}

#[test]
fn every_input_of_the_corpora_is_refused_by_name_or_keeps_every_promise() {
    let seeds = seeds();
    if std::env::var("MOEMESH_SEEDS").is_ok_and(|value| value == "write") {
        for seed in &seeds {
            std::fs::create_dir_all(folder(seed.target)).unwrap();
            std::fs::write(file_of(seed), &seed.bytes).unwrap();
        }
    }
    let missing = seeds.iter().find(|seed| !file_of(seed).exists());
    assert!(missing.is_none(), "{missing:?} is not in the corpus; run this test with MOEMESH_SEEDS=write");
    let mut broken = Vec::new();
    for (target, _) in TARGETS {
        let (mut taken, mut refused) = (0, 0);
        for (name, bytes) in inputs(target, &seeds) {
            match catch_unwind(|| check(target, &bytes)) {
                Ok(Verdict::Taken) => taken += 1,
                Ok(Verdict::Refused) => refused += 1,
                Err(_) => broken.push(format!("{target}: {name}")),
            }
        }
        println!("{target}: {taken} taken, {refused} refused");
        if taken + refused < INPUTS_MIN || taken < EACH_MIN || refused < EACH_MIN {
            broken
                .push(format!("{target}: {taken} taken and {refused} refused are too few to mean anything"));
        }
    }
    assert!(broken.is_empty(), "see the panics above:\n{}", broken.join("\n"));
}

#[test]
fn every_target_is_one_of_cargo_fuzz_and_has_a_corpus_and_no_corpus_is_left_over() {
    let names: BTreeSet<String> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    let here = project().join("tests/fuzz");
    let found = |folder: &str| -> BTreeSet<String> {
        let entries = std::fs::read_dir(here.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        entries.map(|path| path.file_stem().unwrap().to_string_lossy().into_owned()).collect()
    };
    assert_eq!(found("fuzz_targets"), names);
    assert_eq!(found("corpus"), names);
    let manifest: toml::Table = std::fs::read_to_string(here.join("Cargo.toml")).unwrap().parse().unwrap();
    let bins = manifest["bin"].as_array().unwrap().iter();
    let bins: BTreeSet<String> = bins.map(|bin| bin["name"].as_str().unwrap().to_owned()).collect();
    assert_eq!(bins, names);
    for name in &names {
        let text = std::fs::read_to_string(here.join(format!("fuzz_targets/{name}.rs"))).unwrap();
        assert!(text.contains(&format!("check(\"{name}\", ")), "{name}.rs checks something else");
    }
    let files = names.iter().flat_map(|name| std::fs::read_dir(folder(name)).unwrap());
    let bytes: u64 = files.map(|file| file.unwrap().metadata().unwrap().len()).sum();
    assert!(bytes <= CORPORA_BYTES_MAX, "{bytes} bytes of corpora");
}
