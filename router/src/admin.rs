//! What only the operator of the router's machine may do: a socket in the state folder.
//!
//! `moemesh token` and `moemesh nodes revoke` change who belongs to the cluster. That is not for the API, whose keys are
//! for clients: it is for whoever owns the state folder, so it is asked over a Unix socket there that nobody else can
//! open. One line of JSON asks, one line answers. The price: it works on the router's machine only. Bounded in bytes,
//! time and questions at a time, as everything here.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use mesh_net::authority::AuthorityError;
use mesh_net::hub::Hub;
use mesh_proto::cluster::NodeState;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::Semaphore;

use crate::reachable;

/// The socket's name in the state folder.
const SOCKET: &str = "admin.sock";

/// Bytes of a question or an answer: a token with all its addresses takes a tenth.
pub const LINE_BYTES_MAX: u64 = 4096;

/// Nodes that an answer tells of: with the longest names they take 3 kB.
pub const NODES_TOLD_MAX: usize = 16;

/// Questions under way at a time.
pub const QUESTIONS_MAX: usize = 4;

/// Time for one, asked. Saving may take seconds on a slow card.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// What the operator wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "lowercase", deny_unknown_fields)]
pub enum Question {
    /// A join token.
    Token {
        /// Seconds it is good for.
        ttl_s: u64,
        /// Where machines will find the router; none: wherever it listens.
        addresses: Vec<SocketAddr>,
    },
    /// To shut a node out.
    Revoke {
        /// Its name, or the first digits of its key.
        node: String,
    },
    /// Where the router is, and its nodes.
    Where,
    /// To let a quarantined node back in.
    Pardon {
        /// Its name.
        node: String,
    },
}

/// What comes back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase", deny_unknown_fields)]
pub enum Answer {
    /// A token.
    Token {
        /// Its text.
        token: String,
        /// When it expires, in seconds since 1970.
        expires_unix: u64,
        /// The addresses in it.
        addresses: Vec<SocketAddr>,
    },
    /// A node is shut out, or let in again.
    Done {
        /// Its name.
        node: String,
        /// The roster's number now.
        epoch: u64,
    },
    /// Where everybody is.
    Where {
        /// UDP address the router listens on.
        listen: SocketAddr,
        /// Where other machines reach it.
        addresses: Vec<SocketAddr>,
        /// Its nodes, those that are not connected first, at most `NODES_TOLD_MAX`.
        nodes: Vec<Whereabouts>,
    },
    /// Why not, and what to do.
    Error(String),
}

/// A node, as the router sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Whereabouts {
    /// Its name.
    pub name: String,
    /// Where it is connected from; `None`: it is not.
    pub address: Option<SocketAddr>,
    /// What it does.
    pub state: String,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nobody listens.
    #[error("no router runs with the state in {state} ({error}); start one with `moemesh router --state {state}`", state = state.display())]
    NoRouter {
        /// The folder.
        state: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
    /// It listens and says nothing useful.
    #[error("the router at {state} does not answer: {what}", state = state.display())]
    NoAnswer {
        /// The folder.
        state: PathBuf,
        /// What came instead.
        what: String,
    },
    /// It says no.
    #[error("{0}")]
    Refused(String),
    /// The socket cannot be made.
    #[error("{path}: {error}; choose another --state (a short path, on a disk that can hold sockets)", path = path.display())]
    Listen {
        /// The socket.
        path: PathBuf,
        /// What the system says.
        error: std::io::Error,
    },
}

/// The router's side.
#[derive(Debug)]
pub struct Admin {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Admin {
    fn drop(&mut self) {
        // Left behind, it would only be in the way of nobody: the next router removes it.
        drop(std::fs::remove_file(&self.path));
    }
}

impl Admin {
    /// Listens in this state folder, which the caller has locked. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// `Listen`.
    pub fn bind(state: &Path) -> Result<Admin, AdminError> {
        let path = state.join(SOCKET);
        let failed = |error| AdminError::Listen { path: path.clone(), error };
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Admin { listener, path })
    }

