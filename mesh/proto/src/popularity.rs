//! How often experts are wanted: counted coarsely while serving, and forgotten slowly.
//!
//! A trained gate does not pick evenly: some experts of a layer are wanted many times as often as others, and which
//! ones depends on what is asked. The router counts rows per expert over thousands of tokens of all requests together
//! and hands over the sums only; each batch of sums moves a running mean by an eighth. Neither counts nor means leave
//! the router, because what is asked could be guessed from what it uses. The price: what is new shows after some ten
//! thousand tokens. Refuses batches of few tokens, and any that do not fit the model.

use crate::facts::ModelFacts;

/// Least tokens of a batch. Eight of 128 experts per token are then picked 256 times each on average, known to 6 %; and
/// it is more than one request is likely to be.
pub const BATCH_TOKENS_MIN: u64 = 4096;

/// Weight of a batch in the mean: an eighth, so that the noise of a batch is divided by four.
const NEW_SHIFT: u32 = 3;

/// What an even share is: means are in thousandths of it.
pub const EVEN: u32 = 1000;

/// Rows counted since the last batch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Rows that passed all layers.
    pub tokens: u64,
    /// By layer with experts, by expert: rows.
    pub rows: Vec<Vec<u32>>,
}

/// The running means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Popularity {
    /// By layer with experts, by expert: thousandths of an even share.
    shares: Vec<Vec<u32>>,
    /// Batches that are in it.
    batches: u64,
}

impl Popularity {
    /// Every expert as popular as any.
    pub fn even(facts: &ModelFacts) -> Popularity {
        let layer = vec![EVEN; usize::from(facts.experts)];
        Popularity { shares: vec![layer; facts.moe_layers.len()], batches: 0 }
    }

    /// Takes in a batch. False where it is too small, or not about this model; then nothing has changed.
    pub fn learn(&mut self, counts: &Counts) -> bool {
        let fits = counts.rows.len() == self.shares.len()
            && counts.rows.iter().zip(&self.shares).all(|(rows, shares)| rows.len() == shares.len());
        if counts.tokens < BATCH_TOKENS_MIN || !fits {
            return false;
        }
        for (shares, rows) in self.shares.iter_mut().zip(&counts.rows) {
            let all: u64 = rows.iter().map(|rows| u64::from(*rows)).sum();
            if all == 0 {
                continue;
            }
            let experts = rows.len() as u64;
            for (share, rows) in shares.iter_mut().zip(rows) {
                let now = u64::from(*rows) * experts * u64::from(EVEN) / all;
                // The first batch is all that is known.
                let mean = if self.batches == 0 {
                    now
                } else {
                    u64::from(*share) + (now >> NEW_SHIFT) - (u64::from(*share) >> NEW_SHIFT)
                };
                *share = u32::try_from(mean).unwrap_or(u32::MAX);
            }
        }
        self.batches += 1;
        true
    }

    /// Batches that are in it; 0 where nothing was learned.
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// Thousandths of an even share, by expert of the layer at this position of `ModelFacts::moe_layers`.
    pub fn layer(&self, slot: usize) -> &[u32] {
        self.shares.get(slot).map_or(&[], Vec::as_slice)
    }

    /// One expert's.
    pub fn share(&self, slot: usize, expert: u16) -> u32 {
        self.layer(slot).get(usize::from(expert)).copied().unwrap_or(EVEN)
    }

    /// How popular, to about a factor of 1.4: half powers of two, so that noise changes little.
    pub fn level(&self, slot: usize, expert: u16) -> u32 {
        let share = u64::from(self.share(slot, expert)) + 1;
        (share * share).ilog2()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> ModelFacts {
        ModelFacts { moe_layers: vec![1, 3], experts: 4, ..ModelFacts::default() }
    }

    fn batch(rows: [u32; 4]) -> Counts {
        Counts { tokens: BATCH_TOKENS_MIN, rows: vec![rows.to_vec(), vec![10; 4]] }
    }

    #[test]
    fn batches_are_learned_and_forgotten_slowly() {
        let mut popularity = Popularity::even(&facts());
        assert!(popularity.learn(&batch([400, 200, 200, 0])));
        assert_eq!((popularity.layer(0), popularity.layer(1)), (&[2000, 1000, 1000, 0][..], &[1000; 4][..]));
        assert!(
            popularity.level(0, 0) > popularity.level(0, 1)
                && popularity.level(0, 1) > popularity.level(0, 3)
        );
        assert!(popularity.learn(&batch([0, 400, 200, 200])));
        assert_eq!(popularity.layer(0), [1750, 1125, 1000, 125]);
        (0..60).for_each(|_| assert!(popularity.learn(&batch([0, 400, 200, 200]))));
        assert!(popularity.share(0, 0) < 10 && popularity.share(0, 1) > 1980, "{:?}", popularity.layer(0));
        assert_eq!(popularity.share(9, 9), EVEN);
    }

    #[test]
    fn small_batches_and_those_of_another_model_teach_nothing() {
        let mut popularity = Popularity::even(&facts());
        let small = Counts { tokens: BATCH_TOKENS_MIN - 1, ..batch([9, 0, 0, 0]) };
        let narrow = Counts { rows: vec![vec![1; 3]; 2], ..batch([0; 4]) };
        let short = Counts { rows: vec![vec![1; 4]], ..batch([0; 4]) };
        for wrong in [small, narrow, short] {
            assert!(!popularity.learn(&wrong));
        }
        assert_eq!(popularity, Popularity::even(&facts()));
        // Nothing was wanted of a layer.
        assert!(popularity.learn(&batch([0; 4])));
        assert_eq!(popularity.layer(0), [EVEN; 4]);
    }
}
