//! Who computes which experts of a layer, so that all places finish together.
//!
//! A layer is over when the slowest of its places is. Where an expert can be computed at more than one place (on the
//! router and on a node), the choice is a scheduling problem: jobs are experts with their rows, machines are places,
//! wanted is the smallest latest finish. Experts go, the costliest first and those with least choice before others,
//! to the place that would finish them earliest (Graham's LPT rule); then, while it helps, one expert leaves the
//! place that finishes last, directly or by way of a third place. For the handful of experts of a decode row that
//! is the optimum in all but contrived cases, and for the hundred of a prompt it is within an expert of it.
//!
//! What an expert costs at a place comes from the table the place measured when it started (`Curve`), times what
//! calls since then took over what the table said, plus what a call costs beside computing (`Learned`). An answer
//! that is wrong costs time, never a bit: sums over experts are integers.
//!
//! No clock, no IO; nothing is allocated once the largest layer has been seen. Experts are not split.

use model::kernel::Assignment;
use model::kernel::measure::ROWS;

/// Where an expert can be computed: `ROUTER`, or a node (`node_place`).
pub type PlaceIndex = u16;

/// The router itself.
pub const ROUTER: PlaceIndex = 0;

/// The place of a node of the roster.
pub fn node_place(node: u16) -> PlaceIndex {
    node.saturating_add(1)
}

/// Rows per expert up to which the time goes into reading weights; beyond, it goes into arithmetic. What is learned
/// of one says little of the other.
pub const FEW_ROWS: u32 = 4;

/// Weight of a new observation, once there are a few: as in the round trips of TCP (RFC 6298).
const NEW_WEIGHT: f32 = 1.0 / 8.0;

/// A single observation moves a correction by at most this factor, before it is weighted: a thread that lost its
/// core says nothing of the next call.
const SURPRISE_MAX: f32 = 8.0;

/// Corrections stay within this factor of the table, either way.
const CORRECTION_MAX: f32 = 64.0;

/// What a place that gets nothing forgets per layer: after a hundred layers, a few tokens, it is tried again even if
/// it was learned to be hopeless.
const FORGET: f32 = 1.0 / 64.0;

/// A call's cost beside computing before anything is known of it, microseconds: a round trip on a wired LAN.
const CALL_US: f32 = 200.0;

/// A wait shorter than this, in microseconds, does not show that the answer was late: with one core for both, the
/// network thread comes to fetch an answer that has long arrived only when the computing thread waits.
const LATE_US: f32 = 150.0;

/// What a call is thought to cost less after each that was not late, so that its place is given more until it is.
const TRY_MORE: f32 = 1.0 / 32.0;

/// Improvements tried per layer. Each moves an expert off the last place; a prompt's greedy start needs a few.
const MOVES_MAX: usize = 64;

/// Most experts of a layer for which moves by way of a third place are looked for: their number grows with the
/// square, and many small experts balance without.
const DETOUR_MAX: usize = 32;

/// What a move must gain, in microseconds: below that it is rounding.
const GAIN_US: f32 = 0.5;

/// Microseconds of one expert by rows, from what a place measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Curve {
    us: [f32; ROWS.len()],
}

impl Curve {
    /// The same for any rows: for models without experts, where nothing is divided.
    pub const EVEN: Curve = Curve { us: [1.0; ROWS.len()] };

    /// From weight bandwidths in MB/s at `ROWS`, 0 where not measured: then time grows with the rows from the last
    /// count that was. `None` where nothing was measured.
    pub fn new(weight_mb_s: &[u32; ROWS.len()], expert_bytes: u64) -> Option<Curve> {
        let mut us = [0.0_f32; ROWS.len()];
        for (slot, mb_s) in weight_mb_s.iter().enumerate() {
            let before = slot.checked_sub(1).map(|before| us[before]);
            us[slot] = match (mb_s, before) {
                (0, None) => return None,
                (0, Some(before)) => before * (ROWS[slot] / ROWS[slot - 1]) as f32,
                // More rows never take less: a disturbed measurement must not make them look cheaper.
                (mb_s, before) => (expert_bytes as f32 / *mb_s as f32).max(before.unwrap_or(0.0)),
            };
        }
        Some(Curve { us })
    }

