//! How fast this machine reads memory: the yardstick of every kernel that streams weights.
//!
//! Reads with the widest loads the machine has and the same software prefetch as the kernels; anything less
//! would flatter them. Measures, so it belongs in benchmarks only.
#![allow(unsafe_code, reason = "vector loads and prefetch")]

use std::hint::black_box;
use std::time::Instant;

/// Bytes read per round of the loop.
const ROUND: usize = 256;

/// Prefetch distance: the best of 1, 2, 4 and 8 KB for a plain read.
#[cfg(target_arch = "x86_64")]
const AHEAD: usize = 4096;

/// Reads `bytes` once with `threads` threads, each a contiguous share, and returns GB (10^9 bytes) per second.
/// `bytes` should be several times the last-level cache.
pub fn read_gb_s(bytes: &[u8], threads: usize) -> f64 {
    let share = (bytes.len() / threads.max(1) / ROUND * ROUND).max(ROUND);
    let start = Instant::now();
    std::thread::scope(|scope| {
        let mut shares = bytes.chunks(share);
        let mine = shares.next();
        for share in shares {
            scope.spawn(move || black_box(read(share)));
        }
        black_box(mine.map_or(0, read));
    });
    bytes.len() as f64 / start.elapsed().as_secs_f64() / 1e9
}

fn read(bytes: &[u8]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx512f") {
        // SAFETY: the machine has the feature.
        return unsafe { read_avx512(bytes) };
    } else if is_x86_feature_detected!("avx2") {
        // SAFETY: the machine has the feature.
        return unsafe { read_avx2(bytes) };
    }
    read_words(bytes)
}

#[inline(always)]
fn read_words(bytes: &[u8]) -> u64 {
    let mut lanes = [0u64; ROUND / 8];
    for round in bytes.as_chunks::<ROUND>().0 {
        let words: &[[u8; 8]] = round.as_chunks().0;
        for (lane, word) in lanes.iter_mut().zip(words) {
            *lane ^= u64::from_le_bytes(*word);
        }
    }
    lanes.iter().fold(0, |all, lane| all ^ lane)
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn prefetch_round(round: &[u8; ROUND]) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in 0..ROUND / 64 {
        // SAFETY: a prefetch never faults, whatever the address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(round.as_ptr().wrapping_add(AHEAD + line * 64).cast()) };
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn read_avx2(bytes: &[u8]) -> u64 {
    use std::arch::x86_64::*;
    let mut lanes = [_mm256_setzero_si256(); 8];
    for round in bytes.as_chunks::<ROUND>().0 {
        prefetch_round(round);
        for i in 0..8 {
            // SAFETY: 32 of the round's 256 bytes; the load has no alignment demand.
            let v = unsafe { _mm256_loadu_si256(round.as_ptr().add(i * 32).cast()) };
            lanes[i] = _mm256_xor_si256(lanes[i], v);
        }
    }
    let mut all = lanes[0];
    for lane in &lanes[1..] {
        all = _mm256_xor_si256(all, *lane);
    }
    _mm256_extract_epi64::<0>(all) as u64
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
fn read_avx512(bytes: &[u8]) -> u64 {
    use std::arch::x86_64::*;
    let mut lanes = [_mm512_setzero_si512(); 4];
    for round in bytes.as_chunks::<ROUND>().0 {
        prefetch_round(round);
        for i in 0..4 {
            // SAFETY: 64 of the round's 256 bytes; the load has no alignment demand.
            let v = unsafe { _mm512_loadu_si512(round.as_ptr().add(i * 64).cast()) };
            lanes[i] = _mm512_xor_si512(lanes[i], v);
        }
    }
    let (a, b) = (_mm512_xor_si512(lanes[0], lanes[1]), _mm512_xor_si512(lanes[2], lanes[3]));
    _mm512_reduce_add_epi64(_mm512_xor_si512(a, b)) as u64
}
