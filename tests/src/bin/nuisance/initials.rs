//! First packets of QUIC, each from a port of its own, with nothing behind them.
//!
//! A QUIC client dials a socket of ours, and what it sends first is sent on instead of answered. A first packet is good
//! for any address: its keys come from a number it carries itself. Answers are counted, not read.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::net::UdpSocket;
use tokio::time::{sleep, timeout};

use crate::Options;
use crate::dial::Who;

/// A first packet is at least so long (RFC 9000 section 14.1).
const INITIAL_BYTES_MIN: usize = 1200;

/// Until a first packet is there; it takes no network.
const CATCH_WITHIN: Duration = Duration::from_secs(5);

/// Sends them, evenly over half of the time; what came back.
pub(crate) async fn run(options: &Options) -> Result<Value, String> {
    let caught = catch(options).await?;
    let pause = options.seconds / 2 / caught.len().max(1) as u32;
    let mut sockets = Vec::new();
    for packet in &caught {
        let socket = UdpSocket::bind("0.0.0.0:0").await.map_err(|error| error.to_string())?;
        socket.send_to(packet, options.to).await.map_err(|error| error.to_string())?;
        sockets.push(socket);
        sleep(pause).await;
    }
    sleep(options.seconds / 2).await;
    let mut answers = BTreeMap::<&str, u32>::new();
    for socket in &sockets {
        let mut packet = [0; 2048];
        while let Ok((length, _)) = socket.try_recv_from(&mut packet) {
            let kind = match packet[..length].first() {
                // Types of long headers (RFC 9000 section 17.2).
                Some(first) if first & 0xf0 == 0xf0 => "retry",
                Some(first) if first & 0xf0 == 0xc0 => "initial",
                Some(first) if first & 0xf0 == 0xe0 => "handshake",
                _ => "other",
            };
            *answers.entry(kind).or_default() += 1;
        }
    }
    Ok(json!({ "sent": caught.len(), "answers": answers }))
}

/// As many different first packets as there are places.
async fn catch(options: &Options) -> Result<Vec<Vec<u8>>, String> {
    let trap = UdpSocket::bind("127.0.0.1:0").await.map_err(|error| error.to_string())?;
    let here = trap.local_addr().map_err(|error| error.to_string())?;
    let endpoint = Who::of(options)?.endpoint(options.protocol, None)?;
    let mut found = BTreeMap::new();
    while found.len() < options.places {
        let dialing = endpoint.connect(here, "moemesh").map_err(|error| error.to_string())?;
        let mut packet = [0; 2048];
        let received = timeout(CATCH_WITHIN, trap.recv_from(&mut packet)).await;
        let (length, _) = received.map_err(|_| "no first packet")?.map_err(|error| error.to_string())?;
        drop(dialing);
        if length < INITIAL_BYTES_MIN {
            continue;
        }
        // Version, then the number that the keys come from, with its length before it.
        let number = packet[5..].get(..1 + usize::from(packet[5])).unwrap_or_default().to_vec();
        found.entry(number).or_insert_with(|| packet[..length].to_vec());
    }
    Ok(found.into_values().collect())
}
