"""Data sets: every source of a recipe ends in an `ImageDataset` here.

The formats are read by `listing` (folders, CSV), `arrays`, `photos` (the paper's data sets) and `tables` (parquet, hub). What cannot be used stops here, with the names of the files; what is left out
by request, and what a careful reader would want to know (duplicates, ignored files), is written down in `Sources`.
Imports no torch.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from threefold.arrays import FASHION_MNIST_ROOT, read_cifar, read_mnist, read_svhn, with_row_ids
from threefold.data__natural_order import natural_key
from threefold.data__published import FASHION_MNIST_CLASSES
from threefold.errors import DataError
from threefold.images import BadImage, check_all, decode, same_content
from threefold.listing import (
    ArrayDataset,
    EncodedImages,
    ListedImage,
    Listing,
    list_csv,
    list_folder,
    shorten,
)
from threefold.photos import list_cassava2020, list_icassava, list_inaturalist, list_surrey
from threefold.recipe_schema import DataSpec
from threefold.tables import list_huggingface, list_parquet


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images with labels; everything but the pixels is in memory.

    Attributes:
        images: image files, image files in a table, or uint8 pixels (n, h, w) or (n, h, w, 3).
        labels: class number of each image (n,) int64.
        ids: unique name of each image; the sources give rows in ascending order of it.
        classes: class names; a label is a position here.
        groups: what must stay together in one fold, for each image; or None.

    Raises:
        DataError: the parts differ in length, ids repeat, or labels have no class.
    """

    images: Sequence[Path] | EncodedImages | NDArray[np.uint8]
    labels: NDArray[np.int64]
    ids: tuple[str, ...]
    classes: tuple[str, ...]
    groups: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        columns = [self.images, self.labels, self.ids] + (
            [] if self.groups is None else [self.groups]
        )
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            raise DataError(
                "images, labels, ids and groups differ in number", got=", ".join(map(str, lengths))
            )
        if len(set(self.ids)) < len(self.ids):
            twice = [name for name, count in Counter(self.ids).items() if count > 1]
            raise DataError("ids are not unique", got=shorten(twice))
        if len(self.labels) and not (
            self.labels.min() >= 0 and self.labels.max() < len(self.classes)
        ):
            raise DataError(
                "labels do not fit the classes",
                expected=f"0 to {len(self.classes) - 1}",
                got=f"{self.labels.min()} to {self.labels.max()}",
            )

    def __len__(self) -> int:
        return len(self.ids)

    def subset(self, rows: ArrayLike) -> ImageDataset:
        """The images at these positions, in this order."""
        at = np.arange(len(self))[np.asarray(rows)]
        return replace(
            self,
            images=self._images(at),
            labels=self.labels[at],
            ids=tuple(self.ids[i] for i in at),
            groups=None if self.groups is None else tuple(self.groups[i] for i in at),
        )

    def _images(self, at: NDArray[np.int64]) -> Sequence[Path] | EncodedImages | NDArray[np.uint8]:
        if isinstance(self.images, np.ndarray):
            return self.images[at]
        return (
            self.images.take(at)
            if isinstance(self.images, EncodedImages)
            else tuple(self.images[i] for i in at)
        )

    def pixels(self, i: int) -> NDArray[np.uint8]:
        """Image i as uint8 (h, w, 3), decoded now where it is a file.

        Raises:
            DataError: the file can no longer be read.
        """
        if not isinstance(self.images, np.ndarray):
            return decode(self.images[i])
        image = self.images[i]
        return np.repeat(image[..., None], 3, axis=2) if image.ndim == 2 else image.copy()


@dataclass(frozen=True)
class Sources:
    """What a recipe's `data` table stands for."""

    train: ImageDataset
    """Rows for the folds."""
    test: ImageDataset | None
    """Rows to be opened once, at the end."""
    notes: tuple[str, ...]
    """Sentences for the report: what was joined, ignored, or is suspicious."""
    skipped: tuple[BadImage, ...]
    """Files left out under `bad_images = "skip"`."""


