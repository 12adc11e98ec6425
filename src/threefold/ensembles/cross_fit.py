"""Cross-fitting: every row is answered by an ensemble that was fitted on other rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits

from threefold.ensembles.base import Ensemble
from threefold.errors import DataError
from threefold.predictions.checks import check_labels, check_probs
from threefold.scratch import scratch, take_rows

Item = TypeVar("Item")
Result = TypeVar("Result")

PARTS: Final = 5
"""Default number of parts, for up to MANY_ROWS rows."""

MANY_ROWS: Final = 10_000
"""With more rows there are two parts.

Half of that many rows fits as well as four fifths of fewer, and two fits see a quarter of the rows
that five see.
"""


def cross_fit(
    ensemble_factory: Callable[[], Ensemble],
    probs: npt.ArrayLike,
    labels: npt.ArrayLike,
    folds: npt.ArrayLike | None = None,
    groups: Sequence[str] | None = None,
    declare: Callable[[np.ndarray, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Predict each row by an ensemble that was fitted on other rows.

    Args:
        ensemble_factory: makes an unfitted ensemble.
        probs: (m, n, k) out-of-fold probabilities of the members.
        labels: (n,).
        folds, groups: see `cross_fit_parts`.
        declare: called for each fit with the rows it sees and the rows it answers, booleans (n,)
            each (`Ledger.declare`).

    Returns:
        Probabilities (n, k).

    Raises:
        DataError: probabilities or labels are not usable, or there are fewer than two parts.
    """
    array = check_probs(probs, 3)
    _, n, k = array.shape
    truth = check_labels(labels, n, k)
    part = cross_fit_parts(truth, folds, groups)
    first = ensemble_factory()
    if not first.needs_fit:
        return first.predict_proba(array)
    masks = [part == value for value in np.unique(part)]
    if declare is not None:
        for mask in masks:
            declare(~mask, mask)

    def predict(mask: np.ndarray) -> np.ndarray:
        ensemble = ensemble_factory().fit_checked(take_rows(array, ~mask), truth[~mask])
        return ensemble.combine_checked(take_rows(array, mask))

    answers = scratch((n, k))
    for mask, part_answers in zip(masks, side_by_side(predict, masks), strict=True):
        answers[mask] = part_answers
    return answers


def cross_fit_parts(
    labels: np.ndarray, folds: npt.ArrayLike | None = None, groups: Sequence[str] | None = None
) -> np.ndarray:
    """Return the part (n,) of each row in a cross-fit.

    Args:
        labels: (n,).
        folds: (n,) part of each row; None = `stratified_parts`.
        groups: (n,) groups that must stay in one part if `folds` is None.

    Raises:
        DataError: folds or groups do not match the labels, or there are fewer than two parts.
    """
    part = np.asarray(folds) if folds is not None else stratified_parts(labels, groups)
    if part.shape != labels.shape:
        raise DataError(
            "folds have the wrong shape", expected=f"({len(labels)},), one per row", got=part.shape
        )
    if len(np.unique(part)) < 2:
        raise DataError(
            "rows cannot be cross-fitted", expected="two parts at least", got="all rows in one"
        )
    return part


def side_by_side(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return `work(item)` of every item, in order, computed in threads on all cores.

    Threads suffice because numpy and scipy release the interpreter while they compute. BLAS is
    limited to one thread: its own threads would compete with these, and the rounding of its sums
    would depend on the number of cores.
    """
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, items))


def stratified_parts(
    labels: np.ndarray, groups: Sequence[str] | None = None, parts: int | None = None
) -> np.ndarray:
    """Return the part number (n,) of each row, with the classes spread evenly over the parts.

    Unlike scikit-learn's splitters this also takes classes with fewer rows than parts, without a
    warning.

    Args:
        labels: (n,).
        groups: (n,) group names; rows of a group stay in one part.
        parts: number of parts; None = PARTS, or two for more than MANY_ROWS rows.
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
    names, codes = np.unique(np.asarray(groups), return_inverse=True)
    counts = np.zeros((len(names), int(labels.max()) + 1))
    np.add.at(counts, (codes, labels), 1)
    group_part, load = np.empty(len(names), dtype=np.int64), np.zeros((parts, counts.shape[1]))
    # The largest group first, each to the part where its classes are rarest.
    for group in np.argsort(-counts.sum(1), kind="stable"):
        group_part[group] = (load @ counts[group]).argmin()
        load[group_part[group]] += counts[group]
    return group_part[codes]
