//! Blobs on a real disk: cut anywhere, rotten, too many, too large.

use std::time::Duration;

use mesh_wire::id::ExpertKey;

use super::*;

const BYTES: usize = 5000;

fn blob(seed: u8) -> (Hash, Vec<u8>) {
    let bytes: Vec<u8> = (0..BYTES).map(|at| (at * 31 + at / 251) as u8 ^ seed).collect();
    (*blake3::hash(&bytes).as_bytes(), bytes)
}

fn wanted(seeds: &[u8]) -> BTreeMap<Hash, u64> {
    seeds.iter().map(|seed| (blob(*seed).0, BYTES as u64)).collect()
}

fn open(folder: &tempfile::TempDir, quota: Option<u64>) -> Store {
    Store::open(&folder.path().join("store"), quota).unwrap()
}

fn keep(store: &Store, seed: u8) {
    let (hash, bytes) = blob(seed);
    let mut part = store.part(hash, BYTES as u64).unwrap();
    let from = part.have() as usize;
    part.append(&bytes[from..]).unwrap();
    assert!(part.finish().unwrap());
}

fn read(store: &Store, seed: u8) -> bool {
    let (hash, bytes) = blob(seed);
    let mut out = vec![0; BYTES];
    let found = store.read(&hash, &mut out).unwrap();
    assert!(!found || out == bytes);
    found
}

#[test]
fn what_was_kept_is_there_after_a_restart_and_checked_when_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, None);
    keep(&store, 1);
    assert!(read(&store, 1) && !read(&store, 2));
    assert_eq!(store.bytes(), BYTES as u64);
    let again = Store::open(&folder.path().join("store"), None);
    assert!(matches!(again, Err(StoreError::Folder(DiskError::InUse(_)))));
    drop(store);
    std::fs::write(folder.path().join("store/README"), "not ours").unwrap();
    let store = open(&folder, None);
    assert!(store.holds(&blob(1).0, BYTES as u64) && read(&store, 1));
    assert_eq!(store.bytes(), BYTES as u64, "files of others do not count");
    assert!(!store.holds(&blob(1).0, 7) && !read(&store, 1), "of another length it is damaged, and given up");
}

#[test]
fn a_part_of_any_length_is_gone_on_with() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, None);
    let (hash, bytes) = blob(3);
    for cut in (0..=BYTES).step_by(487).chain([1, BYTES - 1, BYTES]) {
        // As a process leaves it that is killed.
        std::fs::write(store.part_file(&hash), &bytes[..cut]).unwrap();
        let mut part = store.part(hash, BYTES as u64).unwrap();
        assert_eq!((part.have(), part.is_complete()), (cut as u64, cut == BYTES));
        part.append(&bytes[cut..]).unwrap();
        assert!(part.finish().unwrap(), "cut at {cut}");
        assert!(read(&store, 3));
        remove(&store.file(&hash)).unwrap();
        store.contents().kept.clear();
    }
}

#[test]
fn a_part_that_is_longer_or_wrong_is_begun_again() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, None);
    let (hash, bytes) = blob(4);
    std::fs::write(store.part_file(&hash), [&bytes[..], b"x"].concat()).unwrap();
    assert_eq!(store.part(hash, BYTES as u64).unwrap().have(), 0, "no blob is as long as that");
    // What the power failed on: the right length, zeros.
    std::fs::write(store.part_file(&hash), vec![0; 100]).unwrap();
    let mut part = store.part(hash, BYTES as u64).unwrap();
    part.append(&bytes[100..]).unwrap();
    assert!(!part.finish().unwrap());
    assert!(!store.part_file(&hash).exists() && !store.file(&hash).exists());
    assert_eq!(store.bytes(), 0);
    // Cut short it is not finished, either.
    let mut part = store.part(hash, BYTES as u64).unwrap();
    part.append(&bytes[..100]).unwrap();
    assert!(!part.finish().unwrap());
}

