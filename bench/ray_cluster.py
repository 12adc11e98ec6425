"""A run on a Ray cluster of several nodes: the same bits whatever dies, its overhead, its speed.

    uv run --group cluster python bench/ray_cluster.py [--only equal,node,workers,overhead,speed]
        [--folds 30] [--images 60] [--side 96] [--seed 0] [--json FILE]

The nodes are in network namespaces of this machine (ray_nodes.py; Linux, root), with one processor
and a cache each. A node and the process that the others are compared with use one thread.

- equal: two nodes; hashes of all weights and predictions against one process without Ray.
- node: the same, and one of the two nodes is killed once a job is done.
- workers: the same, and processes are killed while they do a job, drawn at random, until their
  number is 30 % of that of the jobs.
- overhead: `--folds` x 2 jobs on one node against one process without Ray.
- speed: the same jobs on two nodes against one; and, as the limit of these cores, two processes
  without Ray that do all jobs each, at the same time.

Seconds are those from the start of the first job to the end of the last: starting Ray and the nodes
is not in them. They mean something on a machine with a free processor for every node. The exit code
is 1 if a hash differs, or if less was killed than should have been.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from noise_runs import add_options, job_seconds, start_training, write_images, write_record
from ray_nodes import HEAD, PORT, NamespaceNode, can_start, namespace_cluster

from threefold.files import sha256

STEPS: Final = ("equal", "node", "workers", "overhead", "speed")
KILLED_SHARE: Final = 0.3
"""Killed processes as a share of the jobs."""
LEAST_SECONDS: Final = 1.0
"""A job runs so long before its process is killed."""


def write_recipe(path: Path, images: Path, options: argparse.Namespace, folds: int) -> None:
    """Write a recipe of one network and two stages, so with two jobs for each fold."""
    path.write_text(
        f'name = "cluster"\n[data]\nroot = "{images}"\n[folds]\nk = {folds}\nfinal = "average"\n'
        '[train]\nprecision = "float32"\nbatch_size = 16\ndevice = "cpu"\n'
        "[cluster]\ncpus = 1\nretries = 20\n"
        '[[stages]]\nname = "one"\nepochs = 1\nlr = 1e-3\n'
        '[[stages]]\nname = "two"\nepochs = 1\nlr = 1e-4\n'
        f'[[members]]\nname = "m"\nbackbone = "{options.backbone}"\nweights = "none"\n'
        f"img_size = {options.side}\n",
        encoding="utf-8",
    )


class Training:
    """A process that trains a recipe, on the cluster or by itself."""

    def __init__(self, recipe: Path, folder: Path, *, on_cluster: bool) -> None:
        self.folder = folder
        address = f"{HEAD}:{PORT}" if on_cluster else ""
        self.process = start_training(recipe, folder, 1, address)

    def jobs_done(self) -> int:
        """Count the finished jobs."""
        return len(list(self.folder.glob("jobs/*/*/*/done.json")))

    def goes_on(self) -> bool:
        """Wait a moment; returns whether the training still goes on then."""
        time.sleep(0.1)
        return self.process.poll() is None

    def finish(self) -> Trained:
        """Wait for the end.

        Raises:
            RuntimeError: the training failed.
        """
        seconds = job_seconds(self.process)
        files = sorted(p for p in self.folder.rglob("*") if p.suffix in (".safetensors", ".npz"))
        hashes = {p.relative_to(self.folder).as_posix(): sha256(p) for p in files}
        return Trained(seconds, hashes, self.jobs_done())


@dataclass(frozen=True)
class Trained:
    """A finished run: seconds of its jobs, the hashes of its files, and the number of its jobs."""

    seconds: float
    hashes: dict[str, str]
    jobs: int


def kill_workers(training: Training, nodes: list[NamespaceNode], count: int, seed: int) -> int:
    """Kill processes while they do a job, at random moments; returns how many were killed."""
    rng, killed, moment = random.Random(seed), 0, 0.0
    seen: dict[int, float] = {}
    while killed < count and training.goes_on():
        now = time.monotonic()
        running = [pid for node in nodes for pid in node.workers()]
        seen = {pid: seen.get(pid, now) for pid in running}
        old = [pid for pid, since in seen.items() if now - since > LEAST_SECONDS]
        if old and now >= moment:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(old), signal.SIGKILL)
                killed += 1
            moment = now + rng.uniform(1.0, 10.0)
    return killed


def train_with_faults(
    step: str, recipe: Path, place: Path, kills: int, seed: int
) -> tuple[Trained, int]:
    """Train on two nodes with the faults of a step.

    Args:
        step: equal, node or workers.
        recipe: its file.
        place: a folder for the run and the caches.
        kills: how many processes are killed in the step workers.
        seed: of the moments and the processes.

    Returns:
        The run, and how many nodes or processes were killed.
    """
    with namespace_cluster(2, place / f"caches-{step}") as nodes:
        training = Training(recipe, place / step, on_cluster=True)
        killed = 0
        if step == "node":
            while not training.jobs_done() and training.goes_on():
                pass
            nodes[0].kill()
            killed = 1
        elif step == "workers":
            killed = kill_workers(training, nodes, kills, seed)
        return training.finish(), killed


def time_nodes(count: int, recipe: Path, place: Path) -> Trained:
    """Train on so many nodes."""
    with namespace_cluster(count, place / f"caches-{count}") as _:
        return Training(recipe, place / f"nodes-{count}", on_cluster=True).finish()


def time_two_processes(recipe: Path, place: Path) -> float:
    """Let two processes do all jobs each, at the same time; returns the mean of their seconds."""
    both = [Training(recipe, place / f"beside-{n}", on_cluster=False) for n in range(2)]
    return sum(training.finish().seconds for training in both) / len(both)


def main() -> int:
    """Measure, print, and write the numbers; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(STEPS))
    add_options(parser, folds=30, images=60)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if why := can_start():
        parser.error(why)
    steps = options.only.split(",")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        write_images(place / "images", options.images, options.side)
        recipe = place / "recipe.toml"
        write_recipe(recipe, place / "images", options, options.folds)
        alone = Training(recipe, place / "alone", on_cluster=False).finish()
        rows.append({"what": "one process", "jobs": alone.jobs, "seconds": alone.seconds})
        for step in ("equal", "node", "workers"):
            if step in steps:
                kills = round(KILLED_SHARE * alone.jobs)
                run, killed = train_with_faults(step, recipe, place, kills, options.seed)
                wanted = {"equal": 0, "node": 1, "workers": kills}[step]
                row = _row(f"two nodes, {step}", run, alone)
                rows.append(row | {"killed": killed, "not killed": wanted - killed})
        nodes = {}
        if "overhead" in steps or "speed" in steps:
            nodes[1] = time_nodes(1, recipe, place)
            rows.append(_row("one node", nodes[1], alone))
        beside = 0.0
        if "speed" in steps:
            beside = time_two_processes(recipe, place)
            nodes[2] = time_nodes(2, recipe, place)
            rows.append(_row("two nodes", nodes[2], alone))
    for row in rows:
        print(", ".join(f"{key} {_text(value)}" for key, value in row.items()))
    if 1 in nodes:
        extra = nodes[1].seconds - alone.seconds
        share = 100 * extra / alone.seconds
        print(f"overhead: {extra / alone.jobs:+.3f} s a job, {share:+.2f} % of these jobs")
    if 2 in nodes:
        print(f"speed: two nodes {nodes[1].seconds / nodes[2].seconds:.2f} x one")
        limit = 2 * alone.seconds / beside
        print(f"limit of these cores: two processes do {limit:.2f} x the jobs of one in its time")
    if options.json:
        write_record(options.json, rows)
    return int(any(row.get("different") or row.get("not killed") for row in rows))


def _row(what: str, run: Trained, alone: Trained) -> dict[str, Any]:
    """A row of the table: how many files a run has, and how many differ from one process's."""
    names = run.hashes.keys() | alone.hashes.keys()
    different = sum(run.hashes.get(name) != alone.hashes.get(name) for name in names)
    values = {"jobs": run.jobs, "seconds": run.seconds, "files": len(names)}
    return {"what": what, **values, "different": different}


def _text(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
