//! A matrix times any number of rows, on all threads.
//!
//! Rows are tiled once, then each thread takes a run of row blocks of the weights and multiplies all rows with
//! them, up to `SEGMENT_ROWS` at a time, so that the rows stay in its cache. Only real outputs are written.
#![allow(unsafe_code, reason = "threads write disjoint columns of one result")]

use std::sync::Arc;

use super::definition::LANES;
use super::isa::Table;
use super::tiles::Span;
use super::weights::MatrixWeights;
use super::{Crew, Engine, SEGMENT_ROWS, part};
use crate::activations::Activations;
use crate::format::{BLOCK_OUTPUTS, Format};
use crate::kernel::call::check_product;
use crate::kernel::{KernelError, Linear};
use crate::packed::PackedMatrix;

/// A matrix, loaded.
#[derive(Debug)]
pub(super) struct NativeLinear {
    engine: Arc<Engine>,
    format: Format,
    outputs: usize,
    inputs: usize,
    weights: MatrixWeights,
}

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

impl NativeLinear {
    pub(super) fn new(engine: Arc<Engine>, matrix: PackedMatrix) -> Result<NativeLinear, KernelError> {
        let PackedMatrix { format, outputs, inputs, .. } = matrix;
        if outputs == 0 || inputs == 0 {
            return Err(KernelError::Weights(format!("a matrix of {outputs} x {inputs} computes nothing")));
        }
        Ok(NativeLinear { engine, format, outputs, inputs, weights: MatrixWeights::new(matrix)? })
    }
}

impl Linear for NativeLinear {
    fn outputs(&self) -> usize {
        self.outputs
    }

    fn apply(&self, x: Activations<'_>, y: &mut [f32]) -> Result<(), KernelError> {
        check_product(self.format, (self.outputs, self.inputs), &x, y.len())?;
        if x.rows() == 0 {
            return Ok(());
        }
        let (table, blocks) = (self.engine.table, self.weights.blocks());
        let mut crew = self.engine.crew();
        let Crew { pool, space } = &mut *crew;
        let rows = x.rows();
        space.x.reserve(rows * blocks.groups, self.format.is_quantized());
        let (threads, writer) = (pool.threads(), space.x.writer());
        let segments: usize = rows.div_ceil(SEGMENT_ROWS);
        let span = |segment: usize| {
            let first = segment * SEGMENT_ROWS;
            Span { start: first * blocks.groups, rows: SEGMENT_ROWS.min(rows - first), groups: blocks.groups }
        };
        let copied = super::on_rows(pool, rows, &|row| {
            let (segment, slot) = (row / SEGMENT_ROWS, row % SEGMENT_ROWS);
            // SAFETY: the storage was reserved above, and each row is copied by one thread.
            unsafe { writer.copy_row(span(segment), slot, &x, row) }
        });
        if !copied {
            return Err(super::forged_row());
        }
        let (tiles, slots, columns) = (&space.x, &space.threads, Columns::new(y, self.outputs));
        pool.run(&|thread| {
            let mut slot = super::lock(&slots[thread]);
            for segment in 0..segments {
                let view = tiles.view(span(segment));
                for block in part(blocks.count, thread, threads) {
                    let out = &mut slot.products[0][..view.rows];
                    Table::product(table, self.weights.block(block, view.rows), view, out);
                    for (row, values) in out.iter().enumerate() {
                        // SAFETY: this thread alone computes this block; `y` is borrowed by the call.
                        let to = unsafe { columns.row(segment * SEGMENT_ROWS + row, block) };
                        to.copy_from_slice(&values[..to.len().min(LANES)]);
                    }
                }
            }
        });
        Ok(())
    }
}