#[test]
fn every_flipped_bit_is_found_and_the_blob_is_given_up() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, None);
    let path = store.file(&blob(5).0);
    for bit in (0..BYTES * 8).step_by(397) {
        keep(&store, 5);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[bit / 8] ^= 1 << (bit % 8);
        std::fs::write(&path, bytes).unwrap();
        assert!(!read(&store, 5), "bit {bit} went unnoticed");
        assert!(!path.exists() && !store.holds(&blob(5).0, BYTES as u64));
    }
    keep(&store, 5);
    File::options().write(true).open(&path).unwrap().set_len(BYTES as u64 - 1).unwrap();
    assert!(!read(&store, 5), "it is short");
    assert!(!path.exists());
    keep(&store, 5);
    std::fs::remove_file(&path).unwrap();
    assert!(!read(&store, 5), "it is gone");
}

#[test]
fn the_quota_is_never_exceeded_and_what_was_placed_longest_ago_goes_first() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, Some(3 * BYTES as u64));
    for seed in 1..=3 {
        store.make_room(&wanted(&[seed])).unwrap();
        keep(&store, seed);
    }
    store.make_room(&wanted(&[1])).unwrap();
    assert_eq!(store.bytes(), store.quota());
    store.make_room(&wanted(&[1, 4])).unwrap();
    assert!(!store.holds(&blob(2).0, BYTES as u64), "the first was placed again since");
    keep(&store, 4);
    assert_eq!(store.bytes(), store.quota());
    drop(store);
    // After a restart the order is what the disk says.
    let store = open(&folder, Some(3 * BYTES as u64));
    let old = SystemTime::now() - Duration::from_secs(1000);
    File::open(store.file(&blob(4).0)).unwrap().set_modified(old).unwrap();
    drop(store);
    let store = open(&folder, Some(3 * BYTES as u64));
    store.make_room(&wanted(&[5])).unwrap();
    assert!(!store.holds(&blob(4).0, BYTES as u64) && read(&store, 1) && read(&store, 3));
    // All that is wanted stays, however old.
    let error = store.make_room(&wanted(&[1, 3, 6, 7])).unwrap_err();
    assert!(matches!(error, StoreError::Quota { needed, quota, .. } if needed == 20_000 && quota == 15_000));
    assert!(error.to_string().contains("--disk"), "{error}");
    assert!(read(&store, 1) && read(&store, 3));
}

#[test]
fn parts_count_and_those_that_nobody_wants_go_before_anything_else() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, Some(2 * BYTES as u64));
    keep(&store, 1);
    store.part(blob(2).0, BYTES as u64).unwrap().append(&blob(2).1[..4000]).unwrap();
    assert_eq!(store.bytes(), 9000);
    // Its own part is no more than what it will take anyway.
    store.make_room(&wanted(&[2])).unwrap();
    assert!(store.part_file(&blob(2).0).exists() && read(&store, 1));
    store.make_room(&wanted(&[3])).unwrap();
    assert!(!store.part_file(&blob(2).0).exists() && read(&store, 1));
}

