//! How much of a core finding each other may take.
//!
//! Whoever is on the LAN can send multicast and open TCP connections, and each of them costs this machine something
//! before it is known to be of no use. A machine that computes experts must not lose to that. So the thread's own CPU
//! time is read from the system, and a session that took more than a start's worth and 5 % since ends and rests
//! (`discovery`). The price: an attacker can turn discovery off on purpose; addresses that were given go on working.

use std::time::Duration;

/// Share of one core in the long run.
pub(crate) const SHARE: f64 = 0.05;

/// What a start may take at once: setting up, and a handshake or two at 10 ms on the slowest boards.
pub(crate) const BURST: Duration = Duration::from_millis(200);

/// Whether a session that has lived this long may have used so much.
pub(crate) fn allows(lived: Duration, used: Duration) -> bool {
    used <= BURST + lived.mul_f64(SHARE)
}

/// CPU time of this thread so far; `None` where the system does not say (then only the number of records is limited).
pub(crate) fn used() -> Option<Duration> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_and_five_percent_are_allowed() {
        let ms = Duration::from_millis;
        assert!(allows(ms(0), ms(200)) && !allows(ms(0), ms(201)));
        assert!(allows(ms(10_000), ms(700)) && !allows(ms(10_000), ms(701)));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn the_system_tells_what_this_thread_used() {
        let before = used().unwrap();
        let mut number = 1_u64;
        while used().unwrap() - before < Duration::from_millis(2) {
            number = std::hint::black_box(number.wrapping_mul(3));
        }
    }
}
