//! Whether the system slowed the processor down.
//!
//! Three signs, any of which is enough. Intel counts how often cores and packages were throttled
//! (`thermal_throttle/*_throttle_count`): the count grew. A board's kernel lowers the highest frequency that it allows
//! (`cpufreq/scaling_max_freq`) while it is hot: it is a tenth below the highest seen. A processor that computes runs at a
//! frequency far below what is allowed (`scaling_cur_freq`), which firmware does without telling anybody. Idle
//! processors run slowly as a matter of course, so the last sign counts only where the machine was busy, and of its
//! cores the fastest.

use super::files::Files;

/// Parts in ten of the highest allowance seen, below which it was lowered. Governors move it by less.
const ALLOWED_TENTHS: u64 = 9;

/// Parts in ten of what is allowed, below which a busy core is held back. Many cores together run at two thirds of what
/// one alone may.
const RUNS_TENTHS: u64 = 5;

/// Readings for which a sign holds: a processor that is throttled now and then is throttled.
const HOLDS: u32 = 5;

/// Frequencies that are believed, kHz.
const KHZ: std::ops::RangeInclusive<i64> = 1_000..=20_000_000;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Throttle {
    /// The sum of the counters at the last reading.
    counted: Option<u64>,
    /// The highest frequency ever allowed, kHz.
    allowed: u64,
    /// Readings for which it still counts as throttled.
    holds: u32,
}

impl Throttle {
    /// None where the system has nothing that would tell.
    pub(super) fn read(&mut self, files: &mut Files, busy: bool) -> Option<bool> {
        let (mut counted, mut allowed, mut runs) = (None, None, None);
        for cpu in files.list("devices/system/cpu", "cpu") {
            for kind in ["core", "package"] {
                let path = cpu.join(format!("thermal_throttle/{kind}_throttle_count"));
                let count = files.counter(&path);
                counted = count.map_or(counted, |count| Some(count.saturating_add(counted.unwrap_or(0))));
            }
            allowed = allowed.max(khz(files, &cpu.join("cpufreq/scaling_max_freq")));
            if busy {
                // Asking a core for its frequency may wake it.
                runs = runs.max(khz(files, &cpu.join("cpufreq/scaling_cur_freq")));
            }
        }
        if counted.is_none() && allowed.is_none() {
            return None;
        }
        // Counters that fell were reset; that says nothing.
        let grew = self.counted.zip(counted).is_some_and(|(before, now)| now > before);
        self.counted = counted.or(self.counted);
        self.allowed = self.allowed.max(allowed.unwrap_or(0));
        let lowered = allowed.is_some_and(|now| now * 10 < self.allowed * ALLOWED_TENTHS);
        let held_back = allowed.zip(runs).is_some_and(|(allowed, runs)| runs * 10 < allowed * RUNS_TENTHS);
        let slowed = grew || lowered || held_back;
        self.holds = if slowed { HOLDS } else { self.holds.saturating_sub(1) };
        Some(self.holds > 0)
    }
}

fn khz(files: &mut Files, path: &std::path::Path) -> Option<u64> {
    files.within(path, &KHZ).and_then(|khz| u64::try_from(khz).ok())
}
