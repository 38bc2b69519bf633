//! Plans, made beside the network: where they are worked out, and what there is to say of them.
//!
//! A plan for many nodes takes longer than a call, so it is made on a thread that may be busy, and comes back as an event.
//! What the compute thread counted goes the same way. Refuses to decide anything.

use std::time::Instant;

use mesh_proto::changes::Change;
use mesh_proto::cluster::Event;
use mesh_proto::planner::{Task, Work};
use mesh_proto::popularity::Counts;

use super::{Command, Hub, Shared};

impl Hub {
    /// What the last change of the placement was, if there is a placement.
    pub fn last_change(&self) -> Option<Change> {
        self.shared.cluster().last_change().cloned()
    }

    /// What the change is that nodes are loading for.
    pub fn coming_change(&self) -> Option<Change> {
        self.shared.cluster().coming_change().cloned()
    }

    /// Hands over how many rows wanted each expert. Never waits: where too much is to be done already, they are lost.
    pub fn note_used(&self, counts: Counts) {
        drop(self.commands.try_send(Command::Feed(Event::Used(Box::new(counts)))));
    }
}

impl Shared {
    /// Works a plan out where nothing waits for it.
    pub(super) fn plan_elsewhere(&self, task: Box<Task>) {
        let commands = self.commands.clone();
        let work = move || {
            let started = Instant::now();
            let proposal = Box::new(task.work());
            let ms = started.elapsed().as_millis();
            match (&task.work, &proposal.plan) {
                (Work::Forecast, _) => tracing::debug!(ms, "what is to be expected was worked out"),
                (_, Some(_)) => {
                    tracing::info!(ms, bytes = proposal.moved_bytes, "a new placement was worked out");
                }
                (_, None) => tracing::debug!(ms, "no better placement was found"),
            }
            // Closed only where the hub has ended, and nobody waits for plans.
            drop(commands.blocking_send(Command::Feed(Event::Planned(proposal))));
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(work)),
            Err(error) => tracing::error!(%error, "a plan cannot be made outside the network's runtime"),
        }
    }
}
