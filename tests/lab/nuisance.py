"""Scenarios of peers that wear others out: rows 33, 35 and 40."""

import contextlib
import json
import pathlib
import random
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from client import HTTP_PORT
from cluster import KEY, MESH_PORT, ROOT, Cluster, Process
from discovery import ELSEWHERE, SETTLE_S, discovery_cpu_s
from oracles import Result
from registry import scenario
from trial import Lab

ROGUE, GUEST = "rogue", "guest"
# A member whose key the attacker has, and a node that lends what it fetched.
MEMBER, LENDER = "member", "lender"
LEND_PORT, DISCOVERY_PORT = 8631, 8622
# The router closes what does not go on within 5 s; the rest is what a busy machine adds.
CLOSED_WITHIN_S, LATE_S = 5.0, 0.5
ATTACK_S = 7
PEER_KIB = 8 << 10
# Headers of a request have 30 s (router, http/serve.rs).
HTTP_CONNECTIONS, HTTP_WITHIN_S = 64, 30.0
FLOOD_S, FLOOD_RATE = 10, 400
FLOOD_KIB = 2 << 10
# What discovery takes of a core: 5 % and, once, 200 ms and what is used until that is noticed, which takes a second
# (mesh-discovery, budget.rs and session.rs).
CPU_SHARE, CPU_ONCE_S = 0.05, 1.2
# Connections whose keys are not known yet, and of members (mesh-discovery, swarm.rs).
SOCKETS_MAX = 16 + 64
# It rests 10 s after a flood, then twice as long.
RESTS_S = 60.0
FUZZ_S = 20
FUZZ_KIB = 32 << 10
CORPUS = ROOT / "tests" / "fuzz" / "corpus"


class Attack(NamedTuple):
    """One run of the program `nuisance`, from the attacker's machine."""

    name: str
    # What it is told: a kind of attack and its arguments.
    words: tuple[str, ...]


class Lair:
    """A cluster with one node more, which lends, and a member's key in the wrong hands."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.cluster = lab.fresh()
        self.member = self.cluster.start_guest(MEMBER, ROGUE, ())
        self.cluster.until("the member is in", lambda: self.cluster.serves(MEMBER), 60)
        self.member.kill()
        del self.cluster.nodes[MEMBER]
        flags = ["--name", LENDER, "--join", self.cluster.token(), "--lend-at", f"0.0.0.0:{LEND_PORT}"]
        arguments = ["node", *self.cluster.home(LENDER), *flags]
        log = self.cluster.folder / f"{LENDER}.log"
        self.lender = Process(lab.program, lab.lan, GUEST, arguments, log)
        self.cluster.nodes[LENDER] = self.lender
        self.cluster.until("the lender serves", lambda: self.cluster.serves(LENDER), 60)

    def attack(self, name: str, kind: str, *words: str, stranger: bool = False, lender: bool = False) -> Attack:
        """On the router, or on the node that lends; with the member's key, or with one of its own."""
        at = (GUEST, LEND_PORT, ["--of", str(self.cluster.folder / LENDER)]) if lender else ("router", MESH_PORT, [])
        machine, port, of = at
        who = ["--state", str(self.cluster.folder / MEMBER), *of, *(["--stranger"] if stranger else [])]
        return Attack(name, (kind, *who, "--to", f"{self.lab.lan.address[machine]}:{port}", *words))

    def processes(self) -> dict[str, Process]:
        return {"router": self.cluster.router, **self.cluster.nodes}


def strike(lab: Lab, attacks: list[Attack], look: Callable[[], object] = lambda: None) -> dict[str, dict[str, Any]]:
    """Runs attacks side by side, and looks ten times a second while they last; what each of them met."""
    running = {}
    with contextlib.ExitStack() as stack:
        for attack in attacks:
            command = [str(lab.options.rogues / "nuisance"), *attack.words]
            with lab.lan.at(ROGUE):
                process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            stack.callback(process.kill)
            running[attack.name] = process
        while any(process.poll() is None for process in running.values()):
            look()
            time.sleep(0.1)
        told = {}
        for name, process in running.items():
            out, errors = process.communicate()
            if process.returncode != 0:
                raise RuntimeError(f"{name}: {errors[-400:]}")
            told[name] = json.loads(out)
        return told


