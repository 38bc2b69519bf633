//! The experts this process holds.
//!
//! The router orders placements by epoch and goes on using the last one until everybody has loaded the next, so
//! a node answers calls of two epochs. Experts are pure, so an expert that both contain is one copy in memory; what
//! differs per epoch is only which experts exist. Weights are copied out of the mapped model once, into arenas of
//! `ARENA_BYTES`: a mapped file is evicted under pressure, and thousands of single allocations would each be rounded
//! up to huge pages.
//!
//! Loading runs beside the worker; the table it reads is replaced as a whole at the end. The price: experts of
//! an arena are freed together, so after a re-placement up to one arena per layer is kept for the few experts of it
//! that stayed. Refuses placements of other models, unknown experts, and more than the memory it was given.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_wire::control::Placement;
use mesh_wire::id::ExpertKey;
use model::format::Format;
use model::kernel::{KernelError, Kernels, LayerExperts};
use model::open::{Model, OpenError};
use model::packed::{PackedExpert, gather};

/// Least bytes of one allocation of experts, unless the layer has fewer. Allocations are rounded up to huge pages of
/// 2 MB: at this size that wastes 1.5 % on average. A larger one would keep more memory for few experts.
pub const ARENA_BYTES: usize = 64 << 20;

/// What all experts of a model have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Format of the weights.
    pub format: Format,
    /// Width of a row.
    pub hidden: usize,
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// Layers that have experts, ascending.
    pub layers: Vec<u16>,
    /// Experts of each of them.
    pub experts: u16,
}

/// Where experts come from. `Model` is the one; tests have others.
pub trait Source: Send + Sync + std::fmt::Debug {
    /// What its experts have in common.
    fn shape(&self) -> Shape;

    /// BLAKE3 of the model's manifest.
    fn fingerprint(&self) -> [u8; 32];

    /// One expert, as a view or made now.
    ///
    /// # Errors
    /// Where there is no such expert, or its bytes cannot be read.
    fn expert(&self, key: ExpertKey) -> Result<PackedExpert, OpenError>;

    /// Combine step of a layer, as a power of two.
    fn step_log2(&self, layer: u16) -> i8;
}

impl Source for Model {
    fn shape(&self) -> Shape {
        let moe = &self.config.moe;
        Shape {
            format: self.format,
            hidden: self.config.hidden,
            expert_bytes: self.format.expert_bytes(self.config.hidden, moe.inter) as u64,
            // Configs with more layers or experts than fit are refused when they are read.
            layers: self.config.moe_layers().filter_map(|layer| u16::try_from(layer).ok()).collect(),
            experts: u16::try_from(moe.experts).unwrap_or(u16::MAX),
        }
    }

    fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    fn expert(&self, key: ExpertKey) -> Result<PackedExpert, OpenError> {
        Model::expert(self, usize::from(key.layer), usize::from(key.expert))
    }

    fn step_log2(&self, layer: u16) -> i8 {
        Model::step_log2(self, usize::from(layer))
    }
}

/// Why a placement is refused. The message goes to the router's operator.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// It is about another model.
    #[error("the placement is for another model: start router and node with the same --model and --weights")]
    Model,
    /// It does not fit.
    #[error(
        "{experts} experts need {needed} bytes of memory, allowed are {allowed}: start the node with more --memory"
    )]
    Memory {
        /// Experts of the placement.
        experts: usize,
        /// Bytes they take.
        needed: u64,
        /// Bytes the node may spend.
        allowed: u64,
    },
    /// An expert could not be read.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The kernels do not take them.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The process is ending.
    #[error("the node is shutting down")]
    Ending,
}

/// Why a call finds no experts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// It carries an epoch that is not held.
    #[error("epoch {wanted} is not held here (held: {held:?})")]
    Epoch {
        /// The call's.
        wanted: u64,
        /// Those that are.
        held: Vec<u64>,
    },
    /// No expert of the layer is held.
    #[error("no expert of layer {0} is held here")]
    Layer(u16),
    /// The layer is held, but not this expert.
    #[error("expert {} of layer {} is not held here", .0.expert, .0.layer)]
    Expert(ExpertKey),
}

/// Experts done, experts of the placement.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

type Layers = BTreeMap<u16, Layer>;

/// Experts that the next epoch takes over from the last, by layer.
type Shared = BTreeMap<u16, SharedLayer>;

#[derive(Debug)]
struct SharedLayer {
    experts: Vec<(u16, PackedExpert)>,
    /// Set where both epochs hold the same experts of the layer.
    runs: Option<Arc<dyn LayerExperts>>,
}

