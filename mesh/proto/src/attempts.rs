//! The life of one layer's calls: whom to ask again and when, until every piece of work is accounted for once.
//!
//! Work is cut into units (an expert or a slice of it, with rows), each with the nodes that could do it. A call carries
//! some units to one node, and its answer is one sum over all of them: it counts whole or not at all. So the rules are
//! about calls, and what holds at the end is about units: each was answered once, computed by the router once, or named
//! as lost.
//!
//! * A call that ends without an answer (refused, rejected, gone, given up) is retried at once: each of its units goes
//!   to the least loaded of its holders that was not tried yet. Where none is left the router computes it. Where it may
//!   not, holders are tried again (`ASKS_MAX`): a request shall not end because one answer of a node that is here was
//!   late. Where none can be asked any more the unit is lost.
//! * A call that is late is hedged: all of its units are sent to other holders as well, once, if each unit has one and
//!   the budget allows (`HedgeBudget`). From then on two sides race, the call and its rivals. The call's answer ends
//!   the race; so do the rivals' answers once all are there; until then theirs are kept back. If the call fails, the
//!   rivals stand for themselves.
//! * Whatever comes after that, late, twice or uncalled for, is dropped, and nothing is added twice.
//!
//! The price: a hedge whose rival fails is not hedged again; the call's deadline decides. The caller carries out what
//! `next` says and reports what happens; there is no clock in here and no IO, and nothing is allocated once the
//! largest layer has been seen. This module refuses to know what a unit is or how nodes are trusted.

use std::collections::VecDeque;
use std::time::Duration;

use crate::health::Budget;
use crate::routes::{Holders, NodeIndex, ROUTER};

/// Calls that allow one hedge: hedges are at most 5 % of calls.
pub const CALLS_PER_HEDGE: u32 = 20;

/// Hedges that may be sent without calls before them. A node that dies has a handful of calls out (a prompt in four
/// parts, each answered by two other holders), and all of them should be hedged at once.
pub const HEDGE_BURST: u32 = 16;

/// How often a unit is sent to somebody where the router may not compute it, hedges included: twice to each of two
/// holders. Two misses in a row make a node suspect (`health::MISSES_MAX`), so that a node that is silent ends this
/// sooner.
pub const ASKS_MAX: u8 = 4;

/// A piece of work, in the order of `Attempts::unit`.
pub type Unit = u32;

/// A call, in the order of `Attempts::ask` and of `Step::Send`.
pub type Call = u32;

/// Whether a node can be asked, and what it has to do already, in the units of `Attempts::unit`'s size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Yes.
    Good(u32),
    /// Yes, but one of its calls is late: only where nobody else can be asked.
    Doubtful(u32),
    /// No: it is away, suspect or leaving.
    Out,
}

/// Keeps hedges to a share of all calls. One for all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HedgeBudget {
    /// In hedges times `CALLS_PER_HEDGE`.
    credit: u32,
}

impl Default for HedgeBudget {
    fn default() -> HedgeBudget {
        HedgeBudget { credit: HEDGE_BURST * CALLS_PER_HEDGE }
    }
}

impl HedgeBudget {
    /// A call that is no hedge was sent.
    pub fn earn(&mut self) {
        self.credit = (self.credit + 1).min(HEDGE_BURST * CALLS_PER_HEDGE);
    }

    /// So many hedges at once, or none.
    fn spend(&mut self, hedges: u32) -> bool {
        let left = hedges.checked_mul(CALLS_PER_HEDGE).and_then(|cost| self.credit.checked_sub(cost));
        self.credit = left.unwrap_or(self.credit);
        left.is_some()
    }
}

/// Some units; `Attempts::list` names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Units {
    from: u32,
    to: u32,
}

impl Units {
    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.from == self.to
    }
}

