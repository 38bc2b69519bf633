//! Who belongs to the cluster: a list of keys, numbered and signed.
//!
//! The cluster's key, which only the router holds, signs one list per epoch: the router's key, the nodes' keys and
//! names, and the keys that were revoked. Whoever knows the cluster's public key can tell a true list from any other
//! without asking anybody, and of two true ones the newer: the higher epoch. Names are for people: keys decide.
//!
//! The bytes are flat and have one form for one list, so that equal lists have equal hashes and nothing can hide
//! behind a valid signature. Nothing but tag and cluster is read before the signature is checked. Refuses what is
//! ambiguous: two machines of one name or one key, epoch 0 or the last there is, bytes that are left over.

use std::collections::HashSet;

use mesh_wire::frame::NAME_BYTES_MAX;
use mesh_wire::id::NodeId;
use thiserror::Error;

use crate::keys::{SIGNATURE_BYTES, SigningKey, verify};

/// Most nodes in a cluster: one connection, six lanes and two tables each on one thread of the router.
pub const NODES_MAX: usize = 256;

/// Revoked keys that are remembered, so that they cannot come back with another token; the newest ones. A key that
/// is forgotten is still no member.
pub const REVOKED_MAX: usize = 256;

/// First bytes of a signed roster: what it is and in which form.
const TAG: &[u8; 16] = b"moemesh-roster-1";

/// Bytes of a machine beside its name: key, role, length of the name.
const MACHINE_BYTES: usize = 32 + 1 + 1;

/// Bytes before the lists: tag, cluster, epoch, router.
const HEAD_BYTES: usize = TAG.len() + 32 + 8 + 32;

/// Bytes of the largest roster.
pub const ROSTER_BYTES_MAX: usize =
    HEAD_BYTES + 4 + (NODES_MAX + REVOKED_MAX) * (MACHINE_BYTES + NAME_BYTES_MAX) + SIGNATURE_BYTES;

/// Why a roster is not one.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum RosterError {
    /// The bytes are no signed roster: cut, too long, or something else altogether.
    #[error("these bytes are no roster of this version")]
    Form,
    /// It is about another cluster.
    #[error("the roster is one of cluster {found}, this is cluster {expected}")]
    Cluster {
        /// The cluster it should be about.
        expected: NodeId,
        /// The cluster it is about.
        found: NodeId,
    },
    /// The cluster's key has not signed it.
    #[error("the roster's signature is not the cluster's: it was changed or made up")]
    Signature,
    /// No list has this number.
    #[error("a roster cannot have epoch {0}")]
    Epoch(u64),
    /// Two machines have one name.
    #[error("two machines of the roster are named `{}`", .0.escape_debug())]
    DuplicateName(String),
    /// Two machines have one key.
    #[error("two machines of the roster have the key {0}")]
    DuplicateKey(NodeId),
    /// A name is empty, too long, or has characters that do not belong in a name.
    #[error("`{}` is no name for a machine: 1 to {NAME_BYTES_MAX} letters, digits, `-`, `_` or `.`", .0.escape_debug())]
    Name(String),
    /// A role this version does not know.
    #[error("a machine of the roster has the unknown role {0}; update this machine")]
    Role(u8),
    /// More nodes than a router serves.
    #[error(
        "{0} nodes; a cluster has at most {NODES_MAX}: revoke those that are gone (`moemesh nodes revoke`)"
    )]
    TooMany(usize),
}

/// What a machine may do in the cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Role {
    /// Holds and runs experts.
    Node = 1,
}

impl Role {
    /// The role with this code.
    pub fn from_code(code: u8) -> Option<Role> {
        (code == Role::Node as u8).then_some(Role::Node)
    }
}

/// A machine: what it is called and who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Machine {
    /// Its name, for people.
    pub name: String,
    /// Its key.
    pub key: NodeId,
    /// What it may do.
    pub role: Role,
}

impl Machine {
    /// A node.
    pub fn node(name: &str, key: NodeId) -> Machine {
        Machine { name: name.to_owned(), key, role: Role::Node }
    }
}

/// The machines of a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roster {
    /// Public half of the key that signs.
    pub cluster: NodeId,
    /// Grows with every change, from 1.
    pub epoch: u64,
    /// The one that nodes dial.
    pub router: NodeId,
    /// Those that hold experts.
    pub nodes: Vec<Machine>,
    /// Those that are shut out, oldest first.
    pub revoked: Vec<Machine>,
}

impl Roster {
    /// # Errors
    /// `Epoch`, `TooMany`, `Name`, `DuplicateName`, `DuplicateKey`.
    fn check(&self) -> Result<(), RosterError> {
        if self.epoch == 0 || self.epoch == u64::MAX {
            return Err(RosterError::Epoch(self.epoch));
        }
        if self.nodes.len() > NODES_MAX {
            return Err(RosterError::TooMany(self.nodes.len()));
        }
        if self.revoked.len() > REVOKED_MAX {
            return Err(RosterError::Form);
        }
        let mut names = HashSet::new();
        let mut keys = HashSet::from([self.router]);
        for machine in &self.nodes {
            if !names.insert(&machine.name) {
                return Err(RosterError::DuplicateName(machine.name.clone()));
            }
        }
        for machine in self.nodes.iter().chain(&self.revoked) {
            check_name(&machine.name)?;
            if !keys.insert(machine.key) {
                return Err(RosterError::DuplicateKey(machine.key));
            }
        }
        Ok(())
    }
}

