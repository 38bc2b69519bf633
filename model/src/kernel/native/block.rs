//! What the products of one row block take and give: the vocabulary of the instruction sets.

use super::definition::LANES;
use crate::format::{COMBINE_BLOCK, Format, GROUP};

/// Groups of one combine block.
pub(super) const COMBINE_GROUPS: usize = COMBINE_BLOCK / GROUP;

/// One value per output of a row block.
pub(super) type Outputs<T> = [T; LANES];

/// A row block: 16 outputs, all their inputs.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    /// Format of `bytes`.
    pub(super) format: Format,
    /// Packed bytes, `groups * format.group_bytes()`.
    pub(super) bytes: &'a [u8],
    /// Distance of the software prefetch in bytes; 0 for none. The first tile fetches, the others find it.
    pub(super) ahead: usize,
}

/// What the combine needs beside the product.
#[derive(Clone, Copy)]
pub(super) struct Terms<'a> {
    /// Routing weight per row.
    pub(super) weights: &'a [f32],
    /// `2^-step_log2`.
    pub(super) scale: f32,
}

/// Where the combine adds: per row, 16 sums and the largest |addend| seen per output, as f32 bits (so NaN
/// counts as largest).
pub(super) struct Added<'a> {
    pub(super) sums: &'a mut [Outputs<i32>],
    pub(super) peaks: &'a mut [Outputs<u32>],
}

/// Gate and up products of one group of 32 intermediate values, as two halves of 16, per row.
pub(super) struct GateUp<'a> {
    pub(super) gate: [&'a [Outputs<f32>]; 2],
    pub(super) up: [&'a [Outputs<f32>]; 2],
}

/// Sums and peaks of one row.
pub(super) struct AddedRow<'a> {
    pub(super) sums: &'a mut Outputs<i32>,
    pub(super) peaks: &'a mut Outputs<u32>,
}

impl Added<'_> {
    /// The place of row `row`.
    #[inline(always)]
    pub(super) fn slot(&mut self, row: usize) -> AddedRow<'_> {
        AddedRow { sums: &mut self.sums[row], peaks: &mut self.peaks[row] }
    }
}
