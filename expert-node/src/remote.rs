//! A model that is not on this machine: the router says what it is, experts are fetched when a placement wants them.
//!
//! Before a placement is loaded, what of it is neither in memory nor in the store is fetched, several at a time, while
//! the node goes on serving what it holds; reading then takes it from the store. A stored expert that turns out damaged
//! is fetched again on the spot. A slice is fetched as such: the router says its hash and makes its bytes, so a node that
//! holds an eighth of every expert needs an eighth of the bytes on its disk and on the wire. The price: the hash of a
//! slice is the router's word at that moment, where that of a whole expert is in the manifest, and a node whose slice
//! changes fetches the new one whole unless it can be cut from what is in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mesh_net::borrower::BorrowError;
use mesh_wire::frame::ASKED_SLICES_MAX;
use mesh_wire::id::{ExpertKey, Slice};
use mesh_wire::weights::{Catalogue, Hash};
use model::config::parse::limits::MAX_INTER;
use model::format::Format;
use model::kernel::measure;
use model::open::OpenError;

use crate::fetch::{Counts, FetchError, Supply, Tools, Wanted, fetch_all, name};
use crate::shard::{Fetching, Shape, Source};
use crate::store::Store;

/// Layers and experts of a catalogue together: as many as a placement may list.
const EXPERTS_MAX: usize = mesh_wire::frame::PLACED_EXPERTS_MAX;

/// Bytes of experts whose slices are asked about at a time: a router that says the hash of a slice first reads all of the
/// expert, at 35 MB/s as many within the minute that it is waited for.
const HASHED_BYTES_MAX: u64 = 2 << 30;

/// See the module.
#[derive(Debug)]
pub struct Remote {
    name: String,
    shape: Shape,
    fingerprint: Hash,
    steps_log2: BTreeMap<u16, i8>,
    supply: Arc<dyn Supply>,
    store: Arc<Store>,
    /// What the router has said.
    hashes: Mutex<BTreeMap<Slice, Hash>>,
    counts: Counts,
}

impl Remote {
    /// The model of this catalogue, whose experts `supply` has and `store` keeps.
    ///
    /// # Errors
    /// Where no model is like that.
    pub fn new(
        catalogue: Catalogue,
        supply: Arc<dyn Supply>,
        store: Arc<Store>,
    ) -> Result<Remote, OpenError> {
        let newer = || {
            let code = catalogue.format;
            OpenError(format!("the router's weights have the unknown format {code}; update this machine"))
        };
        let format = Format::from_code(catalogue.format).ok_or_else(newer)?;
        let (hidden, inter) = (catalogue.hidden as usize, catalogue.inter as usize);
        let experts = usize::from(catalogue.experts) * catalogue.layers.len();
        if inter > MAX_INTER || experts > EXPERTS_MAX {
            return Err(OpenError(format!(
                "the router's model has {experts} experts {inter} wide, which no node can hold; update this machine"
            )));
        }
        let shape = Shape {
            format,
            hidden,
            inter,
            expert_bytes: format.expert_bytes(hidden, inter) as u64,
            layers: catalogue.layers.iter().map(|(layer, _)| *layer).collect(),
            experts: catalogue.experts,
        };
        Ok(Remote {
            name: catalogue.name,
            shape,
            fingerprint: catalogue.fingerprint,
            steps_log2: catalogue.layers.into_iter().collect(),
            supply,
            store,
            hashes: Mutex::default(),
            counts: Counts::default(),
        })
    }

    /// What the router calls the model.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What was fetched so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Hashes of these, in their order: those that are known, and the others as the router says.
    fn hashes(&self, slices: &[Slice]) -> Result<Vec<Hash>, OpenError> {
        let unknown: Vec<Slice> = {
            let known = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
            slices.iter().copied().filter(|slice| !known.contains_key(slice)).collect()
        };
        let at_once = (HASHED_BYTES_MAX / self.shape.expert_bytes.max(1)).clamp(1, ASKED_SLICES_MAX as u64);
        for asked in unknown.chunks(at_once as usize) {
            let said = self.supply.hashes(asked).map_err(|error| {
                OpenError(format!("the router does not say the hashes of the experts to hold: {error}"))
            })?;
            let mut known = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
            known.extend(asked.iter().copied().zip(said));
        }
        let known = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        let absent = |slice: &Slice| OpenError(format!("the router has said no hash of {}", name(slice)));
        slices.iter().map(|slice| known.get(slice).copied().ok_or_else(|| absent(slice))).collect()
    }

    fn bytes(&self, slice: &Slice) -> u64 {
        self.shape.width(slice).map_or(0, |width| self.shape.bytes(width))
    }

