"""Checkpoints of a stage, which of two is better, and the gate: whether a stage's best replaces what it started from."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """Weights with what they reach on the select rows."""

    state: State
    accuracy: float
    losses: np.ndarray
    hits: np.ndarray
    epoch: int

    def better_than(self, other: Checkpoint) -> bool:
        """Higher accuracy, ties broken by lower log loss (as in the authors' code)."""
        return (self.accuracy, -float(self.losses.mean())) > (
            other.accuracy,
            -float(other.losses.mean()),
        )


def gate(start: Checkpoint, best: Checkpoint, first: bool, on: bool) -> tuple[bool, str]:
    """Whether the stage's best weights replace those it started from, and why.

    With the gate on (honest protocol) the paired fall of the log loss, or the paired rise of the accuracy, on the select
    rows must exceed its standard error. Otherwise, and after a first stage, the best checkpoint always counts.

    Args:
        start: before the stage.
        best: the best of its epochs, or `start` itself.
        first: whether the stage started from a random head.
        on: whether there is a gate.
    """
    if best is start:
        return False, "no epoch was better on the select rows"
    if first or not on:
        return True, "first stage" if first else "gate off"
    loss_gain, loss_error = _paired(start.losses - best.losses)
    gain, error = _paired(best.hits.astype(float) - start.hits.astype(float))
    kept = loss_gain > loss_error or gain > error
    words = f"select accuracy {gain:+.4f} +- {error:.4f}, log loss {-loss_gain:+.4f} +- {loss_error:.4f}"
    return kept, f"{'helped by more than its noise' if kept else 'within its noise'}: {words}"


def _paired(differences: np.ndarray) -> tuple[float, float]:
    """Mean and standard error of paired differences."""
    n = len(differences)
    return float(differences.mean()), float(
        differences.std(ddof=1) / math.sqrt(n)
    ) if n > 1 else math.inf
