"""Scenarios of machines that come and go while the cluster serves: rows 14 and 15 of the matrix, a machine that is plugged
in for another, and one that joins."""

import signal
import time
from typing import Any, NamedTuple

from client import longest_gap, speed, typical_gap
from cluster import Cluster, Shape
from oracles import Result
from registry import scenario
from trial import FLOWS_WITHIN_S, Lab, copies

# Of the machines of a storm; those of the cluster have whatever the machine gives.
STORM_MEMORY = ("--memory", "64")
STORM_S = 60.0
STORM_EVENTS = 50
STORM_MACHINES = ("client", "guest", "rogue")
FLAPS = 15
# Where speeds are compared, machines are so slow that reading experts is what takes the time, and not the two or three
# cores that all of them have in common.
PACE = ("--pace-gb-s", "0.08")
PACED_TOKENS = 60
# Until speed is compared: mesh-proto waits for silence, then nodes load.
SETTLES_S = 8.0
COMPARE_S = 6.0


def epochs(cluster: Cluster) -> int:
    """Number of the placement in use."""
    plan = cluster.state()["plan"]
    return plan["epoch"] if plan else 0


def settled(cluster: Cluster) -> bool:
    """Whether nothing is being loaded, and nothing is left to the router."""
    state = cluster.state()
    return state["loading"] is None and state["plan"]["unplaced"] == 0


def told(change: dict[str, object]) -> str:
    """A change as `moemesh nodes` shows it."""

    def rate(value: dict[str, float] | None) -> str:
        return f"{value['tok_s']:.0f}" if value else "not enough load"

    before = change["predicted_tok_s_before"]
    predicted = f"{before:.0f} -> {change['predicted_tok_s']:.0f}" if before else f"{change['predicted_tok_s']:.0f}"
    measured = f"{rate(change['measured_before'])} -> {rate(change['measured'])}"
    moved = change["moved_bytes"] / 1e6
    who = " ".join([change["reason"], *change["nodes"]])
    return f"{who}: predicted {predicted} tok/s, measured {measured}, {moved:.0f} MB moved"


@scenario("14", "a node up 1 s, down 1 s", "<= 1 change of the placement per 10 s, throughput >= 90 %")
def flapping(lab: Lab, result: Result) -> None:
    cluster = lab.fresh(*copies(2))
    name = cluster.victim(lab.chance)
    changes: list[float] = []
    with lab.load(cluster) as stories:
        time.sleep(COMPARE_S)
        began, last = time.monotonic(), epochs(cluster)
        for turn in range(2 * FLAPS):
            if turn % 2 == 0:
                cluster.nodes[name].kill()
            else:
                cluster.start_node(name)
            until = began + turn + 1.0
            while time.monotonic() < until:
                now = epochs(cluster)
                if now != last:
                    changes.append(time.monotonic() - began)
                    last = now
                time.sleep(0.05)
        ended = time.monotonic()
    result.runs += 1
    result.judge(stories)
    first = min(story.began for story in stories)
    before = speed(stories, first + 1.0, began)
    # Its first two losses are a restart each; from the third on it flaps.
    during = speed(stories, began + 6.0, ended)
    apart = [later - earlier for earlier, later in zip(changes, changes[1:], strict=False)]
    result.figure(
        f"{len(changes)} changes in {ended - began:.0f} s; {before:.0f} -> {during:.0f} tok/s", before=before, during=during
    )
    result.target_met(min(apart, default=60.0) >= 10.0, f"changes {apart} s apart")
    result.target_met(during >= 0.9 * before, f"{during / before:.0%} of the throughput")


