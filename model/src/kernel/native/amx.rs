//! The quantized products with AMX int8 tiles: 16 rows by 16 outputs by 32 inputs in one instruction.
//!
//! Groups are unpacked to int8, a chunk at a time, and meet all tiles of rows before the next chunk: an
//! unpacked line of four inputs of each output is what the second operand of `tdpbssd` wants. Each group's exact
//! dot products go through memory to AVX-512 registers, which scale and add them as the definition says; that,
//! not the multiplication, is what limits the speed. So it runs as a pipeline: group g + 2 is multiplied, g + 1
//! stored (a store right after its multiplication waits for it), g scaled and added. A short tile computes
//! with fewer rows in the unit and with stale numbers in the rows beyond, which nobody reads.
//!
//! Price: unpacking pays only if enough rows share it, so `isa` uses this from a measured number of rows on. The
//! caller promises `amx_tiles::permitted`, as `Isa::available` checks.
#![allow(unsafe_code, reason = "tile instructions, vector loads and stores, prefetch")]

use std::arch::asm;
use std::arch::x86_64::*;
use std::cell::RefCell;

use super::amx_tiles::TileUnit;
use super::avx512::{add_terms, line, scales};
use super::block::{Added, Block, COMBINE_GROUPS, Outputs, Terms};
use super::definition::LANES;
use super::tiles::{Quads, TILE, Tile, View};
use crate::format::{Format, GROUP};

/// Groups unpacked at a time: 16 KB of int8 stay in the first cache level while the tiles go by. A multiple of
/// the groups of a combine block.
const CHUNK: usize = 32;

/// Groups per round of the pipeline, one per tile of dot products.
const ROUND: usize = 4;

// A round is a combine block, so its sums are complete at the end of one; and chunks begin with a block.
const _: () = assert!(ROUND == COMBINE_GROUPS && CHUNK.is_multiple_of(ROUND));

/// Bytes of a line: four inputs of each output, or the dot products of a row.
const LINE: usize = 4 * LANES;

/// An unpacked group: 8 lines.
type Lines = [i8; GROUP * LANES];

/// Working memory of one thread.
#[repr(C, align(64))]
struct Scratch {
    /// Unpacked groups (q4 only: q8 is stored unpacked).
    lines: [Lines; CHUNK],
    /// Weight scales as f32.
    weight_scales: [Outputs<f32>; CHUNK],
    /// Row scales of a short tile, padded.
    row_scales: [[f32; TILE]; CHUNK],
    /// Dot products of four groups.
    dots: [[Outputs<i32>; TILE]; ROUND],
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch {
            lines: [[0; GROUP * LANES]; CHUNK],
            weight_scales: [[0.0; LANES]; CHUNK],
            row_scales: [[0.0; TILE]; CHUNK],
            dots: [[[0; LANES]; TILE]; ROUND],
        })
    };
}

/// Runs a block for each row of a tile, as literals: LLVM would keep a loop of 16 and its accumulators in memory.
macro_rules! each_row {
    ($i:ident, $b:block) => { each_row!(@ $i, $b, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15) };
    (@ $i:ident, $b:block, $($k:literal)*) => { $( { let $i: usize = $k; $b } )* };
}

/// Multiplies group `$g` of a chunk with a tile into tile register `$c`, by way of `$a` and `$b`.
macro_rules! multiply {
    ($chunk:ident, $cells:ident, $g:expr, $c:literal, $a:literal, $b:literal) => {
        let g: usize = $g;
        if g < $chunk.groups.len() {
            // SAFETY: the unit is configured for the height of the cells: the loads read that many rows of 32
            // bytes and 8 lines of 64, which is what the pointers lead to; only tiles are written.
            unsafe {
                asm!(
                    concat!("tilezero tmm", $c),
                    concat!("tileloadd tmm", $a, ", [{values} + {value_row}*1]"),
                    concat!("tileloadd tmm", $b, ", [{lines} + {line}*1]"),
                    concat!("tdpbssd tmm", $c, ", tmm", $a, ", tmm", $b),
                    values = in(reg) $cells.values(g),
                    value_row = in(reg) GROUP,
                    lines = in(reg) $chunk.lines(g),
                    line = in(reg) LINE,
                    options(nostack, preserves_flags, readonly)
                )
            };
            $chunk.prefetch(g);
        }
    };
}

/// Stores the dot products of group `$g` from tile register `$c`.
macro_rules! store {
    ($chunk:ident, $dots:ident, $g:expr, $c:literal) => {
        let g: usize = $g;
        if g < $chunk.groups.len() {
            // SAFETY: the unit is configured for at most 16 rows of 64 bytes, and the place has as many.
            unsafe {
                asm!(
                    concat!("tilestored [{place} + {row}*1], tmm", $c),
                    place = in(reg) $dots[g % ROUND].as_mut_ptr(),
                    row = in(reg) LINE,
                    options(nostack, preserves_flags)
                )
            };
        }
    };
}

