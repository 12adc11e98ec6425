"""Bootstrap draws of rows or whole groups, as weights: the number of times that each is drawn.

Weights score many draws with one matrix product, where copies of the drawn rows would take one pass
each. Draws come in chunks, which bounds the memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError

LEVEL: Final = 0.95
"""Confidence level of intervals."""

RESAMPLES: Final = 2000
"""Number of draws: 50 lie beyond each end of a 95 % interval."""

_CHUNK: Final = 2_000_000
"""Weights in memory at a time: 16 MB. A score makes a few arrays of that size."""

_MANY_UNITS: Final = 2000
"""Up to this number, units are drawn one by one.

That is fast enough, and scores that are computed in two ways then see the same draws."""


class Interval(NamedTuple):
    """Lower and upper end of a confidence interval."""

    low: float
    high: float


def check_level(level: float) -> None:
    """Check that a confidence level lies between 0 and 1.

    Raises:
        DataError: it does not.
    """
    if not 0 < level < 1:
        raise DataError("a confidence level must lie between 0 and 1", got=level)


def check_draws(level: float, resamples: int) -> None:
    """Check that at least one of the draws lies beyond each end of an interval of this level.

    Raises:
        DataError: there are too few draws.
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
    """Check hits (right or wrong) and return them as booleans; 0 and 1 count as booleans.

    Args:
        hits: (n,) if `ndim` is 1; (classifiers or seeds, n) if it is 2.
        ndim: 1 or 2.

    Raises:
        DataError: the values or the shape are wrong, or there are none.
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
    if array.dtype == bool:
        return array
    if array.dtype.kind not in "iuf" or not np.isin(array, (0, 1)).all():
        raise DataError(
            "hits must be right or wrong", expected="booleans", got=f"dtype {array.dtype}"
        )
    return array.astype(bool)


def check_numbers(values: npt.ArrayLike) -> np.ndarray:
    """Check scores and return them as finite float64 numbers (n,).

    Raises:
        DataError: the values or the shape are wrong, or there are none.
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


def check_pairs(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check that two arrays of scores have the same shape, and return both.

    Raises:
        DataError: they do not.
    """
    if a.shape != b.shape:
        raise DataError("paired scores need one value per row each", expected=a.shape, got=b.shape)
    return a, b


def check_groups(groups: npt.ArrayLike, n: int) -> np.ndarray:
    """The number (n,) of each row's group, counted from 0 in the order of the sorted names.

    Raises:
        DataError: the length is wrong, or names are not strings or whole numbers.
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
    """Draw as many units as there are, with replacement: counts as float64 (units, r) at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // units)
    for start in range(0, resamples, step):
        r = min(step, resamples - start)
        drawn = rng.integers(0, units, (units, r), dtype=np.uint32).astype(np.int64)
        cells = drawn * r + np.arange(r)
        yield np.bincount(cells.ravel(), minlength=units * r).reshape(units, r).astype(np.float64)


def row_weights(n: int, part: np.ndarray | None, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Number of times that each row is drawn: float64 (n, r) at a time.

    Args:
        n: number of rows.
        part: (n,) group numbers from `check_groups`: groups are drawn whole. None = rows are drawn.
        resamples: number of draws.
        seed: seed of the draws.
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
    """Number of rows drawn from each cell of equivalent rows: float64 (cells, r) at a time.

    This is fast if there are few cells.

    Args:
        cells: (n,) the cell of each row; every number from 0 is used.
        part: (n,) group numbers from `check_groups`, or None.
        resamples: number of draws.
        seed: seed of the draws.
    """
    if part is not None:
        # Imported here: the runtime takes LEVEL from this module, and does without scipy.
        from scipy.sparse import csr_array

        table = csr_array((np.ones(len(cells)), (cells, part)))
        if table.shape[0] * table.shape[1] <= _CHUNK:
            # The sums are whole numbers, so the much faster dense product is exact.
            table = table.toarray()
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
    """Sums of columns over drawn units: (c, r) at a time.

    If many units have equal columns, they are drawn together.

    Args:
        columns: (c, u), what each of u units adds to c sums.
        resamples: number of draws.
        seed: seed of the draws.
    """
    distinct, cells = np.unique(columns, axis=1, return_inverse=True)
    if columns.shape[1] > _MANY_UNITS and distinct.shape[1] * 8 <= columns.shape[1]:
        for weights in cell_weights(cells.ravel(), None, resamples, seed):
            yield distinct @ weights
    else:
        for weights in unit_weights(columns.shape[1], resamples, seed):
            yield columns @ weights


def percentile_interval(values: np.ndarray, level: float) -> Interval:
    """Interval between two quantiles of the draws' scores; NaN (not defined) is left out.

    Raises:
        DataError: the score is not defined for any draw.
    """
    defined = values[~np.isnan(values)]
    if not len(defined):
        raise DataError(
            "the score is not defined in any bootstrap resample", expected="rows of several classes"
        )
    low, high = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))
