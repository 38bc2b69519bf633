//! `moemesh node`: an expert node process.
//!
//! A node needs nothing but a token: which model it is the router says, and experts are fetched (`weights`). With
//! `--model` it takes them from its own disk instead, as studies do, and machines that have the model anyway.

mod weights;

use std::io::Read;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use expert_node::node::{ExpertNode, NodeConfig, NodeError};
use expert_node::sensors::SYSFS;
use mesh_net::borrower::BorrowError;
use mesh_net::join::{self, JoinError};
use mesh_net::membership::{Membership, Opened};
use mesh_net::roster::check_name;
use mesh_net::station::{StationConfig, StationError, Stop};
use mesh_net::tickets::Refused;
use mesh_net::token::{TEXT_BYTES_MAX, Token};
use model::kernel::paced::paced;

use crate::discovery::{self, Mode};
use crate::model_options::{ModelOptions, parse_pace};
use crate::{memory, output, signals, state};

/// Share of the machine's memory a node takes for experts unless told otherwise.
const MEMORY_SHARE: f64 = 0.75;

/// How often a leaving node says how many calls it still serves.
const LEAVING_EVERY: Duration = Duration::from_millis(500);

/// Memory assumed where the machine does not say: little for today's machines.
const MEMORY_UNKNOWN: u64 = 4 << 30;

/// Exit status of a machine that was revoked: starting it again is of no use, and service managers are told so
/// (`RestartPreventExitStatus` of its unit).
const REVOKED: u8 = 3;

/// Options of `moemesh node`.
#[derive(Args, Debug)]
#[command(
    after_help = "Without --model the experts of this machine come from the router and other nodes and are kept on \
                  disk; --weights and --cache go with --model.\n\nExit status: 0 stopped in order, 1 failed, 2 \
                  wrong usage, 3 this machine was revoked (starting it again is of no use)."
)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    #[command(flatten)]
    weights: weights::Options,
    /// Join the cluster with a token of `moemesh token` first: the token, @FILE, or - for standard input (arguments
    /// can be seen by other users of this machine). Needed once; later starts need nothing
    #[arg(long, value_name = "TOKEN|@FILE|-")]
    join: Option<String>,
    /// What this machine wants to be called in the cluster [default: its host name]
    #[arg(long, requires = "join")]
    name: Option<String>,
    /// Folder for this machine's key and membership [default: $XDG_DATA_HOME/moemesh/node or
    /// ~/.local/share/moemesh/node]
    #[arg(long, env = "MOEMESH_STATE")]
    state: Option<PathBuf>,
    /// Address of the router, host:port (may be repeated; tried in order) [default: those of the token]
    #[arg(long)]
    router: Vec<String>,
    /// How to find the router if it is at none of its addresses any more. mdns: by multicast on the LAN. off: not at
    /// all [default: mdns, unless the router is on this machine]
    #[arg(long, value_enum)]
    discovery: Option<Mode>,
    /// Memory for experts, in MiB [default: three quarters of what the machine has]
    #[arg(long)]
    memory: Option<u64>,
    /// Be as slow as a machine that reads this many GB/s of weights (for studies)
    #[arg(long, value_parser = parse_pace)]
    pace_gb_s: Option<f64>,
    /// Microseconds to watch for the router's next call before sleeping; only where a core is to spare
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=10_000))]
    spin_us: u64,
    /// Folder in which the system shows temperature, throttling and power of this machine
    #[arg(long, default_value = SYSFS, value_name = "DIR")]
    sysfs: PathBuf,
    /// Print the name given by the cluster as a JSON line (for programs)
    #[arg(long)]
    announce: bool,
    /// Stop when standard input ends (for parents)
    #[arg(long, hide = true)]
    stop_with_parent: bool,
}

pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    match serve(&options) {
        Err(error) if is_revoked(&error) => {
            eprintln!("moemesh: {error:#}");
            Ok(ExitCode::from(REVOKED))
        }
        ended => ended,
    }
}

/// Whether this is what a machine ends with whose key was shut out.
fn is_revoked(error: &anyhow::Error) -> bool {
    let ended = error.downcast_ref::<NodeError>();
    let joined = error.downcast_ref::<JoinError>();
    let waiting = error.downcast_ref::<BorrowError>();
    matches!(ended, Some(NodeError::Station(StationError::Revoked)))
        || matches!(waiting, Some(BorrowError::Revoked))
        || matches!(joined, Some(JoinError::Refused(Refused::Revoked)))
}

fn serve(options: &Options) -> anyhow::Result<ExitCode> {
    let membership = Arc::new(member(options)?);
    let name = membership.admission().name.clone();
    if options.announce {
        output::json(&serde_json::json!({"joined": name}))?;
    }
    let mut routers: Vec<SocketAddr> = Vec::new();
    for router in &options.router {
        let found =
            router.to_socket_addrs().with_context(|| format!("find the router at '{router}' (host:port)"))?;
        routers.extend(found);
    }
    // Lives until the node has ended; what it finds the station reads.
    let _discovery = discovery::of_node(options.discovery, &membership, &routers);
    let depot = weights::Depot::open(options, &membership, &routers)?;
    loop {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
        let Some(weights) = depot.model(options, &runtime)? else { return Ok(ExitCode::SUCCESS) };
        let node = start(options, &weights, (Arc::clone(&membership), routers.clone()))?;
        let (stop, with_parent) = (node.stop(), options.stop_with_parent);
        let (ended, over) = tokio::sync::oneshot::channel();
        let watched = weights.clone();
        let watching = std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! {
                    outcome = end(&stop, with_parent) => if let Err(error) = outcome {
                        tracing::error!(%error, "signals cannot be waited for; stop with kill");
                    },
                    () = watched.show() => {}
                    () = watched.other_model(&stop) => {}
                    _ = over => {}
                }
            });
        });
        if !options.announce && !with_parent {
            println!("{name} serves experts of {}; Ctrl-C ends it", weights.name());
        }
        let outcome = node.join();
        // Fails where the thread has ended.
        ended.send(()).ok();
        watching.join().ok();
        outcome?;
        if !weights.is_outdated() {
            return Ok(ExitCode::SUCCESS);
        }
        eprintln!("the router runs another model now; this node follows it");
    }
}

