//! The AMX kernels on their own: on the tile unit where the machine has one, else emulated.
//!
//! The tests of `products` and `experts` run them beside the others; here is what only tiles can get wrong, and
//! the emulator itself against the manual.

#![allow(unsafe_code, reason = "tile instructions, real and emulated")]

use super::amx_emulator::{self, Done, Trap, Unit};
use super::experts::ExpertCase;
use super::*;
use crate::kernel::native::isa::Table;

/// AMX for calls of `rows` rows and more, real or emulated; `None` on machines without AVX-512, where neither can be.
pub(super) fn amx_from(rows: usize, threads: usize) -> Option<Native> {
    if !Isa::Avx512.available() {
        return None;
    }
    if !Isa::Amx.available() {
        amx_emulator::install();
    }
    let config = NativeConfig { spin: Duration::ZERO, ..NativeConfig::threads(threads) };
    Some(Native::with_table(&config, Table::amx_from_rows(rows)).unwrap())
}

/// Results of a product of random rows with `matrix`, as bits.
fn product(backend: &Native, matrix: &Logical, xs: &[Vec<f32>]) -> Vec<u32> {
    let buffer = filled(matrix.format, matrix.inputs, xs);
    let x = Activations::new(matrix.format, xs.len(), matrix.inputs, &buffer).unwrap();
    let mut y = vec![f32::NAN; xs.len() * matrix.outputs];
    backend.linear(matrix.packed()).unwrap().apply(x, &mut y).unwrap();
    y.into_iter().map(canonical).collect()
}

#[test]
fn rows_longer_than_a_chunk_are_continued_exactly() {
    let Some(amx) = amx_from(1, 1) else { return };
    let scalar = native(Isa::Scalar, 1);
    let mut rng = Rng::new(20);
    for format in [Format::Q4, Format::Q8] {
        for (groups, rows) in [(32, 16), (33, 1), (35, 17), (64, 3), (67, 40)] {
            let inputs = groups * GROUP - rng.below(GROUP);
            let matrix = Logical::random(&mut rng, format, (20, inputs), true);
            let xs: Vec<_> = (0..rows).map(|_| activation(&mut rng, inputs, true)).collect();
            let same = product(&amx, &matrix, &xs) == product(&scalar, &matrix, &xs);
            assert!(same, "{rows} rows of {groups} groups in {format}");

            let experts = vec![LogicalExpert::random(&mut rng, format, (40, inputs), false)];
            let assignments: Vec<_> =
                (0..rows as u32).map(|row| Assignment { row, expert: 0, weight: rng.unit() }).collect();
            let xs = (0..rows).map(|_| activation(&mut rng, 40, false)).collect();
            let case = ExpertCase { format, hidden: 40, experts, xs, assignments, step_log2: -12 };
            let run = |backend| case.run(&*case.load(backend, &[0]), &case.assignments);
            let (got, want) = (run(&amx), run(&scalar));
            assert!(want.sums.iter().any(|sum| *sum != 0));
            assert!(got.sums == want.sums, "{rows} rows of an expert {groups} groups wide in {format}");
        }
    }
}

#[test]
fn tiles_are_used_from_the_crossover_on_and_only_for_integers() {
    let Some(amx) = amx_from(32, 1) else { return };
    let mut rng = Rng::new(21);
    for format in Format::ALL {
        let matrix = Logical::random(&mut rng, format, (40, 70), false);
        for rows in [1usize, 31, 32, 33, 64] {
            let xs: Vec<_> = (0..rows).map(|_| activation(&mut rng, 70, false)).collect();
            let done = amx_emulator::done_by(|| drop(product(&amx, &matrix, &xs)));
            if rows < 32 || !format.is_quantized() || Isa::Amx.available() {
                assert_eq!(
                    done,
                    Done { multiplications: 0, loaded: 0, stored: 0 },
                    "{rows} rows in {format}"
                );
                continue;
            }
            // Per block of outputs and group of inputs: 32 bytes and 16 sums of every row and no more (a short
            // tile reads and writes nothing behind it), and the weights once for each tile.
            let (cells, tiles) = (3 * 3 * rows, 3 * 3 * rows.div_ceil(16));
            let expected =
                Done { multiplications: tiles, loaded: cells * 32 + tiles * 512, stored: cells * 64 };
            assert_eq!(done, expected, "{rows} rows in {format}");
        }
    }
}

