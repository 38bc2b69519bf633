//! Where libtorch computes, what is left of its memory, and what to tell the user when that runs out.
//!
//! Everything that is to stay on the device, and what a call takes while it runs, is announced here first (`reserve`),
//! so that an error can name the need beside what is there already. libtorch's own refusal and a `memory_bytes`
//! that is spent take the same way out: `KernelError::Backend`, never a panic, and nothing stays reserved.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tch::{Device, TchError};

use crate::kernel::KernelError;

/// What libtorch's messages say when memory is short: CUDA's and MPS's allocators, and the CPU's.
const OUT_OF_MEMORY: [&str; 3] = ["out of memory", "can't allocate memory", "not enough memory"];

/// A device in use.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) device: Device,
    /// As the user wrote it.
    pub(super) name: String,
    /// Whether weights and rows are copied there, rather than used where they lie.
    pub(super) remote: bool,
    memory_bytes: Option<u64>,
    taken: Arc<AtomicU64>,
}

/// Memory that is counted as taken until this is dropped.
#[derive(Debug)]
pub(super) struct Reserved {
    bytes: u64,
    taken: Arc<AtomicU64>,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.taken.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// An error of this backend.
pub(super) fn refused(reason: String) -> KernelError {
    KernelError::Backend { backend: "libtorch", reason }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

impl Place {
    /// Opens the device `name`; `memory_bytes` is the most that may be taken of it.
    pub(super) fn open(name: &str, memory_bytes: Option<u64>) -> Result<Place, KernelError> {
        let device = parse(name)?;
        Ok(Place {
            device,
            name: name.to_owned(),
            remote: device != Device::Cpu,
            memory_bytes,
            taken: Arc::default(),
        })
    }

    /// The CPU, treated like a device that weights are copied to: everything but the allocation takes the way it takes
    /// on a GPU.
    #[cfg(test)]
    pub(super) fn as_if_remote(memory_bytes: Option<u64>) -> Place {
        let name = "cpu".to_owned();
        Place { device: Device::Cpu, name, remote: true, memory_bytes, taken: Arc::default() }
    }

    /// Bytes announced and not given back.
    #[cfg(test)]
    pub(super) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Counts `bytes` as taken. `what` names the taker in messages.
    pub(super) fn reserve(&self, bytes: u64, what: &str) -> Result<Reserved, KernelError> {
        let before = self.taken.fetch_add(bytes, Ordering::Relaxed);
        let reserved = Reserved { bytes, taken: Arc::clone(&self.taken) };
        match self.memory_bytes {
            Some(limit) if before.saturating_add(bytes) > limit => {
                Err(self.full(bytes, what, &format!("its limit is {}", megabytes(limit))))
            }
            _ => Ok(reserved),
        }
    }

    /// An operator's error while `bytes` were asked for.
    pub(super) fn failed(&self, error: &TchError, bytes: u64, what: &str) -> KernelError {
        let text = error.to_string();
        let first = text.lines().map(str::trim).find(|line| !line.is_empty()).unwrap_or("no reason given");
        if OUT_OF_MEMORY.iter().any(|sign| text.contains(sign)) {
            return self.full(bytes, what, first);
        }
        refused(format!("device '{}': {what}: {first}", self.name))
    }

    fn full(&self, bytes: u64, what: &str, reason: &str) -> KernelError {
        let taken = self.taken.load(Ordering::Relaxed);
        refused(format!(
            "device '{}' is out of memory: {what} needs {} beside {} taken ({reason}). Give it fewer experts \
             (--memory), a smaller format (--weights q4), shorter chunks (--chunk of the router), or use --device cpu",
            self.name,
            megabytes(bytes),
            megabytes(taken.saturating_sub(bytes))
        ))
    }
}

/// The devices that libtorch finds here, by the names that are accepted.
pub fn devices() -> Vec<String> {
    let mut names = vec!["cpu".to_owned()];
    names.extend((0..tch::Cuda::device_count().max(0)).map(|index| format!("cuda:{index}")));
    if tch::utils::has_mps() {
        names.push("mps".to_owned());
    }
    names
}

fn parse(name: &str) -> Result<Device, KernelError> {
    let here = devices();
    let absent = || {
        let here = here.join(", ");
        refused(format!("device '{name}' is not here: this libtorch finds {here}"))
    };
    match name.split_once(':') {
        None if name == "cpu" => Ok(Device::Cpu),
        None if name == "mps" => here.iter().any(|d| d == "mps").then_some(Device::Mps).ok_or_else(absent),
        None if name == "cuda" => {
            here.iter().any(|d| d == "cuda:0").then_some(Device::Cuda(0)).ok_or_else(absent)
        }
        Some(("cuda", index)) => {
            let index: usize = index.parse().map_err(|_| {
                refused(format!("device '{name}': after cuda: belongs a number, as in cuda:0"))
            })?;
            here.iter().any(|d| d == name).then_some(Device::Cuda(index)).ok_or_else(absent)
        }
        _ => Err(refused(format!("unknown device '{name}': use cpu, cuda, cuda:N or mps"))),
    }
}
