"""Is one better than the other: paired tests and intervals of differences on the same rows.

`correct` of `stats.py` says which rows a classifier has right: booleans (n,), called hits here. `groups` are as in
`stats.py`: with them a test or interval speaks of other groups (patients, signers), not of other rows of the same ones.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import (
    bdtr,
    betaln,
    chdtrc,
    ndtri,
    stdtr,
    stdtrit,
)  # scipy.stats takes a second to import

from threefold.errors import DataError
from threefold.predictions__checks import check_labels, check_probs
from threefold.resampling import (
    RESAMPLES,
    check_draws,
    check_groups,
    check_hits,
    check_level,
    check_numbers,
    column_sums,
    percentile_interval,
    row_weights,
)
from threefold.weighted import Weighted, check_score


class Difference(NamedTuple):
    """A mean paired difference a - b with its interval."""

    estimate: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Rows that only one of two classifiers has right, and the two-sided p-value."""

    only_a: int
    only_b: int
    p: float


class CochranQ(NamedTuple):
    """Cochran's Q, its degrees of freedom and its p-value."""

    q: float
    df: int
    p: float


class TTest(NamedTuple):
    """A mean difference a - b with its interval, the t statistic, its degrees of freedom and the two-sided p-value."""

    estimate: float
    low: float
    high: float
    t: float
    df: float
    p: float


class SeedsDifference(NamedTuple):
    """A difference in accuracy over seeds and images.

    Attributes:
        estimate, low, high: mean difference a - b and its interval, for other seeds and other images.
        p: two-sided p-value of no difference.
        per_seed: the difference of each pair of seeds.
        seeds_share: share of the estimate's variance that only more seeds can lower, 0 to 1.
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
    """Exact McNemar test: is one right more often on the rows where just one of the two is right?

    Rows: two-sided binomial test of these rows against one half (McNemar 1947, in its exact form). Groups: in each
    group the two classifiers may change places, so the sum of the groups' differences only_a - only_b is compared with
    all its values when each group's sign is free (permutation test; enumerated, not drawn). Groups of one row give the
    row test. g groups cannot give a p-value below 2^(1 - g): five never reach 0.05.

    The exact p-value rejects a true null at most as often as it says, and with few discordant rows far less often. The
    mid-p-value counts the observed outcome by half: nearer to its level on average, a little above it at times
    (Fagerland et al. 2013). Verdicts use the exact one: it is the one with a guarantee.

    Args:
        correct_a: (n,) booleans.
        correct_b: (n,) booleans, of the same rows.
        groups: (n,) names, or None.
        mid_p: give the mid-p-value.

    Raises:
        DataError: lengths differ, or values are not booleans.
    """
    a, b = _pair(check_hits(correct_a), check_hits(correct_b))
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    if groups is None:
        fewer, n = min(only_a, only_b), only_a + only_b
        p = 2 * float(bdtr(fewer, n, 0.5)) - mid_p * float(_heads(np.asarray(fewer), n))
        return McNemar(only_a, only_b, min(1.0, p))
    sums = (
        np.bincount(check_groups(groups, len(a)), a.astype(np.float64) - b).round().astype(np.int64)
    )
    chances = _sign_flips(np.abs(sums))
    # Entry i is the chance of a sum of 2 i - total: as far out as observed counts wholly, for mid-p just there by half.
    distance = np.abs(2 * np.arange(len(chances)) - np.abs(sums).sum())
    seen = abs(only_a - only_b)
    p = float(chances[distance >= seen].sum()) - mid_p * 0.5 * float(
        chances[distance == seen].sum()
    )
    return McNemar(only_a, only_b, 1.0 if mid_p and seen == 0 else min(1.0, p))


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Mean of a - b with a percentile bootstrap interval; a and b are per-row scores (n,), such as `correct`.

    With groups, whole groups are drawn (cluster bootstrap): rows of one patient or signer are not independent.

    Raises:
        DataError: lengths differ, values are not finite, or a level outside 0..1.
    """
    first, second = _pair(check_numbers(a), check_numbers(b))
    check_draws(level, resamples)
    difference = first - second
    part = np.arange(len(first)) if groups is None else check_groups(groups, len(first))
    columns = np.stack([np.bincount(part, difference), np.bincount(part)])
    means = [sums / counts for sums, counts in column_sums(columns, resamples, seed)]
    return Difference(float(difference.mean()), *percentile_interval(np.concatenate(means), level))


