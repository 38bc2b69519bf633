//! The table from times that are known, and calls that are split between backends.

use super::*;
use crate::format::Format;
use crate::kernel::native::tests::{Logical, LogicalExpert, Rng, filled};
use crate::kernel::native::{Isa, Native, NativeConfig};

/// Takes `fixed` plus `per_row` for every row.
struct Clock {
    fixed: f64,
    per_row: f64,
    rows: usize,
    steps: usize,
}

impl Subject for Clock {
    fn set_rows(&mut self, rows: usize) -> Result<(), KernelError> {
        self.rows = rows;
        Ok(())
    }

    fn step(&mut self) -> Result<Duration, KernelError> {
        self.steps += 1;
        // Every third step a neighbour disturbs.
        let noise = if self.steps.is_multiple_of(3) { 50.0 } else { 1.0 };
        Ok(Duration::from_secs_f64(noise * (self.fixed + self.per_row * self.rows as f64)))
    }
}

fn clock(fixed: f64, per_row: f64) -> Box<dyn Subject> {
    Box::new(Clock { fixed, per_row, rows: 0, steps: 0 })
}

fn names() -> Vec<String> {
    ["streams", "repacks"].map(str::to_owned).to_vec()
}

#[test]
fn the_faster_one_is_chosen_at_every_row_count() {
    // 0.1 ms per row against 1 ms and 0.02 ms per row: they cross at 12.5 rows.
    let mut subjects = [clock(0.0, 1e-4), clock(1e-3, 2e-5)];
    let times = race(&mut subjects, Instant::now() + Duration::from_secs(60)).unwrap();
    assert!(times.iter().all(|(_, measured)| *measured));
    let choices = choose(&names(), times, 1_000_000);
    let winners: Vec<usize> = choices.iter().map(|choice| choice.winner).collect();
    assert_eq!(winners, [0, 0, 1, 1, 1]);
    assert_eq!(described(&choices), "streams to 4 rows, repacks from 16");
    assert!((choices[0].weight_gb_s[0] - 10.0).abs() < 1e-6, "{choices:?}");
    assert_eq!(choices[2].chosen, "repacks");
}

#[test]
fn what_there_is_no_time_for_follows_from_fewer_rows() {
    let mut subjects = [clock(0.0, 1.0), clock(0.0, 2.0)];
    // Times are claimed, not spent: one row fits and four rows would not.
    let times = race(&mut subjects, Instant::now() + Duration::from_secs(20)).unwrap();
    let measured: Vec<bool> = times.iter().map(|(_, measured)| *measured).collect();
    assert_eq!(measured, [true, false, false, false, false]);
    assert_eq!(times[4].0, [256.0, 512.0]);
    let choices = choose(&names(), times, 1);
    assert!(choices.iter().all(|choice| choice.winner == 0));
    assert_eq!(described(&choices), "streams");
}

#[test]
fn rows_between_the_counts_go_with_the_nearest() {
    let entries: Vec<usize> = [0, 1, 2, 7, 8, 31, 32, 127, 128, 10_000].map(entry).to_vec();
    assert_eq!(entries, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]);
}

#[test]
fn wide_shapes_are_reduced_to_whole_groups() {
    assert_eq!(reduced(768, 2048, 3), 768);
    let mixtral = reduced(14336, 4096, 3);
    assert!(mixtral.is_multiple_of(32) && mixtral * 4096 * 3 <= WEIGHTS_MAX && mixtral >= 384);
    assert_eq!(reduced(100, 1 << 30, 1), 32, "never nothing");
}

/// `scalar` for few rows, the best instruction set from 16 rows on: different code with equal bits.
fn two_natives() -> Fastest {
    let of = |isa| {
        let config = NativeConfig { isa: Some(isa), ..NativeConfig::threads(1) };
        Arc::new(Native::new(config).unwrap()) as Arc<dyn Kernels>
    };
    let candidates = vec![of(Isa::Scalar), of(Isa::best())];
    let seconds = |rows| if rows < 16 { vec![1.0, 2.0] } else { vec![2.0, 1.0] };
    let times = || ROWS.map(|rows| (seconds(rows), true)).to_vec();
    let names = names();
    let choices = Choices {
        experts: choose(&names, times(), 1),
        matrices: choose(&names, times(), 1),
        candidates: names,
        measured_ms: 0.0,
    };
    Fastest { name: "fastest", candidates, choices, space: Arc::default() }
}

/// Twenty rows: expert 0 gets all of them, expert 2 gets two, expert 1 none.
fn call() -> Vec<Assignment> {
    let all = (0..20).map(|row| Assignment { row, expert: 0, weight: 0.5 });
    let few = [3, 19].map(|row| Assignment { row, expert: 2, weight: -0.25 });
    few[..1].iter().copied().chain(all).chain(few[1..].iter().copied()).collect()
}

