//! What this machine's sensors show: temperature, throttling, power and energy, as far as its system tells.
//!
//! Linux shows them as small text files below `/sys`, other ones on every machine. Each figure has a few places where it
//! may be, tried in order of trust, and is `None` where there is no such place, the file cannot be read (energy counters
//! are root's on many systems), or what it holds cannot be: a figure is never made up, and never zero for want of one.
//! What cannot be is said once in the log, with the file.
//!
//! A thread of its own reads, once a second (`Watch`): a sensor behind a slow bus may take tens of milliseconds, and
//! neither the thread that computes nor the network may wait for it. The price: figures are up to a second old. The root
//! is an argument, so that tests and labs can show what machines rarely do. Refuses to follow anything that is not an
//! ordinary file, and to read more than `FILE_BYTES_MAX` of one.

mod energy;

mod files;

mod throttle;

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mesh_wire::control::Vitals;

use self::energy::Meter;
use self::files::Files;
use self::throttle::Throttle;

/// How often the sensors are read.
pub const EVERY: Duration = Duration::from_secs(1);

/// Where the system shows its sensors.
pub const SYSFS: &str = "/sys";

/// Degrees that a working sensor may show, thousandths.
const TEMPERATURE_MC: std::ops::RangeInclusive<i64> = -40_000..=150_000;

/// Drivers (`hwmon*/name`) that show a processor's temperature: Intel, AMD (two), boards of several makers.
const CPU_DRIVERS: [&str; 8] = [
    "coretemp",
    "k10temp",
    "zenpower",
    "cpu_thermal",
    "cpu-thermal",
    "soc_thermal",
    "scpi_sensors",
    "acpitz",
];

/// What the type of a thermal zone says of a processor's, where no driver above is there.
const CPU_ZONES: [&str; 4] = ["pkg_temp", "cpu", "soc", "acpitz"];

/// The sensors of a machine. Reading goes on where the last one left off: counters are compared with before.
#[derive(Debug)]
pub struct Sensors {
    files: Files,
    meter: Meter,
    throttle: Throttle,
}

impl Sensors {
    /// Those below `root`.
    pub fn new(root: &Path) -> Sensors {
        Sensors { files: Files::new(root), meter: Meter::default(), throttle: Throttle::default() }
    }

    /// What they show now. `now` is a time since any start; `busy` is whether the processor was computing since the
    /// last reading.
    pub fn read(&mut self, now: Duration, busy: bool) -> Vitals {
        let Sensors { files, meter, throttle } = self;
        let temperature_mc = temperature(files);
        let throttled = throttle.read(files, busy);
        let (power_mw, energy_mj) = meter.read(files, now);
        Vitals { temperature_mc, throttled, power_mw, energy_mj }
    }
}

/// The hottest part of the processor.
fn temperature(files: &mut Files) -> Option<i32> {
    let mut hottest = None;
    for driver in files.list("class/hwmon", "hwmon") {
        let name = files.text(&driver.join("name")).unwrap_or_default();
        if !CPU_DRIVERS.contains(&name.as_str()) {
            continue;
        }
        for sensor in files.list_named(&driver, "temp", "_input") {
            hottest = hottest.max(files.within(&sensor, &TEMPERATURE_MC));
        }
    }
    if hottest.is_none() {
        for zone in files.list("class/thermal", "thermal_zone") {
            let kind = files.text(&zone.join("type")).unwrap_or_default();
            if CPU_ZONES.iter().any(|part| kind.contains(part)) {
                hottest = hottest.max(files.within(&zone.join("temp"), &TEMPERATURE_MC));
            }
        }
    }
    hottest.and_then(|mc| i32::try_from(mc).ok())
}

#[derive(Debug)]
struct Seen {
    vitals: Vitals,
    ended: bool,
}

/// A thread that reads the sensors. Ends when dropped.
#[derive(Debug)]
pub struct Watch(Arc<(Mutex<Seen>, Condvar)>);

impl Watch {
    /// Reads those below `root` once, and begins to read them again and again. `busy_us` says for how long the processor
    /// has computed so far.
    ///
    /// # Errors
    /// The system has no thread to give.
    pub fn start(root: &Path, busy_us: impl Fn() -> u64 + Send + 'static) -> Result<Watch, std::io::Error> {
        let (started, mut sensors) = (Instant::now(), Sensors::new(root));
        let vitals = sensors.read(Duration::ZERO, false);
        let shared = Arc::new((Mutex::new(Seen { vitals, ended: false }), Condvar::new()));
        let ours = Arc::clone(&shared);
        let reader = move || watch(&mut sensors, started, &busy_us, &ours);
        std::thread::Builder::new().name("sensors".into()).spawn(reader)?;
        Ok(Watch(shared))
    }

    /// What they showed last.
    pub fn vitals(&self) -> Vitals {
        lock(&self.0.0).vitals
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        lock(&self.0.0).ended = true;
        self.0.1.notify_all();
    }
}

fn lock(seen: &Mutex<Seen>) -> MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

fn watch(
    sensors: &mut Sensors,
    started: Instant,
    busy_us: &dyn Fn() -> u64,
    (seen, changed): &(Mutex<Seen>, Condvar),
) {
    let mut before = busy_us();
    loop {
        let waited = changed.wait_timeout_while(lock(seen), EVERY, |seen| !seen.ended);
        if waited.unwrap_or_else(PoisonError::into_inner).0.ended {
            return;
        }
        let computed = busy_us();
        // Half of the time, or more.
        let busy = Duration::from_micros(computed.saturating_sub(before)) * 2 >= EVERY;
        before = computed;
        let vitals = sensors.read(started.elapsed(), busy);
        lock(seen).vitals = vitals;
    }
}

#[cfg(test)]
mod tests;
