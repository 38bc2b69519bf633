"""Scenarios of machines that do not belong, and of nodes that lie: rows 27 to 31, 36 and 39."""

import base64
import contextlib
import json
import pathlib
import re
import shutil
import subprocess
import time

from client import find_secret
from cluster import KEY, MESH_PORT, Cluster, Lie, Process
from net import Capture
from oracles import Result
from registry import scenario
from trial import Fault, Lab, ordinary_loss, run

# Where a machine that is no node yet, or never will be, runs.
GUEST, ROGUE = "guest", "rogue"
# A machine that is told to come back later tries for 20 s.
JOINS_WITHIN_S = 40.0
AT_ONCE = 100
# Handshakes with a certificate whose key is missing.
THEFTS = 1000
# What the bytes of a token begin with: role, expiry, hash of the cluster's key; then comes the secret.
SECRET_AT, SECRET_BYTES = 1 + 8 + 32, 16
# Ways of lying, as MOEMESH_LIE names them; all are replies that a check of form must find.
LIES = ("nan", "short", "long", "foreign", "bytes")


def joining(lab: Lab, cluster: Cluster, machine: str, name: str, token: str) -> Process:
    """A node without a past that shows a token."""
    state = cluster.folder / f"joins-{name}"
    arguments = ["node", "--state", str(state), "--name", name, "--join", token, "--model", str(lab.program.model)]
    return Process(lab.program, lab.lan, machine, arguments, cluster.folder / f"joins-{name}.log")


def ended(process: Process, seconds: float = JOINS_WITHIN_S) -> int | None:
    """The exit status, or `None` where it still runs; then it is killed."""
    try:
        return process.popen.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return None


def members(cluster: Cluster) -> list[str]:
    return [node["name"] for node in cluster.state()["nodes"] if node["state"] != "revoked"]


def secret_of(token: str) -> bytes:
    digits = token.partition(".")[2].upper()
    content = base64.b32decode(digits + "=" * (-len(digits) % 8))
    return content[SECRET_AT : SECRET_AT + SECRET_BYTES]


def refused(result: Result, process: Process, words: tuple[str, ...], what: str) -> None:
    """It must end by itself, with a status that says so and a message with one of these words."""
    status, message = ended(process), process.tail()
    result.target_met(status not in (None, 0), f"{what}: ended with {status}")
    result.target_met(
        any(word in message for word in words), f"{what}: it does not say {' or '.join(words)}: {message[-300:]}"
    )


@scenario(
    "27", "nodes without a token, with another key, with a copy of a node's folder", "none gets in; the others serve on"
)
def no_token(lab: Lab, result: Result) -> None:
    cluster = lab.cluster()
    before = members(cluster)
    counted = cluster.counters()
    with lab.load(cluster) as stories:
        lab.tellers.flowing(2)
        # All that is public about the cluster and a key of its own: only the roster can tell.
        folder = cluster.folder / "forged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(cluster.folder / "node-1", folder)
        other_key(lab, cluster, folder)
        arguments = ["node", "--state", str(folder), "--model", str(lab.program.model)]
        forger = Process(lab.program, lab.lan, ROGUE, arguments, cluster.folder / "forger.log")
        empty = ["node", "--state", str(cluster.folder / "empty"), "--model", str(lab.program.model)]
        refused(
            result,
            Process(lab.program, lab.lan, ROGUE, empty, cluster.folder / "empty.log"),
            ("--join", "token"),
            "without a token",
        )
        time.sleep(4)
        result.figure(f"with another key: {last_words(forger)}")
        result.target_met(
            "handshake" in forger.tail() or "refused" in forger.tail(), "the forger met nobody who refused it"
        )
        result.target_met(members(cluster) == before, f"the cluster has {members(cluster)}")
        result.target_met(len(cluster.serving()) == len(cluster.names), "a real node was disturbed")
        if forger.alive:
            forger.kill()
    after = cluster.counters()
    result.runs += 1
    result.judge(stories)
    failed = sum(after[name] - counted[name] for name in ("late", "gone", "refused", "rejected"))
    result.target_met(failed == 0, f"{failed} calls failed meanwhile")
    lab.check_footprints(cluster, result)
    return None


