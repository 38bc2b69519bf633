"""Scenarios of cables: partitions, loss, delay, wrong order, copies, turned bits, narrow links. Rows 7, 8, 10 to 13."""

import collections
import random
import threading
import time

from client import LONG_PROMPT, Story, speed
from cluster import Cluster, Shape
from oracles import Result
from registry import scenario
from trial import Fault, Lab, Trial, copies, run

# How long a degraded link is measured, at a time.
MEASURE_S = 3.0
MEBIBYTE_KIB = 1024
# docs/OPERATING.md: frames take at most this, on the router and on a node.
FRAMES_KIB = {"router": 256 * MEBIBYTE_KIB, "node": 128 * MEBIBYTE_KIB}


def healed(result: Result, trial: Trial | None, words: str, stall_ms: float) -> None:
    """What a cut cable cost: a stall of at most so much, and serving again within 3 s; nothing for a void trial."""
    if trial is None:
        return
    result.figure(f"{words}: stall {trial.stall_ms:.0f} ms, serving {trial.whole_s:.1f} s after healing")
    result.values[f"stall {words}"] = trial.stall_ms
    result.target_met(trial.stall_ms <= stall_ms, f"{words}: stall {trial.stall_ms:.0f} ms")
    result.target_met(trial.whole_s <= 3, f"{words}: serving after {trial.whole_s:.1f} s")


@scenario("7", "one node unplugged for 1 and 5 s", "stall <= 500 ms, serving <= 3 s after healing")
def partition(lab: Lab, result: Result) -> None:
    for seconds in (1.0, 5.0):
        cluster = lab.cluster(*copies(2))
        name = cluster.victim(lab.chance)
        trial = run(lab, cluster, result, Fault(lambda: lab.lan.unplug(name), lab.lan.heal, seconds))
        healed(result, trial, f"{seconds:g} s", 500)


@scenario("8", "one-way partitions", "O1, O2, stall <= 2 s, serving <= 3 s after healing")
def one_way(lab: Lab, result: Result) -> None:
    ways = {
        "node deaf": lambda name: lab.lan.deafen(name, "router"),
        "router deaf": lambda name: lab.lan.deafen("router", name),
        "router has no way there": lambda name: lab.lan.blackhole("router", name),
    }
    for words, strike in ways.items():
        cluster = lab.cluster()
        name = cluster.victim(lab.chance)
        trial = run(lab, cluster, result, Fault(lambda: strike(name), lab.lan.heal, 4.0))
        healed(result, trial, words, 2000)


@scenario(
    "10", "packets lost on every node's cable", "O1, >= 80 % of the speed at 1 %, >= 40 % at 5 %; 50 % for 1 s survived"
)
def loss(lab: Lab, result: Result) -> None:
    # A step of the story model takes 2 ms, and a lost packet costs more than that however it is repeated. So the nodes are
    # held to a pace at which a step takes some 20 ms, as those of models worth a mesh do.
    cluster = lab.cluster(shape=Shape(node=("--pace-gb-s", "0.08"), tokens=60))
    for share, floor, seconds in (
        (0.01, 0.8, MEASURE_S),
        (0.05, 0.4, MEASURE_S),
        (0.2, 0.0, MEASURE_S),
        (0.5, 0.0, 1.0),
    ):
        dropped = 0

        def strike(share: float = share) -> None:
            for name in cluster.names:
                lab.lan.lose(name, "router", share)

        def happened() -> bool:
            nonlocal dropped
            dropped = lab.lan.dropped()
            return dropped > 0

        trial = run(lab, cluster, result, Fault(strike, lab.lan.heal, seconds, happened))
        if trial is None:
            continue
        kept = speed(trial.stories, trial.began, trial.healed) / trial.speed_before
        result.figure(
            f"{share:.0%}: {kept:.0%} of {trial.speed_before:.0f} tok/s, {dropped} lost, {trial.failed_calls()} failed calls, whole {trial.whole_s:.1f} s after"
        )
        if fallbacks := trial.counters["fallbacks"]:
            # The router is not held to a pace: what it computes itself it computes faster than the nodes.
            result.figure(f"{share:.0%}: the router computed {fallbacks} calls itself")
        result.values[f"kept_{share:g}"] = kept
        result.target_met(kept >= floor, f"{share:.0%}: {kept:.0%} of the speed, less than {floor:.0%}")


@scenario("11", "delay, jitter, wrong order, copies", "O1, O2, O3")
def delay(lab: Lab, result: Result) -> None:
    settings = [
        {"delay_ms": 1.0},
        {"delay_ms": 10.0, "jitter_ms": 5.0},
        {"delay_ms": 50.0, "jitter_ms": 25.0},
        {"delay_ms": 1.0, "jitter_ms": 1.0, "reorder": 0.2},
        {"delay_ms": 1.0, "duplicate": 0.1},
        {"delay_ms": 1.0, "jitter_ms": 1.0, "reorder": 0.1, "duplicate": 0.5},
    ]
    cluster = lab.cluster()
    for number, faults in enumerate(settings):
        trial = bent(lab, cluster, result, dict.fromkeys(cluster.names, faults), number)
        if trial:
            words = ", ".join(f"{value:g} {what.removesuffix('_ms')}" for what, value in faults.items())
            during = speed(trial.stories, trial.began + 0.3, trial.healed)
            after = f"{trial.failed_calls()} failed calls, {trial.counters['fallbacks']} fallbacks"
            result.figure(f"{words}: {during:.0f} of {trial.speed_before:.0f} tok/s, {after}")
            result.values[words] = during


