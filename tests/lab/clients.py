"""Scenarios of clients that go away or do not read: row 23."""

import contextlib
import socket
import time

from client import Outcome
from oracles import Result, spread
from registry import scenario
from trial import Lab

# A story as long as the model's context allows; at its end the buffers hold the most.
LONG_TOKENS = 1900
SLOW_READERS = 8
# What one stream may hold back on the router.
BUFFER_KIB_MAX = 1024


@scenario("23", "clients that go away in the middle", "work cancelled <= 100 ms")
def disconnect(lab: Lab, result: Result) -> None:
    cluster = lab.cluster()
    times = []
    for _ in range(lab.few(20)):
        before = cluster.counters()
        story, stream = cluster.client.open(0, LONG_TOKENS)
        while story.arrived.buffer_info()[1] < lab.chance.randrange(3, 60):
            story.heard(stream.recv(65_536))
        left = time.monotonic()
        stream.close()
        cluster.until("nothing runs", lambda: cluster.state()["router"]["running"] == 0, 5)
        took = (time.monotonic() - left) * 1e3
        computed = cluster.counters()["decode_rows"] - before["decode_rows"]
        if computed >= LONG_TOKENS - 1:
            result.void += 1
            continue
        result.runs += 1
        times.append(took)
        story.take_apart()
        story.outcome = Outcome.LEFT
        story.compare(lab.program.told(0, LONG_TOKENS))
        result.judge([story])
    lab.check_footprints(cluster, result)
    result.figure(f"cancelled in {spread(times)}", cancelled_ms=times)
    result.target_met(max(times, default=0) <= 100, f"cancelled after {max(times, default=0):.0f} ms")


@scenario("23b", f"{SLOW_READERS} clients that do not read", "others go on, <= 1 MB held per stream, all freed")
def slow_readers(lab: Lab, result: Result) -> None:
    cluster = lab.cluster()
    before = cluster.footprint(cluster.router).memory_kib
    with contextlib.ExitStack() as open_ones:
        streams: list[socket.socket] = []
        for index in range(SLOW_READERS):
            story, stream = cluster.client.open(index % 4, LONG_TOKENS, receive_bytes=4096)
            open_ones.enter_context(stream)
            streams.append(stream)
        with lab.load(cluster) as stories:
            flowed = lab.tellers.flowing(2.0)
            time.sleep(6.0)
        held = (cluster.footprint(cluster.router).memory_kib - before) / SLOW_READERS
        time_left = time.monotonic()
    cluster.until("nothing runs", lambda: cluster.state()["router"]["running"] == 0, 10)
    freed = (time.monotonic() - time_left) * 1e3
    result.runs += 1
    result.o2.ask(flowed, "streams beside slow readers stand still")
    result.judge(stories)
    lab.check_footprints(cluster, result)
    result.figure(
        f"{max(0, held):.0f} KiB held per reader (router {before / 1024:.0f} MiB before); all ended {freed:.0f} ms after they left",
        held_kib=held,
    )
    result.target_met(held <= BUFFER_KIB_MAX, f"{held:.0f} KiB held per reader")
