//! The answer to a call: one row of integer sums per row of the call.
//!
//! A node adds up its experts in i32 and writes each row as i16 where it fits, as i32 where it does not, and not
//! at all where even i32 overflows (a flag per row says which). The receiver validates structure, flags and length
//! once, then compares the shape with the call it belongs to. Sums are integers, so there is nothing that could be
//! not finite. Price of the per-row width: rows are found by walking the flags.

use std::ops::Range;

use rkyv::{Archive, Serialize};

use crate::archive::{self, Block, Reserve};
use crate::buffer::{Buffer, Pool};
use crate::frame::{FrameError, Op, REPLY_PAYLOAD_BYTES_MAX, check_shape};
use crate::payload::{ROW_ALIGN, SumWidth};

/// Everything about a reply but its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReplyHead {
    /// The call it answers.
    pub call: u64,
    /// Microseconds the node spent computing, waiting not included.
    pub service_us: u32,
    /// Sums per row.
    pub hidden: u32,
}

#[derive(Archive, Serialize)]
struct ReplyArchive {
    call: u64,
    service_us: u32,
    hidden: u32,
    rows: u32,
    flags: Reserve<u8>,
    payload: Reserve<Block>,
}

/// One row to be filled in.
#[derive(Debug, PartialEq, Eq)]
pub enum RowMut<'a> {
    /// `hidden` sums, at a multiple of 64.
    I16(&'a mut [i16]),
    /// `hidden` sums, at a multiple of 64.
    I32(&'a mut [i32]),
    /// Nothing to fill in.
    Overflow,
}

/// One row that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row<'a> {
    /// `hidden` sums.
    I16(&'a [i16]),
    /// `hidden` sums.
    I32(&'a [i32]),
    /// To be computed by the router in i64.
    Overflow,
}

/// A reply being built: laid out, its sums zero.
#[derive(Debug)]
pub struct ReplyDraft {
    buffer: Buffer,
    hidden: usize,
    flags: Range<usize>,
    payload: Range<usize>,
}

impl ReplyDraft {
    /// Lays out a reply whose rows have these widths.
    ///
    /// # Errors
    /// The limit it exceeds, or that the pool is exhausted.
    pub fn new(pool: &Pool, head: ReplyHead, widths: &[SumWidth]) -> Result<ReplyDraft, FrameError> {
        let rows = u32::try_from(widths.len()).unwrap_or(u32::MAX);
        check_shape(rows, head.hidden)?;
        let hidden = head.hidden as usize;
        let bytes: usize = widths.iter().map(|width| width.row_bytes(hidden)).sum();
        if bytes > REPLY_PAYLOAD_BYTES_MAX {
            return Err(FrameError::Payload { bytes, expected: REPLY_PAYLOAD_BYTES_MAX });
        }
        let value = ReplyArchive {
            call: head.call,
            service_us: head.service_us,
            hidden: head.hidden,
            rows,
            flags: Reserve::new(widths.len()),
            payload: Reserve::new(bytes / ROW_ALIGN),
        };
        let vectors = value.flags.bytes() + value.payload.bytes();
        let mut buffer = archive::write(pool, Op::Reply, vectors, &value)?;
        let flags = value.flags.range();
        for (flag, width) in buffer.body_mut()[flags.clone()].iter_mut().zip(widths) {
            *flag = *width as u8;
        }
        Ok(ReplyDraft { buffer, hidden, flags, payload: value.payload.range() })
    }

    /// The rows in order, to be filled in.
    pub fn rows_mut(&mut self) -> impl Iterator<Item = RowMut<'_>> {
        let hidden = self.hidden;
        let body = self.buffer.body_mut();
        // Flags were reserved before the payload, so they lie before it.
        let (before, rest) = body.split_at_mut(self.payload.start);
        let mut payload = &mut rest[..self.payload.len()];
        before[self.flags.clone()].iter().map(move |flag| {
            let width = SumWidth::from_code(*flag).unwrap_or(SumWidth::Overflow);
            let (row, rest) = std::mem::take(&mut payload).split_at_mut(width.row_bytes(hidden));
            payload = rest;
            match width {
                SumWidth::I16 => RowMut::I16(&mut bytemuck::cast_slice_mut(row)[..hidden]),
                SumWidth::I32 => RowMut::I32(&mut bytemuck::cast_slice_mut(row)[..hidden]),
                SumWidth::Overflow => RowMut::Overflow,
            }
        })
    }

    /// The frame to send.
    pub fn finish(self) -> Buffer {
        self.buffer
    }
}

/// Lays out and fills a reply from i32 sums; a row that overflowed is `None`. Each row takes the narrowest width.
///
/// # Errors
/// As `ReplyDraft::new`; `Shape` where a row does not have `head.hidden` sums.
pub fn encode_sums(pool: &Pool, head: ReplyHead, sums: &[Option<&[i32]>]) -> Result<Buffer, FrameError> {
    let wrong = sums.iter().flatten().find(|row| row.len() != head.hidden as usize);
    if let Some(row) = wrong {
        let rows = sums.len() as u32;
        return Err(FrameError::Shape {
            rows,
            hidden: row.len() as u32,
            expected_rows: rows,
            expected_hidden: head.hidden,
        });
    }
    let widths: Vec<_> = sums.iter().map(|row| row.map_or(SumWidth::Overflow, SumWidth::of)).collect();
    let mut draft = ReplyDraft::new(pool, head, &widths)?;
    for (to, from) in draft.rows_mut().zip(sums) {
        match (to, from) {
            (RowMut::I16(to), Some(from)) => {
                // `SumWidth::of` has checked that every value fits.
                to.iter_mut().zip(*from).for_each(|(to, from)| *to = *from as i16);
            }
            (RowMut::I32(to), Some(from)) => to.copy_from_slice(from),
            (_, _) => {}
        }
    }
    Ok(draft.finish())
}

/// A reply that a peer sent and that is what it should be. Owns its buffer.
#[derive(Debug)]
pub struct Reply {
    buffer: Buffer,
    layout: Layout,
}

impl Reply {
    /// Validates a received buffer.
    ///
    /// # Errors
    /// What is wrong with it; it never panics and never allocates.
    pub fn parse(buffer: Buffer) -> Result<Reply, FrameError> {
        if buffer.op() != Op::Reply {
            return Err(FrameError::UnexpectedOp(buffer.op()));
        }
        let layout = Layout::check(buffer.body())?;
        Ok(Reply { buffer, layout })
    }

    /// The reply as slices.
    pub fn view(&self) -> ReplyView<'_> {
        self.layout.view(self.buffer.body())
    }

    /// Everything but the rows.
    pub fn head(&self) -> &ReplyHead {
        &self.layout.head
    }

    /// Bytes of the whole frame, header included.
    pub fn frame_bytes(&self) -> usize {
        self.buffer.frame().len()
    }
}

