//! How fast this machine streams weights of this model's experts, by number of rows.
//!
//! The router splits experts by it and predicts from it how long a first call may take. A call with one row through
//! every expert of a sample says what memory gives; calls with more rows say how long the same weights keep the
//! cores busy. The sample is a part of one layer, and the whole measurement ends after about `BUDGET`: a machine
//! too slow for it leaves the larger counts unmeasured (0) rather than its user waiting. The price: a sample may
//! lie in a large last-level cache, and then one row looks faster than it will be.

use std::time::{Duration, Instant};

use mesh_wire::id::ExpertKey;
use model::activations::{Activations, row_bytes};
use model::format::{GROUP, padded_inputs};
use model::kernel::{Assignment, Kernels, LayerExperts, PartialSums};
use model::region::Buffer;

use crate::shard::{PlaceError, Shape, Source};

/// Rows at which the bandwidth is measured (`Hello::weight_mb_s`).
pub const ROWS: [u32; 5] = [1, 4, 16, 64, 256];

/// Most bytes of experts that are measured on: beyond the caches of small machines, and read from a slow disk in a
/// second.
const SAMPLE_BYTES: u64 = 64 << 20;

/// Time for all counts of rows, after the sample is loaded.
const BUDGET: Duration = Duration::from_millis(200);

/// A measurement as long as this is believed: a hundred times what the clock and the pool of threads cost.
const ENOUGH: Duration = Duration::from_millis(8);

/// Weight bandwidth in MB/s at `ROWS`: bytes of the experts a call uses over the time it takes, at most `pace`
/// (bytes per second). 0 where not measured.
///
/// # Errors
/// Where the sample cannot be loaded, or not even one row of it runs.
pub fn weight_mb_s(
    source: &dyn Source,
    kernels: &dyn Kernels,
    pace_bytes_s: Option<f64>,
) -> Result<[u32; 5], PlaceError> {
    let shape = source.shape();
    let mut measured = [0; 5];
    let Some(layer) = shape.layers.first().copied() else { return Ok(measured) };
    let experts = (SAMPLE_BYTES / shape.expert_bytes.max(1)).clamp(1, u64::from(shape.experts)) as u16;
    let sample: Result<Vec<_>, PlaceError> = (0..experts)
        .map(|expert| {
            let mut packed = source.expert(ExpertKey { layer, expert })?;
            packed.bytes = packed.bytes.to_resident();
            Ok((expert, packed))
        })
        .collect();
    let runs = kernels.experts(sample?, source.step_log2(layer))?;
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
        let seconds = match one_expert(&*runs, &shape, (rows, experts), &mut sums) {
            Ok(seconds) => seconds,
            // A device too full for more rows serves calls of fewer.
            Err(error) if before.is_some() => {
                tracing::warn!("calls of {rows} rows do not run here, the router will compute them: {error}");
                break;
            }
            Err(error) => return Err(error),
        };
        before = Some((rows, seconds));
        let bytes_s = shape.expert_bytes as f64 / seconds;
        // Saturates at what u32 holds.
        *mb_s = (pace_bytes_s.map_or(bytes_s, |pace| pace.min(bytes_s)) / 1e6).round().max(1.0) as u32;
    }
    Ok(measured)
}

/// Seconds per expert of a call with so many rows through each: of one expert, then of twice as many each time
/// until the time was long enough twice or all of the sample is used. Every time other experts, so that none is
/// warm. A single long time may be a kernel's first call or somebody else's turn on the core; believing it would
/// leave the node without experts.
fn one_expert(
    runs: &dyn LayerExperts,
    shape: &Shape,
    (rows, experts): (u32, u16),
    sums: &mut PartialSums,
) -> Result<f64, PlaceError> {
    let bytes = some_rows(shape, rows as usize);
    let Some(x) = Activations::new(shape.format, rows as usize, shape.hidden, &bytes) else { return Ok(1.0) };
    let mut used = 1;
    let mut next = 0;
    let mut long: Option<f64> = None;
    loop {
        let chosen = (next..next + used).map(|expert| (expert % u32::from(experts)) as u16);
        let assignments: Vec<_> = chosen
            .flat_map(|expert| (0..rows).map(move |row| Assignment { row, expert, weight: 0.5 }))
            .collect();
        let started = Instant::now();
        runs.run(x, &assignments, sums)?;
        let elapsed = started.elapsed();
        let seconds = elapsed.as_secs_f64().max(1e-9) / f64::from(used);
        let least = long.map_or(seconds, |long| long.min(seconds));
        if used >= u32::from(experts) || (elapsed >= ENOUGH && long.is_some()) {
            return Ok(least);
        }
        if elapsed >= ENOUGH {
            long = Some(seconds);
        }
        next += used;
        used = (used * 2).min(u32::from(experts));
    }
}

/// Rows of plausible values: ones of alternating sign would let a kernel take no shortcut either, but cancel out.
fn some_rows(shape: &Shape, rows: usize) -> Buffer {
    let stride = row_bytes(shape.format, shape.hidden);
    let padded = padded_inputs(shape.hidden);
    let mut bytes = Buffer::zeroed(rows * stride);
    for row in bytes.chunks_exact_mut(stride) {
        if shape.format.is_quantized() {
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
mod tests;
