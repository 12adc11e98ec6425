"""Arrays that are read from the disk row by row; a file that is cut short is an error, no death."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from threefold.training.stored_array import StoredArray

VALUES = np.arange(20 * 3000, dtype=np.float16).reshape(20, 3, 1000)


def write(folder: Path) -> Path:
    """Write an array of several pages."""
    np.save(folder / "a.npy", VALUES)
    return folder / "a.npy"


@pytest.mark.parametrize("rows", [[], [0], [3, 4, 5, 19], [19, 0, 0, 7, 8], [*range(20)]], ids=str)
def test_rows_are_those_of_the_array(tmp_path: Path, rows: list[int]) -> None:
    file = StoredArray(write(tmp_path))

    found = file.read(np.array(rows, int))

    assert file.shape == VALUES.shape
    assert found.dtype == VALUES.dtype
    np.testing.assert_array_equal(found, VALUES[np.array(rows, int)])


def test_a_file_cut_short_while_open_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path)
    file = StoredArray(path)
    os.truncate(path, path.stat().st_size // 2)

    with pytest.raises(ValueError, match="cut short"):
        file.read(np.arange(20))

    np.testing.assert_array_equal(file.read(np.arange(5)), VALUES[:5])


def test_a_deleted_file_is_read_to_its_end(tmp_path: Path) -> None:
    path = write(tmp_path)
    file = StoredArray(path)
    if os.name == "nt":
        pytest.skip("Windows refuses to delete it")
    path.unlink()

    np.testing.assert_array_equal(file.read(np.arange(20)), VALUES)


@pytest.mark.parametrize("row", [-1, 20])
def test_a_row_beyond_the_array_is_an_error(tmp_path: Path, row: int) -> None:
    with pytest.raises(ValueError, match="20 rows"):
        StoredArray(write(tmp_path)).read(np.array([row]))


def test_what_is_no_array_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "fortran.npy", np.asfortranarray(VALUES[0]))
    (tmp_path / "text.npy").write_text("text")

    for name in ("fortran.npy", "text.npy"):
        with pytest.raises(ValueError, match=r"C order|magic"):
            StoredArray(tmp_path / name)
