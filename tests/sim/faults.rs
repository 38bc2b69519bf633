//! What goes wrong in a run: rates drawn once per seed, so that some seeds have a little of everything, some one thing
//! in plenty, and some nothing at all.

use std::time::Duration;

use super::dice::Dice;

/// A fault that strikes at random moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// A node's process is gone, with its memory; later it is started again.
    Crash,
    /// Only its connection is.
    Disconnect,
    /// Nothing gets through, in one direction or both.
    Partition,
    /// It stands still (SIGSTOP, a suspended laptop).
    Freeze,
    /// It is slower for a while.
    Slow,
    /// It is stopped in order and started again.
    Leave,
    /// A machine that was never here joins the cluster.
    Join,
    /// A machine is gone for good.
    Death,
    /// What is asked for uses some experts more than others.
    Usage,
    /// The router's process is gone; later it is started again.
    RouterCrash,
    /// The operator asks for a new plan.
    Plan,
}

const FAULTS: [Fault; 11] = [
    Fault::Crash,
    Fault::Disconnect,
    Fault::Partition,
    Fault::Freeze,
    Fault::Slow,
    Fault::Leave,
    Fault::Join,
    Fault::Death,
    Fault::Usage,
    Fault::RouterCrash,
    Fault::Plan,
];

#[derive(Clone, Debug)]
pub(crate) struct Profile {
    /// Mean time between faults of a kind; those that do not happen are not listed.
    pub(crate) every: Vec<(Fault, Duration)>,
    /// Permille of messages that are sent again because they were lost on the way.
    pub(crate) resent: u64,
    /// Permille of calls and answers that never arrive.
    pub(crate) lost: u64,
    /// Permille of calls and answers that arrive twice.
    pub(crate) replayed: u64,
    /// Delay of every message: at least, and at most this much more.
    pub(crate) delay: Duration,
    pub(crate) jitter: Duration,
    /// Permille of partitions that block one direction only.
    pub(crate) one_way: u64,
    /// Permille of placements that a node cannot load.
    pub(crate) refused: u64,
    /// Whether the router may compute what no node holds.
    pub(crate) fallback: bool,
    /// Nothing but many requests and calls that are late now and then, with others that could answer them.
    pub(crate) stragglers: bool,
    /// Whether the operator asks for a plan when the faults are over.
    pub(crate) operator: bool,
}

impl Profile {
    /// The faults of a seed.
    pub(crate) fn draw(dice: &mut Dice) -> Profile {
        let calm = dice.chance(50);
        let mut every = Vec::new();
        for fault in FAULTS {
            let often = if fault == Fault::RouterCrash { 150 } else { 400 };
            let mean = dice.millis(700, 9000);
            if dice.chance(often) && !calm {
                every.push((fault, mean));
            }
        }
        let mut rate = |max: u64| {
            let (happens, rate) = (dice.chance(500), dice.roll(max));
            if happens && !calm { rate } else { 0 }
        };
        let (resent, lost, replayed, refused) = (rate(300), rate(60), rate(500), rate(200));
        let profile = Profile {
            every,
            resent,
            lost,
            replayed,
            delay: dice.micros(50, 3000),
            jitter: if dice.chance(700) { dice.micros(10, 800) } else { dice.millis(5, 60) },
            one_way: dice.roll(1000),
            refused,
            fallback: dice.chance(700),
            stragglers: dice.chance(30),
            // Whoever refused is asked again only if somebody wants that.
            operator: refused > 0 || dice.chance(500),
        };
        if !profile.stragglers {
            return profile;
        }
        let (delay, jitter) = (Duration::from_micros(100), Duration::from_micros(100));
        Profile { every: Vec::new(), resent: 250, lost: 0, refused: 0, delay, jitter, ..profile }
    }

    /// The network as it is when nothing is wrong with it.
    pub(crate) fn heal(&mut self) {
        self.every.clear();
        (self.resent, self.lost, self.replayed, self.refused) = (0, 0, 0, 0);
        (self.delay, self.jitter) = (Duration::from_micros(200), Duration::from_micros(100));
    }
}
