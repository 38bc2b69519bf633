//! How fast these kernels stream experts of this model on this machine, by number of rows.
//!
//! Placement and sharing predict from it how long a layer's experts take, and the first deadlines come from it. A
//! call with one row through every expert of a sample says what memory gives; calls with more rows say how long
//! the same weights keep the cores busy. The whole measurement ends after about `BUDGET`: a machine too slow for it
//! leaves the larger counts unmeasured (0) rather than its user waiting. The price: a sample may lie in a large
//! last-level cache, and then one row looks faster than it will be; what is learned while serving corrects that.

use std::time::{Duration, Instant};

use super::{Assignment, KernelError, LayerExperts, PartialSums};
use crate::activations::{Activations, row_bytes};
use crate::format::{Format, GROUP, padded_inputs};
use crate::region::Buffer;

/// Rows at which the bandwidth is measured.
pub const ROWS: [u32; 5] = [1, 4, 16, 64, 256];

/// Time for all counts of rows.
const BUDGET: Duration = Duration::from_millis(200);

/// A measurement as long as this ends the search: a thousand times what the clock and the pool of threads cost.
const ENOUGH: Duration = Duration::from_millis(8);

/// A measurement as long as this counts.
const BELIEVED: Duration = Duration::from_millis(1);

/// Loaded experts to measure on.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// Experts 0 to `experts` of some layer, whole or slices of equal width.
    pub runs: &'a dyn LayerExperts,
    /// How many; at least 1.
    pub experts: u16,
    /// Format of their weights.
    pub format: Format,
    /// Width of a row.
    pub hidden: usize,
    /// Packed bytes of one.
    pub expert_bytes: u64,
}

/// Fills `out` with what can be measured on where there are no weights: kernels do the same with it. Read as f16 (the
/// scales of quantized formats) every value is about 0.001, read as bf16 about 0.01; the rest differs from place to
/// place, and by `seed`.
pub fn fill(format: Format, seed: u64, out: &mut [u8]) {
    let high = if format.is_quantized() { 0x14 } else { 0x3c };
    let mut state = seed;
    for pair in out.chunks_mut(2) {
        // A step of a 64-bit linear congruential generator (Knuth's MMIX).
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let low = (state >> 56) as u8;
        pair.copy_from_slice(&[low, high][..pair.len()]);
    }
}

/// Weight bandwidth in MB/s at `ROWS`: bytes of the experts a call uses over the time it takes. 0 where not
/// measured.
///
/// # Errors
/// What the kernel refuses.
pub fn weight_mb_s(sample: &Sample<'_>) -> Result<[u32; ROWS.len()], KernelError> {
    let mut measured = [0; ROWS.len()];
    let mut sums = PartialSums::default();
    let started = Instant::now();
    // Time of one expert at the count before, to tell whether the next is affordable.
    let mut before: Option<(u32, f64)> = None;
    for (rows, mb_s) in ROWS.into_iter().zip(&mut measured) {
        let left = BUDGET.saturating_sub(started.elapsed()).as_secs_f64();
        let expected = before.map_or(0.0, |(fewer, seconds)| seconds * f64::from(rows / fewer));
        if expected > left {
            break;
        }
        let seconds = match one_expert(sample, rows, &mut sums) {
            Ok(seconds) => seconds,
            // A device too full for more rows serves calls of fewer.
            Err(error) if before.is_some() => {
                tracing::warn!("calls of {rows} rows do not run here: {error}");
                break;
            }
            Err(error) => return Err(error),
        };
        before = Some((rows, seconds));
        // Saturates at what u32 holds.
        *mb_s = (sample.expert_bytes as f64 / seconds / 1e6).round().max(1.0) as u32;
    }
    Ok(measured)
}

/// Seconds per expert of a call with so many rows through each: of one expert, then of twice as many each time
/// until the time was long enough twice or all of the sample is used. Every time other experts, so that none is
/// warm. The least time counts: others are a kernel's first call or somebody else's turn on the core, and believing
/// those would leave the machine without experts.
fn one_expert(sample: &Sample<'_>, rows: u32, sums: &mut PartialSums) -> Result<f64, KernelError> {
    let bytes = some_rows(sample.format, sample.hidden, rows as usize);
    let experts = u32::from(sample.experts.max(1));
    let Some(x) = Activations::new(sample.format, rows as usize, sample.hidden, &bytes) else {
        return Err(KernelError::Call("the rows of the measurement do not fit".to_owned()));
    };
    let mut used = 1;
    let mut next = 0;
    let mut long = 0;
    let mut least: Option<f64> = None;
    loop {
        let chosen = (next..next + used).map(|expert| (expert % experts) as u16);
        let assignments: Vec<_> = chosen
            .flat_map(|expert| (0..rows).map(move |row| Assignment { row, expert, weight: 0.5 }))
            .collect();
        let started = Instant::now();
        sample.runs.run(x, &assignments, sums)?;
        let elapsed = started.elapsed();
        let seconds = elapsed.as_secs_f64().max(1e-9) / f64::from(used);
        if elapsed >= BELIEVED {
            least = Some(least.map_or(seconds, |least| least.min(seconds)));
        }
        long += u32::from(elapsed >= ENOUGH);
        if used >= experts || long > 1 {
            return Ok(least.unwrap_or(seconds));
        }
        next += used;
        used = (used * 2).min(experts);
    }
}

