//! Weights between machines: who gets which, and what becomes of lenders and borrowers that break the protocol.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mesh_wire::buffer::Pool;
use mesh_wire::frame::{ALPN, CHUNK_BYTES_MAX, FrameError, Op};
use mesh_wire::id::{ExpertKey, Slice};
use mesh_wire::message::Message;
use mesh_wire::weights::{Catalogue, Chunk, Fetch, Hash, Holder, Reason, Weights};
use quinn::{Connection, SendStream};
use tokio::runtime::Runtime;

use super::harness::{Keys, LONG, MODEL, Running, frame, hub_config, keys, listen_anywhere, runtime};
use crate::borrower::{self, BorrowError, Patience};
use crate::endpoint::{self, Listener, dialer_with};
use crate::exchange::{Exchange, ExchangeConfig, Origin};
use crate::hub::{Hub, HubConfig, Lending};
use crate::identity::Identity;
use crate::shelf::{Blob, NotLent, Shelf};
use crate::stream::{read_frame, write_frame};
use crate::tls::{self, JOIN_ALPN, SERVER_NAME, WEIGHTS_ALPN};

/// Three chunks and a bit.
const BYTES: usize = 3 * CHUNK_BYTES_MAX + 77;

fn slice(expert: u16) -> Slice {
    Slice { key: ExpertKey { layer: 0, expert }, from: 0, to: 1 }
}

fn content(expert: u16) -> Vec<u8> {
    (0..BYTES).map(|at| (at * 13 + at / 509) as u8 ^ expert as u8).collect()
}

fn hash_of(expert: u16) -> Hash {
    *blake3::hash(&content(expert)).as_bytes()
}

fn fetch(expert: u16, from: u64) -> Fetch {
    Fetch { slice: slice(expert), hash: hash_of(expert), from }
}

/// Experts in memory.
#[derive(Debug, Default)]
struct Memory {
    catalogue: Option<Catalogue>,
    blobs: Mutex<BTreeMap<Hash, Vec<u8>>>,
}

impl Memory {
    fn node() -> Arc<Memory> {
        Arc::default()
    }

    fn router() -> Arc<Memory> {
        let memory = Memory { catalogue: Some(catalogue()), ..Memory::default() };
        (0..4).for_each(|expert| memory.put(expert));
        Arc::new(memory)
    }

    fn put(&self, expert: u16) {
        self.blobs.lock().unwrap().insert(hash_of(expert), content(expert));
    }
}

fn catalogue() -> Catalogue {
    Catalogue {
        fingerprint: MODEL,
        name: "four".into(),
        format: 1,
        hidden: 32,
        inter: 32,
        experts: 4,
        layers: vec![(0, 0), (1, -3)],
    }
}

struct Bytes(Vec<u8>);

impl Blob for Bytes {
    fn bytes(&self) -> u64 {
        self.0.len() as u64
    }

    fn read(&mut self, from: u64, out: &mut [u8]) -> std::io::Result<()> {
        let from = from as usize;
        out.copy_from_slice(&self.0[from..from + out.len()]);
        Ok(())
    }
}

impl Shelf for Memory {
    fn catalogue(&self) -> Option<Catalogue> {
        self.catalogue.clone()
    }

    fn hashes(&self, slices: &[Slice]) -> Result<Vec<Hash>, NotLent> {
        match slices.iter().find(|slice| slice.key.expert > 3) {
            Some(_) => Err(NotLent::new(Reason::Absent, "the model has no expert 4")),
            None => Ok(slices.iter().map(|slice| hash_of(slice.key.expert)).collect()),
        }
    }

    fn open(&self, _: Slice, hash: Hash) -> Result<Box<dyn Blob>, NotLent> {
        let found = self.blobs.lock().unwrap().get(&hash).cloned();
        let absent = || NotLent::new(Reason::Absent, "it is not here");
        found.map(|bytes| Box::new(Bytes(bytes)) as Box<dyn Blob>).ok_or_else(absent)
    }
}

fn lending_hub(keys: &Keys) -> Hub {
    let weights = Some(Lending { shelf: Memory::router(), bytes_s: None });
    Hub::start(HubConfig { weights, ..hub_config(keys, listen_anywhere()) }).unwrap()
}

