"""Images as squares of a network's size; those of large photographs are remembered on disk.

To decode a photograph of twelve megapixels takes longer than several small networks take to answer
it. A plan, the features of a run, every epoch on cached activations and the search for copies read
the same squares, so each photograph is decoded once for each time that new sizes are asked for.
Squares are found by the content of the image. They lie beside the features (`features.store`),
within the same limit; those of one size take at most half of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Final, Literal, NamedTuple

import numpy as np
import torch
from threadpoolctl import ThreadpoolController

from threefold.data.dataset import ImageDataset
from threefold.data.resize import can_resize, resize_pixels
from threefold.errors import RunError
from threefold.models.resize import resize_square
from threefold.recipe.schema import MemberSpec
from threefold.training.features.store import FeatureStore, cache_limit, make_room

VERSION: Final = 1
"""Version of decoding and resize; another one makes stored squares unknown."""

LARGE: Final = 2
"""An image is large if it has so many times the pixels of its square."""

PART: Final = 64
"""Squares in a part of a store: what a killed process loses at most."""


class SquareForm(NamedTuple):
    """How an image becomes a square."""

    side: int
    """Of the square, in pixels."""
    resize: Literal["squash", "crop"]
    """See `models.resize.resize_square`."""


def form_of(spec: MemberSpec) -> SquareForm:
    """Return how a member has its images."""
    return SquareForm(spec.img_size, spec.resize)


class Squares:
    """Squares of images: read from the stores, or decoded and resized.

    Args:
        folder: of the stores; None = nothing is stored.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._stores: dict[SquareForm, _Store] = {}

    def read(
        self,
        dataset: ImageDataset,
        rows: Sequence[int],
        forms: Collection[SquareForm],
        pool: Executor | None = None,
    ) -> dict[SquareForm, np.ndarray]:
        """Return some images in one or more forms; each is decoded at most once.

        Args:
            dataset: the images.
            rows: (n,) row numbers.
            forms: what is wanted of each.
            pool: threads to share the images among; None = one after the other.

        Returns:
            uint8 (n, side, side, 3) for each form.

        Raises:
            DataError: an image can no longer be read, or was changed.
        """
        squares = {form: np.empty((len(rows), form.side, form.side, 3), np.uint8) for form in forms}
        stores, names = {}, list[str]()
        if self.folder is not None and not isinstance(dataset.images, np.ndarray):
            stores = {form: self._store(form, len(dataset)) for form in forms}
            names = [dataset.content_hash(row)[:32] for row in rows]
        lacking: dict[int, list[SquareForm]] = {}
        for form in forms:
            found = stores[form].fill(names, squares[form]) if stores else set()
            for number in range(len(rows)):
                if number not in found:
                    lacking.setdefault(number, []).append(form)

        def make(number: int) -> bool:
            pixels = dataset.pixels(rows[number])
            for form in lacking[number]:
                squares[form][number] = resize_image(pixels, *form)
            height, width = pixels.shape[:2]
            return bool(height * width >= LARGE * max(form.side**2 for form in lacking[number]))

        with one_thread_of_blas():
            are_large = list((pool.map if pool else map)(make, lacking))
        if stores:
            in_use = [store.key for store in self._stores.values()]
            for number, is_large in zip(lacking, are_large, strict=True):
                for form in lacking[number] if is_large else ():
                    stores[form].add(names[number], squares[form][number], in_use)
        return squares

    def save(self) -> None:
        """Write what is still in memory alone."""
        for store in self._stores.values():
            store.save()

    def _store(self, form: SquareForm, count: int) -> _Store:
        if form not in self._stores:
            assert self.folder is not None
            self._stores[form] = _Store(self.folder, form, count)
        return self._stores[form]


class _Store:
    """Stored squares of one form.

    Args:
        folder: of all stores.
        form: of the squares.
        count: of the images in the data set.
    """

    def __init__(self, folder: Path, form: SquareForm, count: int) -> None:
        self.key = f"squares-{VERSION}-{form.resize}-{form.side}"
        self.folder, self.store = folder, FeatureStore(folder, self.key, np.uint8)
        self.store.missing(())
        if self.store.folder.exists():  # most images are small, and leave no store
            self.store.touch()
        self.bytes = 3 * form.side**2 * count
        self._fits: bool | None = None
        self._unsaved: dict[str, np.ndarray] = {}

    def fill(self, names: Sequence[str], squares: np.ndarray) -> set[int]:
        """Read the squares that are known into an array (n, s, s, 3); returns their positions."""
        unsaved = [i for i, name in enumerate(names) if name in self._unsaved]
        for i in unsaved:
            squares[i] = self._unsaved[names[i]]
        stored = [i for i, name in enumerate(names) if name in self.store]
        if not stored:
            return set(unsaved)
        try:
            squares[stored] = self.store.read([names[i] for i in stored])
        except RunError:  # another process has deleted them, to make room
            return set(unsaved)
        return {*unsaved, *stored}

    def add(self, name: str, square: np.ndarray, in_use: Sequence[str]) -> None:
        """Remember a square, if the disk and half of the cache's limit have room for all of them.

        Args:
            name: of the image.
            square: uint8 (s, s, 3).
            in_use: keys of the stores that must stay.
        """
        if self._fits is None:
            limit = cache_limit()
            fits_limit = self.bytes <= limit // 2
            self._fits = fits_limit and make_room(self.folder, self.bytes, limit, in_use)
        if not self._fits:
            return
        self._unsaved[name] = square.copy()
        if len(self._unsaved) >= PART:
            self.save()

    def save(self) -> None:
        """Write what is still in memory alone; what cannot be written is decoded again."""
        if self._unsaved:
            try:
                self.store.write([*self._unsaved], np.stack([*self._unsaved.values()]))
                self.store.touch()
            except RunError:
                self._fits = False
        self._unsaved = {}


def one_thread_of_blas() -> AbstractContextManager[object]:
    """Keep numpy's products to one thread: more of them would wait for those that share images."""
    limit: AbstractContextManager[object] = _thread_pools().limit(limits=1, user_api="blas")
    return limit


@cache
def _thread_pools() -> ThreadpoolController:
    """Return the thread pools of numpy's libraries; to find them takes 3 ms, as ten images do."""
    return ThreadpoolController()


def resize_images(
    images: Sequence[np.ndarray],
    side: int,
    resize: Literal["squash", "crop"],
    pool: Executor | None = None,
) -> np.ndarray:
    """Resize images of any sizes, each to the same pixels as `resize_square` does.

    Args:
        images: uint8 (h, w, 3).
        side: of the result in pixels.
        resize: see `resize_square`.
        pool: threads to share the images among; None = one after the other.

    Returns:
        uint8 (n, side, side, 3).
    """
    squares = np.empty((len(images), side, side, 3), np.uint8)

    def fill(number: int) -> None:
        squares[number] = resize_image(images[number], side, resize)

    with one_thread_of_blas():
        for _ in (pool.map if pool else map)(fill, range(len(images))):
            pass
    return squares


def resize_image(image: np.ndarray, side: int, resize: Literal["squash", "crop"]) -> np.ndarray:
    """Resize an image uint8 (h, w, 3) to uint8 (side, side, 3)."""
    if can_resize(image.shape, side, resize):
        return resize_pixels(image, side, resize)
    batch = torch.from_numpy(image[None].copy())
    square: np.ndarray = resize_square(batch, side, resize)[0].permute(1, 2, 0).byte().numpy()
    return square
