"""The decoded-once cache: every image as a uint8 square, made by the resize that the exported pipeline has inside."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from threefold.datasets import ImageDataset, Sources
from threefold.errors import RunError
from threefold.models__resize import resize_square
from threefold.models__views import Views
from threefold.recipe_schema import MemberSpec
from threefold.splits import Roles

CHUNK = 32
"""Images decoded at a time: enough to resize small ones together, few enough for large photographs to fit in memory."""


class Pixels:
    """The decoded-once cache: every image as a uint8 square of each size in use, on disk, memory-mapped."""

    def __init__(
        self, sources: Sources, views: Callable[[MemberSpec], Views], folder: Path
    ) -> None:
        self.sources, self.views, self.folder = sources, views, folder

    def rows(
        self, split: str, spec: MemberSpec, rows: np.ndarray, views: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pixels uint8 (r, s, s, 3) and labels (r,) of some rows, at the training size or at the views' canvas."""
        dataset = self.sources.train if split == "train" else self.sources.test
        assert dataset is not None
        side = self.views(spec).canvas if views else spec.img_size
        return np.asarray(self._array(split, dataset, side, spec.resize)[rows]), dataset.labels[
            rows
        ]

    def select(self, spec: MemberSpec, roles: Roles) -> tuple[np.ndarray, np.ndarray]:
        """The rows that checkpoints are chosen on: the fold's, or the test split where the paper protocol has no folds."""
        if len(roles.select):
            return self.rows("train", spec, roles.select)
        test = self.sources.test
        if test is None:
            raise RunError(
                "nothing to choose checkpoints on",
                where="folds.k = 1",
                expected="a test split, or folds.k >= 2",
            )
        return self.rows("test", spec, np.arange(len(test)))

    def _array(self, split: str, dataset: ImageDataset, side: int, resize: Any) -> np.ndarray:
        path = self.folder / f"{split}-{resize}-{side}.npy"
        if not path.exists():
            _fill_cache(path, dataset, side, resize)
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return array

    def remove(self) -> None:
        """Delete the cache; it is only needed while jobs are to be done."""
        for path in self.folder.glob("*.npy") if self.folder.is_dir() else ():
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def _fill_cache(path: Path, dataset: ImageDataset, side: int, resize: Any) -> None:
    """Decode and resize every image into one .npy, by the same resize that the exported pipeline has inside."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp.npy")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, (len(dataset), side, side, 3))
        _reserve(temporary)
        for rows in np.array_split(np.arange(len(dataset)), max(1, len(dataset) // CHUNK)):
            _resize_rows(array, dataset, rows, side, resize)
        array.flush()
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise RunError(
            "cannot write the image cache",
            where=path,
            got=error.strerror or error,
            fix=f"it needs {len(dataset) * side * side * 3 / 1e6:.0f} MB: free disk space or choose another --out",
        ) from None


def _reserve(path: Path) -> None:
    """Claim a sparse file's space now: a disk that fills up under a memory map kills the process, here it is an error."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _resize_rows(
    array: np.ndarray, dataset: ImageDataset, rows: np.ndarray, side: int, resize: Any
) -> None:
    """Decode some rows and resize those of one shape together; an image's result does not depend on its company."""
    by_shape: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
    for row in rows:
        image = dataset.pixels(int(row))
        by_shape.setdefault(image.shape, []).append((int(row), image))
    for group in by_shape.values():
        images = torch.from_numpy(np.stack([image for _, image in group]))
        squares = resize_square(images, side, resize).permute(0, 2, 3, 1).to(torch.uint8).numpy()
        array[[row for row, _ in group]] = squares
