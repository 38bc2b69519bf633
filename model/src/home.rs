//! Routed experts computed in this process: all of them in `reference`, and on a router its own share and those that
//! no node holds or whose node does not answer, whole or in slices.
//!
//! Experts are loaded the first time a row needs them, from the packed model, and stay. So a router that has
//! never lost a node holds none in memory, and one that has pays the price only for what was asked for.
//! `load_resident` loads the first experts of every layer in advance: where they are used all the time. The price of
//! slices: unlike whole experts they cannot be views of mapped files, so copies of `SLICES_BYTES_MAX` are kept, and
//! beyond that they are cut anew for every call.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::activations::Activations;
use crate::format::{blocks, slice_width};
use crate::kernel::measure::{self, Sample};
use crate::kernel::{Assignment, KernelError, Kernels, LayerExperts, PartialSums};
use crate::open::{Model, OpenError};
use crate::packed::slice::gather;
use crate::packed::{PackedExpert, TensorName};

/// Bytes of slices that are kept for the next call. A router needs them while nodes are gone, beside everything else
/// it holds; slices of one lost machine of a home cluster fit.
pub const SLICES_BYTES_MAX: u64 = 2 << 30;

/// Why experts could not be computed here.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// Their weights are not to be had.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The kernel refused.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// The experts of this process.
#[derive(Debug)]
pub struct Home {
    model: Arc<Model>,
    kernels: Arc<dyn Kernels>,
    residency: Residency,
    layers: Vec<HomeLayer>,
    slices_bytes_max: u64,
    partial: PartialSums,
    wide: Vec<i64>,
    overflowed: Vec<Assignment>,
}

/// Where the weights of experts lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Residency {
    /// In the mapped files: nothing is copied, the system's page cache decides. For fallbacks.
    Mapped,
    /// In memory of their own, streamed at full speed. For experts that are used all the time.
    Resident,
}

/// Experts of a layer, all whole or all the same blocks of theirs.
#[derive(Debug, Default)]
struct Held {
    packed: BTreeMap<u16, PackedExpert>,
    runs: Option<Arc<dyn LayerExperts>>,
}

#[derive(Debug, Default)]
struct HomeLayer {
    whole: Held,
    /// So many of the first experts are in memory of their own (`load_resident`).
    resident: u16,
    /// By first block and the one after the last.
    slices: BTreeMap<(u16, u16), Held>,
}

impl HomeLayer {
    fn bytes(&self) -> u64 {
        let held = std::iter::once(&self.whole).chain(self.slices.values());
        held.flat_map(|held| held.packed.values()).map(|expert| expert.bytes.len() as u64).sum()
    }
}

impl Home {
    /// A home with no expert in it yet.
    pub fn new(model: Arc<Model>, kernels: Arc<dyn Kernels>, residency: Residency) -> Home {
        let layers = model.config.layers.iter().map(|_| HomeLayer::default()).collect();
        let (partial, wide, overflowed) = (PartialSums::default(), Vec::new(), Vec::new());
        let slices_bytes_max = SLICES_BYTES_MAX;
        Home { model, kernels, residency, layers, slices_bytes_max, partial, wide, overflowed }
    }

    /// Bytes of experts in use so far.
    pub fn weight_bytes(&self) -> u64 {
        self.layers.iter().map(HomeLayer::bytes).sum()
    }

    /// Bytes of the first `per_layer` experts of every layer.
    pub fn resident_bytes(&self, per_layer: u16) -> u64 {
        let config = &self.model.config;
        let expert = self.model.format.expert_bytes(config.hidden, config.moe.inter) as u64;
        (config.moe_layers().count() * config.moe.experts.min(per_layer.into())) as u64 * expert
    }

    /// Bytes of all experts of the model.
    pub fn all_bytes(&self) -> u64 {
        self.resident_bytes(u16::MAX)
    }

    /// Loads every expert of every layer; `progress` gets bytes done and bytes in all.
    ///
    /// # Errors
    /// The first expert that cannot be had.
    pub fn load_all(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), HomeError> {
        self.load_resident(u16::MAX, progress)
    }

    /// Has the first `per_layer` experts of every layer in memory of their own, whatever the residency: those that
    /// are there stay, more are loaded, and of more than that the rest is let go of. `progress` gets bytes done and
    /// bytes in all.
    ///
    /// # Errors
    /// The first expert that cannot be had.
    pub fn load_resident(
        &mut self,
        per_layer: u16,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), HomeError> {
        let layers: Vec<usize> = self.model.config.moe_layers().collect();
        let all = self.resident_bytes(per_layer);
        // Configs with more experts than fit are refused when they are read.
        let experts = u16::try_from(self.model.config.moe.experts).unwrap_or(u16::MAX).min(per_layer);
        for (done, layer) in layers.iter().enumerate() {
            self.make_resident(*layer, experts)?;
            progress(all * (done as u64 + 1) / layers.len() as u64, all);
        }
        Ok(())
    }

