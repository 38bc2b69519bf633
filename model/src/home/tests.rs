//! What a router adds itself: whole or in slices the same sums, and no more memory than it was told.

use super::*;
use crate::activations::row_bytes;
use crate::format::Format;
use crate::kernel::native::ops::Ops;
use crate::kernel::native::{Native, NativeConfig};
use crate::region::Buffer;

/// One layer of 64 experts, 2048 x 1024: eight blocks each.
const SPEC: &str = "synthetic:olmoe-1b-7b?layers=1&seed=3";
const ROWS: usize = 3;

fn model(format: Format) -> Arc<Model> {
    Arc::new(Model::open(SPEC, format, std::path::Path::new("unused"), &mut |_, _, _| {}).unwrap())
}

fn home(model: &Arc<Model>, residency: Residency) -> Home {
    let kernels = Arc::new(Native::new(NativeConfig::threads(1)).unwrap());
    Home::new(Arc::clone(model), kernels, residency)
}

fn rows(model: &Model, size: f32) -> Buffer {
    let hidden = model.config.hidden;
    let values: Vec<f32> = (0..ROWS * hidden).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0 * size).collect();
    let mut rows = Buffer::zeroed(ROWS * row_bytes(model.format, hidden));
    Ops::default().fill_rows(model.format, hidden, &values, &mut rows).unwrap();
    rows
}

const ASSIGNMENTS: [Assignment; 4] = [
    Assignment { row: 0, expert: 1, weight: 0.5 },
    Assignment { row: 1, expert: 1, weight: 0.25 },
    Assignment { row: 1, expert: 40, weight: 0.75 },
    Assignment { row: 2, expert: 63, weight: 1.0 },
];

/// Sums over these parts of the experts.
fn sums(home: &mut Home, rows: &Buffer, parts: &[(u16, u16)]) -> Vec<i64> {
    let (format, hidden) = (home.model.format, home.model.config.hidden);
    let x = Activations::new(format, ROWS, hidden, rows).unwrap();
    let mut sums = vec![0; ROWS * hidden];
    for part in parts {
        home.add_slice(0, *part, (x, &ASSIGNMENTS), &mut sums).unwrap();
    }
    sums
}

#[test]
fn slices_add_up_to_what_whole_experts_add() {
    for format in Format::ALL {
        let model = model(format);
        // The second is far beyond i32 in steps of the layer, so it is computed again in i64.
        for size in [1.0, 1e7] {
            let rows = rows(&model, size);
            let mut home = home(&model, Residency::Mapped);
            let x = Activations::new(format, ROWS, model.config.hidden, &rows).unwrap();
            let mut whole = vec![0; ROWS * model.config.hidden];
            home.add(0, x, &ASSIGNMENTS, &mut whole).unwrap();
            assert!(whole.iter().any(|sum| *sum != 0));
            assert_eq!(whole.iter().any(|sum| i32::try_from(*sum).is_err()), size > 1.0, "{format} {size}");
            let first = sums(&mut home, &rows, &[(0, 3)]);
            assert_ne!(first, whole, "a slice is not mistaken for the whole");
            let rest = sums(&mut home, &rows, &[(3, 7), (7, 8)]);
            assert!(first.iter().zip(&rest).map(|(a, b)| a + b).eq(whole.iter().copied()), "{format} {size}");
            // Nor the whole for a slice, once both are held.
            assert!(sums(&mut home, &rows, &[(0, 8)]) == whole);
            assert!(sums(&mut home, &rows, &[(0, 3)]) == first);
        }
    }
}

