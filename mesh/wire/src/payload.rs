//! How rows lie in a payload: the one place of the wire's layout arithmetic.
//!
//! A row of activations travels in the very bytes a kernel reads: int8 values in groups of 32 followed by one f32
//! scale per group, or plain f32 values, padded to whole 64-byte lines. The model crate states the same formula
//! for its kernels; the two crates never meet, so a cross-crate test holds them together. The price is up to 63
//! bytes of padding per row. Refuses nothing by itself: callers pass sizes that they have checked against the
//! limits of `frame`, which keep every product here far below `usize::MAX` on 64-bit machines and are checked
//! arithmetic anyway.

/// Values that share one scale.
pub const GROUP: usize = 32;

/// Rows start at multiples of this: a cache line, and the widest vector register.
pub const ROW_ALIGN: usize = 64;

/// How the rows of a call are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum RowFormat {
    /// f32 values: for bf16 weights.
    F32 = 0,
    /// int8 values in groups of 32 with an f32 scale each: for q4 and q8 weights.
    Int8 = 1,
}

impl RowFormat {
    /// The format with this code on the wire.
    pub fn from_code(code: u8) -> Option<RowFormat> {
        match code {
            0 => Some(RowFormat::F32),
            1 => Some(RowFormat::Int8),
            _ => None,
        }
    }
}

/// `hidden` rounded up to whole groups.
pub fn padded(hidden: usize) -> usize {
    hidden.next_multiple_of(GROUP)
}

/// Bytes of one row of a call: int8 values and scales, or f32 values, rounded up to `ROW_ALIGN`.
pub fn row_bytes(format: RowFormat, hidden: usize) -> usize {
    let padded = padded(hidden);
    let bytes = match format {
        RowFormat::F32 => padded * 4,
        RowFormat::Int8 => padded + padded / GROUP * 4,
    };
    bytes.next_multiple_of(ROW_ALIGN)
}

/// How one row of a reply is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum SumWidth {
    /// i16 sums: every value of the row fits.
    I16 = 0,
    /// i32 sums.
    I32 = 1,
    /// A sum of the row overflows i32. It has no bytes in the payload; the router computes the row itself.
    Overflow = 2,
}

impl SumWidth {
    /// The width with this code on the wire.
    pub fn from_code(code: u8) -> Option<SumWidth> {
        match code {
            0 => Some(SumWidth::I16),
            1 => Some(SumWidth::I32),
            2 => Some(SumWidth::Overflow),
            _ => None,
        }
    }

    /// The narrowest width that holds a row of sums.
    pub fn of(sums: &[i32]) -> SumWidth {
        let fits = sums.iter().all(|sum| i16::try_from(*sum).is_ok());
        if fits { SumWidth::I16 } else { SumWidth::I32 }
    }

    /// Bytes of one reply row of `hidden` sums, rounded up to `ROW_ALIGN`.
    pub fn row_bytes(self, hidden: usize) -> usize {
        let bytes = match self {
            SumWidth::I16 => hidden * 2,
            SumWidth::I32 => hidden * 4,
            SumWidth::Overflow => 0,
        };
        bytes.next_multiple_of(ROW_ALIGN)
    }
}
