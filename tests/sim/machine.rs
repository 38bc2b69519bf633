//! A simulated node: what `expert-node` and `station` do, in a few lines, and what a broken or hostile one may do.
//!
//! It keeps the promises that the router relies on: it acknowledges what it holds, answers calls of two epochs, refuses
//! the rest, holds its experts over a lost connection and forgets them when its process ends. A liar keeps none of them
//! when its dice say so.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::time::Duration;

use mesh_proto::facts::ModelFacts;
use mesh_wire::buffer::Pool;
use mesh_wire::control::{Hello, Placed, Placement, Refusal};
use mesh_wire::id::{ExpertKey, Slice};
use mesh_wire::reply::{ReplyHead, encode_sums};

use super::dice::{Dice, mix};
use super::toy::{HIDDEN, Row, Toy};

/// A call as a node sees it.
#[derive(Clone)]
pub(crate) struct Call {
    pub(crate) call: u64,
    pub(crate) epoch: u64,
    pub(crate) layer: u16,
    pub(crate) rows: Vec<Row>,
    /// Row of the call, expert.
    pub(crate) assignments: Vec<(u32, u16)>,
}

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Call { call, epoch, layer, rows, assignments } = self;
        let (first, rows) = (rows.first(), rows.len());
        write!(f, "{call}, epoch {epoch}, layer {layer}, {rows} rows from {first:x?}, {assignments:?}")
    }
}

/// What a node says of a call.
#[derive(Clone)]
pub(crate) enum Answer {
    /// The body of a reply frame.
    Reply(Vec<u8>),
    Refused(u64, Refusal),
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Answer::Reply(body) => {
                let hash = body.iter().fold(0_u64, |hash, byte| mix(hash ^ u64::from(*byte)));
                write!(f, "reply of {} bytes {hash:x}", body.len())
            }
            Answer::Refused(call, refusal) => write!(f, "{call} refused: {refusal:?}"),
        }
    }
}

/// Ways to lie about a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lie {
    Rows,
    Hidden,
    ForeignCall,
    AnotherCall,
    Twice,
    Garbage,
    Truncated,
    Silence,
    Flood,
}

pub(crate) const LIES: [Lie; 9] = [
    Lie::Rows,
    Lie::Hidden,
    Lie::ForeignCall,
    Lie::AnotherCall,
    Lie::Twice,
    Lie::Garbage,
    Lie::Truncated,
    Lie::Silence,
    Lie::Flood,
];

/// Experts in memory for one epoch.
#[derive(Clone, Debug)]
pub(crate) struct Held {
    pub(crate) epoch: u64,
    pub(crate) slices: BTreeMap<ExpertKey, Slice>,
}

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) up: bool,
    /// Counts starts of its process.
    pub(crate) life: u64,
    /// The connection as this side sees it.
    pub(crate) connection: Option<u64>,
    pub(crate) heard_at: Duration,
    pub(crate) memory_bytes: u64,
    pub(crate) weight_mb_s: u32,
    /// At most two, ascending.
    pub(crate) held: Vec<Held>,
    /// When its worker is done with what it has, and when its loader is.
    pub(crate) free_at: Duration,
    pub(crate) loaded_at: Duration,
    pub(crate) slow: u32,
    pub(crate) frozen_until: Duration,
    /// Permille of what it says that is a lie.
    pub(crate) lies: u64,
    pub(crate) leaving: bool,
    /// It is gone for good.
    pub(crate) dead: bool,
    /// Calls it has seen, for answering another one.
    last_call: u64,
}

impl Machine {
    pub(crate) fn new(memory_bytes: u64, weight_mb_s: u32, lies: u64) -> Machine {
        Machine {
            up: false,
            life: 0,
            connection: None,
            heard_at: Duration::ZERO,
            memory_bytes,
            weight_mb_s,
            held: Vec::new(),
            free_at: Duration::ZERO,
            loaded_at: Duration::ZERO,
            slow: 1,
            frozen_until: Duration::ZERO,
            lies,
            leaving: false,
            dead: false,
            last_call: 0,
        }
    }

