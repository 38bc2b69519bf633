"""Scenarios of disks that are full, lose what they held, or rot: rows 20 and 21."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import time
from collections.abc import Iterator

from client import Outcome
from cluster import Cluster, Process, Shape
from oracles import Result
from registry import scenario
from trial import FLOWS_WITHIN_S, Lab, copies

# Machines of nodes that are not the cluster's own.
GUEST, OTHER = "guest", "rogue"
# A disk that two of the demo model's experts fill, and one that holds all of them.
SMALL_BYTES, LARGE_BYTES = 160 << 10, 64 << 20
# More than there is on that disk, so that the node does not take what little it has for its quota.
QUOTA = ("--disk", "1")
# A node that refused a placement is asked again after 30 s, then after twice as long (mesh-proto, nodes.rs).
ASKED_AGAIN_S = 75.0
# Another plan is made once others are missed; then nodes load.
PLANNED_WITHIN_S = 60.0
ENDS_WITHIN_S = 30.0
LOOKS_S = 2.0
# Of a node that has room for a quarter of the experts and no more: 36 of 144, of 55 296 bytes each, are 1.99 MB.
FULL = ("--memory", "2")
# Flips of row 21: in stored experts, and in a packed model.
FLIPS, PACKED_FLIPS = 1000, 24


class Disk:
    """A disk of its own for a folder, of so many bytes."""

    def __init__(self, folder: pathlib.Path, size: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        # Keys and experts are for their owner alone.
        self.mount("-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(folder))

    def mount(self, *arguments: str) -> None:
        subprocess.run(["mount", *arguments], check=True, capture_output=True)

    def grow(self, size: int) -> None:
        self.mount("-o", f"remount,size={size}", str(self.folder))

    def __enter__(self) -> "Disk":
        return self

    def __exit__(self, *_: object) -> None:
        # Lazily: a process may have files open there.
        subprocess.run(["umount", "-l", self.folder], check=False, capture_output=True)


def plain(text: str) -> str:
    """Without what colours it."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def log_of(process: Process) -> str:
    return plain(process.log.read_text(errors="replace"))


def packed_copy(lab: Lab, folder: pathlib.Path) -> pathlib.Path:
    """A cache with a packed model that only one node uses; the folder of its packed files."""
    shutil.copytree(lab.program.environment["MOEMESH_CACHE"], folder)
    name = pathlib.Path(lab.program.model).name
    return next(path.parent for path in sorted(folder.glob(f"{name}-*/q4/manifest.json")))


def blobs(store: pathlib.Path) -> list[pathlib.Path]:
    """Stored experts that are complete."""
    return sorted(path for path in store.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name))


def emptied(path: pathlib.Path) -> None:
    """The file is there, its bytes are not: what a process has mapped of it is gone."""
    os.truncate(path, 0)


def said(node: Process, *words: str) -> str:
    """The line of its log that has all of these, or nothing."""
    lines = [line for line in log_of(node).splitlines() if all(word in line for word in words)]
    return re.sub(r"^\S+Z\s+", "", lines[-1]) if lines else ""


@contextlib.contextmanager
def gone(cluster: Cluster, name: str) -> Iterator[None]:
    """A node of the cluster is away while the body runs, so that others are asked to hold what it held."""
    cluster.nodes[name].stop()
    yield
    cluster.start_node(name)
    cluster.until(f"{name} serves again", lambda: cluster.serves(name), PLANNED_WITHIN_S)


def refuses(cluster: Cluster, name: str) -> bool:
    return "refused its placement" in cluster.node(name)["note"]


