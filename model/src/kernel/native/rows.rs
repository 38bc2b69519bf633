//! Work on rows, on all threads.
//!
//! Between two matrix products a step does a little with every row. Few rows are done by the caller: waking a thread
//! costs as much as several rows. Many are shared among all threads in runs of neighbours. A job gets its parts of
//! the arrays and nothing else, so it does not matter who runs it.
#![allow(
    unsafe_code,
    reason = "disjoint parts of slices, which the borrow checker cannot see across threads"
)]

use super::Native;
use super::engine::part;

/// Parts from which other threads are woken: with a microsecond each, more work than the waking.
const PARALLEL_PARTS: usize = 16;

/// A slice cut into parts of `width`, the last one shorter if it must be.
struct Parts<T> {
    start: *mut T,
    len: usize,
    width: usize,
}

// SAFETY: a plain pointer to values that may be sent; who uses which part is the contract of `at`.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T> Parts<T> {
    fn new(values: &mut [T], width: usize) -> Parts<T> {
        assert!(width > 0);
        Parts { start: values.as_mut_ptr(), len: values.len(), width }
    }

    /// # Safety
    /// The values must outlive the slice, and nobody else may use this part meanwhile.
    unsafe fn at<'a>(&self, index: usize) -> &'a mut [T] {
        let first = index * self.width;
        assert!(first < self.len);
        // SAFETY: inside the values by the assertion; exclusive by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), self.width.min(self.len - first)) }
    }
}

/// Called with the number of a part and the parts of two slices.
pub type PairJob<'a, A, B> = dyn Fn(usize, &mut [A], &mut [B]) + Sync + 'a;

impl Native {
    /// Calls `job(i, part i of a)` for every part of `a`, on all threads if there are many. Parts are `width` values,
    /// the last one may be shorter. The job must not call this backend's products (they wait for the same threads).
    pub fn each_part<A: Send>(&self, a: &mut [A], width: usize, job: &(dyn Fn(usize, &mut [A]) + Sync)) {
        let parts = a.len().div_ceil(width);
        let a = Parts::new(a, width);
        // SAFETY: `share_out` names every part once; it returns after all jobs.
        self.share_out(parts, PARALLEL_PARTS, &|index| job(index, unsafe { a.at(index) }));
    }

    /// The same with parts large enough that two of them are worth two threads.
    pub fn each_large_part<A: Send>(
        &self,
        a: &mut [A],
        width: usize,
        job: &(dyn Fn(usize, &mut [A]) + Sync),
    ) {
        let parts = a.len().div_ceil(width);
        let a = Parts::new(a, width);
        // SAFETY: as in `each_part`.
        self.share_out(parts, 2, &|index| job(index, unsafe { a.at(index) }));
    }

    /// Calls `job(i, part i of a, part i of b)` for every part of two slices that have as many, each with its width.
    pub fn each_pair<A: Send, B: Send>(
        &self,
        (a, a_width): (&mut [A], usize),
        (b, b_width): (&mut [B], usize),
        job: &PairJob<'_, A, B>,
    ) {
        let parts = a.len().div_ceil(a_width);
        assert_eq!(parts, b.len().div_ceil(b_width));
        let (a, b) = (Parts::new(a, a_width), Parts::new(b, b_width));
        // SAFETY: as in `each_part`.
        self.share_out(parts, PARALLEL_PARTS, &|index| unsafe { job(index, a.at(index), b.at(index)) });
    }

    /// Calls `job` for every index below `count` once.
    fn share_out(&self, count: usize, parallel: usize, job: &(dyn Fn(usize) + Sync)) {
        if count < parallel || self.threads() == 1 {
            return (0..count).for_each(job);
        }
        self.parallel(&|thread| part(count, thread, self.threads()).for_each(job));
    }
}

#[cfg(test)]
mod tests {
    use crate::kernel::native::{Native, NativeConfig};

    #[test]
    fn every_part_is_handed_out_once() {
        for threads in [1, 3] {
            let native = Native::new(NativeConfig::threads(threads)).unwrap();
            for (len, width) in [(0, 4), (3, 4), (100, 3), (1000, 7)] {
                let (mut a, mut b) = (vec![0u32; len], vec![0u8; len.div_ceil(width) * 2]);
                native.each_part(&mut a, width, &|index, part| {
                    part.iter_mut().for_each(|x| *x += index as u32)
                });
                native.each_large_part(&mut a, width, &|_, part| part.iter_mut().for_each(|x| *x += 1));
                native.each_pair((&mut a, width), (&mut b, 2), &|index, a, b| {
                    a.iter_mut().for_each(|x| *x += 1);
                    b.fill(index as u8);
                });
                assert!(a.iter().enumerate().all(|(i, x)| *x == (i / width) as u32 + 2), "{len} by {width}");
                assert!(b.iter().enumerate().all(|(i, x)| *x == (i / 2) as u8));
            }
        }
    }
}