/// Why a call is of no more use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Why {
    /// Its time is up. It was no answer in time.
    GaveUp,
    /// Its rivals were faster. It may go on: its answer would tell that the node is alive.
    Beaten,
    /// It was a rival, and the call itself was answered.
    Spare,
}

/// What the caller has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Send these units to this node, then say `started`, or `failed` where that cannot be.
    Send {
        /// The new call.
        call: Call,
        /// Whom to ask.
        node: NodeIndex,
        /// What for.
        units: Units,
        /// Whether somebody else has been asked and may still answer.
        hedge: bool,
    },
    /// Compute these here, now. They are accounted for.
    Compute {
        /// What.
        units: Units,
        /// Whether the router does not hold them: they come from its mapped files.
        mapped: bool,
    },
    /// Nobody can be asked for these, and the router may not compute them.
    Lost(Units),
    /// Add the answer of this call to the sums.
    Add(Call),
    /// Forget this call and its answer, if it has one.
    Drop(Call, Why),
    /// The call is later than it should be: its node is doubtful. Told once per call.
    Overdue(Call, NodeIndex),
    /// Wait for an answer or a failure, at most until this time.
    Wait(Duration),
    /// Every unit is accounted for.
    Done,
}

/// What was done about trouble.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Calls sent besides others that were still out.
    pub hedges: u64,
    /// Calls whose rivals were faster.
    pub hedges_won: u64,
    /// Calls sent for others that had failed.
    pub retries: u64,
    /// Answers dropped because they came too late, or twice.
    pub ignored: u64,
}

#[derive(Clone, Copy, Debug)]
struct UnitState {
    holders: Holders,
    /// Bit `i`: `holders[i]` was asked.
    tried: u8,
    /// How often somebody was asked.
    asks: u8,
    size: u32,
    /// It was sent to somebody else while its call was out.
    hedged: bool,
    done: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Told to the caller, not started yet.
    Unsent,
    Open,
    /// Answered; the answer waits for the other rivals'.
    Held,
    Closed,
}

#[derive(Clone, Copy, Debug)]
struct CallState {
    node: NodeIndex,
    units: Units,
    state: State,
    hedge_at: Duration,
    give_up_at: Duration,
    /// `Step::Overdue` was told.
    overdue: bool,
    /// It must not be hedged (again).
    settled: bool,
    /// The call that this one races.
    rival_of: Option<Call>,
    /// Calls that race this one: the first and how many.
    rivals: (Call, u32),
    /// What the router computes once they have answered.
    here: Units,
}

/// See the module. One per layer under way; `clear` makes it ready for the next.
#[derive(Debug, Default)]
pub struct Attempts {
    units: Vec<UnitState>,
    calls: Vec<CallState>,
    /// What `Units` point into.
    lists: Vec<Unit>,
    todo: VecDeque<Step>,
    /// Units of calls that failed. Each list by itself: what fits in one call fits in one again.
    retry: VecDeque<Units>,
    /// Units not accounted for.
    left: usize,
    fallback: bool,
    counts: Counts,
    chosen: Vec<(NodeIndex, Unit)>,
}

impl Attempts {
    /// Forgets everything. `fallback`: whether the router may compute what it does not hold.
    pub fn clear(&mut self, fallback: bool) {
        self.units.clear();
        self.calls.clear();
        self.lists.clear();
        self.todo.clear();
        self.retry.clear();
        self.chosen.clear();
        (self.left, self.fallback, self.counts) = (0, fallback, Counts::default());
    }

    /// A piece of work that any of `holders` can do (`ROUTER`: the router has it in memory), and its size.
    pub fn unit(&mut self, holders: Holders, size: u32) -> Unit {
        self.units.push(UnitState { holders, tried: 0, asks: 0, size, hedged: false, done: false });
        self.left += 1;
        (self.units.len() - 1) as Unit
    }

    /// More of a unit.
    pub fn grow(&mut self, unit: Unit, size: u32) {
        if let Some(unit) = self.units.get_mut(unit as usize) {
            unit.size = unit.size.saturating_add(size);
        }
    }

