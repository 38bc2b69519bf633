//! `moemesh bench link`: the round trip of a call against bare echoes.

use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use mesh_net::bench_link::{Percentiles, bench_link};
use serde_json::json;

use crate::output;

/// Options of `moemesh bench link`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// Exchanges of each kind
    #[arg(long, default_value_t = 4000)]
    calls: usize,
    /// Microseconds to watch for a reply before sleeping (for machines with cores to spare)
    #[arg(long, default_value_t = 0)]
    spin_us: u64,
    /// Print one JSON object as the last line
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let result = bench_link(options.calls, Duration::from_micros(options.spin_us))?;
    let print = |name: &str, times: Percentiles| {
        println!("{name:<32} p50 {:>7.1} us   p99 {:>8.1} us", times.p50_us, times.p99_us);
    };
    println!("2.3 KB out, 4 KB back, loopback, {} exchanges each", result.calls);
    print("call, forward thread to worker", result.call);
    print("the same frames over TCP", result.tcp_call);
    print("bare quinn echo", result.quinn_echo);
    print("bare TCP echo", result.tcp_echo);
    let over = |base: Percentiles| result.call.p50_us / base.p50_us;
    let [quinn, tcp, tcp_call] = [result.quinn_echo, result.tcp_echo, result.tcp_call].map(over);
    println!("a call takes {quinn:.2} quinn echoes, {tcp:.2} TCP echoes, {tcp_call:.2} times the TCP lane");
    if options.json {
        output::json(&json!({
            "calls": result.calls,
            "call_us_p50": result.call.p50_us,
            "call_us_p99": result.call.p99_us,
            "tcp_call_us_p50": result.tcp_call.p50_us,
            "tcp_call_us_p99": result.tcp_call.p99_us,
            "quinn_echo_us_p50": result.quinn_echo.p50_us,
            "quinn_echo_us_p99": result.quinn_echo.p99_us,
            "tcp_echo_us_p50": result.tcp_echo.p50_us,
            "tcp_echo_us_p99": result.tcp_echo.p99_us,
            "call_over_quinn_echo": quinn,
            "call_over_tcp_echo": tcp,
            "call_over_tcp_call": tcp_call,
        }))?;
    }
    Ok(ExitCode::SUCCESS)
}
