//! Memory that weights live in: a mapped file or an allocation, shared and never written after it is filled.
//!
//! Everything starts at a multiple of 64 bytes, so that kernels use aligned vector loads. Large allocations ask for
//! huge pages: a decode step streams the whole of them, and 4 KB pages cost a fifth of the bandwidth in misses. They
//! are mapped, not taken from the allocator, because the request counts only for pages that nobody has touched yet
//! (`alloc_zeroed` writes aligned memory before it returns).
#![allow(unsafe_code, reason = "mapping files and aligned allocation; each use carries its argument")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// Alignment of every allocation: a huge page, so that the kernel of the system can use them.
const ALIGN: usize = 2 << 20;
/// A cache line: what vector loads want, and the least that is allocated.
const LINE: usize = 64;
/// Below this an allocation is aligned to a cache line only; a huge page would be mostly padding.
const SMALL: usize = 1 << 20;

/// A read-only view of shared bytes.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<Owner>,
    range: Range<usize>,
    /// Bit `kind`: these bytes passed the check of that kind. Shared by clones.
    passed: Arc<AtomicU8>,
}

enum Owner {
    Mapped(memmap2::Mmap),
    Owned(Buffer),
}

impl Bytes {
    /// Maps a whole file. The file must not change while it is mapped (packed files are written under a
    /// temporary name and renamed, and never modified afterwards).
    pub fn map(path: &Path) -> std::io::Result<Bytes> {
        let file = File::open(path)?;
        // SAFETY: the file is opened for reading only and, by the contract above, not modified; a truncation
        // by someone else would raise SIGBUS, which is the price of mapping and stated in docs/OPERATING.md.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        let range = 0..map.len();
        Ok(Bytes { owner: Arc::new(Owner::Mapped(map)), range, passed: Arc::default() })
    }

    /// A part of this view, without copying. `None` where it would leave the view.
    pub fn slice(&self, offset: usize, len: usize) -> Option<Bytes> {
        let end = offset.checked_add(len)?;
        if end > self.range.len() {
            return None;
        }
        let range = self.range.start + offset..self.range.start + end;
        Some(Bytes { owner: Arc::clone(&self.owner), range, passed: Arc::default() })
    }

    /// Whether all of it is as it should be, by a check that has a number below 8. What passed once is not looked at
    /// again, neither here nor in clones of this view: the bytes are never written. So experts that a process holds cost
    /// nothing when more are added.
    pub fn passes_once(&self, number: u8, check: impl FnOnce(&[u8]) -> bool) -> bool {
        let bit = 1_u8.checked_shl(number.into()).unwrap_or(0);
        if self.passed.load(Ordering::Relaxed) & bit != 0 {
            return true;
        }
        let passes = check(self);
        if passes {
            self.passed.fetch_or(bit, Ordering::Relaxed);
        }
        passes
    }

    /// A copy in memory of its own, off the page cache: what a node streams every token.
    pub fn to_resident(&self) -> Bytes {
        let mut buffer = Buffer::zeroed(self.len());
        buffer.copy_from_slice(self);
        buffer.into()
    }
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let all: &[u8] = match &*self.owner {
            Owner::Mapped(map) => map,
            Owner::Owned(buffer) => buffer,
        };
        &all[self.range.clone()]
    }
}

impl From<Buffer> for Bytes {
    fn from(buffer: Buffer) -> Bytes {
        let range = 0..buffer.len();
        Bytes { owner: Arc::new(Owner::Owned(buffer)), range, passed: Arc::default() }
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({} bytes)", self.len())
    }
}

/// Zeroed memory aligned for kernels, while it is being filled.
#[derive(Debug)]
pub struct Buffer {
    start: NonNull<u8>,
    len: usize,
    source: Source,
}

/// Where a buffer's memory comes from, and so how it goes back.
#[derive(Debug)]
enum Source {
    Allocated(Layout),
    /// Pages of the system, unmapped when this is dropped.
    Mapped {
        _pages: memmap2::MmapMut,
    },
}

