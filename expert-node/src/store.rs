//! Experts on this machine's disk: files named by the BLAKE3 hash of what they hold.
//!
//! A blob that is on its way lies beside them as `HASH.part`, which only ever grows: a process that was killed goes on
//! where it ended. When it is complete its hash is compared, it is synced, and then it gets its name, so a file with a
//! plain name was right once. Disks rot, so the hash is compared again whenever a blob is read into memory; one that
//! differs is named, deleted, and fetched again. The price is that loading reads every byte through BLAKE3, which is
//! faster than disks are.
//!
//! The folder never takes more than its quota. Blobs that a new placement does not need go first, those that were placed
//! longest ago before others; what it does need stays. Refuses placements that need more than the quota or the disk
//! has, by name and with figures. One process uses a folder at a time. Files with other names are left alone, and links are
//! not followed: nothing that is fetched is written outside the folder.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use mesh_net::disk::{DiskError, Folder};
use mesh_net::shelf::{Blob, NotLent, Shelf};
use mesh_wire::id::Slice;
use mesh_wire::weights::{Catalogue, Hash, Reason};

/// What a name of a blob that is not complete ends with.
const PART: &str = ".part";

/// Bytes that are read from a file at a time.
const PIECE_BYTES: usize = 1 << 20;

/// Share of the disk that is left free where nobody said how much may be taken: one part in so many.
const LEFT_FREE: u64 = 10;

/// Why blobs cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder.
    #[error(transparent)]
    Folder(#[from] DiskError),
    /// A file.
    #[error("{what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// The disk is full.
    #[error(
        "no room on the disk for {path}: {needed} bytes are needed, {free} are free; make room, or give the node \
         another --store"
    )]
    Full {
        /// The file that did not fit.
        path: PathBuf,
        /// Bytes that were still to be written.
        needed: u64,
        /// Bytes the system has left; 0 where it does not say.
        free: u64,
    },
    /// The quota is too small.
    #[error(
        "the experts of this placement take {needed} bytes on disk, {path} may take {quota}: start the node with more \
         --disk or less --memory"
    )]
    Quota {
        /// The folder.
        path: PathBuf,
        /// Bytes of the placement.
        needed: u64,
        /// Bytes the folder may take.
        quota: u64,
    },
}

fn io(what: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    move |error| StoreError::Io { what, path: path.to_owned(), error }
}

/// A blob that is complete.
#[derive(Clone, Copy, Debug)]
struct Kept {
    bytes: u64,
    /// When a placement last wanted it. A clock that jumps only changes what is given up first.
    placed: SystemTime,
    /// Its hash was compared by this process.
    checked: bool,
}

#[derive(Debug, Default)]
struct Contents {
    kept: BTreeMap<Hash, Kept>,
    /// Bytes of blobs on their way: what they will take, while they are written.
    parts: BTreeMap<Hash, u64>,
}

impl Contents {
    fn bytes(&self) -> u64 {
        self.kept.values().map(|kept| kept.bytes).sum::<u64>() + self.parts.values().sum::<u64>()
    }
}

/// See the module.
#[derive(Debug)]
pub struct Store {
    folder: Folder,
    quota: u64,
    contents: Mutex<Contents>,
}

/// The file's name.
pub fn name_of(hash: &Hash) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
}

