"""Scores of weighted rows, for many weightings at a time: the bootstrap and paired tests use them.

In every function `probs` is (n, k) float64 or float32 and `labels` is (n,) int64, both checked by
the caller; `weights` is (n, r) for r weightings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

import numpy as np
from scipy.sparse import csr_array

from threefold.errors import DataError
from threefold.predictions.checks import FLOOR
from threefold.scratch import row_blocks, top_classes

_COLUMNS: Final = 16
"""Classes whose probabilities are gathered at a time."""

WeightedScore = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Maps probs (n, k), labels (n,) and weights (n, r) to scores (r,), NaN where not defined."""

CountedScore = Callable[[np.ndarray, np.ndarray, int, np.ndarray], np.ndarray]
"""Maps predicted classes (n,), labels (n,), k and weights (n, r) to scores (r,)."""


def check_score(score: str | WeightedScore) -> WeightedScore:
    """The function of a score: one of SCORES by name, or the given one with a check of its result.

    Raises:
        DataError: no score has this name.
    """
    if callable(score):
        return partial(_checked_score, score)
    if score not in SCORES:
        raise DataError("unknown score", where=score, expected=", ".join(SCORES))
    return SCORES[score]


def score_value(score: str, probs: np.ndarray, labels: np.ndarray) -> float:
    """A score of SCORES with equal weights; NaN if it is not defined."""
    if score == "roc_auc":
        return _unweighted_roc_auc(probs, labels)
    return float(SCORES[score](probs, labels, np.ones((len(labels), 1)))[0])


def merit(score: str, probs: np.ndarray, labels: np.ndarray) -> float:
    """A score of SCORES, negated where lower is better; minus infinity if it is not defined."""
    value = score_value(score, probs, labels)
    if np.isnan(value):
        return -np.inf
    return -value if score in LOWER_IS_BETTER else value


