//! Chance with a seed: a xorshift generator, so that a run can be repeated.

/// See the module.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Dice {
        // Zero stays zero.
        Dice(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// From 0 up to, but not, `end`, which is not 0.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() >> 11) as usize % end.max(1)
    }

    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| (self.next() >> 24) as u8).collect()
    }

    /// Bends some bytes: flips, cuts, repeats, or puts in numbers that are often limits.
    pub(crate) fn bend(&mut self, bytes: &mut Vec<u8>) {
        const NUMBERS: [u32; 6] = [0, 1, 0x7f, 0xffff, 0x7fff_ffff, u32::MAX];
        for _ in 0..=self.below(4) {
            if bytes.is_empty() {
                *bytes = self.bytes(8);
            }
            let at = self.below(bytes.len());
            match self.below(5) {
                0 => bytes[at] ^= 1 << self.below(8),
                1 => bytes.truncate(at),
                2 => bytes.extend_from_within(at..),
                3 => {
                    let number = NUMBERS[self.below(NUMBERS.len())].to_le_bytes();
                    let end = bytes.len().min(at + number.len());
                    bytes[at..end].copy_from_slice(&number[..end - at]);
                }
                _ => bytes[at] = self.next() as u8,
            }
        }
        bytes.truncate(1 << 20);
    }
}
