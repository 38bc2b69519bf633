//! A libp2p peer that floods: connections as fast as they are taken, and on each of them one thing that is wrong.
//!
//! TCP, multistream-select and yamux are spoken by hand, so that nothing keeps them in order; Noise is libp2p's, as its
//! handshake has to be right for anything behind it to be tried. What comes back is counted: a stranger must never
//! get an answer on a stream.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use libp2p::core::upgrade::OutboundConnectionUpgrade;
use libp2p::futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::identity::Keypair;
use libp2p::noise;
use libp2p::tcp::tokio::TcpStream;
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::Options;
use crate::dial::Who;
use crate::dice::Dice;

/// Connections at a time.
const AT_ONCE: usize = 256;

/// For one connection: longer than any limit of the other side.
const LIFE: Duration = Duration::from_secs(8);

/// To look for answers once all is written.
const LISTEN: Duration = Duration::from_millis(300);

/// Streams that are opened on a connection: more than are allowed.
const STREAMS: u32 = 64;

/// Bytes of a question that has none.
const QUESTION_BYTES: usize = 1 << 20;

/// What a multistream-select dialogue begins with.
const HELLO: &[u8] = b"\x13/multistream/1.0.0\n";

/// Kinds of yamux frames, and the flag that opens a stream.
const DATA_KIND: u8 = 0;
const WINDOW_KIND: u8 = 1;
const PING_KIND: u8 = 2;
const SYN: u16 = 1;

/// What is wrong with a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Wrong {
    /// It is opened, and nothing is said.
    Silent,
    /// The handshake ends in the middle.
    Half,
    /// Noise in the place of Noise.
    Noise,
    /// After the handshake, bytes that are no protocol.
    Garbage,
    /// Ten thousand proposals of protocols.
    Proposals,
    /// Streams without end.
    Streams,
    /// A question of a megabyte, to this protocol and to one that is not there.
    Question,
    Gossip,
    /// Pings, and credit for streams that do not exist.
    Control,
}

const ALL: [Wrong; 9] = [
    Wrong::Silent,
    Wrong::Half,
    Wrong::Noise,
    Wrong::Garbage,
    Wrong::Proposals,
    Wrong::Streams,
    Wrong::Question,
    Wrong::Gossip,
    Wrong::Control,
];

#[derive(Debug, Default)]
struct Seen {
    tried: u32,
    connected: u32,
    /// Handshakes that were completed.
    secured: u32,
    by: BTreeMap<String, u32>,
    bytes: u64,
    /// Answers of protocols on streams.
    answers: u32,
}

type Notes = Arc<Mutex<Seen>>;

/// Floods; what came of it.
pub(crate) async fn run(options: &Options) -> Result<Value, String> {
    let who = Who::of(options)?;
    let key = Keypair::ed25519_from_bytes(*who.identity.seed()).map_err(|error| error.to_string())?;
    let notes = Notes::default();
    let places = Arc::new(Semaphore::new(AT_ONCE));
    let began = Instant::now();
    let mut dice = Dice::new(options.seed);
    let mut all = JoinSet::new();
    let mut number = 0;
    while began.elapsed() < options.seconds {
        sleep_until(began + Duration::from_secs(1) * number / options.rate).await;
        number += 1;
        while all.try_join_next().is_some() {}
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
        let (wrong, seed) = (ALL[dice.below(ALL.len())], dice.next());
        let (notes, key, options) = (Arc::clone(&notes), key.clone(), options.clone());
        all.spawn(async move {
            let _place = place;
            note(&notes, |seen| seen.tried += 1);
            let done = timeout(LIFE, attack(&options, &key, wrong, (&notes, seed))).await;
            let how = match done {
                Ok(Ok(())) => "done".to_owned(),
                Ok(Err(error)) => error,
                Err(_) => "outlived us".to_owned(),
            };
            note(&notes, |seen| *seen.by.entry(format!("{wrong:?}: {how}")).or_default() += 1);
        });
    }
    while all.join_next().await.is_some() {}
    let seen = notes.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(json!({
        "tried": seen.tried,
        "connected": seen.connected,
        "secured": seen.secured,
        "answers": seen.answers,
        "bytes": seen.bytes,
        "by": seen.by,
    }))
}

fn note(notes: &Notes, change: impl FnOnce(&mut Seen)) {
    change(&mut notes.lock().unwrap_or_else(PoisonError::into_inner));
}

