//! Decides which nodes are to be spared because they are hot.
//!
//! A processor that gets too hot slows itself down, and every layer that waits for it with it. Its temperature tells so
//! seconds before. From `HOT_FROM_MC` on, or when it reports that it was slowed down, a node is hot: whoever else holds
//! an expert is asked instead, and it is asked only for what no other can do. That lets it cool without a request
//! noticing, and it never makes anything fail.
//!
//! What cools is asked again, warms up, and would be spared again: so a node is hot until it is well below
//! (`COOL_BELOW_MC`) and was not slowed down for `CHANGE_EVERY_MIN`, and changes at most that often. The price: a node that
//! gets hot again within that time computes on, as slow as it is by then; late calls are hedged as ever. A node that
//! says nothing of its temperature is not hot. Refuses to look at clocks: reports come with their time.

use std::time::Duration;

use mesh_wire::control::Vitals;

/// A node this hot is spared, thousandths of a degree Celsius. Processors for desks and laptops slow down at 90 to 105,
/// the small boards at 80 to 85 degrees: late for those, which report by themselves that they were slowed down, and early
/// enough for the others, which gain a degree a second under full load.
pub const HOT_FROM_MC: i32 = 82_000;

/// One that is hot is asked again from here down. Idle processors fall by ten degrees within seconds whatever their case
/// and fan do; the rest is the room, and waiting for that would spare a machine for the whole summer.
pub const COOL_BELOW_MC: i32 = 75_000;

/// Least time between two changes: what a heat sink takes to show what a change of load did.
pub const CHANGE_EVERY_MIN: Duration = Duration::from_secs(30);

/// What a report changed. Shown to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is to be spared, at this temperature (thousandths of a degree), if it says.
    Hot(Option<i32>),
    /// It is as good as any other again.
    Cool,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Change::Hot(Some(mc)) if *mc >= HOT_FROM_MC => {
                write!(f, "is hot ({} C): others are asked before it", mc / 1000)
            }
            Change::Hot(_) => f.write_str("was slowed down by its own system: others are asked before it"),
            Change::Cool => f.write_str("has cooled down"),
        }
    }
}

/// One node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Heat {
    hot: bool,
    /// When it last changed.
    changed: Option<Duration>,
    /// When it last had a reason to be hot.
    reason: Option<Duration>,
}

impl Heat {
    /// Whether others are to be asked before it.
    pub fn is_hot(&self) -> bool {
        self.hot
    }

    /// Takes in what its sensors show at time `now`, which never goes back. What that changes, if anything.
    pub fn report(&mut self, now: Duration, vitals: Vitals) -> Option<Change> {
        let at_least = |limit| vitals.temperature_mc.is_some_and(|mc| mc >= limit);
        let slowed = vitals.throttled == Some(true);
        if slowed || at_least(if self.hot { COOL_BELOW_MC } else { HOT_FROM_MC }) {
            self.reason = Some(now);
        }
        let since = |time: Option<Duration>| time.map_or(Duration::MAX, |time| now.saturating_sub(time));
        let hot = if self.hot { since(self.reason) < CHANGE_EVERY_MIN } else { self.reason == Some(now) };
        if hot == self.hot || since(self.changed) < CHANGE_EVERY_MIN {
            return None;
        }
        (self.hot, self.changed) = (hot, Some(now));
        Some(if hot { Change::Hot(vitals.temperature_mc) } else { Change::Cool })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(degrees: i32) -> Vitals {
        Vitals { temperature_mc: Some(degrees * 1000), ..Vitals::default() }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_node_is_spared_with_the_first_report_of_82_degrees() {
        let mut heat = Heat::default();
        for (second, degrees) in (60..82).enumerate() {
            assert_eq!(heat.report(seconds(second as u64), at(degrees)), None);
        }
        assert_eq!(heat.report(seconds(22), at(82)), Some(Change::Hot(Some(82_000))));
        assert!(heat.is_hot());
    }

    #[test]
    fn a_node_that_throttles_is_spared_however_cool_it_says_it_is() {
        let mut heat = Heat::default();
        let slowed = Vitals { throttled: Some(true), ..at(60) };
        assert_eq!(heat.report(seconds(0), slowed), Some(Change::Hot(Some(60_000))));
        let mut mute = Heat::default();
        assert_eq!(
            mute.report(seconds(0), Vitals { throttled: Some(true), ..Vitals::default() }),
            Some(Change::Hot(None))
        );
    }

    #[test]
    fn it_is_asked_again_when_it_was_well_below_for_long_enough() {
        let mut heat = Heat::default();
        heat.report(seconds(0), at(90));
        // Between the limits nothing changes, however long that lasts.
        for second in 1..100 {
            assert_eq!(heat.report(seconds(second), at(76)), None);
        }
        for second in 100..129 {
            assert_eq!(heat.report(seconds(second), at(60)), None, "{second}");
        }
        assert_eq!(heat.report(seconds(129), at(60)), Some(Change::Cool));
        assert!(!heat.is_hot());
    }

    #[test]
    fn whatever_is_reported_it_changes_every_30_seconds_at_most() {
        for period in [1, 2, 7, 29, 31, 45, 200] {
            let mut heat = Heat::default();
            let mut changes = Vec::new();
            for second in 0..3000_u64 {
                let degrees = if second / period % 2 == 0 { 95 } else { 30 };
                changes.extend(heat.report(seconds(second), at(degrees)).map(|_| second));
            }
            assert!(!changes.is_empty());
            assert!(changes.windows(2).all(|two| two[1] - two[0] >= 30), "{period}: {changes:?}");
        }
    }

    #[test]
    fn nothing_known_is_not_hot_and_reports_do_not_have_to_come() {
        let mut heat = Heat::default();
        assert_eq!(heat.report(seconds(0), Vitals::default()), None);
        heat.report(seconds(1), at(99));
        // Its sensor is gone: after a while it counts as any other.
        assert_eq!(heat.report(seconds(500), Vitals::default()), Some(Change::Cool));
    }
}
