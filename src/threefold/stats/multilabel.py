"""Scores of several labels per image, and the threshold of each label.

In every function `probs` is (n, k) in [0, 1] and `targets` is (n, k) zeros and ones. The average
precision of a label without images that have it is not defined: NaN in arrays, None in tables, and
left out of means. `multilabel_tables` has the intervals.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from threefold.predictions.checks import FLOOR, check_sigmoids, check_targets
from threefold.stats.scores import Reliability


def average_precision(probs: npt.ArrayLike, targets: npt.ArrayLike) -> np.ndarray:
    """Average precision (k,) of each label: the mean precision at the places of its images.

    Equal probabilities count as one place, as in scikit-learn's `average_precision_score`.

    Raises:
        DataError: probabilities or targets are not usable.
    """
    array, truth = checked(probs, targets)
    return weighted_precisions(array, truth, np.ones((len(array), 1)))[:, 0]


def mean_average_precision(probs: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Mean over labels of the average precision; NaN if no image has a label.

    Raises:
        DataError: probabilities or targets are not usable.
    """
    return float(mean_of_defined(average_precision(probs, targets)[:, None])[0])


def macro_f1(decided: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Mean F1 of the labels that some image has or is given; NaN if there are none.

    Args:
        decided: (n, k) zeros and ones, the labels that each image is given.
        targets: (n, k).

    Raises:
        DataError: decisions or targets are not usable.
    """
    counts = weighted_f1(*checked(decided, targets), np.ones((len(np.asarray(targets)), 1)))
    return float(mean_of_defined(counts.f1)[0])


def micro_f1(decided: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """F1 of all pairs of image and label together; NaN if no label is there or given.

    Args:
        decided: (n, k) zeros and ones, the labels that each image is given.
        targets: (n, k).

    Raises:
        DataError: decisions or targets are not usable.
    """
    counts = weighted_f1(*checked(decided, targets), np.ones((len(np.asarray(targets)), 1)))
    return float(counts.micro_f1[0])


def subset_accuracy(decided: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Share of images that are given exactly their labels.

    Raises:
        DataError: decisions or targets are not usable.
    """
    array, truth = checked(decided, targets)
    return float((array == truth).all(1).mean())


def log_losses(probs: npt.ArrayLike, targets: npt.ArrayLike) -> np.ndarray:
    """Log loss (n, k) of each answer in nats; the least probability is FLOOR.

    Raises:
        DataError: probabilities or targets are not usable.
    """
    array, truth = checked(probs, targets)
    return np.asarray(-np.log(np.maximum(np.where(truth == 1, array, 1 - array), FLOOR)))


def log_loss(probs: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Mean log loss over images and labels, in nats.

    Raises:
        DataError: probabilities or targets are not usable.
    """
    return float(log_losses(probs, targets).mean())


def brier(probs: npt.ArrayLike, targets: npt.ArrayLike) -> float:
    """Mean squared distance of probability and target over images and labels, 0 (best) to 1.

    Raises:
        DataError: probabilities or targets are not usable.
    """
    array, truth = checked(probs, targets)
    return float(((array - truth) ** 2).mean())


def precision_recall(probs: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision at every place of one label, most certain images first.

    Args:
        probs: (n,).
        targets: (n,).

    Returns:
        Recall (p,) ascending, and precision (p,).

    Raises:
        DataError: probabilities or targets are not usable.
    """
    array, truth = checked(np.asarray(probs)[:, None], np.asarray(targets)[:, None])
    values, at = np.unique(-array[:, 0], return_inverse=True)
    hits = np.cumsum(np.bincount(at, truth[:, 0], len(values)))
    named = np.cumsum(np.bincount(at, minlength=len(values)))
    return hits / max(1.0, truth.sum()), hits / named


def label_reliability(probs: np.ndarray, targets: np.ndarray, bins: int = 10) -> Reliability:
    """Mean probability, and share of images with the label, in equal-width bins.

    Args:
        probs: (n,) of one label, or of several one after another.
        targets: (n,).
        bins: number of bins; each includes its upper end. Those without images are left out.
    """
    where = np.digitize(probs, np.linspace(0, 1, bins + 1)[1:-1], right=True)
    count = np.bincount(where, minlength=bins)
    used = count > 0
    return Reliability(
        confidence=np.bincount(where, probs, minlength=bins)[used] / count[used],
        accuracy=np.bincount(where, targets, minlength=bins)[used] / count[used],
        n=count[used],
    )


def best_f1_threshold(probs: np.ndarray, targets: np.ndarray) -> float:
    """Probability of one label from which on giving it has the largest F1 on these rows.

    It lies midway between two neighbouring probabilities; of several best places the nearest to
    0.5 is taken. Without images that have the label it is 0.5.

    Args:
        probs: (n,).
        targets: (n,) zeros and ones.
    """
    positives = float(targets.sum())
    if not positives:
        return 0.5
    values, at = np.unique(-np.asarray(probs, np.float64), return_inverse=True)
    hits = np.cumsum(np.bincount(at, targets, len(values)))
    named = np.cumsum(np.bincount(at, minlength=len(values)))
    f1 = 2 * hits / (named + positives)
    lower = np.append(-values[1:], 0.0)  # below the last probability every image has the label
    thresholds = (-values + lower) / 2
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(thresholds[best[np.abs(thresholds[best] - 0.5).argmin()]])


def label_ece(probs: np.ndarray, targets: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error of one label: mean distance of probability and frequency.

    Args:
        probs: (n,).
        targets: (n,).
        bins: number of equal-width bins.
    """
    curve = label_reliability(probs, targets, bins)
    return float(np.abs(curve.confidence - curve.accuracy) @ curve.n / curve.n.sum())


class Counts(NamedTuple):
    """F1 (k, r) of each label, NaN where it is not defined, and micro F1 (r,)."""

    f1: np.ndarray
    micro_f1: np.ndarray


def weighted_f1(decided: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> Counts:
    """Weighted F1 of decisions (n, k) under weights (n, r)."""
    both = (decided * targets).T @ weights
    either = (decided + targets).T @ weights
    f1 = np.divide(2 * both, either, out=np.full(both.shape, np.nan), where=either > 0)
    all_both, all_either = both.sum(0), either.sum(0)
    micro = np.divide(
        2 * all_both, all_either, out=np.full(all_both.shape, np.nan), where=all_either > 0
    )
    return Counts(f1, micro)


def weighted_precisions(probs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision (k, r) of each label under weights (n, r)."""
    columns = [
        _average_precision(probs[:, j], targets[:, j] == 1, weights) for j in range(probs.shape[1])
    ]
    return np.array(columns)


def _average_precision(probs: np.ndarray, has_label: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Average precision (r,) of one label.

    Precision counts only at probabilities of images with the label, so images between two of them
    are added up with the lower one; those below the last are left out.
    """
    values, at = np.unique(-probs, return_inverse=True)
    is_place = np.bincount(at[has_label], minlength=len(values)) > 0
    place: np.ndarray = (np.cumsum(is_place) - is_place)[at]
    places = int(is_place.sum())
    if not places:
        return np.full(weights.shape[1], np.nan)
    rows = np.flatnonzero(place < places)
    named = np.cumsum(_sums(place[rows], rows, places, weights), 0)
    own = np.flatnonzero(has_label)
    found = _sums(place[own], own, places, weights)
    hits = np.cumsum(found, 0)
    precision = np.divide(hits, named, out=np.zeros_like(hits), where=named > 0)
    total = hits[-1]
    return np.asarray(
        np.divide(
            (found * precision).sum(0), total, out=np.full(total.shape, np.nan), where=total > 0
        )
    )


def _sums(place: np.ndarray, rows: np.ndarray, places: int, weights: np.ndarray) -> np.ndarray:
    """Sums (places, r) of the weights of these rows by place."""
    table = csr_array((np.ones(len(rows)), (place, rows)), shape=(places, len(weights)))
    return np.asarray(table @ weights)


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean (r,) over the labels (k, r) whose score is defined; NaN if there are none."""
    defined = ~np.isnan(values)
    count = defined.sum(0)
    total = np.where(defined, values, 0.0).sum(0)
    return np.asarray(np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0))


def checked(probs: npt.ArrayLike, targets: npt.ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Check probabilities and targets (n, k), and return both as float64.

    Raises:
        DataError: one is not usable.
    """
    array = check_sigmoids(probs, 2).astype(np.float64)
    return array, check_targets(targets, *array.shape).astype(np.float64)
