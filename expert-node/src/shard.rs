//! The experts this process holds, whole or in slices.
//!
//! The router orders placements by epoch and goes on using the last one until everybody has loaded the next, so
//! a node answers calls of two epochs. Experts are pure, so what both contain is one copy in memory; what
//! differs per epoch is only which experts exist. Weights are copied out of the mapped model once, into arenas of
//! `ARENA_BYTES`: a mapped file is evicted under pressure, and thousands of single allocations would each be rounded
//! up to huge pages. A slice that lies within what the last epoch held of its expert is cut from that, without a disk.
//!
//! Loading runs beside the worker; the table it reads is replaced as a whole at the end. The price: experts of
//! an arena are freed together, so after a re-placement up to one arena per layer is kept for the few experts of it
//! that stayed. Refuses placements of other models, unknown experts and blocks, and more than the memory it was given.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mesh_wire::control::Placement;
use mesh_wire::id::{ExpertKey, Slice};
use model::format::{Format, slice_width};
use model::kernel::{KernelError, Kernels, LayerExperts};
use model::open::{Model, OpenError};
use model::packed::PackedExpert;
use model::packed::slice::gather;

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
    /// Intermediate values of a whole expert.
    pub inter: usize,
    /// Bytes of one expert.
    pub expert_bytes: u64,
    /// Layers that have experts, ascending.
    pub layers: Vec<u16>,
    /// Experts of each of them.
    pub experts: u16,
}

impl Shape {
    /// Intermediate values of a slice; `None` where the model has no such expert or blocks.
    pub fn width(&self, slice: &Slice) -> Option<usize> {
        let known = self.layers.binary_search(&slice.key.layer).is_ok() && slice.key.expert < self.experts;
        slice_width(self.inter, (slice.from, slice.to)).filter(|_| known)
    }

    /// Bytes of an expert that is `width` wide.
    pub fn bytes(&self, width: usize) -> u64 {
        self.format.expert_bytes(self.hidden, width) as u64
    }
}

/// How far a source is with fetching experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fetching {
    /// Experts that are here, of those that were missing.
    pub experts: (u64, u64),
    /// Bytes that are here, of those that were missing.
    pub bytes: (u64, u64),
    /// Bytes that came from the router since the process started.
    pub router_bytes: u64,
    /// Bytes that came from other nodes since then.
    pub peer_bytes: u64,
}

/// Where experts come from: a `Model` on this machine, or one that is fetched (`remote`).
pub trait Source: Send + Sync + std::fmt::Debug {
    /// What its experts have in common.
    fn shape(&self) -> Shape;

    /// BLAKE3 of the model's manifest.
    fn fingerprint(&self) -> [u8; 32];

    /// Writes the packed bytes of an expert or a slice of one to `out`, which has their length.
    ///
    /// # Errors
    /// Where there is no such expert, or its bytes cannot be read.
    fn read(&self, slice: Slice, out: &mut [u8]) -> Result<(), OpenError>;

    /// Combine step of a layer, as a power of two.
    fn step_log2(&self, layer: u16) -> i8;

    /// Makes ready to read `fresh`, which are those of a placement of `wanted` that are not in memory. May take long;
    /// ends soon once `ending` is set.
    ///
    /// # Errors
    /// Where that cannot be.
    fn prepare(&self, wanted: &[Slice], fresh: &[Slice], ending: &AtomicBool) -> Result<(), OpenError> {
        let _ = (wanted, fresh, ending);
        Ok(())
    }

    /// What `prepare` or `read` is fetching at the moment.
    fn fetching(&self) -> Option<Fetching> {
        None
    }

    /// Writes something that takes kernels as long as the packed bytes of this slice do: by it the machine is measured.
    ///
    /// # Errors
    /// As `read`.
    fn sample(&self, slice: Slice, out: &mut [u8]) -> Result<(), OpenError> {
        self.read(slice, out)
    }
}

impl Source for Model {
    fn shape(&self) -> Shape {
        let moe = &self.config.moe;
        Shape {
            format: self.format,
            hidden: self.config.hidden,
            inter: moe.inter,
            expert_bytes: self.format.expert_bytes(self.config.hidden, moe.inter) as u64,
            // Configs with more layers or experts than fit are refused when they are read.
            layers: self.config.moe_layers().filter_map(|layer| u16::try_from(layer).ok()).collect(),
            experts: u16::try_from(moe.experts).unwrap_or(u16::MAX),
        }
    }

    fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    fn read(&self, slice: Slice, out: &mut [u8]) -> Result<(), OpenError> {
        self.write_slice((slice.key.layer, slice.key.expert), (slice.from, slice.to), out)
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
    /// It has something that this model has not.
    #[error("the model has no blocks {}..{} of expert {} in layer {}: start router and node with the same version", .0.from, .0.to, .0.key.expert, .0.key.layer)]
    Unknown(Slice),
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

/// What the next epoch takes over from the last, by layer.
type Shared = BTreeMap<u16, SharedLayer>;

#[derive(Debug)]
struct SharedLayer {
    /// Held as it is wanted.
    pieces: Vec<Piece>,
    /// Held, and wanted in part: to be cut from.
    larger: Vec<Piece>,
    /// Set where both epochs hold the same of the layer.
    runs: Option<Arc<dyn LayerExperts>>,
}

/// An expert of some layer, or a slice of one.
#[derive(Clone, Debug)]
struct Piece {
    slice: Slice,
    packed: PackedExpert,
}

impl Piece {
    /// Whether `slice` is a part of it.
    fn covers(&self, slice: &Slice) -> bool {
        self.slice.key == slice.key && self.slice.from <= slice.from && slice.to <= self.slice.to
    }
}

/// One layer of one epoch.
#[derive(Clone, Debug)]
struct Layer {
    /// What was loaded, to be shared with the next epoch; ascending.
    pieces: Vec<Piece>,
    runs: Arc<dyn LayerExperts>,
}

#[derive(Debug)]
struct Epoch {
    epoch: u64,
    layers: Layers,
}

impl Epoch {
    fn pieces(&self) -> impl Iterator<Item = &Piece> {
        self.layers.values().flat_map(|layer| &layer.pieces)
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
        let pieces = held.iter().flat_map(|epoch| epoch.pieces());
        let all: BTreeMap<Slice, usize> =
            pieces.map(|piece| (piece.slice, piece.packed.bytes.len())).collect();
        all.values().map(|bytes| *bytes as u64).sum()
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
            // The router goes back to it: what is newer was given up, and would be in the way of what comes next.
            self.lock().retain(|held| held.epoch <= placement.epoch);
            return Ok(self.weight_bytes());
        }
        let needed = self.needed(placement)?;
        // While calls of the epochs that are held go on.
        self.source.prepare(&placement.experts, &self.fresh(placement), &self.ending)?;
        if self.ending.load(Ordering::Relaxed) {
            return Err(PlaceError::Ending);
        }
        let wanted = by_layer(placement);
        let shared = self.make_room(placement.epoch, &wanted, needed);
        let layers = self.load(&wanted, shared, progress)?;
        self.lock().push(Arc::new(Epoch { epoch: placement.epoch, layers }));
        Ok(self.weight_bytes())
    }

    /// What the source is fetching at the moment.
    pub fn fetching(&self) -> Option<Fetching> {
        self.source.fetching()
    }

    /// What of a placement cannot be taken, or cut, from what the newest epoch has in memory.
    fn fresh(&self, placement: &Placement) -> Vec<Slice> {
        let newest = self.lock().last().cloned();
        let held = |slice: &Slice| {
            let newest = newest.as_ref().filter(|newest| newest.epoch != placement.epoch);
            let layer = newest.and_then(|newest| newest.layers.get(&slice.key.layer));
            layer.is_some_and(|layer| layer.pieces.iter().any(|piece| piece.covers(slice)))
        };
        placement.experts.iter().copied().filter(|slice| !held(slice)).collect()
    }

    /// Makes a load that is going on end soon, with `PlaceError::Ending`.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Relaxed);
    }

    /// Whether it is held already, to the last expert.
    fn holds(&self, placement: &Placement) -> bool {
        let held = self.lock().clone();
        let found = held.iter().find(|held| held.epoch == placement.epoch);
        found.is_some_and(|epoch| placement.experts.iter().eq(epoch.pieces().map(|piece| &piece.slice)))
    }

