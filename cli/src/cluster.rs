//! A private cluster on this machine: keys and roster in a temporary directory, a router and node processes.

use std::path::Path;

use anyhow::Context;
use mesh_net::identity::Identity;
use mesh_net::roster::{Machine, Roster};
use serde_json::Value;
use tempfile::TempDir;

use crate::children::Process;
use crate::model_options::ModelOptions;

/// Shape of a private cluster.
#[derive(Clone, Debug, Default)]
pub(crate) struct ClusterOptions {
    /// Node processes.
    pub(crate) nodes: u16,
    /// Pins each process to this many cores of its own (router first), with as many threads; `None`: all
    /// processes share the cores.
    pub(crate) cores_per_process: Option<usize>,
    /// More arguments of the router.
    pub(crate) router_arguments: Vec<String>,
    /// More arguments of each node.
    pub(crate) node_arguments: Vec<String>,
    /// GB/s of weights that each process is held to, router first; those beyond the list are as fast as they are.
    pub(crate) paces: Vec<f64>,
}

/// A running private cluster. Dropping it stops every process.
#[derive(Debug)]
pub(crate) struct Cluster {
    http: String,
    /// Nodes first: they say goodbye to a router that is still there.
    nodes: Vec<Process>,
    router: Process,
    _directory: TempDir,
}

impl Cluster {
    /// Starts the processes and returns when every node serves its experts.
    pub(crate) fn start(model: &ModelOptions, options: &ClusterOptions) -> anyhow::Result<Cluster> {
        let directory =
            tempfile::Builder::new().prefix("moemesh-").tempdir().context("make a temporary directory")?;
        write_keys(directory.path(), options.nodes)?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let processes = usize::from(options.nodes) + 1;
        let threads = options.cores_per_process.unwrap_or_else(|| (cores / processes).max(1));
        let arguments = model.to_arguments(threads)?;
        let pin =
            |index: usize| options.cores_per_process.map(|count| core_list(index * count, count, cores));
        let file = |name: &str| directory.path().join(name).to_string_lossy().into_owned();

        let pace = |index: usize| {
            let pace = options.paces.get(index);
            pace.into_iter().flat_map(|pace| ["--pace-gb-s".to_owned(), pace.to_string()])
        };
        let mut router: Vec<String> =
            ["router", "--http", "127.0.0.1:0", "--announce"].map(String::from).to_vec();
        if options.nodes > 0 {
            router.extend(["--roster".into(), file("roster.toml"), "--key".into(), file("router.key")]);
            router.extend(["--listen".into(), "127.0.0.1:0".into()]);
        }
        router.extend(pace(0));
        router.extend(arguments.iter().chain(&options.router_arguments).cloned());
        let mut router = Process::start("the router", &router, pin(0).as_deref())?;
        let listening = router.wait_for("http")?;
        let address = |key: &str| listening[key].as_str().unwrap_or_default().to_owned();
        let (mesh, http) = (address("mesh"), address("http"));

        let mut nodes = Vec::new();
        for index in 0..usize::from(options.nodes) {
            let name = node_name(index);
            let mut node = vec!["node".into(), "--roster".into(), file("roster.toml"), "--key".into()];
            node.extend([file(&format!("{name}.key")), "--router".into(), mesh.clone()]);
            node.extend(pace(index + 1));
            node.extend(arguments.iter().chain(&options.node_arguments).cloned());
            nodes.push(Process::start(&name, &node, pin(index + 1).as_deref())?);
        }
        router.wait_for("ready")?;
        Ok(Cluster { http: format!("http://{http}"), nodes, router, _directory: directory })
    }

    /// Where the API is.
    pub(crate) fn http(&self) -> &str {
        &self.http
    }

    /// Router, then nodes.
    pub(crate) fn processes(&self) -> impl Iterator<Item = &Process> {
        std::iter::once(&self.router).chain(&self.nodes)
    }

    /// Stops every process and waits for it.
    pub(crate) fn stop(&mut self) -> anyhow::Result<()> {
        self.router.stop()?;
        self.nodes.iter_mut().try_for_each(Process::stop)
    }
}

/// What the processes of a private cluster are called.
pub(crate) fn node_name(index: usize) -> String {
    format!("node-{}", index + 1)
}

/// Writes `router.key`, one key per node, and `roster.toml`.
pub(crate) fn write_keys(directory: &Path, nodes: u16) -> anyhow::Result<()> {
    let router = Identity::create(&directory.join("router.key"))?;
    let mut members = Vec::new();
    for index in 0..usize::from(nodes) {
        let name = node_name(index);
        let identity = Identity::create(&directory.join(format!("{name}.key")))?;
        members.push(Machine { name, key: identity.id() });
    }
    let router = Machine { name: "router".to_owned(), key: router.id() };
    Roster { cluster: "local".to_owned(), router, nodes: members }.save(&directory.join("roster.toml"))?;
    Ok(())
}

/// `count` cores from `first` on, wrapping around, in the form `taskset -c` takes.
fn core_list(first: usize, count: usize, cores: usize) -> String {
    (first..first + count).map(|core| (core % cores).to_string()).collect::<Vec<_>>().join(",")
}

/// A number of a JSON object, 0 if absent.
pub(crate) fn number(value: &Value, pointer: &str) -> f64 {
    value.pointer(pointer).and_then(Value::as_f64).unwrap_or(0.0)
}