/// One connection.
async fn attack(
    options: &Options,
    key: &Keypair,
    wrong: Wrong,
    (notes, seed): (&Notes, u64),
) -> Result<(), String> {
    let say = |error: std::io::Error| error.kind().to_string();
    let tcp = tokio::net::TcpStream::connect(options.to).await.map_err(say)?;
    note(notes, |seen| seen.connected += 1);
    let mut tcp = TcpStream(tcp);
    let mut dice = Dice::new(seed);
    match wrong {
        Wrong::Silent => return listen(&mut tcp, LIFE).await.map(drop).map_err(say),
        Wrong::Half => {
            tcp.write_all(&[HELLO, b"\x07/noise\n", &[0, 32], &[9; 16]].concat()).await.map_err(say)?;
            return listen(&mut tcp, LIFE).await.map(drop).map_err(say);
        }
        Wrong::Noise => {
            let bytes = dice.bytes(64 << 10);
            tcp.write_all(&[HELLO, b"\x07/noise\n", &bytes].concat()).await.map_err(say)?;
            return listen(&mut tcp, LIFE).await.map(drop).map_err(say);
        }
        _ => {}
    }
    choose(&mut tcp, b"\x07/noise\n").await.map_err(say)?;
    let noise = noise::Config::new(key).map_err(|error| error.to_string())?;
    let (_, mut inner) = noise.upgrade_outbound(tcp, "/noise").await.map_err(|error| error.to_string())?;
    note(notes, |seen| seen.secured += 1);
    let told = flood(&mut inner, wrong, &mut dice, notes).await;
    // Whatever came of writing: what was answered counts.
    let answered = listen(&mut inner, LISTEN).await.unwrap_or_default();
    if wrong != Wrong::Garbage && wrong != Wrong::Proposals {
        let answers = answered.windows(HELLO.len()).filter(|window| *window == HELLO).count();
        note(notes, |seen| seen.answers += answers as u32);
    }
    told.map_err(say)
}

/// Agrees on a protocol.
async fn choose<T: AsyncRead + AsyncWrite + Unpin>(io: &mut T, protocol: &[u8]) -> std::io::Result<()> {
    io.write_all(&[HELLO, protocol].concat()).await?;
    io.flush().await?;
    let mut answer = vec![0; HELLO.len() + protocol.len()];
    io.read_exact(&mut answer).await
}

/// What comes, until the end or for so long.
async fn listen<T: AsyncRead + Unpin>(io: &mut T, most: Duration) -> std::io::Result<Vec<u8>> {
    let mut heard = Vec::new();
    let reading = async {
        let mut bytes = [0; 4096];
        loop {
            match io.read(&mut bytes).await? {
                0 => return Ok(()),
                read => heard.extend_from_slice(&bytes[..read]),
            }
        }
    };
    match timeout(most, reading).await {
        Ok(Err(error)) if heard.is_empty() => Err(error),
        _ => Ok(heard),
    }
}

/// A yamux frame.
fn yamux(kind: u8, flags: u16, stream: u32, (length, body): (u32, &[u8])) -> Vec<u8> {
    let mut frame = vec![0, kind];
    frame.extend(flags.to_be_bytes());
    frame.extend(stream.to_be_bytes());
    frame.extend(length.to_be_bytes());
    frame.extend(body);
    frame
}

fn data_frame(flags: u16, stream: u32, body: &[u8]) -> Vec<u8> {
    yamux(DATA_KIND, flags, stream, (body.len() as u32, body))
}

/// Behind the handshake.
async fn flood<T: AsyncRead + AsyncWrite + Unpin>(
    io: &mut T,
    wrong: Wrong,
    dice: &mut Dice,
    notes: &Notes,
) -> std::io::Result<()> {
    let mut frames: Vec<Vec<u8>> = Vec::new();
    match wrong {
        Wrong::Garbage => frames.extend((0..16).map(|_| dice.bytes(4096))),
        Wrong::Proposals => {
            frames.push(HELLO.to_vec());
            frames.extend((0..10_000).map(|number| format!("\x0b/no/{number:06}\n").into_bytes()));
        }
        _ => {
            choose(io, b"\x0d/yamux/1.0.0\n").await?;
            let opened = |stream: u32, protocol: &[u8]| data_frame(SYN, stream, &[HELLO, protocol].concat());
            match wrong {
                Wrong::Streams => {
                    frames.extend((0..STREAMS).map(|at| opened(2 * at + 1, b"\x11/moemesh/where/1\n")));
                }
                Wrong::Control => {
                    frames.extend((0..1000).map(|at| yamux(PING_KIND, SYN, 0, (at, &[]))));
                    frames.extend((0..1000).map(|at| yamux(WINDOW_KIND, 0, 2 * at + 1, (u32::MAX, &[]))));
                }
                _ => {
                    let gossips = wrong == Wrong::Gossip;
                    let protocol: &[u8] =
                        if gossips { b"\x0f/meshsub/1.1.0\n" } else { b"\x11/moemesh/where/1\n" };
                    frames.push(opened(1, protocol));
                    let piece = dice.bytes(16 << 10);
                    frames.extend((0..QUESTION_BYTES / piece.len()).map(|_| data_frame(0, 1, &piece)));
                }
            }
        }
    }
    for frame in frames {
        io.write_all(&frame).await?;
        note(notes, |seen| seen.bytes += frame.len() as u64);
    }
    io.flush().await
}
