//! Borrows weights: questions to one lender over one connection, and what it has to do to be believed.
//!
//! Nothing that comes is trusted before its hash was compared, and that is for whoever stores it. Here a lender is held
//! to the protocol: the bytes that were asked for, in order and no others, none later than `Patience` allows and none
//! slower. Waiting counts, what the asker itself takes in between does not. A lender that sends a byte a second, or
//! nothing at all, or goes on forever is told apart and named; who is asked next is the caller's.

use std::time::Duration;

use mesh_wire::buffer::Pool;
use mesh_wire::frame::Op;
use mesh_wire::weights::{Chunk, Fetch, Reason, Weights};
use quinn::{Connection, RecvStream};
use thiserror::Error;
use tokio::time::{Instant, timeout};

use crate::stream::{ReadFrameError, read_frame, write_frame};

/// How long a lender is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// For an answer, or for the next chunk.
    pub silence: Duration,
    /// What is counted as slow is counted over so much waiting.
    pub window: Duration,
    /// Less than this is slow, bytes per second.
    pub least_bytes_s: u64,
}

impl Patience {
    /// What bad Wi-Fi shared by eight still gives. A chunk in five seconds is 52 KB/s at least, so a lender has to send
    /// small chunks to be slow: no correct one does but at an expert's end.
    pub const LAN: Patience =
        Patience { silence: Duration::from_secs(5), window: Duration::from_secs(10), least_bytes_s: 50_000 };

    /// For the router, which is asked when nobody else is left: it may share a thin link among many.
    pub const LAST: Patience =
        Patience { silence: Duration::from_secs(30), window: Duration::from_secs(60), least_bytes_s: 1_000 };
}

/// Why nothing was borrowed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum BorrowError {
    /// The lender cannot be reached, or the connection broke.
    #[error("{0}")]
    Gone(String),
    /// It says nothing.
    #[error("it has sent nothing for {} ms", .0.as_millis())]
    Silent(Duration),
    /// It sends too little.
    #[error("it has sent {bytes} bytes in {} ms", .within.as_millis())]
    Slow {
        /// So many.
        bytes: u64,
        /// While it was waited for.
        within: Duration,
    },
    /// It says what no correct lender says.
    #[error("it breaks the protocol: {0}")]
    Wrong(String),
    /// It says no.
    #[error("it refuses: {1}")]
    Refused(Reason, String),
    /// The operator shut this machine out.
    #[error("this machine was revoked (`moemesh nodes revoke`)")]
    Revoked,
}

impl From<ReadFrameError> for BorrowError {
    fn from(error: ReadFrameError) -> BorrowError {
        match error {
            ReadFrameError::Stream(error) => BorrowError::Gone(error.to_string()),
            ReadFrameError::Truncated | ReadFrameError::Dripping => BorrowError::Gone(error.to_string()),
            ReadFrameError::Frame(error) => BorrowError::Wrong(error.to_string()),
        }
    }
}

fn gone(error: &impl std::fmt::Display) -> BorrowError {
    BorrowError::Gone(error.to_string())
}

/// Opens a stream and says the question.
async fn put(connection: &Connection, pool: &Pool, question: &Weights) -> Result<RecvStream, BorrowError> {
    let frame = question.encode(pool).map_err(|error| BorrowError::Wrong(error.to_string()))?;
    let (mut send, recv) = connection.open_bi().await.map_err(|error| gone(&error))?;
    write_frame(&mut send, frame).await.map_err(|error| gone(&error))?;
    // Fails only on a closed stream, which reading will notice.
    drop(send.finish());
    Ok(recv)
}

/// Asks a question that has one answer, of kind `answer`.
pub(crate) async fn ask(
    connection: &Connection,
    pool: &Pool,
    (question, answer): (&Weights, Op),
    within: Duration,
) -> Result<Weights, BorrowError> {
    let asking = async {
        let mut recv = put(connection, pool, question).await?;
        let frame = read_frame(&mut recv, pool, &[answer, Op::WeightsRefused]).await?;
        let frame = frame.ok_or_else(|| BorrowError::Wrong("no answer".to_owned()))?;
        Weights::decode(&frame).map_err(|error| BorrowError::Wrong(error.to_string()))
    };
    match timeout(within, asking).await.unwrap_or(Err(BorrowError::Silent(within)))? {
        Weights::Refused(reason, detail) => Err(BorrowError::Refused(reason, detail)),
        answer => Ok(answer),
    }
}

/// The bytes of an expert on their way.
#[derive(Debug)]
pub(crate) struct Delivery {
    recv: RecvStream,
    pool: Pool,
    at: u64,
    end: u64,
    patience: Patience,
    /// Since slowness was last judged: time spent waiting, bytes that came.
    waited: Duration,
    came: u64,
}

impl Delivery {
    /// Asks for an expert of `bytes` bytes.
    pub(crate) async fn order(
        connection: &Connection,
        pool: &Pool,
        (fetch, bytes): (Fetch, u64),
        patience: Patience,
    ) -> Result<Delivery, BorrowError> {
        let question = Weights::Fetch(fetch);
        let ordering = put(connection, pool, &question);
        let silent = Err(BorrowError::Silent(patience.silence));
        let recv = timeout(patience.silence, ordering).await.unwrap_or(silent)?;
        let (waited, came) = (Duration::ZERO, 0);
        Ok(Delivery { recv, pool: pool.clone(), at: fetch.from, end: bytes, patience, waited, came })
    }

    /// The next bytes; `None` when all have come.
    pub(crate) async fn next(&mut self) -> Result<Option<Chunk>, BorrowError> {
        if self.at >= self.end {
            return Ok(None);
        }
        let (began, silence) = (Instant::now(), self.patience.silence);
        let reading = read_frame(&mut self.recv, &self.pool, &[Op::Chunk, Op::WeightsRefused]);
        let Ok(frame) = timeout(silence, reading).await else { return Err(BorrowError::Silent(silence)) };
        self.waited += began.elapsed();
        let frame = frame?.ok_or_else(|| BorrowError::Wrong("it ended before the last byte".to_owned()))?;
        if frame.op() == Op::WeightsRefused {
            return Err(match Weights::decode(&frame) {
                Ok(Weights::Refused(reason, detail)) => BorrowError::Refused(reason, detail),
                Ok(_) => BorrowError::Wrong("no refusal".to_owned()),
                Err(error) => BorrowError::Wrong(error.to_string()),
            });
        }
        let chunk = Chunk::parse(frame).map_err(|error| BorrowError::Wrong(error.to_string()))?;
        let len = chunk.bytes().len() as u64;
        if chunk.from() != self.at || len > self.end - self.at {
            let (from, at, end) = (chunk.from(), self.at, self.end);
            let wrong = format!("{len} bytes from {from} on where {at}..{end} are missing");
            return Err(BorrowError::Wrong(wrong));
        }
        self.at += len;
        self.came += len;
        self.judge()?;
        Ok(Some(chunk))
    }

    /// Whether it is fast enough, now and then.
    fn judge(&mut self) -> Result<(), BorrowError> {
        if self.waited < self.patience.window || self.at >= self.end {
            return Ok(());
        }
        let (bytes, within) = (self.came, self.waited);
        (self.waited, self.came) = (Duration::ZERO, 0);
        if (bytes as f64) < self.patience.least_bytes_s as f64 * within.as_secs_f64() {
            return Err(BorrowError::Slow { bytes, within });
        }
        Ok(())
    }
}
