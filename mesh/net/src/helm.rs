//! Who drives the network: one runtime, one seat, two threads that take turns.
//!
//! A call used to cross threads four times: compute thread to network thread and back, on either side of the link.
//! Each crossing is two futex or eventfd calls and a wake-up, together more than the QUIC under it. But the compute
//! thread has nothing to do while it waits. So it may take the helm: it drives the runtime itself (`steer`), reads
//! the reply on its own stack and goes on. Between two turns nobody drives for a moment. The network thread, which
//! `keep`s the helm otherwise, takes over when that lasts `GRACE`, or at once when it is told that a long stretch of
//! computing begins (`release`). Timers, joins and losses are late by at most that.
//!
//! Computing never happens inside the runtime: a guest leaves it, computes, and comes back. What keeps that safe is
//! that the seat, not tokio's own rule for several `block_on`s, decides who drives: one lock, one holder, and the
//! network thread leaves as soon as a guest asks. A second guest is refused and waits the ordinary way.
//!
//! Where cores are idle, a guest may look for packets without sleeping for a while (`spin`): that saves the wake-up
//! of its core and costs the core. The price of all this: an acknowledgement or a control message may be handled up
//! to `GRACE` late while a guest computes. Refuses to be driven from within a runtime.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, EnterGuard, Handle, Runtime};

/// How long nobody may drive. Shorter than what makes a peer repeat a packet (a round trip, 1 ms of variance and the
/// 2 ms that an acknowledgement may take), and longer than what a router or node computes between two calls of a
/// decode step, so that the helm does not change hands within a step.
const GRACE: Duration = Duration::from_millis(2);

/// Most that a thread which computes puts on the wire itself, calls of a router as replies of a node: 16 int8 rows of a
/// model 4096 wide, or 16 i16 rows of one 2560 wide. More needs several round trips, and encrypting it keeps the thread
/// from computing for longer than waking the network thread takes.
pub const SEND_HERE_BYTES_MAX: usize = 80 << 10;

/// See the module.
pub struct Helm {
    /// Locked by whoever has the seat, so never waited for.
    runtime: Mutex<Option<Runtime>>,
    handle: Handle,
    seat: Arc<Seat>,
    spin: Duration,
    /// Whether the network thread has a core beside the one that this process computes a short call on.
    spare: bool,
}

impl std::fmt::Debug for Helm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Helm({:?})", self.seat.state().who)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Who {
    Nobody,
    Network,
    Guest,
}

struct Seat {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    who: Who,
    /// Guests that wait for the network thread to leave.
    wanted: u32,
    /// When the last one left.
    left: Instant,
    /// The network thread is to take over without waiting for `GRACE`.
    release: bool,
    /// Guests that had a turn.
    turn: u64,
    /// The network thread sleeps until it is told that the guest has left.
    dozing: bool,
    /// What `keep` was for has ended.
    over: bool,
    /// Makes whoever drives look at this again.
    driver: Option<Waker>,
}

impl Seat {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_for<'a>(&self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        self.changed.wait_timeout(state, time).unwrap_or_else(PoisonError::into_inner).0
    }
}

impl State {
    fn remember(&mut self, waker: &Waker) {
        if !self.driver.as_ref().is_some_and(|known| known.will_wake(waker)) {
            self.driver = Some(waker.clone());
        }
    }

    fn wake_driver(&self) {
        self.driver.iter().for_each(Waker::wake_by_ref);
    }
}

/// A guest's turn; ends when dropped, also by a panic.
struct Turn<'a>(&'a Seat);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.who = Who::Nobody;
        state.left = Instant::now();
        state.turn = state.turn.wrapping_add(1);
        if state.dozing || state.over || state.release {
            state.dozing = false;
            drop(state);
            self.0.changed.notify_all();
        }
    }
}

/// Says that what `keep` was for has ended, however it did.
struct Over(Arc<Seat>);

impl Drop for Over {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.over = true;
        state.wake_driver();
        drop(state);
        self.0.changed.notify_all();
    }
}

