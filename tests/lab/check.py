"""Whether the lab's faults are what they say: each is measured with plain datagrams between two machines.

Without it a scenario could pass because its fault never happened. Bounds are wide, five standard deviations for shares
and generous for times: they tell a fault from no fault on a busy machine, not 9 ms from 10.
"""

import contextlib
import math
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator

from net import Lan

ECHO_PORT = 7
PROBES = 200
# Between probes: all take a fifth of a second.
APART_S = 0.001
# What comes later counts as lost; the longest delay asked for here is 20 ms.
LATE_S = 0.1
FULL_BYTES = 1400
TRIES = 3


class Echo:
    """Sends back what it hears."""

    def __init__(self, lan: Lan, machine: str) -> None:
        with lan.at(machine):
            self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("", ECHO_PORT))
        self.heard: list[bytes] = []
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self) -> None:
        while True:
            try:
                text, peer = self.socket.recvfrom(65_536)
            except OSError:
                return
            if not text:
                return
            self.heard.append(text)
            with contextlib.suppress(OSError):
                self.socket.sendto(text, peer)

    def stop(self) -> None:
        # Closing alone does not wake a thread that waits; the system says "not connected", and wakes it.
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.thread.join()
        self.socket.close()


class Seen:
    """What came of the probes."""

    def __init__(self) -> None:
        self.times_ms: dict[int, float] = {}
        self.order: list[int] = []
        self.bent = 0

    @property
    def share(self) -> float:
        return len(self.times_ms) / PROBES

    @property
    def median_ms(self) -> float:
        return statistics.median(self.times_ms.values()) if self.times_ms else math.inf

    @property
    def overtaken(self) -> int:
        return sum(later < earlier for earlier, later in zip(self.order, self.order[1:]))


def probe(lan: Lan, machine: str, to: str) -> Seen:
    """Numbered datagrams to an echo and back."""
    seen, sent = Seen(), {}
    with lan.at(machine):
        asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asker.connect((lan.address[to], ECHO_PORT))
    body = bytes(64)

    def listen(until: Callable[[], float]) -> None:
        while (left := until() - time.monotonic()) > 0:
            asker.settimeout(left)
            try:
                text = asker.recv(65_536)
            except TimeoutError:
                return
            except OSError:
                continue
            number = int.from_bytes(text[:4], "big")
            if text[4:] != body or number not in sent:
                seen.bent += 1
                continue
            seen.order.append(number)
            seen.times_ms.setdefault(number, (time.monotonic() - sent[number]) * 1e3)

    for number in range(PROBES):
        sent[number] = time.monotonic()
        with contextlib.suppress(OSError):
            asker.send(number.to_bytes(4, "big") + body)
        due = sent[number] + APART_S
        listen(lambda: due)
    last = time.monotonic() + LATE_S
    listen(lambda: last)
    asker.close()
    return seen


def rate_mbit(lan: Lan, machine: str, echo: Echo, to: str) -> float:
    """What arrives of half a second of full datagrams, sent at some 20 Mbit/s, in Mbit/s."""
    with lan.at(machine):
        asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asker.connect((lan.address[to], ECHO_PORT))
    echo.heard.clear()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            asker.send(bytes(FULL_BYTES))
            asker.send(bytes(FULL_BYTES))
        # The echo is a thread of this process and needs its turn.
        time.sleep(0.001)
    time.sleep(0.1)
    asker.close()
    return len(echo.heard) * FULL_BYTES * 8 / 0.5 / 1e6


def settle(lan: Lan, machine: str, to: str) -> None:
    """All faults end, and a datagram passes again: a machine that could not answer for its address is asked again for
    it a second later."""
    lan.heal()
    with lan.at(machine):
        asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asker.connect((lan.address[to], ECHO_PORT))
    asker.settimeout(0.1)
    for _ in range(50):
        with contextlib.suppress(OSError):
            asker.send(b"settle")
            if asker.recv(64):
                break
    asker.close()


def faults(lan: Lan, one: str, other: str) -> Iterator[tuple[str, bool, str]]:
    """Each fault: its name, whether it did what it says, what was seen."""

    def near(share: float, expected: float) -> bool:
        return abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / PROBES)

    echo = Echo(lan, other)
    try:
        plain = probe(lan, one, other)
        yield "nothing", plain.share == 1 and plain.bent == 0, f"{plain.share:.0%} back in {plain.median_ms:.2f} ms"
        lan.lose(one, other, 0.2)
        lossy = probe(lan, one, other)
        yield "20 % loss each way", near(lossy.share, 0.64) and lan.dropped() > 0, f"{lossy.share:.0%} back"
        settle(lan, one, other)
        for name, listener, speaker in (("deaf router", other, one), ("deaf node", one, other)):
            lan.deafen(listener, speaker)
            echo.heard.clear()
            back = probe(lan, one, other).share
            heard = len(echo.heard)
            yield name, back == 0 and (heard == 0) == (listener == other), f"{heard} arrived, {back:.0%} back"
            settle(lan, one, other)
        lan.unplug(one)
        yield "cut cable", probe(lan, one, other).share == 0, "nothing back"
        settle(lan, one, other)
        lan.blackhole(other, one)
        yield "blackhole", probe(lan, one, other).share == 0, "nothing back"
        settle(lan, one, other)
        lan.slow_down(one, 10)
        rate = rate_mbit(lan, one, echo, other)
        yield "10 Mbit/s", 6 <= rate <= 12, f"{rate:.1f} Mbit/s"
        settle(lan, one, other)
        relay = lan.bend(one)
        through = probe(lan, one, other)
        yield (
            "relay",
            through.share == 1 and through.overtaken == 0,
            f"{through.share:.0%} back in {through.median_ms:.2f} ms",
        )
        relay.set(delay_ms=10)
        late = probe(lan, one, other)
        added = late.median_ms - through.median_ms
        yield "10 ms delay", late.share == 1 and 19 <= added <= 25, f"{added:.1f} ms more there and back"
        relay.set(duplicate=0.5)
        twice = probe(lan, one, other)
        copies = len(twice.order) / PROBES
        yield "50 % twice each way", twice.share == 1 and 1.9 <= copies <= 2.6, f"{copies:.2f} copies back"
        relay.set(reorder=0.3)
        mixed = probe(lan, one, other)
        yield "30 % overtaken", mixed.share == 1 and mixed.overtaken > PROBES // 20, f"{mixed.overtaken} out of order"
        relay.set(loss=0.2, seed=3)
        lost = probe(lan, one, other)
        yield "20 % loss in the relay", near(lost.share, 0.64), f"{lost.share:.0%} back"
        relay.set(flip=1.0)
        bent = probe(lan, one, other)
        yield "a bit turned in each", bent.bent > PROBES * 0.9, f"{bent.bent} bent ones passed the checksum"
        settle(lan, one, other)
        again = probe(lan, one, other)
        yield "healed", again.share == 1 and again.bent == 0, f"{again.share:.0%} back in {again.median_ms:.2f} ms"
    finally:
        lan.heal()
        echo.stop()


def sound(lan: Lan, one: str, other: str) -> tuple[bool, str]:
    """Whether all faults are what they say, and what was seen of each. Tries again where another program took the
    machine away; what is wrong stays wrong."""
    for _ in range(TRIES):
        results = list(faults(lan, one, other))
        lines = [f"    {'ok  ' if well else 'BAD '} {name:<24} {seen}" for name, well, seen in results]
        if all(well for _, well, _ in results):
            return True, "\n".join(lines)
    return False, "\n".join(lines)
