//! Rows as the kernels read them: tiles of 16 rows, `[group][row][32]`, scales beside.
//!
//! Problem: a row block walks the inputs group by group and wants the same group of all rows together. Idea:
//! gathered rows are transposed once into tiles of up to 16, with the scale of each group and minus eight times the
//! sum of its values (which undoes the offset of unsigned 4-bit weights). One row alone is already in this
//! order. bf16 models keep plain rows of f32. Price: one copy of each row per expert that reads it.
//!
//! Groups are written by several threads at once (each its own), hence the raw slots. Refuses: a value of -128,
//! which the quantizer never makes and on which instruction sets would differ.
#![allow(unsafe_code, reason = "threads fill disjoint groups of one buffer")]

use super::definition::QuantizedGroup;
use crate::activations::Activations;
use crate::format::GROUP;

/// Rows of one tile.
pub(super) const TILE: usize = 16;

/// 32 int8 values as eight little-endian quads: what a dot-product instruction broadcasts.
pub(super) type Quads = [i32; GROUP / 4];

/// Undoes the +8 of stored 4-bit weights: `dot(w + 8, q) = dot(w, q) + 8 sum(q)`.
const Q4_OFFSET: i32 = -8;

/// Storage for a number of rows of one width, reused from call to call.
#[derive(Debug, Default)]
pub(super) struct Tiles {
    quantized: bool,
    values: Vec<Quads>,
    scales: Vec<f32>,
    offsets: Vec<i32>,
    floats: Vec<f32>,
}

/// A run of rows of one width inside `Tiles`: the unit that is tiled.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    /// First cell (group of a row) in the storage.
    pub(super) start: usize,
    /// Rows.
    pub(super) rows: usize,
    /// Groups per row.
    pub(super) groups: usize,
}

impl Span {
    /// The cell after the last.
    pub(super) fn end(&self) -> usize {
        self.start + self.rows * self.groups
    }
}

impl Tiles {
    /// Makes room for `cells` groups of rows. Contents are unspecified; memory only grows.
    pub(super) fn reserve(&mut self, cells: usize, quantized: bool) {
        self.quantized = quantized;
        if quantized {
            if self.values.len() < cells {
                self.values.resize(cells, [0; GROUP / 4]);
                self.scales.resize(cells, 0.0);
                self.offsets.resize(cells, 0);
            }
        } else if self.floats.len() < cells * GROUP {
            self.floats.resize(cells * GROUP, 0.0);
        }
    }

    /// The rows of `span`, which must lie inside what was reserved.
    pub(super) fn view(&self, span: Span) -> View<'_> {
        let cells = span.start..span.end();
        let mut view = View {
            rows: span.rows,
            groups: span.groups,
            values: &[],
            scales: &[],
            offsets: &[],
            floats: &[],
        };
        if self.quantized {
            view.values = &self.values[cells.clone()];
            view.scales = &self.scales[cells.clone()];
            view.offsets = &self.offsets[cells];
        } else {
            view.floats = &self.floats[cells.start * GROUP..cells.end * GROUP];
        }
        view
    }

    /// A door for several threads to write groups through. Valid until the storage is touched otherwise.
    pub(super) fn writer(&mut self) -> TilesWriter {
        TilesWriter {
            cells: if self.quantized { self.scales.len() } else { self.floats.len() / GROUP },
            quantized: self.quantized,
            values: self.values.as_mut_ptr(),
            scales: self.scales.as_mut_ptr(),
            offsets: self.offsets.as_mut_ptr(),
            floats: self.floats.as_mut_ptr(),
        }
    }
}

/// Rows to multiply, borrowed.
#[derive(Clone, Copy)]
pub(super) struct View<'a> {
    pub(super) rows: usize,
    pub(super) groups: usize,
    /// `[tile][group][row]`.
    values: &'a [Quads],
    scales: &'a [f32],
    offsets: &'a [i32],
    /// `[row][groups * 32]`, bf16 models only.
    pub(super) floats: &'a [f32],
}

/// Up to 16 rows of a view.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    /// Index of its first row in the view.
    pub(super) first: usize,
    /// Rows, 1..=16.
    pub(super) height: usize,
    /// `[group][row]`.
    pub(super) values: &'a [Quads],
    pub(super) scales: &'a [f32],
    pub(super) offsets: &'a [i32],
}

impl<'a> View<'a> {
    /// The tiles of a quantized view, in order.
    #[inline(always)]
    pub(super) fn tile(&self, index: usize) -> Tile<'a> {
        let first = index * TILE;
        let height = (self.rows - first).min(TILE);
        let cells = first * self.groups..(first + height) * self.groups;
        Tile {
            first,
            height,
            values: &self.values[cells.clone()],
            scales: &self.scales[cells.clone()],
            offsets: &self.offsets[cells],
        }
    }

    /// Number of tiles.
    #[inline(always)]
    pub(super) fn tiles(&self) -> usize {
        self.rows.div_ceil(TILE)
    }
}

/// Writes groups of `Tiles` from several threads.
#[derive(Clone, Copy)]
pub(super) struct TilesWriter {
    cells: usize,
    quantized: bool,
    values: *mut Quads,
    scales: *mut f32,
    offsets: *mut i32,
    floats: *mut f32,
}

// SAFETY: the pointers lead to a buffer that outlives the parallel section; who writes what is the contract of
// the unsafe methods.
unsafe impl Send for TilesWriter {}
// SAFETY: as above.
unsafe impl Sync for TilesWriter {}