    /// These units are sent to `node`; each unit belongs to one such call. Calls are what hedges are a share of:
    /// `HedgeBudget::earn` for each.
    pub fn ask(&mut self, node: NodeIndex, units: &[Unit], now: Duration, budget: Budget) -> Call {
        let from = self.lists.len() as u32;
        self.lists.extend_from_slice(units);
        let call = self.open(node, Units { from, to: self.lists.len() as u32 }, None);
        self.started(call, now, budget);
        call
    }

    /// The call of a `Step::Send` has been sent.
    pub fn started(&mut self, call: Call, now: Duration, budget: Budget) {
        let Some(call) = self.calls.get_mut(call as usize).filter(|call| call.state == State::Unsent) else {
            return;
        };
        call.state = State::Open;
        call.hedge_at = now.saturating_add(budget.hedge);
        call.give_up_at = now.saturating_add(budget.total);
    }

    /// The units in question.
    pub fn list(&self, units: Units) -> &[Unit] {
        self.lists.get(units.from as usize..units.to as usize).unwrap_or_default()
    }

    /// The units of a call.
    pub fn units_of(&self, call: Call) -> &[Unit] {
        self.calls.get(call as usize).map_or(&[], |call| self.list(call.units))
    }

    /// The call that this one was sent to race, while both are out.
    pub fn rival_of(&self, call: Call) -> Option<Call> {
        self.calls.get(call as usize)?.rival_of
    }

    /// What was done about trouble since `clear`.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// A valid answer came. False where it does not matter any more: drop it. Else keep it; `Step::Add` or
    /// `Step::Drop` will say what for.
    pub fn answered(&mut self, call: Call) -> bool {
        let Some(state) = self.calls.get_mut(call as usize).filter(|call| call.state == State::Open) else {
            self.counts.ignored += 1;
            return false;
        };
        match state.rival_of {
            None => {
                let rivals = state.rivals;
                self.add(call);
                self.spare(rivals);
            }
            Some(rival) => {
                state.state = State::Held;
                self.judge(rival);
            }
        }
        true
    }

    /// It will not be answered.
    pub fn failed(&mut self, call: Call) {
        let Some(state) = self.calls.get_mut(call as usize) else { return };
        if !matches!(state.state, State::Open | State::Unsent) {
            return;
        }
        state.state = State::Closed;
        let (units, rivals, rival_of, here) = (state.units, state.rivals, state.rival_of, state.here);
        if rival_of.is_some() {
            // The call it races may still answer; if it fails, this one's units are found without anybody.
            return;
        }
        if rivals.1 == 0 {
            self.retry.push_back(units);
            return;
        }
        for rival in rivals.0..rivals.0 + rivals.1 {
            let state = &mut self.calls[rival as usize];
            state.rival_of = None;
            match state.state {
                State::Held => self.add(rival),
                State::Closed => {
                    self.retry.push_back(state.units);
                }
                State::Open | State::Unsent => {}
            }
        }
        self.compute(here, false);
    }

    /// What to do now. `standing` says how nodes are doing (`ROUTER` is asked about, too, where it is a holder).
    pub fn next(
        &mut self,
        now: Duration,
        standing: &dyn Fn(NodeIndex) -> Standing,
        hedges: &mut HedgeBudget,
    ) -> Step {
        loop {
            if let Some(step) = self.todo.pop_front() {
                return step;
            }
            if let Some(units) = self.retry.pop_front() {
                self.place(units, standing);
                continue;
            }
            if self.left == 0 {
                return Step::Done;
            }
            let mut until = Duration::MAX;
            for index in 0..self.calls.len() {
                let state = self.calls[index];
                if state.state != State::Open {
                    continue;
                }
                let call = index as Call;
                if state.give_up_at <= now {
                    self.todo.push_back(Step::Drop(call, Why::GaveUp));
                    self.failed(call);
                } else if !state.overdue && state.hedge_at <= now {
                    self.calls[index].overdue = true;
                    self.todo.push_back(Step::Overdue(call, state.node));
                } else if state.overdue && !state.settled {
                    self.calls[index].settled = true;
                    self.hedge(call, standing, hedges);
                }
                let state = self.calls[index];
                until = until.min(if state.overdue { state.give_up_at } else { state.hedge_at });
            }
            if self.todo.is_empty() && self.retry.is_empty() && self.left > 0 {
                return Step::Wait(until);
            }
        }
    }

