//! Layers drawn at random, and divided over places as the router divides them.
//!
//! The seed never changes, so the same tables are compared on the same draws, and a small difference between two of
//! them is one of the tables and not of luck. The division is that of `router::share`, simplified: parts go, those
//! with fewest holders first, to the place that is done with them earliest, then, while it helps, one part leaves the
//! last place. Experts that are wanted more
//! often are picked as much more often. The price: they are picked independently, which a trained gate does only about.

use crate::machine::{Machine, bytes_ns};
use crate::routes::{HOLDERS_MAX, NodeIndex, ROUTER, Table};

/// Most moves off the last place per layer: a token has few experts.
const MOVES_MAX: u32 = 8;

/// Tries to pick an expert that is not picked yet.
const PICKS_MAX: u32 = 32;

/// A part of an expert that rows want, and who can compute it.
#[derive(Clone, Copy, Debug)]
struct Piece {
    bytes: u64,
    rows: u32,
    /// Places.
    holders: [u16; HOLDERS_MAX],
    choices: u8,
    place: u16,
    ns: u64,
}

/// What a place got.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Nanoseconds of its weights.
    pub ns: u64,
    /// Parts of experts.
    pub parts: u32,
    /// Assignments: rows over its parts.
    pub assignments: u64,
    /// Bytes of its parts.
    pub bytes: u64,
}

/// A place: the router, or a node.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// How fast it is.
    pub machine: Machine,
    /// What a call to it costs before its first part; nothing for the router.
    pub start_ns: u64,
}

/// Draws and divides; what it needs in memory is kept.
#[derive(Debug)]
pub struct Draws {
    dice: u64,
    experts: Vec<u16>,
    /// By expert: rows of this draw.
    rows: Vec<u32>,
    /// By expert: shares up to and with it.
    upto: Vec<u64>,
    /// By `NodeIndex`: its place, 0 for nodes that are not here.
    places: Vec<u16>,
    pieces: Vec<Piece>,
    loads: Vec<Load>,
}

impl Draws {
    /// For a model with so many experts per layer; place 0 is the router, then these nodes.
    pub fn new(experts: u16, nodes: impl Iterator<Item = NodeIndex>) -> Draws {
        let mut places = Vec::new();
        let mut count = 1;
        for (place, node) in (1..).zip(nodes) {
            let at = usize::from(node);
            if places.len() <= at {
                places.resize(at + 1, 0);
            }
            places[at] = place;
            count += 1;
        }
        Draws {
            dice: 0,
            experts: (0..experts).collect(),
            rows: vec![0; usize::from(experts)],
            upto: Vec::new(),
            places,
            pieces: Vec::new(),
            loads: vec![Load::default(); count],
        }
    }

    /// What each place got, the router first.
    pub fn loads(&self) -> &[Load] {
        &self.loads
    }

    /// Draws `top_k` different experts for each of `rows` rows, in proportion to `shares`; without those all alike.
    pub fn pick(&mut self, rows: u32, top_k: u16, shares: &[u32]) {
        self.rows.fill(0);
        let count = self.experts.len();
        if shares.len() == count {
            return self.pick_by(rows, top_k, shares);
        }
        for _ in 0..rows {
            for at in 0..usize::from(top_k).min(count) {
                let other = at + self.roll((count - at) as u64) as usize;
                self.experts.swap(at, other);
                self.rows[usize::from(self.experts[at])] += 1;
            }
        }
    }

    /// The same by shares: one after the other, each in proportion among all, and again if it was picked already.
    fn pick_by(&mut self, rows: u32, top_k: u16, shares: &[u32]) {
        let mut sum = 0;
        self.upto.clear();
        self.upto.extend(shares.iter().map(|share| {
            // What was never wanted may be.
            sum += u64::from(*share) + 1;
            sum
        }));
        let count = self.experts.len();
        for _ in 0..rows {
            for at in 0..usize::from(top_k).min(count) {
                let mut tries = 0;
                let other = loop {
                    let dice = self.roll(sum);
                    let expert = self.upto.partition_point(|upto| *upto <= dice) as u16;
                    let place = self.experts[at..].iter().position(|left| *left == expert);
                    tries += 1;
                    match place {
                        Some(place) => break at + place,
                        // A few experts have nearly all: any of the others.
                        None if tries == PICKS_MAX => break at + self.roll((count - at) as u64) as usize,
                        None => {}
                    }
                };
                self.experts.swap(at, other);
                self.rows[usize::from(self.experts[at])] += 1;
            }
        }
    }

