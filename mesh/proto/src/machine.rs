//! How fast a machine is: its weights by rows, and its link.
//!
//! Figures come from other machines and may be anything: all arithmetic saturates, and what was not measured is
//! assumed to be ordinary. Whole nanoseconds, so that every machine that predicts finds the same.

use crate::facts::LinkSpeed;
use crate::health::MEASURED_ROWS;
use crate::routes::NodeIndex;

/// Bandwidth assumed where nothing was measured, in MB/s: a core of a desktop machine. Any number does among
/// machines that all have none.
pub const UNMEASURED_MB_S: u32 = 10_000;

/// Round trip assumed of a link that was not probed, in microseconds: a wired LAN, encryption and threads included.
pub const UNMEASURED_ROUND_TRIP_US: u32 = 250;

/// Rate assumed of a link that was not probed, in MB/s: gigabit Ethernet less its headers.
pub const UNMEASURED_LINK_MB_S: u32 = 117;

/// How fast a machine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Machine {
    /// Weight bandwidth in MB/s at `MEASURED_ROWS`; 0 where not measured.
    pub weight_mb_s: [u32; MEASURED_ROWS.len()],
    /// Its link to the router; zeros where not measured. Of the router itself: nothing.
    pub link: LinkSpeed,
}

impl Machine {
    /// Nanoseconds to take `rows` rows through `bytes` of weights: between measured counts along a straight line,
    /// beyond the last in proportion. More rows never take less.
    pub fn weights_ns(&self, bytes: u64, rows: u32) -> u64 {
        let mut before: Option<(u32, u64)> = None;
        for (at, mb_s) in MEASURED_ROWS.into_iter().zip(self.weight_mb_s) {
            let ns = match (mb_s, before) {
                (0, Some((fewer, ns))) => ns.saturating_mul(u64::from(at / fewer)),
                (0, None) => bytes_ns(bytes, UNMEASURED_MB_S),
                (mb_s, before) => bytes_ns(bytes, mb_s).max(before.map_or(0, |(_, ns)| ns)),
            };
            if rows <= at {
                let Some((fewer, less)) = before else { return ns };
                let more = scaled(ns - less, u64::from(rows - fewer), u64::from(at - fewer));
                return less.saturating_add(more);
            }
            before = Some((at, ns));
        }
        before.map_or(0, |(most, ns)| scaled(ns, u64::from(rows), u64::from(most)))
    }

    /// The same machine, as fast with one row as this many MB/s, and with more in proportion.
    pub fn at(&self, mb_s: u32) -> Machine {
        let measured = self.weight_mb_s[0];
        let count = |figure: &u32| match measured {
            0 => mb_s,
            _ => u32::try_from(scaled((*figure).into(), mb_s.into(), measured.into())).unwrap_or(u32::MAX),
        };
        Machine { weight_mb_s: std::array::from_fn(|slot| count(&self.weight_mb_s[slot])), ..*self }
    }

    /// Nanoseconds of a small message there and back.
    pub fn round_trip_ns(&self) -> u64 {
        let us = self.link.round_trip_us;
        u64::from(if us == 0 { UNMEASURED_ROUND_TRIP_US } else { us }) * 1000
    }

    /// Megabytes per second of its link.
    pub fn link_mb_s(&self) -> u32 {
        if self.link.mb_s == 0 { UNMEASURED_LINK_MB_S } else { self.link.mb_s }
    }
}

/// A node, as far as plans go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Which.
    pub node: NodeIndex,
    /// Bytes it will spend on weights.
    pub memory_bytes: u64,
    /// How fast it is.
    pub machine: Machine,
}

/// Nanoseconds of bytes at megabytes (10^6) per second.
pub fn bytes_ns(bytes: u64, mb_s: u32) -> u64 {
    bytes.saturating_mul(1000) / u64::from(mb_s.max(1))
}

/// `value * times / of`, at most what fits.
pub fn scaled(value: u64, times: u64, of: u64) -> u64 {
    (u128::from(value) * u128::from(times) / u128::from(of.max(1))).min(u128::from(u64::MAX)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_grows_with_the_rows_between_and_beyond_what_was_measured() {
        let machine = Machine { weight_mb_s: [1000, 1000, 500, 125, 0], ..Machine::default() };
        let us = |rows| machine.weights_ns(1_000_000, rows) / 1000;
        assert_eq!([1, 4, 10, 16, 64, 256, 512].map(us), [1000, 1000, 1500, 2000, 8000, 32_000, 64_000]);
        // A disturbed measurement does not make more rows cheaper.
        let machine = Machine { weight_mb_s: [1000, 9000, 9000, 9000, 9000], ..Machine::default() };
        assert_eq!(machine.weights_ns(1_000_000, 256), 1_000_000);
    }

    #[test]
    fn what_was_not_measured_is_ordinary_and_nothing_overflows() {
        let machine = Machine::default();
        assert_eq!(machine.weights_ns(10_000_000, 1), 1_000_000);
        assert_eq!(machine.round_trip_ns(), 250_000);
        assert_eq!(machine.link_mb_s(), UNMEASURED_LINK_MB_S);
        let slow = Machine { weight_mb_s: [1, 0, 0, 0, 0], ..machine };
        assert!(slow.weights_ns(u64::MAX, u32::MAX) > slow.weights_ns(1_000_000, 256));
    }
}
