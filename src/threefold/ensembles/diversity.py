"""How members differ: duplicates, pairwise diversity, accuracy by number of members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from threefold.ensembles.cross_fit import side_by_side, stratified_parts
from threefold.errors import DataError
from threefold.predictions.checks import FLOOR, check_labels, check_probs
from threefold.scratch import row_blocks, take_rows, top_classes

TOLERANCE: Final = 0.05
"""Two members are duplicates if their distance relative to their uncertainty is below this.

Measured on the authors' ten Fashion-MNIST files: copies 0.0001 or less, a float16 copy 0.001, the
closest pair of different networks 0.34.
"""

_SAMPLE: Final = 2000
"""Evenly spaced rows that rule out most pairs; only pairs that are close there use all rows."""


@dataclass(frozen=True, eq=False)
class Diversity:
    """Pairwise measures, each (m, m) float64 and symmetric.

    Kuncheva & Whitaker 2003, Machine Learning 51, table 1.

    Attributes:
        disagreement: share of rows where exactly one of two members is right; large = diverse.
        double_fault: share of rows that both get wrong; on the diagonal a member's own error.
        q: Yule's Q, 1 = the same rows right, 0 = independent, -1 = opposite; NaN if undefined.
        kappa: Cohen's kappa of being right, 1 = the same rows, 0 = chance level; NaN if undefined.
        agreement: share of rows with the same predicted class.
    """

    disagreement: np.ndarray
    double_fault: np.ndarray
    q: np.ndarray
    kappa: np.ndarray
    agreement: np.ndarray

    def means(self) -> dict[str, float]:
        """Return the mean of each measure over the pairs where it is defined; NaN if none."""
        upper = np.triu_indices(len(self.q), 1)
        means = {}
        for name in self.__dataclass_fields__:
            pairs = getattr(self, name)[upper]
            defined = pairs[~np.isnan(pairs)]
            means[name] = float(np.mean(defined)) if len(defined) else np.nan
        return means


@dataclass(frozen=True, eq=False)
class SizeCurve:
    """Accuracy of the mean of s members, s = 1..m.

    Attributes:
        random: (m,) mean accuracy of random subsets of s members.
        low, high: (m,) lowest and highest accuracy of them.
        ordered: (m,) accuracy of the first s members in greedy order, cross-fitted.
        order: member numbers in greedy order on all rows.
    """

    random: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ordered: np.ndarray
    order: tuple[int, ...]


def duplicates(probs: npt.ArrayLike, tolerance: float = TOLERANCE) -> list[tuple[int, ...]]:
    """Find groups of members that are the same network, or nearly: saved twice, rounded, quantized.

    Two members count as duplicates if their mean distance (half the sum of absolute differences) is
    at most `tolerance` times their mean uncertainty (1 minus the largest probability). Accurate
    members are close to each other without being the same network, hence the ratio.

    Args:
        probs: (m, n, k).
        tolerance: 0 = identical members only.

    Returns:
        Groups of two or more member numbers, ascending. Duplicates of duplicates are in one group.

    Raises:
        DataError: probabilities are not usable, or the tolerance is negative.
    """
    array = check_probs(probs, 3)
    if not tolerance >= 0:
        raise DataError("a tolerance is not negative", got=tolerance)
    m = len(array)
    uncertainty = 1 - array.max(-1).mean(1, dtype=np.float64)
    sample = array[:, :: -(-array.shape[1] // _SAMPLE)]
    first = np.arange(m)
    for j in range(m):
        for i in range(j):
            limit = tolerance * (uncertainty[i] + uncertainty[j]) / 2
            if first[i] == first[j] or _distance(sample[i], sample[j]) > 3 * limit + 1e-3:
                continue
            if _distance(array[i], array[j]) <= limit:
                first[first == first[j]] = first[i]
    groups = [tuple(map(int, np.flatnonzero(first == value))) for value in np.unique(first)]
    return [group for group in groups if len(group) > 1]


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Return the mean over rows of half the sum of absolute differences."""
    sums = [np.abs(a[rows] - b[rows]).sum(-1) for rows in row_blocks(*a.shape)]
    return float(np.concatenate(sums).mean(dtype=np.float64) / 2)


