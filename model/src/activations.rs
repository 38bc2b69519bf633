//! Rows of activations in the form kernels take them, which is the form they travel in.
//!
//! In a q4 or q8 model a row is quantized once, on the router, to int8 groups of 32 with an f32 scale each;
//! in a bf16 model it stays f32. One row takes `row_bytes`, a multiple of 64: the int8 values (padded to whole
//! groups) followed by the scales, or the f32 values. The wire carries exactly these bytes, so a node computes
//! on the buffer that the network filled.

use crate::format::{Format, GROUP, padded_inputs};

/// Bytes of one row of `inputs` activations that meet weights of `format`.
pub fn row_bytes(format: Format, inputs: usize) -> usize {
    let padded = padded_inputs(inputs);
    let bytes = if format.is_quantized() { padded + padded / GROUP * 4 } else { padded * 4 };
    bytes.next_multiple_of(64)
}

/// A borrowed batch of rows. `bytes` is 64-byte aligned and holds `rows * row_bytes(format, inputs)`.
#[derive(Clone, Copy, Debug)]
pub struct Activations<'a> {
    format: Format,
    rows: usize,
    inputs: usize,
    bytes: &'a [u8],
}

impl<'a> Activations<'a> {
    /// Views `bytes` as `rows` rows. `None` where the length or the alignment does not fit.
    pub fn new(format: Format, rows: usize, inputs: usize, bytes: &'a [u8]) -> Option<Activations<'a>> {
        let len = rows.checked_mul(row_bytes(format, inputs))?;
        let fits = bytes.len() == len && (bytes.is_empty() || bytes.as_ptr().addr().is_multiple_of(64));
        fits.then_some(Activations { format, rows, inputs, bytes })
    }

    /// The weight format these rows are meant for.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements per row, before padding.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Row `row` of a quantized batch: int8 values (whole groups) and their scales.
    pub fn quantized(&self, row: usize) -> (&'a [i8], &'a [f32]) {
        let padded = padded_inputs(self.inputs);
        let bytes = self.row(row);
        let (values, rest) = bytes.split_at(padded);
        (bytemuck::cast_slice(values), bytemuck::cast_slice(&rest[..padded / GROUP * 4]))
    }

    /// Row `row` of an f32 batch, padding included.
    pub fn values(&self, row: usize) -> &'a [f32] {
        bytemuck::cast_slice(&self.row(row)[..padded_inputs(self.inputs) * 4])
    }

    fn row(&self, row: usize) -> &'a [u8] {
        let stride = row_bytes(self.format, self.inputs);
        &self.bytes[row * stride..(row + 1) * stride]
    }
}
