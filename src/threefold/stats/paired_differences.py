"""Bootstrap intervals of the difference of two classifiers on the same rows.

With `groups` (see `scores`), an interval is for new groups, not for new rows of the same groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError
from threefold.predictions.checks import check_labels, check_probs
from threefold.stats.bootstrap import (
    LEVEL,
    RESAMPLES,
    check_draws,
    check_groups,
    check_numbers,
    check_pairs,
    column_sums,
    percentile_interval,
    row_weights,
)
from threefold.stats.weighted_scores import WeightedScore, check_score


class Difference(NamedTuple):
    """A mean paired difference a - b with its interval."""

    estimate: float
    low: float
    high: float


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean of a - b with a percentile bootstrap interval.

    With groups, whole groups are drawn (cluster bootstrap), since rows of one patient or signer are
    not independent.

    Args:
        a, b: (n,) scores of the same rows, such as `scores.correct`.
        groups: (n,) names, or None.
        level: confidence level.
        resamples: number of draws.
        seed: seed of the draws.

    Raises:
        DataError: lengths differ, values are not finite, or the level is outside 0..1.
    """
    first, second = check_pairs(check_numbers(a), check_numbers(b))
    check_draws(level, resamples)
    difference = first - second
    part = np.arange(len(first)) if groups is None else check_groups(groups, len(first))
    columns = np.stack([np.bincount(part, difference), np.bincount(part)])
    means = [sums / counts for sums, counts in column_sums(columns, resamples, seed)]
    return Difference(float(difference.mean()), *percentile_interval(np.concatenate(means), level))


def score_difference(
    score: str | WeightedScore,
    probs_a: npt.ArrayLike,
    probs_b: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Difference a - b of a score with a percentile bootstrap interval.

    Both are scored on the same drawn rows.

    Args:
        score: a name of `weighted_scores.SCORES`, or a `WeightedScore`.
        probs_a, probs_b: (n, k), for the same rows.
        labels: (n,).
        groups: (n,) names, or None. Groups are drawn whole.
        level: confidence level.
        resamples: number of draws.
        seed: seed of the draws.

    Raises:
        DataError: probabilities, labels or groups are not usable, or the score is unknown or not
            defined on these rows.
    """
    a = check_probs(probs_a, 2).astype(np.float64)
    b = check_probs(probs_b, 2).astype(np.float64)
    if a.shape != b.shape:
        raise DataError("the two have different rows or classes", expected=a.shape, got=b.shape)
    truth, function = check_labels(labels, *a.shape), check_score(score)
    part = None if groups is None else check_groups(groups, len(truth))
    check_draws(level, resamples)
    equal = np.ones((len(truth), 1))
    estimate = float((function(a, truth, equal) - function(b, truth, equal))[0])
    if np.isnan(estimate):
        raise DataError(
            "the score is not defined on these rows", where=score if isinstance(score, str) else ""
        )
    drawn = row_weights(len(truth), part, resamples, seed)
    values = [function(a, truth, weights) - function(b, truth, weights) for weights in drawn]
    return Difference(estimate, *percentile_interval(np.concatenate(values), level))
