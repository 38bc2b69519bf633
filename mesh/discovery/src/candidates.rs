//! Whom to ask, and when: what mDNS claims about a machine that is looked for.
//!
//! Anyone on the LAN can claim to be the router, ten thousand times. A claim is a place to ask, and asking costs a TCP
//! connection and a handshake, so a machine has at most 8 such places, one per IP address (the address the claim came
//! from), one is asked per second at most, and one that was asked rests for half a minute, or for two minutes where it
//! proved itself: that many machines ask one router for as long as they live. When all 8 are taken a new
//! claim replaces the one that failed longest ago; where none has failed yet it is dropped: at one question a second a
//! place becomes free soon, and the honest machine repeats its claim at every query. The price: under such a flood
//! finding a router takes longer. The clock is the caller's.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Places per machine.
pub const PLACES_MAX: usize = 8;

/// Between two questions.
pub const ASK_EVERY: Duration = Duration::from_secs(1);

/// Before a place is asked again: less than a person waits for a router that came back at the same address.
pub const ASK_AGAIN_AFTER: Duration = Duration::from_secs(30);

/// The same where it proved itself. 256 nodes ask their router twice a second then.
pub const PROVE_AGAIN_AFTER: Duration = Duration::from_secs(120);

#[derive(Clone, Copy, Debug)]
struct Place {
    address: SocketAddr,
    asked: Option<Instant>,
    /// Whether it proved to be the machine when it was asked.
    proven: bool,
}

impl Place {
    fn rests(&self, now: Instant) -> bool {
        let pause = if self.proven { PROVE_AGAIN_AFTER } else { ASK_AGAIN_AFTER };
        is_recent(self.asked, pause, now)
    }
}

fn is_recent(since: Option<Instant>, pause: Duration, now: Instant) -> bool {
    since.is_some_and(|since| now.saturating_duration_since(since) < pause)
}

/// See the module. For one machine.
#[derive(Debug, Default)]
pub struct Candidates {
    places: Vec<Place>,
    asked: Option<Instant>,
}

impl Candidates {
    /// Somebody claims the machine to be there.
    pub fn hear(&mut self, address: SocketAddr) {
        let fresh = Place { address, asked: None, proven: false };
        if self.places.iter().any(|place| place.address == address) {
            return;
        }
        if let Some(place) = self.places.iter_mut().find(|place| place.address.ip() == address.ip()) {
            // Another port of the same machine; what was proven stays until it is asked and fails.
            if !place.proven {
                *place = Place { asked: place.asked, ..fresh };
            }
            return;
        }
        if self.places.len() < PLACES_MAX {
            return self.places.push(fresh);
        }
        let failed = self.places.iter_mut().filter(|place| place.asked.is_some() && !place.proven);
        if let Some(place) = failed.min_by_key(|place| place.asked) {
            *place = fresh;
        }
    }

    /// The place to ask now, if any: first those never asked, in the order in which they were heard of, then the one
    /// that has rested longest. It counts as failed until `prove`.
    pub fn next(&mut self, now: Instant) -> Option<SocketAddr> {
        if is_recent(self.asked, ASK_EVERY, now) {
            return None;
        }
        let due = self.places.iter_mut().filter(|place| !place.rests(now));
        let place = due.min_by_key(|place| place.asked)?;
        place.asked = Some(now);
        place.proven = false;
        self.asked = Some(now);
        Some(place.address)
    }

    /// The machine was there.
    pub fn prove(&mut self, address: SocketAddr) {
        if let Some(place) = self.places.iter_mut().find(|place| place.address == address) {
            place.proven = true;
        }
    }

    /// How many places are remembered.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.places.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(host: u32, port: u16) -> SocketAddr {
        SocketAddr::from((std::net::Ipv4Addr::from(0x0a00_0000 + host), port))
    }

    #[test]
    fn one_question_a_second_and_each_place_twice_a_minute() {
        let (mut candidates, start) = (Candidates::default(), Instant::now());
        let after = |ms| start + Duration::from_millis(ms);
        assert_eq!(candidates.next(after(0)), None);
        candidates.hear(at(1, 1));
        candidates.hear(at(2, 1));
        candidates.hear(at(1, 1));
        assert_eq!(candidates.next(after(0)), Some(at(1, 1)));
        assert_eq!(candidates.next(after(999)), None);
        assert_eq!(candidates.next(after(1000)), Some(at(2, 1)));
        assert_eq!(candidates.next(after(29_999)), None);
        assert_eq!(candidates.next(after(30_000)), Some(at(1, 1)));
    }

    #[test]
    fn ten_thousand_claims_take_eight_places_and_the_honest_one_is_asked() {
        let (mut candidates, start) = (Candidates::default(), Instant::now());
        // One address with every port is one place.
        (1..=10_000).for_each(|port| candidates.hear(at(1, port)));
        assert_eq!(candidates.len(), 1);
        (2..=3).for_each(|host| (1..=10_000).for_each(|port| candidates.hear(at(host, port))));
        let honest = at(77, 8622);
        candidates.hear(honest);
        let asked: Vec<_> = (0..5).filter_map(|second| candidates.next(start + second * ASK_EVERY)).collect();
        assert_eq!((asked.len(), asked[3]), (4, honest), "{asked:?}");
        candidates.prove(honest);
        // Every address there is.
        for second in 5..65 {
            (0..10_000).for_each(|host| candidates.hear(at(1000 + second * 10_000 + host, 1)));
            assert_eq!(candidates.len(), PLACES_MAX);
            candidates.next(start + second * ASK_EVERY);
        }
    }

    #[test]
    fn a_place_that_was_proven_is_not_displaced() {
        let (mut candidates, start) = (Candidates::default(), Instant::now());
        let honest = at(77, 8622);
        candidates.hear(honest);
        assert_eq!(candidates.next(start), Some(honest));
        candidates.prove(honest);
        (0..10_000).for_each(|host| candidates.hear(at(host + 100, 1)));
        (0..10_000).for_each(|port| candidates.hear(at(77, port)));
        let later = start + PROVE_AGAIN_AFTER;
        let asked: Vec<_> = (0..8).filter_map(|second| candidates.next(later + second * ASK_EVERY)).collect();
        assert!(asked.contains(&honest), "{asked:?}");
    }
}