@scenario("27b", "a copy of a node's whole folder on a second machine", "noticed, the first serves on, O1")
def clone(lab: Lab, result: Result) -> None:
    cluster = lab.fresh()
    name = cluster.victim(lab.chance)
    folder = cluster.folder / "clone"
    with lab.load(cluster) as stories:
        lab.tellers.flowing(2)
        shutil.copytree(cluster.folder / name, folder)
        before = cluster.node(name)
        arguments = ["node", "--state", str(folder), "--model", str(lab.program.model)]
        copy = Process(lab.program, lab.lan, ROGUE, arguments, cluster.folder / "clone.log")
        time.sleep(5)
        after = cluster.node(name)
        lab.tellers.flowing(2)
    if copy.alive:
        copy.kill()
    result.runs += 1
    result.judge(stories)
    said = [
        log
        for log in (copy.log, cluster.router.log)
        if re.search("clone|same key|two machines|copied", log.read_text())
    ]
    result.figure(f"noticed in {', '.join(log.stem for log in said) or 'no log'}: {last_words(copy)}")
    result.figure(f"{after['connections'] - before['connections']} changes of connection")
    result.target_met(bool(said), "nobody says that two machines have one key")
    result.target_met(
        cluster.nodes[name].alive and after["address"] == before["address"], "the clone took the node's place"
    )
    lab.check_footprints(cluster, result)
    return None


def other_key(lab: Lab, cluster: Cluster, folder: pathlib.Path) -> None:
    """Puts the key of a machine that never joined into a copied folder."""
    stranger = cluster.folder / "stranger"
    shutil.rmtree(stranger, ignore_errors=True)
    made = [lab.program.path, "router", "--state", str(stranger), "--model", str(lab.program.model)]
    made += ["--http", "127.0.0.1:0", "--listen", "127.0.0.1:0", "--announce", "--stop-with-parent"]
    with lab.lan.at(ROGUE):
        process = subprocess.Popen(
            made, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=lab.program.environment
        )
    process.stdout.readline()
    process.kill()
    process.wait()
    keys = [path for path in folder.iterdir() if path.suffix == ".key" or path.name == "key"]
    found = [path for path in stranger.iterdir() if path.name in {key.name for key in keys}] or list(
        stranger.glob("*.key")
    )
    if not keys or not found:
        raise RuntimeError(
            f"no key file among {[path.name for path in folder.iterdir()]} and {[path.name for path in stranger.iterdir()]}"
        )
    shutil.copy(found[0], keys[0])
    keys[0].chmod(0o600)


def last_words(process: Process) -> str:
    lines = [line for line in process.tail().splitlines() if line.strip()]
    return re.sub(r"^\S+Z\s+", "", lines[-1])[:160] if lines else "nothing said"


@scenario("28", f"a token used twice, expired, damaged, by {AT_ONCE} at once", "exactly one gets in")
def token_reuse(lab: Lab, result: Result) -> None:
    cluster = lab.fresh()
    before = len(members(cluster))
    short = cluster.token("--ttl", "1s")
    time.sleep(1.5)
    refused(result, joining(lab, cluster, GUEST, "late", short), ("expired",), "expired")
    token = cluster.token()
    damaged = token[:-3] + ("a" if token[-3] != "a" else "b") + token[-2:]
    refused(result, joining(lab, cluster, GUEST, "damaged", damaged), ("damaged",), "one letter other")
    crowd = [joining(lab, cluster, GUEST, f"crowd-{number}", token) for number in range(AT_ONCE)]
    end = time.monotonic() + 90
    while sum(process.alive for process in crowd) > 1 and time.monotonic() < end:
        time.sleep(0.2)
    time.sleep(1.0)
    inside = [process for process in crowd if process.alive]
    said_used = sum("used" in process.tail() for process in crowd if not process.alive)
    now = members(cluster)
    result.runs += 1
    result.figure(
        f"of {AT_ONCE} at once {len(inside)} got in, {said_used} were told that the token was used; roster {before} -> {len(now)}"
    )
    result.target_met(len(inside) == 1 and len(now) == before + 1, f"{len(inside)} run, the roster has {now}")
    refused(result, joining(lab, cluster, GUEST, "again", token), ("used",), "used again")
    for process in crowd:
        if process.alive:
            process.kill()
    undisturbed(lab, cluster, result)
    return None


