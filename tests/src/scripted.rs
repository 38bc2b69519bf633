//! Nodes that compute what they are asked and then answer as a script says.
//!
//! For what real nodes do not do on demand: silence, refusals, answers of the wrong shape, overflow. A scripted node is
//! a station with the router's own `Home` behind it, so what it answers truthfully has the right bits, whole experts
//! or slices, and what it does not answer leaves the router to find somebody else.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use mesh_net::hub::Hub;
use mesh_net::membership::Membership;
use mesh_net::station::{NodeService, ReplySink, Station, StationConfig, Stop};
use mesh_proto::cluster::Policy;
use mesh_proto::routes::Table;
use mesh_wire::buffer::Pool;
use mesh_wire::call::Call;
use mesh_wire::control::{Health, Hello, Placed, Placement, Refusal, Vitals};
use mesh_wire::id::ExpertKey;
use mesh_wire::reply::{ReplyHead, encode_sums};
use model::activations::Activations;
use model::home::{Home, Residency};
use model::kernel::Assignment;
use model::open::Model;

use router::audit::AuditView;
use router::engine::StatusView;
use router::request::EngineHandle;

use crate::cluster::{READY_WITHIN, Shape, native, start_audited_engine, start_hub};
use crate::lies::Lie;

/// What a node does with a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mood {
    /// Answers it.
    Answer,
    /// Keeps it.
    Silence,
    /// Answers it once the next one has come: late, and out of order.
    AfterNext,
    /// Says no.
    Refuse(Refusal),
    /// Answers with a row too many.
    WrongShape,
    /// Says of every row that it overflowed.
    Overflow,
    /// Answers with sums that look right.
    Lie(Lie),
}

/// A router with scripted nodes.
#[derive(Debug)]
pub struct Troupe {
    /// The way into the engine.
    pub engine: EngineHandle,
    /// Its counters.
    pub status: StatusView,
    /// The router's side of the mesh.
    pub hub: Arc<Hub>,
    /// The nodes.
    pub nodes: Vec<Scripted>,
    /// What came of audits.
    pub audits: Option<AuditView>,
}

impl Troupe {
    /// Starts them with this plan, and returns when every node serves. `fallback`: whether the router computes what no
    /// node can be asked for.
    pub fn start(model: &Arc<Model>, cast: Vec<Part>, (table, fallback): (Table, bool)) -> Troupe {
        Troupe::audited(model, cast, (table, fallback), 0.0)
    }

    /// As `start`; the router audits this share of what they answer.
    pub fn audited(model: &Arc<Model>, cast: Vec<Part>, plan: (Table, bool), share: f64) -> Troupe {
        Troupe::of((model, model), cast, plan, share)
    }

    /// The same where router and nodes have each their own copy of the model.
    pub fn of(
        (own, model): (&Arc<Model>, &Arc<Model>),
        cast: Vec<Part>,
        (table, fallback): (Table, bool),
        share: f64,
    ) -> Troupe {
        let (hub, memberships) = start_hub(model, cast.len(), Policy::default(), table);
        let start = |(membership, part)| Scripted::start(model, membership, hub.local_addr(), part);
        let nodes: Vec<Scripted> = memberships.into_iter().zip(cast).map(start).collect();
        assert!(hub.wait_ready(nodes.len(), READY_WITHIN), "the nodes did not get ready");
        let shape = Shape { nodes: nodes.len(), chunk: 64, kv_blocks: 512, replicate: false };
        let (engine, status, audits) =
            start_audited_engine(own, shape, Some(Arc::clone(&hub)), (fallback, share));
        Troupe { engine, status, hub, nodes, audits }
    }
}

/// What a node is told to be.
pub struct Part(Script, Vitals);

/// What it does is a function.
impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Part")
    }
}

impl Part {
    /// A node with room for everything.
    pub fn new(script: impl Fn(u64) -> Mood + Send + Sync + 'static) -> Part {
        Part(Box::new(script), Vitals::default())
    }

    /// Its sensors show this.
    pub fn showing(self, vitals: Vitals) -> Part {
        Part(self.0, vitals)
    }
}

/// Chooses a mood for the n-th call, counted from 0.
type Script = Box<dyn Fn(u64) -> Mood + Send + Sync>;

