//! What a call costs beside the bare transports under it, measured in one run.
//!
//! Four ways to send 2.3 KB and get 4 KB back, the sizes of a decode call to a model 2048 wide: a TCP echo without
//! Nagle's delay, a quinn echo over one stream with our transport settings and TLS, the whole way of a call (waiting
//! thread, hub, QUIC, station, worker thread, and back, with a service that computes nothing), and the same frames,
//! built, validated and pooled alike, over a TCP stream. That TCP lane exists for this comparison only: it knows no
//! keys and no budgets. Each side runs on a current-thread runtime on its own thread, and nobody polls busily unless
//! `spin` says so. Rounds of the four alternate, so that a noisy neighbour hits all of them; percentiles are over all
//! rounds. Prints nothing: `moemesh bench link` does.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use mesh_proto::facts::ModelFacts;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::call::{Assignment, Call, CallDraft, CallHead, OutgoingCall};
use mesh_wire::control::{Health, Hello, Placed, Placement};
use mesh_wire::frame::{FrameError, HEADER_BYTES, Header, Op};
use mesh_wire::payload::{RowFormat, SumWidth};
use mesh_wire::reply::{Reply, ReplyDraft, ReplyHead};
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;

use crate::authority::{Authority, AuthorityError};
use crate::endpoint::{self, EndpointError, Listener};
use crate::helm::Helm;
use crate::hub::{Hub, HubConfig, HubError, Lane};
use crate::identity::Identity;
use crate::keys::KeyError;
use crate::membership::{Admission, Membership};
use crate::pending::CallError;
use crate::station::{NodeService, ReplySink, Station, StationConfig, Stop};
use crate::tls::SERVER_NAME;

/// Values per row: Qwen3-30B-A3B. An int8 row takes 2304 bytes, an i16 reply row 4096.
const HIDDEN: u32 = 2048;

/// Bytes of an echo's question and answer, as in the payloads of call and reply.
const OUT_BYTES: usize = 2304;
const BACK_BYTES: usize = 4096;

/// Alternations of the four ways.
const ROUNDS: usize = 5;

/// Exchanges before each round that are not counted.
const WARM_UP: usize = 200;

/// Longest wait for the node to be ready: it has nothing to load.
const READY_WITHIN: Duration = Duration::from_secs(30);

/// Why there is no measurement.
#[derive(Debug, Error)]
pub enum BenchError {
    /// Sockets, threads or runtimes.
    #[error("bench link: {0}")]
    Io(#[from] io::Error),
    /// No keys.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// No cluster.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// No hub.
    #[error(transparent)]
    Hub(#[from] HubError),
    /// No endpoint.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The quinn echo broke.
    #[error("bench link, quinn echo: {0}")]
    Quinn(String),
    /// A call failed.
    #[error("bench link, call: {0}")]
    Call(#[from] CallError),
    /// A call could not be built.
    #[error("bench link, call: {0}")]
    Frame(#[from] FrameError),
    /// The node did not get ready.
    #[error("bench link: the node on this machine did not get ready within 30 s")]
    NotReady,
}

/// Microseconds of one way.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Percentiles {
    /// Half of the exchanges were faster.
    pub p50_us: f64,
    /// 99 of 100 were.
    pub p99_us: f64,
}

/// The result.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LinkBench {
    /// Exchanges counted, each way.
    pub calls: usize,
    /// Forward thread to node's worker and back.
    pub call: Percentiles,
    /// The same frames over TCP.
    pub tcp_call: Percentiles,
    /// Bare quinn echo.
    pub quinn_echo: Percentiles,
    /// Bare TCP echo.
    pub tcp_echo: Percentiles,
}

/// Measures `calls` exchanges of each way, over loopback. `spin` as in `HubConfig`.
///
/// # Errors
/// `BenchError`.
pub fn bench_link(calls: usize, spin: Duration) -> Result<LinkBench, BenchError> {
    let per_round = calls.div_ceil(ROUNDS).max(1);
    let keys = Keys::generate()?;
    let mut tcp = TcpEcho::start()?;
    let mut tcp_lane = TcpLane::start()?;
    let mut quinn = QuinnEcho::start(&keys)?;
    let link = CallLink::start(&keys, spin)?;
    let mut times: [Vec<Duration>; 4] = Default::default();
    for _ in 0..ROUNDS {
        tcp.round(per_round, &mut times[0])?;
        quinn.round(per_round, &mut times[1])?;
        tcp_lane.round(per_round, &mut times[2])?;
        link.round(per_round, &mut times[3])?;
    }
    let [tcp_times, quinn_times, lane_times, call_times] = times;
    link.stop();
    Ok(LinkBench {
        calls: call_times.len(),
        call: percentiles(call_times),
        tcp_call: percentiles(lane_times),
        quinn_echo: percentiles(quinn_times),
        tcp_echo: percentiles(tcp_times),
    })
}

fn percentiles(mut times: Vec<Duration>) -> Percentiles {
    times.sort_unstable();
    let at = |part: usize| times.get(times.len() * part / 100).map_or(0.0, |time| time.as_secs_f64() * 1e6);
    Percentiles { p50_us: at(50), p99_us: at(99) }
}

fn runtime() -> io::Result<Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

fn loopback() -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 0))
}

