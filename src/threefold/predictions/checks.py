"""Check arrays of probabilities and labels before anything is computed from them."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError

SUM_TOLERANCE: Final = 1e-3
"""Largest allowed distance of a row's sum from 1. Sums of float16 softmax outputs stay below it."""

FLOOR: Final = 1e-7
"""Smallest probability passed to a logarithm: a miss at probability 0 costs 16.1, not infinity.

Votes give exact zeros."""

_SOFTMAX_HINT = "apply softmax to logits first"


def check_probs(probs: npt.ArrayLike, ndim: int) -> np.ndarray:
    """Check probabilities and return them as a floating-point array.

    Args:
        probs: (n, k) if `ndim` is 2, (m, n, k) if it is 3. Integers and booleans become float32.
        ndim: 2 or 3.

    Raises:
        DataError: the shape is wrong, there are no rows or fewer than two classes, a value is NaN,
            infinite or negative, or a row does not sum to 1.
    """
    array = np.asarray(probs)
    axes = "(members, rows, classes)" if ndim == 3 else "(rows, classes)"
    if array.dtype.kind not in "biuf":
        raise DataError("probabilities must be numbers", got=f"dtype {array.dtype}")
    if array.ndim != ndim or 0 in array.shape or array.shape[-1] < 2:
        raise DataError(
            "probabilities have the wrong shape",
            expected=f"{axes}, at least two classes",
            got=array.shape,
        )
    if array.dtype.kind != "f":
        array = array.astype(np.float32)
    if _is_clean(array):
        return array
    if not np.isfinite(array).all():
        raise DataError(
            "probabilities are NaN or infinite", where=_first_index(~np.isfinite(array))
        )
    if array.min() < 0:
        raise DataError(
            "probabilities are negative", where=_first_index(array < 0), fix=_SOFTMAX_HINT
        )
    sums = array.sum(-1, dtype=np.float64)
    off = np.abs(sums - 1) > SUM_TOLERANCE
    if off.any():
        raise DataError(
            "probabilities of a row do not sum to 1",
            where=_first_index(off),
            got=f"{sums[off][0]:.4g}",
            fix=_SOFTMAX_HINT,
        )
    return array


def _is_clean(array: np.ndarray) -> bool:
    """Whether a quick check finds nothing wrong; takes a third of the time of the full checks.

    NaN and infinity fail both comparisons.
    """
    wide = array if array.dtype != np.float16 else array.astype(np.float32)
    sums = wide @ np.ones(array.shape[-1], wide.dtype)
    return bool(array.min() >= 0 and np.abs(sums - 1).max() < SUM_TOLERANCE / 2)


def check_labels(labels: npt.ArrayLike, n: int, k: int) -> np.ndarray:
    """Check that labels are n class numbers in 0..k-1 and return them as int64 (n,).

    Raises:
        DataError: the shape is wrong, or labels are not integers or out of range.
    """
    array = np.asarray(labels)
    if array.shape != (n,):
        raise DataError(
            "labels have the wrong shape", expected=f"({n},), one per row", got=array.shape
        )
    if array.dtype.kind not in "iu":
        raise DataError(
            "labels must be class numbers", expected="an integer array", got=f"dtype {array.dtype}"
        )
    bad = (array < 0) | (array >= k)
    if bad.any():
        raise DataError(
            "labels are out of range",
            where=_first_index(bad),
            expected=f"0 to {k - 1}",
            got=array[bad][0],
        )
    return array.astype(np.int64)


def _first_index(mask: np.ndarray) -> str:
    """Position of the first True, for a message."""
    position = tuple(int(i) for i in np.unravel_index(int(np.argmax(mask)), mask.shape))
    return f"index {position if len(position) > 1 else position[0]}"