/// Small enough for a test, large enough for a busy machine where nothing is to be slow.
const PATIENT: Patience = Patience { silence: LONG, window: LONG, least_bytes_s: 1 };

fn exchange(keys: &Keys, node: usize, router: SocketAddr, shelf: Arc<Memory>) -> Exchange {
    impatient(keys, node, (router, shelf), PATIENT)
}

fn impatient(
    keys: &Keys,
    node: usize,
    (router, shelf): (SocketAddr, Arc<Memory>),
    patience: Patience,
) -> Exchange {
    let membership = keys.membership(&keys.nodes[node]);
    // As a node has it that the router has shown its roster.
    membership.hear(&crate::membership::shown((1, 1), &keys.authority.roster())).unwrap();
    let (routers, listen, lend_bytes_s) = (vec![router], listen_anywhere(), None);
    Exchange::start(ExchangeConfig { membership, routers, listen, shelf, lend_bytes_s, patience }).unwrap()
}

fn get(exchange: &Exchange, origin: Origin, fetch: Fetch) -> Result<Vec<u8>, BorrowError> {
    let mut delivery = exchange.order(origin, fetch, BYTES as u64)?;
    let (mut all, mut piece) = (Vec::new(), Vec::new());
    while delivery.next(&mut piece)? {
        all.extend_from_slice(&piece);
    }
    Ok(all)
}

fn known(runtime: &Runtime, exchange: &Exchange) -> Catalogue {
    runtime.block_on(exchange.catalogue()).unwrap()
}

#[test]
fn a_node_learns_what_there_is_and_gets_it_from_any_byte_on() {
    let (keys, runtime) = (keys(1), runtime());
    let hub = lending_hub(&keys);
    let exchange = exchange(&keys, 0, hub.local_addr(), Memory::node());
    assert_eq!(known(&runtime, &exchange), catalogue());
    assert_eq!(exchange.hashes(&[slice(2), slice(0)]).unwrap(), [hash_of(2), hash_of(0)]);
    let refused = exchange.hashes(&[slice(2), slice(9)]).unwrap_err();
    assert_eq!(refused, BorrowError::Refused(Reason::Absent, "the model has no expert 4".into()));
    for from in [0, 1, CHUNK_BYTES_MAX, CHUNK_BYTES_MAX + 1, BYTES - 1] {
        let got = get(&exchange, Origin::Router, fetch(1, from as u64)).unwrap();
        assert!(got == content(1)[from..], "from {from}");
    }
    let beyond = get(&exchange, Origin::Router, Fetch { from: BYTES as u64, ..fetch(1, 0) });
    assert_eq!(beyond.unwrap(), b"", "all of it is there");
    let unknown = get(&exchange, Origin::Router, Fetch { hash: [3; 32], ..fetch(1, 0) });
    assert!(matches!(unknown, Err(BorrowError::Refused(Reason::Absent, _))));
    let lent = hub.nodes()[0].counters.lent_bytes;
    assert!(lent > BYTES as u64, "{lent}");
}