@scenario(
    "29", "another router at the router's address", "the node refuses, the secret never leaves it, the token stays good"
)
def man_in_the_middle(lab: Lab, result: Result) -> None:
    cluster = lab.cluster()
    token = cluster.token()
    secret = secret_of(token)
    evil_folder = cluster.folder / "evil"
    shutil.rmtree(evil_folder, ignore_errors=True)
    listen = ["--listen", "0.0.0.0:8621", "--http", "0.0.0.0:8620", "--api-key", KEY, "--announce"]
    arguments = ["router", "--state", str(evil_folder), "--model", str(lab.program.model), *listen]
    with lab.load(cluster, 1):
        lab.tellers.flowing(2)
    evil = Process(lab.program, lab.lan, ROGUE, arguments, cluster.folder / "evil.log")
    evil.announced("http")
    try:
        lab.lan.usurp(ROGUE, "router")
        with Capture(lab.lan, GUEST) as there, Capture(lab.lan, ROGUE) as here:
            refused(
                result,
                joining(lab, cluster, GUEST, "betrayed", token),
                ("not a router of this", "impostor", "cluster"),
                "at the impostor",
            )
        answers = sum(from_router(lab, frame) for frame in there.frames)
        seen = find_secret(there.frames, secret) + find_secret(here.frames, secret)
        digits = token.partition(".")[2].encode()
        seen += sum(digits in frame for frame in there.frames)
        if not answers:
            result.void += 1
            return None
        result.runs += 1
        result.figure(f"{answers} answers of the impostor to the node, secret in {seen} of {len(there.frames)} frames")
        result.target_met(seen == 0, f"the secret is in {seen} frames")
        log = (cluster.folder / "evil.log").read_text(errors="replace")
        result.target_met("joined" not in log, "the impostor admitted somebody")
    finally:
        evil.kill()
        lab.lan.heal()
    lab.whole(cluster)
    process = joining(lab, cluster, GUEST, "guest", token)
    with contextlib.suppress(Exception):
        cluster.until("the token still works", lambda: "guest" in members(cluster), JOINS_WITHIN_S)
    result.target_met("guest" in members(cluster), f"the token is spent: {process.tail()[-300:]}")
    process.kill()
    undisturbed(lab, cluster, result)
    return None


def undisturbed(lab: Lab, cluster: Cluster, result: Result) -> None:
    """Whatever strangers did, the stories are the same; then the cluster is done with."""
    with lab.load(cluster) as stories:
        time.sleep(1)
    result.judge(stories)
    lab.discard()


def from_router(lab: Lab, frame: bytes) -> bool:
    """Whether a frame is UDP from the router's address and port."""
    address = bytes(map(int, lab.lan.address["router"].split(".")))
    return frame[12:14] == b"\x08\x00" and frame[26:30] == address and frame[34:36] == (8621).to_bytes(2, "big")


@scenario("30", "a copied certificate without its key", f"{THEFTS} of {THEFTS} refused by the handshake; the others serve on")
def copied_certificate(lab: Lab, result: Result) -> None:
    if lab.options.rogues is None:
        return result.lacks("a thief: MOEMESH_ROGUES=/folder/of/thief")
    cluster = lab.cluster()
    name = cluster.victim(lab.chance)

    # A running node has its folder for itself. The thief reads the certificate from the copy, and the router's key.
    stolen = cluster.folder / "stolen"
    shutil.rmtree(stolen, ignore_errors=True)
    shutil.copytree(cluster.folder / name, stolen)

    def tries(times: int, *flags: str) -> dict[str, object]:
        told = [str(lab.options.rogues / "thief"), str(stolen), f"{lab.lan.address['router']}:{MESH_PORT}", str(times), *flags]
        with lab.lan.at(ROGUE):
            done = subprocess.run(told, capture_output=True, text=True, timeout=300, check=True)
        return json.loads(done.stdout)

    counted = cluster.counters()
    with lab.load(cluster) as stories:
        lab.tellers.flowing(2)
        thief = tries(THEFTS)
        # With the key it gets through the handshake, and meets the node that is there already.
        owner = tries(1, "--own-key")
    after = cluster.counters()
    result.runs += 1
    result.judge(stories)
    result.figure(f"certificate alone: {thief['refused']}; with its key: {owner['refused'] or 'let in'}", thefts=THEFTS)
    by_handshake = sum(count for why, count in thief["refused"].items() if why.startswith("TLS"))
    result.target_met(by_handshake == THEFTS and not thief["let_in"], f"{thief}")
    result.target_met(not any(why.startswith("TLS") for why in owner["refused"]), f"with the key: {owner}")
    failed = sum(after[what] - counted[what] for what in ("late", "gone", "refused", "rejected"))
    result.target_met(failed == 0, f"{failed} calls failed meanwhile")
    lab.check_footprints(cluster, result)
    return None


