"""Paired tests of classifiers on the same rows; `paired_differences` has bootstrap intervals.

Hits are booleans (n,): which rows a classifier gets right (`scores.correct`). With `groups` (see
`scores`), a test or interval is for new groups, not for new rows of the same groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import bdtr, betaln, chdtrc, stdtr, stdtrit  # scipy.stats imports slowly

from threefold.errors import DataError
from threefold.stats.bootstrap import (
    LEVEL,
    check_groups,
    check_hits,
    check_level,
    check_numbers,
    check_pairs,
)
from threefold.stats.crossed_effects import crossed_mean
from threefold.stats.sample_size import required_rows_from_counts


class McNemar(NamedTuple):
    """Rows that only one of two classifiers gets right, and the two-sided p-value."""

    only_a: int
    only_b: int
    p: float


class CochranQ(NamedTuple):
    """Cochran's Q, its degrees of freedom and its p-value."""

    q: float
    df: int
    p: float


class TTest(NamedTuple):
    """A t-test of a mean difference a - b.

    Attributes:
        estimate, low, high: the mean difference and its interval.
        t: the t statistic.
        df: its degrees of freedom.
        p: two-sided p-value.
    """

    estimate: float
    low: float
    high: float
    t: float
    df: float
    p: float


class SeedsDifference(NamedTuple):
    """A difference in accuracy over seeds and images.

    Attributes:
        estimate, low, high: mean difference a - b and its interval, for new seeds and new images.
        p: two-sided p-value of no difference.
        per_seed: difference of each pair of seeds.
        seeds_share: share of the estimate's variance that only more seeds can reduce, 0 to 1.
    """

    estimate: float
    low: float
    high: float
    p: float
    per_seed: tuple[float, ...]
    seeds_share: float


def mcnemar_exact(
    correct_a: npt.ArrayLike,
    correct_b: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    mid_p: bool = False,
) -> McNemar:
    """Exact McNemar test on the discordant rows, which only one of the two gets right.

    Without groups, this is the two-sided binomial test of the discordant rows against one half
    (McNemar 1947, in its exact form). With groups, it is a permutation test: the two classifiers
    may be exchanged in each group, so the sum of the groups' differences only_a - only_b is
    compared with its values for all combinations of signs (enumerated, not drawn). Groups of one
    row give the test without groups. With g groups the p-value is at least 2^(1 - g): five groups
    never reach 0.05.

    The exact p-value rejects a true null hypothesis at most as often as its level, and far less
    often with few discordant rows. The mid-p-value counts the observed outcome by half: it is
    closer to its level on average, but at times a little above it (Fagerland et al. 2013). Verdicts
    use the exact p-value because of its guarantee.

    Args:
        correct_a, correct_b: (n,) booleans for the same rows.
        groups: (n,) names, or None.
        mid_p: return the mid-p-value.

    Raises:
        DataError: lengths differ, or values are not booleans.
    """
    a, b = check_pairs(check_hits(correct_a), check_hits(correct_b))
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if groups is None:
        fewer, n = min(only_a, only_b), only_a + only_b
        p = 2 * float(bdtr(fewer, n, 0.5))
        if mid_p:
            p -= float(_heads(np.asarray(fewer), n))
        return McNemar(only_a, only_b, min(1.0, p))
    part = check_groups(groups, len(a))
    sums = np.bincount(part, a.astype(np.float64) - b).round().astype(np.int64)
    chances = _sign_flips(np.abs(sums))
    # Entry i is the probability of the sum 2 i - total.
    distance = np.abs(2 * np.arange(len(chances)) - np.abs(sums).sum())
    observed = abs(only_a - only_b)
    p = float(chances[distance >= observed].sum())
    if mid_p and observed > 0:
        p -= 0.5 * float(chances[distance == observed].sum())
    return McNemar(only_a, only_b, min(1.0, p))


def cochran_q(correct: npt.ArrayLike) -> CochranQ:
    """Cochran's Q test of equal accuracy of several classifiers on the same rows (Cochran 1950).

    The p-value is that of chi-squared with m - 1 degrees of freedom. It is accurate if m times the
    number of rows on which classifiers differ is at least 24 (Tate and Brown 1970). For two
    classifiers this is McNemar's test without continuity correction.

    Args:
        correct: (m, n) booleans of m >= 2 classifiers.

    Raises:
        DataError: there are fewer than two classifiers, or values are not booleans.
    """
    hits = check_hits(correct, 2).astype(np.float64)
    m = len(hits)
    if m < 2:
        raise DataError("Cochran's Q compares classifiers", expected="two or more", got=m)
    columns, rows = hits.sum(1), hits.sum(0)
    spread = float((rows * (m - rows)).sum())
    q = m * (m - 1) * float(((columns - columns.mean()) ** 2).sum()) / spread if spread else 0.0
    return CochranQ(q, m - 1, float(chdtrc(m - 1, q)))


