//! Who belongs to a cluster, as its operator sees it: tokens, revocation, copied keys, folders that do not fit.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::{Value, json};

use super::harness::{Alone, Cluster, Shape, folder, moemesh, moemesh_reading};

fn state_of(cluster: &Cluster, name: &str) -> Value {
    let nodes = cluster.api.nodes();
    let list = nodes["nodes"].as_array().expect("nodes").clone();
    list.into_iter().find(|node| node["name"] == name).unwrap_or_default()
}

#[test]
fn a_revoked_node_ends_and_the_story_goes_on() {
    let mut cluster = Alone::start(&Shape::nodes(3));
    let expected = cluster.api.story(60, |_| ());
    let router = cluster.state("router");
    let api = cluster.api.clone();
    let disturbed = api.story(60, |token| {
        if token == 20 {
            let revoked = moemesh(&["nodes", "revoke", "node-2", "--state", &router, "--json"]);
            assert_eq!(revoked.json(), json!({"revoked": "node-2", "roster": 5}));
        }
    });
    disturbed.assert_equals(&expected);
    // Not 1, with which its service manager would start it for ever.
    assert_eq!(cluster.ended(1), Some(3));
    let logs = cluster.logs();
    assert!(logs.contains("this machine was revoked") && logs.contains("join with a new token"), "{logs}");
    assert_eq!(state_of(&cluster, "node-2")["state"], "revoked");
    // Neither with what it had, nor with another token for the same key.
    let state = cluster.state("node-2");
    let again = moemesh(&["node", "--state", &state]);
    again.refused(&["this machine was revoked"]);
    assert_eq!(again.code, Some(3));
    fs::remove_file(Path::new(&state).join("membership")).expect("leave the cluster");
    let token = cluster.token();
    let rejoined = moemesh(&["node", "--state", &state, "--join", &token]);
    rejoined.refused(&["key was revoked", "delete its state folder"]);
    assert_eq!(rejoined.code, Some(3));
    moemesh(&["nodes", "revoke", "node-2", "--state", &router]).refused(&["no node is called `node-2`"]);
    // With a new key it is a new machine, which gets the name that is free.
    fs::remove_dir_all(&state).expect("forget the key");
    cluster.join_again(1, &token);
    cluster.until("it serves again", |nodes| {
        let list = nodes["nodes"].as_array().expect("nodes");
        list.len() == 3 && list.iter().all(|node| node["state"] == "serving")
    });
    cluster.api.story(60, |_| ()).assert_equals(&expected);
}

#[test]
fn a_second_machine_with_a_copied_key_is_refused_and_named_while_the_first_serves_on() {
    let cluster = Alone::start(&Shape::nodes(2));
    let expected = cluster.api.story(40, |_| ());
    let (state, copy) = (cluster.state("node-1"), cluster.state("copy"));
    fs::create_dir(&copy).expect("make a folder");
    fs::set_permissions(&copy, Permissions::from_mode(0o700)).expect("close it");
    for file in fs::read_dir(&state).expect("read the state").flatten() {
        fs::copy(file.path(), Path::new(&copy).join(file.file_name())).expect("copy a file");
    }
    let _clone = cluster.start_another("copy");
    let told = |nodes: &Value| {
        let note = nodes["nodes"][0]["note"].as_str().unwrap_or_default();
        note.contains("uses this node's key") && note.contains("SD card")
    };
    let nodes = cluster.until("the copy is noticed", told);
    assert_eq!(
        (&nodes["nodes"][0]["connections"], &nodes["nodes"][0]["state"]),
        (&json!(1), &json!("serving"))
    );
    cluster.api.story(40, |_| ()).assert_equals(&expected);
    let told = "this machine's key is in use by another machine at 127.0.0.1";
    cluster.until("the copy is told", |_| cluster.logs().contains(told));
    // And the same folder twice is noticed on the spot.
    moemesh_reading(&["node", "--state", &state, "--stop-with-parent"], "").refused(&["in use", "--state"]);
}

