//! Frames in and out of QUIC streams.
//!
//! A frame goes out as the buffer it was built in, without a copy: QUIC keeps it until it is acknowledged, then it
//! returns to its pool. A frame comes in with one copy, out of QUIC's chunks (which begin anywhere) into a pooled
//! buffer that begins at a multiple of 64. The header is checked before the buffer is taken.

use std::time::Duration;

use bytes::Bytes;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::frame::{FrameError, HEADER_BYTES, Header, Op};
use quinn::{ReadError, ReadExactError, RecvStream, SendStream, WriteError};
use thiserror::Error;
use tokio::time::timeout;

/// Time for the rest of a frame once its first bytes are there. What machines tell each other fits into a packet or two,
/// which cross the thinnest link in a second.
pub(crate) const FRAME_WITHIN: Duration = Duration::from_secs(5);

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
    /// A frame was begun and is not there in time.
    #[error("a frame was begun and has not ended after {} s", FRAME_WITHIN.as_secs())]
    Dripping,
}

/// As `read_frame`, for streams on which the peer speaks when it likes: silence before a frame is no fault, a frame that
/// takes longer than `FRAME_WITHIN` is.
pub(crate) async fn read_prompt_frame(
    stream: &mut RecvStream,
    pool: &Pool,
    allowed: &[Op],
) -> Result<Option<Buffer>, ReadFrameError> {
    let mut header = [0; HEADER_BYTES];
    let Some(begun) = stream.read(&mut header).await? else { return Ok(None) };
    let rest = async {
        stream.read_exact(&mut header[begun..]).await.map_err(within)?;
        read_body(stream, pool, Header::parse(header, allowed)?).await
    };
    timeout(FRAME_WITHIN, rest).await.unwrap_or(Err(ReadFrameError::Dripping)).map(Some)
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
        Err(error) => return Err(within(error)),
    }
    read_body(stream, pool, Header::parse(header, allowed)?).await.map(Some)
}

async fn read_body(stream: &mut RecvStream, pool: &Pool, header: Header) -> Result<Buffer, ReadFrameError> {
    let mut buffer = pool.take(header)?;
    stream.read_exact(buffer.body_mut()).await.map_err(within)?;
    Ok(buffer)
}

/// Why the rest of a frame did not come.
fn within(error: ReadExactError) -> ReadFrameError {
    match error {
        ReadExactError::FinishedEarly(_) => ReadFrameError::Truncated,
        ReadExactError::ReadError(error) => error.into(),
    }
}

/// Sends a frame. Returns once QUIC has taken it over.
pub(crate) async fn write_frame(stream: &mut SendStream, frame: Buffer) -> Result<(), WriteError> {
    stream.write_chunk(Bytes::from_owner(frame)).await
}