/// Starts the node's threads.
fn start(
    options: &Options,
    weights: &weights::Weights,
    (membership, routers): (Arc<Membership>, Vec<SocketAddr>),
) -> anyhow::Result<ExpertNode> {
    let kernels = paced(weights.load_kernels(&options.model)?, options.pace_gb_s);
    let memory_bytes = match options.memory {
        Some(mebibytes) => mebibytes << 20,
        None => (memory::total().unwrap_or(MEMORY_UNKNOWN) as f64 * MEMORY_SHARE) as u64,
    };
    // It could not keep more of them.
    let memory_bytes = weights.disk_bytes().map_or(memory_bytes, |disk| disk.min(memory_bytes));
    Ok(ExpertNode::start(NodeConfig {
        membership,
        routers,
        model: weights.source(),
        kernels,
        threads: options.model.thread_count() as u16,
        memory_bytes,
        spin: Duration::from_micros(options.spin_us),
        pool_bytes_max: StationConfig::POOL_BYTES_MAX,
        sysfs: options.sysfs.clone(),
    })?)
}

/// At the first signal the node leaves, at the second it ends at once; a parent that is gone needs nobody to wait.
async fn end(stop: &Stop, with_parent: bool) -> anyhow::Result<()> {
    tokio::select! {
        signal = signals::stop_signal() => signal?,
        () = signals::parent_gone(), if with_parent => {
            stop.trigger();
            return Ok(());
        }
    }
    stop.leave();
    let mut ticks = tokio::time::interval(LEAVING_EVERY);
    let mut shown = None;
    let second = signals::stop_signal();
    tokio::pin!(second);
    loop {
        tokio::select! {
            signal = &mut second => {
                stop.trigger();
                return signal;
            }
            _ = ticks.tick() => {
                let calls = stop.calls_under_way();
                if shown.replace(calls) != Some(calls) && !with_parent {
                    eprintln!("leaving: {calls} calls under way; Ctrl-C again ends it at once");
                }
            }
        }
    }
}

/// This machine's membership: as it is kept, or gained now.
fn member(options: &Options) -> anyhow::Result<Membership> {
    let path = state::folder(options.state.clone(), "node")?;
    let token =
        options.join.as_deref().map(|given| read_token(given, options.stop_with_parent)).transpose()?;
    match (Membership::open(&path)?, token) {
        (Opened::Member(membership), None) => Ok(*membership),
        (Opened::Member(membership), Some(token)) if membership.is_of(&token) => {
            let name = &membership.admission().name;
            eprintln!("this machine is in that cluster already, as {name}; the token was not needed");
            Ok(*membership)
        }
        (Opened::Member(_), Some(_)) => bail!(
            "this machine is in another cluster (state {}); give it another --state to join this one as well, or \
             delete that folder to leave the other",
            path.display()
        ),
        (Opened::Stranger(..), None) => bail!(
            "this machine is in no cluster (state {}); run `moemesh token` on the router, then `moemesh node --join \
             TOKEN` here",
            path.display()
        ),
        (Opened::Stranger(folder, identity), Some(token)) => {
            let name = options.name.clone().unwrap_or_else(host_name);
            let admission = join::join(&identity, &token, &name).context("join the cluster")?;
            if !options.announce {
                println!("joined cluster {} as {}", admission.cluster, admission.name);
            }
            Ok(Membership::enter(folder, identity, admission)?)
        }
    }
}

/// The token that was given, or the one in a file or on standard input.
fn read_token(given: &str, with_parent: bool) -> anyhow::Result<Token> {
    let mut text = String::new();
    match given.strip_prefix('@') {
        Some(path) => {
            let file =
                std::fs::File::open(path).with_context(|| format!("open the token's file '{path}'"))?;
            file.take(TEXT_BYTES_MAX as u64 + 1)
                .read_to_string(&mut text)
                .context("read the token's file")?;
        }
        None if given == "-" && with_parent => {
            bail!("standard input cannot be the token and the parent at once")
        }
        None if given == "-" => {
            let input = std::io::stdin().take(TEXT_BYTES_MAX as u64 + 1);
            { input }.read_to_string(&mut text).context("read the token from standard input")?;
        }
        None => text.push_str(given),
    }
    Ok(text.parse()?)
}

/// What this machine is called, as far as it makes a name.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let letter = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
    let name: String = name.trim().chars().map(|c| if letter(c) { c } else { '-' }).take(63).collect();
    if check_name(&name).is_ok() { name } else { "node".to_owned() }
}
