//! `moemesh router`: the router process.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use std::sync::Arc;

use anyhow::Context;
use clap::{Args, ValueEnum};
use mesh_discovery::discovery::PORT;
use mesh_net::authority::Authority;
use mesh_net::hub::HubConfig;
use mesh_proto::placement::Copies;
use mesh_proto::routes::HOLDERS_MAX;
use model::kernel::paced::paced;
use router::serve::{MeshConfig, Milestone, Resident, RouterConfig};
use serde_json::json;

use crate::discovery::{self, Mode};
use crate::model_options::{ModelOptions, parse_pace};
use crate::output::{self, Progress};
use crate::{memory, signals, state};

/// Time that blocking tasks get to end once the router has stopped.
const STOP_WITHIN: Duration = Duration::from_millis(500);

/// Options of `moemesh router`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// Folder for keys, roster and tokens; made at the first start, which makes a new cluster [default:
    /// $XDG_DATA_HOME/moemesh/router or ~/.local/share/moemesh/router]
    #[arg(long, env = "MOEMESH_STATE")]
    state: Option<PathBuf>,
    /// No cluster: every expert runs in this process
    #[arg(long, conflicts_with_all = ["state", "listen", "expect", "replicate"])]
    alone: bool,
    /// UDP address that nodes dial; 0.0.0.0:8621 for nodes on other machines
    #[arg(long, default_value_t = HubConfig::LISTEN)]
    listen: SocketAddr,
    /// Whether nodes find this router when its address changes. mdns: it is announced by multicast on the LAN, to
    /// everybody, and says to its nodes where it is. off: nodes know it by its addresses only [default: mdns, unless
    /// --listen is an address of this machine alone]
    #[arg(long, value_enum, conflicts_with = "alone")]
    discovery: Option<Mode>,
    /// TCP port at which nodes ask where the router is (libp2p); 0 for any
    #[arg(long, default_value_t = PORT)]
    libp2p_port: u16,
    /// TCP address of the API; any but loopback needs an API key
    #[arg(long, default_value = "127.0.0.1:8620")]
    http: SocketAddr,
    /// Key that clients must send (may be repeated)
    #[arg(long, env = "MOEMESH_API_KEY", hide_env_values = true)]
    api_key: Vec<String>,
    /// Nodes to wait for at the start [default: as many as have joined so far]
    #[arg(long)]
    expect: Option<usize>,
    /// Seconds to wait for the nodes before going on without the missing ones
    #[arg(long, default_value_t = 60)]
    wait: u64,
    /// Which experts the router holds besides the nodes. all: every one, each layer's rows shared out so that router
    /// and nodes finish together (takes the memory for it). none: only what no node holds
    #[arg(long, value_enum, default_value_t = Replicate::None)]
    replicate: Replicate,
    /// Memory for experts besides the nodes', in MiB: as many of each layer as fit are shared with the nodes
    #[arg(long, conflicts_with = "replicate", conflicts_with = "alone")]
    memory: Option<u64>,
    /// Machines that hold each expert: 1 to 4, as far as their memory goes. auto: 2, where memory is left and it costs
    /// little speed
    #[arg(long, default_value = "auto", value_parser = parse_replicas)]
    replicas: Copies,
    /// auto: experts are cut and spread over several nodes where that is faster. off: experts stay whole
    #[arg(long, value_enum, default_value_t = Slices::Auto)]
    slices: Slices,
    /// Most MB/s of weights that are sent to nodes, to all together [default: as many as the link takes]
    #[arg(long, conflicts_with = "alone", value_parser = clap::value_parser!(u64).range(1..))]
    weights_mb_s: Option<u64>,
    /// Compute no experts that are meant for nodes, not even while no node can be asked: as long as an expert has no
    /// holder, requests are answered with status 503 instead of slowly (for routers without the memory or disk for it)
    #[arg(long, conflicts_with = "alone")]
    no_fallback: bool,
    /// Share of the nodes' answers to compute again, elsewhere or here, and compare bit for bit: 0.01 is one in a
    /// hundred. A node that is found wrong gets no more work. Reads the experts concerned from the router's disk
    #[arg(long, default_value_t = 0.0, value_parser = parse_share, conflicts_with = "alone", value_name = "SHARE")]
    audit: f64,
    /// Be as slow as a machine that reads this many GB/s of weights (for studies)
    #[arg(long, value_parser = parse_pace)]
    pace_gb_s: Option<f64>,
    /// Memory for the KV cache, in MiB
    #[arg(long, default_value_t = 1024)]
    kv_memory: u64,
    /// Prompt tokens of one request per step while others are answered; twice as many while nobody waits
    #[arg(long, default_value_t = 256)]
    chunk: usize,
    /// Requests that run at a time; more wait
    #[arg(long, default_value_t = 32)]
    max_requests: usize,
    /// Microseconds to watch for a node's answer before sleeping; only where a core is to spare
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=10_000))]
    spin_us: u64,
    /// Print addresses and readiness as JSON lines (for programs)
    #[arg(long)]
    announce: bool,
    /// Stop when standard input ends (for parents)
    #[arg(long, hide = true)]
    stop_with_parent: bool,
}

