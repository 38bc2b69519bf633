//! Registers of f32, so that one writing of a blocked loop serves every instruction set.
//!
//! Problem: loops that keep many sums in registers are left to chance when the compiler vectorises plain arrays (it
//! spills them, or cuts them into odd widths). Idea: the few operations such loops need, as a trait over a register
//! type; everything is `inline(always)` and takes on the target features of the function it ends up in. Every
//! operation rounds as its scalar counterpart does, lane by lane. Price: the trait's functions are unsafe, because
//! only their caller knows that the machine has the instructions.
#![allow(unsafe_code, reason = "intrinsics and raw loads; the callers are entered after detection only")]

/// One register of f32 and what is done with it.
///
/// # Safety
/// All functions: the machine has the instruction set, and the caller is compiled for it. Loads and stores: `N`
/// values are readable or writable there; no alignment is asked for.
pub(super) trait Lanes {
    /// The register.
    type V: Copy;
    /// Its lanes.
    const N: usize;
    /// Queries whose sums fit the registers, two of them each.
    const QUERIES: usize;

    unsafe fn zero() -> Self::V;
    unsafe fn splat(x: f32) -> Self::V;
    unsafe fn load(from: *const f32) -> Self::V;
    /// Widens f16 bits, exactly.
    unsafe fn load_half(from: *const u16) -> Self::V;
    unsafe fn store(to: *mut f32, v: Self::V);
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    unsafe fn mul(a: Self::V, b: Self::V) -> Self::V;
    /// Asks for the cache line of an address; any address will do.
    unsafe fn prefetch(at: *const u8);
}

/// Runs a block for each index below `$n`, as literals: LLVM keeps arrays in registers only when unrolled.
macro_rules! each {
    ($n:expr, $i:ident, $b:block) => { each!(@ $n, $i, $b, 0 1 2 3 4 5 6 7) };
    (@ $n:expr, $i:ident, $b:block, $($k:literal)*) => { $( if $k < $n { let $i: usize = $k; $b } )* };
}
pub(super) use each;

/// How values lie in memory: f32, or f16 bits.
pub(super) trait Stored: Copy + Sync {
    /// # Safety
    /// As [`Lanes`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L::V;
    fn widen(self) -> f32;
}

impl Stored for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const f32) -> L::V {
        // SAFETY: the caller's.
        unsafe { L::load(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
}

impl Stored for u16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const u16) -> L::V {
        // SAFETY: the caller's.
        unsafe { L::load_half(from) }
    }

    #[inline(always)]
    fn widen(self) -> f32 {
        super::definition::widen_f16(self)
    }
}

/// Plain arrays: the definition, and what NEON is made of.
pub(super) struct Portable;

impl Lanes for Portable {
    type V = [f32; 8];
    const N: usize = 8;
    const QUERIES: usize = 4;

    #[inline(always)]
    unsafe fn zero() -> [f32; 8] {
        [0.0; 8]
    }

    #[inline(always)]
    unsafe fn splat(x: f32) -> [f32; 8] {
        [x; 8]
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [f32; 8] {
        // SAFETY: the caller's; an unaligned read.
        unsafe { from.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_half(from: *const u16) -> [f32; 8] {
        // SAFETY: the caller's; an unaligned read.
        let bits = unsafe { from.cast::<[u16; 8]>().read_unaligned() };
        let mut out = [0.0; 8];
        for i in 0..8 {
            out[i] = super::definition::widen_f16(bits[i]);
        }
        out
    }

    #[inline(always)]
    unsafe fn store(to: *mut f32, v: [f32; 8]) {
        // SAFETY: the caller's; an unaligned write.
        unsafe { to.cast::<[f32; 8]>().write_unaligned(v) }
    }

    #[inline(always)]
    unsafe fn fma(a: [f32; 8], b: [f32; 8], mut c: [f32; 8]) -> [f32; 8] {
        for i in 0..8 {
            c[i] = a[i].mul_add(b[i], c[i]);
        }
        c
    }

    #[inline(always)]
    unsafe fn mul(mut a: [f32; 8], b: [f32; 8]) -> [f32; 8] {
        for i in 0..8 {
            a[i] *= b[i];
        }
        a
    }

    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::Lanes;

    macro_rules! x86_lanes {
        (
            $(#[$doc:meta])* $name:ident, $v:ty, $n:literal, $queries:literal,
            $zero:ident, $splat:ident, $load:ident, $widen:ident($half:ident as $half_type:ty),
            $store:ident, $fma:ident, $mul:ident
        ) => {
            $(#[$doc])*
            pub(in super::super) struct $name;

            // SAFETY of all calls: the contract of `Lanes`.
            impl Lanes for $name {
                type V = $v;
                const N: usize = $n;
                const QUERIES: usize = $queries;

                #[inline(always)]
                unsafe fn zero() -> $v {
                    // SAFETY: the contract of `Lanes`; so below.
                    unsafe { $zero() }
                }

                #[inline(always)]
                unsafe fn splat(x: f32) -> $v {
                    // SAFETY: as above.
                    unsafe { $splat(x) }
                }

                #[inline(always)]
                unsafe fn load(from: *const f32) -> $v {
                    // SAFETY: as above.
                    unsafe { $load(from) }
                }

                #[inline(always)]
                unsafe fn load_half(from: *const u16) -> $v {
                    // SAFETY: as above.
                    unsafe { $widen($half(from.cast::<$half_type>())) }
                }

                #[inline(always)]
                unsafe fn store(to: *mut f32, v: $v) {
                    // SAFETY: as above.
                    unsafe { $store(to, v) }
                }

                #[inline(always)]
                unsafe fn fma(a: $v, b: $v, c: $v) -> $v {
                    // SAFETY: as above.
                    unsafe { $fma(a, b, c) }
                }

                #[inline(always)]
                unsafe fn mul(a: $v, b: $v) -> $v {
                    // SAFETY: as above.
                    unsafe { $mul(a, b) }
                }

                #[inline(always)]
                unsafe fn prefetch(at: *const u8) {
                    // SAFETY: a prefetch never faults, whatever the address.
                    unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
                }
            }
        };
    }

    x86_lanes!(
        /// Eight lanes.
        Avx2, __m256, 8, 4,
        _mm256_setzero_ps, _mm256_set1_ps, _mm256_loadu_ps, _mm256_cvtph_ps(_mm_loadu_si128 as __m128i),
        _mm256_storeu_ps, _mm256_fmadd_ps, _mm256_mul_ps
    );

    x86_lanes!(
        /// Sixteen lanes.
        Avx512, __m512, 16, 8,
        _mm512_setzero_ps, _mm512_set1_ps, _mm512_loadu_ps, _mm512_cvtph_ps(_mm256_loadu_si256 as __m256i),
        _mm512_storeu_ps, _mm512_fmadd_ps, _mm512_mul_ps
    );
}
