//! Sensors of systems that are made up file by file: what is there, what is not, and what cannot be.

use super::*;
use std::fs;

/// A tree that is made file by file.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Tree {
        Tree(tempfile::tempdir().unwrap())
    }

    fn set(&self, path: &str, text: &str) {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn sensors(&self) -> Sensors {
        Sensors::new(self.0.path())
    }

    fn read(&self) -> Vitals {
        self.sensors().read(Duration::ZERO, false)
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn without_sensors_everything_is_unavailable() {
    assert_eq!(Sensors::new(Path::new("/nowhere")).read(seconds(0), true), Vitals::default());
    assert_eq!(Tree::new().read(), Vitals::default());
}

#[test]
fn the_hottest_sensor_of_the_processor_counts() {
    let tree = Tree::new();
    tree.set("class/hwmon/hwmon0/name", "nvme\n");
    tree.set("class/hwmon/hwmon0/temp1_input", "99000\n");
    tree.set("class/thermal/thermal_zone0/type", "x86_pkg_temp\n");
    tree.set("class/thermal/thermal_zone0/temp", "50000\n");
    assert_eq!(tree.read().temperature_mc, Some(50_000), "no driver of a processor: the zone");
    tree.set("class/hwmon/hwmon1/name", "coretemp\n");
    tree.set("class/hwmon/hwmon1/temp1_input", "71000\n");
    tree.set("class/hwmon/hwmon1/temp2_input", "73500\n");
    tree.set("class/hwmon/hwmon1/temp2_crit", "100000\n");
    assert_eq!(tree.read().temperature_mc, Some(73_500));
}

#[test]
fn what_cannot_be_is_unavailable_and_never_zero() {
    let tree = Tree::new();
    tree.set("class/hwmon/hwmon0/name", "k10temp");
    for nonsense in ["-273000", "1000000000", "", "hot", "71.5", "0x47", "99999999999999999999", "\u{0}"] {
        tree.set("class/hwmon/hwmon0/temp1_input", nonsense);
        assert_eq!(tree.read().temperature_mc, None, "{nonsense:?}");
    }
    tree.set("class/hwmon/hwmon0/temp1_input", &"7".repeat(1 << 20));
    assert_eq!(tree.read().temperature_mc, None, "a megabyte of digits");
    fs::write(tree.0.path().join("class/hwmon/hwmon0/temp1_input"), [0xff, 0xfe]).unwrap();
    assert_eq!(tree.read().temperature_mc, None, "no text");
    fs::remove_file(tree.0.path().join("class/hwmon/hwmon0/temp1_input")).unwrap();
    fs::create_dir(tree.0.path().join("class/hwmon/hwmon0/temp1_input")).unwrap();
    assert_eq!(tree.read().temperature_mc, None, "a folder");
    // One that works beside it is read.
    tree.set("class/hwmon/hwmon0/temp2_input", "64000");
    assert_eq!(tree.read().temperature_mc, Some(64_000));
}

#[test]
fn a_pipe_in_place_of_a_file_does_not_stop_the_reader() {
    let tree = Tree::new();
    tree.set("class/hwmon/hwmon0/name", "coretemp");
    let pipe = tree.0.path().join("class/hwmon/hwmon0/temp1_input");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
    assert!(made.success());
    assert_eq!(tree.read().temperature_mc, None);
}

#[test]
fn counters_that_grow_mean_throttling_for_a_while() {
    let tree = Tree::new();
    let path = "devices/system/cpu/cpu3/thermal_throttle/package_throttle_count";
    tree.set(path, "17");
    let mut sensors = tree.sensors();
    let read = |sensors: &mut Sensors| sensors.read(seconds(0), false).throttled;
    assert_eq!(read(&mut sensors), Some(false), "what was counted before it started says nothing");
    tree.set(path, "18");
    let seen: Vec<_> = (0..6).map(|_| read(&mut sensors)).collect();
    assert_eq!(seen, [true, true, true, true, true, false].map(Some));
    tree.set(path, "2");
    assert_eq!(read(&mut sensors), Some(false), "a counter that was reset");
}

#[test]
fn a_lowered_allowance_means_throttling_and_a_slow_idle_core_does_not() {
    let tree = Tree::new();
    let (most, now) = (
        "devices/system/cpu/cpu0/cpufreq/scaling_max_freq",
        "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq",
    );
    tree.set(most, "2400000");
    tree.set(now, "600000");
    assert_eq!(tree.sensors().read(seconds(0), false).throttled, Some(false), "idle");
    assert_eq!(tree.sensors().read(seconds(0), true).throttled, Some(true), "it computes at a quarter");
    tree.set(now, "2000000");
    let mut sensors = tree.sensors();
    assert_eq!(sensors.read(seconds(0), true).throttled, Some(false));
    tree.set(most, "1500000");
    assert_eq!(sensors.read(seconds(1), false).throttled, Some(true));
    tree.set(most, "2400000");
    let back: Vec<_> = (2..8).map(|second| sensors.read(seconds(second), false).throttled).collect();
    assert_eq!(back.last(), Some(&Some(false)), "{back:?}");
}

#[test]
fn energy_counters_are_added_up_over_their_wrap() {
    let tree = Tree::new();
    for (zone, name) in
        [("intel-rapl:0", "package-0"), ("intel-rapl:1", "package-1"), ("intel-rapl:0:0", "core")]
    {
        tree.set(&format!("class/powercap/{zone}/name"), name);
        tree.set(&format!("class/powercap/{zone}/max_energy_range_uj"), "1000000000");
        tree.set(&format!("class/powercap/{zone}/energy_uj"), "999000000");
    }
    let mut sensors = tree.sensors();
    let mut read = |second| {
        let Vitals { power_mw, energy_mj, .. } = sensors.read(seconds(second), false);
        (power_mw, energy_mj)
    };
    assert_eq!(read(0), (None, Some(0)), "one reading is no power");
    // The first wraps: 1 J to the end and 14 J after it; the second goes on by 0.5 J; the part of the first is in it.
    tree.set("class/powercap/intel-rapl:0/energy_uj", "14000000");
    tree.set("class/powercap/intel-rapl:1/energy_uj", "999500000");
    tree.set("class/powercap/intel-rapl:0:0/energy_uj", "999999999");
    assert_eq!(read(1), (Some(15_500), Some(15_500)));
    tree.set("class/powercap/intel-rapl:0/energy_uj", "nonsense");
    assert_eq!(read(2), (Some(0), Some(15_500)), "the other goes on");
    // A jump that no machine makes in a second.
    tree.set("class/powercap/intel-rapl:0/max_energy_range_uj", "18446744073709551615");
    tree.set("class/powercap/intel-rapl:0/energy_uj", "900000000000000000");
    assert_eq!(read(3), (Some(0), Some(15_500)));
    fs::remove_dir_all(tree.0.path().join("class/powercap")).unwrap();
    assert_eq!(read(4), (None, None), "gone is unavailable, not zero");
}

#[test]
fn a_gauge_is_multiplied_by_time_where_there_is_no_counter() {
    let tree = Tree::new();
    tree.set("class/hwmon/hwmon0/name", "ina3221");
    tree.set("class/hwmon/hwmon0/power1_input", "7500000");
    let mut sensors = tree.sensors();
    let mut read = |second| {
        let Vitals { power_mw, energy_mj, .. } = sensors.read(seconds(second), false);
        (power_mw, energy_mj)
    };
    assert_eq!(read(0), (None, Some(0)));
    assert_eq!(read(2), (Some(7_500), Some(15_000)));
    tree.set("class/hwmon/hwmon0/power1_input", "-1");
    assert_eq!(read(3), (None, None));
    // A counter is believed before a gauge.
    tree.set("class/hwmon/hwmon0/energy1_input", "5");
    tree.set("class/hwmon/hwmon0/power1_input", "7500000");
    assert_eq!(read(4), (Some(0), Some(15_000)));
}

#[test]
fn a_watch_shows_what_is_there() {
    let tree = Tree::new();
    tree.set("class/hwmon/hwmon0/name", "coretemp");
    tree.set("class/hwmon/hwmon0/temp1_input", "45000");
    let watch = Watch::start(tree.0.path(), || 0).unwrap();
    assert_eq!(watch.vitals().temperature_mc, Some(45_000));
}
