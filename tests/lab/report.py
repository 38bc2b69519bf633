"""What came of the scenarios: a table for people, JSON for machines."""

import json
import pathlib
import textwrap

from oracles import Result

HEAD = ("row", "scenario", "runs", "O1", "O2", "O3", "verdict")
WIDTH = 112


def table(results: list[Result]) -> str:
    """One line per scenario, and below it figures, the target, and what was missed."""
    rows = [HEAD]
    for result in results:
        runs = f"{result.runs} ({result.void})" if result.void else str(result.runs)
        rows.append(
            (result.row, result.name, runs, str(result.o1), str(result.o2), str(result.o3), result.verdict.value)
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEAD))]
    lines = []
    for row, result in zip(rows, [None, *results]):
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
        if result is None:
            lines.append("  ".join("-" * width for width in widths))
        else:
            lines += below(result)
    lines.append("")
    lines.append("part: interrupted, with what there was until then; nothing had failed")
    lines.append("runs: faults that hit calls in flight (in brackets: void ones that did not, repeated)")
    lines.append(
        "O1: stories equal to the last bit; O2: requests that ended once; O3: processes whose memory and files returned"
    )
    return "\n".join(lines)


def below(result: Result) -> list[str]:
    lines = [f"target: {result.target}"] + result.figures + [f"needs {what}" for what in result.needs]
    for name, oracle in (("O1", result.o1), ("O2", result.o2), ("O3", result.o3)):
        lines += [f"{name} broken: {words}" for words in oracle.broken[:3]]
    lines += [f"MISSED: {words}" for words in result.missed]
    return [
        wrapped
        for line in lines
        for wrapped in textwrap.wrap(line, WIDTH, initial_indent="      ", subsequent_indent="        ")
    ]


def summary(results: list[Result], seconds: float) -> str:
    count = {}
    for result in results:
        count[result.verdict.value] = count.get(result.verdict.value, 0) + 1
    words = ", ".join(f"{number} {name}" for name, number in sorted(count.items()))
    return f"{len(results)} scenarios in {seconds / 60:.1f} minutes: {words}"


def write_json(path: pathlib.Path, results: list[Result], facts: dict[str, object]) -> None:
    """Everything, figures as numbers."""
    listed = []
    for result in results:
        oracles = {
            name: {"asked": oracle.asked, "broken": oracle.broken}
            for name, oracle in (("o1", result.o1), ("o2", result.o2), ("o3", result.o3))
        }
        listed.append({
            "row": result.row, "name": result.name, "target": result.target, "verdict": result.verdict.value,
            "runs": result.runs, "void": result.void, **oracles, "figures": result.figures, "values": result.values,
            "missed": result.missed, "needs": result.needs, "seconds": round(result.seconds, 1),
        })  # fmt: skip
    path.write_text(json.dumps({**facts, "scenarios": listed}, indent=1) + "\n")
