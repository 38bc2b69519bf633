//! A warm call allocates nothing: counted by an allocator that watches the threads of one backend.
#![allow(unsafe_code, reason = "an allocator that counts and passes on")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::pool::allowed_cores;
use super::{Native, NativeConfig};
use crate::activations::{Activations, row_bytes};
use crate::format::Format;
use crate::kernel::{Assignment, Kernels, PartialSums};
use crate::packed::{PackedExpert, PackedMatrix};
use crate::region::Buffer;

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

fn count() {
    if WATCHED.get() {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is passed on to the system's allocator; counting allocates nothing (a constant thread-local
// value without a destructor).
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: by the contract of this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: by the contract of this function.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count();
        // SAFETY: by the contract of this function.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

const HIDDEN: usize = 96;
const INTER: usize = 64;
const EXPERTS: u16 = 8;

/// Allocations of all threads of `native` while `work` runs.
fn allocations(native: &Native, mut work: impl FnMut()) -> usize {
    native.parallel(&|_| WATCHED.set(true));
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    work();
    let after = ALLOCATIONS.load(Ordering::Relaxed);
    native.parallel(&|_| WATCHED.set(false));
    after - before
}

#[test]
fn warm_calls_allocate_nothing() {
    let native = Native::new(NativeConfig::threads(2)).unwrap();
    assert!(allocations(&native, || drop(std::hint::black_box(Box::new(1)))) > 0, "the counter counts");
    for format in Format::ALL {
        let experts = (0..EXPERTS).map(|index| {
            let bytes = Buffer::zeroed(format.expert_bytes(HIDDEN, INTER)).into();
            (index, PackedExpert { format, hidden: HIDDEN, inter: INTER, bytes })
        });
        let experts = native.experts(experts.collect(), -10).unwrap();
        let bytes = Buffer::zeroed(format.matrix_bytes(INTER, HIDDEN)).into();
        let matrix = native.linear(PackedMatrix { format, outputs: INTER, inputs: HIDDEN, bytes }).unwrap();
        // A prefill, then decoding: the second of equal calls is warm, and so is every smaller one.
        let (mut sums, mut product) = (PartialSums::default(), vec![0.0; 300 * INTER]);
        for (rows, warm) in [(300, false), (300, true), (8, true), (1, true), (1, true)] {
            let batch = Buffer::zeroed(rows * row_bytes(format, HIDDEN));
            let x = Activations::new(format, rows, HIDDEN, &batch).unwrap();
            let assignments: Vec<Assignment> = (0..EXPERTS)
                .flat_map(|expert| (0..rows as u32).map(move |row| Assignment { row, expert, weight: 0.5 }))
                .collect();
            let count = allocations(&native, || {
                experts.run(x, &assignments, &mut sums).unwrap();
                matrix.apply(x, &mut product[..rows * INTER]).unwrap();
            });
            assert!(!warm || count == 0, "{count} allocations with {rows} rows in {format}");
        }
    }
}

#[test]
fn threads_get_cores_of_their_own_only_where_they_fit_exactly() {
    let allowed = allowed_cores();
    assert!(NativeConfig::threads(1).cores.is_empty());
    assert!(NativeConfig::threads(allowed.len() + 1).cores.is_empty());
    if allowed.len() > 1 {
        assert_eq!(NativeConfig::threads(allowed.len()).cores, allowed);
    }
}