    /// Microseconds of an expert with so many rows: between measured counts along a straight line, beyond the last in
    /// proportion.
    pub fn us(&self, rows: u32) -> f32 {
        let Some(slot) = ROWS.iter().position(|measured| *measured >= rows) else {
            return self.us[ROWS.len() - 1] * rows as f32 / ROWS[ROWS.len() - 1] as f32;
        };
        if slot == 0 {
            return self.us[0];
        }
        let along = (rows - ROWS[slot - 1]) as f32 / (ROWS[slot] - ROWS[slot - 1]) as f32;
        self.us[slot - 1] + (self.us[slot] - self.us[slot - 1]) * along
    }
}

/// A mean that follows: of the first observations the plain one, later a moving one.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Mean {
    value: f32,
    seen: u32,
}

impl Mean {
    fn at(value: f32) -> Mean {
        Mean { value, seen: 0 }
    }

    fn take(&mut self, new: f32) {
        self.seen = self.seen.saturating_add(1);
        let weight = (1.0 / self.seen as f32).max(NEW_WEIGHT);
        self.value += (new - self.value) * weight;
    }

    fn forget(&mut self, towards: f32) {
        self.value += (towards - self.value) * FORGET;
    }
}

/// How calls of a layer are waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The router waits for them as soon as its own share is done.
    Alone,
    /// The router turns to another part of the step in between, so that a round trip costs nothing and only the
    /// places' throughput counts.
    Overlapped,
}

/// What was learned of a place since it is here.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Learned {
    /// Measured over predicted time, with few rows per expert and with many.
    correction: [Mean; 2],
    /// Microseconds of a call beside computing, with few rows per expert.
    call_us: Mean,
    /// The same per row, with many.
    row_us: Mean,
    /// Microseconds per row by which the place keeps an overlapped step waiting beyond its prediction.
    lag_us: f32,
}

impl Default for Learned {
    fn default() -> Learned {
        let (one, call_us) = (Mean::at(1.0), Mean::at(CALL_US));
        Learned { correction: [one; 2], call_us, row_us: Mean::at(0.0), lag_us: 0.0 }
    }
}

impl Learned {
    /// Nothing but the cost of a call beside computing, microseconds.
    pub fn with_call_us(us: f32) -> Learned {
        Learned { call_us: Mean::at(us), ..Learned::default() }
    }

    /// Measured over predicted time with few rows per expert, and with many.
    pub fn corrections(&self) -> [f32; 2] {
        self.correction.map(|mean| mean.value)
    }

    /// Microseconds of a call beside computing, with few rows.
    pub fn call_us(&self) -> f32 {
        self.call_us.value
    }

    /// Work that was predicted took this long.
    pub fn served(&mut self, predicted: Predicted, us: f32) {
        if predicted.us <= 0.0 {
            return;
        }
        let mean = &mut self.correction[usize::from(!predicted.few)];
        let ratio = (us / predicted.us).clamp(1.0 / CORRECTION_MAX, CORRECTION_MAX);
        let known = if mean.seen == 0 { ratio } else { mean.value };
        mean.take(ratio.clamp(known / SURPRISE_MAX, known * SURPRISE_MAX));
    }

    /// A call of `rows` rows took `us` beside computing; the router waited `waited_us` for it when its own share was
    /// done. Only a real wait tells the cost; else it is at most `us`, and perhaps less.
    pub fn travelled(&mut self, predicted: Predicted, rows: u32, (us, waited_us): (f32, f32)) {
        let (mean, us) =
            if predicted.few { (&mut self.call_us, us) } else { (&mut self.row_us, us / rows.max(1) as f32) };
        let late = waited_us >= LATE_US;
        if late || us < mean.value {
            mean.take(us.max(0.0));
        }
        if !late {
            mean.value -= mean.value * TRY_MORE;
        }
    }

