//! A machine's key: who it is, towards everyone.
//!
//! One Ed25519 key per machine lies in a file that only its owner can read. Its public half is the machine's
//! `NodeId`, which rosters list; a self-signed certificate around it is what TLS carries. Everything else a
//! machine needs to keep secret over restarts (the key of QUIC's stateless resets) is derived from it, so there is
//! one file to guard. There is no expiry: boards without a clock must be able to join. The price is that a stolen
//! key is good until the roster drops it.

use mesh_wire::id::NodeId;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::disk::Folder;
use crate::keys::{KeyError, SigningKey, random};

/// The file of a state folder that holds the key.
pub const FILE: &str = "machine.key";

/// First word of it.
const FILE_TAG: &str = "moemesh-ed25519-1";

/// DER around an Ed25519 seed (RFC 8410 section 7): what comes before its 32 bytes in PKCS #8.
const PKCS8_PREFIX: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];

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
    pub fn generate() -> Result<Identity, KeyError> {
        Identity::from_seed(random()?)
    }

    /// The identity of this seed.
    ///
    /// # Errors
    /// `Certificate`.
    pub fn from_seed(seed: [u8; 32]) -> Result<Identity, KeyError> {
        let id = SigningKey::from_seed(seed)?.public();
        let pkcs8 = PrivatePkcs8KeyDer::from(pkcs8(&seed));
        let signer = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519)?;
        let certificate = rcgen::CertificateParams::new(vec!["moemesh".to_owned()])?.self_signed(&signer)?;
        Ok(Identity { seed, id, certificate: certificate.der().clone() })
    }

    /// The key of this state folder; a new one where it has none.
    ///
    /// # Errors
    /// `KeyError`.
    pub fn open(folder: &Folder) -> Result<Identity, KeyError> {
        Identity::from_seed(*SigningKey::load_or_create(folder, FILE, FILE_TAG)?.seed())
    }

    /// The key of this state folder, if it has one.
    ///
    /// # Errors
    /// `KeyError`.
    pub fn peek(folder: &Folder) -> Result<Option<Identity>, KeyError> {
        let key = SigningKey::load(folder, FILE, FILE_TAG)?;
        key.map(|key| Identity::from_seed(*key.seed())).transpose()
    }

    /// The public key.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// The self-signed certificate around it.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// The private half, for the other protocol in which this machine proves its key (`mesh-discovery`). What is signed
    /// there begins with a word of its own, so a signature of one protocol is none of the other.
    pub fn seed(&self) -> &[u8; 32] {
        &self.seed
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
