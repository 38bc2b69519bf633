//! What is measured on; the measurement itself is tested where it is, and speeds are not tested.

use super::*;
use crate::fixture::{FakeKernels, FakeSource, key};

#[test]
fn a_sample_of_the_first_layer_is_measured() {
    let measured = weight_mb_s(&FakeSource::default(), &FakeKernels::default()).unwrap();
    assert!(measured[0] > 0, "{measured:?}");
}

#[test]
fn a_sample_that_cannot_be_read_is_an_error() {
    let source = FakeSource { broken: Some(key(1, 3)), ..FakeSource::default() };
    let error = weight_mb_s(&source, &FakeKernels::default()).unwrap_err();
    assert_eq!(error.to_string(), "expert 3 of layer 1 cannot be read");
}

#[test]
fn a_sample_is_no_larger_than_it_may_be() {
    // Wide experts of 0.1 MB: all eight of them, whole.
    let source = FakeSource { wide: true, ..FakeSource::default() };
    assert!(weight_mb_s(&source, &FakeKernels::default()).unwrap()[0] > 0);
    let reads = source.reads.lock().unwrap();
    assert!(reads.len() == 8 && reads.iter().all(|slice| (slice.from, slice.to) == (0, 3)));
    // Experts larger than the sample (Mixtral's in bf16: 112 blocks, 352 MB): a part of one.
    let (whole, all) = (352_321_536_u64, 112_u64);
    let to = SAMPLE_BYTES * all / whole;
    assert_eq!(sample_blocks(whole, all as usize), to as u16);
    assert_eq!((sample_blocks(u64::MAX, 2), sample_blocks(0, 5), sample_blocks(1, 0)), (1, 5, 1));
}
