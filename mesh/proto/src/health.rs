//! Decides which nodes are trusted with calls, from answers and misses.
//!
//! A call that is late is sent to another holder, or computed on the router, so a wrong alarm costs time and never
//! text, while a missed alarm costs the user a stall. Three questions, answered per node:
//!
//! * How long may a call take? Two multiples of what calls of its size took lately (a moving average per power of
//!   two of assignments: one row streams weights, a thousand compute on cached ones, and no straight line goes
//!   through both): after the smaller one another holder is asked as well, after the larger one nobody waits any
//!   more. Before there is history: what the node's measured bandwidth and link predict.
//! * Who gets calls at all? After a few misses in a row a node is suspect and gets none; after a pause, longer each
//!   time, it is tried again with one call. The same for one whose connection is lost again and again (`Flaps`).
//! * Who gets calls only where nobody else can? One of whose calls is late (`Doubts`).
//!
//! The price: a node that is alive but was slow for a moment may be left out for a second. This module refuses to
//! look at a clock or at connections; those are events of `cluster`.

use std::time::Duration;

use crate::routes::NodeIndex;

/// No call is given up before this. On a small machine with more runnable threads than cores a thread waits for
/// tens of milliseconds as a matter of course (50 ms is ordinary); twice that keeps wrong alarms rare, and a
/// dead node still costs only `MISSES_MAX` times this.
pub const BUDGET_FLOOR: Duration = Duration::from_millis(100);

/// Least budget of a size of call nobody has answered yet: its weights may still have to come into the caches,
/// the allocator and the page tables of a process that did nothing so far.
pub const BUDGET_BEFORE_HISTORY: Duration = Duration::from_millis(500);

/// Most a call may take, unless the node is expected to need longer. `MISSES_MAX` of these in a row are 1.5 s:
/// with the router's own computation a killed node stalls a stream for less than 2 s.
pub const BUDGET_CEILING: Duration = Duration::from_millis(750);

/// Budget over expected round trip. Averages hide a spread: four times the mean is beyond what the load of other
/// processes on a machine with two cores adds (it halves the speed), and far below a hang.
pub const BUDGET_FACTOR: f64 = 4.0;

/// Budget over expected round trip where that alone would exceed the ceiling: a board that needs two seconds
/// for a large prefill call must be able to answer it.
pub const SLOW_FACTOR: f64 = 1.5;

/// Another holder is asked no sooner than this. Too early is harmless to the text and bounded in number
/// (`attempts::HedgeBudget`), so this may be below what a busy machine makes a thread wait now and then.
pub const HEDGE_FLOOR: Duration = Duration::from_millis(20);

/// The same for a size of call nobody has answered yet, for the reasons of `BUDGET_BEFORE_HISTORY`.
pub const HEDGE_BEFORE_HISTORY: Duration = Duration::from_millis(100);

/// Time until another holder is asked over expected round trip: beyond twice the mean are fewer than one in
/// twenty calls of a node whose times scatter as those of a thread on a shared core do.
pub const HEDGE_FACTOR: f64 = 2.0;

/// How long a node is doubtful after its last late call, if it answers nothing. As long as the first pause: what is
/// slow for a moment is well again by then, and what is dead costs one hedge more.
pub const DOUBT_MAX: Duration = PAUSE_FIRST;

/// Lost connections within `FLAP_WITHIN` that make a node one that flaps. A node that is restarted, by hand or by its
/// supervisor, and once more because of a typing error, is not meant.
pub const FLAPS_MAX: u32 = 3;

/// How long a lost connection counts, and how long a node has to stay connected to be forgiven.
pub const FLAP_WITHIN: Duration = Duration::from_secs(60);

/// No budget exceeds this, whatever a node's figures predict; frames carry no more (`mesh_wire`).
pub const BUDGET_MAX: Duration = Duration::from_secs(60);

/// Misses in a row that make a node suspect. One may be a lost packet or a busy machine; every one more is another
/// stall of the stream.
pub const MISSES_MAX: u32 = 2;

/// First pause before a suspect node is tried again. A stall of the scheduler or of Wi-Fi is over by then.
pub const PAUSE_FIRST: Duration = Duration::from_secs(1);

/// Longest pause. Trying costs one budget, so a node that stays connected and never answers costs at most a
/// tenth of the time (`PATIENCE_MAX` x `BUDGET_CEILING`), typically a hundredth.
pub const PAUSE_MAX: Duration = Duration::from_secs(30);

/// A failed trial doubles the next trial's budget, at most to this multiple. So a node that is slower than its
/// budget, and therefore never answers in time, is given the time to show it.
pub const PATIENCE_MAX: u32 = 4;

/// Most that is expected of a size of call nobody has answered yet when it is inferred from smaller calls: a guess
/// must not make a stream wait as long as a measurement may.
pub const GUESS_MAX: Duration = Duration::from_secs(2);

/// Weight of a new observation in the moving averages (as the smoothed round trip of TCP, RFC 6298).
const NEW_WEIGHT: f64 = 1.0 / 8.0;

