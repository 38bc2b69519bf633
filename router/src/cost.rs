//! Where the time of a step went, and what crossed the wire.

use std::time::{Duration, Instant};

/// Where the time of a step went, and what crossed the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepCost {
    /// Attention halves, embeddings included; norms and the quantizing of rows are part of it.
    pub attention: Duration,
    /// Norm and gate before the experts.
    pub gate: Duration,
    /// Building and sending calls.
    pub send: Duration,
    /// Routed experts computed here, their sums included.
    pub experts: Duration,
    /// Dense and shared blocks.
    pub ffn: Duration,
    /// Waiting for replies.
    pub wait: Duration,
    /// Adding replies up.
    pub combine: Duration,
    /// Last norm and head.
    pub head: Duration,
    /// Bytes of calls.
    pub bytes_out: u64,
    /// Bytes of replies.
    pub bytes_in: u64,
    /// Calls sent.
    pub calls: u64,
    /// Times that experts of calls were computed here after all.
    pub fallbacks: u64,
    /// Calls sent beside others that were late.
    pub hedges: u64,
    /// Late calls that were answered by others first.
    pub hedges_won: u64,
    /// Calls sent for others that had failed.
    pub retries: u64,
    /// Rows times experts.
    pub assignments: u64,
    /// Of those, planned to be computed here.
    pub assignments_here: u64,
}

impl StepCost {
    /// Adds another step's cost.
    pub fn add(&mut self, other: &StepCost) {
        self.attention += other.attention;
        self.gate += other.gate;
        self.send += other.send;
        self.experts += other.experts;
        self.ffn += other.ffn;
        self.wait += other.wait;
        self.combine += other.combine;
        self.head += other.head;
        self.bytes_out += other.bytes_out;
        self.bytes_in += other.bytes_in;
        self.calls += other.calls;
        self.fallbacks += other.fallbacks;
        self.hedges += other.hedges;
        self.hedges_won += other.hedges_won;
        self.retries += other.retries;
        self.assignments += other.assignments;
        self.assignments_here += other.assignments_here;
    }
}

/// Adds the time since `since` to `total` and restarts the clock.
pub(crate) fn lap(since: &mut Instant, total: &mut Duration) {
    let now = Instant::now();
    *total += now - *since;
    *since = now;
}
