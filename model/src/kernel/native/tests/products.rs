//! Matrix products of every instruction set against the naive writing of the definition.

use super::*;

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

/// A matrix of the largest weights, both signs, whose scales all have these bits.
fn extreme(rng: &mut Rng, format: Format, shape: (usize, usize), scale: u16) -> Logical {
    let mut matrix = Logical::random(rng, format, shape, true);
    let most = if format == Format::Q8 { 127 } else { 7 };
    for (i, v) in matrix.values.iter_mut().enumerate() {
        *v = if i % 3 == 0 { -most - 1 } else { most };
    }
    matrix.scales.fill(f16::from_bits(scale));
    matrix
}

/// Rows whose every value is as large, as small or as subnormal as can be.
fn extreme_rows(rng: &mut Rng, inputs: usize, rows: usize) -> Vec<Vec<f32>> {
    let quiet = 2.0f32.powi(-64);
    let magnitudes = [
        f32::MAX,
        1e30,
        1.0,
        quiet,
        f32::from_bits(quiet.to_bits() - 1),
        f32::MIN_POSITIVE,
        f32::from_bits(1),
        0.0,
    ];
    (0..rows)
        .map(|row| {
            let magnitude = magnitudes[row % magnitudes.len()];
            (0..inputs).map(|_| if rng.below(4) == 0 { -magnitude } else { magnitude }).collect()
        })
        .collect()
}

#[test]
fn extreme_scales_and_rows_have_the_bits_of_the_definition() {
    let mut rng = Rng::new(14);
    let backends = backends();
    // Zero, minus zero, the smallest and largest subnormal, the smallest normal, the largest, and its negative.
    let scales = [0, 0x8000, 0x0001, 0x83ff, 0x0400, 0x7bff, 0xfbff];
    for format in [Format::Q4, Format::Q8] {
        for scale in scales {
            for rows in [1, 2, 3, 4, 5, 8, 15, 16, 17, 40] {
                let inputs = 1 + rng.below(200);
                let matrix = extreme(&mut rng, format, (17, inputs), scale);
                let xs = extreme_rows(&mut rng, inputs, rows);
                let buffer = filled(format, inputs, &xs);
                let x = Activations::new(format, rows, inputs, &buffer).unwrap();
                let expected = xs.iter().map(|values| row_for(format, values)).flat_map(|row| {
                    let matrix = &matrix;
                    (0..17).map(move |n| canonical(dot(matrix, n, &row, 0..inputs)))
                });
                let expected: Vec<u32> = expected.collect();
                for backend in &backends {
                    let mut y = vec![f32::NAN; rows * 17];
                    backend.linear(matrix.packed()).unwrap().apply(x, &mut y).unwrap();
                    let y: Vec<u32> = y.into_iter().map(canonical).collect();
                    assert!(y == expected, "{backend:?} {format}: {rows} rows, scale {scale:#06x}");
                }
            }
        }
    }
}