/// A roster, and the bytes and signature that prove it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignedRoster {
    roster: Roster,
    bytes: Vec<u8>,
}

impl SignedRoster {
    /// Checks and signs.
    ///
    /// # Errors
    /// What is ambiguous in it; `Cluster` where it is about another key's cluster.
    pub fn sign(roster: Roster, key: &SigningKey) -> Result<SignedRoster, RosterError> {
        roster.check()?;
        if key.public() != roster.cluster {
            return Err(RosterError::Cluster { expected: key.public(), found: roster.cluster });
        }
        let mut bytes = Vec::new();
        bytes.extend(TAG);
        bytes.extend(roster.cluster.0);
        bytes.extend(roster.epoch.to_le_bytes());
        bytes.extend(roster.router.0);
        for list in [&roster.nodes, &roster.revoked] {
            // `check` keeps both lists and every name far below these widths.
            bytes.extend((list.len() as u16).to_le_bytes());
            for machine in list {
                bytes.extend(machine.key.0);
                bytes.extend([machine.role as u8, machine.name.len() as u8]);
                bytes.extend(machine.name.as_bytes());
            }
        }
        bytes.extend(key.sign(&bytes));
        Ok(SignedRoster { roster, bytes })
    }

    /// Reads a roster that this cluster's key must have signed.
    ///
    /// # Errors
    /// `RosterError`.
    pub fn parse(bytes: &[u8], cluster: NodeId) -> Result<SignedRoster, RosterError> {
        if bytes.len() > ROSTER_BYTES_MAX || bytes.len() < HEAD_BYTES + 4 + SIGNATURE_BYTES {
            return Err(RosterError::Form);
        }
        let (message, signature) = bytes.split_at(bytes.len() - SIGNATURE_BYTES);
        let mut rest = Rest(message);
        if rest.take()? != *TAG {
            return Err(RosterError::Form);
        }
        let found = NodeId(rest.take()?);
        if found != cluster {
            return Err(RosterError::Cluster { expected: cluster, found });
        }
        if !verify(cluster, message, signature) {
            return Err(RosterError::Signature);
        }
        let (epoch, router) = (u64::from_le_bytes(rest.take()?), NodeId(rest.take()?));
        let (nodes, revoked) = (rest.machines()?, rest.machines()?);
        if !rest.0.is_empty() {
            return Err(RosterError::Form);
        }
        let roster = Roster { cluster, epoch, router, nodes, revoked };
        roster.check()?;
        Ok(SignedRoster { roster, bytes: bytes.to_owned() })
    }

    /// What it says.
    pub fn roster(&self) -> &Roster {
        &self.roster
    }

    /// What to send and to keep.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// BLAKE3 of what is signed: two rosters of one epoch must not differ in it. (Ed25519 as used here gives one
    /// signature for one message, but others could be made by whoever has the key.)
    pub fn hash(&self) -> [u8; 32] {
        *blake3::hash(&self.bytes[..self.bytes.len() - SIGNATURE_BYTES]).as_bytes()
    }
}

/// Bytes that are still to be read.
struct Rest<'a>(&'a [u8]);

impl Rest<'_> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], RosterError> {
        let (taken, rest) = self.0.split_first_chunk().ok_or(RosterError::Form)?;
        self.0 = rest;
        Ok(*taken)
    }

    fn machines(&mut self) -> Result<Vec<Machine>, RosterError> {
        let count = u16::from_le_bytes(self.take()?);
        (0..count).map(|_| self.machine()).collect()
    }

    fn machine(&mut self) -> Result<Machine, RosterError> {
        let (key, [role, length]) = (NodeId(self.take()?), self.take()?);
        let role = Role::from_code(role).ok_or(RosterError::Role(role))?;
        let (name, rest) = self.0.split_at_checked(length.into()).ok_or(RosterError::Form)?;
        self.0 = rest;
        let name = std::str::from_utf8(name).map_err(|_| RosterError::Form)?;
        Ok(Machine { name: name.to_owned(), key, role })
    }
}

/// Checks what a machine is to be called.
///
/// # Errors
/// `Name`.
pub fn check_name(name: &str) -> Result<(), RosterError> {
    let letter = |letter: char| letter.is_alphanumeric() || "-_.".contains(letter);
    if (1..=NAME_BYTES_MAX).contains(&name.len()) && name.chars().all(letter) {
        Ok(())
    } else {
        Err(RosterError::Name(name.to_owned()))
    }
}