/// Sizes of calls told apart: up to 1, 2, 4, ... 65536 assignments; larger ones count as the last.
const SIZES: usize = 17;

/// Rows at which a node measures its weight bandwidth (`Hello::weight_mb_s`).
pub const MEASURED_ROWS: [u32; 5] = [1, 4, 16, 64, 256];

/// What a node said about its speed, with what turns it into times.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Speed {
    /// MB/s at `MEASURED_ROWS`; 0 where not measured.
    pub weight_mb_s: [u32; 5],
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// Most experts of one layer that it holds.
    pub per_layer: u32,
    /// Round trip of a small message; zero where not measured.
    pub round_trip: Duration,
}

impl Speed {
    /// Predicted service of a call with so many assignments: all of them spread over as many experts as
    /// possible, because that streams the most weights. `None` where nothing was measured.
    fn service(&self, assignments: u32) -> Option<Duration> {
        let experts = assignments.clamp(1, self.per_layer.max(1));
        let rows = assignments.div_ceil(experts);
        let enough = MEASURED_ROWS.iter().position(|measured| *measured >= rows).unwrap_or(4);
        // Where so many rows were not measured, the time grows with the rows from the most that were.
        let slot = (0..=enough).rev().find(|slot| self.weight_mb_s[*slot] > 0)?;
        let times = f64::from(rows.div_ceil(MEASURED_ROWS[slot]));
        let bytes = f64::from(experts) * self.expert_bytes as f64 * times;
        Some(seconds(bytes / (f64::from(self.weight_mb_s[slot]) * 1e6)))
    }
}

/// How long a call may take, from when it is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// Then it is late: somebody else is asked as well, if there is somebody.
    pub hedge: Duration,
    /// Then nobody waits for it any more.
    pub total: Duration,
}

/// Whether calls are sent.
#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    /// Yes; so many misses in a row.
    Trusted { misses: u32 },
    /// Not before this time.
    Suspect { until: Duration },
    /// Yes; the first answer or miss decides.
    Trial,
}

/// What is known of one node's answers since it connected.
#[derive(Clone, Debug)]
pub struct Trust {
    state: State,
    /// Times in a row that it became suspect.
    strikes: u32,
    /// Mean round trip in seconds by size of call.
    round_trip: [Option<f64>; SIZES],
    /// Mean time in kernels and mean round trip of all calls, in seconds.
    means: Option<(f64, f64)>,
}

impl Default for Trust {
    fn default() -> Trust {
        Trust { state: State::Trusted { misses: 0 }, strikes: 0, round_trip: [None; SIZES], means: None }
    }
}

impl Trust {
    /// Whether its experts are the router's for now.
    pub fn is_suspect(&self) -> bool {
        matches!(self.state, State::Suspect { .. })
    }

    /// Whether it is suspect for the first time in a row: it is tried again within `PAUSE_FIRST`.
    pub fn pauses_shortly(&self) -> bool {
        self.is_suspect() && self.strikes == 1
    }

    /// Mean time in kernels and mean round trip of recent calls.
    pub fn means(&self) -> Option<(Duration, Duration)> {
        self.means.map(|(service, round_trip)| (seconds(service), seconds(round_trip)))
    }

    /// A call was answered. A late answer of a suspect node teaches the averages; its pause goes on.
    pub fn answered(&mut self, assignments: u32, service: Duration, round_trip: Duration) {
        let (service, round_trip) = (service.as_secs_f64(), round_trip.as_secs_f64());
        let mean = &mut self.round_trip[size(assignments)];
        *mean = Some(mean.map_or(round_trip, |mean| blend(mean, round_trip)));
        self.means = Some(match self.means {
            None => (service, round_trip),
            Some(means) => (blend(means.0, service), blend(means.1, round_trip)),
        });
        if !self.is_suspect() {
            self.state = State::Trusted { misses: 0 };
            self.strikes = 0;
        }
    }

    /// A call was not answered in time. True if the node became suspect by it.
    pub fn missed(&mut self, now: Duration) -> bool {
        match &mut self.state {
            State::Trusted { misses } if *misses + 1 < MISSES_MAX => {
                *misses += 1;
                return false;
            }
            // Calls that were out when it became suspect.
            State::Suspect { .. } => return false,
            State::Trusted { .. } | State::Trial => {}
        }
        let doublings = self.strikes.min(16);
        let pause = PAUSE_FIRST.saturating_mul(1 << doublings).min(PAUSE_MAX);
        self.strikes = self.strikes.saturating_add(1);
        self.state = State::Suspect { until: now.saturating_add(pause) };
        true
    }

    /// Time passed. True if the node gets calls again.
    pub fn tick(&mut self, now: Duration) -> bool {
        let due = matches!(self.state, State::Suspect { until } if until <= now);
        if due {
            self.state = State::Trial;
        }
        due
    }

