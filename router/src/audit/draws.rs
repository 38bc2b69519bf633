//! Chance that nobody outside this process can foresee: which calls are audited, which of their rows, and by whom.
//!
//! A node that knew which of its answers are looked at would lie in the others. So the numbers come from a stream keyed
//! with a secret that is drawn when the router starts (BLAKE3 in its extendable form, one block for eight draws, about
//! ten nanoseconds each), and a call is drawn after it was answered. With the same secret the same numbers come, which
//! is what tests and studies use. Refuses to be fair to nodes: a draw does not know whose call it is about.

use blake3::OutputReader;

/// Numbers that one block of the stream gives.
const PER_BLOCK: usize = 8;

/// How often something shall happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share(u64);

impl Share {
    /// Never.
    pub const NONE: Share = Share(0);

    /// Of so many cases in all; what is not between 0 and 1 counts as the nearer of them.
    pub fn new(share: f64) -> Share {
        // The cast ends at the largest number; a share that is no number is none.
        Share((share.max(0.0) * 2_f64.powi(64)) as u64)
    }
}

/// See the module.
#[derive(Debug)]
pub struct Draws {
    stream: OutputReader,
    block: [u64; PER_BLOCK],
    used: usize,
}

impl Draws {
    /// The stream of this secret.
    pub fn new(secret: &[u8; 32]) -> Draws {
        let stream = blake3::Hasher::new_keyed(secret).finalize_xof();
        Draws { stream, block: [0; PER_BLOCK], used: PER_BLOCK }
    }

    /// The next number, any as likely as any other.
    pub fn number(&mut self) -> u64 {
        if self.used == PER_BLOCK {
            let mut bytes = [0; PER_BLOCK * 8];
            self.stream.fill(&mut bytes);
            for (number, bytes) in self.block.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *number = u64::from_le_bytes(*bytes);
            }
            self.used = 0;
        }
        self.used += 1;
        self.block[self.used - 1]
    }

    /// Whether it happens this time.
    pub fn happens(&mut self, share: Share) -> bool {
        let number = self.number();
        // The largest share is all of them: one number in 2^64 is not worth an exception.
        number < share.0
    }

    /// A number below `count`; 0 where that is 0. Counts here are so small that the remainder favours none noticeably.
    pub fn below(&mut self, count: usize) -> usize {
        (self.number() % count.max(1) as u64) as usize
    }

    /// `wanted` different numbers below `count`, ascending; all of them where there are no more.
    pub fn some(&mut self, wanted: usize, count: usize) -> Vec<usize> {
        if wanted >= count {
            return (0..count).collect();
        }
        // As Floyd has it: each is drawn once, however many were drawn before.
        let mut chosen = Vec::with_capacity(wanted);
        for last in count - wanted..count {
            let drawn = self.below(last + 1);
            chosen.push(if chosen.contains(&drawn) { last } else { drawn });
        }
        chosen.sort_unstable();
        chosen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_gives_its_numbers_and_another_gives_others() {
        let first = |secret: u8| {
            let mut draws = Draws::new(&[secret; 32]);
            (0..20).map(|_| draws.number()).collect::<Vec<_>>()
        };
        assert_eq!(first(1), first(1));
        assert!(first(1).iter().all(|number| !first(2).contains(number)));
    }

    #[test]
    fn things_happen_as_often_as_they_shall() {
        let mut draws = Draws::new(&[7; 32]);
        let mut of = |share: f64| (0..100_000).filter(|_| draws.happens(Share::new(share))).count();
        assert_eq!([of(0.0), of(-1.0), of(f64::NAN), of(1.0), of(7.0)], [0, 0, 0, 100_000, 100_000]);
        for (share, expected) in [(0.001, 100), (0.01, 1000), (0.1, 10_000), (0.5, 50_000)] {
            let seen = of(share);
            // Five standard deviations; the secret is fixed, so this holds or it does not.
            let spread = 5.0 * (f64::from(expected) * (1.0 - share)).sqrt();
            assert!((seen as f64 - f64::from(expected)).abs() < spread, "{share}: {seen}");
        }
    }

    #[test]
    fn some_are_different_ascending_and_any() {
        let mut draws = Draws::new(&[9; 32]);
        let mut seen = [0; 40];
        for _ in 0..2000 {
            let some = draws.some(16, 40);
            assert!(some.len() == 16 && some.is_sorted_by(|a, b| a < b) && some[15] < 40, "{some:?}");
            some.iter().for_each(|index| seen[*index] += 1);
        }
        assert!(seen.iter().all(|times| (650..950).contains(times)), "{seen:?}");
        assert_eq!(draws.some(16, 3), [0, 1, 2]);
        assert_eq!(draws.below(0), 0);
    }
}
