//! What the network asks of a node: who it is, to hold experts, to compute, how it is doing.
//!
//! Runs on the network thread, so nothing here waits but `place`, which the network calls on a thread for it. Calls
//! go to the queue; a full queue is said at once, because the router can compute in the time an answer would take.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mesh_net::station::{NodeService, ReplySink};
use mesh_wire::call::Call;
use mesh_wire::control::{self, Health, Hello, Placed, Placement, Refusal, Vitals};
use mesh_wire::id::Slice;

use crate::batch::{Job, Queue, Rejected};
use crate::sensors::Watch;
use crate::shard::{Fetching, Shard};
use crate::worker::Counters;

/// The node, as the network sees it.
#[derive(Debug)]
pub struct Service {
    hello: Hello,
    shard: Arc<Shard>,
    queue: Arc<Queue>,
    counters: Arc<Counters>,
    /// Calls that were not even queued.
    rejected: AtomicU64,
    loading: Mutex<Option<Loading>>,
    sensors: Option<Watch>,
}

/// How far a placement is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loading {
    /// Which.
    pub epoch: u64,
    /// Experts that are in memory.
    pub done: u64,
    /// Experts of the placement.
    pub total: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

impl Service {
    /// Answers with `hello`; its `held_epoch` is filled in at every connection.
    pub fn new(hello: Hello, shard: Arc<Shard>, queue: Arc<Queue>, counters: Arc<Counters>) -> Service {
        let (rejected, loading) = (AtomicU64::new(0), Mutex::default());
        Service { hello, shard, queue, counters, rejected, loading, sensors: None }
    }

    /// Reports what these show, too.
    pub fn with_sensors(self, sensors: Watch) -> Service {
        Service { sensors: Some(sensors), ..self }
    }

    /// What the machine's sensors showed last.
    pub fn vitals(&self) -> Vitals {
        self.sensors.as_ref().map(Watch::vitals).unwrap_or_default()
    }

    /// The placement that is being loaded now.
    pub fn loading(&self) -> Option<Loading> {
        *self.loading.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls refused because too many were waiting.
    pub fn rejected(&self) -> u64 {
        self.rejected.load(Ordering::Relaxed)
    }

    /// Takes a call, or says at once why not.
    pub fn enqueue(&self, job: Job) {
        let Err((job, rejected)) = self.queue.push(job) else { return };
        self.rejected.fetch_add(1, Ordering::Relaxed);
        match rejected {
            Rejected::Full => job.answer.refuse(Refusal::Busy, "too many calls wait at this node"),
            Rejected::Closed => job.answer.refuse(Refusal::Stopping, "the node is shutting down"),
        }
    }

    fn set_loading(&self, loading: Option<Loading>) {
        *self.loading.lock().unwrap_or_else(PoisonError::into_inner) = loading;
    }
}

impl NodeService for Service {
    fn hello(&self) -> Hello {
        Hello { held_epoch: self.shard.epoch(), ..self.hello.clone() }
    }

    fn place(&self, placement: Placement) -> Placed {
        let (epoch, total) = (placement.epoch, placement.experts.len() as u64);
        tracing::info!(epoch, experts = total, "loading a placement");
        let shape = self.shard.shape();
        let width = |slice: &Slice| shape.width(slice).map_or(0, |width| shape.bytes(width));
        let bytes = placement.experts.iter().map(width).sum();
        self.set_loading(Some(Loading { epoch, done: 0, total, bytes }));
        let placed = self.shard.place(&placement, &mut |done, total| {
            self.set_loading(Some(Loading { epoch, done, total, bytes }));
        });
        self.set_loading(None);
        match placed {
            Ok(weight_bytes) => {
                tracing::info!(epoch, weight_bytes, "serving");
                Placed { epoch, weight_bytes, refusal: String::new() }
            }
            Err(error) => {
                tracing::error!(epoch, "the placement is refused: {error}");
                Placed { epoch, weight_bytes: self.shard.weight_bytes(), refusal: error.to_string() }
            }
        }
    }

    /// What is fetched, and then what is read into memory; both count from nothing.
    fn loading(&self) -> Option<control::Loading> {
        if let Some(Fetching { bytes, peer_bytes, .. }) = self.shard.fetching() {
            let (done_bytes, total_bytes) = bytes;
            return Some(control::Loading { done_bytes, total_bytes, peer_bytes });
        }
        let loading = Service::loading(self)?;
        let done_bytes = loading.bytes / loading.total.max(1) * loading.done;
        Some(control::Loading { done_bytes, total_bytes: loading.bytes, peer_bytes: 0 })
    }

    fn call(&self, call: Call, sink: ReplySink) {
        self.enqueue(Job { call, answer: Box::new(sink) });
    }

    fn health(&self) -> Health {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Health {
            epoch: self.shard.epoch(),
            calls: load(&self.counters.calls),
            rows: load(&self.counters.rows),
            busy_us: load(&self.counters.busy_us),
            // Bounded by `QUEUE_CALLS_MAX`.
            queued: self.queue.len() as u32,
            resident_bytes: resident_bytes(),
            vitals: self.vitals(),
        }
    }
}

/// Resident memory of this process; 0 where the system has no `/proc`.
pub fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests;