    fn make_resident(&mut self, layer: usize, experts: u16) -> Result<(), HomeError> {
        let HomeLayer { whole, resident, .. } = &mut self.layers[layer];
        if experts < *resident {
            // They share allocations, which end with the last of them: what stays is read again.
            whole.packed.retain(|expert, _| *expert >= *resident);
            *resident = 0;
        }
        let is_resident = |expert: &u16| {
            *expert < *resident || self.residency == Residency::Resident && whole.packed.contains_key(expert)
        };
        let missing: BTreeSet<u16> = (0..experts).filter(|expert| !is_resident(expert)).collect();
        let new = copied(&self.model, layer, whole_of(&self.model), &missing)?;
        let HomeLayer { whole, resident, .. } = &mut self.layers[layer];
        *resident = experts;
        whole.packed.extend(new);
        whole.take_over(&self.model, &*self.kernels, layer)
    }

    /// How fast this process computes its experts (`kernel::measure`), on those of the first layer that are resident;
    /// zeros where none is.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn weight_mb_s(&self) -> Result<[u32; measure::ROWS.len()], KernelError> {
        let config = &self.model.config;
        let resident = self.layers.iter().find(|layer| layer.resident > 0);
        let Some((layer, runs)) = resident.and_then(|layer| Some((layer, layer.whole.runs.as_deref()?)))
        else {
            return Ok([0; measure::ROWS.len()]);
        };
        measure::weight_mb_s(&Sample {
            runs,
            experts: layer.resident,
            format: self.model.format,
            hidden: config.hidden,
            expert_bytes: self.model.format.expert_bytes(config.hidden, config.moe.inter) as u64,
        })
    }

    /// What computes these experts of a layer, or these blocks of theirs: as far as they are not held, they are loaded
    /// now.
    fn ready(
        &mut self,
        layer: usize,
        part: (u16, u16),
        experts: impl Iterator<Item = u16> + Clone,
    ) -> Result<Arc<dyn LayerExperts>, HomeError> {
        let (model, kernels) = (&*self.model, &*self.kernels);
        let is_whole = part == whole_of(model);
        let home = &self.layers[layer];
        let held = if is_whole { Some(&home.whole) } else { home.slices.get(&part) };
        if let Some(Held { packed, runs: Some(runs) }) = held
            && experts.clone().all(|expert| packed.contains_key(&expert))
        {
            let mapped =
                |expert: &u16| is_whole && self.residency == Residency::Mapped && *expert >= home.resident;
            if let (Some(expert), Ok(layer)) = (experts.clone().find(mapped), u16::try_from(layer)) {
                // All of a layer are in one file.
                model.check_length(TensorName::Expert(layer, expert))?;
            }
            return Ok(Arc::clone(runs));
        }
        let room = self.slices_bytes_max.saturating_sub(self.slices_bytes());
        let home = &mut self.layers[layer];
        let held = if is_whole { &mut home.whole } else { home.slices.entry(part).or_default() };
        let wanted: BTreeSet<u16> = experts.collect();
        let missing: BTreeSet<u16> =
            wanted.iter().copied().filter(|expert| !held.packed.contains_key(expert)).collect();
        if is_whole && self.residency == Residency::Mapped {
            for expert in &missing {
                held.packed.insert(*expert, model.expert(layer, usize::from(*expert))?);
            }
        } else {
            let new = copied(model, layer, part, &missing)?;
            let bytes: u64 = new.iter().map(|(_, expert)| expert.bytes.len() as u64).sum();
            if !is_whole && bytes > room {
                let mut once = new;
                let kept = held.packed.iter().filter(|(expert, _)| wanted.contains(expert));
                once.extend(kept.map(|(index, expert)| (*index, expert.clone())));
                return Ok(kernels.experts(once, model.step_log2(layer))?);
            }
            held.packed.extend(new);
        }
        held.take_over(model, kernels, layer)?;
        held.runs.clone().ok_or_else(|| OpenError(format!("layer {layer} has no experts")).into())
    }

    fn slices_bytes(&self) -> u64 {
        let held = self.layers.iter().flat_map(|layer| layer.slices.values());
        held.flat_map(|held| held.packed.values()).map(|expert| expert.bytes.len() as u64).sum()
    }

    /// Adds the output of these assignments to `sums` (`[rows, hidden]`, multiples of the layer's step).
    pub fn add(
        &mut self,
        layer: usize,
        x: Activations<'_>,
        assignments: &[Assignment],
        sums: &mut [i64],
    ) -> Result<(), HomeError> {
        self.add_slice(layer, whole_of(&self.model), (x, assignments), sums)
    }

    /// Adds what blocks `from..to` of these assignments' experts contribute to `sums`: over blocks that cover an expert,
    /// exactly what `add` adds for all of it.
    ///
    /// # Errors
    /// Blocks that the model's experts do not have; what cannot be loaded or computed.
    pub fn add_slice(
        &mut self,
        layer: usize,
        blocks: (u16, u16),
        (x, assignments): (Activations<'_>, &[Assignment]),
        sums: &mut [i64],
    ) -> Result<(), HomeError> {
        if assignments.is_empty() {
            return Ok(());
        }
        let experts = self.ready(layer, blocks, assignments.iter().map(|assignment| assignment.expert))?;
        experts.run(x, assignments, &mut self.partial)?;
        let hidden = x.inputs();
        for (row, partial) in self.partial.sums.chunks_exact(hidden).enumerate() {
            if !self.partial.overflowed[row] {
                let sums = &mut sums[row * hidden..][..hidden];
                sums.iter_mut().zip(partial).for_each(|(sum, part)| *sum += i64::from(*part));
            }
        }
        self.overflowed.clear();
        let overflowed = &self.partial.overflowed;
        self.overflowed.extend(assignments.iter().filter(|a| overflowed[a.row as usize]));
        if self.overflowed.is_empty() {
            return Ok(());
        }
        // Exact in i64: rows without overflow have no assignment left and add nothing.
        experts.run_wide(x, &self.overflowed, &mut self.wide)?;
        sums.iter_mut().zip(&self.wide).for_each(|(sum, part)| *sum += part);
        Ok(())
    }
}

