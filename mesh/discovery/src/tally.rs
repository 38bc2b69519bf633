//! What discovery has seen, counted: for the log, for `moemesh doctor net`, and for tests.

use std::sync::{Arc, Mutex, PoisonError};

/// What was seen so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// Records that mDNS brought, of anybody.
    pub records: u64,
    /// Addresses that mDNS knows at the moment, of anybody.
    pub others: usize,
    /// Candidates that were dialed.
    pub asked: u64,
    /// Dials that ended without the right key.
    pub failed: u64,
    /// Candidates that proved to be who they were said to be.
    pub proven: u64,
    /// Connections refused: strangers, and too many at once.
    pub refused: u64,
    /// Questions answered.
    pub answered: u64,
    /// Sessions that ended in a flood.
    pub floods: u64,
}

/// `Seen`, as the session writes it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally(Arc<Mutex<Seen>>);

impl Tally {
    /// Counts something.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Seen)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// What there is so far.
    pub(crate) fn seen(&self) -> Seen {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
