//! Seeds that are programs of steps: what nodes do, what happens to the experts on a disk, claims of machines on the LAN.

use super::super::store::LENGTHS;
use super::Seed;

pub(super) fn seeds() -> Vec<Seed> {
    [clusters(), stores(), discoveries()].concat()
}

/// Memory for everything (34 GB), and speeds as `cluster` reads them.
const MUCH: u8 = 130;
const FAST: u8 = 5;

/// 16 and 65 seconds, and a quarter of an hour.
const SHORT: u8 = 5;
const LONG: u8 = 17;
const LONGEST: u8 = 221;

const TICK: [u8; 3] = [15, 0, SHORT];
const PLANNED: [u8; 2] = [11, 0];

/// Joins with much memory, and holds what it was asked for before.
fn join(node: u8) -> [u8; 6] {
    [0, node, 0, MUCH, FAST, FAST]
}

fn lost(node: u8) -> [u8; 2] {
    [1, node]
}

/// Has loaded what it was asked for.
fn placed(node: u8) -> [u8; 3] {
    [2, node, 0]
}

/// Two nodes that serve; a plan was made for both.
fn two() -> Vec<u8> {
    [&join(0)[..], &join(1), &PLANNED, &placed(0), &placed(1), &TICK].concat()
}

fn clusters() -> Vec<Seed> {
    // Planned for at two nodes.
    let story = |name: &str, policy: u8, steps: &[&[u8]]| {
        Seed::new("cluster", name, [&[policy | 1, 0][..], &steps.concat()].concat())
    };
    let restarted =
        |name: &str, steps: &[&[u8]]| Seed::new("cluster", name, [&[1, 7][..], &steps.concat()].concat());
    let two = two();
    let again = [&PLANNED[..], &placed(0), &placed(1), &placed(2), &TICK].concat();
    let third = [&join(2)[..], &TICK, &TICK, &again].concat();
    let holds = |node: u8, epoch: u8| [0, node, 32, MUCH, FAST, FAST, epoch << 2];
    let used = [12_u8, 0, 0, 9, 200, 200, 201, 0, 250].repeat(10);
    let slow = [14, 2, 1, 40, 80, 0, 15, 0, LONGEST, 14, 2, 1, 44, 80, 4, 15, 0, LONGEST];
    let hot = [3, 1, 24, 21, 0];
    vec![
        story("two-serve", 0, &[&two]),
        story("a-third-joins", 0, &[&two, &third]),
        story("copies-and-slices", 16 | 32 | 64, &[&two, &third]),
        story("one-is-lost", 16, &[&two, &third, &lost(1), &[15, 0, LONG], &again, &join(1), &TICK]),
        story("one-leaves", 0, &[&two, &third, &[8, 0], &again, &[15, 0, LONG], &TICK, &lost(0)]),
        story("one-lies", 0, &[&two, &[7, 1], &PLANNED, &placed(0), &[13, 1, 0], &TICK, &third]),
        story("one-is-broken", 0, &[&two, &[6_u8, 1].repeat(3), &PLANNED, &placed(0), &lost(1), &join(1)]),
        story(
            "one-refuses",
            0,
            &[&join(0), &join(1), &PLANNED, &placed(0), &[2, 1, 16], &PLANNED, &[10, 0], &third],
        ),
        story("one-is-silent", 0, &[&two, &[5_u8, 1].repeat(6), &[4, 1, 4, FAST, FAST], &TICK, &hot, &TICK]),
        story("one-is-revoked", 0, &[&two, &[13, 1, 7], &PLANNED, &placed(0), &join(1)]),
        story(
            "one-flaps",
            0,
            &[&two, &[lost(1).to_vec(), join(1).to_vec(), placed(1).to_vec()].concat().repeat(8), &TICK],
        ),
        story(
            "some-are-popular",
            0,
            &[&two, &used, &[15, 0, LONGEST], &PLANNED, &placed(0), &placed(1), &TICK],
        ),
        story(
            "links-are-measured",
            32,
            &[&join(0), &[9, 0, 255, 4], &join(1), &[9, 1, 4, 255], &again, &[10, 0], &again],
        ),
        story("a-plan-comes-twice", 0, &[&two, &[10, 0], &[11, 5], &[11, 5], &placed(0), &placed(1)]),
        story(
            "a-stranger",
            0,
            &[&two, &[0, 5, 0, MUCH, FAST, FAST], &[2, 5, 0], &[7, 5], &[14, 0, 0], &join(3), &TICK],
        ),
        story("another-model", 0, &[&two, &[0, 2, 15, MUCH, FAST, FAST], &TICK]),
        story("other-kernels", 4, &[&two, &[0, 2, 16, MUCH, FAST, FAST], &TICK]),
        story(
            "the-largest-epoch",
            0,
            &[&[0, 0, 32, MUCH, FAST, FAST, 254], &join(1), &again, &lost(1), &join(1)],
        ),
        story("beyond-the-largest-epoch", 0, &[&two, &[0, 2, 32, MUCH, FAST, FAST, 255], &TICK]),
        story(
            "one-loads-slowly",
            0,
            &[&two, &join(2), &TICK, &PLANNED, &placed(0), &slow, &TICK, &slow, &[1, 1], &again],
        ),
        story("claims", 0, &[&[0, 0, 0, 255, 255, 255], &[0, 1, 0, 0, 0, 0], &again]),
        restarted(
            "they-come-back",
            &[&holds(0, 7), &holds(1, 7), &placed(0), &placed(1), &TICK, &[15, 0, LONG], &again],
        ),
        restarted("older-than-what-they-hold", &[&holds(0, 7), &holds(1, 9), &placed(0), &placed(1), &third]),
    ]
}