/// One layer of one epoch.
#[derive(Clone, Debug)]
struct Layer {
    /// What was loaded, to be shared with the next epoch; ascending.
    experts: Vec<(u16, PackedExpert)>,
    runs: Arc<dyn LayerExperts>,
}

#[derive(Debug)]
struct Epoch {
    epoch: u64,
    layers: Layers,
}

impl Epoch {
    fn experts(&self) -> impl Iterator<Item = (ExpertKey, &PackedExpert)> {
        self.layers.iter().flat_map(|(layer, held)| {
            held.experts.iter().map(|(expert, packed)| (ExpertKey { layer: *layer, expert: *expert }, packed))
        })
    }
}

/// The experts of up to two epochs.
#[derive(Debug)]
pub struct Shard {
    source: Arc<dyn Source>,
    kernels: Arc<dyn Kernels>,
    memory_bytes: u64,
    /// Newest last. The lock is held for a look-up or an exchange, never while loading.
    held: Mutex<Vec<Arc<Epoch>>>,
    /// One load at a time.
    loading: Mutex<()>,
    ending: AtomicBool,
}

impl Shard {
    /// Holds nothing yet; will hold at most `memory_bytes` of experts.
    pub fn new(source: Arc<dyn Source>, kernels: Arc<dyn Kernels>, memory_bytes: u64) -> Shard {
        Shard {
            source,
            kernels,
            memory_bytes,
            held: Mutex::default(),
            loading: Mutex::default(),
            ending: AtomicBool::new(false),
        }
    }

    /// What all experts of the model have in common.
    pub fn shape(&self) -> Shape {
        self.source.shape()
    }

    /// Newest epoch that is held, 0 for none.
    pub fn epoch(&self) -> u64 {
        self.lock().last().map_or(0, |epoch| epoch.epoch)
    }

    /// Bytes of all experts that are held, those that epochs share counted once.
    pub fn weight_bytes(&self) -> u64 {
        let held = self.lock().clone();
        let all: BTreeMap<_, _> = held.iter().flat_map(|epoch| epoch.experts()).collect();
        all.values().map(|packed| packed.bytes.len() as u64).sum()
    }

    /// The experts of `layer` under `epoch`, which hold all of `experts`.
    ///
    /// # Errors
    /// `Missing` names the epoch or the first expert that is not held.
    pub fn layer(
        &self,
        epoch: u64,
        layer: u16,
        experts: impl IntoIterator<Item = u16>,
    ) -> Result<Arc<dyn LayerExperts>, Missing> {
        let runs = {
            let held = self.lock();
            let Some(found) = held.iter().find(|held| held.epoch == epoch) else {
                let held = held.iter().map(|held| held.epoch).collect();
                return Err(Missing::Epoch { wanted: epoch, held });
            };
            found.layers.get(&layer).map(|layer| Arc::clone(&layer.runs)).ok_or(Missing::Layer(layer))?
        };
        let absent = experts.into_iter().find(|expert| !runs.holds(*expert));
        absent.map_or(Ok(runs), |expert| Err(Missing::Expert(ExpertKey { layer, expert })))
    }

    /// Loads a placement and serves it beside the newest one that was held; older ones are let go of. Returns the
    /// bytes of weights then in memory. Takes as long as reading the new experts does.
    ///
    /// # Errors
    /// `PlaceError`; then the newest epoch that was held is held still, unless it had to make room.
    pub fn place(&self, placement: &Placement, progress: Progress<'_>) -> Result<u64, PlaceError> {
        let _one = self.loading.lock().unwrap_or_else(PoisonError::into_inner);
        if placement.model != self.source.fingerprint() {
            return Err(PlaceError::Model);
        }
        if self.holds(placement) {
            return Ok(self.weight_bytes());
        }
        let needed = self.needed(placement)?;
        let wanted = by_layer(placement);
        let shared = self.make_room(placement.epoch, &wanted, needed);
        let layers = self.load(&wanted, shared, progress)?;
        self.lock().push(Arc::new(Epoch { epoch: placement.epoch, layers }));
        Ok(self.weight_bytes())
    }

    /// Makes a load that is going on end soon, with `PlaceError::Ending`.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Whether it is held already, to the last expert.
    fn holds(&self, placement: &Placement) -> bool {
        let held = self.lock().clone();
        let found = held.iter().find(|held| held.epoch == placement.epoch);
        found.is_some_and(|epoch| {
            placement.experts.iter().map(|slice| slice.key).eq(epoch.experts().map(|(key, _)| key))
        })
    }

