//! One module per subcommand: its options and what it does with the crates below.

pub(crate) mod bench;
pub(crate) mod demo;
pub(crate) mod doctor;
pub(crate) mod eval;
pub(crate) mod node;
pub(crate) mod nodes;
pub(crate) mod plan;
pub(crate) mod reference;
pub(crate) mod router;
pub(crate) mod run;
pub(crate) mod synth;
pub(crate) mod token;
pub(crate) mod version;