@scenario("20", "a node whose disk is full", "the error names file and need, all others serve on, goes on when there is room")
def full(lab: Lab, result: Result) -> None:
    lab.discard()
    cluster = lab.cluster(shape=Shape(nodes=2, router=copies(1)))
    folder = cluster.folder / "disk"
    with Disk(folder, SMALL_BYTES) as disk, lab.load(cluster) as stories:
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still before the node comes")
        flags = ("--store", str(folder), *QUOTA)
        guest = cluster.start_guest("guest-full", GUEST, flags, empty=True)
        cluster.until("the node says that its disk is full", lambda: refuses(cluster, "guest-full"), PLANNED_WITHIN_S)
        note = cluster.node("guest-full")["note"]
        named = re.search(r"no room on the disk for (\S+): (\d+) bytes are needed, (\d+) are free", note)
        result.target_met(bool(named) and named[1].startswith(str(folder)), f"file and need are not named: {note}")
        result.target_met(bool(said(guest, "no room on the disk", str(folder))), "its own log does not name the file")
        # The others take what it refused.
        cluster.until("nothing is left to the router", lambda: cluster.state()["plan"]["unplaced"] == 0, PLANNED_WITHIN_S)
        time.sleep(LOOKS_S)
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still while the disk is full")
        result.target_met(guest.alive, f"the node ended: {guest.tail()}")
        result.target_met(set(cluster.names) <= set(cluster.serving()), "another node stopped serving")
        disk.grow(LARGE_BYTES)
        again_s = cluster.until("it serves once there is room", lambda: cluster.serves("guest-full"), ASKED_AGAIN_S)
        time.sleep(LOOKS_S)
        result.target_met(cluster.node("guest-full")["calls"] > 0, "it gets no calls")
        stored = len(blobs(folder))
        # Gone before its disk is.
        guest.stop()
    result.runs += 1
    result.judge(stories)
    need = f"{named[2]} bytes needed, {named[3]} free" if named else "no need"
    result.figure(f"refused: {need}, named {pathlib.Path(named[1]).name[:12] if named else '-'}...")
    result.figure(f"serves {again_s:.0f} s after there was room, {stored} experts on its disk", again_s=again_s)
    lab.discard()


