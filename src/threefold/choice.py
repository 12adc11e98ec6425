"""The one-standard-error rule: the simplest of several candidates that no other beats by more than its noise.

Breiman et al. (1984), section 3.4.3, for paired candidates: all are judged on the same rows, so the standard error is that
of the row-by-row difference to the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Choice(NamedTuple):
    """Which candidate, against which best one, and the standard error of their difference (0 where they are one)."""

    chosen: int
    best: int
    error: float


def simplest(scores: Sequence[np.ndarray]) -> Choice:
    """The first candidate within one standard error of the best.

    Args:
        scores: one array (n,) per candidate, the simplest first; higher is better (hits, or minus losses).
    """
    best = max(range(len(scores)), key=lambda i: scores[i].mean())
    for index, mine in enumerate(scores):
        difference = scores[best].astype(np.float64) - mine
        error = float(difference.std() / len(difference) ** 0.5)
        if index == best or difference.mean() <= error:
            return Choice(index, best, 0.0 if index == best else error)
    raise AssertionError("the best candidate is one of them")
