//! The router's end of one node's connection: its control stream and its lanes.
//!
//! The node has proven its key before anything here runs. It opens the control stream and introduces itself; then
//! two loops live side by side, one reading what the node says, one writing what it is told, while one task per
//! lane carries calls. When any of the loops ends, for whatever reason, the connection is closed, and every
//! call that waits or is under way fails at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mesh_proto::cluster::Event;
use mesh_proto::routes::NodeIndex;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::control::Hello;
use mesh_wire::frame::{FrameError, Op};
use mesh_wire::message::Message;
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::endpoint::{Close, Parting, is_goodbye};
use crate::lane::{Lane, Queue, Worker};
use crate::probe::Prober;
use crate::stream::{ReadFrameError, read_frame, read_prompt_frame, write_frame};
use crate::tally::{Feed, Tally};

/// Time a connected node has to introduce itself.
const HELLO_WITHIN: Duration = Duration::from_secs(5);

/// Messages to a node that may wait to be written: a placement or two and a goodbye.
const OUTBOX_MESSAGES: usize = 8;

/// Time a goodbye has to arrive before the connection is closed regardless.
pub(crate) const GOODBYE_WITHIN: Duration = Duration::from_millis(200);

/// Time a node has to answer whether it is there: three round trips as they were estimated while it answered, within
/// these bounds. A LAN and a busy machine need a third of the lower one; a process that was killed and started again
/// waits for it once.
const ALIVE_WITHIN: (Duration, Duration) = (Duration::from_millis(100), Duration::from_millis(300));

/// `ALIVE_WITHIN` for a connection with this round trip.
fn alive_within(round_trip: Duration) -> Duration {
    round_trip.saturating_mul(3).clamp(ALIVE_WITHIN.0, ALIVE_WITHIN.1)
}

/// Reports closer together than this are dropped: a node reports every second.
const HEALTH_EVERY_MIN: Duration = Duration::from_millis(100);

/// What is to be written on the control stream.
#[derive(Debug)]
pub(crate) enum Outgoing {
    /// A message.
    Frame(Buffer),
    /// The last one: close when it has arrived.
    Last(Buffer),
}

/// A node's connection, as the rest of the router sees it.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) connection: Connection,
    /// Of the node's process.
    pub(crate) instance: u64,
    /// Number of the last ping that was answered.
    answered: watch::Sender<u64>,
    asked: AtomicU64,
    queues: [Arc<Queue>; 2],
    outbox: mpsc::Sender<Outgoing>,
}

impl Link {
    /// Where calls of this kind wait.
    pub(crate) fn queue(&self, lane: Lane) -> &Queue {
        &self.queues[lane.index()]
    }

    /// Says something to the node. A node that does not read what it is told is closed.
    pub(crate) fn tell(&self, message: Outgoing) {
        if self.outbox.try_send(message).is_err() {
            self.close(Close::Protocol, "control messages are not read");
        }
    }

    /// Whether the node answers, within `alive_within`.
    pub(crate) async fn is_alive(&self, pool: &Pool) -> bool {
        let asked = self.asked.fetch_add(1, Ordering::Relaxed) + 1;
        let Ok(frame) = Message::Ping(asked).encode(pool) else { return false };
        let within = alive_within(self.connection.rtt());
        let mut answers = self.answered.subscribe();
        self.tell(Outgoing::Frame(frame));
        let answer = answers.wait_for(|answered| *answered >= asked);
        tokio::select! {
            answered = timeout(within, answer) => answered.is_ok_and(|answered| answered.is_ok()),
            _ = self.connection.closed() => false,
        }
    }

    /// Closes the connection and fails every call, now.
    pub(crate) fn close(&self, close: Close, reason: &str) {
        self.connection.close(close.into(), reason.as_bytes());
        self.queues.iter().for_each(|queue| queue.close());
    }
}

