//! Who comes to the router: connections from their first packet to their end.
//!
//! A peer shakes hands, and by what it offered it came to join, for weights, or to be a node. A node introduces itself
//! and takes its seat, unless another process with its key is there and alive; then its session runs until either side
//! ends it.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use mesh_proto::cluster::Event;
use mesh_wire::control::Goodbye;
use mesh_wire::message::Message;
use quinn::{Connection, Incoming};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use super::{Command, Shared};
use crate::endpoint::{Close, Listener, has_left, peer_key, wants_to_join, wants_weights};
use crate::join;
use crate::lender::Lender;
use crate::link::{GOODBYE_WITHIN, Link, Outgoing, Session, introduce};
use crate::seats::{Greeters, Greeting, Seat};
use crate::tally::Feed;

/// How often the cluster's logic is told that time passed.
const TICK: Duration = Duration::from_millis(100);

/// Time a peer has to complete the handshake; on a LAN it takes three milliseconds.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(3);

/// The task that everything else of the hub hangs on.
pub(super) struct Server {
    pub(super) shared: Arc<Shared>,
    pub(super) listener: Listener,
    pub(super) lender: Option<Arc<Lender>>,
    pub(super) sessions: JoinSet<()>,
}

impl Server {
    pub(super) async fn serve(
        mut self,
        mut inbox: mpsc::Receiver<Command>,
        mut stop: watch::Receiver<Option<String>>,
    ) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let greeters = Arc::new(Greeters::default());
        let reason = loop {
            tokio::select! {
                reason = stop.wait_for(Option::is_some) => {
                    break reason.ok().and_then(|reason| reason.clone()).unwrap_or_default();
                }
                Some(command) = inbox.recv() => match command {
                    Command::Feed(event) => self.shared.feed(event),
                    Command::Roster => self.shared.follow_roster(),
                },
                _ = ticks.tick() => {
                    self.shared.feed(Event::Tick);
                    self.shared.sum_up(Instant::now());
                }
                incoming = self.listener.endpoint.accept() => match incoming {
                    Some(incoming) => self.greet(incoming, &greeters),
                    None => break String::new(),
                },
                Some(_) = self.sessions.join_next() => {}
            }
        };
        self.close(reason).await;
    }

    /// Starts a session with a new peer, or puts it off where too many come at once.
    fn greet(&mut self, incoming: Incoming, greeters: &Arc<Greeters>) {
        let Some((incoming, greeting)) = greeters.let_in(incoming) else {
            self.shared.deferred.fetch_add(1, Ordering::Relaxed);
            return;
        };
        let (shared, listener) = (Arc::clone(&self.shared), self.listener.clone());
        let visit = visit(shared, (listener, self.lender.clone()), incoming, greeting);
        self.sessions.spawn(visit);
    }

    /// Tells every node, waits a moment for it to arrive, and closes the endpoint.
    async fn close(mut self, reason: String) {
        self.listener.endpoint.set_server_config(None);
        self.shared.closing.store(true, Ordering::Relaxed);
        for seat in self.shared.seats.all().iter() {
            let Some(link) = seat.link().clone() else { continue };
            match Message::Goodbye(Goodbye { reason: reason.clone() }).encode(&self.shared.pool) {
                Ok(frame) => link.tell(Outgoing::Last(frame)),
                Err(_) => link.close(Close::Goodbye, &reason),
            }
        }
        let all = async { while self.sessions.join_next().await.is_some() {} };
        // Sessions that are still shaking hands do not end by themselves.
        drop(timeout(GOODBYE_WITHIN, all).await);
        self.listener.endpoint.close(Close::Goodbye.into(), reason.as_bytes());
        drop(timeout(GOODBYE_WITHIN, self.listener.endpoint.wait_idle()).await);
        self.sessions.shutdown().await;
        // Whoever still holds a `PendingCall` learns that its node is gone.
        self.shared.seats.all().iter().for_each(|seat| drop(seat.link().take()));
    }
}

/// One connection, from its first packet to its end.
async fn visit(
    shared: Arc<Shared>,
    (listener, lender): (Listener, Option<Arc<Lender>>),
    incoming: Incoming,
    greeting: Greeting,
) {
    let address = incoming.remote_address();
    let shaken = timeout(HANDSHAKE_WITHIN, listener.accept(incoming)).await;
    let connection = match shaken.unwrap_or_else(|_| Err("the handshake took too long".to_owned())) {
        Ok(connection) => connection,
        Err(error) => {
            shared.handshakes_failed.fetch_add(1, Ordering::Relaxed);
            if shared.strangers[0].admits(Instant::now()) {
                tracing::warn!(%address, error, "a peer did not get in");
            } else {
                tracing::debug!(%address, error, "a peer did not get in");
            }
            return;
        }
    };
    if wants_to_join(&connection) {
        drop(greeting);
        return admit(&shared, &connection).await;
    }
    if wants_weights(&connection) {
        drop(greeting);
        return match lender {
            Some(lender) => lender.serve(connection).await,
            None => connection.close(Close::Unwanted.into(), b"this router lends no weights"),
        };
    }
    session(shared, connection, greeting).await;
}

