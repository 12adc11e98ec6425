"""What a stage does when the memory is short: the same batch in more and smaller parts.

The batch that an optimizer step learns from stays the same: its images and their order, the
learning rate and the loss scale. Only how many of its images are in memory at a time is halved,
until they fit, and stays so for the rest of the stage. The gradients are those of the whole batch;
the layers of batch norm see the parts, as with `train.accumulate`, which is where the parts begin.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Generator, nn

from threefold.errors import is_out_of_memory, shorten
from threefold.recipe.recipe import Job
from threefold.recipe.schema import StageSpec, TrainSpec
from threefold.training.checks import short_of_memory

LEAST = 2
"""Least images of a part: batch norm needs two."""


class MemoryGuard:
    """Takes optimizer steps, each again in more parts while it does not fit into memory.

    Args:
        member: the network.
        generators: that a step draws from, besides the global ones.
        spec: the recipe's `train`, which says into how many parts batches are divided at first.
        stage: what is trained.
        note: tells the user.

    Attributes:
        parts: into which batches are divided now.
        splits: each time that they became more: `step`, `images` of the batch and the new `parts`.
        is_complete: whether the step has its gradients, so that it cannot be taken again.
    """

    def __init__(
        self,
        member: nn.Module,
        generators: Mapping[str, Generator],
        spec: TrainSpec,
        stage: StageSpec,
        note: Callable[[str], None],
    ) -> None:
        self.parts, self.is_complete = spec.accumulate, False
        self.splits: list[dict[str, int]] = []
        self._generators, self._stage, self._note = generators, stage, note
        self._device = next(member.parameters()).device
        self._has_norms = any(getattr(m, "track_running_stats", False) for m in member.modules())

    def take(
        self, step: Callable[[], float], undo: Callable[[], None], number: int, images: int
    ) -> float:
        """Take an optimizer step, in more parts if the memory is short.

        Args:
            step: takes it; sets `is_complete` before it changes weights.
            undo: removes what a step has left behind that failed before.
            number: of the step in the stage.
            images: in its batch.

        Returns:
            What `step` returns.

        Raises:
            OutOfMemoryError: parts of two images are too large, too; or there is no way back: the
                weights were about to change, or several processes take the step together.
        """
        while True:
            states, self.is_complete = self._states(), False
            try:
                return step()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            # Outside of the handler, whose traceback keeps the tensors of the step.
            most = max(1, images // LEAST)
            if self.is_complete or min(self.parts, most) == most or _is_shared():
                raise short_of_memory(self._stage, self._device, -(-images // self.parts))
            undo()
            self._restore(states)
            gc.collect()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self.parts = min(2 * self.parts, most)
            self.splits.append({"step": number, "images": images, "parts": self.parts})
            self._note(describe_splits(self.splits, self._has_norms))

    def describe(self) -> str:
        """Say what happened, in words; empty if the memory was enough."""
        return describe_splits(self.splits, self._has_norms)

    def values(self) -> dict[str, Any]:
        """Return what a resumed stage needs."""
        return {"parts": self.parts, "splits": self.splits}

    def restore(self, values: dict[str, Any]) -> None:
        """Restore `values`."""
        self.parts, self.splits = values["parts"], values["splits"]

    def _states(self) -> dict[str, Any]:
        """The states of all generators, from which a step draws."""
        states = {name: generator.get_state() for name, generator in self._generators.items()}
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        own = {"torch": torch.get_rng_state(), "cuda": cuda}
        return {"own": states, "python": random.getstate(), "numpy": np.random.get_state(), **own}

    def _restore(self, states: dict[str, Any]) -> None:
        for name, generator in self._generators.items():
            generator.set_state(states["own"][name])
        torch.set_rng_state(states["torch"])
        if states["cuda"] is not None:
            torch.cuda.set_rng_state(states["cuda"], self._device)
        random.setstate(states["python"])
        np.random.set_state(states["numpy"])


def _is_shared() -> bool:
    """Whether several processes take each step together, so that none can take it again alone."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def describe_splits(splits: list[dict[str, int]], has_norms: bool = False) -> str:
    """Say how batches were divided because the memory was short; empty if they were not.

    Args:
        splits: the attribute of `MemoryGuard`.
        has_norms: whether the network has batch norm.
    """
    if not splits:
        return ""
    last = splits[-1]
    size = -(-last["images"] // last["parts"])
    also = ", which batch norm sees by themselves" if has_norms else ""
    return (
        f"memory was short: from step {splits[0]['step']} on, batches of {last['images']} images "
        f"are computed in {last['parts']} parts of {size}{also}"
    )


def memory_notes(histories: Mapping[Job, Mapping[str, Any]]) -> list[str]:
    """Name the jobs of a run whose batches did not fit into memory.

    Args:
        histories: content of history.json by job.
    """
    texts = {job: describe_splits(history.get("splits", [])) for job, history in histories.items()}
    jobs = [f"{job.path.removeprefix('jobs/')}: {text}" for job, text in texts.items() if text]
    return [f"training met a shortage of memory: {shorten(jobs, 5)}"] if jobs else []
