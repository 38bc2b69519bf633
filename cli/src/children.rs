//! Processes of a private cluster: started with their standard input held open, so that they end when this
//! process does, however it does; their first lines of standard output say where they listen.

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

/// Flag that makes `router` and `node` stop when their standard input ends.
pub(crate) const STOP_WITH_PARENT: &str = "--stop-with-parent";

/// A child of this process.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    /// Closing it tells the child to stop.
    stdin: Option<ChildStdin>,
    lines: BufReader<ChildStdout>,
}

impl Process {
    /// Starts this very binary with `arguments`. `cores` pins it there.
    pub(crate) fn start(name: &str, arguments: &[String], cores: Option<&str>) -> anyhow::Result<Process> {
        let binary = std::env::current_exe().context("find the moemesh binary")?;
        let mut command = match cores {
            None => Command::new(binary),
            Some(cores) => {
                let mut command = Command::new("taskset");
                command.arg("-c").arg(cores).arg(binary);
                command
            }
        };
        command.args(arguments).arg(STOP_WITH_PARENT).stdin(Stdio::piped()).stdout(Stdio::piped());
        // A group of its own: Ctrl-C reaches this process, which then stops its children in order.
        command.process_group(0);
        let mut child = command.spawn().with_context(|| format!("start {name}"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("the child has no standard output")?;
        Ok(Process { name: name.to_owned(), child, stdin, lines: BufReader::new(stdout) })
    }

    /// Process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it is called.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Name and process id.
    pub(crate) fn describe(&self) -> String {
        format!("{} (pid {})", self.name, self.id())
    }

    /// Reads JSON lines until one has this key; that line.
    pub(crate) fn wait_for(&mut self, key: &str) -> anyhow::Result<Value> {
        let mut line = String::new();
        loop {
            line.clear();
            if self.lines.read_line(&mut line).with_context(|| format!("read from {}", self.name))? == 0 {
                let status = self.child.wait()?;
                bail!("{} ended before it was ready ({status}); its messages are above", self.name);
            }
            if let Ok(value) = serde_json::from_str::<Value>(&line)
                && value.get(key).is_some()
            {
                return Ok(value);
            }
        }
    }

    /// Asks it to stop and waits until it has.
    pub(crate) fn stop(&mut self) -> anyhow::Result<()> {
        drop(self.stdin.take());
        self.child.wait().with_context(|| format!("wait for {}", self.name))?;
        Ok(())
    }

    /// Resident memory in bytes, read from the system; `None` where it does not say.
    pub(crate) fn resident_bytes(&self) -> Option<u64> {
        self.memory("VmRSS:")
    }

    /// The part of it that is no file.
    pub(crate) fn anonymous_bytes(&self) -> Option<u64> {
        self.memory("RssAnon:")
    }

    fn memory(&self, key: &str) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).ok()?;
        let line = status.lines().find(|line| line.starts_with(key))?;
        let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
        Some(kilobytes * 1024)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.stdin.take());
        // It may have ended already; either way it is reaped here.
        self.child.wait().ok();
    }
}
