"""Training and feature extraction beside the peers: images a second, as ratios, in one run.

    uv run python bench/speed_peers.py FOLDER --out OUT [--peer-python OTHER/bin/python]

FOLDER has one folder per class; `--limit` images of it are copied, so that an epoch takes less
than a minute. speed_systems.py says what each system does. In a round every system has one turn,
in a process of its own, so that other work on the machine affects all alike. The table has the
median over `--rounds` of images a second, and the median, smallest and largest of the ratios
threefold / peer of the same round. `--peer-python` runs fastai and Keras from another environment;
a system whose packages are missing is left out, and named. OUT/speeds.jsonl keeps each turn.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from speed_systems import KERAS_NETWORKS, SYSTEMS

from threefold.training.provenance import commit, hardware

OURS = "threefold"
NETWORKS = ("tf_efficientnet_lite0", "mobilenetv1_100", "resnet50")
PACKAGES = {
    "fastai": "fastai",
    "keras-torch": "keras",
    "keras-tensorflow": "keras, tensorflow",
}
"""What the peers need beyond this project's own environment."""


class Case(NamedTuple):
    """What is timed: a task on a network at an image size."""

    task: str
    network: str
    size: int


class Turn(NamedTuple):
    """One system's speed in one round of a case."""

    case: Case
    system: str
    round: int
    speed: float


def systems_of(case: Case, python: str) -> list[str]:
    """The systems that know the network and whose packages are installed."""
    names = []
    for system in SYSTEMS[case.task]:
        if system.startswith("keras") and case.network not in KERAS_NETWORKS:
            continue
        packages = PACKAGES.get(system)
        if (
            packages
            and subprocess.run(
                [python, "-c", f"import {packages}"], stderr=subprocess.DEVNULL
            ).returncode
        ):
            continue
        names.append(system)
    return names


def copy_images(folder: Path, target: Path, limit: int) -> Path:
    """Copy the first images of each class, `limit` in all, and return the copy."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    for source in classes:
        (target / source.name).mkdir(parents=True)
        for path in sorted(source.iterdir())[: limit // len(classes)]:
            shutil.copy(path, target / source.name)
    return target


def time_turn(case: Case, system: str, images: Path, python: str, batch: int) -> float | None:
    """Run one system in a process of its own; returns images a second, or None if it failed."""
    program = python if system in PACKAGES else sys.executable
    script = Path(__file__).with_name("speed_systems.py")
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--images", images, "--network", case.network, "--size", case.size]
        options += ["--batch", batch, "--scratch", scratch]
        command = [program, script, case.task, system, *options]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        print(f"{system} failed: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    return float(json.loads(done.stdout.splitlines()[-1])["images_per_second"])


def table(turns: list[Turn]) -> str:
    """Markdown: one row per case and system."""
    lines = [
        "| task | network | size | system | images/s | threefold / it (least - most) |",
        "|---|---|---|---|---|---|",
    ]
    for case, system in dict.fromkeys((turn.case, turn.system) for turn in turns):
        speeds = {t.round: t.speed for t in turns if (t.case, t.system) == (case, system)}
        ours = {t.round: t.speed for t in turns if (t.case, t.system) == (case, OURS)}
        ratios = [ours[number] / speed for number, speed in speeds.items() if number in ours]
        ratio = ""
        if system != OURS and ratios:
            spread = f"{min(ratios):.2f} - {max(ratios):.2f}"
            ratio = f"{statistics.median(ratios):.2f} ({spread})"
        speed = statistics.median(speeds.values())
        row = (case.task, case.network, case.size, system, f"{speed:.1f}", ratio)
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


def main() -> None:
    """Time all systems in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", default="features,train")
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--sizes", default="96,224")
    parser.add_argument("--limit", type=int, default=320)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-python", default=sys.executable)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    turns: list[Turn] = []
    with tempfile.TemporaryDirectory() as scratch, (options.out / "speeds.jsonl").open("a") as log:
        images = copy_images(options.folder, Path(scratch) / "images", options.limit)
        cases = [
            Case(task, network, int(size))
            for task in options.tasks.split(",")
            for network in options.networks.split(",")
            for size in options.sizes.split(",")
        ]
        for case in cases:
            systems = systems_of(case, options.peer_python)
            for number in range(options.rounds):
                for system in systems:
                    speed = time_turn(case, system, images, options.peer_python, options.batch)
                    if speed is None:
                        continue
                    turn = Turn(case, system, number, speed)
                    turns.append(turn)
                    record = {**case._asdict(), "system": system, "round": number, "speed": speed}
                    print(json.dumps(record), file=log, flush=True)
            print(table([turn for turn in turns if turn.case == case]), flush=True)
    print(f"\n{datetime.date.today()}, {hardware()}, commit {commit()}\n")
    print(table(turns))


if __name__ == "__main__":
    main()
