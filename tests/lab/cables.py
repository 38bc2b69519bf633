"""A cluster of machines of chosen speeds on cables of a chosen round trip, and how fast it decodes.

Nothing fails here: `benches/plan-accuracy --veth` compares what the router's plan says with what a token takes where a call costs
a real network's time. Each node's cable has a relay in it. A relay is a loop in Python and has a delay of its own, so the
round trip is measured with `ping` and the relay's delay is set until it is the one that was asked for.
"""

import pathlib
import re
import statistics

from client import Story
from cluster import Cluster, Program, Shape
from net import Lan, run

# Tokens of the prompt, and of the story that warms up.
PROMPT, WARM_UP = 16, 8
# Calibrating: pings of a try, their distance, how near is near enough and how often to try.
PINGS, APART_S, NEAR_MS, TRIES = 40, 0.01, 0.02, 6


class Paced(Cluster):
    """A cluster whose processes are as slow as machines that read so many GB/s: the router's pace first."""

    def __init__(self, program: Program, lan: Lan, folder: pathlib.Path, paces: list[str], *router: str) -> None:
        self.paces = paces
        flags = ("--pace-gb-s", paces[0], *router)
        super().__init__(program, lan, folder, Shape(nodes=len(paces) - 1, router=flags))

    def node_flags(self, name: str) -> tuple[str, ...]:
        return ("--pace-gb-s", self.paces[1 + self.names.index(name)])

    def decode_tok_s(self, tokens: int, vocab: int) -> float:
        """Tokens per second of one stream after its first, and before that a short one that is not timed."""
        prompt = [(index * 7919 + 13) % vocab for index in range(PROMPT)]
        for count in (WARM_UP, tokens):
            story = Story(0, count)
            with self.client.send(prompt, count) as stream:
                while piece := stream.recv(65_536):
                    story.heard(piece)
            story.take_apart()
            if len(story.times) != count:
                raise RuntimeError(f"{len(story.times)} of {count} tokens came: {story.error[:300]}")
        return (tokens - 1) / (story.times[-1] - story.times[0])


def round_trip_ms(lan: Lan, machine: str, to: str = "router") -> float:
    """Median of pings."""
    words = ["ip", "netns", "exec", lan.namespace(machine), "ping", "-n", "-c", str(PINGS), "-i", str(APART_S)]
    times = re.findall(r"time=([\d.]+) ms", run(*words, lan.address[to]))
    return statistics.median(map(float, times))


def lengthen(lan: Lan, machine: str, wanted_ms: float) -> float:
    """Puts a relay into the machine's cable so that a round trip to the router takes this long; what it then takes."""
    delay = 0.0
    for _ in range(TRIES):
        lan.bend(machine, delay_ms=delay)
        took = round_trip_ms(lan, machine)
        if abs(took - wanted_ms) <= NEAR_MS or (delay == 0.0 and took > wanted_ms):
            break
        delay = max(0.0, delay + (wanted_ms - took) / 2)
    return took