#[test]
fn tokens_are_good_once_and_in_whatever_form_they_arrive() {
    let cluster = Cluster::start(&Shape::nodes(0));
    let folder = folder();
    let file = |name: &str| folder.path().join(name).to_string_lossy().into_owned();
    // These end right after they joined, as they have no such model.
    let nowhere = ["--model", "synthetic:unknown"];
    let join = |state: &str, token: &str| -> Vec<String> {
        let fixed = ["node", "--state", &file(state), "--join", token];
        fixed.iter().chain(&nowhere).map(|text| (*text).to_owned()).collect()
    };
    let run = |arguments: &[String]| moemesh(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
    let token = cluster.token();
    assert!(token.starts_with("moemesh1.") && !token.contains(char::is_whitespace), "{token}");

    let joined = run(&join("one", &token));
    joined.refused(&["'synthetic:unknown'"]);
    assert!(joined.stdout.contains("joined cluster"), "{joined:?}");
    run(&join("two", &token)).refused(&["used already", "moemesh token"]);
    // The machine that is in may show it again, and needs none.
    run(&join("one", &token)).refused(&["in that cluster already", "'synthetic:unknown'"]);
    moemesh(&["node", "--state", &file("one"), "--model", "synthetic:unknown"])
        .refused(&["'synthetic:unknown'"]);

    let wrapped = cluster.token();
    let (left, right) = wrapped.split_at(40);
    fs::write(file("token"), format!("\n  {left}\n{right}\n")).expect("write the token");
    let joined = run(&join("three", &format!("@{}", file("token"))));
    assert!(joined.stdout.contains("joined cluster"), "{joined:?}");
    let piped = join("four", "-");
    let piped: Vec<_> = piped.iter().map(String::as_str).collect();
    let joined = moemesh_reading(&piped, &cluster.token().to_uppercase());
    assert!(joined.stdout.contains("joined cluster"), "{joined:?}");

    let last = token.chars().last().expect("it is not empty");
    let flipped = format!("{}{}", &token[..token.len() - 1], if last == 'a' { 'b' } else { 'a' });
    run(&join("five", &flipped)).refused(&["damaged", "copy it again"]);
    run(&join("five", "hello")).refused(&["no join token", "moemesh token"]);
    run(&join("five", &format!("@{}", file("none")))).refused(&[&file("none")]);
    moemesh(&["node", "--state", &file("five")]).refused(&["in no cluster", "moemesh token", "--join"]);

    // Another cluster's: refused where the machine is in one, and where another router answers.
    let other = Cluster::start(&Shape::nodes(0));
    run(&join("one", &other.token())).refused(&["in another cluster", "--state"]);
    let mesh = cluster.mesh();
    let elsewhere = moemesh(&["token", "--state", &other.state("router"), "--address", &mesh]);
    run(&join("six", elsewhere.stdout.trim())).refused(&[&mesh, "not a router of this token's cluster"]);

    let json = moemesh(&["token", "--state", &cluster.state("router"), "--ttl", "5m", "--json"]).json();
    assert_eq!(json["addresses"], json!([mesh]));
    assert!(json["expires_unix"].as_u64().is_some_and(|time| time > 1_700_000_000), "{json}");
    moemesh(&["token", "--state", &cluster.state("router"), "--ttl", "31d"]).refused(&["30 days"]);
    moemesh(&["token", "--ttl", "soon"]).refused(&["soon", "30m"]);
    moemesh(&["token", "--address", "nowhere"]).refused(&["nowhere", "host:port"]);
}

#[test]
fn a_cluster_survives_its_router_and_its_folders_are_guarded() {
    let mut cluster = Cluster::start(&Shape::nodes(0));
    let router = cluster.state("router");
    let ports = ["--http", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--stop-with-parent"];
    let start = |state: &str| moemesh(&[&["router", "--state", state], &ports[..]].concat());
    start(&router).refused(&["in use by another moemesh process", "--state"]);
    let mode = |name: &str| {
        let path = Path::new(&router).join(name);
        fs::metadata(path).expect("it is there").permissions().mode() & 0o777
    };
    drop(cluster.token());
    for file in ["machine.key", "cluster.key", "roster", "tokens", "term", "admin.sock"] {
        assert_eq!(mode(file), 0o600, "{file}");
    }
    assert_eq!(mode(""), 0o700);
    assert_eq!(cluster.stop_router(), Some(0));
    // Nobody there: said at once.
    for command in [&["token"][..], &["nodes", "revoke", "pi"], &["nodes", "pardon", "pi"]] {
        let refused = moemesh(&[command, &["--state", &router]].concat());
        assert_eq!(refused.code, Some(1));
        refused.refused(&["no router runs with the state in", &router, "moemesh router --state"]);
    }
    moemesh(&["node", "--state", &router]).refused(&["state of a router"]);
    let key = Path::new(&router).join("cluster.key");
    fs::set_permissions(&key, Permissions::from_mode(0o644)).expect("open the key to all");
    start(&router).refused(&["cluster.key", "644", "chmod 600"]);
    fs::remove_file(&key).expect("lose the key");
    start(&router).refused(&["cluster.key", "missing", "restore"]);
    // A file where a folder should be, and a folder that others can write to.
    let file = cluster.state("file");
    fs::write(&file, "x").expect("write");
    start(&file).refused(&[&file]);
    moemesh(&["node", "--state", &format!("{file}/below")]).refused(&[&file]);
    let open = cluster.state("open");
    fs::create_dir(&open).expect("make a folder");
    fs::set_permissions(&open, Permissions::from_mode(0o777)).expect("open it");
    start(&open).refused(&[&open, "chmod 700"]);
}
