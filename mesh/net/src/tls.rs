//! Who may talk at all: TLS 1.3 in both directions, with keys pinned by the roster.
//!
//! There is no certificate authority. A peer's certificate is only a wrapper around its Ed25519 key; it is good if
//! and only if that key is one of the expected ones *and* the peer signs the handshake with it. Both are checked
//! here, before a byte of ours is parsed. The second is the one that is easily lost: a verifier that compares keys
//! and waves the signature through lets in everyone who has ever seen the certificate. Names, dates and chains in
//! the certificate are ignored on purpose. Refuses TLS 1.2, other signature schemes, chains, session resumption
//! (it would outlive a change of the roster) and early data.
//!
//! The router's port serves three protocols: the mesh and weights, for members, and joining, for anyone who signs with
//! the key it shows; a node's serves weights alone. Which of them a client may have is decided within the handshake:
//! each connection has a set-up of its own, whose certificate resolver sees what the client offers and tells the
//! verifier. Whoever offers anything beside joining is judged as a member. The price is a set-up per handshake, some
//! kilobytes and microseconds.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use mesh_wire::frame::ALPN;
use mesh_wire::id::NodeId;
use quinn::crypto::rustls::QuicServerConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, PeerIncompatible,
    ServerConfig, SignatureScheme,
};
use thiserror::Error as ThisError;

use crate::identity::Identity;
use crate::members::{Members, Standing};

/// The protocol of joining, and its version.
pub(crate) const JOIN_ALPN: &[u8] = b"moemesh-join/1";

/// The protocol of connections that carry weights, and its version.
pub(crate) const WEIGHTS_ALPN: &[u8] = b"moemesh-blobs/1";

/// What dialers call the router in TLS. It is not checked, as keys are.
pub(crate) const SERVER_NAME: &str = "moemesh";

/// A SubjectPublicKeyInfo of an Ed25519 key is these bytes and the key (RFC 8410).
const ED25519_SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];

/// Why TLS cannot be set up. None of these depends on a peer.
#[derive(Debug, ThisError)]
pub enum TlsError {
    /// rustls does not take the certificate or the versions.
    #[error("setting up TLS: {0}")]
    Rustls(#[from] Error),
    /// The provider lacks the cipher suite QUIC starts with.
    #[error("setting up TLS for QUIC: {0}")]
    Quic(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
}

/// The key in a peer's certificate, if it is an Ed25519 key.
pub fn key_of(certificate: &CertificateDer<'_>) -> Option<NodeId> {
    let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
    let spki = certificate.subject_public_key_info();
    let key = spki.as_ref().strip_prefix(&ED25519_SPKI_PREFIX)?;
    key.try_into().ok().map(NodeId)
}

/// Whom a handshake is for.
#[derive(Debug)]
enum Expected {
    /// The machine that is dialed: the router, or a node that lends weights.
    Machine(NodeId),
    /// A router that will prove itself by the cluster's signature, for a machine that joins.
    Anyone,
    /// Members, or anyone who offered nothing but to join: the flag says so.
    Members(Arc<Members>, Arc<AtomicBool>),
}

/// Takes whom it expects, if they sign with the key they show.
#[derive(Debug)]
struct Pinned {
    expected: Expected,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn new(expected: Expected, provider: &CryptoProvider) -> Pinned {
        Pinned { expected, algorithms: provider.signature_verification_algorithms }
    }

    fn check(&self, certificate: &CertificateDer<'_>, chain: &[CertificateDer<'_>]) -> Result<(), Error> {
        let key = key_of(certificate).ok_or(Error::InvalidCertificate(CertificateError::BadEncoding))?;
        if !chain.is_empty() {
            return Err(Error::InvalidCertificate(CertificateError::UnknownIssuer));
        }
        let standing = match &self.expected {
            Expected::Machine(dialed) if *dialed == key => Standing::Member,
            Expected::Machine(_) => Standing::Stranger,
            Expected::Anyone => Standing::Member,
            Expected::Members(_, joins) if joins.load(Ordering::Acquire) => Standing::Member,
            Expected::Members(members, _) => members.standing(key),
        };
        let reason = match standing {
            Standing::Member => return Ok(()),
            Standing::Revoked => CertificateError::Revoked,
            Standing::Stranger => CertificateError::ApplicationVerificationFailure,
        };
        // Anybody can make a router write this; a node asks for its router itself, and not often.
        let writes = match &self.expected {
            Expected::Members(members, _) => members.refusals.admits(Instant::now()),
            Expected::Machine(_) | Expected::Anyone => true,
        };
        if writes {
            tracing::warn!(key = key.to_hex(), ?standing, "a peer was turned away for its key");
        } else {
            tracing::debug!(key = key.to_hex(), ?standing, "a peer was turned away for its key");
        }
        Err(Error::InvalidCertificate(reason))
    }

    fn check_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        if signature.scheme != SignatureScheme::ED25519 {
            return Err(Error::PeerIncompatible(PeerIncompatible::NoSignatureSchemesInCommon));
        }
        rustls::crypto::verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }
}

