"""Router and nodes as processes in machines of the LAN, what they say about themselves, and what they use.

A router makes its cluster when it first starts, and each node joins it with a token of its own, once. Their messages go to files in
the lab's folder. They end with the lab, however it ends: their standard input is a pipe of ours, and they stop when
it closes.
"""

import collections
import contextlib
import json
import os
import pathlib
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from client import PROMPTS, Client, Told
from faketime import environment
from net import Lan

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
MESH_PORT = 8621
KEY = "the-key-of-the-lab"
# A start takes a second; on a machine that builds something else, more.
STARTS_WITHIN_S = 60.0
POLL_S = 0.01
# A node whose connection is lost this often within this time flaps, and is kept out for a while on purpose
# (mesh-proto, health.rs). A scenario that is about something else takes another node, or another cluster, before that.
FLAPS_MAX, FLAP_WITHIN_S = 3, 60.0


# What the router counts for each node: calls that failed and why, and replies that came too late to matter.
OF_NODES = ("late", "gone", "refused", "rejected", "stale")


# Of packed experts, to find them in a node's memory: a node of three holds some ten of them.
SAMPLES = 32
SAMPLE_BYTES = 64


class Shape(NamedTuple):
    """What a cluster is made of; two scenarios with the same shape share a running cluster."""

    nodes: int = 3
    router: tuple[str, ...] = ()
    node: tuple[str, ...] = ()
    # Length of the stories it is asked for: some 0.6 s at full speed.
    tokens: int = 400
    # Whether nodes have the model; those that have not fetch it.
    empty: bool = False
    # Machines whose clocks are wrong, and by how much (clocks.py).
    clocks: tuple[tuple[str, str], ...] = ()


class Program:
    """The program under test."""

    def __init__(self, path: pathlib.Path, folder: pathlib.Path) -> None:
        self.path = path.resolve()
        self.model: pathlib.Path | str = ROOT / "models" / "tale-moe"
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("MOEMESH_")}
        cache = os.environ.get("MOEMESH_CACHE") or str(ROOT / "target" / "lab" / "cache")
        self.environment |= {"MOEMESH_CACHE": cache, "MOEMESH_THREADS": "1", "HOME": str(folder)}
        self.verbose: tuple[str, ...] = ()
        self.stories: dict[tuple[int, int], Told] = {}
        began = time.monotonic()
        self.ask("--version")
        self.begins_ms = (time.monotonic() - began) * 1e3

    def ask(self, *arguments: str) -> str:
        """What it prints, or nothing where it refuses."""
        done = subprocess.run(
            [self.path, *arguments], capture_output=True, text=True, env=self.environment, check=False
        )
        return done.stdout if done.returncode == 0 else ""

    def told(self, prompt: int, tokens: int) -> Told:
        """The story as a single process without a network tells it: what every stream must equal to the last bit."""
        if (prompt, tokens) not in self.stories:
            flags = ["--prompt", PROMPTS[prompt], "--max-tokens", str(tokens), "--ignore-eos", "--json"]
            command = [self.path, "reference", "--model", self.model, *flags]
            done = subprocess.run(command, capture_output=True, text=True, env=self.environment, check=True)
            last = json.loads(done.stdout.splitlines()[-1])
            self.stories[prompt, tokens] = Told(tuple(last["token_ids"]), last["logits_digest"])
        return self.stories[prompt, tokens]

    def weight_samples(self) -> list[bytes]:
        """Pieces of packed experts that occur in no other place."""
        draw = random.Random(1)
        cache = pathlib.Path(self.environment["MOEMESH_CACHE"])
        layers = [path.read_bytes() for path in sorted(cache.glob(f"{self.model.name}-*/q4/layer-*.bin"))]
        samples: list[bytes] = []
        while layers and len(samples) < SAMPLES:
            layer = draw.choice(layers)
            at = draw.randrange(len(layer) - SAMPLE_BYTES)
            piece = layer[at : at + SAMPLE_BYTES]
            if len(set(piece)) > SAMPLE_BYTES // 2:
                samples.append(piece)
        return samples


