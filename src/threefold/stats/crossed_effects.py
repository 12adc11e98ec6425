"""What several seeds of a recipe say about other seeds and other images.

Values (s, n) of s seeds on n rows are modelled as mean + seed + image + rest, all random. This is
the analysis of readers and cases in radiology (Dorfman, Berbaum and Metz 1992; Hillis 2007), with
seeds as readers and images as cases.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import expit, logit, stdtrit  # scipy.stats imports slowly

from threefold.errors import DataError
from threefold.stats.bootstrap import LEVEL, check_groups, check_hits, check_level
from threefold.stats.scores import wilson_interval


class CrossedMean(NamedTuple):
    """A mean over seeds and rows.

    Attributes:
        mean: the mean.
        variance: of the mean, over other seeds and other images.
        df: Satterthwaite's degrees of freedom of the variance.
        seeds_share: share of the variance that only more seeds can reduce, 0 to 1.
    """

    mean: float
    variance: float
    df: float
    seeds_share: float


class SeedsAccuracy(NamedTuple):
    """The accuracy of a recipe, with its interval for other seeds and other images."""

    estimate: float
    low: float
    high: float


def crossed_mean(values: np.ndarray, groups: npt.ArrayLike | None = None) -> CrossedMean:
    """Return the mean of values (s, n) and its variance over other seeds and other images.

    With mean squares MS of seeds, images and rest, the variance is (MS_seeds + max(MS_images -
    MS_rest, 0)) / (s n). MS_seeds is at least MS_rest, as it would be with many seeds. A bootstrap
    of both axes (Owen 2007) gives three seeds two thirds of their variance and uses no t quantile,
    so its coverage is too low if seeds matter. Two seeds give a valid but very wide interval.

    Args:
        values: float (s, n) of s >= 2 seeds.
        groups: (n,) names, which take the place of images; or None.

    Raises:
        DataError: there is only one row or group.
    """
    mean = float(values.mean())
    cells = values
    if groups is not None:
        # Linearised ratio: values of groups are centred on the overall mean, whatever their size.
        part = check_groups(groups, values.shape[1])
        sizes = np.bincount(part)
        sums = np.array([np.bincount(part, row) for row in values])
        cells = mean + (sums - mean * sizes) * len(sizes) / values.shape[1]
    s, n = cells.shape
    if n < 2:
        raise DataError("one row or group says nothing about others", expected="two or more", got=n)
    seeds, images = cells.mean(1), cells.mean(0)
    ms_seeds = n * float(((seeds - mean) ** 2).sum()) / (s - 1)
    ms_images = s * float(((images - mean) ** 2).sum()) / (n - 1)
    ms_rest = float(((cells - seeds[:, None] - images + mean) ** 2).sum()) / ((s - 1) * (n - 1))
    ms_seeds = max(ms_seeds, ms_rest)
    excess = 0.0
    denominator = ms_seeds**2 / (s - 1)  # of Satterthwaite's degrees of freedom
    if ms_images > (1 + 1e-9) * ms_rest:  # rounding errors must not change the degrees of freedom
        excess = ms_images - ms_rest
        denominator += ms_images**2 / (n - 1) + ms_rest**2 / ((s - 1) * (n - 1))
    total = ms_seeds + excess
    return CrossedMean(
        mean=mean,
        variance=total / (s * n),
        df=total**2 / denominator if denominator else 1.0,
        seeds_share=(ms_seeds - ms_rest) / total if total else 0.0,
    )


def seeds_accuracy(
    correct: npt.ArrayLike, groups: npt.ArrayLike | None = None, level: float = LEVEL
) -> SeedsAccuracy:
    """Return the mean accuracy of several seeds, with an interval for other seeds and images.

    The interval is Student's on the scale of log odds, so that it stays within 0 and 1. Where every
    answer is right, or every one wrong, it is Wilson's of the rows (or groups) of one seed.

    Args:
        correct: (s, n) booleans of s >= 2 seeds on the same rows.
        groups: (n,) names, or None.
        level: confidence level.

    Raises:
        DataError: values are not booleans, or there is only one seed, row or group.
    """
    hits = check_hits(correct, 2)
    check_level(level)
    if len(hits) < 2:
        raise DataError("one seed says nothing about other seeds", expected="two or more")
    over = crossed_mean(hits.astype(np.float64), groups)
    p, quantile = over.mean, float(stdtrit(over.df, (1 + level) / 2))
    if over.variance == 0:
        n = hits.shape[1]
        rows = n if groups is None else int(check_groups(groups, n).max()) + 1
        return SeedsAccuracy(p, *wilson_interval(p * rows, rows, level))
    half = quantile * over.variance**0.5 / (p * (1 - p))
    low, high = expit(logit(p) + np.array([-half, half]))
    return SeedsAccuracy(p, float(low), float(high))
