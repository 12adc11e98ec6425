"""Kill commands at random moments, resume them, and compare every bit with an uninterrupted run.

    uv run python bench/kill.py [--kills 50] [--seed 0] [--only train] [--json kills.json]
    uv run python bench/kill.py --walk [--every 1] [--only train]

Each trial begins in an empty folder. Its commands are killed with SIGKILL up to three times: at a
random moment, or as soon as a drawn phase is reached. Then the same commands run to their end.
`--walk` instead records the folder before each call that changes a file (mkdir, write, fsync,
rename, unlink), and once more with half of the file that is being written: that is what a kill
there leaves. The commands then end from each of these states.

The figures: SHA-256 of weights, predictions, arrays and exported file, and the JSON files without
times, equal to those of the uninterrupted run; no traceback, no hang, no temporary file left. A fit
with a time budget cannot have equal bits: it must finish, with all that a finished run has.

Stages save their state after every epoch, and not at most once a minute, so that there is something
to resume from. Linux only (fork). The exit code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from kill_child import Child, Ended, Recorder, save_each_epoch, warm_up
from kill_compare import hashes, leftovers
from PIL import Image

from threefold.recipe.recipe import Recipe

COLOURS: Final = {"red": (200, 40, 40), "green": (40, 180, 60), "blue": (40, 60, 200)}
TIMEOUT: Final = 240.0
"""Seconds after which a command counts as hanging."""
ANSWERS: Final = ("answers.csv", "answers.jsonl") + (
    ("answers.parquet",) if importlib.util.find_spec("pyarrow") else ()
)
"""Files of answers; the last needs the extra `parquet`."""
MAX_KILLS: Final = 3
"""Kills of one trial."""

Words = list[object]


@dataclass
class Scenario:
    """Commands that are one after the other one piece of work.

    Attributes:
        name: of the table.
        commands: makes the words of each command, for the folder of a trial.
        prepare: makes what they need, once, in a folder that all trials share.
        begin: puts into the empty folder of a trial what is there before the commands.
        is_exact: whether resumed work has the same bits.
        is_complete: looks into the folder of a trial; returns what is missing, or an empty text.
    """

    name: str
    commands: Callable[[Path, Path], list[Words]]
    prepare: Callable[[Path], None] = lambda shared: None
    begin: Callable[[Path, Path], object] = lambda shared, trial: None
    is_exact: bool = True
    is_complete: Callable[[Path], str] = lambda trial: ""


@dataclass
class Tally:
    """What came of the trials."""

    kills: Counter[str] = field(default_factory=Counter)
    trials: int = 0
    mismatches: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    def faults(self) -> int:
        """Count what is wrong."""
        kinds = (self.mismatches, self.tracebacks, self.failures, self.hangs, self.leftovers)
        return sum(map(len, kinds))


def paint_images(root: Path, per_class: int = 10, test: int = 3) -> None:
    """Write class folders of coloured noise, 32 px, below train/ and test/."""
    rng = np.random.default_rng(0)
    for part, count in (("train", per_class), ("test", test)):
        for name, colour in COLOURS.items():
            for number in range(count):
                pixels = np.clip(rng.normal(colour, 60, (32, 32, 3)), 0, 255).astype(np.uint8)
                path = root / part / name / f"{number:02d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


def recipe_of(images: Path) -> Recipe:
    """A probe, a recurrent head, and the probe tuned from its head on, in two folds."""
    network = {"backbone": "test_resnet", "weights": "none", "img_size": 32}
    return Recipe.parse(
        {
            "name": "kill",
            "data": {"root": str(images)},
            "folds": {"k": 2, "select": 0.25},
            "augment": {"hflip": True},
            "features": {"engine": "torch", "copies": 1},
            "train": {"batch_size": 8, "device": "cpu", "precision": "float32", "ema": 0.9},
            "ensemble": {"methods": ["mean", "weighted"]},
            "stages": [
                {"name": "probe", "kind": "head", "members": ["linear"]},
                {"name": "head", "kind": "head", "epochs": 3, "lr": 1e-3, "members": ["gated"]},
                {"name": "late", "epochs": 2, "lr": 1e-3, "members": ["tuned"]},
                {"name": "whole", "epochs": 2, "lr": 1e-4, "members": ["tuned"]},
            ],
            "members": [
                {"name": "linear", **network},
                {"name": "gated", **network, "head": {"kind": "gru", "units": 8, "fc": 8}},
                {"name": "tuned", **network, "starts_from": "linear"},
            ],
        }
    )


def prepare_images(shared: Path) -> None:
    """Write images and recipe."""
    paint_images(shared / "images")
    (shared / "kill.toml").write_text(recipe_of(shared / "images").dump())


def prepare_run(shared: Path) -> None:
    """Train the recipe, for commands on a finished run."""
    prepare_images(shared)
    finish(["train", shared / "kill.toml", "--out", shared / "run"], shared)


def prepare_model(shared: Path) -> None:
    """Train and export the recipe, for commands on a file."""
    prepare_run(shared)
    finish(["export", shared / "run", "--out", shared / "run" / "model.onnx"], shared)


def train_commands(shared: Path, trial: Path) -> list[Words]:
    return [["train", shared / "kill.toml", "--out", trial / "run"]]


def export_commands(shared: Path, trial: Path) -> list[Words]:
    run = trial / "run"
    return [["export", run, "--out", run / "model.onnx"], ["report", run]]


def copy_run(shared: Path, trial: Path) -> None:
    """Give a trial a finished run of its own."""
    shutil.copytree(shared / "run", trial / "run")


def fit_commands(budget: str) -> Callable[[Path, Path], list[Words]]:
    def commands(shared: Path, trial: Path) -> list[Words]:
        words: Words = ["fit", shared / "images", "--out", trial / "run", "--budget", budget]
        # Which precision and which engine is faster is measured, and not always the same.
        exact = ["--set", "train.precision=float32", "--set", "features.engine=torch"]
        return [[*words, "--members", "tf_efficientnet_lite0", "--set", "folds.k=2", *exact]]

    return commands


def is_finished(trial: Path) -> str:
    """What a finished fit lacks."""
    run = trial / "run"
    for name in ("results.json", "model.onnx", "report.html", "oof.npz", "test.npz", "chosen.npz"):
        if not (run / name).exists():
            return f"no {name}"
    results = json.loads((run / "results.json").read_text())
    if results["pending"] or results["export"] is None or results["expected"] is None:
        return "results.json is not that of a finished run"
    jobs = {path.parent for path in run.glob("jobs/*/*/*/history.json")}
    undone = [job for job in jobs if not (job / "done.json").exists()]
    return f"{len(undone)} jobs are not done" if undone else ""


SCENARIOS: Final = (
    Scenario("train", train_commands, prepare_images),
    Scenario("export", export_commands, prepare_run, copy_run),
    Scenario(
        "distill",
        lambda shared, trial: [
            ["distill", shared / "run", "--student", "tuned", "--out", trial / "student"]
        ],
        prepare_run,
    ),
    Scenario(
        "search",
        lambda shared, trial: [
            [
                "search",
                shared / "kill.toml",
                "--out",
                trial / "search",
                "--trials",
                2,
                "--space",
                "train.batch_size=4,8",
            ]
        ],
        prepare_images,
    ),
    Scenario(
        "predict",
        lambda shared, trial: [
            [
                "predict",
                shared / "run" / "model.onnx",
                shared / "images",
                "--out",
                trial / name,
                "--batch",
                1,
            ]
            for name in ANSWERS
        ],
        prepare_model,
    ),
    Scenario("fit", fit_commands("0"), prepare_images, is_complete=is_finished),
    Scenario(
        "fit, budget",
        fit_commands("30s"),
        prepare_images,
        is_exact=False,
        is_complete=is_finished,
    ),
)


def start(words: Words, trial: Path, prepare: Callable[[], object] = lambda: None) -> Child:
    """Start a command whose caches are in the folder of the trial."""

    def begin() -> None:
        from threefold.cli import app

        os.environ["THREEFOLD_CACHE"] = str(trial / "cache")
        app.STARTED = time.monotonic()  # a budget counts from there, and not from the bench's start
        save_each_epoch()
        prepare()

    return Child(words, trial.parent / "log.txt", begin)


def finish(words: Words, trial: Path, prepare: Callable[[], object] = lambda: None) -> Ended:
    """Run a command to its end.

    Raises:
        SystemExit: it fails, so that there is nothing to compare with.
    """
    trial.mkdir(parents=True, exist_ok=True)
    ended = start(words, trial, prepare).wait(4 * TIMEOUT)
    if ended is None or ended.code:
        raise SystemExit(f"{words}: {ended}")
    return ended


class Bench:
    """The trials of one scenario, compared with its uninterrupted run.

    Args:
        scenario: what runs.
        base: a folder for everything.
        seed: of all draws.
    """

    def __init__(self, scenario: Scenario, base: Path, seed: int) -> None:
        self.scenario, self.base = scenario, base
        self.shared, self.trial = base / "shared", base / "trial"
        self.random = random.Random(f"{seed} {scenario.name}")
        self.tally = Tally()
        self.shared.mkdir(parents=True)
        scenario.prepare(self.shared)
        self.copies = base / "copies"

    def run_whole(self, record: bool = False) -> None:
        """Run without an interruption, and note the phases and the bits."""
        began = time.monotonic()
        self.phases: list[str] = []
        self._begin()
        for number, words in enumerate(self.commands()):
            recorder = Recorder(self.trial, self.copies / f"{number}-{words[0]}")
            child = start(words, self.trial, recorder.install if record else lambda: None)
            while (ended := child.wait(0.002)) is None:
                if child.phase not in [*self.phases, "start"]:
                    self.phases.append(child.phase)
            if ended.code:
                raise SystemExit(f"{self.scenario.name}: {ended}")
        self.seconds = time.monotonic() - began
        self.right = hashes(self.trial)

    def _begin(self) -> None:
        """Make the folder of a trial as it is before the commands."""
        shutil.rmtree(self.trial, ignore_errors=True)
        self.trial.mkdir(parents=True)
        self.scenario.begin(self.shared, self.trial)

    def commands(self) -> list[Words]:
        """The commands of a trial, which all have the same folder."""
        return self.scenario.commands(self.shared, self.trial)

    def kill_some(self, count: int) -> None:
        """Run one trial with some kills."""
        self._begin()
        phases = []
        for _ in range(count):
            phase = self._killed_in()
            if phase:
                phases.append(phase)
        self.tally.kills.update(phases)
        self.check(f"killed in {', '.join(phases) or 'no phase'}")

    def _killed_in(self) -> str:
        """Kill the commands once; returns the phase, or an empty text if they ended before."""
        until = time.monotonic() + self.random.uniform(0, self.seconds)
        wanted = self.random.choice([*self.phases, *[""] * len(self.phases)])
        delay = self.random.choice([0.0, 0.0, 0.01, 0.05])
        for words in self.commands():
            child = start(words, self.trial)
            while (ended := child.wait(0.0)) is None:
                if child.phase == wanted or (not wanted and time.monotonic() > until):
                    time.sleep(delay)
                    child.send(signal.SIGKILL)
                    last = child.wait(TIMEOUT)
                    return last.phase if last is not None and last.code == -signal.SIGKILL else ""
                time.sleep(0.001)
            self._look_at(ended, words, "before a kill")
        return ""

    def check(self, what: str) -> None:
        """Run the commands to their end, and compare."""
        self.tally.trials += 1
        for words in self.commands():
            child = start(words, self.trial)
            ended = child.wait(TIMEOUT)
            if ended is None:
                self.tally.hangs.append(f"{what}: {words[0]} in {child.phase}")
                child.send(signal.SIGKILL)
                child.wait(TIMEOUT)
                return
            if not self._look_at(ended, words, what):
                return
        found = hashes(self.trial)
        if self.scenario.is_exact:
            different = [
                name
                for name in sorted({*found, *self.right})
                if found.get(name) != self.right.get(name)
            ]
            if different:
                self.tally.mismatches.append(f"{what}: {', '.join(different[:8])}")
        missing = self.scenario.is_complete(self.trial)
        if missing:
            self.tally.failures.append(f"{what}: {missing}")
        self.tally.leftovers += [f"{what}: {name}" for name in leftovers(self.trial)]

    def _look_at(self, ended: Ended, words: Words, what: str) -> bool:
        """Whether a command has ended as it should."""
        if "Traceback" in ended.errors:
            self.tally.tracebacks.append(f"{what}: {words[0]}: {ended.errors[-1500:]}")
        elif ended.code:
            self.tally.failures.append(
                f"{what}: {words[0]} exits with {ended.code}: {ended.errors[-300:]}"
            )
        return not ended.code

    def walk(self, every: int) -> None:
        """End the work from the state before each call that changes a file."""
        copies = sorted(self.copies.glob("*/*"))
        for number, copy in enumerate(copies[self.random.randrange(every) :: every]):
            shutil.rmtree(self.trial, ignore_errors=True)
            shutil.copytree(copy, self.trial, symlinks=True)
            self.tally.kills[copy.name.partition("-")[2]] += 1
            self.check(f"before {copy.relative_to(self.copies)}")
            if number % 20 == 0:
                print(f"  {number * every} of {len(copies)}", file=sys.stderr, flush=True)


def show(name: str, tally: Tally) -> None:
    """Print a tally."""
    kinds = {
        "mismatches": tally.mismatches,
        "tracebacks": tally.tracebacks,
        "failures": tally.failures,
        "hangs": tally.hangs,
        "leftovers": tally.leftovers,
    }
    counts = ", ".join(f"{kind} {len(faults)}" for kind, faults in kinds.items())
    print(f"{name}: {tally.kills.total()} kills in {tally.trials} trials: {counts}")
    for phase, count in sorted(tally.kills.items()):
        print(f"  {count:4d}  {phase}")
    for kind, faults in kinds.items():
        for fault in faults[:10]:
            print(f"  {kind}: {fault}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of each scenario")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="names of scenarios, separated by semicolons")
    parser.add_argument("--walk", action="store_true", help="before each call that changes a file")
    parser.add_argument("--every", type=int, default=1, help="with --walk: every n-th call")
    parser.add_argument("--json", type=Path, help="also write the tallies here")
    options = parser.parse_args(arguments)
    names = options.only.split(";") if options.only else [s.name for s in SCENARIOS]
    warm_up()
    tallies = {}
    with tempfile.TemporaryDirectory(prefix="kill") as folder:
        for scenario in SCENARIOS:
            if scenario.name not in names:
                continue
            bench = Bench(scenario, Path(folder) / scenario.name.replace(" ", ""), options.seed)
            bench.run_whole(record=options.walk)
            tally = bench.tally
            if options.walk:
                bench.walk(options.every)
            else:
                misses = 0
                while tally.kills.total() < options.kills and misses < options.kills:
                    before = tally.kills.total()
                    left = options.kills - before
                    bench.kill_some(min(left, bench.random.randint(1, MAX_KILLS)))
                    misses += tally.kills.total() == before
                    print(f"  {tally.kills.total()} kills", file=sys.stderr, flush=True)
            tallies[scenario.name] = tally
            show(scenario.name, tally)
            sys.stdout.flush()
    if options.json:
        content = {
            name: vars(tally) | {"faults": tally.faults()} for name, tally in tallies.items()
        }
        options.json.write_text(json.dumps(content, indent=1))
    return int(any(tally.faults() for tally in tallies.values()))


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
