//! Sums that look right and are not: what a node does that wants to change text without being noticed.
//!
//! None of these can be told from the frame: shape, width and size are those of an honest answer. What is left is to
//! compute the same elsewhere (`router::audit`). A lie is a function of the call's number and the right sums, so that a
//! test or study that is repeated is lied to in the same way.

/// Ways to lie plausibly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// Everything a hundredth too large.
    Scaled,
    /// One more in one value, in one of a hundred answers.
    Noise,
    /// The neighbouring experts' sums.
    OtherExperts,
    /// Nothing.
    Zeros,
    /// Sums of four-bit weights where eight were promised. `bend` has to be given them.
    FewerBits,
    /// As `Scaled`, in every twentieth answer only.
    Seldom,
}

/// Answers of `Noise` that are honest, for one that is not.
const NOISE_EVERY: u64 = 100;
/// The same of `Seldom`.
const SELDOM_EVERY: u64 = 20;

impl Lie {
    /// All of them.
    pub const ALL: [Lie; 6] =
        [Lie::Scaled, Lie::Noise, Lie::OtherExperts, Lie::Zeros, Lie::FewerBits, Lie::Seldom];

    /// What it is called, in `liar --mode` and in tables.
    pub fn name(self) -> &'static str {
        match self {
            Lie::Scaled => "scaled",
            Lie::Noise => "noise",
            Lie::OtherExperts => "other-experts",
            Lie::Zeros => "zeros",
            Lie::FewerBits => "fewer-bits",
            Lie::Seldom => "seldom",
        }
    }

    /// The lie of this name.
    pub fn parse(name: &str) -> Option<Lie> {
        Lie::ALL.into_iter().find(|lie| lie.name() == name)
    }

    /// One in so many answers is a lie.
    pub fn every(self) -> u64 {
        match self {
            Lie::Noise => NOISE_EVERY,
            Lie::Seldom => SELDOM_EVERY,
            Lie::Scaled | Lie::OtherExperts | Lie::Zeros | Lie::FewerBits => 1,
        }
    }

    /// Whether the answer to the call of this number is a lie.
    pub fn strikes(self, call: u64) -> bool {
        match self {
            // Which ones nobody can guess, who does not know this function.
            Lie::Noise => mix(call).is_multiple_of(NOISE_EVERY),
            Lie::Seldom => call.is_multiple_of(SELDOM_EVERY),
            Lie::Scaled | Lie::OtherExperts | Lie::Zeros | Lie::FewerBits => true,
        }
    }

    /// The expert that is computed in place of this one, of so many.
    pub fn expert(self, expert: u16, experts: u16) -> u16 {
        if self == Lie::OtherExperts && experts > 1 { (expert + 1) % experts } else { expert }
    }

    /// Makes of the sums of a call what it is answered with.
    pub fn bend(self, call: u64, sums: &mut [i64]) {
        if !self.strikes(call) {
            return;
        }
        match self {
            Lie::Scaled | Lie::Seldom => sums.iter_mut().for_each(|sum| *sum += *sum / 100),
            Lie::Noise => {
                let at = mix(call ^ 1) % sums.len().max(1) as u64;
                sums.iter_mut().skip(at as usize).take(1).for_each(|sum| *sum += 1);
            }
            Lie::Zeros => sums.fill(0),
            Lie::OtherExperts | Lie::FewerBits => {}
        }
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): a hash of 64 bits.
pub fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
