//! Sources that fail in every way, without a network.

use std::collections::HashMap;
use std::net::SocketAddr;

use mesh_wire::id::ExpertKey;

use super::*;

const BYTES: usize = 10_000;
const PIECE: usize = 1000;

/// What a source does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Serve,
    /// Says that it has it not.
    Absent,
    /// Cannot be reached.
    Gone,
    /// Sends so many bytes and then nothing.
    Stall(usize),
    /// Sends the right number of wrong bytes.
    Lie,
    /// Is busy so many times, then serves.
    Busy(usize),
    /// Breaks so many times after a piece, then serves.
    Break(usize),
}

#[derive(Debug)]
struct Scripted {
    ways: HashMap<Option<NodeId>, Way>,
    orders: Mutex<Vec<(Option<NodeId>, u16, u64)>>,
    pauses: AtomicU64,
}

impl Scripted {
    fn new(router: Way, peers: &[(u8, Way)]) -> Scripted {
        let peers = peers.iter().map(|(id, way)| (Some(NodeId([*id; 32])), *way));
        let ways = peers.chain([(None, router)]).collect();
        Scripted { ways, orders: Mutex::default(), pauses: AtomicU64::new(0) }
    }

    fn ordered(&self) -> Vec<(Option<NodeId>, u16, u64)> {
        std::mem::take(&mut self.orders.lock().unwrap())
    }
}

struct Pieces {
    bytes: Vec<u8>,
    at: usize,
    /// Where it ends, and how.
    end: (usize, Option<BorrowError>),
}

impl Chunks for Pieces {
    fn next(&mut self, out: &mut Vec<u8>) -> Result<bool, BorrowError> {
        out.clear();
        if self.at >= self.end.0 {
            return self.end.1.take().map_or(Ok(false), Err);
        }
        let to = (self.at + PIECE).min(self.end.0);
        out.extend_from_slice(&self.bytes[self.at..to]);
        self.at = to;
        Ok(true)
    }
}

fn content(expert: u16) -> Vec<u8> {
    (0..BYTES).map(|at| (at * 7 + at / 251) as u8 ^ expert as u8).collect()
}

impl Supply for Scripted {
    fn hashes(&self, _: &[Slice]) -> Result<Vec<Hash>, BorrowError> {
        unreachable!("fetching knows them")
    }

    fn holders(&self, _: &[Slice]) -> Result<Holders, BorrowError> {
        unreachable!("fetching knows them")
    }

    fn order(&self, origin: Origin, fetch: Fetch, bytes: u64) -> Result<Box<dyn Chunks>, BorrowError> {
        let id = match origin {
            Origin::Router => None,
            Origin::Peer(holder) => Some(holder.id),
        };
        let expert = fetch.slice.key.expert;
        let mut orders = self.orders.lock().unwrap();
        let before = orders.iter().filter(|(other, of, _)| (*other, *of) == (id, expert)).count();
        orders.push((id, expert, fetch.from));
        assert_eq!(bytes, BYTES as u64);
        let (all, at) = (content(expert), fetch.from as usize);
        let pieces =
            |bytes, end| -> Result<Box<dyn Chunks>, BorrowError> { Ok(Box::new(Pieces { bytes, at, end })) };
        let silent = BorrowError::Silent(Duration::from_secs(5));
        match self.ways[&id] {
            Way::Absent => Err(BorrowError::Refused(Reason::Absent, "not here".into())),
            Way::Gone => Err(BorrowError::Gone("no answer".into())),
            Way::Busy(times) if before < times => Err(BorrowError::Refused(Reason::Busy, "later".into())),
            Way::Stall(end) => pieces(all, (end.max(at), Some(silent))),
            Way::Break(times) if before < times => {
                pieces(all, ((at + PIECE).min(BYTES), Some(BorrowError::Gone("the connection broke".into()))))
            }
            Way::Lie => pieces(all.iter().map(|byte| byte ^ 1).collect(), (BYTES, None)),
            _ => pieces(all, (BYTES, None)),
        }
    }

    fn pause(&self, _: Duration) {
        self.pauses.fetch_add(1, Ordering::Relaxed);
    }

    fn rest(&self) {}
}

fn wanted(expert: u16, holders: &[u8]) -> Wanted {
    let holder = |id: &u8| Holder { id: NodeId([*id; 32]), address: SocketAddr::from(([10, 0, 0, *id], 1)) };
    Wanted {
        slice: Slice { key: ExpertKey { layer: 2, expert }, from: 0, to: 6 },
        hash: *blake3::hash(&content(expert)).as_bytes(),
        bytes: BYTES as u64,
        holders: holders.iter().map(holder).collect(),
    }
}