@scenario("20b", "experts that cannot be read or were cut short before a start", "named; fetched again where they can be")
def cut_before(lab: Lab, result: Result) -> None:
    lab.discard()
    cluster = lab.cluster(shape=Shape(nodes=2, router=copies(1)))
    with lab.load(cluster) as stories:
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still before")
        damages = {"cut short": emptied, "no file": lambda path: (path.unlink(), path.mkdir()), "gone": pathlib.Path.unlink}
        for number, (what, damage) in enumerate(damages.items()):
            packed = packed_copy(lab, cluster.folder / f"cache-{number}")
            damage(packed / "layer-003.bin")
            flags = ("--cache", str(cluster.folder / f"cache-{number}"))
            node = cluster.start_guest(f"guest-{number}", GUEST, flags)
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.popen.wait(ENDS_WITHIN_S)
            status, words = node.popen.poll(), said(node, "layer-003.bin")
            result.target_met(status not in (None, 0) and status > 0, f"{what}: ended with {status}")
            result.target_met(str(packed) in words, f"{what}: the file is not named: {node.tail()}")
            result.figure(f"with a model, a layer's file {what}: status {status}, named")
            if node.alive:
                node.kill()
            del cluster.nodes[f"guest-{number}"]
        store = cluster.folder / "store"
        flags = ("--store", str(store))
        node = cluster.start_guest("guest-store", OTHER, flags, empty=True)
        cluster.until("it serves", lambda: cluster.serves("guest-store"), PLANNED_WITHIN_S)
        node.stop()
        held = blobs(store)
        whole = {path.name: path.read_bytes() for path in held}
        for path in held[::2]:
            os.truncate(path, path.stat().st_size // 2)
        for path in held[1::4]:
            path.unlink()
        node = cluster.start_guest("guest-store", OTHER, flags, empty=True)
        cluster.until("it serves again", lambda: cluster.serves("guest-store"), PLANNED_WITHIN_S)
        time.sleep(LOOKS_S)
        right = sum(path.exists() and path.read_bytes() == whole[path.name] for path in held[::2])
        named = sum(bool(said(node, path.name, "damaged")) for path in held[::2])
        wanted = len(held[::2])
        result.figure(f"without a model, {wanted} of {len(held)} experts cut in half: {named} named, {right} whole again")
        result.target_met(named == right == wanted > 0, "an expert that was cut was not named or not fetched again")
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still after")
    result.runs += 1
    result.judge(stories)
    lab.discard()


@scenario("20c", "files cut to nothing or deleted while nodes serve from them", "no SIGBUS, the running model as before, O1")
def cut_while_serving(lab: Lab, result: Result) -> None:
    lab.discard()
    cluster = lab.cluster(shape=Shape(nodes=2, router=copies(1), node=FULL))
    store = cluster.folder / "store"
    packed = packed_copy(lab, cluster.folder / "cache")
    with lab.load(cluster) as stories:
        # Of all nodes it alone has room for what another one held.
        model = cluster.start_guest("guest-model", GUEST, ("--cache", str(cluster.folder / "cache")))
        fetched = cluster.start_guest("guest-store", OTHER, ("--store", str(store), *FULL), empty=True)
        cluster.until("both serve", lambda: len(cluster.serving()) == 4, PLANNED_WITHIN_S)
        time.sleep(LOOKS_S)
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still before")
        cut, deleted = blobs(store)[::2], blobs(store)[1::2]
        for path in [*packed.glob("*.bin"), *cut]:
            emptied(path)
        for path in deleted:
            path.unlink()
        before = {name: cluster.node(name)["calls"] for name in ("guest-model", "guest-store")}
        time.sleep(LOOKS_S)
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still after the files were cut")
        calls = {name: cluster.node(name)["calls"] - count for name, count in before.items()}
        result.target_met(all(calls.values()), f"calls since then: {calls}")
        # Now they have to read.
        with gone(cluster, cluster.names[0]):
            short = ("became shorter", ".bin")
            cluster.until("the cut file is named", lambda: bool(said(model, *short)) or not model.alive, PLANNED_WITHIN_S)
            words = said(model, *short)
            time.sleep(LOOKS_S)
            result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still while a node is gone")
        for node in (model, fetched):
            result.target_met(node.alive, f"{node.log.stem} ended with {node.popen.poll()}: {node.tail()[-300:]}")
        result.target_met(str(packed) in words, f"the file is not named: {model.tail()}")
        serving = "guest-store" in cluster.serving()
        result.target_met(serving, "the node that fetches does not serve any more")
        on_disk = len(blobs(store))
    result.runs += 1
    result.judge(stories)
    cuts = f"{len(list(packed.glob('*.bin')))} files of a model and {len(cut)} stored experts cut, {len(deleted)} deleted"
    result.figure(f"{cuts}: {sum(calls.values())} calls answered since, both nodes live")
    result.figure(f"asked to load more, one names {pathlib.Path(packed).parent.name}/.../layer-*.bin, the other holds {on_disk} files")
    lab.discard()


@scenario("20d", "the router's files cut to nothing while it serves", "no SIGBUS; 503 or an error that names the file, O1")
def cut_at_router(lab: Lab, result: Result) -> None:
    lab.discard()
    cluster = lab.cluster(shape=Shape(nodes=2, router=(*copies(1), "--cache", "{own}/cache")))
    packed = next((cluster.folder / "cache").glob("*/q4/manifest.json")).parent
    with lab.load(cluster) as stories:
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still before")
        for path in packed.glob("layer-*.bin"):
            emptied(path)
        time.sleep(LOOKS_S)
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still after the files were cut")
        # What only it held the router has to compute, and cannot.
        name = cluster.victim(lab.chance)
        cluster.nodes[name].kill()
        whole_s = cluster.until(
            "the other node holds everything", lambda: cluster.state()["plan"]["unplaced"] == 0 and name not in cluster.serving(), PLANNED_WITHIN_S
        )
        flows_s = cluster.until("all streams flow", lambda: lab.tellers.flowing(FLOWS_WITHIN_S), PLANNED_WITHIN_S)
        result.target_met(cluster.router.alive, f"the router ended with {cluster.router.popen.poll()}")
    result.runs += 1
    result.judge(stories, refused=True)
    refusals = [story.error for story in stories if story.outcome is Outcome.REFUSED]
    named = sum("cannot read its own copy" in error and "layer-" in error for error in refusals)
    result.figure(f"{len(refusals)} requests refused, {named} name the file; whole again {whole_s + flows_s:.1f} s after the node")
    result.target_met(bool(refusals), "no request met the files that were cut")
    result.target_met(named == len(refusals), f"a refusal without the file: {refusals[:1]}")
    emptied(packed / "router.bin")
    status, body = cluster.client.ask("POST", "/v1/completions", {"prompt": "The", "max_tokens": 4})
    result.target_met(status >= 500 and b"router.bin" in body, f"without its own weights: {status}: {body[:200]!r}")
    result.target_met(cluster.router.alive, f"the router ended with {cluster.router.popen.poll()}")
    result.figure(f"without its embedding: {status}, names router.bin")
    lab.discard()


@scenario("21", f"{FLIPS} flipped bits in stored experts", "each named when it is loaded and fetched again, O1")
def rot(lab: Lab, result: Result) -> None:
    lab.discard()
    # The only node, so that whatever is on its disk is also loaded.
    node = ("--store", "{own}/experts")
    cluster = lab.cluster(shape=Shape(nodes=1, router=copies(1), node=node, empty=True))
    name = cluster.names[0]
    store = cluster.folder / name / "experts"
    flips, named, again = 0, 0, 0
    with lab.load(cluster) as stories:
        while flips < FLIPS:
            cluster.nodes[name].stop()
            right = {path: path.read_bytes() for path in blobs(store)}
            chosen = list(right)[: FLIPS - flips]
            for path in chosen:
                bit = lab.chance.randrange(len(right[path]) * 8)
                rotten = bytearray(right[path])
                rotten[bit // 8] ^= 1 << bit % 8
                path.write_bytes(rotten)
            at = len(log_of(cluster.nodes[name]))
            cluster.start_node(name)
            cluster.until("it serves again", lambda: cluster.serves(name), PLANNED_WITHIN_S)
            lines = [line for line in log_of(cluster.nodes[name])[at:].splitlines() if "damaged" in line]
            flips += len(chosen)
            named += sum(any(path.name in line for line in lines) for path in chosen)
            again += sum(path.exists() and path.read_bytes() == right[path] for path in right)
            again -= len(right) - len(chosen)
            lab.progress(f"{named} of {flips} named, {again} fetched again")
        time.sleep(LOOKS_S)
        result.o2.ask(lab.tellers.flowing(FLOWS_WITHIN_S), "a stream stands still at the end")
    result.runs += 1
    result.judge(stories)
    result.figure(f"{named} of {flips} flips named when loaded, {again} fetched again", named=named, again=again, flips=flips)
    result.target_met(named == again == flips >= FLIPS, f"{flips - named} flips were not named, {flips - again} not mended")
    lab.discard()


@scenario("21b", f"{PACKED_FLIPS} flipped bits in the packed model of a node", "each refused by file and expert, O1")
def packed_rot(lab: Lab, result: Result) -> None:
    lab.discard()
    cluster = lab.cluster(shape=Shape(nodes=1, router=copies(1), node=("--cache", "{own}/cache")))
    name = cluster.names[0]
    packed = next((cluster.folder / name / "cache").glob("*/q4/manifest.json")).parent
    manifest = json.loads((packed / "manifest.json").read_text())
    experts = sorted(blob for blob in manifest["blobs"] if ".experts." in blob)
    caught = 0
    with lab.load(cluster) as stories:
        for _ in range(PACKED_FLIPS):
            cluster.nodes[name].stop()
            expert = lab.chance.choice(experts)
            blob = manifest["blobs"][expert]
            path = packed / manifest["files"][blob["file"]]["name"]
            bit = lab.chance.randrange(blob["bytes"] * 8)
            flip(path, blob["offset"] * 8 + bit)
            at = len(log_of(cluster.nodes[name]))
            node = cluster.start_node(name)
            words = (f"{path.name}: {expert} does not have the hash", str(packed))

            def refused(node: Process = node, at: int = at, words: tuple[str, ...] = words) -> bool:
                return all(word in log_of(node)[at:] for word in words)

            cluster.until(
                "it is refused, or loaded", lambda: refused() or not node.alive or cluster.serves(name), PLANNED_WITHIN_S
            )
            caught += refused()
            result.target_met(not cluster.serves(name), f"{expert}: the node serves it")
            flip(path, blob["offset"] * 8 + bit)
        cluster.nodes[name].stop()
        cluster.start_node(name)
        cluster.until("it serves what is whole again", lambda: cluster.serves(name), PLANNED_WITHIN_S)
    result.runs += 1
    result.judge(stories)
    result.figure(f"{caught} of {PACKED_FLIPS} flips refused by file and expert; the text is the router's meanwhile", caught=caught)
    result.target_met(caught == PACKED_FLIPS, f"{PACKED_FLIPS - caught} flips were not named")
    lab.discard()


def flip(path: pathlib.Path, bit: int) -> None:
    """Flips a bit of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))