    fn open(&mut self, node: NodeIndex, units: Units, rival_of: Option<Call>) -> Call {
        for unit in &self.lists[units.from as usize..units.to as usize] {
            let unit = &mut self.units[*unit as usize];
            let slot = unit.holders.as_slice().iter().position(|holder| *holder == node);
            unit.tried |= slot.map_or(0, |slot| 1 << slot);
            unit.asks = unit.asks.saturating_add(1);
        }
        self.calls.push(CallState {
            node,
            units,
            state: State::Unsent,
            hedge_at: Duration::MAX,
            give_up_at: Duration::MAX,
            overdue: false,
            settled: rival_of.is_some(),
            rival_of,
            rivals: (0, 0),
            here: Units::default(),
        });
        (self.calls.len() - 1) as Call
    }

    /// Accounts for units. No unit is twice: a call's units are its own or, in a race, those of one side.
    fn account(&mut self, units: Units) {
        for unit in &self.lists[units.from as usize..units.to as usize] {
            let unit = &mut self.units[*unit as usize];
            debug_assert!(!unit.done, "a unit was accounted for twice");
            unit.done = true;
            self.left -= 1;
        }
    }

    fn add(&mut self, call: Call) {
        let state = &mut self.calls[call as usize];
        state.state = State::Closed;
        let units = state.units;
        self.account(units);
        self.todo.push_back(Step::Add(call));
    }

    fn compute(&mut self, units: Units, mapped: bool) {
        if !units.is_empty() {
            self.account(units);
            self.todo.push_back(Step::Compute { units, mapped });
        }
    }

    /// Rivals of a call that was answered.
    fn spare(&mut self, rivals: (Call, u32)) {
        for rival in rivals.0..rivals.0 + rivals.1 {
            let state = &mut self.calls[rival as usize];
            if state.state != State::Closed {
                state.state = State::Closed;
                self.todo.push_back(Step::Drop(rival, Why::Spare));
            }
        }
    }

    /// Whether the rivals of `call` have all answered, and then what follows.
    fn judge(&mut self, call: Call) {
        let (first, count) = self.calls[call as usize].rivals;
        let all = first as usize..(first + count) as usize;
        if self.calls[all].iter().any(|rival| rival.state != State::Held) {
            return;
        }
        (first..first + count).for_each(|rival| self.add(rival));
        let state = &mut self.calls[call as usize];
        state.state = State::Closed;
        let here = state.here;
        self.compute(here, false);
        self.counts.hedges_won += 1;
        self.todo.push_back(Step::Drop(call, Why::Beaten));
    }

    /// The holder to ask for a unit next: well ones before doubtful ones, then the least loaded, then in order.
    fn best(&self, unit: Unit, standing: &dyn Fn(NodeIndex) -> Standing) -> Option<(Standing, NodeIndex)> {
        let state = &self.units[unit as usize];
        let given = |node| self.chosen.iter().filter(move |(chosen, _)| *chosen == node);
        let untried =
            state.holders.as_slice().iter().enumerate().filter(|(slot, _)| state.tried >> slot & 1 == 0);
        let known = untried.map(|(_, node)| {
            let more =
                given(*node).map(|(_, unit)| self.units[*unit as usize].size).fold(0, u32::saturating_add);
            let standing = match standing(*node) {
                Standing::Good(load) => Standing::Good(load.saturating_add(more)),
                Standing::Doubtful(load) => Standing::Doubtful(load.saturating_add(more)),
                Standing::Out => Standing::Out,
            };
            (standing, *node)
        });
        known.filter(|(standing, _)| *standing != Standing::Out).min()
    }