def score_difference(
    score: str | Weighted,
    probs_a: npt.ArrayLike,
    probs_b: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Difference:
    """Difference a - b of a score with a percentile bootstrap interval; both are scored on the same drawn rows.

    Args:
        score: a name of `weighted.SCORES`, or a function of probs (n, k), labels (n,), weights (n, r) to values (r,).
        probs_a: (n, k).
        probs_b: (n, k), of the same rows.
        labels: (n,).
        groups: (n,) names of what is drawn as a whole, or None.
        level: confidence level.
        resamples: number of draws.
        seed: of the draws.

    Raises:
        DataError: unusable probabilities, labels or groups, an unknown score, or one that is not defined on these rows.
    """
    a, b = (check_probs(probs, 2).astype(np.float64) for probs in (probs_a, probs_b))
    if a.shape != b.shape:
        raise DataError(
            "the two are not of the same rows and classes", expected=a.shape, got=b.shape
        )
    truth, function = check_labels(labels, *a.shape), check_score(score)
    part = None if groups is None else check_groups(groups, len(truth))
    check_draws(level, resamples)
    every = np.ones((len(truth), 1))
    estimate = float((function(a, truth, every) - function(b, truth, every))[0])
    if np.isnan(estimate):
        raise DataError(
            "the score is not defined on these rows", where=score if isinstance(score, str) else ""
        )
    drawn = row_weights(len(truth), part, resamples, seed)
    values = [function(a, truth, weights) - function(b, truth, weights) for weights in drawn]
    return Difference(estimate, *percentile_interval(np.concatenate(values), level))


def cochran_q(correct: npt.ArrayLike) -> CochranQ:
    """Cochran's Q test: are several classifiers right equally often on the same rows? (Cochran 1950)

    The p-value is that of chi-squared with m - 1 degrees of freedom, good where the rows on which classifiers differ, times
    m, are 24 or more (Tate and Brown 1970). Two classifiers: McNemar's test without continuity correction.

    Args:
        correct: (m, n) booleans of m >= 2 classifiers.

    Raises:
        DataError: fewer than two classifiers, or values that are not booleans.
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
    """p-values (tests,) adjusted for their number by Holm's step-down method (Holm 1979), in the order given.

    Raises:
        DataError: not probabilities.
    """
    p = np.asarray(pvalues, dtype=np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise DataError("p-values must be a list of numbers in 0..1", got=p.tolist())
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1)
    return adjusted


def corrected_t_test(
    a: npt.ArrayLike, b: npt.ArrayLike, n_fit: float, n_score: float, level: float = 0.95
) -> TTest:
    """Corrected resampled t-test of scores over folds or random splits (Nadeau and Bengio 2003).

    Fit rows are shared between splits, so the scores are not independent: 1 / J in the variance of their mean becomes
    1 / J + n_score / n_fit. For k folds that is 1 / J + 1 / (k - 1); J counts all splits, repeats included.

    Args:
        a: (J,) scores of the first, one per split.
        b: (J,) scores of the second on the same splits.
        n_fit: rows fitted on in a split.
        n_score: rows scored in a split.
        level: of the interval.

    Raises:
        DataError: lengths differ, values are not finite, fewer than two splits, or numbers of rows that cannot be.
    """
    first, second = _pair(check_numbers(a), check_numbers(b))
    check_level(level)
    if len(first) < 2:
        raise DataError("a t-test over splits needs two or more", got=len(first))
    if not (0 < n_fit < np.inf and 0 < n_score < np.inf):
        raise DataError(
            "splits have rows to fit and rows to score",
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
    level: float = 0.95,
) -> SeedsDifference:
    """Difference in accuracy of two recipes trained with several seeds, for other seeds and other images alike.

    The rows' differences (s, n) are taken as mean + seed + image + rest, all random. With mean squares MS of seeds,
    images and rest, the variance of the mean is (MS_seeds + max(MS_images - MS_rest, 0)) / (s n), with Satterthwaite's
    degrees of freedom: the analysis of readers and cases in radiology (Dorfman, Berbaum and Metz 1992; Hillis 2007), with
    seeds for readers and images for cases. MS_seeds counts as MS_rest at least, as it would with many seeds. Bootstrapping
    both axes (Owen 2007) gives three seeds two thirds of their variance and no t quantile: it covers too seldom where
    seeds matter. Two seeds give a valid but very wide interval. With groups, these take the place of images.

    Args:
        correct_a: (s, n) booleans of s >= 2 seeds.
        correct_b: (s, n) booleans of the same rows; seed i of one is paired with seed i of the other.
        groups: (n,) names, or None.
        level: of the interval.

    Raises:
        DataError: shapes differ, values are not booleans, one seed only, or one group (or row) only.
    """
    a, b = _pair(check_hits(correct_a, 2), check_hits(correct_b, 2))
    check_level(level)
    if len(a) < 2:
        raise DataError(
            "one seed says nothing of other seeds",
            expected="two or more",
            fix="use paired_bootstrap",
        )
    cells = a.astype(np.float64) - b
    mean = float(cells.mean())
    if groups is not None:
        # Linearised as a ratio: each group's value has the whole mean as its centre, whatever the group's size.
        part = check_groups(groups, a.shape[1])
        sizes = np.bincount(part)
        sums = np.array([np.bincount(part, row) for row in cells])
        cells = mean + (sums - mean * sizes) * len(sizes) / a.shape[1]
    s, n = cells.shape
    if n < 2:
        raise DataError("one row or group says nothing of others", expected="two or more", got=n)
    seeds, images = cells.mean(1), cells.mean(0)
    of_seeds = n * float(((seeds - mean) ** 2).sum()) / (s - 1)
    of_images = s * float(((images - mean) ** 2).sum()) / (n - 1)
    of_rest = float(((cells - seeds[:, None] - images + mean) ** 2).sum()) / ((s - 1) * (n - 1))
    of_seeds = max(of_seeds, of_rest)
    beyond = (
        of_images - of_rest if of_images > (1 + 1e-9) * of_rest else 0.0
    )  # rounding must not change the freedom
    freedom = of_seeds**2 / (s - 1)
    if beyond:
        freedom += of_images**2 / (n - 1) + of_rest**2 / ((s - 1) * (n - 1))
    whole = of_seeds + beyond
    test = _t_test(mean, whole / (s * n), whole**2 / freedom if freedom else 1.0, level)
    low, high = max(test.low, -1.0), min(test.high, 1.0)
    per_seed = tuple((a.mean(1) - b.mean(1)).tolist())
    return SeedsDifference(
        mean, low, high, test.p, per_seed, (of_seeds - of_rest) / whole if whole else 0.0
    )


def required_rows(
    discordant: float, difference: float, power: float = 0.8, alpha: float = 0.05
) -> int:
    """Rows that McNemar's test needs to find a difference in accuracy with this power (Connor 1987).

    Args:
        discordant: share of rows that just one of the two has right, 0 to 1.
        difference: of the accuracies, at most `discordant` in size.
        power: chance to find it, alpha to 1.
        alpha: level of the two-sided test.

    Raises:
        DataError: shares that cannot be, or no difference.
    """
    size = abs(difference)
    if not 0 < size <= discordant <= 1:
        raise DataError(
            "no such pair of classifiers",
            expected="0 < |difference| <= discordant <= 1",
            got=(difference, discordant),
        )
    if not 0 < alpha < power < 1:
        raise DataError(
            "no such test", expected="0 < alpha < power < 1", got=f"alpha {alpha}, power {power}"
        )
    root = ndtri(1 - alpha / 2) * discordant**0.5 + ndtri(power) * (discordant - size**2) ** 0.5
    return int(np.ceil((root / size) ** 2))


def required_rows_from_counts(
    only_a: int, only_b: int, n: int, power: float = 0.8, alpha: float = 0.05
) -> int:
    """`required_rows` if the truth were as in a first look: discordant rows of n in all.

    Raises:
        DataError: counts that cannot be, or equal ones: no number of rows shows a difference that is not there.
    """
    if only_a == only_b or min(only_a, only_b) < 0 or not only_a + only_b <= n:
        raise DataError(
            "counts give no difference to look for",
            expected="unlike counts of n rows",
            got=(only_a, only_b, n),
        )
    return required_rows((only_a + only_b) / n, (only_a - only_b) / n, power, alpha)


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
    """A McNemar test of a against b as one sentence; `p` may be adjusted for several tests.

    Example: "no evidence of a difference: 141 against 140 images, p = 1.00"; with `test` "exact McNemar" and `n` 10,000
    it ends in "(exact McNemar, p = 1.00); about 23,000,000 images would be needed to show a difference of this size".

    Args:
        a: name of the first.
        b: name of the second.
        only_a: rows that only the first has right.
        only_b: rows that only the second has right.
        p: p-value.
        alpha: level above which there is no evidence.
        test: name of the test, to be told.
        n: rows in all, discordant or not; where given, a sentence without evidence says how many would be needed.
    """
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}"
    shown = f" ({test}, {shown})" if test else f", {shown}"
    if p <= alpha:
        better, worse = (a, b) if only_a > only_b else (b, a)
        return f"{better} is better than {worse}: {max(only_a, only_b)} against {min(only_a, only_b)} images{shown}"
    told = f"no evidence of a difference: {only_a} against {only_b} images{shown}"
    if not n or only_a == only_b:
        return told
    needed = required_rows_from_counts(only_a, only_b, n, alpha=alpha)
    digits = 10 ** max(0, len(str(needed)) - 2)
    return f"{told}; about {-(-needed // digits) * digits:,} images would be needed to show a difference of this size"


def _sign_flips(sizes: np.ndarray) -> np.ndarray:
    """Chances (sum of sizes + 1,) of the sum of those of the sizes (groups,) that fall to one side, each by a fair coin."""
    chances = np.ones(1)
    for size, count in zip(*np.unique(sizes[sizes > 0], return_counts=True), strict=True):
        step = np.zeros(int(size * count) + 1)
        step[::size] = _heads(np.arange(count + 1), count)
        chances = np.convolve(chances, step)
    return chances


def _heads(k: np.ndarray, n: int) -> np.ndarray:
    """Chance of k heads in n throws of a fair coin."""
    return np.asarray(np.exp(-betaln(k + 1, n - k + 1) - np.log(n + 1) - n * np.log(2)))


def _t_test(mean: float, variance: float, df: float, level: float) -> TTest:
    """Student's test of a mean with this variance; a variance of zero leaves no doubt, except of no difference."""
    if variance == 0:
        return TTest(
            mean, mean, mean, float(np.sign(mean) * np.inf) if mean else 0.0, df, float(mean == 0)
        )
    error = variance**0.5
    half = float(stdtrit(df, (1 + level) / 2)) * error
    return TTest(
        mean, mean - half, mean + half, mean / error, df, float(2 * stdtr(df, -abs(mean) / error))
    )


def _pair(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, if they are of the same rows."""
    if a.shape != b.shape:
        raise DataError("paired scores need one value per row each", expected=a.shape, got=b.shape)
    return a, b
