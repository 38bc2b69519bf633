//! `moemesh roster`: keys and roster of a static cluster.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use crate::cluster;

/// Options of `moemesh roster`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Folder to write roster.toml, router.key and node-1.key, node-2.key, ... to
    #[arg(long, default_value = "cluster")]
    out: PathBuf,
    /// Nodes to make keys for
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=1024))]
    nodes: u16,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    std::fs::create_dir_all(&options.out).with_context(|| format!("make {}", options.out.display()))?;
    cluster::write_keys(&options.out, options.nodes)?;
    let out = options.out.display();
    println!("wrote {out}/roster.toml, {out}/router.key and {} node keys.", options.nodes);
    println!("Copy roster.toml and one node key to each machine (a key belongs to one machine only), then");
    println!(
        "  on the router: moemesh router --roster roster.toml --key router.key --listen 0.0.0.0:8621 --model DIR"
    );
    println!(
        "  on each node:  moemesh node --roster roster.toml --key node-1.key --router ROUTER:8621 --model DIR"
    );
    Ok(ExitCode::SUCCESS)
}
