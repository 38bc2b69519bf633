//! Weight formats, and how many bytes anything in them takes.
//!
//! One layout serves every instruction set, on disk, on the wire and in memory, so packing happens once and
//! loading is a memory map. A quantized matrix is a sequence of *row blocks* of 16 outputs; a row block is a
//! sequence of *groups* of 32 inputs; a group is its quantized lines followed by 16 f16 scales:
//!
//! * q4: 4 lines of 64 bytes + 32 bytes of scales = 288. Line j holds, for output r (bytes 4r..4r+4), inputs
//!   4j..4j+4 of the group in the low nibbles and 4(j+4).. in the high ones, stored as value + 8: the nibble
//!   pairing of GGUF Q4_0, so importing that is a permutation of bytes.
//! * q8: 8 lines of 64 bytes + 32 bytes of scales = 544. Line j holds inputs 4j..4j+4 of each output, as int8.
//!
//! A bf16 matrix is row-major. Dimensions are padded with zeros to whole blocks, which is exact.

use serde::{Deserialize, Serialize};

/// Inputs that share one scale.
pub const GROUP: usize = 32;
/// Outputs of one row block: the width of a 512-bit register of i32 accumulators.
pub const BLOCK_OUTPUTS: usize = 16;
/// Inputs of the down product that are added in f32 before the sum is rounded to the combine step.
pub const COMBINE_BLOCK: usize = 128;

/// How the weights of large matrices are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[repr(u8)]
pub enum Format {
    /// bfloat16, multiplied as f32.
    Bf16 = 0,
    /// int8 in groups of 32 with an f16 scale: 8.5 bits per weight, the information of GGUF Q8_0.
    Q8 = 1,
    /// 4-bit in groups of 32 with an f16 scale: 4.5 bits per weight, the information of GGUF Q4_0.
    Q4 = 2,
}

impl Format {
    /// All formats, widest first.
    pub const ALL: [Format; 3] = [Format::Bf16, Format::Q8, Format::Q4];

    /// The name used in flags, paths and manifests.
    pub fn name(self) -> &'static str {
        match self {
            Format::Bf16 => "bf16",
            Format::Q8 => "q8",
            Format::Q4 => "q4",
        }
    }

    /// The inverse of `self as u8`, for the wire.
    pub fn from_code(code: u8) -> Option<Format> {
        Format::ALL.into_iter().find(|format| *format as u8 == code)
    }

    /// Whether activations are quantized to int8 groups before they meet these weights.
    pub fn is_quantized(self) -> bool {
        self != Format::Bf16
    }

    /// Bytes of one group of one row block (quantized formats), lines and scales.
    pub const fn group_bytes(self) -> usize {
        match self {
            Format::Bf16 => 2 * GROUP * BLOCK_OUTPUTS,
            Format::Q8 => 544,
            Format::Q4 => 288,
        }
    }

    /// Bytes of a packed matrix of `outputs` x `inputs`, padding included.
    pub fn matrix_bytes(self, outputs: usize, inputs: usize) -> usize {
        padded_outputs(outputs) / BLOCK_OUTPUTS * (padded_inputs(inputs) / GROUP) * self.group_bytes()
    }

    /// Bytes of a packed expert: gate and up (`inter` x `hidden` each), then down (`hidden` x `inter`).
    pub fn expert_bytes(self, hidden: usize, inter: usize) -> usize {
        let inter = padded_inputs(inter);
        self.matrix_bytes(2 * inter, hidden) + self.matrix_bytes(hidden, inter)
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Format, String> {
        Format::ALL
            .into_iter()
            .find(|format| format.name() == text)
            .ok_or_else(|| format!("unknown weight format '{text}': use bf16, q8 or q4"))
    }
}

/// Blocks of `COMBINE_BLOCK` intermediate values of an expert of width `inter`, in which slices of experts are
/// counted. The last may be shorter.
pub const fn blocks(inter: usize) -> usize {
    inter.div_ceil(COMBINE_BLOCK)
}

/// Intermediate values in blocks `from..to` of an expert of width `inter`; `None` where it has no such blocks.
pub fn slice_width(inter: usize, (from, to): (u16, u16)) -> Option<usize> {
    let (from, to) = (usize::from(from), usize::from(to));
    (from < to && to <= blocks(inter)).then(|| inter.min(to * COMBINE_BLOCK) - from * COMBINE_BLOCK)
}

/// `inputs` rounded up to whole groups.
pub const fn padded_inputs(inputs: usize) -> usize {
    inputs.next_multiple_of(GROUP)
}

/// `outputs` rounded up to whole row blocks.
pub const fn padded_outputs(outputs: usize) -> usize {
    outputs.next_multiple_of(BLOCK_OUTPUTS)
}
