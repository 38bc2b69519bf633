//! A node that lies: admitted like any other, loading what it is told, and then wrong in one chosen way.
//!
//! An honest station cannot be made to break its protocol, so this one speaks QUIC itself, over the node's own key and
//! membership. It takes a node's arguments (what it does not know it passes over), so that the lab can start it in a
//! node's place; how it lies is in `--mode` or `MOEMESH_LIE`. Where its lie needs right sums it computes them, with the
//! router's own code. The price: it keeps every epoch it was ever given. It is for tests; no release contains it.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program for tests")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use mesh_net::endpoint::dialer;
use mesh_net::join::join;
use mesh_net::membership::{Membership, Opened};
use mesh_net::token::Token;
use mesh_wire::buffer::{Buffer, Pool};
use mesh_wire::call::Call;
use mesh_wire::control::{Hello, Placed, Placement};
use mesh_wire::frame::{HEADER_BYTES, Header, Op};
use mesh_wire::id::ExpertKey;
use mesh_wire::message::Message;
use mesh_wire::reply::{ReplyHead, encode_sums};
use model::activations::Activations;
use model::format::Format;
use model::home::{Home, Residency};
use model::kernel::Assignment;
use model::open::Model;
use moemesh_tests::cluster::native;
use moemesh_tests::lies::Lie;
use quinn::{RecvStream, SendStream};

/// Bytes of frames.
const POOL_BYTES: usize = 64 << 20;
/// Between attempts to reach the router.
const PAUSE: Duration = Duration::from_millis(200);
/// Between two bytes of a reply that drips.
const DRIP: Duration = Duration::from_millis(100);
/// Replies of a flood, per call.
const FLOOD: u64 = 1000;

/// Ways to lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// A row too few, or one too many.
    Short,
    Long,
    /// Rows of another width.
    Hidden,
    /// A width that does not exist.
    Width,
    /// The number of a call that nobody made.
    Foreign,
    /// The answer to the call before.
    Another,
    /// The right answer, twice.
    Twice,
    /// A frame full of nonsense; one that ends too early; one that says it has four gigabytes.
    Garbage,
    Truncated,
    Oversized,
    /// It only ever acknowledges the epoch before.
    Stale,
    /// One byte every 100 ms.
    Drip,
    Silence,
    /// A thousand replies per call, none of them to it.
    Flood,
    /// A petabyte of memory, infinitely fast, and it loads nothing.
    Boast,
    /// Sums that look right and are not.
    Sums,
    Plausible(Lie),
    /// It does not lie.
    Honest,
}

impl Mode {
    fn parse(name: &str) -> Option<Mode> {
        Some(match name {
            "short" | "rows" => Mode::Short,
            "long" => Mode::Long,
            "hidden" => Mode::Hidden,
            // Sums are integers; a width that does not exist is as near to "not a number" as they come.
            "width" | "nan" => Mode::Width,
            "foreign" => Mode::Foreign,
            "another" => Mode::Another,
            "twice" => Mode::Twice,
            "garbage" | "bytes" => Mode::Garbage,
            "truncated" => Mode::Truncated,
            "oversized" => Mode::Oversized,
            "stale" => Mode::Stale,
            "drip" => Mode::Drip,
            "silence" => Mode::Silence,
            "flood" => Mode::Flood,
            "boast" => Mode::Boast,
            "sums" => Mode::Sums,
            "honest" => Mode::Honest,
            // The model is of four bits already.
            "fewer-bits" => return None,
            name => Mode::Plausible(Lie::parse(name)?),
        })
    }
}

impl Mode {
    fn lie(self) -> Option<Lie> {
        if let Mode::Plausible(lie) = self { Some(lie) } else { None }
    }
}

#[derive(Debug)]
struct Options {
    mode: Mode,
    state: PathBuf,
    join: Option<String>,
    name: String,
    routers: Vec<SocketAddr>,
    model: String,
    cache: PathBuf,
    memory_bytes: u64,
    with_parent: bool,
}