class Lie(NamedTuple):
    """A program that takes a node's arguments and answers wrongly, and how: it reads that from MOEMESH_LIE."""

    program: pathlib.Path
    way: str


class Process:
    """One process on one machine."""

    def __init__(
        self,
        program: Program,
        lan: Lan,
        machine: str,
        arguments: list[str],
        log: pathlib.Path,
        lie: Lie | None = None,
        more: dict[str, str] | None = None,
    ) -> None:
        self.machine = machine
        path, more = (lie.program, {"MOEMESH_LIE": lie.way}) if lie else (program.path, more or {})
        self.log = log
        self.began = time.monotonic()
        with lan.at(machine), log.open("ab") as errors:
            self.popen = subprocess.Popen(
                [path, *arguments, *program.verbose, "--stop-with-parent"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=program.environment | more,
            )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self) -> None:
        for line in self.popen.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def announced(self, key: str) -> Any:
        """Waits for a JSON line with this key."""
        end = time.monotonic() + STARTS_WITHIN_S
        while True:
            try:
                line = self.lines.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"{self.machine} did not say '{key}' within {STARTS_WITHIN_S:.0f} s") from None
            if line is None:
                raise RuntimeError(
                    f"{self.machine} ended with {self.popen.wait()} before it said '{key}': {self.tail()}"
                )
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict) and key in value:
                    return value[key]

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-1000:]

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def signal(self, number: signal.Signals) -> None:
        self.popen.send_signal(number)

    def kill(self) -> float:
        """`kill -9`; the instant it was sent."""
        now = time.monotonic()
        self.popen.kill()
        self.popen.wait()
        self.close()
        return now

    def stop(self, seconds: float = 35.0) -> int | None:
        """SIGTERM; the exit status, or `None` if it is still there after this time."""
        self.signal(signal.SIGTERM)
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if not self.alive:
                self.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.popen.stdin.close()

    def memory_kib(self) -> int:
        """Memory of its own. Not counted: pages of mapped files, which the system takes back when it wants."""
        text = pathlib.Path(f"/proc/{self.popen.pid}/status").read_text()
        return sum(int(size) for size in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+)", text, re.MULTILINE))

    def held(self, samples: list[bytes]) -> dict[int, int]:
        """Which samples of weights lie in memory of its own, and at which address."""
        found: dict[int, int] = {}
        with open(f"/proc/{self.popen.pid}/mem", "rb", 0) as memory:
            for line in pathlib.Path(f"/proc/{self.popen.pid}/maps").read_text().splitlines():
                area = re.match(r"(\w+)-(\w+) rw\S+ \S+ \S+ 0\s*(?!\[v)", line)
                if area is None:
                    continue
                begin, end = int(area[1], 16), int(area[2], 16)
                try:
                    memory.seek(begin)
                    text = memory.read(end - begin)
                except OSError:
                    continue
                found |= {number: begin + at for number, sample in enumerate(samples) if (at := text.find(sample)) >= 0}
        return found

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.popen.pid}/fd"))


class Footprint(NamedTuple):
    """What a process uses."""

    memory_kib: int
    descriptors: int


