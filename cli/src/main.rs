//! The one binary of moemesh: subcommands, nothing else. What they do lives in the crates below.
#![allow(clippy::print_stdout, reason = "a command's result goes to standard output")]

mod commands;

mod story;

mod cluster;

mod children;

mod client;

mod discovery;

mod model_options;

mod output;

mod memory;

mod signals;

mod state;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// One server for large sparse Mixture-of-Experts models out of the machines on a LAN.
///
/// The router holds attention, gates, KV cache and the API; expert nodes hold the routed experts. Try it on
/// this machine alone with `moemesh demo`.
#[derive(Debug, Parser)]
#[command(name = "moemesh", version, max_term_width = 110, infer_subcommands = false)]
struct Cli {
    /// Log more to standard error (-v: debug of moemesh, -vv: everything). RUST_LOG overrides it.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a private cluster on this machine and let it tell a story
    Demo(commands::demo::Options),
    /// Serve a model over the OpenAI-compatible API, its experts on the nodes of a cluster
    Router(commands::router::Options),
    /// Hold and run experts for a router
    Node(commands::node::Options),
    /// Chat with a running router, or complete one prompt
    Run(commands::run::Options),
    /// Print a one-time token with which a machine joins the cluster of the router on this machine
    Token(commands::token::Options),
    /// Show the nodes of a running router, or shut one out
    Nodes(commands::nodes::Options),
    /// Say why two machines do not work together
    #[command(subcommand)]
    Doctor(commands::doctor::Command),
    /// Say how a cluster would run a model: whether it fits, how fast, and what bounds it
    Plan(commands::plan::Options),
    /// Run a prompt in one process, without a mesh: the yardstick of every cluster
    Reference(commands::reference::Options),
    /// Measure what a model predicts
    #[command(subcommand)]
    Eval(commands::eval::Command),
    /// Measure kernels, links and whole clusters
    #[command(subcommand)]
    Bench(commands::bench::Command),
    /// Make a model of a real shape with random weights
    Synth(commands::synth::Options),
    /// Print versions and what this machine can do
    Version(commands::version::Options),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    output::start_logging(cli.verbose);
    let result = match cli.command {
        Command::Demo(options) => commands::demo::run(&options),
        Command::Router(options) => commands::router::run(options),
        Command::Node(options) => commands::node::run(options),
        Command::Run(options) => commands::run::run(&options),
        Command::Token(options) => commands::token::run(&options),
        Command::Nodes(options) => commands::nodes::run(&options),
        Command::Doctor(command) => commands::doctor::run(&command),
        Command::Plan(options) => commands::plan::run(&options),
        Command::Reference(options) => commands::reference::run(&options),
        Command::Eval(command) => commands::eval::run(&command),
        Command::Bench(command) => commands::bench::run(&command),
        Command::Synth(options) => commands::synth::run(&options),
        Command::Version(options) => commands::version::run(&options),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            eprintln!("moemesh: {error:#}");
            ExitCode::FAILURE
        }
    }
}
