"""Data sets: every source of a recipe becomes an `ImageDataset`.

The readers of each format are in the modules that this one imports. Unusable data stop here, with
the names of the files. `Sources` records what was left out on request and what a careful reader
wants to know (duplicates, ignored files). Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from threefold.data.class_names import check_class_names, warn_of_alike
from threefold.data.copies import warn_of_copies
from threefold.data.group_file import find_groups, groups_of, read_groups
from threefold.data.images import BadImage, content_hash, decode
from threefold.data.label_counts import (
    find_labels,
    limited_sets,
    make_targets,
    note_label_counts,
    require_both,
)
from threefold.data.read_source import read_source
from threefold.data.sources.folder import (
    ArrayDataset,
    EncodedImages,
    FilePaths,
    ImageArrays,
    ListedImage,
    Listing,
    contents_of,
)
from threefold.data.split_names import warn_of_parts
from threefold.data.splits import fold_values
from threefold.data.unchanged import DIGEST, decode_unchanged
from threefold.data.verified import refuse_bad, verify_images
from threefold.errors import DataError, shorten
from threefold.names import count_of, find_repeated, natural_key
from threefold.recipe_schema import DataSpec


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


def load_data(
    spec: DataSpec, seed: int, trained: tuple[str, ...] = (), fresh: bool = False
) -> Sources:
    """Find, verify and label the images of a recipe.

    Every file is decoded once to verify it, and not again while its size and times stay the same
    (`verified`). `limit_per_class` draws from the training files before
    that, so the draw depends only on the seed and the list of files. With `bad_images = "skip"`,
    readable files whose suffix names another format are kept and noted.

    Args:
        spec: the `data` table of a recipe.
        seed: the recipe's seed, for `limit_per_class`.
        trained: the classes of a run that has been trained on these images. Their names are not
            refused, so that it can be exported; its file has `exported_name` in their place.
        fresh: decode every file, whatever is known of it.

    Raises:
        DataError: images or labels are missing, unreadable or inconsistent.
    """
    found = read_source(spec)
    if isinstance(found, ArrayDataset):
        return _from_arrays(found, spec, seed)
    return _from_files(found, spec, seed, trained, fresh)


def _from_files(
    listing: Listing, spec: DataSpec, seed: int, trained: tuple[str, ...], fresh: bool
) -> Sources:
    """Verify listed files and assign their labels."""
    key = "group_regex" if spec.group_regex else "group_file" if spec.group_file else ""
    if key and any(item.group for item in listing.items):
        raise DataError(
            "groups are defined twice",
            where=spec.root,
            fix=f"clear data.{key} or remove the group column",
        )
    train = sorted(item for item in listing.items if item.part == "train")
    test = sorted(item for item in listing.items if item.part == "test")
    has_test = bool(test)
    several = spec.task == "multilabel"
    find_classes = find_labels if several else _classes
    classes = find_classes(_label_names(train), _label_names(test), listing.classes)
    if classes != trained:
        check_class_names(classes)
    train = [train[row] for row in _limited_items(train, spec.limit_per_class, seed)]
    verified = verify_images(train + test, listing.encoded, f"{spec.source} {spec.root}", fresh)
    if verified.bad and spec.bad_images == "fail":
        raise refuse_bad(verified.bad, len(train + test))
    skipped = tuple(image for image in verified.bad if not image.readable)
    usable = verified.usable
    train, test = (
        [item for item, is_usable in zip(part, kept, strict=True) if is_usable]
        for part, kept in ((train, usable[: len(train)]), (test, usable[len(train) :]))
    )
    digests = verified.digests[usable]
    if not several:
        _require_two_of_each([item.label for item in train], classes)
    if has_test and not test:
        raise DataError("none of the test images can be read", where=spec.root)

    def dataset(items: list[ListedImage], of_items: NDArray[np.bytes_]) -> ImageDataset:
        made = make_dataset(items, classes, spec.group_regex, listing.encoded)
        return replace(made, digests=of_items)

    train_set = dataset(train, digests[: len(train)])
    test_set = dataset(test, digests[len(train) :]) if test else None
    require_both(train_set)
    train_set = _with_group_file(train_set, spec, every=True)
    if test_set is not None:
        test_set = _with_group_file(test_set, spec, every=False)
    groups = set(train_set.groups or ())
    if len(groups) == 1:  # neither cross-fitting nor an interval is possible with one group
        raise DataError(
            "all training images are in one group",
            where=spec.root,
            expected="two groups or more, or none",
            got=groups.pop(),
            fix="remove the groups",
        )
    return Sources(
        train=train_set,
        test=test_set,
        notes=(
            *listing.notes,
            *note_misleading_names(verified.bad),
            *note_label_counts(train_set, test_set),
            *_fold_notes(train_set, spec.fold_column),
        ),
        skipped=skipped,
        warnings=(
            *warn_of_copies(train + test, digests),
            *_shared_groups(train_set, test_set),
            *_split_groups(train_set),
            *warn_of_parts(classes),
            *warn_of_alike(classes),
        ),
    )


def _label_names(items: Sequence[ListedImage]) -> set[str]:
    """Return the names of all labels of some images."""
    return {name for item in items for name in (item.label,) if item.labels is None} | {
        name for item in items for name in item.labels or ()
    }


def _limited_items(items: Sequence[ListedImage], limit: int, seed: int) -> NDArray[np.int64]:
    """Return ascending rows: all, or at most `limit` of each class."""
    if any(item.labels is not None for item in items):
        return limited_sets([item.labels or () for item in items], limit, seed)
    return _limited([item.label for item in items], limit, seed)


def _classes(train: set[str], test: set[str], official: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return class names in official or natural order; train and test must have the same."""
    if len(train) < 2:
        got = f"only {shorten(train)}" if train else "no training images"
        raise DataError("too few classes", expected="training images of 2 or more classes", got=got)
    if test and train != test:
        differences = []
        for part, names in (("train", train - test), ("test", test - train)):
            if names:
                differences.append(f"only in {part}: {shorten(sorted(names, key=natural_key))}")
        raise DataError(
            "classes differ between train and test",
            got=" and ".join(differences),
            fix="give both the same class names",
        )
    return official or tuple(sorted(train, key=natural_key))


