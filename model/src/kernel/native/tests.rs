//! The instruction sets this machine has, and AMX emulated, against a second, naive writing of the definition over
//! logical weights: random shapes, row counts on both sides of every tile and segment, wild values, thread counts,
//! batchings and splits of the experts. Here are that writing and random weights and rows; the tests are below.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx_emulator;
mod experts;
mod products;
mod refusals;
mod rows;
mod slices;

use std::sync::Arc;

use half::{bf16, f16};

use super::definition::{self, LANES};
use super::*;
use crate::activations::{Activations, row_bytes};
use crate::format::{COMBINE_BLOCK, Format, GROUP, padded_inputs};
use crate::kernel::{Assignment, PartialSums};
use crate::region::Buffer;
use std::ops::Range;

/// Row counts around tiles (16), vector tails and segments (256).
const ODD_ROWS: [usize; 4] = [65, 127, 256, 512];

pub(crate) struct Rng(u64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        ((self.bits() >> 32) as usize * n) >> 32
    }

    /// Uniform in -1..1.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }
}

/// Weights before packing: integers and scales, or bf16 values.
pub(crate) struct Logical {
    format: Format,
    outputs: usize,
    inputs: usize,
    values: Vec<i8>,
    scales: Vec<f16>,
    floats: Vec<bf16>,
}

impl Logical {
    pub(crate) fn random(rng: &mut Rng, format: Format, shape: (usize, usize), wild: bool) -> Logical {
        let (outputs, inputs) = shape;
        let groups = inputs.div_ceil(GROUP);
        let half = if format == Format::Q8 { 128 } else { 8 };
        let values = (0..outputs * inputs).map(|_| {
            // Wild: a third of the weights at the extremes.
            let extreme = wild && rng.below(3) == 0;
            let v = if extreme { rng.below(2) * (2 * half - 1) } else { rng.below(2 * half) };
            (v as i32 - half as i32) as i8
        });
        let values = values.collect();
        let scale = |rng: &mut Rng| loop {
            let s = if wild { f16::from_bits(rng.bits() as u16) } else { f16::from_f32(rng.unit() * 0.02) };
            if s.is_finite() {
                return s;
            }
        };
        let scales = (0..outputs * groups).map(|_| scale(rng)).collect();
        let floats =
            (0..outputs * inputs).map(|_| bf16::from_f32(rng.unit() * if wild { 1e18 } else { 0.2 }));
        Logical { format, outputs, inputs, values, scales, floats: floats.collect() }
    }

    /// Weight of output `n`, input `i`, as a real number.
    pub(crate) fn weight(&self, n: usize, i: usize) -> f32 {
        if self.format == Format::Bf16 {
            return self.floats[n * self.inputs + i].to_f32();
        }
        let scale = self.scales[n * self.inputs.div_ceil(GROUP) + i / GROUP];
        f32::from(self.values[n * self.inputs + i]) * scale.to_f32()
    }

    /// Writes row block `block` (outputs past the end are zero) at `to`.
    fn pack_block(&self, block: usize, to: &mut [u8]) {
        let groups = self.inputs.div_ceil(GROUP);
        let size = self.format.group_bytes();
        for r in 0..LANES {
            let n = block * LANES + r;
            if n >= self.outputs {
                if self.format == Format::Q4 {
                    (0..groups * GROUP).for_each(|i| put_q4(&mut to[i / GROUP * size..], r, i % GROUP, 0));
                }
                continue;
            }
            for i in 0..groups * GROUP {
                let value = if i < self.inputs { self.values[n * self.inputs + i] } else { 0 };
                let group = &mut to[i / GROUP * size..];
                match self.format {
                    Format::Q4 => put_q4(group, r, i % GROUP, value),
                    Format::Q8 => group[i % GROUP / 4 * 64 + r * 4 + i % 4] = value as u8,
                    Format::Bf16 => {
                        let w = if i < self.inputs { self.floats[n * self.inputs + i] } else { bf16::ZERO };
                        to[(r * groups * GROUP + i) * 2..][..2].copy_from_slice(&w.to_le_bytes());
                    }
                }
            }
            for g in 0..if self.format.is_quantized() { groups } else { 0 } {
                let at = (g + 1) * size - 32 + 2 * r;
                to[at..at + 2].copy_from_slice(&self.scales[n * groups + g].to_le_bytes());
            }
        }
    }

