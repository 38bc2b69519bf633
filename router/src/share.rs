//! Who computes which experts of a layer, so that all places finish together.
//!
//! A layer is over when the slowest of its places is. Where an expert, or a slice of it, can be computed at more than
//! one place (on two nodes, or on the router and a node), the choice is a scheduling problem: jobs are experts or their
//! slices with their rows, machines are places, wanted is the smallest latest finish. Experts go, the costliest first and those with least choice before others,
//! to the place that would finish them earliest (Graham's LPT rule); then, while it helps, one expert leaves the
//! place that finishes last, directly or by way of a third place. For the handful of experts of a decode row that
//! is the optimum in all but contrived cases, and for the hundred of a prompt it is within an expert of it.
//!
//! What an expert costs at a place comes from the table the place measured when it started (`Curve`), times what
//! calls since then took over what the table said, plus what a call costs beside computing (`Learned`). An answer
//! that is wrong costs time, never a bit: sums over experts are integers.
//!
//! No clock, no IO; nothing is allocated once the largest layer has been seen. How experts are cut is not decided here.

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

/// Corrections stay within this factor of the table, either way: start-up measurements were seen to be a hundred times
/// too slow.
const CORRECTION_MAX: f32 = 256.0;

/// What a place that gets nothing forgets per layer: after a hundred layers, a few tokens, it is tried again even if
/// it was learned to be hopeless.
const FORGET: f32 = 1.0 / 64.0;

/// No place is hoped to be more than this many times faster than what is known of it.
const HOPE_MAX: f32 = 1024.0;

/// Hoped for at least so many times faster, it is given work as a trial.
const TRIAL: f32 = 2.0;

/// A trial that fails makes hope grow half as fast, down to this part: a place that is a hundred times slower then costs
/// a layer in ten thousand.
const DOUBT_MAX: f32 = 64.0;

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
    /// How many times faster than what is known of it the place is hoped to be. It grows while the place gets nothing:
    /// a table that is wrong can only be found out by a trial.
    hope: f32,
    /// How many times slower than at first hope grows.
    doubt: f32,
}

impl Default for Learned {
    fn default() -> Learned {
        let (one, call_us) = (Mean::at(1.0), Mean::at(CALL_US));
        Learned { correction: [one; 2], call_us, row_us: Mean::at(0.0), lag_us: 0.0, hope: 1.0, doubt: 1.0 }
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
        if self.hope >= TRIAL {
            let failed = ratio * self.hope > mean.value * TRIAL;
            self.doubt = if failed { (self.doubt * 2.0).min(DOUBT_MAX) } else { 1.0 };
            // What was known before is why it got nothing.
            mean.seen = 0;
        }
        self.hope = 1.0;
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
        self.hope = (self.hope * (1.0 + FORGET / self.doubt)).min(HOPE_MAX);
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
        // A trial is of one row and not of a prompt.
        let hope = if rows > FEW_ROWS { 1.0 } else { self.learned.hope };
        self.curve.us(rows) * correction.value / hope
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

/// Most places that are considered for one part of an expert.
pub const CHOICES_MAX: usize = 8;

/// A part of an expert, and where it can be computed.
#[derive(Clone, Copy, Debug)]
pub struct Choice {
    /// How much of the expert it is, 1 for all.
    width: f32,
    places: [PlaceIndex; CHOICES_MAX],
    count: u8,
}

impl Choice {
    /// So much of an expert (1 for all), and the first `CHOICES_MAX` of its places. Without any it is the router's.
    pub fn new(width: f32, places: impl IntoIterator<Item = PlaceIndex>) -> Choice {
        let mut choice = Choice { width, places: [ROUTER; CHOICES_MAX], count: 0 };
        for (slot, place) in choice.places.iter_mut().zip(places) {
            *slot = place;
            choice.count += 1;
        }
        choice
    }

    fn places(&self) -> &[PlaceIndex] {
        &self.places[..usize::from(self.count)]
    }
}

/// What `Layer` needs of experts that are all whole: `holders(expert, i)` is the i-th place that holds one.
pub fn whole(
    holders: &dyn Fn(u16, usize) -> Option<PlaceIndex>,
) -> impl Fn(u16, usize) -> Option<Choice> + '_ {
    |expert, part| (part == 0).then(|| Choice::new(1.0, (0..).map_while(|slot| holders(expert, slot))))
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
    /// `parts(expert, i)`: its i-th part; one that has none is the router's.
    pub parts: &'a dyn Fn(u16, usize) -> Option<Choice>,
}

/// Its size: what holds what is a function.
impl std::fmt::Debug for Layer<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Layer({} assignments of {} rows, {:?})", self.assignments.len(), self.rows, self.mode)
    }
}

