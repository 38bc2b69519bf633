//! Slices of experts: packed they are the bytes of an expert of that width, and whoever computes them, on whatever
//! instruction set, their sums add up to exactly the sums of the whole.

use super::experts::{ExpertCase, expected};
use super::*;
use crate::format::blocks;

/// Three experts of up to four blocks, ragged more often than not.
fn case(rng: &mut Rng, rows: usize, (format, wild): (Format, bool)) -> ExpertCase {
    let mut case = ExpertCase::random(rng, rows, format, wild);
    let expert = |rng: &mut Rng| {
        let inter = if rng.below(4) == 0 { GROUP * (1 + rng.below(14)) } else { 1 + rng.below(460) };
        let extreme = wild && rng.below(2) == 0;
        LogicalExpert::random(rng, format, (case.hidden, inter), extreme)
    };
    case.experts = (0..3).map(|_| expert(rng)).collect();
    case
}

/// Ranges of blocks that cover an expert, cut at random.
fn cuts(rng: &mut Rng, inter: usize) -> Vec<(u16, u16)> {
    let count = blocks(inter) as u16;
    let mut bounds: Vec<u16> = (1..count).filter(|_| rng.below(2) == 0).collect();
    bounds.insert(0, 0);
    bounds.push(count);
    bounds.windows(2).map(|pair| (pair[0], pair[1])).collect()
}

/// The experts of a case on several machines: part k of each on the k-th, if it has so many.
fn machines(rng: &mut Rng, case: &ExpertCase) -> Vec<Vec<(u16, PackedExpert)>> {
    let mut machines: Vec<Vec<(u16, PackedExpert)>> = Vec::new();
    for (index, expert) in (0..).zip(&case.experts) {
        let packed = expert.packed();
        for (machine, (from, to)) in cuts(rng, packed.inter).into_iter().enumerate() {
            if machines.len() <= machine {
                machines.push(Vec::new());
            }
            machines[machine].push((index, packed.slice(from, to).unwrap()));
        }
    }
    machines
}

#[test]
fn slices_add_up_to_the_bits_of_the_definition() {
    let mut rng = Rng::new(40);
    let backends: Vec<Native> = backends().into_iter().filter(|backend| backend.threads() < 3).collect();
    let (mut exact, mut wide_rows, mut parts) = (0, 0, 0);
    let rows_of_cases = (1..=64).map(|rows| (rows, Format::ALL[rows % 3], rows / 3 % 2 == 0));
    for (rows, format, wild) in rows_of_cases {
        let case = case(&mut rng, rows, (format, wild));
        let want = expected(&case.experts, &case.xs, &case.assignments, case.step_log2);
        let machines = machines(&mut rng, &case);
        for backend in &backends {
            let label = format!("{backend:?} {format} wild {wild}: {rows} rows of {}", case.hidden);
            let mut sums = vec![0_i64; rows * case.hidden];
            for held in &machines {
                let experts = backend.experts(held.clone(), case.step_log2).unwrap();
                let mine = |a: &&Assignment| held.iter().any(|(index, _)| *index == a.expert);
                let mine: Vec<_> = case.assignments.iter().filter(mine).copied().collect();
                let out = case.run(&*experts, &mine);
                parts += 1;
                // What the router does with a row that does not fit i32.
                let again = |a: &&Assignment| out.overflowed[a.row as usize] && !want.broken[a.row as usize];
                let again: Vec<_> = mine.iter().filter(again).copied().collect();
                wide_rows += again.len();
                let wide = case.wide(&*experts, &again).unwrap();
                for (at, sum) in sums.iter_mut().enumerate() {
                    let overflowed = out.overflowed[at / case.hidden];
                    *sum += if overflowed { wide[at] } else { i64::from(out.sums[at]) };
                }
            }
            for row in (0..rows).filter(|row| !want.broken[*row]) {
                let range = row * case.hidden..(row + 1) * case.hidden;
                assert!(sums[range.clone()] == want.wide[range], "row {row}, {label}");
                exact += 1;
            }
        }
    }
    assert!(exact > 500 && wide_rows > 100 && parts > 500, "{exact} rows, {wide_rows} wide, {parts} parts");
}

#[test]
fn a_packed_slice_is_the_packed_expert_of_its_rows_and_columns() {
    let mut rng = Rng::new(41);
    for format in Format::ALL {
        for inter in [1, 31, 128, 129, 200, 256, 300, 384, 511] {
            let whole = LogicalExpert::random(&mut rng, format, (40, inter), false);
            let packed = whole.packed();
            let count = blocks(inter) as u16;
            for (from, to) in (0..count).flat_map(|from| (from + 1..=count).map(move |to| (from, to))) {
                let range = usize::from(from) * COMBINE_BLOCK..inter.min(usize::from(to) * COMBINE_BLOCK);
                let slice = packed.slice(from, to).unwrap();
                let want = LogicalExpert {
                    gate: rows_of(&whole.gate, range.clone()),
                    up: rows_of(&whole.up, range.clone()),
                    down: columns_of(&whole.down, range.clone()),
                };
                assert_eq!(slice.inter, range.len());
                assert!(*slice.bytes == *want.packed().bytes, "{format}: {from}..{to} of {inter}");
                // The whole is a view, not a copy.
                assert_eq!(slice.bytes.as_ptr() == packed.bytes.as_ptr(), (from, to) == (0, count));
                // And a slice can be cut again.
                if to - from > 1 {
                    let again = slice.slice(1, to - from).unwrap();
                    assert!(*again.bytes == *packed.slice(from + 1, to).unwrap().bytes);
                }
            }
            for (from, to) in [(0, 0), (count, count), (0, count + 1), (1, 0), (0, u16::MAX)] {
                assert!(packed.slice(from, to).is_none(), "{from}..{to} of {inter}");
            }
        }
    }
}

fn rows_of(m: &Logical, range: Range<usize>) -> Logical {
    let groups = m.inputs.div_ceil(GROUP);
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
    let groups = m.inputs.div_ceil(GROUP);
    let cut = range.start / GROUP..range.end.div_ceil(GROUP);
    Logical {
        format: m.format,
        outputs: m.outputs,
        inputs: range.len(),
        values: m.values.chunks(m.inputs).flat_map(|row| row[range.clone()].to_vec()).collect(),
        scales: m.scales.chunks(groups).flat_map(|row| row[cut.clone()].to_vec()).collect(),
        floats: m.floats.chunks(m.inputs).flat_map(|row| row[range.clone()].to_vec()).collect(),
    }
}
