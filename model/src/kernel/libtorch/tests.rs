//! libtorch against native, within the stated tolerance, for every format and ragged shapes.

use super::*;
use crate::activations::Activations;
use crate::kernel::native::tests::{Logical, LogicalExpert, Rng, filled};
use crate::kernel::native::{Native, NativeConfig};
use crate::kernel::{Assignment, PartialSums};

fn native(threads: usize) -> Arc<Native> {
    Arc::new(Native::new(NativeConfig::threads(threads)).unwrap())
}

fn on(place: Place, route: Route, crew: Option<Arc<Native>>) -> Libtorch {
    Libtorch { shop: Arc::new(Shop::new(place, route, crew)) }
}

/// Every way through libtorch that this machine can take, a device that weights are copied to among them.
fn ways() -> Vec<(&'static str, Libtorch)> {
    let cpu = |route| Libtorch::new(&LibtorchConfig::cpu(1, route)).unwrap();
    let helped = LibtorchConfig { crew: Some(native(3)), ..LibtorchConfig::cpu(1, Route::Dequantized) };
    vec![
        ("operators", cpu(Route::Operators)),
        ("dequantized", cpu(Route::Dequantized)),
        ("dequantized by three threads", Libtorch::new(&helped).unwrap()),
        ("device", on(Place::as_if_remote(None), Route::Operators, None)),
    ]
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

/// The last shape is multiplied in two pieces of bf16, by several threads where there are any.
const PRODUCTS: [(usize, usize, usize); 5] =
    [(1, 64, 64), (3, 100, 96), (17, 31, 250), (70, 256, 512), (5, 2100, 1056)];

#[test]
fn products_are_within_tolerance_of_native() {
    let mut rng = Rng::new(21);
    for format in Format::ALL {
        for (count, outputs, inputs) in PRODUCTS {
            let matrix = Logical::random(&mut rng, format, (outputs, inputs), false);
            let buffer = filled(format, inputs, &rows(&mut rng, count, inputs));
            let x = Activations::new(format, count, inputs, &buffer).unwrap();
            let product = |backend: &dyn Kernels| {
                let mut y = vec![0.0; count * outputs];
                backend.linear(matrix.packed()).unwrap().apply(x, &mut y).unwrap();
                y.into_iter().map(f64::from).collect::<Vec<f64>>()
            };
            let reference = product(&*native(1));
            for (way, torch) in ways() {
                let difference = difference(&product(&torch), &reference);
                let limit = TOLERANCE[format as usize];
                assert!(
                    difference <= limit,
                    "{way} {format} {count} x {outputs} x {inputs}: {difference:.4}"
                );
            }
        }
    }
}

/// Sums of two experts over `count` rows, each row given to both; both widths of sums agree.
fn sums(backend: &dyn Kernels, experts: &[LogicalExpert], x: Activations<'_>) -> Vec<f64> {
    let assignments: Vec<Assignment> = (0..2 * x.rows() as u32)
        .map(|i| Assignment { row: i / 2, expert: (i % 2) as u16, weight: 0.1 + 0.01 * i as f32 })
        .collect();
    let packed = experts.iter().enumerate().map(|(i, e)| (i as u16, e.packed())).collect();
    let layer = backend.experts(packed, -16).unwrap();
    let (mut out, mut wide) = (PartialSums::default(), Vec::new());
    layer.run(x, &assignments, &mut out).unwrap();
    layer.run_wide(x, &assignments, &mut wide).unwrap();
    assert!(out.overflowed.iter().all(|flag| !flag));
    assert!(out.sums.iter().zip(&wide).all(|(a, b)| i64::from(*a) == *b));
    wide.into_iter().map(|v| v as f64).collect()
}

#[test]
fn expert_sums_are_within_tolerance_of_native() {
    let mut rng = Rng::new(22);
    for format in Format::ALL {
        for (count, hidden, inter) in [(1, 64, 64), (5, 90, 72), (40, 256, 160), (3, 1024, 1100)] {
            let experts: Vec<LogicalExpert> =
                (0..2).map(|_| LogicalExpert::random(&mut rng, format, (hidden, inter), false)).collect();
            // Rows of the wide shape are small, as after a norm: beyond, the sum of 1024 products is no well-scaled
            // input of the activation.
            let reach = if hidden > 512 { 0.125 } else { 1.0 };
            let mut rows = rows(&mut rng, count, hidden);
            rows.iter_mut().flatten().for_each(|v| *v *= reach);
            let buffer = filled(format, hidden, &rows);
            let x = Activations::new(format, count, hidden, &buffer).unwrap();
            let reference = sums(&*native(1), &experts, x);
            for (way, torch) in ways() {
                let difference = difference(&sums(&torch, &experts, x), &reference);
                let limit = TOLERANCE[format as usize];
                assert!(difference <= limit, "{way} {format} {count} of {hidden} x {inter}: {difference:.4}");
            }
        }
    }
}

#[test]
fn slices_of_different_widths_in_one_layer_add_up_within_tolerance() {
    let mut rng = Rng::new(23);
    for format in Format::ALL {
        let (count, hidden, inter) = (5, 128, 300);
        let experts =
            [0, 1].map(|_| LogicalExpert::random(&mut rng, format, (hidden, inter), false).packed());
        let buffer = filled(format, hidden, &rows(&mut rng, count, hidden));
        let x = Activations::new(format, count, hidden, &buffer).unwrap();
        let assignments: Vec<Assignment> =
            (0..10).map(|i| Assignment { row: i / 2, expert: (i % 2) as u16, weight: 0.5 }).collect();
        let sums = |backend: &dyn Kernels, parts: [(u16, u16); 2]| {
            let held = (0..).zip(&experts).zip(parts);
            let held = held.map(|((index, whole), (from, to))| (index, whole.slice(from, to).unwrap()));
            let (layer, mut wide) = (backend.experts(held.collect(), -16).unwrap(), Vec::new());
            layer.run_wide(x, &assignments, &mut wide).unwrap();
            wide.into_iter().map(|v| v as f64).collect::<Vec<f64>>()
        };
        let reference = sums(&*native(1), [(0, 3), (0, 3)]);
        for (way, torch) in ways() {
            // The narrow one first: what is reserved must do for the widest.
            let parts = [sums(&torch, [(2, 3), (0, 2)]), sums(&torch, [(0, 2), (2, 3)])];
            let both: Vec<f64> = parts[0].iter().zip(&parts[1]).map(|(a, b)| a + b).collect();
            let difference = difference(&both, &reference);
            assert!(difference <= TOLERANCE[format as usize], "{way} {format}: {difference:.4}");
        }
    }
}

#[test]
fn dequantized_weights_are_the_nearest_bf16() {
    let mut rng = Rng::new(24);
    for format in [Format::Q4, Format::Q8] {
        for wild in [false, true] {
            let (outputs, inputs) = (48, 96);
            let matrix = Logical::random(&mut rng, format, (outputs, inputs), wild);
            let bytes = matrix.packed().bytes;
            let packed = Packed { format, outputs, inputs, paired: false, bytes };
            for (at, bits) in packed.widened().into_iter().enumerate() {
                let weight = matrix.weight(at / inputs, at % inputs);
                assert_eq!(bits, half::bf16::from_f32(weight).to_bits(), "{format} {at}: {weight}");
            }
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
    for (way, backend) in ways() {
        let layer = backend.experts(vec![(3, expert.packed())], -40).unwrap();
        let (mut out, mut wide) = (PartialSums::default(), Vec::new());
        layer.run(x, &assignments, &mut out).unwrap();
        assert_eq!(out.overflowed, [true, false], "{way}");
        assert!(out.sums[..64].iter().all(|v| *v == 0));
        layer.run_wide(x, &assignments, &mut wide).unwrap();
        assert!(wide[..64].iter().any(|v| v.unsigned_abs() > 1 << 31));
        assert!(out.sums[64..].iter().zip(&wide[64..]).all(|(a, b)| i64::from(*a) == *b));
    }
}

#[test]
fn devices_that_are_not_there_are_refused_by_name() {
    for (device, message) in [
        ("tpu", "unknown device 'tpu': use cpu, cuda, cuda:N or mps"),
        ("cpu:1", "unknown device 'cpu:1'"),
        ("cuda:999", "device 'cuda:999' is not here: this libtorch finds cpu"),
        ("cuda:x", "device 'cuda:x': after cuda: belongs a number"),
    ] {
        let config = LibtorchConfig { device: device.to_owned(), ..LibtorchConfig::cpu(1, Route::Operators) };
        let error = Libtorch::new(&config).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let error = Libtorch::new(&LibtorchConfig::cpu(0, Route::Operators)).unwrap_err();
    assert!(error.to_string().contains("0 threads"));
}

#[test]
fn a_device_without_room_for_the_weights_says_what_it_needs() {
    let mut rng = Rng::new(25);
    let expert = LogicalExpert::random(&mut rng, Format::Q4, (64, 64), false);
    // One expert takes 3 x 64 x 64 bf16 weights: 24.6 KB.
    let torch = on(Place::as_if_remote(Some(30_000)), Route::Operators, None);
    let first = torch.experts(vec![(0, expert.packed())], -16).unwrap();
    assert_eq!(torch.shop.place.taken(), 24_576);
    let error = torch.experts(vec![(1, expert.packed())], -16).unwrap_err();
    let KernelError::Backend { backend: "libtorch", reason } = error else { panic!("{error:?}") };
    for part in ["device 'cpu' is out of memory", "expert 1 of 64 x 64", "--memory", "--device cpu"] {
        assert!(reason.contains(part), "{reason:?} does not say {part:?}");
    }
    assert_eq!(torch.shop.place.taken(), 24_576, "what was refused is given back");
    drop(first);
    assert_eq!(torch.shop.place.taken(), 0);
    torch.experts(vec![(1, expert.packed())], -16).unwrap();
}

#[test]
fn a_call_without_room_fails_and_the_next_one_runs() {
    let mut rng = Rng::new(26);
    let expert = LogicalExpert::random(&mut rng, Format::Q4, (64, 64), false);
    let matrix = Logical::random(&mut rng, Format::Q4, (64, 64), false);
    let torch = on(Place::as_if_remote(Some(40_000)), Route::Operators, None);
    let layer = torch.experts(vec![(0, expert.packed())], -16).unwrap();
    let linear = torch.linear(matrix.packed()).unwrap();
    let run = |count: usize| {
        let buffer = filled(Format::Q4, 64, &rows(&mut Rng::new(27), count, 64));
        let x = Activations::new(Format::Q4, count, 64, &buffer).unwrap();
        let all: Vec<_> = (0..count as u32).map(|row| Assignment { row, expert: 0, weight: 1.0 }).collect();
        let (mut out, mut y) = (PartialSums::default(), vec![0.0; count * 64]);
        (layer.run(x, &all, &mut out), linear.apply(x, &mut y))
    };
    for _ in 0..2 {
        let (experts, product) = run(1);
        experts.unwrap();
        product.unwrap();
        let (experts, product) = run(200);
        for error in [experts.unwrap_err(), product.unwrap_err()] {
            let text = error.to_string();
            assert!(text.contains("out of memory") && text.contains("200 rows"), "{text}");
        }
    }
}

#[test]
fn what_libtorch_says_when_memory_ends_becomes_the_same_error() {
    let place = Place::as_if_remote(None);
    // 140 TB: more than addresses.
    let error = tch::Tensor::f_zeros([1 << 45], (tch::Kind::Float, place.device)).unwrap_err();
    let text = place.failed(&error, 1 << 47, "a test").to_string();
    assert!(text.contains("device 'cpu' is out of memory: a test needs 140737488.4 MB"), "{text}");
    assert!(!text.contains('\n'), "one line: {text}");
    let error = tch::Tensor::f_zeros([2, 3], (tch::Kind::Float, place.device))
        .and_then(|x| x.f_matmul(&x))
        .unwrap_err();
    let text = place.failed(&error, 24, "a test").to_string();
    assert!(text.starts_with("libtorch: device 'cpu': a test: ") && !text.contains("memory"), "{text}");
}