/// What both verifiers answer to TLS 1.2, which is never offered.
fn refuse_tls12() -> Result<HandshakeSignatureValid, Error> {
    Err(Error::PeerIncompatible(PeerIncompatible::Tls13RequiredForQuic))
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(end_entity, intermediates)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(end_entity, intermediates)?;
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        refuse_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.check_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

/// Shows this machine's key, and notes whether the client offers nothing but to join.
#[derive(Debug)]
struct Offer {
    key: Arc<CertifiedKey>,
    joins: Arc<AtomicBool>,
}

impl ResolvesServerCert for Offer {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let offers =
            |wanted: &[u8]| hello.alpn().is_some_and(|mut offered| offered.any(|alpn| alpn == wanted));
        let joins = offers(JOIN_ALPN) && !offers(ALPN) && !offers(WEIGHTS_ALPN);
        self.joins.store(joins, Ordering::Release);
        Some(Arc::clone(&self.key))
    }
}

/// TLS of the side that listens.
#[derive(Clone, Debug)]
pub struct Gate {
    key: Arc<CertifiedKey>,
    members: Arc<Members>,
    /// What it serves, preferred first.
    protocols: &'static [&'static [u8]],
}

impl Gate {
    /// The router's: shows this key, and lets members in, and those who want to join.
    ///
    /// # Errors
    /// `TlsError`, which would be a defect of this program.
    pub fn new(identity: &Identity, members: Arc<Members>) -> Result<Gate, TlsError> {
        Gate::serving(&[ALPN, WEIGHTS_ALPN, JOIN_ALPN], identity, members)
    }

    /// A node's: lets members in, for weights.
    ///
    /// # Errors
    /// `TlsError`, which would be a defect of this program.
    pub(crate) fn lending(identity: &Identity, members: Arc<Members>) -> Result<Gate, TlsError> {
        Gate::serving(&[WEIGHTS_ALPN], identity, members)
    }

    fn serving(
        protocols: &'static [&'static [u8]],
        identity: &Identity,
        members: Arc<Members>,
    ) -> Result<Gate, TlsError> {
        let provider = rustls::crypto::ring::default_provider();
        let signer = provider.key_provider.load_private_key(identity.private_key())?;
        let key = Arc::new(CertifiedKey::new(vec![identity.certificate()], signer));
        Ok(Gate { key, members, protocols })
    }

    /// The same with another certificate, or another key to sign with.
    #[cfg(test)]
    pub(crate) fn showing(self, key: CertifiedKey) -> Gate {
        Gate { key: Arc::new(key), ..self }
    }

    /// What rustls needs for one connection.
    ///
    /// # Errors
    /// `TlsError`, which would be a defect of this program.
    pub(crate) fn server(&self) -> Result<ServerConfig, TlsError> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let joins = Arc::new(AtomicBool::new(false));
        let expected = Expected::Members(Arc::clone(&self.members), Arc::clone(&joins));
        let verifier = Arc::new(Pinned::new(expected, &provider));
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::new(Offer { key: Arc::clone(&self.key), joins }));
        config.alpn_protocols = self.protocols.iter().map(|protocol| protocol.to_vec()).collect();
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(config)
    }

    /// The same for QUIC.
    ///
    /// # Errors
    /// `TlsError`, which would be a defect of this program.
    pub(crate) fn session(&self) -> Result<QuicServerConfig, TlsError> {
        Ok(QuicServerConfig::try_from(self.server()?)?)
    }
}

fn client_expecting(identity: &Identity, expected: Expected, alpn: &[u8]) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = Arc::new(Pinned::new(expected, &provider));
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![identity.certificate()], identity.private_key())?;
    config.alpn_protocols = vec![alpn.to_vec()];
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// TLS of a node: takes this key as the router.
///
/// # Errors
/// `TlsError`, which would be a defect of this program.
pub fn client(identity: &Identity, router: NodeId) -> Result<ClientConfig, TlsError> {
    client_expecting(identity, Expected::Machine(router), ALPN)
}

/// TLS of a node that borrows weights of the machine with this key.
///
/// # Errors
/// `TlsError`, which would be a defect of this program.
pub(crate) fn borrower(identity: &Identity, lender: NodeId) -> Result<ClientConfig, TlsError> {
    client_expecting(identity, Expected::Machine(lender), WEIGHTS_ALPN)
}

/// TLS of a machine that joins: takes any key, as the cluster's signature will tell whose it is.
///
/// # Errors
/// `TlsError`, which would be a defect of this program.
pub(crate) fn joiner(identity: &Identity) -> Result<ClientConfig, TlsError> {
    client_expecting(identity, Expected::Anyone, JOIN_ALPN)
}
