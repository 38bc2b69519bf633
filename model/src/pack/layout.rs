//! Rows of a checkpoint streamed into the packed layout, one row block at a time.
//!
//! Memory: 16 rows of f32 and one packed row block, whatever the size of the tensor.

use half::bf16;

use super::error::PackError;
use super::quantize::{self, Group};
use crate::checkpoint::TensorView;
use crate::format::{BLOCK_OUTPUTS, Format, GROUP, padded_inputs, padded_outputs};

/// Takes packed bytes in order.
pub(crate) type Sink<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), PackError>;

/// Matrices stacked on each other, as one; rows past the end are zero.
pub(crate) struct Stack<'a> {
    parts: Vec<TensorView<'a>>,
    inputs: usize,
}

impl<'a> Stack<'a> {
    /// Stacks `parts`, which are all `[rows, inputs]`.
    pub(crate) fn new(parts: Vec<TensorView<'a>>, inputs: usize) -> Stack<'a> {
        Stack { parts, inputs }
    }

    fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.shape[0] as usize).sum()
    }

    /// The matrix and its row that row `row` of the stack is.
    fn locate(&self, mut row: usize) -> Option<(&TensorView<'a>, usize)> {
        for part in &self.parts {
            let rows = part.shape[0] as usize;
            if row < rows {
                return Some((part, row));
            }
            row -= rows;
        }
        None
    }
}

/// Turns row blocks into bytes; keeps its buffers between them.
pub(crate) struct BlockPacker {
    format: Format,
    values: Vec<f32>,
    bytes: Vec<u8>,
}

impl BlockPacker {
    pub(crate) fn new(format: Format) -> BlockPacker {
        BlockPacker { format, values: Vec::new(), bytes: Vec::new() }
    }

    /// A matrix, whole.
    pub(crate) fn matrix(&mut self, stack: &Stack<'_>, sink: Sink<'_>) -> Result<(), PackError> {
        for block in 0..padded_outputs(stack.rows()) / BLOCK_OUTPUTS {
            sink(self.block(stack, block)?)?;
        }
        Ok(())
    }

    /// Rows as bf16, one after the other without padding: the embedding, in every format.
    pub(crate) fn rows(&mut self, stack: &Stack<'_>, sink: Sink<'_>) -> Result<(), PackError> {
        for row in 0..stack.rows() {
            self.values.clear();
            self.values.resize(stack.inputs, 0.0);
            if let Some((part, row)) = stack.locate(row) {
                part.row_to_f32(row, &mut self.values);
            }
            self.bytes.clear();
            self.bytes.resize(stack.inputs * 2, 0);
            self.round_to_bf16(stack.inputs).map_err(|_| refuse(stack, row, Format::Bf16))?;
            sink(&self.bytes)?;
        }
        Ok(())
    }

    /// An expert from its gate, up and down matrices.
    pub(crate) fn expert(
        &mut self,
        [gate, up, down]: &[Stack<'_>; 3],
        sink: Sink<'_>,
    ) -> Result<(), PackError> {
        let blocks = padded_inputs(gate.rows()) / BLOCK_OUTPUTS;
        if self.format.is_quantized() {
            for block in 0..blocks {
                sink(self.block(gate, block)?)?;
                sink(self.block(up, block)?)?;
            }
        } else {
            for stack in [gate, up] {
                for block in 0..blocks {
                    sink(self.block(stack, block)?)?;
                }
            }
        }
        self.matrix(down, sink)
    }

    /// Packs outputs `16 block..` of `stack`.
    fn block(&mut self, stack: &Stack<'_>, block: usize) -> Result<&[u8], PackError> {
        let padded = padded_inputs(stack.inputs);
        self.values.clear();
        self.values.resize(BLOCK_OUTPUTS * padded, 0.0);
        for (output, values) in self.values.chunks_exact_mut(padded).enumerate() {
            if let Some((part, row)) = stack.locate(block * BLOCK_OUTPUTS + output) {
                part.row_to_f32(row, values);
            }
        }
        self.bytes.clear();
        self.bytes.resize(padded / GROUP * self.format.group_bytes(), 0);
        let packed = match self.format {
            Format::Bf16 => self.round_to_bf16(padded),
            Format::Q8 | Format::Q4 => self.quantize(padded),
        };
        packed.map_err(|output| refuse(stack, block * BLOCK_OUTPUTS + output, self.format))?;
        Ok(&self.bytes)
    }

    fn quantize(&mut self, padded: usize) -> Result<(), usize> {
        let mut group: Group = [[0.0; BLOCK_OUTPUTS]; GROUP];
        for (index, out) in self.bytes.chunks_exact_mut(self.format.group_bytes()).enumerate() {
            for (output, values) in self.values.chunks_exact(padded).enumerate() {
                for (input, value) in values[index * GROUP..(index + 1) * GROUP].iter().enumerate() {
                    group[input][output] = *value;
                }
            }
            quantize::quantize(self.format, &group, out).map_err(|bad| bad.output)?;
        }
        Ok(())
    }

    fn round_to_bf16(&mut self, padded: usize) -> Result<(), usize> {
        for (index, (out, value)) in
            self.bytes.as_chunks_mut::<2>().0.iter_mut().zip(&self.values).enumerate()
        {
            let rounded = bf16::from_f32(*value);
            if !rounded.is_finite() {
                return Err(index / padded);
            }
            *out = rounded.to_le_bytes();
        }
        Ok(())
    }
}

fn refuse(stack: &Stack<'_>, output: usize, format: Format) -> PackError {
    let (name, row) = match stack.locate(output) {
        Some((part, row)) => (part.name, row),
        None => ("padding", output),
    };
    PackError(format!(
        "tensor {name}, row {row}: a weight is not finite or too large for {format}; the checkpoint is damaged, \
         download it again{}",
        if format.is_quantized() { ", or use the bf16 format" } else { "" }
    ))
}
