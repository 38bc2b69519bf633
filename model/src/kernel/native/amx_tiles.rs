//! The tile unit of AMX: whether this process may use it, and how its eight tiles are configured.
//!
//! Tiles 0 to 3 take dot products (rows x 16 i32), 4 and 6 activations (rows x 32 int8), 5 and 7 an unpacked group
//! of weights (8 lines of 64 int8). The rows are those of the activation tile, so a short tile neither reads nor
//! writes past its end. A configuration belongs to a thread, and libtorch's operators in the same process
//! have their own: so it is loaded at the start of every product and released at its end, which also spares
//! context switches from saving 8 KB of tiles. Price: some 20 ns per product.
//!
//! Linux hands the unit to processes that ask for it. The answer holds for the whole process and its threads, so
//! it is asked for once, by whoever first wants to know.
#![allow(unsafe_code, reason = "a system call and instructions that std has no functions for")]

use std::arch::asm;
use std::sync::OnceLock;

use super::tiles::TILE;

/// Whether the processor has int8 tiles, the system saves them, and this process may use them.
pub(super) fn permitted() -> bool {
    static PERMITTED: OnceLock<bool> = OnceLock::new();
    *PERMITTED.get_or_init(|| present() && saved_by_system() && asked_for())
}

/// Processor: AMX-TILE and AMX-INT8, and the one palette this is written for.
fn present() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    /// Leaf 7, register EDX.
    const TILE_AND_INT8: u32 = 1 << 24 | 1 << 25;
    /// The leaf that describes palettes.
    const PALETTES: u32 = 0x1d;
    if __cpuid(0).eax < PALETTES || __cpuid_count(7, 0).edx & TILE_AND_INT8 != TILE_AND_INT8 {
        return false;
    }
    let palette = __cpuid_count(PALETTES, 1);
    // 1024 bytes per tile, 8 tiles; 64 bytes per row; 16 rows.
    palette.eax >> 16 == 1024
        && palette.ebx == (8 << 16 | 64)
        && palette.ecx & 0xffff == TILE as u32
        && __cpuid(1).ecx & 1 << 27 != 0
}

/// System: XCR0 has the tile configuration (bit 17) and the tiles (bit 18). Reading XCR0 needs OSXSAVE, which
/// `present` looked for.
fn saved_by_system() -> bool {
    const TILES: u64 = 1 << 17 | 1 << 18;
    #[target_feature(enable = "xsave")]
    fn xcr0() -> u64 {
        // SAFETY: register 0 exists wherever XGETBV does.
        unsafe { std::arch::x86_64::_xgetbv(0) }
    }
    // SAFETY: the caller has made sure of OSXSAVE, so XGETBV may run.
    unsafe { xcr0() & TILES == TILES }
}

/// Process: Linux 5.16 and later grant the tiles on request (and not, where a thread's signal stack is too small for
/// them).
#[cfg(target_os = "linux")]
fn asked_for() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: changes nothing but the permission; both arguments are plain numbers.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn asked_for() -> bool {
    false
}

/// What `ldtilecfg` reads: palette, bytes per row of tile i at 16 + 2i, rows at 48 + i.
#[repr(C, align(64))]
struct Configuration([u8; 64]);

/// Index: rows less one.
static CONFIGURATIONS: [Configuration; TILE] = {
    let mut all = [const { Configuration([0; 64]) }; TILE];
    let mut rows = 1;
    while rows <= TILE {
        all[rows - 1] = configuration(rows as u8);
        rows += 1;
    }
    all
};

const fn configuration(rows: u8) -> Configuration {
    let mut bytes = [0; 64];
    bytes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        (bytes[48 + tile], bytes[16 + 2 * tile]) = match tile {
            0..=3 => (rows, 64),
            4 | 6 => (rows, 32),
            _ => (8, 64),
        };
        tile += 1;
    }
    Configuration(bytes)
}

/// The tile unit of this thread, configured; released when dropped.
pub(super) struct TileUnit {
    rows: usize,
}

impl TileUnit {
    /// Configured for tiles of `rows` rows, 1 to 16.
    ///
    /// # Safety
    /// The tile unit must be `permitted`.
    #[inline]
    pub(super) unsafe fn configured(rows: usize) -> TileUnit {
        let unit = TileUnit { rows };
        unit.load();
        unit
    }

    /// Changes the rows; the tiles become zero if that is a change.
    #[inline]
    pub(super) fn set_rows(&mut self, rows: usize) {
        if rows != self.rows {
            self.rows = rows;
            self.load();
        }
    }

    fn load(&self) {
        let bytes = CONFIGURATIONS[self.rows - 1].0.as_ptr();
        // SAFETY: the unit may be used (contract of `configured`), and the 64 bytes are a valid configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) bytes, options(nostack, readonly, preserves_flags)) };
    }
}

impl Drop for TileUnit {
    fn drop(&mut self) {
        // SAFETY: the unit may be used (contract of `configured`).
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}
