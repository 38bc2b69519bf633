//! What the link to a node can carry, measured over the connection that carries its calls.
//!
//! Placement weighs bytes against round trips, so it has to know both. After a node joins and then every minute a few
//! probes travel on a stream of their own: small ones for the round trip, then larger ones that come back as large,
//! until the next would take longer than `TAKES_MAX` or is the largest there is. Of every size the fastest counts,
//! since whatever else happens only slows a probe down; the rate is the bytes both ways over the time beyond a round
//! trip, so the mean of both directions as a call and its reply use them.
//!
//! Streams of probes have the lowest priority and larger ones start only while no call is out to the node, so what a
//! probe can delay is a call that begins within `TAKES_MAX` of it. The price: on a node that is never idle the rate is
//! the one measured when it joined. A node may lie. It cannot look faster than its link by answering before it was
//! asked (numbers of probes are not to be guessed), nor hold anything up: an answer that is wrong, late or drips in ends
//! the measurement, is counted, and leaves the last one standing. One that answers late on purpose is believed to be far
//! away, which costs it work and nobody else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mesh_proto::cluster::Event;
use mesh_proto::facts::LinkSpeed;
use mesh_proto::routes::NodeIndex;
use mesh_wire::buffer::Pool;
use mesh_wire::control::{Probe, Probed};
use mesh_wire::frame::{Op, PROBE_BYTES_MAX};
use mesh_wire::message::Message;
use quinn::{Connection, RecvStream, SendStream};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::time::{sleep, timeout};

use crate::endpoint::LaneReset;
use crate::stream::{PROBE_PRIORITY, ReadFrameError, read_frame, write_frame};
use crate::tally::{Feed, Tally};

/// How often a link is measured. Machines do not move, cables are changed by people.
const EVERY: Duration = Duration::from_secs(60);

/// Time for one probe, there and back: what a bad Wi-Fi takes to repeat a lost packet twice.
const ANSWER_WITHIN: Duration = Duration::from_secs(1);

/// Small probes. The fastest of eight has met neither a busy core nor another packet.
const ROUND_TRIPS: u32 = 8;

/// QUIC spreads packets over its own estimate of the round trip, which begins at 10 ms and forgets an eighth of that
/// with each exchange: before it is near the fastest, larger probes would measure the estimate (67 MB/s over a link
/// of 1 GB/s). So many more small ones are sent for it at most; near is twice the fastest and what threads add.
const SETTLING_MAX: u32 = 64;
const SETTLED_US: u64 = 250;

/// Larger probes of each size.
const TRIES: u32 = 5;

/// Bytes each way of the larger probes. The first takes 33 ms on a megabit, the last 4 ms on a gigabit.
const SIZES: [usize; 5] = [2 << 10, 8 << 10, 32 << 10, 128 << 10, PROBE_BYTES_MAX];

/// A size that would take longer is not tried: no call waits longer for a probe.
const TAKES_MAX: Duration = Duration::from_millis(10);

/// How often, and how many times, to look whether no call is out, before the larger probes are left out this time.
const IDLE_EVERY: Duration = Duration::from_millis(20);
const IDLE_LOOKS: u32 = 100;

/// Part of a time that is taken for the transfer at least: beyond, differences of two times are noise.
const TRANSFER_PART_MIN: u32 = 10;

/// Changes of less than one in so many are not worth telling.
const CHANGE_MIN: u64 = 10;

/// What measures the link of one connection.
pub(crate) struct Prober {
    pub(crate) node: NodeIndex,
    pub(crate) connection: Connection,
    pub(crate) tally: Arc<Tally>,
    pub(crate) pool: Pool,
    pub(crate) feed: Arc<dyn Feed>,
}

/// Why a probe gave no time.
#[derive(Debug, PartialEq, Eq)]
enum Failure {
    /// The connection broke, or there is no room on our side: nothing that the node is to blame for.
    Broken,
    /// No answer in time.
    Late,
    /// The answer is none that a correct node gives.
    Wrong,
}

