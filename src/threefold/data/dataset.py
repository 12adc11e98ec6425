"""Data sets: images with labels, ids, groups and folds, whatever source they come from.

`load.load_data` reads those of a recipe. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from threefold.data.images import BadImage, decode, measure
from threefold.data.label_counts import make_targets
from threefold.data.same_content import content_hash
from threefold.data.sources.folder import (
    EncodedImages,
    FilePaths,
    ImageArrays,
    ListedImage,
    contents_of,
)
from threefold.data.unchanged import DIGEST, decode_unchanged
from threefold.errors import DataError, shorten
from threefold.names import find_repeated


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images with labels; everything except the pixels is in memory.

    Attributes:
        images: image files, encoded images of a table, or uint8 pixels (n, h, w) or (n, h, w, 3).
        labels: (n,) int64 class number of each image; -1 for all where none has a label, or where
            images have any number of labels.
        ids: unique name of each image; sources list rows in ascending order of the ids.
        classes: class names; a label is an index into them.
        groups: group of each image, or None; grouped folds never split a group.
        folds: the user's own fold of each image, or None.
        targets: (n, k) uint8, 1 where an image has a label; None where each image has one class.
        digests: (n,) S16, the first bytes of the SHA-256 of each encoded image; None = unknown.

    Raises:
        DataError: lengths differ, ids repeat, or a label has no class.
    """

    images: Sequence[Path] | EncodedImages | NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None = None
    folds: tuple[str, ...] | None = None
    targets: NDArray[np.uint8] | None = None
    digests: NDArray[np.bytes_] | None = None

    def __post_init__(self) -> None:
        lengths = [len(self.images), len(self.labels), len(self.ids)]
        lengths += [len(names) for names in (self.groups, self.folds) if names is not None]
        if len(set(lengths)) > 1:
            raise DataError(
                "images, labels, ids, groups and folds differ in number",
                got=", ".join(map(str, lengths)),
            )
        if len(set(self.ids)) < len(self.ids):
            repeated = find_repeated(self.ids)
            raise DataError("ids are not unique", got=shorten(repeated))
        if self.targets is not None and self.targets.shape != (len(self), len(self.classes)):
            raise DataError(
                "targets do not fit images and labels",
                expected=(len(self), len(self.classes)),
                got=self.targets.shape,
            )
        if not len(self.labels):
            return
        low, high = self.labels.min(), self.labels.max()
        is_unlabelled = low == high == -1
        if (low < 0 and not is_unlabelled) or high >= len(self.classes):
            raise DataError(
                "labels do not fit the classes",
                expected=f"0 to {len(self.classes) - 1}",
                got=f"{low} to {high}",
            )

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def is_multilabel(self) -> bool:
        """Whether an image has any number of labels, and not one class."""
        return self.targets is not None

    @property
    def truth(self) -> NDArray[Any]:
        """What a network learns: labels (n,), or targets (n, k)."""
        return self.labels if self.targets is None else self.targets

    def label_names(self, i: int) -> tuple[str, ...]:
        """Return the names of the labels of image i."""
        if self.targets is None:
            return (self.classes[self.labels[i]],) if self.labels[i] >= 0 else ()
        return tuple(self.classes[j] for j in np.flatnonzero(self.targets[i]))

    def subset(self, rows: ArrayLike) -> ImageDataset:
        """Return the images at these positions, in this order."""
        positions = np.arange(len(self))[np.asarray(rows)]
        images: Sequence[Path] | EncodedImages | NDArray[np.uint8]
        if isinstance(self.images, np.ndarray):
            images = self.images[positions]
        elif isinstance(self.images, EncodedImages | FilePaths):
            images = self.images.take(positions)
        else:
            images = tuple(self.images[i] for i in positions)
        return replace(
            self,
            images=images,
            labels=self.labels[positions],
            ids=tuple(self.ids[i] for i in positions),
            groups=None if self.groups is None else tuple(self.groups[i] for i in positions),
            folds=None if self.folds is None else tuple(self.folds[i] for i in positions),
            targets=None if self.targets is None else self.targets[positions],
            digests=None if self.digests is None else self.digests[positions],
        )

    def pixels(self, i: int) -> NDArray[np.uint8]:
        """Return image i as uint8 (h, w, 3); files are decoded on each call.

        Raises:
            DataError: the file can no longer be read, or was changed since it was verified.
        """
        if not isinstance(self.images, np.ndarray):
            image = self.images[i]
            if self.digests is None or not self.digests[i]:
                return decode(image)
            where = image if isinstance(image, Path) else self.ids[i]
            return decode_unchanged(image, bytes(self.digests[i]), where)
        image = self.images[i]
        return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image.copy()

    def size_of(self, i: int) -> tuple[int, int]:
        """Return the two sides of image i in pixels, in any order, without decoding it.

        Raises:
            DataError: the file can no longer be read.
        """
        image = self.images[i]
        if isinstance(image, np.ndarray):
            return image.shape[0], image.shape[1]
        try:
            return measure(image.read_bytes() if isinstance(image, Path) else image)
        except OSError as error:
            raise DataError("cannot read the file", where=image, got=error) from None

    def content_hash(self, i: int) -> str:
        """Return 32 hexadecimal digits of the SHA-256 of image i's file, or of its pixels.

        Of a file that was verified, they are of that time.

        Raises:
            DataError: the file can no longer be read.
        """
        if self.digests is not None and self.digests[i]:
            return bytes(self.digests[i]).ljust(DIGEST, b"\0").hex()
        if not isinstance(self.images, np.ndarray):
            return content_hash(self.images[i])[: 2 * DIGEST]
        image = self.images[i]
        return content_hash(repr(image.shape).encode() + image.tobytes())[: 2 * DIGEST]

    def all_digests(self) -> NDArray[np.uint8]:
        """Return the first bytes of every `content_hash`, (n, 16)."""
        content = b"".join(bytes.fromhex(self.content_hash(i)) for i in range(len(self)))
        return np.frombuffer(content, np.uint8).reshape(-1, DIGEST)


