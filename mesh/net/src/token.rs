//! A join token: what a new machine has to know to trust the cluster, and to be trusted by it, once.
//!
//! It carries the full hash of the cluster's public key, so that the machine can check whom it talks to *before* it
//! proves anything; 128 secret bits; the router's addresses; and, for people and their mistakes, role, expiry and a
//! checksum, so that a token that lost a character in a chat window is told apart from one that is not known. The
//! text has one case and no characters that shells or line breaks hurt; white space in it is ignored.
//!
//! The secret is the seed of an Ed25519 key. The router keeps the public half only, and the machine proves the other
//! by a signature, so neither the wire nor the router's disk ever holds what is needed to use a token. Expiry is
//! enforced by the router: a machine that joins may not know what time it is.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use mesh_wire::id::NodeId;
use thiserror::Error;

use crate::keys::{KeyError, SigningKey, random};
use crate::roster::Role;

/// What a token begins with, up to the version of its form.
const PREFIX: &str = "moemesh";

/// The version of the form, as text.
const VERSION: &str = "1";

/// Addresses in a token: a router with more networks than this has one that is good enough among them.
pub const ADDRESSES_MAX: usize = 8;

/// Characters that are looked at: the longest token, white space between all of them.
pub const TEXT_BYTES_MAX: usize = 1024;

/// Digits of RFC 4648's base 32, in lower case.
const DIGITS: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";

/// Bytes of the checksum: one in four billion damaged tokens passes for another.
const CHECKSUM_BYTES: usize = 4;

/// Why a text is no token.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum TokenError {
    /// It does not begin as one.
    #[error("this is no join token; it begins with `moemesh1.` and comes from `moemesh token` on the router")]
    NotAToken,
    /// A later version of this program made it.
    #[error("this token is of version {0}, which this program does not know; update moemesh on this machine")]
    Version(String),
    /// A character is missing, wrong or too much.
    #[error("the token is damaged: a character is missing or was changed on the way; copy it again")]
    Damaged,
    /// It is for another kind of machine.
    #[error("the token is for another kind of machine (role {0}); make one for a node with `moemesh token`")]
    Role(u8),
    /// It would have no address, or too many.
    #[error("a token needs 1 to {ADDRESSES_MAX} router addresses; say which with --address HOST:PORT")]
    Addresses,
}

/// See the module.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// BLAKE3 of the cluster's public key.
    pub cluster: [u8; 32],
    /// What the machine that shows it becomes.
    pub role: Role,
    /// When the router will not take it any more, in seconds since 1970 by the router's clock; for people.
    pub expires_unix: u64,
    /// Where the router may be, tried in order.
    pub addresses: Vec<SocketAddr>,
    secret: [u8; 16],
}

/// What a cluster is called in tokens.
pub fn cluster_hash(cluster: NodeId) -> [u8; 32] {
    *blake3::hash(&cluster.0).as_bytes()
}

impl Token {
    /// A token with a new secret.
    ///
    /// # Errors
    /// `Random`.
    pub fn generate(
        cluster: NodeId,
        role: Role,
        expires_unix: u64,
        addresses: Vec<SocketAddr>,
    ) -> Result<Token, KeyError> {
        let cluster = cluster_hash(cluster);
        Ok(Token { cluster, role, expires_unix, addresses, secret: random()? })
    }

    /// The key that proves it.
    ///
    /// # Errors
    /// `Random`; there is no secret for which that happens.
    pub fn key(&self) -> Result<SigningKey, KeyError> {
        SigningKey::from_seed(blake3::derive_key("moemesh 2026-11 join token", &self.secret))
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = vec![self.role as u8];
        bytes.extend(self.expires_unix.to_le_bytes());
        bytes.extend(self.cluster);
        bytes.extend(self.secret);
        for address in self.addresses.iter().take(ADDRESSES_MAX) {
            match address.ip() {
                IpAddr::V4(ip) => {
                    bytes.push(4);
                    bytes.extend(ip.octets());
                }
                IpAddr::V6(ip) => {
                    bytes.push(6);
                    bytes.extend(ip.octets());
                }
            }
            bytes.extend(address.port().to_le_bytes());
        }
        let checksum = blake3::hash(&bytes);
        bytes.extend(&checksum.as_bytes()[..CHECKSUM_BYTES]);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Result<Token, TokenError> {
        let (content, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(TokenError::Damaged)?;
        if blake3::hash(content).as_bytes()[..CHECKSUM_BYTES] != *checksum {
            return Err(TokenError::Damaged);
        }
        let mut rest = content;
        let [role] = take(&mut rest)?;
        let role = Role::from_code(role).ok_or(TokenError::Role(role))?;
        let (expires_unix, cluster, secret) =
            (u64::from_le_bytes(take(&mut rest)?), take(&mut rest)?, take(&mut rest)?);
        let mut addresses = Vec::new();
        while !rest.is_empty() {
            let [family] = take(&mut rest)?;
            let ip = match family {
                4 => IpAddr::V4(Ipv4Addr::from(take::<4>(&mut rest)?)),
                6 => IpAddr::V6(Ipv6Addr::from(take::<16>(&mut rest)?)),
                _ => return Err(TokenError::Damaged),
            };
            addresses.push(SocketAddr::new(ip, u16::from_le_bytes(take(&mut rest)?)));
        }
        if !(1..=ADDRESSES_MAX).contains(&addresses.len()) {
            return Err(TokenError::Addresses);
        }
        Ok(Token { cluster, role, expires_unix, addresses, secret })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], TokenError> {
    let (taken, after) = rest.split_first_chunk().ok_or(TokenError::Damaged)?;
    *rest = after;
    Ok(*taken)
}

/// The text to hand over.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{VERSION}.{}", to_base32(&self.to_bytes()))
    }
}

/// Says which cluster, and keeps the secret to itself.
impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", NodeId(self.cluster))
    }
}

/// Takes any white space and either case.
impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Token, TokenError> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(TokenError::NotAToken);
        }
        let letters = text.chars().filter(|letter| !letter.is_whitespace());
        let text: String = letters.map(|letter| letter.to_ascii_lowercase()).collect();
        let rest = text.strip_prefix(PREFIX).ok_or(TokenError::NotAToken)?;
        let (version, digits) = rest.split_once('.').ok_or(TokenError::Damaged)?;
        if version != VERSION {
            let number = !version.is_empty() && version.bytes().all(|byte| byte.is_ascii_digit());
            return Err(if number { TokenError::Version(version.to_owned()) } else { TokenError::Damaged });
        }
        Token::from_bytes(&from_base32(digits).ok_or(TokenError::Damaged)?)
    }
}

fn to_base32(bytes: &[u8]) -> String {
    let mut text = String::new();
    let (mut bits, mut count) = (0_u32, 0);
    for byte in bytes {
        bits = bits << 8 | u32::from(*byte);
        count += 8;
        while count >= 5 {
            count -= 5;
            text.push(char::from(DIGITS[(bits >> count & 31) as usize]));
        }
    }
    if count > 0 {
        text.push(char::from(DIGITS[(bits << (5 - count) & 31) as usize]));
    }
    text
}

/// `None` for other digits, and for bits that are left over: bytes have one text.
fn from_base32(text: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let (mut bits, mut count) = (0_u32, 0);
    for letter in text.bytes() {
        let digit = DIGITS.iter().position(|digit| *digit == letter)?;
        bits = bits << 5 | digit as u32;
        count += 5;
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 255) as u8);
        }
    }
    let left_over = bits & ((1 << count) - 1);
    (count < 5 && left_over == 0).then_some(bytes)
}
