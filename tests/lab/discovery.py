"""Scenarios of machines that find each other: rows 32 to 32d."""

import json
import pathlib
import re
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

from cluster import MESH_PORT, Cluster, Process, Shape
from mdns import Speaker
from net import Capture, Lan
from oracles import Result
from registry import scenario
from trial import Lab

ROGUE = "rogue"
# Fake records, as many as row 32 asks for, and the time they are spread over.
RECORDS, FLOOD_S = 10_000, 10.0
# What a process may grow by, and what its discovery may take of a core.
GROWTH_KIB, CPU_SHARE = 1024, 0.05
# Memory is taken in pages and by other threads, too; what a process does by itself is measured before.
SETTLE_S = 2.0
# A connection to the old address is idle for 3 s, dialing it takes 3 s more, and pauses double up to 3 s.
FOUND_WITHIN_S = 20.0
# The address that the router moves to.
ELSEWHERE = 99
DOCTOR_WITHIN_S = 60.0


def router_key(cluster: Cluster) -> bytes:
    """The router's public key, as a node keeps it."""
    text = (cluster.folder / cluster.names[0] / "membership").read_text()
    return bytes.fromhex(re.search(r"^router ([0-9a-f]{64})$", text, re.MULTILINE)[1])


def discovery_cpu_s(process: Process) -> float:
    """CPU time that the thread of discovery has had; raises where there is none."""
    for task in pathlib.Path(f"/proc/{process.popen.pid}/task").iterdir():
        if (task / "comm").read_text().strip() == "discovery":
            return int((task / "schedstat").read_text().split()[0]) / 1e9
    raise RuntimeError(f"{process.machine} has no discovery: {process.tail()}")


class Trap:
    """A TCP port that takes connections and says nothing; what came."""

    def __init__(self, lan: Lan, machine: str) -> None:
        with lan.at(machine):
            self.listener = socket.create_server(("0.0.0.0", 0))
        self.listener.settimeout(0.2)
        self.port = self.listener.getsockname()[1]
        self.taken, self.heard = 0, b""
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self) -> None:
        while not self.over.is_set():
            try:
                stream, _ = self.listener.accept()
            except TimeoutError:
                continue
            with stream:
                self.taken += 1
                stream.settimeout(0.5)
                try:
                    self.heard += stream.recv(65_536)
                except OSError:
                    continue

    def close(self) -> None:
        self.over.set()
        self.thread.join()
        self.listener.close()


def to_port(frames: list[bytes], address: str, port: int) -> int:
    """Frames that are UDP to this address and port."""
    ip, wanted = bytes(map(int, address.split("."))), port.to_bytes(2, "big")
    return sum(f[12:14] == b"\x08\x00" and f[23] == 17 and f[30:34] == ip and f[36:38] == wanted for f in frames)


