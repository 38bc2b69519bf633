//! API keys: who may ask, and where the server may listen.
//!
//! Keys are kept as BLAKE3 hashes and compared in constant time, all of them for every request, so that neither
//! memory nor timing tells one. Without keys the server answers anybody, and may therefore listen on loopback
//! only.

use std::net::SocketAddr;

use axum::http::{HeaderMap, header};

/// A list of keys; empty lets everybody in.
#[derive(Clone, Default)]
pub struct ApiKeys(Vec<blake3::Hash>);

impl std::fmt::Debug for ApiKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "ApiKeys({} keys)", self.0.len())
    }
}

/// An address that must not be listened on.
#[derive(Debug, thiserror::Error)]
#[error(
    "{0} can be reached from other machines and no API key is set; give one with --api-key-file, or bind a \
     loopback address such as 127.0.0.1"
)]
pub struct OpenBind(pub SocketAddr);

impl ApiKeys {
    /// From the keys' text; blank ones are passed over.
    pub fn new<S: AsRef<str>>(keys: impl IntoIterator<Item = S>) -> ApiKeys {
        let keys = keys.into_iter();
        let hashes = keys.filter(|key| !key.as_ref().trim().is_empty());
        ApiKeys(hashes.map(|key| blake3::hash(key.as_ref().trim().as_bytes())).collect())
    }

    /// Whether everybody is let in.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether these headers carry a key (`Authorization: Bearer`).
    pub fn admit(&self, headers: &HeaderMap) -> bool {
        if self.0.is_empty() {
            return true;
        }
        let mut values = headers.get_all(header::AUTHORIZATION).iter();
        let (Some(value), None) = (values.next(), values.next()) else { return false };
        let Some((scheme, key)) = value.to_str().ok().and_then(|value| value.split_once(' ')) else {
            return false;
        };
        let hash = blake3::hash(key.trim().as_bytes());
        // blake3's comparison is constant-time; `|` looks at all of them.
        let known = self.0.iter().fold(false, |known, other| known | (*other == hash));
        known & scheme.eq_ignore_ascii_case("bearer")
    }

    /// Refuses to listen where strangers can reach, unless there is a key.
    pub fn check_bind(&self, address: SocketAddr) -> Result<(), OpenBind> {
        if self.is_empty() && !address.ip().to_canonical().is_loopback() {
            return Err(OpenBind(address));
        }
        Ok(())
    }
}
