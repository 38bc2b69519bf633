//! The router's authority over its cluster: it signs who belongs to it.
//!
//! A state folder holds the machine's key, the cluster's key, the signed roster, the join tokens that are out, and
//! the number of starts (the term). All of it changes here only, under one lock, and on disk first: what was not
//! saved has not happened. A token is spent on disk before the machine that showed it is let in, so of a hundred
//! machines with one token at most one gets in, whatever crashes when. The price: one or two synced writes per
//! change, a few milliseconds on the thread that asks; so never ask on the network's thread.
//!
//! The term tells two routers with one state (a restored backup, a copied disk) apart: nodes stay with the higher
//! one, and of equal ones, which differ in a random incarnation, with the first they met. Refuses folders whose files
//! do not belong together instead of repairing them: a new key would make strangers of all machines.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_wire::frame::NAME_BYTES_MAX;
use mesh_wire::id::NodeId;
use thiserror::Error;

use crate::disk::{DiskError, Folder};
use crate::identity::{self, Identity};
use crate::keys::{CLUSTER_FILE, KeyError, SigningKey, random};
use crate::members::{Members, Standing};
use crate::membership;
use crate::roster::{Machine, REVOKED_MAX, Role, Roster, RosterError, SignedRoster, check_name};
use crate::tickets::{Now, Refused, Ticket, Tickets, TicketsError};
use crate::token::{ADDRESSES_MAX, Token, TokenError};

/// The files, and the first word of the cluster's key.
const CLUSTER_KEY_TAG: &str = "moemesh-cluster-ed25519-1";
const ROSTER: &str = "roster";
const TOKENS: &str = "tokens";
const TERM: &str = "term";

/// Longest life of a token. It is meant for the next minutes; a month is for machines that are sent by mail.
pub const TTL_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Names tried for a machine whose name is taken, with `-2`, `-3` and so on behind it; more than there are nodes.
const NAMES_TRIED: usize = 2 * crate::roster::NODES_MAX;