struct Run {
    store: Store,
    counts: Counts,
    ending: AtomicBool,
    _folder: tempfile::TempDir,
}

fn run() -> Run {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), None).unwrap();
    Run { store, counts: Counts::default(), ending: AtomicBool::new(false), _folder: folder }
}

impl Run {
    fn fetch(&self, supply: &Scripted, wanted: Vec<Wanted>) -> Result<(), FetchError> {
        let tools = Tools { supply, store: &self.store, ending: &self.ending, counts: &self.counts };
        fetch_all(tools, wanted)
    }

    #[track_caller]
    fn assert_has(&self, expert: u16) {
        let mut out = vec![0; BYTES];
        assert!(self.store.read(&wanted(expert, &[]).hash, &mut out).unwrap(), "expert {expert} is missing");
        assert_eq!(out, content(expert));
    }

    fn came(&self) -> (u64, u64, u64) {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (load(&self.counts.router_bytes), load(&self.counts.peer_bytes), load(&self.counts.failures))
    }
}

#[test]
fn experts_come_from_nodes_that_have_them_and_from_the_router_otherwise() {
    let (run, supply) = (run(), Scripted::new(Way::Serve, &[(1, Way::Serve), (2, Way::Serve)]));
    let all = (0..40).map(|expert| wanted(expert, if expert < 20 { &[1, 2] } else { &[] })).collect();
    run.fetch(&supply, all).unwrap();
    (0..40).for_each(|expert| run.assert_has(expert));
    let (router, peers, failures) = run.came();
    assert_eq!((router + peers, failures), (40 * BYTES as u64, 0));
    assert!(router >= 20 * BYTES as u64 && peers > 0);
    let orders = supply.ordered();
    assert!(orders.iter().all(|(origin, expert, from)| *from == 0 && (origin.is_none() || *expert < 20)));
    let done = [&run.counts.experts_done, &run.counts.experts_total, &run.counts.bytes_done]
        .map(|counter| counter.load(Ordering::Relaxed));
    assert_eq!(done, [40, 40, 40 * BYTES as u64]);
    assert!(!run.counts.busy.load(Ordering::Relaxed));
}

#[test]
fn what_a_stalling_node_has_sent_stays_and_the_next_goes_on_from_there() {
    let (run, supply) = (run(), Scripted::new(Way::Serve, &[(1, Way::Stall(3000))]));
    run.fetch(&supply, vec![wanted(5, &[1])]).unwrap();
    run.assert_has(5);
    assert_eq!(supply.ordered(), [(Some(NodeId([1; 32])), 5, 0), (None, 5, 3000)]);
    assert_eq!(run.came(), (7000, 3000, 1));
}

#[test]
fn a_node_that_sends_wrong_bytes_is_found_and_not_asked_again() {
    let (run, supply) = (run(), Scripted::new(Way::Serve, &[(1, Way::Lie)]));
    run.fetch(&supply, (0..9).map(|expert| wanted(expert, &[1])).collect()).unwrap();
    (0..9).for_each(|expert| run.assert_has(expert));
    let lied = supply.ordered().iter().filter(|(origin, ..)| origin.is_some()).count();
    assert!((1..=STREAMS).contains(&lied), "it was asked {lied} times");
    assert_eq!(run.came().2, lied as u64);
    assert_eq!(run.counts.bytes_done.load(Ordering::Relaxed), 9 * BYTES as u64, "wrong bytes do not count");
}

#[test]
fn after_a_mixture_of_sources_was_wrong_the_router_alone_is_asked() {
    // The first stalls after it has lied: the second's bytes are right and the whole is wrong.
    #[derive(Debug)]
    struct Mixed(Scripted);
    impl Supply for Mixed {
        fn hashes(&self, slices: &[Slice]) -> Result<Vec<Hash>, BorrowError> {
            self.0.hashes(slices)
        }
        fn holders(&self, slices: &[Slice]) -> Result<Holders, BorrowError> {
            self.0.holders(slices)
        }
        fn order(&self, origin: Origin, fetch: Fetch, bytes: u64) -> Result<Box<dyn Chunks>, BorrowError> {
            let first = matches!(origin, Origin::Peer(holder) if holder.id.0[0] == 1);
            let chunks = self.0.order(origin, fetch, bytes)?;
            if !first {
                return Ok(chunks);
            }
            let silent = Some(BorrowError::Silent(Duration::ZERO));
            Ok(Box::new(Pieces { bytes: vec![9; BYTES], at: 0, end: (2000, silent) }))
        }
        fn pause(&self, _: Duration) {}
        fn rest(&self) {}
    }
    let run = run();
    let supply = Mixed(Scripted::new(Way::Serve, &[(1, Way::Serve), (2, Way::Serve)]));
    let tools = Tools { supply: &supply, store: &run.store, ending: &run.ending, counts: &run.counts };
    fetch_all(tools, vec![wanted(0, &[1, 2])]).unwrap();
    run.assert_has(0);
    let asked: Vec<_> =
        supply.0.ordered().iter().map(|(origin, _, from)| (origin.map(|id| id.0[0]), *from)).collect();
    assert_eq!(asked, [(Some(1), 0), (Some(2), 2000), (None, 0)]);
}

