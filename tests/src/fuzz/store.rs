//! Experts on a node's disk: whatever lies in the folder and whatever comes over the network, what is read is right, the
//! quota holds, and files of others stay.
//!
//! An input is a program of steps over a few small experts: files as a crash or a rotten disk leaves them, placements,
//! pieces that arrive, reads and loans. A model beside it says what must be true after each step.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use expert_node::store::{Store, StoreError, name_of};
use mesh_net::shelf::Shelf;
use mesh_wire::id::{ExpertKey, Slice};
use mesh_wire::weights::Hash;

use super::files::{folder, put};
use super::{Verdict, says_why};

/// Lengths of the experts.
pub(super) const LENGTHS: [usize; 6] = [1, 100, 1000, 1000, 2500, 4096];

/// Bytes that the folder may take: not all of them.
const QUOTA: u64 = 6000;

/// Steps of one input.
const STEPS_MAX: usize = 200;

/// A file that is none of the store's.
const FOREIGN: (&str, &[u8]) = ("README.txt", b"not ours");

/// The experts and their hashes.
pub(super) fn experts() -> &'static [(Hash, Vec<u8>)] {
    static EXPERTS: OnceLock<Vec<(Hash, Vec<u8>)>> = OnceLock::new();
    EXPERTS.get_or_init(|| {
        let make = |(seed, length): (usize, &usize)| {
            let bytes: Vec<u8> = (0..*length).map(|at| (at * 31 + at / 251) as u8 ^ seed as u8).collect();
            (*blake3::hash(&bytes).as_bytes(), bytes)
        };
        LENGTHS.iter().enumerate().map(make).collect()
    })
}

/// The store, and what is known of it.
struct Scene {
    path: PathBuf,
    store: Option<Store>,
    /// Experts of the last placement that was taken, which there is room for.
    wanted: BTreeSet<usize>,
    refused: bool,
}

/// Steps of two bytes each: what is done, and to which expert in which way.
pub(super) fn store(bytes: &[u8]) -> Verdict {
    let path = folder("store");
    // Only what an earlier input left.
    drop(std::fs::remove_dir_all(&path));
    std::fs::create_dir(&path).expect("a folder can be made");
    private(&path);
    put(&path, FOREIGN.0, FOREIGN.1);
    let mut scene = Scene { path, store: None, wanted: BTreeSet::new(), refused: false };
    let (steps, _) = bytes.as_chunks::<2>();
    for [what, how] in steps.iter().take(STEPS_MAX) {
        scene.step(*what, *how);
    }
    let foreign = std::fs::read(scene.path.join(FOREIGN.0)).expect("a file of others stays");
    assert_eq!(foreign, FOREIGN.1);
    if scene.refused || steps.is_empty() { Verdict::Refused } else { Verdict::Taken }
}

#[cfg(unix)]
fn private(path: &Path) {
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    std::fs::set_permissions(path, mode).expect("the folder is ours");
}

#[cfg(not(unix))]
fn private(_: &Path) {}

impl Scene {
    fn step(&mut self, what: u8, how: u8) {
        let expert = usize::from(how) % LENGTHS.len();
        let way = usize::from(how) / LENGTHS.len();
        match what % 6 {
            0 => self.leave(expert, way),
            1 => drop(self.store.take()),
            2 => self.place(how),
            3 => self.receive(expert, (usize::from(what) / 6, way)),
            4 => self.read(expert),
            _ => self.lend(expert, way),
        }
    }

    /// A process that ended, a disk, or a person leaves a file, while no process uses the folder.
    fn leave(&mut self, expert: usize, way: usize) {
        self.store = None;
        self.wanted.clear();
        let (hash, bytes) = &experts()[expert];
        let name = name_of(hash);
        if self.path.join(&name).is_dir() {
            return;
        }
        let mut wrong = bytes.clone();
        wrong[bytes.len() / 2] ^= 1;
        let long = [&bytes[..], b"xyz"].concat();
        match way % 10 {
            0 => put(&self.path, &name, bytes),
            1 => put(&self.path, &name, &wrong),
            2 => put(&self.path, &name, &bytes[..bytes.len() / 3]),
            3 => put(&self.path, &name, &long),
            4 => put(&self.path, &format!("{name}.part"), &bytes[..bytes.len() / 2]),
            5 => put(&self.path, &format!("{name}.part"), &wrong),
            6 => put(&self.path, &format!("{name}.part"), &long),
            7 => put(&self.path, &name.to_uppercase(), bytes),
            8 => put(&self.path, &format!("{name}.part.part"), bytes),
            // Fails where there is a file of that name.
            _ => drop(std::fs::create_dir(self.path.join(&name))),
        }
    }

    fn open(&mut self) -> &Store {
        let path = &self.path;
        self.store.get_or_insert_with(|| Store::open(path, Some(QUOTA)).expect("the folder is ours"))
    }

