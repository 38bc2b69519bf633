//! The node: puts the parts together, starts their two threads and ends them.
//!
//! The worker thread computes. While it waits for a call it drives the network itself, so that a decode call is
//! computed by the thread that read it and answered by the thread that computed it. The network thread does so at
//! all other times and never computes (`mesh_net::helm`). Between them is the queue. If either ends, the other is
//! ended too: half a node would only make the router wait.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_net::helm::Helm;
use mesh_net::keys::{KeyError, random};
use mesh_net::membership::Membership;
use mesh_net::station::{Station, StationConfig, StationError, Stop};
use mesh_wire::buffer::Pool;
use mesh_wire::control::{Hello, Refusal};
use model::kernel::Kernels;

use crate::batch::Queue;
use crate::measure::weight_mb_s;
use crate::sensors::Watch;
use crate::serve::{Loading, Service, resident_bytes};
use crate::shard::{PlaceError, Shard, Source};
use crate::worker::{Counters, Worker};

/// What a node needs to run.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// This machine's key and name, and whom it trusts.
    pub membership: Arc<Membership>,
    /// Where the router may be, tried in order; none: where it was when the machine joined.
    pub routers: Vec<SocketAddr>,
    /// Where experts come from: an `Arc<Model>`.
    pub model: Arc<dyn Source>,
    /// What computes them.
    pub kernels: Arc<dyn Kernels>,
    /// Threads `kernels` computes with, for people.
    pub threads: u16,
    /// Most bytes of experts it will hold.
    pub memory_bytes: u64,
    /// How long the worker looks for packets before it sleeps; zero unless a core is to spare.
    pub spin: Duration,
    /// Bytes of frames that may be under way (`StationConfig::POOL_BYTES_MAX`).
    pub pool_bytes_max: usize,
    /// Where the system shows its sensors (`sensors::SYSFS`).
    pub sysfs: PathBuf,
}

