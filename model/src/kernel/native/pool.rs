//! The threads that compute, kept from call to call.
//!
//! Problem: a layer takes a few hundred microseconds, so a thread per call or a sleeping barrier would cost as
//! much as the work. Idea: workers wait for a counter to move; they watch it for a few microseconds and only then
//! sleep, and the caller works too. Price: a core per worker stays hot for the watching time after each call; where
//! threads outnumber cores the time is zero. A panic in a job reaches the caller after all threads are done.
//! One thread means no machinery at all. Refuses: jobs from inside jobs (`run` borrows the pool exclusively).
#![allow(
    unsafe_code,
    reason = "the job is borrowed by threads that outlive the call; pinning is a system call"
)]

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle, available_parallelism};
use std::time::{Duration, Instant};

/// Work: called once per thread with the thread's number, 0 being the caller.
type Job = dyn Fn(usize) + Sync;

/// Rounds of watching between two looks at the clock, which costs 20-50 ns.
const WATCH_ROUNDS: usize = 32;

/// A fixed number of threads, the caller's included.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// How threads wait.
#[derive(Debug)]
struct Gate {
    spin: Duration,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    moved: Condvar,
}

struct Shared {
    gate: Gate,
    /// Number of jobs started so far.
    started: AtomicUsize,
    /// Workers that have yet to finish the current job.
    busy: AtomicUsize,
    stop: AtomicBool,
    job: UnsafeCell<Option<*const Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written by the caller only while no worker is busy, before the release of `started` that
// workers acquire; everything else is Sync by itself.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is used only while the call that set it waits.
unsafe impl Send for Shared {}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("gate", &self.gate).finish_non_exhaustive()
    }
}

/// A lock whose holder panicked guards nothing that could be half done here.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Gate {
    /// Returns once `open` holds: watches for the spin time, then sleeps until `wake`.
    fn wait(&self, open: impl Fn() -> bool) {
        if !self.spin.is_zero() {
            let start = Instant::now();
            loop {
                for _ in 0..WATCH_ROUNDS {
                    if open() {
                        return;
                    }
                    std::hint::spin_loop();
                }
                if start.elapsed() > self.spin {
                    break;
                }
            }
        }
        let mut guard = locked(&self.lock);
        // Counted before the last look: either `wake` sees the sleeper or the sleeper sees the change.
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !open() {
            guard = self.moved.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }

    /// To be called after every change that `open` looks at (which must be SeqCst).
    fn wake(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _guard = locked(&self.lock);
            self.moved.notify_all();
        }
    }
}

impl Pool {
    /// `threads` threads in all; worker i runs on core `cores[i % len]` if any are given (the caller, number 0,
    /// is pinned by its owner). `spin` is how long they watch before they sleep; ignored where threads outnumber
    /// the cores this process may use.
    pub(super) fn new(threads: usize, cores: &[usize], spin: Duration) -> std::io::Result<Pool> {
        let crowded = available_parallelism().is_ok_and(|cores| threads > cores.get());
        let spin = if crowded { Duration::ZERO } else { spin };
        let gate = Gate { spin, sleepers: AtomicUsize::new(0), lock: Mutex::new(()), moved: Condvar::new() };
        let shared = Arc::new(Shared {
            gate,
            started: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            job: UnsafeCell::new(None),
            panic: Mutex::new(None),
        });
        let mut pool = Pool { shared, workers: Vec::new() };
        for number in 1..threads.max(1) {
            let shared = Arc::clone(&pool.shared);
            let core = if cores.is_empty() { None } else { Some(cores[number % cores.len()]) };
            let builder = Builder::new().name(format!("kernel-{number}"));
            pool.workers.push(builder.spawn(move || work(&shared, number, core))?);
        }
        Ok(pool)
    }