/// Rows of plausible values: ones of alternating sign would let a kernel take no shortcut either, but cancel out.
fn some_rows(format: Format, hidden: usize, rows: usize) -> Buffer {
    let stride = row_bytes(format, hidden);
    let padded = padded_inputs(hidden);
    let mut bytes = Buffer::zeroed(rows * stride);
    for row in bytes.chunks_exact_mut(stride) {
        if format.is_quantized() {
            let (values, rest) = row.split_at_mut(padded);
            values.iter_mut().enumerate().for_each(|(at, value)| *value = (at * 37 % 127) as u8);
            for scale in rest[..padded / GROUP * 4].chunks_exact_mut(4) {
                scale.copy_from_slice(&0.01_f32.to_le_bytes());
            }
        } else {
            for (at, value) in row[..padded * 4].chunks_exact_mut(4).enumerate() {
                value.copy_from_slice(&((at * 37 % 127) as f32 / 100.0).to_le_bytes());
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Ffn;
    use crate::kernel::Kernels;
    use crate::kernel::native::{Native, NativeConfig};
    use crate::open::Model;
    use crate::packed::PackedExpert;

    fn loaded(format: Format) -> (std::sync::Arc<dyn LayerExperts>, usize, u64) {
        let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/qwen3_moe");
        let cache = tempfile::tempdir().unwrap();
        let spec = directory.to_str().unwrap();
        let model = Model::open(spec, format, cache.path(), &mut |_, _, _| {}).unwrap();
        let layer = model.config.layers.iter().position(|layer| layer.ffn == Ffn::Moe).unwrap();
        let experts = (0..2).map(|expert| (expert, model.expert(layer, usize::from(expert)).unwrap()));
        let experts: Vec<_> = experts.collect();
        let bytes = experts[0].1.bytes.len() as u64;
        let native = Native::new(NativeConfig::threads(1)).unwrap();
        (native.experts(experts, model.step_log2(layer)).unwrap(), model.config.hidden, bytes)
    }

    #[test]
    fn every_affordable_count_is_measured() {
        for format in Format::ALL {
            let (runs, hidden, expert_bytes) = loaded(format);
            let sample = Sample { runs: &*runs, experts: 2, format, hidden, expert_bytes };
            let measured = weight_mb_s(&sample).unwrap();
            assert!(measured[0] > 0, "{measured:?}");
            // Not measured only after something that was slow.
            let first_missing = measured.iter().position(|mb_s| *mb_s == 0).unwrap_or(measured.len());
            assert!(measured[first_missing..].iter().all(|mb_s| *mb_s == 0), "{measured:?}");
        }
    }

    #[test]
    fn what_fills_in_for_weights_can_be_measured_on_in_every_format() {
        let native = Native::new(NativeConfig::threads(1)).unwrap();
        for format in Format::ALL {
            let (hidden, inter) = (64, 160);
            let expert_bytes = format.expert_bytes(hidden, inter);
            let expert = |seed| {
                let mut bytes = Buffer::zeroed(expert_bytes);
                fill(format, seed, &mut bytes);
                PackedExpert { format, hidden, inter, bytes: bytes.into() }
            };
            assert_ne!(expert(0).bytes[..64], expert(1).bytes[..64]);
            let runs = native.experts(vec![(0, expert(0)), (1, expert(1))], -9).unwrap();
            let sample =
                Sample { runs: &*runs, experts: 2, format, hidden, expert_bytes: expert_bytes as u64 };
            assert!(weight_mb_s(&sample).unwrap()[0] > 0, "{format}");
        }
    }

    #[test]
    fn a_kernel_that_refuses_is_an_error() {
        let (runs, hidden, expert_bytes) = loaded(Format::Q4);
        // One expert more than there is.
        let sample = Sample { runs: &*runs, experts: 3, format: Format::Q4, hidden, expert_bytes };
        assert!(weight_mb_s(&sample).is_err());
    }

    #[test]
    fn rows_are_what_the_format_says() {
        for format in Format::ALL {
            let bytes = some_rows(format, 40, 3);
            let x = Activations::new(format, 3, 40, &bytes).unwrap();
            if format.is_quantized() {
                let (values, scales) = x.quantized(2);
                assert!(values[..40].iter().any(|value| *value != 0) && scales == [0.01, 0.01]);
            } else {
                assert!(x.values(2)[1] > 0.0);
            }
        }
    }
}
