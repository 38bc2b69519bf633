//! `moemesh version`: what this program is and what this machine can do.

use std::process::ExitCode;

use clap::Args;
use model::kernel::native::Isa;
use serde_json::json;

use crate::output;

/// Options of `moemesh version`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let isas: Vec<&str> = Isa::available_here().map(Isa::name).collect();
    let version = env!("CARGO_PKG_VERSION");
    let wire = mesh_wire::frame::ALPN;
    if options.json {
        output::json(&json!({
            "version": version,
            "wire": String::from_utf8_lossy(wire),
            "isa": isas,
            "libtorch": cfg!(feature = "torch"),
        }))?;
    } else {
        println!("moemesh {version}");
        println!("wire       {}", String::from_utf8_lossy(wire));
        println!("kernels    {}", isas.join(", "));
        println!("libtorch   {}", if cfg!(feature = "torch") { "2.11" } else { "not in this build" });
    }
    Ok(ExitCode::SUCCESS)
}
