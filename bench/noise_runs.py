"""Runs on coloured noise in processes of their own: what benches of workers and clusters share."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from threefold.training.provenance import commit, hardware

_TRAIN: Final = """
import sys, time
from threefold.recipe.recipe import Recipe
from threefold.training.execution import Execution
from threefold.training.jobs import train_members
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run

class Clock(Watcher):
    begins = ends = 0.0
    def job(self, job, skipped):
        self.begins = self.begins or time.monotonic()
    def ended(self, job, done=True):
        self.ends = time.monotonic()
    def note(self, text):
        print(text, file=sys.stderr)

clock, (recipe, folder, address) = Clock(), sys.argv[1:]
execution = Execution("ray", address) if address else Execution()
train_members(Run.create(Recipe.load(recipe), folder, clock, execution=execution))
print(clock.ends - clock.begins)
"""


def add_options(parser: argparse.ArgumentParser, *, folds: int, images: int) -> None:
    """Add the options of such runs, with the usual number of folds and of images of a class."""
    parser.add_argument("--folds", type=int, default=folds)
    parser.add_argument("--images", type=int, default=images, help="of each of two classes")
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--json", type=Path)


def write_images(folder: Path, per_class: int, side: int) -> None:
    """Write coloured noise of two classes."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 90), ("bright", 160)):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = rng.normal(level, 50, (side, side, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:04d}.jpg")


def start_training(
    recipe: Path, folder: Path, threads: int, address: str = ""
) -> subprocess.Popen[str]:
    """Start a process that trains a recipe; `job_seconds` reads what it prints.

    Args:
        recipe: its file.
        folder: the run folder.
        threads: of the process.
        address: of a Ray cluster that does the jobs.
    """
    return subprocess.Popen(
        [sys.executable, "-c", _TRAIN, str(recipe), str(folder), address],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE,
        text=True,
    )


def job_seconds(process: subprocess.Popen[str]) -> float:
    """Wait for a training; returns the seconds from its first job's start to its last one's end.

    Raises:
        RuntimeError: it failed.
    """
    said, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"training ended with code {process.returncode}")
    return float(said.splitlines()[-1])  # Ray may have printed something before


def write_record(path: Path, rows: list[dict[str, Any]], **others: Any) -> None:
    """Write measured rows with the date, the commit and the hardware."""
    record = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "hardware": hardware(),
        "rows": rows,
        **others,
    }
    path.write_text(json.dumps(record, indent=1))
