//! A node's membership in its cluster: whom it trusts, and what it has seen.
//!
//! It is made once, by joining, and kept in the state folder: the cluster's public key, the router's key and
//! addresses, the newest signed roster, and the highest term of a router. From these the node can tell, without asking
//! anyone, that it is shown an old roster (a replay), two rosters of one epoch (a fork: the cluster's key is in two
//! hands), or a second router started from a copy of the first one's state. Everything that is accepted is saved
//! first. The price: a router restored from an old backup is refused by nodes that saw the newer state, and its
//! machines must join again; the alternative would let anyone with an old backup undo a revocation.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_wire::id::NodeId;
use thiserror::Error;

use crate::disk::{DiskError, Folder};
use crate::identity::Identity;
use crate::keys::{CLUSTER_FILE, KeyError};
use crate::members::Members;
use crate::roster::{RosterError, SignedRoster, check_name};
use crate::suggestions::Suggestions;
use crate::token::{ADDRESSES_MAX, Token, cluster_hash};

/// The file, and its first line.
pub(crate) const FILE: &str = "membership";
const TAG: &str = "moemesh-membership-1";

/// Bytes before the roster in what a router shows: term and incarnation.
const TERM_BYTES: usize = 16;

/// Why there is no membership.
#[derive(Debug, Error)]
pub enum MembershipError {
    /// Folder or file.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// This machine's key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The folder is a router's.
    #[error("{0} is the state of a router; give the node another --state")]
    RoutersFolder(String),
    /// The file has other content.
    #[error("{0} is not what moemesh wrote there; restore it, or delete it and join again with a new token")]
    Content(String),
}

/// Why a node does not believe a router that owns the right key.
#[derive(Debug, Error)]
pub enum Distrust {
    /// What it shows is no roster of this cluster.
    #[error(transparent)]
    Roster(#[from] RosterError),
    /// An older one than was seen before.
    #[error(
        "the router shows roster {shown}, this node has seen {seen}: it was restored from an old backup, or an old \
         message was replayed"
    )]
    Replay {
        /// Epoch shown.
        shown: u64,
        /// Epoch seen.
        seen: u64,
    },
    /// Another one of the same epoch.
    #[error(
        "ALARM: two different rosters of epoch {0} are signed by this cluster's key; two routers run with copies of one \
         state folder, or the key was stolen"
    )]
    Fork(u64),
    /// A router of an earlier start.
    #[error(
        "the router is of term {shown}, this node has met one of term {seen}: two routers run with copies of one state \
         folder; stop one of them"
    )]
    Term {
        /// Term shown.
        shown: u64,
        /// Term seen.
        seen: u64,
    },
    /// Another router of the same number of starts.
    #[error(
        "this is another router of term {0} than the one this node has met: two run with copies of one state \
             folder; stop one of them"
    )]
    Twin(u64),
    /// The message is too short.
    #[error("the router's roster message is cut")]
    Cut,
    /// It cannot be saved.
    #[error(transparent)]
    Disk(#[from] DiskError),
}

/// What is learned by joining.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Admission {
    /// Public half of the cluster's key.
    pub cluster: NodeId,
    /// Key of its router.
    pub router: NodeId,
    /// What this machine is called there.
    pub name: String,
    /// Where the router is.
    pub addresses: Vec<SocketAddr>,
}

#[derive(Clone, Debug, Default)]
struct Seen {
    /// Of the router, highest first met.
    term: u64,
    incarnation: u64,
    roster: Option<SignedRoster>,
}

/// See the module.
#[derive(Debug)]
pub struct Membership {
    identity: Identity,
    admission: Admission,
    seen: Mutex<Seen>,
    /// Where machines of the cluster were found; not kept on disk.
    suggestions: Suggestions,
    /// Those of the newest roster: who may borrow weights of this machine.
    members: Arc<Members>,
    /// `None`: nothing outlives the process.
    folder: Option<Folder>,
}

/// A node's state folder.
#[derive(Debug)]
pub enum Opened {
    /// It has joined.
    Member(Box<Membership>),
    /// It has yet to; with the key it will have.
    Stranger(Folder, Identity),
}

