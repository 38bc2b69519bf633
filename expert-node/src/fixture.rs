//! Experts, kernels and callers small enough to calculate by hand, for the tests of this crate.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};

use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::call::{Assignment as WireAssignment, Call, CallDraft, CallHead};
use mesh_wire::control::{Placement, Refusal};
use mesh_wire::id::{ExpertKey, Slice};
use mesh_wire::payload::RowFormat;
use mesh_wire::reply::Reply;
use model::activations::Activations;
use model::format::Format;
use model::kernel::{Assignment, KernelError, Kernels, LayerExperts, Linear, PartialSums};
use model::open::OpenError;
use model::packed::{PackedExpert, PackedMatrix};
use model::region;

use crate::batch::{Answer, Job};
use crate::shard::{Shape, Source};

pub(crate) const HIDDEN: usize = 32;
pub(crate) const EXPERT_BYTES: u64 = 3 * 544 * 2;
pub(crate) const FINGERPRINT: [u8; 32] = [3; 32];

/// Weights that make the fake kernel do something.
pub(crate) const PANICS: f32 = 1000.0;
pub(crate) const FAILS: f32 = 1001.0;
pub(crate) const OVERFLOWS: f32 = 1002.0;

/// Width of the wide experts: three blocks, the last of them ragged.
pub(crate) const WIDE: usize = 300;

/// Layers 1 and 3 with 8 experts each; every byte of an expert is `10 layer + expert`, but for wide ones.
#[derive(Debug, Default)]
pub(crate) struct FakeSource {
    /// What was read, in order.
    pub(crate) reads: Mutex<Vec<Slice>>,
    /// Experts are `WIDE`, and their bytes differ (`wide_expert`).
    pub(crate) wide: bool,
    /// Reading this one fails.
    pub(crate) broken: Option<ExpertKey>,
}

impl Source for FakeSource {
    fn shape(&self) -> Shape {
        Shape {
            format: Format::Q8,
            hidden: HIDDEN,
            inter: if self.wide { WIDE } else { 32 },
            expert_bytes: if self.wide { Format::Q8.expert_bytes(HIDDEN, WIDE) as u64 } else { EXPERT_BYTES },
            layers: vec![1, 3],
            experts: 8,
        }
    }

    fn fingerprint(&self) -> [u8; 32] {
        FINGERPRINT
    }

    fn read(&self, slice: Slice, out: &mut [u8]) -> Result<(), OpenError> {
        let key = slice.key;
        self.reads.lock().unwrap().push(slice);
        if self.broken == Some(key) || !(key.layer == 1 || key.layer == 3) || key.expert >= 8 {
            return Err(OpenError(format!("expert {} of layer {} cannot be read", key.expert, key.layer)));
        }
        if self.wide {
            wide_expert(key).write_slice((slice.from, slice.to), out).unwrap();
        } else {
            assert_eq!(out.len() as u64, EXPERT_BYTES);
            out.fill((10 * key.layer + key.expert) as u8);
        }
        Ok(())
    }

    fn step_log2(&self, layer: u16) -> i8 {
        layer as i8
    }
}

/// Output of an expert: its byte at the column times the row's value at the column times the weight.
#[derive(Debug, Default)]
pub(crate) struct FakeKernels {
    /// Entries into `run` of all layers.
    pub(crate) entries: Arc<AtomicUsize>,
    /// Layers taken over.
    pub(crate) layers: AtomicUsize,
}

#[derive(Debug)]
struct FakeLayer {
    experts: Vec<(u16, PackedExpert)>,
    entries: Arc<AtomicUsize>,
}

impl Kernels for FakeKernels {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn isa(&self) -> String {
        "none".into()
    }

    fn exact(&self) -> bool {
        true
    }

    fn linear(&self, _: PackedMatrix) -> Result<Box<dyn Linear>, KernelError> {
        Err(KernelError::Weights("no matrices here".into()))
    }

    fn experts(
        &self,
        experts: Vec<(u16, PackedExpert)>,
        _: i8,
    ) -> Result<Arc<dyn LayerExperts>, KernelError> {
        self.layers.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(FakeLayer { experts, entries: Arc::clone(&self.entries) }))
    }
}

impl LayerExperts for FakeLayer {
    fn holds(&self, index: u16) -> bool {
        self.experts.iter().any(|(expert, _)| *expert == index)
    }

