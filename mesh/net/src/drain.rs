//! How a node stops without anybody noticing: it says that it is leaving, serves what still comes, then goes.
//!
//! A node that is told to stop (`Stop::leave`) announces it and goes on serving, while other nodes load what only it
//! holds; the router says when they have, or that there is no room for it, and sends no new calls from then on
//! (`Stop::release`). Calls that are under way are still answered. When nothing has come for `QUIET`, it is over:
//! calls that come after all are refused, so that the router asks elsewhere, and the goodbye goes out behind the last
//! replies. The price: a rolling restart waits for what is handed over, and `QUIET`, per node. A router that does not let
//! go cannot hold a node for longer than `HANDED_OVER_MAX`, nor one that goes on sending for more than `LEAVING_MAX`
//! after that, and whoever says stop a second time waits for nothing.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use mesh_proto::changes::HANDOVER_MAX;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until, timeout_at};

/// Silence after which a leaving node goes. Longer than the router takes between two calls of a step, and than word of
/// the leaving takes to it over a bad Wi-Fi.
pub const QUIET: Duration = Duration::from_millis(300);

/// Longest wait for the router to let go: what it waits for others to load, and the way of the words.
pub const HANDED_OVER_MAX: Duration = HANDOVER_MAX.saturating_add(Duration::from_secs(5));

/// Longest time that a leaving node goes on serving after that: a prefill call on a slow board takes seconds.
pub const LEAVING_MAX: Duration = Duration::from_secs(10);

/// How far the end has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Running,
    Leaving,
    Over,
}

#[derive(Debug)]
struct Shared {
    level: watch::Sender<Level>,
    under_way: AtomicU32,
    /// Calls that came and calls that ended, together: it stands still while nothing happens.
    activity: AtomicU64,
    /// The router sends no more calls.
    released: watch::Sender<bool>,
    /// Calls are refused.
    closed: AtomicBool,
}

/// Ends a station from any thread, and knows what it still does.
#[derive(Clone, Debug)]
pub struct Stop {
    shared: Arc<Shared>,
}

impl Default for Stop {
    fn default() -> Stop {
        Stop::new()
    }
}

impl Stop {
    /// Not yet triggered.
    pub fn new() -> Stop {
        let shared = Shared {
            level: watch::Sender::new(Level::Running),
            under_way: AtomicU32::new(0),
            activity: AtomicU64::new(0),
            released: watch::Sender::new(false),
            closed: AtomicBool::new(false),
        };
        Stop { shared: Arc::new(shared) }
    }

    /// Ends it once the calls under way are served, or at once where that is happening already.
    pub fn leave(&self) {
        self.shared.level.send_modify(|level| {
            *level = if *level == Level::Running { Level::Leaving } else { Level::Over };
        });
    }

    /// Ends it at once.
    pub fn trigger(&self) {
        self.shared.level.send_replace(Level::Over);
    }

    /// Whether it is to end, now or when it is done.
    pub fn is_triggered(&self) -> bool {
        *self.shared.level.borrow() != Level::Running
    }

    /// Calls that wait, are computed or are being answered.
    pub fn calls_under_way(&self) -> u32 {
        self.shared.under_way.load(Ordering::Relaxed)
    }

    /// Until it is to end, now or when it is done.
    pub(crate) async fn wait(&self) {
        self.reached(Level::Leaving).await;
    }

    async fn reached(&self, wanted: Level) {
        let mut changes = self.shared.level.subscribe();
        // The sender lives in `self`, so this ends with the level only.
        drop(changes.wait_for(|level| *level >= wanted).await.map(|_| ()));
    }

    /// Counts a call; `None` where none is taken any more.
    pub(crate) fn begin(&self) -> Option<UnderWay> {
        self.shared.under_way.fetch_add(1, Ordering::SeqCst);
        self.shared.activity.fetch_add(1, Ordering::SeqCst);
        let counted = UnderWay(Arc::clone(&self.shared));
        // After it was counted: either this sees that no more are taken, or `drained` sees the call.
        (!self.shared.closed.load(Ordering::SeqCst)).then_some(counted)
    }

    /// The router has let go of this node.
    pub(crate) fn release(&self) {
        self.shared.released.send_replace(true);
    }

    /// After `wait`: until the router has let go, or it is to end at once; for `HANDED_OVER_MAX` at most.
    pub(crate) async fn handed_over(&self) {
        let mut released = self.shared.released.subscribe();
        let latest = Instant::now() + HANDED_OVER_MAX;
        tokio::select! {
            // The sender lives in `self`, so this ends with the word only.
            _ = released.wait_for(|released| *released) => {}
            () = self.reached(Level::Over) => {}
            () = sleep_until(latest) => {}
        }
    }

    /// After `handed_over`: until nothing has happened for `QUIET`, at most until `deadline`; no call is taken from then on.
    pub(crate) async fn drained(&self, deadline: Instant) {
        let over = self.reached(Level::Over);
        tokio::pin!(over);
        loop {
            let before = self.shared.activity.load(Ordering::SeqCst);
            let until = deadline.min(Instant::now() + QUIET);
            let stopped = timeout_at(until, &mut over).await.is_ok();
            let idle = self.calls_under_way() == 0 && self.shared.activity.load(Ordering::SeqCst) == before;
            if idle || stopped || Instant::now() >= deadline {
                break;
            }
        }
        self.close();
    }

    /// No call is taken from now on.
    pub(crate) fn close(&self) {
        self.shared.closed.store(true, Ordering::SeqCst);
    }

    /// Until a session must be over, whatever its peer does: `grace` after the end was wanted at once, or after the
    /// latest end of leaving.
    pub(crate) async fn out_of_time(&self, grace: Duration) {
        self.wait().await;
        let latest = Instant::now() + HANDED_OVER_MAX + LEAVING_MAX;
        drop(timeout_at(latest, self.reached(Level::Over)).await);
        sleep_until(Instant::now() + grace).await;
    }
}

/// A call under way, while it lives.
#[derive(Debug)]
pub(crate) struct UnderWay(Arc<Shared>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.activity.fetch_add(1, Ordering::SeqCst);
        self.0.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests;
