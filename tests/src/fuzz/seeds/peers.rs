//! Seeds of what other machines say: frames, rosters, tokens, joining; and of what the router keeps of it.

use mesh_proto::machine::Machine;
use mesh_proto::placement::{Capacity, Copies, Wishes, plan};
use mesh_proto::stored::Stored;
use mesh_wire::buffer::Pool;
use mesh_wire::call::{Assignment, CallDraft, CallHead};
use mesh_wire::control::{
    CallRefused, Goodbye, Health, Hello, Loading, Placed, Placement, Probe, Probed, Refusal, Vitals,
};
use mesh_wire::frame::Op;
use mesh_wire::id::{ExpertKey, Slice};
use mesh_wire::message::Message;
use mesh_wire::payload::RowFormat;
use mesh_wire::reply::{ReplyHead, encode_sums};

use super::super::Verdict;
use super::super::cluster::{capacities, facts, members};
use super::super::trust::{ROSTER_HEAD_BYTES, cluster, roster_with, token_text};
use super::super::wire::control;
use super::Seed;

/// Longest body of zeros that is tried.
const ZEROS_MAX: usize = 512;

pub(super) fn seeds() -> Vec<Seed> {
    [frames(), zeros(), rosters(), tokens(), joins(), placements()].concat()
}

fn messages() -> Vec<(&'static str, Message)> {
    let hello = Hello {
        name: "k\u{f6}ln".into(),
        version: "0.1.0".into(),
        model: [9; 32],
        memory_bytes: 1 << 33,
        threads: 8,
        exact: true,
        kernels: "native avx512-vnni".into(),
        weight_mb_s: [1, 2, 3, 4, 5],
        held_epoch: 4,
        instance: u64::MAX,
    };
    let greedy = Hello { memory_bytes: u64::MAX, weight_mb_s: [u32::MAX; 5], ..hello.clone() };
    let vitals = Vitals {
        temperature_mc: Some(83_000),
        throttled: Some(true),
        power_mw: Some(4500),
        energy_mj: Some(1 << 40),
    };
    let odd = Vitals { temperature_mc: Some(i32::MAX), power_mw: Some(u32::MAX - 1), ..vitals };
    let slice = |layer, expert, from, to| Slice { key: ExpertKey { layer, expert }, from, to };
    let experts = vec![slice(0, 3, 0, 6), slice(1, 0, 2, 6), slice(1, 7, 0, 1)];
    let detail = "epoch 3, not 4".into();
    vec![
        ("hello", Message::Hello(hello)),
        ("placement", Message::Placement(Placement { epoch: 8, model: [1; 32], experts })),
        ("placed", Message::Placed(Placed { epoch: 8, weight_bytes: 99, refusal: "disk full".into() })),
        ("goodbye", Message::Goodbye(Goodbye { reason: "stopped by its operator".into() })),
        ("refused", Message::CallRefused(CallRefused { call: 9, refusal: Refusal::UnknownEpoch, detail })),
        ("probe", Message::Probe(Probe { id: 3, answer_bytes: 4, padding: vec![5; 6] })),
        ("probed", Message::Probed(Probed { id: 3, padding: vec![0; 4] })),
        ("health", Message::Health(Health { epoch: 8, calls: 9, vitals, ..Health::default() })),
        ("health-unbelievable", Message::Health(Health { vitals: odd, ..Health::default() })),
        ("loading", Message::Loading(Loading { done_bytes: 1, total_bytes: u64::MAX, peer_bytes: 2 })),
        ("hello-unbelievable", Message::Hello(greedy)),
        ("leaving", Message::Leaving),
        ("ping", Message::Ping(u64::MAX)),
        ("pong", Message::Pong(1)),
        ("roster", Message::Roster(roster_with(&[("a", 2)], &[]).bytes().to_vec())),
    ]
}