impl Store {
    /// Opens a folder, and makes it where there is none. `quota`: bytes it may take; `None`: nine tenths of what it has
    /// and the disk has free.
    ///
    /// # Errors
    /// `Folder`, `Io`.
    pub fn open(path: &Path, quota: Option<u64>) -> Result<Store, StoreError> {
        let folder = Folder::open(path)?;
        let mut contents = Contents::default();
        for entry in std::fs::read_dir(path).map_err(io("list", path))? {
            let entry = entry.map_err(io("list", path))?;
            let name = entry.file_name();
            let Some(name) = name.to_str() else { continue };
            let (digits, partial) = name.strip_suffix(PART).map_or((name, false), |digits| (digits, true));
            let Ok(hash) = blake3::Hash::from_hex(digits) else { continue };
            let found = entry.metadata().map_err(io("look at", &entry.path()))?;
            // Links, folders of such names, and names in capitals are not this program's.
            if !found.is_file() || name_of(hash.as_bytes()) != digits {
                continue;
            }
            if partial {
                contents.parts.insert(*hash.as_bytes(), found.len());
            } else {
                let placed = found.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                let kept = Kept { bytes: found.len(), placed, checked: false };
                contents.kept.insert(*hash.as_bytes(), kept);
            }
        }
        let has = contents.bytes();
        let all = || free(path).map_or(u64::MAX, |free| (has + free) / LEFT_FREE * (LEFT_FREE - 1));
        let quota = quota.unwrap_or_else(all);
        Ok(Store { folder, quota, contents: Mutex::new(contents) })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Bytes it may take.
    pub fn quota(&self) -> u64 {
        self.quota
    }

    /// Bytes it takes.
    pub fn bytes(&self) -> u64 {
        self.contents().bytes()
    }

    /// Whether it has this blob, complete and of this length. One that lost a part of it since it got its name is named
    /// and given up.
    pub fn holds(&self, hash: &Hash, bytes: u64) -> bool {
        self.fits(&mut self.contents(), hash, bytes).unwrap_or_else(|error| {
            // Whoever writes the new one over it will say so again.
            tracing::error!(%error, "a damaged file stays");
            false
        })
    }

    /// Makes room for these blobs, each with its length, and notes that they are wanted now. What of them is there
    /// stays.
    ///
    /// # Errors
    /// `Quota`, `Full`: then nothing that is wanted was given up.
    pub fn make_room(&self, wanted: &BTreeMap<Hash, u64>) -> Result<(), StoreError> {
        let needed: u64 = wanted.values().sum();
        if needed > self.quota {
            let path = self.path().to_owned();
            return Err(StoreError::Quota { path, needed, quota: self.quota });
        }
        let now = SystemTime::now();
        let mut contents = self.contents();
        self.give_up_misfits(&mut contents, wanted)?;
        for (hash, kept) in contents.kept.iter_mut().filter(|(hash, _)| wanted.contains_key(*hash)) {
            kept.placed = now;
            // Only the order in which blobs are given up after a restart depends on it.
            drop(File::open(self.file(hash)).and_then(|file| file.set_modified(now)));
        }
        let missing = |contents: &Contents| {
            let missing = wanted.iter().filter(|(hash, _)| !contents.kept.contains_key(*hash));
            let left = |(hash, bytes): (&Hash, &u64)| {
                bytes.saturating_sub(contents.parts.get(hash).copied().unwrap_or(0))
            };
            missing.map(left).sum::<u64>()
        };
        loop {
            let more = missing(&contents);
            let within = contents.bytes() + more <= self.quota;
            if within && (more == 0 || free(self.path()).is_none_or(|free| more <= free)) {
                return Ok(());
            }
            if !self.give_up_one(&mut contents, wanted)? {
                let first = wanted.keys().find(|hash| !contents.kept.contains_key(*hash));
                let path = first.map_or_else(|| self.path().to_owned(), |hash| self.file(hash));
                return Err(StoreError::Full { path, needed: more, free: free(self.path()).unwrap_or(0) });
            }
        }
    }

    /// Deletes blobs that are wanted, but not of the length they have, and parts that are longer than they should become or
    /// of blobs that are complete: they would be fetched anew in any case or never used, and take room until then.
    fn give_up_misfits(
        &self,
        contents: &mut Contents,
        wanted: &BTreeMap<Hash, u64>,
    ) -> Result<(), StoreError> {
        for (hash, bytes) in wanted {
            let whole = self.fits(contents, hash, *bytes)?;
            if contents.parts.get(hash).is_some_and(|part| whole || part > bytes) {
                remove(&self.part_file(hash))?;
                contents.parts.remove(hash);
            }
        }
        Ok(())
    }

    /// `holds`, where a file that cannot be deleted is an error.
    fn fits(&self, contents: &mut Contents, hash: &Hash, bytes: u64) -> Result<bool, StoreError> {
        match contents.kept.get(hash) {
            Some(Kept { bytes: found, .. }) if *found != bytes => {
                let why = format!("it is {found} bytes long instead of {bytes}");
                self.give_up_damaged(contents, hash, &why)
            }
            kept => Ok(kept.is_some()),
        }
    }

    /// Deletes what is missed least; false where everything is wanted.
    fn give_up_one(&self, contents: &mut Contents, wanted: &BTreeMap<Hash, u64>) -> Result<bool, StoreError> {
        if let Some(hash) = contents.parts.keys().find(|hash| !wanted.contains_key(*hash)).copied() {
            remove(&self.part_file(&hash))?;
            contents.parts.remove(&hash);
            return Ok(true);
        }
        let unwanted = contents.kept.iter().filter(|(hash, _)| !wanted.contains_key(*hash));
        let Some((hash, _)) = unwanted.min_by_key(|(_, kept)| kept.placed) else { return Ok(false) };
        let hash = *hash;
        remove(&self.file(&hash))?;
        contents.kept.remove(&hash);
        Ok(true)
    }

    /// Opens a blob of `bytes` bytes to go on writing it. One writer per blob at a time, and `make_room` before.
    ///
    /// # Errors
    /// `Io`, `Full`.
    pub fn part(&self, hash: Hash, bytes: u64) -> Result<Part<'_>, StoreError> {
        let path = self.part_file(&hash);
        // A link of this name would be written through, to wherever it leads.
        if path.symlink_metadata().is_ok_and(|found| !found.is_file()) {
            remove(&path)?;
        }
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(io("open", &path))?;
        let found = file.metadata().map_err(io("look at", &path))?.len();
        if found > bytes {
            file.set_len(0).map_err(io("shorten", &path))?;
        }
        // What is there already may be anything: the hash of all of it is compared in the end.
        let mut hasher = blake3::Hasher::new();
        let have = hash_file(&mut file, &mut hasher).map_err(io("read", &path))?;
        self.contents().parts.insert(hash, have);
        Ok(Part { store: self, hash, bytes, have, hasher, file, path })
    }

