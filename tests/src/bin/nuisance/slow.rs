//! Connections and streams that are begun and never ended, as many at a time as there are places.
//!
//! Each place dials, does its act until the connection is closed by the other side, and dials again. What is told is how
//! long the oldest connection and the oldest stream lived, whether they were ended or not.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_wire::buffer::Pool;
use mesh_wire::control::Hello;
use mesh_wire::frame::{HEADER_BYTES, Op};
use mesh_wire::message::Message;
use quinn::{Connection, RecvStream, SendStream};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

use crate::Options;
use crate::dial::{Protocol, Who, reason};
use crate::tamper::Way;

/// Between two connections of a place.
const PAUSE: Duration = Duration::from_millis(50);

/// Between two bytes.
const DRIP: Duration = Duration::from_secs(1);

/// Streams of weights at a time.
const STREAMS: usize = 8;

/// Bytes of a write to a stream with holes: one packet.
const PIECE: [u8; 1000] = [7; 1000];

/// What is done on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Act {
    /// Nothing.
    Silent,
    /// A byte per second, never the end.
    Drip,
    /// A hello, then the same.
    HelloDrip,
    /// As many bytes as are taken.
    Pour,
    /// Streams that are opened and given up at once.
    Loop,
}

/// What was met.
#[derive(Debug, Default)]
struct Seen {
    connected: u32,
    /// Ends before and after a connection was there.
    refused: BTreeMap<String, u32>,
    closed: BTreeMap<String, u32>,
    oldest_s: f64,
    streams: u64,
    oldest_stream_s: f64,
    bytes: u64,
}

/// What is noted, and the hello that some acts begin with.
#[derive(Clone, Debug)]
struct Notes(Arc<Mutex<Seen>>, Arc<[u8]>);

