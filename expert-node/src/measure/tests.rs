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
