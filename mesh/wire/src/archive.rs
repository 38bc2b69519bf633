//! The thin layer over rkyv: write an archive into a buffer, check one that came.
//!
//! rkyv's usual ways copy a vector's elements one by one into a growing buffer and validate without a limit on
//! depth. Here a vector is *reserved*: the archive gets zeroed room of the right length and alignment, and the
//! caller fills it afterwards, quantizing straight into the frame. Checking allows two levels, an archive and its
//! vectors, which is all there is. The zeroing is the price; it also means that no bytes of an earlier frame leave
//! this process in padding.

use std::cell::Cell;
use std::marker::PhantomData;
use std::num::NonZeroUsize;
use std::ops::Range;

use rkyv::api::{access_with_context, serialize_using};
use rkyv::bytecheck::CheckBytes;
use rkyv::rancor::{Failure, Fallible, Strategy};
use rkyv::ser::writer::Positional;
use rkyv::ser::{Serializer, Writer};
use rkyv::validation::Validator;
use rkyv::validation::archive::ArchiveValidator;
use rkyv::vec::{ArchivedVec, VecResolver};
use rkyv::{Archive, Place, Portable, Serialize};

use crate::buffer::{Buffer, Pool};
use crate::frame::{ARCHIVE_FIXED_BYTES_MAX, FrameError, Header, Op};

/// Subtrees within subtrees: the archive, and the vectors in it. One more than there are, as rkyv counts the end.
const DEPTH_MAX: Option<NonZeroUsize> = NonZeroUsize::new(3);

/// 64 bytes of a payload.
#[derive(Clone, Copy, Debug, CheckBytes, Portable)]
#[bytecheck(crate = rkyv::bytecheck)]
#[repr(C, align(64))]
pub(crate) struct Block([u8; 64]);

/// Room for `count` elements of an archived vector, and, once written, where it lies in the body.
#[derive(Debug)]
pub(crate) struct Reserve<T> {
    count: usize,
    at: Cell<usize>,
    element: PhantomData<T>,
}

impl<T> Reserve<T> {
    pub(crate) fn new(count: usize) -> Reserve<T> {
        Reserve { count, at: Cell::new(0), element: PhantomData }
    }

    /// Bytes of the elements.
    pub(crate) fn bytes(&self) -> usize {
        self.count * size_of::<T>()
    }

    /// Where they lie in the body.
    pub(crate) fn range(&self) -> Range<usize> {
        self.at.get()..self.at.get() + self.bytes()
    }
}

impl<T: Portable> Archive for Reserve<T> {
    type Archived = ArchivedVec<T>;
    type Resolver = VecResolver;

    fn resolve(&self, resolver: VecResolver, out: Place<ArchivedVec<T>>) {
        ArchivedVec::resolve_from_len(self.count, resolver, out);
    }
}

impl<T: Portable, S: Fallible + Writer + ?Sized> Serialize<S> for Reserve<T> {
    fn serialize(&self, serializer: &mut S) -> Result<VecResolver, S::Error> {
        const ZEROS: [u8; 4096] = [0; 4096];
        // `align` of rkyv pads at most 32 bytes at a time.
        let at = serializer.pos().next_multiple_of(align_of::<T>());
        let mut missing = at - serializer.pos() + self.bytes();
        while missing > 0 {
            let bytes = missing.min(ZEROS.len());
            serializer.write(&ZEROS[..bytes])?;
            missing -= bytes;
        }
        self.at.set(at);
        Ok(VecResolver::from_pos(at))
    }
}

/// Writes into the body of a buffer, never beyond it.
pub(crate) struct Cursor<'a> {
    bytes: &'a mut [u8],
    at: usize,
}

impl Positional for Cursor<'_> {
    fn pos(&self) -> usize {
        self.at
    }
}

impl Writer<Failure> for Cursor<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let end = self.at + bytes.len();
        self.bytes.get_mut(self.at..end).ok_or(Failure)?.copy_from_slice(bytes);
        self.at = end;
        Ok(())
    }
}

/// The serializer that `write` uses.
type Writing<'a> = Strategy<Serializer<Cursor<'a>, (), ()>, Failure>;

/// Writes an archive whose vectors take `vector_bytes` into a buffer of the pool.
pub(crate) fn write<T>(pool: &Pool, op: Op, vector_bytes: usize, value: &T) -> Result<Buffer, FrameError>
where
    T: for<'a> Serialize<Writing<'a>>,
{
    let room = vector_bytes.saturating_add(ARCHIVE_FIXED_BYTES_MAX);
    let mut buffer = pool.take(Header::new(op, room)?)?;
    let cursor = Cursor { bytes: buffer.body_mut(), at: 0 };
    let mut serializer = Serializer::new(cursor, (), ());
    let too_long = |Failure| FrameError::TooLong { op, bytes: room, max: op.body_bytes_max() };
    serialize_using::<_, Failure>(value, &mut serializer).map_err(too_long)?;
    let written = serializer.into_writer().at;
    buffer.truncate(written);
    Ok(buffer)
}

/// What bytecheck validates in.
type Checking<'a> = Validator<ArchiveValidator<'a>, ()>;

/// The archive in `body`, checked for structure (not for meaning).
pub(crate) fn read<'a, T>(op: Op, body: &'a [u8]) -> Result<&'a T, FrameError>
where
    T: Portable + for<'c> CheckBytes<Strategy<Checking<'c>, Failure>>,
{
    if body.len() > op.body_bytes_max() {
        return Err(FrameError::TooLong { op, bytes: body.len(), max: op.body_bytes_max() });
    }
    if !body.as_ptr().addr().is_multiple_of(64) {
        return Err(FrameError::Misaligned);
    }
    let mut context = Validator::new(ArchiveValidator::with_max_depth(body, DEPTH_MAX), ());
    access_with_context::<T, _, Failure>(body, &mut context).map_err(|Failure| FrameError::Archive(op))
}

/// Where an archived vector lies in the body it was read from.
pub(crate) fn range_in<T>(body: &[u8], vector: &ArchivedVec<T>) -> Option<Range<usize>> {
    let start = vector.as_ptr().addr().checked_sub(body.as_ptr().addr())?;
    let end = start.checked_add(size_of_val(vector.as_slice()))?;
    (end <= body.len()).then_some(start..end)
}