/// Scales the dot products of group `$g` and adds them to `$acc`.
macro_rules! add {
    ($chunk:ident, $cells:ident, $dots:ident, $g:expr, $acc:ident) => {
        let g: usize = $g;
        if g < $chunk.groups.len() {
            let (dots, row_scales) = (&$dots[g % ROUND], &$cells.scales[g]);
            // SAFETY: 16 floats are readable.
            let sw = unsafe { _mm512_loadu_ps($chunk.weight_scales[g].as_ptr()) };
            each_row!(r, {
                // SAFETY: 16 integers are readable.
                let dot = _mm512_cvtepi32_ps(unsafe { _mm512_loadu_si512(dots[r].as_ptr().cast()) });
                let scale = _mm512_mul_ps(_mm512_set1_ps(row_scales[r]), sw);
                $acc[r] = _mm512_fmadd_ps(dot, scale, $acc[r]);
            });
        }
    };
}

/// A run of groups of a row block, unpacked.
struct Chunk<'a, const BYTES: usize> {
    /// Whether it begins the row block.
    first: bool,
    groups: &'a [[u8; BYTES]],
    lines: &'a [Lines; CHUNK],
    weight_scales: &'a [Outputs<f32>; CHUNK],
    /// Distance of the prefetch; 0 for none.
    ahead: usize,
}

impl<const BYTES: usize> Chunk<'_, BYTES> {
    /// The eight lines of group `g`.
    #[inline(always)]
    fn lines(&self, g: usize) -> *const u8 {
        if BYTES == Format::Q8.group_bytes() {
            self.groups[g].as_ptr()
        } else {
            self.lines[g].as_ptr().cast()
        }
    }

    /// Asks for what lies `ahead` of group `g`, into the second cache level: the first is full of unpacked lines.
    #[inline(always)]
    fn prefetch(&self, g: usize) {
        if self.ahead != 0 {
            for line in 0..BYTES.div_ceil(LINE) {
                let address = self.groups[g].as_ptr().wrapping_add(self.ahead + line * LINE);
                // SAFETY: a prefetch never faults, whatever the address.
                unsafe { _mm_prefetch::<_MM_HINT_T1>(address.cast()) };
            }
        }
    }
}

/// Part of a tile that meets a chunk.
struct Cells<'a> {
    /// Index of its first row in the view.
    first: usize,
    height: usize,
    /// `[group][row]`.
    values: &'a [Quads],
    scales: &'a [[f32; TILE]],
}

impl<'a> Cells<'a> {
    /// The groups of `tile` from group `first` on, `groups` of them. `padded` takes the scales of a short tile.
    fn new(tile: Tile<'a>, first: usize, groups: usize, padded: &'a mut [[f32; TILE]; CHUNK]) -> Cells<'a> {
        let height = tile.height;
        let range = first * height..(first + groups) * height;
        let (values, scales) = (&tile.values[range.clone()], &tile.scales[range]);
        if height == TILE {
            return Cells { first: tile.first, height, values, scales: scales.as_chunks().0 };
        }
        for (to, scales) in padded.iter_mut().zip(scales.chunks_exact(height)) {
            to[..height].copy_from_slice(scales);
        }
        Cells { first: tile.first, height, values, scales: &padded[..groups] }
    }

    /// The rows of group `g`.
    #[inline(always)]
    fn values(&self, g: usize) -> *const Quads {
        self.values[g * self.height..][..self.height].as_ptr()
    }
}

/// Where the results of all rows go.
enum Results<'a> {
    Products(&'a mut [Outputs<f32>]),
    /// Rounded and added after every combine block.
    Sums(Terms<'a>, Added<'a>),
}

/// Converts the scales of `groups` and, for q4, unpacks their nibbles to signed bytes.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c")]
fn unpack<const BYTES: usize>(
    groups: &[[u8; BYTES]],
    lines: &mut [Lines; CHUNK],
    weight_scales: &mut [Outputs<f32>; CHUNK],
) {
    let (low_bits, offset) = (_mm512_set1_epi8(15), _mm512_set1_epi8(8));
    for (g, group) in groups.iter().enumerate() {
        // SAFETY: 16 floats are writable.
        unsafe { _mm512_storeu_ps(weight_scales[g].as_mut_ptr(), scales(group)) };
        if BYTES == Format::Q8.group_bytes() {
            continue;
        }
        for j in 0..4 {
            let bytes = line(group, j);
            let low = _mm512_and_si512(bytes, low_bits);
            let high = _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), low_bits);
            // SAFETY: lines j and j + 4 of the eight.
            unsafe {
                let to = lines[g].as_mut_ptr().add(j * LINE);
                _mm512_storeu_si512(to.cast(), _mm512_sub_epi8(low, offset));
                _mm512_storeu_si512(to.add(4 * LINE).cast(), _mm512_sub_epi8(high, offset));
            }
        }
    }
}

