//! The measurement ends and reports what it should; speeds themselves are not tested.

use super::*;
use crate::fixture::{FakeKernels, FakeSource, key};

#[test]
fn every_affordable_count_is_measured() {
    let measured = weight_mb_s(&FakeSource::default(), &FakeKernels::default(), None).unwrap();
    assert!(measured[0] > 0, "{measured:?}");
    // Not measured only after something that was slow.
    let first_missing = measured.iter().position(|mb_s| *mb_s == 0).unwrap_or(measured.len());
    assert!(measured[first_missing..].iter().all(|mb_s| *mb_s == 0), "{measured:?}");
}

#[test]
fn the_pace_is_reported_instead() {
    let measured = weight_mb_s(&FakeSource::default(), &FakeKernels::default(), Some(2e6)).unwrap();
    assert!(measured.iter().all(|mb_s| *mb_s <= 2) && measured[0] > 0, "{measured:?}");
}

#[test]
fn a_sample_that_cannot_be_read_is_an_error() {
    let source = FakeSource { broken: Some(key(1, 3)), ..FakeSource::default() };
    let error = weight_mb_s(&source, &FakeKernels::default(), None).unwrap_err();
    assert_eq!(error.to_string(), "expert 3 of layer 1 cannot be read");
}

#[test]
fn rows_are_what_the_format_says() {
    for format in model::format::Format::ALL {
        let shape = Shape { format, hidden: 40, ..FakeSource::default().shape() };
        let bytes = some_rows(&shape, 3);
        let x = Activations::new(format, 3, 40, &bytes).unwrap();
        if format.is_quantized() {
            let (values, scales) = x.quantized(2);
            assert!(values[..40].iter().any(|value| *value != 0) && scales == [0.01, 0.01]);
        } else {
            assert!(x.values(2)[1] > 0.0);
        }
    }
}
