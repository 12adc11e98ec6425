"""Arrays larger than memory: in temporary files that are mapped, and worked on by blocks of rows.

Probabilities of many images and classes do not fit in memory as often as they are needed. An array
above SPILL_BYTES therefore lies in a temporary file (in the folder that TMPDIR names), which the
system reads and writes as it goes and drops from memory when something else needs the room.
Whoever computes with such arrays does so block by block, so that temporary arrays stay small.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from threefold.errors import RunError

SPILL_BYTES: int = 1 << 26
"""Largest array that is kept in memory as a whole."""

BLOCK_VALUES: int = 1 << 22
"""Numbers in a block of rows; of a block, a few copies are in memory at a time."""

_STEP: Final = 256
"""Blocks of many rows have a multiple of this number of rows.

Kernels of linear algebra then treat each row as they do without blocks."""


def scratch(shape: tuple[int, ...], dtype: npt.DTypeLike = np.float64) -> np.ndarray:
    """Return an array to be filled; a large one lies in a file that is deleted along with it.

    Raises:
        RunError: there is no room for the file.
    """
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    if size <= SPILL_BYTES:
        return np.empty(shape, dtype)
    import tempfile  # exported files are answered without it

    try:
        with tempfile.TemporaryFile() as file:
            _reserve(file.fileno(), size)
            return np.frombuffer(mmap.mmap(file.fileno(), size), dtype).reshape(shape)
    except OSError as error:
        raise RunError(
            "no room for a temporary file",
            where=tempfile.gettempdir(),
            expected=f"{size >> 20} MiB",
            got=error.strerror or error,
            fix="free disk space, or set TMPDIR to a folder on a larger disk",
        ) from None


def _reserve(descriptor: int, size: int) -> None:
    """Give the file its size, with its space on the disk where the system can reserve it.

    A disk that fills up under a memory map kills the process.
    """
    os.truncate(descriptor, size)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise  # not every file system can reserve


def row_blocks(n: int, width: int) -> Iterator[slice]:
    """Yield slices of n rows, each row of `width` numbers, with up to BLOCK_VALUES numbers each."""
    size = max(1, BLOCK_VALUES // max(1, width))
    if size > _STEP:
        size -= size % _STEP
    for begin in range(0, n, size):
        yield slice(begin, min(n, begin + size))


class RowBlock(NamedTuple):
    """Values (..., r) of a block of r rows, contiguous."""

    rows: slice
    values: np.ndarray


def class_blocks(
    n: int, shape: tuple[int, ...], dtype: npt.DTypeLike, width: int
) -> list[RowBlock]:
    """Return an array (*shape, r) to be filled for each block of n rows, all of one scratch array.

    Args:
        n: number of rows.
        shape: what belongs to a row, such as (m, k).
        dtype: of the numbers.
        width: numbers of a row that decide the size of the blocks, see `row_blocks`.
    """
    each = math.prod(shape)
    flat = scratch((n * each,), dtype)
    return [
        RowBlock(rows, flat[rows.start * each : rows.stop * each].reshape(*shape, -1))
        for rows in row_blocks(n, width)
    ]


def top_classes(array: np.ndarray) -> np.ndarray:
    """Return the number of the largest value of each row of (..., n, k), the first one on ties.

    numpy's argmax copies an array that must not be written to, as predictions must not, as a whole.
    """
    *members, n, k = array.shape
    numbers = np.empty((*members, n), np.int64)
    for rows in row_blocks(n, math.prod(members) * k):
        numbers[..., rows] = array[..., rows, :].argmax(-1)
    return numbers


def take_rows(array: np.ndarray, rows: npt.ArrayLike) -> np.ndarray:
    """Return rows (..., r, k) of an array (..., n, k), as `array[..., rows, :]` does.

    Args:
        array: (..., n, k).
        rows: row numbers, or one boolean per row.
    """
    index = np.asarray(rows)
    if index.dtype == np.bool_:
        index = np.flatnonzero(index)
    *members, _, k = array.shape
    taken = scratch((*members, len(index), k), array.dtype)
    for block in row_blocks(len(index), math.prod(members) * k):
        taken[..., block, :] = array[..., index[block], :]
    return taken


def take_members(array: np.ndarray, members: npt.ArrayLike) -> np.ndarray:
    """Return members (s, n, k) of an array (m, n, k), as `array[members]` does."""
    numbers = np.asarray(members)
    taken = scratch((len(numbers), *array.shape[1:]), array.dtype)
    for place, member in enumerate(numbers.tolist()):
        taken[place] = array[member]
    return taken


def take_columns(array: np.ndarray, columns: npt.ArrayLike) -> np.ndarray:
    """Return columns (m, n, c) of an array (m, n, k), as `array[:, :, columns]` does."""
    numbers = np.asarray(columns)
    m, n, k = array.shape
    taken = scratch((m, n, len(numbers)), array.dtype)
    for block in row_blocks(n, m * k):
        taken[:, block] = array[:, block][:, :, numbers]
    return taken


def converted(array: np.ndarray, dtype: npt.DTypeLike) -> np.ndarray:
    """Return an array (..., n, k) of another type; the array itself if it has that type."""
    if array.dtype == dtype:
        return array
    copy = scratch(array.shape, dtype)
    copy[...] = array  # numpy converts in small pieces
    return copy
