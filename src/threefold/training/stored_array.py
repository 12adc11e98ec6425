"""Rows of a .npy file, read from the disk and never mapped into memory.

A file that is cut short under a memory map kills the process (SIGBUS), with no error to catch. A
read says so, and leaves no pages in the process.
"""

from __future__ import annotations

import threading
import weakref
from io import FileIO
from pathlib import Path

import numpy as np

from threefold.files import check_regular
from threefold.npz_files import read_into


class StoredArray:
    """An array on the disk, of which some rows are read at a time.

    The file stays open as long as this object lives; so it can be read although it was deleted.

    Args:
        path: a .npy file of plain numbers, in C order.

    Attributes:
        shape: of the array (n, ...).

    Raises:
        OSError: it cannot be read, or is no regular file.
        ValueError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        check_regular(path)
        self.path = path
        self._file, self._lock = FileIO(path), threading.Lock()
        weakref.finalize(self, self._file.close)
        if np.lib.format.read_magic(self._file) != (1, 0):
            raise ValueError("another version of the format")
        header = np.lib.format.read_array_header_1_0(self._file)
        self.shape: tuple[int, ...] = header[0]
        self._dtype, self._begin = header[2], self._file.tell()
        if header[1] or self._dtype.hasobject or not self.shape:
            raise ValueError("no array of plain numbers in C order")

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read some rows by their (m,) numbers; neighbours at once.

        Returns:
            An array (m, ...).

        Raises:
            OSError: the file cannot be read.
            ValueError: it was cut short, or has no such row.
        """
        values = np.empty((len(rows), *self.shape[1:]), self._dtype)
        if not values.size:
            return values
        if rows.min() < 0 or rows.max() >= self.shape[0]:
            raise ValueError(f"the file has {self.shape[0]} rows")
        size = values[0].nbytes
        begins = np.flatnonzero(np.diff(rows, prepend=rows[0] - 2) != 1).tolist()
        with self._lock:
            for begin, end in zip(begins, [*begins[1:], len(rows)], strict=True):
                self._file.seek(self._begin + int(rows[begin]) * size)
                read_into(values[begin:end], self._file)
        return values
