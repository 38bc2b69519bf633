//! What machines on the LAN say of where they are: answers, addresses, and how many of them are believed.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use libp2p::Multiaddr;
use libp2p::futures::executor::block_on;
use libp2p::futures::io::Cursor;
use libp2p::request_response::Codec as _;
use mesh_discovery::address::{to_multiaddr, to_socket};
use mesh_discovery::candidates::{ASK_AGAIN_AFTER, ASK_EVERY, Candidates, PLACES_MAX};
use mesh_discovery::question::{ANSWER_BYTES_MAX, Codec, PROTOCOL};

use super::{Verdict, says_why};

/// Claims of one input.
const CLAIMS_MAX: usize = 400;

/// By the first byte: a question, an answer, the bytes of an address, the text of one, or claims to be somewhere.
pub(super) fn discovery(bytes: &[u8]) -> Verdict {
    let Some((mode, rest)) = bytes.split_first() else { return Verdict::Refused };
    match mode % 5 {
        0 => question(rest),
        1 => answer(rest),
        2 => match Multiaddr::try_from(rest.to_vec()) {
            Ok(address) => dialed(&address),
            Err(_) => Verdict::Refused,
        },
        3 => match std::str::from_utf8(rest).ok().and_then(|text| text.parse::<Multiaddr>().ok()) {
            Some(address) => dialed(&address),
            None => Verdict::Refused,
        },
        _ => claims(rest),
    }
}

fn question(bytes: &[u8]) -> Verdict {
    match block_on(Codec.read_request(&PROTOCOL, &mut Cursor::new(bytes))) {
        Ok(()) => {
            assert!(bytes.is_empty(), "a question says nothing");
            Verdict::Taken
        }
        Err(error) => says_why(&error),
    }
}

fn answer(bytes: &[u8]) -> Verdict {
    let mut stream = Cursor::new(bytes);
    let read = block_on(Codec.read_response(&PROTOCOL, &mut stream));
    assert!(stream.position() <= ANSWER_BYTES_MAX as u64 + 1, "{} bytes were read", stream.position());
    match read {
        Ok(answer) => {
            assert!(answer.version.bytes().all(|byte| byte.is_ascii_graphic()), "{answer:?}");
            assert_eq!(answer.to_bytes(), bytes, "one answer has one form");
            Verdict::Taken
        }
        Err(error) => says_why(&error),
    }
}

/// Nothing is looked up, and what is dialed is what was said.
fn dialed(address: &Multiaddr) -> Verdict {
    let Some(socket) = to_socket(address) else { return Verdict::Refused };
    assert!(socket.port() != 0 && !socket.ip().is_unspecified(), "{socket}");
    let again = to_multiaddr(socket);
    assert_eq!(to_socket(&again), Some(socket));
    assert!(address.to_vec().starts_with(&again.to_vec()), "{address} became {again}");
    Verdict::Taken
}

/// Four bytes each: a host, a port, milliseconds until the next claim, and whether who was asked proves itself.
fn claims(bytes: &[u8]) -> Verdict {
    let (mut candidates, mut now) = (Candidates::default(), Instant::now());
    let mut asked: Vec<(Instant, SocketAddr)> = Vec::new();
    let (claims, _) = bytes.as_chunks::<4>();
    for [host, port, pause, proves] in claims.iter().take(CLAIMS_MAX) {
        candidates.hear(SocketAddr::from(([10, 0, 0, *host], 1 + u16::from(*port))));
        if let Some(address) = candidates.next(now) {
            if let Some((last, _)) = asked.last() {
                assert!(now - *last >= ASK_EVERY, "two questions within a second");
            }
            let recently =
                |(then, place): &&(Instant, SocketAddr)| *place == address && now - *then < ASK_AGAIN_AFTER;
            let again = asked.iter().rev().take(PLACES_MAX).find(recently);
            // A place that was displaced may be heard of anew.
            let others = asked.iter().rev().take_while(|(then, _)| now - *then < ASK_AGAIN_AFTER).count();
            assert!(again.is_none() || others > 1, "{address} is asked again at once");
            asked.push((now, address));
            if proves % 2 == 1 {
                candidates.prove(address);
            }
        }
        now += Duration::from_millis(u64::from(*pause) * 16);
    }
    if asked.is_empty() { Verdict::Refused } else { Verdict::Taken }
}
