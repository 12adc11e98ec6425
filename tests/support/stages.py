"""Build tiny members and the tasks of their stages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.tiny_runs import COLOURS, tiny_tree
from threefold.models.member import Member, build_member
from threefold.recipe.recipe import Recipe
from threefold.training.pixel_cache import PixelRows
from threefold.training.progress.watcher import Watcher
from threefold.training.stages.loop import train_stage
from threefold.training.stages.task import StageTask


def make_rows(n: int, seed: int) -> PixelRows:
    """Draw coloured noise (n, 32, 32, 3) and its class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    colours = np.array(list(COLOURS.values()))[labels][:, None, None, :]
    pixels = colours + rng.normal(0, 70, (n, 32, 32, 3))
    return PixelRows(np.clip(pixels, 0, 255).astype(np.uint8), labels)


def make_task(*sets: str, first: bool = True, seed: int = 1, **more: Any) -> StageTask:
    """Return the first stage of the tiny recipe with some changes."""
    recipe = Recipe.parse(tiny_tree(Path("x")), sets)
    values: dict[str, Any] = {"fit": make_rows(24, 0), "select": make_rows(12, 1), **more}
    return StageTask(recipe.stages[0], recipe, seed=seed, num_classes=3, first=first, **values)


def build_tiny(name: str = "plain", *sets: str) -> Member:
    """Build a member of the tiny recipe with the same fresh weights every time."""
    torch.manual_seed(0)
    return build_member(Recipe.parse(tiny_tree(Path("x")), sets).member(name), 3)


class Interrupter(Watcher):
    """Interrupts training in an epoch, and counts epochs and images."""

    def __init__(self, epoch: int = -1) -> None:
        self.stop_at, self.epochs, self.images = epoch, 0, 0

    def batch(self, images: int) -> None:
        if self.epochs == self.stop_at:
            raise KeyboardInterrupt
        self.images += images

    def epoch(self, record: dict[str, Any]) -> None:
        self.epochs += 1


def interrupt(task: StageTask, epoch: int) -> None:
    """Train the tiny network until an epoch, saving after each one before."""
    with pytest.raises(KeyboardInterrupt):
        train_stage(build_tiny(), replace(task, watcher=Interrupter(epoch)))


class Stopper(Watcher):
    """Asks training to stop after some steps, as a signal does."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def batch(self, images: int) -> None:
        self.steps -= 1
        if self.steps == 0 and self.defers_stop:
            self.stop = KeyboardInterrupt("a signal")


def stop_after(task: StageTask, steps: int) -> None:
    """Train the tiny network until it has saved its state after some steps."""
    with pytest.raises(KeyboardInterrupt, match="a signal"):
        train_stage(build_tiny(), replace(task, watcher=Stopper(steps)))


def without_path(task: StageTask) -> StageTask:
    return replace(task, resume_path=None)


def train_whole_and_in_parts(*sets: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Train the tiny network, without randomness, on whole batches and on four parts of each."""
    noise = "members.plain.head.noise=0.0"
    sets = (*sets, "augment.hflip=false", "augment.rotation=0", noise)
    whole, parts = (
        train_stage(build_tiny("plain", noise), make_task(*sets, f"train.accumulate={n}")).state
        for n in (1, 4)
    )
    return whole, parts