    /// An overlapped step had to wait `us` for this place's answer to `rows` rows; 0 if not at all. The lag grows
    /// while there are waits and shrinks while there are none, and comes to rest where the place is just in time.
    pub fn lagged(&mut self, rows: u32, us: f32) {
        const GROW: f32 = 0.25;
        const SHRINK: f32 = 1.0 / 16.0;
        self.lag_us += us / rows.max(1) as f32 * GROW;
        if us <= 0.0 {
            self.lag_us -= self.lag_us * SHRINK;
        }
    }

    /// The place could have computed something and got nothing.
    pub fn idle(&mut self) {
        self.correction.iter_mut().for_each(|mean| mean.forget(1.0));
        self.call_us.forget(CALL_US);
        self.row_us.forget(0.0);
        self.lag_us -= self.lag_us * FORGET;
    }

    /// Microseconds that a call of `rows` rows costs beside computing.
    fn start_us(&self, mode: Mode, rows: u32) -> f32 {
        match mode {
            Mode::Overlapped => self.lag_us * rows as f32,
            Mode::Alone if rows <= FEW_ROWS => self.call_us.value,
            Mode::Alone => self.call_us.value.max(self.row_us.value * rows as f32),
        }
    }
}

/// A place as the division sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Place {
    /// What it measured; 0 where it did not.
    pub weight_mb_s: [u32; ROWS.len()],
    /// The same as times.
    pub curve: Curve,
    /// What calls have shown since.
    pub learned: Learned,
}

impl Place {
    /// Microseconds of an expert with so many rows.
    pub fn us(&self, rows: u32) -> f32 {
        let [few, many] = &self.learned.correction;
        // A disturbed measurement is wrong for many rows as it is for few.
        let correction = if rows > FEW_ROWS && many.seen > 0 { many } else { few };
        self.curve.us(rows) * correction.value
    }
}

/// What the table says of the work a place got.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Predicted {
    /// Microseconds, uncorrected.
    pub us: f32,
    /// Whether its experts have few rows each.
    pub few: bool,
}

/// One layer to be divided.
#[derive(Clone, Copy)]
pub struct Layer<'a> {
    /// Rows and experts.
    pub assignments: &'a [Assignment],
    /// Rows of the step's part.
    pub rows: u32,
    /// What the router has to do besides, before it can wait: microseconds.
    pub busy_us: f32,
    /// How calls are waited for.
    pub mode: Mode,
    /// `holders(expert, i)`: the i-th place that holds the expert, in any order; every expert has at least one.
    pub holders: &'a dyn Fn(u16, usize) -> Option<PlaceIndex>,
}

/// Its size: what holds what is a function.
impl std::fmt::Debug for Layer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Layer({} assignments of {} rows, {:?})", self.assignments.len(), self.rows, self.mode)
    }
}

/// An expert with rows, and where it is to be computed.
#[derive(Clone, Copy, Debug)]
struct Piece {
    expert: u16,
    rows: u32,
    place: PlaceIndex,
    choices: u16,
}

#[derive(Clone, Copy, Debug, Default)]
struct Load {
    /// Of its experts.
    us: f32,
    /// Of whatever it does besides.
    start_us: f32,
    experts: u32,
    /// Whether it is busy even without experts: the router, with its own stages.
    always: bool,
}

impl Load {
    /// When it is done, with `more` microseconds and `experts` more.
    fn finish_us(&self, more: f32, experts: i32) -> f32 {
        if self.experts as i32 + experts <= 0 && !self.always { 0.0 } else { self.start_us + self.us + more }
    }
}

/// The division, and the memory it needs.
#[derive(Debug, Default)]
pub struct Share {
    /// By expert: rows while counting, then index into `pieces`.
    slots: Vec<u32>,
    pieces: Vec<Piece>,
    loads: Vec<Load>,
}

