//! Routed experts computed in this process: all of them in `reference`, and on a router those that no node
//! holds or whose node does not answer.
//!
//! Experts are loaded the first time a row needs them, from the packed model, and stay. So a router that has
//! never lost a node holds none in memory, and one that has pays the price only for what was asked for. `load_all`
//! loads them in advance: where they are used all the time.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::activations::Activations;
use crate::kernel::measure::{self, Sample};
use crate::kernel::{Assignment, KernelError, Kernels, LayerExperts, PartialSums};
use crate::open::{Model, OpenError};
use crate::packed::{PackedExpert, gather};

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

#[derive(Debug, Default)]
struct HomeLayer {
    held: BTreeSet<u16>,
    packed: Vec<(u16, PackedExpert)>,
    loaded: Option<Arc<dyn LayerExperts>>,
}

impl Home {
    /// A home with no expert in it yet.
    pub fn new(model: Arc<Model>, kernels: Arc<dyn Kernels>, residency: Residency) -> Home {
        let layers = model.config.layers.iter().map(|_| HomeLayer::default()).collect();
        let (partial, wide, overflowed) = (PartialSums::default(), Vec::new(), Vec::new());
        Home { model, kernels, residency, layers, partial, wide, overflowed }
    }

    /// Bytes of experts in use so far.
    pub fn weight_bytes(&self) -> u64 {
        let sizes = self.layers.iter().flat_map(|layer| &layer.packed).map(|(_, e)| e.bytes.len() as u64);
        sizes.sum()
    }

    /// Bytes of all experts of the model.
    pub fn all_bytes(&self) -> u64 {
        let config = &self.model.config;
        let expert = self.model.format.expert_bytes(config.hidden, config.moe.inter) as u64;
        (config.moe_layers().count() * config.moe.experts) as u64 * expert
    }

    /// Loads every expert of every layer; `progress` gets bytes done and bytes in all.
    ///
    /// # Errors
    /// The first expert that cannot be had.
    pub fn load_all(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), HomeError> {
        let layers: Vec<usize> = self.model.config.moe_layers().collect();
        let (experts, all) = (self.model.config.moe.experts as u16, self.all_bytes());
        for (done, layer) in layers.iter().enumerate() {
            self.load(*layer, 0..experts)?;
            progress(all * (done as u64 + 1) / layers.len() as u64, all);
        }
        Ok(())
    }

    /// How fast this process computes its experts (`kernel::measure`), on those of the first layer that is loaded in
    /// full; zeros where none is.
    ///
    /// # Errors
    /// What the kernel refuses.
    pub fn weight_mb_s(&self) -> Result<[u32; measure::ROWS.len()], KernelError> {
        let config = &self.model.config;
        let full =
            self.layers.iter().find(|layer| layer.held.len() == config.moe.experts && layer.loaded.is_some());
        let Some(runs) = full.and_then(|layer| layer.loaded.as_deref()) else {
            return Ok([0; measure::ROWS.len()]);
        };
        measure::weight_mb_s(&Sample {
            runs,
            experts: config.moe.experts as u16,
            format: self.model.format,
            hidden: config.hidden,
            expert_bytes: self.model.format.expert_bytes(config.hidden, config.moe.inter) as u64,
        })
    }

    /// Makes sure that these experts of a layer are loaded.
    pub fn load(&mut self, layer: usize, experts: impl Iterator<Item = u16>) -> Result<(), HomeError> {
        let home = &mut self.layers[layer];
        if home.held.len() == self.model.config.moe.experts {
            return Ok(());
        }
        let missing: BTreeSet<u16> = experts.filter(|expert| !home.held.contains(expert)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let mut new = Vec::with_capacity(missing.len());
        for expert in &missing {
            new.push((*expert, self.model.expert(layer, usize::from(*expert))?));
        }
        if self.residency == Residency::Resident {
            gather(&mut new);
        }
        home.packed.extend(new);
        home.loaded = Some(self.kernels.experts(home.packed.clone(), self.model.step_log2(layer))?);
        home.held.extend(missing);
        Ok(())
    }

    /// Adds the output of these assignments to `sums` (`[rows, hidden]`, multiples of the layer's step).
    pub fn add(
        &mut self,
        layer: usize,
        x: Activations<'_>,
        assignments: &[Assignment],
        sums: &mut [i64],
    ) -> Result<(), HomeError> {
        if assignments.is_empty() {
            return Ok(());
        }
        self.load(layer, assignments.iter().map(|assignment| assignment.expert))?;
        let Some(experts) = &self.layers[layer].loaded else { return Ok(()) };
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
