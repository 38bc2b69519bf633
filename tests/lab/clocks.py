"""Scenarios of clocks that are wrong: row 22."""

import pathlib
import re
import time

from cluster import Cluster, Process, Shape
from faketime import LOOKS_EVERY_S, missing, set_clock
from oracles import Result
from registry import scenario
from trial import FLOWS_WITHIN_S, Lab, copies
from trust import ended

AHEAD, BEHIND = "+10y", "-10y"
GUEST, OTHER = "guest", "rogue"
SERVES_WITHIN_S = 60.0
# Until every process has looked at its clock, and more.
SEEN_WITHIN_S = 5 * LOOKS_EVERY_S
LOOKS_S = 2.0
# A token that is good for so long, and one that is not good for long.
LONG, SHORT, SHORT_S = "1m", "3s", 3.0


def year_of(log: pathlib.Path) -> int:
    """The year in the last line of a log that has a time."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    found = re.findall(r"^(\d{4})-\d\d-\d\dT", text, re.MULTILINE)
    return int(found[-1]) if found else 0


def expected_year(by: str) -> int:
    """The year by a clock that is so much off."""
    return time.gmtime().tm_year + int(by.rstrip("y"))


class Clocks:
    """The clocks of a cluster, and whether they are believed to be what they are set to."""

    def __init__(self, cluster: Cluster, result: Result) -> None:
        self.cluster, self.result = cluster, result
        self.by = dict(cluster.shape.clocks)

    def process(self, machine: str) -> Process:
        return self.cluster.router if machine == "router" else self.cluster.nodes[machine]

    def jump(self, machine: str, by: str) -> None:
        """Sets a clock while the process runs."""
        self.by[machine] = by
        set_clock(self.cluster.folder / f"{machine}.clock", by)

    def check(self, machines: list[str]) -> None:
        """The processes really go by these clocks: they write the time into their logs."""
        for machine in machines:
            year, wanted = year_of(self.process(machine).log), expected_year(self.by[machine])
            # Around the turn of a year, and because years have 365 days there.
            held = abs(year - wanted) <= 1
            self.result.target_met(held, f"{machine} writes {year} into its log, not {wanted}: its clock was not moved")


def joins(lab: Lab, result: Result, cluster: Cluster, name: str, token: str) -> None:
    """A machine joins with this token and serves."""
    machine = name.removeprefix("guest-")
    began = time.monotonic()
    cluster.start_guest(name, machine, (), token=token)
    cluster.until(f"{name} serves", lambda: cluster.serves(name), SERVES_WITHIN_S)
    result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), f"a stream stands still after {name} joined")
    result.figure(f"{machine} ({dict(cluster.shape.clocks).get(machine, 'right')}) joined and serves {time.monotonic() - began:.1f} s after its start")


def expired(result: Result, cluster: Cluster, name: str, machine: str, token: str) -> None:
    """A machine is refused because the token has expired."""
    process = cluster.start_guest(name, machine, (), token=token)
    status = ended(process, 20.0)
    del cluster.nodes[name]
    words = process.tail()
    result.target_met(status not in (None, 0) and "expired" in words, f"an expired token: {status}, {words[-200:]}")


def wrong_clocks(lab: Lab, result: Result, router: str, node: str) -> None:
    """The router's clock is off by so much, a node's and a guest's by so much, two are right. Then they jump."""
    if lacking := missing():
        result.lacks(lacking)
        return
    lab.discard()
    clocks = (("router", router), ("node-1", node), (GUEST, node), (OTHER, node))
    # So that there is always something in their logs, with a time.
    usual, lab.program.verbose = lab.program.verbose, ("-v",)
    try:
        cluster = lab.cluster(shape=Shape(nodes=2, router=copies(2), clocks=clocks))
        jumping(lab, result, cluster, (router, node))
    finally:
        lab.program.verbose = usual
    lab.discard()


def jumping(lab: Lab, result: Result, cluster: Cluster, offsets: tuple[str, str]) -> None:
    """What a cluster whose clocks are wrong must do, before and after they jump."""
    router, node = offsets
    moved = Clocks(cluster, result)
    with lab.load(cluster) as stories:
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still before")
        moved.check(["router", "node-1"])
        before, since = cluster.counters(), cluster.node("node-1")["connections"]
        # Made before the jump, used after it.
        good, short = cluster.token("--ttl", LONG), cluster.token("--ttl", SHORT)
        issued = time.monotonic()
        joins(lab, result, cluster, f"guest-{GUEST}", cluster.token())
        # To the other side, twenty years at once.
        moved.jump("router", node)
        moved.jump("node-1", router)
        time.sleep(SEEN_WITHIN_S + max(0.0, issued + SHORT_S - time.monotonic()))
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still after the jump")
        joins(lab, result, cluster, f"guest-{OTHER}", good)
        expired(result, cluster, "guest-late", GUEST, short)
        moved.check(["router", "node-1"])
        # And back.
        moved.jump("router", router)
        time.sleep(SEEN_WITHIN_S)
        expired(result, cluster, "guest-later", GUEST, short)
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still after the second jump")
        moved.check(["router", "node-1"])
        time.sleep(LOOKS_S)
        after, lost = cluster.counters(), cluster.node("node-1")["connections"] - since
        used = {name: cluster.node(name)["calls"] for name in cluster.serving()}
    result.runs += 1
    result.judge(stories)
    failed = sum(after[name] - before[name] for name in ("gone", "refused", "rejected"))
    result.figure(f"{len(used)} of 4 nodes serve, {failed} calls failed, {lost} connections lost; tokens lived by the monotonic clock")
    result.target_met(len(used) == 4 and all(used.values()), f"calls: {used}")
    result.target_met(lost == 0, f"node-1 connected {lost} times more")
    lab.check_footprints(cluster, result)


@scenario(
    "22", "a router ten years ahead, nodes ten years behind; both jump by twenty", "joins, serves; tokens live as long as they say; O1, O2"
)
def router_ahead(lab: Lab, result: Result) -> None:
    wrong_clocks(lab, result, AHEAD, BEHIND)


@scenario(
    "22b", "a router ten years behind, nodes ten years ahead; both jump by twenty", "joins, serves; tokens live as long as they say; O1, O2"
)
def router_behind(lab: Lab, result: Result) -> None:
    wrong_clocks(lab, result, BEHIND, AHEAD)
