//! Private clusters of real processes, and the HTTP client that asks them.
//!
//! A cluster is a router and nodes that join it with tokens, as users do it. Processes are started with their
//! standard input held open (`--stop-with-parent`), so they end with this one even if it is killed; dropping a
//! cluster kills them at once. Their messages go to files that a failing start shows. One cluster computes at a
//! time unless it is the shared one: the machine may have two cores.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;
use ureq::http::HeaderMap;

/// A request that takes longer hangs; the slowest take a second on a busy machine.
const HANGS_AFTER: Duration = Duration::from_secs(120);
/// Requests asked while waiting for the cluster to change; each takes two milliseconds or more, and the slowest of what is
/// waited for, energy, is noted every ten seconds.
pub(crate) const POLLS_MAX: usize = 20_000;
/// Opening of every story.
pub(crate) const OPENING: &str = "Once upon a time there was a poor woodcutter who lived with his wife";

/// Folder of this run: packed models and clusters. Lies in the target folder; those of runs that are over are
/// removed by the next run, since nothing is dropped at the end of a process.
static RUN: LazyLock<PathBuf> = LazyLock::new(|| {
    let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("processes");
    for run in std::fs::read_dir(&all).into_iter().flatten().flatten() {
        let over = run.file_name().to_str().is_none_or(|id| !Path::new("/proc").join(id).exists());
        if over {
            std::fs::remove_dir_all(run.path()).expect("remove the folder of a run that is over");
        }
    }
    let run = all.join(std::process::id().to_string());
    std::fs::create_dir_all(&run).expect("make the folder of this run");
    run
});

static TURN: Mutex<()> = Mutex::new(());

/// Waits until no other test computes.
pub(crate) fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A new folder of this run.
pub(crate) fn folder() -> TempDir {
    TempDir::new_in(&*RUN).expect("make a folder")
}

/// The demo model.
pub(crate) fn tale_moe() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tale-moe")
}

/// A tiny checkpoint of the fixtures.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name)
}

/// The program, without the settings of whoever runs the tests.
fn program() -> Command {
    without_settings(Command::new(env!("CARGO_BIN_EXE_moemesh")))
}

fn without_settings(mut command: Command) -> Command {
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("MOEMESH_")) {
        command.env_remove(name);
    }
    command.env("MOEMESH_CACHE", RUN.join("cache")).env("MOEMESH_THREADS", "1").stdin(Stdio::null());
    command
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Ended {
    fn of(output: Output) -> Ended {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("output is UTF-8");
        Ended { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// The object on the last line of standard output, of a command that succeeded.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{self:#?}");
        let last = self.stdout.lines().last().expect("something was printed");
        let value: Value = serde_json::from_str(last).expect("the last line is JSON");
        assert!(value.is_object(), "{value}");
        value
    }

    /// Checks that it failed as it should: a code, a message with these words, no panic.
    #[track_caller]
    pub(crate) fn refused(&self, words: &[&str]) {
        assert!(self.code.is_some_and(|code| code != 0), "it should have failed: {self:#?}");
        assert!(!self.stderr.contains("panicked") && !self.stderr.contains("RUST_BACKTRACE"), "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "the message lacks {word:?}: {}", self.stderr);
        }
    }
}

/// Runs a command to its end.
pub(crate) fn moemesh(arguments: &[&str]) -> Ended {
    moemesh_with(arguments, &[])
}

/// Runs a command to its end, with this on its standard input.
pub(crate) fn moemesh_reading(arguments: &[&str], input: &str) -> Ended {
    let mut command = program();
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("run moemesh");
    let mut stdin = child.stdin.take().expect("standard input is a pipe");
    // It may end without having read it.
    stdin.write_all(input.as_bytes()).ok();
    drop(stdin);
    Ended::of(child.wait_with_output().expect("run moemesh"))
}

/// The same with more in its environment.
pub(crate) fn moemesh_with(arguments: &[&str], environment: &[(&str, &str)]) -> Ended {
    let mut command = program();
    command.envs(environment.iter().copied());
    Ended::of(command.args(arguments).output().expect("run moemesh"))
}

/// A process of a cluster.
#[derive(Debug)]
struct Process {
    child: Child,
    /// Nothing of one on a terminal.
    lines: Option<BufReader<ChildStdout>>,
    log: PathBuf,
}

impl Process {
    fn start(arguments: &[String], log: PathBuf) -> Process {
        let file = File::options().create(true).append(true).open(&log).expect("open a log");
        let mut command = program();
        command.args(arguments).arg("--stop-with-parent").stdin(Stdio::piped());
        let mut child = command.stdout(Stdio::piped()).stderr(file).spawn().expect("start moemesh");
        let lines = BufReader::new(child.stdout.take().expect("standard output is a pipe"));
        Process { child, lines: Some(lines), log }
    }

    /// Reads lines until one is an object with this key.
    #[track_caller]
    fn announced(&mut self, key: &str) -> Value {
        let mut line = String::new();
        let lines = self.lines.as_mut().expect("it is on no terminal");
        while lines.read_line(&mut line).expect("read a line") > 0 {
            match serde_json::from_str::<Value>(&line) {
                Ok(value) if value.get(key).is_some() => return value,
                _ => line.clear(),
            }
        }
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        panic!("it ended before it said {key:?}: {:?}\n{log}", self.child.wait());
    }

    fn signal(&self, name: &str) {
        let kill = format!("kill -{name} {}", self.child.id());
        let status = Command::new("sh").args(["-c", &kill]).status().expect("run kill");
        assert!(status.success(), "{kill}: {status}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead already, as the test wanted.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// What a cluster is made of.
#[derive(Clone, Debug)]
pub(crate) struct Shape<'a> {
    pub(crate) nodes: usize,
    /// Arguments of every process: model, format.
    pub(crate) all: &'a [&'a str],
    /// Of the router.
    pub(crate) router: &'a [&'a str],
    /// Of the nodes.
    pub(crate) node: &'a [&'a str],
    /// Whether nodes have no model and fetch their experts.
    pub(crate) empty: bool,
}