@scenario("15", "50 joins and leaves in a minute", "no lost request, the placement stands still <= 5 s after the last")
def storm(lab: Lab, result: Result) -> None:
    cluster = lab.fresh(*copies(1))
    here: dict[str, bool] = {}
    with lab.load(cluster) as stories:
        time.sleep(2.0)
        began, last = time.monotonic(), epochs(cluster)
        for number in range(STORM_EVENTS):
            machine = STORM_MACHINES[number % len(STORM_MACHINES)]
            name = f"guest-{machine}"
            if here.get(machine):
                if cluster.nodes[name].alive:
                    # In order, and not waited for; every third without a word.
                    process = cluster.nodes[name]
                    process.signal(signal.SIGKILL if number % 3 == 0 else signal.SIGTERM)
                here[machine] = False
            else:
                if name in cluster.nodes and cluster.nodes[name].alive:
                    cluster.nodes[name].kill()
                cluster.start_guest(name, machine, STORM_MEMORY)
                here[machine] = True
            time.sleep(max(0.0, began + (number + 1) * STORM_S / STORM_EVENTS - time.monotonic()))
        ended = time.monotonic()
        while time.monotonic() < ended + 5.0:
            time.sleep(0.05)
        stands, calm = epochs(cluster), settled(cluster)
        time.sleep(SETTLES_S)
        moved = epochs(cluster) - stands
        changes = stands - last
        came = sum(cluster.node(name)["connections"] for name in cluster.nodes if name.startswith("guest-"))
        states = [cluster.node(f"guest-{machine}")["state"] for machine, is_here in here.items() if is_here]
    result.runs += 1
    result.judge(stories)
    began_at = min(story.began for story in stories)
    stall = (longest_gap(stories, began_at, ended) - typical_gap(stories)) * 1e3
    result.figure(
        f"{STORM_EVENTS} events, {came} connections, {changes} placements, stall {stall:.0f} ms", stall_ms=stall, came=came
    )
    result.target_met(came >= STORM_EVENTS // 3, f"only {came} connections: that is no storm")
    # Whoever was killed three times in a minute is let in with a pause (`suspect`).
    result.target_met(all(state in ("serving", "suspect") for state in states), f"machines that stayed are {states}")
    result.target_met(1 <= changes <= STORM_EVENTS // 2, f"{changes} placements")
    result.target_met(calm, "5 s after the last event something is still being loaded")
    result.target_met(moved == 0, f"{moved} changes later than 5 s after the last event")
    lab.discard()


class Swap(NamedTuple):
    """A machine that was lost and the one in its place: seconds to the end of each, the changes as they are told."""

    taken_s: float
    lost: str
    joined_s: float
    state: dict[str, Any]
    ended: float


def swap(lab: Lab, cluster: Cluster, name: str, machine: str) -> Swap:
    """Pulls the plug of one and plugs in another one with an empty disk; nobody says a word to the cluster."""
    lab.lan.unplug(name)
    epoch = epochs(cluster)
    taken_s = cluster.until("others hold what it held", lambda: epochs(cluster) > epoch, 30)
    lost = told(cluster.state()["change"])
    epoch = epochs(cluster)
    guest = f"guest-{machine}"
    cluster.start_guest(guest, machine, PACE, empty=True)
    joined_s = cluster.until("the new machine serves", lambda: cluster.serves(guest), 30)
    cluster.until("the placement is another", lambda: epochs(cluster) > epoch, 30)
    time.sleep(SETTLES_S + COMPARE_S)
    return Swap(taken_s, lost, joined_s, cluster.state(), time.monotonic())


@scenario("14b", "each machine's plug pulled in turn, one with an empty disk plugged in", "the predicted speed is back without a command")
def replaced(lab: Lab, result: Result) -> None:
    lab.discard()
    cluster = lab.cluster(shape=Shape(router=copies(1), node=PACE, tokens=PACED_TOKENS))
    swaps: dict[str, Swap] = {}
    with lab.load(cluster) as stories:
        time.sleep(SETTLES_S)
        predicted = cluster.state()["plan"]["predicted_tok_s"]
        healthy = time.monotonic()
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still before the plug is pulled")
        for name, machine in zip(cluster.names, STORM_MACHINES, strict=True):
            swaps[name] = swap(lab, cluster, name, machine)
    result.runs += len(swaps)
    result.judge(stories)
    whole = speed(stories, healthy - COMPARE_S, healthy)
    for name, now in swaps.items():
        after, plan = speed(stories, now.ended - COMPARE_S, now.ended), now.state["plan"]
        result.figure(f"{name}: taken over {now.taken_s:.1f} s after the plug ({now.lost})", **{f"{name}_taken_s": now.taken_s})
        change = told(now.state["change"])
        result.figure(f"the new one serves {now.joined_s:.1f} s after its start ({change})", **{f"{name}_joined_s": now.joined_s})
        result.figure(f"{whole:.0f} -> {after:.0f} tok/s", **{f"{name}_before": whole, f"{name}_after": after})
        back = plan["predicted_tok_s"]
        result.target_met(plan["unplaced"] == 0, f"{name}: experts are left to the router")
        result.target_met(back >= 0.9 * predicted, f"{name}: predicted {back:.0f} instead of {predicted:.0f} tok/s")
        result.target_met(after >= 0.9 * whole, f"{name}: measured {after:.0f} instead of {whole:.0f} tok/s")
    lab.discard()


@scenario("15b", "a machine with an empty disk joins a cluster that serves", "0 failed or changed requests, it takes load, the change is told")
def joined(lab: Lab, result: Result) -> None:
    lab.discard()
    cluster = lab.cluster(shape=Shape(nodes=2, router=copies(1), node=PACE, tokens=PACED_TOKENS))
    epoch = epochs(cluster)
    with lab.load(cluster) as stories:
        time.sleep(SETTLES_S)
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still before the machine joins")
        began = time.monotonic()
        cluster.start_guest("guest-guest", "guest", PACE, empty=True)
        cluster.until("the placement is another", lambda: epochs(cluster) > epoch, 30)
        cluster.until("it serves", lambda: cluster.serves("guest-guest"), 30)
        serves_s = time.monotonic() - began
        time.sleep(SETTLES_S)
        state = cluster.state()
        ended = time.monotonic()
    result.runs += 1
    result.judge(stories)
    change, node = state["change"], cluster.node("guest-guest")
    stall = (longest_gap(stories, began, ended) - typical_gap(stories)) * 1e3
    result.figure(f"serves {serves_s:.1f} s after its start, stall {stall:.0f} ms", serves_s=serves_s, stall_ms=stall)
    kept = sum(path.stat().st_size for path in (cluster.folder / "guest-guest" / "weights").rglob("*") if path.is_file())
    result.figure(f"{kept / 1e6:.1f} MB of experts on its disk, which was empty", fetched_bytes=kept)
    result.target_met(kept >= node["weight_bytes"] > 0, f"{kept} bytes on its disk, {node['weight_bytes']} in its memory")
    result.figure(told(change))
    result.target_met(change["reason"] == "joined" and change["nodes"] == ["guest-guest"], f"the change is said to be {change}")
    result.target_met(change["measured"] is not None and change["measured_before"] is not None, "nothing was measured")
    result.target_met(node["calls"] > 0, "the new node got no calls")
    faster = change["measured"] and change["measured_before"] and change["measured"]["tok_s"] > change["measured_before"]["tok_s"]
    result.target_met(faster, "tokens do not come faster than before")
    lab.discard()
