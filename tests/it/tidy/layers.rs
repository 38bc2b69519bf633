//! Which crate may depend on which: read off the manifests.
//!
//! `tests, benches, cli > {router, expert-node} > mesh-net > mesh-proto > mesh-wire` and
//! `{router, expert-node} > model`; `tests, cli > mesh-discovery > mesh-net`. Router and node never see each other, mesh and model never meet.

use super::Complaint;

/// (crate, its dependencies among ours).
const LAYERS: [(&str, &[&str]); 11] = [
    ("mesh-wire", &[]),
    ("mesh-proto", &["mesh-wire"]),
    ("mesh-net", &["mesh-proto", "mesh-wire"]),
    ("mesh-discovery", &["mesh-net", "mesh-wire"]),
    ("model", &[]),
    ("router", &["mesh-net", "mesh-proto", "mesh-wire", "model"]),
    ("expert-node", &["mesh-net", "mesh-proto", "mesh-wire", "model"]),
    ("moemesh", &["expert-node", "mesh-discovery", "mesh-net", "mesh-proto", "mesh-wire", "model", "router"]),
    ("moemesh-benches", &["expert-node", "mesh-net", "mesh-proto", "mesh-wire", "model", "router"]),
    (
        "moemesh-tests",
        &[
            "expert-node",
            "mesh-discovery",
            "mesh-net",
            "mesh-proto",
            "mesh-wire",
            "model",
            "moemesh",
            "router",
        ],
    ),
    ("moemesh-fuzz", &["moemesh-tests"]),
];

/// (crate, dependencies that would break what it stands for, why).
const REFUSED: [(&str, &[&str], &str); 4] = [
    ("model", &["axum", "hyper", "libp2p", "quinn", "tokio", "ureq"], "the model knows nothing of networks"),
    ("mesh-wire", &["axum", "hyper", "libp2p", "quinn", "tokio", "ureq"], "the wire is bytes, no IO"),
    ("mesh-net", &["libp2p", "libp2p-gossipsub"], "discovery suggests; QUIC decides without it"),
    ("mesh-proto", &["libp2p", "quinn", "rand", "tokio", "tracing", "ureq"], "the protocol is pure state"),
];

const TABLES: [&str; 3] = ["dependencies", "dev-dependencies", "build-dependencies"];

/// Complaints about one manifest.
pub(super) fn check(path: &str, manifest: &str) -> Vec<Complaint> {
    let Ok(manifest) = manifest.parse::<toml::Table>() else {
        return vec![format!("{path}: not TOML")];
    };
    let name = manifest.get("package").and_then(|package| package.get("name")).and_then(|name| name.as_str());
    let Some(name) = name else { return vec![format!("{path}: no package name")] };
    let Some((_, allowed)) = LAYERS.iter().find(|(layer, _)| *layer == name) else {
        return vec![format!("{path}: crate '{name}' has no layer: give it one in tests/it/tidy/layers.rs")];
    };
    let refused = REFUSED.iter().find(|(layer, _, _)| *layer == name);
    let mut complaints = Vec::new();
    for dependency in dependencies(&manifest) {
        let ours = LAYERS.iter().any(|(layer, _)| *layer == dependency);
        if ours && !allowed.contains(&dependency.as_str()) {
            complaints.push(format!(
                "{path}: '{name}' must not depend on '{dependency}': it is not in a layer below"
            ));
        }
        if let Some((_, _, why)) = refused.filter(|(_, refused, _)| refused.contains(&dependency.as_str())) {
            complaints.push(format!("{path}: '{name}' must not depend on '{dependency}': {why}"));
        }
    }
    complaints
}

/// Names of all dependencies, those of single platforms included, renamed ones by their real name.
fn dependencies(manifest: &toml::Table) -> Vec<String> {
    let mut tables: Vec<&toml::Table> = vec![manifest];
    if let Some(targets) = manifest.get("target").and_then(|target| target.as_table()) {
        tables.extend(targets.values().filter_map(|target| target.as_table()));
    }
    let listed =
        tables.iter().flat_map(|table| TABLES.iter().filter_map(|name| table.get(*name)?.as_table()));
    let named = listed.flat_map(|table| table.iter());
    named
        .map(|(key, value)| value.get("package").and_then(|name| name.as_str()).unwrap_or(key).to_string())
        .collect()
}

#[test]
fn a_dependency_upwards_is_seen() {
    let upwards = "[package]\nname = 'model'\n[dependencies]\nmesh-wire.workspace = true\n";
    assert_eq!(check("model/Cargo.toml", upwards).len(), 1);
    let sideways = "[package]\nname = 'router'\n[dev-dependencies]\nexpert-node = { path = 'x' }\n";
    assert_eq!(check("router/Cargo.toml", sideways).len(), 1);
    let renamed =
        "[package]\nname = 'mesh-wire'\n[target.'cfg(unix)'.dependencies]\nm = { package = 'mesh-net' }\n";
    assert_eq!(check("mesh/wire/Cargo.toml", renamed).len(), 1);
    let impure = "[package]\nname = 'mesh-proto'\n[dependencies]\ntokio = '1'\n";
    assert_eq!(check("mesh/proto/Cargo.toml", impure).len(), 1);
    assert_eq!(check("new/Cargo.toml", "[package]\nname = 'new'\n").len(), 1);
    let right =
        "[package]\nname = 'router'\n[dependencies]\nmodel.workspace = true\ntokio.workspace = true\n";
    assert!(check("router/Cargo.toml", right).is_empty());
}
