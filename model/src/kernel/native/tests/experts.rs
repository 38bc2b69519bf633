//! Sums over experts of every instruction set against the naive writing of the definition, and their independence of
//! batching, of threads, and of who holds which experts.

use super::*;

/// What `run` and `run_wide` must give: wide sums (`None`: NaN), and whether a row is flagged.
pub(super) struct Expected {
    pub(super) wide: Vec<i64>,
    pub(super) broken: Vec<bool>,
    pub(super) flagged: Vec<bool>,
}

pub(super) fn expected(
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

pub(super) struct ExpertCase {
    pub(super) format: Format,
    pub(super) hidden: usize,
    pub(super) experts: Vec<LogicalExpert>,
    pub(super) xs: Vec<Vec<f32>>,
    pub(super) assignments: Vec<Assignment>,
    pub(super) step_log2: i8,
}

impl ExpertCase {
    pub(super) fn random(rng: &mut Rng, rows: usize, format: Format, wild: bool) -> ExpertCase {
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

    pub(super) fn load(&self, backend: &Native, which: &[u16]) -> Arc<dyn LayerExperts> {
        let packed = which.iter().map(|&e| (e, self.experts[usize::from(e)].packed())).collect();
        backend.experts(packed, self.step_log2).unwrap()
    }

    pub(super) fn run(&self, experts: &dyn LayerExperts, assignments: &[Assignment]) -> PartialSums {
        let buffer = filled(self.format, self.hidden, &self.xs);
        let x = Activations::new(self.format, self.xs.len(), self.hidden, &buffer).unwrap();
        let mut out = PartialSums::default();
        experts.run(x, assignments, &mut out).unwrap();
        out
    }

    pub(super) fn wide(
        &self,
        experts: &dyn LayerExperts,
        assignments: &[Assignment],
    ) -> Result<Vec<i64>, KernelError> {
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