struct Keys {
    authority: Arc<Authority>,
    node: Identity,
}

impl Keys {
    fn generate() -> Result<Keys, BenchError> {
        let (authority, node) = (Arc::new(Authority::in_memory()?), Identity::generate()?);
        authority.admit("node", node.id())?;
        Ok(Keys { authority, node })
    }

    fn membership(&self) -> Arc<Membership> {
        let (cluster, router) = (self.authority.cluster(), self.authority.identity().id());
        let admission = Admission { cluster, router, name: "node".to_owned(), addresses: Vec::new() };
        Arc::new(Membership::in_memory(self.node.clone(), admission))
    }
}

/// The listening side ends when the dialing side closes its connection.
struct TcpEcho {
    runtime: Runtime,
    stream: TcpStream,
}

impl TcpEcho {
    fn start() -> Result<TcpEcho, BenchError> {
        let theirs = runtime()?;
        let listener = theirs.block_on(TcpListener::bind(loopback()))?;
        let address = listener.local_addr()?;
        spawn("bench-tcp", move || {
            let served: io::Result<()> = theirs.block_on(async {
                let (mut stream, _) = listener.accept().await?;
                stream.set_nodelay(true)?;
                let (mut question, answer) = ([0; OUT_BYTES], [1; BACK_BYTES]);
                loop {
                    stream.read_exact(&mut question).await?;
                    stream.write_all(&answer).await?;
                }
            });
            tracing::debug!(?served, "the TCP echo ended");
        })?;
        let runtime = runtime()?;
        let stream = runtime.block_on(TcpStream::connect(address))?;
        stream.set_nodelay(true)?;
        Ok(TcpEcho { runtime, stream })
    }

    fn round(&mut self, count: usize, times: &mut Vec<Duration>) -> Result<(), BenchError> {
        let stream = &mut self.stream;
        self.runtime.block_on(async {
            let (question, mut answer) = ([0; OUT_BYTES], [0; BACK_BYTES]);
            for at in 0..WARM_UP + count {
                let start = Instant::now();
                stream.write_all(&question).await?;
                stream.read_exact(&mut answer).await?;
                if at >= WARM_UP {
                    times.push(start.elapsed());
                }
            }
            Ok(())
        })
    }
}

/// As `TcpEcho`, over one stream with our transport.
struct QuinnEcho {
    runtime: Runtime,
    streams: (quinn::SendStream, quinn::RecvStream),
    /// Both must live as long as the streams are used.
    _alive: (quinn::Connection, quinn::Endpoint),
}

impl QuinnEcho {
    fn start(keys: &Keys) -> Result<QuinnEcho, BenchError> {
        let theirs = runtime()?;
        let listener = {
            let _entered = theirs.enter();
            Listener::bind(keys.authority.identity(), keys.authority.members(), loopback())?
        };
        let address = listener.endpoint.local_addr()?;
        spawn("bench-quinn", move || {
            let served: Result<(), BenchError> = theirs.block_on(async {
                let incoming = listener.endpoint.accept().await;
                let incoming = incoming.ok_or_else(|| quinn("the endpoint closed"))?;
                let connection = listener.accept(incoming).await.map_err(quinn)?;
                let (mut send, mut recv) = connection.accept_bi().await.map_err(quinn)?;
                let (mut question, answer) = ([0; OUT_BYTES], [1; BACK_BYTES]);
                loop {
                    recv.read_exact(&mut question).await.map_err(quinn)?;
                    send.write_all(&answer).await.map_err(quinn)?;
                }
            });
            tracing::debug!(?served, "the quinn echo ended");
        })?;
        let runtime = runtime()?;
        let (endpoint, connection, streams) = runtime.block_on(async {
            let endpoint = endpoint::dialer(&keys.node, keys.authority.identity().id(), false)?;
            let connecting = endpoint.connect(address, SERVER_NAME).map_err(quinn)?;
            let connection = connecting.await.map_err(quinn)?;
            let streams = connection.open_bi().await.map_err(quinn)?;
            Ok::<_, BenchError>((endpoint, connection, streams))
        })?;
        Ok(QuinnEcho { runtime, streams, _alive: (connection, endpoint) })
    }

