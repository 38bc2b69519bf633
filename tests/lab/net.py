"""A LAN on one machine: every machine is a network namespace, a bridge in one more is the switch.

    router ----+            a cable is a veth pair: `eth0` at the machine, `port-NAME` at the switch
    node-1 ----+ switch     cut: the port goes down                  slow: tbf at both ends
    client ----+            lossy, one-way: nftables at whoever hears    late, twice, bent: relay.py in the cable

Frames are dropped where they arrive, never where they leave: a sender whose own filter drops gets an error from the
system, and a real cable gives none. `blackhole` is the exception, and is named as one. Offloads are off at every end:
with them the kernel leaves checksums to hardware that is not there, and every frame that passes a relay is lost.

Names begin with a prefix and the process id of the lab, so that `remove_leftovers` finds what a killed lab left. All
of it needs root; `missing` says what else a machine lacks.
"""

import contextlib
import ctypes
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

from relay import ETH_P_ALL, FRAME_BYTES_MAX, Relay

PREFIX = "moemeshlab"
# The address plan: 10.77.0.0/24, which no machine of a test network is likely to use. Nothing leaves the namespaces.
SUBNET = "10.77.0."
CLONE_NEWNET = 0x40000000
NAMESPACES = pathlib.Path("/run/netns")
CGROUPS = pathlib.Path("/sys/fs/cgroup")
# Period over which a CPU quota is counted, the kernel's default.
QUOTA_PERIOD_US = 100_000
# Offloads that make a frame other on the wire than in memory.
OFFLOADS = ("tx", "sg", "gso", "gro", "tso")
# Program and the Debian package that has it.
PROGRAMS = {"ip": "iproute2", "tc": "iproute2", "nft": "nftables", "ethtool": "ethtool"}

LIBC = ctypes.CDLL(None, use_errno=True)


def missing() -> list[str]:
    """What this machine lacks for the lab, each with its remedy; empty if nothing."""
    found = []
    if os.uname().sysname != "Linux":
        return ["Linux (network namespaces, cgroups)"]
    if os.geteuid() != 0:
        found.append("root, for network namespaces: make lab SUDO=sudo")
    packages = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
    if packages:
        found.append(
            f"{', '.join(p for p in PROGRAMS if shutil.which(p) is None)}: apt-get install {' '.join(packages)}"
        )
    if not found:
        found += untried()
    return found


def untried() -> list[str]:
    """What the kernel refuses although the programs are there."""
    name, found = f"{PREFIX}{os.getpid()}-try", []
    try:
        run("ip", "netns", "add", name)
        run("ip", "-n", name, "link", "add", "one", "type", "veth", "peer", "name", "other")
        run("ip", "-n", name, "link", "add", "switch", "type", "bridge")
        run(
            "tc",
            "-n",
            name,
            "qdisc",
            "add",
            "dev",
            "one",
            "root",
            "tbf",
            "rate",
            "10mbit",
            "burst",
            "32kb",
            "latency",
            "50ms",
        )
        rules(name, ["numgen random mod 10 < 1 drop"])
    except subprocess.CalledProcessError as error:
        words = " ".join(error.cmd)
        found.append(f"a kernel that does `{words}` (it says: {error.stderr.strip()}); containers need --privileged")
    finally:
        subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL, check=False)
    return found


def run(*command: str, given: str | None = None) -> str:
    """Runs a program to its end; its output. Raises where it fails."""
    return subprocess.run(command, check=True, capture_output=True, text=True, input=given).stdout


