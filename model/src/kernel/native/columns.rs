//! A row-major result that several threads write, each its own blocks of 16 columns.
#![allow(unsafe_code, reason = "disjoint parts of one slice, which the borrow checker cannot see")]

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

    /// The part of row `row` that row block `block` computes: 16 columns, fewer at the edge.
    ///
    /// # Safety
    /// The values must outlive the slice, and no other thread may use this block of columns meanwhile.
    pub(super) unsafe fn row<'a>(&self, row: usize, block: usize) -> &'a mut [T] {
        let column = block * BLOCK_OUTPUTS;
        assert!(row < self.rows && column < self.width);
        let len = BLOCK_OUTPUTS.min(self.width - column);
        // SAFETY: inside the values by the assertion; exclusive by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.width + column), len) }
    }
}