    /// How long a call may take, when `assignments` is all that the node has to compute before it can answer.
    pub fn budget(&self, assignments: u32, speed: &Speed) -> Budget {
        let seen = self.expected(assignments);
        let (hedge_floor, floor) = match seen {
            Some(_) => (HEDGE_FLOOR, BUDGET_FLOOR),
            None => (HEDGE_BEFORE_HISTORY, BUDGET_BEFORE_HISTORY),
        };
        let predicted = || speed.service(assignments).unwrap_or_default();
        let (expected, link) = match seen {
            // The link is part of what was seen.
            Some(expected) => (expected, Duration::ZERO),
            None => (predicted(), speed.round_trip),
        };
        let usual = times(expected, BUDGET_FACTOR).saturating_add(link).clamp(floor, BUDGET_CEILING);
        let patience = (1 << self.strikes.min(16)).min(PATIENCE_MAX);
        let slow = times(expected, SLOW_FACTOR).saturating_add(link);
        let total = usual.max(slow).saturating_mul(patience).min(BUDGET_MAX);
        let hedge = times(expected, HEDGE_FACTOR).saturating_add(link).max(hedge_floor).min(total);
        Budget { hedge, total }
    }

    /// Mean round trip of this size; of a size not seen yet, from the nearest smaller one as if no weights were
    /// shared by rows, else from the nearest larger one as it is. Both are upper bounds, the first up to `GUESS_MAX` or
    /// what the smaller one took.
    fn expected(&self, assignments: u32) -> Option<Duration> {
        let own = size(assignments);
        if let Some(mean) = self.round_trip[own] {
            return Some(seconds(mean));
        }
        let smaller = (0..own).rev().find_map(|slot| {
            let mean = self.round_trip[slot]?;
            let guess = mean * f64::from(1_u32 << (own - slot));
            Some(seconds(guess).min(GUESS_MAX.max(seconds(mean))))
        });
        let larger = || self.round_trip[own..].iter().find_map(|mean| *mean);
        smaller.or_else(|| larger().map(seconds))
    }
}

/// Nodes with a call that is later than it should be: as long as that lasts, others are preferred, so that a node
/// that died costs one delay and not one per layer.
#[derive(Clone, Debug, Default)]
pub struct Doubts {
    /// By node; in the past for most.
    until: Vec<Duration>,
    latest: Duration,
}

impl Doubts {
    /// A call is overdue.
    pub fn overdue(&mut self, node: NodeIndex, now: Duration) {
        let index = usize::from(node);
        if self.until.len() <= index {
            self.until.resize(index + 1, Duration::ZERO);
        }
        self.until[index] = now.saturating_add(DOUBT_MAX);
        self.latest = self.latest.max(self.until[index]);
    }

    /// It answered, to whichever call.
    pub fn answered(&mut self, node: NodeIndex) {
        if let Some(until) = self.until.get_mut(usize::from(node)) {
            *until = Duration::ZERO;
        }
    }

    /// Whether others are to be preferred to it.
    pub fn of(&self, node: NodeIndex, now: Duration) -> bool {
        self.until.get(usize::from(node)).is_some_and(|until| *until > now)
    }

    /// Whether there may be any.
    pub fn any(&self, now: Duration) -> bool {
        self.latest > now
    }
}

/// Lost connections of one node, kept while it is away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flaps {
    /// The last ones, oldest first.
    lost: [Option<Duration>; FLAPS_MAX as usize],
    pauses: u32,
    barred_until: Duration,
}

impl Flaps {
    /// Its connection was lost, and not because it said it would leave. How long it gets no calls, if it does this
    /// too often: every further loss doubles that.
    pub fn lost(&mut self, now: Duration) -> Option<Duration> {
        if self.lost.last().copied().flatten().is_some_and(|last| now.saturating_sub(last) > FLAP_WITHIN) {
            *self = Flaps::default();
        }
        self.lost.rotate_left(1);
        *self.lost.last_mut()? = Some(now);
        let oldest = (*self.lost.first()?)?;
        if self.pauses == 0 && now.saturating_sub(oldest) > FLAP_WITHIN {
            return None;
        }
        let pause = PAUSE_FIRST.saturating_mul(1 << self.pauses.min(16)).min(PAUSE_MAX);
        self.pauses = self.pauses.saturating_add(1);
        self.barred_until = now.saturating_add(pause);
        Some(pause)
    }

    /// Whether it gets no calls yet.
    pub fn is_barred(&self, now: Duration) -> bool {
        self.barred_until > now
    }
}

fn size(assignments: u32) -> usize {
    let ceiling = assignments.max(1).checked_next_power_of_two().unwrap_or(1 << 31);
    (ceiling.trailing_zeros() as usize).min(SIZES - 1)
}

fn blend(mean: f64, new: f64) -> f64 {
    mean + (new - mean) * NEW_WEIGHT
}

fn times(duration: Duration, factor: f64) -> Duration {
    seconds(duration.as_secs_f64() * factor)
}

/// Figures of a peer may predict anything; more than `BUDGET_MAX` is as good as that.
fn seconds(value: f64) -> Duration {
    Duration::from_secs_f64(value.clamp(0.0, BUDGET_MAX.as_secs_f64()))
}

#[cfg(test)]
mod tests;