def load_data(spec: DataSpec, seed: int) -> Sources:
    """Find, verify and label the images of a recipe.

    Every file is decoded once to verify it. `limit_per_class` draws from the training files before that, so the draw
    depends on the seed and the listed files only. Under `bad_images = "skip"`, files that can be read although their
    name promises another format are kept and noted.

    Args:
        spec: the `data` table of a recipe.
        seed: the recipe's seed, for `limit_per_class`.

    Raises:
        DataError: images or labels are missing, unreadable or contradict each other.
    """
    if spec.source == "demo":
        return _from_arrays(_demo(), spec, seed)
    root = spec.root or (FASHION_MNIST_ROOT if spec.source == "fashion-mnist" else "")
    if not root:
        raise DataError(
            "data.root is not set",
            fix="set data.root to a folder of class folders, or to a CSV file",
        )
    if spec.source == "huggingface":
        return _from_files(list_huggingface(root), spec, seed)
    path = Path(root).expanduser()
    decoded: dict[str, Callable[[], ArrayDataset]] = {
        **dict.fromkeys(("mnist", "fashion-mnist"), lambda: read_mnist(path, spec.source)),
        **dict.fromkeys(("cifar10", "cifar100"), lambda: read_cifar(path, spec.source)),
        "svhn": lambda: read_svhn(path, spec.extra),
    }
    if spec.source in decoded:
        return _from_arrays(decoded[spec.source](), spec, seed)
    listed: dict[str, Callable[[], Listing]] = {
        "folder": lambda: list_folder(path),
        "csv": lambda: list_csv(path),
        "parquet": lambda: list_parquet(path),
        "inaturalist2019": lambda: list_inaturalist(path, spec.extra),
        "icassava2019": lambda: list_icassava(path, spec.extra),
        "cassava2020": lambda: list_cassava2020(path),
        "surrey-asl": lambda: list_surrey(path),
    }
    return _from_files(listed[spec.source](), spec, seed)


def _from_files(listing: Listing, spec: DataSpec, seed: int) -> Sources:
    """Verify listed files and give them labels."""
    if spec.group_regex and any(item.group for item in listing.items):
        raise DataError(
            "groups are given twice",
            where=spec.root,
            fix="empty data.group_regex or drop the CSV's group column",
        )
    train, test = (
        sorted(item for item in listing.items if item.part == part) for part in ("train", "test")
    )
    classes = _classes(
        {item.label for item in train}, {item.label for item in test}, listing.classes
    )
    train = [
        train[row] for row in _limited([item.label for item in train], spec.limit_per_class, seed)
    ]
    bad = _verify(train + test, listing.encoded, spec)
    gone = {image.path for image in bad if not image.readable}
    train, test = ([item for item in part if item.path not in gone] for part in (train, test))
    _require_two_of_each(train, classes)
    if not test and any(item.part == "test" for item in listing.items):
        raise DataError("none of the test images can be read", where=spec.root)

    parts = [
        _dataset(part, classes, spec.group_regex, listing.encoded) for part in (train, test) if part
    ]
    groups = set(parts[0].groups or ())
    if len(groups) == 1:  # no interval could speak of others, and nothing could be cross-fitted
        raise DataError(
            "all training images are of one group",
            where=spec.root,
            expected="two groups or more, or none",
            got=groups.pop(),
            fix="leave the groups out",
        )
    notes = (
        listing.notes
        + _mislabelled(bad)
        + _duplicates(train + test, listing.encoded)
        + _shared_groups(parts)
    )
    skipped = tuple(image for image in bad if not image.readable)
    return Sources(parts[0], parts[1] if test else None, tuple(notes), skipped)