#[test]
fn nodes_are_named_as_holders_and_lend_to_each_other() {
    let (keys, runtime) = (keys(2), runtime());
    let hub = lending_hub(&keys);
    let shelf = Memory::node();
    let first = exchange(&keys, 0, hub.local_addr(), Arc::clone(&shelf));
    let second = exchange(&keys, 1, hub.local_addr(), Memory::node());
    known(&runtime, &first);
    known(&runtime, &second);
    // Nobody serves yet.
    let all: Vec<_> = (0..4).map(slice).collect();
    assert!(second.holders(&all).unwrap().machines.is_empty());
    let _stations: Vec<_> = (0..2).map(|node| Running::start(&keys, node, vec![hub.local_addr()])).collect();
    assert!(hub.wait_ready(2, LONG));
    let held: Vec<bool> = (0..4)
        .map(|expert| {
            let holders = hub.routes().table.parts(0, expert)[0].holders;
            holders.contains(0)
        })
        .collect();
    assert!(held.contains(&true), "{held:?}");
    let holders = second.holders(&all).unwrap();
    let at = SocketAddr::from(([127, 0, 0, 1], first.port()));
    for (position, held) in held.iter().enumerate() {
        let named: Vec<Holder> = holders.holders_of(position).collect();
        let expected = Holder { id: keys.nodes[0].id(), address: at };
        assert_eq!(named.contains(&expected), *held, "expert {position}");
        assert!(named.iter().all(|holder| holder.id != keys.nodes[1].id()), "not the asker itself");
    }
    shelf.put(2);
    let origin = Origin::Peer(Holder { id: keys.nodes[0].id(), address: at });
    assert!(get(&second, origin, fetch(2, 100)).unwrap() == content(2)[100..]);
    assert!(matches!(get(&second, origin, fetch(1, 0)), Err(BorrowError::Refused(Reason::Absent, _))));
    second.rest();
    assert!(get(&second, origin, fetch(2, 0)).unwrap() == content(2), "it connects again");
    // Gone with its exchange.
    drop(first);
    assert!(matches!(get(&second, origin, fetch(2, 0)), Err(BorrowError::Gone(_))));
    let unnamed = (0..10_000).any(|_| second.holders(&all).unwrap().machines.is_empty());
    assert!(unnamed, "a machine that has gone is still named");
}

#[test]
fn weights_come_from_a_router_that_moved_once_it_is_found() {
    let (keys, runtime) = (keys(1), runtime());
    let hub = lending_hub(&keys);
    let membership = keys.membership(&keys.nodes[0]);
    let exchange = Exchange::start(ExchangeConfig {
        membership: Arc::clone(&membership),
        routers: vec![hub.local_addr()],
        listen: listen_anywhere(),
        shelf: Memory::node(),
        lend_bytes_s: None,
        patience: PATIENT,
    })
    .unwrap();
    known(&runtime, &exchange);
    // Both are there for a while, so that the new one has another port.
    let moved = lending_hub(&keys);
    drop(hub);
    // What nobody proved leads nowhere: another cluster's router lends nothing to this node.
    let other = super::harness::keys(0);
    let wrong = lending_hub(&other);
    membership.suggestions().suggest(keys.router(), moved.local_addr());
    membership.suggestions().suggest(keys.router(), wrong.local_addr());
    let began = std::time::Instant::now();
    let got = loop {
        match get(&exchange, Origin::Router, fetch(3, 0)) {
            // It is not known yet that the old one is gone, or where the new one is.
            Err(BorrowError::Gone(_)) if began.elapsed() < LONG => {}
            got => break got,
        }
    };
    assert!(got.unwrap() == content(3));
    assert_eq!(wrong.nodes().len(), 0);
    assert!(moved.nodes()[0].counters.lent_bytes >= BYTES as u64);
}

/// Dials with these protocols on offer, and asks for the catalogue.
fn ask_as(
    identity: &Identity,
    (to, at): (mesh_wire::id::NodeId, SocketAddr),
    protocols: &[&[u8]],
) -> Result<Weights, String> {
    runtime().block_on(async {
        let mut client = tls::borrower(identity, to).unwrap();
        client.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        let endpoint = dialer_with(identity, client, false).unwrap();
        let connection =
            endpoint.connect(at, SERVER_NAME).unwrap().await.map_err(|error| error.to_string())?;
        let (pool, question) = (Pool::new(1 << 20), Weights::AskCatalogue { port: 0 });
        let asked = borrower::ask(&connection, &pool, (&question, Op::Catalogue), LONG).await;
        asked.map_err(|error| format!("{error} {:?}", connection.close_reason()))
    })
}