#[test]
fn what_others_left_in_the_tile_unit_does_not_matter_and_nothing_is_left_for_them() {
    let Some(amx) = amx_from(1, 1) else { return };
    let mut rng = Rng::new(22);
    let matrix = Logical::random(&mut rng, Format::Q4, (16, 64), false);
    let xs: Vec<_> = (0..19).map(|_| activation(&mut rng, 64, false)).collect();
    let want = product(&native(Isa::Scalar, 1), &matrix, &xs);
    // Seven rows in tile 0 alone, as if an operator of libtorch had been here.
    let mut foreign = [0u8; 64];
    (foreign[0], foreign[16], foreign[48]) = (1, 8, 7);
    // SAFETY: the tile unit may be used (`amx_from`), and this is a valid configuration.
    unsafe {
        std::arch::asm!("ldtilecfg [{}]", "tilezero tmm0", in(reg) foreign.as_ptr(), options(nostack));
    }
    assert!(amx_emulator::configured() || Isa::Amx.available());
    assert_eq!(product(&amx, &matrix, &xs), want);
    assert!(!amx_emulator::configured());
}

#[test]
fn threads_have_a_tile_unit_each() {
    if amx_from(1, 1).is_none() {
        return;
    }
    let mut rng = Rng::new(23);
    let work: Vec<_> = (0..4)
        .map(|i| {
            let matrix = Logical::random(&mut rng, [Format::Q4, Format::Q8][i % 2], (33, 300), true);
            let xs: Vec<_> = (0..30 + i).map(|_| activation(&mut rng, 300, true)).collect();
            (matrix, xs)
        })
        .collect();
    std::thread::scope(|scope| {
        for (matrix, xs) in &work {
            scope.spawn(move || {
                let (amx, scalar) = (amx_from(1, 2).unwrap(), native(Isa::Scalar, 1));
                for _ in 0..3 {
                    assert_eq!(product(&amx, matrix, xs), product(&scalar, matrix, xs));
                }
            });
        }
    });
}

/// Machine code as the manual lists it; memory operands at [rax + rcx].
mod code {
    pub(super) const LDTILECFG: [u8; 5] = [0xc4, 0xe2, 0x78, 0x49, 0x00];
    pub(super) const TILERELEASE: [u8; 5] = [0xc4, 0xe2, 0x78, 0x49, 0xc0];
    pub(super) const TILEZERO_0: [u8; 5] = [0xc4, 0xe2, 0x7b, 0x49, 0xc0];
    pub(super) const TILELOADD_4: [u8; 6] = [0xc4, 0xe2, 0x7b, 0x4b, 0x24, 0x08];
    pub(super) const TILELOADD_5: [u8; 6] = [0xc4, 0xe2, 0x7b, 0x4b, 0x2c, 0x08];
    pub(super) const TILESTORED_0: [u8; 6] = [0xc4, 0xe2, 0x7a, 0x4b, 0x04, 0x08];
    /// tmm0 += tmm4 * tmm5, both signed; the others differ in the prefix.
    pub(super) const TDPBSSD_0_4_5: [u8; 5] = [0xc4, 0xe2, 0x53, 0x5e, 0xc4];
}

/// One instruction on an emulated unit, with `rax` and `rcx`.
fn step(unit: &mut Unit, code: &[u8], rax: *const u8, rcx: u64) -> Result<usize, Trap> {
    let mut registers = [0; 16];
    (registers[0], registers[1]) = (rax as u64, rcx);
    // SAFETY: the callers give whole instructions and memory that is large enough for them.
    unsafe { unit.step(code.as_ptr(), &registers) }
}

/// Tile 0: `rows` x 8 i32; tile 4: `rows` x 12 bytes; tile 5: 3 x 32 bytes.
fn small_configuration(rows: u8) -> [u8; 64] {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    for (tile, tile_rows, row) in [(0, rows, 32), (4, rows, 12), (5, 3, 32)] {
        (bytes[48 + tile], bytes[16 + 2 * tile]) = (tile_rows, row);
    }
    bytes
}

