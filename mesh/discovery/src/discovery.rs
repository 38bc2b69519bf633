//! Discovery as part of a process: its thread, and what happens when the LAN is not friendly.
//!
//! A thread with a current-thread runtime lives beside router or node and shares nothing with the thread that computes
//! or the one that moves calls. A session that is flooded ends, with every socket and table it had, and the next one
//! begins after a rest that doubles from 10 s to 5 min while floods go on. What was found stays suggested meanwhile.
//! The price of the clean cut: during a rest nothing new is found. Where the system has no multicast or no interfaces
//! the process says so once and goes on without: addresses that were given are enough.

use std::net::IpAddr;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use thiserror::Error;
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::circle::{Circle, keypair_of};
use crate::session::{Over, Session};
use crate::swarm::{Multicast, swarm};
pub use crate::tally::Seen;
use crate::tally::Tally;

/// First rest after a flood, and the longest; doubled while sessions end early.
const REST_FIRST: Duration = Duration::from_secs(10);
const REST_MAX: Duration = Duration::from_secs(300);

/// A session that lived this long was a good one: the next rest is short again.
const LIVED_WELL: Duration = Duration::from_secs(600);

/// Default TCP port of a router for discovery, beside its UDP port 8621.
pub const PORT: u16 = 8622;

/// Why there is no discovery.
#[derive(Debug, Error)]
pub enum DiscoveryError {
    /// A part of it cannot be had.
    #[error("{0}; machines are found at the addresses they were given only")]
    Start(String),
    /// No thread or no runtime.
    #[error("starting the thread of discovery: {0}")]
    Thread(#[from] std::io::Error),
}

/// What a machine needs to take part.
#[derive(Clone, Debug)]
pub struct DiscoveryConfig {
    /// Whose machine it is.
    pub circle: Circle,
    /// Where to answer, IP address and TCP port; `None`: it only asks, and opens no TCP port.
    pub answer_at: Option<(IpAddr, u16)>,
    /// UDP port at which it serves QUIC, 0 for none.
    pub mesh_port: u16,
    /// Whether mDNS is spoken over IPv6, and not over IPv4.
    pub ipv6: bool,
}

/// A machine that takes part until this is dropped.
#[derive(Debug)]
pub struct Discovery {
    stop: watch::Sender<bool>,
    tally: Tally,
    thread: Option<JoinHandle<()>>,
}

impl Discovery {
    /// Starts the thread. What is found goes to the membership's suggestions.
    ///
    /// # Errors
    /// `DiscoveryError`; nothing else of the process depends on it.
    pub fn start(config: DiscoveryConfig) -> Result<Discovery, DiscoveryError> {
        let (stop, stopped) = watch::channel(false);
        let tally = Tally::default();
        let first = open(&config, &tally)?;
        let counts = tally.clone();
        let thread = std::thread::Builder::new().name("discovery".to_owned());
        let thread = thread.spawn(move || live(&config, &counts, stopped, first))?;
        Ok(Discovery { stop, tally, thread: Some(thread) })
    }

    /// What was seen so far.
    pub fn seen(&self) -> Seen {
        self.tally.seen()
    }
}

impl Drop for Discovery {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the discovery thread panicked: this is a bug, please report the log");
        }
    }
}

/// A session and the runtime that its sockets and tasks belong to. Fields are dropped in this order.
type Opened = (Session, Runtime);

fn open(config: &DiscoveryConfig, tally: &Tally) -> Result<Opened, DiscoveryError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let session = {
        let _inside = runtime.enter();
        let keypair = keypair_of(config.circle.identity());
        let keypair = keypair.ok_or_else(|| DiscoveryError::Start("this machine's key is no key".into()))?;
        // Whoever answers on loopback only has nothing to say to a LAN.
        let multicast = match config.answer_at {
            Some((ip, _)) if ip.is_loopback() => Multicast::None,
            _ if config.ipv6 => Multicast::Ipv6,
            _ => Multicast::Ipv4,
        };
        let protocols = swarm(keypair, multicast).map_err(DiscoveryError::Start)?;
        let mut session = Session::new(protocols, config.circle.clone(), config.mesh_port, tally.clone());
        if let Some((ip, port)) = config.answer_at {
            session.listen(ip, port).map_err(DiscoveryError::Start)?;
        }
        session
    };
    Ok((session, runtime))
}

/// The thread: sessions and rests.
fn live(config: &DiscoveryConfig, tally: &Tally, mut stop: watch::Receiver<bool>, first: Opened) {
    let mut next = Some(first);
    let mut rest = REST_FIRST;
    loop {
        let opened = next.take().map_or_else(|| open(config, tally), Ok);
        let began = Instant::now();
        let over = match opened {
            Ok((session, runtime)) => runtime.block_on(session.run(&mut stop)),
            Err(error) => Over::Flooded(error.to_string()),
        };
        let Over::Flooded(what) = over else { return };
        tally.update(|seen| seen.floods += 1);
        if began.elapsed() >= LIVED_WELL {
            rest = REST_FIRST;
        }
        tracing::warn!(what, rest_s = rest.as_secs(), "discovery rests");
        if !wait(rest, &mut stop) {
            return;
        }
        rest = (2 * rest).min(REST_MAX);
    }
}

/// Waits on a runtime that has nothing else; whether to go on.
fn wait(rest: Duration, stop: &mut watch::Receiver<bool>) -> bool {
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_time().build() else {
        return false;
    };
    runtime.block_on(async { timeout(rest, stop.wait_for(|stop| *stop)).await.is_err() })
}
