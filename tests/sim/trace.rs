//! Everything that happens in a run, as one hash and, if wanted, as lines to read.

use std::fmt;
use std::time::Duration;

/// FNV-1a over the lines.
#[derive(Debug)]
pub(crate) struct Trace {
    hash: u64,
    pub(crate) lines: u64,
    prints: bool,
}

struct Line<'a>(&'a mut u64);

impl fmt::Write for Line<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            *self.0 = (*self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        Ok(())
    }
}

impl Trace {
    pub(crate) fn new(prints: bool) -> Trace {
        Trace { hash: 0xcbf2_9ce4_8422_2325, lines: 0, prints }
    }

    pub(crate) fn note(&mut self, now: Duration, what: fmt::Arguments<'_>) {
        self.lines += 1;
        // Writing into a hash cannot fail.
        fmt::write(&mut Line(&mut self.hash), format_args!("{} {what}\n", now.as_nanos())).ok();
        if self.prints {
            eprintln!("{:>12.6} {what}", now.as_secs_f64());
        }
    }

    pub(crate) fn hash(&self) -> u64 {
        self.hash
    }
}
