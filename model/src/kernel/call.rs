//! What every backend checks and decides alike: whether a call fits, and whether a sum could leave i32.

use super::{Assignment, KernelError};
use crate::activations::Activations;
use crate::format::Format;

/// What a layer's experts expect of a call.
#[derive(Clone, Copy)]
pub(super) struct Expected<'a> {
    pub(super) format: Format,
    pub(super) hidden: usize,
    pub(super) holds: &'a dyn Fn(u16) -> bool,
}

/// Refuses, by name, a call that does not fit the loaded experts.
pub(super) fn check_call(
    expected: Expected<'_>,
    x: &Activations<'_>,
    assignments: &[Assignment],
) -> Result<(), KernelError> {
    let Expected { format, hidden, holds } = expected;
    if !assignments.is_empty() && (x.format() != format || x.inputs() != hidden) {
        return Err(KernelError::Call(format!(
            "experts of width {hidden} in {format} were given rows of {} for {}",
            x.inputs(),
            x.format()
        )));
    }
    for a in assignments {
        if !holds(a.expert) {
            return Err(KernelError::Call(format!("expert {} is not held here", a.expert)));
        }
        if a.row as usize >= x.rows() {
            return Err(KernelError::Call(format!("row {} of a batch of {}", a.row, x.rows())));
        }
        if !a.weight.is_finite() {
            return Err(KernelError::Call(format!(
                "row {} has routing weight {} for expert {}",
                a.row, a.weight, a.expert
            )));
        }
    }
    Ok(())
}

/// Refuses a product whose rows or result do not fit a matrix of `outputs` x `inputs` in `format`.
pub(super) fn check_product(
    format: Format,
    (outputs, inputs): (usize, usize),
    x: &Activations<'_>,
    results: usize,
) -> Result<(), KernelError> {
    if x.format() == format && x.inputs() == inputs && results == x.rows() * outputs {
        return Ok(());
    }
    Err(KernelError::Call(format!(
        "matrix of {outputs} x {inputs} in {format} was given {} rows of {} for {} and room for {results} results",
        x.rows(),
        x.inputs(),
        x.format()
    )))
}

/// The error of a row whose numbers left f32 in an expert.
pub(super) fn beyond_f32(a: &Assignment) -> KernelError {
    KernelError::Call(format!(
        "row {} gives NaN or infinity in expert {}: its numbers exceed f32",
        a.row, a.expert
    ))
}

/// Whether `addends` values of magnitude at most `peak` (f32 bits, so that NaN counts as largest), each
/// rounded, could leave i32.
pub(super) fn may_overflow(peak: u32, addends: u32) -> bool {
    let bound = (f64::from(f32::from_bits(peak)) + 1.0) * f64::from(addends);
    bound.is_nan() || bound >= f64::from(1u32 << 31)
}
