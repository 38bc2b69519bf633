//! Kernels that take at least as long as those of a weaker machine: for studies on machines of one kind.
//!
//! Every entry, a matrix product or the experts of a layer, gets a floor under its time: the bytes of weights it
//! reads over the bandwidth to be imitated. Results are those of the kernels inside. The system wakes a thread late,
//! by tens of microseconds each time; how late it was is taken off the next entry's floor, so that the pace holds on
//! average. What it refuses: to be faster than the machine is, and to imitate anything but weights being read.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::{Assignment, KernelError, Kernels, LayerExperts, Linear, PartialSums};
use crate::activations::Activations;
use crate::packed::{PackedExpert, PackedMatrix};

/// Longest floor of an entry: a typing error in the pace must not stop a machine for good.
const FLOOR_MAX: Duration = Duration::from_secs(10);

/// Most that is taken off a floor for waking up late: an entry that was held up for long, by a busy machine, does
/// not make later ones instant.
const CREDIT_MAX: Duration = Duration::from_millis(1);

/// Wraps `inner` so that it reads at most `gb_s` gigabytes (10^9 bytes) of weights per second; as it is without.
pub fn paced(inner: Arc<dyn Kernels>, gb_s: Option<f64>) -> Arc<dyn Kernels> {
    match gb_s.filter(|gb_s| *gb_s > 0.0) {
        None => inner,
        Some(gb_s) => {
            let pace = Pace { bytes_s: gb_s * 1e9, late_ns: AtomicU64::new(0) };
            Arc::new(Paced { inner, pace: Arc::new(pace) })
        }
    }
}

#[derive(Debug)]
struct Pace {
    bytes_s: f64,
    /// How late the last entry ended, to be taken off the next.
    late_ns: AtomicU64,
}

impl Pace {
    /// Runs an entry that reads `bytes`, and waits until its time has passed.
    fn hold<T>(&self, bytes: u64, entry: impl FnOnce() -> T) -> T {
        let started = Instant::now();
        let result = entry();
        let floor = Duration::try_from_secs_f64(bytes as f64 / self.bytes_s).unwrap_or(FLOOR_MAX);
        let credit = Duration::from_nanos(self.late_ns.swap(0, Ordering::Relaxed));
        let until = started + floor.min(FLOOR_MAX).saturating_sub(credit);
        if Instant::now() >= until {
            // The machine itself was slower: nothing was waited for, nothing is owed.
            return result;
        }
        loop {
            let now = Instant::now();
            let left = until.saturating_duration_since(now);
            if left.is_zero() {
                let late = (now - until).min(CREDIT_MAX);
                self.late_ns.store(late.as_nanos() as u64, Ordering::Relaxed);
                return result;
            }
            std::thread::park_timeout(left);
        }
    }
}

/// A backend with a pace.
#[derive(Debug)]
struct Paced {
    inner: Arc<dyn Kernels>,
    pace: Arc<Pace>,
}

impl Kernels for Paced {
    fn name(&self) -> &'static str {
        self.inner.name()
    }

    fn isa(&self) -> String {
        self.inner.isa()
    }

    fn exact(&self) -> bool {
        self.inner.exact()
    }

    fn linear(&self, matrix: PackedMatrix) -> Result<Box<dyn Linear>, KernelError> {
        let bytes = matrix.bytes.len() as u64;
        let inner = self.inner.linear(matrix)?;
        Ok(Box::new(PacedLinear { inner, bytes, pace: Arc::clone(&self.pace) }))
    }

    fn experts(
        &self,
        experts: Vec<(u16, PackedExpert)>,
        step_log2: i8,
    ) -> Result<Arc<dyn LayerExperts>, KernelError> {
        let mut bytes = Vec::new();
        for (index, expert) in &experts {
            let slot = usize::from(*index);
            bytes.resize(bytes.len().max(slot + 1), 0);
            bytes[slot] = expert.bytes.len() as u64;
        }
        let inner = self.inner.experts(experts, step_log2)?;
        Ok(Arc::new(PacedExperts { inner, bytes, pace: Arc::clone(&self.pace) }))
    }
}

#[derive(Debug)]
struct PacedLinear {
    inner: Box<dyn Linear>,
    bytes: u64,
    pace: Arc<Pace>,
}

impl Linear for PacedLinear {
    fn outputs(&self) -> usize {
        self.inner.outputs()
    }

    fn apply(&self, x: Activations<'_>, y: &mut [f32]) -> Result<(), KernelError> {
        self.pace.hold(self.bytes, || self.inner.apply(x, y))
    }
}

