//! A call: rows for the experts of one node at one layer.
//!
//! The caller fills in a `CallHead` and the assignments, gets the frame's payload as `&mut [u8]` at a multiple of
//! 64, and quantizes its rows straight into it. The receiver turns a filled buffer into a `Call` by one validation
//! (structure, limits, lengths, indices, finite numbers) and from then on only sees slices of it. Price: the
//! payload is zeroed before it is written. Refuses batches above 1 MiB: the router splits them by rows.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use rkyv::bytecheck::CheckBytes;
use rkyv::rend::{f32_le, u16_le, u32_le};
use rkyv::{Archive, Portable, Serialize};

use crate::archive::{self, Block, Reserve};
use crate::buffer::{Buffer, Pool};
use crate::frame::{
    ASSIGNMENTS_MAX, BUDGET_US_MAX, CALL_PAYLOAD_BYTES_MAX, FrameError, Op, TOP_K_MAX, check_shape,
};
use crate::payload::{GROUP, ROW_ALIGN, RowFormat, padded, row_bytes};

/// One row goes through one expert.
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Assignment {
    /// Row of the payload.
    pub row: u32,
    /// Gate weight its output is multiplied by.
    pub weight: f32,
    /// Expert of the call's layer.
    pub expert: u16,
    /// Zero; kept for slices of an expert.
    reserved: u16,
}

impl Assignment {
    /// `row` through `expert`, weighted.
    pub fn new(row: u32, expert: u16, weight: f32) -> Assignment {
        Assignment { row, weight, expert, reserved: 0 }
    }
}

/// `Assignment` as rkyv knows it: the same bytes.
#[derive(Clone, Copy, Debug, CheckBytes, Portable)]
#[bytecheck(crate = rkyv::bytecheck)]
#[repr(C)]
struct Record {
    row: u32_le,
    weight: f32_le,
    expert: u16_le,
    reserved: u16_le,
}

const _: () = assert!(size_of::<Record>() == size_of::<Assignment>() && size_of::<Record>() == 12);

/// Everything about a call but its assignments and rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CallHead {
    /// Unique per attempt: a repeated call has another one.
    pub call: u64,
    /// The step it belongs to, for traces.
    pub step: u64,
    /// Placement epoch the assignments are by.
    pub epoch: u64,
    /// Microseconds, counted from receipt, after which nobody waits for the answer.
    pub budget_us: u32,
    /// Decoder layer.
    pub layer: u16,
    /// How rows are written.
    pub format: RowFormat,
    /// Values per row, before padding.
    pub hidden: u32,
    /// Rows in the payload.
    pub rows: u32,
}

impl CallHead {
    /// Bytes of the payload.
    ///
    /// # Errors
    /// `Rows`, `Hidden` or `Payload` where a limit is exceeded.
    pub fn payload_bytes(&self) -> Result<usize, FrameError> {
        check_shape(self.rows, self.hidden)?;
        let row = row_bytes(self.format, self.hidden as usize);
        let bytes = row.saturating_mul(self.rows as usize);
        if bytes > CALL_PAYLOAD_BYTES_MAX {
            return Err(FrameError::Payload { bytes, expected: CALL_PAYLOAD_BYTES_MAX });
        }
        Ok(bytes)
    }

    /// Rows of this format and width that fit in one call.
    pub fn rows_max(format: RowFormat, hidden: u32) -> u32 {
        let row = row_bytes(format, hidden as usize).max(ROW_ALIGN);
        (CALL_PAYLOAD_BYTES_MAX / row).min(crate::frame::ROWS_MAX) as u32
    }

    fn check_assignments(&self, count: usize) -> Result<(), FrameError> {
        let max = (self.rows as usize).saturating_mul(TOP_K_MAX).min(ASSIGNMENTS_MAX);
        if count == 0 || count > max { Err(FrameError::Assignments { count, max }) } else { Ok(()) }
    }
}

#[derive(Archive, Serialize)]
struct CallArchive {
    call: u64,
    step: u64,
    epoch: u64,
    budget_us: u32,
    hidden: u32,
    rows: u32,
    layer: u16,
    format: u8,
    reserved: u8,
    assignments: Reserve<Record>,
    payload: Reserve<Block>,
}

/// A call being built: the frame is laid out, its payload is zero.
#[derive(Debug)]
pub struct CallDraft {
    buffer: Buffer,
    head: CallHead,
    assignments: u32,
    payload: Range<usize>,
}