def _classes(train: set[str], test: set[str], official: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Class names in official or in natural order (`2` before `10`); train and test must agree on them."""
    if len(train) < 2:
        got = f"only {shorten(train)}" if train else "no training images"
        raise DataError(
            "there is nothing to tell apart",
            expected="training images of 2 or more classes",
            got=got,
        )
    if test and train != test:
        sides = {
            "train": sorted(train - test, key=natural_key),
            "test": sorted(test - train, key=natural_key),
        }
        raise DataError(
            "classes differ between train and test",
            got=" and ".join(
                f"only in {part}: {shorten(names)}" for part, names in sides.items() if names
            ),
            fix="give both the same class names",
        )
    return official or tuple(sorted(train, key=natural_key))


def _limited(labels: ArrayLike, limit: int, seed: int) -> NDArray[np.int64]:
    """Ascending rows: all of them, or at most `limit` of each class."""
    labels = np.asarray(labels)
    if not limit:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed % 2**32)
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:limit] for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(drawn))


def _verify(
    items: Sequence[ListedImage], encoded: EncodedImages | None, spec: DataSpec
) -> list[BadImage]:
    """Decode every image once; under `fail`, stop if anything is wrong."""
    paths = [item.path for item in items]
    bad = check_all(paths, min(8, os.cpu_count() or 1), _contents(items, encoded))
    if bad and spec.bad_images == "fail":
        raise DataError(
            f"{len(bad)} of {len(items)} images cannot be used",
            got=shorten(f"{image.path} ({image.reason})" for image in bad),
            fix='repair, rename or remove them, or set data.bad_images = "skip"',
        )
    return bad


def _contents(items: Sequence[ListedImage], encoded: EncodedImages | None) -> EncodedImages | None:
    """The image files of these rows of a table; None where the items are files themselves."""
    return None if encoded is None else encoded.take([item.row for item in items])


def _require_two_of_each(train: list[ListedImage], classes: tuple[str, ...]) -> None:
    counts = Counter(item.label for item in train)
    few = [f"{name} ({counts[name]})" for name in classes if counts[name] < 2]
    if few:
        raise DataError(
            "classes with fewer than 2 usable training images",
            got=shorten(few),
            fix="add images or leave these classes out",
        )


def _dataset(
    items: list[ListedImage],
    classes: tuple[str, ...],
    group_regex: str,
    encoded: EncodedImages | None,
) -> ImageDataset:
    ids = tuple(item.id for item in items)
    number = {name: label for label, name in enumerate(classes)}
    listed = tuple(item.group for item in items if item.group is not None)
    return ImageDataset(
        images=_contents(items, encoded) or tuple(item.path for item in items),
        labels=np.array([number[item.label] for item in items], dtype=np.int64),
        ids=ids,
        classes=classes,
        groups=listed or _groups(ids, group_regex),
    )


def _groups(ids: Sequence[str], pattern: str) -> tuple[str, ...] | None:
    """The group of each id: the pattern's first group, or all that it matches."""
    if not pattern:
        return None
    regex = re.compile(pattern)
    groups = []
    for name in ids:
        match = regex.search(name)
        group = match.group(1 if regex.groups else 0) if match else None
        if not group:
            raise DataError(
                "data.group_regex finds no group", where=name, expected=f"a match of {pattern}"
            )
        groups.append(group)
    return tuple(groups)


def _mislabelled(bad: list[BadImage]) -> list[str]:
    """A note about readable files whose name promises another format."""
    named = [f"{image.path} ({image.reason})" for image in bad if image.readable]
    return (
        [f"{len(named)} images were read although their names mislead: {shorten(named)}"]
        if named
        else []
    )


def _duplicates(items: list[ListedImage], encoded: EncodedImages | None) -> list[str]:
    """Notes about files that are equal byte for byte."""
    across: list[str] = []
    contradicting: list[str] = []
    within = 0
    for rows in same_content([item.path for item in items], _contents(items, encoded)):
        same = [items[row] for row in rows]
        in_test = [item.id for item in same if item.part == "test"]
        in_train = len(same) - len(in_test)
        within += max(0, in_train - 1)
        across += in_test if in_train else []
        if len({item.label for item in same}) > 1:
            contradicting.append(" = ".join(item.id for item in same))
    notes = []
    if across:
        notes.append(
            f"{len(across)} test images are exact copies of training images: {shorten(across)}"
        )
    if within:
        notes.append(
            f"{within} training images are exact copies of others; copies may fall into different folds"
        )
    if contradicting:
        notes.append(
            f"{len(contradicting)} images stand in several classes as exact copies: {shorten(contradicting)}"
        )
    return notes


def _shared_groups(parts: list[ImageDataset]) -> list[str]:
    """A note about groups on both sides of the official split."""
    shared = (
        set.intersection(*(set(part.groups or ()) for part in parts)) if len(parts) == 2 else set()
    )
    return (
        [f"{len(shared)} groups stand in train and in test: {shorten(sorted(shared))}"]
        if shared
        else []
    )


def _demo() -> ArrayDataset:
    """The packaged part of Fashion-MNIST, as scripts/make_demo_data.py wrote it."""
    asset = resources.files("threefold") / "assets" / "fashion_mnist" / "data.npz"
    with asset.open("rb") as stream, np.load(stream, allow_pickle=False) as data:
        train, test = (
            with_row_ids(part, data[f"{part}_images"], data[f"{part}_labels"], data[f"{part}_rows"])
            for part in ("train", "test")
        )
    return ArrayDataset(train, test, FASHION_MNIST_CLASSES, [])


def _from_arrays(data: ArrayDataset, spec: DataSpec, seed: int) -> Sources:
    """Pixels in memory need no check; they are copied only where some are left out."""
    train, test = (
        ImageDataset(
            part.images, part.labels, part.ids, data.classes, _groups(part.ids, spec.group_regex)
        )
        for part in (data.train, data.test)
    )
    if spec.limit_per_class:
        train = train.subset(_limited(train.labels, spec.limit_per_class, seed))
    return Sources(train, test, tuple(data.notes + _shared_groups([train, test])), ())
