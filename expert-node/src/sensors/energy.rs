//! Energy and power: counters that wrap, or gauges that are added up.
//!
//! Processors count microjoules (`powercap/intel-rapl:N`, AMD's as well; `hwmon*/energy*_input` elsewhere), from a start that
//! nobody knows up to a range that the system tells, and then from zero again. Only differences mean something. Where
//! there is no counter but a gauge of the draw (`hwmon*/power*_average` or `_input`, microwatts), it is multiplied by the
//! time. Parts of a package (cores, graphics, memory controllers) are counted within it and passed over. The price: what
//! a machine's board, fan and disks draw is not seen, so the figure is a lower bound.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::files::Files;

/// Most power that one counter or gauge is believed to show, microwatts: ten kilowatts.
const POWER_UW_MAX: u64 = 10_000_000_000;

/// Where counters begin again if the system does not say: at 32 bits of microjoules, as the first of them did.
const RANGE_UJ: u64 = u32::MAX as u64;

/// Least time over which power is told: less than that is within the jitter of a thread.
const POWER_OVER_MIN: Duration = Duration::from_millis(100);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Meter {
    counters: BTreeMap<PathBuf, u64>,
    /// Since the first reading, microjoules; none before there was anything to read.
    used_uj: Option<u64>,
    last: Option<Duration>,
    power_mw: Option<u32>,
}

impl Meter {
    /// Milliwatts since the last reading, and millijoules since the first.
    pub(super) fn read(&mut self, files: &mut Files, now: Duration) -> (Option<u32>, Option<u64>) {
        let elapsed = self.last.map(|last| now.saturating_sub(last));
        if elapsed.is_some_and(|elapsed| elapsed < POWER_OVER_MIN) {
            return (self.power_mw, self.used_uj.map(|uj| uj / 1000));
        }
        self.last = Some(now);
        let counted = self.count(files, elapsed);
        let used = match counted {
            Some(used) => Some(used),
            None => draw_uw(files).map(|uw| micros(uw, elapsed.unwrap_or_default())),
        };
        self.power_mw = used.zip(elapsed).and_then(|(used, elapsed)| {
            let mw = u128::from(used) * 1000 / elapsed.as_micros().max(1);
            u32::try_from(mw).ok()
        });
        // What is not shown this time is missing from the sum, which only grows.
        self.used_uj = match (self.used_uj, used) {
            (known, None) => known,
            (known, Some(used)) => Some(known.unwrap_or(0).saturating_add(used)),
        };
        (self.power_mw, self.used_uj.filter(|_| used.is_some()).map(|uj| uj / 1000))
    }

    /// Microjoules that all counters counted since the last reading; none without a counter that can be read.
    fn count(&mut self, files: &mut Files, elapsed: Option<Duration>) -> Option<u64> {
        let mut used = None;
        for (path, range) in counters(files) {
            let Some(now) = files.counter(&path) else { continue };
            let before = self.counters.insert(path.clone(), now);
            let since = match before {
                None => 0,
                Some(before) if now >= before => now - before,
                Some(before) => range.saturating_sub(before).saturating_add(now),
            };
            let most = micros(POWER_UW_MAX, elapsed.unwrap_or_default());
            if since > most {
                files.complain(&path, &format!("{since} uJ more"));
                continue;
            }
            used = Some(since.saturating_add(used.unwrap_or(0)));
        }
        used
    }
}

/// Microjoules of so many microwatts over a time.
fn micros(uw: u64, time: Duration) -> u64 {
    let uj = u128::from(uw) * time.as_micros() / 1_000_000;
    u64::try_from(uj).unwrap_or(u64::MAX)
}

/// Counters of whole packages, and where each begins again.
fn counters(files: &mut Files) -> Vec<(PathBuf, u64)> {
    let mut found = Vec::new();
    for zone in files.list("class/powercap", "intel-rapl:") {
        // `intel-rapl:0:1` is a part of `intel-rapl:0`.
        let is_part = zone.file_name().is_some_and(|name| name.to_string_lossy().matches(':').count() > 1);
        let is_package = files.text(&zone.join("name")).is_some_and(|name| name.starts_with("package"));
        if is_part || !is_package {
            continue;
        }
        let range = files.counter(&zone.join("max_energy_range_uj")).unwrap_or(RANGE_UJ);
        found.push((zone.join("energy_uj"), range));
    }
    if found.iter().any(|(path, _)| files.text(path).is_some()) {
        return found;
    }
    for driver in files.list("class/hwmon", "hwmon") {
        let sockets = files.list_named(&driver, "energy", "_input");
        let is_socket = |path: &Path| {
            let label = path.to_string_lossy().replace("_input", "_label");
            // AMD's driver shows cores and sockets side by side.
            files.text(Path::new(&label)).is_none_or(|label| !label.starts_with("Ecore"))
        };
        found.extend(sockets.into_iter().filter(|path| is_socket(path)).map(|path| (path, u64::MAX)));
    }
    found
}

/// What gauges show, microwatts, all together; none without one.
fn draw_uw(files: &mut Files) -> Option<u64> {
    let mut draw = None;
    for driver in files.list("class/hwmon", "hwmon") {
        let mut gauges = files.list_named(&driver, "power", "_average");
        if gauges.is_empty() {
            gauges = files.list_named(&driver, "power", "_input");
        }
        for gauge in gauges {
            let uw = files.within(&gauge, &(0..=POWER_UW_MAX as i64)).and_then(|uw| u64::try_from(uw).ok());
            draw = uw.map_or(draw, |uw| Some(uw.saturating_add(draw.unwrap_or(0))));
        }
    }
    draw
}