impl CallDraft {
    /// Lays out the frame in a buffer of the pool.
    ///
    /// # Errors
    /// A `FrameError` that says which limit the call exceeds, or that the pool is exhausted.
    pub fn new(pool: &Pool, head: CallHead, assignments: &[Assignment]) -> Result<CallDraft, FrameError> {
        let payload_bytes = head.payload_bytes()?;
        head.check_assignments(assignments.len())?;
        check_each(&head, assignments)?;
        if head.budget_us == 0 || head.budget_us > BUDGET_US_MAX {
            return Err(FrameError::Budget(head.budget_us));
        }
        let value = CallArchive {
            call: head.call,
            step: head.step,
            epoch: head.epoch,
            budget_us: head.budget_us,
            hidden: head.hidden,
            rows: head.rows,
            layer: head.layer,
            format: head.format as u8,
            reserved: 0,
            assignments: Reserve::new(assignments.len()),
            payload: Reserve::new(payload_bytes / ROW_ALIGN),
        };
        let vectors = value.assignments.bytes() + value.payload.bytes();
        let mut buffer = archive::write(pool, Op::Call, vectors, &value)?;
        let records = bytemuck::cast_slice(assignments);
        buffer.body_mut()[value.assignments.range()].copy_from_slice(records);
        let count = assignments.len() as u32;
        Ok(CallDraft { buffer, head, assignments: count, payload: value.payload.range() })
    }

    /// The whole payload: `rows * row_bytes(format, hidden)` bytes, beginning at a multiple of 64.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.buffer.body_mut()[self.payload.clone()]
    }

    /// Copies rows that are already written elsewhere in the call's format; `rows` yields each row's bytes.
    ///
    /// # Errors
    /// `Payload` where the rows are not as many or as long as the head says.
    pub fn copy_rows<'r>(&mut self, rows: impl IntoIterator<Item = &'r [u8]>) -> Result<(), FrameError> {
        let row = row_bytes(self.head.format, self.head.hidden as usize);
        let expected = self.payload.len();
        let payload = self.payload_mut();
        let mut at = 0;
        for bytes in rows {
            let to = payload.get_mut(at..at + row).filter(|to| to.len() == bytes.len());
            to.ok_or(FrameError::Payload { bytes: at + bytes.len(), expected })?.copy_from_slice(bytes);
            at += row;
        }
        if at == expected { Ok(()) } else { Err(FrameError::Payload { bytes: at, expected }) }
    }

    /// The finished frame. What the payload holds is the caller's promise; the receiver checks it.
    pub fn finish(self) -> OutgoingCall {
        OutgoingCall { buffer: self.buffer, head: self.head, assignments: self.assignments }
    }
}

/// A call that is ready to be sent.
#[derive(Debug)]
pub struct OutgoingCall {
    buffer: Buffer,
    head: CallHead,
    assignments: u32,
}

impl OutgoingCall {
    /// What it asks for.
    pub fn head(&self) -> &CallHead {
        &self.head
    }

    /// How many (row, expert) pairs it has.
    pub fn assignments(&self) -> u32 {
        self.assignments
    }

    /// Bytes that will cross the wire, header included.
    pub fn frame_bytes(&self) -> usize {
        self.buffer.frame().len()
    }

    /// The frame.
    pub fn into_buffer(self) -> Buffer {
        self.buffer
    }
}

/// A call that a peer sent and that is what it should be. Owns its buffer; every accessor is a slice of it.
#[derive(Debug)]
pub struct Call {
    buffer: Buffer,
    layout: Layout,
}

/// A refused frame, with the call's number where that much could be read, so that the caller can be told.
#[derive(Clone, Debug, PartialEq)]
pub struct BadCall {
    /// The call it says it is.
    pub call: Option<u64>,
    /// What is wrong with it.
    pub error: FrameError,
}

impl Call {
    /// Validates a received buffer.
    ///
    /// # Errors
    /// What is wrong with it; it never panics and never allocates.
    pub fn parse(buffer: Buffer) -> Result<Call, BadCall> {
        if buffer.op() != Op::Call {
            return Err(BadCall { call: None, error: FrameError::UnexpectedOp(buffer.op()) });
        }
        let layout = Layout::check(buffer.body())?;
        Ok(Call { buffer, layout })
    }

    /// The call as slices.
    pub fn view(&self) -> CallView<'_> {
        self.layout.view(self.buffer.body())
    }

    /// Everything but assignments and rows.
    pub fn head(&self) -> &CallHead {
        &self.layout.head
    }
}

