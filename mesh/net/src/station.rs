//! A node's side: stays connected to the router and hands calls to whoever computes them.
//!
//! `Station::run` owns its thread. It dials the router's addresses in turn, with growing pauses, introduces the node,
//! and from then on only moves bytes: a lane's task reads a call into a pooled buffer, validates it, hands it to the
//! `NodeService`, waits for the answer and writes it. The service must return at once and compute on threads of its
//! own; loading weights is the exception and runs on a blocking thread. A thread that computes may take the `Helm`
//! the station runs at and move the bytes itself while it has nothing to compute. The price of the simple lanes: one
//! call per lane at a time, so the number of calls at a node is bounded by the lanes the router may open.
//!
//! Pauses between attempts carry a jitter derived from the node's key, so that nodes that lost their router together
//! do not come back together, and a run can be replayed. A node that is refused asks ever more rarely; one that was
//! revoked ends. Before a router may place anything it has to show the roster (`membership`): a node does not work for
//! a router that was restored from an old backup, or for a second one that runs with the first one's keys.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::call::Call;
use mesh_wire::control::{CallRefused, Goodbye, Health, Hello, Loading, Placed, Placement, Probed, Refusal};
use mesh_wire::frame::{FrameError, Op};
use mesh_wire::id::NodeId;
use mesh_wire::message::Message;
use quinn::{Connection, ConnectionError, RecvStream, SendStream, TransportErrorCode};
use thiserror::Error;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::drain::LEAVING_MAX;
pub use crate::drain::Stop;
use crate::endpoint::{
    self, Close, EndpointError, LaneReset, Parting, TLS_ALERTS, is_goodbye, is_revocation,
};
use crate::helm::Helm;
use crate::membership::{Distrust, Membership};
use crate::stream::{PROBE_PRIORITY, ReadFrameError, read_frame, write_frame};
use crate::throttle::Throttle;
use crate::tls::SERVER_NAME;

/// How often a node reports.
const HEALTH_EVERY: Duration = Duration::from_secs(1);

/// Time a handshake may take before the next address is tried.
pub(crate) const DIAL_WITHIN: Duration = Duration::from_secs(3);

/// First pause after all addresses failed; doubles up to `PAUSE_MAX`. A router that restarts is found again within
/// the time a person notices.
const PAUSE_FIRST: Duration = Duration::from_millis(100);

/// Longest pause while nobody answers.
pub(crate) const PAUSE_MAX: Duration = Duration::from_secs(3);

/// Longest pause where the router answers and refuses: a person has to do something first.
pub(crate) const REFUSED_PAUSE_MAX: Duration = Duration::from_secs(30);

/// A connection that held this long was no refusal; the next pause is short again.
pub(crate) const SERVED_MIN: Duration = Duration::from_secs(10);

/// A reply frame up to this size is sent before larger ones that wait: a decode reply of 8 rows 4096 wide.
const URGENT_BYTES_MAX: usize = 64 << 10;

/// Placements that may wait while one is loaded. The router has at most two under way.
const PLACEMENTS_MAX: usize = 4;

/// Messages to the router that may wait to be written.
const OUTBOX_MESSAGES: usize = 8;

/// QUIC sends streams of a lower priority last: the goodbye behind every reply.
const GOODBYE_PRIORITY: i32 = -2;

/// Time a goodbye has to arrive.
const GOODBYE_WITHIN: Duration = Duration::from_millis(200);

/// What a node does. Called on the network thread, which must never wait: every method but `place` returns at once.
pub trait NodeService: Send + Sync + 'static {
    /// Introduces the node, at every connection.
    fn hello(&self) -> Hello;

    /// Loads what the placement says. May take long; called on a blocking thread, one at a time.
    fn place(&self, placement: Placement) -> Placed;

    /// Takes a call and returns at once; another thread computes it and answers through the sink. A sink that
    /// is dropped refuses the call.
    fn call(&self, call: Call, sink: ReplySink);

    /// The node's counters.
    fn health(&self) -> Health;

    /// How far it is with the placement it is loading; `None` while it is loading none.
    fn loading(&self) -> Option<Loading> {
        None
    }
}