impl Shape<'static> {
    /// Nodes with nothing special about them.
    pub(crate) fn nodes(nodes: usize) -> Shape<'static> {
        Shape { nodes, all: &[], router: &[], node: &[], empty: false }
    }
}

/// A running cluster.
#[derive(Debug)]
pub(crate) struct Cluster {
    pub(crate) api: Api,
    nodes: Vec<Option<Process>>,
    node_arguments: Vec<Vec<String>>,
    router: Process,
    router_arguments: Vec<String>,
    /// Where nodes dial.
    mesh: String,
    directory: TempDir,
}

/// Starts a router; where nodes dial, and its API.
fn start_router(arguments: &[String], log: PathBuf) -> (Process, String, Api) {
    let mut router = Process::start(arguments, log);
    let listening = router.announced("mesh");
    let text = |key: &str| listening[key].as_str().expect("it has an address").to_owned();
    let api = Api::new(&format!("http://{}", text("http")));
    (router, text("mesh"), api)
}

/// A cluster beside which no other such cluster runs.
#[derive(Debug)]
pub(crate) struct Alone {
    cluster: Cluster,
    // After the cluster: the next begins when this one is gone.
    _turn: MutexGuard<'static, ()>,
}

impl Alone {
    /// Starts it when it is its turn.
    pub(crate) fn start(shape: &Shape<'_>) -> Alone {
        Alone::start_with(shape, shape.nodes)
    }

    /// The same where only `serving` of the nodes will serve.
    pub(crate) fn start_with(shape: &Shape<'_>, serving: usize) -> Alone {
        let turn = turn();
        Alone { cluster: Cluster::start_with(shape, serving), _turn: turn }
    }
}

impl Deref for Alone {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl DerefMut for Alone {
    fn deref_mut(&mut self) -> &mut Cluster {
        &mut self.cluster
    }
}

impl Cluster {
    /// A cluster beside whatever else runs.
    pub(crate) fn start(shape: &Shape<'_>) -> Cluster {
        Cluster::start_with(shape, shape.nodes)
    }

    fn start_with(shape: &Shape<'_>, serving: usize) -> Cluster {
        let mut cluster = Cluster::open(shape);
        (0..shape.nodes).for_each(|index| cluster.join_node(index));
        assert_eq!(cluster.ready(), json!(serving), "{}", cluster.logs());
        cluster
    }

