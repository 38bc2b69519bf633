//! Memory that weights live in: a mapped file or an allocation, shared and never written after it is filled.
//!
//! Everything starts at a multiple of 64 bytes, so that kernels use aligned vector loads. Allocations ask for
//! huge pages: a decode step streams the whole of them, and 4 KB pages cost a tenth of the bandwidth in misses.
#![allow(unsafe_code, reason = "mapping files and aligned allocation; each use carries its argument")]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs::File;
use std::ops::{Deref, Range};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

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
        Ok(Bytes { owner: Arc::new(Owner::Mapped(map)), range })
    }

    /// A part of this view, without copying. `None` where it would leave the view.
    pub fn slice(&self, offset: usize, len: usize) -> Option<Bytes> {
        let end = offset.checked_add(len)?;
        if end > self.range.len() {
            return None;
        }
        let range = self.range.start + offset..self.range.start + end;
        Some(Bytes { owner: Arc::clone(&self.owner), range })
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
        Bytes { owner: Arc::new(Owner::Owned(buffer)), range }
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
    layout: Layout,
    len: usize,
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
        // SAFETY: the layout has a non-zero size.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        #[cfg(target_os = "linux")]
        if layout.size() >= ALIGN {
            // SAFETY: the range was just allocated; the advice changes page sizes only, and failing is harmless.
            unsafe { libc::madvise(start.as_ptr().cast(), layout.size(), libc::MADV_HUGEPAGE) };
        }
        Buffer { start, layout, len }
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
        // SAFETY: allocated in `zeroed` with this layout, freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}
