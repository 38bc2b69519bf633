//! Random weights by name: the same bytes on every machine, several gigabytes per second and core.
//!
//! A stream starts at BLAKE3(seed, name) and is SplitMix64 (Steele, Lea, Flood 2014), a counter under a mixing
//! function: good statistics, no state but 64 bits, and only integer operations. Values become weights by IEEE
//! multiplications alone. Not for secrets.

use half::f16;

use crate::format::{BLOCK_OUTPUTS, Format};

/// Root mean square of a uniform nibble minus 8: variance 21.25, mean -0.5.
const Q4_RMS: f32 = 4.636_809;
/// Root mean square of a uniform int8 where -128 is replaced by 0.
const Q8_RMS: f32 = 73.755_93;
/// Root mean square of a uniform i16 plus one half.
const I16_RMS: f32 = 18_918.613;
/// Bits of an f16 scale that vary between groups: up to an eighth of its value.
const SCALE_NOISE: u16 = 0x7f;

/// Step of the counter: 2^64 over the golden ratio, as in the source.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// Values made at once.
const BLOCK: usize = 32;

/// An endless stream of random bits.
#[derive(Clone, Debug)]
pub(super) struct Stream(u64);

impl Stream {
    /// The stream of one tensor.
    pub(super) fn new(seed: u64, name: &str) -> Stream {
        let mut hasher = blake3::Hasher::new_derive_key("moemesh synthetic weights 1");
        hasher.update(&seed.to_le_bytes());
        hasher.update(name.as_bytes());
        let mut start = [0; 8];
        hasher.finalize_xof().fill(&mut start);
        Stream(u64::from_le_bytes(start))
    }

    /// The stream where it has made the first `bytes` of `packed`: whole groups, or whole blocks of bf16. Every word
    /// of those is a step of the counter.
    pub(super) fn after(&self, bytes: usize) -> Stream {
        Stream(self.0.wrapping_add(STEP.wrapping_mul((bytes / 8) as u64)))
    }

    #[inline(always)]
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Numbers uniform between -sqrt 3 and sqrt 3, so that their root mean square is 1. Made a block at a time,
    /// which compilers vectorise.
    #[inline(always)]
    fn block(&mut self) -> [f32; BLOCK] {
        let mut bits = [0u8; 2 * BLOCK];
        for word in bits.as_chunks_mut::<8>().0 {
            *word = self.next().to_le_bytes();
        }
        let mut values = [0.0; BLOCK];
        for (value, bits) in values.iter_mut().zip(bits.as_chunks::<2>().0) {
            *value = (f32::from(i16::from_le_bytes(*bits)) + 0.5) * (1.0 / I16_RMS);
        }
        values
    }

    /// bf16 weights with this root mean square.
    pub(super) fn bf16(&mut self, out: &mut [u8], rms: f32) {
        for chunk in out.chunks_mut(2 * BLOCK) {
            for (slot, value) in chunk.as_chunks_mut::<2>().0.iter_mut().zip(self.block()) {
                // Round to nearest, ties to even; never NaN.
                let bits = (value * rms).to_bits();
                let rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
                *slot = (rounded as u16).to_le_bytes();
            }
        }
    }

    /// f32 values around `centre` with this root mean square deviation.
    pub(super) fn f32(&mut self, out: &mut [u8], centre: f32, rms: f32) {
        for chunk in out.chunks_mut(4 * BLOCK) {
            for (slot, value) in chunk.as_chunks_mut::<4>().0.iter_mut().zip(self.block()) {
                *slot = (centre + value * rms).to_le_bytes();
            }
        }
    }

    /// Packed weights with this root mean square: whole groups of `format`, or bf16.
    ///
    /// The signs of q4 scales alternate at random, because nibbles minus 8 have a mean of -0.5.
    pub(super) fn packed(&mut self, format: Format, out: &mut [u8], rms: f32) {
        let scale = match format {
            Format::Bf16 => return self.bf16(out, rms),
            Format::Q8 => f16::from_f32(rms / Q8_RMS),
            Format::Q4 => f16::from_f32(rms / Q4_RMS),
        };
        let size = format.group_bytes();
        for group in out.chunks_exact_mut(size) {
            let (lines, scales) = group.split_at_mut(size - 2 * BLOCK_OUTPUTS);
            for chunk in lines.as_chunks_mut::<8>().0 {
                let bits = self.next();
                let bits = if format == Format::Q8 { without_minus_128(bits) } else { bits };
                *chunk = bits.to_le_bytes();
            }
            for chunk in scales.as_chunks_mut::<8>().0 {
                let bits = self.next();
                for (slot, shift) in chunk.as_chunks_mut::<2>().0.iter_mut().zip([0, 16, 32, 48]) {
                    let noise = (bits >> shift) as u16;
                    let bits = (scale.to_bits() & !SCALE_NOISE) | (noise & (SCALE_NOISE | 0x8000));
                    *slot = bits.to_le_bytes();
                }
            }
        }
    }
}

/// Clears those of eight bytes that are 0x80, which a symmetric int8 does not use.
#[inline(always)]
fn without_minus_128(bytes: u64) -> u64 {
    const LOW: u64 = 0x7f7f_7f7f_7f7f_7f7f;
    // Adding 0x7f carries into the top bit of a byte whose low seven bits are not all zero.
    let low_is_zero = !((bytes & LOW) + LOW) & !LOW;
    bytes & !(bytes & low_is_zero)
}