#[test]
fn a_call_split_between_backends_adds_up() {
    let mut rng = Rng::new(31);
    let fastest = two_natives();
    let native = Native::new(NativeConfig::threads(1)).unwrap();
    for format in Format::ALL {
        let experts: Vec<LogicalExpert> =
            (0..3).map(|_| LogicalExpert::random(&mut rng, format, (96, 64), false)).collect();
        let packed = || experts.iter().enumerate().map(|(i, e)| (i as u16, e.packed())).collect();
        let rows: Vec<Vec<f32>> = (0..20).map(|_| (0..96).map(|_| rng.unit()).collect()).collect();
        let buffer = filled(format, 96, &rows);
        let x = Activations::new(format, 20, 96, &buffer).unwrap();
        let run = |kernels: &dyn Kernels, step| {
            let layer = kernels.experts(packed(), step).unwrap();
            assert!(layer.holds(2) && !layer.holds(3));
            let (mut out, mut wide) = (PartialSums::default(), Vec::new());
            layer.run(x, &call(), &mut out).unwrap();
            layer.run_wide(x, &call(), &mut wide).unwrap();
            (out, wide)
        };
        let ((ours, wide), (expected, expected_wide)) = (run(&fastest, -14), run(&native, -14));
        assert_eq!((ours.sums, ours.overflowed), (expected.sums, expected.overflowed), "{format}");
        assert_eq!(wide, expected_wide, "{format}");
        // Steps so fine that rows overflow: whatever backend found it, the row says so.
        let ((ours, _), (expected, _)) = (run(&fastest, -40), run(&native, -40));
        assert!(expected.overflowed.iter().any(|flag| *flag));
        for (row, flag) in expected.overflowed.iter().enumerate() {
            assert!(ours.overflowed[row] || !flag, "{format}: row {row}");
        }
    }
}

#[test]
fn products_go_to_the_winner_for_their_rows() {
    let mut rng = Rng::new(32);
    let fastest = two_natives();
    let native = Native::new(NativeConfig::threads(1)).unwrap();
    let matrix = Logical::random(&mut rng, Format::Q4, (50, 64), false);
    for count in [1, 20] {
        let rows: Vec<Vec<f32>> = (0..count).map(|_| (0..64).map(|_| rng.unit()).collect()).collect();
        let buffer = filled(Format::Q4, 64, &rows);
        let x = Activations::new(Format::Q4, count, 64, &buffer).unwrap();
        let product = |kernels: &dyn Kernels| {
            let linear = kernels.linear(matrix.packed()).unwrap();
            assert_eq!(linear.outputs(), 50);
            let mut y = vec![0.0; count * 50];
            linear.apply(x, &mut y).unwrap();
            y
        };
        assert_eq!(product(&fastest), product(&native));
    }
}

#[test]
fn sums_that_leave_i32_only_together_are_flagged() {
    let part = |sums: &[i32], overflowed: &[bool]| PartialSums {
        sums: sums.to_vec(),
        overflowed: overflowed.to_vec(),
    };
    let mut sums = part(&[i32::MAX, 5, 1, 2, 7, 8], &[false, false, true]);
    merge(&mut sums, &part(&[1, 1, 3, 4, 0, 0], &[false, false, false]), 2);
    assert_eq!(sums.overflowed, [true, false, true]);
    assert_eq!(sums.sums, [0, 0, 4, 6, 0, 0]);
}

#[test]
fn exact_only_where_every_winner_is() {
    #[derive(Debug)]
    struct Rough(Native);

    impl Kernels for Rough {
        fn name(&self) -> &'static str {
            "rough"
        }

        fn isa(&self) -> String {
            "guess".to_owned()
        }

        fn exact(&self) -> bool {
            false
        }

        fn linear(&self, matrix: PackedMatrix) -> Result<Box<dyn Linear>, KernelError> {
            self.0.linear(matrix)
        }

        fn experts(
            &self,
            experts: Vec<(u16, PackedExpert)>,
            step_log2: i8,
        ) -> Result<Arc<dyn LayerExperts>, KernelError> {
            self.0.experts(experts, step_log2)
        }
    }

    let mut fastest = two_natives();
    assert!(fastest.exact());
    assert_eq!(fastest.isa(), "(streams to 4 rows, repacks from 16)");
    fastest.candidates.push(Arc::new(Rough(Native::new(NativeConfig::threads(1)).unwrap())));
    assert!(fastest.exact(), "it won nowhere");
    fastest.choices.matrices[4].winner = 2;
    fastest.choices.matrices[4].chosen = "rough guess".to_owned();
    assert!(!fastest.exact());
    let isa = fastest.isa();
    assert!(isa.contains("matrices: streams to 4 rows, repacks to 64 rows, rough guess from 256"), "{isa}");
}

#[test]
fn measuring_real_backends_fills_the_table() {
    let native = Arc::new(Native::new(NativeConfig::threads(1)).unwrap()) as Arc<dyn Kernels>;
    let workload = Workload { format: Format::Q4, expert: (96, 64), matrix: (128, 96) };
    let fastest = Fastest::measure("fastest", vec![Arc::clone(&native), native], workload).unwrap();
    let choices = fastest.choices();
    for table in [&choices.experts, &choices.matrices] {
        assert_eq!(table.iter().map(|choice| choice.rows).collect::<Vec<_>>(), ROWS);
        assert!(table.iter().all(|c| c.weight_gb_s.iter().all(|v| *v > 0.0 && v.is_finite())));
    }
    assert!(fastest.exact());
    assert!(Fastest::measure("fastest", Vec::new(), workload).is_err());
}
