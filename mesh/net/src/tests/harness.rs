//! A cluster in one process: a hub, stations with scripted services, and a raw node that can say anything.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_proto::facts::ModelFacts;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::call::{Assignment, Call, CallDraft, CallHead, OutgoingCall};
use mesh_wire::control::{Health, Hello, Placed, Placement, Refusal};
use mesh_wire::frame::{HEADER_BYTES, Header, Op};
use mesh_wire::id::NodeId;
use mesh_wire::message::Message;
use mesh_wire::payload::RowFormat;
use mesh_wire::reply::{ReplyHead, Row, encode_sums};
use quinn::{Connection, Endpoint, RecvStream, SendStream};
use tokio::runtime::Runtime;

use crate::authority::Authority;
use crate::endpoint;
use crate::hub::{Hub, HubConfig, Lane};
use crate::identity::Identity;
use crate::membership::{Admission, Membership};
use crate::pending::PendingCall;
use crate::station::{NodeService, ReplySink, Station, StationConfig, StationError, Stop};
use crate::stream::{read_frame, write_frame};
use crate::tls::SERVER_NAME;

/// Longer than anything here takes, on the slowest machine: reached only where a test fails.
pub(super) const LONG: Duration = Duration::from_secs(60);

/// Budget of calls that are meant to be answered.
pub(super) const LONG_US: u32 = 60_000_000;

pub(super) const MODEL: [u8; 32] = [7; 32];

pub(super) fn listen_anywhere() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

/// A cluster in memory, and its nodes' keys.
pub(super) struct Keys {
    pub(super) authority: Arc<Authority>,
    pub(super) nodes: Vec<Identity>,
}

pub(super) fn keys(nodes: usize) -> Keys {
    let authority = Arc::new(Authority::in_memory().unwrap());
    let nodes: Vec<_> = (0..nodes).map(|_| Identity::generate().unwrap()).collect();
    for (at, node) in nodes.iter().enumerate() {
        authority.admit(&format!("node-{at}"), node.id()).unwrap();
    }
    Keys { authority, nodes }
}

impl Keys {
    /// What the router is known by.
    pub(super) fn router(&self) -> NodeId {
        self.authority.identity().id()
    }

    /// What joining would have told this machine.
    pub(super) fn membership(&self, identity: &Identity) -> Arc<Membership> {
        let (cluster, router) = (self.authority.cluster(), self.router());
        let admission = Admission { cluster, router, name: "node".to_owned(), addresses: Vec::new() };
        Arc::new(Membership::in_memory(identity.clone(), admission))
    }
}

pub(super) fn hub_config(keys: &Keys, listen: SocketAddr) -> HubConfig {
    let facts = ModelFacts {
        fingerprint: MODEL,
        moe_layers: vec![0, 1],
        experts: 4,
        expert_bytes: 100,
        top_k: 2,
        blocks: 1,
        ..ModelFacts::default()
    };
    // Raw nodes count streams; who tests probes asks for them.
    HubConfig { listen, probe_links: false, ..HubConfig::new(Arc::clone(&keys.authority), facts) }
}

pub(super) fn hub(keys: &Keys) -> Hub {
    Hub::start(hub_config(keys, listen_anywhere())).unwrap()
}

pub(super) fn hello() -> Hello {
    Hello {
        name: "node".into(),
        version: "0".into(),
        model: MODEL,
        memory_bytes: 1 << 30,
        threads: 1,
        exact: true,
        kernels: "none".into(),
        weight_mb_s: [1000; 5],
        held_epoch: 0,
        instance: 0,
    }
}

/// What a scripted node does with a call, by its layer.
pub(super) mod layer {
    pub(crate) const ANSWER: u16 = 0;
    pub(crate) const REFUSE: u16 = 1;
    /// Keeps the sink and never answers.
    pub(crate) const SILENT: u16 = 2;
    /// Drops the sink.
    pub(crate) const DROP: u16 = 3;
    /// Is answered only once another such call has arrived.
    pub(crate) const PAIR: u16 = 4;
}

/// Computes on its own thread, as a node does.
pub(super) struct Service {
    work: Mutex<Sender<(Call, ReplySink)>>,
    instance: u64,
    pub(super) calls: Arc<AtomicU64>,
}

impl Service {
    pub(super) fn start() -> Arc<Service> {
        let (work, inbox) = channel();
        let calls = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&calls);
        std::thread::spawn(move || compute(&inbox, &counter));
        // Every service is a process of its own; 0 is the raw nodes'.
        let instance = 1 + INSTANCES.fetch_add(1, Ordering::SeqCst);
        Arc::new(Service { work: Mutex::new(work), instance, calls })
    }
}

