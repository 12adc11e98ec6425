"""Scores of one classifier, with intervals, in float64; `paired_tests` compares two.

In every function `probs` is (n, k) with rows that sum to 1, `labels` is (n,) class numbers, and
`groups` is (n,) names of patients, signers and the like, or None. Rows of a group are not
independent: with groups, intervals are for new groups. Values that are not defined (the recall of a
class without images) are None in tables, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit  # scipy.stats takes a second to import

from threefold.errors import DataError
from threefold.predictions.checks import check_labels, check_probs
from threefold.scratch import converted, top_classes
from threefold.stats.bootstrap import (
    LEVEL,
    RESAMPLES,
    Interval,
    cell_weights,
    check_draws,
    check_groups,
    check_hits,
    check_level,
    percentile_interval,
    row_weights,
)
from threefold.stats.weighted_scores import COUNTED, WeightedScore, check_score, in_top, score_value


class Reliability(NamedTuple):
    """Points of a reliability diagram: arrays (bins,), without the bins that have no rows."""

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
    """Whether each row is classified correctly: booleans (n,)."""
    array, truth = _checked(probs, labels)
    return np.asarray(top_classes(array) == truth)


def top_k_accuracy(probs: npt.ArrayLike, labels: npt.ArrayLike, top: int = 5) -> float:
    """Share of labels among the `top` largest probabilities; ties go to the first classes.

    Raises:
        DataError: probabilities or labels are not usable, or `top` is below 1.
    """
    if top < 1:
        raise DataError("top-k accuracy needs at least one class", expected="top >= 1", got=top)
    return float(in_top(top, *_checked(probs, labels)).mean())


def balanced_accuracy(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean recall of the classes that have rows (Brodersen et al. 2010).

    Raises:
        DataError: probabilities or labels are not usable.
    """
    return score_value("balanced_accuracy", *_checked(probs, labels))