/// A part of an expert with rows, and where it is to be computed.
#[derive(Clone, Copy, Debug)]
struct Piece {
    expert: u16,
    part: u16,
    rows: u32,
    place: PlaceIndex,
    choice: Choice,
}

impl Piece {
    /// Microseconds at a place.
    fn us(&self, at: &Place) -> f32 {
        at.us(self.rows) * self.choice.width
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Load {
    /// Of its experts.
    us: f32,
    /// Of whatever it does besides.
    start_us: f32,
    experts: u32,
    /// Whether it could have had more or others.
    asked: bool,
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
    /// By expert: where its parts begin in `entries`.
    slots: Vec<u32>,
    /// Indices into `pieces`, the parts of an expert in order.
    entries: Vec<u32>,
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
        self.spread(places);
        let free = self.pieces.iter().any(|piece| piece.choice.count > 1);
        for _ in 0..if free { MOVES_MAX } else { 0 } {
            if !self.improve(places) {
                break;
            }
        }
        for (index, piece) in self.pieces.iter().enumerate() {
            let first = self.slots[usize::from(piece.expert)];
            self.entries[first as usize + usize::from(piece.part)] = index as u32;
        }
    }

    /// Where a part of `expert` is to be computed; the router, if it is not in the layer.
    pub fn place(&self, expert: u16, part: usize) -> PlaceIndex {
        let first = self.slots.get(usize::from(expert)).copied().unwrap_or(u32::MAX) as usize;
        let entry = self.entries.get(first.saturating_add(part));
        let piece = entry.and_then(|index| self.pieces.get(*index as usize));
        piece.filter(|piece| piece.expert == expert).map_or(ROUTER, |piece| piece.place)
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
            (us + of.curve.us(piece.rows) * piece.choice.width, rows + piece.rows, experts + 1)
        });
        Predicted { us, few: rows <= experts * FEW_ROWS }
    }

    /// Whether a place got nothing that it could have computed.
    pub fn is_idle(&self, place: PlaceIndex) -> bool {
        self.loads.get(usize::from(place)).is_some_and(|load| load.asked && load.experts == 0)
    }

    /// Collects the experts that have rows: costliest first, those with least choice before all.
    fn count(&mut self, layer: &Layer<'_>, places: &[Place]) {
        self.pieces.clear();
        self.slots.clear();
        self.entries.clear();
        for assignment in layer.assignments {
            let expert = usize::from(assignment.expert);
            if self.slots.len() <= expert {
                self.slots.resize(expert + 1, u32::MAX);
            }
            if self.slots[expert] == u32::MAX {
                self.slots[expert] = self.entries.len() as u32;
                self.take_up(layer, places.len(), assignment.expert);
            }
            for entry in self.slots[expert] as usize.. {
                let piece = self.entries.get(entry).and_then(|index| self.pieces.get_mut(*index as usize));
                let Some(piece) = piece.filter(|piece| piece.expert == assignment.expert) else { break };
                piece.rows += 1;
            }
        }
        self.pieces.sort_unstable_by_key(|piece| {
            (piece.choice.count, std::cmp::Reverse(piece.rows), piece.expert, piece.part)
        });
    }

    /// Adds the parts of an expert, without rows.
    fn take_up(&mut self, layer: &Layer<'_>, places: usize, expert: u16) {
        for part in 0.. {
            let choice = match (layer.parts)(expert, part) {
                Some(choice) => choice,
                None if part == 0 => Choice::new(1.0, []),
                None => break,
            };
            let known = choice.places().iter().copied().filter(|place| usize::from(*place) < places);
            let choice = Choice::new(choice.width, known);
            self.entries.push(self.pieces.len() as u32);
            let part = u16::try_from(part).unwrap_or(u16::MAX);
            self.pieces.push(Piece { expert, part, rows: 0, place: ROUTER, choice });
            if choice.width >= 1.0 {
                break;
            }
        }
    }

    /// Gives every piece to the place that would have it done first.
    fn spread(&mut self, places: &[Place]) {
        for index in 0..self.pieces.len() {
            let piece = self.pieces[index];
            let mut best = (ROUTER, f32::INFINITY);
            for place in piece.choice.places().iter().copied() {
                let load = &mut self.loads[usize::from(place)];
                load.asked = true;
                let finish = load.finish_us(piece.us(&places[usize::from(place)]), 1);
                if finish < best.1 {
                    best = (place, finish);
                }
            }
            self.pieces[index].place = best.0;
            self.give(places, best.0, &piece, 1);
        }
    }

    /// Adds (or takes, with -1) an expert.
    fn give(&mut self, places: &[Place], place: PlaceIndex, piece: &Piece, sign: i32) {
        let Some(at) = places.get(usize::from(place)) else { return };
        let load = &mut self.loads[usize::from(place)];
        load.us = (load.us + piece.us(at) * sign as f32).max(0.0);
        load.experts = load.experts.saturating_add_signed(sign);
    }

    /// Moves one expert away from the place that finishes last, or one there for one here. False if nothing helps.
    fn improve(&mut self, places: &[Place]) -> bool {
        let finish = |load: &Load| load.finish_us(0.0, 0);
        let last =
            (0..self.loads.len()).max_by(|a, b| finish(&self.loads[*a]).total_cmp(&finish(&self.loads[*b])));
        let Some(last) = last.map(|last| last as PlaceIndex) else { return false };
        let now = finish(&self.loads[usize::from(last)]);
        let mut best: (f32, Option<Move>) = (now - GAIN_US, None);
        for (index, piece) in self.pieces.iter().enumerate() {
            if piece.place != last || piece.choice.count < 2 {
                continue;
            }
            for to in piece.choice.places().iter().copied().filter(|to| *to != last) {
                let first = Move { index, to, then: None };
                let after = self.after(places, last, &first);
                if after < best.0 {
                    best = (after, Some(first));
                }
                if self.pieces.len() <= DETOUR_MAX {
                    self.detours(places, (last, first), &mut best);
                }
            }
        }
        let Some(chosen) = best.1 else { return false };
        for (index, to) in std::iter::once((chosen.index, chosen.to)).chain(chosen.then) {
            let piece = self.pieces[index];
            self.give(places, piece.place, &piece, -1);
            self.give(places, to, &piece, 1);
            self.pieces[index].place = to;
        }
        true
    }

    /// Moves that make room at `first.to` by sending on one expert that is there.
    fn detours(&self, places: &[Place], (last, first): (PlaceIndex, Move), best: &mut (f32, Option<Move>)) {
        for (index, piece) in self.pieces.iter().enumerate() {
            if piece.place != first.to || piece.choice.count < 2 {
                continue;
            }
            for to in piece.choice.places().iter().copied().filter(|to| *to != first.to) {
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
                let cost = piece.us(&places[usize::from(place)]);
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

#[cfg(test)]
mod tests;