    /// Reads a blob that fills `out`; false where there is none. One that does not have its hash any more is deleted,
    /// and then there is none.
    ///
    /// # Errors
    /// `Io`.
    pub fn read(&self, hash: &Hash, out: &mut [u8]) -> Result<bool, StoreError> {
        let Some(kept) = self.contents().kept.get(hash).copied() else { return Ok(false) };
        let path = self.file(hash);
        let read = File::open(&path).and_then(|mut file| file.read_exact(out));
        match read {
            Ok(()) if kept.bytes == out.len() as u64 && *blake3::hash(out).as_bytes() == *hash => {
                self.note_checked(hash);
                Ok(true)
            }
            Ok(()) => self.give_up_damaged(
                &mut self.contents(),
                hash,
                "its bytes do not have the hash it is named by",
            ),
            Err(error) if matches!(error.kind(), ErrorKind::UnexpectedEof | ErrorKind::NotFound) => {
                self.give_up_damaged(&mut self.contents(), hash, "it is shorter than it was")
            }
            // A disk that cannot read a sector is not asked again for this file.
            Err(error) => self.give_up_damaged(&mut self.contents(), hash, &error.to_string()),
        }
    }

    /// Names a blob that is not what it should be, and deletes it. Returns that it is not there.
    fn give_up_damaged(&self, contents: &mut Contents, hash: &Hash, why: &str) -> Result<bool, StoreError> {
        let path = self.file(hash);
        tracing::error!(path = %path.display(), "a stored expert is damaged ({why}); it is fetched again");
        remove(&path)?;
        contents.kept.remove(hash);
        Ok(false)
    }

    fn note_checked(&self, hash: &Hash) {
        if let Some(kept) = self.contents().kept.get_mut(hash) {
            kept.checked = true;
        }
    }

    fn file(&self, hash: &Hash) -> PathBuf {
        self.folder.file(&name_of(hash))
    }

    fn part_file(&self, hash: &Hash) -> PathBuf {
        self.folder.file(&format!("{}{PART}", name_of(hash)))
    }

    fn contents(&self) -> MutexGuard<'_, Contents> {
        self.contents.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A blob on its way.
#[derive(Debug)]
pub struct Part<'a> {
    store: &'a Store,
    hash: Hash,
    bytes: u64,
    have: u64,
    hasher: blake3::Hasher,
    file: File,
    path: PathBuf,
}