    /// Divides the picked experts of a layer over the places. `bytes(from, to)` is the size of a part; what nobody
    /// holds is the router's, who reads it at `fallback_mb_s` (0: as fast as all else).
    pub fn divide(
        &mut self,
        (table, layer): (&Table, u16),
        places: &[Place],
        bytes: &dyn Fn(u16, u16) -> u64,
        fallback_mb_s: u32,
    ) {
        self.collect(table, layer, bytes);
        self.loads.fill(Load::default());
        for index in 0..self.pieces.len() {
            let piece = self.pieces[index];
            let mut best = (u64::MAX, 0, 0);
            for place in &piece.holders[..usize::from(piece.choices)] {
                let ns = places[usize::from(*place)].machine.weights_ns(piece.bytes, piece.rows);
                let finish = self
                    .finish(places, *place)
                    .saturating_add(ns)
                    .max(places[usize::from(*place)].start_ns.saturating_add(ns));
                if finish < best.0 {
                    best = (finish, *place, ns);
                }
            }
            if piece.choices == 0 {
                let own = places[0].machine.weights_ns(piece.bytes, piece.rows);
                best.2 = if fallback_mb_s == 0 { own } else { own.max(bytes_ns(piece.bytes, fallback_mb_s)) };
            }
            self.give(index, best.1, best.2);
        }
        for _ in 0..MOVES_MAX {
            if !self.improve(places) {
                break;
            }
        }
    }

    /// When a place is done, nanoseconds from the start of the layer; 0 without work.
    pub fn finish(&self, places: &[Place], place: u16) -> u64 {
        let load = &self.loads[usize::from(place)];
        if load.parts == 0 { 0 } else { places[usize::from(place)].start_ns.saturating_add(load.ns) }
    }

    /// The parts of the picked experts, those with fewest choices first, then the costliest.
    fn collect(&mut self, table: &Table, layer: u16, bytes: &dyn Fn(u16, u16) -> u64) {
        self.pieces.clear();
        for (expert, rows) in (0_u16..).zip(&self.rows) {
            if *rows == 0 {
                continue;
            }
            for part in table.parts(layer, expert) {
                let mut piece = Piece {
                    bytes: bytes(part.from, part.to),
                    rows: *rows,
                    holders: [0; HOLDERS_MAX],
                    choices: 0,
                    place: 0,
                    ns: 0,
                };
                for node in part.holders.as_slice() {
                    let known = self.places.get(usize::from(*node)).copied().filter(|place| *place > 0);
                    if let Some(place) = if *node == ROUTER { Some(0) } else { known } {
                        piece.holders[usize::from(piece.choices)] = place;
                        piece.choices += 1;
                    }
                }
                self.pieces.push(piece);
            }
        }
        // Stable, so experts of the same size stay in ascending order.
        self.pieces
            .sort_by_key(|piece| (piece.choices, std::cmp::Reverse(piece.bytes * u64::from(piece.rows))));
    }

    fn give(&mut self, index: usize, place: u16, ns: u64) {
        let piece = &mut self.pieces[index];
        (piece.place, piece.ns) = (place, ns);
        let load = &mut self.loads[usize::from(place)];
        load.ns = load.ns.saturating_add(ns);
        load.parts += 1;
        load.assignments += u64::from(piece.rows);
        load.bytes = load.bytes.saturating_add(piece.bytes);
    }

    fn take(&mut self, index: usize) {
        let piece = self.pieces[index];
        let load = &mut self.loads[usize::from(piece.place)];
        load.ns = load.ns.saturating_sub(piece.ns);
        load.parts -= 1;
        load.assignments -= u64::from(piece.rows);
        load.bytes = load.bytes.saturating_sub(piece.bytes);
    }

    /// Moves one part off the place that is done last. False if that helps nowhere.
    fn improve(&mut self, places: &[Place]) -> bool {
        let last =
            (0..places.len() as u16).max_by_key(|place| (self.finish(places, *place), u16::MAX - place));
        let Some(last) = last else { return false };
        let now = self.finish(places, last);
        let mut best: Option<(u64, usize, u16, u64)> = None;
        for (index, piece) in self.pieces.iter().enumerate() {
            if piece.place != last || piece.choices < 2 {
                continue;
            }
            for to in piece.holders[..usize::from(piece.choices)].iter().filter(|to| **to != last) {
                let place = &places[usize::from(*to)];
                let ns = place.machine.weights_ns(piece.bytes, piece.rows);
                let there = place.start_ns.saturating_add(self.loads[usize::from(*to)].ns).saturating_add(ns);
                let here = if self.loads[usize::from(last)].parts == 1 { 0 } else { now - piece.ns };
                let after = there.max(here);
                if after < now && best.is_none_or(|best| after < best.0) {
                    best = Some((after, index, *to, ns));
                }
            }
        }
        let Some((_, index, to, ns)) = best else { return false };
        self.take(index);
        self.give(index, to, ns);
        true
    }

    /// SplitMix64 (Steele, Lea, Flood 2014).
    fn roll(&mut self, below: u64) -> u64 {
        self.dice = self.dice.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.dice;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % below.max(1)
    }
}