impl Share {
    /// Divides a layer over `places`; by `PlaceIndex`. Holders outside `places` are passed over, unless an expert has
    /// no other: then it is the router's.
    pub fn divide(&mut self, layer: &Layer<'_>, places: &[Place]) {
        self.count(layer, places);
        self.loads.clear();
        self.loads.extend(places.iter().enumerate().map(|(index, place)| Load {
            start_us: if index == usize::from(ROUTER) {
                layer.busy_us
            } else {
                place.learned.start_us(layer.mode, layer.rows)
            },
            always: index == usize::from(ROUTER),
            ..Load::default()
        }));
        self.spread(layer, places);
        let free = self.pieces.iter().any(|piece| piece.choices > 1);
        for _ in 0..if free { MOVES_MAX } else { 0 } {
            if !self.improve(layer, places) {
                break;
            }
        }
        for (index, piece) in self.pieces.iter().enumerate() {
            self.slots[usize::from(piece.expert)] = index as u32;
        }
    }

    /// Where `expert` is to be computed; the router, if it is not in the layer.
    pub fn place(&self, expert: u16) -> PlaceIndex {
        let slot = self.slots.get(usize::from(expert)).copied().unwrap_or(u32::MAX);
        let piece = self.pieces.get(slot as usize).filter(|piece| piece.expert == expert);
        piece.map_or(ROUTER, |piece| piece.place)
    }

    /// When a place is expected to be done, microseconds from now.
    pub fn finish_us(&self, place: PlaceIndex) -> f32 {
        self.loads.get(usize::from(place)).map_or(0.0, |load| load.finish_us(0.0, 0))
    }

    /// When the last one is.
    pub fn latest_us(&self) -> f32 {
        self.loads.iter().map(|load| load.finish_us(0.0, 0)).fold(0.0, f32::max)
    }

    /// What the table of `place` says of its share.
    pub fn predicted(&self, place: PlaceIndex, of: &Place) -> Predicted {
        let own = self.pieces.iter().filter(|piece| piece.place == place);
        let (us, rows, experts) = own.fold((0.0, 0, 0), |(us, rows, experts), piece| {
            (us + of.curve.us(piece.rows), rows + piece.rows, experts + 1)
        });
        Predicted { us, few: rows <= experts * FEW_ROWS }
    }

    /// Whether a place got nothing that it could have computed.
    pub fn is_idle(&self, place: PlaceIndex) -> bool {
        self.loads.get(usize::from(place)).is_some_and(|load| load.experts == 0)
    }

    /// Collects the experts that have rows: costliest first, those with least choice before all.
    fn count(&mut self, layer: &Layer<'_>, places: &[Place]) {
        self.pieces.clear();
        self.slots.clear();
        for assignment in layer.assignments {
            let expert = usize::from(assignment.expert);
            if self.slots.len() <= expert {
                self.slots.resize(expert + 1, u32::MAX);
            }
            if self.slots[expert] == u32::MAX {
                self.slots[expert] = self.pieces.len() as u32;
                let held = |slot: &usize| (layer.holders)(assignment.expert, *slot).is_some();
                let choices = (0..places.len().max(1)).take_while(held).count() as u16;
                self.pieces.push(Piece { expert: assignment.expert, rows: 0, place: ROUTER, choices });
            }
            self.pieces[self.slots[expert] as usize].rows += 1;
        }
        self.pieces
            .sort_unstable_by_key(|piece| (piece.choices, std::cmp::Reverse(piece.rows), piece.expert));
    }

    /// Gives every piece to the place that would have it done first.
    fn spread(&mut self, layer: &Layer<'_>, places: &[Place]) {
        for index in 0..self.pieces.len() {
            let piece = self.pieces[index];
            let mut best = (ROUTER, f32::INFINITY);
            for place in holders(layer, places, piece.expert) {
                let cost = places[usize::from(place)].us(piece.rows);
                let finish = self.loads[usize::from(place)].finish_us(cost, 1);
                if finish < best.1 {
                    best = (place, finish);
                }
            }
            self.pieces[index].place = best.0;
            self.give(places, best.0, piece.rows, 1);
        }
    }

