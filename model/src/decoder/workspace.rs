//! Memory of one step, kept from step to step.

use crate::activations::{Activations, row_bytes};
use crate::config::ModelConfig;
use crate::format::Format;
use crate::kernel::Assignment;
use crate::kernel::native::Native;
use crate::kernel::native::attend::AttendScratch;
use crate::kernel::native::kv::Slot;
use crate::region::Buffer;
use std::sync::atomic::{AtomicUsize, Ordering};

/// What the stages of `Decoder` hand to each other. Rows are those of the step.
#[derive(Debug)]
pub struct Workspace {
    /// Rows in this step.
    pub rows: usize,
    /// The residual stream, `[rows, hidden]`.
    pub residual: Vec<f32>,
    /// The rows after the last norm, `[rows, hidden]`.
    pub normed: Vec<f32>,
    /// The same as kernels and experts take them.
    pub input: Rows,
    /// Who computes what in this layer, rows ascending.
    pub assignments: Vec<Assignment>,
    /// Output of the dense block or shared expert, `[rows, hidden]`.
    pub local: Vec<f32>,
    pub(super) qkv: Vec<f32>,
    pub(super) attended: Vec<f32>,
    pub(super) hidden: Vec<f32>,
    pub(super) angles: Vec<f32>,
    pub(super) scores: Vec<f32>,
    /// Scores of one row.
    pub(super) logits: Vec<f32>,
    pub(super) gate_up: Vec<f32>,
    pub(super) inner: Vec<f32>,
    pub(super) inner_input: Rows,
    /// Rows of the step and the slots of the cache where their keys and values go.
    pub(super) slots: Vec<(usize, Slot)>,
    pub(super) attend: AttendScratch,
}

impl Workspace {
    /// An empty workspace for models with weights in `format`.
    pub fn new(format: Format) -> Workspace {
        Workspace {
            rows: 0,
            residual: Vec::new(),
            normed: Vec::new(),
            input: Rows::new(format),
            assignments: Vec::new(),
            local: Vec::new(),
            qkv: Vec::new(),
            attended: Vec::new(),
            hidden: Vec::new(),
            angles: Vec::new(),
            scores: Vec::new(),
            logits: Vec::new(),
            gate_up: Vec::new(),
            inner: Vec::new(),
            inner_input: Rows::new(format),
            slots: Vec::new(),
            attend: AttendScratch::default(),
        }
    }

    pub(super) fn start(&mut self, rows: usize, config: &ModelConfig) {
        let (hidden, q_width) = (config.hidden, config.q_width());
        self.rows = rows;
        self.residual.resize(rows * hidden, 0.0);
        self.local.resize(rows * hidden, 0.0);
        self.hidden.resize(rows * hidden, 0.0);
        self.qkv.resize(rows * (q_width + 2 * config.kv_width()), 0.0);
        self.attended.resize(rows * q_width, 0.0);
    }
}

/// A growing, aligned buffer of activation rows.
#[derive(Debug)]
pub struct Rows {
    format: Format,
    buffer: Buffer,
    rows: usize,
    inputs: usize,
}

impl Rows {
    fn new(format: Format) -> Rows {
        Rows { format, buffer: Buffer::zeroed(0), rows: 0, inputs: 0 }
    }

    /// Room for `rows` rows of `inputs`: `row_bytes` each.
    fn start(&mut self, rows: usize, inputs: usize) -> (&mut [u8], usize) {
        let stride = row_bytes(self.format, inputs);
        if self.buffer.len() < rows * stride {
            self.buffer = Buffer::zeroed((rows * stride).next_power_of_two());
        }
        (self.rows, self.inputs) = (rows, inputs);
        (&mut self.buffer[..rows * stride], stride)
    }

    /// Takes over `values` (`[rows, inputs]`) after `prepare` had each row, quantized if the format says so: one
    /// visit per row, on all threads if there are many. The error is the first row that is not finite.
    pub(super) fn fill(
        &mut self,
        native: &Native,
        values: &mut [f32],
        inputs: usize,
        prepare: &(dyn Fn(usize, &mut [f32]) + Sync),
    ) -> Result<(), usize> {
        let (format, broken) = (self.format, AtomicUsize::new(usize::MAX));
        let (bytes, stride) = self.start(values.len() / inputs, inputs);
        native.each_pair((values, inputs), (bytes, stride), &|row, x, bytes| {
            prepare(row, x);
            if !native.ops().fill_row(format, x, bytes) {
                broken.fetch_min(row, Ordering::Relaxed);
            }
        });
        match broken.into_inner() {
            usize::MAX => Ok(()),
            row => Err(row),
        }
    }

    /// The rows.
    pub fn view(&self) -> Activations<'_> {
        let bytes = &self.buffer[..self.rows * row_bytes(self.format, self.inputs)];
        Activations::new(self.format, self.rows, self.inputs, bytes).expect("filled by `fill`")
    }

    /// The bytes of row `row`, as they travel.
    pub fn row(&self, row: usize) -> &[u8] {
        let stride = row_bytes(self.format, self.inputs);
        &self.buffer[row * stride..][..stride]
    }
}
