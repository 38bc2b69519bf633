//! `moemesh doctor net` with real sockets: what works, and each way in which it does not, is told by name.

use std::net::UdpSocket;

use serde_json::{Value, json};

use super::harness::{Alone, Cluster, Ended, Shape, folder, moemesh};

/// The checks, after the status was found to agree with them: 1 where one fails.
#[track_caller]
fn checks(ended: &Ended) -> Vec<Value> {
    let last = ended.stdout.lines().last().expect("something was printed");
    let told: Value = serde_json::from_str(last).expect("the last line is JSON");
    let checks = told["checks"].as_array().expect("checks").clone();
    let fails = checks.iter().any(|check| check["outcome"] == "fail");
    assert_eq!((ended.code, &told["well"]), (Some(i32::from(fails)), &json!(!fails)), "{ended:#?}");
    for check in checks.iter().filter(|check| check["outcome"] == "fail") {
        let remedy = check["remedy"].as_str().unwrap_or_default();
        assert!(remedy.len() > 10, "no remedy: {check}");
    }
    checks
}

/// Names of the checks with this outcome.
fn named<'a>(checks: &'a [Value], outcome: &str) -> Vec<&'a str> {
    let those = checks.iter().filter(|check| check["outcome"] == outcome);
    those.filter_map(|check| check["name"].as_str()).collect()
}

/// The one check that fails, as it says.
#[track_caller]
fn fails(arguments: &[&str], name: &str, words: &[&str]) {
    let all = [&["doctor", "net", "--json"][..], arguments].concat();
    let checks = checks(&moemesh(&all));
    assert_eq!(named(&checks, "fail"), [name], "{checks:#?}");
    let failed = checks.iter().find(|check| check["name"] == name).expect("it is there");
    let text = format!("{} -> {}", failed["what"], failed["remedy"]);
    words.iter().for_each(|word| assert!(text.contains(word), "it lacks {word:?}: {text}"));
}

#[test]
fn a_node_learns_that_all_is_well_or_what_is_not() {
    // On loopback the router answers at a TCP port and says nothing to the LAN.
    let shape = Shape { router: &["--discovery", "mdns", "--libp2p-port", "0"], ..Shape::nodes(2) };
    let mut cluster = Alone::start(&shape);
    let (state, mesh) = (cluster.state("node-1"), cluster.mesh());
    let well = checks(&moemesh(&["doctor", "net", "--json", "--state", &state]));
    assert_eq!(named(&well, "pass"), ["membership", "route", "port", "protocol", "cluster", "trust", "mtu"]);
    assert!(named(&well, "fail").is_empty(), "{well:#?}");
    // For people, and while the node serves: it is not disturbed.
    let text = moemesh(&["doctor", "net", &mesh, "--state", &state]);
    assert_eq!(text.code, Some(0), "{text:#?}");
    assert!(text.stdout.contains("pass  trust") && !text.stdout.contains("FAIL"), "{}", text.stdout);
    assert_eq!(cluster.node(0)["connections"], 1);
    let logs = cluster.logs();
    assert!(!logs.contains("WARN"), "whoever only looks is no cause for warnings: {logs}");

    // The router's own view, while both are here and when one is gone.
    let router = cluster.state("router");
    let seen = checks(&moemesh(&["doctor", "net", "--json", "--state", &router]));
    assert_eq!(named(&seen, "pass"), ["router", "port", "node", "node"]);
    assert_eq!(cluster.stop_node(1), Some(0));
    cluster.until("it is gone", |nodes| nodes["nodes"][1]["state"] == "absent");
    fails(&["--state", &router], "node", &["node-2 is not connected", "doctor net"]);

    // Another cluster's router at the address.
    let other = Cluster::start(&Shape::nodes(0));
    fails(&[&other.mesh(), "--state", &state], "cluster", &["this machine joined router", "another --state"]);

    // Shut out.
    let gone = cluster.state("node-2");
    assert_eq!(moemesh(&["nodes", "revoke", "node-2", "--state", &router]).code, Some(0));
    fails(&["--state", &gone], "trust", &["was revoked", "new token"]);

    // The router has stopped: nobody has its port any more.
    cluster.stop_router();
    fails(&["--state", &state], "port", &["nothing listens", "moemesh router"]);
    fails(&["--state", &router], "router", &["no router runs"]);
}

#[test]
fn ports_and_names_that_lead_nowhere_are_told_apart() {
    let folder = folder();
    let nowhere = folder.path().join("none").to_string_lossy().into_owned();
    let state = ["--json", "--state", &nowhere];
    let run = |host: &str| checks(&moemesh(&[&["doctor", "net", host][..], &state].concat()));
    let what = |checks: &[Value], name: &str| {
        let found = checks.iter().find(|check| check["name"] == name);
        found.unwrap_or_else(|| panic!("no {name}: {checks:#?}"))["what"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    let socket = || UdpSocket::bind("127.0.0.1:0").expect("a free port");
    let closed = socket().local_addr().expect("an address").to_string();
    let seen = run(&closed);
    assert_eq!(named(&seen, "fail"), ["membership", "port"], "{seen:#?}");
    assert!(what(&seen, "membership").contains("in no cluster"));
    assert!(what(&seen, "port").contains("nothing listens"), "{seen:#?}");
    // It takes packets and never answers, as behind a firewall that drops.
    let hole = socket();
    let seen = run(&hole.local_addr().expect("an address").to_string());
    assert!(what(&seen, "port").contains("nothing comes back from UDP"), "{seen:#?}");
    let seen = run("no.such.host.invalid");
    assert_eq!(named(&seen, "fail"), ["membership", "name"], "{seen:#?}");
    let seen = checks(&moemesh(&[&["doctor", "net"][..], &state].concat()));
    assert_eq!(named(&seen, "fail"), ["membership", "name"], "{seen:#?}");
    assert!(!folder.path().join("none").exists(), "a doctor leaves nothing behind");
}
