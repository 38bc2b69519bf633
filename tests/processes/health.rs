//! What machines show of themselves: from files of a made-up system to the API, the table and the metrics, and what the
//! router does about a hot one. And audits, switched on from the command line.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::harness::{Alone, Shape, folder, moemesh};

fn set(root: &Path, path: &str, text: &str) {
    let path = root.join(path);
    fs::create_dir_all(path.parent().expect("below the root")).expect("a folder");
    fs::write(path, text).expect("a file");
}

fn story(cluster: &Alone) -> Value {
    let request = json!({"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0});
    cluster.api.complete(&request)["choices"][0]["text"].clone()
}

#[test]
fn a_machine_that_gets_hot_is_shown_spared_and_changes_no_text() {
    let sysfs = folder();
    let temperature = "class/hwmon/hwmon0/temp1_input";
    set(sysfs.path(), "class/hwmon/hwmon0/name", "coretemp\n");
    set(sysfs.path(), temperature, "55000\n");
    set(sysfs.path(), "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "3\n");
    set(sysfs.path(), "class/powercap/intel-rapl:0/name", "package-0\n");
    set(sysfs.path(), "class/powercap/intel-rapl:0/energy_uj", "5000000\n");
    let root = sysfs.path().to_string_lossy().into_owned();
    let shape = Shape { node: &["--sysfs", &root], ..Shape::nodes(2) };
    let cluster = Alone::start(&shape);
    let before = story(&cluster);
    let each = |state: &Value, well: &dyn Fn(&Value) -> bool| {
        state["nodes"].as_array().is_some_and(|nodes| nodes.len() == 2 && nodes.iter().all(well))
    };
    // What is used counts from the first time it is noted; until then it is null.
    let cool = cluster.until("the sensors are read", |state| {
        each(state, &|node| {
            let shown = [&node["temperature_celsius"], &node["throttled"], &node["energy_joules"]];
            shown == [&json!(55.0), &json!(false), &json!(0)]
        })
    });
    assert!(each(&cool, &|node| node["spared"] == json!(false) && node["audits"].is_null()), "{cool:#}");
    set(sysfs.path(), temperature, "83000\n");
    set(sysfs.path(), "class/powercap/intel-rapl:0/energy_uj", "65000000\n");
    cluster.until("both are hot", |state| each(state, &|node| node["spared"] == json!(true)));
    assert_eq!(story(&cluster), before, "nobody else holds anything, and nothing is lost");
    cluster.until("the energy is noted", |state| {
        each(state, &|node| node["energy_joules"] == json!(60) && node["joules_per_token"].is_number())
    });
    let metrics = cluster.api.get("/metrics").text;
    for line in [
        "moemesh_node_temperature_celsius{node=\"node-1\"} 83",
        "moemesh_node_throttled{node=\"node-2\"} 0",
        "moemesh_node_energy_joules_total{node=\"node-1\"} 60",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    let table = moemesh(&["nodes", "--router", &cluster.api.base]).stdout;
    assert!(table.contains("83 C") && table.contains("no, spared") && table.contains("J/token"), "{table}");
    // A sensor that breaks is unavailable, and its series ends.
    set(sysfs.path(), temperature, "-273000\n");
    cluster.until("it is not believed", |state| each(state, &|node| node["temperature_celsius"].is_null()));
    assert!(!cluster.api.get("/metrics").text.contains("moemesh_node_temperature_celsius{"));
    assert!(cluster.logs().contains("cannot be"), "{}", cluster.logs());
}

#[test]
fn machines_without_sensors_are_said_to_have_none() {
    let shape = Shape { node: &["--sysfs", "/nowhere"], router: &["--audit", "1"], ..Shape::nodes(1) };
    let cluster = Alone::start(&shape);
    let told = story(&cluster);
    let state =
        cluster.until("something was audited", |state| state["nodes"][0]["audits"]["right"] != json!(0));
    let node = &state["nodes"][0];
    assert_eq!(node["audits"]["wrong"], json!(0), "{node:#}");
    for figure in ["temperature_celsius", "throttled", "power_watts", "energy_joules", "joules_per_token"] {
        assert!(node[figure].is_null(), "{figure} of {node:#}");
    }
    assert_eq!(story(&cluster), told);
    let table = moemesh(&["nodes", "--router", &cluster.api.base]).stdout;
    assert!(table.contains("unavailable on all machines") && table.contains("audited"), "{table}");
    assert!(
        cluster
            .api
            .get("/metrics")
            .text
            .contains("moemesh_audits_total{node=\"node-1\",outcome=\"wrong\"} 0")
    );
    let refused = ["router", "--audit", "1.5"];
    moemesh(&refused).refused(&["0 (none) to 1 (all)"]);
}
