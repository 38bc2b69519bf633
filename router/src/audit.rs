//! Audits: a share of what nodes answer is computed again elsewhere and compared bit for bit.
//!
//! A node that answers nonsense is found by the shape of its frames. One that answers something plausible is not: its
//! sums are added and the text is another. Kernels of the exact class make it easy to find: whoever computes the same
//! rows with the same experts gets the same integers, so an answer that differs is wrong, and one that is right is never
//! suspected. Nodes whose kernels do not promise that are not audited.
//!
//! What the compute thread does for it: one draw per call (`draws`), after it was answered, and for those drawn a copy of
//! a few rows and their sums (`sample`) into a queue that is bounded in number and bytes. Where it is full the sample
//! is dropped and counted: serving never waits. A thread of its own looks at the samples one by one (`judge`), while
//! requests are being served for a tenth of its time at most. The price: at a share of 0.01 one call in a hundred is
//! computed twice, and the router reads experts that it otherwise would not. Refuses to take text back: what was sent
//! before a liar is found stays wrong, so whoever must not see wrong text at all has to compute everything twice.

mod peers;

pub mod judge;

pub mod sample;

pub mod draws;

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use mesh_net::hub::Hub;
use mesh_proto::routes::NodeIndex;
use model::kernel::KernelError;
use model::kernel::native::{Native, NativeConfig};
use model::open::Model;

use self::draws::{Draws, Share};
use self::judge::{Judge, Outcome};
use self::peers::Peers;
use self::sample::{Difference, Sample};

/// Rows of a call that are looked at: a token's all, of a prompt's some. A liar about one row of a hundred in prompts is
/// as likely to be found as one about one token of a hundred.
pub const ROWS_MAX: usize = 16;

/// Samples that may wait. A step of a large model makes a few hundred calls, and of those few are drawn.
const SAMPLES_MAX: usize = 256;

/// Bytes that they may take: sixteen rows of a model 7168 wide are about a megabyte with their sums.
const BYTES_MAX: usize = 32 << 20;

/// While requests are served, the auditing thread rests this many times as long as it worked: what it takes from the
/// threads that serve is at most a tenth of a core.
const REST: u32 = 9;

/// What is wanted of audits.
#[derive(Clone, Copy, Debug)]
pub struct AuditConfig {
    /// The share of calls that is looked at, 0 to 1.
    pub share: f64,
    /// What draws are made with. Whoever knows it knows which calls are looked at.
    pub secret: [u8; 32],
}

/// Why there are no audits.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The judge has nothing to compute with.
    #[error("the kernels of the audit: {0}")]
    Kernels(#[from] KernelError),
    /// No thread.
    #[error("the thread of the audit: {0}")]
    Thread(#[from] std::io::Error),
}

/// Audits of one node since the router started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AuditCounts {
    /// Its sums were right.
    pub right: u64,
    /// They were not.
    pub wrong: u64,
    /// Nobody could tell.
    pub unchecked: u64,
    /// There was no room for the sample.
    pub skipped: u64,
}

/// What came of audits so far, by node; readable from other threads.
#[derive(Clone, Debug, Default)]
pub struct AuditView(Arc<Mutex<Vec<AuditCounts>>>);

impl AuditView {
    /// By `NodeIndex`; those that were never audited may be missing at the end.
    pub fn read(&self) -> Vec<AuditCounts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn count(&self, node: NodeIndex, change: impl FnOnce(&mut AuditCounts)) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let index = usize::from(node);
        if all.len() <= index {
            all.resize(index + 1, AuditCounts::default());
        }
        change(&mut all[index]);
    }
}

#[derive(Debug, Default)]
struct Waiting {
    samples: VecDeque<Sample>,
    bytes: usize,
    closed: bool,
}

/// What compute thread and auditing thread share.
#[derive(Debug, Default)]
struct Ledger {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// Steps begun: whether requests are being served shows in whether this grows.
    steps: AtomicU64,
}

impl Ledger {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// False where there is no room.
    fn push(&self, sample: Sample) -> bool {
        let mut waiting = self.waiting();
        let bytes = waiting.bytes + sample.bytes();
        if waiting.closed || waiting.samples.len() == SAMPLES_MAX || bytes > BYTES_MAX {
            return false;
        }
        waiting.bytes = bytes;
        waiting.samples.push_back(sample);
        drop(waiting);
        self.changed.notify_one();
        true
    }