/// Why the cluster's state cannot be used or changed.
#[derive(Debug, Error)]
pub enum AuthorityError {
    /// Folder or file.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A key.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The roster would not be one.
    #[error(transparent)]
    Roster(#[from] RosterError),
    /// The roster's file is not usable.
    #[error(
        "{path}: {error}; restore the folder from a backup, or delete it and let every machine join again"
    )]
    RosterFile {
        /// Which file.
        path: String,
        /// What is wrong.
        error: RosterError,
    },
    /// The folder is a node's.
    #[error("{0} is the state of a node; give the router another --state")]
    NodesFolder(String),
    /// A file is missing that must be there, as others are.
    #[error("{path} is missing; restore it, or delete the folder and let every machine join again")]
    Missing {
        /// Which file.
        path: String,
    },
    /// The folder is another machine's, or its key was replaced.
    #[error("{0}/machine.key is not the key of the roster's router; restore the folder as a whole")]
    NotTheRouter(String),
    /// The tokens' or the term's file has other content.
    #[error("{0} is not what moemesh wrote there; delete it{1}")]
    Content(String, &'static str),
    /// A token cannot be made.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Too many tokens are out.
    #[error(transparent)]
    Tickets(#[from] TicketsError),
    /// A token's time.
    #[error("a token lives at least a second and at most 30 days")]
    Ttl,
    /// No node is called so.
    #[error("no node is called `{0}`, and no node's key begins so; `moemesh nodes` shows them")]
    NoSuchNode(String),
    /// Several nodes' keys begin so.
    #[error("several nodes' keys begin with `{0}`; give more digits")]
    Ambiguous(String),
}

#[derive(Debug)]
struct State {
    roster: Arc<SignedRoster>,
    tickets: Tickets,
}

/// See the module.
#[derive(Debug)]
pub struct Authority {
    identity: Identity,
    cluster: SigningKey,
    term: u64,
    incarnation: u64,
    is_new: bool,
    members: Arc<Members>,
    state: Mutex<State>,
    /// `None`: nothing outlives the process.
    folder: Option<Folder>,
}

impl Authority {
    /// Takes over the state in this folder; an empty one becomes a new cluster. Each time is a new term.
    ///
    /// # Errors
    /// `AuthorityError`. A cluster that was only half made is made whole.
    pub fn open(path: &Path) -> Result<Authority, AuthorityError> {
        let folder = Folder::open(path)?;
        if folder.read(membership::FILE)?.is_some() {
            return Err(AuthorityError::NodesFolder(path.display().to_string()));
        }
        let missing = |name| AuthorityError::Missing { path: folder.file(name).display().to_string() };
        let (roster, term) = (folder.read(ROSTER)?, read_term(&folder)?);
        let is_new = roster.is_none() && term == 0;
        if roster.is_none() && term > 0 {
            return Err(missing(ROSTER));
        }
        // A new key beside an old roster would make strangers of all machines.
        for name in [CLUSTER_FILE, identity::FILE] {
            if !is_new && folder.read(name)?.is_none() {
                return Err(missing(name));
            }
        }
        let identity = Identity::open(&folder)?;
        let cluster = SigningKey::load_or_create(&folder, CLUSTER_FILE, CLUSTER_KEY_TAG)?;
        let roster = match roster {
            None => {
                let first = first_roster(&cluster, &identity)?;
                folder.write(ROSTER, first.bytes())?;
                first
            }
            Some(bytes) => SignedRoster::parse(&bytes, cluster.public()).map_err(|error| {
                AuthorityError::RosterFile { path: folder.file(ROSTER).display().to_string(), error }
            })?,
        };
        if roster.roster().router != identity.id() {
            return Err(AuthorityError::NotTheRouter(path.display().to_string()));
        }
        let tickets = match folder.read(TOKENS)? {
            None => Tickets::default(),
            Some(bytes) => Tickets::parse(&bytes).ok_or_else(|| {
                let path = folder.file(TOKENS).display().to_string();
                AuthorityError::Content(path, "; tokens that are out will not work then")
            })?,
        };
        let term = term + 1;
        folder.write(TERM, format!("{term}\n").as_bytes())?;
        Authority::new(
            (identity, cluster),
            (term, is_new),
            State { roster: Arc::new(roster), tickets },
            Some(folder),
        )
    }

    /// A cluster that ends with the process: for measurements, and tests.
    ///
    /// # Errors
    /// `Key`.
    pub fn in_memory() -> Result<Authority, AuthorityError> {
        let (identity, cluster) = (Identity::generate()?, SigningKey::generate()?);
        let roster = Arc::new(first_roster(&cluster, &identity)?);
        Authority::new((identity, cluster), (1, true), State { roster, tickets: Tickets::default() }, None)
    }

    fn new(
        (identity, cluster): (Identity, SigningKey),
        (term, is_new): (u64, bool),
        state: State,
        folder: Option<Folder>,
    ) -> Result<Authority, AuthorityError> {
        let members = Arc::new(Members::default());
        members.set(state.roster.roster());
        let incarnation = u64::from_le_bytes(random()?);
        Ok(Authority {
            identity,
            cluster,
            term,
            incarnation,
            is_new,
            members,
            state: Mutex::new(state),
            folder,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where the state is, if anywhere.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_ref().map(Folder::path)
    }

    /// This machine's key.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Public half of the cluster's key.
    pub fn cluster(&self) -> NodeId {
        self.cluster.public()
    }

    /// Number of this start, from 1, and what tells it from another start of the same number.
    pub fn term(&self) -> (u64, u64) {
        (self.term, self.incarnation)
    }

    /// Whether the cluster was made by this start.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// Who may talk, always up to date.
    pub fn members(&self) -> Arc<Members> {
        Arc::clone(&self.members)
    }

    /// The roster as it is now.
    pub fn roster(&self) -> Arc<SignedRoster> {
        Arc::clone(&self.state().roster)
    }

    /// Signs a message for those who know the cluster's key.
    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.cluster.sign(message)
    }

    /// A new token for one machine, good for `ttl`.
    ///
    /// # Errors
    /// `Ttl`, `Token` for no or too many addresses, `Tickets`, `Disk`, `Key`.
    pub fn issue(&self, ttl: Duration, addresses: Vec<SocketAddr>) -> Result<Token, AuthorityError> {
        if !(Duration::from_secs(1)..=TTL_MAX).contains(&ttl) {
            return Err(AuthorityError::Ttl);
        }
        if !(1..=ADDRESSES_MAX).contains(&addresses.len()) {
            return Err(TokenError::Addresses.into());
        }
        let now = Now::read();
        let token = Token::generate(self.cluster(), Role::Node, now.unix + ttl.as_secs(), addresses)?;
        let mut state = self.state();
        let tickets =
            state.tickets.with(Ticket::new(&token, token.key()?.public(), now.monotonic + ttl), now)?;
        self.save(TOKENS, tickets.to_text().as_bytes())?;
        state.tickets = tickets;
        Ok(token)
    }

    /// Lets a machine in that has proven to hold the token with this public half. Asked again for the same machine
    /// (its answer was lost), the answer is the same.
    ///
    /// # Errors
    /// `Refused`; then nothing has changed.
    pub fn redeem(
        &self,
        ticket: NodeId,
        role: u8,
        wanted: (&str, NodeId),
        now: Now,
    ) -> Result<Machine, Refused> {
        let (name, key) = wanted;
        let mut state = self.state();
        let known = state.roster.roster().nodes.iter().find(|machine| machine.key == key).cloned();
        match state.tickets.check(ticket, role, now) {
            // It is in, by this very token: it was only not told.
            Err(Refused::Used) if state.tickets.used_by(ticket) == Some(key) => {
                return known.ok_or(Refused::Used);
            }
            checked => checked?,
        }
        if self.members.standing(key) == Standing::Revoked || key == self.identity.id() {
            return Err(Refused::Revoked);
        }
        let next = match &known {
            Some(_) => None,
            None => Some(self.with_node(&state, name, key).map_err(|error| refusal(&error))?),
        };
        let failed = |error: AuthorityError| {
            tracing::error!(%error, "a machine was not let in");
            Refused::Failed
        };
        let tickets = state.tickets.spent(ticket, key);
        self.save(TOKENS, tickets.to_text().as_bytes()).map_err(failed)?;
        if let Some((roster, machine)) = next {
            if let Err(error) = self.adopt(&mut state, roster) {
                // The token stays good, also after a restart if the disk lets us say so.
                drop(self.save(TOKENS, state.tickets.to_text().as_bytes()));
                return Err(failed(error));
            }
            state.tickets = tickets;
            return Ok(machine);
        }
        state.tickets = tickets;
        known.ok_or(Refused::Failed)
    }

    /// Lets a machine in without a token: for private clusters, whose processes are all ours.
    ///
    /// # Errors
    /// `Roster`, `Disk`.
    pub fn admit(&self, name: &str, key: NodeId) -> Result<Machine, AuthorityError> {
        let mut state = self.state();
        let (roster, machine) = self.with_node(&state, name, key)?;
        self.adopt(&mut state, roster)?;
        Ok(machine)
    }

    /// Shuts a node out: by its name, or by the first digits of its key.
    ///
    /// # Errors
    /// `NoSuchNode`, `Ambiguous`, `Disk`; then nothing has changed.
    pub fn revoke(&self, which: &str) -> Result<Machine, AuthorityError> {
        let mut state = self.state();
        let mut roster = state.roster.roster().clone();
        let at = find(&roster.nodes, which)?;
        let machine = roster.nodes.remove(at);
        roster.revoked.push(machine.clone());
        let forgotten = roster.revoked.len().saturating_sub(REVOKED_MAX);
        roster.revoked.drain(..forgotten);
        roster.epoch += 1;
        self.adopt(&mut state, SignedRoster::sign(roster, &self.cluster)?)?;
        Ok(machine)
    }

    fn with_node(
        &self,
        state: &State,
        name: &str,
        key: NodeId,
    ) -> Result<(SignedRoster, Machine), RosterError> {
        check_name(name)?;
        let mut roster = state.roster.roster().clone();
        let machine = Machine::node(&free_name(&roster.nodes, name)?, key);
        roster.nodes.push(machine.clone());
        roster.epoch += 1;
        Ok((SignedRoster::sign(roster, &self.cluster)?, machine))
    }

    fn adopt(&self, state: &mut State, roster: SignedRoster) -> Result<(), AuthorityError> {
        self.save(ROSTER, roster.bytes())?;
        self.members.set(roster.roster());
        state.roster = Arc::new(roster);
        Ok(())
    }

    fn save(&self, name: &str, content: &[u8]) -> Result<(), AuthorityError> {
        match &self.folder {
            Some(folder) => Ok(folder.write(name, content)?),
            None => Ok(()),
        }
    }
}

fn first_roster(cluster: &SigningKey, identity: &Identity) -> Result<SignedRoster, RosterError> {
    let (cluster_id, router) = (cluster.public(), identity.id());
    let roster = Roster { cluster: cluster_id, epoch: 1, router, nodes: Vec::new(), revoked: Vec::new() };
    SignedRoster::sign(roster, cluster)
}

/// 0 where none was written yet.
fn read_term(folder: &Folder) -> Result<u64, AuthorityError> {
    let Some(content) = folder.read(TERM)? else { return Ok(0) };
    let term = std::str::from_utf8(&content).ok().and_then(|text| text.trim().parse::<u64>().ok());
    // Nodes believe the highest term they saw: a lower one would shut this router out.
    let unusable = || {
        let path = folder.file(TERM).display().to_string();
        AuthorityError::Content(path, " and let every machine join again, or restore it")
    };
    term.filter(|term| (1..u64::MAX).contains(term)).ok_or_else(unusable)
}

fn refusal(error: &RosterError) -> Refused {
    match error {
        RosterError::Name(_) => Refused::Name,
        RosterError::TooMany(_) => Refused::Full,
        _ => Refused::Failed,
    }
}

/// `name`, or with a number behind it that makes it differ from all others.
fn free_name(nodes: &[Machine], name: &str) -> Result<String, RosterError> {
    let taken = |name: &str| nodes.iter().any(|node| node.name == name);
    let numbered = |number: usize| {
        let suffix = format!("-{number}");
        let mut short = name.to_owned();
        while short.len() + suffix.len() > NAME_BYTES_MAX {
            short.pop();
        }
        short + &suffix
    };
    let names = std::iter::once(name.to_owned()).chain((2..NAMES_TRIED).map(numbered));
    names.into_iter().find(|name| !taken(name)).ok_or(RosterError::DuplicateName(name.to_owned()))
}

fn find(nodes: &[Machine], which: &str) -> Result<usize, AuthorityError> {
    if let Some(at) = nodes.iter().position(|node| node.name == which) {
        return Ok(at);
    }
    let digits = which.to_ascii_lowercase();
    let mut matching = nodes
        .iter()
        .enumerate()
        .filter(|(_, node)| !digits.is_empty() && node.key.to_hex().starts_with(&digits));
    match (matching.next(), matching.next()) {
        (Some((at, _)), None) => Ok(at),
        (None, _) => Err(AuthorityError::NoSuchNode(which.to_owned())),
        (Some(_), Some(_)) => Err(AuthorityError::Ambiguous(which.to_owned())),
    }
}