/// A validated call, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct CallView<'a> {
    head: CallHead,
    assignments: &'a [Assignment],
    payload: &'a [u8],
}

impl<'a> CallView<'a> {
    /// Validates a frame's body that lies at a multiple of 64 (see `Call::parse`).
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(body: &'a [u8]) -> Result<CallView<'a>, BadCall> {
        Ok(Layout::check(body)?.view(body))
    }

    /// Everything but assignments and rows.
    pub fn head(&self) -> &CallHead {
        &self.head
    }

    /// Which row goes through which expert; every row is below `head().rows`.
    pub fn assignments(&self) -> &'a [Assignment] {
        self.assignments
    }

    /// All rows, each `row_bytes(format, hidden)` long; begins at a multiple of 64. Scales (f32 rows: values) are
    /// finite.
    pub fn payload(&self) -> &'a [u8] {
        self.payload
    }
}

#[derive(Debug)]
struct Layout {
    head: CallHead,
    assignments: Range<usize>,
    payload: Range<usize>,
}

impl Layout {
    fn check(body: &[u8]) -> Result<Layout, BadCall> {
        let archived = archive::read::<ArchivedCallArchive>(Op::Call, body)
            .map_err(|error| BadCall { call: None, error })?;
        let call = archived.call.to_native();
        Layout::of(body, archived).map_err(|error| BadCall { call: Some(call), error })
    }

    fn of(body: &[u8], archived: &ArchivedCallArchive) -> Result<Layout, FrameError> {
        let format = RowFormat::from_code(archived.format).ok_or(FrameError::Format(archived.format))?;
        if archived.reserved != 0 {
            return Err(FrameError::Reserved(u16::from(archived.reserved)));
        }
        let head = CallHead {
            call: archived.call.to_native(),
            step: archived.step.to_native(),
            epoch: archived.epoch.to_native(),
            budget_us: archived.budget_us.to_native(),
            layer: archived.layer.to_native(),
            format,
            hidden: archived.hidden.to_native(),
            rows: archived.rows.to_native(),
        };
        if head.budget_us == 0 || head.budget_us > BUDGET_US_MAX {
            return Err(FrameError::Budget(head.budget_us));
        }
        let expected = head.payload_bytes()?;
        head.check_assignments(archived.assignments.len())?;
        let not_inside = FrameError::Archive(Op::Call);
        let assignments = archive::range_in(body, &archived.assignments).ok_or(not_inside.clone())?;
        let payload = archive::range_in(body, &archived.payload).ok_or(not_inside)?;
        if payload.len() != expected {
            return Err(FrameError::Payload { bytes: payload.len(), expected });
        }
        let layout = Layout { head, assignments, payload };
        let view = layout.view(body);
        check_each(&head, view.assignments)?;
        check_rows(&head, view.payload)?;
        Ok(layout)
    }

    fn view<'a>(&self, body: &'a [u8]) -> CallView<'a> {
        CallView {
            head: self.head,
            assignments: bytemuck::cast_slice(&body[self.assignments.clone()]),
            payload: &body[self.payload.clone()],
        }
    }
}

fn check_each(head: &CallHead, assignments: &[Assignment]) -> Result<(), FrameError> {
    for (index, assignment) in assignments.iter().enumerate() {
        if assignment.row >= head.rows || assignment.reserved != 0 {
            return Err(FrameError::Assignment { index, row: assignment.row });
        }
        if !assignment.weight.is_finite() {
            return Err(FrameError::Weight(index));
        }
    }
    Ok(())
}

/// A NaN or infinity in a row would spread over the whole text: refuse it where it enters.
fn check_rows(head: &CallHead, payload: &[u8]) -> Result<(), FrameError> {
    let values = padded(head.hidden as usize);
    for (row, bytes) in payload.chunks_exact(row_bytes(head.format, head.hidden as usize)).enumerate() {
        match head.format {
            RowFormat::Int8 => {
                let scales: &[f32] = bytemuck::cast_slice(&bytes[values..values + values / GROUP * 4]);
                let bad = scales.iter().position(|scale| !(scale.is_finite() && *scale >= 0.0));
                bad.map_or(Ok(()), |group| Err(FrameError::Scale { row, group }))?;
            }
            RowFormat::F32 => {
                let values: &[f32] = bytemuck::cast_slice(&bytes[..values * 4]);
                let bad = values.iter().position(|value| !value.is_finite());
                bad.map_or(Ok(()), |column| Err(FrameError::Value { row, column }))?;
            }
        }
    }
    Ok(())
}