impl Membership {
    /// Opens a node's state folder. An empty one gets a key.
    ///
    /// # Errors
    /// `MembershipError`.
    pub fn open(path: &Path) -> Result<Opened, MembershipError> {
        let folder = Folder::open(path)?;
        if folder.read(CLUSTER_FILE)?.is_some() {
            return Err(MembershipError::RoutersFolder(path.display().to_string()));
        }
        let identity = Identity::open(&folder)?;
        let Some(content) = folder.read(FILE)? else { return Ok(Opened::Stranger(folder, identity)) };
        let unusable = || MembershipError::Content(folder.file(FILE).display().to_string());
        let text = std::str::from_utf8(&content).map_err(|_| unusable())?;
        let (admission, seen) = parse(text).ok_or_else(unusable)?;
        Ok(Opened::Member(Box::new(Membership::new(identity, admission, seen, Some(folder)))))
    }

    /// Reads a node's state folder beside the process that uses it: nothing is made, locked or changed, then or later.
    /// `None` where there is no membership.
    ///
    /// # Errors
    /// `MembershipError`.
    pub fn peek(path: &Path) -> Result<Option<Membership>, MembershipError> {
        let folder = Folder::peek(path);
        let Some(content) = folder.read(FILE)? else { return Ok(None) };
        let unusable = || MembershipError::Content(folder.file(FILE).display().to_string());
        let identity = Identity::peek(&folder)?.ok_or_else(unusable)?;
        let text = std::str::from_utf8(&content).map_err(|_| unusable())?;
        let (admission, seen) = parse(text).ok_or_else(unusable)?;
        Ok(Some(Membership::new(identity, admission, seen, None)))
    }

    /// Keeps what was learned by joining.
    ///
    /// # Errors
    /// `Disk`.
    pub fn enter(
        folder: Folder,
        identity: Identity,
        admission: Admission,
    ) -> Result<Membership, MembershipError> {
        let seen = Seen::default();
        folder.write(FILE, to_text(&admission, &seen).as_bytes())?;
        Ok(Membership::new(identity, admission, seen, Some(folder)))
    }

    /// A membership that ends with the process: for measurements, and tests.
    pub fn in_memory(identity: Identity, admission: Admission) -> Membership {
        Membership::new(identity, admission, Seen::default(), None)
    }

    fn new(identity: Identity, admission: Admission, seen: Seen, folder: Option<Folder>) -> Membership {
        let members = Arc::<Members>::default();
        seen.roster.iter().for_each(|roster| members.set(roster.roster()));
        let (seen, suggestions) = (Mutex::new(seen), Suggestions::default());
        Membership { identity, admission, seen, suggestions, members, folder }
    }

