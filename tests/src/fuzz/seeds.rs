//! What the fuzzers start from: inputs that are right, and inputs that are wrong in a way somebody thought of.
//!
//! They are made from code where their form is ours, so that they follow it when it changes, and from the fixtures and
//! by hand where it is not. `tests/fuzz/corpus` holds them as files, for cargo-fuzz; those files stay what they were
//! when the form changes, as inputs of another version. Price: a new message has no seed of its own before somebody
//! writes one; until then it gets zeros.

mod files;
mod peers;
mod stories;
mod texts;
mod weights;

/// An input for a target, with a name for its file.
#[derive(Clone, Debug)]
pub struct Seed {
    /// Of the target.
    pub target: &'static str,
    /// Letters, digits and dashes.
    pub name: String,
    /// The input.
    pub bytes: Vec<u8>,
}

impl Seed {
    fn new(target: &'static str, name: &str, bytes: impl Into<Vec<u8>>) -> Seed {
        Seed { target, name: name.to_owned(), bytes: bytes.into() }
    }
}

/// All of them.
pub fn seeds() -> Vec<Seed> {
    [peers::seeds(), weights::seeds(), stories::seeds(), files::seeds(), texts::seeds()].concat()
}
