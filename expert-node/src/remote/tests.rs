//! A model that comes from somewhere else, as the shard sees it.

use std::time::Duration;

use mesh_net::exchange::Origin;
use mesh_wire::control::Placement;
use mesh_wire::weights::{Fetch, Holders};

use super::*;
use crate::fetch::Chunks;
use crate::fixture::{FINGERPRINT, FakeKernels, HIDDEN, WIDE, key, wide_expert};
use crate::shard::Shard;

/// The router: experts of `wide_expert`, 0 to 7 of layers 1 and 3.
#[derive(Debug, Default)]
struct Router {
    fetched: Mutex<Vec<Slice>>,
    asked: Mutex<Vec<usize>>,
    down: AtomicBool,
}

struct All(Option<Vec<u8>>);

impl Chunks for All {
    fn next(&mut self, out: &mut Vec<u8>) -> Result<bool, BorrowError> {
        *out = self.0.take().unwrap_or_default();
        Ok(!out.is_empty())
    }
}

fn bytes_of(slice: &Slice) -> Vec<u8> {
    wide_expert(slice.key).slice(slice.from, slice.to).unwrap().bytes.to_vec()
}

impl Supply for Router {
    fn hashes(&self, slices: &[Slice]) -> Result<Vec<Hash>, BorrowError> {
        if self.down.load(Ordering::Relaxed) {
            return Err(BorrowError::Gone("the router cannot be reached".into()));
        }
        self.asked.lock().unwrap().push(slices.len());
        Ok(slices.iter().map(|slice| *blake3::hash(&bytes_of(slice)).as_bytes()).collect())
    }

    fn holders(&self, _: &[Slice]) -> Result<Holders, BorrowError> {
        Err(BorrowError::Gone("it does not say".into()))
    }

    fn order(&self, origin: Origin, fetch: Fetch, bytes: u64) -> Result<Box<dyn Chunks>, BorrowError> {
        assert_eq!(origin, Origin::Router);
        self.fetched.lock().unwrap().push(fetch.slice);
        let all = bytes_of(&fetch.slice);
        assert_eq!(all.len() as u64, bytes);
        Ok(Box::new(All(Some(all[fetch.from as usize..].to_vec()))))
    }

    fn pause(&self, _: Duration) {}

    fn rest(&self) {}
}

fn catalogue() -> Catalogue {
    Catalogue {
        fingerprint: FINGERPRINT,
        name: "wide".into(),
        format: Format::Q8 as u8,
        hidden: HIDDEN as u32,
        inter: WIDE as u32,
        experts: 8,
        layers: vec![(1, -5), (3, -6)],
    }
}

struct Setup {
    router: Arc<Router>,
    remote: Arc<Remote>,
    shard: Shard,
    folder: tempfile::TempDir,
}

impl Setup {
    fn new(folder: tempfile::TempDir, memory_bytes: u64, quota: Option<u64>) -> Setup {
        let router = Arc::<Router>::default();
        let store = Arc::new(Store::open(&folder.path().join("store"), quota).unwrap());
        let supply = Arc::<Router>::clone(&router);
        let remote = Arc::new(Remote::new(catalogue(), supply, store).unwrap());
        let source = Arc::<Remote>::clone(&remote);
        let shard = Shard::new(source, Arc::new(FakeKernels::default()), memory_bytes);
        Setup { router, remote, shard, folder }
    }

    /// The same disk after a restart.
    fn again(self) -> Setup {
        let Setup { folder, shard, remote, .. } = self;
        drop((shard, remote));
        Setup::new(folder, u64::MAX, None)
    }

    fn place(&self, epoch: u64, experts: &[Slice]) -> Result<u64, String> {
        let placement = Placement { epoch, model: FINGERPRINT, experts: experts.to_vec() };
        self.shard.place(&placement, &mut |_, _| {}).map_err(|error| error.to_string())
    }

    /// What was fetched since it was last asked.
    fn fetched(&self) -> Vec<Slice> {
        let mut fetched = std::mem::take(&mut *self.router.fetched.lock().unwrap());
        fetched.sort();
        fetched
    }

    /// The only file in the store.
    fn file(&self, slice: &Slice) -> std::path::PathBuf {
        let name = crate::store::name_of(blake3::hash(&bytes_of(slice)).as_bytes());
        self.folder.path().join("store").join(name)
    }
}

fn setup() -> Setup {
    Setup::new(tempfile::tempdir().unwrap(), u64::MAX, None)
}

fn slice(layer: u16, expert: u16, from: u16, to: u16) -> Slice {
    Slice { key: key(layer, expert), from, to }
}

