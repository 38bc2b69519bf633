//! Which instruction set runs, and the table of functions it fills.
//!
//! One file per instruction set (`scalar`, `neon`, `avx2`, `avx512`, `amx`) provides the products of one row block of
//! 16 outputs with any number of rows; everything above is written once against this table. Another instruction
//! set is another file and another line in `Isa`. Chosen once, at start; forcing one that the machine lacks is
//! an error with the list of those it has. AMX takes calls of many rows only and leaves the others to AVX-512.
#![allow(unsafe_code, reason = "calls through the table, made safe by detection when the table is chosen")]

use std::env::VarError;
use std::str::FromStr;
#[cfg(target_arch = "x86_64")]
use std::sync::OnceLock;

use super::block::{Added, Block, GateUp, Outputs, Terms};
#[cfg(target_arch = "aarch64")]
use super::neon;
use super::tiles::{GroupSlots, View};
use super::{ISA_VARIABLE, elementwise, scalar};
#[cfg(target_arch = "x86_64")]
use super::{amx, amx_tiles, avx2, avx2_bf16, avx512, avx512_bf16, crossover};
use crate::format::Format;

/// An instruction set with its own kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable code: the definition itself. Slow.
    Scalar,
    /// NEON with dot products (aarch64: every core since Cortex-A55/A75/A76, Apple M1 and Graviton 2).
    Neon,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// The same with AMX int8 tiles, which Linux must have granted to this process.
    Amx,
}

impl Isa {
    /// All, slowest first.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Neon, Isa::Avx2, Isa::Avx512, Isa::Amx];

    /// The name that `MOEMESH_ISA` takes and reports print.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Neon => "neon",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// Whether this machine has it. The first question about AMX asks the system for it, for the whole process.
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
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Isa::Avx512.available() && amx_tiles::permitted(),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => {
                std::arch::is_aarch64_feature_detected!("neon")
                    && std::arch::is_aarch64_feature_detected!("dotprod")
            }
            #[allow(unreachable_patterns, reason = "which are left depends on the processor")]
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

    /// The one that `MOEMESH_ISA` names, else the fastest this machine has. An unknown or lacking one is refused with
    /// the choices.
    pub fn chosen() -> Result<Isa, String> {
        match std::env::var(ISA_VARIABLE) {
            Ok(name) => name.parse::<Isa>()?.checked(),
            Err(VarError::NotPresent) => Ok(Isa::best()),
            Err(VarError::NotUnicode(name)) => name.to_string_lossy().parse::<Isa>()?.checked(),
        }
    }

    /// This one if the machine has it, else a message with the choices.
    pub fn checked(self) -> Result<Isa, String> {
        if self.available() {
            return Ok(self);
        }
        let here: Vec<&str> = Isa::available_here().map(Isa::name).collect();
        Err(format!(
            "this machine has no {}: leave MOEMESH_ISA unset or choose one of {}",
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
            .ok_or_else(|| format!("unknown instruction set '{text}': MOEMESH_ISA takes {known}"))
    }
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
    few: &'static Functions,
    many: &'static Functions,
    /// Rows from which `many` computes, per format.
    many_from: [usize; 3],
}

static SCALAR: Functions = Functions {
    product: [elementwise::product_bf16, scalar::product_q8, scalar::product_q4],
    combine: [elementwise::combine_bf16, scalar::combine_q8, scalar::combine_q4],
    activate: elementwise::scalar::activate,
};

#[cfg(target_arch = "aarch64")]
static NEON: Functions = Functions {
    product: [elementwise::product_bf16, neon::product::<544>, neon::product::<288>],
    combine: [elementwise::combine_bf16, neon::combine::<544>, neon::combine::<288>],
    activate: elementwise::neon::activate,
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

/// For many rows only.
#[cfg(target_arch = "x86_64")]
static AMX: Functions = Functions {
    product: [avx512_bf16::product, amx::product::<544>, amx::product::<288>],
    combine: [avx512_bf16::combine, amx::combine::<544>, amx::combine::<288>],
    activate: elementwise::avx512::activate,
};

/// Rows from which AMX is faster than AVX-512 here, per format; AMX must be available.
#[cfg(target_arch = "x86_64")]
fn amx_from() -> [usize; 3] {
    static FROM: OnceLock<[usize; 3]> = OnceLock::new();
    *FROM.get_or_init(|| {
        let mut from = [usize::MAX; 3];
        for format in Format::ALL.into_iter().filter(|format| format.is_quantized()) {
            let (few, many) = (AVX512.product[format as usize], AMX.product[format as usize]);
            // SAFETY: both are available, says the contract.
            from[format as usize] = unsafe { crossover::crossover(format, few, many) };
        }
        from
    })
}

impl Table {
    /// The table of `isa`, which must be available (else the message of `Isa::checked`).
    pub(super) fn new(isa: Isa) -> Result<Table, String> {
        let all = |functions| Table { isa, few: functions, many: functions, many_from: [usize::MAX; 3] };
        Ok(match isa.checked()? {
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => all(&NEON),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => all(&AVX2),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => all(&AVX512),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => Table { isa, few: &AVX512, many: &AMX, many_from: amx_from() },
            _ => all(&SCALAR),
        })
    }

    /// AMX for calls of `rows` rows and more, wherever it would pay. The caller has made sure that its instructions
    /// run: by a machine that has them or by emulating them.
    #[cfg(all(test, target_arch = "x86_64", target_os = "linux"))]
    pub(super) fn amx_from_rows(rows: usize) -> Table {
        assert!(Isa::Avx512.available());
        Table { isa: Isa::Amx, few: &AVX512, many: &AMX, many_from: [rows; 3] }
    }

    /// The functions for a call of `rows` rows.
    #[inline]
    fn functions(self, format: Format, rows: usize) -> &'static Functions {
        if rows < self.many_from[format as usize] { self.few } else { self.many }
    }

    pub(super) fn isa(self) -> Isa {
        self.isa
    }

    /// `out[row][n] = sum over all inputs`, for the 16 outputs of `block` and every row of `x`.
    #[inline]
    pub(super) fn product(self, block: Block<'_>, x: View<'_>, out: &mut [Outputs<f32>]) {
        // SAFETY: `Table::new` checked that the machine has the features of these functions.
        unsafe { self.functions(block.format, x.rows).product[block.format as usize](block, x, out) }
    }

    /// Adds the rounded addends of every block of 128 inputs to `added`.
    #[inline]
    pub(super) fn combine(self, block: Block<'_>, x: View<'_>, terms: Terms<'_>, added: Added<'_>) {
        // SAFETY: as in `product`.
        unsafe { self.functions(block.format, x.rows).combine[block.format as usize](block, x, terms, added) }
    }

    /// SwiGLU of one group of every row, written (quantized or f32) to `slots`.
    #[inline]
    pub(super) fn activate(self, products: GateUp<'_>, slots: &GroupSlots) {
        // SAFETY: as in `product`.
        unsafe { (self.few.activate)(products, slots) }
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table({})", self.isa.name())
    }
}