    /// A placement of the experts whose bits are set.
    fn place(&mut self, bits: u8) {
        let wanted: BTreeSet<usize> = (0..LENGTHS.len()).filter(|expert| bits >> expert & 1 == 1).collect();
        let sizes: BTreeMap<Hash, u64> =
            wanted.iter().map(|expert| (experts()[*expert].0, LENGTHS[*expert] as u64)).collect();
        let needed: u64 = sizes.values().sum();
        let store = self.open();
        let held = |store: &Store| -> Vec<bool> {
            sizes.iter().map(|(hash, bytes)| store.holds(hash, *bytes)).collect()
        };
        let before = held(store);
        let made = store.make_room(&sizes);
        assert_eq!(held(store), before, "what is wanted stays, whole");
        match made {
            Ok(()) => {
                let missing = sizes.iter().filter(|(hash, bytes)| !store.holds(hash, **bytes));
                let missing: u64 = missing.map(|(_, bytes)| *bytes).sum();
                assert!(needed <= QUOTA && store.bytes() <= QUOTA, "{} bytes", store.bytes());
                assert!(missing <= QUOTA);
                self.wanted = wanted;
            }
            Err(error) => {
                assert_eq!(needed > QUOTA, matches!(error, StoreError::Quota { .. }), "{error}");
                assert!(needed > QUOTA, "what fits is refused: {error}");
                says_why(&error);
                self.refused = true;
            }
        }
        self.counts_what_is_there();
    }

    /// Pieces of an expert that was placed arrive; the last of them may be wrong.
    fn receive(&mut self, expert: usize, (end, way): (usize, usize)) {
        let (hash, bytes) = &experts()[expert];
        let length = bytes.len();
        if !self.wanted.contains(&expert) || self.open().holds(hash, length as u64) {
            return;
        }
        let mut part = self.open().part(*hash, length as u64).expect("the disk has room");
        let from = part.have() as usize;
        assert!(from <= length, "{from} of {length} bytes");
        let to = if end.is_multiple_of(4) { length } else { from + (length - from) / 2 };
        let mut rest = bytes[from..to].to_vec();
        if way % 3 == 1
            && let Some(last) = rest.last_mut()
        {
            *last ^= 1;
        }
        for piece in rest.chunks(64 + 97 * way) {
            part.append(piece).expect("the disk has room");
        }
        assert_eq!(part.is_complete(), to == length);
        if !part.is_complete() {
            return self.counts_what_is_there();
        }
        let finished = match part.finish() {
            Ok(finished) => finished,
            Err(error) => {
                assert!(self.path.join(name_of(hash)).is_dir(), "the disk works: {error}");
                says_why(&error);
                self.refused = true;
                return;
            }
        };
        assert_eq!(self.open().holds(hash, length as u64), finished);
        if finished {
            assert!(self.open().bytes() <= QUOTA, "{} bytes", self.open().bytes());
            self.read(expert);
            assert!(self.open().holds(hash, length as u64), "what has just come was right");
        }
        self.counts_what_is_there();
    }

    fn read(&mut self, expert: usize) {
        let (hash, bytes) = &experts()[expert];
        let store = self.open();
        let mut out = vec![0; bytes.len()];
        match store.read(hash, &mut out) {
            Ok(true) => assert!(out == *bytes, "other bytes than its own"),
            Ok(false) => assert!(!store.holds(hash, bytes.len() as u64), "what is damaged is not held"),
            Err(error) => {
                says_why(&error);
                self.refused = true;
            }
        }
        self.counts_what_is_there();
    }

    /// Another node asks for it. What is lent is right, as it is compared before: by whoever asked, too.
    fn lend(&mut self, expert: usize, way: usize) {
        let (hash, bytes) = &experts()[expert];
        let slice = Slice { key: ExpertKey { layer: 0, expert: 0 }, from: 0, to: 1 };
        match Shelf::open(self.open(), slice, *hash) {
            Ok(mut blob) => {
                let from = (way * 17).min(bytes.len());
                let mut out = vec![0; bytes.len() - from];
                assert_eq!(blob.bytes(), bytes.len() as u64);
                blob.read(from as u64, &mut out).expect("the disk works");
                assert!(out == bytes[from..], "other bytes than its own are lent");
                assert!(blob.read(bytes.len() as u64, &mut [0]).is_err(), "a byte behind the last one");
            }
            Err(refused) => {
                says_why(&refused.detail);
                self.refused = true;
            }
        }
    }

    /// The store's own figure is what the disk says of files with its names.
    fn counts_what_is_there(&mut self) {
        let bytes = self.open().bytes();
        let names: BTreeSet<String> = experts().iter().map(|(hash, _)| name_of(hash)).collect();
        let entries = std::fs::read_dir(&self.path).expect("the folder is there").flatten();
        let ours = entries.filter(|entry| {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            names.contains(name.strip_suffix(".part").unwrap_or(&name))
        });
        let there = ours.filter_map(|entry| entry.metadata().ok()).filter(|found| found.is_file());
        assert_eq!(bytes, there.map(|found| found.len()).sum::<u64>(), "what the files take");
    }
}
