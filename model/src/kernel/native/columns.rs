//! A row-major result that several threads write, each its own blocks of 16 columns.
#![allow(unsafe_code, reason = "disjoint parts of one slice, which the borrow checker cannot see")]

use std::ops::Range;

use crate::format::BLOCK_OUTPUTS;

/// Result columns, written by all threads, each its own.
#[derive(Clone, Copy)]
pub(super) struct Columns<T> {
    start: *mut T,
    width: usize,
    rows: usize,
}

// SAFETY: a plain pointer to values that may be sent; who writes which column is the contract of `row`.
unsafe impl<T: Send> Send for Columns<T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Columns<T> {}

impl<T> Columns<T> {
    /// `values` is `[rows, width]`, row-major.
    pub(super) fn new(values: &mut [T], width: usize) -> Columns<T> {
        Columns { start: values.as_mut_ptr(), width, rows: values.len() / width }
    }

    /// The part of row `row` that the row blocks `blocks` compute: 16 columns each, fewer at the edge.
    ///
    /// # Safety
    /// The values must outlive the slice, and no other thread may use these blocks of columns meanwhile.
    pub(super) unsafe fn row<'a>(&self, row: usize, blocks: Range<usize>) -> &'a mut [T] {
        let (start, end) = (blocks.start * BLOCK_OUTPUTS, (blocks.end * BLOCK_OUTPUTS).min(self.width));
        assert!(row < self.rows && start <= end);
        // SAFETY: inside the values by the assertion; exclusive by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.width + start), end - start) }
    }
}

/// Copies the 16 values of each block to its place in `to`, whose last block may be cut.
#[inline(always)]
pub(super) fn copy_blocks<'a, T: Copy + 'a>(
    blocks: impl Iterator<Item = &'a [T; BLOCK_OUTPUTS]>,
    to: &mut [T],
) {
    let (whole, rest) = to.as_chunks_mut::<BLOCK_OUTPUTS>();
    let mut whole = whole.iter_mut();
    for block in blocks {
        match whole.next() {
            Some(to) => *to = *block,
            None => rest.copy_from_slice(&block[..rest.len()]),
        }
    }
}