    fn pack_into(&self, to: &mut [u8]) {
        let size = self.inputs.div_ceil(GROUP) * self.format.group_bytes();
        to.chunks_exact_mut(size).enumerate().for_each(|(block, to)| self.pack_block(block, to));
    }

    pub(crate) fn packed(&self) -> PackedMatrix {
        let mut buffer = Buffer::zeroed(self.format.matrix_bytes(self.outputs, self.inputs));
        self.pack_into(&mut buffer);
        PackedMatrix { format: self.format, outputs: self.outputs, inputs: self.inputs, bytes: buffer.into() }
    }
}

fn put_q4(group: &mut [u8], r: usize, i: usize, value: i8) {
    group[i / 4 % 4 * 64 + r * 4 + i % 4] |= ((value + 8) as u8) << (i / 16 * 4);
}

pub(crate) struct LogicalExpert {
    pub(crate) gate: Logical,
    pub(crate) up: Logical,
    pub(crate) down: Logical,
}

impl LogicalExpert {
    pub(crate) fn random(rng: &mut Rng, format: Format, shape: (usize, usize), wild: bool) -> LogicalExpert {
        let (hidden, inter) = shape;
        LogicalExpert {
            gate: Logical::random(rng, format, (inter, hidden), wild),
            up: Logical::random(rng, format, (inter, hidden), wild),
            down: Logical::random(rng, format, (hidden, inter), wild),
        }
    }

    pub(crate) fn packed(&self) -> PackedExpert {
        let (format, hidden, inter) = (self.gate.format, self.gate.inputs, self.gate.outputs);
        let mut buffer = Buffer::zeroed(format.expert_bytes(hidden, inter));
        let padded = padded_inputs(inter);
        let (first, down) = buffer.split_at_mut(format.matrix_bytes(2 * padded, hidden));
        let block = padded_inputs(hidden) / GROUP * format.group_bytes();
        for (index, to) in first.chunks_exact_mut(block).enumerate() {
            let (matrix, source) = if format.is_quantized() {
                ([&self.gate, &self.up][index % 2], index / 2)
            } else {
                ([&self.gate, &self.up][index / (padded / LANES)], index % (padded / LANES))
            };
            matrix.pack_block(source, to);
        }
        self.down.pack_into(down);
        PackedExpert { format, hidden, inter, bytes: buffer.into() }
    }
}

/// One activation row: integers and scales, or f32.
enum Row {
    Quantized(Vec<i8>, Vec<f32>),
    Floats(Vec<f32>),
}

/// The quantizer once more, by the text of the definition. Not finite: a NaN scale.
fn quantized(x: &[f32]) -> Row {
    let (mut values, mut scales) = (Vec::new(), Vec::new());
    for group in x.chunks(GROUP) {
        let amax = group.iter().fold(0.0f32, |m, v| if v.is_nan() { f32::NAN } else { m.max(v.abs()) });
        let broken = group.iter().any(|v| !v.is_finite());
        let quiet = broken || amax < 2.0f32.powi(-64);
        let inverse = 127.0 / amax;
        for i in 0..GROUP {
            let v = group.get(i).copied().unwrap_or(0.0);
            values.push(if quiet { 0 } else { (v * inverse).round_ties_even() as i8 });
        }
        scales.push(if broken {
            f32::NAN
        } else if quiet {
            0.0
        } else {
            amax / 127.0
        });
    }
    Row::Quantized(values, scales)
}

fn row_for(format: Format, x: &[f32]) -> Row {
    if format.is_quantized() { quantized(x) } else { Row::Floats(x.to_vec()) }
}