@dataclass(frozen=True)
class Sources:
    """The images that a recipe's `data` table names."""

    train: ImageDataset
    """Rows for the folds."""
    test: ImageDataset | None
    """Rows that are opened once, at the end."""
    notes: tuple[str, ...]
    """Sentences for the report: what was joined or ignored."""
    skipped: tuple[BadImage, ...]
    """Files left out because `bad_images` is "skip"."""
    warnings: tuple[str, ...] = ()
    """Sentences for the report: what makes scores too optimistic."""
    unlabelled: ImageDataset | None = None
    """Images for pseudo labels; see `unlabelled.with_unlabelled`."""

    def part(self, split: str) -> ImageDataset:
        """Return the images of a split that exists: train, test or unlabelled."""
        dataset = {"train": self.train, "test": self.test, "unlabelled": self.unlabelled}[split]
        assert dataset is not None
        return dataset

    @property
    def num_images(self) -> int:
        """Number of training and test images."""
        return len(self.train) + (0 if self.test is None else len(self.test))


def make_dataset(
    items: list[ListedImage],
    classes: tuple[str, ...],
    group_regex: str,
    encoded: EncodedImages | None,
) -> ImageDataset:
    """Make a data set of listed images; a DataError names an id that `group_regex` misses."""
    ids = tuple(item.id for item in items)
    number = {name: label for label, name in enumerate(classes)}
    listed = tuple(item.group for item in items if item.group is not None)
    folds = tuple(item.fold for item in items if item.fold is not None)
    if any(item.labels is not None for item in items):
        labels = np.full(len(items), -1)
        targets = make_targets([item.labels or () for item in items], classes)
    else:
        labels = np.array([number[item.label] for item in items], dtype=np.int64)
        targets = None
    return ImageDataset(
        images=contents_of(items, encoded) or FilePaths([item.path for item in items]),
        labels=labels,
        ids=ids,
        classes=classes,
        groups=listed or _groups(ids, group_regex),
        folds=folds or None,
        targets=targets,
    )


def _groups(ids: Sequence[str], pattern: str) -> tuple[str, ...] | None:
    """Return the group of each id: the first group of the match, or the whole match."""
    if not pattern:
        return None
    regex = re.compile(pattern)
    groups = []
    for name in ids:
        match = regex.search(name)
        group = match.group(1 if regex.groups else 0) if match else None
        if not group:
            raise DataError(
                "data.group_regex does not match", where=name, expected=f"a match of {pattern}"
            )
        groups.append(group)
    return tuple(groups)


def arrays_dataset(
    part: ImageArrays, classes: tuple[str, ...], group_regex: str = ""
) -> ImageDataset:
    """Make a data set of a part that holds pixels."""
    groups = _groups(part.ids, group_regex)
    if part.labels.ndim == 1:
        return ImageDataset(part.images, part.labels, part.ids, classes, groups)
    labels, targets = np.full(len(part.ids), -1), part.labels.astype(np.uint8)
    return ImageDataset(part.images, labels, part.ids, classes, groups, targets=targets)