def macro_f1(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean F1 of the classes that are the label or the prediction of some row.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    return score_value("macro_f1", *_checked(probs, labels))


def roc_auc(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Area under the ROC curve (Hanley and McNeil 1982).

    For two classes it is that of class 1; for more, the mean over the classes that have rows, each
    against the rest.

    Raises:
        DataError: probabilities or labels are not usable, or all rows have one label.
    """
    area = score_value("roc_auc", *_checked(probs, labels))
    if np.isnan(area):
        raise DataError("ROC AUC needs rows of two classes", got="one class")
    return area


def log_loss(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean negative log probability of the labels, in nats; the least probability is FLOOR.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    return score_value("log_loss", *_checked(probs, labels))


def brier(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Brier score: mean squared distance to the one-hot label, summed over classes, 0 (best) to 2.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    return score_value("brier", *_checked(probs, labels))


def reliability_curve(probs: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15) -> Reliability:
    """Confidence and accuracy in equal-width bins of the largest probability.

    Each bin includes its upper end.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array, truth = _checked(probs, labels)
    return _reliability(array.max(-1), top_classes(array) == truth, bins)


def ece(probs: npt.ArrayLike, labels: npt.ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of the largest probability (Guo et al. 2017), 0 (best) to 1.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    return _ece(reliability_curve(probs, labels, bins))


def confusion_matrix(probs: npt.ArrayLike, labels: npt.ArrayLike) -> np.ndarray:
    """Counts (k, k) int64: row = label, column = prediction.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array, truth = _checked(probs, labels)
    k = array.shape[-1]
    return (
        np.bincount(truth * k + top_classes(array), minlength=k * k).reshape(k, k).astype(np.int64)
    )


class Confusions(NamedTuple):
    """Pairs of a label and another answer that occur, the most frequent first: (p,) int64 each."""

    labels: np.ndarray
    answers: np.ndarray
    counts: np.ndarray


def confusions(probs: npt.ArrayLike, labels: npt.ArrayLike) -> Confusions:
    """Count the mistakes by label and answer, without a matrix of all pairs of classes.

    Pairs of equal counts are in the order of the matrix.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array, truth = _checked(probs, labels)
    k, answers = array.shape[1], top_classes(array)
    wrong = answers != truth
    cells, counts = np.unique(truth[wrong] * k + answers[wrong], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return Confusions(cells[order] // k, cells[order] % k, counts[order])


def wilson_interval(hits: float, n: float, level: float = LEVEL) -> Interval:
    """Wilson's score interval of the share hits / n (Wilson 1927); (0, 1) if n is 0.

    Raises:
        DataError: the counts are impossible, or the level is outside 0..1.
    """
    if not 0 <= hits <= n < np.inf:
        raise DataError("not a share", expected="0 <= hits <= n", got=f"{hits} of {n}")
    check_level(level)
    if n == 0:
        return Interval(0.0, 1.0)
    z2 = float(ndtri((1 + level) / 2)) ** 2
    centre = (hits + z2 / 2) / (n + z2)
    half = (z2 * (hits * (n - hits) / n + z2 / 4)) ** 0.5 / (n + z2)
    # The formula gives exactly 0 and 1 at the ends, except for rounding errors.
    low = 0.0 if hits == 0 else centre - half
    high = 1.0 if hits == n else centre + half
    return Interval(low, high)


def paired_interval(only_a: int, only_b: int, n: int, level: float) -> tuple[float, float]:
    """Interval of the difference of two accuracies on the same n independent rows.

    This is the adjusted Wald interval of Bonett and Price (2012), which adds one row to each count;
    Fagerland et al. (2014) recommend it for paired shares.

    Args:
        only_a: rows that only the first classifies correctly.
        only_b: rows that only the second classifies correctly.
        n: number of rows.
        level: confidence level.
    """
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = float(ndtri((1 + level) / 2)) * ((a + b - (a - b) ** 2) / (n + 2)) ** 0.5
    return max(-1.0, a - b - half), min(1.0, a - b + half)


def share_interval(
    hits: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    level: float = LEVEL,
    among: npt.ArrayLike | None = None,
) -> Interval:
    """Wilson's interval of a share of hits, such as an accuracy, on the effective number of rows.

    With groups, the effective n is n divided by the design effect of the share, a ratio of group
    totals (Rao and Scott 1992), but at most n; then multiplied by the squared ratio of t quantiles
    for n - 1 and groups - 1 degrees of freedom (Korn and Graubard 1998). Franco et al. (2019)
    recommend Wilson's interval on the effective n. If all or no rows are hits, the design effect
    cannot be estimated, and the rows of a group are taken to be identical. A single group says
    nothing about others: (0, 1).

    Args:
        hits: (n,) booleans.
        groups: (n,) names, or None if rows are independent.
        level: confidence level.
        among: (n,) booleans, the rows that count, with all hits among them; None = all rows.

    Raises:
        DataError: lengths differ, `hits` are not booleans, or the level is outside 0..1.
    """
    hit = check_hits(hits)
    counted = np.ones(len(hit), bool) if among is None else check_hits(among)
    if counted.shape != hit.shape or (hit & ~counted).any():
        raise DataError(
            "hits lie outside the rows that count", expected="`among` includes every hit"
        )
    check_level(level)
    right, n = float(hit.sum()), float(counted.sum())
    if groups is None or n == 0:
        return wilson_interval(right, n, level)
    part = check_groups(groups, len(hit))
    sizes = np.bincount(part, counted)
    effective = _effective_rows(np.bincount(part, hit)[sizes > 0], sizes[sizes > 0], level)
    return wilson_interval(min(right / n * effective, effective), effective, level)


def effective_rows(hits: npt.ArrayLike, groups: npt.ArrayLike, level: float = LEVEL) -> float:
    """Effective number of rows for the share of hits, at most n; see `share_interval`.

    Args:
        hits: (n,) booleans.
        groups: (n,) names.
        level: confidence level of a two-sided interval.

    Raises:
        DataError: lengths differ, `hits` are not booleans, or the level is outside 0..1.
    """
    hit = check_hits(hits)
    check_level(level)
    part = check_groups(groups, len(hit))
    return min(float(len(hit)), _effective_rows(np.bincount(part, hit), np.bincount(part), level))


def per_class(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    classes: Sequence[str],
    level: float = LEVEL,
    groups: npt.ArrayLike | None = None,
) -> list[dict[str, Any]]:
    """Recall, precision and F1 of each class, with intervals from `share_interval`.

    F1 = 2 s / (1 + s), where s is the share of hits among the rows whose label or prediction is the
    class. The interval of s therefore gives that of F1 (the indirect Wilson method of Lam et al.
    2023, arXiv:2309.14621). Unlike a bootstrap interval, it has a width even if all or no rows are
    right.

    Returns:
        One entry per class: class, n, recall, interval (of the recall), precision,
        precision_interval, f1, f1_interval.

    Raises:
        DataError: probabilities, labels or groups are not usable, or the number of class names is
            wrong.
    """
    array, truth = _checked(probs, labels)
    if len(classes) != array.shape[1]:
        raise DataError(
            "class names do not match the probabilities", expected=array.shape[1], got=len(classes)
        )
    part = None if groups is None else check_groups(groups, len(truth))
    predicted = top_classes(array)
    return [
        {"class": name, **binary_scores(truth == c, predicted == c, part, level)}
        for c, name in enumerate(classes)
    ]


def bootstrap_interval(
    score: str | WeightedScore,
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a score (Efron 1979).

    With groups, whole groups are drawn (cluster bootstrap). Resamples for which the score is not
    defined are left out. With fewer than about 20 rows or groups the interval is too narrow. The
    calibration error is not available: resampling adds noise to each of its bins, so its interval
    would lie above the score.

    Args:
        score: a name of `weighted_scores.SCORES`, or a `WeightedScore`.
        probs: (n, k).
        labels: (n,).
        groups: (n,) names, or None.
        level: confidence level.
        resamples: number of draws.
        seed: seed of the draws.

    Raises:
        DataError: probabilities, labels or groups are not usable, or the score is unknown or not
            defined for any resample.
    """
    array, truth = _checked(probs, labels)
    function = check_score(score)
    if not isinstance(score, str):
        array = converted(array, np.float64)
    part = None if groups is None else check_groups(groups, len(truth))
    check_draws(level, resamples)
    if isinstance(score, str) and score in COUNTED:
        # These depend only on label and prediction: rows that agree in both are drawn together.
        k, predicted = array.shape[1], top_classes(array)
        if score != "macro_f1":  # all wrong classes are equivalent, which leaves fewer cells
            predicted = np.where(predicted == truth, truth, (truth + 1) % k)
        cells, at = np.unique(truth * k + predicted, return_inverse=True)
        # Classes without label and answer do not count, and would take a row of all draws.
        classes, number = np.unique([cells // k, cells % k], return_inverse=True)
        own, answered = number.reshape(2, -1)
        counted = COUNTED[score]
        values = [
            counted(answered, own, len(classes), weights)
            for weights in cell_weights(at, part, resamples, seed)
        ]
    else:
        draws = row_weights(len(truth), part, resamples, seed)
        values = [function(array, truth, weights) for weights in draws]
    return percentile_interval(np.concatenate(values), level)


def score_table(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    level: float = LEVEL,
    groups: npt.ArrayLike | None = None,
) -> dict[str, Any]:
    """All scores of one classifier, as in an entry of "scores" in `results.json`.

    The caller adds what was scored, on which rows, and what it was fitted on.

    Returns:
        n, accuracy, interval, level, log_loss, ece, brier, balanced_accuracy,
        balanced_accuracy_interval, macro_f1, and roc_auc (None if all rows have one label).

    Raises:
        DataError: probabilities, labels or groups are not usable.
    """
    array, truth = _checked(probs, labels)
    hits = top_classes(array) == truth
    roc = score_value("roc_auc", array, truth)
    balanced = bootstrap_interval("balanced_accuracy", array, truth, groups, level=level)
    return {
        "n": len(hits),
        "accuracy": float(hits.mean()),
        "interval": list(share_interval(hits, groups, level)),
        "level": level,
        "log_loss": score_value("log_loss", array, truth),
        "ece": _ece(_reliability(array.max(-1), hits)),
        "brier": score_value("brier", array, truth),
        "balanced_accuracy": score_value("balanced_accuracy", array, truth),
        "balanced_accuracy_interval": list(balanced),
        "macro_f1": score_value("macro_f1", array, truth),
        "roc_auc": None if np.isnan(roc) else roc,
    }


def calibration_error(confidence: np.ndarray, hit: np.ndarray) -> float:
    """Return `ece` from the largest probabilities (n,) and whether they are right (n,)."""
    return _ece(_reliability(confidence, hit))


def _reliability(confidence: np.ndarray, hit: np.ndarray, bins: int = 15) -> Reliability:
    """`reliability_curve` from the largest probabilities (n,) and hits (n,)."""
    confidence = confidence.astype(np.float64)
    where = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    count = np.bincount(where, minlength=bins)
    used = count > 0
    return Reliability(
        confidence=np.bincount(where, confidence, minlength=bins)[used] / count[used],
        accuracy=np.bincount(where, hit, minlength=bins)[used] / count[used],
        n=count[used],
    )


def _ece(curve: Reliability) -> float:
    return float(np.abs(curve.confidence - curve.accuracy) @ curve.n / curve.n.sum())


def binary_scores(
    is_label: np.ndarray, is_predicted: np.ndarray, part: np.ndarray | None, level: float
) -> dict[str, Any]:
    """Recall, precision and F1 of one class, with intervals; see `per_class`.

    Args:
        is_label: (n,) booleans, the rows with this label.
        is_predicted: (n,) booleans, the rows with this answer.
        part: (n,) group numbers from `check_groups`, or None.
        level: confidence level.
    """
    hit, union = is_label & is_predicted, is_label | is_predicted
    hits, n, predicted = int(hit.sum()), int(is_label.sum()), int(is_predicted.sum())
    ends = share_interval(hit, part, level, union)
    return {
        "n": n,
        "recall": _share(hits, n),
        "interval": list(share_interval(hit, part, level, is_label)),
        "precision": _share(hits, predicted),
        "precision_interval": list(share_interval(hit, part, level, is_predicted)),
        "f1": _share(2 * hits, n + predicted),
        "f1_interval": [2 * end / (1 + end) for end in ends],
    }


def _effective_rows(hits: np.ndarray, sizes: np.ndarray, level: float) -> float:
    """Effective number of rows of groups with these numbers of hits and rows (groups,)."""
    groups, n = len(sizes), sizes.sum()
    if groups < 2:
        return 0.0
    share = hits.sum() / n
    if 0 < share < 1:
        variance = ((hits - share * sizes) ** 2).sum() * groups / (groups - 1) / n**2
        effective = n / max(1.0, variance / (share * (1 - share) / (n - 1)))
    else:
        effective = n**2 / (sizes**2).sum()
    tail = (1 + level) / 2
    return float(effective * (stdtrit(n - 1, tail) / stdtrit(groups - 1, tail)) ** 2)


def _checked(probs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities and labels; float32 stays, and what is summed becomes float64 later."""
    array = check_probs(probs, 2)
    if array.dtype != np.float32:
        array = converted(array, np.float64)
    return array, check_labels(labels, *array.shape)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
