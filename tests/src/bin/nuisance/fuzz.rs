//! Bytes that no honest machine sends, at every place where an authenticated connection takes some.
//!
//! They are the committed inputs of the fuzz targets, bent or with a frame's header before them, so that they get as far
//! as the parser behind it: as first message, as control messages after a hello, as answers on streams that the
//! router opens, as questions about weights, as proofs of a machine that joins; and packets of QUIC itself that are bent
//! inside of their encryption.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use mesh_wire::frame::Op;
use quinn::{Connection, SendStream};
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use crate::Options;
use crate::dial::{Protocol, Who, reason};
use crate::dice::Dice;
use crate::slow::hello;
use crate::tamper::Way;

/// Streams of a connection before there is another one.
const STREAMS: usize = 64;

/// Messages on a control stream before there is another connection.
const MESSAGES: usize = 32;

/// For an answer to a question.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// For one connection.
const VISIT_WITHIN: Duration = Duration::from_secs(3);

/// Between two connections: the router lets ten machines join per second.
const PAUSE: Duration = Duration::from_millis(20);

/// One connection in so many has bent packets instead.
const PACKETS_EVERY: usize = 4;

/// What was sent, and how it ended.
#[derive(Debug, Default)]
struct Seen {
    connections: u64,
    inputs: u64,
    bytes: u64,
    answers: u64,
    ends: BTreeMap<String, u64>,
}

/// What all connections share.
#[derive(Debug)]
struct Feed {
    inputs: Vec<Vec<u8>>,
    hello: Vec<u8>,
    dice: Mutex<Dice>,
    seen: Mutex<Seen>,
}

impl Feed {
    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn dice(&self) -> MutexGuard<'_, Dice> {
        self.dice.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next input.
    fn next(&self) -> Vec<u8> {
        let mut dice = self.dice();
        let mut bytes = self.inputs[dice.below(self.inputs.len())].clone();
        if dice.below(4) != 0 {
            dice.bend(&mut bytes);
        }
        if dice.below(2) == 0 {
            let op = Op::ALL[dice.below(Op::ALL.len())];
            let skipped = [0, 1, 2, 8][dice.below(4)].min(bytes.len());
            let body = bytes.split_off(skipped);
            bytes = (body.len() as u32).to_le_bytes().to_vec();
            bytes.extend((op as u16).to_le_bytes());
            bytes.extend([0, 0]);
            bytes.extend(body);
        }
        let mut seen = self.seen();
        seen.inputs += 1;
        seen.bytes += bytes.len() as u64;
        bytes
    }

    async fn send(&self, stream: &mut SendStream) -> Option<()> {
        let bytes = self.next();
        stream.write_all(&bytes).await.ok()
    }
}

/// Files of the folders in a folder, in the order of their names.
fn read_inputs(folder: &Path) -> std::io::Result<Vec<Vec<u8>>> {
    let mut paths = Vec::new();
    for target in std::fs::read_dir(folder)? {
        for file in std::fs::read_dir(target?.path())? {
            paths.push(file?.path());
        }
    }
    paths.sort();
    paths.iter().map(std::fs::read).collect()
}

/// What the router serves. Others of us are at it already, so the question may be lost among what they send.
async fn model(who: &Who, options: &Options) -> Result<[u8; 32], String> {
    let until = Instant::now() + options.seconds;
    loop {
        match who.model(options.to).await {
            Err(_) if Instant::now() < until => sleep(PAUSE).await,
            said => return said,
        }
    }
}

/// Sends inputs for as long as told; what came of it.
pub(crate) async fn run(options: &Options) -> Result<Value, String> {
    let inputs = read_inputs(&options.corpus).map_err(|error| error.to_string())?;
    if inputs.is_empty() {
        return Err(format!("no inputs in {}", options.corpus.display()));
    }
    let (dice, seen) = (Mutex::new(Dice::new(options.seed)), Mutex::default());
    let who = Who::of(options)?;
    let hello = match options.protocol {
        Protocol::Mesh => hello(model(&who, options).await?).ok_or("no hello can be made")?,
        Protocol::Join | Protocol::Weights => Vec::new(),
    };
    let feed = Arc::new(Feed { inputs, hello, dice, seen });
    let until = Instant::now() + options.seconds;
    let mut places = JoinSet::new();
    for _ in 0..options.places {
        let (who, feed, options) = (who.clone(), Arc::clone(&feed), options.clone());
        places.spawn(async move {
            while Instant::now() < until {
                let visited = timeout_at(until, visit(&who, &feed, &options)).await;
                let end = visited.unwrap_or_else(|_| Ok("our time was up".to_owned()));
                *feed.seen().ends.entry(end.unwrap_or_else(|error| error)).or_default() += 1;
                sleep(PAUSE).await;
            }
        });
    }
    while places.join_next().await.is_some() {}
    let seen = feed.seen();
    Ok(json!({
        "connections": seen.connections,
        "inputs": seen.inputs,
        "bytes": seen.bytes,
        "answers": seen.answers,
        "ends": seen.ends,
    }))
}

