//! `moemesh node`: an expert node process.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use expert_node::node::{ExpertNode, NodeConfig};
use mesh_net::identity::Identity;
use mesh_net::roster::Roster;
use mesh_net::station::{StationConfig, Stop};
use model::kernel::paced::paced;

use crate::model_options::{ModelOptions, parse_pace};
use crate::{memory, signals};

/// Share of the machine's memory a node takes for experts unless told otherwise.
const MEMORY_SHARE: f64 = 0.75;

/// How often a leaving node says how many calls it still serves.
const LEAVING_EVERY: Duration = Duration::from_millis(500);

/// Memory assumed where the machine does not say: little for today's machines.
const MEMORY_UNKNOWN: u64 = 4 << 30;

/// Options of `moemesh node`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelOptions,
    /// Roster of the cluster
    #[arg(long)]
    roster: PathBuf,
    /// This machine's key file
    #[arg(long)]
    key: PathBuf,
    /// Address of the router, host:port (may be repeated; tried in order)
    #[arg(long, required = true)]
    router: Vec<String>,
    /// Memory for experts, in MiB [default: three quarters of what the machine has]
    #[arg(long)]
    memory: Option<u64>,
    /// Be as slow as a machine that reads this many GB/s of weights (for studies)
    #[arg(long, value_parser = parse_pace)]
    pace_gb_s: Option<f64>,
    /// Microseconds to watch for the router's next call before sleeping; only where a core is to spare
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=10_000))]
    spin_us: u64,
    /// Stop when standard input ends (for parents)
    #[arg(long, hide = true)]
    stop_with_parent: bool,
}

pub(crate) fn run(options: Options) -> anyhow::Result<ExitCode> {
    let (identity, roster) = (Identity::load(&options.key)?, Roster::load(&options.roster)?);
    let index = roster.node_index(identity.id());
    let name = index.and_then(|index| roster.nodes.get(usize::from(index)));
    let name = name.map_or_else(|| "node".to_owned(), |machine| machine.name.clone());
    let mut routers: Vec<SocketAddr> = Vec::new();
    for router in &options.router {
        let found =
            router.to_socket_addrs().with_context(|| format!("find the router at '{router}' (host:port)"))?;
        routers.extend(found);
    }
    let model = options.model.open()?;
    let (kernels, _) = options.model.load_kernels(&model)?;
    let kernels = paced(kernels, options.pace_gb_s);
    let memory_bytes = match options.memory {
        Some(mebibytes) => mebibytes << 20,
        None => (memory::total().unwrap_or(MEMORY_UNKNOWN) as f64 * MEMORY_SHARE) as u64,
    };
    let node = ExpertNode::start(NodeConfig {
        name: name.clone(),
        identity,
        roster,
        routers,
        model: Arc::<model::open::Model>::clone(&model),
        kernels,
        threads: options.model.thread_count() as u16,
        memory_bytes,
        spin: Duration::from_micros(options.spin_us),
        pool_bytes_max: StationConfig::POOL_BYTES_MAX,
    })?;
    let stop = node.stop();
    let with_parent = options.stop_with_parent;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    std::thread::spawn(move || {
        if let Err(error) = runtime.block_on(end(&stop, with_parent)) {
            tracing::error!(%error, "signals cannot be waited for; stop with kill");
        }
    });
    if !with_parent {
        println!("{name} serves experts of {}; Ctrl-C ends it", model.name);
    }
    node.join()?;
    Ok(ExitCode::SUCCESS)
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
