//! Who belongs to the cluster: the router's key and the nodes' keys, in a file.
//!
//! The same file is given to every machine. The router admits the keys listed as nodes and nobody else; a node
//! talks to the router's key and nobody else. Names are for people: keys decide. It is static for now, so a change
//! needs a restart of the router. Refuses everything that is ambiguous: unknown fields, two machines of one name or
//! one key.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use mesh_wire::frame::NAME_BYTES_MAX;
use mesh_wire::id::NodeId;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Most nodes in a cluster: one connection, six lanes and two tables each on one thread of the router.
pub const NODES_MAX: usize = 256;

/// Longest file that is read; `NODES_MAX` machines take a tenth of it.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Why there is no roster.
#[derive(Debug, Error)]
pub enum RosterError {
    /// The file cannot be read or written.
    #[error("roster {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// The file is longer than any roster.
    #[error("roster {path} is larger than {FILE_BYTES_MAX} bytes; is it the right file?")]
    TooLong {
        /// Which file.
        path: PathBuf,
    },
    /// What is in the file is wrong.
    #[error("roster {path}: {source}", path = path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: Box<RosterError>,
    },
    /// It is not TOML, or not of this form; the message says where.
    #[error("the roster does not parse: {0}")]
    Syntax(String),
    /// Two machines have one name.
    #[error("two machines of the roster are named `{0}`; give each its own name")]
    DuplicateName(String),
    /// Two machines have one key.
    #[error(
        "`{first}` and `{second}` have the same key; a copied key file makes two machines one, delete it on one of them"
    )]
    DuplicateKey {
        /// The machine that comes first.
        first: String,
        /// The other one.
        second: String,
    },
    /// A name is empty, too long, or has characters that do not belong in a name.
    #[error("`{0}` is no name for a machine: 1 to {NAME_BYTES_MAX} letters, digits, `-`, `_` or `.`")]
    Name(String),
    /// More nodes than a router serves.
    #[error("{0} nodes; a cluster has at most {NODES_MAX}")]
    TooMany(usize),
}

/// A machine: what it is called and who it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Machine {
    /// Its name, for people.
    pub name: String,
    /// Its key.
    pub key: NodeId,
}

/// The machines of a cluster.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Roster {
    /// The cluster's name, for people.
    pub cluster: String,
    /// The one that nodes dial.
    pub router: Machine,
    /// Those that hold experts; a node's position is its `NodeIndex`.
    #[serde(default)]
    pub nodes: Vec<Machine>,
}

impl Roster {
    /// Reads and checks a roster file.
    ///
    /// # Errors
    /// What is wrong with it and what to do.
    pub fn load(path: &Path) -> Result<Roster, RosterError> {
        let failed = |source| RosterError::File { path: path.to_owned(), source };
        if std::fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
            return Err(RosterError::TooLong { path: path.to_owned() });
        }
        let text = std::fs::read_to_string(path).map_err(failed)?;
        let content = |source| RosterError::Content { path: path.to_owned(), source: Box::new(source) };
        Roster::parse(&text).map_err(content)
    }

    /// Parses and checks the text of a roster.
    ///
    /// # Errors
    /// What is wrong with it and what to do.
    pub fn parse(text: &str) -> Result<Roster, RosterError> {
        let roster: Roster = toml::from_str(text).map_err(|error| RosterError::Syntax(error.to_string()))?;
        roster.check()?;
        Ok(roster)
    }

    /// Checks a roster that was put together by a program.
    ///
    /// # Errors
    /// `Name`, `DuplicateName`, `DuplicateKey`, `TooMany`.
    pub fn check(&self) -> Result<(), RosterError> {
        if self.nodes.len() > NODES_MAX {
            return Err(RosterError::TooMany(self.nodes.len()));
        }
        check_name(&self.cluster)?;
        let machines = || std::iter::once(&self.router).chain(&self.nodes);
        let mut names = HashSet::new();
        for (at, machine) in machines().enumerate() {
            check_name(&machine.name)?;
            if !names.insert(&machine.name) {
                return Err(RosterError::DuplicateName(machine.name.clone()));
            }
            if let Some(first) = machines().take(at).find(|first| first.key == machine.key) {
                let (first, second) = (first.name.clone(), machine.name.clone());
                return Err(RosterError::DuplicateKey { first, second });
            }
        }
        Ok(())
    }

    /// The text of the file.
    ///
    /// # Errors
    /// As `check`.
    pub fn to_toml(&self) -> Result<String, RosterError> {
        self.check()?;
        toml::to_string(self).map_err(|error| RosterError::Syntax(error.to_string()))
    }

    /// Writes the file.
    ///
    /// # Errors
    /// As `check`; `File`.
    pub fn save(&self, path: &Path) -> Result<(), RosterError> {
        let text = self.to_toml()?;
        std::fs::write(path, text).map_err(|source| RosterError::File { path: path.to_owned(), source })
    }

    /// Position of the node with this key.
    pub fn node_index(&self, key: NodeId) -> Option<u16> {
        self.nodes.iter().position(|node| node.key == key).and_then(|at| u16::try_from(at).ok())
    }
}

fn check_name(name: &str) -> Result<(), RosterError> {
    let letter = |letter: char| letter.is_alphanumeric() || "-_.".contains(letter);
    if (1..=NAME_BYTES_MAX).contains(&name.len()) && name.chars().all(letter) {
        Ok(())
    } else {
        Err(RosterError::Name(name.to_owned()))
    }
}