    /// As `best`, of the holders that were tried already, where nobody else may compute the unit.
    fn once_more(
        &mut self,
        unit: Unit,
        standing: &dyn Fn(NodeIndex) -> Standing,
    ) -> Option<(Standing, NodeIndex)> {
        let state = &mut self.units[unit as usize];
        if self.fallback || state.asks >= ASKS_MAX {
            return None;
        }
        state.tried = 0;
        self.best(unit, standing)
    }

    /// Finds somebody for the units of a failed call.
    fn place(&mut self, units: Units, standing: &dyn Fn(NodeIndex) -> Standing) {
        self.chosen.clear();
        let nobody = self.lists.len();
        for index in units.from..units.to {
            let unit = self.lists[index as usize];
            match self.best(unit, standing).or_else(|| self.once_more(unit, standing)) {
                Some((_, node)) => self.chosen.push((node, unit)),
                None => self.lists.push(unit),
            }
        }
        let units = Units { from: nobody as u32, to: self.lists.len() as u32 };
        if self.fallback {
            self.compute(units, true);
        } else if !units.is_empty() {
            self.account(units);
            self.todo.push_back(Step::Lost(units));
        }
        let (calls, here) = self.send_chosen(None);
        self.counts.retries += u64::from(calls);
        self.compute(here, false);
    }

    /// Sends all units of a late call to others as well, if each has another holder that is well.
    fn hedge(&mut self, call: Call, standing: &dyn Fn(NodeIndex) -> Standing, hedges: &mut HedgeBudget) {
        self.chosen.clear();
        let units = self.calls[call as usize].units;
        for index in units.from..units.to {
            let unit = self.lists[index as usize];
            match self.best(unit, standing).filter(|_| !self.units[unit as usize].hedged) {
                Some((Standing::Good(_), node)) => self.chosen.push((node, unit)),
                _ => return,
            }
        }
        self.chosen.sort_unstable();
        let nodes =
            self.chosen.chunk_by(|a, b| a.0 == b.0).filter(|chunk| chunk[0].0 != ROUTER).count() as u32;
        // What the router computes itself instead counts as one.
        if !hedges.spend(nodes.max(1)) {
            return;
        }
        for (_, unit) in &self.chosen {
            self.units[*unit as usize].hedged = true;
        }
        let first = self.calls.len() as Call;
        let (count, here) = self.send_chosen(Some(call));
        let state = &mut self.calls[call as usize];
        (state.rivals, state.here) = ((first, count), here);
        self.counts.hedges += u64::from(nodes.max(1));
        if count == 0 {
            self.judge(call);
        }
    }

    /// One call per chosen node, and what is the router's among them.
    fn send_chosen(&mut self, rival_of: Option<Call>) -> (u32, Units) {
        let mut chosen = std::mem::take(&mut self.chosen);
        chosen.sort_unstable();
        let (mut calls, mut here) = (0, Units::default());
        for chunk in chosen.chunk_by(|a, b| a.0 == b.0) {
            let (node, from) = (chunk[0].0, self.lists.len() as u32);
            self.lists.extend(chunk.iter().map(|(_, unit)| *unit));
            let units = Units { from, to: self.lists.len() as u32 };
            if node == ROUTER {
                here = units;
                continue;
            }
            let call = self.open(node, units, rival_of);
            self.todo.push_back(Step::Send { call, node, units, hedge: rival_of.is_some() });
            calls += 1;
        }
        self.chosen = chosen;
        (calls, here)
    }
}

#[cfg(test)]
mod tests;
