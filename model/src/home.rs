//! Routed experts computed in this process: all of them in `reference`, and on a router those that no node
//! holds or whose node does not answer.
//!
//! Experts are loaded the first time a row needs them, from the packed model, and stay. So a router that has
//! never lost a node holds none in memory, and one that has pays the price only for what was asked for.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::activations::Activations;
use crate::kernel::{Assignment, KernelError, Kernels, LayerExperts, PartialSums};
use crate::open::{Model, OpenError};
use crate::packed::PackedExpert;
use crate::region::{Buffer, Bytes};

/// Experts begin at multiples of a cache line.
const LINE: usize = 64;

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

    /// Makes sure that these experts of a layer are loaded.
    pub fn load(&mut self, layer: usize, experts: impl Iterator<Item = u16>) -> Result<(), HomeError> {
        let home = &mut self.layers[layer];
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

/// Moves experts into one allocation: huge pages cover it all but its end, and each is streamed after the other.
fn gather(experts: &mut [(u16, PackedExpert)]) {
    let size = |expert: &PackedExpert| expert.bytes.len().next_multiple_of(LINE);
    let mut arena = Buffer::zeroed(experts.iter().map(|(_, expert)| size(expert)).sum());
    let mut at = 0;
    for (_, expert) in experts.iter() {
        arena[at..at + expert.bytes.len()].copy_from_slice(&expert.bytes);
        at += size(expert);
    }
    let arena = Bytes::from(arena);
    let mut at = 0;
    for (_, expert) in experts.iter_mut() {
        let (start, len) = (at, expert.bytes.len());
        at += size(expert);
        if let Some(bytes) = arena.slice(start, len) {
            expert.bytes = bytes;
        }
    }
}
