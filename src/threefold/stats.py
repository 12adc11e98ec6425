"""How good, how sure, and is it better: scores, intervals and paired tests on probabilities and labels, in float64.

Everywhere `probs` is (n, k) with rows that sum to 1 and `labels` is (n,) class numbers. Numbers that are not defined
(the recall of a class without images) are None in tables, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, norm

from threefold.errors import DataError
from threefold.predictions import FLOOR, check_labels, check_probs


class Interval(NamedTuple):
    """Lower and upper end of a confidence interval."""

    low: float
    high: float


class Difference(NamedTuple):
    """A mean paired difference a - b with its interval."""

    estimate: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Discordant rows of two classifiers and the two-sided exact p-value."""

    only_a: int
    only_b: int
    p: float


class Reliability(NamedTuple):
    """Points of a reliability diagram, one per bin that has rows: arrays (bins,)."""

    confidence: np.ndarray
    accuracy: np.ndarray
    n: np.ndarray


def accuracy(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Share of rows whose largest probability is the label's; ties go to the first class.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    return float(correct(probs, labels).mean())


def correct(probs: npt.ArrayLike, labels: npt.ArrayLike) -> np.ndarray:
    """Which rows are right: booleans (n,)."""
    array, truth = _checked(probs, labels)
    return np.asarray(array.argmax(-1) == truth)


def wilson_interval(correct: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share, correct / n (Wilson 1927); (0, 1) where there are no rows.

    Raises:
        DataError: counts that cannot be, or a level outside 0..1.
    """
    if not 0 <= correct <= n:
        raise DataError("not a share", expected="0 <= correct <= n", got=f"{correct} of {n}")
    _check_level(level)
    if n == 0:
        return Interval(0.0, 1.0)
    z2 = float(norm.ppf((1 + level) / 2)) ** 2
    centre = (correct + z2 / 2) / (n + z2)
    half = (z2 * (correct * (n - correct) / n + z2 / 4)) ** 0.5 / (n + z2)
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    return Interval(0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half)


def log_loss(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean negative log probability of the labels, in nats; probabilities below FLOOR count as FLOOR.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array, truth = _checked(probs, labels)
    return float(-np.log(np.maximum(array[np.arange(len(truth)), truth], FLOOR)).mean())


def brier(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Brier score: mean squared distance to the one-hot label, summed over classes, 0 (best) to 2.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array, truth = _checked(probs, labels)
    hit = array[np.arange(len(truth)), truth]
    return float(((array**2).sum(-1) - 2 * hit + 1).mean())


def reliability_curve(probs: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15) -> Reliability:
    """Confidence against accuracy in equal-width bins of the largest probability, each closed at its upper end.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array, truth = _checked(probs, labels)
    confidence, hit = array.max(-1), array.argmax(-1) == truth
    where = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    count = np.bincount(where, minlength=bins)
    used = count > 0
    means = [np.bincount(where, weights, minlength=bins)[used] / count[used] for weights in (confidence, hit)]
    return Reliability(means[0], means[1], count[used])


def ece(probs: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of the largest probability (Guo et al. 2017), 0 (best) to 1.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    curve = reliability_curve(probs, labels, bins)
    return float(np.abs(curve.confidence - curve.accuracy) @ curve.n / curve.n.sum())


def confusion_matrix(probs: npt.ArrayLike, labels: npt.ArrayLike) -> np.ndarray:
    """Counts (k, k) int64: row = label, column = prediction.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array, truth = _checked(probs, labels)
    k = array.shape[-1]
    return np.bincount(truth * k + array.argmax(-1), minlength=k * k).reshape(k, k).astype(np.int64)


def per_class(
    probs: npt.ArrayLike, labels: npt.ArrayLike, classes: Sequence[str], level: float = 0.95
) -> list[dict[str, Any]]:
    """One entry per class: class, n, recall, interval (of the recall), precision, precision_interval, f1.

    Raises:
        DataError: probabilities or labels are not usable, or the number of class names is another.
    """
    matrix = confusion_matrix(probs, labels)
    if len(classes) != len(matrix):
        raise DataError("class names do not match the probabilities", expected=len(matrix), got=len(classes))
    columns = zip(classes, matrix.diagonal().tolist(), matrix.sum(1).tolist(), matrix.sum(0).tolist(), strict=True)
    return [
        {
            "class": name,
            "n": n,
            "recall": _share(hit, n),
            "interval": list(wilson_interval(hit, n, level)),
            "precision": _share(hit, predicted),
            "precision_interval": list(wilson_interval(hit, predicted, level)),
            "f1": _share(2 * hit, n + predicted),
        }
        for name, hit, n, predicted in columns
    ]


def mcnemar_exact(correct_a: npt.ArrayLike, correct_b: npt.ArrayLike) -> McNemar:
    """Exact McNemar test on paired booleans (n,): is one right more often where just one of the two is right?

    Two-sided binomial test of the discordant rows against one half; p = 1 where there are none.

    Raises:
        DataError: different lengths.
    """
    a, b = _paired(correct_a, correct_b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p = min(1.0, 2 * float(binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)))
    return McNemar(only_a, only_b, p)


def paired_bootstrap(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    groups: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Mean of a - b with a percentile bootstrap interval; a and b are per-row scores (n,), such as `correct`.

    With groups, whole groups are drawn (cluster bootstrap): rows of one patient or signer are not independent.

    Raises:
        DataError: different lengths, or a level outside 0..1.
    """
    first, second = _paired(a, b, np.float64)
    _check_level(level)
    difference = first - second
    part = np.arange(len(difference)) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if part.shape != difference.shape:
        raise DataError("groups have the wrong length", expected=len(difference), got=len(part))
    sums, counts = np.bincount(part, difference), np.bincount(part)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    for i in range(resamples):
        drawn = rng.integers(0, len(sums), len(sums))
        means[i] = sums[drawn].sum() / counts[drawn].sum()
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Difference(float(difference.mean()), float(low), float(high))


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


def verdict(a: str, b: str, only_a: int, only_b: int, p: float, alpha: float = 0.05) -> str:
    """A McNemar test of a against b as one sentence; `p` may be adjusted for several tests.

    Example: "no evidence of a difference: 141 against 140 images, p = 1.00".
    """
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.2f}" if p >= 0.1 else f"p = {p:.3f}"
    if p > alpha:
        return f"no evidence of a difference: {only_a} against {only_b} images, {shown}"
    better, worse = (a, b) if only_a > only_b else (b, a)
    return f"{better} is better than {worse}: {max(only_a, only_b)} against {min(only_a, only_b)} images, {shown}"


def score_table(probs: npt.ArrayLike, labels: npt.ArrayLike, level: float = 0.95) -> dict[str, Any]:
    """The figures of one entry of `results.json`'s "scores": n, accuracy, interval, level, log_loss, ece.

    What was scored, on which rows and fitted on what is known to the caller, who adds it.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    hits = correct(probs, labels)
    return {
        "n": len(hits),
        "accuracy": float(hits.mean()),
        "interval": list(wilson_interval(int(hits.sum()), len(hits), level)),
        "level": level,
        "log_loss": log_loss(probs, labels),
        "ece": ece(probs, labels),
    }


def _checked(probs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    array = check_probs(probs, 2).astype(np.float64)
    return array, check_labels(labels, *array.shape)


def _paired(a: npt.ArrayLike, b: npt.ArrayLike, dtype: npt.DTypeLike) -> tuple[np.ndarray, np.ndarray]:
    """Two per-row arrays of the same length."""
    first, second = np.asarray(a, dtype=dtype), np.asarray(b, dtype=dtype)
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise DataError("paired scores need one value per row each", expected=first.shape, got=second.shape)
    return first, second


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise DataError("a confidence level lies between 0 and 1", got=level)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
