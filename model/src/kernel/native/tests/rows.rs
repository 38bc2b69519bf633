//! Row operations of every instruction set: the same bits, and right.

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
