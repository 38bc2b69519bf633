"""Scenarios of machines that get hot, and of nodes that lie plausibly: rows 6, 37 and 38."""

import contextlib
import math
import time

from cluster import Cluster, Lie, Never, Shape
from oracles import Result
from registry import scenario
from trial import Lab, copies

# A share of audits, and of these the router's own (router, audit/judge.rs).
AUDIT, HOME_SHARE = 0.01, 0.25
# One in so many answers of these ways to lie is one (tests, lies.rs).
LIES = {"scaled": 1, "zeros": 1, "other-experts": 1, "seldom": 20}
# A liar that is found later than this is found by one run of a thousand; the target allows twice that. Found it is sooner
# than by its own calls alone: it is asked by the audits of others as well.
UNLIKELY = math.log(1000)
# Text is wrong until a liar is found, so that takes no longer than this, whatever the machine does meanwhile.
FOUND_WITHIN_S = 60.0
HOT_C, COOL_C = 90, 50
# Reports come every second, of sensors that are read every second.
SPARED_WITHIN_S = 3.0
CHANGES_EVERY_S = 30.0


class Sensors:
    """What the system of one node shows."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.root = cluster.folder / f"{name}-sys" / "class" / "hwmon" / "hwmon0"
        self.root.mkdir(parents=True, exist_ok=True)
        (self.root / "name").write_text("coretemp\n")
        self.show(COOL_C)

    def show(self, degrees: int) -> None:
        """Replaces the file as a whole: nobody reads half of it."""
        new = self.root / "new"
        new.write_text(f"{degrees * 1000}\n")
        new.replace(self.root / "temp1_input")


def watched(cluster: Cluster, name: str, seconds: float) -> list[tuple[float, bool, int]]:
    """What the router says of a node for so long: when, whether it is spared, calls so far."""
    seen, end = [], time.monotonic() + seconds
    while time.monotonic() < end:
        node = cluster.node(name)
        seen.append((time.monotonic(), node["spared"], node["calls"]))
        time.sleep(0.05)
    return seen


@scenario("6", "a node's temperature climbs, and swings", "no work beyond need > 82 C within 1 s of its report, <= 1 change / 30 s")
def hot_node(lab: Lab, result: Result) -> None:
    lab.discard()
    cluster = lab.cluster(shape=Shape(router=copies(2), node=("--sysfs", "{own}-sys")))
    name = cluster.victim(lab.chance)
    sensors = Sensors(cluster, name)
    with lab.load(cluster) as stories:
        flowed = lab.tellers.flowing(2)
        cluster.until("its sensor is read", lambda: cluster.node(name)["temperature_celsius"] == COOL_C, SPARED_WITHIN_S)
        for degrees in range(60, 84, 2):
            sensors.show(degrees)
            time.sleep(0.2)
        began = time.monotonic()
        spared = cluster.until("it is spared", lambda: cluster.node(name)["spared"], SPARED_WITHIN_S)
        calls = cluster.node(name)["calls"]
        time.sleep(1.0)
        after = cluster.node(name)["calls"]
        later = watched(cluster, name, 2.0)
        # Once a second, for two minutes: each swing is one that it would follow.
        seen = []
        for swing in range(lab.few(1) * 60):
            sensors.show(COOL_C if swing % 2 else HOT_C)
            seen += watched(cluster, name, 2.0)
    changes = [at for (_, was, _), (at, now, _) in zip(seen, seen[1:], strict=False) if was != now]
    between = [later - at for at, later in zip(changes, changes[1:], strict=False)]
    result.runs += 1 if flowed and calls > 0 else 0
    result.void += 0 if flowed and calls > 0 else 1
    result.judge(stories)
    lab.check_footprints(cluster, result)
    more = later[-1][2] - after
    result.figure(
        f"spared {spared:.1f} s after its sensor showed 82 C, then {after - calls} calls within 1 s and {more} in 2 s more",
        spared_s=spared,
        began=began,
    )
    result.figure(f"{len(changes)} changes in {len(seen) * 0.05:.0f} s of swings", changes=len(changes))
    result.target_met(more == 0, f"{more} calls to a hot node")
    result.target_met(all(gap >= CHANGES_EVERY_S - 1 for gap in between), f"changes after {min(between, default=0):.0f} s")
    return None


def found(lab: Lab, cluster: Cluster, result: Result, liars: dict[str, str], unlikely: float) -> None:
    """Puts liars in the place of nodes under load and waits until the router has shut them out. Text is wrong meanwhile, and
    right from then on, which is what is judged."""
    program = lab.options.rogues / "liar"
    for name in liars:
        cluster.nodes[name].kill()
    before = {name: cluster.node(name)["calls"] for name in liars}
    for name, way in liars.items():
        cluster.start_node(name, Lie(program, way))

    def out() -> bool:
        return all(cluster.node(name)["state"] == "quarantined" for name in liars)

    with lab.load(cluster), contextlib.suppress(Never):
        cluster.until("the liars are found", out, FOUND_WITHIN_S)
    calls = {name: cluster.node(name)["calls"] - before[name] for name in liars}
    for name, way in liars.items():
        state = cluster.node(name)["state"]
        result.figure(f"{way}: {state} after {calls[name]} calls, at most {2 * unlikely:.0f} expected")
        result.target_met(state == "quarantined", f"{way}: {state} instead of quarantined")
        result.target_met(calls[name] <= 2 * unlikely + 500, f"{way}: {calls[name]} calls until it was found")
    honest = [node for node in cluster.state()["nodes"] if node["name"] not in liars]
    result.target_met(all(node["audits"]["wrong"] == 0 for node in honest), "an honest node was found wrong")
    with lab.load(cluster) as stories:
        lab.tellers.flowing(2)
        time.sleep(1.0)
    result.runs += 1
    result.judge(stories)
    for name in liars:
        cluster.nodes[name].kill()
        with contextlib.suppress(RuntimeError):
            cluster.command("nodes", "pardon", name, *cluster.home("router"))
        cluster.start_node(name)
    lab.whole(cluster)


@scenario("37", "a node that lies plausibly, audited at 0.01", "found within twice the computed calls, no honest one accused, O1 after")
def plausible_liar(lab: Lab, result: Result) -> None:
    if lab.options.rogues is None:
        result.lacks("a node that lies (MOEMESH_ROGUES)")
        return
    for way, every in LIES.items():
        cluster = lab.fresh(*copies(2), "--audit", str(AUDIT))
        found(lab, cluster, result, {cluster.victim(lab.chance): way}, UNLIKELY * every / AUDIT)


@scenario("38", "two replicas that lie alike, audited at 0.01", "both found by the router's own computation")
def colluding_liars(lab: Lab, result: Result) -> None:
    if lab.options.rogues is None:
        result.lacks("a node that lies (MOEMESH_ROGUES)")
        return
    cluster = lab.fresh(*copies(2), "--audit", str(AUDIT))
    liars = {cluster.victim(lab.chance): "scaled" for _ in range(2)}
    found(lab, cluster, result, liars, UNLIKELY / (AUDIT * HOME_SHARE))