/// What a station needs to run.
#[derive(Clone, Debug)]
pub struct StationConfig {
    /// This machine's key, and whom it trusts.
    pub membership: Arc<Membership>,
    /// Where the router may be, tried in order; none: where it was when the machine joined.
    pub routers: Vec<SocketAddr>,
    /// The pool for frames; the service builds its replies in it, too.
    pub pool: Pool,
}

impl StationConfig {
    /// Default size of a station's pool: each of the router's lanes with a call of 2 MiB and a reply of 8 MiB.
    pub const POOL_BYTES_MAX: usize = 128 << 20;
}

/// Why a station does not run.
#[derive(Debug, Error)]
pub enum StationError {
    /// The operator shut this machine out.
    #[error(
        "this machine was revoked (`moemesh nodes revoke`) and the cluster does not take its key any more; to bring it \
         back, delete its state folder and join with a new token from `moemesh token`"
    )]
    Revoked,
    /// There is nowhere to dial.
    #[error("no address of the router is known; say where it is with --router HOST:PORT")]
    NoAddress,
    /// No endpoint.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// No runtime.
    #[error("starting the network thread: {0}")]
    Runtime(#[from] std::io::Error),
}

/// Where the answer to a call goes. Exactly one answer leaves: `complete`, `refuse`, or, when it is dropped, a
/// refusal that says so.
#[derive(Debug)]
pub struct ReplySink {
    call: u64,
    deadline: Instant,
    pool: Pool,
    answer: Option<oneshot::Sender<Buffer>>,
}

impl ReplySink {
    /// The call's number.
    pub fn call(&self) -> u64 {
        self.call
    }

    /// The pool to build the reply in.
    pub fn pool(&self) -> &Pool {
        &self.pool
    }

    /// When the budget, counted from receipt, runs out.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether computing is still worth it: the budget is not spent and the router still waits. To be asked right
    /// before the work starts; where the answer is no, drop the sink.
    pub fn is_wanted(&self) -> bool {
        let listening = self.answer.as_ref().is_some_and(|answer| !answer.is_closed());
        listening && Instant::now() < self.deadline
    }

    /// Sends the reply, a frame built by `mesh_wire::reply`.
    pub fn complete(mut self, reply: Buffer) {
        if reply.op() == Op::Reply {
            self.send(reply);
        } else {
            self.refuse(Refusal::Failed, "the node built something that is not a reply");
        }
    }

    /// Says no.
    pub fn refuse(mut self, refusal: Refusal, detail: &str) {
        self.send_refusal(refusal, detail);
    }

    fn send(&mut self, frame: Buffer) {
        // Fails where the router has given up: then nobody misses it.
        drop(self.answer.take().map(|answer| answer.send(frame)));
    }

    fn send_refusal(&mut self, refusal: Refusal, detail: &str) {
        if let Ok(frame) = refusal_frame(&self.pool, self.call, refusal, detail) {
            self.send(frame);
        }
    }
}

impl Drop for ReplySink {
    fn drop(&mut self) {
        if self.answer.is_none() {
            return;
        }
        if Instant::now() >= self.deadline {
            self.send_refusal(Refusal::Expired, "the budget was spent before the call could start");
        } else {
            self.send_refusal(Refusal::Failed, "the node dropped the call");
        }
    }
}

/// A sink, and where its answer arrives.
pub(crate) fn sink(call: u64, deadline: Instant, pool: &Pool) -> (ReplySink, oneshot::Receiver<Buffer>) {
    let (answer, receiver) = oneshot::channel();
    (ReplySink { call, deadline, pool: pool.clone(), answer: Some(answer) }, receiver)
}