fn frames() -> Vec<Seed> {
    let pool = Pool::new(8 << 20);
    let mut seeds = Vec::new();
    let mut all = Vec::new();
    for (name, message) in messages() {
        let frame = message.encode(&pool).expect("it is within its limits");
        seeds.push(Seed::new("frame", name, frame.frame()));
        seeds.push(Seed::new("control", name, [&[frame.op() as u8][..], frame.body()].concat()));
        all.extend_from_slice(frame.frame());
    }
    for (name, format, hidden, rows) in [("int8", RowFormat::Int8, 40, 2), ("f32", RowFormat::F32, 33, 3)] {
        let assignments: Vec<_> = (0..rows).map(|row| Assignment::new(row, 1, 0.5)).collect();
        let head = CallHead { call: 7, step: 3, epoch: 5, budget_us: 20_000, layer: 2, format, hidden, rows };
        let mut draft = CallDraft::new(&pool, head, &assignments).expect("it is within its limits");
        draft.payload_mut().fill(17);
        let frame = draft.finish().into_buffer();
        seeds.push(Seed::new("call", name, frame.body()));
        seeds.extend(damaged("call", name, frame.body()));
        seeds.push(Seed::new("frame", &format!("call-{name}"), frame.frame()));
    }
    for (name, sums) in [("narrow", -3), ("wide", 1 << 20)] {
        let row = vec![sums; 33];
        let head = ReplyHead { call: 7, service_us: 12, hidden: 33 };
        let frame = encode_sums(&pool, head, &[Some(&row), None]).expect("it is within its limits");
        seeds.push(Seed::new("reply", name, frame.body()));
        seeds.extend(damaged("reply", name, frame.body()));
        seeds.push(Seed::new("frame", &format!("reply-{name}"), frame.frame()));
    }
    let cut = all.len() - 5;
    seeds.extend([
        Seed::new("frame", "cut", &all[..cut]),
        Seed::new("frame", "all", all),
        Seed::new("frame", "unknown-operation", [0_u8, 0, 0, 0, 0xff, 0x7f, 0, 0]),
        Seed::new("frame", "reserved-bits", [0_u8, 0, 0, 0, 22, 0, 1, 0]),
        Seed::new("frame", "four-gigabytes", [0xff_u8, 0xff, 0xff, 0xff, 2, 0, 0, 0]),
        Seed::new("frame", "above-its-cap", [1_u8, 4, 0, 0, 19, 0, 0, 0]),
        Seed::new("call", "nothing", ""),
        Seed::new("reply", "nothing", ""),
    ]);
    seeds
}

/// Cut, and with numbers of its archive, which is at the end, made as large as they can be.
fn damaged(target: &'static str, name: &str, body: &[u8]) -> Vec<Seed> {
    let large = |back: usize| {
        let mut body = body.to_vec();
        let at = body.len() - back;
        body[at..at + 4].fill(0xff);
        Seed::new(target, &format!("{name}-large-{back}"), body)
    };
    let cut = Seed::new(target, &format!("{name}-cut"), &body[..body.len() - 8]);
    [4, 8, 12, 24, 32].map(large).into_iter().chain([cut]).collect()
}

/// For each operation the shortest body of zeros that is a message, or a body that is none.
fn zeros() -> Vec<Seed> {
    let with = |op: Op, length: usize| [&[op as u8][..], &vec![0; length][..]].concat();
    let shortest =
        |op: Op| (0..ZEROS_MAX).step_by(4).find(|length| control(&with(op, *length)) == Verdict::Taken);
    let seed =
        |op: Op| Seed::new("control", &format!("zeros-{}", op as u16), with(op, shortest(op).unwrap_or(64)));
    Op::ALL.into_iter().map(seed).collect()
}

fn rosters() -> Vec<Seed> {
    let full = roster_with(&[("k\u{fc}che", 2), ("pi-4.local", 3)], &[("attic", 4)]);
    let empty = roster_with(&[], &[]);
    let tail = |bytes: &[u8]| bytes[ROSTER_HEAD_BYTES..bytes.len() - 64].to_vec();
    let raw = |name: &str, bytes: &[u8]| Seed::new("roster", name, [&[0][..], bytes].concat());
    let signed = |name: &str, tail: &[u8]| Seed::new("roster", name, [&[1][..], tail].concat());
    let replaced = |at: usize, bytes: &[u8]| {
        let mut tail = tail(full.bytes());
        tail[at..at + bytes.len()].copy_from_slice(bytes);
        tail
    };
    // Epoch 0..8, router 8..40, nodes' count 40..42, key 42..74, role 74, length 75, name from 76.
    vec![
        raw("whole", full.bytes()),
        raw("whole-empty", empty.bytes()),
        raw("cut", &full.bytes()[..200]),
        raw("none", b"moemesh-roster-1"),
        signed("signed", &tail(full.bytes())),
        signed("signed-empty", &tail(empty.bytes())),
        signed("epoch-0", &replaced(0, &[0; 8])),
        signed("last-epoch", &replaced(0, &[0xff; 8])),
        signed("the-routers-key", &replaced(42, &[1; 32])),
        signed("role-2", &replaced(74, &[2])),
        signed("name-acts-on-terminals", &replaced(76, b"\x1b[2J")),
        signed("many", &replaced(40, &[0xff, 0xff])),
        signed("left-over", &[&tail(full.bytes())[..], &[0]].concat()),
    ]
}

