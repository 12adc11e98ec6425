"""Scores of weighted rows, many weightings at a time: what the bootstrap and the paired tests evaluate.

Everywhere `probs` is (n, k) float64, `labels` (n,) int64, both checked by the caller; `weights` is (n, r), r weightings.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

import numpy as np
from scipy.sparse import csr_array

from threefold.errors import DataError
from threefold.predictions__checks import FLOOR

Weighted = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""A score of probs (n, k) and labels (n,) for r weightings of the rows (n, r): values (r,), NaN where not defined."""


def check_score(score: str | Weighted) -> Weighted:
    """The function of a name of SCORES; of a function, the same with its answers' shape checked.

    Raises:
        DataError: no score has this name.
    """
    if callable(score):
        return partial(_own_score, score)
    if score not in SCORES:
        raise DataError("unknown score", where=score, expected=", ".join(SCORES))
    return SCORES[score]


def score_value(score: str, probs: np.ndarray, labels: np.ndarray) -> float:
    """A score of SCORES where every row counts once; NaN where it is not defined."""
    if score == "roc_auc":
        return _plain_roc_auc(probs, labels)
    return float(SCORES[score](probs, labels, np.ones((len(labels), 1)))[0])


def _own_score(
    score: Weighted, probs: np.ndarray, labels: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    values = np.asarray(score(probs, labels, weights), dtype=np.float64)
    if values.shape != weights.shape[1:]:
        raise DataError(
            "a score gives one value per weighting", expected=weights.shape[1:], got=values.shape
        )
    return values


def _hits(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray(probs.argmax(-1) == labels)


def in_top(top: int, probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Rows (n,) where fewer than `top` classes stand before the label: larger, or as large and earlier."""
    own = probs[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(probs.shape[1]) < labels[:, None]
    return np.asarray(((probs > own) | ((probs == own) & earlier)).sum(-1) < top)


def _log_losses(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray(-np.log(np.maximum(probs[np.arange(len(labels)), labels], FLOOR)))


def _squared(probs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.asarray((probs**2).sum(-1) - 2 * probs[np.arange(len(labels)), labels] + 1)


def _row_mean(
    values: Callable[[np.ndarray, np.ndarray], np.ndarray],
    probs: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
) -> np.ndarray:
    return np.asarray(values(probs, labels).astype(np.float64) @ weights / weights.sum(0))


def _balanced(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    k = probs.shape[1]
    right = _sums(labels, k, weights, _hits(probs, labels))
    return _class_mean(right, _sums(labels, k, weights))


def _macro_f1(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    k = probs.shape[1]
    right = _sums(labels, k, weights, _hits(probs, labels))
    return _class_mean(2 * right, _sums(labels, k, weights) + _sums(probs.argmax(-1), k, weights))


def _roc_auc(probs: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    k = probs.shape[1]
    pairs = [
        _ordered_pairs(probs[:, c], labels == c, weights) for c in ([1] if k == 2 else range(k))
    ]
    return _class_mean(
        np.array([below for below, _ in pairs]), np.array([total for _, total in pairs])
    )


def _plain_roc_auc(probs: np.ndarray, labels: np.ndarray) -> float:
    """`_roc_auc` where every row counts once: sorting and searching, a tenth of the time, and the same counts."""
    below, total = [], []
    for c in [1] if probs.shape[1] == 2 else range(probs.shape[1]):
        mine = labels == c
        above, other = np.sort(probs[mine, c]), np.sort(probs[~mine, c])
        ranks = (
            np.searchsorted(other, above, "left").sum()
            + np.searchsorted(other, above, "right").sum()
        )
        below.append([ranks / 2])
        total.append([float(len(above)) * len(other)])
    return float(_class_mean(np.array(below), np.array(total))[0])


def _ordered_pairs(
    score: np.ndarray, positive: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the pairs of a positive and a negative row that the score orders right, ties by half; and of all pairs."""
    values, at = np.unique(score, return_inverse=True)
    # Neighbouring levels that hold rows of one kind only are one level: no pair of theirs is told apart.
    has, lacks = (
        np.bincount(at[side], minlength=len(values)) > 0 for side in (positive, ~positive)
    )
    kind = has + 2 * lacks
    level = np.cumsum(np.concatenate([[0], (kind[1:] != kind[:-1]) | (kind[1:] == 3)]))[at]
    count = int(level.max()) + 1
    above, other = (_sums(level, count, weights, side) for side in (positive, ~positive))
    below = np.cumsum(other, 0) - other / 2
    return (above * below).sum(0), above.sum(0) * other.sum(0)


def _sums(
    where: np.ndarray, count: int, weights: np.ndarray, rows: np.ndarray | None = None
) -> np.ndarray:
    """Sums of weights (n, r) by class or level `where` (n,): (count, r); of the chosen rows (n,) booleans only."""
    if weights.shape[1] == 1:
        counted = weights[:, 0] if rows is None else np.where(rows, weights[:, 0], 0.0)
        return np.bincount(where, counted, count)[:, None]
    at = np.arange(len(where)) if rows is None else np.flatnonzero(rows)
    return np.asarray(
        csr_array((np.ones(len(at)), (where[at], at)), shape=(count, len(where))) @ weights
    )


def _class_mean(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Mean over classes (k, r) of part / whole where there is a whole; NaN where there is none in any class."""
    used = wholes > 0
    shares = np.divide(parts, wholes, out=np.zeros_like(parts), where=used)
    count = used.sum(0)
    return np.asarray(
        np.divide(shares.sum(0), count, out=np.full(count.shape, np.nan), where=count > 0)
    )


COUNTED: Final = ("accuracy", "balanced_accuracy", "macro_f1")
"""Scores that see no more of a row than its label and its answer; all but F1 only whether the two agree."""

SCORES: Final[dict[str, Weighted]] = {
    "accuracy": partial(_row_mean, _hits),
    "balanced_accuracy": _balanced,
    "macro_f1": _macro_f1,
    "roc_auc": _roc_auc,
    **{f"top{top}": partial(_row_mean, partial(in_top, top)) for top in (2, 3, 5)},
    "log_loss": partial(_row_mean, _log_losses),
    "brier": partial(_row_mean, _squared),
}
"""Scores by name. The calibration error is not among them: see `stats.bootstrap_interval`."""
