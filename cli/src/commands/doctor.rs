//! `moemesh doctor`: says what is wrong, and what to do about it, one line per check.

mod net;

mod places;

use std::process::ExitCode;

use clap::Subcommand;
use serde::Serialize;

use crate::output;

/// What to look at.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Why this machine and the cluster's other machines do not see or trust each other
    Net(net::Options),
}

pub(crate) fn run(command: &Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Net(options) => net::run(options),
    }
}

/// What came of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Outcome {
    Pass,
    Fail,
    /// It could not be looked at, or is not needed.
    Unknown,
}

/// One line.
#[derive(Clone, Debug, Serialize)]
struct Check {
    name: &'static str,
    outcome: Outcome,
    /// What was seen.
    what: String,
    /// What to do; empty where nothing is to be done.
    #[serde(skip_serializing_if = "String::is_empty")]
    remedy: String,
}

/// All of them, in the order in which they were made.
#[derive(Clone, Debug, Default)]
struct Report {
    checks: Vec<Check>,
}

impl Report {
    fn add(
        &mut self,
        name: &'static str,
        outcome: Outcome,
        what: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        self.checks.push(Check { name, outcome, what: what.into(), remedy: remedy.into() });
    }

    fn pass(&mut self, name: &'static str, what: impl Into<String>) {
        self.add(name, Outcome::Pass, what, "");
    }

    fn fail(&mut self, name: &'static str, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(name, Outcome::Fail, what, remedy);
    }

    fn unknown(&mut self, name: &'static str, what: impl Into<String>, remedy: impl Into<String>) {
        self.add(name, Outcome::Unknown, what, remedy);
    }

    fn is_well(&self) -> bool {
        self.checks.iter().all(|check| check.outcome != Outcome::Fail)
    }

    /// Prints it; the status to end with: 1 where something fails.
    fn tell(&self, json: bool) -> anyhow::Result<ExitCode> {
        if json {
            output::json(&serde_json::json!({"well": self.is_well(), "checks": self.checks}))?;
        } else {
            for check in &self.checks {
                let mark = match check.outcome {
                    Outcome::Pass => "pass",
                    Outcome::Fail => "FAIL",
                    Outcome::Unknown => "  ? ",
                };
                println!("{mark}  {:<10} {}", check.name, check.what);
                if !check.remedy.is_empty() {
                    println!("      {:<10} -> {}", "", check.remedy);
                }
            }
        }
        Ok(if self.is_well() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}