#[derive(Debug)]
struct PacedExperts {
    inner: Arc<dyn LayerExperts>,
    /// Of each expert, by index: some may be slices.
    bytes: Vec<u64>,
    pace: Arc<Pace>,
}

impl PacedExperts {
    /// Bytes of the experts a call uses: each is read once.
    fn bytes(&self, assignments: &[Assignment]) -> u64 {
        let mut used = [0_u64; 1 << 10];
        assignments.iter().for_each(|a| used[usize::from(a.expert >> 6)] |= 1 << (a.expert & 63));
        let is_used = |index: usize| used[index >> 6] >> (index & 63) & 1 == 1;
        let used = self.bytes.iter().enumerate().filter(|(index, _)| is_used(*index));
        used.map(|(_, bytes)| bytes).sum()
    }
}

impl LayerExperts for PacedExperts {
    fn holds(&self, index: u16) -> bool {
        self.inner.holds(index)
    }

    fn run(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut PartialSums,
    ) -> Result<(), KernelError> {
        self.pace.hold(self.bytes(assignments), || self.inner.run(x, assignments, out))
    }

    fn run_wide(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut Vec<i64>,
    ) -> Result<(), KernelError> {
        self.pace.hold(self.bytes(assignments), || self.inner.run_wide(x, assignments, out))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Instant0;

    impl LayerExperts for Instant0 {
        fn holds(&self, index: u16) -> bool {
            index < 4
        }
        fn run(
            &self,
            x: Activations<'_>,
            _: &[Assignment],
            out: &mut PartialSums,
        ) -> Result<(), KernelError> {
            out.reset(x.rows(), x.inputs());
            Ok(())
        }
        fn run_wide(
            &self,
            _: Activations<'_>,
            _: &[Assignment],
            _: &mut Vec<i64>,
        ) -> Result<(), KernelError> {
            Err(KernelError::Call("refused".to_owned()))
        }
    }

    fn experts(bytes: &[u64], bytes_s: f64) -> PacedExperts {
        let pace = Arc::new(Pace { bytes_s, late_ns: AtomicU64::new(0) });
        PacedExperts { inner: Arc::new(Instant0), bytes: bytes.to_vec(), pace }
    }

    #[test]
    fn an_expert_counts_once_however_many_rows_it_has() {
        let assignment = |row, expert| Assignment { row, expert, weight: 1.0 };
        // Of different widths: a slice takes the time of its own bytes.
        let mut bytes = vec![0; 65536];
        (bytes[1], bytes[2], bytes[70], bytes[65535]) = (1000, 7, 500, 20);
        let paced = experts(&bytes, 1e12);
        assert_eq!(paced.bytes(&[]), 0);
        assert_eq!(
            paced.bytes(&[assignment(0, 1), assignment(1, 1), assignment(1, 70), assignment(2, 65535)]),
            1520
        );
    }

    #[test]
    fn entries_take_the_time_of_the_weights_and_results_pass_through() {
        // Forty calls of two experts, a thousand experts per second: 80 ms, less the last entry's lateness.
        let paced = experts(&[1000; 4], 1e6);
        let format = crate::format::Format::Bf16;
        let bytes = crate::region::Buffer::zeroed(crate::activations::row_bytes(format, 16));
        let x = Activations::new(format, 1, 16, &bytes).unwrap();
        let two = [0, 3].map(|expert| Assignment { row: 0, expert, weight: 1.0 });
        let (mut sums, started) = (PartialSums::default(), Instant::now());
        (0..40).for_each(|_| paced.run(x, &two, &mut sums).unwrap());
        assert!(started.elapsed() >= Duration::from_millis(80) - CREDIT_MAX, "{:?}", started.elapsed());
        assert_eq!(sums.sums.len(), 16);
        assert!(paced.holds(3) && !paced.holds(4));
        assert!(paced.run_wide(x, &two, &mut Vec::new()).is_err());
    }

    #[test]
    fn without_a_pace_nothing_is_wrapped() {
        use crate::kernel::native::{Native, NativeConfig};
        let native: Arc<dyn Kernels> = Arc::new(Native::new(NativeConfig::threads(1)).unwrap());
        assert!(Arc::ptr_eq(&paced(Arc::clone(&native), None), &native));
        assert!(Arc::ptr_eq(&paced(Arc::clone(&native), Some(0.0)), &native));
        let slow = paced(Arc::clone(&native), Some(1.0));
        assert!(!Arc::ptr_eq(&slow, &native));
        assert_eq!((slow.name(), slow.isa(), slow.exact()), (native.name(), native.isa(), true));
    }
}
