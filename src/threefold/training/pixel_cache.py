"""The image cache of a run: every image decoded once, as a uint8 square.

The resize is the one that the exported pipeline contains. Beside a file of squares is its SHA-256,
written after it: a file that a killed process left, or that was changed since, is made again.
Training reads its batches from the file, so that the images may be more than the memory holds.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.splits import Roles
from threefold.errors import RunError
from threefold.files import (
    delete_leftovers,
    one_at_a_time,
    read_text,
    sha256,
    temporary_path,
    write_bytes,
)
from threefold.machine import decoding_threads
from threefold.models.pipeline import ImageRows
from threefold.models.views import Views
from threefold.recipe.schema import MemberSpec
from threefold.training.squares import SquareForm, Squares
from threefold.training.stored_array import StoredArray

CHUNK = 32
"""Images decoded at a time: enough to resize in batches, few enough for large photographs."""


class StoredPixels:
    """Rows of files of squares, read from the disk when they are indexed.

    Each read opens its file anew, and no file is mapped: one that is cut short is an error.

    Args:
        parts: files of squares (N, s, s, 3) uint8, all of one side, and the (n,) row numbers to
            take of each, in order.

    Attributes:
        shape: (n, s, s, 3), with the rows of all parts.
    """

    def __init__(self, parts: Sequence[tuple[Path, np.ndarray]]) -> None:
        self.parts = tuple(parts)
        count = sum(len(rows) for _, rows in parts)
        with _in_use(parts[0][0]):
            self.shape: tuple[int, ...] = (count, *StoredArray(parts[0][0]).shape[1:])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """Read a slice, or rows by their (m,) numbers: uint8 (m, s, s, 3)."""
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        pixels = np.empty((len(index), *self.shape[1:]), np.uint8)
        begin = 0
        for path, rows in self.parts:
            inside = (index >= begin) & (index < begin + len(rows))
            if inside.any():
                pixels[inside] = _read(path, rows[index[inside] - begin])
            begin += len(rows)
        return pixels

    def __iter__(self) -> Iterator[np.ndarray]:
        """Yield every image, uint8 (s, s, 3)."""
        for begin in range(0, len(self), CHUNK):
            yield from self[begin : begin + CHUNK]


def join_rows(first: ImageRows, second: ImageRows) -> ImageRows:
    """Return the rows of two files of squares of one side, the first ones first."""
    assert isinstance(first, StoredPixels)
    assert isinstance(second, StoredPixels)
    return StoredPixels([*first.parts, *second.parts])


def slice_rows(pixels: ImageRows, rows: slice) -> ImageRows:
    """Return some rows in a row, from `rows.start` up to `rows.stop`; none is read yet."""
    if rows == slice(0, len(pixels)):
        return pixels
    if not isinstance(pixels, StoredPixels):
        part: np.ndarray = pixels[rows]
        return part
    parts: list[tuple[Path, np.ndarray]] = []
    begin = 0
    for path, numbers in pixels.parts:
        inside = numbers[max(0, rows.start - begin) : max(0, rows.stop - begin)]
        if len(inside) or not parts:
            parts.append((path, inside))
        begin += len(numbers)
    return StoredPixels(parts)


class PixelRows(NamedTuple):
    """Some rows of a data set."""

    pixels: ImageRows
    """(n, s, s, 3) uint8."""
    labels: np.ndarray
    """(n,) int64, or (n, k) zeros and ones where images have any number of labels."""


def file_name(split: str, spec: MemberSpec, side: int) -> str:
    """Name the file of a split's squares of one side, as a member has them resized."""
    return f"{split}-{spec.resize}-{side}.npy"