#[test]
fn only_members_get_weights_at_the_router_and_at_nodes() {
    let (keys, runtime) = (keys(2), runtime());
    let hub = lending_hub(&keys);
    let exchange = exchange(&keys, 0, hub.local_addr(), Memory::node());
    known(&runtime, &exchange);
    let router = (keys.router(), hub.local_addr());
    let node = (keys.nodes[0].id(), SocketAddr::from(([127, 0, 0, 1], exchange.port())));
    let stranger = Identity::generate().unwrap();
    // A stranger may join; offering that beside weights gets it neither.
    for offered in [&[WEIGHTS_ALPN][..], &[WEIGHTS_ALPN, JOIN_ALPN], &[JOIN_ALPN, WEIGHTS_ALPN]] {
        for (to, at) in [router, node] {
            let refused = ask_as(&stranger, (to, at), offered).unwrap_err();
            assert!(refused.contains("certificate") || refused.contains("alert"), "{refused}");
        }
    }
    // A node serves no other protocol.
    for offered in [ALPN, JOIN_ALPN] {
        assert!(ask_as(&keys.nodes[1], node, &[offered]).is_err());
    }
    assert!(matches!(ask_as(&keys.nodes[1], router, &[WEIGHTS_ALPN]), Ok(Weights::Catalogue(_))));
    // Which model it is, a node does not say.
    let refused = ask_as(&keys.nodes[1], node, &[WEIGHTS_ALPN]).unwrap_err();
    assert!(refused.contains("the router says"), "{refused}");
    // Nor does one talk to a machine that took another's address.
    let there = Holder { id: keys.nodes[1].id(), address: node.1 };
    assert!(matches!(get(&exchange, Origin::Peer(there), fetch(0, 0)), Err(BorrowError::Gone(_))));
}

#[test]
fn a_revoked_node_gets_no_further_chunk_and_is_told() {
    let (keys, runtime) = (keys(2), runtime());
    let weights = Some(Lending { shelf: Memory::router(), bytes_s: Some(CHUNK_BYTES_MAX as u64) });
    let hub = Hub::start(HubConfig { weights, ..hub_config(&keys, listen_anywhere()) }).unwrap();
    let exchange = exchange(&keys, 0, hub.local_addr(), Memory::node());
    known(&runtime, &exchange);
    let mut delivery = exchange.order(Origin::Router, fetch(0, 0), BYTES as u64).unwrap();
    let mut piece = Vec::new();
    assert!(delivery.next(&mut piece).unwrap());
    hub.revoke("node-0").unwrap();
    let mut came = piece.len();
    let ended = loop {
        match delivery.next(&mut piece) {
            Ok(true) => came += piece.len(),
            ended => break ended,
        }
    };
    assert!(ended.is_err() && came < BYTES, "{came} bytes came");
    let told = loop {
        // The connection may not be known to be closed yet.
        match get(&exchange, Origin::Router, fetch(0, 0)).unwrap_err() {
            BorrowError::Gone(_) => {}
            error => break error,
        }
    };
    assert_eq!(told, BorrowError::Revoked);
}

#[test]
fn a_router_without_weights_says_so() {
    let keys = keys(1);
    let hub = super::harness::hub(&keys);
    let refused = ask_as(&keys.nodes[0], (keys.router(), hub.local_addr()), &[WEIGHTS_ALPN]).unwrap_err();
    assert!(refused.contains("lends no weights"), "{refused}");
}

/// A member that asks by hand.
struct Asker {
    runtime: Runtime,
    connection: Connection,
    pool: Pool,
    _endpoint: quinn::Endpoint,
}

impl Asker {
    fn dial(keys: &Keys, node: usize, router: SocketAddr) -> Asker {
        let runtime = runtime();
        let (endpoint, connection) = runtime.block_on(async {
            let endpoint = endpoint::outward(&keys.nodes[node], false).unwrap();
            let setup = endpoint::borrowing(&keys.nodes[node], keys.router()).unwrap();
            let connection = endpoint.connect_with(setup, router, SERVER_NAME).unwrap().await.unwrap();
            (endpoint, connection)
        });
        Asker { runtime, connection, pool: Pool::new(16 << 20), _endpoint: endpoint }
    }

    /// What is answered to these bytes.
    fn answer(&self, bytes: &[u8]) -> Result<Weights, String> {
        self.runtime.block_on(async {
            let (mut send, mut recv) = self.connection.open_bi().await.map_err(|error| error.to_string())?;
            send.write_all(bytes).await.map_err(|error| error.to_string())?;
            drop(send.finish());
            let frame =
                read_frame(&mut recv, &self.pool, &[Op::Catalogue, Op::WeightsRefused, Op::Hashes]).await;
            let frame = frame.map_err(|error| error.to_string())?.ok_or("no answer")?;
            Weights::decode(&frame).map_err(|error| error.to_string())
        })
    }

