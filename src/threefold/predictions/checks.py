"""Check arrays of probabilities and labels before anything is computed from them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from threefold.errors import DataError
from threefold.scratch import converted, row_blocks

SUM_TOLERANCE: Final = 1e-3
"""Largest allowed distance of a row's sum from 1. Sums of float16 softmax outputs stay below it."""

FLOOR: Final = 1e-7
"""Smallest probability passed to a logarithm: a miss at probability 0 costs 16.1, not infinity.

Votes give exact zeros."""


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
        array = converted(array, np.float32)
    if is_clean(array):
        return array
    if not all(np.isfinite(block).all() for _, block in _blocks(array)):
        raise DataError(
            "probabilities are NaN or infinite", where=_first_index(~np.isfinite(array))
        )
    off = find_unsuitable(array)
    if off.any():
        members = array if ndim == 3 else array[None]
        first = tuple(int(i) for i in np.argwhere(off)[0])
        member, row = first if ndim == 3 else (0, *first)
        what, got, fix = describe_unsuitable(members, member, row)
        raise DataError(
            what, where=_first_index(off), expected="rows that sum to 1", got=got, fix=fix
        )
    return array


def _blocks(array: np.ndarray) -> Iterator[tuple[tuple[Any, slice], np.ndarray]]:
    """Yield blocks of rows of an array (..., n, k), with their place in an array (..., n)."""
    *members, n, k = array.shape
    for rows in row_blocks(n, math.prod(members) * k):
        yield (..., rows), array[..., rows, :]


def is_clean(probs: np.ndarray) -> bool:
    """Whether a quick check of (..., n, k) finds nothing wrong; takes a third of the full check.

    NaN and infinity fail both comparisons.
    """
    wide = np.float32 if probs.dtype == np.float16 else probs.dtype
    ones = np.ones(probs.shape[-1], wide)
    for _, block in _blocks(probs):
        with np.errstate(invalid="ignore"):  # BLAS may leave the flag behind, whatever it is given
            sums = block.astype(wide, copy=False) @ ones
        if not (block.min() >= 0 and np.abs(sums - 1).max() < SUM_TOLERANCE / 2):
            return False
    return True


def find_unsuitable(probs: np.ndarray) -> np.ndarray:
    """Find rows of finite numbers (..., k) that are no probabilities; returns bool (...)."""
    unsuitable = np.empty(probs.shape[:-1], bool)
    for place, block in _blocks(probs):
        sums = block.sum(-1, dtype=np.float64)
        unsuitable[place] = (np.abs(sums - 1) > SUM_TOLERANCE) | (block < 0).any(-1)
    return unsuitable


def describe_unsuitable(
    probs: np.ndarray, member: int, row: int, names: tuple[str, ...] | None = None
) -> tuple[str, str, str]:
    """Describe a row that is no probabilities, and guess from all numbers what they are.

    Args:
        probs: (m, n, k).
        member: the member of the row.
        row: the row.
        names: k names of the columns, if they are known.

    Returns:
        What is wrong, the row's first numbers and their sum, and advice.
    """
    values = np.asarray(probs[member, row], np.float64)
    if _is_transposed(probs):
        what = "the axes are swapped: each column sums to 1 in place of each row"
        fix = "save the transpose: one row per image, one column per class"
    else:
        what, fix = _diagnose(values, names)
    shown = ", ".join(f"{value:.4g}" for value in values[:4])
    more = ", ..." if len(values) > 4 else ""
    return what, f"{shown}{more} with sum {values.sum():.4g}", fix


def _is_transposed(probs: np.ndarray) -> bool:
    sums = probs.sum(-2, dtype=np.float64)
    return bool((probs >= 0).all() and (np.abs(sums - 1) < SUM_TOLERANCE).all())


def _diagnose(row: np.ndarray, names: tuple[str, ...] | None) -> tuple[str, str]:
    """Guess what numbers that do not sum to 1 are, and suggest a fix."""
    total = row.sum()
    not_negative = (row >= 0).all()
    if not_negative and abs(total - 100) < 1:
        return "these are percentages", "divide by 100"
    if (row <= 0).all() and abs(np.exp(row).sum() - 1) < 0.01:
        return "these are logarithms of probabilities", "apply exp first"
    prefixes = [name.split(":", 1)[0] for name in names or () if ":" in name]
    if len(prefixes) == len(row) and len(set(prefixes)) == round(total) > 1:
        return (
            "the columns are those of several members",
            "write one row per id and member, with a column `member`",
        )
    if not_negative and abs(total - 1) < 0.05:
        if _is_bfloat16(row):
            return (
                "probabilities of a row do not sum to 1: they have the precision of bfloat16",
                "compute the softmax in float32: logits.float().softmax(-1)",
            )
        return (
            "probabilities of a row do not sum to 1",
            "write at least 5 digits, and one column for every class",
        )
    if not_negative and (row <= 1).all():
        fix = "of sigmoid outputs save softmax(logits) in place of sigmoid(logits)"
        if total < 1:
            fix = f"save all classes, not only the most likely ones; {fix}"
        return "probabilities of a row do not sum to 1 (sigmoid outputs?)", fix
    return (
        "these are not probabilities (logits?)",
        "apply softmax first; every column without a meaning of its own is a class",
    )


def _is_bfloat16(row: np.ndarray) -> bool:
    """Whether every number fits bfloat16, the upper half of a float32."""
    return not (row.astype(np.float32).view(np.uint32) & 0xFFFF).any()


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


def check_sigmoids(probs: npt.ArrayLike, ndim: int) -> np.ndarray:
    """Check independent probabilities, as of sigmoids, and return them as floating-point array.

    Args:
        probs: (n, k) if `ndim` is 2, (m, n, k) if it is 3. Integers and booleans become float32.
        ndim: 2 or 3.

    Raises:
        DataError: the shape is wrong, there are no rows or labels, or a value is NaN or outside
            0 to 1.
    """
    array = np.asarray(probs)
    axes = "(members, rows, labels)" if ndim == 3 else "(rows, labels)"
    if array.dtype.kind not in "biuf":
        raise DataError("probabilities must be numbers", got=f"dtype {array.dtype}")
    if array.ndim != ndim or 0 in array.shape:
        raise DataError("probabilities have the wrong shape", expected=axes, got=array.shape)
    if array.dtype.kind != "f":
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise DataError(
            "probabilities are NaN or infinite", where=_first_index(~np.isfinite(array))
        )
    off = (array < 0) | (array > 1)
    if off.any():
        raise DataError(
            "probabilities are outside 0 to 1 (logits?)",
            where=_first_index(off),
            got=f"{array[off][0]:.4g}",
            fix="apply the sigmoid first; divide percentages by 100",
        )
    return array


def check_targets(targets: npt.ArrayLike, n: int, k: int) -> np.ndarray:
    """Check that targets are zeros and ones (n, k) and return them as uint8.

    Raises:
        DataError: the shape is wrong, or a value is neither 0 nor 1.
    """
    array = np.asarray(targets)
    if array.shape != (n, k):
        raise DataError(
            "targets have the wrong shape",
            expected=f"({n}, {k}), one row per image and one column per label",
            got=array.shape,
        )
    if array.dtype.kind not in "biuf":
        raise DataError("targets must be numbers", expected="0 and 1", got=f"dtype {array.dtype}")
    bad = (array != 0) & (array != 1)
    if bad.any():
        raise DataError(
            "targets are not 0 and 1", where=_first_index(bad), got=f"{array[bad][0]:.4g}"
        )
    return array.astype(np.uint8)
