"""Arrays as .npz files without pickle."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

import numpy as np

from threefold.errors import DamagedFileError, is_out_of_memory, out_of_memory
from threefold.files import check_regular, unreadable, write_bytes

_PIECE: Final = 1 << 22
"""Bytes of an array that are read at a time."""


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed .npz file, without pickle."""
    write_bytes(path, array_bytes(**arrays))


def array_bytes(**arrays: np.ndarray) -> bytes:
    """Return the content of a file of `write_arrays`."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read_into(values: np.ndarray, file: Any) -> None:
    """Fill an array with the next bytes of a file, which may give them in pieces.

    Args:
        values: in C order.
        file: has `readinto`. Some kinds make a copy of what they read, so it is asked for little at
            a time.

    Raises:
        ValueError: the file ends before.
        OSError: it cannot be read.
    """
    if not values.nbytes:
        return
    left = values.reshape(-1).view(np.uint8).data
    while left:
        count = file.readinto(left[:_PIECE])
        if not count:
            raise ValueError("the file is cut short")
        left = left[count:]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read an .npz file written by `write_arrays`; object arrays are refused.

    Raises:
        DamagedFileError: the file is missing or damaged.
        RunError: the file cannot be read, or does not fit into memory.
    """
    try:
        check_regular(path)
        # numpy would leave a file open that it cannot read.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise unreadable("cannot read arrays", path, error) from None
    except Exception as error:
        if is_out_of_memory(error):
            raise out_of_memory(path, error) from None
        raise DamagedFileError(
            "cannot read arrays", where=path, got=f"{type(error).__name__}: {str(error)[:120]}"
        ) from None
