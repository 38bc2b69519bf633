"""Clocks that are wrong: libfaketime between a process and what it asks for the time of day.

Only the calendar is moved. The monotonic clock, which every timer of a correct program goes by, is the machine's: no
real clock that is set moves it either. A clock is a file that says how far off it is, read again every second, so that
it can jump while the process runs.
"""

import pathlib

PACKAGE = "libfaketime"
# Where distributions put it.
PLACES = ("/usr/lib/*/faketime", "/usr/lib/faketime", "/usr/lib64/faketime", "/usr/local/lib/faketime")
NAME = "libfaketimeMT.so.1"
# How often a process looks whether its clock jumped.
LOOKS_EVERY_S = 1


def library() -> pathlib.Path | None:
    """The library for programs with threads, if it is installed."""
    root = pathlib.Path("/")
    found = (path for place in PLACES for path in sorted(root.glob(f"{place[1:]}/{NAME}")))
    return next(found, None)


def missing() -> str | None:
    """What to install, if anything."""
    return None if library() else f"{NAME}, which moves clocks: apt-get install {PACKAGE}"


def set_clock(clock: pathlib.Path, by: str) -> None:
    """Sets a clock, `+10y` ahead or `-10y` behind. As a whole: a process that reads half of it would have the right time."""
    fresh = clock.with_suffix(".new")
    fresh.write_text(by + "\n")
    fresh.rename(clock)


def environment(clock: pathlib.Path, by: str) -> dict[str, str]:
    """What a process is started with to go by this clock, which is made if there is none."""
    if not clock.exists():
        set_clock(clock, by)
    return {
        "LD_PRELOAD": str(library()),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_CACHE_DURATION": str(LOOKS_EVERY_S),
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        # The name that older versions know.
        "DONT_FAKE_MONOTONIC": "1",
        # Or files of the right age would seem to be of another.
        "NO_FAKE_STAT": "1",
    }
