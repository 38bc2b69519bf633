#!/usr/bin/env python3
"""Times moemesh and llama.cpp side by side on this machine: targets D3, D4 and D5, and decoding in one process.

    compare.py --llama DIR --gguf FILE [--moemesh PROGRAM] [--rounds 3] [--json]

DIR holds `llama-bench` and the RPC server of llama.cpp (built with GGML_RPC=ON), FILE comes from shape_gguf.py. Programs
take turns, round by round, so that a noisy neighbour hits both; medians and their ratios are printed. Processes are
pinned with taskset: "2 hosts of 1 core" are two processes, one on core 0, one on core 1.
"""

import argparse
import json
import pathlib
import re
import statistics
import subprocess
import sys
import time

PROMPT, DECODE = 512, 64
RPC_PORTS = (50152, 50153)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", type=pathlib.Path, required=True)
    parser.add_argument("--gguf", type=pathlib.Path, required=True)
    parser.add_argument("--moemesh", default="target/release/moemesh")
    parser.add_argument("--model", default="synthetic:qwen3-30b-a3b?layers=12")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    ways = {
        "llama.cpp, 1 core": lambda: llama(options, 1),
        "moemesh, 1 core": lambda: moemesh(options, 0, 1),
        "llama.cpp, 2 cores": lambda: llama(options, 2),
        "moemesh, 2 cores": lambda: moemesh(options, 0, 2),
        "llama.cpp RPC, 2 hosts of 1 core": lambda: llama_rpc(options),
        "moemesh, router + node of 1 core": lambda: moemesh(options, 1, 1, "--replicate", "all"),
    }
    seen: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(options.rounds):
        for name, run in ways.items():
            decode, prefill = run()
            seen[name].append((decode, prefill))
            now = f"decode {decode:.1f}, prefill {prefill:.1f} tok/s"
            print(f"round {turn + 1} of {options.rounds}: {name}: {now}", file=sys.stderr)
    middle = {name: tuple(map(statistics.median, zip(*runs))) for name, runs in seen.items()}
    print(f"{'':<36}{'decode tok/s':>14}{f'prefill({PROMPT}) tok/s':>22}")
    for name, (decode, prefill) in middle.items():
        print(f"{name:<36}{decode:>14.1f}{prefill:>22.1f}")
    names = list(ways)
    ratio = {
        "decode, 1 core": middle[names[1]][0] / middle[names[0]][0],
        "decode, 2 cores": middle[names[3]][0] / middle[names[2]][0],
        "D3 decode, 2 hosts": middle[names[5]][0] / middle[names[4]][0],
        "D4 prefill, 2 cores": middle[names[3]][1] / middle[names[2]][1],
        "D5 prefill, 2 hosts": middle[names[5]][1] / middle[names[4]][1],
    }
    for name, value in ratio.items():
        print(f"{name:<36}{value:>13.2f}x")
    if options.json:
        print(json.dumps({"runs": seen, "median": middle, "ratio": ratio}))


def cores(count: int) -> list[str]:
    return ["taskset", "-c", ",".join(map(str, range(count)))]


def llama(options: argparse.Namespace, threads: int, *more: str) -> tuple[float, float]:
    """Decode and prefill tokens per second of llama-bench."""
    command = [*cores(threads), str(options.llama / "llama-bench"), "-m", str(options.gguf), "-o", "json"]
    command += ["-t", str(threads), "-p", str(PROMPT), "-n", str(DECODE), "-r", "1", *(more or ("-ngl", "0"))]
    lines = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    speed = {line["n_gen"] > 0: line["avg_ts"] for line in lines}
    return speed[True], speed[False]


def llama_rpc(options: argparse.Namespace) -> tuple[float, float]:
    """The same with the layers split over two RPC servers of one core each; the client shares the first core."""
    program = next(path for path in options.llama.iterdir() if re.fullmatch(r"(ggml-)?rpc-server", path.name))
    servers = [
        subprocess.Popen(
            ["taskset", "-c", str(core), str(program), "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for core, port in enumerate(RPC_PORTS)
    ]
    try:
        time.sleep(1)
        addresses = ",".join(f"127.0.0.1:{port}" for port in RPC_PORTS)
        return llama(options, 1, "-ngl", "99", "--rpc", addresses)
    finally:
        for server in servers:
            server.terminate()
            server.wait()


def moemesh(options: argparse.Namespace, nodes: int, per_process: int, *more: str) -> tuple[float, float]:
    """Decode and prefill tokens per second of `moemesh bench decode`."""
    command = [options.moemesh, "bench", "decode", "--model", options.model, "--nodes", str(nodes), *more]
    command += ["--cores-per-process", str(per_process), "--prompt", str(PROMPT), "--max-tokens", str(DECODE), "--json"]
    report = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return report["decode_tok_s"], report["prefill_tok_s"]


if __name__ == "__main__":
    main()