def _checked_score(
    score: WeightedScore, probs: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    values = np.asarray(score(probs, labels, weights), dtype=np.float64)
    if values.shape != weights.shape[1:]:
        raise DataError(
            "a score must return one value per weighting",
            expected=weights.shape[1:],
            got=values.shape,
        )
    return values


def in_top(top: int, probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each label is among the `top` largest probabilities; ties go to the first classes."""
    return _by_block(partial(_in_top, top), probs, labels)


def _in_top(top: int, probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    own = probs[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(probs.shape[1]) < labels[:, None]
    return np.asarray(((probs > own) | ((probs == own) & earlier)).sum(-1) < top)


def _by_block(
    values: Callable[[np.ndarray, np.ndarray], np.ndarray], probs: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Compute a value (n,) of each row in blocks of rows, whose temporary arrays stay small."""
    return np.concatenate([values(probs[rows], labels[rows]) for rows in row_blocks(*probs.shape)])


def log_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the log loss (n,) of each row of probabilities (n, k); the least one is FLOOR."""
    own = probs[np.arange(len(labels)), labels].astype(np.float64)
    return np.asarray(-np.log(np.maximum(own, FLOOR)))


def _squared_errors(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return _by_block(_squared_errors_of_block, probs, labels)


def _squared_errors_of_block(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    wide = probs.astype(np.float64)
    own = wide[np.arange(len(labels)), labels]
    return np.asarray((wide**2).sum(-1) - 2 * own + 1)


def _row_mean(
    values: Callable[[np.ndarray, np.ndarray], np.ndarray],
    probs: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    return np.asarray(values(probs, labels).astype(np.float64) @ weights / weights.sum(0))


def _accuracy(predicted: np.ndarray, labels: np.ndarray, k: int, weights: np.ndarray) -> np.ndarray:
    return np.asarray((predicted == labels).astype(np.float64) @ weights / weights.sum(0))


def _balanced(predicted: np.ndarray, labels: np.ndarray, k: int, weights: np.ndarray) -> np.ndarray:
    right = _sums(labels, k, weights, predicted == labels)
    return _class_mean(right, _sums(labels, k, weights))


def _macro_f1(predicted: np.ndarray, labels: np.ndarray, k: int, weights: np.ndarray) -> np.ndarray:
    right = _sums(labels, k, weights, predicted == labels)
    return _class_mean(2 * right, _sums(labels, k, weights) + _sums(predicted, k, weights))


def _of_answers(
    score: CountedScore, probs: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    return score(top_classes(probs), labels, probs.shape[1], weights)


def _one_vs_rest_classes(labels: np.ndarray, k: int) -> Sequence[int]:
    """The classes whose ROC curves are averaged: those with rows; of two classes, only class 1."""
    return [1] if k == 2 else np.unique(labels).tolist()


def _roc_auc(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    ordered, total = [], []
    for c in _one_vs_rest_classes(labels, probs.shape[1]):
        ordered_c, total_c = _ordered_pairs(probs[:, c], labels == c, weights)
        ordered.append(ordered_c)
        total.append(total_c)
    return _class_mean(np.array(ordered), np.array(total))


def _unweighted_roc_auc(probs: np.ndarray, labels: np.ndarray) -> float:
    """`_roc_auc` with equal weights: the same counts, by sorting, in a tenth of the time."""
    ordered, total = [], []
    classes = _one_vs_rest_classes(labels, probs.shape[1])
    for begin in range(0, len(classes), _COLUMNS):
        some = classes[begin : begin + _COLUMNS]
        # Neighbouring columns share lines of the processor's cache.
        columns = np.ascontiguousarray(probs[:, some].T)
        for c, column in zip(some, columns, strict=True):
            is_positive = labels == c
            positive, negative = np.sort(column[is_positive]), np.sort(column[~is_positive])
            ranks = (
                np.searchsorted(negative, positive, "left").sum()
                + np.searchsorted(negative, positive, "right").sum()
            )
            ordered.append([ranks / 2])
            total.append([float(len(positive)) * len(negative)])
    return float(_class_mean(np.array(ordered), np.array(total))[0])


def _ordered_pairs(
    score: np.ndarray, is_positive: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (r,) of the pairs of a positive and a negative row in the right order, and of all.

    A tie counts by half.
    """
    values, at = np.unique(score, return_inverse=True)
    has_positive = np.bincount(at[is_positive], minlength=len(values)) > 0
    has_negative = np.bincount(at[~is_positive], minlength=len(values)) > 0
    # Neighbouring values with rows of one kind only are merged: no pair lies between them.
    kind = has_positive + 2 * has_negative
    level = np.cumsum(np.concatenate([[0], (kind[1:] != kind[:-1]) | (kind[1:] == 3)]))[at]
    count = int(level.max()) + 1
    positive = _sums(level, count, weights, is_positive)
    negative = _sums(level, count, weights, ~is_positive)
    below = np.cumsum(negative, 0) - negative / 2
    return (positive * below).sum(0), positive.sum(0) * negative.sum(0)


def _sums(
    where: np.ndarray, count: int, weights: np.ndarray, rows: np.ndarray | None = None
) -> np.ndarray:
    """Sums (count, r) of weights by class or level `where` (n,), of `rows` (booleans) or all."""
    if weights.shape[1] == 1:
        counted = weights[:, 0] if rows is None else np.where(rows, weights[:, 0], 0.0)
        return np.bincount(where, counted, count)[:, None]
    at = np.arange(len(where)) if rows is None else np.flatnonzero(rows)
    return np.asarray(
        csr_array((np.ones(len(at)), (where[at], at)), shape=(count, len(where))) @ weights
    )


def _class_mean(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Mean over the classes (k, r) with a positive whole of part / whole; NaN if there are none."""
    used = wholes > 0
    shares = np.divide(parts, wholes, out=np.zeros_like(parts), where=used)
    count = used.sum(0)
    return np.asarray(
        np.divide(shares.sum(0), count, out=np.full(count.shape, np.nan), where=count > 0)
    )


LOWER_IS_BETTER: Final = ("log_loss", "brier")
"""Scores whose best value is the least."""

COUNTED: Final[dict[str, CountedScore]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced,
    "macro_f1": _macro_f1,
}
"""Scores that depend only on each row's label and predicted class.

All but F1 depend only on whether the two agree."""

SCORES: Final[dict[str, WeightedScore]] = {
    **{name: partial(_of_answers, score) for name, score in COUNTED.items()},
    "roc_auc": _roc_auc,
    **{f"top{top}": partial(_row_mean, partial(in_top, top)) for top in (2, 3, 5)},
    "log_loss": partial(_row_mean, log_losses),
    "brier": partial(_row_mean, _squared_errors),
}
"""Scores by name. `scores.bootstrap_interval` says why the calibration error is not among them."""
