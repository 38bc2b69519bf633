//! What a token costs in energy: what nodes used over a window, divided by the tokens generated in it.
//!
//! Nodes report how much they have used since they started, tokens are counted here, and neither says when. So both are
//! noted every `EVERY`, and what is told is the quotient over the last `MARKS` of these: coarse on purpose, as a draw by
//! the second would tell about the text, and no meter of a machine is that good. A node that started again begins at
//! zero; what it used before stays counted. The price: energy of idle machines counts for whatever tokens there were, and
//! machines that run several nodes are counted for each. Refuses to guess for nodes that do not say.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How often energy and tokens are noted.
pub(crate) const EVERY: Duration = Duration::from_secs(10);

/// Notes that the window spans: a minute of them, and the one it begins with.
const MARKS: usize = 7;

/// One note.
#[derive(Clone, Debug, Default)]
struct Mark {
    tokens: u64,
    /// By node: millijoules since the router started.
    used_mj: Vec<u64>,
}

/// One node's figures.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct NodeEnergy {
    /// Whole joules that it used while the router ran; none where it does not say.
    pub(crate) joules: Option<u64>,
    /// Joules per token of the cluster, over the window; none without tokens.
    pub(crate) per_token: Option<f64>,
}

#[derive(Debug, Default)]
struct Book {
    marks: VecDeque<Mark>,
    /// By node: what it last reported, millijoules, and how much it used so far.
    known: Vec<(Option<u64>, u64)>,
}

/// The figures, shared between who notes and who reads.
#[derive(Clone, Debug, Default)]
pub(crate) struct Energy(Arc<Mutex<Book>>);

impl Energy {
    /// Notes tokens generated so far, and what each node reports, millijoules.
    pub(crate) fn note(&self, tokens: u64, reported: &[Option<u64>]) {
        let mut book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if book.known.len() < reported.len() {
            book.known.resize(reported.len(), (None, 0));
        }
        for ((last, used), now) in book.known.iter_mut().zip(reported) {
            let Some(now) = *now else { continue };
            let more = match *last {
                // What it used before this router looked is not this router's.
                None => 0,
                Some(last) if now >= last => now - last,
                // It started again.
                Some(_) => now,
            };
            (*last, *used) = (Some(now), used.saturating_add(more));
        }
        let used_mj = book.known.iter().map(|(_, used)| *used).collect();
        book.marks.push_back(Mark { tokens, used_mj });
        while book.marks.len() > MARKS {
            book.marks.pop_front();
        }
    }

    /// By node.
    pub(crate) fn read(&self) -> Vec<NodeEnergy> {
        let book = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(first), Some(last)) = (book.marks.front(), book.marks.back()) else { return Vec::new() };
        let tokens = last.tokens.saturating_sub(first.tokens);
        let node = |(index, (reported, used)): (usize, &(Option<u64>, u64))| {
            if reported.is_none() {
                return NodeEnergy::default();
            }
            let before = first.used_mj.get(index).copied().unwrap_or(0);
            let millijoules = used.saturating_sub(before) as f64;
            let per_token = (tokens > 0 && millijoules > 0.0).then(|| millijoules / 1000.0 / tokens as f64);
            NodeEnergy { joules: Some(used / 1000), per_token }
        };
        book.known.iter().enumerate().map(node).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn per_token(energy: &Energy) -> Vec<Option<f64>> {
        energy.read().iter().map(|node| node.per_token).collect()
    }

    #[test]
    fn a_token_costs_what_was_used_in_the_window_by_those_who_say() {
        let energy = Energy::default();
        assert_eq!(energy.read(), []);
        energy.note(0, &[Some(5_000), None]);
        assert_eq!(per_token(&energy), [None, None], "one note is no window");
        energy.note(10, &[Some(25_000), None]);
        assert_eq!(per_token(&energy), [Some(2.0), None]);
        assert_eq!(energy.read()[0].joules, Some(20));
        assert_eq!(energy.read()[1], NodeEnergy::default(), "unavailable, not zero");
        // A node that joins later counts from its first report.
        energy.note(20, &[Some(45_000), None, Some(1_000_000)]);
        energy.note(20, &[Some(45_000), None, Some(1_004_000)]);
        assert_eq!(per_token(&energy), [Some(2.0), None, Some(0.2)]);
    }

    #[test]
    fn a_node_that_started_again_goes_on_from_what_it_used() {
        let energy = Energy::default();
        for (tokens, reported) in [(0, 100_000), (1, 101_000), (2, 500), (3, 1_500)] {
            energy.note(tokens, &[Some(reported)]);
        }
        assert_eq!(energy.read()[0].joules, Some(2));
        energy.note(3, &[None]);
        assert_eq!(energy.read()[0].joules, Some(2), "a report that is missing takes nothing away");
    }

    #[test]
    fn only_the_last_minute_counts_and_idle_has_no_price() {
        let energy = Energy::default();
        energy.note(0, &[Some(0)]);
        energy.note(1000, &[Some(1_000_000)]);
        for minute in 1..8 {
            energy.note(1000, &[Some(1_000_000 + minute)]);
        }
        assert_eq!(per_token(&energy), [None]);
        energy.note(1002, &[Some(1_004_007)]);
        assert!((per_token(&energy)[0].unwrap() - 2.0).abs() < 0.01, "{:?}", per_token(&energy));
    }
}
