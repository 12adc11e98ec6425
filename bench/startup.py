"""Time from the command to its answer: help, import, one prediction, one evaluation.

    uv run python bench/startup.py RUN IMAGE [--rounds 11]

RUN is a finished run with model.onnx; IMAGE is a file to predict. All commands take turns, each in
a fresh process; the first round warms up the file system and does not count. The table has medians
of the wall-clock and of the processor time (user and system), which tells more on a shared machine.
Beside them stand a bare interpreter, and onnxruntime opening the same file.
"""

from __future__ import annotations

import argparse
import datetime
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from threefold.training.provenance import commit, hardware

OPEN = "import onnxruntime as o; o.set_default_logger_severity(3); o.InferenceSession({path!r})"
PAUSED = """
from threefold.lazy import importing_for_good
with importing_for_good():
    import threefold.api
"""
"""How the commands import: without collecting garbage meanwhile."""


class Timed(NamedTuple):
    """Seconds of one process."""

    wall: float
    processor: float


class Case(NamedTuple):
    """A command, and the wall-clock seconds that it should stay below, or None."""

    name: str
    command: list[str]
    target: float | None = None


def cases(run: Path, image: Path) -> list[Case]:
    """The commands to time."""
    python, program = [sys.executable, "-c"], [sys.executable, "-m", "threefold"]
    model = str(run / "model.onnx")
    return [
        Case("python -c pass", [*python, "pass"]),
        Case("onnxruntime opens the file", [*python, OPEN.format(path=model)]),
        Case("import threefold", [*python, "import threefold"]),
        Case("threefold --help", [*program, "--help"], 0.15),
        Case("threefold predict, one image", [*program, "predict", model, str(image)], 0.6),
        Case("threefold evaluate", [*program, "evaluate", str(run / "oof.npz")], 1.0),
        Case("import what fit needs", [*python, "import threefold.api"]),
        Case("the same as fit does it", [*python, PAUSED]),
    ]


def time_once(command: list[str]) -> Timed:
    """Run a command in a fresh process.

    Raises:
        SystemExit: the command failed.
    """
    before, began = os.times(), time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wall, after = time.perf_counter() - began, os.times()
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr}")
    processor = after.children_user + after.children_system
    return Timed(wall, processor - before.children_user - before.children_system)


def main() -> None:
    """Time all commands in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args()
    todo = cases(options.run, options.image)
    times: dict[str, list[Timed]] = {case.name: [] for case in todo}
    for number in range(options.rounds + 1):
        for case in todo:
            timed = time_once(case.command)
            if number > 0:
                times[case.name].append(timed)
    print(f"{datetime.date.today()}, {hardware()}, commit {commit()}\n")
    print("| command | wall s | processor s | target s |\n|---|---|---|---|")
    for case in todo:
        wall = statistics.median(timed.wall for timed in times[case.name])
        processor = statistics.median(timed.processor for timed in times[case.name])
        target = "" if case.target is None else f"{case.target:g}"
        print(f"| {case.name} | {wall:.2f} | {processor:.2f} | {target} |")


if __name__ == "__main__":
    main()