@scenario(
    "32",
    f"mDNS: the router's key at an attacker's address; {RECORDS} fake records",
    f"no traffic misdirected; <= {GROWTH_KIB >> 10} MiB, <= {CPU_SHARE:.0%} CPU each; O1",
)
def spoofed(lab: Lab, result: Result) -> None:
    cluster = lab.fresh()
    processes = [cluster.router, *cluster.nodes.values()]
    time.sleep(SETTLE_S)
    victim, trap, speaker = router_key(cluster), Trap(lab.lan, ROGUE), Speaker(lab.lan, ROGUE)
    # Keys that are points of the curve are not needed: nobody checks what nobody looks for.
    fake = [(number.to_bytes(32, "little"), 1 + number % 60_000) for number in range(RECORDS)]
    try:
        with Capture(lab.lan, ROGUE) as seen:
            before = [(process.memory_kib(), discovery_cpu_s(process)) for process in processes]
            # Heard before the flood is noticed: a candidate is dialed within a second.
            speaker.claim([(victim, trap.port)])
            time.sleep(SETTLE_S)
            began, sent = time.monotonic(), 0
            while sent < RECORDS:
                due = min(RECORDS, round(RECORDS * (time.monotonic() - began) / FLOOD_S))
                if due > sent:
                    speaker.claim([(victim, trap.port), *fake[sent:due]])
                    sent = due
                time.sleep(0.02)
            time.sleep(1.0)
            took = time.monotonic() - began
            after = [(process.memory_kib(), discovery_cpu_s(process)) for process in processes]
            # All of it at once, too.
            speaker.claim(fake)
            time.sleep(1.0)
            burst = [process.memory_kib() for process in processes]
            with lab.load(cluster) as stories:
                speaker.claim([(victim, trap.port)])
                time.sleep(1.0)
    finally:
        speaker.close()
        trap.close()
    result.runs += 1
    result.judge(stories)
    grown = {
        process.machine: max(after[at][0], burst[at]) - before[at][0] for at, process in enumerate(processes)
    }
    shares = {
        process.machine: (after[at][1] - before[at][1]) / took for at, process in enumerate(processes)
    }
    floods = sum("discovery rests" in process.log.read_text(errors="replace") for process in processes)
    misdirected = to_port(seen.frames, lab.lan.address[ROGUE], MESH_PORT)
    result.figure(
        f"{trap.taken} dials of the attacker, {misdirected} QUIC packets to it; memory {max(grown.values()):+d} KiB, "
        f"CPU {max(shares.values()):.2%} at most; {floods} of {len(processes)} rested",
        grown_kib=grown,
        cpu_share=shares,
        dials=trap.taken,
        misdirected=misdirected,
        rested=floods,
    )
    result.target_met(trap.taken > 0, "nobody looked at the attacker's claim: the attack did not hit")
    result.target_met(floods > 0, "no process noticed a flood")
    result.target_met(misdirected == 0, f"{misdirected} QUIC packets went to the attacker")
    for machine, kib in grown.items():
        result.target_met(kib <= GROWTH_KIB, f"{machine} grew by {kib} KiB")
    for machine, share in shares.items():
        result.target_met(share <= CPU_SHARE, f"discovery of {machine} took {share:.1%} of a core")
    result.target_met(len(cluster.serving()) == len(cluster.names), "a node was lost")
    lab.discard()


@scenario("32b", "the router gets another address", f"all nodes find it within {FOUND_WITHIN_S:.0f} s, also beside a liar; O1")
def moved(lab: Lab, result: Result) -> None:
    cluster = lab.fresh()
    # Long enough that every node has heard of the router at least once, and of the liar.
    trap, speaker = Trap(lab.lan, ROGUE), Speaker(lab.lan, ROGUE)
    victim = router_key(cluster)
    try:
        with Capture(lab.lan, ROGUE) as seen:
            before = {name: cluster.node(name)["connections"] for name in cluster.names}
            lab.lan.move("router", ELSEWHERE)
            speaker.claim([(victim, trap.port)])
            cluster.earlier.update(before)
            took = cluster.until(
                "all nodes serve at the router's new address",
                lambda: len(cluster.serving()) == len(cluster.names),
                60.0,
            )
    finally:
        speaker.close()
        trap.close()
    with lab.load(cluster) as stories:
        time.sleep(1.0)
    result.runs += 1
    result.judge(stories)
    misdirected = to_port(seen.frames, lab.lan.address[ROGUE], MESH_PORT)
    result.figure(
        f"found by all after {took:.1f} s; {trap.taken} dials of the liar, {misdirected} QUIC packets to it",
        found_s=took,
        misdirected=misdirected,
    )
    result.target_met(took <= FOUND_WITHIN_S, f"found after {took:.1f} s")
    result.target_met(misdirected == 0, f"{misdirected} QUIC packets went to the liar")
    lab.discard()


