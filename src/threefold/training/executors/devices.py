"""The devices of this machine: what each worker process gets of its GPUs, cores and threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch

from threefold.errors import RecipeError
from threefold.machine import available_memory, usable_cores
from threefold.models.pipeline import pick_device

WORKER_MEMORY: Final = 2 * 10**9
"""Bytes that a worker on the processor is given credit for, where their number is not named."""


@dataclass(frozen=True)
class Device:
    """What one worker process has to itself.

    Attributes:
        cores: numbers of the processor cores that it runs on; empty = any.
        threads: of its computations.
        variables: its environment, beside that of this process.
    """

    cores: tuple[int, ...]
    threads: int
    variables: dict[str, str] = field(default_factory=dict)


def count_devices(wanted: int | Literal["all"], device: str) -> int:
    """Return how many jobs are to run at the same time.

    Args:
        wanted: a number, or all.
        device: the recipe's `train.device`.

    Raises:
        RecipeError: there are fewer GPUs, or the recipe names one of them.
    """
    if wanted == 1:
        return 1
    kind = pick_device(device).type
    if kind == "cpu":
        if wanted != "all":
            return wanted
        return max(1, min(usable_cores(), available_memory() // WORKER_MEMORY))
    count = torch.cuda.device_count() if kind == "cuda" else 1
    if ":" in device:
        raise RecipeError(
            "several devices, and one of them by its number",
            where="train.devices, train.device",
            got=f"{wanted} and {device}",
            fix='set train.device = "cuda" or "auto"',
        )
    if wanted == "all":
        return count
    if wanted > count:
        raise RecipeError(
            "not so many devices",
            where="train.devices",
            expected=f"at most {count}, or all",
            got=wanted,
        )
    return wanted


def share_out(count: int, device: str) -> list[Device]:
    """Share the machine out among some workers: a GPU each, equal parts of cores and threads.

    The threads of this process (`OMP_NUM_THREADS`, or one per core) are the threads of all workers
    together. So the bits of a run depend on the number of workers only through these threads.

    Args:
        count: of workers.
        device: the recipe's `train.device`.
    """
    threads = max(1, min(torch.get_num_threads(), usable_cores()) // count)
    gpus: Sequence[str] = ()
    if pick_device(device).type == "cuda":
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else [*map(str, range(torch.cuda.device_count()))]
    cores = _groups_of_cores(count)
    return [
        Device(cores[i], threads, {"CUDA_VISIBLE_DEVICES": gpus[i]} if gpus else {})
        for i in range(count)
    ]


def _groups_of_cores(count: int) -> list[tuple[int, ...]]:
    """Equal groups of neighbouring cores; empty where there are too few, or they cannot be set."""
    if not hasattr(os, "sched_getaffinity"):
        return [()] * count
    cores = sorted(os.sched_getaffinity(0))
    size = len(cores) // count
    if not size:
        return [()] * count
    return [tuple(cores[i * size : (i + 1) * size]) for i in range(count)]