#[test]
fn just_what_a_placement_wants_is_fetched_and_only_once() {
    let setup = setup();
    let experts = [slice(1, 0, 0, 3), slice(1, 4, 1, 2), slice(3, 7, 0, 3)];
    setup.place(1, &experts).unwrap();
    assert_eq!(setup.fetched(), experts);
    assert!(setup.shard.layer(1, 1, [0, 4]).is_ok() && setup.shard.layer(1, 3, [7]).is_ok());
    // What is in memory is taken over, and a part of it is cut from it.
    setup.place(2, &[slice(1, 0, 0, 2), slice(1, 4, 1, 2), slice(3, 2, 0, 3)]).unwrap();
    assert_eq!(setup.fetched(), [slice(3, 2, 0, 3)]);
    // After a restart it is on disk.
    let setup = setup.again();
    setup.place(1, &experts).unwrap();
    assert_eq!(setup.fetched(), []);
    for expert in &experts {
        let mut out = vec![0; bytes_of(expert).len()];
        setup.remote.read(*expert, &mut out).unwrap();
        assert_eq!(out, bytes_of(expert));
    }
    assert_eq!(setup.fetched(), []);
    assert_eq!(setup.remote.fetching(), None);
}

#[test]
fn a_damaged_expert_is_found_when_it_is_loaded_and_fetched_again() {
    let (setup, expert) = (setup(), slice(1, 2, 0, 3));
    setup.place(1, &[expert]).unwrap();
    let setup = setup.again();
    let mut bytes = std::fs::read(setup.file(&expert)).unwrap();
    bytes[1234] ^= 16;
    std::fs::write(setup.file(&expert), &bytes).unwrap();
    setup.place(1, &[expert]).unwrap();
    assert_eq!(setup.fetched(), [expert]);
    bytes[1234] ^= 16;
    assert_eq!(std::fs::read(setup.file(&expert)).unwrap(), bytes);
}

#[test]
fn a_router_that_is_away_or_a_small_quota_refuse_a_placement_and_nothing_else() {
    let whole = bytes_of(&slice(1, 0, 0, 3)).len() as u64;
    let setup = Setup::new(tempfile::tempdir().unwrap(), u64::MAX, Some(2 * whole));
    let three: Vec<_> = (0..3).map(|expert| slice(1, expert, 0, 3)).collect();
    setup.place(1, &three[..1]).unwrap();
    let refused = setup.place(2, &three).unwrap_err();
    assert!(refused.contains("--disk") && refused.contains(&(3 * whole).to_string()), "{refused}");
    assert!(setup.shard.layer(1, 1, [0]).is_ok(), "what was held is held");
    setup.router.down.store(true, Ordering::Relaxed);
    let refused = setup.place(3, &[three[0], slice(3, 5, 0, 3)]).unwrap_err();
    assert!(refused.contains("cannot be reached"), "{refused}");
    setup.router.down.store(false, Ordering::Relaxed);
    setup.place(4, &three[1..]).unwrap();
    assert_eq!(setup.remote.store.bytes(), 2 * whole, "the first made room");
}

#[test]
fn many_are_asked_about_in_parts() {
    let (setup, many) = (setup(), 2 * ASKED_SLICES_MAX + 10);
    let slices: Vec<_> = (0..many).map(|at| slice(1, at as u16, 0, 1)).collect();
    let hashes = setup.remote.hashes(&slices).unwrap();
    assert_eq!(hashes.len(), many);
    assert_eq!(*setup.router.asked.lock().unwrap(), [1024, 1024, 10]);
    assert_eq!(setup.remote.hashes(&slices[5..7]).unwrap(), hashes[5..7]);
    assert_eq!(setup.router.asked.lock().unwrap().len(), 3, "they are known");
    // The router must not take minutes to answer: these have 160 MB each, 13 of them two gigabytes.
    let large = Catalogue { hidden: 4096, inter: 12_288, ..catalogue() };
    let supply = Arc::<Router>::clone(&setup.router);
    let large = Remote::new(large, supply, Arc::clone(&setup.remote.store)).unwrap();
    large.hashes(&slices[..14]).unwrap();
    assert_eq!(setup.router.asked.lock().unwrap()[3..], [13, 1]);
}

#[test]
fn a_machine_without_weights_is_measured_and_models_of_no_kind_are_refused() {
    let setup = setup();
    let measured = crate::measure::weight_mb_s(&*setup.remote, &FakeKernels::default()).unwrap();
    assert!(measured[0] > 0 && setup.fetched().is_empty(), "{measured:?}");
    let refused = |catalogue| {
        let supply = Arc::<Router>::clone(&setup.router);
        Remote::new(catalogue, supply, Arc::clone(&setup.remote.store)).unwrap_err().0
    };
    assert!(refused(Catalogue { format: 9, ..catalogue() }).contains("format 9"));
    assert!(refused(Catalogue { inter: 1 << 30, ..catalogue() }).contains("1073741824 wide"));
    let layers = (0..100).map(|layer| (layer, 0)).collect();
    assert!(refused(Catalogue { experts: 4096, layers, ..catalogue() }).contains("409600 experts"));
}