    /// What of these is not in the store, each hash once, and who else has it.
    fn missing(&self, slices: &[Slice]) -> Result<Vec<Wanted>, OpenError> {
        let hashes = self.hashes(slices)?;
        let mut missing: BTreeMap<Hash, Slice> = BTreeMap::new();
        for (slice, hash) in slices.iter().zip(hashes) {
            if !self.store.holds(&hash, self.bytes(slice)) {
                missing.entry(hash).or_insert(*slice);
            }
        }
        let mut wanted: Vec<Wanted> = missing
            .into_iter()
            .map(|(hash, slice)| Wanted { slice, hash, bytes: self.bytes(&slice), holders: Vec::new() })
            .collect();
        // In the order in which they are loaded.
        wanted.sort_by_key(|one| one.slice);
        for some in wanted.chunks_mut(ASKED_SLICES_MAX) {
            let asked: Vec<Slice> = some.iter().map(|one| one.slice).collect();
            match self.supply.holders(&asked) {
                Ok(holders) => some
                    .iter_mut()
                    .enumerate()
                    .for_each(|(position, one)| one.holders = holders.holders_of(position).collect()),
                // The router has everything itself.
                Err(error) => tracing::debug!(%error, "who else has the experts is not known"),
            }
        }
        Ok(wanted)
    }

    fn fetch(&self, wanted: Vec<Wanted>, ending: &AtomicBool) -> Result<(), OpenError> {
        if wanted.is_empty() {
            return Ok(());
        }
        let experts = wanted.len();
        let bytes: u64 = wanted.iter().map(|one| one.bytes).sum();
        tracing::info!(experts, bytes, "fetching experts");
        let tools = Tools { supply: &*self.supply, store: &self.store, ending, counts: &self.counts };
        let fetched = fetch_all(tools, wanted);
        self.supply.rest();
        match &fetched {
            Ok(()) => tracing::info!(experts, bytes, "fetched experts"),
            Err(FetchError::Router { error: BorrowError::Revoked, .. }) | Err(FetchError::Ending) => {}
            Err(error) => tracing::error!("{error}"),
        }
        fetched.map_err(|error| OpenError(error.to_string()))
    }
}

impl Source for Remote {
    fn shape(&self) -> Shape {
        self.shape.clone()
    }

    fn fingerprint(&self) -> [u8; 32] {
        self.fingerprint
    }

    /// From the store; what is damaged there or not there is fetched first.
    fn read(&self, slice: Slice, out: &mut [u8]) -> Result<(), OpenError> {
        let failed = |error: crate::store::StoreError| OpenError(error.to_string());
        let hash = *self.hashes(&[slice])?.first().unwrap_or(&[0; 32]);
        if self.store.read(&hash, out).map_err(failed)? {
            return Ok(());
        }
        let wanted = self.missing(&[slice])?;
        // It takes the place of the damaged one.
        self.store.make_room(&wanted.iter().map(|one| (one.hash, one.bytes)).collect()).map_err(failed)?;
        self.fetch(wanted, &AtomicBool::new(false))?;
        if self.store.read(&hash, out).map_err(failed)? {
            return Ok(());
        }
        let path = self.store.path().display();
        Err(OpenError(format!(
            "{} is damaged again as soon as it is stored: is the disk of {path} failing?",
            name(&slice)
        )))
    }

    fn step_log2(&self, layer: u16) -> i8 {
        self.steps_log2.get(&layer).copied().unwrap_or(0)
    }

    fn prepare(&self, wanted: &[Slice], fresh: &[Slice], ending: &AtomicBool) -> Result<(), OpenError> {
        let hashes = self.hashes(wanted)?;
        let room = hashes.into_iter().zip(wanted.iter().map(|slice| self.bytes(slice)));
        let fresh: BTreeSet<Slice> = fresh.iter().copied().collect();
        // What is in memory needs no disk, but stays where it is on disk, for the next start.
        let held = wanted
            .iter()
            .zip(room)
            .filter(|(slice, (hash, bytes))| fresh.contains(*slice) || self.store.holds(hash, *bytes));
        let room = held.map(|(_, blob)| blob).collect();
        self.store.make_room(&room).map_err(|error| OpenError(error.to_string()))?;
        let fresh: Vec<Slice> = fresh.into_iter().collect();
        self.fetch(self.missing(&fresh)?, ending)
    }

    fn fetching(&self) -> Option<Fetching> {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counts { experts_done, experts_total, bytes_done, bytes_total, .. } = &self.counts;
        self.counts.busy.load(Ordering::Relaxed).then(|| Fetching {
            experts: (load(experts_done), load(experts_total)),
            bytes: (load(bytes_done), load(bytes_total)),
            router_bytes: load(&self.counts.router_bytes),
            peer_bytes: load(&self.counts.peer_bytes),
        })
    }

    /// Bytes that kernels take as long for: there are no weights yet.
    fn sample(&self, slice: Slice, out: &mut [u8]) -> Result<(), OpenError> {
        let ExpertKey { layer, expert } = slice.key;
        measure::fill(self.shape.format, u64::from(layer) << 16 | u64::from(expert), out);
        Ok(())
    }
}

#[cfg(test)]
mod tests;