#[test]
fn files_of_a_wrong_length_and_what_others_left_do_not_take_the_room_of_what_is_wanted() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, Some(2 * BYTES as u64));
    let long = vec![0; 3 * BYTES];
    std::fs::write(store.file(&blob(1).0), &long).unwrap();
    std::fs::write(store.part_file(&blob(2).0), &long).unwrap();
    let (capitals, inside) = (name_of(&blob(3).0).to_uppercase(), store.file(&blob(4).0).join("inside"));
    std::fs::write(store.folder.file(&capitals), &long).unwrap();
    std::fs::create_dir_all(&inside).unwrap();
    drop(store);
    let store = open(&folder, Some(2 * BYTES as u64));
    assert_eq!(store.bytes(), 6 * BYTES as u64, "what is not this program's does not count");
    store.make_room(&wanted(&[1, 2])).unwrap();
    assert_eq!(store.bytes(), 0);
    keep(&store, 1);
    std::fs::write(store.part_file(&blob(1).0), &long[..BYTES]).unwrap();
    drop(store);
    let store = open(&folder, Some(2 * BYTES as u64));
    store.make_room(&wanted(&[1, 2])).unwrap();
    keep(&store, 2);
    assert!(read(&store, 1) && read(&store, 2) && inside.exists() && store.folder.file(&capitals).exists());
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_named_with_the_file_and_the_need() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, Some(1 << 60));
    let (hash, bytes) = blob(6);
    // The system's own full disk.
    std::os::unix::fs::symlink("/dev/full", store.part_file(&hash)).unwrap();
    let mut part = Part {
        store: &store,
        hash,
        bytes: BYTES as u64,
        have: 0,
        hasher: blake3::Hasher::new(),
        file: File::options().write(true).open(store.part_file(&hash)).unwrap(),
        path: store.part_file(&hash),
    };
    let error = part.append(&bytes).unwrap_err();
    assert!(matches!(&error, StoreError::Full { needed, .. } if *needed == BYTES as u64));
    let text = error.to_string();
    assert!(
        text.contains(&name_of(&hash)) && text.contains("5000 bytes") && text.contains("--store"),
        "{text}"
    );
    // A placement that no disk holds is refused before anything is fetched.
    let huge = BTreeMap::from([(hash, 1 << 59)]);
    let error = store.make_room(&huge).unwrap_err();
    assert!(
        matches!(&error, StoreError::Full { needed, free, .. } if *needed == 1 << 59 && *free > 0),
        "{error}"
    );
}

#[cfg(unix)]
#[test]
fn links_in_the_folder_lead_nowhere() {
    let (folder, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (hash, bytes) = blob(3);
    let (kept, written) = (outside.path().join("kept"), outside.path().join("written"));
    std::fs::write(&kept, &bytes).unwrap();
    std::fs::write(&written, b"of somebody else").unwrap();
    let store = open(&folder, None);
    std::os::unix::fs::symlink(&kept, store.file(&hash)).unwrap();
    std::os::unix::fs::symlink(&written, store.part_file(&hash)).unwrap();
    drop(store);
    let store = open(&folder, None);
    assert_eq!((store.bytes(), store.holds(&hash, BYTES as u64)), (0, false));
    assert!(!read(&store, 3));
    keep(&store, 3);
    assert!(read(&store, 3));
    assert!(store.file(&hash).symlink_metadata().unwrap().is_file());
    assert_eq!(std::fs::read(&written).unwrap(), b"of somebody else");
    assert!(std::fs::read(&kept).unwrap() == bytes);
}

#[test]
fn whole_blobs_are_lent_and_damaged_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder, None);
    let slice = Slice { key: ExpertKey { layer: 0, expert: 0 }, from: 0, to: 1 };
    keep(&store, 7);
    let (hash, bytes) = blob(7);
    store.part(blob(8).0, BYTES as u64).unwrap().append(&blob(8).1[..10]).unwrap();
    drop(store);
    let store = open(&folder, None);
    let lend = |hash: Hash| store.open(slice, hash).map_err(|not| not.reason);
    let mut lent = lend(hash).unwrap();
    let mut out = vec![0; 1000];
    lent.read(3000, &mut out).unwrap();
    assert_eq!((lent.bytes(), &out[..]), (BYTES as u64, &bytes[3000..4000]));
    assert!(lent.read(4500, &mut out).is_err());
    assert_eq!(lend(blob(8).0).err(), Some(Reason::Absent), "it is not complete");
    assert!(store.catalogue().is_none() && store.hashes(&[slice]).is_err());
    drop((lent, store));
    let store = open(&folder, None);
    let mut rotten = bytes;
    rotten[17] ^= 4;
    std::fs::write(store.file(&hash), rotten).unwrap();
    assert_eq!(store.open(slice, hash).err().map(|not| not.reason), Some(Reason::Absent));
}
