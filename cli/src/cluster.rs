//! A private cluster on this machine: its state in a temporary directory, a router and node processes.
//!
//! All processes are ours, so the nodes are admitted without tokens, before the router starts: then they have the
//! order of their names, and all of them are waited for.

use std::path::Path;

use anyhow::{Context, bail};
use mesh_net::authority::Authority;
use mesh_net::membership::{Admission, Membership, Opened};
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
        admit(directory.path(), options.nodes)?;
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
            router.extend(["--state".into(), file("router"), "--listen".into(), "127.0.0.1:0".into()]);
        } else {
            router.push("--alone".into());
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
            let mut node = vec!["node".into(), "--state".into(), file(&name)];
            node.extend(["--router".into(), mesh.clone()]);
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

/// Makes a cluster in `router`, and its nodes in `node-1`, `node-2`, ...
fn admit(directory: &Path, nodes: u16) -> anyhow::Result<()> {
    if nodes == 0 {
        return Ok(());
    }
    let authority = Authority::open(&directory.join("router"))?;
    for name in (0..usize::from(nodes)).map(node_name) {
        let Opened::Stranger(folder, identity) = Membership::open(&directory.join(&name))? else {
            bail!("the temporary directory is not empty");
        };
        let name = authority.admit(&name, identity.id())?.name;
        // Where the router listens is known when it does.
        let (cluster, router) = (authority.cluster(), authority.identity().id());
        Membership::enter(folder, identity, Admission { cluster, router, name, addresses: Vec::new() })?;
    }
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
