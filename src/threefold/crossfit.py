"""Cross-fitting: every row answered by an ensemble that was fitted on other rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from threefold.combiners import Ensemble
from threefold.errors import DataError
from threefold.predictions__checks import check_labels, check_probs

Item = TypeVar("Item")
Answer = TypeVar("Answer")

PARTS: Final = 5
"""Parts of a cross-fit where the caller has no folds, and there are MANY_ROWS or fewer."""

MANY_ROWS: Final = 10_000
"""With more rows there are two parts: the half of them that a fit then has is as good as four fifths of fewer, and a quarter of the rows to fit on in all."""


def cross_fit(
    ensemble_factory: Callable[[], Ensemble],
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    folds: npt.ArrayLike | None = None,
    groups: Sequence[str] | None = None,
    declare: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Probabilities (n, k) where each row is predicted by an ensemble that was fitted on other rows.

    Args:
        ensemble_factory: makes an ensemble that is not fitted.
        probs: (m, n, k) out-of-fold probabilities of the members.
        labels: (n,).
        folds: (n,) part of each row; None = `stratified_parts`.
        groups: (n,) what must stay in one part, where `folds` is None.
        declare: told of every fit: rows seen and rows answered, booleans (n,) each (`Ledger.declare`).

    Raises:
        DataError: probabilities or labels are not usable, or the rows make fewer than two parts.
    """
    array = check_probs(probs, 3)
    _, n, k = array.shape
    truth = check_labels(labels, n, k)
    part = np.asarray(folds) if folds is not None else stratified_parts(truth, groups)
    if part.shape != (n,):
        raise DataError(
            "folds have the wrong shape", expected=f"({n},), one per row", got=part.shape
        )
    if len(np.unique(part)) < 2:
        raise DataError(
            "rows cannot be cross-fitted", expected="two parts at least", got="all rows in one"
        )
    first = ensemble_factory()
    if not first.needs_fit:
        return first.predict_proba(
            array
        )  # nothing is learned, so every part would get the same answers
    helds = [part == value for value in np.unique(part)]
    for held in helds if declare else ():
        declare(~held, held)  # type: ignore[misc]

    def answered(held: np.ndarray) -> np.ndarray:
        return (
            ensemble_factory().fit_checked(array[:, ~held], truth[~held])._combine(array[:, held])
        )

    answer = np.empty((n, k))
    for held, found in zip(helds, side_by_side(answered, helds), strict=True):
        answer[held] = found
    return answer


def side_by_side(work: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
    """`work` of every item, in their order, on all cores: numpy and scipy let go of the interpreter while they compute.

    The linear algebra keeps to one thread: threads of it in threads of ours would wait for each other, and its sums would round
    differently with the number of cores.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, items))


def stratified_parts(
    labels: np.ndarray, groups: Sequence[str] | None = None, parts: int | None = None
) -> np.ndarray:
    """Part number (n,) of each row, classes spread evenly; groups, where there are any, kept whole.

    Without a number of parts there are PARTS, or two of more than MANY_ROWS rows. Unlike scikit-learn's splitters this also takes
    classes with fewer rows than parts, without a warning.
    """
    if parts is None:
        parts = PARTS if len(labels) <= MANY_ROWS else 2
    rng = np.random.default_rng(0)
    if groups is None:
        part = np.empty(len(labels), dtype=np.int64)
        part[np.lexsort((rng.random(len(labels)), labels))] = np.arange(len(labels)) % parts
        return part
    if len(groups) != len(labels):
        raise DataError("groups do not match the labels", expected=len(labels), got=len(groups))
    names, number = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.zeros((len(names), int(labels.max()) + 1))
    np.add.at(counts, (number, labels), 1)
    chosen, load = np.empty(len(names), dtype=np.int64), np.zeros((parts, counts.shape[1]))
    for group in np.argsort(
        -counts.sum(1), kind="stable"
    ):  # the largest first, each to where its classes are rarest
        chosen[group] = (load @ counts[group]).argmin()
        load[chosen[group]] += counts[group]
    return chosen[number]