/// Why a node does not start, or ended.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The experts on which the machine is measured cannot be loaded.
    #[error("measuring this machine: {0}")]
    Measure(#[from] PlaceError),
    /// The network part did not start, or ended.
    #[error(transparent)]
    Station(#[from] StationError),
    /// The system gives no random numbers.
    #[error(transparent)]
    Chance(#[from] KeyError),
    /// A thread could not be started.
    #[error("starting a thread: {0}")]
    Thread(#[from] std::io::Error),
    /// A thread panicked; the message is in the log.
    #[error("the {0} thread panicked: this is a bug, please report the log")]
    Panicked(&'static str),
}

/// What a running node can say of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeSnapshot {
    /// Newest epoch it holds, 0 for none.
    pub epoch: u64,
    /// Bytes of experts in memory.
    pub weight_bytes: u64,
    /// The placement it is loading.
    pub loading: Option<Loading>,
    /// Whether it serves its last calls (`ExpertNode::drain`).
    pub leaving: bool,
    /// Calls that wait, are computed or are being answered.
    pub under_way: u32,
    /// Calls that wait.
    pub queued: usize,
    /// Calls answered with sums.
    pub calls: u64,
    /// Rows of those.
    pub rows: u64,
    /// Microseconds in kernels.
    pub busy_us: u64,
    /// Calls refused, for any reason.
    pub refused: u64,
    /// Calls dropped because nobody waited any more.
    pub unwanted: u64,
    /// Panics of kernels.
    pub panics: u64,
    /// Resident memory of the process, 0 where unknown.
    pub resident_bytes: u64,
}

/// A running node. Dropping it stops it without waiting.
#[derive(Debug)]
pub struct ExpertNode {
    hello: Hello,
    service: Arc<Service>,
    shard: Arc<Shard>,
    queue: Arc<Queue>,
    counters: Arc<Counters>,
    stop: Stop,
    threads: Option<Threads>,
}

#[derive(Debug)]
struct Threads {
    network: JoinHandle<Result<(), StationError>>,
    worker: JoinHandle<()>,
}

impl ExpertNode {
    /// Measures the machine (`measure`), then starts the threads. The router is dialed from then on, for as long as
    /// the node runs; `join` tells if that cannot work at all.
    ///
    /// # Errors
    /// `Measure`, `Thread`, `Chance`.
    pub fn start(config: NodeConfig) -> Result<ExpertNode, NodeError> {
        let hello = hello(&config, weight_mb_s(&*config.model, &*config.kernels)?)?;
        let shard = Arc::new(Shard::new(config.model, config.kernels, config.memory_bytes));
        let queue = Arc::new(Queue::default());
        let pool = Pool::new(config.pool_bytes_max);
        let helm = Arc::new(Helm::new(config.spin)?);
        let worker = Worker::new(Arc::clone(&queue), Arc::clone(&shard), pool.clone());
        let worker = worker.at(Arc::clone(&helm));
        let counters = worker.counters();
        let service =
            Service::new(hello.clone(), Arc::clone(&shard), Arc::clone(&queue), Arc::clone(&counters));
        let computing = Arc::clone(&counters);
        let sensors = Watch::start(&config.sysfs, move || computing.busy_us.load(Ordering::Relaxed))?;
        let service = service.with_sensors(sensors);
        let (service, stop) = (Arc::new(service), Stop::new());

        let ended = StopOnDrop(stop.clone());
        let worker = spawn("experts", move || {
            let _ended = ended;
            worker.run();
        })?;
        let NodeConfig { membership, routers, .. } = config;
        let station = StationConfig { membership, routers, pool };
        let ended = CloseOnDrop { queue: Arc::clone(&queue), shard: Arc::clone(&shard) };
        let (calls, stopped) = (Arc::clone(&service), stop.clone());
        let network = spawn("network", move || {
            let _ended = ended;
            Station::run_at(&helm, station, calls, &stopped)
        })?;
        let threads = Some(Threads { network, worker });
        Ok(ExpertNode { hello, service, shard, queue, counters, stop, threads })
    }

    /// How it introduces itself, with the measured bandwidths.
    pub fn hello(&self) -> &Hello {
        &self.hello
    }

    /// How it is doing.
    pub fn snapshot(&self) -> NodeSnapshot {
        let counters = &self.counters;
        NodeSnapshot {
            epoch: self.shard.epoch(),
            weight_bytes: self.shard.weight_bytes(),
            loading: self.service.loading(),
            leaving: self.stop.is_triggered(),
            under_way: self.stop.calls_under_way(),
            queued: self.queue.len(),
            calls: counters.calls.load(Ordering::Relaxed),
            rows: counters.rows.load(Ordering::Relaxed),
            busy_us: counters.busy_us.load(Ordering::Relaxed),
            refused: counters.refused.load(Ordering::Relaxed) + self.service.rejected(),
            unwanted: counters.unwanted.load(Ordering::Relaxed),
            panics: counters.panics.load(Ordering::Relaxed),
            resident_bytes: resident_bytes(),
        }
    }

    /// Ends it from any thread: for signals. `Stop::leave` as `drain`, `Stop::trigger` as `shutdown`.
    pub fn stop(&self) -> Stop {
        self.stop.clone()
    }

    /// Begins to end it without loss: tells the router that it leaves, serves what is under way and what still comes,
    /// then says goodbye. A second time it ends at once. `join` waits for that.
    pub fn drain(&self) {
        self.stop.leave();
    }

    /// Begins to end it: says goodbye to the router, refuses what waits. `join` waits for that.
    pub fn shutdown(&self) {
        self.stop.trigger();
    }

    /// Waits until it has ended, by `shutdown` or by itself.
    ///
    /// # Errors
    /// `Station` where it could not run at all, `Panicked`.
    pub fn join(mut self) -> Result<(), NodeError> {
        let Some(Threads { network, worker }) = self.threads.take() else { return Ok(()) };
        let network = network.join();
        let worker = worker.join();
        network.map_err(|_| NodeError::Panicked("network"))??;
        worker.map_err(|_| NodeError::Panicked("experts"))
    }
}

impl Drop for ExpertNode {
    fn drop(&mut self) {
        self.shutdown();
    }
}

/// Ends the network when the worker ends.
struct StopOnDrop(Stop);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.trigger();
    }
}

/// Ends the worker, and a load that is going on, when the network ends.
struct CloseOnDrop {
    queue: Arc<Queue>,
    shard: Arc<Shard>,
}

impl Drop for CloseOnDrop {
    fn drop(&mut self) {
        self.shard.end();
        for job in self.queue.close() {
            job.answer.refuse(Refusal::Stopping, "the node is shutting down");
        }
    }
}

fn spawn<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, std::io::Error> {
    std::thread::Builder::new().name(name.to_owned()).spawn(run)
}

fn hello(config: &NodeConfig, weight_mb_s: [u32; 5]) -> Result<Hello, KeyError> {
    Ok(Hello {
        name: config.membership.admission().name.clone(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        model: config.model.fingerprint(),
        memory_bytes: config.memory_bytes,
        threads: config.threads,
        exact: config.kernels.exact(),
        kernels: format!("{} {}", config.kernels.name(), config.kernels.isa()),
        weight_mb_s,
        held_epoch: 0,
        instance: u64::from_le_bytes(random()?),
    })
}

#[cfg(test)]
mod tests;
