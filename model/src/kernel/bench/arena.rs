//! Weights to walk through, and what runs on them one step at a time.
//!
//! Random bytes in the packed format, the same for every backend that is compared; each step takes the next expert or
//! matrix, so that its weights have left the caches by the time it comes round again (if the arena is large).

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::activations::{Activations, row_bytes};
use crate::format::{BLOCK_OUTPUTS, Format};
use crate::kernel::native::ops::Ops;
use crate::kernel::{Assignment, KernelError, Kernels, LayerExperts, Linear, PartialSums};
use crate::packed::{PackedExpert, PackedMatrix};
use crate::region::{Buffer, Bytes};

/// Combine step of the made-up experts: small enough for fine sums, far from overflow.
const STEP_LOG2: i8 = -10;

/// Something that is timed.
pub trait Subject {
    /// Rows per step from now on.
    ///
    /// # Errors
    /// What the backend says.
    fn set_rows(&mut self, rows: usize) -> Result<(), KernelError>;

    /// Runs the next expert or matrix and returns the time it took.
    ///
    /// # Errors
    /// What the backend says.
    fn step(&mut self) -> Result<Duration, KernelError>;
}

/// Distinct blobs of random weights.
pub(in crate::kernel) struct Arena {
    pub(in crate::kernel) bytes: Bytes,
    pub(in crate::kernel) format: Format,
    each: usize,
    count: usize,
}

impl Arena {
    /// `bytes` or a little more, in blobs of `each`; at least two.
    pub(in crate::kernel) fn new(format: Format, each: usize, bytes: usize) -> Arena {
        let count = bytes.div_ceil(each).clamp(2, usize::from(u16::MAX));
        let mut buffer = Buffer::zeroed(count * each);
        fill(format, &mut buffer);
        Arena { bytes: buffer.into(), format, each, count }
    }

    fn blobs(&self) -> impl Iterator<Item = Bytes> {
        (0..self.count).filter_map(|index| self.bytes.slice(index * self.each, self.each))
    }
}

/// Random bytes with sane floats: scales of 0.004 to 0.008 (quantized), weights of magnitude below 2^-6 (bf16).
fn fill(format: Format, bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let (keep, set) = match format {
        Format::Bf16 => (0x807f_807f_807f_807f, 0x3c00_3c00_3c00_3c00),
        Format::Q8 | Format::Q4 => (u64::MAX, 0),
    };
    for word in bytes.as_chunks_mut::<8>().0 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = (state & keep | set).to_le_bytes();
    }
    if format.is_quantized() {
        let size = format.group_bytes();
        for group in bytes.chunks_exact_mut(size) {
            for scale in group[size - 2 * BLOCK_OUTPUTS..].as_chunks_mut::<2>().0 {
                let bits = u16::from_le_bytes(*scale);
                *scale = (0x1c00 | bits & 0x3ff).to_le_bytes();
            }
        }
    }
}

/// Rows to compute with.
struct Batch {
    format: Format,
    width: usize,
    rows: usize,
    bytes: Buffer,
}

impl Batch {
    fn new(format: Format, width: usize, rows: usize) -> Result<Batch, KernelError> {
        let values: Vec<f32> = (0..rows * width).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();
        let mut bytes = Buffer::zeroed(rows * row_bytes(format, width));
        Ops::default()
            .fill_rows(format, width, &values, &mut bytes)
            .map_err(|e| KernelError::Call(e.to_string()))?;
        Ok(Batch { format, width, rows, bytes })
    }

    fn view(&self) -> Result<Activations<'_>, KernelError> {
        Activations::new(self.format, self.rows, self.width, &self.bytes)
            .ok_or_else(|| KernelError::Call("the benchmark's rows do not fit".to_owned()))
    }
}

/// Experts of an arena, one per step, all rows through it.
pub(in crate::kernel) struct ExpertRunner {
    experts: Arc<dyn LayerExperts>,
    count: usize,
    next: usize,
    batch: Batch,
    assignments: Vec<Assignment>,
    sums: PartialSums,
}

impl ExpertRunner {
    /// Loads the arena's blobs as experts of `shape` (hidden, inter).
    pub(in crate::kernel) fn new(
        kernels: &dyn Kernels,
        arena: &Arena,
        (hidden, inter): (usize, usize),
    ) -> Result<ExpertRunner, KernelError> {
        let format = arena.format;
        let expert = |bytes| PackedExpert { format, hidden, inter, bytes };
        let experts = arena.blobs().enumerate().map(|(index, bytes)| (index as u16, expert(bytes))).collect();
        Ok(ExpertRunner {
            experts: kernels.experts(experts, STEP_LOG2)?,
            count: arena.count,
            next: 0,
            batch: Batch::new(format, hidden, 0)?,
            assignments: Vec::new(),
            sums: PartialSums::default(),
        })
    }
}

impl Subject for ExpertRunner {
    fn set_rows(&mut self, rows: usize) -> Result<(), KernelError> {
        self.batch = Batch::new(self.batch.format, self.batch.width, rows)?;
        self.assignments = (0..rows as u32).map(|row| Assignment { row, expert: 0, weight: 0.125 }).collect();
        Ok(())
    }

    fn step(&mut self) -> Result<Duration, KernelError> {
        self.next = (self.next + 1) % self.count;
        self.assignments.iter_mut().for_each(|a| a.expert = self.next as u16);
        let x = self.batch.view()?;
        let start = Instant::now();
        self.experts.run(x, &self.assignments, &mut self.sums)?;
        Ok(start.elapsed())
    }
}

/// Matrices of an arena, one per step.
pub(in crate::kernel) struct LinearRunner {
    matrices: Vec<Box<dyn Linear>>,
    next: usize,
    batch: Batch,
    results: Vec<f32>,
}

impl LinearRunner {
    /// Loads the arena's blobs as matrices of `shape` (outputs, inputs).
    pub(in crate::kernel) fn new(
        kernels: &dyn Kernels,
        arena: &Arena,
        (outputs, inputs): (usize, usize),
    ) -> Result<LinearRunner, KernelError> {
        let format = arena.format;
        let matrix = |bytes| kernels.linear(PackedMatrix { format, outputs, inputs, bytes });
        let matrices = arena.blobs().map(matrix).collect::<Result<_, _>>()?;
        Ok(LinearRunner { matrices, next: 0, batch: Batch::new(format, inputs, 0)?, results: Vec::new() })
    }
}

impl Subject for LinearRunner {
    fn set_rows(&mut self, rows: usize) -> Result<(), KernelError> {
        self.batch = Batch::new(self.batch.format, self.batch.width, rows)?;
        self.results = vec![0.0; rows * self.matrices.first().map_or(0, |matrix| matrix.outputs())];
        Ok(())
    }

    fn step(&mut self) -> Result<Duration, KernelError> {
        self.next = (self.next + 1) % self.matrices.len();
        let (x, matrix) = (self.batch.view()?, &self.matrices[self.next]);
        let start = Instant::now();
        matrix.apply(x, &mut self.results)?;
        Ok(start.elapsed())
    }
}