    fn ask(&self, question: &Weights) -> Result<Weights, String> {
        self.answer(question.encode(&self.pool).unwrap().frame())
    }
}

#[test]
fn questions_that_make_no_sense_are_refused_by_name_and_harm_nobody() {
    let keys = keys(1);
    let hub = lending_hub(&keys);
    let asker = Asker::dial(&keys, 0, hub.local_addr());
    let malformed = |outcome: Result<Weights, String>| match outcome {
        Ok(Weights::Refused(Reason::Malformed, detail)) => detail,
        other => panic!("{other:?}"),
    };
    // Other operations, bodies that are none, a question that is an answer.
    assert!(malformed(asker.answer(&frame(Op::Call, &[0; 8]))).contains("does not belong"));
    assert!(malformed(asker.answer(&[255; 64])).contains("unknown"));
    assert!(malformed(asker.answer(&frame(Op::Fetch, &[7; 60]))).contains("not a valid Fetch"));
    assert!(malformed(asker.ask(&Weights::Hashes(vec![[0; 32]]))).contains("does not belong"));
    assert!(malformed(asker.answer(&[])).contains("without a question"));
    let cut = Weights::AskHashes(vec![slice(0)]).encode(&asker.pool).unwrap();
    assert!(malformed(asker.answer(&cut.frame()[..cut.frame().len() - 1])).contains("within a frame"));
    // Bytes beyond the end, and as far as numbers go.
    for from in [BYTES as u64, BYTES as u64 + 1, u64::MAX] {
        let detail = malformed(asker.ask(&Weights::Fetch(fetch(0, from))));
        assert!(detail.contains(&BYTES.to_string()), "{detail}");
    }
    assert!(matches!(asker.ask(&Weights::AskCatalogue { port: 0 }), Ok(Weights::Catalogue(_))));
}

#[test]
fn a_member_has_a_few_streams_and_one_connection() {
    let keys = keys(1);
    let hub = lending_hub(&keys);
    let asker = Asker::dial(&keys, 0, hub.local_addr());
    assert!(asker.ask(&Weights::AskCatalogue { port: 0 }).is_ok());
    let opened = asker.runtime.block_on(async {
        let mut streams = Vec::new();
        // Streams that say nothing are kept open; the ninth is not to be had.
        while let Ok(Ok((mut send, recv))) =
            tokio::time::timeout(Duration::from_millis(500), asker.connection.open_bi()).await
        {
            send.write_all(&[0]).await.unwrap();
            streams.push((send, recv));
        }
        streams.len()
    });
    // The one that was answered may not count as closed yet.
    assert!((7..=8).contains(&opened), "{opened}");
    let second = Asker::dial(&keys, 0, hub.local_addr());
    assert!(second.ask(&Weights::AskCatalogue { port: 0 }).is_ok());
    let closed = asker.runtime.block_on(asker.connection.closed()).to_string();
    assert!(closed.contains("took its place"), "{closed}");
}

/// A node that lends as a script says.
struct Hostile {
    address: SocketAddr,
    _runtime: Runtime,
}

/// What a hostile lender does with a stream on which it was asked.
#[derive(Clone, Copy, Debug)]
enum Script {
    /// Says nothing.
    Silent,
    /// A byte at a time, forever.
    Drips,
    /// The right bytes as if they were others'.
    Elsewhere,
    /// Goes on after the last byte, and before.
    Endless,
    /// Ends before the last byte.
    Short,
    /// Resets the stream.
    Resets,
    /// Announces more than a chunk may have.
    Huge,
    /// Says something else.
    Chats,
}