fn refusal_frame(pool: &Pool, call: u64, refusal: Refusal, detail: &str) -> Result<Buffer, FrameError> {
    let refused = CallRefused { call, refusal, detail: detail.to_owned() };
    Message::CallRefused(refused).encode(pool)
}

/// See the module.
#[derive(Debug)]
pub struct Station;

impl Station {
    /// Runs on this thread until `stop` is triggered; then serves what is under way (`drain`), says goodbye and
    /// returns. Loss of the router is not an error: it dials again.
    ///
    /// # Errors
    /// What keeps it from ever running.
    pub fn run(
        config: StationConfig,
        service: Arc<dyn NodeService>,
        stop: &Stop,
    ) -> Result<(), StationError> {
        Station::run_at(&Helm::new(Duration::ZERO)?, config, service, stop)
    }

    /// `run`, at a helm that other threads may take.
    ///
    /// # Errors
    /// What keeps it from ever running.
    pub fn run_at(
        helm: &Helm,
        config: StationConfig,
        service: Arc<dyn NodeService>,
        stop: &Stop,
    ) -> Result<(), StationError> {
        if config.routers.is_empty() && config.membership.admission().addresses.is_empty() {
            return Err(StationError::NoAddress);
        }
        let (placing, silence, stop) = (Arc::default(), Throttle::default(), stop.clone());
        let node = Arc::new(Node { config, service, stop: stop.clone(), placing, silence });
        // A placement that is still loading does not keep the process.
        helm.keep(async move { node.stay_connected(&stop).await })
    }
}

/// How long to pause after `attempt` failed rounds: doubling up to `max`, plus or minus a quarter by this node's own
/// dice.
pub(crate) fn pause(id: NodeId, attempt: u32, max: Duration) -> Duration {
    let whole = PAUSE_FIRST.saturating_mul(1 << attempt.min(10)).min(max);
    let dice = blake3::Hasher::new().update(&id.0).update(&attempt.to_le_bytes()).finalize();
    let part = f64::from(dice.as_bytes()[0]) / 255.0;
    whole.mul_f64(0.75 + part / 2.0)
}

struct Node {
    config: StationConfig,
    service: Arc<dyn NodeService>,
    stop: Stop,
    /// Held while weights are loaded, so that a placement of a new connection waits for one of an old.
    placing: Arc<Mutex<()>>,
    /// What is written down of a router that does not answer.
    silence: Throttle,
}

/// How a connection, or the attempt at one, ended.
enum End {
    /// There was one, and the router had nothing against this node.
    Served,
    /// Nobody answered.
    Unreachable,
    /// The router does not want this node, or this node not that router.
    Refused,
}

impl Node {
    async fn stay_connected(self: &Arc<Node>, stop: &Stop) -> Result<(), StationError> {
        let (mut attempt, mut refusals) = (0_u32, 0_u32);
        loop {
            let (mut served, mut refused) = (false, false);
            for address in self.config.membership.places(&self.config.routers) {
                match self.try_router(address, stop).await {
                    Ok(End::Served) => served = true,
                    Ok(End::Refused) => refused = true,
                    Ok(End::Unreachable) => {}
                    Err(error @ StationError::Revoked) => return Err(error),
                    Err(error) if attempt == 0 => return Err(error),
                    // The network may come back; the address was fine once or another one may be.
                    Err(error) => tracing::warn!(%address, %error, "no endpoint"),
                }
                if stop.is_triggered() {
                    return Ok(());
                }
            }
            attempt = if served { 0 } else { attempt.saturating_add(1) };
            refusals = if refused { refusals.saturating_add(1) } else { 0 };
            let (rounds, max) = if refused { (refusals, REFUSED_PAUSE_MAX) } else { (attempt, PAUSE_MAX) };
            let pause = pause(self.config.membership.identity().id(), rounds.saturating_sub(1), max);
            if timeout(pause, stop.wait()).await.is_ok() {
                return Ok(());
            }
        }
    }