/// Everything a connection needs to run.
pub(crate) struct Session {
    pub(crate) node: NodeIndex,
    pub(crate) pool: Pool,
    pub(crate) tally: Arc<Tally>,
    pub(crate) feed: Arc<dyn Feed>,
    /// Whether the link is measured (`probe`).
    pub(crate) probes: bool,
    control: (SendStream, RecvStream),
    outbox: mpsc::Receiver<Outgoing>,
}

/// What a node says first.
pub(crate) struct Introduction {
    pub(crate) hello: Hello,
    control: (SendStream, RecvStream),
}

/// Waits for a connected node to introduce itself. The error is for the log and for the node.
pub(crate) async fn introduce(connection: &Connection, pool: &Pool) -> Result<Introduction, String> {
    let hello = async {
        let (send, mut recv) = connection.accept_bi().await.map_err(|error| error.to_string())?;
        let frame = read_frame(&mut recv, pool, &[Op::Hello]).await.map_err(|error| error.to_string())?;
        let frame = frame.ok_or("the control stream ended")?;
        match Message::decode(&frame).map_err(|error| error.to_string())? {
            Message::Hello(hello) => Ok(Introduction { hello, control: (send, recv) }),
            _ => Err("the first message is not a hello".to_owned()),
        }
    };
    timeout(HELLO_WITHIN, hello).await.unwrap_or_else(|_| Err("no hello within 5 s".to_owned()))
}

impl Session {
    /// The two halves of a new connection: what runs it, and what the rest of the router holds.
    pub(crate) fn new(
        connection: Connection,
        introduction: Introduction,
        node: NodeIndex,
        (pool, tally, feed): (Pool, Arc<Tally>, Arc<dyn Feed>),
    ) -> (Session, Arc<Link>) {
        let (outbox, outgoing) = mpsc::channel(OUTBOX_MESSAGES);
        let link = Arc::new(Link {
            connection,
            instance: introduction.hello.instance,
            answered: watch::Sender::new(0),
            asked: AtomicU64::new(0),
            queues: Default::default(),
            outbox,
        });
        let control = introduction.control;
        (Session { node, pool, tally, feed, probes: true, control, outbox: outgoing }, link)
    }

    /// Runs until the connection ends.
    pub(crate) async fn run(mut self, link: Arc<Link>) -> Parting {
        let mut lanes = JoinSet::new();
        for lane in Lane::ALL {
            for _ in 0..lane.streams() {
                lanes.spawn(self.worker(&link, lane).run());
            }
        }
        if self.probes {
            lanes.spawn(self.prober(&link).run());
        }
        let (mut send, mut recv) = self.control;
        let (node, pool, feed) = (self.node, &self.pool, &*self.feed);
        let parting = tokio::select! {
            parting = listen(node, &mut recv, (pool, &link), feed) => parting,
            parting = speak(&mut send, &mut self.outbox) => parting,
            error = link.connection.closed() => Err(error.to_string()),
        };
        let in_order = link.connection.close_reason().as_ref().is_some_and(is_goodbye);
        let parting = parting.or_else(|reason| if in_order { Ok(reason) } else { Err(reason) });
        // Where the peer has closed already this changes nothing.
        match &parting {
            Ok(reason) => link.close(Close::Goodbye, reason),
            Err(reason) => link.close(Close::Broken, reason),
        }
        // Lanes notice by themselves; jobs they still hold fail when they end.
        while lanes.join_next().await.is_some() {}
        parting
    }

    fn prober(&self, link: &Link) -> Prober {
        Prober {
            node: self.node,
            connection: link.connection.clone(),
            tally: Arc::clone(&self.tally),
            pool: self.pool.clone(),
            feed: Arc::clone(&self.feed),
        }
    }

    fn worker(&self, link: &Link, lane: Lane) -> Worker {
        Worker {
            node: self.node,
            lane,
            connection: link.connection.clone(),
            queue: Arc::clone(&link.queues[lane.index()]),
            tally: Arc::clone(&self.tally),
            pool: self.pool.clone(),
            feed: Arc::clone(&self.feed),
            stale: 0,
        }
    }
}