@scenario("32c", "multicast blocked everywhere", "a cluster forms, loses its router and comes back by addresses alone; O1")
def without_multicast(lab: Lab, result: Result) -> None:
    lab.discard()
    for machine in lab.lan.machines:
        lab.lan.deaf_to_multicast(machine)
    cluster = Cluster(lab.program, lab.lan, lab.folder / "cluster-without-multicast", Shape())
    try:
        cluster.start()
        with lab.load(cluster) as stories:
            time.sleep(1.0)
        cluster.router.kill()
        cluster.router = cluster.start_router()
        took = cluster.until("all nodes are back", lambda: len(cluster.serving()) == len(cluster.names), 60.0)
        with lab.load(cluster) as later:
            time.sleep(1.0)
        dropped = lab.lan.dropped()
    finally:
        cluster.stop()
        lab.lan.heal()
    result.runs += 1
    result.judge([*stories, *later])
    result.figure(f"{dropped} multicast packets dropped; back {took:.1f} s after the router's restart", back_s=took)
    result.target_met(dropped > 0, "no multicast was sent, so none was blocked")


def doctor(cluster: Cluster, machine: str) -> list[dict[str, str]]:
    """The checks of `moemesh doctor net` on a machine, whose state folder has its name."""
    command = [cluster.program.path, "doctor", "net", "--json", *cluster.home(machine)]
    with cluster.lan.at(machine):
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env=cluster.program.environment,
            check=False,
            timeout=DOCTOR_WITHIN_S,
        )
    told = json.loads(done.stdout.splitlines()[-1])
    if told["well"] != (done.returncode == 0):
        raise RuntimeError(f"the exit status is {done.returncode}: {done.stdout}")
    return told["checks"]


def failing(checks: list[dict[str, str]]) -> dict[str, str]:
    """What fails, each with a remedy: what was seen, by name."""
    bad = [check for check in checks if check["outcome"] == "fail"]
    if not all(check.get("remedy") for check in bad):
        raise RuntimeError(f"no remedy: {bad}")
    return {check["name"]: check["what"] for check in bad}


def faults(lab: Lab) -> Iterator[tuple[str, Callable[[], object], str, str]]:
    """What goes wrong between router and node-1, and the check that must fail with which words."""
    lan = lab.lan
    router, port = lan.address["router"], MESH_PORT
    yield "nothing", lambda: None, "", ""
    yield "UDP dropped", lambda: lan.drop("router", f"udp dport {port} counter drop"), "port", "answers TCP"
    reject = f"udp dport {port} counter reject with icmp port-unreachable"
    yield "UDP rejected", lambda: lan.drop("router", reject), "port", "nothing listens"
    yield "unplugged", lambda: lan.unplug("router"), "port", ""
    yield "answers lost", lambda: lan.drop("node-1", f"ip saddr {router} ip protocol udp counter drop"), "port", "answers TCP"
    one_way = f"ip saddr {router} ip daddr != 224.0.0.0/4 counter drop"
    yield "one way", lambda: lan.drop("node-1", one_way), "direction", "one-way"


@scenario("32d", "doctor net, while a firewall drops, rejects, or lets one way through", "each named; exit status 0 only without")
def diagnosed(lab: Lab, result: Result) -> None:
    cluster = lab.fresh()
    named = []
    for what, strike, check, words in faults(lab):
        strike()
        try:
            told = doctor(cluster, "node-1")
        finally:
            lab.lan.heal()
        failed = failing(told)
        named.append(f"{what}: {', '.join(failed) or 'well'}")
        if check:
            result.target_met(check in failed and words in failed[check], f"{what}: {failed}")
            continue
        result.target_met(not failed, f"{what}: {failed}")
        passed = {entry["name"]: entry["what"] for entry in told if entry["outcome"] == "pass"}
        result.figure(f"{passed.get('mtu')}; {passed.get('mdns')}")
        result.target_met({"trust", "mtu", "mdns"} <= set(passed), f"passed are {list(passed)}")
    lab.whole(cluster)
    lab.lan.unplug("node-2")
    cluster.until("node-2 is missed", lambda: not cluster.serves("node-2"), 20.0)
    failed = failing(doctor(cluster, "router"))
    result.target_met("node-2" in failed.get("node", ""), f"the router's own: {failed}")
    lab.lan.heal()
    result.runs += 1
    result.figure("; ".join(named))
    lab.discard()
