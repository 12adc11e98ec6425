"""The one-standard-error rule for paired candidates.

Among several candidates, take the simplest one that the best does not beat by more than one
standard error (Breiman et al. 1984, section 3.4.3). All candidates are judged on the same rows, so
the standard error is that of the row-by-row difference to the best.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Choice(NamedTuple):
    """The result of the rule.

    Attributes:
        chosen: index of the chosen candidate.
        best: index of the candidate with the best mean score.
        error: standard error of their difference; 0 if they are the same.
    """

    chosen: int
    best: int
    error: float


def simplest(scores: Sequence[np.ndarray], groups: npt.ArrayLike | None = None) -> Choice:
    """Return the first candidate within one standard error of the best.

    Args:
        scores: one array (n,) per candidate, simplest first. Higher is better: hits, or negative
            losses.
        groups: (n,) group of each row; None = rows are independent.
    """
    best = max(range(len(scores)), key=lambda i: scores[i].mean())
    for index, score in enumerate(scores[:best]):
        difference = scores[best].astype(np.float64) - score
        error = standard_error(difference, groups)
        if difference.mean() <= error:
            return Choice(index, best, error)
    return Choice(best, best, 0.0)


def standard_error(values: np.ndarray, groups: npt.ArrayLike | None = None) -> float:
    """Return the standard error of the mean of `values` (n,).

    With `groups` (n,), rows are independent only between groups, and the sums of the groups'
    deviations take the place of the rows' (the cluster-robust variance).
    """
    if groups is None:
        return float(values.std() / len(values) ** 0.5)
    codes = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(codes, values - values.mean())
    return float(np.sqrt((sums**2).sum()) / len(values))