impl Part<'_> {
    /// Bytes that are there.
    pub fn have(&self) -> u64 {
        self.have
    }

    /// Whether all are.
    pub fn is_complete(&self) -> bool {
        self.have >= self.bytes
    }

    /// Adds the next bytes.
    ///
    /// # Errors
    /// `Full`, `Io`.
    pub fn append(&mut self, piece: &[u8]) -> Result<(), StoreError> {
        if let Err(error) = self.file.write_all(piece) {
            return Err(self.failed("write", error));
        }
        self.hasher.update(piece);
        self.have += piece.len() as u64;
        self.store.contents().parts.insert(self.hash, self.have);
        Ok(())
    }

    /// Ends it: right, it gets its name; wrong, it is deleted. Returns which.
    ///
    /// # Errors
    /// `Full`, `Io`.
    pub fn finish(self) -> Result<bool, StoreError> {
        let right = self.have == self.bytes && *self.hasher.finalize().as_bytes() == self.hash;
        if !right {
            remove(&self.path)?;
            self.store.contents().parts.remove(&self.hash);
            return Ok(false);
        }
        if let Err(error) = self.file.sync_all() {
            return Err(self.failed("sync", error));
        }
        let path = self.store.file(&self.hash);
        std::fs::rename(&self.path, &path).map_err(io("rename", &self.path))?;
        let folder = self.store.path();
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io("sync", folder))?;
        let mut contents = self.store.contents();
        contents.parts.remove(&self.hash);
        let kept = Kept { bytes: self.bytes, placed: SystemTime::now(), checked: true };
        contents.kept.insert(self.hash, kept);
        Ok(true)
    }

    fn failed(&self, what: &'static str, error: std::io::Error) -> StoreError {
        if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
            let (path, needed) = (self.path.clone(), self.bytes - self.have);
            return StoreError::Full { path, needed, free: free(self.store.path()).unwrap_or(0) };
        }
        StoreError::Io { what, path: self.path.clone(), error }
    }
}

/// Nodes lend what they have checked. Which model it is, and what its hashes are, the router says.
impl Shelf for Store {
    fn catalogue(&self) -> Option<Catalogue> {
        None
    }

    fn hashes(&self, _: &[Slice]) -> Result<Vec<Hash>, NotLent> {
        Err(NotLent::new(Reason::Absent, "hashes are for the router to say"))
    }

    fn open(&self, _: Slice, hash: Hash) -> Result<Box<dyn Blob>, NotLent> {
        let absent = || NotLent::new(Reason::Absent, "it is not here");
        let kept = self.contents().kept.get(&hash).copied().ok_or_else(absent)?;
        let failed = |error: std::io::Error| NotLent::new(Reason::Failed, error.to_string());
        let mut file = File::open(self.file(&hash)).map_err(failed)?;
        if !kept.checked {
            let mut hasher = blake3::Hasher::new();
            hash_file(&mut file, &mut hasher).map_err(failed)?;
            if *hasher.finalize().as_bytes() != hash {
                // It is deleted when this node itself reads it, or needs its room.
                return Err(NotLent::new(Reason::Absent, "the copy here is damaged"));
            }
            self.note_checked(&hash);
        }
        Ok(Box::new(Opened { file, bytes: kept.bytes }))
    }
}

/// A blob that is lent.
struct Opened {
    file: File,
    bytes: u64,
}

impl Blob for Opened {
    fn bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&mut self, from: u64, out: &mut [u8]) -> std::io::Result<()> {
        self.file.seek(SeekFrom::Start(from))?;
        self.file.read_exact(out)
    }
}

/// Hashes what is in a file from where it stands; how much that was.
fn hash_file(file: &mut File, hasher: &mut blake3::Hasher) -> std::io::Result<u64> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut have = 0;
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Ok(have),
            Ok(read) => {
                hasher.update(&piece[..read]);
                have += read as u64;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn remove(path: &Path) -> Result<(), StoreError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(io("delete", path)(error)),
        _ => Ok(()),
    }
}

/// Bytes the system lets this process write beside what is there; `None` where it does not say.
#[cfg(unix)]
fn free(path: &Path) -> Option<u64> {
    let disk = rustix::fs::statvfs(path).ok()?;
    disk.f_bavail.checked_mul(disk.f_frsize)
}

#[cfg(not(unix))]
fn free(_: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests;