#[test]
fn slices_are_kept_within_their_bytes_and_cut_anew_beyond() {
    let model = model(Format::Q4);
    let rows = rows(&model, 1.0);
    let mut home = home(&model, Residency::Mapped);
    let eighth = Format::Q4.expert_bytes(2048, 128) as u64;
    home.slices_bytes_max = 4 * eighth;
    let want = [(0, 1), (1, 2)].map(|part| sums(&mut home, &rows, &[part]));
    assert_eq!(home.weight_bytes(), 3 * eighth, "three experts' first blocks, no room for three more");
    for (part, want) in [(0, 1), (1, 2)].into_iter().zip(&want) {
        assert!(sums(&mut home, &rows, &[part]) == *want);
    }
    assert_eq!(home.weight_bytes(), 3 * eighth);
    home.slices_bytes_max = u64::MAX;
    assert!(sums(&mut home, &rows, &[(1, 2)]) == want[1]);
    assert_eq!(home.weight_bytes(), 6 * eighth);
}

#[test]
fn experts_that_are_held_are_not_checked_again_when_more_come() {
    for format in Format::ALL {
        let model = model(format);
        let rows = rows(&model, 1.0);
        let mut home = home(&model, Residency::Mapped);
        sums(&mut home, &rows, &[(0, 8)]);
        let held: Vec<_> = home.layers[0].whole.packed.values().map(|expert| expert.bytes.clone()).collect();
        assert_eq!(held.len(), 3);
        // Another look would find nothing good.
        assert!(held.iter().all(|bytes| bytes.passes_once(format as u8, |_| false)), "{format}");
        assert!(
            !model.expert(0, 2).unwrap().bytes.passes_once(format as u8, |_| false),
            "nobody looked at it"
        );
    }
}

#[test]
fn blocks_and_experts_that_are_not_there_are_errors() {
    let model = model(Format::Q8);
    let rows = rows(&model, 1.0);
    let mut home = home(&model, Residency::Mapped);
    let x = Activations::new(Format::Q8, ROWS, 2048, &rows).unwrap();
    let mut to = vec![0; ROWS * 2048];
    let mut add = |part, expert| {
        let one = [Assignment { row: 0, expert, weight: 1.0 }];
        home.add_slice(0, part, (x, &one), &mut to).map_err(|error| error.to_string())
    };
    assert!(add((0, 9), 0).unwrap_err().contains("blocks 0..9"));
    assert!(add((2, 2), 0).is_err() && add((3, 1), 0).is_err());
    assert!(add((0, 8), 64).is_err() && add((0, 1), 64).is_err());
    assert!(to.iter().all(|sum| *sum == 0));
}

#[test]
fn a_share_is_resident_and_the_rest_stays_mapped() {
    let model = model(Format::Q4);
    let rows = rows(&model, 1.0);
    let one = Format::Q4.expert_bytes(2048, 1024) as u64;
    let want = sums(&mut home(&model, Residency::Resident), &rows, &[(0, 8)]);
    let mut home = home(&model, Residency::Mapped);
    let mut seen = Vec::new();
    home.load_resident(2, &mut |done, all| seen.push((done, all))).unwrap();
    assert_eq!((seen.as_slice(), home.resident_bytes(2)), (&[(2 * one, 2 * one)][..], 2 * one));
    assert_eq!(home.weight_bytes(), 2 * one);
    assert!(home.weight_mb_s().unwrap()[0] > 0);
    assert!(sums(&mut home, &rows, &[(0, 8)]) == want);
    assert_eq!(home.weight_bytes(), 4 * one, "two more were asked for");
    let at = |home: &Home, expert: u16| home.layers[0].whole.packed[&expert].bytes.as_ptr();
    let before = [at(&home, 1), at(&home, 40)];
    // More: what is resident stays where it is. Less: the rest is let go of.
    home.load_resident(3, &mut |_, _| {}).unwrap();
    assert_eq!((home.weight_bytes(), [at(&home, 1), at(&home, 40)]), (5 * one, before));
    assert!(sums(&mut home, &rows, &[(0, 8)]) == want);
    home.load_resident(1, &mut |_, _| {}).unwrap();
    assert_eq!(home.weight_bytes(), 3 * one);
    assert!(sums(&mut home, &rows, &[(0, 8)]) == want);
    home.load_all(&mut |_, _| {}).unwrap();
    assert_eq!((home.weight_bytes(), home.layers[0].resident), (home.all_bytes(), 64));
    assert!(sums(&mut home, &rows, &[(0, 8)]) == want);
}
