"""How members differ: duplicates, pairwise diversity, and accuracy against the number of members."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from threefold.crossfit import side_by_side, stratified_parts
from threefold.errors import DataError
from threefold.predictions__checks import FLOOR, check_labels, check_probs

TOLERANCE: Final = 0.05
"""Two members are duplicates below this ratio of what they differ by to what they are unsure of. Measured on the
authors' ten Fashion-MNIST files: copies 0.0001 or less, a float16 copy 0.001, the nearest two others 0.34."""

_LOOK: Final = 2000
"""Rows, evenly spread, on which most pairs are told apart; only those that are near there are compared on all."""


@dataclass(frozen=True, eq=False)
class Diversity:
    """Pairwise measures (Kuncheva & Whitaker 2003, Machine Learning 51, table 1), each (m, m) float64, symmetric.

    Attributes:
        disagreement: share of rows where exactly one of two members is right; 0 on the diagonal, large is diverse.
        double_fault: share of rows that both miss; a member's own error on the diagonal.
        q: Yule's Q, 1 = the same rows right, 0 = independent, -1 = opposite; NaN where no row decides it.
        kappa: Cohen's kappa of being right, 1 = the same rows, 0 = as by chance; NaN where no row decides it.
        agreement: share of rows with the same predicted class.
    """

    disagreement: np.ndarray
    double_fault: np.ndarray
    q: np.ndarray
    kappa: np.ndarray
    agreement: np.ndarray

    def means(self) -> dict[str, float]:
        """Each measure averaged over the pairs of different members; NaN where none has a value."""
        upper = np.triu_indices(len(self.q), 1)
        pairs = {name: getattr(self, name)[upper] for name in self.__dataclass_fields__}
        return {
            name: float(np.mean(v[~np.isnan(v)])) if (~np.isnan(v)).any() else np.nan
            for name, v in pairs.items()
        }


@dataclass(frozen=True, eq=False)
class SizeCurve:
    """Accuracy of the mean of s members, s = 1..m.

    Attributes:
        random: (m,) average over random subsets.
        low, high: (m,) least and greatest of them.
        ordered: (m,) members in greedy order, the order found on other rows than those it is scored on.
        order: the greedy order on all rows, member numbers.
    """

    random: np.ndarray
    low: np.ndarray
    high: np.ndarray
    ordered: np.ndarray
    order: tuple[int, ...]


