//! Frames in and out of QUIC streams.
//!
//! A frame goes out as the buffer it was built in, without a copy: QUIC keeps it until it is acknowledged, then it
//! returns to its pool. A frame comes in with one copy, out of QUIC's chunks (which begin anywhere) into a pooled
//! buffer that begins at a multiple of 64. The header is checked before the buffer is taken.

use bytes::Bytes;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::frame::{FrameError, HEADER_BYTES, Header, Op};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream, WriteError};
use thiserror::Error;

/// QUIC sends streams of a lower priority last: probes of the link behind all calls and replies.
pub(crate) const PROBE_PRIORITY: i32 = -1;

/// Why no frame came.
#[derive(Debug, Error)]
pub(crate) enum ReadFrameError {
    /// The stream or the connection broke.
    #[error(transparent)]
    Stream(#[from] ReadError),
    /// The stream ended within a frame.
    #[error("the stream ended within a frame")]
    Truncated,
    /// What came is not a frame that belongs here.
    #[error(transparent)]
    Frame(#[from] FrameError),
}

/// The next frame; `None` where the stream ended before one. Not cancel-safe: when it is dropped half-way, the
/// stream is of no use any more.
pub(crate) async fn read_frame(
    stream: &mut RecvStream,
    pool: &Pool,
    allowed: &[Op],
) -> Result<Option<Buffer>, ReadFrameError> {
    let mut header = [0; HEADER_BYTES];
    match stream.read_exact(&mut header).await {
        Ok(()) => {}
        Err(ReadExactError::FinishedEarly(0)) => return Ok(None),
        Err(ReadExactError::FinishedEarly(_)) => return Err(ReadFrameError::Truncated),
        Err(ReadExactError::ReadError(error)) => return Err(error.into()),
    }
    let header = Header::parse(header, allowed)?;
    let mut buffer = pool.take(header)?;
    match stream.read_exact(buffer.body_mut()).await {
        Ok(()) => Ok(Some(buffer)),
        Err(ReadExactError::FinishedEarly(_)) => Err(ReadFrameError::Truncated),
        Err(ReadExactError::ReadError(error)) => Err(error.into()),
    }
}

/// Sends a frame. Returns once QUIC has taken it over.
pub(crate) async fn write_frame(stream: &mut SendStream, frame: Buffer) -> Result<(), WriteError> {
    stream.write_chunk(Bytes::from_owner(frame)).await
}