#[test]
fn the_emulator_multiplies_as_the_manual_says() {
    let mut rng = Rng::new(24);
    let mut unit = Unit::new();
    for (prefix, left_signed, right_signed) in
        [(3, true, true), (2, true, false), (1, false, true), (0, false, false)]
    {
        let mut multiply = code::TDPBSSD_0_4_5;
        multiply[2] = multiply[2] & !3 | prefix;
        let a: Vec<u8> = (0..5 * 20).map(|_| rng.below(256) as u8).collect();
        let b: Vec<u8> = (0..3 * 32).map(|_| rng.below(256) as u8).collect();
        let mut out = [0i32; 6 * 8];
        let done: Vec<_> = [
            step(&mut unit, &code::LDTILECFG, small_configuration(5).as_ptr(), 0),
            step(&mut unit, &code::TILEZERO_0, std::ptr::null(), 0),
            step(&mut unit, &code::TILELOADD_4, a.as_ptr(), 20),
            step(&mut unit, &code::TILELOADD_5, b.as_ptr(), 32),
            step(&mut unit, &multiply, std::ptr::null(), 0),
            step(&mut unit, &multiply, std::ptr::null(), 0),
            step(&mut unit, &code::TILESTORED_0, out.as_mut_ptr().cast(), 32),
            step(&mut unit, &code::TILERELEASE, std::ptr::null(), 0),
        ]
        .into_iter()
        .collect::<Result<_, _>>()
        .unwrap();
        assert_eq!(done, [5, 5, 6, 6, 5, 5, 6, 5]);
        let widen = |v: u8, signed| if signed { i32::from(v as i8) } else { i32::from(v) };
        for m in 0..5 {
            for n in 0..8 {
                let sum: i32 = (0..12)
                    .map(|i| {
                        widen(a[m * 20 + i], left_signed) * widen(b[i / 4 * 32 + 4 * n + i % 4], right_signed)
                    })
                    .sum();
                assert_eq!(out[m * 8 + n], 2 * sum);
            }
        }
        assert_eq!(out[5 * 8..], [0; 8], "a tile of five rows stores five");
    }
}

#[test]
fn the_emulator_refuses_what_the_manual_forbids() {
    let none = std::ptr::null();
    let fault = |unit: &mut Unit, code: &[u8], at| match step(unit, code, at, 64) {
        Err(Trap::Fault(what)) => what,
        other => panic!("{code:x?}: {other:?}"),
    };
    let memory = [0u8; 1024];
    let mut unit = Unit::new();
    for code in [&code::TILEZERO_0[..], &code::TILELOADD_4, &code::TILESTORED_0, &code::TDPBSSD_0_4_5] {
        assert!(fault(&mut unit, code, memory.as_ptr()).contains("not configured"));
    }
    for (at, value) in [(0, 2), (1, 1), (7, 1), (40, 1), (63, 1), (48, 17), (48, 0), (17, 1)] {
        let mut wrong = small_configuration(4);
        wrong[at] = value;
        assert!(fault(&mut unit, &code::LDTILECFG, wrong.as_ptr()).contains("a configuration with"));
    }
    for (at, value) in [(48, 5), (24, 16), (26, 28), (53, 2), (24, 10)] {
        let mut wrong = small_configuration(4);
        wrong[at] = value;
        step(&mut unit, &code::LDTILECFG, wrong.as_ptr(), 0).unwrap();
        assert!(fault(&mut unit, &code::TDPBSSD_0_4_5, none).contains("a multiplication of"), "{at}");
    }
    step(&mut unit, &code::LDTILECFG, small_configuration(4).as_ptr(), 0).unwrap();
    let twice = [0xc4, 0xe2, 0x5b, 0x5e, 0xc4]; // tmm0 += tmm4 * tmm4
    assert!(fault(&mut unit, &twice, none).contains("names a tile twice"));
    step(&mut unit, &code::TILERELEASE, none, 0).unwrap();
    assert!(fault(&mut unit, &code::TILEZERO_0, none).contains("not configured"));
    // ud2; andn, which shares the map; a load through a register pair that lacks the index.
    for unknown in [&[0x0f, 0x0b][..], &[0xc4, 0xe2, 0x78, 0xf2, 0xc0], &[0xc4, 0xe2, 0x7b, 0x4b, 0x20]] {
        assert_eq!(step(&mut unit, unknown, memory.as_ptr(), 64), Err(Trap::Unknown));
    }
}