def duplicates(probs: npt.ArrayLike, tolerance: float = TOLERANCE) -> list[tuple[int, ...]]:
    """Groups of members that are the same, or nearly: one network saved twice, rounded, or quantised.

    Two members count as the same when their mean distance (half of the sum of absolute differences) is below
    `tolerance` times what they are unsure of (1 minus the largest probability, averaged over rows and both): accurate
    members are close to each other without being the same network.

    Args:
        probs: (m, n, k).
        tolerance: 0 = identical members only.

    Returns:
        Groups of two or more member numbers, ascending; what is the same as the same is in one group.

    Raises:
        DataError: probabilities are not usable, or the tolerance is negative.
    """
    array = check_probs(probs, 3)
    if not tolerance >= 0:
        raise DataError("a tolerance is not negative", got=tolerance)
    m = len(array)
    unsure = 1 - array.max(-1).mean(1, dtype=np.float64)
    some = array[:, :: -(-array.shape[1] // _LOOK)]
    first = np.arange(m)
    for j in range(m):
        for i in range(j):
            most = tolerance * (unsure[i] + unsure[j]) / 2
            if first[i] == first[j] or _apart(some[i], some[j]) > 3 * most + 1e-3:
                continue  # far apart on a part of the rows already
            if _apart(array[i], array[j]) <= most:
                first[first == first[j]] = first[i]
    return [
        tuple(map(int, np.flatnonzero(first == value)))
        for value in np.unique(first)
        if (first == value).sum() > 1
    ]


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over rows of half the sum of absolute differences."""
    return float(np.abs(a - b).sum(-1).mean(dtype=np.float64) / 2)


def distinct(probs: npt.ArrayLike, tolerance: float = TOLERANCE) -> list[int]:
    """The member numbers that remain when every group of duplicates is counted once, by its first; probs (m, n, k).

    Raises:
        DataError: probabilities are not usable, or the tolerance is negative.
    """
    extra = {i for group in duplicates(probs, tolerance) for i in group[1:]}
    return [i for i in range(len(np.asarray(probs))) if i not in extra]


def diversity(probs: npt.ArrayLike, labels: npt.ArrayLike) -> Diversity:
    """Pairwise diversity of members with probabilities (m, n, k) on rows with labels (n,).

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array = check_probs(probs, 3)
    preds = array.argmax(-1)
    right = (preds == check_labels(labels, *array.shape[1:])).astype(np.float64)
    wrong = 1 - right
    both, neither, one, other = (
        a @ b.T / right.shape[1]
        for a, b in ((right, right), (wrong, wrong), (right, wrong), (wrong, right))
    )
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN: no row decides it
        q = (both * neither - one * other) / (both * neither + one * other)
        chance = (both + one) * (one + neither) + (both + other) * (other + neither)
        kappa = 2 * (both * neither - one * other) / chance
    agreement = np.array([(preds == mine).mean(1) for mine in preds])
    return Diversity(one + other, neither, q, kappa, agreement)


def greedy_order(probs: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[int, ...]:
    """Every member once, each the one whose addition gives the mean the least log loss.

    Log loss needs only the probability of the right class: m^2 / 2 trials of n numbers.

    Args:
        probs: (m, n, k).
        labels: (n,).

    Raises:
        DataError: probabilities or labels are not usable.
    """
    array = check_probs(probs, 3)
    truth = check_labels(labels, *array.shape[1:])
    return _order(array[:, np.arange(len(truth)), truth].astype(np.float64))


def size_curve(
    probs: npt.ArrayLike, labels: npt.ArrayLike, draws: int = 20, seed: int = 0
) -> SizeCurve:
    """Accuracy of the mean against the number of members: what another member still brings.

    Args:
        probs: (m, n, k).
        labels: (n,).
        draws: random orders of the members; the first s of each are a random subset of size s.
        seed: of the orders.

    Raises:
        DataError: probabilities or labels are not usable, or there is no draw.
    """
    array = check_probs(probs, 3)
    m, n, k = array.shape
    truth = check_labels(labels, n, k)
    if draws < 1:
        raise DataError("a curve needs a draw", expected="1 or more", got=draws)
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(m) for _ in range(draws)]
    curves = np.array(side_by_side(lambda order: _hits(array, truth, order), orders)) / n
    hits = array[:, np.arange(n), truth].astype(np.float64)
    part = stratified_parts(truth)

    def held_out(value: int) -> np.ndarray:
        held = part == value
        order = _order(hits[:, ~held] if part.any() else hits)
        return _hits(array[:, held], truth[held], np.array(order))

    ordered = np.sum(side_by_side(held_out, np.unique(part)), axis=0) / n
    return SizeCurve(curves.mean(0), curves.min(0), curves.max(0), ordered, _order(hits))


def _hits(probs: np.ndarray, labels: np.ndarray, order: np.ndarray) -> np.ndarray:
    """How many rows the mean of the first 1, 2, .. m members in this order classifies correctly, (m,)."""
    total, found = np.zeros(probs.shape[1:]), []
    for member in order:
        total += probs[member]
        found.append((total.argmax(-1) == labels).sum())
    return np.array(found)


def _order(hits: np.ndarray) -> tuple[int, ...]:
    """Greedy order by log loss from the probabilities (m, n) of the right classes."""
    left, had = list(range(len(hits))), np.zeros(hits.shape[1])
    order: list[int] = []
    while left:
        gains = [np.log(np.maximum((had + hits[i]) / (len(order) + 1), FLOOR)).sum() for i in left]
        best = left[int(np.argmax(gains))]
        had = had + hits[best]
        left.remove(best)
        order.append(best)
    return tuple(order)
