"""One fault under load, from a healthy cluster to a healthy cluster.

A trial counts only if it hit: tokens flowed on every stream just before, and something shows that calls met the fault
(counters of the router, packets that a rule dropped, frames that a relay bent). One that did not is void: it is
repeated, and counted apart, never as passed.
"""

import contextlib
import pathlib
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from client import LONG_PROMPT, Load, Story, longest_gap, speed, typical_gap
from cluster import Cluster, Footprint, Never, Program, Shape, say
from net import Lan
from oracles import Result, grown

# Streams of the load; of each the text is known.
STREAMS = 4
# Just before a fault, on every stream.
FLOWS_WITHIN_S = 2.0
# A trial that misses is repeated this often.
REPEATS = 3
# Until a cluster is whole again after a fault; the longest pause between two tries of a node is 30 s.
WHOLE_WITHIN_S = 45.0
# Memory that is being freed needs a moment.
SETTLES_WITHIN_S = 5.0
MACHINES = ("router", "node-1", "node-2", "node-3", "client", "guest", "rogue")


@dataclass
class Options:
    """What the lab was asked to do."""

    program: pathlib.Path
    kills: int
    seed: int
    # Where the programs `liar`, `thief` and `nuisance` are.
    rogues: pathlib.Path | None
    long: bool


class Lab:
    """The LAN, the program, and at most one running cluster at a time."""

    def __init__(self, options: Options, lan: Lan, folder: pathlib.Path) -> None:
        self.options, self.lan, self.folder = options, lan, folder
        self.program = Program(options.program, folder)
        self.chance = random.Random(options.seed)
        self.running: Cluster | None = None
        self.baseline: dict[int, Footprint] = {}
        self.clusters = 0
        self.panics: list[str] = []
        self.began = time.monotonic()
        # Writes down what there is of a scenario that takes long.
        self.interim: Callable[[Result], None] = lambda result: None

    def cluster(self, *router: str, shape: Shape | None = None) -> Cluster:
        """A healthy cluster whose router has these arguments, or of this shape: the one that runs, if it is such a one."""
        shape = shape or Shape(router=router)
        if self.running and self.running.shape == shape and self.running.spared():
            with contextlib.suppress(Never, OSError):
                self.whole(self.running)
                return self.running
            say("    the cluster does not get well; another")
        self.discard()
        self.clusters += 1
        self.running = Cluster(self.program, self.lan, self.folder / f"cluster-{self.clusters}", shape)
        self.running.start()
        self.warm_up(self.running)
        return self.running

    def fresh(self, *router: str) -> Cluster:
        """The same, never used."""
        self.discard()
        return self.cluster(*router)

    def discard(self) -> None:
        """Ends the cluster that runs."""
        if self.running:
            self.running.stop()
        self.running = None
        self.lan.heal()

    def whole(self, cluster: Cluster) -> float:
        """Waits until everything runs and serves; how long."""
        for name in cluster.names:
            if name not in cluster.nodes or not cluster.nodes[name].alive:
                cluster.start_node(name)
        return cluster.until("all nodes serve", lambda: len(cluster.serving()) == len(cluster.names), WHOLE_WITHIN_S)

    def warm_up(self, cluster: Cluster) -> None:
        """Brings memory to what load takes, and remembers it. The stories of the undisturbed cluster are checked, too."""
        with self.load(cluster) as stories:
            time.sleep(1.0)
        # The largest frames and the most rows at a time.
        long = cluster.client.tell(LONG_PROMPT, 4)
        long.compare(self.program.told(LONG_PROMPT, 4))
        stories.append(long)
        wrong = [story for story in stories if not story.right]
        if wrong:
            raise Never(
                f"the undisturbed cluster tells another story than the single process: {wrong[0].error or wrong[0].prompt}"
            )
        self.baseline = {pid: use for pid, (_, use) in cluster.footprints().items()}

    @contextlib.contextmanager
    def load(self, cluster: Cluster, streams: int = STREAMS) -> Iterator[list[Story]]:
        """Streams while the body runs; afterwards the list has their stories."""
        expected = [self.program.told(prompt, cluster.shape.tokens) for prompt in range(streams)]
        stories: list[Story] = []
        load = Load(cluster.client, expected)
        self.tellers = load
        try:
            yield stories
        finally:
            stories += load.finish()

    def few(self, count: int) -> int:
        """How often a short scenario repeats: more often in a long run."""
        return count * (5 if self.options.long else 1)

    def progress(self, text: str) -> None:
        say(f"    {time.monotonic() - self.began:6.0f} s  {text}")

    def check_footprints(self, cluster: Cluster, result: Result) -> None:
        """O3 of everybody who lived through it; who is new is remembered for the next time."""
        cluster.until("no request runs", lambda: not cluster.state()["router"]["running"], SETTLES_WITHIN_S)
        end = time.monotonic() + SETTLES_WITHIN_S
        while True:
            excess = {}
            for pid, (machine, use) in cluster.footprints().items():
                excess[machine] = grown(self.baseline.setdefault(pid, use), use)
            if not any(excess.values()) or time.monotonic() > end:
                break
            time.sleep(0.1)
        for machine, words in excess.items():
            result.o3.ask(not words, f"{machine} uses {words}")


