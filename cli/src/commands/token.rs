//! `moemesh token`: lets one more machine into the cluster of the router on this machine.

use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use router::admin::{self, Answer, Question};
use serde_json::json;

use crate::{output, state};

/// Options of `moemesh token`.
#[derive(Args, Debug)]
pub(crate) struct Options {
    /// How long the token is good for: 90s, 30m, 1h, 7d (at most 30d)
    #[arg(long, default_value = "1h", value_parser = parse_ttl)]
    ttl: Duration,
    /// State folder of the router [default: as `moemesh router` has it]
    #[arg(long, env = "MOEMESH_STATE")]
    state: Option<PathBuf>,
    /// Where the machine will find the router, host:port (may be repeated) [default: wherever the router listens]
    #[arg(long)]
    address: Vec<String>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(options: &Options) -> anyhow::Result<ExitCode> {
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in &options.address {
        let found = address.to_socket_addrs();
        addresses.extend(found.with_context(|| format!("find the address '{address}' (host:port)"))?);
    }
    let state = state::folder(options.state.clone(), "router")?;
    let question = Question::Token { ttl_s: options.ttl.as_secs(), addresses };
    let Answer::Token { token, expires_unix, addresses } = admin::ask(&state, &question)? else {
        bail!("the router answered something else; is it of this version?");
    };
    if options.json {
        output::json(&json!({"token": token, "expires_unix": expires_unix, "addresses": addresses}))?;
        return Ok(ExitCode::SUCCESS);
    }
    println!("{token}");
    if addresses.iter().all(|address| address.ip().is_loopback()) {
        eprintln!(
            "The router listens on this machine only; for other machines start it with --listen 0.0.0.0:8621."
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// A number and a unit; without one, seconds.
pub(crate) fn parse_ttl(text: &str) -> Result<Duration, String> {
    let wrong = || format!("'{text}' is no time; write 90s, 30m, 1h or 7d");
    let digits = text.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(wrong()),
    };
    let count: u64 = digits.parse().map_err(|_| wrong())?;
    count.checked_mul(unit).map(Duration::from_secs).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_units() {
        for (text, seconds) in [("5", 5), ("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604_800)] {
            assert_eq!(parse_ttl(text), Ok(Duration::from_secs(seconds)));
        }
        for text in ["", "h", "-1s", "1 h", "1w", "1.5h", "99999999999999999999", "9999999999999999999d"] {
            assert!(parse_ttl(text).unwrap_err().contains("30m"), "{text}");
        }
    }
}
