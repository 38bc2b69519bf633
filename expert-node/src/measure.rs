//! How fast this machine streams weights of this model's experts, by number of rows: `model::kernel::measure` on a
//! sample of one layer, before the router has said which experts are to be held.
//!
//! The sample is limited, so that a slow disk does not hold back the start and a machine that holds slices never has
//! to hold a whole expert; it is let go of afterwards.

use mesh_wire::id::{ExpertKey, Slice};
use model::format::blocks;
use model::kernel::Kernels;
use model::kernel::measure::{self, Sample};
use model::packed::slice::gather;

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
    let to = sample_blocks(shape.expert_bytes, blocks(shape.inter));
    let of = |expert| Slice { key: ExpertKey { layer, expert }, from: 0, to };
    let Some(width) = shape.width(&of(0)) else { return Ok([0; measure::ROWS.len()]) };
    let expert_bytes = shape.bytes(width);
    let experts = (SAMPLE_BYTES / expert_bytes.max(1)).clamp(1, u64::from(shape.experts)) as u16;
    let widths: Vec<_> = (0..experts).map(|expert| (expert, width)).collect();
    let read = |at: usize, out: &mut [u8]| source.sample(of(at as u16), out);
    let sample = gather((shape.format, shape.hidden), &widths, read)?;
    let runs = kernels.experts(sample, source.step_log2(layer))?;
    let (format, hidden) = (shape.format, shape.hidden);
    Ok(measure::weight_mb_s(&Sample { runs: &*runs, experts, format, hidden, expert_bytes })?)
}

/// Blocks of an expert of `expert_bytes` that are measured on: all `blocks`, or as many as the sample may have.
fn sample_blocks(expert_bytes: u64, blocks: usize) -> u16 {
    let all = blocks.clamp(1, usize::from(u16::MAX)) as u64;
    (SAMPLE_BYTES * all / expert_bytes.max(1)).clamp(1, all) as u16
}

#[cfg(test)]
mod tests;