impl Notes {
    fn now(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wrote(&self, bytes: usize) {
        self.now().bytes += bytes as u64;
    }
}

/// A stream's life, which counts however it ends.
struct Life(Notes, Instant);

impl Life {
    fn begin(notes: &Notes) -> Life {
        notes.now().streams += 1;
        Life(notes.clone(), Instant::now())
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        let lived = self.1.elapsed().as_secs_f64();
        let mut seen = self.0.now();
        seen.oldest_stream_s = seen.oldest_stream_s.max(lived);
    }
}

/// Runs the act in `options`; what was met.
pub(crate) async fn run(options: &Options) -> Result<Value, String> {
    let (act, way) = match options.act.as_str() {
        "silent" => (Act::Silent, None),
        "half" => (Act::Silent, Some(Way::Half)),
        "drip" => (Act::Drip, None),
        "hello-drip" => (Act::HelloDrip, None),
        "loop" => (Act::Loop, None),
        "hole" => (Act::Pour, Some(Way::Hole)),
        "crumbs" => (Act::Pour, Some(Way::Crumbs)),
        other => return Err(format!("'{other}' is nothing to do slowly")),
    };
    let who = Who::of(options)?;
    let hello = match act {
        Act::HelloDrip => hello(who.model(options.to).await?).ok_or("no hello can be made")?,
        _ => Vec::new(),
    };
    let notes = Notes(Arc::default(), hello.into());
    let until = Instant::now() + options.seconds;
    let mut places = JoinSet::new();
    for _ in 0..options.places {
        let endpoint = who.endpoint(options.protocol, way)?;
        let (notes, options) = (notes.clone(), options.clone());
        places.spawn(async move {
            while Instant::now() < until {
                visit(&endpoint, &options, act, (&notes, until)).await;
                sleep(PAUSE).await;
            }
        });
    }
    while places.join_next().await.is_some() {}
    let seen = notes.now();
    Ok(json!({
        "connected": seen.connected,
        "refused": seen.refused,
        "closed": seen.closed,
        "oldest_s": seen.oldest_s,
        "streams": seen.streams,
        "oldest_stream_s": seen.oldest_stream_s,
        "bytes": seen.bytes,
    }))
}

/// One connection, from its first packet to its end or ours.
async fn visit(endpoint: &quinn::Endpoint, options: &Options, act: Act, (notes, until): (&Notes, Instant)) {
    let began = Instant::now();
    let living = async {
        let connecting = endpoint.connect(options.to, "moemesh").map_err(|error| error.to_string())?;
        let connection = connecting.await.map_err(|error| reason(&error))?;
        notes.now().connected += 1;
        let error = tokio::select! {
            error = connection.closed() => error,
            never = perform(act, options.protocol, &connection, notes) => match never {},
        };
        *notes.now().closed.entry(reason(&error)).or_default() += 1;
        Ok::<(), String>(())
    };
    let lived = timeout_at(until, living).await;
    let mut seen = notes.now();
    seen.oldest_s = seen.oldest_s.max(began.elapsed().as_secs_f64());
    if let Ok(Err(reason)) = lived {
        *seen.refused.entry(reason).or_default() += 1;
    }
}

/// Nothing that ends.
enum Never {}

/// Does the act for as long as the connection is there.
async fn perform(act: Act, protocol: Protocol, connection: &Connection, notes: &Notes) -> Never {
    match act {
        Act::Silent => {}
        Act::Drip | Act::HelloDrip | Act::Pour => {
            let streams = if protocol == Protocol::Weights { STREAMS } else { 1 };
            let mut all = JoinSet::new();
            for _ in 0..streams {
                let (connection, notes) = (connection.clone(), notes.clone());
                all.spawn(async move { while stream(act, protocol, &connection, &notes).await.is_some() {} });
            }
            if protocol == Protocol::Join {
                // The stream that the router opens, besides.
                let (connection, notes) = (connection.clone(), notes.clone());
                all.spawn(async move {
                    while let Ok(streams) = connection.accept_bi().await {
                        occupy(act, protocol, streams, &notes).await;
                    }
                });
            }
            while all.join_next().await.is_some() {}
        }
        Act::Loop => {
            while let Ok((mut send, mut recv)) = connection.open_bi().await {
                notes.now().streams += 1;
                drop(send.write_all(&[1]).await);
                drop((send.reset(0_u32.into()), recv.stop(0_u32.into())));
            }
        }
    }
    std::future::pending().await
}

/// One stream of ours; `None` once there are no more.
async fn stream(act: Act, protocol: Protocol, connection: &Connection, notes: &Notes) -> Option<()> {
    let streams = connection.open_bi().await.ok()?;
    occupy(act, protocol, streams, notes).await;
    Some(())
}

/// Keeps a stream busy until the other side has had enough.
async fn occupy(act: Act, protocol: Protocol, (mut send, recv): (SendStream, RecvStream), notes: &Notes) {
    tokio::select! {
        () = write(act, protocol, &mut send, notes) => {}
        () = read(recv) => {}
    }
}

/// Until the stream ends, or nobody has it any more.
async fn read(mut recv: RecvStream) {
    while let Ok(Some(_)) = recv.read_chunk(usize::MAX, true).await {}
}

async fn write(act: Act, protocol: Protocol, send: &mut SendStream, notes: &Notes) {
    // A stream lives from the first byte that is taken: until then the other side knows nothing of it.
    let mut life = None;
    if act == Act::HelloDrip && send.write_all(&notes.1).await.is_err() {
        return;
    }
    let mut bytes = opening(act, protocol).into_iter().chain(std::iter::repeat(0));
    loop {
        let written = match act {
            Act::Pour => send.write(&PIECE).await.unwrap_or(0),
            _ => send.write(&[bytes.next().unwrap_or(0)]).await.unwrap_or(0),
        };
        if written == 0 {
            return;
        }
        life.get_or_insert_with(|| Life::begin(notes));
        notes.wrote(written);
        if act != Act::Pour {
            sleep(DRIP).await;
        }
    }
}

/// What a stream of this protocol begins with.
fn opening(act: Act, protocol: Protocol) -> Vec<u8> {
    let (op, length) = match (protocol, act) {
        (Protocol::Join, _) => return b"moemesh-proof-1\n".to_vec(),
        (Protocol::Mesh, Act::HelloDrip) => (Op::Health, 64_u32),
        (Protocol::Mesh, _) => (Op::Hello, 64),
        (Protocol::Weights, _) => (Op::AskHashes, 64),
    };
    let mut bytes = Vec::with_capacity(HEADER_BYTES);
    bytes.extend(length.to_le_bytes());
    bytes.extend((op as u16).to_le_bytes());
    bytes.extend([0, 0]);
    bytes
}

/// How a node of this model without any memory introduces itself: nothing is placed on it.
pub(crate) fn hello(model: [u8; 32]) -> Option<Vec<u8>> {
    let hello = Hello {
        model,
        name: "nuisance".into(),
        version: "0".into(),
        kernels: "none".into(),
        threads: 1,
        exact: true,
        weight_mb_s: [1; 5],
        instance: u64::from(std::process::id()),
        ..Hello::default()
    };
    let frame = Message::Hello(hello).encode(&Pool::new(1 << 20)).ok()?;
    Some(frame.frame().to_vec())
}