    /// Bytes of the placement's experts, which must be within the memory.
    fn needed(&self, placement: &Placement) -> Result<u64, PlaceError> {
        let experts = placement.experts.len();
        let needed = self.source.shape().expert_bytes.saturating_mul(experts as u64);
        if needed > self.memory_bytes {
            return Err(PlaceError::Memory { experts, needed, allowed: self.memory_bytes });
        }
        Ok(needed)
    }

    /// Lets go of all but the newest epoch, and of that too if it does not fit beside the placement: its calls
    /// are refused then, and the router computes them until this placement is loaded. Returns what of it the
    /// placement wants as well.
    fn make_room(&self, epoch: u64, wanted: &Wanted, needed: u64) -> Shared {
        let mut held = self.lock();
        let newest = held.pop().filter(|newest| newest.epoch != epoch);
        held.clear();
        let Some(newest) = newest else { return Shared::new() };
        let mut shared = Shared::new();
        let mut alone = 0;
        for (layer, old) in &newest.layers {
            let new = wanted.get(layer).map_or(&[][..], Vec::as_slice);
            let (both, rest): (Vec<_>, Vec<_>) =
                old.experts.iter().cloned().partition(|(expert, _)| new.binary_search(expert).is_ok());
            alone += rest.iter().map(|(_, packed)| packed.bytes.len() as u64).sum::<u64>();
            let same = rest.is_empty() && both.len() == new.len();
            let runs = same.then(|| Arc::clone(&old.runs));
            shared.insert(*layer, SharedLayer { experts: both, runs });
        }
        if needed.saturating_add(alone) <= self.memory_bytes {
            held.push(newest);
        } else {
            tracing::warn!(
                epoch = newest.epoch,
                "no memory for two placements at once: the old one ends now"
            );
        }
        shared
    }

    /// All layers of a placement: shared ones as they are, the rest from the source.
    fn load(
        &self,
        wanted: &Wanted,
        mut shared: Shared,
        progress: Progress<'_>,
    ) -> Result<Layers, PlaceError> {
        let total: usize = wanted.values().map(Vec::len).sum();
        let mut done = 0;
        let mut layers = Layers::new();
        for (layer, wanted) in wanted {
            let (mut experts, runs) = match shared.remove(layer) {
                Some(shared) => (shared.experts, shared.runs),
                None => (Vec::new(), None),
            };
            let held = |expert: &u16| experts.binary_search_by_key(expert, |(expert, _)| *expert).is_ok();
            let fresh: Vec<_> = wanted.iter().copied().filter(|expert| !held(expert)).collect();
            done += experts.len();
            let mut loaded = |more: usize| {
                done += more;
                progress(done as u64, total as u64);
            };
            experts.extend(self.read(*layer, &fresh, &mut loaded)?);
            experts.sort_by_key(|(expert, _)| *expert);
            let runs = match runs {
                Some(runs) => runs,
                None => self.kernels.experts(experts.clone(), self.source.step_log2(*layer))?,
            };
            layers.insert(*layer, Layer { experts, runs });
        }
        Ok(layers)
    }

    /// Copies experts of a layer into arenas.
    fn read(
        &self,
        layer: u16,
        experts: &[u16],
        loaded: &mut dyn FnMut(usize),
    ) -> Result<Vec<(u16, PackedExpert)>, PlaceError> {
        let mut resident = Vec::with_capacity(experts.len());
        let mut arena: Vec<(u16, PackedExpert)> = Vec::new();
        let mut arena_bytes = 0;
        for (index, expert) in experts.iter().enumerate() {
            if self.ending.load(Ordering::Relaxed) {
                return Err(PlaceError::Ending);
            }
            let packed = self.source.expert(ExpertKey { layer, expert: *expert })?;
            arena_bytes += packed.bytes.len();
            arena.push((*expert, packed));
            if arena_bytes >= ARENA_BYTES || index + 1 == experts.len() {
                loaded(arena.len());
                gather(&mut arena);
                arena_bytes = 0;
                resident.append(&mut arena);
            }
        }
        Ok(resident)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Epoch>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Experts of a placement by layer, ascending.
type Wanted = BTreeMap<u16, Vec<u16>>;

fn by_layer(placement: &Placement) -> Wanted {
    let mut wanted = Wanted::new();
    for slice in &placement.experts {
        wanted.entry(slice.key.layer).or_default().push(slice.key.expert);
    }
    wanted
}

#[cfg(test)]
mod tests;