/// Dot product of output `n` with inputs `range` of a row, from +0.
fn dot(m: &Logical, n: usize, row: &Row, range: Range<usize>) -> f32 {
    match row {
        Row::Quantized(values, scales) => {
            let groups = m.inputs.div_ceil(GROUP);
            let mut acc = 0.0f32;
            for g in range.start / GROUP..range.end.div_ceil(GROUP) {
                let mut dot = 0i32;
                for i in g * GROUP..((g + 1) * GROUP).min(m.inputs) {
                    dot += i32::from(m.values[n * m.inputs + i]) * i32::from(values[i]);
                }
                acc = (dot as f32).mul_add(scales[g] * m.scales[n * groups + g].to_f32(), acc);
            }
            acc
        }
        Row::Floats(x) => {
            let mut lanes = [0.0f32; 16];
            for i in range.start..range.end.min(m.inputs) {
                let lane = &mut lanes[(i - range.start) % 16];
                *lane = m.weight(n, i).mul_add(x[i], *lane);
            }
            let eight: Vec<f32> = (0..8).map(|i| lanes[i] + lanes[i + 8]).collect();
            let four: Vec<f32> = (0..4).map(|i| eight[i] + eight[i + 4]).collect();
            (four[0] + four[2]) + (four[1] + four[3])
        }
    }
}

/// Addends of one assignment: `[hidden][blocks]`, before rounding.
fn addends(e: &LogicalExpert, x: &[f32], weight: f32, step_log2: i8) -> Vec<Vec<f32>> {
    let (format, hidden, inter) = (e.gate.format, e.gate.inputs, e.gate.outputs);
    let row = row_for(format, x);
    let h: Vec<f32> = (0..inter)
        .map(|n| {
            let (g, u) = (dot(&e.gate, n, &row, 0..hidden), dot(&e.up, n, &row, 0..hidden));
            definition::swiglu(g, u)
        })
        .collect();
    let h = row_for(format, &h);
    let block = |n: usize, start: usize| {
        dot(&e.down, n, &h, start..start + COMBINE_BLOCK.min(inter - start))
            * weight
            * 2.0f32.powi(-i32::from(step_log2))
    };
    (0..hidden).map(|n| (0..inter).step_by(COMBINE_BLOCK).map(|start| block(n, start)).collect()).collect()
}

fn activation(rng: &mut Rng, inputs: usize, wild: bool) -> Vec<f32> {
    let mut x = vec![0.0; inputs];
    for group in x.chunks_mut(GROUP) {
        let kind = if wild { rng.below(10) } else { 0 };
        for v in group {
            let bits = rng.bits() as u32;
            *v = match kind {
                1 => 0.0,
                2 => -0.0,
                3 => f32::from_bits(bits & 0x807f_ffff), // subnormal
                4 => f32::from_bits((bits & 0x81ff_ffff) + (60 << 23)), // around the 2^-64 cut
                5 => rng.unit() * 1e-19,
                6 => rng.unit() * 1e30,
                7 => rng.unit() * 3.4e38,
                8 => (rng.below(255) as f32 - 127.0) * 0.5, // exact ties
                9 => f32::from_bits(bits & 0x9fff_ffff) * 1e10, // mixed magnitudes
                _ => rng.unit() * 3.0,
            };
        }
    }
    x
}

fn native(isa: Isa, threads: usize) -> Native {
    Native::new(NativeConfig { isa: Some(isa), spin: Duration::ZERO, ..NativeConfig::threads(threads) })
        .unwrap()
}

/// Every instruction set with one thread, and the SIMD ones with two and three; AMX tiles for every number of rows
/// and from half a tile on.
fn backends() -> Vec<Native> {
    let mut all = vec![native(Isa::Scalar, 1)];
    for isa in Isa::available_here().skip(1) {
        all.extend([native(isa, 1), native(isa, 2), native(isa, 3)]);
    }
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    all.extend([amx::amx_from(9, 1), amx::amx_from(1, 2)].into_iter().flatten());
    all
}

pub(crate) fn filled(format: Format, inputs: usize, rows: &[Vec<f32>]) -> Buffer {
    let mut buffer = Buffer::zeroed(rows.len() * row_bytes(format, inputs));
    Ops::default().fill_rows(format, inputs, &rows.concat(), &mut buffer).unwrap();
    buffer
}

fn canonical(x: f32) -> u32 {
    if x.is_nan() { 0x7fc0_0000 } else { x.to_bits() }
}

/// All row counts with all formats, tame and wild, each with a random shape: (rows, format, wild).
fn cases() -> impl Iterator<Item = (usize, Format, bool)> {
    let rows = (1..=64).chain(ODD_ROWS);
    rows.flat_map(|rows| Format::ALL.into_iter().flat_map(move |f| [(rows, f, false), (rows, f, true)]))
}