// SAFETY: a Buffer owns its memory like a Vec<u8>; nothing else points into it.
unsafe impl Send for Buffer {}
// SAFETY: as above; shared references only read.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// `len` zero bytes.
    ///
    /// # Panics
    /// If `len` exceeds `isize::MAX`. Where the system has no memory the process ends, as with `Vec`.
    pub fn zeroed(len: usize) -> Buffer {
        let align = if len < SMALL { LINE } else { ALIGN };
        let layout =
            Layout::from_size_align(len.max(1).next_multiple_of(LINE), align).expect("length fits isize");
        if cfg!(target_os = "linux") && layout.size() >= ALIGN {
            return Buffer::mapped(layout, len);
        }
        // SAFETY: the layout has a non-zero size.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        Buffer { start, len, source: Source::Allocated(layout) }
    }

    /// Untouched pages of the system. Whole huge pages are asked for; the rest past the last of them is left alone, so
    /// that many buffers do not take a huge page each for their ends.
    fn mapped(layout: Layout, len: usize) -> Buffer {
        let Ok(mut pages) = memmap2::MmapMut::map_anon(layout.size() + ALIGN) else {
            handle_alloc_error(layout)
        };
        let offset = pages.as_ptr().align_offset(ALIGN);
        #[cfg(target_os = "linux")]
        {
            let whole = layout.size() / ALIGN * ALIGN;
            // Refused where the system has no huge pages: small ones only cost speed.
            drop(pages.advise_range(memmap2::Advice::HugePage, offset, whole));
        }
        let start = NonNull::from(&mut pages[offset..]).cast();
        Buffer { start, len, source: Source::Mapped { _pages: pages } }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: start..start+len is inside the allocation and initialized (zeroed).
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in deref, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if let Source::Allocated(layout) = self.source {
            // SAFETY: allocated in `zeroed` with this layout, freed once.
            unsafe { dealloc(self.start.as_ptr(), layout) }
        }
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::*;

    /// The lines of `/proc/self/smaps` about the mapping that holds `address`.
    fn mapping_of(address: usize) -> Vec<String> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let bounds = |line: &str| {
            let (start, end) = line.split_whitespace().next()?.split_once('-')?;
            Some((usize::from_str_radix(start, 16).ok()?, usize::from_str_radix(end, 16).ok()?))
        };
        smaps
            .lines()
            .skip_while(|line| !bounds(line).is_some_and(|(start, end)| (start..end).contains(&address)))
            .enumerate()
            .take_while(|(index, line)| *index == 0 || bounds(line).is_none())
            .map(|(_, line)| line.to_owned())
            .collect()
    }

    #[test]
    fn what_passed_is_not_looked_at_again_and_what_did_not_is() {
        let bytes = Bytes::from(Buffer::zeroed(128));
        assert!(!bytes.passes_once(1, |_| false), "it does not pass");
        let mut looks = 0;
        let mut look = |bytes: &Bytes, number| {
            assert!(bytes.passes_once(number, |seen| {
                looks += 1;
                seen == &**bytes
            }));
            looks
        };
        assert_eq!(look(&bytes, 1), 1, "it passes now");
        assert_eq!([look(&bytes, 1), look(&bytes.clone(), 1)], [1, 1]);
        assert_eq!(look(&bytes, 2), 2, "another check");
        assert_eq!(look(&bytes.slice(0, 64).unwrap(), 1), 3, "other bytes");
    }

    #[test]
    fn huge_pages_are_asked_for_before_the_first_touch() {
        let mut buffer = Buffer::zeroed(4 * ALIGN + 100);
        let fresh = mapping_of(buffer.as_ptr().addr());
        assert!(fresh.iter().any(|line| line.starts_with("Rss:") && line.contains(" 0 kB")), "{fresh:?}");
        if Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            let flags = fresh.iter().find(|line| line.starts_with("VmFlags:")).unwrap();
            assert!(flags.split_whitespace().any(|flag| flag == "hg"), "{flags}");
        }
        assert!(buffer.as_ptr().addr().is_multiple_of(ALIGN));
        assert!(buffer.iter().all(|byte| *byte == 0));
        buffer.fill(7);
        assert_eq!(Bytes::from(buffer)[4 * ALIGN + 99], 7);
    }
}