impl Held {
    fn take_over(&mut self, model: &Model, kernels: &dyn Kernels, layer: usize) -> Result<(), HomeError> {
        let experts = self.packed.iter().map(|(index, expert)| (*index, expert.clone())).collect();
        self.runs = Some(kernels.experts(experts, model.step_log2(layer))?);
        Ok(())
    }
}

/// Most bytes of experts that a machine is measured on: beyond the caches of small machines, and read from a slow disk
/// in a second.
const SAMPLE_BYTES: u64 = 64 << 20;

/// How fast `kernels` compute experts of this model (`kernel::measure`), on a sample that is let go of afterwards; zeros
/// for a model without experts.
///
/// # Errors
/// What cannot be loaded or computed.
pub fn weight_mb_s(
    model: &Arc<Model>,
    kernels: &dyn Kernels,
) -> Result<[u32; measure::ROWS.len()], HomeError> {
    let config = &model.config;
    let expert_bytes = model.format.expert_bytes(config.hidden, config.moe.inter) as u64;
    let Some(layer) = config.moe_layers().next() else { return Ok([0; measure::ROWS.len()]) };
    let fit = (SAMPLE_BYTES / expert_bytes.max(1)).clamp(1, config.moe.experts.max(1) as u64);
    let experts = u16::try_from(fit).unwrap_or(u16::MAX);
    let sample = copied(model, layer, whole_of(model), &(0..experts).collect())?;
    let runs = kernels.experts(sample, model.step_log2(layer))?;
    let (format, hidden) = (model.format, config.hidden);
    Ok(measure::weight_mb_s(&Sample { runs: &*runs, experts, format, hidden, expert_bytes })?)
}

/// All blocks of the model's experts.
fn whole_of(model: &Model) -> (u16, u16) {
    // Configs whose experts are wider are refused when they are read.
    (0, u16::try_from(blocks(model.config.moe.inter)).unwrap_or(u16::MAX))
}

/// These blocks of these experts, in memory of their own.
fn copied(
    model: &Model,
    layer: usize,
    part: (u16, u16),
    experts: &BTreeSet<u16>,
) -> Result<Vec<(u16, PackedExpert)>, HomeError> {
    let absent = || {
        OpenError(format!("{} has no blocks {}..{} of experts in layer {layer}", model.name, part.0, part.1))
    };
    let width = slice_width(model.config.moe.inter, part).ok_or_else(absent)?;
    let number = u16::try_from(layer).map_err(|_| absent())?;
    let wanted: Vec<(u16, usize)> = experts.iter().map(|expert| (*expert, width)).collect();
    let write = |at: usize, out: &mut [u8]| model.write_slice((number, wanted[at].0), part, out);
    Ok(gather((model.format, model.config.hidden), &wanted, write)?)
}

#[cfg(test)]
mod tests;