class Cluster:
    """A running cluster."""

    def __init__(self, program: Program, lan: Lan, folder: pathlib.Path, shape: Shape) -> None:
        self.program, self.lan, self.folder, self.shape = program, lan, folder, shape
        self.client = Client(lan, KEY)
        self.names = [node_name(index) for index in range(shape.nodes)]
        self.nodes: dict[str, Process] = {}
        # Connections each node had had when its process was started: it serves once it has had one more.
        self.earlier: dict[str, int] = {}
        # When each node was taken as the victim of a fault.
        self.struck: dict[str, list[float]] = {name: [] for name in self.names}
        folder.mkdir(parents=True)
        self.router = self.start_router()

    def start(self) -> None:
        """Starts every node and waits until all serve."""
        for name in self.names:
            self.start_node(name)
        self.router.announced("ready")
        self.until("all nodes serve", lambda: len(self.serving()) == len(self.names), STARTS_WITHIN_S)

    def start_router(self) -> Process:
        listen = ["--listen", f"0.0.0.0:{MESH_PORT}", "--http", "0.0.0.0:8620", "--api-key", KEY, "--announce"]
        arguments = ["router", *self.home("router"), "--model", str(self.program.model), *listen]
        arguments += ["--expect", str(self.shape.nodes), *self.shape.router]
        arguments = [argument.replace("{own}", str(self.folder)) for argument in arguments]
        more = self.clock("router")
        router = Process(self.program, self.lan, "router", arguments, self.folder / "router.log", more=more)
        router.announced("http")
        self.earlier.clear()
        return router

    def start_node(self, name: str, lie: Lie | None = None) -> Process:
        if lie:
            # Its end will be a loss besides that of the honest one before it.
            self.struck[name].append(time.monotonic())
        join = [] if (self.folder / name).exists() else ["--name", name, "--join", self.token()]
        model = [] if self.shape.empty else ["--model", str(self.program.model)]
        arguments = ["node", *self.home(name), *join, *model, *self.node_flags(name)]
        # The API answers once the router is ready, so not while nodes start for the first time.
        self.earlier[name] = self.node(name)["connections"] if name in self.nodes else 0
        log, more = self.folder / f"{name}.log", self.clock(name)
        self.nodes[name] = Process(self.program, self.lan, name, arguments, log, lie, more)
        return self.nodes[name]

    def start_guest(
        self, name: str, machine: str, flags: tuple[str, ...], empty: bool = False, token: str | None = None
    ) -> Process:
        """A node that is not one of the cluster's own, on a machine that may do something else besides; an `empty` one has no
        model, and fetches what it needs."""
        join = [] if (self.folder / name).exists() else ["--name", name, "--join", token or self.token()]
        model = [] if empty else ["--model", str(self.program.model)]
        arguments = ["node", *self.home(name), *join, *model, *flags]
        known = [node for node in self.state()["nodes"] if node["name"] == name]
        self.earlier[name] = known[0]["connections"] if known else 0
        log, more = self.folder / f"{name}.log", self.clock(machine)
        self.nodes[name] = Process(self.program, self.lan, machine, arguments, log, more=more)
        return self.nodes[name]

    def spared(self) -> list[str]:
        """Nodes that the router would take back at once: those it has not lost so often that they flap."""
        since = time.monotonic() - FLAP_WITHIN_S
        return [name for name, times in self.struck.items() if sum(at > since for at in times) < FLAPS_MAX - 1]

    def victim(self, chance: random.Random) -> str:
        """A node for the next fault: one of those that had the fewest lately."""
        since = time.monotonic() - FLAP_WITHIN_S
        lately = {name: sum(at > since for at in times) for name, times in self.struck.items()}
        name = chance.choice([name for name in self.names if lately[name] == min(lately.values())])
        self.struck[name].append(time.monotonic())
        return name

    def node_flags(self, name: str) -> tuple[str, ...]:
        """What this node is started with besides. `{own}` becomes a path of its own."""
        return tuple(flag.replace("{own}", str(self.folder / name)) for flag in self.shape.node)

    def clock(self, machine: str) -> dict[str, str]:
        """What makes a process of this machine see another time than there is."""
        by = dict(self.shape.clocks).get(machine)
        return environment(self.folder / f"{machine}.clock", by) if by else {}

    def home(self, name: str) -> list[str]:
        """The argument that names a machine's folder of keys and membership."""
        return ["--state", str(self.folder / name)]

    def token(self, *flags: str) -> str:
        """A join token, made on the router's machine."""
        with self.lan.at("router"):
            return self.command("token", *self.home("router"), *flags).strip().splitlines()[-1]

    def command(self, *arguments: str) -> str:
        done = subprocess.run(
            [self.program.path, *arguments], capture_output=True, text=True, env=self.program.environment, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"moemesh {' '.join(arguments)}: {done.stderr.strip()[-400:]}")
        return done.stdout

    # What it says.

    def state(self, seconds: float = 5.0) -> dict[str, Any]:
        """`/api/v1/nodes`."""
        return self.client.json("/api/v1/nodes", seconds)

    def node(self, name: str) -> dict[str, Any]:
        return next(node for node in self.state()["nodes"] if node["name"] == name)

    def serves(self, name: str) -> bool:
        """Whether this very process serves; what the router believes of one before it does not count."""
        return name in self.serving()

    def serving(self) -> list[str]:
        nodes = self.state()["nodes"]
        return [
            node["name"]
            for node in nodes
            if node["state"] == "serving" and node["connections"] > self.earlier.get(node["name"], 0)
        ]

    def counters(self) -> collections.Counter[str]:
        """What can tell that calls failed, as running numbers; and how many there were."""
        state = self.state()
        count = collections.Counter({name: value for name, value in state["router"].items() if isinstance(value, int)})
        for name in OF_NODES:
            count[name] = sum(node.get(name, 0) for node in state["nodes"])
        for node in state["nodes"]:
            count[f"{node['name']}.calls"] = node["calls"]
        return count

    def metric(self, name: str) -> float:
        """A series without labels."""
        _, text = self.client.ask("GET", "/metrics")
        found = re.search(rf"^moemesh_{name} (\S+)$", text.decode(), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def until(self, what: str, wanted: Callable[[], bool], seconds: float) -> float:
        """Waits until something is so; how long that took. Raises where it takes longer."""
        began = time.monotonic()
        while time.monotonic() < began + seconds:
            with contextlib.suppress(OSError, StopIteration):
                if wanted():
                    return time.monotonic() - began
            time.sleep(POLL_S)
        raise Never(f"not within {seconds:g} s: {what}\n{self.describe()}")

    def describe(self) -> str:
        try:
            state = self.state()
            nodes = ", ".join(f"{node['name']} {node['state']}" for node in state["nodes"])
            return f"{nodes}; running {state['router'].get('running')}, waiting {state['router'].get('waiting')}"
        except OSError as error:
            return f"the router does not answer: {error}; {self.router.tail()}"

    # What it uses.

    def footprints(self) -> dict[int, tuple[str, Footprint]]:
        """By process id, so that a restarted one is another. The KV cache keeps, on purpose, what it once took of
        the memory it was given (--kv-memory), so it is not counted."""
        found = {}
        for process in [self.router, *self.nodes.values()]:
            if process.alive:
                memory = process.memory_kib()
                if process is self.router:
                    memory -= self.state()["router"]["kv_peak_bytes"] >> 10
                found[process.popen.pid] = (process.machine, Footprint(memory, process.descriptors()))
        return found

    def footprint(self, process: Process) -> Footprint:
        """That of one."""
        return self.footprints()[process.popen.pid][1]

    def stop(self) -> None:
        """Kills everything."""
        for process in [*self.nodes.values(), self.router]:
            if process.alive:
                process.kill()


class Never(Exception):
    """Something that had to happen did not."""


def node_name(index: int) -> str:
    return f"node-{index + 1}"


def panics(folder: pathlib.Path) -> list[str]:
    """Lines of logs that no process may ever write."""
    found = []
    for log in sorted(folder.glob("**/*.log")):
        for line in log.read_text(errors="replace").splitlines():
            if "panicked at" in line or "RUST_BACKTRACE" in line:
                found.append(f"{log.name}: {line.strip()[:200]}")
    return found


def say(text: str) -> None:
    """Progress, for people."""
    print(text, file=sys.stderr, flush=True)
