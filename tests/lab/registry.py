"""The list of scenarios, in the order of the matrix."""

import re
from collections.abc import Callable
from typing import NamedTuple


class Scenario(NamedTuple):
    """A row of the fault matrix, with what must come of it."""

    row: str
    name: str
    target: str
    play: Callable[..., None]


ALL: list[Scenario] = []


def scenario(row: str, name: str, target: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Puts a function into the list."""

    def add(play: Callable[..., None]) -> Callable[..., None]:
        ALL.append(Scenario(row, name, target, play))
        return play

    return add


def chosen(only: str | None) -> list[Scenario]:
    """All, or those of these rows: `1,4` means 1 and 4, and 2 means 2 and 2b, but =2 means 2 alone."""
    every = sorted(ALL, key=lambda entry: (int(re.match(r"\d+", entry.row)[0]), entry.row))
    if not only:
        return every
    rows = [row.strip() for row in only.split(",")]

    def named(entry: Scenario, row: str) -> bool:
        return row in (entry.row, f"={entry.row}", entry.row.rstrip("abcdefgh"))

    picked = [entry for entry in every if any(named(entry, row) for row in rows)]
    unknown = [row for row in rows if not any(named(entry, row) for entry in ALL)]
    if unknown:
        raise ValueError(f"no row {', '.join(unknown)}; there are {', '.join(entry.row for entry in every)}")
    return picked