def copies(count: int) -> tuple[str, ...]:
    """Arguments of a router that keeps each expert on so many nodes."""
    return ("--replicas", str(count))


@dataclass
class Trial:
    """What was seen of one fault."""

    began: float
    healed: float
    ended: float
    stories: list[Story]
    # Differences of counters between just before the fault and the end.
    counters: dict[str, int]
    # Seconds from the healing to a whole cluster.
    whole_s: float

    @property
    def stall_ms(self) -> float:
        """Longest gap of any stream since the fault, beyond the usual."""
        usual = typical_gap([story for story in self.stories if story.began < self.began])
        return max(0.0, longest_gap(self.stories, self.began, self.ended) - usual) * 1e3

    @property
    def speed_before(self) -> float:
        first = min(story.began for story in self.stories)
        return speed(self.stories, max(first, self.began - 2.0), self.began)

    def failed_calls(self) -> int:
        return sum(self.counters.get(name, 0) for name in ("late", "gone", "refused", "rejected"))

    def noticed(self) -> bool:
        """Whether the router says that calls met the fault."""
        return self.failed_calls() + sum(self.counters.get(name, 0) for name in ("hedges", "retries", "fallbacks")) > 0


@dataclass
class Fault:
    """How to break something, for how long, and how to mend it."""

    strike: Callable[[], object]
    mend: Callable[[], object]
    lasts_s: float
    # Beyond what the router says of itself: whether it happened.
    happened: Callable[[], bool] | None = None
    # How long to look on once all is whole again.
    after_s: float = 0.5


def run(lab: Lab, cluster: Cluster, result: Result, fault: Fault, refused: bool = False) -> Trial | None:
    """A trial that counts, or `None` where none of several did."""
    for _ in range(REPEATS):
        trial, hit = attempt(lab, cluster, fault)
        result.judge(trial.stories, refused=refused)
        lab.check_footprints(cluster, result)
        if hit:
            result.runs += 1
            return trial
        result.void += 1
    return None


def attempt(lab: Lab, cluster: Cluster, fault: Fault) -> tuple[Trial, bool]:
    """One trial, and whether it counts."""
    happened = True
    with lab.load(cluster) as stories:
        flowed = lab.tellers.flowing(FLOWS_WITHIN_S)
        time.sleep(lab.chance.uniform(0.5, 0.8))
        flowed = flowed and lab.tellers.flowing(FLOWS_WITHIN_S)
        before = cluster.counters()
        began = time.monotonic()
        try:
            fault.strike()
            time.sleep(fault.lasts_s)
            if fault.happened:
                happened = fault.happened()
        finally:
            fault.mend()
        healed = time.monotonic()
        whole_s = lab.whole(cluster)
        time.sleep(fault.after_s)
        ended = time.monotonic()
    after = cluster.counters()
    delta = {name: after[name] - before[name] for name in after}
    trial = Trial(began, healed, ended, stories, delta, whole_s)
    return trial, flowed and happened and (fault.happened is not None or trial.noticed())


def ordinary_loss(counters: dict[str, int]) -> str:
    """What the router did about failed calls, in words."""
    words = [
        f"{counters.get(name, 0)} {name}"
        for name in ("late", "gone", "hedges", "retries", "fallbacks")
        if counters.get(name)
    ]
    return ", ".join(words) or "no call failed"