/// Products of one tile with a chunk.
///
/// # Safety
/// The tile unit must be configured for the height of `cells`.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,f16c,fma")]
unsafe fn meet<const BYTES: usize>(
    chunk: &Chunk<'_, BYTES>,
    cells: &Cells<'_>,
    dots: &mut [[Outputs<i32>; TILE]; ROUND],
    results: &mut Results<'_>,
) {
    let rows = cells.first..cells.first + cells.height;
    let mut acc = [_mm512_setzero_ps(); TILE];
    if let Results::Products(out) = results
        && !chunk.first
    {
        let out = &out[rows.clone()];
        each_row!(r, {
            if r < out.len() {
                // SAFETY: 16 floats are readable.
                acc[r] = unsafe { _mm512_loadu_ps(out[r].as_ptr()) };
            }
        });
    }
    multiply!(chunk, cells, 0, "0", "4", "5");
    store!(chunk, dots, 0, "0");
    multiply!(chunk, cells, 1, "1", "6", "7");
    for g in (0..chunk.groups.len()).step_by(ROUND) {
        multiply!(chunk, cells, g + 2, "2", "4", "5");
        store!(chunk, dots, g + 1, "1");
        add!(chunk, cells, dots, g, acc);
        multiply!(chunk, cells, g + 3, "3", "6", "7");
        store!(chunk, dots, g + 2, "2");
        add!(chunk, cells, dots, g + 1, acc);
        multiply!(chunk, cells, g + 4, "0", "4", "5");
        store!(chunk, dots, g + 3, "3");
        add!(chunk, cells, dots, g + 2, acc);
        multiply!(chunk, cells, g + 5, "1", "6", "7");
        store!(chunk, dots, g + 4, "0");
        add!(chunk, cells, dots, g + 3, acc);
        if let Results::Sums(terms, added) = results {
            let weights = &terms.weights[rows.clone()];
            let (sums, peaks) = (&mut added.sums[rows.clone()], &mut added.peaks[rows.clone()]);
            each_row!(r, {
                if r < weights.len() {
                    add_terms(acc[r], weights[r], terms.scale, &mut sums[r], &mut peaks[r]);
                }
                acc[r] = _mm512_setzero_ps();
            });
        }
    }
    if let Results::Products(out) = results {
        let out = &mut out[rows];
        each_row!(r, {
            if r < out.len() {
                // SAFETY: 16 floats are writable.
                unsafe { _mm512_storeu_ps(out[r].as_mut_ptr(), acc[r]) };
            }
        });
    }
}

/// All chunks of a row block with all tiles of rows.
///
/// # Safety
/// The tile unit must be permitted, and the machine have the features of `meet`.
unsafe fn meet_all<const BYTES: usize>(
    block: Block<'_>,
    x: View<'_>,
    mut results: Results<'_>,
    scratch: &mut Scratch,
) {
    let Scratch { lines, weight_scales, row_scales, dots } = scratch;
    if x.rows == 0 {
        return;
    }
    // SAFETY: by the contract of this function.
    let mut unit = unsafe { TileUnit::configured(x.rows.min(TILE)) };
    for (index, groups) in block.bytes.as_chunks::<BYTES>().0.chunks(CHUNK).enumerate() {
        // SAFETY: by the contract of this function.
        unsafe { unpack(groups, lines, weight_scales) };
        for t in 0..x.tiles() {
            let ahead = if t == 0 { block.ahead } else { 0 };
            let chunk = Chunk { first: index == 0, groups, lines, weight_scales, ahead };
            let cells = Cells::new(x.tile(t), index * CHUNK, groups.len(), row_scales);
            unit.set_rows(cells.height);
            // SAFETY: by the contract of this function; the unit has the height of the cells.
            unsafe { meet(&chunk, &cells, dots, &mut results) };
        }
    }
}

/// Products of a row block with all rows of `x`; `BYTES` is the size of a group and so the format.
///
/// # Safety
/// `Isa::Amx` must be available.
pub(super) unsafe fn product<const BYTES: usize>(block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
    // SAFETY: by the contract of this function.
    SCRATCH.with_borrow_mut(|s| unsafe { meet_all::<BYTES>(block, x, Results::Products(out), s) });
}

/// The same with the combine of DESIGN section 5.
///
/// # Safety
/// `Isa::Amx` must be available.
pub(super) unsafe fn combine<const BYTES: usize>(
    block: Block<'_>,
    x: View<'_>,
    terms: Terms<'_>,
    added: Added<'_>,
) {
    // SAFETY: by the contract of this function.
    SCRATCH.with_borrow_mut(|s| unsafe { meet_all::<BYTES>(block, x, Results::Sums(terms, added), s) });
}