/// A node, on threads of its own. Leaves when dropped.
#[derive(Debug)]
pub struct Scripted {
    stop: Stop,
    calls: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Scripted {
    /// Starts a node that dials `router`.
    pub fn start(
        model: &Arc<Model>,
        membership: Arc<Membership>,
        router: SocketAddr,
        part: Part,
    ) -> Scripted {
        let (work, inbox) = channel();
        let calls = Arc::new(AtomicU64::new(0));
        let held: Arc<Mutex<Held>> = Arc::default();
        let worker = Worker {
            home: Home::new(Arc::clone(model), native(), Residency::Mapped),
            model: Arc::clone(model),
            held: Arc::clone(&held),
            script: part.0,
            calls: Arc::clone(&calls),
        };
        std::thread::spawn(move || worker.run(&inbox));
        let service =
            Service { fingerprint: model.fingerprint, held, work: Mutex::new(work), vitals: part.1 };
        let pool = Pool::new(StationConfig::POOL_BYTES_MAX);
        let config = StationConfig { membership, routers: vec![router], pool };
        let stop = Stop::new();
        let until = stop.clone();
        let thread =
            std::thread::spawn(move || Station::run(config, Arc::new(service), &until).expect("it runs"));
        Scripted { stop, calls, thread: Some(thread) }
    }

    /// Calls it got so far.
    pub fn calls(&self) -> u64 {
        self.calls.load(Ordering::SeqCst)
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        self.stop.trigger();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

/// By epoch and expert: the blocks it holds.
type Held = BTreeMap<(u64, ExpertKey), (u16, u16)>;

struct Service {
    fingerprint: [u8; 32],
    held: Arc<Mutex<Held>>,
    work: Mutex<Sender<(Call, ReplySink)>>,
    vitals: Vitals,
}

impl NodeService for Service {
    fn hello(&self) -> Hello {
        Hello {
            name: "scripted".into(),
            version: "0".into(),
            model: self.fingerprint,
            memory_bytes: 1 << 40,
            threads: 1,
            exact: true,
            kernels: "scripted".into(),
            weight_mb_s: [1000; 5],
            ..Hello::default()
        }
    }

    fn place(&self, placement: Placement) -> Placed {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        for slice in &placement.experts {
            held.insert((placement.epoch, slice.key), (slice.from, slice.to));
        }
        Placed { epoch: placement.epoch, weight_bytes: 1, refusal: String::new() }
    }

    fn call(&self, call: Call, sink: ReplySink) {
        let work = self.work.lock().unwrap_or_else(PoisonError::into_inner);
        // The worker ends with the last of these.
        drop(work.send((call, sink)));
    }

    fn health(&self) -> Health {
        Health { epoch: 1, resident_bytes: 1, vitals: self.vitals, ..Health::default() }
    }
}

struct Worker {
    home: Home,
    model: Arc<Model>,
    held: Arc<Mutex<Held>>,
    script: Script,
    calls: Arc<AtomicU64>,
}

impl Worker {
    fn run(mut self, inbox: &Receiver<(Call, ReplySink)>) {
        let mut kept = Vec::new();
        let mut late: Option<(Call, ReplySink)> = None;
        while let Ok((call, sink)) = inbox.recv() {
            let mood = (self.script)(self.calls.fetch_add(1, Ordering::SeqCst));
            let owed = late.take();
            match mood {
                Mood::Answer => self.answer(&call, sink, None),
                Mood::Lie(lie) => self.answer(&call, sink, Some(lie)),
                Mood::Silence => kept.push(sink),
                Mood::AfterNext => late = Some((call, sink)),
                Mood::Refuse(refusal) => sink.refuse(refusal, "as told"),
                Mood::WrongShape => reply(&call, sink, &vec![Some(vec![1]); call.head().rows as usize + 1]),
                Mood::Overflow => reply(&call, sink, &vec![None; call.head().rows as usize]),
            }
            if let Some((call, sink)) = owed {
                self.answer(&call, sink, None);
            }
        }
    }

    fn answer(&mut self, call: &Call, sink: ReplySink, lie: Option<Lie>) {
        let head = *call.head();
        let (rows, hidden) = (head.rows as usize, head.hidden as usize);
        let mut by_part: BTreeMap<(u16, u16), Vec<Assignment>> = BTreeMap::new();
        for from in call.view().assignments() {
            let key = ExpertKey { layer: head.layer, expert: from.expert };
            let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(part) = held.get(&(head.epoch, key)).copied() else {
                return sink.refuse(Refusal::UnknownExpert, "not held");
            };
            let experts = self.model.config.moe.experts as u16;
            let expert = lie.map_or(from.expert, |lie| lie.expert(from.expert, experts));
            let assignment = Assignment { row: from.row, expert, weight: from.weight };
            by_part.entry(part).or_default().push(assignment);
        }
        let x = Activations::new(self.model.format, rows, hidden, call.view().payload()).expect("rows");
        let mut sums = vec![0; rows * hidden];
        for (part, assignments) in by_part {
            let layer = usize::from(head.layer);
            self.home.add_slice(layer, part, (x, &assignments), &mut sums).expect("it computes");
        }
        lie.into_iter().for_each(|lie| lie.bend(head.call, &mut sums));
        let narrow =
            |row: &[i64]| row.iter().map(|sum| i32::try_from(*sum).ok()).collect::<Option<Vec<i32>>>();
        let rows: Vec<_> = sums.chunks_exact(hidden).map(narrow).collect();
        reply(call, sink, &rows);
    }
}

fn reply(call: &Call, sink: ReplySink, rows: &[Option<Vec<i32>>]) {
    let width = rows.iter().flatten().next().map_or(call.head().hidden, |row| row.len() as u32);
    let head = ReplyHead { call: call.head().call, service_us: 1, hidden: width };
    let rows: Vec<Option<&[i32]>> = rows.iter().map(|row| row.as_deref()).collect();
    let frame = encode_sums(sink.pool(), head, &rows).expect("it fits");
    sink.complete(frame);
}