fn options() -> Result<Options, String> {
    let variable = |name: &str| std::env::var(name).ok();
    let mut options = Options {
        mode: Mode::Honest,
        state: variable("MOEMESH_STATE").unwrap_or_default().into(),
        join: None,
        name: "liar".to_owned(),
        routers: Vec::new(),
        model: variable("MOEMESH_MODEL").unwrap_or_default(),
        cache: variable("MOEMESH_CACHE").map_or_else(std::env::temp_dir, PathBuf::from),
        memory_bytes: 1 << 32,
        with_parent: false,
    };
    let mut mode = variable("MOEMESH_LIE");
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or(format!("{argument} needs a value"));
        match argument.as_str() {
            "--mode" => mode = Some(value()?),
            "--state" => options.state = value()?.into(),
            "--join" => options.join = Some(value()?),
            "--name" => options.name = value()?,
            "--router" => options.routers.push(value()?.parse().map_err(|_| "--router is ADDRESS:PORT")?),
            "--model" => options.model = value()?,
            "--cache" => options.cache = value()?.into(),
            "--memory" => {
                options.memory_bytes =
                    value()?.parse::<u64>().map_err(|_| "--memory is a number of MiB")? << 20;
            }
            "--stop-with-parent" => options.with_parent = true,
            // Other arguments of a node.
            _ => {}
        }
    }
    let mode = mode.ok_or("how shall it lie? --mode or MOEMESH_LIE")?;
    options.mode = Mode::parse(&mode).ok_or(format!("'{mode}' is no way to lie"))?;
    Ok(options)
}

fn membership(options: &Options) -> Result<Membership, String> {
    let opened = Membership::open(&options.state).map_err(|error| error.to_string())?;
    match opened {
        Opened::Member(membership) => Ok(*membership),
        Opened::Stranger(folder, identity) => {
            let token = options.join.as_deref().ok_or("it is in no cluster: --join TOKEN")?;
            let token: Token = token.parse().map_err(|_| "that is no token")?;
            let admission = join(&identity, &token, &options.name).map_err(|error| error.to_string())?;
            Membership::enter(folder, identity, admission).map_err(|error| error.to_string())
        }
    }
}

/// By epoch and expert: the blocks it was told to hold.
type Held = BTreeMap<(u64, ExpertKey), (u16, u16)>;

/// What all its streams share.
struct Liar {
    mode: Mode,
    pool: Pool,
    model: Arc<Model>,
    home: Mutex<Home>,
    held: Mutex<Held>,
    memory_bytes: u64,
    /// The answer before.
    before: Mutex<Option<Vec<u8>>>,
}

impl Liar {
    fn hello(&self) -> Hello {
        let boasts = self.mode == Mode::Boast;
        Hello {
            name: "liar".into(),
            version: "0".into(),
            model: self.model.fingerprint,
            memory_bytes: if boasts { 1 << 50 } else { self.memory_bytes },
            threads: 1,
            exact: true,
            kernels: "lies".into(),
            weight_mb_s: if boasts { [u32::MAX; 5] } else { [1000; 5] },
            instance: u64::from(std::process::id()),
            ..Hello::default()
        }
    }

    fn placed(&self, placement: &Placement) -> Placed {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        if self.mode != Mode::Boast {
            let slices = placement.experts.iter();
            held.extend(slices.map(|slice| ((placement.epoch, slice.key), (slice.from, slice.to))));
        }
        let stale = u64::from(self.mode == Mode::Stale);
        let epoch = placement.epoch.saturating_sub(stale);
        Placed { epoch, weight_bytes: 1, refusal: String::new() }
    }