def holm(pvalues: npt.ArrayLike) -> np.ndarray:
    """Adjust p-values (tests,) for their number by Holm's step-down method (Holm 1979).

    Returns:
        Adjusted p-values in the given order.

    Raises:
        DataError: the values are not probabilities.
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise DataError("p-values must be a list of numbers in 0..1", got=p.tolist())
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def corrected_t_test(
    a: npt.ArrayLike, b: npt.ArrayLike, n_fit: float, n_score: float, level: float = LEVEL
) -> TTest:
    """Corrected resampled t-test of scores over folds or random splits (Nadeau and Bengio 2003).

    Splits share rows to fit on, so the scores are not independent: 1 / J in the variance of their
    mean becomes 1 / J + n_score / n_fit. For k folds that is 1 / J + 1 / (k - 1). J counts all
    splits, repeats included.

    Args:
        a, b: (J,) scores of the two on the same splits.
        n_fit, n_score: numbers of rows that a split fits on and scores.
        level: confidence level.

    Raises:
        DataError: lengths differ, values are not finite, there are fewer than two splits, or the
            numbers of rows are impossible.
    """
    first, second = check_pairs(check_numbers(a), check_numbers(b))
    check_level(level)
    if len(first) < 2:
        raise DataError("a t-test over splits needs two or more", got=len(first))
    if not (0 < n_fit < np.inf and 0 < n_score < np.inf):
        raise DataError(
            "splits must have rows to fit on and rows to score",
            expected="both above 0",
            got=(n_fit, n_score),
        )
    difference = first - second
    variance = float(difference.var(ddof=1)) * (1 / len(difference) + n_score / n_fit)
    return _t_test(float(difference.mean()), variance, len(difference) - 1, level)


def seeds_difference(
    correct_a: npt.ArrayLike,
    correct_b: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    level: float = LEVEL,
) -> SeedsDifference:
    """Difference in accuracy of two recipes that were trained with several seeds.

    The interval is for new seeds and new images.

    Differences (s, n) of the hits are averaged over seeds and images, both random, with the
    variance of `crossed_effects.crossed_mean` and Student's t. Two seeds give a valid but very wide
    interval. With groups, groups take the place of images.

    Args:
        correct_a, correct_b: (s, n) booleans of s >= 2 seeds on the same rows. Seeds are paired.
        groups: (n,) names, or None.
        level: confidence level.

    Raises:
        DataError: shapes differ, values are not booleans, or there is only one seed, row or group.
    """
    a, b = check_pairs(check_hits(correct_a, 2), check_hits(correct_b, 2))
    check_level(level)
    if len(a) < 2:
        raise DataError(
            "one seed says nothing about other seeds",
            expected="two or more",
            fix="use paired_bootstrap",
        )
    over = crossed_mean(a.astype(np.float64) - b, groups)
    test = _t_test(over.mean, over.variance, over.df, level)
    return SeedsDifference(
        estimate=over.mean,
        low=max(test.low, -1.0),
        high=min(test.high, 1.0),
        p=test.p,
        per_seed=tuple((a.mean(1) - b.mean(1)).tolist()),
        seeds_share=over.seeds_share,
    )


def verdict(
    a: str,
    b: str,
    only_a: int,
    only_b: int,
    p: float,
    alpha: float = 0.05,
    *,
    test: str = "",
    n: int = 0,
) -> str:
    """The result of a McNemar test as one sentence.

    Example: "no evidence of a difference: 141 against 140 images, p = 1.00". With `test` "exact
    McNemar" and `n` 10,000 it ends in "(exact McNemar, p = 1.00); about 23,000,000 images would be
    needed to show a difference of this size".

    Args:
        a, b: names of the two.
        only_a, only_b: rows that only the first, or only the second, gets right.
        p: p-value, possibly adjusted for several tests.
        alpha: significance level.
        test: name of the test, to be included.
        n: number of rows. If it is given, a sentence without evidence says how many are needed.
    """
    shown = f"p = {p:.3f}"
    if p < 0.001:
        shown = "p < 0.001"
    elif p >= 0.1:
        shown = f"p = {p:.2f}"
    shown = f" ({test}, {shown})" if test else f", {shown}"
    if p <= alpha:
        better, worse = (a, b) if only_a > only_b else (b, a)
        more, fewer = max(only_a, only_b), min(only_a, only_b)
        return f"{better} is better than {worse}: {more} against {fewer} images{shown}"
    sentence = f"no evidence of a difference: {only_a} against {only_b} images{shown}"
    if not n or only_a == only_b:
        return sentence
    needed = required_rows_from_counts(only_a, only_b, n, alpha=alpha)
    unit = 10 ** max(0, len(str(needed)) - 2)
    return (
        f"{sentence}; about {-(-needed // unit) * unit:,} images would be needed to show a "
        "difference of this size"
    )


def _sign_flips(sizes: np.ndarray) -> np.ndarray:
    """Distribution of the sum of sizes (groups,) that each count with probability one half.

    Returns:
        Probabilities (sum of sizes + 1,) of the sums 0, 1, ...
    """
    chances = np.ones(1)
    for size, count in zip(*np.unique(sizes[sizes > 0], return_counts=True), strict=True):
        step = np.zeros(int(size * count) + 1)
        step[::size] = _heads(np.arange(count + 1), count)
        chances = np.convolve(chances, step)
    return chances


def _heads(k: np.ndarray, n: int) -> np.ndarray:
    """Probability of k heads in n throws of a fair coin."""
    return np.asarray(np.exp(-betaln(k + 1, n - k + 1) - np.log(n + 1) - n * np.log(2)))


def _t_test(mean: float, variance: float, df: float, level: float) -> TTest:
    """Student's test of a mean with this variance. With variance 0, any difference is certain."""
    if variance == 0:
        t = float(np.sign(mean) * np.inf) if mean else 0.0
        return TTest(estimate=mean, low=mean, high=mean, t=t, df=df, p=float(mean == 0))
    error = variance**0.5
    half = float(stdtrit(df, (1 + level) / 2)) * error
    return TTest(
        estimate=mean,
        low=mean - half,
        high=mean + half,
        t=mean / error,
        df=df,
        p=float(2 * stdtr(df, -abs(mean) / error)),
    )