/// A validated reply, borrowed.
#[derive(Clone, Copy, Debug)]
pub struct ReplyView<'a> {
    head: ReplyHead,
    flags: &'a [u8],
    payload: &'a [u8],
}

impl<'a> ReplyView<'a> {
    /// Validates a frame's body that lies at a multiple of 64.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn parse(body: &'a [u8]) -> Result<ReplyView<'a>, FrameError> {
        Ok(Layout::check(body)?.view(body))
    }

    /// Everything but the rows.
    pub fn head(&self) -> &ReplyHead {
        &self.head
    }

    /// How many rows there are.
    pub fn row_count(&self) -> usize {
        self.flags.len()
    }

    /// Whether it answers this call with the shape it must have.
    ///
    /// # Errors
    /// `Call` or `Shape`.
    pub fn check_against(&self, call: u64, rows: u32, hidden: u32) -> Result<(), FrameError> {
        if self.head.call != call {
            return Err(FrameError::Call { expected: call, actual: self.head.call });
        }
        if self.flags.len() != rows as usize || self.head.hidden != hidden {
            return Err(FrameError::Shape {
                rows: self.flags.len() as u32,
                hidden: self.head.hidden,
                expected_rows: rows,
                expected_hidden: hidden,
            });
        }
        Ok(())
    }

    /// The rows in order.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = Row<'a>> {
        let hidden = self.head.hidden as usize;
        let mut payload = self.payload;
        self.flags.iter().map(move |flag| {
            let width = SumWidth::from_code(*flag).unwrap_or(SumWidth::Overflow);
            let (row, rest) = payload.split_at(width.row_bytes(hidden));
            payload = rest;
            match width {
                SumWidth::I16 => Row::I16(&bytemuck::cast_slice(row)[..hidden]),
                SumWidth::I32 => Row::I32(&bytemuck::cast_slice(row)[..hidden]),
                SumWidth::Overflow => Row::Overflow,
            }
        })
    }
}

#[derive(Debug)]
struct Layout {
    head: ReplyHead,
    flags: Range<usize>,
    payload: Range<usize>,
}

impl Layout {
    fn check(body: &[u8]) -> Result<Layout, FrameError> {
        let archived = archive::read::<ArchivedReplyArchive>(Op::Reply, body)?;
        let rows = archived.rows.to_native();
        let head = ReplyHead {
            call: archived.call.to_native(),
            service_us: archived.service_us.to_native(),
            hidden: archived.hidden.to_native(),
        };
        check_shape(rows, head.hidden)?;
        if archived.flags.len() != rows as usize {
            return Err(FrameError::Flags { flags: archived.flags.len(), rows });
        }
        let mut expected = 0;
        for (row, code) in archived.flags.iter().enumerate() {
            let width = SumWidth::from_code(*code).ok_or(FrameError::Width { row, code: *code })?;
            expected += width.row_bytes(head.hidden as usize);
        }
        let flags = archive::range_in(body, &archived.flags).ok_or(FrameError::Archive(Op::Reply))?;
        let payload = archive::range_in(body, &archived.payload).ok_or(FrameError::Archive(Op::Reply))?;
        if payload.len() != expected || expected > REPLY_PAYLOAD_BYTES_MAX {
            return Err(FrameError::Payload { bytes: payload.len(), expected });
        }
        Ok(Layout { head, flags, payload })
    }

    fn view<'a>(&self, body: &'a [u8]) -> ReplyView<'a> {
        ReplyView { head: self.head, flags: &body[self.flags.clone()], payload: &body[self.payload.clone()] }
    }
}