    /// The sums of a call as an honest node has them.
    fn sums(&self, call: &Call) -> Option<Vec<Option<Vec<i32>>>> {
        let head = *call.head();
        let (rows, hidden) = (head.rows as usize, head.hidden as usize);
        let mut by_part: BTreeMap<(u16, u16), Vec<Assignment>> = BTreeMap::new();
        for from in call.view().assignments() {
            let key = ExpertKey { layer: head.layer, expert: from.expert };
            let part = *self.held.lock().unwrap_or_else(PoisonError::into_inner).get(&(head.epoch, key))?;
            let experts = self.model.config.moe.experts as u16;
            let expert = self.mode.lie().map_or(from.expert, |lie| lie.expert(from.expert, experts));
            let assignment = Assignment { row: from.row, expert, weight: from.weight };
            by_part.entry(part).or_default().push(assignment);
        }
        let x = Activations::new(self.model.format, rows, hidden, call.view().payload())?;
        let mut sums = vec![0; rows * hidden];
        let mut home = self.home.lock().unwrap_or_else(PoisonError::into_inner);
        for (part, assignments) in by_part {
            home.add_slice(usize::from(head.layer), part, (x, &assignments), &mut sums).ok()?;
        }
        self.mode.lie().into_iter().for_each(|lie| lie.bend(head.call, &mut sums));
        let narrow = |row: &[i64]| row.iter().map(|sum| i32::try_from(*sum).ok()).collect();
        Some(sums.chunks_exact(hidden).map(narrow).collect())
    }

    fn encode(&self, call: u64, hidden: u32, rows: &[Option<Vec<i32>>]) -> Vec<u8> {
        let rows: Vec<Option<&[i32]>> = rows.iter().map(|row| row.as_deref()).collect();
        let frame = encode_sums(&self.pool, ReplyHead { call, service_us: 1, hidden }, &rows);
        frame.map_or_else(|_| Vec::new(), |frame| frame.frame().to_vec())
    }

    /// What it writes in answer to a call.
    fn answer(&self, call: &Call) -> Vec<u8> {
        let head = *call.head();
        let Some(mut rows) = self.sums(call) else { return Vec::new() };
        let right = self.encode(head.call, head.hidden, &rows);
        match self.mode {
            Mode::Honest | Mode::Stale | Mode::Boast | Mode::Drip | Mode::Plausible(_) => right,
            Mode::Silence => Vec::new(),
            Mode::Twice => right.repeat(2),
            Mode::Short => {
                // One row is the least a reply can have.
                if rows.len() > 1 {
                    rows.truncate(rows.len() - 1)
                } else {
                    rows.push(None)
                };
                self.encode(head.call, head.hidden, &rows)
            }
            Mode::Long => {
                rows.push(rows[0].clone());
                self.encode(head.call, head.hidden, &rows)
            }
            Mode::Hidden => {
                let half = head.hidden / 2;
                rows.iter_mut().flatten().for_each(|row| row.truncate(half as usize));
                self.encode(head.call, half, &rows)
            }
            Mode::Width => {
                // The widths of the rows are the first bytes of a reply.
                let mut frame = right;
                frame[HEADER_BYTES] = 9;
                frame
            }
            Mode::Foreign => self.encode(head.call ^ 1 << 40, head.hidden, &rows).repeat(16),
            Mode::Another => {
                let mut before = self.before.lock().unwrap_or_else(PoisonError::into_inner);
                before.replace(right).unwrap_or_default()
            }
            Mode::Garbage => {
                let mut frame = right;
                frame[HEADER_BYTES..].fill(0xff);
                frame
            }
            Mode::Truncated => {
                let mut frame = right;
                frame.truncate(HEADER_BYTES + 64);
                frame[..4].copy_from_slice(&64_u32.to_le_bytes());
                frame
            }
            Mode::Oversized => {
                let mut frame = right;
                frame[..4].fill(0xff);
                frame
            }
            Mode::Flood => (1..=FLOOD)
                .flat_map(|more| self.encode(head.call + (more << 32), head.hidden, &rows[..1]))
                .collect(),
            Mode::Sums => {
                if let Some(Some(row)) = rows.first_mut() {
                    row[0] = row[0].wrapping_add(1 << 12);
                }
                self.encode(head.call, head.hidden, &rows)
            }
        }
    }
}

/// The next frame of these kinds; none where the stream ended or broke.
async fn read(stream: &mut RecvStream, pool: &Pool, allowed: &[Op]) -> Option<Buffer> {
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header).await.ok()?;
    let mut buffer = pool.take(Header::parse(header, allowed).ok()?).ok()?;
    stream.read_exact(buffer.body_mut()).await.ok()?;
    Some(buffer)
}

async fn say(stream: &mut SendStream, pool: &Pool, message: &Message) -> Option<()> {
    let frame = message.encode(pool).ok()?;
    stream.write_all(frame.frame()).await.ok()
}