    /// One connection to this address, from dialing to its end.
    async fn try_router(self: &Arc<Node>, address: SocketAddr, stop: &Stop) -> Result<End, StationError> {
        let membership = &self.config.membership;
        let router = membership.admission().router;
        let endpoint = endpoint::dialer(membership.identity(), router, address.is_ipv6())?;
        let dialing = async {
            let connecting = endpoint.connect(address, SERVER_NAME);
            let connecting = connecting.map_err(|error| (error.to_string(), End::Unreachable))?;
            connecting.await.map_err(|error| (explain(&error), judge_dialing(&error)))
        };
        let dialed = tokio::select! {
            dialed = timeout(DIAL_WITHIN, dialing) => dialed,
            () = stop.wait() => return Ok(End::Unreachable),
        };
        let silence = || Err(("no answer within 3 s".to_owned(), End::Unreachable));
        let connection = match dialed.unwrap_or_else(|_| silence()) {
            Ok(connection) => connection,
            Err((reason, end)) => {
                // A router that is away for a day is not worth 30 000 lines.
                if self.silence.admits(Instant::now()) {
                    tracing::warn!(%address, reason, "the router cannot be reached; this node goes on trying");
                } else {
                    tracing::debug!(%address, reason, "the router cannot be reached");
                }
                return Ok(end);
            }
        };
        tracing::info!(%address, "connected to the router");
        let since = Instant::now();
        let parting = self.session(&connection).await;
        let closed = connection.close_reason();
        let in_order = parting.is_ok() || self.stop.is_triggered() || closed.as_ref().is_some_and(is_goodbye);
        let told = parting.unwrap_or_else(|reason| closed.as_ref().map_or(reason, explain));
        let reason = told.as_str();
        let end = match closed.as_ref().map_or(Ok(End::Served), judge) {
            Ok(End::Refused) if since.elapsed() < SERVED_MIN => {
                tracing::warn!(%address, reason, "refused; this node will try again, ever more rarely");
                Ok(End::Refused)
            }
            Ok(_) if in_order => {
                tracing::info!(%address, reason, "the connection to the router ended");
                Ok(End::Served)
            }
            Ok(_) => {
                tracing::warn!(%address, reason, "the connection to the router broke");
                Ok(End::Served)
            }
            Err(error) => Err(error),
        };
        let close = if in_order { Close::Goodbye } else { Close::Broken };
        connection.close(close.into(), reason.as_bytes());
        // Lets the close arrive; a router that is gone does not hold us up.
        drop(timeout(GOODBYE_WITHIN, endpoint.wait_idle()).await);
        end
    }

    /// Serves one connection until the router says goodbye, or something breaks.
    async fn session(self: &Arc<Node>, connection: &Connection) -> Parting {
        let (outbox, outgoing) = mpsc::channel(OUTBOX_MESSAGES);
        let (orders, placements) = mpsc::channel(PLACEMENTS_MAX);
        let (send, recv) = match connection.open_bi().await {
            Ok(control) => control,
            Err(error) => return Err(explain(&error)),
        };
        let reason = tokio::select! {
            parting = self.listen((connection, recv), orders, outbox.clone()) => return parting,
            reason = self.speak(send, outgoing) => reason,
            reason = self.leave(outbox.clone()) => reason,
            reason = self.place(placements, outbox.clone()) => reason,
            reason = self.report(outbox) => reason,
            reason = self.lanes(connection) => reason,
            () = self.stop.out_of_time(GOODBYE_WITHIN) => "the router does not read this node's goodbye".to_owned(),
        };
        Err(reason)
    }