impl Helm {
    /// A runtime that nobody drives yet. `spin` is how long a guest looks before it sleeps: zero where threads
    /// share cores.
    ///
    /// # Errors
    /// The system has no more file descriptors.
    pub fn new(spin: Duration) -> std::io::Result<Helm> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let state = State {
            who: Who::Nobody,
            wanted: 0,
            left: Instant::now(),
            release: true,
            turn: 0,
            dozing: false,
            over: false,
            driver: None,
        };
        let seat = Arc::new(Seat { state: Mutex::new(state), changed: Condvar::new() });
        let spare = std::thread::available_parallelism().is_ok_and(|cores| cores.get() > 1);
        Ok(Helm { handle: runtime.handle().clone(), runtime: Mutex::new(Some(runtime)), seat, spin, spare })
    }

    /// Makes this thread one that may create sockets.
    pub(crate) fn enter(&self) -> EnterGuard<'_> {
        self.handle.enter()
    }

    /// Drives whenever no guest does, until `main` has ended; then nobody drives any more, and everything that
    /// still ran is dropped. For the network thread.
    pub(crate) fn keep<T: Send + 'static>(&self, main: impl Future<Output = T> + Send + 'static) -> T {
        let over = Over(Arc::clone(&self.seat));
        let mut main = self.handle.spawn(async move {
            let _over = over;
            main.await
        });
        let ended = loop {
            self.sit_down();
            let ended = match &*self.runtime() {
                Some(runtime) => runtime.block_on(poll_fn(|cx| {
                    if let Poll::Ready(ended) = Pin::new(&mut main).poll(cx) {
                        return Poll::Ready(Some(ended));
                    }
                    let mut state = self.seat.state();
                    state.remember(cx.waker());
                    if state.wanted > 0 { Poll::Ready(None) } else { Poll::Pending }
                })),
                None => None,
            };
            if let Some(ended) = ended {
                // The seat stays taken: nobody drives what is being taken apart.
                let runtime = self.runtime().take();
                if let Some(runtime) = runtime {
                    runtime.shutdown_background();
                }
                self.stand_up();
                break ended;
            }
            self.stand_up();
        };
        match ended {
            Ok(ended) => ended,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(error) => std::panic::panic_any(error.to_string()),
            },
        }
    }

    fn runtime(&self) -> MutexGuard<'_, Option<Runtime>> {
        self.runtime.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the network thread has to drive.
    fn sit_down(&self) {
        let mut state = self.seat.state();
        let mut seen = None;
        loop {
            match state.who {
                Who::Guest if seen == Some(state.turn) => {
                    // The same guest as a while ago: it waits for something that may take long, and will say when.
                    state.dozing = true;
                    state = self.seat.wait(state);
                }
                Who::Guest => {
                    seen = Some(state.turn);
                    state = self.seat.wait_for(state, GRACE);
                }
                Who::Nobody | Who::Network => {
                    let left = (state.left + GRACE).saturating_duration_since(Instant::now());
                    if state.over || (state.wanted == 0 && (state.release || left.is_zero())) {
                        state.who = Who::Network;
                        state.release = false;
                        return;
                    }
                    state = self.seat.wait_for(state, left.max(GRACE / 4));
                }
            }
        }
    }

    fn stand_up(&self) {
        let mut state = self.seat.state();
        state.who = Who::Nobody;
        state.left = Instant::now();
        drop(state);
        self.seat.changed.notify_all();
    }

    /// The seat for a guest; `None` where another has it, where all is over, or within a runtime. `insist` says
    /// whether the network thread is to make room.
    fn take_turn(&self, insist: bool) -> Option<Turn<'_>> {
        if Handle::try_current().is_ok() {
            return None;
        }
        let mut state = self.seat.state();
        while !state.over {
            match state.who {
                Who::Nobody => {
                    state.who = Who::Guest;
                    state.release = false;
                    return Some(Turn(&self.seat));
                }
                Who::Network if !insist => return None,
                Who::Network => {
                    state.wanted += 1;
                    state.wake_driver();
                    state = self.seat.wait(state);
                    state.wanted -= 1;
                }
                Who::Guest => {
                    // Two who wait: the network thread serves both when the other is through.
                    state.release = true;
                    return None;
                }
            }
        }
        None
    }

    /// Drives until `future` is ready. `None` where this thread cannot drive (see the module) or may no longer: the
    /// caller then waits the ordinary way, and somebody else drives.
    pub fn steer<F: Future>(&self, future: F) -> Option<F::Output> {
        let _turn = self.take_turn(true)?;
        let runtime = self.runtime();
        let looks_until = (!self.spin.is_zero()).then(|| Instant::now() + self.spin);
        let mut future = pin!(future);
        runtime.as_ref()?.block_on(poll_fn(|cx| {
            if let Poll::Ready(out) = future.as_mut().poll(cx) {
                return Poll::Ready(Some(out));
            }
            let mut state = self.seat.state();
            state.remember(cx.waker());
            if state.over {
                return Poll::Ready(None);
            }
            drop(state);
            if looks_until.is_some_and(|until| Instant::now() < until) {
                // Polled again after a look at the sockets that does not sleep. Whoever else wants this core comes
                // first: it may be the one who is to answer.
                std::thread::yield_now();
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        }))
    }

    /// Does `work`, which wakes tasks of this runtime, and lets them run until they wait for the network: what is to
    /// be sent has left when it returns. Where this thread cannot drive, or the network thread drives on a core of its
    /// own, that one sends it.
    pub fn now<T>(&self, work: impl FnOnce() -> T) -> T {
        let turn = self.take_turn(!self.spare);
        let runtime = turn.as_ref().map(|_| self.runtime());
        match runtime.as_ref().and_then(|runtime| runtime.as_ref()) {
            Some(runtime) => runtime.block_on(async {
                let out = work();
                let mut ran = false;
                // Woken by itself, so it is polled again once every task that was ready has run.
                poll_fn(|cx| match std::mem::replace(&mut ran, true) {
                    true => Poll::Ready(()),
                    false => {
                        cx.waker().wake_by_ref();
                        Poll::Pending
                    }
                })
                .await;
                out
            }),
            None => {
                drop((runtime, turn));
                let out = {
                    let _entered = self.enter();
                    work()
                };
                self.release();
                out
            }
        }
    }

    /// Has the network thread take over now: this thread is about to do something long.
    pub fn release(&self) {
        let mut state = self.seat.state();
        if state.who != Who::Network && !state.release {
            state.release = true;
            let tell = state.who == Who::Nobody;
            drop(state);
            if tell {
                self.seat.changed.notify_all();
            }
        }
    }
}

impl Drop for Helm {
    fn drop(&mut self) {
        // Waits for nothing, so it may happen anywhere.
        let runtime = self.runtime().take();
        if let Some(runtime) = runtime {
            runtime.shutdown_background();
        }
    }
}