@scenario("11b", "drawn cables: delay, loss, copies, order, bits, each other", "O1, O2, O3 with every seed")
def drawn_cables(lab: Lab, result: Result) -> None:
    cluster = lab.cluster()
    seeds = []
    for number in range(lab.few(10)):
        seed = lab.options.seed * 1000 + number
        draw = random.Random(seed)
        faults = {name: drawn(draw) for name in cluster.names}
        trial = bent(lab, cluster, result, faults, seed)
        seeds.append(seed)
        if result.o1.broken or result.o2.broken or result.o3.broken or trial is None:
            result.missed.append(f"seed {seed}: {faults}")
            break
    result.figure(f"{result.runs} draws, seeds {seeds[0]} to {seeds[-1]}", seeds=seeds)


def drawn(draw: random.Random) -> dict[str, float]:
    """A cable with some of all faults, within what TigerBeetle's simulator draws (loss to 30 %, copies to 50 %)."""
    delay = draw.choice((0.0, 0.2, 1.0, 5.0, 20.0))
    faults = {
        "delay_ms": delay,
        "jitter_ms": delay * draw.random(),
        "loss": draw.choice((0.0, 0.0, 0.02, 0.3 * draw.random())),
    }
    return faults | {
        "duplicate": draw.choice((0.0, 0.5 * draw.random())),
        "reorder": draw.choice((0.0, 0.3 * draw.random())),
        "flip": draw.choice((0.0, 0.0, 0.01)),
    }


def bent(lab: Lab, cluster: Cluster, result: Result, faults: dict[str, dict[str, float]], seed: int) -> Trial | None:
    """A trial with a relay in the cable of each of these machines."""
    seen: collections.Counter[str] = collections.Counter()

    def strike() -> None:
        for index, (name, cable) in enumerate(faults.items()):
            lab.lan.bend(name, **cable, seed=seed * 10 + index)

    def happened() -> bool:
        for name in faults:
            seen.update(lab.lan.relays[name].counters())
        return seen["carried"] > 0

    trial = run(lab, cluster, result, Fault(strike, lab.lan.heal, MEASURE_S, happened))
    if trial:
        for name, count in seen.items():
            result.values[name] = result.values.get(name, 0) + count
    return trial


@scenario("12", "bits turned in datagrams, checksums right", "O1; nothing bent is accepted")
def bits(lab: Lab, result: Result) -> None:
    cluster = lab.cluster()
    for share, seconds in ((1e-4, 12.0), (1e-2, MEASURE_S)):
        flipped = 0

        def strike(share: float = share) -> None:
            for index, name in enumerate(cluster.names):
                lab.lan.bend(name, flip=share, seed=lab.options.seed * 10 + index)

        def happened() -> bool:
            nonlocal flipped
            flipped = sum(relay.counters()["flipped"] for relay in lab.lan.relays.values())
            return flipped > 0

        trial = run(lab, cluster, result, Fault(strike, lab.lan.heal, seconds, happened))
        if trial is None:
            continue
        rejected = trial.counters["rejected"]
        result.figure(f"{share:g}: {flipped} bent, {rejected} replies rejected, {trial.failed_calls()} failed calls")
        result.target_met(rejected == 0, f"{share:g}: {rejected} bent replies got as far as us")


@scenario("13", "links of 10, 100 and 1000 Mbit/s", "O1; memory within the documented frames; recovers")
def narrow(lab: Lab, result: Result) -> None:
    cluster = lab.cluster()
    for megabits in (10, 100, 1000):
        peak: dict[str, int] = {}
        told: list[Story] = []

        def strike(megabits: int = megabits) -> None:
            for name in cluster.names:
                lab.lan.slow_down(name, megabits)

        def watch() -> bool:
            # A long prompt beside the streams: its calls are a thousand times as large as theirs.
            asking = threading.Thread(target=lambda: told.append(cluster.client.tell(LONG_PROMPT, 4)))
            asking.start()
            while asking.is_alive():
                for machine, use in cluster.footprints().values():
                    peak[machine] = max(peak.get(machine, 0), use.memory_kib)
                asking.join(0.02)
            told[-1].compare(lab.program.told(LONG_PROMPT, 4))
            return True

        began = time.monotonic()
        trial = run(lab, cluster, result, Fault(strike, lab.lan.heal, MEASURE_S, watch))
        result.judge(told)
        if trial is None:
            continue
        for pid, (machine, _) in cluster.footprints().items():
            budget = lab.baseline[pid].memory_kib + FRAMES_KIB["router" if machine == "router" else "node"]
            result.target_met(
                peak.get(machine, 0) <= budget, f"{megabits} Mbit/s: {machine} took {peak.get(machine, 0)} KiB"
            )
        during = speed(trial.stories, trial.began, trial.healed)
        highest = max(peak.values(), default=0) / MEBIBYTE_KIB
        result.figure(
            f"{megabits}: {during:.0f} of {trial.speed_before:.0f} tok/s, peak {highest:.0f} MiB, {trial.failed_calls()} failed calls"
        )
        result.values[f"tok_s_{megabits}"] = during
        result.values[f"seconds_{megabits}"] = time.monotonic() - began