/// One connection; how it ended.
async fn visit(who: &Who, feed: &Arc<Feed>, options: &Options) -> Result<String, String> {
    let way = {
        let mut dice = feed.dice();
        (dice.below(PACKETS_EVERY) == 0).then(|| Way::Fuzz(dice.next()))
    };
    let endpoint = who.endpoint(options.protocol, way)?;
    let connecting = endpoint.connect(options.to, "moemesh").map_err(|error| error.to_string())?;
    let connection = timeout(VISIT_WITHIN, connecting).await;
    let connection = connection.map_err(|_| "no handshake")?.map_err(|error| reason(&error))?;
    feed.seen().connections += 1;
    let doing = async {
        match options.protocol {
            Protocol::Mesh => control(feed, &connection).await,
            Protocol::Join => proof(feed, &connection).await,
            Protocol::Weights => questions(feed, &connection).await,
        }
        // Without answers to nonsense the other side ends the connection; this is for what was in order.
        connection.close(0_u32.into(), b"");
    };
    Ok(tokio::select! {
        error = connection.closed() => reason(&error),
        done = timeout(VISIT_WITHIN, doing) => if done.is_ok() { "done".to_owned() } else { "still open".to_owned() },
    })
}

/// Messages of a node, and answers on the streams that the router opens meanwhile.
async fn control(feed: &Arc<Feed>, connection: &Connection) {
    let (connection, feed) = (connection.clone(), Arc::clone(feed));
    let Ok((mut send, mut recv)) = connection.open_bi().await else { return };
    let introduces = feed.dice().below(4) != 0;
    if introduces && send.write_all(&feed.hello).await.is_err() {
        return;
    }
    let speaking = async {
        for _ in 0..MESSAGES {
            if feed.send(&mut send).await.is_none() {
                return;
            }
            sleep(PAUSE).await;
        }
    };
    let answering = async {
        while let Ok((mut send, mut recv)) = connection.accept_bi().await {
            // What was asked does not matter.
            drop(timeout(PAUSE, recv.read_chunk(1 << 20, true)).await);
            while feed.send(&mut send).await.is_some() {
                feed.seen().answers += 1;
                sleep(PAUSE).await;
            }
        }
    };
    let hearing = async { while let Ok(Some(_)) = recv.read_chunk(1 << 20, true).await {} };
    tokio::select! {
        () = speaking => {}
        () = answering => {}
        () = hearing => {}
    }
}

/// Questions about weights.
async fn questions(feed: &Arc<Feed>, connection: &Connection) {
    let mut all = JoinSet::new();
    for _ in 0..STREAMS {
        let Ok((mut send, mut recv)) = connection.open_bi().await else { return };
        if feed.send(&mut send).await.is_some() {
            // Fails only where the stream is closed already.
            drop(send.finish());
        }
        let feed = Arc::clone(feed);
        all.spawn(async move {
            if let Ok(Ok(Some(_))) = timeout(ANSWER_WITHIN, recv.read_chunk(1 << 20, true)).await {
                feed.seen().answers += 1;
            }
        });
        while all.try_join_next().is_some() {}
    }
    while all.join_next().await.is_some() {}
}

/// A proof of whoever joins.
async fn proof(feed: &Arc<Feed>, connection: &Connection) {
    let Ok((mut send, mut recv)) = connection.accept_bi().await else { return };
    if feed.send(&mut send).await.is_some() {
        // Fails only where the stream is closed already.
        drop(send.finish());
    }
    while let Ok(Some(_)) = recv.read_chunk(1 << 20, true).await {
        feed.seen().answers += 1;
    }
}
