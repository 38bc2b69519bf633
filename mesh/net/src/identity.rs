//! A machine's key: who it is, towards everyone.
//!
//! One Ed25519 key per machine lies in a file that only its owner can read. Its public half is the machine's
//! `NodeId`, which rosters list; a self-signed certificate around it is what TLS carries. Everything else a
//! machine needs to keep secret over restarts (the key of QUIC's stateless resets) is derived from it, so there is
//! one file to guard. There is no expiry: boards without a clock must be able to join. The price is that a stolen
//! key is good until the roster drops it.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use mesh_wire::id::NodeId;
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use thiserror::Error;

/// First word of a key file.
const FILE_TAG: &str = "moemesh-ed25519-1";

/// Longest file that is read: tag, key and line break take 83 bytes.
const FILE_BYTES_MAX: u64 = 256;

/// DER around an Ed25519 seed (RFC 8410 section 7): what comes before its 32 bytes in PKCS #8.
const PKCS8_PREFIX: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];

/// Why there is no identity.
#[derive(Debug, Error)]
pub enum IdentityError {
    /// The file cannot be read or written.
    #[error("key file {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// Others on this machine can read the key.
    #[error("key file {path} can be read by others (mode {mode:o}); run `chmod 600 {path}`")]
    Exposed {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// The file has other content.
    #[error("{path} is not a moemesh key file; restore it, or delete it to make this a new machine")]
    Content {
        /// Which file.
        path: PathBuf,
    },
    /// The system gives no random numbers.
    #[error("the system's source of random numbers failed")]
    Random,
    /// The certificate cannot be made.
    #[error("making the certificate: {0}")]
    Certificate(#[from] rcgen::Error),
}

/// The key of this machine.
#[derive(Clone)]
pub struct Identity {
    seed: [u8; 32],
    id: NodeId,
    certificate: CertificateDer<'static>,
}

impl Identity {
    /// A new key, in memory only.
    ///
    /// # Errors
    /// `Random`, `Certificate`.
    pub fn generate() -> Result<Identity, IdentityError> {
        let mut seed = [0; 32];
        SystemRandom::new().fill(&mut seed).map_err(|_| IdentityError::Random)?;
        Identity::from_seed(seed)
    }

    /// The identity of this seed.
    ///
    /// # Errors
    /// `Certificate`.
    pub fn from_seed(seed: [u8; 32]) -> Result<Identity, IdentityError> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed).map_err(|_| IdentityError::Random)?;
        let mut key = [0; 32];
        key.copy_from_slice(pair.public_key().as_ref());
        let pkcs8 = PrivatePkcs8KeyDer::from(pkcs8(&seed));
        let signer = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519)?;
        let certificate = rcgen::CertificateParams::new(vec!["moemesh".to_owned()])?.self_signed(&signer)?;
        Ok(Identity { seed, id: NodeId(key), certificate: certificate.der().clone() })
    }

    /// The key in the file; where there is no file, a new key, written there readable by its owner only.
    ///
    /// # Errors
    /// `File`, `Exposed`, `Content`, `Random`.
    pub fn load_or_create(path: &Path) -> Result<Identity, IdentityError> {
        match Identity::load(path) {
            Err(IdentityError::File { source, .. }) if source.kind() == ErrorKind::NotFound => {
                Identity::create(path)
            }
            outcome => outcome,
        }
    }

    /// The key in the file.
    ///
    /// # Errors
    /// `File`, `Exposed`, `Content`.
    pub fn load(path: &Path) -> Result<Identity, IdentityError> {
        let failed = |source| IdentityError::File { path: path.to_owned(), source };
        let file = File::open(path).map_err(failed)?;
        check_mode(path, &file)?;
        let mut text = String::new();
        let content = || IdentityError::Content { path: path.to_owned() };
        match file.take(FILE_BYTES_MAX).read_to_string(&mut text) {
            Ok(_) => {}
            Err(source) if source.kind() == ErrorKind::InvalidData => return Err(content()),
            Err(source) => return Err(failed(source)),
        }
        let mut words = text.split_whitespace();
        let (tag, seed, rest) = (words.next(), words.next(), words.next());
        if tag != Some(FILE_TAG) || rest.is_some() {
            return Err(content());
        }
        // Seed and key are written alike: 64 hexadecimal digits.
        let NodeId(seed) = seed.and_then(NodeId::from_hex).ok_or_else(content)?;
        Identity::from_seed(seed)
    }

    /// A new key in a new file. Never overwrites: a lost key is a lost machine.
    ///
    /// # Errors
    /// `File` (also where the file exists), `Random`.
    pub fn create(path: &Path) -> Result<Identity, IdentityError> {
        let identity = Identity::generate()?;
        let failed = |source| IdentityError::File { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        options.write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let mut file = options.open(path).map_err(failed)?;
        let line = format!("{FILE_TAG} {}\n", NodeId(identity.seed).to_hex());
        file.write_all(line.as_bytes()).and_then(|()| file.sync_all()).map_err(failed)?;
        Ok(identity)
    }

    /// The public key.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The self-signed certificate around it.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// The private key, for TLS.
    pub(crate) fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(pkcs8(&self.seed)))
    }

    /// Key of QUIC's stateless resets. It outlives the process, so that a restarted router can tell a peer at
    /// once that the old connection is gone; a random one would leave the peer waiting for its idle timeout.
    pub(crate) fn reset_key(&self) -> [u8; 32] {
        blake3::derive_key("moemesh 2026-11 stateless reset", &self.seed)
    }
}

/// Names the machine and keeps the key to itself.
impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.id)
    }
}

fn pkcs8(seed: &[u8; 32]) -> Vec<u8> {
    [&PKCS8_PREFIX[..], seed].concat()
}

#[cfg(unix)]
fn check_mode(path: &Path, file: &File) -> Result<(), IdentityError> {
    use std::os::unix::fs::PermissionsExt;
    let failed = |source| IdentityError::File { path: path.to_owned(), source };
    let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o777;
    if mode & 0o077 != 0 { Err(IdentityError::Exposed { path: path.to_owned(), mode }) } else { Ok(()) }
}

#[cfg(not(unix))]
fn check_mode(_: &Path, _: &File) -> Result<(), IdentityError> {
    Ok(())
}
