//! QUIC as a member or a stranger dials it, with nothing of the politeness: no time-out, more streams, bent packets.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use mesh_net::identity::Identity;
use mesh_net::membership::Membership;
use mesh_net::tls;
use mesh_wire::buffer::Pool;
use mesh_wire::frame::{ALPN, HEADER_BYTES, Header, Op};
use mesh_wire::id::NodeId;
use mesh_wire::weights::Weights;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, ConnectionError, Endpoint, TransportConfig, crypto};

use crate::Options;
use crate::tamper::{Bending, Way};

/// Often enough that the other side does not take us for gone.
const KEEP_ALIVE: Duration = Duration::from_millis(500);

/// Streams the router may open here: more than it has.
const STREAMS: u32 = 64;

/// What is asked for in the handshake.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Mesh,
    Join,
    Weights,
}

impl Protocol {
    pub(crate) fn parse(name: &str) -> Option<Protocol> {
        match name {
            "mesh" => Some(Protocol::Mesh),
            "join" => Some(Protocol::Join),
            "weights" => Some(Protocol::Weights),
            _ => None,
        }
    }

    fn alpn(self) -> Vec<u8> {
        match self {
            Protocol::Mesh => ALPN.to_vec(),
            Protocol::Join => b"moemesh-join/1".to_vec(),
            Protocol::Weights => b"moemesh-blobs/1".to_vec(),
        }
    }
}

/// Who dials, and the key of whom it dials.
#[derive(Clone, Debug)]
pub(crate) struct Who {
    pub(crate) identity: Identity,
    pub(crate) target: NodeId,
}

impl Who {
    pub(crate) fn of(options: &Options) -> Result<Who, String> {
        let member = |path| match Membership::peek(path) {
            Ok(Some(membership)) => Ok(membership),
            Ok(None) => Err(format!("{} is no member's folder", path.display())),
            Err(error) => Err(error.to_string()),
        };
        let own = member(&options.state)?;
        let target = match &options.of {
            Some(folder) => member(folder)?.identity().id(),
            None => own.admission().router,
        };
        let identity = match options.stranger {
            true => Identity::generate().map_err(|error| error.to_string())?,
            false => own.identity().clone(),
        };
        Ok(Who { identity, target })
    }

    /// A socket from which connections of this protocol can be dialed.
    pub(crate) fn endpoint(&self, protocol: Protocol, way: Option<Way>) -> Result<Endpoint, String> {
        let mut tls = tls::client(&self.identity, self.target).map_err(|error| error.to_string())?;
        tls.alpn_protocols = vec![protocol.alpn()];
        let honest = Arc::new(QuicClientConfig::try_from(tls).map_err(|error| error.to_string())?);
        let crypto: Arc<dyn crypto::ClientConfig> = match way {
            Some(way) => Arc::new(Bending::new(honest, way)),
            None => honest,
        };
        let mut transport = TransportConfig::default();
        transport
            .max_idle_timeout(None)
            .keep_alive_interval(Some(KEEP_ALIVE))
            .max_concurrent_bidi_streams(STREAMS.into());
        let mut config = ClientConfig::new(crypto);
        config.transport_config(Arc::new(transport));
        let here = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        let mut endpoint = Endpoint::client(here).map_err(|error| error.to_string())?;
        endpoint.set_default_client_config(config);
        Ok(endpoint)
    }
}

impl Who {
    /// Fingerprint of the model that the router at this address serves, as it tells its members.
    pub(crate) async fn model(&self, router: SocketAddr) -> Result<[u8; 32], String> {
        let say = |error: &dyn std::fmt::Display| error.to_string();
        let endpoint = self.endpoint(Protocol::Weights, None)?;
        let connecting = endpoint.connect(router, "moemesh").map_err(|error| say(&error))?;
        let connection = connecting.await.map_err(|error| say(&error))?;
        let (mut send, mut recv) = connection.open_bi().await.map_err(|error| say(&error))?;
        let pool = Pool::new(1 << 20);
        let question = Weights::AskCatalogue { port: 0 }.encode(&pool).map_err(|error| say(&error))?;
        send.write_all(question.frame()).await.map_err(|error| say(&error))?;
        let mut header = [0; HEADER_BYTES];
        recv.read_exact(&mut header).await.map_err(|error| say(&error))?;
        let header = Header::parse(header, &[Op::Catalogue]).map_err(|error| say(&error))?;
        let mut answer = pool.take(header).map_err(|error| say(&error))?;
        recv.read_exact(answer.body_mut()).await.map_err(|error| say(&error))?;
        connection.close(0_u32.into(), b"");
        match Weights::decode(&answer).map_err(|error| say(&error))? {
            Weights::Catalogue(catalogue) => Ok(catalogue.fingerprint),
            _ => Err("no catalogue".to_owned()),
        }
    }
}

/// How a connection ended, in words that can be counted.
pub(crate) fn reason(error: &ConnectionError) -> String {
    match error {
        ConnectionError::ConnectionClosed(close) => format!("QUIC: {}", close.error_code),
        ConnectionError::ApplicationClosed(close) => {
            format!("{}: {}", close.error_code, String::from_utf8_lossy(&close.reason))
        }
        other => other.to_string(),
    }
}
