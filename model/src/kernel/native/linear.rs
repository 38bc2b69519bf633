//! A matrix times any number of rows, on all threads.
//!
//! Rows are tiled once, then each thread takes a run of row blocks of the weights and multiplies all rows with
//! them, up to `SEGMENT_ROWS` at a time, so that the rows stay in its cache. Only real outputs are written, those of
//! several row blocks together: rows lie kilobytes apart, where single lines would chase each other out of the cache.
#![allow(unsafe_code, reason = "threads write disjoint columns of one result")]

use std::sync::Arc;

use super::columns::{Columns, copy_blocks};
use super::engine::{Crew, Engine, forged_row, lock, on_rows, part};
use super::plan::SEGMENT_ROWS;
use super::tiles::Span;
use super::weights::MatrixWeights;
use crate::activations::Activations;
use crate::format::Format;
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
        let copied = on_rows(pool, rows, &|row| {
            let (segment, slot) = (row / SEGMENT_ROWS, row % SEGMENT_ROWS);
            // SAFETY: the storage was reserved above, and each row is copied by one thread.
            unsafe { writer.copy_row(span(segment), slot, &x, row) }
        });
        if !copied {
            return Err(forged_row());
        }
        let (tiles, slots, columns) = (&space.x, &space.threads, Columns::new(y, self.outputs));
        pool.run(&|thread| {
            let mut slot = lock(&slots[thread]);
            for segment in 0..segments {
                let view = tiles.view(span(segment));
                let mine = part(blocks.count, thread, threads);
                for first in mine.clone().step_by(slot.products.len()) {
                    let run = first..mine.end.min(first + slot.products.len());
                    for (block, out) in run.clone().zip(&mut slot.products) {
                        table.product(self.weights.block(block, view.rows), view, &mut out[..view.rows]);
                    }
                    let products = &slot.products[..run.len()];
                    for row in 0..view.rows {
                        // SAFETY: this thread alone computes these blocks; `y` is borrowed by the call.
                        let to = unsafe { columns.row(segment * SEGMENT_ROWS + row, run.clone()) };
                        copy_blocks(products.iter().map(|out| &out[row]), to);
                    }
                }
            }
        });
        Ok(())
    }
}