/// What a node may say on its control stream after its hello.
const HEARD: [Op; 6] = [Op::Placed, Op::Health, Op::Loading, Op::Pong, Op::Leaving, Op::Goodbye];

/// Reads what the node says until there is no more. What no correct node says is told to the cluster's logic.
async fn listen(
    node: NodeIndex,
    recv: &mut RecvStream,
    (pool, link): (&Pool, &Link),
    feed: &dyn Feed,
) -> Parting {
    let (mut last_health, mut last_loading) = (None, None);
    let mut leaving = false;
    loop {
        let frame = match read_prompt_frame(recv, pool, &HEARD).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return Err("it closed its control stream".to_owned()),
            Err(error) => {
                if matches!(&error, ReadFrameError::Frame(error) if !matches!(error, FrameError::PoolExhausted(_)))
                {
                    feed.feed(Event::Malformed(node));
                }
                return Err(format!("its control stream broke: {error}"));
            }
        };
        match Message::decode(&frame) {
            Ok(Message::Placed(placed)) => feed.feed(Event::Placed(node, placed)),
            Ok(Message::Loading(loading)) if is_due(&mut last_loading) => {
                feed.feed(Event::Loading(node, loading));
            }
            Ok(Message::Health(health)) if is_due(&mut last_health) => {
                feed.feed(Event::Health(node, health));
            }
            // Sooner than a correct node says it.
            Ok(Message::Loading(_) | Message::Health(_)) => {}
            // Once: saying it again changes nothing.
            Ok(Message::Leaving) => {
                if !std::mem::replace(&mut leaving, true) {
                    tracing::info!(node, "a node is leaving");
                    feed.feed(Event::Leaving(node));
                }
            }
            // A number that was not asked for wakes nobody.
            Ok(Message::Pong(asked)) if asked <= link.asked.load(Ordering::Relaxed) => {
                link.answered.send_replace(asked);
            }
            Ok(Message::Goodbye(goodbye)) => return Ok(format!("it said goodbye: {}", goodbye.reason)),
            Ok(_) => {
                feed.feed(Event::Malformed(node));
                return Err("it said what only a router says".to_owned());
            }
            Err(error) => {
                feed.feed(Event::Malformed(node));
                return Err(format!("a message of its was refused: {error}"));
            }
        }
    }
}

/// Whether the last such report is old enough; then this is the last.
fn is_due(last: &mut Option<Instant>) -> bool {
    let due = last.is_none_or(|last| last.elapsed() >= HEALTH_EVERY_MIN);
    if due {
        *last = Some(Instant::now());
    }
    due
}

/// Writes what the node is told until the last of it has arrived.
async fn speak(send: &mut SendStream, outbox: &mut mpsc::Receiver<Outgoing>) -> Parting {
    while let Some(outgoing) = outbox.recv().await {
        let (frame, last) = match outgoing {
            Outgoing::Frame(frame) => (frame, false),
            Outgoing::Last(frame) => (frame, true),
        };
        if let Err(error) = write_frame(send, frame).await {
            return Err(format!("its control stream broke: {error}"));
        }
        if last {
            say_goodbye(send).await;
            return Ok("this router said goodbye".to_owned());
        }
    }
    Err("its connection was replaced".to_owned())
}

/// Ends the stream and waits, not for long, until the peer has everything.
pub(crate) async fn say_goodbye(send: &mut SendStream) {
    if send.finish().is_ok() {
        // Either it arrived, or the time is up, or the connection broke: the connection is closed next in any case.
        drop(timeout(GOODBYE_WITHIN, send.stopped()).await);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whether_a_node_lives_is_known_after_three_round_trips_within_bounds() {
        let within = |millis| alive_within(Duration::from_millis(millis)).as_millis();
        assert_eq!([0, 1, 33, 34, 50, 100, 5000].map(within), [100, 100, 100, 102, 150, 300, 300]);
    }
}