fn compute(inbox: &Receiver<(Call, ReplySink)>, calls: &AtomicU64) {
    let mut kept = Vec::new();
    let mut waiting: Option<(Call, ReplySink)> = None;
    while let Ok((call, sink)) = inbox.recv() {
        calls.fetch_add(1, Ordering::SeqCst);
        match call.head().layer {
            layer::ANSWER => answer(&call, sink),
            layer::REFUSE => sink.refuse(Refusal::UnknownExpert, "expert 3 of layer 1 is not here"),
            layer::SILENT => kept.push(sink),
            layer::DROP => drop(sink),
            layer::PAIR => match waiting.take() {
                None => waiting = Some((call, sink)),
                Some((first, first_sink)) => {
                    answer(&call, sink);
                    answer(&first, first_sink);
                }
            },
            other => panic!("no script for layer {other}"),
        }
    }
}

/// Row `r` of the answer is `r + sum of the experts assigned to it`, in every column.
pub(super) fn reply_to(pool: &Pool, call: &Call) -> Buffer {
    let head = *call.head();
    let sum = |row: u32| {
        let experts = call.view().assignments().iter().filter(|a| a.row == row).map(|a| i32::from(a.expert));
        row as i32 + experts.sum::<i32>()
    };
    let sums: Vec<_> = (0..head.rows).map(|row| vec![sum(row); head.hidden as usize]).collect();
    let rows: Vec<_> = sums.iter().map(|row| Some(&row[..])).collect();
    encode_sums(pool, ReplyHead { call: head.call, service_us: 5, hidden: head.hidden }, &rows).unwrap()
}

fn answer(call: &Call, sink: ReplySink) {
    let reply = reply_to(sink.pool(), call);
    sink.complete(reply);
}

impl NodeService for Service {
    fn hello(&self) -> Hello {
        Hello { instance: self.instance, ..hello() }
    }

    fn place(&self, placement: Placement) -> Placed {
        Placed { epoch: placement.epoch, weight_bytes: 100, refusal: String::new() }
    }

    fn call(&self, call: Call, sink: ReplySink) {
        self.work.lock().unwrap().send((call, sink)).unwrap();
    }

    fn health(&self) -> Health {
        Health { epoch: 1, resident_bytes: 1, ..Health::default() }
    }
}

/// A station on a thread of its own; stopped and joined when dropped.
pub(super) struct Running {
    pub(super) stop: Stop,
    pub(super) pool: Pool,
    pub(super) service: Arc<Service>,
    thread: Option<JoinHandle<Result<(), StationError>>>,
}

impl Running {
    pub(super) fn start(keys: &Keys, node: usize, routers: Vec<SocketAddr>) -> Running {
        Running::of(keys.membership(&keys.nodes[node]), routers)
    }

    /// A station of any machine.
    pub(super) fn of(membership: Arc<Membership>, routers: Vec<SocketAddr>) -> Running {
        let pool = Pool::new(StationConfig::POOL_BYTES_MAX);
        let config = StationConfig { membership, routers, pool: pool.clone() };
        let stop = Stop::new();
        let service = Service::start();
        let (for_thread, stop_there) = (Arc::clone(&service), stop.clone());
        let thread = std::thread::spawn(move || Station::run(config, for_thread, &stop_there));
        Running { stop, pool, service, thread: Some(thread) }
    }

    /// Whether it runs on, as a node should whose router may yet take it.
    pub(super) fn goes_on(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    pub(super) fn join(&mut self) -> Result<(), StationError> {
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.trigger();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap().unwrap();
        }
    }
}

/// One hub and one station that answers, ready.
pub(super) fn pair() -> (Hub, Running) {
    let keys = keys(1);
    let hub = hub(&keys);
    let station = Running::start(&keys, 0, vec![hub.local_addr()]);
    assert!(hub.wait_ready(1, LONG));
    (hub, station)
}

static INSTANCES: AtomicU64 = AtomicU64::new(0);

static CALLS: AtomicU64 = AtomicU64::new(1);

/// A call of `rows` rows for the script of this layer.
pub(super) fn outgoing(pool: &Pool, layer: u16, rows: u32, budget_us: u32) -> OutgoingCall {
    let call = CALLS.fetch_add(1, Ordering::SeqCst);
    let head =
        CallHead { call, step: 1, epoch: 1, budget_us, layer, format: RowFormat::Int8, hidden: 100, rows };
    let assignments: Vec<_> =
        (0..rows).flat_map(|row| [Assignment::new(row, 1, 0.5), Assignment::new(row, 3, 0.5)]).collect();
    CallDraft::new(pool, head, &assignments).unwrap().finish()
}