    /// The oldest sample; none once closed.
    fn next(&self) -> Option<Sample> {
        let waiting = self.waiting();
        let idle = |waiting: &mut Waiting| waiting.samples.is_empty() && !waiting.closed;
        let waiting = self.changed.wait_while(waiting, idle);
        let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner);
        if waiting.closed {
            return None;
        }
        let sample = waiting.samples.pop_front()?;
        waiting.bytes = waiting.bytes.saturating_sub(sample.bytes());
        Some(sample)
    }

    /// Lets so much time pass, unless it is closed.
    fn rest(&self, time: Duration) {
        let waiting = self.waiting();
        drop(self.changed.wait_timeout_while(waiting, time, |waiting| !waiting.closed));
    }

    fn close(&self) {
        let mut waiting = self.waiting();
        waiting.closed = true;
        waiting.samples.clear();
        drop(waiting);
        self.changed.notify_all();
    }
}

/// The compute thread's end. Dropping it ends the audits; samples that wait are forgotten.
#[derive(Debug)]
pub struct Audit {
    draws: Draws,
    share: Share,
    ledger: Arc<Ledger>,
    view: AuditView,
    /// Not joined: it may be waiting for a node, and holds nothing that others wait for.
    _thread: JoinHandle<()>,
}

impl Audit {
    /// Starts the auditing thread. It computes from `model`, whatever the router may compute for requests.
    ///
    /// # Errors
    /// `AuditError`: kernels or thread.
    pub fn start(config: AuditConfig, model: Arc<Model>, hub: Arc<Hub>) -> Result<Audit, AuditError> {
        let kernels = Arc::new(Native::new(NativeConfig::threads(1))?);
        let [drawn, judged] =
            [b"calls", b"judge"].map(|what| *blake3::keyed_hash(&config.secret, what).as_bytes());
        let mut judge = Judge::new(model, kernels, Draws::new(&judged));
        let (ledger, view) = (Arc::new(Ledger::default()), AuditView::default());
        let (samples, counts) = (Arc::clone(&ledger), view.clone());
        let thread = std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || look_at_all(&samples, &mut judge, &hub, &counts))?;
        Ok(Audit {
            draws: Draws::new(&drawn),
            share: Share::new(config.share),
            ledger,
            view,
            _thread: thread,
        })
    }

    /// What came of them, readable from other threads.
    pub fn view(&self) -> AuditView {
        self.view.clone()
    }

    /// A step begins.
    pub fn begin_step(&self) {
        self.ledger.steps.fetch_add(1, Ordering::Relaxed);
    }

    /// For a call with so many rows that was answered: which of them to keep, if any.
    pub fn draw(&mut self, rows: usize) -> Option<Vec<usize>> {
        self.draws.happens(self.share).then(|| self.draws.some(ROWS_MAX, rows))
    }

    /// Hands over what was kept. Never waits.
    pub fn keep(&self, sample: Sample) {
        let node = sample.node;
        if !self.ledger.push(sample) {
            self.view.count(node, |counts| counts.skipped += 1);
        }
    }
}

impl Drop for Audit {
    fn drop(&mut self) {
        self.ledger.close();
    }
}

/// The auditing thread.
fn look_at_all(ledger: &Ledger, judge: &mut Judge, hub: &Arc<Hub>, view: &AuditView) {
    let mut peers = Peers(Arc::clone(hub));
    while let Some(sample) = ledger.next() {
        let (before, steps) = (judge.worked(), ledger.steps.load(Ordering::Relaxed));
        for (node, outcome) in judge.check(&sample, &mut peers) {
            view.count(node, |counts| match &outcome {
                Outcome::Right => counts.right += 1,
                Outcome::Wrong(_) => counts.wrong += 1,
                Outcome::Unchecked(_) => counts.unchecked += 1,
            });
            match outcome {
                Outcome::Right => {}
                Outcome::Wrong(difference) => hub.convict(node, verdict(&sample, difference)),
                Outcome::Unchecked(why) => tracing::debug!(node, why, "an answer could not be audited"),
            }
        }
        if ledger.steps.load(Ordering::Relaxed) != steps {
            // Waiting for a node costs nobody anything.
            ledger.rest(judge.worked().saturating_sub(before).saturating_mul(REST));
        }
    }
}

/// What is said of a node that was wrong: where, by how much, and whom it may concern. Nothing of the text.
fn verdict(sample: &Sample, difference: Difference) -> String {
    let Difference { rows, sums, of_rows } = difference;
    format!(
        "computed wrongly in layer {} ({sums} sums in {rows} of {of_rows} rows audited are not the router's own); up to \
         {} requests that it took part in may have got wrong text, and what was sent cannot be taken back",
        sample.layer, sample.requests
    )
}

#[cfg(test)]
mod tests;