@contextlib.contextmanager
def inside(namespace: str) -> Iterator[None]:
    """This thread is in the namespace: sockets it opens and processes it starts belong there."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    there = os.open(NAMESPACES / namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(there)
        yield
    finally:
        enter(before)
        os.close(there)
        os.close(before)


def enter(descriptor: int) -> None:
    if LIBC.setns(descriptor, CLONE_NEWNET) != 0:
        raise OSError(ctypes.get_errno(), "setns")


class Capture:
    """Every frame that a machine sends or receives, while the body runs."""

    def __init__(self, lan: "Lan", machine: str) -> None:
        with lan.at(machine):
            self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, ETH_P_ALL)
        self.socket.bind(("eth0", 0))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        self.socket.settimeout(0.1)
        self.frames: list[bytes] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.listen, daemon=True)

    def listen(self) -> None:
        while True:
            try:
                self.frames.append(self.socket.recv(FRAME_BYTES_MAX))
            except TimeoutError:
                if self.over.is_set():
                    return
            except OSError:
                # The interface went down for a moment.
                continue

    def __enter__(self) -> "Capture":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()
        self.socket.close()


class Lan:
    """Machines and the cables between them and the switch."""

    def __init__(self, machines: list[str]) -> None:
        self.prefix = f"{PREFIX}{os.getpid()}-"
        self.machines = machines
        self.switch = self.prefix + "switch"
        self.address = {name: f"{SUBNET}{index + 1}" for index, name in enumerate(machines)}
        self.rules: dict[str, list[str]] = {}
        self.relays: dict[str, Relay] = {}
        self.holes: list[tuple[str, str]] = []
        self.slow: set[str] = set()
        self.cut: set[str] = set()
        self.quotas: dict[str, pathlib.Path] = {}
        self.usurped: list[tuple[str, str]] = []
        # Machines that were given another address, and the one they had.
        self.moved: dict[str, str] = {}
        self.made: list[str] = []

    def build(self) -> None:
        """Makes namespaces, switch and cables."""
        self.make_namespace(self.switch)
        batch(self.switch, "link add bridge type bridge forward_delay 0 stp_state 0", "link set bridge up")
        for name in self.machines:
            self.make_namespace(self.namespace(name))
            port = port_of(name)
            batch(
                self.switch,
                f"link add {port} type veth peer name eth0 netns {self.namespace(name)}",
                f"link set {port} master bridge up",
            )
            batch(self.namespace(name), f"address add {self.address[name]}/24 dev eth0", "link set eth0 up")
            plain(self.switch, port)
            plain(self.namespace(name), "eth0")

    def make_namespace(self, namespace: str) -> None:
        run("ip", "netns", "add", namespace)
        self.made.append(namespace)
        with inside(namespace):
            # Nobody speaks IPv6 here; without it the switch is silent.
            pathlib.Path("/proc/sys/net/ipv6/conf/all/disable_ipv6").write_text("1")
        run("ip", "-n", namespace, "link", "set", "lo", "up")

    def namespace(self, machine: str) -> str:
        return self.prefix + machine

    def at(self, machine: str) -> contextlib.AbstractContextManager[None]:
        """This thread is on that machine."""
        return inside(self.namespace(machine))

    def connect(self, machine: str, to: str, port: int, seconds: float) -> socket.socket:
        """A TCP connection from one machine to another."""
        with self.at(machine):
            stream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        stream.settimeout(seconds)
        try:
            stream.connect((self.address[to], port))
        except OSError:
            stream.close()
            raise
        return stream

    # What goes wrong on a LAN, and `heal`, which ends all of it.

    def unplug(self, machine: str) -> None:
        self.cut.add(machine)
        run("ip", "-n", self.switch, "link", "set", port_of(machine), "down")

    def plug(self, machine: str) -> None:
        self.cut.discard(machine)
        run("ip", "-n", self.switch, "link", "set", port_of(machine), "up")

    def deafen(self, listener: str, speaker: str) -> None:
        """The listener hears nothing of the speaker, who is not told."""
        self.drop(listener, f"ip saddr {self.address[speaker]} counter drop")

    def lose(self, one: str, other: str, share: float) -> None:
        """Each packet between the two is lost with this probability."""
        for listener, speaker in ((one, other), (other, one)):
            chance = f"numgen random mod 10000 < {round(share * 10_000)}"
            self.drop(listener, f"ip saddr {self.address[speaker]} {chance} counter drop")

    def drop(self, listener: str, rule: str) -> None:
        self.rules.setdefault(listener, []).append(rule)
        self.apply(listener)

    def apply(self, listener: str) -> None:
        rules(self.namespace(listener), self.rules.get(listener, []))

    def dropped(self) -> int:
        """Packets that rules have dropped since they were made."""
        count = 0
        for listener, rules in self.rules.items():
            if rules:
                listed = run("ip", "netns", "exec", self.namespace(listener), "nft", "list table inet lab")
                count += sum(map(int, re.findall(r"counter packets (\d+)", listed)))
        return count

    def blackhole(self, machine: str, towards: str) -> None:
        """The machine has no way to another and its own system says so at once."""
        self.holes.append((machine, towards))
        run("ip", "-n", self.namespace(machine), "route", "add", "blackhole", f"{self.address[towards]}/32")

    def slow_down(self, machine: str, megabits: int) -> None:
        """The machine's cable carries this many Mbit/s each way."""
        self.slow.add(machine)
        # Ten full frames at least, and what passes within 10 ms: a busy machine wakes the queue that late.
        burst = max(15_000, megabits * 1_000_000 // 8 // 100)
        shape = ("root", "tbf", "rate", f"{megabits}mbit", "burst", str(burst), "latency", "50ms")
        run("tc", "-n", self.namespace(machine), "qdisc", "replace", "dev", "eth0", *shape)
        run("tc", "-n", self.switch, "qdisc", "replace", "dev", port_of(machine), *shape)

    def drip(self, machine: str) -> None:
        """What the machine says leaves at 1 kB/s: it is not silent, and nothing of it is ever whole in time."""
        self.slow.add(machine)
        shape = ("root", "tbf", "rate", "8kbit", "burst", "2000", "limit", "60000")
        run("tc", "-n", self.namespace(machine), "qdisc", "replace", "dev", "eth0", *shape)

    def bend(self, machine: str, **faults: float) -> Relay:
        """Puts a relay into the machine's cable, or changes what the one there does."""
        if machine not in self.relays:
            port, here, there = port_of(machine), f"here-{machine}", f"there-{machine}"
            run("ip", "-n", self.switch, "link", "add", here, "type", "veth", "peer", "name", there)
            plain(self.switch, here)
            plain(self.switch, there)
            batch(
                self.switch,
                f"link set {here} up",
                f"link set {there} up",
                f"link set {port} nomaster",
                f"link set {there} master bridge",
            )
            with inside(self.switch):
                self.relays[machine] = Relay(port, here)
        self.relays[machine].set(**faults)
        return self.relays[machine]

    def straighten(self, machine: str) -> None:
        """Takes the relay out of the cable."""
        self.relays.pop(machine).stop()
        run("ip", "-n", self.switch, "link", "del", f"here-{machine}")
        run("ip", "-n", self.switch, "link", "set", port_of(machine), "master", "bridge")

    def throttle(self, name: str, pid: int, share: float) -> None:
        """The process gets this share of one core."""
        folder = self.quotas.get(name)
        if folder is None:
            second = (CGROUPS / "cgroup.controllers").exists()
            folder = CGROUPS / ("" if second else "cpu") / (self.prefix + name)
            if second:
                (CGROUPS / "cgroup.subtree_control").write_text("+cpu")
            folder.mkdir()
            self.quotas[name] = folder
        quota = round(share * QUOTA_PERIOD_US)
        if (folder / "cpu.max").exists():
            (folder / "cpu.max").write_text(f"{quota} {QUOTA_PERIOD_US}")
        else:
            (folder / "cpu.cfs_quota_us").write_text(str(quota))
        (folder / "cgroup.procs").write_text(str(pid))

    def unthrottle(self, name: str) -> None:
        release(self.quotas.pop(name))

    def usurp(self, usurper: str, machine: str) -> None:
        """A machine answers at another's address, and the other is cut off."""
        self.unplug(machine)
        self.usurped.append((usurper, machine))
        run("ip", "-n", self.namespace(usurper), "address", "add", f"{self.address[machine]}/24", "dev", "eth0")
        # Whoever knows the old place of the address learns the new one.
        for other in self.machines:
            if other != machine:
                run("ip", "-n", self.namespace(other), "neighbour", "flush", "dev", "eth0")

    def move(self, machine: str, last: int) -> None:
        """The machine gets another address, as from a DHCP server; nobody is told. The old one is nobody's."""
        before, after = self.address[machine], f"{SUBNET}{last}"
        self.moved.setdefault(machine, before)
        batch(
            self.namespace(machine), f"address del {before}/24 dev eth0", f"address add {after}/24 dev eth0"
        )
        self.address[machine] = after

    def deaf_to_multicast(self, machine: str) -> None:
        """The machine hears no multicast, as on Wi-Fi that keeps its clients apart, or behind a router."""
        self.drop(machine, "ip daddr 224.0.0.0/4 counter drop")
        self.drop(machine, "ip6 daddr ff00::/8 counter drop")

    def heal(self) -> None:
        """Everything is whole again."""
        for machine, before in self.moved.items():
            after = self.address[machine]
            batch(self.namespace(machine), f"address del {after}/24 dev eth0", f"address add {before}/24 dev eth0")
            self.address[machine] = before
        self.moved.clear()
        for machine in list(self.relays):
            self.straighten(machine)
        for usurper, machine in self.usurped:
            run("ip", "-n", self.namespace(usurper), "address", "del", f"{self.address[machine]}/24", "dev", "eth0")
            for other in self.machines:
                run("ip", "-n", self.namespace(other), "neighbour", "flush", "dev", "eth0")
        self.usurped.clear()
        for machine in list(self.cut):
            self.plug(machine)
        for listener, rules in self.rules.items():
            if rules:
                rules.clear()
                self.apply(listener)
        for machine, towards in self.holes:
            run("ip", "-n", self.namespace(machine), "route", "del", "blackhole", f"{self.address[towards]}/32")
        self.holes.clear()
        for machine in self.slow:
            for namespace, interface in ((self.namespace(machine), "eth0"), (self.switch, port_of(machine))):
                # One that drips is shaped at one end only.
                subprocess.run(
                    ["tc", "-n", namespace, "qdisc", "del", "dev", interface, "root"],
                    stderr=subprocess.DEVNULL,
                    check=False,
                )
        self.slow.clear()
        for name in list(self.quotas):
            self.unthrottle(name)

    def close(self) -> None:
        """Removes all of it, whatever state it is in."""
        for relay in self.relays.values():
            relay.stop()
        for folder in self.quotas.values():
            release(folder)
        for namespace in reversed(self.made):
            subprocess.run(["ip", "netns", "del", namespace], stderr=subprocess.DEVNULL, check=False)
        self.relays, self.quotas, self.made = {}, {}, []


def port_of(machine: str) -> str:
    return f"port-{machine}"


def batch(namespace: str, *lines: str) -> None:
    run("ip", "-n", namespace, "-batch", "-", given="\n".join(lines) + "\n")


def plain(namespace: str, interface: str) -> None:
    """Frames on the wire are what the programs sent."""
    settings = [word for offload in OFFLOADS for word in (offload, "off")]
    run("ip", "netns", "exec", namespace, "ethtool", "-K", interface, *settings)


def rules(namespace: str, lines: list[str]) -> None:
    """These rules for what the namespace hears, instead of those before."""
    chain = ["chain heard {", "type filter hook prerouting priority -300", *lines, "}"]
    text = ["table inet lab", "delete table inet lab", "table inet lab {", *chain, "}"]
    run("ip", "netns", "exec", namespace, "nft", "-f", "-", given="\n".join(text) + "\n")


def release(folder: pathlib.Path) -> None:
    """Ends a cgroup; what still runs in it goes to the one above."""
    with contextlib.suppress(OSError):
        for pid in (folder / "cgroup.procs").read_text().split():
            (folder.parent / "cgroup.procs").write_text(pid)
        folder.rmdir()


def remove_leftovers() -> list[str]:
    """Removes what labs that are over left behind; the names of it. Processes in their namespaces are killed."""
    gone = []
    for path in sorted(NAMESPACES.glob(f"{PREFIX}*")) if NAMESPACES.exists() else []:
        if not over(path.name):
            continue
        for pid in run("ip", "netns", "pids", path.name).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        # The kernel frees cables with the namespace once nobody is left in it.
        time.sleep(0.05)
        subprocess.run(["ip", "netns", "del", path.name], check=False)
        gone.append(path.name)
    for folder in [*CGROUPS.glob(f"{PREFIX}*"), *CGROUPS.glob(f"cpu/{PREFIX}*")]:
        if over(folder.name):
            release(folder)
            gone.append(str(folder))
    return gone


def over(name: str) -> bool:
    """Whether the lab that made something of this name is gone."""
    owner = re.match(rf"{PREFIX}(\d+)-", name)
    return owner is not None and not pathlib.Path("/proc", owner[1]).exists()
