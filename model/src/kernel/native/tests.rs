//! The instruction sets this machine has against a second, naive writing of the definition over logical
//! weights: random shapes, row counts on both sides of every tile and segment, wild values, thread counts,
//! batchings and splits of the experts.

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

/// Every instruction set with one thread, and the SIMD ones with two and three.
fn backends() -> Vec<Native> {
    let mut all = vec![native(Isa::Scalar, 1)];
    for isa in Isa::available_here().skip(1) {
        all.extend([native(isa, 1), native(isa, 2), native(isa, 3)]);
    }
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

#[test]
fn products_are_the_bits_of_the_definition() {
    let mut rng = Rng::new(1);
    let backends = backends();
    let mut finite = 0;
    for (rows, format, wild) in cases() {
        let inputs = if rng.below(2) == 0 { GROUP * (1 + rng.below(9)) } else { 1 + rng.below(288) };
        let outputs = 1 + rng.below(if rows > 64 { 40 } else { 70 });
        let matrix = Logical::random(&mut rng, format, (outputs, inputs), wild);
        let xs: Vec<Vec<f32>> = (0..rows).map(|_| activation(&mut rng, inputs, wild)).collect();
        let buffer = filled(format, inputs, &xs);
        let x = Activations::new(format, rows, inputs, &buffer).unwrap();
        let mut expected = Vec::new();
        for values in &xs {
            let row = row_for(format, values);
            expected.extend((0..outputs).map(|n| canonical(dot(&matrix, n, &row, 0..inputs))));
        }
        finite += expected.iter().filter(|v| f32::from_bits(**v).is_finite()).count();
        for backend in &backends {
            let linear = backend.linear(matrix.packed()).unwrap();
            let mut y = vec![f32::NAN; rows * outputs];
            linear.apply(x, &mut y).unwrap();
            let y: Vec<u32> = y.into_iter().map(canonical).collect();
            assert!(y == expected, "{backend:?} {format} wild {wild}: {rows} rows of {outputs} x {inputs}");
        }
    }
    assert!(finite > 200_000, "only {finite} finite values were compared");
}

/// What `run` and `run_wide` must give: wide sums (`None`: NaN), and whether a row is flagged.
struct Expected {
    wide: Vec<i64>,
    broken: Vec<bool>,
    flagged: Vec<bool>,
}

fn expected(
    experts: &[LogicalExpert],
    xs: &[Vec<f32>],
    assignments: &[Assignment],
    step_log2: i8,
) -> Expected {
    let hidden = xs[0].len();
    let mut out = Expected {
        wide: vec![0; xs.len() * hidden],
        broken: vec![false; xs.len()],
        flagged: vec![false; xs.len()],
    };
    let (mut peaks, mut counts) = (vec![0.0f64; xs.len()], vec![0usize; xs.len()]);
    for a in assignments {
        let row = a.row as usize;
        let terms = addends(&experts[usize::from(a.expert)], &xs[row], a.weight, step_log2);
        counts[row] += terms[0].len();
        for (n, blocks) in terms.iter().enumerate() {
            for v in blocks {
                out.broken[row] |= v.is_nan();
                peaks[row] = peaks[row].max(f64::from(v.abs()));
                let limit = 2.0f64.powi(52);
                out.wide[row * hidden + n] += f64::from(*v).round_ties_even().clamp(-limit, limit) as i64;
            }
        }
    }
    for row in 0..xs.len() {
        let bound = (peaks[row] + 1.0) * counts[row] as f64;
        out.flagged[row] = out.broken[row] || bound >= 2.0f64.powi(31);
    }
    out
}

struct ExpertCase {
    format: Format,
    hidden: usize,
    experts: Vec<LogicalExpert>,
    xs: Vec<Vec<f32>>,
    assignments: Vec<Assignment>,
    step_log2: i8,
}

impl ExpertCase {
    fn random(rng: &mut Rng, rows: usize, format: Format, wild: bool) -> ExpertCase {
        let aligned = rng.below(2) == 0;
        let size = |rng: &mut Rng, groups| {
            if aligned { GROUP * (1 + rng.below(groups)) } else { 1 + rng.below(GROUP * groups) }
        };
        let hidden = size(rng, if rows > 64 { 1 } else { 2 });
        // Widths differ: a process may hold slices of experts.
        let experts: Vec<LogicalExpert> = (0..3)
            .map(|_| {
                let inter = size(rng, if rows > 64 { 5 } else { 8 });
                let extreme = wild && rng.below(2) == 0;
                LogicalExpert::random(rng, format, (hidden, inter), extreme)
            })
            .collect();
        let xs = (0..rows).map(|_| activation(rng, hidden, wild)).collect();
        let mut assignments = Vec::new();
        for row in 0..rows as u32 {
            for expert in 0..3u16 {
                if rng.below(3) > 0 {
                    assignments.push(Assignment { row, expert, weight: rng.unit() });
                }
            }
        }
        for i in 0..assignments.len() {
            let j = rng.below(i + 1);
            assignments.swap(i, j);
        }
        let step_log2 = if wild { rng.below(40) as i8 - 10 } else { -12 };
        ExpertCase { format, hidden, experts, xs, assignments, step_log2 }
    }

    fn load(&self, backend: &Native, which: &[u16]) -> Arc<dyn LayerExperts> {
        let packed = which.iter().map(|&e| (e, self.experts[usize::from(e)].packed())).collect();
        backend.experts(packed, self.step_log2).unwrap()
    }

    fn run(&self, experts: &dyn LayerExperts, assignments: &[Assignment]) -> PartialSums {
        let buffer = filled(self.format, self.hidden, &self.xs);
        let x = Activations::new(self.format, self.xs.len(), self.hidden, &buffer).unwrap();
        let mut out = PartialSums::default();
        experts.run(x, assignments, &mut out).unwrap();
        out
    }

    fn wide(&self, experts: &dyn LayerExperts, assignments: &[Assignment]) -> Result<Vec<i64>, KernelError> {
        let buffer = filled(self.format, self.hidden, &self.xs);
        let x = Activations::new(self.format, self.xs.len(), self.hidden, &buffer).unwrap();
        let mut out = Vec::new();
        experts.run_wide(x, assignments, &mut out).map(|()| out)
    }
}

#[test]
fn expert_sums_are_the_bits_of_the_definition() {
    let mut rng = Rng::new(2);
    let backends = backends();
    let (mut exact, mut flagged, mut broken) = (0, 0, 0);
    // Every row count with every format, tame and wild in turn: both would take twice the time.
    let in_turn = |(rows, format, wild): &(usize, Format, bool)| {
        *rows > 64 || *wild == (rows / 2 + *format as usize).is_multiple_of(2)
    };
    for (rows, format, wild) in cases().filter(in_turn) {
        let case = ExpertCase::random(&mut rng, rows, format, wild);
        let expected = expected(&case.experts, &case.xs, &case.assignments, case.step_log2);
        for backend in &backends {
            let label = format!("{backend:?} {format} wild {wild}: {rows} rows of {}", case.hidden);
            let experts = case.load(backend, &[0, 1, 2]);
            let out = case.run(&*experts, &case.assignments);
            assert!(out.overflowed == expected.flagged, "flags, {label}");
            for row in 0..rows {
                let range = row * case.hidden..(row + 1) * case.hidden;
                let (got, want) = (&out.sums[range.clone()], &expected.wide[range]);
                if expected.flagged[row] {
                    assert!(got.iter().all(|v| *v == 0), "a flagged row is zeroed, {label}");
                } else {
                    assert!(got.iter().zip(want).all(|(g, w)| i64::from(*g) == *w), "row {row}, {label}");
                }
            }
            if backend.threads() > 1 {
                continue; // the wide sums have no threads
            }
            let sound: Vec<Assignment> =
                case.assignments.iter().filter(|a| !expected.broken[a.row as usize]).copied().collect();
            let wide = case.wide(&*experts, &sound).unwrap();
            for row in (0..rows).filter(|row| !expected.broken[*row]) {
                let range = row * case.hidden..(row + 1) * case.hidden;
                assert!(wide[range.clone()] == expected.wide[range], "wide row {row}, {label}");
            }
        }
        flagged += expected.flagged.iter().filter(|v| **v).count();
        broken += expected.broken.iter().filter(|v| **v).count();
        exact += expected.flagged.iter().filter(|v| !**v).count();
    }
    assert!(exact > 1000 && flagged > 100 && broken > 20, "{exact} exact, {flagged} flagged, {broken} NaN");
}

#[test]
fn sums_do_not_depend_on_batching_nor_on_who_holds_the_experts() {
    let mut rng = Rng::new(3);
    for rows in [1, 5, 16, 17, 40] {
        for format in Format::ALL {
            let case = ExpertCase::random(&mut rng, rows, format, false);
            let backend = native(Isa::best(), 2);
            let all = case.load(&backend, &[0, 1, 2]);
            let whole = case.run(&*all, &case.assignments);
            assert!(whole.overflowed.iter().all(|flag| !flag));
            let (first, second) = (case.load(&backend, &[1]), case.load(&backend, &[0, 2]));
            assert!(first.holds(1) && !first.holds(0) && !first.holds(7));
            let (mine, theirs): (Vec<_>, Vec<_>) = case.assignments.iter().partition(|a| a.expert == 1);
            let parts = [case.run(&*first, &mine), case.run(&*second, &theirs)];
            for i in 0..whole.sums.len() {
                assert_eq!(parts[0].sums[i] + parts[1].sums[i], whole.sums[i]);
            }
            for row in 0..rows {
                let one: Vec<_> =
                    case.assignments.iter().filter(|a| a.row as usize == row).copied().collect();
                let alone = case.run(&*all, &one);
                let range = row * case.hidden..(row + 1) * case.hidden;
                assert_eq!(alone.sums[range.clone()], whole.sums[range]);
            }
        }
    }
}

#[test]
fn an_expert_cut_at_multiples_of_128_adds_up_exactly() {
    let mut rng = Rng::new(4);
    for format in Format::ALL {
        let (hidden, inter, cut) = (96, 320, 128);
        let whole = LogicalExpert::random(&mut rng, format, (hidden, inter), false);
        let slice = |range: Range<usize>| LogicalExpert {
            gate: rows_of(&whole.gate, range.clone()),
            up: rows_of(&whole.up, range.clone()),
            down: columns_of(&whole.down, range),
        };
        let experts = vec![slice(0..cut), slice(cut..inter)];
        let xs = vec![activation(&mut rng, hidden, false)];
        let a = |expert| Assignment { row: 0, expert, weight: 0.3 };
        let sliced = ExpertCase {
            format,
            hidden,
            experts,
            xs: xs.clone(),
            assignments: vec![a(0), a(1)],
            step_log2: -12,
        };
        let whole =
            ExpertCase { format, hidden, experts: vec![whole], xs, assignments: vec![a(0)], step_log2: -12 };
        let backend = native(Isa::best(), 1);
        let got = sliced.run(&*sliced.load(&backend, &[0, 1]), &sliced.assignments);
        let want = whole.run(&*whole.load(&backend, &[0]), &whole.assignments);
        assert!(want.sums.iter().any(|v| *v != 0));
        assert_eq!(got.sums, want.sums);
    }
}

fn rows_of(m: &Logical, range: Range<usize>) -> Logical {
    let groups = m.inputs / GROUP;
    Logical {
        format: m.format,
        outputs: range.len(),
        inputs: m.inputs,
        values: m.values[range.start * m.inputs..range.end * m.inputs].to_vec(),
        scales: m.scales[range.start * groups..range.end * groups].to_vec(),
        floats: m.floats[range.start * m.inputs..range.end * m.inputs].to_vec(),
    }
}

fn columns_of(m: &Logical, range: Range<usize>) -> Logical {
    let groups = m.inputs / GROUP;
    let cut = range.start / GROUP..range.end / GROUP;
    Logical {
        format: m.format,
        outputs: m.outputs,
        inputs: range.len(),
        values: m.values.chunks(m.inputs).flat_map(|row| row[range.clone()].to_vec()).collect(),
        scales: m.scales.chunks(groups).flat_map(|row| row[cut.clone()].to_vec()).collect(),
        floats: m.floats.chunks(m.inputs).flat_map(|row| row[range.clone()].to_vec()).collect(),
    }
}

#[test]
fn calls_that_do_not_fit_are_refused_by_name() {
    let mut rng = Rng::new(5);
    let backend = native(Isa::best(), 1);
    let case = ExpertCase::random(&mut rng, 2, Format::Q4, false);
    let experts = case.load(&backend, &[0, 2]);
    let buffer = filled(Format::Q4, case.hidden, &case.xs);
    let x = Activations::new(Format::Q4, 2, case.hidden, &buffer).unwrap();
    let refusal = |a: Assignment| {
        let mut out = PartialSums::default();
        experts.run(x, &[a], &mut out).unwrap_err().to_string()
    };
    let good = Assignment { row: 0, expert: 0, weight: 1.0 };
    assert_eq!(refusal(Assignment { expert: 1, ..good }), "expert 1 is not held here");
    assert_eq!(refusal(Assignment { expert: 900, ..good }), "expert 900 is not held here");
    assert_eq!(refusal(Assignment { row: 2, ..good }), "row 2 of a batch of 2");
    assert!(refusal(Assignment { weight: f32::NAN, ..good }).contains("weight NaN for expert 0"));
    let wrong = filled(Format::Q8, case.hidden + 64, &[vec![1.0; case.hidden + 64]]);
    let wrong = Activations::new(Format::Q8, 1, case.hidden + 64, &wrong).unwrap();
    let mut out = PartialSums::default();
    assert!(experts.run(wrong, &[good], &mut out).unwrap_err().to_string().contains("for q8"));
    let mut forged = filled(Format::Q4, case.hidden, &case.xs);
    forged[3] = 0x80;
    let forged = Activations::new(Format::Q4, 2, case.hidden, &forged).unwrap();
    assert!(experts.run(forged, &[good], &mut out).unwrap_err().to_string().contains("-128"));
    assert!(experts.run_wide(forged, &[good], &mut Vec::new()).unwrap_err().to_string().contains("-128"));
}

#[test]
fn weights_that_do_not_fit_are_refused_by_name() {
    let mut rng = Rng::new(6);
    let backend = native(Isa::best(), 1);
    for (format, bits) in [(Format::Q4, 0x7c00u16), (Format::Q8, 0xfe01), (Format::Bf16, 0x7f80)] {
        let packed = Logical::random(&mut rng, format, (5, 40), false).packed();
        let mut bytes = Buffer::zeroed(packed.bytes.len());
        bytes.copy_from_slice(&packed.bytes);
        let at = if format.is_quantized() { format.group_bytes() - 32 } else { 6 };
        bytes[at..at + 2].copy_from_slice(&bits.to_le_bytes());
        let error = backend.linear(PackedMatrix { bytes: bytes.into(), ..packed.clone() }).unwrap_err();
        assert!(error.to_string().contains("NaN or infinite"), "{error}");
        let short = packed.bytes.slice(0, packed.bytes.len() - 64).unwrap();
        let error = backend.linear(PackedMatrix { bytes: short, ..packed }).unwrap_err();
        assert!(error.to_string().contains("bytes where"), "{error}");
    }
    let expert = || LogicalExpert::random(&mut Rng::new(7), Format::Q4, (32, 32), false).packed();
    let twice = backend.experts(vec![(1, expert()), (1, expert())], -10).unwrap_err();
    assert_eq!(twice.to_string(), "expert 1 was given twice");
    let step = backend.experts(vec![(1, expert())], 65).unwrap_err();
    assert!(step.to_string().contains("combine step 2^65"), "{step}");
}

#[test]
fn settings_that_cannot_be_met_are_refused_by_name() {
    let error = "avx1024".parse::<Isa>().unwrap_err();
    assert!(error.contains("scalar, avx2, avx512"), "{error}");
    let error = Native::new(NativeConfig::threads(0)).unwrap_err().to_string();
    assert!(error.contains("0 threads"), "{error}");
    if let Some(lacking) = Isa::ALL.into_iter().find(|isa| !isa.available()) {
        let config = NativeConfig { isa: Some(lacking), ..NativeConfig::threads(1) };
        let error = Native::new(config).unwrap_err().to_string();
        assert!(error.contains("this machine has no"), "{error}");
    }
}

mod rows {
    use super::*;

    /// A vector that mixes magnitudes; `finite` leaves NaN and infinity out.
    fn vector(rng: &mut Rng, len: usize, finite: bool) -> Vec<f32> {
        (0..len)
            .map(|_| match rng.below(if finite { 6 } else { 9 }) {
                0 => f32::from_bits(rng.bits() as u32 & 0x807f_ffff),
                1 => rng.unit() * 1e5,
                2 => [0.0, -0.0, 65504.0, 65520.0, -70000.0, 6e-8][rng.below(6)],
                8 => f32::from_bits(rng.bits() as u32),
                7 => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][rng.below(3)],
                _ => rng.unit() * 4.0,
            })
            .collect()
    }

    fn bits(x: &[f32]) -> Vec<u32> {
        x.iter().copied().map(canonical).collect()
    }

    /// Everything `ops` offers on one pair of vectors, as bits.
    fn all_operations(ops: Ops, a: &[f32], b: &[f32], finite: &[f32]) -> Vec<Vec<u32>> {
        let n = a.len();
        let mut out = vec![vec![0.0; n]; 6];
        ops.rms_norm(a, b, 1e-6, &mut out[0]);
        ops.swiglu(a, b, &mut out[1]);
        out[2].copy_from_slice(a);
        ops.axpy(b.first().copied().unwrap_or(1.0), b, &mut out[2]);
        out[3].copy_from_slice(a);
        ops.scale(1.7, &mut out[3]);
        out[4].copy_from_slice(finite);
        ops.softmax(&mut out[4]);
        out[5].copy_from_slice(a);
        let sum = ops.exp_shifted(&mut out[5], 3.5);
        let mut rows = vec![0.0; 3];
        ops.dot16_rows(&[a, b, finite].concat(), a, &mut rows);
        let mut halves = vec![0; n];
        ops.narrow_f16(a, &mut halves);
        let mut back = vec![0.0; n];
        ops.widen_f16(&halves, &mut back);
        let mut all: Vec<Vec<u32>> = out.iter().chain([&rows, &back]).map(|x| bits(x)).collect();
        all.push(bits(&[sum, ops.sum16(a), ops.dot16(a, b), ops.max(a)]));
        all.push(halves.into_iter().map(u32::from).collect());
        if n > 0 {
            for format in Format::ALL {
                let buffer = {
                    let mut buffer = Buffer::zeroed(row_bytes(format, n));
                    buffer.fill(0xaa);
                    ops.fill_rows(format, n, finite, &mut buffer).unwrap();
                    buffer
                };
                all.push(buffer.iter().map(|b| u32::from(*b)).collect());
            }
        }
        all
    }

    #[test]
    fn have_the_same_bits_with_every_instruction_set() {
        let mut rng = Rng::new(8);
        for round in 0..600 {
            let n = round % 150;
            let (a, b) = (vector(&mut rng, n, round % 3 == 0), vector(&mut rng, n, round % 2 == 0));
            let finite = vector(&mut rng, n, true);
            let scalar = all_operations(Ops::new(Isa::Scalar).unwrap(), &a, &b, &finite);
            for isa in Isa::available_here() {
                let got = all_operations(Ops::new(isa).unwrap(), &a, &b, &finite);
                for (which, (got, want)) in got.iter().zip(&scalar).enumerate() {
                    assert!(got == want, "operation {which} of {isa:?} on {n} values");
                }
            }
        }
    }

    #[test]
    fn quantize_by_the_text_of_the_definition_also_beside_ties() {
        let mut rng = Rng::new(10);
        for round in 0..4000 {
            // Values a few units from where `x * (127 / amax)` is half an integer: any other formula, division
            // order or approximate reciprocal rounds some of them differently.
            let amax = (rng.unit().abs() + 0.01) * 2.0f32.powi(rng.below(120) as i32 - 62);
            let mut x: Vec<f32> = (0..GROUP)
                .map(|_| {
                    let tie = amax * (rng.below(254) as f32 - 126.5) / 127.0;
                    f32::from_bits(tie.to_bits() + rng.below(5) as u32 - 2)
                })
                .collect();
            x[round % GROUP] = amax;
            let Row::Quantized(values, scales) = quantized(&x) else { unreachable!() };
            for isa in Isa::available_here() {
                let mut buffer = Buffer::zeroed(row_bytes(Format::Q8, GROUP));
                Ops::new(isa).unwrap().fill_rows(Format::Q8, GROUP, &x, &mut buffer).unwrap();
                let row = Activations::new(Format::Q8, 1, GROUP, &buffer).unwrap();
                let (got, got_scales) = row.quantized(0);
                assert!(got == values && got_scales == scales, "{isa:?}: {x:?}");
            }
        }
    }

    #[test]
    fn exp_is_within_its_stated_error() {
        let mut worst = 0.0f64;
        for i in -860_000..880_000 {
            let x = i as f32 * 1e-4;
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(definition::exp(x)) - exact).abs() / exact);
        }
        assert!(worst <= 7.4e-8, "relative error {worst:e}");
        assert_eq!(definition::exp(0.0), 1.0);
        assert_eq!(definition::exp(-1e9), definition::exp(-86.0));
        assert_eq!(definition::exp(f32::INFINITY), definition::exp(88.0));
        assert_eq!(definition::exp(f32::NAN), definition::exp(-86.0));
    }

    #[test]
    fn norms_and_softmax_are_right_in_f64() {
        let mut rng = Rng::new(9);
        let ops = Ops::default();
        for n in [1, 15, 16, 17, 100, 2048] {
            let x: Vec<f32> = (0..n).map(|_| rng.unit()).collect();
            let w: Vec<f32> = (0..n).map(|_| rng.unit()).collect();
            let mut out = vec![0.0; n];
            ops.rms_norm(&x, &w, 1e-5, &mut out);
            let square = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n as f64;
            for i in 0..n {
                let want = f64::from(x[i]) / (square + 1e-5).sqrt() * f64::from(w[i]);
                assert!((f64::from(out[i]) - want).abs() <= 1e-6 * want.abs().max(1e-3));
            }
            let mut p: Vec<f32> = x.iter().map(|v| v * 20.0).collect();
            let total: f64 = p.iter().map(|v| f64::from(*v).exp()).sum();
            let want: Vec<f64> = p.iter().map(|v| f64::from(*v).exp() / total).collect();
            ops.softmax(&mut p);
            for (p, want) in p.iter().zip(want) {
                assert!((f64::from(*p) - want).abs() <= 2e-6 * want + 1e-12);
            }
        }
    }

    #[test]
    fn half_floats_convert_like_the_half_crate() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (definition::widen_f16(bits), f16::from_bits(bits).to_f32());
            assert_eq!(canonical(ours), canonical(theirs), "{bits:#06x}");
            if theirs.is_finite() {
                assert_eq!(definition::narrow_f16(theirs), bits);
                // Between this value and the next: the tie, and one step to either side of it.
                let next = f16::from_bits(bits + 1).to_f32();
                if next.is_finite() {
                    let tie = (theirs + next) / 2.0;
                    for x in [tie, f32::from_bits(tie.to_bits() + 1), f32::from_bits(tie.to_bits() - 1)] {
                        assert_eq!(definition::narrow_f16(x), f16::from_f32(x).to_bits(), "{x:e}");
                    }
                }
            }
        }
        assert_eq!(definition::narrow_f16(f32::INFINITY), f16::MAX.to_bits());
        assert_eq!(definition::narrow_f16(-1e30), f16::MIN.to_bits());
    }

    #[test]
    fn a_row_that_is_not_finite_is_named() {
        for format in Format::ALL {
            for (bad, value) in [(0, f32::NAN), (2, f32::INFINITY), (1, f32::NEG_INFINITY)] {
                let mut rows = vec![0.5; 3 * 40];
                rows[bad * 40 + 37] = value;
                let mut buffer = Buffer::zeroed(3 * row_bytes(format, 40));
                let error = Ops::default().fill_rows(format, 40, &rows, &mut buffer).unwrap_err();
                assert_eq!(error.row, bad);
            }
        }
    }
}
