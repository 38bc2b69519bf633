"""What must hold whatever happens, and what a scenario reports.

O1  every story is, as far as it goes, the one that a single process tells: token ids and the digest of all logits
O2  every request ends exactly once, whole or with a documented error; none hangs
O3  memory and descriptors of router and surviving nodes return to what they were
"""

import enum
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from client import Outcome, Story
from cluster import Footprint

# O3: a tenth of what it was, and what a process may keep for good reasons. 16 MiB: a node that dials again makes a
# new receive buffer of 13 MiB (6500 bytes x 64 segments x 32 messages), and the allocator keeps the place of the old one; it
# does so once, however often it dials (measured over eight partitions). 2 descriptors: a connection being closed.
GROWTH = 0.10
SLACK_KIB = 16 << 10
SLACK_DESCRIPTORS = 2


class Verdict(enum.Enum):
    PASS = "pass"
    FAIL = "FAIL"
    # The fault never hit calls in flight.
    VOID = "VOID"
    # Somebody interrupted it; until then nothing failed.
    PART = "part"
    # This build lacks what the scenario tests.
    NEEDS = "needs"


@dataclass
class Oracle:
    """How often it was asked and what it said when it did not hold."""

    asked: int = 0
    broken: list[str] = field(default_factory=list)

    def ask(self, holds: bool, otherwise: str) -> None:
        self.asked += 1
        if not holds:
            self.broken.append(otherwise)

    def __str__(self) -> str:
        if not self.asked:
            return "-"
        return f"{self.asked - len(self.broken)}/{self.asked}"


@dataclass
class Result:
    """What came of one scenario."""

    row: str
    name: str
    target: str = ""
    runs: int = 0
    void: int = 0
    o1: Oracle = field(default_factory=Oracle)
    o2: Oracle = field(default_factory=Oracle)
    o3: Oracle = field(default_factory=Oracle)
    # Figures for people, in the order they were found; and for machines.
    figures: list[str] = field(default_factory=list)
    values: dict[str, object] = field(default_factory=dict)
    # Targets that were missed, and errors.
    missed: list[str] = field(default_factory=list)
    needs: list[str] = field(default_factory=list)
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def verdict(self) -> Verdict:
        if self.missed or self.o1.broken or self.o2.broken or self.o3.broken:
            return Verdict.FAIL
        if self.interrupted:
            return Verdict.PART
        if self.needs:
            return Verdict.NEEDS
        return Verdict.PASS if self.runs else Verdict.VOID

    def figure(self, text: str, **values: object) -> None:
        self.figures.append(text)
        self.values.update(values)

    def target_met(self, met: bool, text: str) -> None:
        if not met:
            self.missed.append(text)

    def lacks(self, what: str) -> None:
        self.needs.append(what)

    def judge(self, stories: Iterable[Story], refused: bool = False, cut: bool = False) -> None:
        """O1 and O2 of requests. `refused`, `cut`: whether a documented error or a broken connection is a good end."""
        good = (
            {Outcome.COMPLETE, Outcome.LEFT}
            | ({Outcome.REFUSED} if refused else set())
            | ({Outcome.CUT} if cut else set())
        )
        for story in stories:
            where = f"prompt {story.prompt}, {len(story.times)} of {story.tokens} tokens"
            self.o1.ask(bool(story.right), f"another story: {where}")
            self.o2.ask(
                story.outcome in good,
                f"{story.outcome.value if story.outcome else 'open'}: {where} {story.error[:300]}",
            )


def grown(before: Footprint, after: Footprint) -> str:
    """What a process uses more than it may, in words; empty if nothing."""
    found = []
    memory = before.memory_kib * (1 + GROWTH) + SLACK_KIB
    descriptors = before.descriptors * (1 + GROWTH) + SLACK_DESCRIPTORS
    if after.memory_kib > memory:
        found.append(f"{after.memory_kib / 1024:.1f} MiB instead of {before.memory_kib / 1024:.1f}")
    if after.descriptors > descriptors:
        found.append(f"{after.descriptors} descriptors instead of {before.descriptors}")
    return " and ".join(found)


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least this share does not exceed."""
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def spread(values: list[float], unit: str = "ms") -> str:
    """p50, p99 and the highest."""
    return f"p50 {quantile(values, 0.5):.0f}, p99 {quantile(values, 0.99):.0f}, max {max(values, default=math.nan):.0f} {unit}"