    /// The router alone, which waits for its nodes.
    pub(crate) fn open(shape: &Shape<'_>) -> Cluster {
        let directory = folder();
        let model = tale_moe().to_string_lossy().into_owned();
        let common = |command: &str, state: &str, more: &[&str]| -> Vec<String> {
            let state = directory.path().join(state).to_string_lossy().into_owned();
            let fixed = [command, "--state", &state, "--announce"];
            let fetches = shape.empty && command == "node";
            let named = ["--model", model.as_str()];
            let named = if fetches { &[][..] } else { &named[..] };
            let given = fixed.iter().chain(named).chain(shape.all).chain(more);
            given.map(|text| (*text).to_owned()).collect()
        };
        let count = shape.nodes.to_string();
        let ports = ["--http", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--expect", &count];
        let more: Vec<&str> = ports.iter().chain(shape.router).copied().collect();
        let log = directory.path().join("router.log");
        let router_arguments = common("router", "router", &more);
        let (router, mesh, api) = start_router(&router_arguments, log);
        let node_arguments: Vec<Vec<String>> =
            (1..=shape.nodes).map(|index| common("node", &format!("node-{index}"), shape.node)).collect();
        let nodes = (0..shape.nodes).map(|_| None).collect();
        Cluster { api, nodes, node_arguments, router, router_arguments, mesh, directory }
    }

    /// Starts the router again with more arguments, where nodes look for it; it waits for them.
    pub(crate) fn restart_router(&mut self, more: &[&str]) {
        assert_eq!(self.stop_router(), Some(0), "{}", self.logs());
        let mut arguments = self.router_arguments.clone();
        let listen = arguments.iter().position(|text| text == "--listen").expect("the router listens");
        arguments[listen + 1].clone_from(&self.mesh);
        arguments.extend(more.iter().map(|text| (*text).to_owned()));
        let log = self.directory.path().join("router.log");
        (self.router, self.mesh, self.api) = start_router(&arguments, log);
    }

    /// Starts a node that has joined before on a terminal. What that shows goes to a file, whose path comes back.
    #[cfg(target_os = "linux")]
    pub(crate) fn start_node_on_terminal(&mut self, index: usize) -> PathBuf {
        let shown = self.directory.path().join(format!("terminal-{}", index + 1));
        let node = [env!("CARGO_BIN_EXE_moemesh").to_owned()].into_iter();
        let given = self.node_arguments[index].iter().cloned();
        let line: Vec<String> = node.chain(given).chain(["--stop-with-parent".to_owned()]).collect();
        let mut command = without_settings(Command::new("script"));
        command.args(["-qefc", &line.join(" ")]).arg(&shown).stdin(Stdio::piped()).stdout(Stdio::null());
        let child = command.spawn().expect("start script (of util-linux)");
        self.nodes[index] = Some(Process { child, lines: None, log: self.log(index) });
        shown
    }

    /// Waits until the router serves; the number of nodes that do.
    pub(crate) fn ready(&mut self) -> Value {
        self.router.announced("ready")["ready"].clone()
    }

    /// Starts a node for the first time; returns when it is in the roster, so that nodes have the order of names.
    pub(crate) fn join_node(&mut self, index: usize) {
        let token = self.token();
        self.join_again(index, &token);
    }

    /// The same for a node that is to have no model, in a cluster whose nodes have.
    pub(crate) fn join_empty(&mut self, index: usize) {
        let model = self.node_arguments[index].iter().position(|text| text == "--model").expect("it has one");
        self.node_arguments[index].drain(model..model + 2);
        self.join_node(index);
    }

    /// The same with a given token.
    pub(crate) fn join_again(&mut self, index: usize, token: &str) {
        let name = format!("node-{}", index + 1);
        let join = ["--join".to_owned(), token.to_owned(), "--name".to_owned(), name.clone()];
        let arguments: Vec<String> = self.node_arguments[index].iter().chain(&join).cloned().collect();
        let mut node = Process::start(&arguments, self.log(index));
        assert_eq!(node.announced("joined")["joined"], json!(name));
        self.nodes[index] = Some(node);
    }

    /// Starts a node that has joined before.
    pub(crate) fn start_node(&mut self, index: usize) {
        self.nodes[index] = Some(Process::start(&self.node_arguments[index], self.log(index)));
    }

    fn log(&self, index: usize) -> PathBuf {
        self.directory.path().join(format!("node-{}.log", index + 1))
    }

    /// State folder of `router`, `node-1`, `node-2`, ...
    pub(crate) fn state(&self, name: &str) -> String {
        self.directory.path().join(name).to_string_lossy().into_owned()
    }

    /// Fetched experts that a node keeps on its disk, smallest name first.
    pub(crate) fn stored(&self, index: usize) -> Vec<PathBuf> {
        let folder = self.directory.path().join(format!("node-{}/weights", index + 1));
        let files = std::fs::read_dir(folder).expect("the node has a store").flatten();
        let hash = |path: &PathBuf| path.file_name().is_some_and(|name| name.len() == 64);
        let mut stored: Vec<_> = files.map(|file| file.path()).filter(hash).collect();
        stored.sort();
        stored
    }

    /// A node with the state of this name, which nobody stops before it is dropped.
    pub(crate) fn start_another(&self, name: &str) -> impl Drop + use<> {
        let mut arguments = self.node_arguments[0].clone();
        let state =
            arguments.iter_mut().find(|text| text.ends_with("/node-1")).expect("the first node's state");
        *state = self.state(name);
        Process::start(&arguments, self.directory.path().join(format!("{name}.log")))
    }

    /// Where nodes dial.
    pub(crate) fn mesh(&self) -> String {
        self.mesh.clone()
    }

    /// A join token.
    #[track_caller]
    pub(crate) fn token(&self) -> String {
        let made = moemesh(&["token", "--state", &self.state("router")]);
        assert_eq!(made.code, Some(0), "{made:#?}");
        made.stdout.trim().to_owned()
    }

    /// Lets a node leave in order; its exit code.
    pub(crate) fn stop_node(&mut self, index: usize) -> Option<i32> {
        self.signal_node(index, "TERM");
        self.ended(index)
    }

    /// Waits until a node has ended by itself; its exit code.
    pub(crate) fn ended(&mut self, index: usize) -> Option<i32> {
        let mut node = self.nodes[index].take().expect("the node runs");
        node.child.wait().expect("the node ends").code()
    }

    /// `kill -9`.
    pub(crate) fn kill_node(&mut self, index: usize) {
        let mut node = self.nodes[index].take().expect("the node runs");
        node.child.kill().expect("kill the node");
        node.child.wait().expect("the node is dead");
    }

    /// Sends a signal to a node.
    pub(crate) fn signal_node(&self, index: usize, name: &str) {
        self.nodes[index].as_ref().expect("the node runs").signal(name);
    }

    /// Lets the router stop in order.
    pub(crate) fn stop_router(&mut self) -> Option<i32> {
        drop(self.router.child.stdin.take());
        self.router.child.wait().expect("the router ends").code()
    }

    /// Everything the processes said.
    pub(crate) fn logs(&self) -> String {
        let files = std::fs::read_dir(self.directory.path()).expect("read the cluster's folder").flatten();
        let logs = files.filter(|file| file.path().extension().is_some_and(|ending| ending == "log"));
        logs.map(|log| {
            let text = std::fs::read_to_string(log.path()).expect("read a log");
            format!("--- {}\n{text}", log.file_name().to_string_lossy())
        })
        .collect()
    }

    /// One entry of `/api/v1/nodes`.
    pub(crate) fn node(&self, index: usize) -> Value {
        self.api.nodes()["nodes"][index].clone()
    }

    /// Asks for tokens until the cluster's state is as wanted; its state then.
    #[track_caller]
    pub(crate) fn until(&self, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        for _ in 0..POLLS_MAX {
            let state = self.api.nodes();
            if wanted(&state) {
                return state;
            }
            self.api.post("/v1/completions", &json!({"prompt": "The", "max_tokens": 1})).ok();
        }
        panic!("never: {what}\n{:#}\n{}", self.api.nodes(), self.logs());
    }
}

/// An answer over HTTP.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) headers: HeaderMap,
    pub(crate) text: String,
}

impl Answer {
    /// The body of a 200.
    #[track_caller]
    pub(crate) fn ok(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.text);
        serde_json::from_str(&self.text).expect("the body is JSON")
    }