    fn round(&mut self, count: usize, times: &mut Vec<Duration>) -> Result<(), BenchError> {
        let (send, recv) = &mut self.streams;
        self.runtime.block_on(async {
            let (question, mut answer) = ([0; OUT_BYTES], [0; BACK_BYTES]);
            for at in 0..WARM_UP + count {
                let start = Instant::now();
                send.write_all(&question).await.map_err(quinn)?;
                recv.read_exact(&mut answer).await.map_err(quinn)?;
                if at >= WARM_UP {
                    times.push(start.elapsed());
                }
            }
            Ok(())
        })
    }
}

fn quinn(error: impl std::fmt::Display) -> BenchError {
    BenchError::Quinn(error.to_string())
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.to_owned()).spawn(body)
}

/// The call of one decode step: one row through eight experts.
fn decode_call(pool: &Pool, call: u64) -> Result<OutgoingCall, FrameError> {
    let head = CallHead {
        call,
        step: 1,
        epoch: 1,
        budget_us: 10_000_000,
        layer: 0,
        format: RowFormat::Int8,
        hidden: HIDDEN,
        rows: 1,
    };
    let assignments: [_; 8] = std::array::from_fn(|expert| Assignment::new(0, expert as u16, 0.125));
    Ok(CallDraft::new(pool, head, &assignments)?.finish())
}

/// Zeros for every row of the call.
fn zeros(pool: &Pool, call: &Call) -> Result<Buffer, FrameError> {
    let head = call.head();
    let reply = ReplyHead { call: head.call, service_us: 0, hidden: head.hidden };
    // As many as a decode call of this bench has.
    let widths = [SumWidth::I16];
    Ok(ReplyDraft::new(pool, reply, &widths)?.finish())
}

/// The frames of a call and its reply over a TCP stream, built and checked as on a lane.
struct TcpLane {
    runtime: Runtime,
    stream: TcpStream,
    pool: Pool,
}

impl TcpLane {
    fn start() -> Result<TcpLane, BenchError> {
        let theirs = runtime()?;
        let listener = theirs.block_on(TcpListener::bind(loopback()))?;
        let address = listener.local_addr()?;
        spawn("bench-tcp-lane", move || {
            let served = TcpLane::serve(&theirs, &listener);
            tracing::debug!(?served, "the TCP lane ended");
        })?;
        let runtime = runtime()?;
        let stream = runtime.block_on(TcpStream::connect(address))?;
        stream.set_nodelay(true)?;
        Ok(TcpLane { runtime, stream, pool: Pool::new(StationConfig::POOL_BYTES_MAX) })
    }

    /// A worker that drives its end of the stream while it has nothing to compute.
    fn serve(runtime: &Runtime, listener: &TcpListener) -> Result<(), BenchError> {
        let pool = Pool::new(StationConfig::POOL_BYTES_MAX);
        let (mut stream, _) = runtime.block_on(listener.accept())?;
        stream.set_nodelay(true)?;
        loop {
            let frame = runtime.block_on(read_frame(&mut stream, &pool, Op::Call))?;
            let call = Call::parse(frame).map_err(|bad| bad.error)?;
            let reply = zeros(&pool, &call)?;
            runtime.block_on(stream.write_all(reply.frame()))?;
        }
    }

