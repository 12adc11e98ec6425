"""Bootstrap draws of rows or of whole groups, as weights: how often each is drawn, in chunks that bound the memory.

A score of weighted rows costs one matrix product for many draws at once; copies of the drawn rows would cost a pass each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from threefold.errors import DataError

RESAMPLES: Final = 2000
"""Number of draws: 50 lie beyond each end of a 95 % interval."""

_CHUNK: Final = 2_000_000
"""Weights in memory at a time: 16 MB, and a score makes a few arrays of that size."""

_MANY_UNITS: Final = 2000
"""Fewer units are drawn one by one: that is quick, and scores that are computed in two ways then see the same draws."""


class Interval(NamedTuple):
    """Lower and upper end of a confidence interval."""

    low: float
    high: float


def check_level(level: float) -> None:
    """Nothing, if the confidence level lies between 0 and 1.

    Raises:
        DataError: it does not.
    """
    if not 0 < level < 1:
        raise DataError("a confidence level lies between 0 and 1", got=level)


def check_draws(level: float, resamples: int) -> None:
    """Nothing, if so many draws can have an interval of that level: one at least lies beyond each end.

    Raises:
        DataError: they cannot.
    """
    check_level(level)
    fewest = int(np.ceil(round(2 / (1 - level), 6)))
    if resamples < fewest:
        raise DataError(
            "too few bootstrap resamples for the level",
            expected=f"at least {fewest}",
            got=resamples,
        )


def check_hits(hits: npt.ArrayLike, ndim: int = 1) -> np.ndarray:
    """Booleans of `ndim` axes, none of them empty; 0 and 1 count as booleans.

    Raises:
        DataError: other values, another shape, or nothing.
    """
    try:
        array = np.asarray(hits)
    except ValueError:
        raise DataError(
            "hits have rows of different lengths", expected="one value per row"
        ) from None
    if array.ndim != ndim or 0 in array.shape:
        axes = "(n,)" if ndim == 1 else "(classifiers or seeds, n)"
        raise DataError("hits need one value per row", expected=axes, got=array.shape)
    if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
        raise DataError("hits say right or wrong", expected="booleans", got=f"dtype {array.dtype}")
    return array.astype(bool)


def check_numbers(values: npt.ArrayLike) -> np.ndarray:
    """Finite float64 numbers (n,), at least one.

    Raises:
        DataError: other values, another shape, or nothing.
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError("scores must be numbers", expected="one value per row") from None
    if array.ndim != 1 or not len(array):
        raise DataError("scores need one value per row", expected="(n,)", got=array.shape)
    if not np.isfinite(array).all():
        raise DataError(
            "scores are NaN or infinite", where=f"row {int((~np.isfinite(array)).argmax())}"
        )
    return array


def check_groups(groups: npt.ArrayLike, n: int) -> np.ndarray:
    """The group of each row as a number (n,) from 0, in the order of the sorted names.

    Raises:
        DataError: another length, or names that are not strings or whole numbers.
    """
    array = groups if isinstance(groups, np.ndarray) else np.asarray(groups, dtype=object)
    if array.shape != (n,):
        raise DataError("groups have the wrong length", expected=f"({n},)", got=array.shape)
    if array.dtype.kind not in "iuU":
        for row, name in enumerate(array):
            if not isinstance(name, str | int | np.integer):
                raise DataError(
                    "a group has no name",
                    where=f"row {row}",
                    expected="a string or whole number",
                    got=name,
                )
        array = np.array([str(name) for name in array])
    return np.asarray(np.unique(array, return_inverse=True)[1])


def unit_weights(units: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each unit is drawn when as many are drawn with replacement: float64 (units, r) at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // units)
    for start in range(0, resamples, step):
        r = min(step, resamples - start)
        drawn = rng.integers(0, units, (units, r), dtype=np.uint32).astype(
            np.int64
        ) * r + np.arange(r)
        yield np.bincount(drawn.ravel(), minlength=units * r).reshape(units, r).astype(np.float64)


def row_weights(n: int, part: np.ndarray | None, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each row is drawn: float64 (n, r) at a time.

    Args:
        n: number of rows.
        part: (n,) numbers of groups that are drawn whole, as of `check_groups`; None = each row is drawn by itself.
        resamples: number of draws.
        seed: of the draws.
    """
    if part is None:
        yield from unit_weights(n, resamples, seed)
        return
    step = max(1, _CHUNK // n)
    for weights in unit_weights(int(part.max()) + 1, resamples, seed):
        for start in range(0, weights.shape[1], step):
            yield weights[part, start : start + step]


def cell_weights(
    cells: np.ndarray, part: np.ndarray | None, resamples: int, seed: int
) -> Iterator[np.ndarray]:
    """Rows drawn per cell, where rows of one cell are alike: float64 (cells, r) at a time, fast where cells are few.

    Args:
        cells: (n,) the cell of each row, every number from 0 used.
        part: (n,) the group of each row, or None.
        resamples: number of draws.
        seed: of the draws.
    """
    if part is not None:
        table = csr_array((np.ones(len(cells)), (cells, part)))
        if table.shape[0] * table.shape[1] <= _CHUNK:
            table = (
                table.toarray()
            )  # a dense product is many times faster; the sums are whole numbers either way
        for weights in unit_weights(table.shape[1], resamples, seed):
            step = max(1, _CHUNK // table.shape[0])
            for start in range(0, weights.shape[1], step):
                yield table @ weights[:, start : start + step]
        return
    rng, counts = np.random.default_rng(seed), np.bincount(cells)
    step = max(1, _CHUNK // len(counts))
    for start in range(0, resamples, step):
        drawn = rng.multinomial(len(cells), counts / len(cells), size=min(step, resamples - start))
        yield drawn.T.astype(np.float64)


def column_sums(columns: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Sums of columns (c, u) over drawn units, (c, r) at a time; units whose columns are equal are drawn together.

    Args:
        columns: what each of u units adds to c sums.
        resamples: number of draws.
        seed: of the draws.
    """
    distinct, cells = np.unique(columns, axis=1, return_inverse=True)
    if columns.shape[1] > _MANY_UNITS and distinct.shape[1] * 8 <= columns.shape[1]:
        for weights in cell_weights(cells.ravel(), None, resamples, seed):
            yield distinct @ weights
    else:
        for weights in unit_weights(columns.shape[1], resamples, seed):
            yield columns @ weights


def percentile_interval(values: np.ndarray, level: float) -> Interval:
    """Interval between quantiles of the draws' values; draws without a value (NaN) are left out.

    Raises:
        DataError: no draw has a value.
    """
    found = values[~np.isnan(values)]
    if not len(found):
        raise DataError(
            "the score is not defined in any bootstrap resample", expected="rows of several classes"
        )
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
