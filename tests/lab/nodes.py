"""Scenarios of nodes that die, hang, are slow, leave or come back: rows 1 to 5, 9, 16 and 18 of the matrix."""

import math
import signal
import statistics
import time
from dataclasses import dataclass, field

from client import Outcome, gaps_after, longest_gap, speed, typical_gap
from cluster import Cluster
from oracles import Result, quantile, spread
from registry import scenario
from trial import FLOWS_WITHIN_S, STREAMS, Fault, Lab, copies, ordinary_loss, run

# Between a kill and the restart: longer than the longest budget of a call and its retry, so that what the router does
# without the node is seen, too.
WITHOUT_S = 0.5
NO_FALLBACK = ("--no-fallback",)
# Of one cluster: the third loss within a minute makes a node one that flaps.
KILLS_PER_NODE = 2
# Kills between two running accounts of many.
TELL_EVERY = 50
# Target F1.
STALL_MS_MAX = 400.0


@scenario(
    "1", "kill -9, a replica on another node, none on the router", "O1 of all kills, added stall p99 <= 400 ms (F1)"
)
def kill_with_replica(lab: Lab, result: Result) -> None:
    measured_kills(lab, (*copies(2), *NO_FALLBACK), result, lab.options.kills)


@scenario(
    "1b", "kill -9, a replica on another node and one on the router", "O1 of all kills, added stall p99 <= 400 ms"
)
def kill_with_replica_and_copy(lab: Lab, result: Result) -> None:
    measured_kills(lab, copies(2), result, max(1, lab.options.kills // 5))


@dataclass
class Kills:
    """What came of kills, one entry per kill that hit: added stalls and times until a new process serves, in ms."""

    stalls: list[float] = field(default_factory=list)
    restarts: list[float] = field(default_factory=list)
    # Kills during which every story was the right one and whole; calls that the router computed itself.
    same: int = 0
    fallbacks: int = 0
    usual_ms: float = 0.0

    def add(self, other: "Kills") -> None:
        self.stalls += other.stalls
        self.restarts += other.restarts
        self.same += other.same
        self.fallbacks += other.fallbacks
        self.usual_ms = other.usual_ms

    def tell(self, result: Result) -> None:
        """The figures so far, instead of those before."""
        result.figures.clear()
        count = len(self.stalls)
        result.figure(
            f"{self.same} of {count} kills with the same text; added stall {spread(self.stalls)}", stalls_ms=self.stalls
        )
        again = f"serves {spread(self.restarts)} after its restart"
        result.figure(
            f"{again}; {self.fallbacks} fallbacks; typical gap {self.usual_ms:.1f} ms", restarts_ms=self.restarts
        )

    def judge(self, result: Result) -> None:
        """F1."""
        wrong = len(self.stalls) - self.same
        result.target_met(not wrong, f"{wrong} kills with another text or a failed request")
        late = quantile(self.stalls, 0.99)
        result.target_met(late <= STALL_MS_MAX, f"added stall p99 {late:.0f} ms")


def measured_kills(lab: Lab, flags: tuple[str, ...], result: Result, count: int) -> None:
    """Kills, and F1. A node that is lost three times within a minute is kept out for a while, on purpose, so every
    node dies twice, and then the next cluster begins. What was found until then stands if somebody interrupts."""
    all_of_them, told = Kills(), 0
    try:
        while len(all_of_them.stalls) < count and result.void <= count:
            cluster = lab.fresh(*flags)
            some = min(count - len(all_of_them.stalls), KILLS_PER_NODE * len(cluster.names))
            seen = kills(lab, cluster, result, some)
            if not seen.stalls:
                break
            all_of_them.add(seen)
            all_of_them.tell(result)
            lab.progress(f"{len(all_of_them.stalls)} of {count} kills, stall {spread(all_of_them.stalls)}")
            if len(all_of_them.stalls) // TELL_EVERY > told:
                told = len(all_of_them.stalls) // TELL_EVERY
                for words in result.figures:
                    lab.progress(f"    {words}")
                lab.interim(result)
    finally:
        if all_of_them.stalls:
            all_of_them.judge(result)


def kills(lab: Lab, cluster: Cluster, result: Result, count: int) -> Kills:
    """Kills nodes one after another while streams run."""
    windows: list[tuple[float, float]] = []
    found = Kills()
    first = cluster.counters()
    with lab.load(cluster) as stories:
        while len(windows) < count and result.void <= count:
            result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still before the kill")
            time.sleep(lab.chance.uniform(0.0, 0.2))
            name = cluster.victim(lab.chance)
            before = cluster.counters()
            flowing = lab.tellers.flowing(FLOWS_WITHIN_S)
            killed = cluster.nodes[name].kill()
            time.sleep(WITHOUT_S)
            moving = lab.tellers.flowing(FLOWS_WITHIN_S)
            restarted = time.monotonic()
            cluster.start_node(name)
            cluster.until(f"{name} serves again", lambda name=name: cluster.serves(name), 30)
            back = time.monotonic()
            # The next one to die must not be the last that serves.
            lab.whole(cluster)
            after = cluster.counters()
            hit = any(after[what] > before[what] for what in ("late", "gone", "hedges", "retries", "fallbacks"))
            result.o2.ask(moving, f"a stream stands still after the kill of {name}")
            if not (flowing and hit):
                result.void += 1
                continue
            result.runs += 1
            windows.append((killed, back))
            found.restarts.append((back - restarted) * 1e3)
        time.sleep(0.3)
    result.judge(stories)
    lab.check_footprints(cluster, result)
    usual = typical_gap(stories[: 4 * len(lab.tellers.tellers)])
    for killed, back in windows:
        near = [story for story in stories if story.began < back and story.ended > killed]
        found.stalls.append(max(0.0, longest_gap(near, killed, back) - usual) * 1e3)
        found.same += all(story.right and story.outcome is Outcome.COMPLETE for story in near)
    found.usual_ms, found.fallbacks = usual * 1e3, cluster.counters()["fallbacks"] - first["fallbacks"]
    return found


@scenario("2", "kill -9, sole holder, the router steps in", "O1, first stall <= 2 s (F2)")
def kill_sole_holder(lab: Lab, result: Result) -> None:
    cluster = lab.fresh(*copies(1))
    seen = kills(lab, cluster, result, 5)
    if not seen.stalls:
        return
    seen.tell(result)
    worst = max(seen.stalls)
    result.target_met(seen.fallbacks > 0, "the router never stepped in")
    result.target_met(seen.same == len(seen.stalls), f"{len(seen.stalls) - seen.same} kills with another text")
    result.target_met(worst <= 2000, f"stall {worst:.0f} ms > 2 s")


@scenario("2b", "kill -9, sole holder, no copy anywhere", "named 503 or error event <= 2 s, back <= 10 s")
def kill_sole_holder_without_copy(lab: Lab, result: Result) -> None:
    cluster = lab.cluster(*copies(1), *NO_FALLBACK)
    answers: list[tuple[float, int, bytes]] = []
    name = cluster.victim(lab.chance)
    killed = 0.0

    def strike() -> None:
        nonlocal killed
        killed = cluster.nodes[name].kill()

    def ask_without() -> bool:
        began = time.monotonic()
        status, body = cluster.client.ask("POST", "/v1/completions", {"prompt": "The", "max_tokens": 4})
        answers.append((time.monotonic() - began, status, body))
        return True

    trial = run(lab, cluster, result, Fault(strike, lambda: None, 2.5, ask_without), refused=True)
    if trial is None:
        return
    ends = [story.ended - trial.began for story in trial.stories if story.began < killed < story.ended]
    refused = [story for story in trial.stories if story.outcome is Outcome.REFUSED]
    result.target_met(bool(refused), "no request was refused")
    result.target_met(max(ends, default=0) <= 2, f"an error came after {max(ends, default=0):.1f} s")
    unnamed = [story.error for story in refused if "expert" not in story.error]
    result.target_met(not unnamed, f"an error names no expert: {unnamed[:1]}")
    seconds, status, body = answers[-1]
    result.target_met(
        status == 503 and b"expert" in body and seconds <= 2,
        f"while gone: {status} after {seconds:.1f} s: {body[:200]!r}",
    )
    result.target_met(trial.whole_s <= 10, f"back after {trial.whole_s:.1f} s")
    result.figure(
        f"errors within {max(ends, default=0):.2f} s, {len(refused)} refused, back {trial.whole_s:.2f} s after restart"
    )
    return None


@scenario("3", "kill -9 and restart at once, same address", "noticed <= 200 ms, serves <= 2 s")
def restart(lab: Lab, result: Result) -> None:
    noticed, served, stalls = [], [], []
    for _ in range(lab.few(5)):
        cluster = lab.cluster()
        name = cluster.victim(lab.chance)

        def strike(cluster: Cluster = cluster, name: str = name) -> None:
            before = cluster.node(name)["connections"]
            cluster.nodes[name].kill()
            began = time.monotonic()
            cluster.start_node(name)
            cluster.until("a new connection", lambda: cluster.node(name)["connections"] > before, 30)
            noticed.append((time.monotonic() - began) * 1e3)
            cluster.until("it serves", lambda: cluster.serves(name), 30)
            served.append((time.monotonic() - began) * 1e3)

        trial = run(lab, cluster, result, Fault(strike, lambda: None, 0.2))
        if trial:
            stalls.append(trial.stall_ms)
    result.figure(
        f"new connection {spread(noticed)}; serves {spread(served)}; stall {spread(stalls)}",
        noticed_ms=noticed,
        served_ms=served,
    )
    # From the start of the new process, less what the program takes to begin: before it speaks there is nothing to notice.
    late = quantile(noticed, 0.5) - lab.program.begins_ms
    result.target_met(
        late <= 200,
        f"noticed {late:.0f} ms after the new process had begun (which takes {lab.program.begins_ms:.0f} ms)",
    )
    result.target_met(max(served, default=0) <= 2000, f"served after {max(served, default=0):.0f} ms")


@scenario("4", "SIGSTOP for 0.2, 2 and 10 s", "O1, serving <= 3 s after SIGCONT")
def stopped(lab: Lab, result: Result) -> None:
    for seconds in (0.2, 2.0, 60.0 if lab.options.long else 10.0):
        cluster = lab.cluster()
        name = cluster.victim(lab.chance)
        node = cluster.nodes[name]
        fault = Fault(lambda: node.signal(signal.SIGSTOP), lambda: node.signal(signal.SIGCONT), seconds)
        trial = run(lab, cluster, result, fault)
        if trial is None:
            continue
        used_s = used_again(lab, cluster, name, 35)
        stale = trial.counters.get("stale", 0)
        result.figure(
            f"{seconds:g} s: stall {trial.stall_ms:.0f} ms, serving {trial.whole_s:.1f} s after, {stale} stale, {ordinary_loss(trial.counters)}"
        )
        result.values[f"stall_{seconds:g}s_ms"] = trial.stall_ms
        result.target_met(trial.whole_s <= 3, f"{seconds:g} s: serving after {trial.whole_s:.1f} s")
        result.target_met(used_s is not None, f"{seconds:g} s: no more calls for {name}")


def used_again(lab: Lab, cluster: Cluster, name: str, seconds: float) -> float | None:
    """How long it takes until calls to a node are answered again, under load; `None` if they are not."""
    began, before = time.monotonic(), cluster.node(name)["calls"]
    with lab.load(cluster, 1) as _:
        while time.monotonic() < began + seconds:
            if cluster.node(name)["calls"] > before:
                return time.monotonic() - began
            time.sleep(0.02)
    return None


@scenario("5", "one node with 10 % of a core", "token latency <= 1.5 x within 20 tokens, hedges <= 5 % of calls")
def slow_node(lab: Lab, result: Result) -> None:
    cluster = lab.cluster(*copies(2))
    name = cluster.victim(lab.chance)
    pid = cluster.nodes[name].popen.pid
    lasts = 6.0
    fault = Fault(lambda: lab.lan.throttle(name, pid, 0.1), lambda: lab.lan.unthrottle(name), lasts, lambda: True)
    trial = run(lab, cluster, result, fault)
    if trial is None:
        return
    usual = STREAMS / trial.speed_before
    soon = statistics.median(gaps_after(trial.stories, trial.began, 20, 60) or [math.inf]) / usual
    later = trial.speed_before / max(speed(trial.stories, trial.began + 2.0, trial.healed), 1e-9)
    calls, hedges = trial.counters.get("calls", 0), trial.counters.get("hedges", 0)
    result.figure(
        f"{soon:.1f} x the latency from the 20th token on, {later:.1f} x after 2 s; stall {trial.stall_ms:.0f} ms"
    )
    result.figure(f"{hedges} hedges of {calls} calls, {ordinary_loss(trial.counters)}", soon=soon, later=later)
    result.target_met(soon <= 1.5 and later <= 1.5, f"latency {max(soon, later):.1f} x")
    result.target_met(hedges <= 0.05 * calls, f"{hedges} hedges of {calls} calls")


@scenario("9", "two of three nodes cut off", "O1, stall <= 2 s; whole <= 5 s after healing")
def majority_cut(lab: Lab, result: Result) -> None:
    cluster = lab.cluster(*copies(1))
    pair = cluster.names[:2]

    def strike() -> None:
        for name in pair:
            lab.lan.unplug(name)

    trial = run(lab, cluster, result, Fault(strike, lab.lan.heal, 5.0))
    if trial is None:
        return
    without = speed(trial.stories, trial.began + 2.0, trial.healed)
    result.figure(
        f"stall {trial.stall_ms:.0f} ms; {trial.speed_before:.0f} -> {without:.0f} tok/s; whole {trial.whole_s:.1f} s after healing",
        stall_ms=trial.stall_ms,
    )
    result.target_met(trial.stall_ms <= 2000, f"stall {trial.stall_ms:.0f} ms")
    result.target_met(trial.whole_s <= 5, f"whole after {trial.whole_s:.1f} s")


@scenario(
    "9b", "two of three nodes cut off, no copy anywhere", "503 at once, bounded queue, whole <= 5 s after healing"
)
def majority_cut_without_copy(lab: Lab, result: Result) -> None:
    cluster = lab.cluster(*copies(1), *NO_FALLBACK)
    waiting: list[int] = []
    times: list[float] = []

    def strike() -> None:
        for name in cluster.names[:2]:
            lab.lan.unplug(name)

    def look() -> bool:
        for _ in range(10):
            began = time.monotonic()
            status, body = cluster.client.ask("POST", "/v1/completions", {"prompt": "The", "max_tokens": 4})
            times.append(time.monotonic() - began)
            result.target_met(status == 503 and b"expert" in body, f"while cut off: {status}: {body[:200]!r}")
            waiting.append(cluster.state()["router"]["waiting"])
        return True

    trial = run(lab, cluster, result, Fault(strike, lab.lan.heal, 4.0, look), refused=True)
    if trial is None:
        return None
    result.figure(
        f"503 within {max(times) * 1e3:.0f} ms; at most {max(waiting)} waited; whole {trial.whole_s:.1f} s after healing"
    )
    result.target_met(max(times) <= 0.5, f"503 after {max(times):.1f} s")
    result.target_met(trial.whole_s <= 5, f"whole after {trial.whole_s:.1f} s")
    return None


@scenario("16", "SIGTERM and restart of every node in turn", "0 failed requests, 0 failed calls, each gone <= 10 s")
def rolling_restart(lab: Lab, result: Result) -> None:
    cluster = lab.cluster(*copies(2))
    gone, served, before = [], [], cluster.counters()
    with lab.load(cluster) as stories:
        for name in cluster.names:
            result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), f"a stream stands still before {name} leaves")
            asked = time.monotonic()
            status = cluster.nodes[name].stop(20)
            gone.append(time.monotonic() - asked)
            result.target_met(status == 0, f"{name} ended with {status}")
            if status is None:
                cluster.nodes[name].kill()
            time.sleep(WITHOUT_S)
            started = time.monotonic()
            cluster.start_node(name)
            cluster.until(f"{name} serves", lambda name=name: cluster.serves(name), 30)
            served.append(time.monotonic() - started)
            time.sleep(WITHOUT_S)
            result.runs += 1
        end = time.monotonic()
    result.judge(stories)
    lab.check_footprints(cluster, result)
    after = cluster.counters()
    delta = {name: after[name] - before[name] for name in after}
    failed = sum(delta.get(name, 0) for name in ("late", "gone", "refused", "rejected"))
    began = min(story.began for story in stories)
    stall = (longest_gap(stories, began, end) - typical_gap(stories)) * 1e3
    result.figure(
        f"gone in {max(gone):.2f} s, serves again in {max(served):.2f} s, stall {stall:.0f} ms, {failed} failed calls ({ordinary_loss(delta)})",
        stall_ms=stall,
    )
    result.target_met(max(gone) <= 10, f"drained for {max(gone):.1f} s")
    result.target_met(failed == 0, f"{failed} calls failed: a node that leaves in order fails none")


