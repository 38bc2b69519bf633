//! The one message: who answers here, and at which port.
//!
//! Opening a stream of `/moemesh/where/1` and closing its sending half is the question; the answer is some 40 bytes of
//! one form. It names no address: the asker knows to which one it has just been proven that the machine is there, and
//! puts the port to it, so that nobody can be sent to a place where nobody proved anything. Longer, shorter, or with
//! anything behind it, an answer is refused; nothing is read beyond its limit.

use std::io;

use libp2p::StreamProtocol;
use libp2p::futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::request_response;

/// The protocol and its version.
pub const PROTOCOL: StreamProtocol = StreamProtocol::new("/moemesh/where/1");

/// Longest version of a program that is told: `4294967295.4294967295.4294967295` and some.
pub const VERSION_BYTES_MAX: usize = 48;

/// Bytes before the version: cluster, role, port, length.
const HEAD_BYTES: usize = 32 + 1 + 2 + 1;

/// Bytes of the longest answer.
pub const ANSWER_BYTES_MAX: usize = HEAD_BYTES + VERSION_BYTES_MAX;

/// What a machine does in its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Does {
    /// It serves QUIC to nodes.
    Router = 1,
    /// It holds experts.
    Node = 2,
}

/// What a machine says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Hash of its cluster's public key, as tokens carry it.
    pub cluster: [u8; 32],
    /// What it does there.
    pub does: Does,
    /// UDP port at which it serves QUIC, 0 for none.
    pub port: u16,
    /// Of the program, for people.
    pub version: String,
}

impl Answer {
    /// Its one form; a version that is too long is cut.
    pub fn to_bytes(&self) -> Vec<u8> {
        let version = &self.version.as_bytes()[..self.version.len().min(VERSION_BYTES_MAX)];
        let mut bytes = Vec::with_capacity(ANSWER_BYTES_MAX);
        bytes.extend(self.cluster);
        bytes.push(self.does as u8);
        bytes.extend(self.port.to_le_bytes());
        bytes.push(version.len() as u8);
        bytes.extend(version);
        bytes
    }

    /// `None` for bytes that `to_bytes` never makes.
    pub fn from_bytes(bytes: &[u8]) -> Option<Answer> {
        let (head, version) = bytes.split_first_chunk::<HEAD_BYTES>()?;
        let (cluster, rest) = head.split_first_chunk::<32>()?;
        let does = match rest[0] {
            1 => Does::Router,
            2 => Does::Node,
            _ => return None,
        };
        let whole = version.len() == usize::from(rest[3]) && version.len() <= VERSION_BYTES_MAX;
        let plain = version.iter().all(u8::is_ascii_graphic);
        let version = String::from_utf8(version.to_owned()).ok()?;
        let port = u16::from_le_bytes([rest[1], rest[2]]);
        (whole && plain).then_some(Answer { cluster: *cluster, does, port, version })
    }
}

/// Reads and writes them.
#[derive(Clone, Copy, Debug, Default)]
pub struct Codec;

fn refused(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Everything up to the end of the stream, which has at most `max` bytes.
async fn read_short<T: AsyncRead + Unpin + Send>(io: &mut T, max: usize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = io.take(max as u64 + 1).read_to_end(&mut bytes).await?;
    if read > max { Err(refused("longer than any message of this protocol")) } else { Ok(bytes) }
}

impl request_response::Codec for Codec {
    type Protocol = StreamProtocol;
    type Request = ();
    type Response = Answer;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<()>
    where
        T: AsyncRead + Unpin + Send,
    {
        read_short(io, 0).await.map(drop)
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Answer>
    where
        T: AsyncRead + Unpin + Send,
    {
        let bytes = read_short(io, ANSWER_BYTES_MAX).await?;
        Answer::from_bytes(&bytes).ok_or_else(|| refused("no answer of this protocol"))
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, _: &mut T, _: ()) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        Ok(())
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, answer: Answer) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        io.write_all(&answer.to_bytes()).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use libp2p::futures::executor::block_on;
    use libp2p::futures::io::Cursor;
    use libp2p::request_response::Codec as _;
    use proptest::prelude::*;

    fn answer() -> Answer {
        Answer { cluster: [3; 32], does: Does::Router, port: 8621, version: "0.1.0".into() }
    }

    fn read(bytes: &[u8]) -> io::Result<Answer> {
        block_on(Codec.read_response(&PROTOCOL, &mut Cursor::new(bytes.to_vec())))
    }

    #[test]
    fn an_answer_is_read_back_and_nothing_else_is() {
        let bytes = answer().to_bytes();
        assert_eq!(read(&bytes).unwrap(), answer());
        assert!((0..bytes.len()).all(|length| read(&bytes[..length]).is_err()), "cut");
        assert!(read(&[&bytes[..], b"x"].concat()).is_err(), "something behind it");
        assert!(read(&vec![b'x'; 1 << 20]).is_err(), "a megabyte");
        for (at, value) in [(32, 0), (32, 3), (35, 4), (35, 6), (36, b' '), (36, 0x1b), (36, 0xff)] {
            let mut wrong = bytes.clone();
            wrong[at] = value;
            assert!(read(&wrong).is_err(), "byte {at} as {value}");
        }
        let long = Answer { version: "9".repeat(300), ..answer() };
        assert_eq!(
            read(&long.to_bytes()).unwrap().version.len(),
            VERSION_BYTES_MAX,
            "never too long to be read"
        );
    }

    #[test]
    fn a_question_says_nothing() {
        let ask = |bytes: &[u8]| block_on(Codec.read_request(&PROTOCOL, &mut Cursor::new(bytes.to_vec())));
        assert!(ask(b"").is_ok());
        assert!(ask(b"x").is_err() && ask(&vec![0; 1 << 20]).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_have_one_form(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Some(answer) = Answer::from_bytes(&bytes) {
                prop_assert_eq!(answer.to_bytes(), bytes);
            }
        }
    }
}
