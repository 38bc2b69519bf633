//! `moemesh bench`: kernels, links and whole clusters, measured.

pub(crate) mod decode;
pub(crate) mod kernel;
pub(crate) mod link;

use std::process::ExitCode;

use clap::Subcommand;

/// What to measure.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Expert kernels: weight bandwidth and arithmetic by backend, format and rows, against the machine's reads
    Kernel(kernel::Options),
    /// The round trip of a call on loopback, against a bare QUIC echo and a bare TCP echo
    Link(link::Options),
    /// Decode and prefill speed of a private cluster of real processes
    Decode(decode::Options),
}

pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Kernel(options) => kernel::run(options),
        Command::Link(options) => link::run(options),
        Command::Decode(options) => decode::run(options),
    }
}
