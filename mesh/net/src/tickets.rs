//! The join tokens that are out, as the router remembers them, and why one is not taken: public halves only.
//!
//! Those that are used or expired are remembered a while, so that whoever shows one is told which of the two it is.
//! A value, not a place: changes give a new list, which is saved before it counts. Expiry is measured by a clock that
//! never jumps while the process lives; after a restart only the calendar is left.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

use mesh_wire::id::NodeId;
use thiserror::Error;

use crate::token::Token;

/// Tokens that may be out at a time.
pub const OUTSTANDING_MAX: usize = 64;

/// Used and expired ones that are remembered, newest last.
const REMEMBERED_MAX: usize = 64;

/// First line of the file.
const TAG: &str = "moemesh-tokens-1";

/// Why a machine is not let in, as it is told. The codes travel.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Refused {
    /// Nobody here has issued this token.
    #[error(
        "this router knows no such token: it is another cluster's, or too old; make one with `moemesh token`"
    )]
    Unknown = 1,
    /// Another machine was faster.
    #[error("this token was used already; each is good for one machine, make another with `moemesh token`")]
    Used = 2,
    /// Too late.
    #[error("this token has expired; make another with `moemesh token`, with --ttl for a longer one")]
    Expired = 3,
    /// It is for another kind of machine.
    #[error("this token is for another kind of machine; make another with `moemesh token`")]
    Role = 4,
    /// The proof does not belong to token, machine and connection.
    #[error("the proof is wrong: the token does not belong to this connection")]
    Proof = 5,
    /// There are `NODES_MAX` of them.
    #[error("the cluster is full; revoke machines that are gone with `moemesh nodes revoke NAME`")]
    Full = 6,
    /// This key was shut out.
    #[error(
        "this machine's key was revoked; delete its state folder, so that it gets a new key, and join again"
    )]
    Revoked = 7,
    /// What it wants to be called is no name.
    #[error(
        "that is no name for a machine: 1 to 63 letters, digits, `-`, `_` or `.`; choose one with --name"
    )]
    Name = 8,
    /// The router cannot save what it must.
    #[error("the router could not save the change; its log says why")]
    Failed = 9,
    /// What came is not a request of this version.
    #[error("router and machine do not speak the same version of joining; install the same moemesh on both")]
    Version = 10,
}

impl Refused {
    /// The reason with this code.
    pub fn from_code(code: u8) -> Option<Refused> {
        use Refused::{Expired, Failed, Full, Name, Proof, Revoked, Role, Unknown, Used, Version};
        let all = [Unknown, Used, Expired, Role, Proof, Full, Revoked, Name, Failed, Version];
        all.into_iter().find(|refused| *refused as u8 == code)
    }
}

/// The time, as far as tokens care: since some start, never going back, and by the calendar.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// What tokens of this process are measured by.
    pub monotonic: Instant,
    /// Seconds since 1970, which may jump; what is left after a restart.
    pub unix: u64,
}

impl Now {
    /// As the system says.
    pub fn read() -> Now {
        let unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Now { monotonic: Instant::now(), unix }
    }
}

/// Why no token is made.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum TicketsError {
    /// `OUTSTANDING_MAX` are out.
    #[error("{OUTSTANDING_MAX} join tokens are out and unused; use them, or wait until some expire")]
    TooMany,
}

/// A token, without what it takes to use it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    key: NodeId,
    role: u8,
    expires_unix: u64,
    /// Of tokens made by this process.
    expires: Option<Instant>,
    used_by: Option<NodeId>,
}

impl Ticket {
    /// Of a token with this public half.
    pub fn new(token: &Token, key: NodeId, expires: Instant) -> Ticket {
        let (role, expires_unix) = (token.role as u8, token.expires_unix);
        Ticket { key, role, expires_unix, expires: Some(expires), used_by: None }
    }

    fn is_expired(&self, now: Now) -> bool {
        self.expires.map_or(now.unix >= self.expires_unix, |expires| now.monotonic >= expires)
    }
}

/// See the module.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tickets {
    list: Vec<Ticket>,
}

impl Tickets {
    /// With one more.
    ///
    /// # Errors
    /// `TooMany`.
    pub fn with(&self, ticket: Ticket, now: Now) -> Result<Tickets, TicketsError> {
        let is_out = |ticket: &&Ticket| ticket.used_by.is_none() && !ticket.is_expired(now);
        let out: Vec<_> = self.list.iter().filter(is_out).cloned().collect();
        if out.len() >= OUTSTANDING_MAX {
            return Err(TicketsError::TooMany);
        }
        let over: Vec<_> = self.list.iter().filter(|ticket| !is_out(ticket)).cloned().collect();
        let forgotten = over.len().saturating_sub(REMEMBERED_MAX);
        let list = over.into_iter().skip(forgotten).chain(out).chain([ticket]).collect();
        Ok(Tickets { list })
    }

    /// Whether the token with this public half is good.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self, key: NodeId, role: u8, now: Now) -> Result<(), Refused> {
        let ticket = self.find(key).ok_or(Refused::Unknown)?;
        if ticket.used_by.is_some() {
            Err(Refused::Used)
        } else if ticket.is_expired(now) {
            Err(Refused::Expired)
        } else if ticket.role != role {
            Err(Refused::Role)
        } else {
            Ok(())
        }
    }

    /// The machine that used it.
    pub fn used_by(&self, key: NodeId) -> Option<NodeId> {
        self.find(key)?.used_by
    }

    /// With this one used.
    pub fn spent(&self, key: NodeId, by: NodeId) -> Tickets {
        let mut list = self.list.clone();
        list.iter_mut().filter(|ticket| ticket.key == key).for_each(|ticket| ticket.used_by = Some(by));
        Tickets { list }
    }

    fn find(&self, key: NodeId) -> Option<&Ticket> {
        self.list.iter().find(|ticket| ticket.key == key)
    }

    /// The file: a line per token.
    pub fn to_text(&self) -> String {
        let line = |ticket: &Ticket| {
            let used = ticket.used_by.map_or_else(|| "-".to_owned(), NodeId::to_hex);
            format!("{} {} {} {used}\n", ticket.key.to_hex(), ticket.role, ticket.expires_unix)
        };
        std::iter::once(format!("{TAG}\n")).chain(self.list.iter().map(line)).collect()
    }

    /// Reads `to_text`; `None` for anything else.
    pub fn parse(bytes: &[u8]) -> Option<Tickets> {
        let mut lines = std::str::from_utf8(bytes).ok()?.lines();
        if lines.next() != Some(TAG) {
            return None;
        }
        let ticket = |line: &str| {
            let mut words = line.split(' ');
            let key = NodeId::from_hex(words.next()?)?;
            let (role, expires_unix) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            let used_by = match words.next()? {
                "-" => None,
                key => Some(NodeId::from_hex(key)?),
            };
            words.next().is_none().then_some(Ticket { key, role, expires_unix, expires: None, used_by })
        };
        let list: Vec<_> = lines.map(ticket).collect::<Option<_>>()?;
        (list.len() <= OUTSTANDING_MAX + REMEMBERED_MAX).then_some(Tickets { list })
    }
}
