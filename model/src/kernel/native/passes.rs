//! Rows of a tile four at a time, for instruction sets whose registers do not hold the accumulators of a whole tile.
//!
//! AVX2 and NEON both hold four rows beside a group's weights; a taller tile walks the row block again, from the first
//! cache level. The price is that walk. Only the very first pass prefetches: later ones find the weights there.

use super::tiles::{Tile, View};

/// Rows per pass at most.
const PASS: usize = 4;

/// Up to four rows of a tile from `row` on, and the prefetch distance for this pass.
#[derive(Clone, Copy)]
pub(super) struct Pass<'a> {
    pub(super) tile: Tile<'a>,
    pub(super) row: usize,
    pub(super) ahead: usize,
}

/// The passes over `x`, each with its number of rows.
#[inline(always)]
pub(super) fn passes<'a>(x: View<'a>, ahead: usize) -> impl Iterator<Item = (Pass<'a>, usize)> {
    (0..x.tiles()).map(move |t| x.tile(t)).flat_map(move |tile| {
        (0..tile.height).step_by(PASS).map(move |row| {
            let ahead = if tile.first + row == 0 { ahead } else { 0 };
            (Pass { tile, row, ahead }, (tile.height - row).min(PASS))
        })
    })
}

/// Calls `$f::<BYTES, rows>` for the number of rows of a pass.
macro_rules! by_rows {
    ($rows:expr, $f:ident, $args:tt) => {
        match $rows {
            1 => $f::<BYTES, 1> $args,
            2 => $f::<BYTES, 2> $args,
            3 => $f::<BYTES, 3> $args,
            _ => $f::<BYTES, 4> $args,
        }
    };
}
pub(super) use by_rows;