fn stores() -> Vec<Seed> {
    let experts = LENGTHS.len() as u8;
    let leave = |expert: u8, way: u8| [0, expert + experts * way];
    let restart = [1, 0];
    let place = |bits: u8| [2, bits];
    let receive = |expert: u8, whole: bool, way: u8| [if whole { 3 } else { 9 }, expert + experts * way];
    let read = |expert: u8| [4, expert];
    let lend = |expert: u8, way: u8| [5, expert + experts * way];
    let seed = |name: &str, steps: &[[u8; 2]]| Seed::new("store", name, steps.concat());
    let rotten =
        |way: u8| [leave(2, way), place(4), read(2), receive(2, true, 3), read(2), restart, lend(2, 4)];
    let mut seeds = vec![
        seed("fetched", &[place(5), receive(0, true, 1), receive(2, true, 9), read(0), read(2), lend(2, 9)]),
        seed("goes-on", &[place(16), receive(4, false, 5), restart, place(16), receive(4, true, 7), read(4)]),
        seed("wrong-at-the-end", &[place(16), receive(4, true, 1), receive(4, true, 2), read(4)]),
        seed(
            "makes-room",
            &[
                place(20),
                receive(4, true, 2),
                receive(2, true, 2),
                restart,
                place(32),
                receive(5, true, 3),
                read(4),
            ],
        ),
        seed("too-much", &[place(63), place(0), lend(3, 0)]),
        seed("absent", &[read(1), lend(1, 1)]),
        seed("nothing", &[]),
    ];
    let names = [
        "whole",
        "flipped",
        "short",
        "long",
        "part",
        "part-flipped",
        "part-long",
        "capitals",
        "part-of-a-part",
        "folder",
    ];
    seeds.extend((0..).zip(names).map(|(way, name)| seed(&format!("left-{name}"), &rotten(way))));
    seeds
}

fn discoveries() -> Vec<Seed> {
    let seed =
        |name: &str, mode: u8, bytes: &[u8]| Seed::new("discovery", name, [&[mode][..], bytes].concat());
    let text = |name: &str, text: &str| seed(name, 3, text.as_bytes());
    let answer = [&[7; 32][..], &[1, 0xad, 0x21, 5], b"0.1.0"].concat();
    let with = |at: usize, byte: u8| {
        let mut wrong = answer.clone();
        wrong[at] = byte;
        wrong
    };
    let peer = "12D3KooWEyoppNCUx8Yx66oV9fJnriXwCcXwDDUA2kj6vnc6iDEp";
    let crowd: Vec<u8> = (0..100).flat_map(|host| [host, host % 3, 70, host / 9]).collect();
    vec![
        seed("question", 0, b""),
        seed("question-with-words", 0, b"x"),
        seed("answer", 1, &answer),
        seed("answer-cut", 1, &answer[..20]),
        seed("answer-role", 1, &with(32, 3)),
        seed("answer-length", 1, &with(35, 6)),
        seed("answer-acts-on-terminals", 1, &with(36, 0x1b)),
        seed("answer-long", 1, &[&answer[..], &[b'9'; 60]].concat()),
        seed("address-bytes", 2, &[4, 10, 0, 0, 1, 6, 0x21, 0xae]),
        seed("address-bytes-cut", 2, &[4, 10, 0]),
        text("address", &format!("/ip4/10.0.0.1/tcp/8622/p2p/{peer}")),
        text("address-6", "/ip6/fd00::1/tcp/1"),
        text("address-anywhere", "/ip4/0.0.0.0/tcp/1"),
        text("address-relay", &format!("/ip4/10.0.0.1/tcp/1/p2p/{peer}/p2p-circuit")),
        text("address-name", "/dns4/evil.example/tcp/80"),
        seed("claims", 4, &crowd),
        seed("claims-of-one", 4, &[1_u8, 1, 255, 1].repeat(40)),
    ]
}