    /// The keys of the newest roster seen; follows it.
    pub fn members(&self) -> Arc<Members> {
        Arc::clone(&self.members)
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// This machine's key.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What joining told.
    pub fn admission(&self) -> &Admission {
        &self.admission
    }

    /// Where machines of the cluster were found, beside the addresses that joining told.
    pub fn suggestions(&self) -> &Suggestions {
        &self.suggestions
    }

    /// Where the router may be now: where the user said it is (`given`), or where it was when this machine joined, and
    /// then where it was found since.
    pub fn places(&self, given: &[SocketAddr]) -> Vec<SocketAddr> {
        let known = if given.is_empty() { &self.admission.addresses[..] } else { given };
        let found = self.suggestions.of(self.admission.router);
        let news = found.into_iter().filter(|address| !known.contains(address));
        known.iter().copied().chain(news).collect()
    }

    /// Whether a token is for the cluster this machine is in.
    pub fn is_of(&self, token: &Token) -> bool {
        cluster_hash(self.admission.cluster) == token.cluster
    }

    /// Epoch of the newest roster seen, 0 for none.
    pub fn epoch(&self) -> u64 {
        self.seen().roster.as_ref().map_or(0, |roster| roster.roster().epoch)
    }

    /// The newest roster seen, if any.
    pub fn roster(&self) -> Option<SignedRoster> {
        self.seen().roster.clone()
    }

    /// Checks what a router says first on each connection, and whenever the roster changes; keeps it if it is newer.
    /// Writes to disk.
    ///
    /// # Errors
    /// `Distrust`; then nothing has changed.
    pub fn hear(&self, message: &[u8]) -> Result<(), Distrust> {
        let (term, roster) = message.split_first_chunk::<8>().ok_or(Distrust::Cut)?;
        let (incarnation, roster) = roster.split_first_chunk::<8>().ok_or(Distrust::Cut)?;
        let (term, incarnation) = (u64::from_le_bytes(*term), u64::from_le_bytes(*incarnation));
        let roster = SignedRoster::parse(roster, self.admission.cluster)?;
        let mut seen = self.seen();
        if term < seen.term {
            return Err(Distrust::Term { shown: term, seen: seen.term });
        }
        if term == seen.term && incarnation != seen.incarnation {
            return Err(Distrust::Twin(term));
        }
        if let Some(newest) = &seen.roster {
            let (known, shown) = (newest.roster().epoch, roster.roster().epoch);
            if shown < known {
                return Err(Distrust::Replay { shown, seen: known });
            }
            if shown == known && roster.hash() != newest.hash() {
                return Err(Distrust::Fork(shown));
            }
            if shown == known && term == seen.term {
                return Ok(());
            }
        }
        let next = Seen { term, incarnation, roster: Some(roster) };
        if let Some(folder) = &self.folder {
            folder.write(FILE, to_text(&self.admission, &next).as_bytes())?;
        }
        next.roster.iter().for_each(|roster| self.members.set(roster.roster()));
        *seen = next;
        Ok(())
    }
}

/// What a router of this term and incarnation shows its nodes.
pub(crate) fn shown((term, incarnation): (u64, u64), roster: &SignedRoster) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(TERM_BYTES + roster.bytes().len());
    bytes.extend(term.to_le_bytes());
    bytes.extend(incarnation.to_le_bytes());
    bytes.extend(roster.bytes());
    bytes
}

fn to_text(admission: &Admission, seen: &Seen) -> String {
    let addresses: Vec<_> = admission.addresses.iter().map(SocketAddr::to_string).collect();
    let bytes = seen.roster.as_ref().map_or(&[][..], SignedRoster::bytes);
    let roster: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!(
        "{TAG}\ncluster {}\nrouter {}\nname {}\naddresses {}\nterm {}\nincarnation {}\nroster {roster}\n",
        admission.cluster.to_hex(),
        admission.router.to_hex(),
        admission.name,
        addresses.join(","),
        seen.term,
        seen.incarnation,
    )
}

fn parse(text: &str) -> Option<(Admission, Seen)> {
    let mut lines = text.lines();
    if lines.next() != Some(TAG) {
        return None;
    }
    let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
    let cluster = NodeId::from_hex(field("cluster")?)?;
    let router = NodeId::from_hex(field("router")?)?;
    let name = field("name")?.to_owned();
    let addresses = field("addresses")?.split(',').filter(|address| !address.is_empty());
    let addresses: Vec<SocketAddr> = addresses.map(|address| address.parse().ok()).collect::<Option<_>>()?;
    let (term, incarnation) = (field("term")?.parse().ok()?, field("incarnation")?.parse().ok()?);
    let roster = match field("roster")? {
        "" => None,
        digits => Some(SignedRoster::parse(&from_hex(digits)?, cluster).ok()?),
    };
    let whole = lines.next().is_none() && check_name(&name).is_ok() && addresses.len() <= ADDRESSES_MAX;
    whole.then_some((Admission { cluster, router, name, addresses }, Seen { term, incarnation, roster }))
}

fn from_hex(digits: &str) -> Option<Vec<u8>> {
    let pair = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok();
    (digits.bytes().all(|digit| digit.is_ascii_hexdigit()) && digits.len().is_multiple_of(2))
        .then(|| digits.as_bytes().chunks(2).map(pair).collect())
        .flatten()
}