    fn run(
        &self,
        x: Activations<'_>,
        assignments: &[Assignment],
        out: &mut PartialSums,
    ) -> Result<(), KernelError> {
        self.entries.fetch_add(1, Ordering::Relaxed);
        out.reset(x.rows(), HIDDEN);
        for assignment in assignments {
            let row = assignment.row as usize;
            let (_, packed) = self.experts.iter().find(|(expert, _)| *expert == assignment.expert).unwrap();
            match assignment.weight {
                PANICS => panic!("as told"),
                FAILS => return Err(KernelError::Call("as told".into())),
                OVERFLOWS => out.overflowed[row] = true,
                _ => {}
            }
            let values = x.quantized(row).0;
            for (column, sum) in out.sums[row * HIDDEN..(row + 1) * HIDDEN].iter_mut().enumerate() {
                *sum +=
                    i32::from(packed.bytes[column]) * i32::from(values[column]) * assignment.weight as i32;
            }
        }
        Ok(())
    }

    fn run_wide(&self, _: Activations<'_>, _: &[Assignment], _: &mut Vec<i64>) -> Result<(), KernelError> {
        Err(KernelError::Call("not on nodes".into()))
    }
}

/// All of a wide expert: bytes that differ from place to place and from expert to expert, scales that are finite.
pub(crate) fn wide_expert(key: ExpertKey) -> PackedExpert {
    let mut bytes = region::Buffer::zeroed(Format::Q8.expert_bytes(HIDDEN, WIDE));
    let seed = usize::from(10 * key.layer + key.expert);
    bytes.iter_mut().enumerate().for_each(|(at, byte)| *byte = ((at * 37 + at / 251 + seed) % 61) as u8);
    PackedExpert { format: Format::Q8, hidden: HIDDEN, inter: WIDE, bytes: bytes.into() }
}

pub(crate) fn key(layer: u16, expert: u16) -> ExpertKey {
    ExpertKey { layer, expert }
}

/// The first block of an expert, which is all of those that are not wide.
pub(crate) fn first(layer: u16, expert: u16) -> Slice {
    Slice { key: key(layer, expert), from: 0, to: 1 }
}

pub(crate) fn placement(epoch: u64, experts: impl IntoIterator<Item = (u16, u16)>) -> Placement {
    let experts = experts.into_iter().map(|(layer, expert)| first(layer, expert)).collect();
    Placement { epoch, model: FINGERPRINT, experts }
}

/// A call of `values.len()` rows; every column of a row is its value.
pub(crate) fn call(
    pool: &Pool,
    head: (u64, u64, u16),
    values: &[i8],
    assignments: &[(u32, u16, f32)],
) -> Call {
    let (call, epoch, layer) = head;
    let head = CallHead {
        call,
        step: 0,
        epoch,
        budget_us: 60_000_000,
        layer,
        format: RowFormat::Int8,
        hidden: HIDDEN as u32,
        rows: values.len() as u32,
    };
    let assignments: Vec<_> =
        assignments.iter().map(|(row, expert, weight)| WireAssignment::new(*row, *expert, *weight)).collect();
    let mut draft = CallDraft::new(pool, head, &assignments).unwrap();
    for (row, value) in draft.payload_mut().chunks_exact_mut(64).zip(values) {
        row[..HIDDEN].fill(*value as u8);
    }
    Call::parse(draft.finish().into_buffer()).unwrap()
}

/// What fake callers are told.
pub(crate) type Answers = Receiver<Result<Buffer, (Refusal, String)>>;

#[derive(Debug)]
pub(crate) struct Caller {
    sender: Sender<Result<Buffer, (Refusal, String)>>,
    wanted: Arc<AtomicBool>,
}

impl Answer for Caller {
    fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    fn complete(self: Box<Self>, reply: Buffer) {
        self.sender.send(Ok(reply)).unwrap();
    }

    fn refuse(self: Box<Self>, refusal: Refusal, detail: &str) {
        self.sender.send(Err((refusal, detail.to_owned()))).unwrap();
    }
}

/// A job, where its answer arrives, and the switch that says whether it is wanted.
pub(crate) fn job(call: Call) -> (Job, Answers, Arc<AtomicBool>) {
    let (sender, answers) = channel();
    let wanted = Arc::new(AtomicBool::new(true));
    let answer = Box::new(Caller { sender, wanted: Arc::clone(&wanted) });
    (Job { call, answer }, answers, wanted)
}

/// The reply that has arrived.
pub(crate) fn reply(answers: &Answers) -> Reply {
    Reply::parse(answers.try_recv().expect("answered").expect("not refused")).unwrap()
}

/// The refusal that has arrived.
pub(crate) fn refusal(answers: &Answers) -> (Refusal, String) {
    answers.try_recv().expect("answered").expect_err("refused")
}
