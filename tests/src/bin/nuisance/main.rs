//! A peer that wears others out: it opens, begins and floods what it never ends.
//!
//! Honest ends of QUIC and libp2p cannot be made to break their protocols, so this one bends what they send (`tamper`) or
//! speaks the protocol by hand (`peer`). It shows the key of the machine whose state folder it is given, or one
//! of its own (`--stranger`), does one thing for some seconds, and prints what it met as one line of JSON. Whether the
//! others survived is for the lab to judge (`tests/lab/nuisance.py`). It is for tests; no release contains it.
#![allow(clippy::print_stdout, reason = "a program for tests")]

mod fuzz;
mod initials;
mod slow;

mod dial;
mod peer;
mod tamper;

mod dice;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

const USAGE: &str = "nuisance slow|initials|peer|fuzz --state FOLDER --to ADDRESS [--of FOLDER-OF-THAT-NODE] [--stranger] \
                     [--protocol mesh|join|weights] [--act WHAT] [--seconds N] [--places N] [--rate N] [--seed N] \
                     [--corpus FOLDER]";

/// What to do, and to whom.
#[derive(Clone, Debug)]
struct Options {
    state: PathBuf,
    to: SocketAddr,
    of: Option<PathBuf>,
    stranger: bool,
    protocol: dial::Protocol,
    act: String,
    seconds: Duration,
    places: usize,
    rate: u32,
    seed: u64,
    corpus: PathBuf,
}

fn options(mut arguments: impl Iterator<Item = String>) -> Option<Options> {
    let mut options = Options {
        state: PathBuf::new(),
        to: SocketAddr::from(([0; 4], 0)),
        of: None,
        stranger: false,
        protocol: dial::Protocol::Mesh,
        act: String::new(),
        seconds: Duration::from_secs(5),
        places: 1,
        rate: 100,
        seed: 1,
        corpus: PathBuf::new(),
    };
    while let Some(argument) = arguments.next() {
        if argument == "--stranger" {
            options.stranger = true;
            continue;
        }
        let value = arguments.next()?;
        match argument.as_str() {
            "--state" => options.state = value.into(),
            "--to" => options.to = value.parse().ok()?,
            "--of" => options.of = Some(value.into()),
            "--protocol" => options.protocol = dial::Protocol::parse(&value)?,
            "--act" => options.act = value,
            "--seconds" => options.seconds = Duration::from_secs(value.parse().ok()?),
            "--places" => options.places = value.parse().ok()?,
            "--rate" => options.rate = value.parse().ok().filter(|rate| *rate > 0)?,
            "--seed" => options.seed = value.parse().ok()?,
            "--corpus" => options.corpus = value.into(),
            _ => return None,
        }
    }
    Some(options)
}

fn main() -> Result<(), String> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().ok_or(USAGE)?;
    let options = options(arguments).ok_or(USAGE)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let told = runtime.block_on(async {
        match what.as_str() {
            "slow" => slow::run(&options).await,
            "initials" => initials::run(&options).await,
            "peer" => peer::run(&options).await,
            "fuzz" => fuzz::run(&options).await,
            _ => Err(USAGE.to_owned()),
        }
    })?;
    println!("{told}");
    Ok(())
}