    /// The process ends; memory and connection go with it.
    pub(crate) fn die(&mut self) {
        self.up = false;
        self.connection = None;
        self.held.clear();
        self.leaving = false;
    }

    pub(crate) fn start(&mut self, now: Duration) {
        self.up = true;
        self.life += 1;
        (self.free_at, self.loaded_at) = (now, now);
        self.frozen_until = Duration::ZERO;
    }

    pub(crate) fn hello(&self, facts: &ModelFacts, dice: &mut Dice) -> Hello {
        let honest = Hello {
            name: "machine".to_owned(),
            version: "0".to_owned(),
            model: facts.fingerprint,
            memory_bytes: self.memory_bytes,
            threads: 1,
            exact: true,
            kernels: "toy".to_owned(),
            weight_mb_s: [self.weight_mb_s; 5],
            held_epoch: self.held.last().map_or(0, |held| held.epoch),
            instance: self.life,
        };
        if !dice.chance(self.lies) {
            return honest;
        }
        match dice.roll(7) {
            0 => Hello { memory_bytes: u64::MAX, ..honest },
            1 => Hello { weight_mb_s: [u32::MAX; 5], ..honest },
            2 => Hello { weight_mb_s: [0; 5], memory_bytes: 0, ..honest },
            3 => Hello { weight_mb_s: [1, 0, 0, 0, u32::MAX], ..honest },
            4 => Hello { held_epoch: honest.held_epoch + 1 + dice.roll(1 << 20), ..honest },
            5 => Hello { held_epoch: u64::MAX, ..honest },
            _ => Hello { model: [9; 32], exact: false, ..honest },
        }
    }

    /// Takes a placement into memory, dropping the older epochs that do not fit beside it.
    pub(crate) fn load(&mut self, placement: &Placement, facts: &ModelFacts) {
        let slices = placement.experts.iter().map(|slice| (slice.key, *slice)).collect();
        self.held.retain(|held| held.epoch < placement.epoch);
        self.held.push(Held { epoch: placement.epoch, slices });
        if self.held.len() > 2 {
            self.held.remove(0);
        }
        if self.held.len() == 2 && union_bytes(&self.held, facts) > self.memory_bytes {
            self.held.remove(0);
        }
    }

    /// The answer to a placement, once loaded.
    pub(crate) fn placed(&self, placement: &Placement, refuse: bool, dice: &mut Dice) -> Placed {
        let refusal = if refuse { "the disk is broken" } else { "" };
        let honest = Placed { epoch: placement.epoch, weight_bytes: 1, refusal: refusal.to_owned() };
        if !dice.chance(self.lies) {
            return honest;
        }
        match dice.roll(4) {
            0 => Placed { epoch: placement.epoch + dice.between(1, 9), ..honest },
            1 => Placed { epoch: placement.epoch.saturating_sub(1), ..honest },
            2 => Placed { weight_bytes: u64::MAX, ..honest },
            _ => Placed { refusal: "no".repeat(100), ..honest },
        }
    }

    /// Time a call takes once it is its turn; none where it is refused.
    pub(crate) fn service(&self, call: &Call, facts: &ModelFacts) -> Result<Duration, Refusal> {
        let held = self.held.iter().find(|held| held.epoch == call.epoch).ok_or(Refusal::UnknownEpoch)?;
        // As it says of itself: reading the weights is what takes time, however many rows there are.
        let experts: BTreeSet<u16> = call.assignments.iter().map(|(_, expert)| *expert).collect();
        let mut bytes = 0;
        for expert in experts {
            let key = ExpertKey { layer: call.layer, expert };
            let slice = held.slices.get(&key).ok_or(Refusal::UnknownExpert)?;
            bytes += facts.slice_bytes(slice.from, slice.to);
        }
        let seconds = bytes as f64 / (f64::from(self.weight_mb_s.max(1)) * 1e6) * f64::from(self.slow);
        Ok(Duration::from_secs_f64(seconds))
    }