    /// Introduces the node, then writes what is to be said until that is goodbye.
    async fn speak(&self, mut send: SendStream, mut outgoing: mpsc::Receiver<Message>) -> String {
        let mut next = Message::Hello(self.service.hello());
        let mut leaving = false;
        loop {
            let last = matches!(next, Message::Goodbye(_));
            leaving |= matches!(next, Message::Leaving);
            let frame = match next.encode(&self.config.pool) {
                Ok(frame) => frame,
                Err(error) => return format!("a message cannot be sent: {error}"),
            };
            if last {
                // Fails only on a closed stream, which the write notices.
                drop(send.set_priority(GOODBYE_PRIORITY));
            }
            if let Err(error) = write_frame(&mut send, frame).await {
                return format!("the control stream broke: {error}");
            }
            if last {
                // Behind the last replies, which a slow link may still carry: `Stop::out_of_time` ends the wait.
                let within = if leaving { LEAVING_MAX } else { GOODBYE_WITHIN };
                if send.finish().is_ok() {
                    drop(timeout(within, send.stopped()).await);
                }
                return "this node is stopping".to_owned();
            }
            match outgoing.recv().await {
                Some(message) => next = message,
                None => return "nothing more to say".to_owned(),
            }
        }
    }

    /// At the stop: says that the node leaves, and when the router has let go of it and it has served what was under
    /// way, goodbye. Sessions end with
    /// that, so this never does by itself.
    async fn leave(&self, outbox: mpsc::Sender<Message>) -> String {
        self.stop.wait().await;
        let drained = async {
            self.stop.handed_over().await;
            self.stop.drained(tokio::time::Instant::now() + LEAVING_MAX).await;
        };
        let told = async {
            // Not where it is to end at once: then `drained` is over first.
            if outbox.send(Message::Leaving).await.is_ok() {
                tracing::info!(calls = self.stop.calls_under_way(), "leaving");
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            biased;
            () = drained => {}
            () = told => {}
        }
        let goodbye = Goodbye { reason: "the node is stopping".to_owned() };
        drop(outbox.send(Message::Goodbye(goodbye)).await);
        std::future::pending().await
    }

    /// Reads what the router says: first the roster, then whatever it wants.
    async fn listen(
        &self,
        (connection, mut recv): (&Connection, RecvStream),
        orders: mpsc::Sender<Placement>,
        outbox: mpsc::Sender<Message>,
    ) -> Parting {
        let mut allowed: &[Op] = &[Op::Roster, Op::Goodbye];
        loop {
            let frame = match read_frame(&mut recv, &self.config.pool, allowed).await {
                Ok(Some(frame)) => frame,
                Ok(None) => return Err("the router closed the control stream".to_owned()),
                Err(error) => return Err(format!("the control stream broke: {error}")),
            };
            match Message::decode(&frame) {
                Ok(Message::Roster(shown)) => {
                    if let Err(distrust) = self.hear(shown).await {
                        tracing::error!(address = %connection.remote_address(), %distrust, "this router is not trusted");
                        let reason = distrust.to_string();
                        connection.close(Close::Distrusted.into(), reason.as_bytes());
                        return Err(reason);
                    }
                    allowed = &[Op::Roster, Op::Placement, Op::Ping, Op::Goodbye];
                }
                Ok(Message::Ping(asked)) => {
                    if outbox.try_send(Message::Pong(asked)).is_err() {
                        return Err("the router asks faster than can be answered".to_owned());
                    }
                }
                Ok(Message::Placement(placement)) => {
                    if orders.try_send(placement).is_err() {
                        return Err("the router sends placements faster than they can be loaded".to_owned());
                    }
                }
                Ok(Message::Goodbye(goodbye)) => {
                    return Ok(format!("the router said goodbye: {}", goodbye.reason));
                }
                Ok(_) => return Err("the router said what only a node says".to_owned()),
                Err(error) => return Err(format!("a message of the router was refused: {error}")),
            }
        }
    }

    /// Checks and keeps a roster; saving is for a thread that may wait.
    async fn hear(&self, shown: Vec<u8>) -> Result<(), Distrust> {
        let membership = Arc::clone(&self.config.membership);
        let heard = tokio::task::spawn_blocking(move || membership.hear(&shown));
        heard.await.unwrap_or(Err(Distrust::Cut))
    }

    /// Carries out placements, one after the other.
    async fn place(
        &self,
        mut placements: mpsc::Receiver<Placement>,
        outbox: mpsc::Sender<Message>,
    ) -> String {
        while let Some(placement) = placements.recv().await {
            let epoch = placement.epoch;
            if self.stop.is_triggered() && placement.experts.is_empty() {
                self.stop.release();
                continue;
            }
            if self.stop.is_triggered() {
                let refusal = "the node is stopping".to_owned();
                let placed = Placed { epoch, weight_bytes: 0, refusal };
                drop(outbox.send(Message::Placed(placed)).await);
                continue;
            }
            let (service, placing) = (Arc::clone(&self.service), Arc::clone(&self.placing));
            let loading = tokio::task::spawn_blocking(move || {
                let _placing = placing.lock().unwrap_or_else(PoisonError::into_inner);
                service.place(placement)
            });
            let failed = |error: &tokio::task::JoinError| Placed {
                epoch,
                weight_bytes: 0,
                refusal: format!("loading failed: {error}"),
            };
            let placed = loading.await.unwrap_or_else(|error| failed(&error));
            if outbox.send(Message::Placed(placed)).await.is_err() {
                break;
            }
        }
        "no more placements".to_owned()
    }

    /// Reports every second.
    async fn report(&self, outbox: mpsc::Sender<Message>) -> String {
        let mut ticks = interval(HEALTH_EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let loading = self.service.loading().map(Message::Loading);
            for message in std::iter::once(Message::Health(self.service.health())).chain(loading) {
                if outbox.send(message).await.is_err() {
                    return "nobody to report to".to_owned();
                }
            }
        }
    }

    /// Serves the lanes the router opens; the transport limits how many there are.
    async fn lanes(self: &Arc<Node>, connection: &Connection) -> String {
        let mut lanes = JoinSet::new();
        loop {
            tokio::select! {
                lane = connection.accept_bi() => match lane {
                    Ok((send, recv)) => {
                        lanes.spawn(Arc::clone(self).lane(send, recv));
                    }
                    Err(error) => return explain(&error),
                },
                Some(_) = lanes.join_next() => {}
            }
        }
    }

    async fn lane(self: Arc<Node>, mut send: SendStream, mut recv: RecvStream) {
        if let Err(reset) = self.serve_lane(&mut send, &mut recv).await {
            // Both fail only where the stream is closed already.
            drop((send.reset(reset.into()), recv.stop(reset.into())));
        }
    }

    /// Answers calls until the router ends the lane.
    async fn serve_lane(&self, send: &mut SendStream, recv: &mut RecvStream) -> Result<(), LaneReset> {
        let pool = &self.config.pool;
        let stopped = send.stopped();
        tokio::pin!(stopped);
        loop {
            let frame = match read_frame(recv, pool, &[Op::Call, Op::Probe]).await {
                Ok(Some(frame)) => frame,
                Ok(None) => return Ok(()),
                Err(ReadFrameError::Stream(_)) => return Err(LaneReset::Cancelled),
                Err(ReadFrameError::Frame(error @ FrameError::PoolExhausted(_))) => {
                    tracing::warn!(%error, "a call was dropped");
                    return Err(LaneReset::Busy);
                }
                Err(error) => {
                    tracing::warn!(%error, "a lane was reset");
                    return Err(LaneReset::Frame);
                }
            };
            let received = Instant::now();
            if frame.op() == Op::Probe {
                self.answer_probe(send, &frame).await?;
                continue;
            }
            let under_way = self.stop.begin();
            let answer = match Call::parse(frame) {
                Ok(call) if under_way.is_none() => {
                    refusal_frame(pool, call.head().call, Refusal::Stopping, "the node has left")
                        .map_err(|_| LaneReset::Busy)?
                }
                Ok(call) => {
                    let answer = self.hand_over(call, received);
                    tokio::select! {
                        biased;
                        answer = answer => answer.map_err(|_| LaneReset::Busy)?,
                        _ = &mut stopped => return Err(LaneReset::Cancelled),
                    }
                }
                Err(bad) => {
                    tracing::warn!(error = %bad.error, "a call was refused");
                    let call = bad.call.ok_or(LaneReset::Frame)?;
                    refusal_frame(pool, call, Refusal::Malformed, &bad.error.to_string())
                        .map_err(|_| LaneReset::Busy)?
                }
            };
            let priority = i32::from(answer.frame().len() <= URGENT_BYTES_MAX);
            // Fails only on a closed stream, which the write notices.
            drop(send.set_priority(priority));
            let sent = send.write_chunk(Bytes::from_owner(answer)).await;
            sent.map_err(|_| LaneReset::Cancelled)?;
        }
    }

    /// Answers a probe of the link, behind whatever else there is to send. Nothing is computed for it.
    async fn answer_probe(&self, send: &mut SendStream, frame: &Buffer) -> Result<(), LaneReset> {
        let Ok(Message::Probe(probe)) = Message::decode(frame) else { return Err(LaneReset::Frame) };
        // Bounded when it was decoded.
        let padding = vec![0; probe.answer_bytes as usize];
        let probed = Message::Probed(Probed { id: probe.id, padding });
        let answer = probed.encode(&self.config.pool).map_err(|_| LaneReset::Busy)?;
        drop(send.set_priority(PROBE_PRIORITY));
        write_frame(send, answer).await.map_err(|_| LaneReset::Cancelled)
    }

    fn hand_over(&self, call: Call, received: Instant) -> oneshot::Receiver<Buffer> {
        let budget = Duration::from_micros(u64::from(call.head().budget_us));
        let (sink, receiver) = sink(call.head().call, received + budget, &self.config.pool);
        self.service.call(call, sink);
        receiver
    }
}

/// What went wrong, and what to do where we know.
pub(crate) fn explain(error: &ConnectionError) -> String {
    match error {
        ConnectionError::TransportError(inner) if inner.reason.contains("certificate") => format!(
            "{error}; the machine at this address is not this cluster's router: check the address, or join the new \
             cluster with a token and another --state"
        ),
        ConnectionError::ConnectionClosed(close) if u64::from(close.error_code) & 0xff00 == TLS_ALERTS => {
            format!(
                "{error}; the router does not take this machine's key or protocol version: check that both run the same \
             version, and join again with a new token if the router's state was lost"
            )
        }
        ConnectionError::TimedOut => "no answer; is the router running, is UDP let through?".to_owned(),
        _ => error.to_string(),
    }
}

/// What a failure to connect means. Nobody has proven to be the router yet, so nothing is final: where another router
/// answers, or one of another version, ours may yet be found.
fn judge_dialing(error: &ConnectionError) -> End {
    match error {
        // It is too busy to shake hands, or about to end.
        ConnectionError::ConnectionClosed(close)
            if close.error_code == TransportErrorCode::CONNECTION_REFUSED =>
        {
            End::Unreachable
        }
        ConnectionError::ConnectionClosed(_) | ConnectionError::TransportError(_) => End::Refused,
        _ => End::Unreachable,
    }
}

/// What the end of a connection whose router has proven its key means.
fn judge(error: &ConnectionError) -> Result<End, StationError> {
    let is = |code, close: Close| code == quinn::VarInt::from(close);
    match error {
        error if is_revocation(error) => Err(StationError::Revoked),
        // A refusal of our key comes after the handshake, from our side of it.
        ConnectionError::ConnectionClosed(_) => Ok(End::Refused),
        ConnectionError::ApplicationClosed(closed)
            if is(closed.error_code, Close::Goodbye) || is(closed.error_code, Close::Broken) =>
        {
            Ok(End::Served)
        }
        ConnectionError::ApplicationClosed(_) => Ok(End::Refused),
        // This node closed it, as it does not believe this router.
        ConnectionError::LocallyClosed => Ok(End::Refused),
        _ => Ok(End::Served),
    }
}