class Memory:
    """What processes had before, and the most they had since."""

    def __init__(self, processes: dict[str, Process]) -> None:
        self.processes = processes
        self.before = {name: process.memory_kib() for name, process in processes.items()}
        self.most = dict(self.before)

    def look(self) -> None:
        for name, process in self.processes.items():
            if process.alive:
                self.most[name] = max(self.most[name], process.memory_kib())

    def grown(self, name: str) -> int:
        return self.most[name] - self.before[name]


class Drips(threading.Thread):
    """Connections to the HTTP port with one byte of a header per second each; when each of them was cut."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(daemon=True)
        self.open = [lab.lan.connect("client", "router", HTTP_PORT, 5.0) for _ in range(HTTP_CONNECTIONS)]
        self.began = time.monotonic()
        self.cut: list[float] = []
        self.over = threading.Event()
        self.start()

    def run(self) -> None:
        text = b"GET /v1/models HTTP/1.1\r\nHost: router\r\nX-" + b"a" * 200
        number = 0
        while self.open and not self.over.is_set():
            for stream in list(self.open):
                with contextlib.suppress(BlockingIOError):
                    try:
                        stream.setblocking(False)
                        stream.send(text[number : number + 1])
                        # An answer that says why comes before the end.
                        while stream.recv(4096):
                            pass
                        raise ConnectionResetError
                    except BlockingIOError:
                        continue
                    except OSError:
                        self.cut.append(time.monotonic() - self.began)
                        self.open.remove(stream)
                        stream.close()
            number += 1
            time.sleep(1.0)

    def close(self) -> None:
        self.over.set()
        self.join()
        for stream in self.open:
            stream.close()


def waves(lair: Lair) -> Iterator[tuple[str, list[Attack]]]:
    """What happens at a time. A member has one connection for weights at a machine, so these come one after another."""
    seconds = ("--seconds", str(ATTACK_S))

    def slow(who: str, protocol: str, act: str, places: int, lender: bool = False) -> Attack:
        words = ("--protocol", protocol, "--act", act, "--places", str(places), *seconds)
        name = f"{who} {protocol} {act}{' at a node' if lender else ''}"
        return lair.attack(name, "slow", *words, stranger=who == "stranger", lender=lender)

    def initials(lender: bool) -> Attack:
        name = f"stranger first packets{' at a node' if lender else ''}"
        protocol = ("--protocol", "weights" if lender else "mesh")
        return lair.attack(name, "initials", *protocol, "--places", "256", *seconds, stranger=True, lender=lender)

    yield "strangers", [
        slow("stranger", "mesh", "drip", 4),
        slow("stranger", "weights", "loop", 4),
        slow("stranger", "join", "drip", 4),
        slow("stranger", "join", "hole", 4),
        slow("stranger", "join", "crumbs", 4),
        slow("stranger", "weights", "drip", 4, lender=True),
    ]
    yield "half handshakes", [
        slow("stranger", "mesh", "half", 24),
        slow("stranger", "weights", "half", 24, lender=True),
        initials(False),
        initials(True),
    ]
    yield "a member, no hello", [
        slow("member", "mesh", "silent", 2),
        slow("member", "mesh", "drip", 2),
        slow("member", "mesh", "loop", 2),
        slow("member", "mesh", "crumbs", 2),
    ]
    yield "a member, holes", [slow("member", "mesh", "hole", 24)]
    yield "a member with a hello", [slow("member", "mesh", "hello-drip", 1)]
    for act in ("drip", "hole", "crumbs", "loop"):
        yield f"a member, weights {act}", [
            slow("member", "weights", act, 1),
            slow("member", "weights", act, 1, lender=True),
        ]


def judge_wave(result: Result, wave: str, told: dict[str, dict[str, Any]], memory: Memory) -> None:
    """Closed in time, within the memory of a peer."""
    words = []
    for name, met in told.items():
        if "sent" in met:
            words.append(f"{name}: {met['sent']} sent, {sum(met['answers'].values())} answers")
            continue
        # A member may keep a connection for weights, and then it is the streams that are ended.
        keeps = name.startswith("member weights")
        oldest = met["oldest_stream_s"] if keeps else met["oldest_s"]
        loops = keeps and name.split()[2] == "loop"
        words.append(
            f"{name}: {met['connected']} connections, {met['streams']} streams, {met['bytes']} bytes, oldest {oldest:.2f} s"
        )
        tried = met["connected"] + sum(met["refused"].values())
        result.target_met(tried > 0, f"{name}: it did nothing: {met}")
        if not loops:
            result.target_met(oldest <= CLOSED_WITHIN_S + LATE_S, f"{name}: open for {oldest:.1f} s: {met}")
        if name.startswith("member") or " join " in name:
            result.target_met(met["connected"] > 0, f"{name}: it met nobody: {met}")
    for name in ("router", LENDER):
        grown = memory.grown(name)
        words.append(f"{name} {grown:+d} KiB")
        result.target_met(grown <= PEER_KIB, f"{wave}: {name} grew by {grown} KiB")
    result.figure(f"{wave}: {'; '.join(words)}", **{wave: told})


@scenario(
    "35",
    "QUIC and HTTP slow-loris: dripped, gapped, endless, half shaken; by strangers and by a member",
    f"closed or refused <= {CLOSED_WITHIN_S:.0f} s, <= {PEER_KIB >> 10} MiB per peer; the others serve on, O1",
)
def slow_loris(lab: Lab, result: Result) -> None:
    if lab.options.rogues is None:
        return result.lacks("a nuisance: MOEMESH_ROGUES=/folder/of/nuisance")
    lair = Lair(lab)
    cluster = lair.cluster
    with lab.load(cluster) as stories:
        drips = Drips(lab)
        try:
            lab.tellers.flowing(2)
            failed = cluster.metric("handshakes_failed_total")
            for wave, attacks in waves(lair):
                memory = Memory({"router": cluster.router, LENDER: lair.lender})
                told = strike(lab, attacks, memory.look)
                judge_wave(result, wave, told, memory)
            failed = cluster.metric("handshakes_failed_total") - failed
            result.target_met(failed > 0, "no handshake failed")
            while drips.open and time.monotonic() < drips.began + HTTP_WITHIN_S + 5.0:
                time.sleep(0.1)
        finally:
            drips.close()
    result.runs += 1
    result.judge(stories)
    last = max(drips.cut, default=0.0)
    result.figure(
        f"HTTP: {len(drips.cut)} of {HTTP_CONNECTIONS} connections cut, the last after {last:.1f} s; {failed:.0f} handshakes failed",
        http_cut=len(drips.cut),
        http_last_s=last,
    )
    result.target_met(len(drips.cut) == HTTP_CONNECTIONS, f"{len(drips.open)} connections to the API were not cut")
    result.target_met(last <= HTTP_WITHIN_S + 2.0, f"a connection to the API was cut after {last:.1f} s")
    # Still a member: whoever is honest with that key is served.
    serving = cluster.serving()
    result.target_met({*cluster.names, LENDER} <= set(serving), f"only {serving} serve")
    lab.check_footprints(cluster, result)
    lab.discard()
    return None


def sockets(process: Process, port: int) -> int:
    """Connections at this port that the process has taken."""
    count = 0
    for line in pathlib.Path(f"/proc/{process.popen.pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        # Established ones; those that wait to be taken have no inode.
        count += int(fields[1].split(":")[1], 16) == port and fields[3] == "01" and fields[9] != "0"
    return count


def listens(process: Process, port: int) -> bool:
    lines = pathlib.Path(f"/proc/{process.popen.pid}/net/tcp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == "0A" for line in lines)


@scenario(
    "33",
    f"floods at the discovery port, {FLOOD_RATE} connections/s: by a stranger and by a member",
    f"a stranger gets no answer; <= {FLOOD_KIB >> 10} MiB, <= {CPU_SHARE:.0%} CPU + {CPU_ONCE_S} s; discovery comes back; O1",
)
def flooded(lab: Lab, result: Result) -> None:
    if lab.options.rogues is None:
        return result.lacks("a nuisance: MOEMESH_ROGUES=/folder/of/nuisance")
    cluster = lab.fresh()
    router, victim = cluster.router, cluster.names[-1]
    to = f"{lab.lan.address['router']}:{DISCOVERY_PORT}"
    rate = ("--seconds", str(FLOOD_S), "--rate", str(FLOOD_RATE), "--seed", str(lab.options.seed))
    with lab.load(cluster) as stories:
        lab.tellers.flowing(2)
        # Memory is taken by the load, too.
        time.sleep(SETTLE_S)
        for who in ("stranger", "member"):
            cluster.until("discovery takes connections", lambda: listens(router, DISCOVERY_PORT), RESTS_S)
            words = ("peer", "--state", str(cluster.folder / victim), "--to", to, *rate)
            words += ("--stranger",) if who == "stranger" else ()
            memory, most = Memory({"router": router}), [0]

            def look(memory: Memory = memory, most: list[int] = most) -> None:
                memory.look()
                most[0] = max(most[0], sockets(router, DISCOVERY_PORT))

            began, used = time.monotonic(), discovery_cpu_s(router)
            met = strike(lab, [Attack(who, words)], look)[who]
            took, used = time.monotonic() - began, discovery_cpu_s(router) - used
            grown, allowed = memory.grown("router"), CPU_SHARE * took + CPU_ONCE_S
            result.figure(
                f"{who}: {met['tried']} tried, {met['connected']} connections, {met['secured']} handshakes, "
                f"{met['bytes'] >> 10} KiB, {met['answers']} answers; {most[0]} sockets at most, router {grown:+d} KiB, "
                f"discovery {used:.2f} s of CPU in {took:.0f} s",
                **{who: met | {"grown_kib": grown, "cpu_s": used, "sockets": most[0]}},
            )
            result.target_met(met["secured"] > 0, f"{who}: no handshake was completed, the attack did not hit: {met}")
            if who == "stranger":
                result.target_met(met["answers"] == 0, f"a stranger got {met['answers']} answers")
            else:
                result.target_met(met["answers"] > 0, f"a member got no answer, the attack did not hit: {met}")
            result.target_met(grown <= FLOOD_KIB, f"{who}: the router grew by {grown} KiB")
            result.target_met(used <= allowed, f"{who}: discovery took {used:.2f} s of CPU")
            result.target_met(most[0] <= SOCKETS_MAX, f"{who}: {most[0]} connections at a time")
        cluster.until("discovery takes connections", lambda: listens(router, DISCOVERY_PORT), RESTS_S)
    # Discovery is what tells the nodes where the router has gone.
    before = {name: cluster.node(name)["connections"] for name in cluster.names}
    lab.lan.move("router", ELSEWHERE)
    cluster.earlier.update(before)
    took = cluster.until("all nodes find the router again", lambda: len(cluster.serving()) == len(cluster.names), RESTS_S)
    result.runs += 1
    result.judge(stories)
    rested = router.log.read_text(errors="replace").count("discovery rests")
    result.figure(f"discovery rested {rested} times; {took:.1f} s after it moved all nodes found the router", found_s=took)
    lab.discard()
    return None


def bend(chance: random.Random, text: bytes) -> bytes:
    """Some bytes other, fewer or more."""
    bytes_ = bytearray(text or b"{}")
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(bytes_))
        match chance.randrange(4):
            case 0:
                bytes_[at] ^= 1 << chance.randrange(8)
            case 1:
                del bytes_[at + 1 :]
            case 2:
                bytes_ += bytes_[at:][:65_536]
            case _:
                bytes_[at : at + 4] = chance.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"[[[[", b"1e99", b'"\\u'])
    return bytes(bytes_) or b"0"


class Plain(threading.Thread):
    """The same inputs by UDP and TCP, without any key but that of the API."""

    def __init__(self, lab: Lab, until: float) -> None:
        super().__init__(daemon=True)
        self.lab, self.until = lab, until
        self.chance = random.Random(lab.options.seed)
        self.inputs = [path.read_bytes() for path in sorted(CORPUS.glob("*/*"))]
        self.bodies = [path.read_bytes() for path in sorted(CORPUS.glob("http/*"))]
        self.count = {"datagrams": 0, "TCP": 0, "HTTP": 0}
        self.statuses: dict[str, int] = {}
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            with self.lab.lan.at(ROGUE):
                udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            with udp:
                while time.monotonic() < self.until:
                    self.turn(udp)
        except Exception as error:  # noqa: BLE001  (it is told at the end)
            self.error = error

    def next(self, inputs: list[bytes]) -> bytes:
        text = self.chance.choice(inputs)
        return bend(self.chance, text) if self.chance.random() < 0.75 else text

    def turn(self, udp: socket.socket) -> None:
        address = self.lab.lan.address
        for _ in range(20):
            # Behind nothing, and behind the first bytes of a long header.
            head = self.chance.choice([b"", b"\xc0\0\0\0\1\x08" + self.chance.randbytes(8), b"\x40" + self.chance.randbytes(8)])
            datagram = (head + self.next(self.inputs)).ljust(self.chance.choice([0, 1200]), b"\0")[:1400]
            for machine, port in (("router", MESH_PORT), (GUEST, LEND_PORT)):
                udp.sendto(datagram, (address[machine], port))
                self.count["datagrams"] += 1
        for port in (DISCOVERY_PORT, HTTP_PORT):
            with contextlib.suppress(OSError):
                self.send(port, self.next(self.inputs), 0.02)
                self.count["TCP"] += 1
        body, path = self.next(self.bodies), self.chance.choice(["/v1/models", "/api/v1/nodes", "/metrics"])
        if self.chance.random() < 0.8:
            # The first byte of these inputs names the form (moemesh-tests, fuzz/http.rs).
            path = "/v1/completions" if body[:1] == b"\1" else "/v1/chat/completions"
            body = body[1:]
        head = [f"POST {path} HTTP/1.1", "Host: router", f"Authorization: Bearer {KEY}", "Content-Type: application/json"]
        head += [f"Content-Length: {len(body)}", "Connection: close", "", ""]
        with contextlib.suppress(OSError):
            answer = self.send(HTTP_PORT, "\r\n".join(head).encode() + body, 0.2)
            self.count["HTTP"] += 1
            status = answer[9:12].decode("latin-1") or "no answer"
            self.statuses[status] = self.statuses.get(status, 0) + 1

    def send(self, port: int, text: bytes, seconds: float) -> bytes:
        """What is said to these bytes within this time; nobody waits for the rest."""
        with self.lab.lan.connect(ROGUE, "router", port, 2.0) as stream:
            stream.sendall(text)
            ready, _, _ = select.select([stream], [], [], seconds)
            return stream.recv(4096) if ready else b""


@scenario(
    "40",
    f"the fuzz targets' inputs, bent, at every live port for {FUZZ_S} s",
    f"no panic, everybody lives, <= {FUZZ_KIB >> 10} MiB, the same text before, meanwhile and after",
)
def fuzzed(lab: Lab, result: Result) -> None:
    if lab.options.rogues is None:
        return result.lacks("a nuisance: MOEMESH_ROGUES=/folder/of/nuisance")
    lair = Lair(lab)
    cluster = lair.cluster
    told_by = lair.processes()
    words = ("--corpus", str(CORPUS), "--seconds", str(FUZZ_S), "--seed", str(lab.options.seed))
    attacks = [
        lair.attack("control and lanes", "fuzz", "--protocol", "mesh", "--places", "2", *words),
        lair.attack("weights", "fuzz", "--protocol", "weights", "--places", "1", *words),
        lair.attack("weights of a node", "fuzz", "--protocol", "weights", "--places", "1", *words, lender=True),
        lair.attack("joining", "fuzz", "--protocol", "join", "--places", "2", *words, stranger=True),
    ]
    with lab.load(cluster) as stories:
        lab.tellers.flowing(2)
        memory = Memory(told_by)
        plain = Plain(lab, time.monotonic() + FUZZ_S)
        met = strike(lab, attacks, memory.look)
        plain.join()
    with lab.load(cluster) as later:
        time.sleep(1.0)
    result.runs += 1
    # Bodies that are in order take their turns, too.
    result.judge(stories, refused=True)
    result.judge(later)
    if plain.error:
        raise plain.error
    for name, seen in met.items():
        result.figure(f"{name}: {seen['connections']} connections, {seen['inputs']} inputs, {seen['bytes'] >> 10} KiB", **{name: seen})
        result.target_met(seen["inputs"] > 100, f"{name}: only {seen['inputs']} inputs: {seen['ends']}")
    counts = ", ".join(f"{number} {what}" for what, number in plain.count.items())
    answers = ", ".join(f"{number} of {status}" for status, number in sorted(plain.statuses.items()))
    result.figure(f"{counts}; answers {answers}", plain=plain.count, statuses=plain.statuses)
    result.target_met("400" in plain.statuses, f"no body was refused: {plain.statuses}")
    result.target_met(not plain.statuses.get("500"), f"{plain.statuses.get('500')} answers of 500")
    growth = {name: memory.grown(name) for name in told_by}
    result.figure(f"grown by at most {max(growth.values())} KiB", grown_kib=growth)
    for name, process in told_by.items():
        result.target_met(process.alive, f"{name} ended: {process.tail()[-300:]}")
        result.target_met(growth[name] <= FUZZ_KIB, f"{name} grew by {growth[name]} KiB")
    lab.check_footprints(cluster, result)
    lab.discard()
    return None