fn tokens() -> Vec<Seed> {
    let address_4 = [4, 192, 168, 1, 10, 0xad, 0x21];
    let address_6 = [&[6, 0xfd][..], &[0; 14], &[1, 0xad, 0x21]].concat();
    let head = [&[1][..], &1_800_000_000_u64.to_le_bytes(), &[7; 32], &[8; 16]].concat();
    let whole = [&head[..], &address_4, &address_6[..]].concat();
    let content = |name: &str, bytes: &[u8]| Seed::new("token", name, [&[1][..], bytes].concat());
    let text = |name: &str, text: &str| Seed::new("token", name, [&[0][..], text.as_bytes()].concat());
    let hex = |digit: &str| digit.repeat(64);
    let file = |lines: &str| format!("moemesh-tokens-1\n{lines}");
    let listed = |name: &str, lines: String| Seed::new("tickets", name, file(&lines));
    vec![
        content("content", &whole),
        content("no-address", &head),
        content("nine-addresses", &[&head[..], &address_4.repeat(9)[..]].concat()),
        content("role-2", &[&[2][..], &whole[1..]].concat()),
        content("family-5", &[&head[..], &[5, 0, 0]].concat()),
        text("text", &token_text(&whole)),
        text("wrapped", &format!(" {}\r\n", token_text(&whole).to_uppercase().replace('.', ". \n"))),
        text("damaged", &token_text(&whole).replace('a', "b")),
        text("version", "moemesh23.abc"),
        text("hello", "hello there"),
        listed("none", String::new()),
        listed("three", format!("{} 1 99 -\n{} 1 0 {}\n{} 2 5 -\n", hex("a"), hex("0"), hex("f"), hex("7"))),
        listed("key-with-signs", format!("{} 1 99 -\n", "+a".repeat(32))),
        listed("last-second", format!("{} 1 18446744073709551615 -\n", hex("b"))),
        listed("no-end", format!("{} 1 99 -", hex("c"))),
        listed("role-3", format!("{} 3 99 -\n", hex("d"))),
        listed("twice", format!("{} 1 99 -\n", hex("e")).repeat(2)),
        listed("short-key", "abc 1 99 -\n".to_owned()),
        listed("too-many", format!("{} 1 99 -\n", hex("a")).repeat(129)),
        Seed::new("tickets", "other", "moemesh-tokens-2\n"),
    ]
}

fn joins() -> Vec<Seed> {
    let seed = |name: &str, bytes: &[u8]| Seed::new("join", name, bytes);
    let said = |name: &str, mode: &[u8], text: &[u8]| seed(name, &[mode, text].concat());
    vec![
        seed("statement", &[0]),
        seed("statement-of-another-cluster", &[0, 0xff, 0xff, 20, 0, 1]),
        seed("statement-unsigned", &[0, 0xff, 0xff, 60, 0, 1]),
        seed("statement-cut", &[0, 50, 0]),
        seed("request", &[1]),
        seed("request-role", &[1, 0xff, 0xff, 16, 0, 3]),
        seed("request-token", &[1, 0xff, 0xff, 17, 0, 1]),
        seed("request-name", &[1, 0xff, 0xff, 113, 0, 1]),
        seed("request-cut", &[1, 50, 0]),
        said("signed", &[2, 1], b"pi-4.local"),
        said("signed-role", &[2, 2], b"pi"),
        said("signed-name", &[2, 1], b"a b\x1b"),
        said("signed-long-name", &[2, 1], &[b'x'; 64]),
        said("answer", &[3], b"moemesh-answer-1\n\0pi"),
        said("answer-used", &[3], b"moemesh-answer-1\n\x02"),
        said("answer-unknown", &[3], b"moemesh-answer-1\n\xff"),
        said("answer-no-name", &[3], b"moemesh-answer-1\n\0a\nb"),
    ]
}

fn placements() -> Vec<Seed> {
    let facts = facts();
    let nodes = capacities();
    let stored = |wishes: Wishes, nodes: &[Capacity]| {
        let plan = plan(&facts, nodes, &wishes, None);
        Stored { epoch: 41, plan }.to_text(&facts, &members())
    };
    let router = Machine { weight_mb_s: [9000; 5], ..Machine::default() };
    let cut = Wishes { copies: Copies::Auto, slices: true, router_experts: 2, router };
    let whole = stored(cut, &nodes);
    let seed = |name: &str, text: &str| Seed::new("placement", name, text);
    let key = cluster().public().to_hex();
    let stranger = whole.replacen("node ", &format!("node {key} 1 1 1 1 1 1 1 1\nnode "), 1);
    vec![
        seed("sliced", &whole),
        seed("two-copies", &stored(Wishes { copies: Copies::Exactly(2), ..Wishes::default() }, &nodes)),
        seed("nobody", &stored(Wishes::default(), &[])),
        seed("a-stranger-in-front", &stranger),
        seed("256-copies", &whole.replace("wishes 0", "wishes 256")),
        seed("all-large", &whole.replace("8000", &u64::MAX.to_string())),
        seed("last-epoch", &whole.replace("epoch 41", &format!("epoch {}", u64::MAX))),
        seed("cuts", &whole.replace("cuts ", "cuts 70")),
        seed("other-model", &whole.replace("0707", "0708")),
        seed("twice", &format!("{whole}{whole}")),
        seed("title", "moemesh placement 2\n"),
    ]
}