    /// Adds (or takes, with -1) an expert.
    fn give(&mut self, places: &[Place], place: PlaceIndex, rows: u32, sign: i32) {
        let Some(at) = places.get(usize::from(place)) else { return };
        let load = &mut self.loads[usize::from(place)];
        load.us = (load.us + at.us(rows) * sign as f32).max(0.0);
        load.experts = load.experts.saturating_add_signed(sign);
    }

    /// Moves one expert away from the place that finishes last, or one there for one here. False if nothing helps.
    fn improve(&mut self, layer: &Layer<'_>, places: &[Place]) -> bool {
        let finish = |load: &Load| load.finish_us(0.0, 0);
        let last =
            (0..self.loads.len()).max_by(|a, b| finish(&self.loads[*a]).total_cmp(&finish(&self.loads[*b])));
        let Some(last) = last.map(|last| last as PlaceIndex) else { return false };
        let now = finish(&self.loads[usize::from(last)]);
        let mut best: (f32, Option<Move>) = (now - GAIN_US, None);
        for (index, piece) in self.pieces.iter().enumerate() {
            if piece.place != last || piece.choices < 2 {
                continue;
            }
            for to in holders(layer, places, piece.expert).filter(|to| *to != last) {
                let first = Move { index, to, then: None };
                let after = self.after(places, last, &first);
                if after < best.0 {
                    best = (after, Some(first));
                }
                if self.pieces.len() <= DETOUR_MAX {
                    self.detours(layer, places, (last, first), &mut best);
                }
            }
        }
        let Some(chosen) = best.1 else { return false };
        for (index, to) in std::iter::once((chosen.index, chosen.to)).chain(chosen.then) {
            let piece = self.pieces[index];
            self.give(places, piece.place, piece.rows, -1);
            self.give(places, to, piece.rows, 1);
            self.pieces[index].place = to;
        }
        true
    }

    /// Moves that make room at `first.to` by sending on one expert that is there.
    fn detours(
        &self,
        layer: &Layer<'_>,
        places: &[Place],
        (last, first): (PlaceIndex, Move),
        best: &mut (f32, Option<Move>),
    ) {
        for (index, piece) in self.pieces.iter().enumerate() {
            if piece.place != first.to || piece.choices < 2 {
                continue;
            }
            for to in holders(layer, places, piece.expert).filter(|to| *to != first.to) {
                let both = Move { then: Some((index, to)), ..first };
                let after = self.after(places, last, &both);
                if after < best.0 {
                    *best = (after, Some(both));
                }
            }
        }
    }

    /// When the places a move touches would finish, `last` among them.
    fn after(&self, places: &[Place], last: PlaceIndex, change: &Move) -> f32 {
        let steps = || std::iter::once((change.index, change.to)).chain(change.then);
        let finish = |place: PlaceIndex| {
            let (mut us, mut experts) = (0.0, 0);
            for (index, to) in steps() {
                let piece = &self.pieces[index];
                let cost = places[usize::from(place)].us(piece.rows);
                if piece.place == place {
                    (us, experts) = (us - cost, experts - 1);
                }
                if to == place {
                    (us, experts) = (us + cost, experts + 1);
                }
            }
            self.loads[usize::from(place)].finish_us(us, experts)
        };
        steps().map(|(_, to)| finish(to)).fold(finish(last), f32::max)
    }
}

/// Piece `index` goes to `to`, and then perhaps another.
#[derive(Clone, Copy, Debug)]
struct Move {
    index: usize,
    to: PlaceIndex,
    then: Option<(usize, PlaceIndex)>,
}

/// The places that hold an expert and are known.
fn holders<'a>(
    layer: &'a Layer<'_>,
    places: &'a [Place],
    expert: u16,
) -> impl Iterator<Item = PlaceIndex> + 'a {
    let all = (0..places.len()).map_while(move |slot| (layer.holders)(expert, slot));
    all.filter(|place| usize::from(*place) < places.len())
}

#[cfg(test)]
mod tests;
