"""What a model file answers, and what says that its answers are no probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from threefold.tasks import Task

TOLERANCE: Final = 0.01
"""How far the probabilities of an image may be from a sum of 1, and each from 0..1."""


@dataclass(frozen=True)
class ModelOutput:
    """The answers of a model for n images.

    Attributes:
        probs: (n, k) float32; in a row of a multiclass model they sum to 1.
        member_probs: (n, m, k) float32; zeros for members that did not run.
        stages_used: (n,) int64, the stages of the cascade that ran; None without a cascade.
    """

    probs: np.ndarray
    member_probs: np.ndarray
    stages_used: np.ndarray | None = None

    def row(self, i: int) -> ModelOutput:
        """The output for image i, with n = 1."""
        stages = None if self.stages_used is None else self.stages_used[i : i + 1]
        return ModelOutput(self.probs[i : i + 1], self.member_probs[i : i + 1], stages)


def find_fault(output: ModelOutput, shape: Sequence[int], stages: int, task: Task) -> str:
    """Say what is wrong with answers, as of a damaged file; empty if nothing is.

    Args:
        output: the answers.
        shape: n images, m members, k classes.
        stages: of the cascade; 0 = it has none.
        task: multilabel = a row has any sum.
    """
    n, m, k = shape
    if output.probs.shape != (n, k) or output.member_probs.shape != (n, m, k):
        return f"answers of shape {output.probs.shape} and {output.member_probs.shape}"
    if stages:
        used = np.asarray(output.stages_used)
        if used.shape != (n,) or ((used < 1) | (used > stages)).any():
            return "a number of stages that the cascade does not have"
    for probs in (output.probs, output.member_probs):
        inside = (probs >= -TOLERANCE) & (probs <= 1 + TOLERANCE)  # false for NaN
        if not inside.all():
            return f"a probability of {probs[~inside][0]:.4g}"
    sums = output.probs.sum(axis=-1)
    if task == "multiclass" and not (np.abs(sums - 1) <= TOLERANCE).all():
        return f"probabilities with a sum of {sums[np.abs(sums - 1).argmax()]:.4g}"
    return ""
