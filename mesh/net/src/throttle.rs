//! Lines of the log that anybody out there can cause.
//!
//! A stranger who knocks ten times a second must not be able to fill the router's disk, or to hide what else happens.
//! So of each kind of such lines the first is written at once, and what follows within a minute is only counted, to be
//! summed up in one line when the minute is over. The memory is two numbers per kind, whoever comes. The price: the
//! addresses of all but the first are not written down (`-v` shows them). The clock is the caller's.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Between two lines of a kind. An operator who reads the log sees an attack within a minute, and a day of it takes
/// 1440 lines.
pub(crate) const EVERY: Duration = Duration::from_secs(60);

/// One kind of lines.
#[derive(Debug, Default)]
pub(crate) struct Throttle(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// When the last line was written.
    written: Option<Instant>,
    /// What was not written since.
    held: u64,
}

impl State {
    fn rests(&self, now: Instant) -> bool {
        self.written.is_some_and(|written| now.saturating_duration_since(written) < EVERY)
    }
}

impl Throttle {
    /// Something of this kind happened: whether to write it down. What is not written is counted.
    pub(crate) fn admits(&self, now: Instant) -> bool {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.rests(now) {
            state.held = state.held.saturating_add(1);
            return false;
        }
        state.written = Some(now);
        true
    }

    /// How many were held back, once it is time to say so; asking takes them out.
    pub(crate) fn due(&self, now: Instant) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if state.held == 0 || state.rests(now) {
            return None;
        }
        state.written = Some(now);
        Some(std::mem::take(&mut state.held))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_is_written_the_rest_is_summed_up_once_a_minute() {
        let (throttle, start) = (Throttle::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(throttle.due(at(0)), None);
        assert!(throttle.admits(at(0)));
        assert!((1..=9).all(|second| !throttle.admits(at(second))));
        assert_eq!(throttle.due(at(59)), None, "the minute is not over");
        assert_eq!(throttle.due(at(60)), Some(9));
        assert_eq!(throttle.due(at(60)), None, "said once");
        // The sum was a line, too: the next one waits for its minute.
        assert!(!throttle.admits(at(61)));
        assert_eq!(throttle.due(at(120)), Some(1));
        // After a quiet minute the first is written at once again, and nothing is lost if nobody asked in between.
        assert_eq!(throttle.due(at(500)), None);
        assert!(throttle.admits(at(500)));
        assert!(!throttle.admits(at(510)) && throttle.admits(at(560)));
        assert_eq!(throttle.due(at(620)), Some(1));
    }
}