def _limited(labels: ArrayLike, limit: int, seed: int) -> NDArray[np.int64]:
    """Return ascending rows: all, or at most `limit` of each class."""
    labels = np.asarray(labels)
    if not limit:
        return np.arange(len(labels))
    rng = np.random.default_rng(seed % 2**32)
    drawn = [
        rng.permutation(np.flatnonzero(labels == label))[:limit] for label in np.unique(labels)
    ]
    return np.sort(np.concatenate(drawn))


def _require_two_of_each(labels: Sequence[str], classes: tuple[str, ...]) -> None:
    counts = Counter(labels)
    few = [f"{name} ({counts[name]})" for name in classes if counts[name] < 2]
    if few:
        raise DataError(
            "classes with fewer than 2 usable training images",
            got=shorten(few),
            fix="add images or leave these classes out",
        )


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


def _with_group_file(data: ImageDataset, spec: DataSpec, *, every: bool) -> ImageDataset:
    """Add the groups of data.group_file; `every` = an image without one is an error."""
    if not spec.group_file:
        return data
    table = read_groups(Path(spec.group_file).expanduser())
    if not every and None in find_groups(data.ids, table):
        return data
    return replace(data, groups=groups_of(data.ids, table, spec.group_file))


def note_misleading_names(bad: list[BadImage]) -> list[str]:
    """Note readable files whose suffix names another format."""
    named = [f"{image.path} ({image.reason})" for image in bad if image.readable]
    read = count_of(len(named), "image was read", "images were read")
    return [f"{read} despite a misleading suffix: {shorten(named)}"] if named else []


def _shared_groups(train: ImageDataset, test: ImageDataset | None) -> list[str]:
    """Warn about groups on both sides of the official split."""
    if test is None:
        return []
    shared = set(train.groups or ()) & set(test.groups or ())
    groups = count_of(len(shared), "group is", "groups are")
    return [f"{groups} in both train and test: {shorten(sorted(shared))}"] if shared else []


def _fold_notes(train: ImageDataset, column: str) -> list[str]:
    """Say which folds the user's own column makes."""
    if train.folds is None:
        return []
    values = fold_values(train.folds)
    return [f"{count_of(len(values), 'fold')} from the column {column}: {shorten(values)}"]


def _split_groups(train: ImageDataset) -> list[str]:
    """Warn about groups that are in several of the user's own folds."""
    if train.folds is None or train.groups is None:
        return []
    pairs = set(zip(train.groups, train.folds, strict=True))
    folds_of = Counter(group for group, _ in pairs)
    split = sorted((group for group, count in folds_of.items() if count > 1), key=natural_key)
    if not split:
        return []
    return [
        f"{count_of(len(split), 'group is', 'groups are')} in several folds of "
        f"data.fold_column, which makes scores too good: {shorten(split)}"
    ]


def _from_arrays(data: ArrayDataset, spec: DataSpec, seed: int) -> Sources:
    """Wrap pixels in memory, which need no verification."""
    train = arrays_dataset(data.train, data.classes, spec.group_regex)
    if spec.limit_per_class and train.targets is None:
        train = train.subset(_limited(train.labels, spec.limit_per_class, seed))
    elif spec.limit_per_class:
        sets = [train.label_names(row) for row in range(len(train))]
        train = train.subset(limited_sets(sets, spec.limit_per_class, seed))
    train = _with_group_file(train, spec, every=True)
    test = None
    if data.test is not None:
        test = arrays_dataset(data.test, data.classes, spec.group_regex)
        test = _with_group_file(test, spec, every=False)
    if train.is_multilabel:
        check_class_names(train.classes)
        find_labels(set(train.classes), set())
        require_both(train)
    elif spec.source == "npz":  # the others are published
        names = [[data.classes[label] for label in part.labels] for part in (train, test) if part]
        check_class_names(_classes(set(names[0]), set(names[-1])))
        _require_two_of_each(names[0], data.classes)
    return Sources(
        train=train,
        test=test,
        notes=(*data.notes, *note_label_counts(train, test)),
        skipped=(),
        warnings=tuple(_shared_groups(train, test)),
    )


def arrays_dataset(
    part: ImageArrays, classes: tuple[str, ...], group_regex: str = ""
) -> ImageDataset:
    """Make a data set of a part that holds pixels."""
    groups = _groups(part.ids, group_regex)
    if part.labels.ndim == 1:
        return ImageDataset(part.images, part.labels, part.ids, classes, groups)
    labels, targets = np.full(len(part.ids), -1), part.labels.astype(np.uint8)
    return ImageDataset(part.images, labels, part.ids, classes, groups, targets=targets)
