//! Loaded weights: packed bytes that were checked once, and where their row blocks begin.
//!
//! Refuses at load what would make a wrong or different result later: a length that does not fit the shape, a
//! scale (or bf16 weight) that is NaN or infinite.

#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use super::block::Block;
use super::tiles::TILE;
use crate::format::{BLOCK_OUTPUTS, Format, GROUP, padded_inputs, padded_outputs};
use crate::kernel::KernelError;
use crate::packed::{PackedExpert, PackedMatrix};
use crate::region::Bytes;

/// Prefetch distance for up to 16 rows. 1 to 2 KB hid the latency best, 4 KB was worse.
const AHEAD_BYTES: usize = 2048;

/// Up to so many rows AMD's cores fetch one stream by themselves as fast as memory gives, and prefetch instructions
/// only take their places in the queue of misses: 0.89 of the read bandwidth without, 0.77 with them (Zen 4, q4, 1 row; at
/// 4 rows it is 0.55 and 0.62).
const ALONE_ROWS: usize = 2;

/// Whether this core is better left alone while it streams for few rows.
fn streams_alone() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        static AMD: OnceLock<bool> = OnceLock::new();
        // The vendor's name in EBX, EDX, ECX of leaf 0: "Auth", "enti", "cAMD".
        *AMD.get_or_init(|| std::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Auth"))
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Row blocks of one matrix inside `bytes`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    format: Format,
    /// Groups of 32 inputs per row.
    pub(super) groups: usize,
    /// Number of row blocks.
    pub(super) count: usize,
    offset: usize,
}

impl Blocks {
    fn new(format: Format, outputs: usize, inputs: usize, offset: usize) -> Blocks {
        let groups = padded_inputs(inputs) / GROUP;
        Blocks { format, groups, count: padded_outputs(outputs) / BLOCK_OUTPUTS, offset }
    }

    fn block_bytes(&self) -> usize {
        self.groups * self.format.group_bytes()
    }

    /// Row block `index`, to meet `rows` rows. Up to one tile, memory is the limit: fetch a fixed distance ahead.
    /// Beyond, the first tile fetches the next row block while the others compute.
    #[inline]
    fn block<'a>(&self, bytes: &'a [u8], index: usize, rows: usize) -> Block<'a> {
        let len = self.block_bytes();
        let ahead = match rows {
            0..=ALONE_ROWS if streams_alone() => 0,
            0..=TILE => AHEAD_BYTES,
            _ => len,
        };
        Block { format: self.format, bytes: &bytes[self.offset + index * len..][..len], ahead }
    }
}

/// A matrix.
#[derive(Debug)]
pub(super) struct MatrixWeights {
    bytes: Bytes,
    blocks: Blocks,
}

impl MatrixWeights {
    /// Checks and takes over `matrix`.
    pub(super) fn new(matrix: PackedMatrix) -> Result<MatrixWeights, KernelError> {
        let PackedMatrix { format, outputs, inputs, bytes } = matrix;
        let what = format!("matrix of {outputs} x {inputs} in {format}");
        check(&what, format, &bytes, format.matrix_bytes(outputs, inputs))?;
        Ok(MatrixWeights { bytes, blocks: Blocks::new(format, outputs, inputs, 0) })
    }

    pub(super) fn blocks(&self) -> &Blocks {
        &self.blocks
    }

    #[inline]
    pub(super) fn block(&self, index: usize, rows: usize) -> Block<'_> {
        self.blocks.block(&self.bytes, index, rows)
    }
}

/// One expert.
#[derive(Debug)]
pub(super) struct ExpertWeights {
    bytes: Bytes,
    gate_up: Blocks,
    /// Row blocks of gate; as many of up.
    inter_blocks: usize,
    down: Blocks,
}

impl ExpertWeights {
    /// Checks and takes over `expert`, whose index is for messages.
    pub(super) fn new(index: u16, expert: PackedExpert) -> Result<ExpertWeights, KernelError> {
        let PackedExpert { format, hidden, inter, bytes } = expert;
        let what = format!("expert {index} of {hidden} x {inter} in {format}");
        check(&what, format, &bytes, format.expert_bytes(hidden, inter))?;
        let padded = padded_inputs(inter);
        let gate_up = Blocks::new(format, 2 * padded, hidden, 0);
        let down = Blocks::new(format, hidden, inter, format.matrix_bytes(2 * padded, hidden));
        Ok(ExpertWeights { bytes, gate_up, inter_blocks: padded / BLOCK_OUTPUTS, down })
    }

    /// Groups of the intermediate values.
    pub(super) fn inter_groups(&self) -> usize {
        self.down.groups
    }

    /// Gate and up of 16 intermediate values: adjacent row blocks where quantized, two matrices in bf16.
    #[inline]
    pub(super) fn gate_up(&self, block: usize, rows: usize) -> (Block<'_>, Block<'_>) {
        let (gate, up) = if self.gate_up.format.is_quantized() {
            (2 * block, 2 * block + 1)
        } else {
            (block, self.inter_blocks + block)
        };
        (self.gate_up.block(&self.bytes, gate, rows), self.gate_up.block(&self.bytes, up, rows))
    }

    /// Row block `block` of down.
    #[inline]
    pub(super) fn down(&self, block: usize, rows: usize) -> Block<'_> {
        self.down.block(&self.bytes, block, rows)
    }
}

fn check(what: &str, format: Format, bytes: &Bytes, expected: usize) -> Result<(), KernelError> {
    if bytes.len() != expected {
        return Err(KernelError::Weights(format!(
            "{what} has {} bytes where {expected} belong: pack the model again",
            bytes.len()
        )));
    }
    let finite = |bytes: &[u8]| match format {
        Format::Bf16 => finite_floats::<0x7f80>(bytes),
        Format::Q8 | Format::Q4 => bytes
            .chunks_exact(format.group_bytes())
            .all(|group| finite_floats::<0x7c00>(&group[group.len() - 2 * BLOCK_OUTPUTS..])),
    };
    if bytes.passes_once(format as u8, finite) {
        return Ok(());
    }
    Err(KernelError::Weights(format!(
        "{what} holds a NaN or infinite {}: the checkpoint is damaged, fetch and pack it again",
        if format.is_quantized() { "scale" } else { "weight" }
    )))
}

/// Whether no 16-bit float has all bits of `EXPONENT` set.
fn finite_floats<const EXPONENT: u16>(bytes: &[u8]) -> bool {
    let mut finite = true;
    for v in bytes.as_chunks::<2>().0 {
        finite &= u16::from_le_bytes(*v) & EXPONENT != EXPONENT;
    }
    finite
}