@scenario("31", "a node revoked while it serves", "cut off <= 1 s, cannot return, O1")
def revoked(lab: Lab, result: Result) -> None:
    cluster = lab.fresh()
    name = cluster.victim(lab.chance)
    with lab.load(cluster) as stories:
        flowed = lab.tellers.flowing(2)
        calls = cluster.node(name)["calls"]
        time.sleep(0.3)
        flowed = flowed and cluster.node(name)["calls"] > calls
        with lab.lan.at("router"):
            cluster.command("nodes", "revoke", name, *cluster.home("router"))
        cut = cluster.until(f"{name} is shut out", lambda: not cluster.serves(name), 10)
        calls = of(cluster, name).get("calls", 0)
        time.sleep(1.0)
        later = of(cluster, name).get("calls", calls)
        result.target_met(later == calls, f"{later - calls} calls after it was shut out")
        process = cluster.nodes[name]
        if process.alive:
            process.kill()
        process = Process(
            lab.program,
            lab.lan,
            name,
            ["node", "--state", str(cluster.folder / name), "--model", str(lab.program.model)],
            process.log,
        )
        time.sleep(4)
        back = of(cluster, name).get("state") in ("serving", "loading", "waiting")
        result.target_met(not back, "it is back")
        result.figure(f"cut off in {cut * 1e3:.0f} ms; when it returns: {last_words(process)}", cut_ms=cut * 1e3)
        if process.alive:
            process.kill()
    if not flowed:
        result.void += 1
        return None
    result.runs += 1
    result.judge(stories)
    result.target_met(cut <= 1, f"cut off after {cut:.1f} s")
    lab.discard()
    return None


def of(cluster: Cluster, name: str) -> dict[str, object]:
    """What the router says of a node; nothing where it does not know it any more."""
    found = [node for node in cluster.state()["nodes"] if node["name"] == name]
    return found[0] if found else {}


@scenario("36", "a node that answers nonsense", "all rejected, quarantined after 3, O1")
def nonsense(lab: Lab, result: Result) -> None:
    if lab.options.rogues is None:
        return result.lacks("a node that lies: MOEMESH_ROGUES=/folder/of/liar")
    for way in LIES:
        cluster = lab.cluster()
        name = cluster.victim(lab.chance)

        def strike(cluster: Cluster = cluster, name: str = name, way: str = way) -> None:
            cluster.nodes[name].kill()
            cluster.start_node(name, Lie(lab.options.rogues / "liar", way))

        seen: list[str] = []

        def happened(cluster: Cluster = cluster, name: str = name) -> bool:
            seen.append(str(of(cluster, name).get("state")))
            return True

        def mend(cluster: Cluster = cluster, name: str = name) -> None:
            cluster.nodes[name].kill()
            # A node that is not quarantined needs none, and that is judged below.
            with contextlib.suppress(RuntimeError):
                cluster.command("nodes", "pardon", name, *cluster.home("router"))
            cluster.start_node(name)

        trial = run(lab, cluster, result, Fault(strike, mend, 4.0, happened))
        if trial is None:
            continue
        wrong = trial.counters["rejected"]
        result.figure(
            f"{way}: {wrong} rejected, then {seen[-1]}, stall {trial.stall_ms:.0f} ms, serving {trial.whole_s:.1f} s after it was pardoned"
        )
        result.target_met(wrong >= 3, f"{way}: only {wrong} rejected")
        result.target_met(seen[-1] == "quarantined", f"{way}: {seen[-1]} instead of quarantined")
    return None


@scenario("39", "a node whose answers drip, 1 kB/s", "as a dead one: O1, stall <= 2 s")
def drip(lab: Lab, result: Result) -> None:
    # Below the node: it means well, and its words leave so slowly that no reply is whole before its call is over, while
    # the connection lives on what does arrive.
    cluster = lab.cluster()
    name = cluster.victim(lab.chance)
    trial = run(lab, cluster, result, Fault(lambda: lab.lan.drip(name), lab.lan.heal, 5.0))
    if trial is None:
        return
    result.figure(
        f"stall {trial.stall_ms:.0f} ms, serving {trial.whole_s:.1f} s after, {ordinary_loss(trial.counters)}",
        stall_ms=trial.stall_ms,
    )
    result.target_met(trial.stall_ms <= 2000, f"stall {trial.stall_ms:.0f} ms")