    /// Checks an OpenAI error object; its message.
    #[track_caller]
    pub(crate) fn error(&self, status: u16, code: &str) -> String {
        assert_eq!(self.status, status, "{}", self.text);
        let body: Value = serde_json::from_str(&self.text).expect("the body is JSON");
        assert_eq!(body["error"]["code"], code, "{body}");
        assert!(body["error"]["type"].is_string() && body["error"].get("param").is_some(), "{body}");
        let message = body["error"]["message"].as_str().expect("an error has a message");
        assert!(message.len() > 10 && !message.contains("panic"), "{message}");
        message.to_owned()
    }

    pub(crate) fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }
}

/// The API of a router.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    pub(crate) base: String,
    agent: ureq::Agent,
}

impl Api {
    fn new(base: &str) -> Api {
        let config =
            ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(HANGS_AFTER));
        Api { base: base.to_owned(), agent: config.build().into() }
    }

    fn answered(response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Answer {
        let mut response = response.expect("the router answers");
        let text = response.body_mut().read_to_string().expect("read the answer");
        Answer { status: response.status().as_u16(), headers: response.headers().clone(), text }
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        Self::answered(self.agent.get(format!("{}{path}", self.base)).call())
    }

    pub(crate) fn read_with_key(&self, path: &str, key: &str) -> Answer {
        let request = self.agent.get(format!("{}{path}", self.base));
        Self::answered(request.header("Authorization", format!("Bearer {key}")).call())
    }

    pub(crate) fn delete(&self, path: &str) -> Answer {
        Self::answered(self.agent.delete(format!("{}{path}", self.base)).call())
    }

    /// A body of any bytes.
    pub(crate) fn post_bytes(&self, path: &str, body: &[u8]) -> Answer {
        let request = self.agent.post(format!("{}{path}", self.base));
        Self::answered(request.header("Content-Type", "application/json").send(body))
    }

    pub(crate) fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    /// `POST /v1/completions` that succeeds.
    #[track_caller]
    pub(crate) fn complete(&self, body: &Value) -> Value {
        self.post("/v1/completions", body).ok()
    }

    /// The events of a streamed answer.
    #[track_caller]
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Events {
        let request = self.agent.post(format!("{}{path}", self.base));
        let response = request.send_json(body).expect("the router answers");
        assert_eq!(response.status().as_u16(), 200);
        let kind = response.headers().get("content-type").expect("a stream has a type");
        assert!(kind.to_str().expect("a type is ASCII").starts_with("text/event-stream"), "{kind:?}");
        Events { lines: BufReader::new(Box::new(response.into_body().into_reader())), done: false }
    }

    /// `/api/v1/nodes`.
    pub(crate) fn nodes(&self) -> Value {
        self.get("/api/v1/nodes").ok()
    }

    /// A greedy story of this many tokens; `at_token` is called when that many have arrived.
    #[track_caller]
    pub(crate) fn story(&self, tokens: usize, mut at_token: impl FnMut(usize)) -> Story {
        let body = json!({
            "prompt": OPENING, "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": true,
            "logits_digest": true, "return_token_ids": true,
        });
        let mut story = Story::default();
        let mut last = Instant::now();
        for event in self.stream("/v1/completions", &body) {
            let choice = &event["choices"][0];
            let ids = choice["token_ids"].as_array().into_iter().flatten();
            for id in ids.filter_map(Value::as_u64) {
                if !story.token_ids.is_empty() {
                    story.longest_gap = story.longest_gap.max(last.elapsed());
                }
                last = Instant::now();
                story.token_ids.push(id);
                at_token(story.token_ids.len());
            }
            story.text.push_str(choice["text"].as_str().unwrap_or_default());
            if let Some(digest) = choice["logits_digest"].as_str() {
                story.digest = digest.to_owned();
            }
        }
        assert_eq!(story.token_ids.len(), tokens, "{}", story.text);
        assert_eq!(story.digest.len(), 64, "{story:?}");
        story
    }
}