impl From<ReadFrameError> for Failure {
    fn from(error: ReadFrameError) -> Failure {
        match error {
            ReadFrameError::Stream(_) => Failure::Broken,
            ReadFrameError::Frame(mesh_wire::frame::FrameError::PoolExhausted(_)) => Failure::Broken,
            ReadFrameError::Truncated | ReadFrameError::Dripping | ReadFrameError::Frame(_) => Failure::Wrong,
        }
    }
}

impl Prober {
    /// Measures until the connection is gone.
    pub(crate) async fn run(self) {
        tokio::select! {
            _ = self.connection.closed() => {}
            () = self.measure_forever() => {}
        }
    }

    async fn measure_forever(&self) {
        let mut known = LinkSpeed::default();
        loop {
            let measured = self.measure(known).await;
            if differs(known, measured) {
                known = measured;
                tracing::debug!(node = self.node, ?measured, "a link was measured");
                self.feed.feed(Event::Linked(self.node, measured));
            }
            sleep(EVERY).await;
        }
    }

    /// One measurement on streams of its own; what could not be measured is as `known`.
    async fn measure(&self, known: LinkSpeed) -> LinkSpeed {
        // A node that leaves its streams open after a reset has none left for us.
        let Ok(Ok((mut send, mut recv))) = timeout(ANSWER_WITHIN, self.connection.open_bi()).await else {
            return known;
        };
        // Fails only on a closed stream, which the probe will notice.
        drop(send.set_priority(PROBE_PRIORITY));
        let mut found = known;
        match self.measure_on((&mut send, &mut recv), &mut found).await {
            Ok(()) => drop(send.finish()),
            Err(failure) => {
                if failure != Failure::Broken {
                    self.tally.update(|counters| counters.probes_failed += 1);
                    tracing::debug!(node = self.node, ?failure, "a probe of the link failed");
                }
                if failure == Failure::Wrong {
                    self.feed.feed(Event::Malformed(self.node));
                }
                // Both fail only where the stream is closed already.
                let reset = if failure == Failure::Late { LaneReset::Late } else { LaneReset::Frame };
                drop((send.reset(reset.into()), recv.stop(reset.into())));
            }
        }
        found
    }

    async fn measure_on(
        &self,
        (send, recv): (&mut SendStream, &mut RecvStream),
        found: &mut LinkSpeed,
    ) -> Result<(), Failure> {
        let mut round_trip = self.least(ROUND_TRIPS, 0, (&mut *send, &mut *recv)).await?;
        for _ in 0..SETTLING_MAX {
            if self.connection.rtt() <= 2 * round_trip + Duration::from_micros(SETTLED_US) {
                break;
            }
            round_trip = round_trip.min(self.least(1, 0, (&mut *send, &mut *recv)).await?);
        }
        found.round_trip_us = u32::try_from(round_trip.as_micros()).unwrap_or(u32::MAX).max(1);
        let mut rate: Option<f64> = None;
        for bytes in SIZES {
            let expected = rate.map_or(0.0, |rate| 2.0 * bytes as f64 / rate);
            if expected > TAKES_MAX.as_secs_f64() || !self.is_idle().await {
                break;
            }
            let took = self.least(TRIES, bytes, (&mut *send, &mut *recv)).await?;
            rate = Some(bytes_s(bytes, took, round_trip));
        }
        if let Some(rate) = rate {
            // Saturates at what u32 holds.
            found.mb_s = (rate / 1e6).round().max(1.0) as u32;
        }
        Ok(())
    }

    /// Waits, not for long, until no call is out to the node.
    async fn is_idle(&self) -> bool {
        for _ in 0..IDLE_LOOKS {
            if self.tally.outstanding() == 0 {
                return true;
            }
            sleep(IDLE_EVERY).await;
        }
        false
    }

