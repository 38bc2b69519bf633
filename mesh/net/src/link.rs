//! The router's end of one node's connection: its control stream and its lanes.
//!
//! The node has proven its key before anything here runs. It opens the control stream and introduces itself; then
//! two loops live side by side, one reading what the node says, one writing what it is told, while one task per
//! lane carries calls. When any of the loops ends, for whatever reason, the connection is closed, and every
//! call that waits or is under way fails at once.

use std::sync::Arc;
use std::time::Duration;

use mesh_proto::cluster::Event;
use mesh_proto::routes::NodeIndex;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::control::Hello;
use mesh_wire::frame::{FrameError, Op};
use mesh_wire::message::Message;
use quinn::{Connection, RecvStream, SendStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use crate::endpoint::Close;
use crate::lane::{Lane, Queue, Worker};
use crate::stream::{ReadFrameError, read_frame, write_frame};
use crate::tally::{Feed, Tally};

/// Time a connected node has to introduce itself.
const HELLO_WITHIN: Duration = Duration::from_secs(5);

/// Messages to a node that may wait to be written: a placement or two and a goodbye.
const OUTBOX_MESSAGES: usize = 8;

/// Time a goodbye has to arrive before the connection is closed regardless.
pub(crate) const GOODBYE_WITHIN: Duration = Duration::from_millis(200);

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
        let link = Arc::new(Link { connection, queues: Default::default(), outbox });
        (Session { node, pool, tally, feed, control: introduction.control, outbox: outgoing }, link)
    }

    /// Runs until the connection ends; says why.
    pub(crate) async fn run(mut self, link: Arc<Link>) -> String {
        let mut lanes = JoinSet::new();
        for lane in Lane::ALL {
            for _ in 0..lane.streams() {
                lanes.spawn(self.worker(&link, lane).run());
            }
        }
        let (mut send, mut recv) = self.control;
        let (node, pool, feed) = (self.node, &self.pool, &*self.feed);
        let reason = tokio::select! {
            reason = listen(node, &mut recv, pool, feed) => reason,
            reason = speak(&mut send, &mut self.outbox) => reason,
            error = link.connection.closed() => error.to_string(),
        };
        // Where the peer has closed already this changes nothing.
        link.close(Close::Goodbye, "");
        // Lanes notice by themselves; jobs they still hold fail when they end.
        while lanes.join_next().await.is_some() {}
        reason
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

/// Reads what the node says until there is no more. What no correct node says is told to the cluster's logic.
async fn listen(node: NodeIndex, recv: &mut RecvStream, pool: &Pool, feed: &dyn Feed) -> String {
    let mut last_health: Option<Instant> = None;
    loop {
        let frame = match read_frame(recv, pool, &[Op::Placed, Op::Health, Op::Goodbye]).await {
            Ok(Some(frame)) => frame,
            Ok(None) => return "it closed its control stream".to_owned(),
            Err(error) => {
                if matches!(&error, ReadFrameError::Frame(error) if !matches!(error, FrameError::PoolExhausted(_)))
                {
                    feed.feed(Event::Malformed(node));
                }
                return format!("its control stream broke: {error}");
            }
        };
        match Message::decode(&frame) {
            Ok(Message::Placed(placed)) => feed.feed(Event::Placed(node, placed)),
            Ok(Message::Health(health)) => {
                if last_health.is_none_or(|last| last.elapsed() >= HEALTH_EVERY_MIN) {
                    last_health = Some(Instant::now());
                    feed.feed(Event::Health(node, health));
                }
            }
            Ok(Message::Goodbye(goodbye)) => return format!("it said goodbye: {}", goodbye.reason),
            Ok(_) => {
                feed.feed(Event::Malformed(node));
                return "it said what only a router says".to_owned();
            }
            Err(error) => {
                feed.feed(Event::Malformed(node));
                return format!("a message of its was refused: {error}");
            }
        }
    }
}

/// Writes what the node is told until the last of it has arrived.
async fn speak(send: &mut SendStream, outbox: &mut mpsc::Receiver<Outgoing>) -> String {
    while let Some(outgoing) = outbox.recv().await {
        let (frame, last) = match outgoing {
            Outgoing::Frame(frame) => (frame, false),
            Outgoing::Last(frame) => (frame, true),
        };
        if let Err(error) = write_frame(send, frame).await {
            return format!("its control stream broke: {error}");
        }
        if last {
            say_goodbye(send).await;
            return "this router said goodbye".to_owned();
        }
    }
    "its connection was replaced".to_owned()
}

/// Ends the stream and waits, not for long, until the peer has everything.
pub(crate) async fn say_goodbye(send: &mut SendStream) {
    if send.finish().is_ok() {
        // Either it arrived, or the time is up, or the connection broke: the connection is closed next in any case.
        drop(timeout(GOODBYE_WITHIN, send.stopped()).await);
    }
}
