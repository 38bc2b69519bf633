//! What commands print besides their result: logs, progress, and the one JSON object of `--json`.

use std::io::{IsTerminal, Write};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// Logs go to standard error: warnings and worse unless asked for more.
pub(crate) fn start_logging(verbose: u8) {
    let default = match verbose {
        // Of libp2p only what it says itself: a cable that is pulled is an error to it, every few seconds.
        0 => "warn,libp2p=off",
        1 => {
            "info,libp2p=off,mesh_discovery=debug,model=debug,router=debug,expert_node=debug,mesh_net=debug,moemesh=debug"
        }
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(default));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .init();
}

/// Prints one object as the last line of standard output.
pub(crate) fn json(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string(value)?);
    Ok(())
}

/// Writes text at once, as a story arrives.
pub(crate) fn stream_text(text: &str) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// A progress bar of bytes on standard error; a line per tenth when that is no terminal.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    tenth: u64,
}

impl Progress {
    pub(crate) fn new() -> Progress {
        let style = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        let bar = ProgressBar::no_length();
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        Progress { bar, tenth: 0 }
    }

    /// Shows `done` of `total` bytes of `what`.
    pub(crate) fn show(&mut self, done: u64, total: u64, what: &str) {
        self.bar.set_length(total);
        self.bar.set_message(what.to_owned());
        self.bar.set_position(done);
        let tenth = (done * 10).checked_div(total).unwrap_or(10);
        if self.bar.is_hidden() && tenth > self.tenth {
            eprintln!("{what}: {} % of {} MB", tenth * 10, total / 1_000_000);
        }
        self.tenth = tenth;
    }

    pub(crate) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Bytes for people.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let (mut value, mut unit) = (count as f64, 0);
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        (value, unit) = (value / 1000.0, unit + 1);
    }
    if unit == 0 { format!("{count} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

/// Milliseconds, for JSON.
pub(crate) fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
