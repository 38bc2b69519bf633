//! Packed weights, quantized rows and results to and from the bf16 and f32 that libtorch multiplies.
//!
//! For many rows the cheapest way through libtorch is to dequantize an expert once per call and multiply in bf16, so
//! turning packed bytes into rows of bf16 must cost little beside the product: 0.3 ns per weight is a tenth of a
//! product with 16 rows. The loops below are plain arithmetic on arrays, compiled once per instruction set
//! (`per_isa`), so the compiler makes vector code of them and there is one text to read. Price: weights are rounded
//! to bf16 (8 bits), so this is for the backend that is equal within tolerance only.
#![allow(unsafe_code, reason = "functions compiled for instruction sets, called after detection")]

use half::bf16;

use crate::format::{BLOCK_OUTPUTS, Format, GROUP};

/// Bytes of a group's scales.
const SCALES: usize = 2 * BLOCK_OUTPUTS;

/// Defines `$name`, which runs `$body` compiled for the best instruction set the machine has.
macro_rules! per_isa {
    ($(#[$doc:meta])* $name:ident = $body:ident ( $($arg:ident : $type:ty),* ) $(-> $result:ty)?) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $type),*) $(-> $result)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                fn avx512($($arg: $type),*) $(-> $result)? {
                    $body($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $type),*) $(-> $result)? {
                    $body($($arg),*)
                }
                if is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                {
                    // SAFETY: the machine has the features.
                    return unsafe { avx512($($arg),*) };
                }
                if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                    // SAFETY: the machine has the features.
                    return unsafe { avx2($($arg),*) };
                }
            }
            $body($($arg),*)
        }
    };
}

per_isa! {
    /// One row block of a q4 or q8 matrix (`bytes`: its groups) to 16 rows of bf16, `[16, inputs]` row-major.
    widen_block = widen_block_body(format: Format, bytes: &[u8], out: &mut [u16])
}

per_isa! {
    /// One quantized row, `values` in groups of 32 with a scale each, to bf16.
    widen_row = widen_row_body(values: &[i8], scales: &[f32], out: &mut [u16])
}

per_isa! {
    /// f32 to bf16, to nearest, ties to even. NaN may become infinity; rows hold none.
    narrow = narrow_body(values: &[f32], out: &mut [u16])
}

per_isa! {
    /// Adds `y * weight * scale`, rounded to integers, to `sums` (bf16 `y`), and returns the largest magnitude of an
    /// addend as f32 bits.
    add_rounded = add_rounded_body(y: &[u16], weight: f32, scale: f32, sums: &mut [i32]) -> u32
}

per_isa! {
    /// bf16 to f32.
    widen = widen_body(values: &[u16], out: &mut [f32])
}

/// bf16 of a finite value, to nearest, ties to even.
#[inline(always)]
fn round(v: f32) -> u16 {
    let bits = v.to_bits();
    (bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

/// A finite f16 as f32: its bits moved into place, then scaled, which is exact for subnormal ones too.
#[inline(always)]
fn scale_of(bytes: &[u8; SCALES], output: usize) -> f32 {
    let bits = u32::from(u16::from_le_bytes([bytes[2 * output], bytes[2 * output + 1]]));
    let magnitude = f32::from_bits((bits & 0x7fff) << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(magnitude.to_bits() | (bits & 0x8000) << 16)
}

#[inline(always)]
fn widen_block_body(format: Format, bytes: &[u8], out: &mut [u16]) {
    match format {
        Format::Q4 => widen_groups::<256>(bytes, out, widen_q4),
        Format::Q8 => widen_groups::<512>(bytes, out, widen_q8),
        Format::Bf16 => {}
    }
}

/// `LINES`: bytes of a group before its scales.
#[inline(always)]
fn widen_groups<const LINES: usize>(
    bytes: &[u8],
    out: &mut [u16],
    one: impl Fn(&[u8; LINES], usize, f32, &mut [u16; GROUP]),
) {
    let inputs = out.len() / BLOCK_OUTPUTS;
    for (g, group) in bytes.chunks_exact(LINES + SCALES).enumerate() {
        let (Some(lines), Some(scales)) = (group.first_chunk::<LINES>(), group.last_chunk::<SCALES>()) else {
            continue;
        };
        for output in 0..BLOCK_OUTPUTS {
            let row = &mut out[output * inputs + g * GROUP..];
            if let Some(row) = row.first_chunk_mut() {
                one(lines, output, scale_of(scales, output), row);
            }
        }
    }
}

/// The 32 inputs of one output: four bytes in each of four lines, inputs 0..16 in the low nibbles.
#[inline(always)]
fn widen_q4(lines: &[u8; 256], output: usize, scale: f32, out: &mut [u16; GROUP]) {
    let mut nibbles = [0u8; GROUP / 2];
    for line in 0..4 {
        nibbles[line * 4..line * 4 + 4].copy_from_slice(&lines[line * 64 + output * 4..][..4]);
    }
    for i in 0..GROUP / 2 {
        out[i] = round((i32::from(nibbles[i] & 15) - 8) as f32 * scale);
    }
    for i in 0..GROUP / 2 {
        out[GROUP / 2 + i] = round((i32::from(nibbles[i] >> 4) - 8) as f32 * scale);
    }
}

/// The 32 inputs of one output: four bytes in each of eight lines.
#[inline(always)]
fn widen_q8(lines: &[u8; 512], output: usize, scale: f32, out: &mut [u16; GROUP]) {
    let mut values = [0u8; GROUP];
    for line in 0..8 {
        values[line * 4..line * 4 + 4].copy_from_slice(&lines[line * 64 + output * 4..][..4]);
    }
    for i in 0..GROUP {
        out[i] = round(f32::from(values[i] as i8) * scale);
    }
}

#[inline(always)]
fn widen_row_body(values: &[i8], scales: &[f32], out: &mut [u16]) {
    for ((group, scale), out) in
        values.as_chunks::<GROUP>().0.iter().zip(scales).zip(out.as_chunks_mut::<GROUP>().0)
    {
        for i in 0..GROUP {
            out[i] = round(f32::from(group[i]) * scale);
        }
    }
}

#[inline(always)]
fn narrow_body(values: &[f32], out: &mut [u16]) {
    for (value, out) in values.iter().zip(out) {
        *out = round(*value);
    }
}

#[inline(always)]
fn widen_body(values: &[u16], out: &mut [f32]) {
    for (value, out) in values.iter().zip(out) {
        *out = f32::from_bits(u32::from(*value) << 16);
    }
}

#[inline(always)]
fn add_rounded_body(y: &[u16], weight: f32, scale: f32, sums: &mut [i32]) -> u32 {
    let mut peak = 0;
    for (sum, y) in sums.iter_mut().zip(y) {
        let v = f32::from_bits(u32::from(*y) << 16) * weight * scale;
        peak = peak.max(v.to_bits() & 0x7fff_ffff);
        *sum = sum.wrapping_add(v.round_ties_even() as i32);
    }
    peak
}

/// One bf16 as f32, for the wide sums.
pub(super) fn single(y: u16) -> f32 {
    bf16::from_bits(y).to_f32()
}
