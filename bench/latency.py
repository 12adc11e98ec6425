"""Time one image: the exported file against the same pipeline in eager PyTorch at its best setting.

    uv run python bench/latency.py RUN [--model MODEL] [--rounds 30] [--compile]

Eager: every combination of 1 or 2 threads and contiguous or channels-last weights, in inference
mode on one uint8 image, and bfloat16 autocast unless one try is five times slower. File: the
session of `threefold.load` with 1 and 2 threads. All candidates take turns in one process, so that
other work on the machine affects all of them alike. In a round each gets one call to warm up and
one that counts. The best of a side has the smallest median; the ratio is the median over rounds of
best by best. `--compile` adds torch.compile in its default mode, with a line of its own. Both sides
start from the decoded image. Processor time is printed too, for machines that are shared.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import threefold
from threefold.exporting.export import chosen_ensemble
from threefold.models.pipeline import Pipeline
from threefold.training.provenance import commit, hardware
from threefold.training.run import Run

THREADS = (1, 2)
Call = Callable[[], Any]


class Elapsed(NamedTuple):
    """Seconds of one call."""

    wall: float
    processor: float


def eager(pipeline: Any, image: torch.Tensor, threads: int, half: bool = False) -> Call:
    """One answer of the pipeline in PyTorch."""

    def call() -> None:
        torch.set_num_threads(threads)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            pipeline(image)

    return call


def exported(path: Path, image: np.ndarray, threads: int) -> Call:
    """One answer of the file."""
    model = threefold.load(path, threads)
    return lambda: model.infer([image])


def candidates(
    pipeline: Pipeline, path: Path, image: np.ndarray, compiled: bool
) -> dict[str, Call]:
    """Every setting that is timed, by name."""
    tensor = torch.from_numpy(image[None])
    last = copy.deepcopy(pipeline)
    for module in last.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    calls: dict[str, Call] = {}
    for threads in THREADS:
        calls[f"file, {threads} threads"] = exported(path, image, threads)
        for name, module in (("contiguous", pipeline), ("channels last", last)):
            calls[f"eager, {name}, {threads} threads"] = eager(module, tensor, threads)
    plain, half = calls["eager, channels last, 1 threads"], eager(last, tensor, 1, half=True)
    if timed(half).wall < 5 * timed(plain).wall:
        for threads in THREADS:
            calls[f"eager, channels last, bfloat16, {threads} threads"] = eager(
                last, tensor, threads, half=True
            )
    else:
        print("bfloat16 autocast: more than five times slower in one try, left out")
    if compiled:
        for threads in THREADS:
            calls[f"compiled, {threads} threads"] = eager(torch.compile(pipeline), tensor, threads)
    return calls


def timed(call: Call) -> Elapsed:
    """Time a call after one that does not count."""
    call()
    start, processor_start = time.perf_counter(), time.process_time()
    call()
    return Elapsed(time.perf_counter() - start, time.process_time() - processor_start)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    run = Run.open(args.run)
    ensemble = chosen_ensemble(run)
    names = ensemble.members
    pipeline = run.pipeline(ensemble.combiner, names)
    dataset = run.sources.test or run.sources.train
    image = dataset.pixels(0)
    path = args.model or args.run / "model.onnx"
    print(
        f"{hardware()}, torch {torch.__version__}, commit {commit()}, {time.strftime('%Y-%m-%d')}; "
        f"{len(names)} members, {run.networks(run.recipe.members[0])} folds, image {image.shape}"
    )
    calls = candidates(pipeline, path, image, args.compile)
    for call in calls.values():
        timed(call)
    times = {name: np.zeros((args.rounds, 2)) for name in calls}
    for i in range(args.rounds):
        for name, call in calls.items():
            times[name][i] = timed(call)
    print(f"{'':44}{'median ms':>10}{'least':>8}{'CPU ms':>8}")
    for name, seconds in times.items():
        wall, processor = 1000 * seconds.T
        print(f"{name:44}{np.median(wall):10.1f}{wall.min():8.1f}{np.median(processor):8.1f}")
    for other in ("eager", "compiled")[: 2 if args.compile else 1]:
        for clock, axis in (("wall time", 0), ("processor time", 1)):
            file = fastest(times, "file", axis)
            torch_call = fastest(times, other, axis)
            ratio = np.median(times[file][:, axis] / times[torch_call][:, axis])
            print(f"by {clock}: {file} / {torch_call} = {ratio:.2f}")


def fastest(times: dict[str, np.ndarray], prefix: str, axis: int) -> str:
    """Name the candidate with the smallest median among those of a prefix."""
    names = [name for name in times if name.startswith(prefix)]
    return min(names, key=lambda name: float(np.median(times[name][:, axis])))


if __name__ == "__main__":
    main()