class PixelCache:
    """Uint8 squares of every image, one file for each size in use.

    Args:
        sources: the images.
        views: the test-time views of a member, whose canvas is another size.
        folder: where the files go.
        squares: reads the images; None = each is decoded.
    """

    def __init__(
        self,
        sources: Sources,
        views: Callable[[MemberSpec], Views],
        folder: Path,
        squares: Squares | None = None,
    ) -> None:
        self.sources, self.views, self.folder = sources, views, folder
        self.squares = squares or Squares()
        self._known: set[Path] = set()
        self._keys: dict[str, str] = {}

    def rows(
        self, split: str, spec: MemberSpec, rows: np.ndarray, views: bool = False, side: int = 0
    ) -> PixelRows:
        """Return some rows of a split, whose pixels are read when they are indexed.

        Args:
            split: train, test or unlabelled.
            spec: the member that sees them.
            rows: (n,) row numbers.
            views: resize to the canvas of the member's views instead of its img_size.
            side: resize to this side instead; 0 = as above.
        """
        dataset = self.sources.part(split)
        side = side or (self.views(spec).canvas if views else spec.img_size)
        path = self.folder / file_name(split, spec, side)
        if path not in self._known or not path.exists():
            key = self._key(split)
            with one_at_a_time(path.with_suffix(".lock")):
                if not _is_intact(path, key):
                    _fill(path, dataset, SquareForm(side, spec.resize), key, self.squares)
            self._known.add(path)
        return PixelRows(StoredPixels([(path, np.asarray(rows))]), dataset.truth[rows])

    def _key(self, split: str) -> str:
        """SHA-256 of the contents of a split's images, so that squares of others are not used."""
        if split not in self._keys:
            contents = self.sources.part(split).all_digests().tobytes()
            self._keys[split] = hashlib.sha256(contents).hexdigest()
        return self._keys[split]

    def labels(self, rows: np.ndarray) -> PixelRows:
        """Return training rows without their pixels (n, 0, 0, 3), for stages that have no use."""
        return PixelRows(np.zeros((len(rows), 0, 0, 3), np.uint8), self.sources.train.truth[rows])

    def select(self, spec: MemberSpec, roles: Roles) -> PixelRows:
        """Return the rows that checkpoints are chosen on.

        These are the fold's select rows, or the test split where the paper protocol has no folds.

        Raises:
            RunError: there are neither.
        """
        split, rows = select_rows(self.sources, roles)
        return self.rows(split, spec, rows)

    def remove(self) -> None:
        """Delete the cache, which only training needs; what cannot be deleted stays."""
        if not self.folder.is_dir():
            return
        delete_leftovers(self.folder)
        for pattern in ("*.npy", "*.sha256", "*.lock"):
            for path in self.folder.glob(pattern):
                with suppress(OSError):
                    path.unlink()
        with suppress(OSError):  # other files are in it
            self.folder.rmdir()


def select_rows(sources: Sources, roles: Roles) -> tuple[str, np.ndarray]:
    """Return split and row numbers of what a fold's choices are made on.

    These are its select rows, or the test split where the paper protocol has no folds.

    Raises:
        RunError: there are neither.
    """
    if len(roles.select):
        return "train", roles.select
    if sources.test is None:
        raise RunError(
            "nothing to choose checkpoints on",
            where="folds.k = 1",
            expected="a test split, or folds.k >= 2",
        )
    return "test", np.arange(len(sources.test))


def _read(path: Path, rows: np.ndarray) -> np.ndarray:
    """Read some rows of a file of squares, by their numbers."""
    with _in_use(path):
        return StoredArray(path).read(rows)


@contextmanager
def _in_use(path: Path) -> Iterator[None]:
    """Say that a file of squares was removed or changed while it is in use.

    Raises:
        RunError: it was.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise RunError(
            "the image cache was removed or changed while it is in use",
            where=path,
            got=error,
            fix="run the same command again, which makes it anew",
        ) from None


def _is_intact(path: Path, key: str) -> bool:
    """Whether a file of squares is as another process finished it, of the same images."""
    with suppress(OSError, ValueError):
        return read_text(path.with_suffix(".sha256")) == f"{sha256(path)} {key}"
    return False


def _fill(path: Path, dataset: ImageDataset, form: SquareForm, key: str, squares: Squares) -> None:
    """Write the squares of every image, of contents with this key, into one .npy file."""
    side = form.side
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".sha256").unlink(missing_ok=True)
        with (
            open(temporary, "wb") as file,
            ThreadPoolExecutor(decoding_threads()) as pool,
        ):
            shape = (len(dataset), side, side, 3)
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            _reserve(file, math.prod(shape))
            for rows in np.array_split(np.arange(len(dataset)), max(1, len(dataset) // CHUNK)):
                file.write(squares.read(dataset, rows.tolist(), [form], pool)[form].data)
            squares.save()
            file.flush()
            os.fsync(file.fileno())
        digest = sha256(temporary)
        os.replace(temporary, path)
        write_bytes(path.with_suffix(".sha256"), f"{digest} {key}".encode())
    except BaseException as error:  # a signal may come at any moment, too
        with suppress(OSError):
            temporary.unlink()
        if not isinstance(error, OSError):
            raise
        megabytes = len(dataset) * side * side * 3 / 1e6
        raise RunError(
            "cannot write the image cache",
            where=path,
            got=error,
            fix=f"it needs {megabytes:.0f} MB: free disk space or choose another --out",
        ) from None


def _reserve(file: IO[bytes], size: int) -> None:
    """Reserve the bytes that follow, so that a full disk is found before images are decoded.

    The bytes are written, and not mapped: a disk that fills up under a memory map kills.

    Raises:
        OSError: the disk has no room for them.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, file.tell() + size)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            raise  # not every file system can reserve