    /// The fastest of so many probes of this size each way.
    async fn least(
        &self,
        tries: u32,
        bytes: usize,
        (send, recv): (&mut SendStream, &mut RecvStream),
    ) -> Result<Duration, Failure> {
        let mut least = Duration::MAX;
        for _ in 0..tries {
            let exchange = self.exchange(bytes, (&mut *send, &mut *recv));
            let took = timeout(ANSWER_WITHIN, exchange).await.unwrap_or(Err(Failure::Late))?;
            self.tally.update(|counters| counters.probes += 1);
            least = least.min(took);
        }
        Ok(least)
    }

    async fn exchange(
        &self,
        bytes: usize,
        (send, recv): (&mut SendStream, &mut RecvStream),
    ) -> Result<Duration, Failure> {
        let mut number = [0; 8];
        SystemRandom::new().fill(&mut number).map_err(|_| Failure::Broken)?;
        let id = u64::from_le_bytes(number);
        // At most `PROBE_BYTES_MAX`, which fits.
        let probe = Probe { id, answer_bytes: bytes as u32, padding: vec![0; bytes] };
        let frame = Message::Probe(probe).encode(&self.pool).map_err(|_| Failure::Broken)?;
        let started = Instant::now();
        write_frame(send, frame).await.map_err(|_| Failure::Broken)?;
        let frame = read_frame(recv, &self.pool, &[Op::Probed]).await?;
        let took = started.elapsed();
        let answer = Message::decode(&frame.ok_or(Failure::Wrong)?);
        match answer {
            Ok(Message::Probed(Probed { id: answered, padding }))
                if answered == id && padding.len() == bytes =>
            {
                Ok(took)
            }
            _ => Err(Failure::Wrong),
        }
    }
}

/// Bytes per second of a probe of so many bytes each way.
fn bytes_s(bytes: usize, took: Duration, round_trip: Duration) -> f64 {
    let transfer = took.saturating_sub(round_trip).max(took / TRANSFER_PART_MIN);
    2.0 * bytes as f64 / transfer.as_secs_f64().max(1e-9)
}

/// Whether a figure changed by more than a tenth.
fn differs(known: LinkSpeed, measured: LinkSpeed) -> bool {
    let differs = |a: u32, b: u32| u64::from(a.abs_diff(b)) * CHANGE_MIN > u64::from(a.max(b));
    differs(known.round_trip_us, measured.round_trip_us) || differs(known.mb_s, measured.mb_s)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_those_of_the_transfer_and_never_absurd() {
        let (us, ms) = (Duration::from_micros, Duration::from_millis);
        // 128 KiB each way over a gigabit at 0.3 ms.
        let took = Duration::from_secs_f64(2.0 * 131_072.0 / 125e6) + us(300);
        assert!((bytes_s(131_072, took, us(300)) / 125e6 - 1.0).abs() < 1e-3);
        // 2 KiB each way over 10 Mbit at 40 ms.
        let took = Duration::from_secs_f64(2.0 * 2048.0 / 1.25e6) + ms(40);
        assert!((bytes_s(2048, took, ms(40)) / 1.25e6 - 1.0).abs() < 0.25);
        // As fast as a round trip: the transfer is lost in it.
        assert_eq!(bytes_s(1000, ms(1), ms(1)), 2000.0 / 100e-6);
        assert_eq!(bytes_s(1000, ms(1), ms(5)), 2000.0 / 100e-6);
        assert!(bytes_s(1000, Duration::ZERO, Duration::ZERO).is_finite());
    }

    #[test]
    fn a_change_of_a_tenth_is_none() {
        let link = |round_trip_us, mb_s| LinkSpeed { round_trip_us, mb_s };
        let known = link(1000, 100);
        assert!(!differs(known, known) && !differs(known, link(1100, 110)) && !differs(known, link(901, 91)));
        assert!(differs(known, link(1112, 100)) && differs(known, link(1000, 89)));
        assert!(differs(LinkSpeed::default(), link(1, 1)) && differs(LinkSpeed::default(), link(1, 0)));
        assert!(!differs(LinkSpeed::default(), LinkSpeed::default()));
    }
}
