//! Dot products of several rows with several matrix rows at once: the routing gate.
//!
//! Problem: row by row, a prompt reads the whole f32 matrix once per token. Idea: a tile of matrix rows meets a tile of
//! rows in registers; every pair keeps its own 16 lanes and tree, so the bits are those of `definition::dot16`.
#![allow(unsafe_code, reason = "intrinsics behind `Lanes`; entered through tables chosen after detection")]

use super::definition::{LANES, reduce};
#[cfg(target_arch = "x86_64")]
use super::lanes::{Avx2, Avx512};
use super::lanes::{Lanes, Portable, each};

/// What is multiplied, and where results go: that of matrix row n and row r to `r * row_step + n * output_step`.
#[derive(Clone, Copy, Debug)]
pub struct Dots<'a> {
    /// `[outputs, inputs]`
    pub weights: &'a [f32],
    /// `[rows, inputs]`
    pub x: &'a [f32],
    /// Inputs.
    pub inputs: usize,
    /// Distance between the results of two rows.
    pub row_step: usize,
    /// Distance between the results of two matrix rows.
    pub output_step: usize,
}

pub(super) type DotsFunction = unsafe fn(Dots<'_>, &mut [f32]);

/// The tile, as registers allow: `W` matrix rows, `R` rows, `P` registers for 16 lanes.
#[inline(always)]
unsafe fn dots<L: Lanes, const W: usize, const R: usize, const P: usize>(task: Dots<'_>, out: &mut [f32]) {
    let (outputs, rows) = (task.weights.len() / task.inputs, task.x.len() / task.inputs);
    let mut row = 0;
    while row < rows {
        let height = if row + R <= rows { R } else { 1 };
        let mut output = 0;
        while output < outputs {
            // One row alone waits for memory, which is fastest read in order, and without prefetch instructions: 50 us
            // for a gate of 1 MB, 70 with them (Zen 4).
            let width = if rows > 1 && output + W <= outputs { W } else { 1 };
            // SAFETY: the caller's.
            unsafe {
                match (width == W, height == R) {
                    (true, true) => tile::<L, W, R, P>(task, (output, row), out),
                    (true, false) => tile::<L, W, 1, P>(task, (output, row), out),
                    (false, true) => tile::<L, 1, R, P>(task, (output, row), out),
                    (false, false) => tile::<L, 1, 1, P>(task, (output, row), out),
                }
            }
            output += width;
        }
        row += height;
    }
}

#[inline(always)]
unsafe fn tile<L: Lanes, const W: usize, const R: usize, const P: usize>(
    task: Dots<'_>,
    (output, row): (usize, usize),
    out: &mut [f32],
) {
    let Dots { inputs, .. } = task;
    let weights = &task.weights[output * inputs..(output + W) * inputs];
    let x = &task.x[row * inputs..(row + R) * inputs];
    let whole = inputs / LANES * LANES;
    // As in the definition the rest, none included, is filled up with zeros and multiplied.
    let (mut weight_rest, mut x_rest) = ([[0.0f32; LANES]; W], [[0.0f32; LANES]; R]);
    for w in 0..W {
        weight_rest[w][..inputs - whole].copy_from_slice(&weights[w * inputs + whole..(w + 1) * inputs]);
    }
    for r in 0..R {
        x_rest[r][..inputs - whole].copy_from_slice(&x[r * inputs + whole..(r + 1) * inputs]);
    }
    // SAFETY: the caller's; every register lies within its row.
    unsafe {
        let mut acc = [[[L::zero(); P]; R]; W];
        for at in (0..whole).step_by(LANES) {
            let (weights, x) = (weights.as_ptr().add(at), x.as_ptr().add(at));
            step::<L, W, R, P>((weights, inputs), (x, inputs), &mut acc);
        }
        step::<L, W, R, P>((weight_rest.as_ptr().cast(), LANES), (x_rest.as_ptr().cast(), LANES), &mut acc);
        for w in 0..W {
            for r in 0..R {
                let mut lanes = [0.0; LANES];
                each!(P, p, {
                    L::store(lanes.as_mut_ptr().add(p * L::N), acc[w][r][p]);
                });
                out[(row + r) * task.row_step + (output + w) * task.output_step] = reduce(lanes);
            }
        }
    }
}

/// Sixteen inputs of all pairs; rows lie the given numbers of values apart.
#[inline(always)]
unsafe fn step<L: Lanes, const W: usize, const R: usize, const P: usize>(
    (weights, weight_stride): (*const f32, usize),
    (x, x_stride): (*const f32, usize),
    acc: &mut [[[L::V; P]; R]; W],
) {
    // SAFETY: the caller's.
    unsafe {
        each!(P, p, {
            let mut row = [L::zero(); R];
            each!(R, r, {
                row[r] = L::load(x.add(r * x_stride + p * L::N));
            });
            each!(W, w, {
                let weight = L::load(weights.add(w * weight_stride + p * L::N));
                each!(R, r, {
                    acc[w][r][p] = L::fma(weight, row[r], acc[w][r][p]);
                });
            });
        });
    }
}

/// With plain code.
pub(super) unsafe fn portable(task: Dots<'_>, out: &mut [f32]) {
    // SAFETY: plain code.
    unsafe { dots::<Portable, 2, 2, 2>(task, out) }
}

/// With AVX2.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn avx2(task: Dots<'_>, out: &mut [f32]) {
    // SAFETY: compiled for these registers; the caller detected them.
    unsafe { dots::<Avx2, 2, 2, 2>(task, out) }
}

/// With AVX-512.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(super) unsafe fn avx512(task: Dots<'_>, out: &mut [f32]) {
    // SAFETY: compiled for these registers; the caller detected them.
    unsafe { dots::<Avx512, 4, 4, 1>(task, out) }
}
