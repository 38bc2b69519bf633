//! Which instruction set runs, and the table of functions it fills.
//!
//! One file per instruction set (`scalar`, `avx2`, `avx512`) provides the products of one row block of 16
//! outputs with any number of rows; everything above is written once against this table. Another instruction
//! set is another file and another line in `Isa`. Chosen once, at start; forcing one that the machine lacks is
//! an error with the list of those it has.
#![allow(unsafe_code, reason = "calls through the table, made safe by detection when the table is chosen")]

use std::str::FromStr;

use super::definition::LANES;
use super::tiles::{GroupSlots, View};
#[cfg(target_arch = "x86_64")]
use super::{avx2, avx2_bf16, avx512, avx512_bf16};
use super::{elementwise, scalar};
use crate::format::Format;

/// An instruction set with its own kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable code: the definition itself. Slow.
    Scalar,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
}

impl Isa {
    /// All, slowest first.
    pub const ALL: [Isa; 3] = [Isa::Scalar, Isa::Avx2, Isa::Avx512];

    /// The name that `MOEMESH_ISA` takes and reports print.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
        }
    }

    /// Whether this machine has it.
    pub fn available(self) -> bool {
        match self {
            Isa::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => {
                Isa::Avx2.available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            _ => false,
        }
    }

    /// Those this machine has, slowest first.
    pub fn available_here() -> impl Iterator<Item = Isa> {
        Isa::ALL.into_iter().filter(|isa| isa.available())
    }

    /// The fastest this machine has.
    pub fn best() -> Isa {
        Isa::available_here().last().unwrap_or(Isa::Scalar)
    }

    /// This one if the machine has it, else a message with the choices.
    pub fn checked(self) -> Result<Isa, String> {
        if self.available() {
            return Ok(self);
        }
        let here: Vec<&str> = Isa::available_here().map(Isa::name).collect();
        Err(format!(
            "this machine has no {}: unset MOEMESH_ISA or set it to one of {}",
            self.name(),
            here.join(", ")
        ))
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(text: &str) -> Result<Isa, String> {
        let known = Isa::ALL.map(Isa::name).join(", ");
        Isa::ALL
            .into_iter()
            .find(|isa| isa.name() == text)
            .ok_or_else(|| format!("unknown instruction set '{text}' in MOEMESH_ISA: use one of {known}"))
    }
}

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

type Product = unsafe fn(Block<'_>, View<'_>, &mut [Outputs<f32>]);
type Combine = unsafe fn(Block<'_>, View<'_>, Terms<'_>, Added<'_>);
type Activate = unsafe fn(GateUp<'_>, &GroupSlots);

/// The functions of one instruction set, per format in the order of `Format as usize`.
pub(super) struct Functions {
    pub(super) product: [Product; 3],
    pub(super) combine: [Combine; 3],
    pub(super) activate: Activate,
}

/// A chosen instruction set.
#[derive(Clone, Copy)]
pub(super) struct Table {
    isa: Isa,
    functions: &'static Functions,
}

static SCALAR: Functions = Functions {
    product: [elementwise::product_bf16, scalar::product_q8, scalar::product_q4],
    combine: [elementwise::combine_bf16, scalar::combine_q8, scalar::combine_q4],
    activate: elementwise::scalar::activate,
};

#[cfg(target_arch = "x86_64")]
static AVX2: Functions = Functions {
    product: [avx2_bf16::product, avx2::product::<544>, avx2::product::<288>],
    combine: [avx2_bf16::combine, avx2::combine::<544>, avx2::combine::<288>],
    activate: elementwise::avx2::activate,
};

#[cfg(target_arch = "x86_64")]
static AVX512: Functions = Functions {
    product: [avx512_bf16::product, avx512::product::<544>, avx512::product::<288>],
    combine: [avx512_bf16::combine, avx512::combine::<544>, avx512::combine::<288>],
    activate: elementwise::avx512::activate,
};

impl Table {
    /// The table of `isa`, which must be available (else the message of `Isa::checked`).
    pub(super) fn new(isa: Isa) -> Result<Table, String> {
        let functions = match isa.checked()? {
            Isa::Scalar => &SCALAR,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &AVX2,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => &AVX512,
            #[cfg(not(target_arch = "x86_64"))]
            _ => &SCALAR,
        };
        Ok(Table { isa, functions })
    }

    pub(super) fn isa(self) -> Isa {
        self.isa
    }

    /// `out[row][n] = sum over all inputs`, for the 16 outputs of `block` and every row of `x`.
    #[inline]
    pub(super) fn product(self, block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
        // SAFETY: `Table::new` checked that the machine has the features of these functions.
        unsafe { self.functions.product[block.format as usize](block, x, out) }
    }

    /// Adds the rounded addends of every block of 128 inputs to `added`.
    #[inline]
    pub(super) fn combine(self, block: Block<'_>, x: View<'_>, terms: Terms<'_>, added: Added<'_>) {
        // SAFETY: as in `product`.
        unsafe { self.functions.combine[block.format as usize](block, x, terms, added) }
    }

    /// SwiGLU of one group of every row, written (quantized or f32) to `slots`.
    #[inline]
    pub(super) fn activate(self, products: GateUp<'_>, slots: &GroupSlots) {
        // SAFETY: as in `product`.
        unsafe { (self.functions.activate)(products, slots) }
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table({})", self.isa.name())
    }
}
