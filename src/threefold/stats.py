"""How good and how sure: scores of one set of probabilities, with intervals, in float64. Two sets: `paired.py`.

Everywhere `probs` is (n, k) with rows that sum to 1, `labels` is (n,) class numbers, and `groups`, where given, is (n,)
names of what is drawn as a whole (patient, signer): rows of a group are not independent, and intervals then speak of
other groups. Numbers that are not defined (the recall of a class without images) are None in tables, never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit  # scipy.stats takes a second to import

from threefold.errors import DataError
from threefold.predictions__checks import check_labels, check_probs
from threefold.resampling import (
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
from threefold.weighted import COUNTED, Weighted, check_score, in_top, score_value


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


def top_k_accuracy(probs: npt.ArrayLike, labels: npt.ArrayLike, top: int = 5) -> float:
    """Share of rows whose label is among the `top` largest probabilities; ties go to the first classes.

    Raises:
        DataError: probabilities or labels are not usable, or `top` is below 1.
    """
    if top < 1:
        raise DataError("top-k accuracy needs at least one answer", expected="top >= 1", got=top)
    return float(in_top(top, *_checked(probs, labels)).mean())


def balanced_accuracy(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean recall of the classes that have rows (Brodersen et al. 2010): each class counts alike, however rare.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    return score_value("balanced_accuracy", *_checked(probs, labels))


def macro_f1(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean F1 of the classes that are some row's label or answer.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    return score_value("macro_f1", *_checked(probs, labels))


def roc_auc(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Area under the ROC curve (Hanley and McNeil 1982): chance that a row of the class has the larger probability.

    Two classes: of class 1. More: mean over the classes that have rows, each against the rest.

    Raises:
        DataError: probabilities or labels are not usable, or all rows have one label.
    """
    found = score_value("roc_auc", *_checked(probs, labels))
    if np.isnan(found):
        raise DataError("ROC AUC needs rows of two classes", got="one class")
    return found