/// One lane: calls in, lies out.
async fn lane(liar: Arc<Liar>, (mut send, mut recv): (SendStream, RecvStream)) -> Option<()> {
    loop {
        let frame = read(&mut recv, &liar.pool, &[Op::Call, Op::Probe]).await?;
        if frame.op() == Op::Probe {
            if let Ok(Message::Probe(probe)) = Message::decode(&frame) {
                let padding = vec![0; probe.answer_bytes as usize];
                let answer = Message::Probed(mesh_wire::control::Probed { id: probe.id, padding });
                say(&mut send, &liar.pool, &answer).await?;
            }
            continue;
        }
        let call = Call::parse(frame).ok()?;
        let computing = Arc::clone(&liar);
        let answer = tokio::task::spawn_blocking(move || computing.answer(&call)).await.ok()?;
        if liar.mode != Mode::Drip {
            send.write_all(&answer).await.ok()?;
            continue;
        }
        let mut every = tokio::time::interval(DRIP);
        for byte in answer {
            every.tick().await;
            send.write_all(&[byte]).await.ok()?;
        }
    }
}

/// One connection, until it ends.
async fn serve(liar: &Arc<Liar>, membership: &Membership, router: SocketAddr) -> Result<(), String> {
    let endpoint = dialer(membership.identity(), membership.admission().router, router.is_ipv6());
    let endpoint = endpoint.map_err(|error| error.to_string())?;
    let connecting = endpoint.connect(router, "moemesh").map_err(|error| error.to_string())?;
    let connection = connecting.await.map_err(|error| error.to_string())?;
    let (mut send, mut recv) = connection.open_bi().await.map_err(|error| error.to_string())?;
    say(&mut send, &liar.pool, &Message::Hello(liar.hello())).await.ok_or("the hello was not taken")?;
    let control = async {
        let kinds = [Op::Placement, Op::Goodbye, Op::Roster, Op::Ping];
        while let Some(frame) = read(&mut recv, &liar.pool, &kinds).await {
            let answer = match Message::decode(&frame) {
                Ok(Message::Placement(placement)) => Message::Placed(liar.placed(&placement)),
                Ok(Message::Ping(id)) => Message::Pong(id),
                _ => continue,
            };
            if say(&mut send, &liar.pool, &answer).await.is_none() {
                return;
            }
        }
    };
    let lanes = async {
        while let Ok(streams) = connection.accept_bi().await {
            tokio::spawn(lane(Arc::clone(liar), streams));
        }
    };
    tokio::select! {
        () = control => {}
        () = lanes => {}
        _ = connection.closed() => {}
    }
    let reason = connection.close_reason().map(|reason| reason.to_string()).unwrap_or_default();
    eprintln!("liar: the connection ended: {reason}");
    Ok(())
}

fn run() -> Result<(), String> {
    let options = options()?;
    let membership = membership(&options)?;
    let model = Model::open(&options.model, Format::Q4, &options.cache, &mut |_, _, _| {});
    let model = Arc::new(model.map_err(|error| error.to_string())?);
    let liar = Arc::new(Liar {
        mode: options.mode,
        pool: Pool::new(POOL_BYTES),
        home: Mutex::new(Home::new(Arc::clone(&model), native(), Residency::Mapped)),
        model,
        held: Mutex::default(),
        memory_bytes: options.memory_bytes,
        before: Mutex::default(),
    });
    let routers =
        if options.routers.is_empty() { membership.admission().addresses.clone() } else { options.routers };
    if options.with_parent {
        std::thread::spawn(|| {
            let mut rest = Vec::new();
            std::io::Read::read_to_end(&mut std::io::stdin(), &mut rest).ok();
            std::process::exit(0);
        });
    }
    println!("it lies: {:?}", options.mode);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
    runtime.map_err(|error| error.to_string())?.block_on(async {
        loop {
            for router in &routers {
                if let Err(error) = serve(&liar, &membership, *router).await {
                    eprintln!("liar: {router}: {error}");
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    })
}

fn main() -> std::process::ExitCode {
    match run() {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("liar: {error}");
            std::process::ExitCode::FAILURE
        }
    }
}