/// Which experts the router holds besides the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Replicate {
    All,
    None,
}

/// Whether experts may be cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Slices {
    Auto,
    Off,
}

/// Reads `--replicas`.
pub(crate) fn parse_replicas(text: &str) -> Result<Copies, String> {
    match text {
        "auto" => Ok(Copies::Auto),
        number => match number.parse() {
            Ok(copies) if (1..=HOLDERS_MAX).contains(&usize::from(copies)) => Ok(Copies::Exactly(copies)),
            _ => Err(format!("say auto, or a number from 1 to {HOLDERS_MAX}")),
        },
    }
}

/// Reads `--audit`.
fn parse_share(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("say a share of all calls, from 0 (none) to 1 (all); 0.01 is one in a hundred".to_owned()),
    }
}

pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    let mesh = if options.alone { None } else { Some(open_cluster(&options)?) };
    let hint = mesh.as_ref().map(|mesh| join_hint(&mesh.authority, &options));
    let authority = mesh.as_ref().map(|mesh| Arc::clone(&mesh.authority));
    let model = options.model.open()?;
    let (kernels, native) = options.model.load_kernels(&model)?;
    let kernels = paced(kernels, options.pace_gb_s);
    let name = model.name.clone();
    let config = RouterConfig {
        mesh,
        resident: match (options.replicate, options.memory) {
            (Replicate::All, _) => Resident::All,
            (Replicate::None, Some(mebibytes)) => Resident::Bytes(mebibytes << 20),
            (Replicate::None, None) => Resident::None,
        },
        fallback: !options.no_fallback,
        audit: options.audit,
        memory_bytes: memory::available(),
        require_exact: options.model.require_exact(),
        http: options.http,
        api_keys: options.api_key.clone(),
        model,
        kernels,
        native,
        kv_bytes: options.kv_memory << 20,
        rows: 2 * options.chunk + options.max_requests,
        chunk: options.chunk,
        sequences: options.max_requests,
    };
    let announce = options.announce;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime of the API")?;
    let stop = async {
        if let Err(error) = signals::stop(options.stop_with_parent).await {
            tracing::error!(%error, "signals cannot be waited for; stop with kill");
            std::future::pending::<()>().await;
        }
    };
    let mut loading = Progress::new();
    let mut _discovery = None;
    let reached = |milestone| match milestone {
        Milestone::Loading { done, total } if !announce => loading.show(done, total, "loading experts"),
        milestone => {
            if let (Milestone::Listening { mesh: Some(mesh), .. }, Some(authority)) = (milestone, &authority)
            {
                _discovery = discovery::of_router(options.discovery, options.libp2p_port, authority, mesh);
            }
            loading.finish();
            report(milestone, announce, &name, hint.as_deref());
        }
    };
    let ended = runtime.block_on(router::serve::run(config, reached, stop));
    // Stopped while it was loading, a blocking task may still be at it.
    runtime.shutdown_timeout(STOP_WITHIN);
    ended?;
    Ok(ExitCode::SUCCESS)
}

/// The cluster in the state folder, which may be new.
fn open_cluster(options: &Options) -> anyhow::Result<MeshConfig> {
    let authority = Authority::open(&state::folder(options.state.clone(), "router")?)?;
    Ok(MeshConfig {
        authority: Arc::new(authority),
        expect: options.expect,
        listen: options.listen,
        wait: Duration::from_secs(options.wait),
        spin: Duration::from_micros(options.spin_us),
        copies: options.replicas,
        slices: options.slices == Slices::Auto,
        weights_bytes_s: options.weights_mb_s.map(|mb_s| mb_s.saturating_mul(1_000_000)),
    })
}

/// What to do to add a machine.
fn join_hint(authority: &Authority, options: &Options) -> String {
    let what = match (authority.is_new(), authority.roster().roster().nodes.len()) {
        (true, _) => format!("made cluster {}", authority.cluster()),
        (false, nodes) => format!("cluster {}, {nodes} nodes have joined", authority.cluster()),
    };
    let state = options.state.as_ref().map(|state| format!(" --state {}", state.display()));
    let state = state.unwrap_or_default();
    format!("{what}; to add a machine: `moemesh token{state}` here, then `moemesh node --join TOKEN` there")
}

fn report(milestone: Milestone, announce: bool, name: &str, hint: Option<&str>) {
    let line = match milestone {
        Milestone::Listening { mesh, http } => {
            if !announce {
                if let Some((mesh, hint)) = mesh.zip(hint) {
                    println!("{hint}");
                    println!("nodes dial {mesh}");
                }
                println!("loading {name}");
            }
            json!({"mesh": mesh.map(|a| a.to_string()), "http": http.to_string()})
        }
        Milestone::Loading { .. } => return,
        Milestone::Ready { nodes } => {
            if !announce {
                println!("ready with {nodes} nodes; chat with `moemesh run`");
            }
            json!({"ready": nodes})
        }
    };
    if announce && let Err(error) = output::json(&line) {
        tracing::warn!(%error, "announce");
    }
}
