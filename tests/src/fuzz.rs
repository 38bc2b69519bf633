//! What must hold for any bytes a stranger may send or leave on a disk, one function per parser.
//!
//! Each target takes bytes, hands them to the parser that the program itself uses, and checks promises: what is taken
//! keeps the documented limits and comes out of its encoder as it went in; what is refused says why, in a text that
//! can be shown on a terminal. "Does not panic" is the least of it. Where a signature, a checksum or a length would
//! keep every mutation out, the target puts it right first, so that what lies behind is reached too; the unaided way
//! stays reachable beside it. The same functions are run by cargo-fuzz (`tests/fuzz`) and, over its corpus, by plain
//! tests. The price: a broken promise is a panic here, so nothing but tests may call this.

pub mod seeds;

mod cluster;
mod discovery;
mod files;
mod http;
mod placement;
mod prompt;
mod store;
mod trust;
mod weights;
mod wire;

use std::fmt::Display;

/// What became of an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is one of those that the program works with.
    Taken,
    /// It is not, and the program said why.
    Refused,
}

/// A property of every input.
pub type Check = fn(&[u8]) -> Verdict;

/// All of them, by the name of their fuzz target and corpus.
pub const TARGETS: &[(&str, Check)] = &[
    ("call", wire::call),
    ("checkpoint_index", files::checkpoint_index),
    ("cluster", cluster::cluster),
    ("config", files::config),
    ("control", wire::control),
    ("discovery", discovery::discovery),
    ("frame", wire::frame),
    ("http", http::http),
    ("join", trust::join),
    ("manifest", files::manifest),
    ("placement", placement::placement),
    ("prompt_files", prompt::prompt_files),
    ("reply", wire::reply),
    ("roster", trust::roster),
    ("safetensors", files::safetensors),
    ("store", store::store),
    ("template", prompt::template),
    ("tickets", trust::tickets),
    ("token", trust::token),
    ("tokenizer", prompt::tokenizer),
];

/// Runs one input through the target of this name.
///
/// # Panics
/// If there is no such target, or a promise is broken.
pub fn check(target: &str, bytes: &[u8]) -> Verdict {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    let (_, check) = found.unwrap_or_else(|| panic!("no fuzz target is called {target}"));
    check(bytes)
}

/// Longest text of a refusal, characters: a screen. What a stranger sent must not fill a log.
const REFUSAL_MAX: usize = 2200;

/// Checks the text of a refusal: there is one, it is of a length to be read, and it does to a terminal what text does.
fn says_why(error: &impl Display) -> Verdict {
    let text = error.to_string();
    assert!(!text.trim().is_empty(), "refused without a word");
    let length = text.chars().count();
    assert!(length <= REFUSAL_MAX, "a refusal of {length} characters: {}...", shown(&text));
    let odd = text.chars().find(|letter| letter.is_control() && *letter != '\n');
    assert_eq!(odd, None, "a refusal that acts on terminals: {}", shown(&text));
    Verdict::Refused
}

fn shown(text: &str) -> String {
    text.escape_debug().take(400).collect()
}
