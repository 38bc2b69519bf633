"""A cable that misbehaves: carries Ethernet frames between two interfaces, late, not at all, twice, in another order
or with a bit turned over.

It sits below IP, so UDP, TCP and multicast pass as they are and no address is rewritten. As a program
(`relay.py ONE OTHER`) it reads settings as JSON lines on standard input and answers each with its counters; it ends when its
input does. `Relay` starts one in the namespace its thread is in.

Draws come from a seed, one generator per direction, in the order of the frames: the same frames have the same fate.
A turned bit lies in the payload of a UDP datagram and its checksum is made right again: the system's check would drop
the datagram and prove nothing about ours.

The price is a Python loop per frame, some 20 us: good for a few thousand frames a second, which is what a stream of
tokens needs. What is on the way is bounded; more than that is dropped and counted.
"""

import heapq
import json
import pathlib
import random
import select
import socket
import subprocess
import sys
import time

# Every protocol, in network byte order.
ETH_P_ALL = socket.htons(3)
# What the kernel reports of frames this very interface sent.
PACKET_OUTGOING = 4
SOCKET_BYTES = 16 << 20
# Frames on the way at a time; 10 000 full ones are 15 MB, a second of a 100 Mbit cable.
ON_THE_WAY_MAX = 10_000
FRAME_BYTES_MAX = 65_536
ETHERNET_BYTES = 14
UDP_HEADER_BYTES = 8
# Longest extra wait of a frame that is to be overtaken.
OVERTAKEN_S = 0.004

CLEAN = {"delay_ms": 0.0, "jitter_ms": 0.0, "loss": 0.0, "duplicate": 0.0, "reorder": 0.0, "flip": 0.0, "seed": 1}


class Relay:
    """A relay process between two interfaces of the namespace this thread is in."""

    def __init__(self, one: str, other: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).resolve()), one, other],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # It carries frames once it has answered.
        self.counters()

    def set(self, **faults: float) -> dict[str, int]:
        """From now on these faults and no others; the counters so far."""
        return self.ask({**CLEAN, **faults})

    def counters(self) -> dict[str, int]:
        """Frames carried, and what became of them."""
        return self.ask({})

    def ask(self, settings: dict[str, float]) -> dict[str, int]:
        self.process.stdin.write(json.dumps(settings) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the relay ended with {self.process.wait()}")
        return json.loads(line)

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Cable:
    """The frames on the way and what happens to them."""

    def __init__(self, ends: list[socket.socket]) -> None:
        self.ends = ends
        self.faults = dict(CLEAN)
        self.chance = [random.Random(1), random.Random(2)]
        self.waiting: list[tuple[float, int, int, bytes]] = []
        self.number = 0
        self.count = dict.fromkeys(("carried", "lost", "duplicated", "reordered", "flipped", "overflowed"), 0)

    def change(self, faults: dict[str, float]) -> None:
        if faults:
            self.faults = faults
            self.chance = [random.Random(2 * faults["seed"] + side) for side in (0, 1)]

    def take(self, side: int, frame: bytes, now: float) -> None:
        """A frame came in at one end."""
        faults, chance = self.faults, self.chance[side]
        # Always as many draws per frame, so that one fault does not shift the others.
        lost, twice, overtaken, bent, early, late = (chance.random() for _ in range(6))
        if lost < faults["loss"]:
            self.count["lost"] += 1
            return
        if bent < faults["flip"]:
            flipped = with_a_bit_turned(frame, chance)
            self.count["flipped"] += flipped is not None
            frame = flipped or frame
        delay = (faults["delay_ms"] + faults["jitter_ms"] * (2 * early - 1)) / 1e3
        if overtaken < faults["reorder"]:
            self.count["reordered"] += 1
            delay += OVERTAKEN_S * late
        copies = 1
        if twice < faults["duplicate"]:
            self.count["duplicated"] += 1
            copies = 2
        for copy in range(copies):
            if len(self.waiting) >= ON_THE_WAY_MAX:
                self.count["overflowed"] += 1
                return
            self.number += 1
            due = now + max(0.0, delay) + copy * OVERTAKEN_S * late
            heapq.heappush(self.waiting, (due, self.number, 1 - side, frame))

    def deliver(self, now: float) -> None:
        """Hands over every frame that is due."""
        while self.waiting and self.waiting[0][0] <= now:
            _, _, side, frame = heapq.heappop(self.waiting)
            try:
                self.ends[side].send(frame)
                self.count["carried"] += 1
            except OSError:
                # The cable's end is down, or its queue is full: a lost frame, as on a real one.
                self.count["lost"] += 1


def with_a_bit_turned(frame: bytes, chance: random.Random) -> bytes | None:
    """The frame with one bit of its UDP payload turned and a checksum that agrees; `None` if it has no such payload."""
    if frame[12:14] != b"\x08\x00" or len(frame) < ETHERNET_BYTES + 20:
        return None
    header = (frame[ETHERNET_BYTES] & 15) * 4
    udp = ETHERNET_BYTES + header
    fragment = int.from_bytes(frame[ETHERNET_BYTES + 6 : ETHERNET_BYTES + 8], "big") & 0x3FFF
    length = int.from_bytes(frame[udp + 4 : udp + 6], "big")
    if (
        frame[ETHERNET_BYTES + 9] != socket.IPPROTO_UDP
        or fragment
        or length <= UDP_HEADER_BYTES
        or udp + length > len(frame)
    ):
        return None
    bent = bytearray(frame)
    bit = chance.randrange((length - UDP_HEADER_BYTES) * 8)
    bent[udp + UDP_HEADER_BYTES + bit // 8] ^= 1 << (bit % 8)
    bent[udp + 6 : udp + 8] = b"\0\0"
    addresses = bytes(bent[ETHERNET_BYTES + 12 : ETHERNET_BYTES + 20])
    pseudo = addresses + bytes([0, socket.IPPROTO_UDP]) + length.to_bytes(2, "big")
    checksum = internet_checksum(pseudo + bytes(bent[udp : udp + length]))
    bent[udp + 6 : udp + 8] = (checksum or 0xFFFF).to_bytes(2, "big")
    return bytes(bent)


def internet_checksum(text: bytes) -> int:
    """RFC 1071."""
    text += b"\0" * (len(text) % 2)
    total = sum(int.from_bytes(text[at : at + 2], "big") for at in range(0, len(text), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def open_end(interface: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, ETH_P_ALL)
    end.bind((interface, 0))
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SOCKET_BYTES)
    end.setblocking(False)
    # The veth frames of both sides must all be seen.
    return end


def main() -> None:
    ends = [open_end(interface) for interface in sys.argv[1:3]]
    cable = Cable(ends)
    while True:
        wait = max(0.0, cable.waiting[0][0] - time.monotonic()) if cable.waiting else None
        ready, _, _ = select.select([*ends, sys.stdin], [], [], wait)
        for side, end in enumerate(ends):
            while end in ready:
                try:
                    frame, origin = end.recvfrom(FRAME_BYTES_MAX)
                except OSError:
                    # Nothing more for now, or the interface is down.
                    break
                if origin[2] != PACKET_OUTGOING:
                    cable.take(side, frame, time.monotonic())
        if sys.stdin in ready:
            line = sys.stdin.readline()
            if not line:
                return
            cable.change(json.loads(line))
            print(json.dumps(cable.count), flush=True)
        cable.deliver(time.monotonic())


if __name__ == "__main__":
    main()