impl TilesWriter {
    /// The slots of group `group` of the rows of `span`.
    ///
    /// # Safety
    /// The storage must outlive the slots, and no other thread may use slots of the same span and group.
    pub(super) unsafe fn slots(&self, span: Span, group: usize) -> GroupSlots {
        assert!(group < span.groups && span.end() <= self.cells);
        GroupSlots { writer: *self, span, group }
    }

    /// Copies row `row` of a batch to row `slot` of `span`. Whether its values are ones that the quantizer
    /// makes.
    ///
    /// # Safety
    /// As `slots`, for all groups of this row.
    pub(super) unsafe fn copy_row(&self, span: Span, slot: usize, x: &Activations<'_>, row: usize) -> bool {
        assert!(slot < span.rows && span.end() <= self.cells);
        if !self.quantized {
            let values = &x.values(row)[..span.groups * GROUP];
            // SAFETY: the row's place lies inside the storage (asserted) and is written by this thread alone.
            let to = unsafe { self.floats.add((span.start + slot * span.groups) * GROUP) };
            // SAFETY: as above; both are `span.groups * GROUP` long and cannot overlap.
            unsafe { to.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
            return true;
        }
        let (values, scales) = x.quantized(row);
        let (first, height) = tile_of(span, slot);
        let mut cell = span.start + first * span.groups + (slot - first);
        let mut fine = true;
        for (chunk, &scale) in values.as_chunks::<GROUP>().0[..span.groups].iter().zip(scales) {
            let (sum, made_by_quantizer) = sum_of_group(chunk);
            fine &= made_by_quantizer;
            // SAFETY: the cells of this row lie inside the storage (asserted) and are written by this thread alone.
            unsafe { self.put(cell, &QuantizedGroup { values: *chunk, scale, sum }) };
            cell += height;
        }
        fine
    }

    /// Fills a cell.
    ///
    /// # Safety
    /// The cell must lie inside the storage, and no other thread may use it.
    #[inline(always)]
    unsafe fn put(&self, cell: usize, x: &QuantizedGroup) {
        // SAFETY: by the contract.
        unsafe {
            self.values.add(cell).write(bytemuck::cast(x.values));
            self.scales.add(cell).write(x.scale);
            self.offsets.add(cell).write(x.sum * Q4_OFFSET);
        }
    }
}

/// First row and height of the tile of row `row` of a span.
#[inline(always)]
fn tile_of(span: Span, row: usize) -> (usize, usize) {
    let first = row - row % TILE;
    (first, (span.rows - first).min(TILE))
}

/// Sum of a group, and whether it holds only values that the quantizer makes: all but -128.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn sum_of_group(values: &[i8; GROUP]) -> (i32, bool) {
    // SAFETY: every x86-64 processor has SSE2.
    unsafe { sum_of_group_sse2(values) }
}

/// The same by summing the distances of bytes to zero: as a plain loop this took 3 % of a prefill.
#[cfg(target_arch = "x86_64")]
#[inline]
#[target_feature(enable = "sse2")]
fn sum_of_group_sse2(values: &[i8; GROUP]) -> (i32, bool) {
    use std::arch::x86_64::*;
    // SAFETY: both halves of 16 bytes are readable; the loads have no alignment demand.
    let (a, b) = unsafe {
        let from: *const __m128i = values.as_ptr().cast();
        (_mm_loadu_si128(from), _mm_loadu_si128(from.add(1)))
    };
    let (zero, sign) = (_mm_setzero_si128(), _mm_set1_epi8(i8::MIN));
    let (a, b) = (_mm_xor_si128(a, sign), _mm_xor_si128(b, sign));
    let sums = _mm_add_epi64(_mm_sad_epu8(a, zero), _mm_sad_epu8(b, zero));
    let sum = _mm_cvtsi128_si32(sums) + _mm_cvtsi128_si32(_mm_unpackhi_epi64(sums, sums));
    let lowest = _mm_cmpeq_epi8(_mm_min_epu8(a, b), zero);
    (sum - 128 * GROUP as i32, _mm_movemask_epi8(lowest) == 0)
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn sum_of_group(values: &[i8; GROUP]) -> (i32, bool) {
    let (mut sum, mut lowest) = (0i16, 0i8);
    for v in values {
        sum += i16::from(*v);
        lowest = lowest.min(*v);
    }
    (i32::from(sum), lowest > i8::MIN)
}

/// One group of every row of a span, owned by one thread.
pub(super) struct GroupSlots {
    writer: TilesWriter,
    span: Span,
    group: usize,
}

impl GroupSlots {
    /// Whether rows are stored as int8 groups, not as f32.
    #[inline(always)]
    pub(super) fn quantized(&self) -> bool {
        self.writer.quantized
    }

    /// Stores the group of row `row` of the span.
    #[inline(always)]
    pub(super) fn put(&self, row: usize, x: &QuantizedGroup) {
        debug_assert!(row < self.span.rows);
        let (first, height) = tile_of(self.span, row);
        let cell = self.span.start + first * self.span.groups + self.group * height + (row - first);
        // SAFETY: `cell` lies inside the storage (asserted when the slots were made) and belongs to this
        // span and group, which no other thread writes.
        unsafe { self.writer.put(cell, x) };
    }

    /// Stores the group of row `row` as f32.
    #[inline(always)]
    pub(super) fn put_floats(&self, row: usize, x: &[f32; GROUP]) {
        debug_assert!(row < self.span.rows);
        let at = self.span.start + row * self.span.groups + self.group;
        // SAFETY: as in `put`.
        unsafe { self.writer.floats.add(at * GROUP).cast::<[f32; GROUP]>().write_unaligned(*x) };
    }
}
