//! The rules of the source tree, as tests: layers, import order, budgets, headers, names, links.
//!
//! A rule that nobody checks is a wish. Each rule is a function from text to complaints, so that it can be shown a
//! violation (the tests below) as well as the tree. They read text, not syntax trees: simple enough to trust, at the
//! price of not seeing through macros. They do not repeat what clippy does (function length, `unwrap`, printing).

mod layers;
mod modules;
mod source;
mod text;

use std::path::{Path, PathBuf};

/// One violation, with what to do about it.
pub(crate) type Complaint = String;

/// A text file of the repository.
#[derive(Debug)]
pub(crate) struct SourceFile {
    /// Path from the root of the repository, with `/`.
    pub(crate) path: String,
    /// All of it.
    pub(crate) text: String,
}

/// Folders that are made, not written.
const MADE: [&str; 3] = ["target", "cache", "node_modules"];
/// Hidden folders that are written.
const HIDDEN_WRITTEN: [&str; 3] = [".cargo", ".ci", ".github"];
/// What is read as text.
const TEXT_ENDINGS: [&str; 11] =
    ["rs", "toml", "md", "py", "sh", "yml", "yaml", "service", "env", "sysusers", "jinja"];
const TEXT_NAMES: [&str; 5] = ["Makefile", "run", "setup-libtorch", "check", "Containerfile"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the tests are a folder of the workspace")
        .to_path_buf()
}

fn collect(folder: &Path, root: &Path, files: &mut Vec<SourceFile>) {
    for entry in std::fs::read_dir(folder).expect("a folder of the repository is readable") {
        let path = entry.expect("a folder of the repository is readable").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if path.is_dir() {
            let hidden = name.starts_with('.') && !HIDDEN_WRITTEN.contains(&name.as_str());
            if !hidden && !MADE.contains(&name.as_str()) {
                collect(&path, root, files);
            }
            continue;
        }
        let ending = path.extension().unwrap_or_default().to_string_lossy().into_owned();
        if !TEXT_ENDINGS.contains(&ending.as_str()) && !TEXT_NAMES.contains(&name.as_str()) {
            continue;
        }
        let below = path.strip_prefix(root).expect("collected below the root");
        let text = std::fs::read_to_string(&path).expect("a text file of the repository is UTF-8");
        files.push(SourceFile { path: below.to_string_lossy().replace('\\', "/"), text });
    }
}

/// Every text file that people write, in a fixed order. Fixtures and models are data.
fn tree() -> Vec<SourceFile> {
    let root = root();
    let mut files = Vec::new();
    collect(&root, &root, &mut files);
    files.retain(|file| !file.path.starts_with("tests/fixtures/") && !file.path.starts_with("models/"));
    files.sort_by(|a, b| a.path.cmp(&b.path));
    assert!(files.len() > 30, "the walk lost its way: {} files below {}", files.len(), root.display());
    files
}

fn rust(files: &[SourceFile]) -> impl Iterator<Item = &SourceFile> {
    files.iter().filter(|file| file.path.ends_with(".rs"))
}

#[track_caller]
fn assert_none(complaints: Vec<Complaint>) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

#[test]
fn crates_depend_only_on_layers_below() {
    let files = tree();
    let manifests = files.iter().filter(|file| file.path.ends_with("/Cargo.toml"));
    let complaints: Vec<_> = manifests.flat_map(|file| layers::check(&file.path, &file.text)).collect();
    assert_none(complaints);
}

#[test]
fn modules_import_only_modules_listed_after_them() {
    assert_none(modules::check(&tree()));
}

#[test]
fn files_have_headers_and_keep_their_budget() {
    let files = tree();
    assert_none(rust(&files).flat_map(|file| source::check_file(&file.path, &file.text)).collect());
}

#[test]
fn unsafe_code_stays_in_the_kernels() {
    let files = tree();
    assert_none(rust(&files).flat_map(|file| source::check_unsafe(&file.path, &file.text)).collect());
}

#[test]
fn names_say_what_things_are() {
    let files = tree();
    assert_none(rust(&files).flat_map(|file| source::check_names(&file.path, &file.text)).collect());
}

#[test]
fn the_protocol_has_no_clock_and_no_io() {
    let files = tree();
    let proto = rust(&files).filter(|file| file.path.starts_with("mesh/proto/src/"));
    assert_none(proto.flat_map(|file| source::check_purity(&file.path, &file.text)).collect());
}

#[test]
fn nothing_is_left_for_later_or_tied_to_one_machine() {
    let files = tree();
    let written = files.iter().filter(|file| !file.path.starts_with("tests/it/tidy"));
    assert_none(written.flat_map(|file| text::check(&file.path, &file.text)).collect());
}

#[test]
fn links_in_documents_lead_somewhere() {
    let root = root();
    let files = tree();
    let documents = files.iter().filter(|file| file.path.ends_with(".md"));
    let exists = |path: &str| root.join(path).exists();
    assert_none(documents.flat_map(|file| text::check_links(&file.path, &file.text, exists)).collect());
}

#[test]
fn documents_name_tests_that_exist() {
    let files = tree();
    let architecture =
        files.iter().find(|file| file.path == "ARCHITECTURE.md").expect("ARCHITECTURE.md exists");
    assert_none(text::check_named_tests(&architecture.text, &files));
}