pub(super) fn send(hub: &Hub, layer: u16, rows: u32, budget_us: u32) -> PendingCall {
    let lane = if rows > 16 { Lane::Prefill } else { Lane::Decode };
    hub.send(0, lane, outgoing(hub.pool(), layer, rows, budget_us))
}

/// Calls and checks that every number of the reply is right.
pub(super) fn call_and_check(hub: &Hub, rows: u32) {
    let reply = send(hub, layer::ANSWER, rows, LONG_US).wait().unwrap();
    assert_eq!(reply.view().row_count(), rows as usize);
    for (row, sums) in reply.view().rows().enumerate() {
        assert_eq!(sums, Row::I16(&[row as i16 + 4; 100]));
    }
}

/// A node whose every byte the test writes. Its endpoint runs on threads of its own.
pub(super) struct RawNode {
    pub(super) runtime: Runtime,
    pub(super) endpoint: Endpoint,
    pub(super) connection: Connection,
    pub(super) control: (SendStream, RecvStream),
    pub(super) pool: Pool,
}

pub(super) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap()
}

/// A connection with nothing on it yet, and what it lives by.
pub(super) type Shaken = (Runtime, Endpoint, Connection);

impl RawNode {
    /// Shakes hands, and says nothing.
    pub(super) fn shake(keys: &Keys, node: usize, router: SocketAddr) -> Shaken {
        let runtime = runtime();
        let (endpoint, connection) = runtime.block_on(async {
            let endpoint = endpoint::dialer(&keys.nodes[node], keys.router(), false).unwrap();
            let connection = endpoint.connect(router, SERVER_NAME).unwrap().await.unwrap();
            (endpoint, connection)
        });
        (runtime, endpoint, connection)
    }

    /// Connects, without a hello.
    pub(super) fn connect(keys: &Keys, node: usize, router: SocketAddr) -> RawNode {
        let (runtime, endpoint, connection) = RawNode::shake(keys, node, router);
        let control = runtime.block_on(connection.open_bi()).unwrap();
        RawNode { runtime, endpoint, connection, control, pool: Pool::new(64 << 20) }
    }

    /// Connects, introduces itself and holds what it is told to.
    pub(super) fn join(keys: &Keys, node: usize, router: SocketAddr) -> RawNode {
        RawNode::join_as(keys, node, router, 0)
    }

    /// As the process of this number.
    pub(super) fn join_as(keys: &Keys, node: usize, router: SocketAddr, instance: u64) -> RawNode {
        let mut raw = RawNode::connect(keys, node, router);
        raw.say(&Message::Hello(Hello { instance, ..hello() }));
        let Message::Placement(placement) = raw.hear(Op::Placement) else { panic!("not a placement") };
        let placed = Placed { epoch: placement.epoch, weight_bytes: 1, refusal: String::new() };
        raw.say(&Message::Placed(placed));
        raw
    }

    pub(super) fn say(&mut self, message: &Message) {
        let frame = message.encode(&self.pool).unwrap();
        self.runtime.block_on(write_frame(&mut self.control.0, frame)).unwrap();
    }

    /// The next message of this kind; rosters before it are passed over.
    pub(super) fn hear(&mut self, op: Op) -> Message {
        loop {
            let allowed = [op, Op::Roster];
            let reading = read_frame(&mut self.control.1, &self.pool, &allowed);
            let frame = self.runtime.block_on(reading).unwrap().unwrap();
            if frame.op() == op {
                return Message::decode(&frame).unwrap();
            }
        }
    }

    /// The next lane the router opens, and the call on it.
    pub(super) fn accept_call(&self) -> (SendStream, RecvStream, Call) {
        self.runtime.block_on(async {
            let (send, mut recv) = self.connection.accept_bi().await.unwrap();
            let call = read_call(&mut recv, &self.pool).await;
            (send, recv, call)
        })
    }

    pub(super) fn write(&self, stream: &mut SendStream, bytes: &[u8]) {
        self.runtime.block_on(stream.write_all(bytes)).unwrap();
    }
}

pub(super) async fn read_call(recv: &mut RecvStream, pool: &Pool) -> Call {
    Call::parse(read_frame(recv, pool, &[Op::Call]).await.unwrap().unwrap()).unwrap()
}

/// A frame with this body, for bodies no builder would write.
pub(super) fn frame(op: Op, body: &[u8]) -> Vec<u8> {
    let header: [u8; HEADER_BYTES] = Header::new(op, body.len()).unwrap().to_bytes();
    [&header[..], body].concat()
}