    fn round(&mut self, count: usize, times: &mut Vec<Duration>) -> Result<(), BenchError> {
        for at in 0..WARM_UP + count {
            let start = Instant::now();
            let frame = decode_call(&self.pool, at as u64 + 1)?.into_buffer();
            self.runtime.block_on(self.stream.write_all(frame.frame()))?;
            let frame = self.runtime.block_on(read_frame(&mut self.stream, &self.pool, Op::Reply))?;
            Reply::parse(frame)?.view().check_against(at as u64 + 1, 1, HIDDEN)?;
            if at >= WARM_UP {
                times.push(start.elapsed());
            }
        }
        Ok(())
    }
}

async fn read_frame(stream: &mut TcpStream, pool: &Pool, op: Op) -> Result<Buffer, BenchError> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await?;
    let mut buffer = pool.take(Header::parse(header, &[op])?)?;
    stream.read_exact(buffer.body_mut()).await?;
    Ok(buffer)
}

/// Answers with zeros, on a thread of its own that takes the station's helm while it waits, as a node's worker does.
struct Idle {
    work: mpsc::Sender<(Call, ReplySink)>,
}

impl Idle {
    fn start(helm: Arc<Helm>) -> io::Result<Idle> {
        // One call is under way at a time.
        let (work, mut inbox) = mpsc::channel::<(Call, ReplySink)>(1);
        spawn("bench-worker", move || {
            // Refused only when the station has ended.
            while let Some(Some((call, sink))) = helm.steer(inbox.recv()) {
                match zeros(sink.pool(), &call) {
                    Ok(reply) => helm.now(|| sink.complete(reply)),
                    Err(error) => tracing::error!(%error, "bench link"),
                }
            }
        })?;
        Ok(Idle { work })
    }
}

impl NodeService for Idle {
    fn hello(&self) -> Hello {
        Hello {
            name: "node".to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            model: [0; 32],
            memory_bytes: 1 << 20,
            threads: 1,
            exact: true,
            kernels: "none".to_owned(),
            weight_mb_s: [1000; 5],
            held_epoch: 0,
            instance: 0,
        }
    }

    fn place(&self, placement: Placement) -> Placed {
        Placed { epoch: placement.epoch, weight_bytes: 0, refusal: String::new() }
    }

    fn call(&self, call: Call, sink: ReplySink) {
        // Fails only when the worker is gone.
        drop(self.work.try_send((call, sink)));
    }

    fn health(&self) -> Health {
        Health::default()
    }
}

/// A hub, and a node on a thread of this process.
struct CallLink {
    hub: Hub,
    stop: Stop,
    station: JoinHandle<()>,
}

impl CallLink {
    fn start(keys: &Keys, spin: Duration) -> Result<CallLink, BenchError> {
        let (fingerprint, moe_layers) = ([0; 32], vec![0]);
        let facts = ModelFacts {
            fingerprint,
            moe_layers,
            experts: 1,
            expert_bytes: 1,
            top_k: 1,
            blocks: 1,
            ..ModelFacts::default()
        };
        let defaults = HubConfig::new(Arc::clone(&keys.authority), facts);
        let hub = Hub::start(HubConfig { listen: loopback(), spin, probe_links: false, ..defaults })?;
        let config = StationConfig {
            membership: keys.membership(),
            routers: vec![hub.local_addr()],
            pool: Pool::new(StationConfig::POOL_BYTES_MAX),
        };
        let helm = Arc::new(Helm::new(spin)?);
        let service = Arc::new(Idle::start(Arc::clone(&helm))?);
        let stop = Stop::new();
        let stop_there = stop.clone();
        let station = spawn("bench-station", move || {
            if let Err(error) = Station::run_at(&helm, config, service, &stop_there) {
                tracing::error!(%error, "bench link");
            }
        })?;
        let link = CallLink { hub, stop, station };
        if link.hub.wait_ready(1, READY_WITHIN) {
            Ok(link)
        } else {
            link.stop();
            Err(BenchError::NotReady)
        }
    }

    fn round(&self, count: usize, times: &mut Vec<Duration>) -> Result<(), BenchError> {
        for at in 0..WARM_UP + count {
            let start = Instant::now();
            let call = decode_call(self.hub.pool(), at as u64 + 1)?;
            self.hub.send(0, Lane::Decode, call).wait()?;
            if at >= WARM_UP {
                times.push(start.elapsed());
            }
        }
        Ok(())
    }

    fn stop(self) {
        self.stop.trigger();
        self.hub.shutdown("the measurement is over");
        if self.station.join().is_err() {
            tracing::error!("the bench's station panicked");
        }
    }
}