/// One node's connection, from its hello to its end.
async fn session(shared: Arc<Shared>, connection: Connection, greeting: Greeting) {
    let address = connection.remote_address();
    let Some((node, seat)) = peer_key(&connection).and_then(|key| shared.seats.of(key)) else {
        // It was shut out since its handshake.
        connection.close(Close::Revoked.into(), b"the operator revoked this machine's key");
        return;
    };
    let Ok(introducing) = seat.introductions.try_acquire() else {
        shared.deferred.fetch_add(1, Ordering::Relaxed);
        connection
            .close(Close::Busy.into(), b"this machine has connections that do not introduce themselves");
        return;
    };
    let introduction = match introduce(&connection, &shared.pool).await {
        Ok(introduction) => introduction,
        Err(reason) => {
            if !has_left(&connection) && shared.strangers[2].admits(Instant::now()) {
                tracing::warn!(node = seat.machine.name, %address, reason, "a node did not introduce itself");
            }
            connection.close(Close::Protocol.into(), reason.as_bytes());
            return;
        }
    };
    let hello = introduction.hello.clone();
    let feed: Arc<dyn Feed> = Arc::clone(&shared) as Arc<dyn Feed>;
    let tools = (shared.pool.clone(), Arc::clone(&seat.tally), feed);
    let (mut session, link) = Session::new(connection, introduction, node, tools);
    session.probes = shared.probe_links;
    if !take_seat(&shared, &seat, &link).await {
        return;
    }
    drop((greeting, introducing));
    shared.connections.fetch_add(1, Ordering::Relaxed);
    seat.tally.update(|counters| counters.connections += 1);
    tracing::info!(node = seat.machine.name, %address, "a node joined");
    shared.show_roster(&link);
    shared.feed(Event::Joined(node, hello));
    let parting = session.run(Arc::clone(&link)).await;
    let present = {
        let mut current = seat.link();
        let present = current.as_ref().is_some_and(|current| Arc::ptr_eq(current, &link));
        current.take_if(|_| present);
        present
    };
    if present {
        let name = &seat.machine.name;
        match parting {
            Err(reason) if !shared.closing.load(Ordering::Relaxed) => {
                tracing::warn!(node = name, reason, "a node is gone");
            }
            Ok(reason) | Err(reason) => tracing::info!(node = name, reason, "a node left"),
        }
        shared.feed(Event::Lost(node));
    }
}

/// Serves a stranger who wants to join, if there is room.
async fn admit(shared: &Shared, connection: &Connection) {
    let now = tokio::time::Instant::now();
    let place = shared.doorway.lock().unwrap_or_else(PoisonError::into_inner).enter(now);
    let Some(_place) = place else {
        shared.deferred.fetch_add(1, Ordering::Relaxed);
        connection.close(Close::Busy.into(), b"too many machines join at once; try again");
        return;
    };
    if join::serve(connection, &shared.authority, &shared.strangers[1]).await.is_some() {
        shared.joined.fetch_add(1, Ordering::Relaxed);
        shared.follow_roster();
    } else {
        shared.joins_refused.fetch_add(1, Ordering::Relaxed);
    }
}

/// Makes this the node's live connection, unless its key belongs to a machine that is here and alive. A process that
/// was killed and started again does not answer on its old connection; a second machine with a copied key finds the
/// first one answering.
async fn take_seat(shared: &Shared, seat: &Seat, link: &Arc<Link>) -> bool {
    let _first = seat.arrival.lock().await;
    let old = seat.link().clone();
    if let Some(old) = old
        && old.instance != link.instance
        && old.is_alive(&shared.pool).await
    {
        refuse_clone(shared, seat, &old, link);
        return false;
    }
    match seat.sit(link) {
        Ok(replaced) => {
            seat.note().clear();
            if let Some(old) = replaced {
                tracing::warn!(node = seat.machine.name, "a new connection replaces the node's old one");
                old.close(Close::Replaced, "a newer connection with the same key took its place");
            }
            true
        }
        Err(()) => {
            link.close(Close::Revoked, "the operator revoked this machine's key");
            false
        }
    }
}

fn refuse_clone(shared: &Shared, seat: &Seat, old: &Link, link: &Link) {
    shared.clones.fetch_add(1, Ordering::Relaxed);
    let (here, there) = (old.connection.remote_address(), link.connection.remote_address());
    let remedy = "a copied key file or SD card? Delete the state folder on one of them and join it again";
    link.close(
        Close::Cloned,
        &format!("this machine's key is in use by another machine at {here}: {remedy}"),
    );
    let note = format!("another machine at {there} uses this node's key: {remedy}");
    // Said once while the other one keeps trying.
    if seat.note().is_empty() {
        tracing::error!(node = seat.machine.name, "{note}");
    }
    *seat.note() = note;
}
