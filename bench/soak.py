"""Whether one process that works for hours grows: its memory, its open files, its threads.

    uv run python bench/soak.py [--minutes 20] [--json FILE]      # Linux

Each round trains, exports and reports a tiny run of coloured noise in a new folder, then reads it
with every verb (evaluate, ensemble, compare, predict, charts, review, export, train again, ...).
After each round the resident memory, the open files and the threads are read from /proc.

The first third of the rounds warms up caches and pools of memory. What the rest adds is the
difference between the medians of its last and its first quarter. The exit code is 1 if that is more
than `--most-mb`, or more than one open file or thread.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import damage_runs as runs
from noise_runs import write_record


class State(NamedTuple):
    """What a process holds.

    Attributes:
        mb: resident memory in MB.
        files: open file descriptors.
        threads: threads.
    """

    mb: float
    files: int
    threads: int


def read_state() -> State:
    """Read what this process holds."""
    gc.collect()
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(":", 1) for line in lines)
    files = len(list(Path("/proc/self/fd").iterdir()))
    return State(int(values["VmRSS"].split()[0]) / 1000, files, int(values["Threads"]))


def work(place: Path) -> None:
    """Make a run in a folder, and read it with every verb."""
    shutil.rmtree(place, ignore_errors=True)
    made = runs.make_run(place / "made")
    run = made.rename(place / "trial" / "run")  # where it was trained: the paths in it are these
    for verb in runs.VERBS.values():
        verb(run, runs.Words())


def growth(states: Sequence[State]) -> State:
    """Return what the rounds after the first third have added.

    Args:
        states: after each round, twelve or more.
    """
    rest = states[len(states) // 3 :]
    quarter = len(rest) // 4
    parts = []
    for values in zip(*rest, strict=True):
        parts.append(statistics.median(values[-quarter:]) - statistics.median(values[:quarter]))
    return State(parts[0], round(parts[1]), round(parts[2]))


def main() -> int:
    """Work, print, and write the states; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--most-mb", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    states: list[State] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        while len(states) < 12 or time.monotonic() - began < 60 * options.minutes:
            work(Path(name) / "place")
            states.append(read_state())
            if len(states) % 10 == 1:
                print(f"round {len(states)}: {_text(states[-1])}", flush=True)
    added = growth(states)
    minutes = (time.monotonic() - began) / 60
    print(f"{len(states)} rounds in {minutes:.0f} minutes; at the end {_text(states[-1])}")
    print(f"added after the first third: {_text(added)}")
    if options.json:
        write_record(options.json, [state._asdict() for state in states])
    return int(added.mb > options.most_mb or added.files > 1 or added.threads > 1)


def _text(state: State) -> str:
    return f"{state.mb:.0f} MB, {state.files} files, {state.threads} threads"


if __name__ == "__main__":
    sys.exit(main())