    /// What it answers, lies included; usually one answer.
    pub(crate) fn answers(
        &mut self,
        call: &Call,
        (toy, pool): (&Toy, &Pool),
        dice: &mut Dice,
    ) -> Vec<Answer> {
        let before = std::mem::replace(&mut self.last_call, call.call);
        let Some(held) = self.held.iter().find(|held| held.epoch == call.epoch) else {
            return vec![Answer::Refused(call.call, Refusal::UnknownEpoch)];
        };
        let mut sums: Vec<Row> = vec![[0; HIDDEN]; call.rows.len()];
        for (row, expert) in &call.assignments {
            let key = ExpertKey { layer: call.layer, expert: *expert };
            let Some(slice) = held.slices.get(&key) else {
                return vec![Answer::Refused(call.call, Refusal::UnknownExpert)];
            };
            let row = *row as usize;
            let part = toy.part((call.layer, *expert), (slice.from, slice.to), &call.rows[row]);
            sums[row].iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
        }
        let honest = |call| Answer::Reply(encode(pool, call, &sums, HIDDEN));
        if !dice.chance(self.lies) {
            return vec![honest(call.call)];
        }
        match dice.one(&LIES) {
            Lie::Rows => {
                let wrong =
                    if dice.chance(500) { &sums[..sums.len() - 1] } else { &[&sums[..], &sums[..]].concat() };
                vec![Answer::Reply(encode(pool, call.call, wrong, HIDDEN))]
            }
            Lie::Hidden => vec![Answer::Reply(encode(pool, call.call, &sums, HIDDEN - 1))],
            Lie::ForeignCall => vec![honest(call.call + 1 + dice.roll(1 << 40))],
            Lie::AnotherCall => vec![honest(before)],
            Lie::Twice => vec![honest(call.call), honest(call.call)],
            Lie::Garbage => {
                let Answer::Reply(mut body) = honest(call.call) else { return Vec::new() };
                // Its own bytes, cut off a row's sums: what stays is not a reply.
                let at = dice.roll(body.len() as u64) as usize;
                body[at..].iter_mut().for_each(|byte| *byte = !*byte);
                let tail = body.len().saturating_sub(4);
                body[tail..].fill(0xff);
                vec![Answer::Reply(body)]
            }
            Lie::Truncated => {
                let Answer::Reply(mut body) = honest(call.call) else { return Vec::new() };
                body.truncate(dice.roll(body.len() as u64) as usize);
                vec![Answer::Reply(body)]
            }
            Lie::Silence => Vec::new(),
            Lie::Flood => {
                (0..dice.between(2, 40)).map(|more| honest(call.call.wrapping_add(more * more))).collect()
            }
        }
    }
}

/// The body of a reply with these sums, of which only the first `hidden` values of a row are sent.
fn encode(pool: &Pool, call: u64, sums: &[Row], hidden: usize) -> Vec<u8> {
    let narrow = |row: &Row| -> Option<Vec<i32>> {
        row[..hidden].iter().map(|value| i32::try_from(*value).ok()).collect()
    };
    let rows: Vec<Option<Vec<i32>>> = sums.iter().map(narrow).collect();
    let rows: Vec<Option<&[i32]>> = rows.iter().map(|row| row.as_deref()).collect();
    let head = ReplyHead { call, service_us: 1, hidden: hidden as u32 };
    encode_sums(pool, head, &rows).map_or_else(|_| Vec::new(), |buffer| buffer.body().to_vec())
}

/// Bytes of two epochs, what is in both counted once.
fn union_bytes(held: &[Held], facts: &ModelFacts) -> u64 {
    let [old, new] = held else { return 0 };
    let bytes =
        |held: &Held| held.slices.values().map(|slice| facts.slice_bytes(slice.from, slice.to)).sum::<u64>();
    let both = old.slices.iter().filter(|(key, slice)| new.slices.get(key) == Some(*slice));
    bytes(old) + bytes(new) - both.map(|(_, slice)| facts.slice_bytes(slice.from, slice.to)).sum::<u64>()
}
