//! libtorch against native, within the stated tolerance, for every format and ragged shapes.

use super::*;
use crate::kernel::native::tests::{Logical, LogicalExpert, Rng, filled};
use crate::kernel::native::{Native, NativeConfig};

fn backends() -> [Box<dyn Kernels>; 2] {
    let torch = Libtorch::new(&LibtorchConfig { device: "cpu".to_owned(), threads: 1 }).unwrap();
    [Box::new(torch), Box::new(Native::new(NativeConfig::threads(1)).unwrap())]
}

fn rows(rng: &mut Rng, count: usize, width: usize) -> Vec<Vec<f32>> {
    (0..count).map(|_| (0..width).map(|_| rng.unit() * 2.0).collect()).collect()
}

/// Root mean square of the difference over that of the reference.
fn difference(ours: &[f64], reference: &[f64]) -> f64 {
    let square: f64 = reference.iter().map(|v| v * v).sum();
    let error: f64 = ours.iter().zip(reference).map(|(a, b)| (a - b) * (a - b)).sum();
    assert!(square > 0.0);
    (error / square).sqrt()
}

#[test]
fn products_are_within_tolerance_of_native() {
    let mut rng = Rng::new(21);
    for format in Format::ALL {
        for (count, outputs, inputs) in [(1, 64, 64), (3, 100, 96), (17, 31, 250), (70, 256, 512)] {
            let matrix = Logical::random(&mut rng, format, (outputs, inputs), false);
            let buffer = filled(format, inputs, &rows(&mut rng, count, inputs));
            let x = Activations::new(format, count, inputs, &buffer).unwrap();
            let [ours, native] = backends().map(|backend| {
                let mut y = vec![0.0; count * outputs];
                backend.linear(matrix.packed()).unwrap().apply(x, &mut y).unwrap();
                y.into_iter().map(f64::from).collect::<Vec<f64>>()
            });
            let difference = difference(&ours, &native);
            let limit = TOLERANCE[format as usize];
            assert!(difference <= limit, "{format} {count} x {outputs} x {inputs}: {difference:.4}");
        }
    }
}

#[test]
fn expert_sums_are_within_tolerance_of_native() {
    let mut rng = Rng::new(22);
    for format in Format::ALL {
        for (count, hidden, inter) in [(1, 64, 64), (5, 90, 72), (40, 256, 160)] {
            let experts: Vec<LogicalExpert> =
                (0..2).map(|_| LogicalExpert::random(&mut rng, format, (hidden, inter), false)).collect();
            let buffer = filled(format, hidden, &rows(&mut rng, count, hidden));
            let x = Activations::new(format, count, hidden, &buffer).unwrap();
            let assignments: Vec<Assignment> = (0..2 * count as u32)
                .map(|i| Assignment { row: i / 2, expert: (i % 2) as u16, weight: 0.1 + 0.01 * i as f32 })
                .collect();
            let [ours, native] = backends().map(|backend| {
                let packed = experts.iter().enumerate().map(|(i, e)| (i as u16, e.packed())).collect();
                let layer = backend.experts(packed, -16).unwrap();
                let (mut out, mut wide) = (PartialSums::default(), Vec::new());
                layer.run(x, &assignments, &mut out).unwrap();
                layer.run_wide(x, &assignments, &mut wide).unwrap();
                assert!(out.overflowed.iter().all(|flag| !flag));
                assert!(out.sums.iter().zip(&wide).all(|(a, b)| i64::from(*a) == *b));
                wide.into_iter().map(|v| v as f64).collect::<Vec<f64>>()
            });
            let difference = difference(&ours, &native);
            let limit = TOLERANCE[format as usize];
            assert!(difference <= limit, "{format} {count} rows of {hidden} x {inter}: {difference:.4}");
        }
    }
}

#[test]
fn sums_that_leave_i32_are_flagged_and_held_in_i64() {
    let mut rng = Rng::new(23);
    let expert = LogicalExpert::random(&mut rng, Format::Q4, (64, 64), false);
    let buffer = filled(Format::Q4, 64, &rows(&mut rng, 2, 64));
    let x = Activations::new(Format::Q4, 2, 64, &buffer).unwrap();
    let assignments =
        [1.0, 1e-7].map(|weight| Assignment { row: u32::from(weight < 0.5), expert: 3, weight });
    for backend in backends() {
        let layer = backend.experts(vec![(3, expert.packed())], -40).unwrap();
        let (mut out, mut wide) = (PartialSums::default(), Vec::new());
        layer.run(x, &assignments, &mut out).unwrap();
        assert_eq!(out.overflowed, [true, false], "{backend:?}");
        assert!(out.sums[..64].iter().all(|v| *v == 0));
        layer.run_wide(x, &assignments, &mut wide).unwrap();
        assert!(wide[..64].iter().any(|v| v.unsigned_abs() > 1 << 31));
        assert!(out.sums[64..].iter().zip(&wide[64..]).all(|(a, b)| i64::from(*a) == *b));
    }
}

#[test]
fn devices_that_are_not_there_are_refused_by_name() {
    for (device, message) in [("tpu", "unknown device 'tpu'"), ("cuda:999", "cuda:999"), ("cuda:x", "cuda:x")]
    {
        let config = LibtorchConfig { device: device.to_owned(), threads: 1 };
        let error = Libtorch::new(&config).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let error = Libtorch::new(&LibtorchConfig { device: "cpu".to_owned(), threads: 0 }).unwrap_err();
    assert!(error.to_string().contains("0 threads"));
}
