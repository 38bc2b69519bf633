//! How fast tokens come, before and after a change of the placement: to be held against what was predicted.
//!
//! Only steps that do nothing but decode count, by the time they take: load comes and goes, and a rate per second of the
//! clock would show that. The last so many seconds of such steps are kept for the placement in use; when another comes
//! into use, they are what was before. The price: with more sequences at a time more tokens come per step, so
//! rows per step are told beside. Refuses to say anything from little.

use std::collections::VecDeque;
use std::time::Duration;

/// Time of steps that a figure is made of, at most: older ones tell of another load.
const WINDOW: Duration = Duration::from_secs(30);

/// And at least: a hundred tokens of a slow cluster.
const LEAST: Duration = Duration::from_secs(2);

/// Steps are added up to pieces of this time, so that few are kept.
const PIECE: Duration = Duration::from_millis(500);

/// How fast tokens came for a while.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Tokens per second of all sequences together.
    pub tok_s: f64,
    /// Sequences per step, on average.
    pub rows_per_step: f64,
}

/// What was measured of the placement in use, and of the one before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Paces {
    /// Epoch of the placement in use.
    pub epoch: u64,
    /// `None`: not enough load.
    pub before: Option<Rate>,
    /// The same of now.
    pub now: Option<Rate>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Piece {
    rows: u64,
    steps: u64,
    time: Duration,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Pace {
    epoch: u64,
    before: Option<Rate>,
    pieces: VecDeque<Piece>,
}

impl Pace {
    /// Takes in a step that decoded `rows` rows under a placement.
    pub fn step(&mut self, epoch: u64, rows: u64, time: Duration) {
        if epoch != self.epoch {
            // Before the first placement the router was alone; that is a before, too.
            self.before = self.rate();
            self.pieces.clear();
            self.epoch = epoch;
        }
        match self.pieces.back_mut().filter(|piece| piece.time < PIECE) {
            Some(piece) => {
                piece.rows += rows;
                piece.steps += 1;
                piece.time += time;
            }
            None => self.pieces.push_back(Piece { rows, steps: 1, time }),
        }
        let kept = |pieces: &VecDeque<Piece>| pieces.iter().map(|piece| piece.time).sum::<Duration>();
        while self.pieces.len() > 1 && kept(&self.pieces) > WINDOW {
            self.pieces.pop_front();
        }
    }

    /// What is known now.
    pub fn paces(&self) -> Paces {
        Paces { epoch: self.epoch, before: self.before, now: self.rate() }
    }

    fn rate(&self) -> Option<Rate> {
        let sum = self.pieces.iter().fold(Piece::default(), |sum, piece| Piece {
            rows: sum.rows + piece.rows,
            steps: sum.steps + piece.steps,
            time: sum.time + piece.time,
        });
        (sum.time >= LEAST).then(|| Rate {
            tok_s: sum.rows as f64 / sum.time.as_secs_f64(),
            rows_per_step: sum.rows as f64 / sum.steps.max(1) as f64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_of_the_placement_divides_what_was_from_what_is() {
        let mut pace = Pace::default();
        let ms = Duration::from_millis;
        (0..19).for_each(|_| pace.step(1, 2, ms(100)));
        assert_eq!(pace.paces(), Paces { epoch: 1, before: None, now: None }, "not enough load");
        pace.step(1, 2, ms(100));
        let slow = Rate { tok_s: 20.0, rows_per_step: 2.0 };
        assert_eq!(pace.paces().now, Some(slow));
        pace.step(2, 1, ms(20));
        assert_eq!(pace.paces(), Paces { epoch: 2, before: Some(slow), now: None });
        (0..99).for_each(|_| pace.step(2, 1, ms(20)));
        let fast = pace.paces().now.unwrap();
        assert!((fast.tok_s - 50.0).abs() < 1e-9 && fast.rows_per_step == 1.0, "{fast:?}");
        // What is long ago does not count.
        (0..400).for_each(|_| pace.step(2, 4, ms(100)));
        let loaded = pace.paces().now.unwrap();
        assert!((loaded.tok_s - 40.0).abs() < 1e-9 && loaded.rows_per_step == 4.0, "{loaded:?}");
        assert!(pace.pieces.len() <= 61, "{}", pace.pieces.len());
    }
}