def distinct(probs: npt.ArrayLike, tolerance: float = TOLERANCE) -> list[int]:
    """Return the numbers of the members without duplicates; the first of each group stays.

    Args:
        probs: (m, n, k).
        tolerance: as in `duplicates`.

    Raises:
        DataError: probabilities are not usable, or the tolerance is negative.
    """
    extra = {i for group in duplicates(probs, tolerance) for i in group[1:]}
    return [i for i in range(len(np.asarray(probs))) if i not in extra]


def diversity(probs: npt.ArrayLike, labels: npt.ArrayLike) -> Diversity:
    """Measure the pairwise diversity of members.

    Args:
        probs: (m, n, k).
        labels: (n,).

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array = check_probs(probs, 3)
    preds = top_classes(array)
    right = (preds == check_labels(labels, *array.shape[1:])).astype(np.float64)
    wrong = 1 - right
    n = right.shape[1]
    both, neither = right @ right.T / n, wrong @ wrong.T / n
    only_a, only_b = right @ wrong.T / n, wrong @ right.T / n
    # 0 / 0 = NaN: the measure is undefined.
    with np.errstate(invalid="ignore"):
        product = both * neither - only_a * only_b
        q = product / (both * neither + only_a * only_b)
        chance = (both + only_a) * (only_a + neither) + (both + only_b) * (only_b + neither)
        kappa = 2 * product / chance
    agreement = np.array([(preds == own).mean(1) for own in preds])
    return Diversity(
        disagreement=only_a + only_b,
        double_fault=neither,
        q=q,
        kappa=kappa,
        agreement=agreement,
    )


def size_curve(
    probs: npt.ArrayLike, labels: npt.ArrayLike, draws: int = 20, seed: int = 0
) -> SizeCurve:
    """Measure the accuracy of the mean of 1, 2, ... m members.

    Args:
        probs: (m, n, k).
        labels: (n,).
        draws: number of random orders; the first s members of each are a random subset.
        seed: seed of the orders.

    Raises:
        DataError: probabilities or labels are not usable, or draws is below 1.
    """
    array = check_probs(probs, 3)
    m, n, k = array.shape
    truth = check_labels(labels, n, k)
    if draws < 1:
        raise DataError("a curve needs a draw", expected="1 or more", got=draws)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(m) for _ in range(draws)]
    curves = np.array(side_by_side(lambda order: _count_correct(array, truth, order), orders)) / n
    hits = array[:, np.arange(n), truth].astype(np.float64)
    part = stratified_parts(truth)

    def cross_fitted(value: int) -> np.ndarray:
        inside = part == value
        order = _greedy_order(hits[:, ~inside] if part.any() else hits)
        return _count_correct(take_rows(array, inside), truth[inside], np.array(order))

    ordered = np.sum(side_by_side(cross_fitted, np.unique(part)), axis=0) / n
    return SizeCurve(
        random=curves.mean(0),
        low=curves.min(0),
        high=curves.max(0),
        ordered=ordered,
        order=_greedy_order(hits),
    )


def _count_correct(probs: np.ndarray, labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """Return how many rows the mean of the first 1, 2, ... m members classifies correctly, (m,)."""
    counts = np.zeros(len(order), np.int64)
    for rows in row_blocks(len(labels), probs.shape[2]):
        total = np.zeros((len(labels[rows]), probs.shape[2]))
        for place, member in enumerate(order):
            total += probs[member, rows]
            counts[place] += (total.argmax(-1) == labels[rows]).sum()
    return counts


def _greedy_order(hits: np.ndarray) -> tuple[int, ...]:
    """Order the members greedily: each is the one whose addition gives the least log loss.

    The log loss needs only the right classes' probabilities `hits` (m, n).
    """
    remaining, total = list(range(len(hits))), np.zeros(hits.shape[1])
    order: list[int] = []
    while remaining:
        size = len(order) + 1
        gains = [np.log(np.maximum((total + hits[i]) / size, FLOOR)).sum() for i in remaining]
        pick = remaining[int(np.argmax(gains))]
        total = total + hits[pick]
        remaining.remove(pick)
        order.append(pick)
    return tuple(order)