    /// Threads, the caller's included.
    pub(super) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(i)` on every thread i and returns when all are done. A panic of any is raised again here.
    pub(super) fn run(&mut self, job: &(dyn Fn(usize) + Sync)) {
        if self.workers.is_empty() {
            job(0);
            return;
        }
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes; `run` does not return before every worker is done with the job.
        let raw = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), *const Job>(job) };
        // SAFETY: no worker is busy (`run` is exclusive and waits), so nobody reads the cell.
        unsafe { *shared.job.get() = Some(raw) };
        shared.busy.store(self.workers.len(), Ordering::SeqCst);
        shared.started.fetch_add(1, Ordering::SeqCst);
        shared.gate.wake();
        let mine = catch_unwind(AssertUnwindSafe(|| job(0)));
        shared.gate.wait(|| shared.busy.load(Ordering::SeqCst) == 0);
        let theirs = locked(&shared.panic).take();
        if let Some(cause) = mine.err().or(theirs) {
            resume_unwind(cause);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.gate.wake();
        for worker in self.workers.drain(..) {
            // A worker catches the panics of its jobs; there is nothing to learn from how it ended.
            drop(worker.join());
        }
    }
}

fn work(shared: &Shared, number: usize, core: Option<usize>) {
    if let Some(core) = core {
        pin(core);
    }
    let mut seen = 0;
    loop {
        shared
            .gate
            .wait(|| shared.started.load(Ordering::SeqCst) != seen || shared.stop.load(Ordering::SeqCst));
        if shared.started.load(Ordering::SeqCst) == seen {
            return;
        }
        seen += 1;
        // SAFETY: the caller wrote the job before it moved `started`, and keeps it until `busy` is zero.
        let result = catch_unwind(AssertUnwindSafe(|| unsafe {
            if let Some(job) = *shared.job.get() {
                (*job)(number);
            }
        }));
        if let Err(cause) = result {
            *locked(&shared.panic) = Some(cause);
        }
        shared.busy.fetch_sub(1, Ordering::SeqCst);
        shared.gate.wake();
    }
}

/// The cores this process may use, ascending; empty where the system does not say.
#[cfg(target_os = "linux")]
pub(super) fn allowed_cores() -> Vec<usize> {
    // SAFETY: an all-zero cpu_set_t is an empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is writable for the call; 0 means this thread.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) } != 0 {
        return Vec::new();
    }
    // SAFETY: the index lies inside the set.
    (0..libc::CPU_SETSIZE as usize).filter(|&core| unsafe { libc::CPU_ISSET(core, &set) }).collect()
}

#[cfg(not(target_os = "linux"))]
pub(super) fn allowed_cores() -> Vec<usize> {
    Vec::new()
}

/// Keeps the current thread on one core. Failing (a core outside the allowed set) only costs speed.
#[cfg(target_os = "linux")]
fn pin(core: usize) {
    if core >= libc::CPU_SETSIZE as usize {
        tracing::warn!(core, "no such core to pin a kernel thread to");
        return;
    }
    // SAFETY: an all-zero cpu_set_t is an empty set, and `core` lies inside it.
    let set = unsafe {
        let mut set: libc::cpu_set_t = std::mem::zeroed();
        libc::CPU_SET(core, &mut set);
        set
    };
    // SAFETY: the set is valid for the call; 0 means this thread.
    if unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) } != 0 {
        tracing::warn!(core, "could not pin a kernel thread: {}", std::io::Error::last_os_error());
    }
}

#[cfg(not(target_os = "linux"))]
fn pin(_core: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(threads: usize, spin: Duration, rounds: usize) -> Vec<usize> {
        let mut pool = Pool::new(threads, &[], spin).unwrap();
        let counts: Vec<AtomicUsize> = (0..threads).map(|_| AtomicUsize::new(0)).collect();
        for _ in 0..rounds {
            pool.run(&|i| {
                counts[i].fetch_add(1, Ordering::Relaxed);
            });
        }
        counts.into_iter().map(AtomicUsize::into_inner).collect()
    }

    #[test]
    fn every_thread_runs_every_job_once() {
        for threads in [1, 2, 3, 7] {
            for spin in [Duration::ZERO, Duration::from_micros(20)] {
                assert_eq!(counts(threads, spin, 500), vec![500; threads]);
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3, &[0], Duration::from_micros(5)).unwrap();
        for guilty in 0..3 {
            let outcome = catch_unwind(AssertUnwindSafe(|| pool.run(&|i| assert!(i != guilty, "by {i}"))));
            let message = *outcome.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("by {guilty}"));
        }
        let ran = AtomicUsize::new(0);
        pool.run(&|_| {
            ran.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.into_inner(), 3);
    }
    #[cfg(target_os = "linux")]
    #[test]
    fn workers_stay_on_their_cores_and_the_caller_keeps_its_own() {
        let before = allowed_cores();
        let mut pool = Pool::new(3, &before, Duration::ZERO).unwrap();
        let seen: Vec<Mutex<Vec<usize>>> = (0..3).map(|_| Mutex::default()).collect();
        pool.run(&|i| *locked(&seen[i]) = allowed_cores());
        assert_eq!(*locked(&seen[0]), before);
        for i in 1..3 {
            assert_eq!(*locked(&seen[i]), [before[i % before.len()]]);
        }
    }
}
