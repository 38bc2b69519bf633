//! From how many rows on a kernel for many rows beats one for few: measured, once, when it is first wanted.
//!
//! Both are timed in turn on one row block that lies in the cache, at a few row counts; the fastest of several
//! tries counts, since whatever else the machine does only slows a try down. Price: about a millisecond at start.
//! A wrong answer costs speed, never a bit: both kernels give the same.
#![allow(unsafe_code, reason = "calls kernels of a detected instruction set")]

use std::time::{Duration, Instant};

use super::block::{Block, Outputs};
use super::definition::LANES;
use super::tiles::{Span, Tiles, View};
use crate::format::{Format, GROUP};

/// Row counts that are tried, most first: the crossover is one of them.
const ROWS: [usize; 4] = [64, 32, 16, 8];

/// Inputs of the block: with 64 rows its operands fit the second cache level of any machine concerned.
const INPUTS: usize = 1024;

/// Tries per kernel and row count.
const TRIES: usize = 7;

type Product = unsafe fn(Block<'_>, View<'_>, &mut [Outputs<f32>]);

/// The smallest tried row count from which on `many` is faster than `few`; `usize::MAX` where it never is.
///
/// # Safety
/// The machine must have what both kernels need.
pub(super) unsafe fn crossover(format: Format, few: Product, many: Product) -> usize {
    let bytes = vec![0; INPUTS / GROUP * format.group_bytes()];
    let mut tiles = Tiles::default();
    tiles.reserve(ROWS[0] * INPUTS / GROUP, true);
    let mut out = vec![[0.0; LANES]; ROWS[0]];
    let from = first_win(|rows| {
        let view = tiles.view(Span { start: 0, rows, groups: INPUTS / GROUP });
        let mut best = [Duration::MAX; 2];
        for _ in 0..TRIES {
            for (best, product) in best.iter_mut().zip([few, many]) {
                let start = Instant::now();
                // SAFETY: by the contract of this function.
                unsafe { product(Block { format, bytes: &bytes, ahead: 0 }, view, &mut out[..rows]) };
                *best = (*best).min(start.elapsed());
            }
        }
        best
    });
    tracing::debug!(%format, from, "rows from which the kernel for many rows is faster");
    from
}

/// The smallest of `ROWS` from which on the second of `times` is the shorter one.
fn first_win(mut times: impl FnMut(usize) -> [Duration; 2]) -> usize {
    let mut from = usize::MAX;
    for rows in ROWS {
        let [few, many] = times(rows);
        if many >= few {
            break;
        }
        from = rows;
    }
    from
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crossover_is_the_first_row_count_from_which_many_wins() {
        let times = |few: fn(u64) -> u64, many: fn(u64) -> u64| {
            first_win(|rows| [few, many].map(|time| Duration::from_nanos(time(rows as u64))))
        };
        assert_eq!(times(|rows| 4 * rows, |rows| 40 + rows), 16);
        assert_eq!(times(|rows| 4 * rows, |_| 1), 8);
        assert_eq!(times(|rows| rows, |rows| rows), usize::MAX);
        // A win at few rows only, say by noise, does not count.
        assert_eq!(times(|_| 20, |rows| rows), usize::MAX);
        assert_eq!(times(|rows| if rows == 16 { 1 } else { 100 }, |_| 50), 32);
    }

    #[test]
    fn both_kernels_are_called_at_every_row_count_that_decides() {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static CALLS: AtomicUsize = AtomicUsize::new(0);
        fn counted(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
            assert!(out.len() == x.rows && block.bytes.len() == x.groups * block.format.group_bytes());
            CALLS.fetch_add(1, Ordering::Relaxed);
        }
        for format in [Format::Q4, Format::Q8] {
            CALLS.store(0, Ordering::Relaxed);
            // SAFETY: the kernel is a plain function.
            let from = unsafe { crossover(format, counted, counted) };
            assert!(from == usize::MAX || ROWS.contains(&from));
            assert!(CALLS.load(Ordering::Relaxed) >= 2 * TRIES);
        }
    }
}