impl Hostile {
    fn start(keys: &Keys, node: usize, script: Script) -> Hostile {
        let runtime = runtime();
        let members = keys.authority.members();
        let identity = keys.nodes[node].clone();
        let listener = {
            let _entered = runtime.enter();
            Listener::lending(&identity, members, listen_anywhere()).unwrap()
        };
        let address = listener.endpoint.local_addr().unwrap();
        runtime.spawn(async move {
            let incoming = listener.endpoint.accept().await.unwrap();
            let connection = listener.accept(incoming).await.unwrap();
            connection.set_max_concurrent_bi_streams(8_u32.into());
            let pool = Pool::new(16 << 20);
            while let Ok((send, mut recv)) = connection.accept_bi().await {
                read_frame(&mut recv, &pool, &[Op::Fetch]).await.unwrap();
                play(script, send, &pool).await;
            }
        });
        Hostile { address, _runtime: runtime }
    }
}

fn chunk(pool: &Pool, from: usize, bytes: &[u8]) -> mesh_wire::buffer::Buffer {
    let written = Chunk::write(pool, (from as u64, bytes.len()), |out| {
        out.copy_from_slice(bytes);
        Ok::<(), FrameError>(())
    });
    written.unwrap()
}

async fn play(script: Script, mut send: SendStream, pool: &Pool) {
    let all = content(0);
    match script {
        Script::Silent => std::future::pending().await,
        Script::Drips => {
            for at in 0..all.len() {
                // Fails once the borrower has had enough.
                if write_frame(&mut send, chunk(pool, at, &all[at..=at])).await.is_err() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
        Script::Elsewhere => drop(write_frame(&mut send, chunk(pool, 50, &all[..100])).await),
        Script::Endless => {
            let most = &all[..CHUNK_BYTES_MAX];
            for at in 0..10 {
                drop(write_frame(&mut send, chunk(pool, at * CHUNK_BYTES_MAX, most)).await);
            }
        }
        Script::Short => {
            drop(write_frame(&mut send, chunk(pool, 0, &all[..100])).await);
            drop(send.finish());
            drop(send.stopped().await);
        }
        Script::Resets => drop(send.reset(3_u32.into())),
        Script::Huge => {
            let mut header = frame(Op::Chunk, &[]);
            header[..4].copy_from_slice(&(64_u32 << 20).to_le_bytes());
            drop(send.write_all(&header).await);
            drop(send.stopped().await);
        }
        Script::Chats => {
            drop(write_frame(&mut send, Message::Ping(3).encode(pool).unwrap()).await);
            drop(send.stopped().await);
        }
    }
}

#[test]
fn lenders_that_break_the_protocol_or_waste_time_are_told_apart() {
    let (keys, runtime) = (keys(2), runtime());
    let hub = lending_hub(&keys);
    let short = Patience { silence: Duration::from_millis(300), ..PATIENT };
    let slow = Patience { window: Duration::from_millis(300), least_bytes_s: 1 << 30, ..PATIENT };
    let outcome = |script, patience| {
        let hostile = Hostile::start(&keys, 1, script);
        let exchange = impatient(&keys, 0, (hub.local_addr(), Memory::node()), patience);
        known(&runtime, &exchange);
        let peer = Origin::Peer(Holder { id: keys.nodes[1].id(), address: hostile.address });
        let failed = get(&exchange, peer, fetch(0, 0)).unwrap_err();
        // The router is as good as ever.
        assert!(get(&exchange, Origin::Router, fetch(0, 0)).unwrap() == content(0), "{script:?}");
        failed
    };
    assert_eq!(outcome(Script::Silent, short), BorrowError::Silent(short.silence));
    assert!(matches!(outcome(Script::Drips, slow), BorrowError::Slow { bytes, .. } if bytes < 10_000));
    assert!(
        matches!(outcome(Script::Elsewhere, PATIENT), BorrowError::Wrong(why) if why.contains("from 50 on"))
    );
    assert!(
        matches!(outcome(Script::Endless, PATIENT), BorrowError::Wrong(why) if why.contains("are missing"))
    );
    assert!(
        matches!(outcome(Script::Short, PATIENT), BorrowError::Wrong(why) if why.contains("before the last"))
    );
    assert!(matches!(outcome(Script::Resets, PATIENT), BorrowError::Gone(_)));
    assert!(
        matches!(outcome(Script::Huge, PATIENT), BorrowError::Wrong(why) if why.contains("the limit is"))
    );
    assert!(
        matches!(outcome(Script::Chats, PATIENT), BorrowError::Wrong(why) if why.contains("does not belong"))
    );
}