    /// Bytes of the placement's experts, which must exist and be within the memory.
    fn needed(&self, placement: &Placement) -> Result<u64, PlaceError> {
        let shape = self.source.shape();
        let bytes = |slice: &Slice| Ok(shape.bytes(shape.width(slice).ok_or(PlaceError::Unknown(*slice))?));
        let needed = placement.experts.iter().map(bytes).sum::<Result<u64, PlaceError>>()?;
        if needed > self.memory_bytes {
            let experts = placement.experts.len();
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
            let is_wanted = |piece: &Piece| new.binary_search(&piece.slice).is_ok();
            let (pieces, rest): (Vec<_>, Vec<_>) = old.pieces.iter().cloned().partition(is_wanted);
            alone += rest.iter().map(|piece| piece.packed.bytes.len() as u64).sum::<u64>();
            let same = rest.is_empty() && pieces.len() == new.len();
            let runs = same.then(|| Arc::clone(&old.runs));
            let larger =
                rest.into_iter().filter(|piece| new.iter().any(|slice| piece.covers(slice))).collect();
            shared.insert(*layer, SharedLayer { pieces, larger, runs });
        }
        if needed.saturating_add(alone) <= self.memory_bytes {
            held.push(newest);
        } else {
            tracing::warn!(
                epoch = newest.epoch,
                "no memory for two placements at once: the old one ends now"
            );
            // What is held only to be cut from would be in memory beside its part: that is read instead.
            shared.values_mut().for_each(|layer| layer.larger.clear());
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
            let (mut pieces, larger, runs) = match shared.remove(layer) {
                Some(SharedLayer { pieces, larger, runs }) => (pieces, larger, runs),
                None => (Vec::new(), Vec::new(), None),
            };
            let held = |slice: &Slice| pieces.binary_search_by_key(slice, |piece| piece.slice).is_ok();
            let fresh: Vec<_> = wanted.iter().copied().filter(|slice| !held(slice)).collect();
            done += pieces.len();
            let mut loaded = |more: usize| {
                done += more;
                progress(done as u64, total as u64);
            };
            pieces.extend(self.read(&fresh, &larger, &mut loaded)?);
            pieces.sort_by_key(|piece| piece.slice);
            let runs = match runs {
                Some(runs) => runs,
                None => {
                    let experts = pieces.iter().map(|piece| (piece.slice.key.expert, piece.packed.clone()));
                    self.kernels.experts(experts.collect(), self.source.step_log2(*layer))?
                }
            };
            layers.insert(*layer, Layer { pieces, runs });
        }
        Ok(layers)
    }

    /// Copies experts of a layer into arenas: from those of `held` that contain them, else from the source.
    fn read(
        &self,
        slices: &[Slice],
        held: &[Piece],
        loaded: &mut dyn FnMut(usize),
    ) -> Result<Vec<Piece>, PlaceError> {
        let shape = self.source.shape();
        let mut resident = Vec::with_capacity(slices.len());
        let mut rest = slices;
        while !rest.is_empty() {
            let mut bytes = 0;
            let begins = |slice: &&Slice| {
                let room = bytes < ARENA_BYTES as u64;
                bytes += shape.width(slice).map_or(0, |width| shape.bytes(width));
                room
            };
            let (arena, after) = rest.split_at(rest.iter().take_while(begins).count());
            rest = after;
            let widths = arena
                .iter()
                .map(|slice| Ok((slice.key.expert, shape.width(slice).ok_or(PlaceError::Unknown(*slice))?)));
            let widths = widths.collect::<Result<Vec<_>, PlaceError>>()?;
            let write = |at: usize, out: &mut [u8]| {
                if self.ending.load(Ordering::Relaxed) {
                    return Err(PlaceError::Ending);
                }
                let slice = arena[at];
                let larger = held.iter().find(|piece| piece.covers(&slice));
                let cut = |piece: &Piece| {
                    let first = piece.slice.from;
                    piece.packed.write_slice((slice.from - first, slice.to - first), out)
                };
                if larger.and_then(cut).is_some() { Ok(()) } else { Ok(self.source.read(slice, out)?) }
            };
            let packed = gather((shape.format, shape.hidden), &widths, write)?;
            loaded(arena.len());
            resident
                .extend(arena.iter().zip(packed).map(|(slice, (_, packed))| Piece { slice: *slice, packed }));
        }
        Ok(resident)
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Epoch>>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Slices of a placement by layer, ascending.
type Wanted = BTreeMap<u16, Vec<Slice>>;

fn by_layer(placement: &Placement) -> Wanted {
    let mut wanted = Wanted::new();
    for slice in &placement.experts {
        wanted.entry(slice.key.layer).or_default().push(*slice);
    }
    wanted
}

#[cfg(test)]
mod tests;