def log_loss(probs: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """Mean negative log probability of the labels, in nats; probabilities below FLOOR count as FLOOR.

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
    """Confidence against accuracy in equal-width bins of the largest probability, each closed at its upper end.

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array, truth = _checked(probs, labels)
    return _reliability(array.max(-1), array.argmax(-1) == truth, bins)


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
    return np.bincount(truth * k + array.argmax(-1), minlength=k * k).reshape(k, k).astype(np.int64)


def wilson_interval(correct: float, n: float, level: float = 0.95) -> Interval:
    """Wilson's score interval of a share, correct / n (Wilson 1927); (0, 1) where there are no rows.

    Raises:
        DataError: counts that cannot be, or a level outside 0..1.
    """
    if not 0 <= correct <= n < np.inf:
        raise DataError("not a share", expected="0 <= correct <= n", got=f"{correct} of {n}")
    check_level(level)
    if n == 0:
        return Interval(0.0, 1.0)
    z2 = float(ndtri((1 + level) / 2)) ** 2
    centre = (correct + z2 / 2) / (n + z2)
    half = (z2 * (correct * (n - correct) / n + z2 / 4)) ** 0.5 / (n + z2)
    # At the ends the formula gives exactly 0 and 1, but for rounding.
    return Interval(0.0 if correct == 0 else centre - half, 1.0 if correct == n else centre + half)


def paired_interval(only_a: int, only_b: int, n: int, level: float) -> tuple[float, float]:
    """Interval of the difference of two accuracies on the same n rows, from the rows that just one of the two has right.

    The adjusted Wald interval of Bonett and Price (2012), which Fagerland et al. (2014) recommend for paired shares: one row is added
    to each count. Rows count as independent.
    """
    a, b = (only_a + 1) / (n + 2), (only_b + 1) / (n + 2)
    half = float(ndtri((1 + level) / 2)) * ((a + b - (a - b) ** 2) / (n + 2)) ** 0.5
    return max(-1.0, a - b - half), min(1.0, a - b + half)


def share_interval(
    hits: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    level: float = 0.95,
    among: npt.ArrayLike | None = None,
) -> Interval:
    """Interval of the share of rows that hit, such as an accuracy: Wilson's, on as many rows as the groups are worth.

    With groups, n is divided by the design effect of the share, a ratio of group totals (Rao and Scott 1992), never
    raised by it, and multiplied with the squared ratio of t quantiles for n - 1 and groups - 1 degrees of freedom (Korn
    and Graubard 1998). Wilson's interval on the effective n is the one that Franco et al. (2019) recommend. Where all or
    no rows hit, the design effect cannot be seen; each group then counts as wholly alike. One group alone says nothing
    about others: (0, 1).

    Args:
        hits: (n,) booleans.
        groups: (n,) names, or None: rows are independent.
        level: confidence level.
        among: (n,) booleans, the rows that count; None = all. No hits are outside them.

    Raises:
        DataError: lengths differ, `hits` are not booleans, or a level outside 0..1.
    """
    hit = check_hits(hits)
    counted = np.ones(len(hit), bool) if among is None else check_hits(among)
    if counted.shape != hit.shape or (hit & ~counted).any():
        raise DataError("hits lie outside the rows that count", expected="`among` holds every hit")
    check_level(level)
    right, n = float(hit.sum()), float(counted.sum())
    if groups is None or n == 0:
        return wilson_interval(right, n, level)
    part = check_groups(groups, len(hit))
    sizes = np.bincount(part, counted)
    effective = _effective_rows(np.bincount(part, hit)[sizes > 0], sizes[sizes > 0], level)
    return wilson_interval(min(right / n * effective, effective), effective, level)


def effective_rows(hits: npt.ArrayLike, groups: npt.ArrayLike, level: float = 0.95) -> float:
    """How many independent rows say as much about the share of hits as these; see `share_interval`. At most n.

    Args:
        hits: (n,) booleans.
        groups: (n,) names of what belongs together.
        level: confidence level of a two-sided interval.

    Raises:
        DataError: lengths differ, `hits` are not booleans, or a level outside 0..1.
    """
    hit = check_hits(hits)
    check_level(level)
    part = check_groups(groups, len(hit))
    return min(float(len(hit)), _effective_rows(np.bincount(part, hit), np.bincount(part), level))


def per_class(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    classes: Sequence[str],
    level: float = 0.95,
    groups: npt.ArrayLike | None = None,
) -> list[dict[str, Any]]:
    """One entry per class: class, n, recall, interval (of the recall), precision, precision_interval, f1, f1_interval.

    All three intervals are `share_interval`s. F1 = 2 s / (1 + s) where s is the share of hits among the rows that are
    of the class or called so, so the interval of s gives that of F1 (the indirect Wilson method of Lam et al. 2023,
    arXiv:2309.14621); unlike a bootstrap it has a width where every row, or none, is right.

    Raises:
        DataError: probabilities, labels or groups are not usable, or the number of class names is another.
    """
    array, truth = _checked(probs, labels)
    if len(classes) != array.shape[1]:
        raise DataError(
            "class names do not match the probabilities", expected=array.shape[1], got=len(classes)
        )
    part = None if groups is None else check_groups(groups, len(truth))
    answer = array.argmax(-1)
    return [
        {"class": name, **_class_figures(truth == c, answer == c, part, level)}
        for c, name in enumerate(classes)
    ]


def bootstrap_interval(
    score: str | Weighted,
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap interval of a score (Efron 1979); with groups, whole groups are drawn (cluster bootstrap).

    Resamples in which the score is not defined are left out. With fewer than about 20 rows or groups the interval is
    too narrow. The calibration error is not among the names: resampling adds noise to each of its bins, so that its
    interval would lie above the score.

    Args:
        score: a name of SCORES, or a function of probs (n, k), labels (n,) and weights (n, r) to values (r,).
        probs: (n, k).
        labels: (n,).
        groups: (n,) names, or None.
        level: confidence level.
        resamples: number of draws.
        seed: of the draws.

    Raises:
        DataError: unusable probabilities, labels or groups, an unknown score, or one that no resample defines.
    """
    array, truth = _checked(probs, labels)
    function = check_score(score)
    part = None if groups is None else check_groups(groups, len(truth))
    check_draws(level, resamples)
    if score in COUNTED:
        # These see no more of a row than its label and answer: rows that agree in both are drawn together.
        k, answer = array.shape[1], array.argmax(-1)
        if (
            score != "macro_f1"
        ):  # any other class is as wrong as the one that was called: fewer cells to draw
            answer = np.where(answer == truth, truth, (truth + 1) % k)
        cells, at = np.unique(truth * k + answer, return_inverse=True)
        array, truth = np.eye(k)[cells % k], cells // k
        draws = cell_weights(at, part, resamples, seed)
    else:
        draws = row_weights(len(truth), part, resamples, seed)
    return percentile_interval(
        np.concatenate([function(array, truth, weights) for weights in draws]), level
    )


def score_table(
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    level: float = 0.95,
    groups: npt.ArrayLike | None = None,
) -> dict[str, Any]:
    """The figures of one entry of `results.json`'s "scores": n, accuracy, interval, level, log_loss, ece, brier,
    balanced_accuracy, balanced_accuracy_interval, macro_f1, roc_auc (None where all rows have one label).

    What was scored, on which rows and fitted on what is known to the caller, who adds it.

    Raises:
        DataError: probabilities, labels or groups are not usable.
    """
    array, truth = _checked(probs, labels)
    hits = array.argmax(-1) == truth
    values = {
        name: score_value(name, array, truth)
        for name in ("log_loss", "brier", "macro_f1", "roc_auc")
    }
    curve = _reliability(array.max(-1), hits)
    return {
        "n": len(hits),
        "accuracy": float(hits.mean()),
        "interval": list(share_interval(hits, groups, level)),
        "level": level,
        "log_loss": values["log_loss"],
        "ece": _ece(curve),
        "brier": values["brier"],
        "balanced_accuracy": score_value("balanced_accuracy", array, truth),
        "balanced_accuracy_interval": list(
            bootstrap_interval("balanced_accuracy", array, truth, groups, level=level)
        ),
        "macro_f1": values["macro_f1"],
        "roc_auc": None if np.isnan(values["roc_auc"]) else values["roc_auc"],
    }


def _reliability(confidence: np.ndarray, hit: np.ndarray, bins: int = 15) -> Reliability:
    """`reliability_curve` of largest probabilities (n,) and which rows are right (n,)."""
    where = np.digitize(confidence, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    count = np.bincount(where, minlength=bins)
    used = count > 0
    means = [
        np.bincount(where, weights, minlength=bins)[used] / count[used]
        for weights in (confidence, hit)
    ]
    return Reliability(means[0], means[1], count[used])


def _ece(curve: Reliability) -> float:
    return float(np.abs(curve.confidence - curve.accuracy) @ curve.n / curve.n.sum())


def _class_figures(
    member: np.ndarray, answered: np.ndarray, part: np.ndarray | None, level: float
) -> dict[str, Any]:
    """Figures of one class from the rows of it and those called so."""
    hit, union = member & answered, member | answered
    right, n, predicted = int(hit.sum()), int(member.sum()), int(answered.sum())
    ends = share_interval(hit, part, level, union)
    return {
        "n": n,
        "recall": _share(right, n),
        "interval": list(share_interval(hit, part, level, member)),
        "precision": _share(right, predicted),
        "precision_interval": list(share_interval(hit, part, level, answered)),
        "f1": _share(2 * right, n + predicted),
        "f1_interval": [2 * end / (1 + end) for end in ends],
    }


def _effective_rows(hits: np.ndarray, sizes: np.ndarray, level: float) -> float:
    """How many independent rows say as much about the share as groups of these hits and sizes (groups,)."""
    groups, n = len(sizes), sizes.sum()
    if groups < 2:
        return 0.0
    share = hits.sum() / n
    if 0 < share < 1:
        spread = ((hits - share * sizes) ** 2).sum() * groups / (groups - 1) / n**2
        worth = n / max(1.0, spread / (share * (1 - share) / (n - 1)))
    else:
        worth = n**2 / (sizes**2).sum()
    tail = (1 + level) / 2
    return float(worth * (stdtrit(n - 1, tail) / stdtrit(groups - 1, tail)) ** 2)


def _checked(probs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    array = check_probs(probs, 2).astype(np.float64)
    return array, check_labels(labels, *array.shape)


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
