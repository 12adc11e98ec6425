"""The batches of an epoch: the rows of each optimizer step, and what a forward pass is given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from threefold.recipe.schema import TrainSpec
from threefold.training.steps.losses import Whole


class Batch(NamedTuple):
    """What a forward pass and its loss take."""

    images: Tensor
    labels: Tensor
    soft: Tensor | None
    whole: Whole | None = None
    """The micro-batch of all ranks, of which these images are one rank's; None = it is whole."""

    @property
    def num_images(self) -> int:
        """Images of the micro-batch, over all ranks."""
        return len(self.images) if self.whole is None else self.whole.images


def draw_batches(
    labels: np.ndarray, spec: TrainSpec, num_classes: int, steps: int, generator: torch.Generator
) -> Iterator[np.ndarray]:
    """Yield the rows of each optimizer step, without a last batch of one row.

    (Batch norm needs two.)

    Args:
        labels: (n,) of the rows to train on, which a balanced sampler needs; or targets (n, k).
        spec: has the sampler.
        num_classes: number of classes k.
        steps: batches in the epoch.
        generator: the only source of randomness.
    """
    if spec.sampler == "balanced":
        counts = np.bincount(labels, minlength=num_classes)
        weights = torch.from_numpy(1.0 / counts[labels])
        order = torch.multinomial(weights, len(labels), replacement=True, generator=generator)
    else:
        order = torch.randperm(len(labels), generator=generator)
    for rows in np.array_split(order.numpy(), steps):
        if len(rows) > 1:
            yield np.sort(rows)
