//! Ed25519 keys: made, kept in a file, signing and checking.
//!
//! Three kinds of them exist: a machine's (`identity`), the cluster's, which signs who belongs to it (`authority`),
//! and one per join token (`token`). In a file each kind has a word of its own in front, so that a machine's key put
//! in the place of a cluster's is noticed. Every message that is signed begins with a word that says what it is,
//! so a signature of one kind is none of another. Never overwrites a key: a lost key is a lost machine or cluster.

use std::path::PathBuf;

use mesh_wire::id::NodeId;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use thiserror::Error;

use crate::disk::{DiskError, Folder};

/// The file of a router's state folder that holds the cluster's key.
pub const CLUSTER_FILE: &str = "cluster.key";

/// Bytes of a signature.
pub const SIGNATURE_BYTES: usize = 64;

/// Why there is no key.
#[derive(Debug, Error)]
pub enum KeyError {
    /// Its file cannot be read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The file has other content.
    #[error("{0} is not a moemesh key file of this kind; restore it, or delete it to begin anew")]
    Content(PathBuf),
    /// The system gives no random numbers.
    #[error("the system's source of random numbers failed")]
    Random,
    /// The key's certificate cannot be made.
    #[error("making the certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// `N` bytes nobody can guess.
///
/// # Errors
/// `Random`.
pub fn random<const N: usize>() -> Result<[u8; N], KeyError> {
    let mut bytes = [0; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| KeyError::Random)?;
    Ok(bytes)
}

/// Both halves of a key.
pub struct SigningKey {
    seed: [u8; 32],
    pair: Ed25519KeyPair,
}

impl SigningKey {
    /// A new key, in memory only.
    ///
    /// # Errors
    /// `Random`.
    pub fn generate() -> Result<SigningKey, KeyError> {
        SigningKey::from_seed(random()?)
    }

    /// The key of this seed.
    ///
    /// # Errors
    /// `Random`; there is no seed for which that happens.
    pub fn from_seed(seed: [u8; 32]) -> Result<SigningKey, KeyError> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|_| KeyError::Random)?;
        Ok(SigningKey { seed, pair })
    }

    /// The key in this file; `tag` is the first word in it.
    ///
    /// # Errors
    /// `Disk`, `Content`.
    pub fn load(folder: &Folder, name: &str, tag: &str) -> Result<Option<SigningKey>, KeyError> {
        let Some(content) = folder.read(name)? else { return Ok(None) };
        let content = std::str::from_utf8(&content).unwrap_or_default();
        let mut words = content.split_whitespace();
        let (first, seed, rest) = (words.next(), words.next(), words.next());
        // Seed and public key are written alike: 64 hexadecimal digits.
        match seed.and_then(NodeId::from_hex) {
            Some(NodeId(seed)) if first == Some(tag) && rest.is_none() => {
                SigningKey::from_seed(seed).map(Some)
            }
            _ => Err(KeyError::Content(folder.file(name))),
        }
    }

    /// The key in this file; where there is none, a new one, written there.
    ///
    /// # Errors
    /// `Disk`, `Content`, `Random`.
    pub fn load_or_create(folder: &Folder, name: &str, tag: &str) -> Result<SigningKey, KeyError> {
        if let Some(key) = SigningKey::load(folder, name, tag)? {
            return Ok(key);
        }
        let key = SigningKey::generate()?;
        folder.write(name, format!("{tag} {}\n", NodeId(key.seed).to_hex()).as_bytes())?;
        Ok(key)
    }

    /// The public half.
    pub fn public(&self) -> NodeId {
        let mut key = [0; 32];
        key.copy_from_slice(self.pair.public_key().as_ref());
        NodeId(key)
    }

    /// Signs a message that begins with a word saying what it is.
    pub fn sign(&self, message: &[u8]) -> [u8; SIGNATURE_BYTES] {
        let mut signature = [0; SIGNATURE_BYTES];
        signature.copy_from_slice(self.pair.sign(message).as_ref());
        signature
    }

    /// The secret half.
    pub(crate) fn seed(&self) -> &[u8; 32] {
        &self.seed
    }
}

/// Names the public half and keeps the other to itself.
impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SigningKey({})", self.public())
    }
}

/// Whether `key` has signed this message.
pub fn verify(key: NodeId, message: &[u8], signature: &[u8]) -> bool {
    UnparsedPublicKey::new(&ED25519, key.0).verify(message, signature).is_ok()
}