/// A story as it arrived.
#[derive(Clone, Debug, Default)]
pub(crate) struct Story {
    pub(crate) text: String,
    pub(crate) token_ids: Vec<u64>,
    /// Over the logits of every token.
    pub(crate) digest: String,
    pub(crate) longest_gap: Duration,
}

impl Story {
    /// Checks that both are the same to the last bit.
    #[track_caller]
    pub(crate) fn assert_equals(&self, other: &Story) {
        assert_eq!(self.token_ids, other.token_ids);
        assert_eq!(self.text, other.text);
        assert_eq!(self.digest, other.digest, "same tokens from other logits");
    }
}

/// Server-sent events, each one JSON object. Ends at `[DONE]`; an end without it is a failure. Dropping it early
/// closes the connection.
pub(crate) struct Events {
    lines: BufReader<Box<dyn Read>>,
    done: bool,
}

impl Iterator for Events {
    type Item = Value;

    fn next(&mut self) -> Option<Value> {
        while !self.done {
            let mut line = String::new();
            assert!(self.lines.read_line(&mut line).expect("read the stream") > 0, "it ended without [DONE]");
            let line = line.trim_end();
            match line.strip_prefix("data: ") {
                Some("[DONE]") => {
                    let mut rest = String::new();
                    self.lines.read_to_string(&mut rest).expect("read the end");
                    assert_eq!(rest.trim(), "", "something follows [DONE]");
                    self.done = true;
                }
                Some(event) => return Some(serde_json::from_str(event).expect("an event is JSON")),
                None => assert!(line.is_empty() || line.starts_with(':'), "no event: {line}"),
            }
        }
        None
    }
}