@scenario("18", "kill -9 of the router", "clients see the end, nodes come back, serves <= 5 s")
def router_killed(lab: Lab, result: Result) -> None:
    cluster = lab.cluster()
    samples = lab.program.weight_samples()
    before = {name: (node.popen.pid, node.held(samples)) for name, node in cluster.nodes.items()}
    with lab.load(cluster) as stories:
        flowed = lab.tellers.flowing(FLOWS_WITHIN_S)
        time.sleep(lab.chance.uniform(0.3, 0.6))
        killed = cluster.router.kill()
        time.sleep(1.0)
        started = time.monotonic()
        cluster.router = cluster.start_router()
        cluster.router.announced("ready")
        cluster.until("all nodes serve", lambda: len(cluster.serving()) == len(cluster.names), 40)
        ready = time.monotonic() - started
        flows_again = lab.tellers.flowing(5.0)
        time.sleep(1.0)
    cut = [
        story for story in stories if story.outcome is Outcome.CUT and story.began < killed and story.ended >= killed
    ]
    if not (flowed and cut):
        result.void += 1
        return
    result.runs += 1
    result.judge(stories, cut=True, refused=True)
    result.target_met(max(story.ended for story in cut) - killed <= 0.5, "a client learned of it after more than 0.5 s")
    result.o2.ask(flows_again, "no stream after the restart")
    held, kept = 0, 0
    for name, (pid, places) in before.items():
        alive = cluster.nodes[name].alive and cluster.nodes[name].popen.pid == pid
        result.target_met(alive, f"{name} did not live through it")
        after = cluster.nodes[name].held(samples) if alive else {}
        held += len(places)
        kept += sum(after.get(number) == place for number, place in places.items())
    result.figure(f"{kept} of {held} samples of the nodes' weights are where they were")
    result.target_met(kept == held > 0, "nodes dropped or copied their experts")
    lab.baseline = {pid: use for pid, use in lab.baseline.items() if pid in {pid for pid, _ in before.values()}}
    lab.check_footprints(cluster, result)
    result.figure(
        f"{len(cut)} streams ended at once; serving with all nodes {ready:.2f} s after the restart", ready_s=ready
    )
    result.target_met(ready <= 5, f"ready after {ready:.1f} s")