#[test]
fn nodes_that_cannot_be_reached_are_dropped_at_once_and_slow_ones_after_three_times() {
    let (run, supply) =
        (run(), Scripted::new(Way::Serve, &[(1, Way::Gone), (2, Way::Stall(0)), (3, Way::Absent)]));
    run.fetch(&supply, (0..30).map(|expert| wanted(expert, &[1, 2, 3])).collect()).unwrap();
    (0..30).for_each(|expert| run.assert_has(expert));
    let orders = supply.ordered();
    let asked = |id: u8| orders.iter().filter(|(origin, ..)| *origin == Some(NodeId([id; 32]))).count();
    let (gone, stalled) = (asked(1), asked(2));
    assert!((1..=STREAMS_EACH).contains(&gone), "asked {gone} times");
    let most = STRIKES_MAX as usize + STREAMS_EACH - 1;
    assert!((STRIKES_MAX as usize..=most).contains(&stalled), "asked {stalled} times");
    assert!(asked(3) > 3, "to have it not is no failure");
    assert_eq!(run.came().2, (gone + stalled) as u64);
}

#[test]
fn a_router_that_is_busy_or_breaks_is_asked_again_and_goes_on_from_where_it_broke() {
    let (run, supply) = (run(), Scripted::new(Way::Busy(7), &[]));
    run.fetch(&supply, vec![wanted(1, &[])]).unwrap();
    assert_eq!((supply.ordered().len(), supply.pauses.load(Ordering::Relaxed)), (8, 7));
    let supply = Scripted::new(Way::Break(6), &[]);
    run.fetch(&supply, vec![wanted(2, &[])]).unwrap();
    run.assert_has(2);
    let from: Vec<_> = supply.ordered().iter().map(|(_, _, from)| *from).collect();
    assert_eq!(from, [0, 1000, 2000, 3000, 4000, 5000, 6000]);
}

#[test]
fn without_the_router_it_ends_with_the_expert_and_the_reason() {
    for (way, orders) in
        [(Way::Gone, ROUTER_FAILURES_MAX), (Way::Stall(0), ROUTER_FAILURES_MAX), (Way::Absent, 1)]
    {
        let (run, supply) = (run(), Scripted::new(way, &[]));
        let error = run.fetch(&supply, vec![wanted(7, &[])]).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, FetchError::Router { .. }) && text.contains("expert 7 of layer 2"), "{text}");
        assert_eq!(supply.ordered().len(), orders as usize, "{way:?}");
    }
    let (run, supply) = (run(), Scripted::new(Way::Lie, &[]));
    let error = run.fetch(&supply, vec![wanted(7, &[])]).unwrap_err();
    assert!(matches!(error, FetchError::Damaged { .. }), "{error}");
    assert!(error.to_string().contains("--cache"), "{error}");
}

#[test]
fn damaged_bytes_of_an_earlier_run_are_nobodys_fault() {
    let (run, supply) = (run(), Scripted::new(Way::Serve, &[]));
    let one = wanted(3, &[]);
    run.store.part(one.hash, one.bytes).unwrap().append(&[5; 4321]).unwrap();
    run.fetch(&supply, vec![one]).unwrap();
    run.assert_has(3);
    assert_eq!(supply.ordered(), [(None, 3, 4321), (None, 3, 0)]);
    assert_eq!(run.came().2, 0);
}

#[test]
fn an_ending_process_stops_and_what_came_is_gone_on_with() {
    let (run, supply) = (run(), Scripted::new(Way::Stall(3000), &[]));
    let one = || vec![wanted(4, &[])];
    assert!(run.fetch(&supply, one()).is_err());
    run.ending.store(true, Ordering::Relaxed);
    let supply = Scripted::new(Way::Serve, &[]);
    assert!(matches!(run.fetch(&supply, one()), Err(FetchError::Ending)));
    run.ending.store(false, Ordering::Relaxed);
    run.fetch(&supply, one()).unwrap();
    run.assert_has(4);
    assert_eq!(supply.ordered().last(), Some(&(None, 4, 3000)));
}