    /// Answers until it is dropped.
    pub async fn serve(self, hub: Arc<Hub>) {
        let places = Arc::new(Semaphore::new(QUESTIONS_MAX));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a question of the operator was not taken");
                    // Out of file descriptors, for one: others must give some back first.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let hub = Arc::clone(&hub);
            tokio::spawn(async move {
                if let Ok(Err(error)) = tokio::time::timeout(ANSWER_WITHIN, answer(stream, hub)).await {
                    tracing::warn!(%error, "a question of the operator was not answered");
                }
                drop(place);
            });
        }
    }
}

async fn answer(stream: tokio::net::UnixStream, hub: Arc<Hub>) -> std::io::Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    tokio::io::BufReader::new(read.take(LINE_BYTES_MAX)).read_line(&mut line).await?;
    let answer = match serde_json::from_str(&line) {
        // Saves, and waits for the network's thread.
        Ok(question) => tokio::task::spawn_blocking(move || decide(&hub, question)).await?,
        Err(error) => Answer::Error(format!("not a question of this version: {error}")),
    };
    let text = serde_json::to_string(&answer)? + "\n";
    write.write_all(text.as_bytes()).await
}

/// Does what is wanted.
fn decide(hub: &Hub, question: Question) -> Answer {
    let done = |node: String| {
        let epoch = hub.authority().roster().roster().epoch;
        Answer::Done { node, epoch }
    };
    let decided: Result<Answer, AuthorityError> = match question {
        Question::Token { ttl_s, addresses } => {
            let own = addresses.is_empty().then(|| reachable::addresses(hub.local_addr()));
            let token = hub.authority().issue(Duration::from_secs(ttl_s), own.unwrap_or(addresses));
            token.map(|token| Answer::Token {
                token: token.to_string(),
                expires_unix: token.expires_unix,
                addresses: token.addresses,
            })
        }
        Question::Where => Ok(whereabouts(hub)),
        Question::Revoke { node } => hub.revoke(&node).map(|machine| done(machine.name)),
        Question::Pardon { node } => hub.pardon(&node).map(|()| done(node)),
    };
    decided.unwrap_or_else(|error| Answer::Error(error.to_string()))
}

fn whereabouts(hub: &Hub) -> Answer {
    let mut nodes: Vec<_> = hub
        .nodes()
        .into_iter()
        .filter(|node| node.cluster.state != NodeState::Revoked)
        .map(|node| Whereabouts {
            name: node.name,
            address: node.address,
            state: node.cluster.state.to_string(),
        })
        .collect();
    nodes.sort_by_key(|node| node.address.is_some());
    nodes.truncate(NODES_TOLD_MAX);
    let listen = hub.local_addr();
    Answer::Where { listen, addresses: reachable::addresses(listen), nodes }
}

/// Asks the router whose state is in this folder.
///
/// # Errors
/// `AdminError`; `NoRouter` at once where none runs.
pub fn ask(state: &Path, question: &Question) -> Result<Answer, AdminError> {
    let path = state.join(SOCKET);
    let silent = |what: String| AdminError::NoAnswer { state: state.to_owned(), what };
    let mut stream =
        UnixStream::connect(path).map_err(|error| AdminError::NoRouter { state: state.to_owned(), error })?;
    let line = serde_json::to_string(question).map_err(|error| silent(error.to_string()))? + "\n";
    let asked = |stream: &mut UnixStream| -> std::io::Result<String> {
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.set_write_timeout(Some(ANSWER_WITHIN))?;
        stream.write_all(line.as_bytes())?;
        let mut text = String::new();
        BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut text)?;
        Ok(text)
    };
    let text = asked(&mut stream).map_err(|error| silent(error.to_string()))?;
    match serde_json::from_str(&text) {
        Ok(Answer::Error(why)) => Err(AdminError::Refused(why)),
        Ok(answer) => Ok(answer),
        Err(error) => Err(silent(error.to_string())),
    }
}

#[cfg(test)]
mod tests;
