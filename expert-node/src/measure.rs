//! How fast this machine streams weights of this model's experts, by number of rows: `model::kernel::measure` on a
//! sample of one layer, before the router has said which experts are to be held.
//!
//! The sample is limited, so that a slow disk does not hold back the start; it is let go of afterwards.

use mesh_wire::id::ExpertKey;
use model::kernel::Kernels;
use model::kernel::measure::{self, Sample};

use crate::shard::{PlaceError, Source};

/// Most bytes of experts that are measured on: beyond the caches of small machines, and read from a slow disk in a
/// second.
const SAMPLE_BYTES: u64 = 64 << 20;

/// Weight bandwidth in MB/s at `measure::ROWS` rows. 0 where not measured.
///
/// # Errors
/// Where the sample cannot be loaded, or not even one row of it runs.
pub fn weight_mb_s(
    source: &dyn Source,
    kernels: &dyn Kernels,
) -> Result<[u32; measure::ROWS.len()], PlaceError> {
    let shape = source.shape();
    let Some(layer) = shape.layers.first().copied() else { return Ok([0; measure::ROWS.len()]) };
    let experts = (SAMPLE_BYTES / shape.expert_bytes.max(1)).clamp(1, u64::from(shape.experts)) as u16;
    let sample: Result<Vec<_>, PlaceError> = (0..experts)
        .map(|expert| {
            let mut packed = source.expert(ExpertKey { layer, expert })?;
            packed.bytes = packed.bytes.to_resident();
            Ok((expert, packed))
        })
        .collect();
    let runs = kernels.experts(sample?, source.step_log2(layer))?;
    let (format, hidden, expert_bytes) = (shape.format, shape.hidden, shape.expert_bytes);
    Ok(measure::weight_mb_s(&Sample { runs: &*runs, experts, format, hidden, expert_bytes })?)
}

#[cfg(test)]
mod tests;
