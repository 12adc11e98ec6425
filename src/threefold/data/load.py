"""Load the images of a recipe: every source becomes an `ImageDataset`, verified and labelled.

The readers of each format are in the modules that `read_source` imports. Unusable data stop here,
with the names of the files. `Sources` records what was left out on request and what a careful
reader wants to know (duplicates, ignored files). Imports no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from threefold.data.class_names import check_class_names, warn_of_alike
from threefold.data.copies import warn_of_copies
from threefold.data.dataset import ImageDataset, Sources, arrays_dataset, make_dataset
from threefold.data.group_file import find_groups, groups_of, read_groups
from threefold.data.label_counts import find_labels, limited_sets, note_label_counts, require_both
from threefold.data.read_source import read_source
from threefold.data.sources.folder import ArrayDataset, ListedImage, Listing
from threefold.data.split_names import warn_of_parts
from threefold.data.splits import fold_values
from threefold.data.verified import note_misleading_names, refuse_bad, verify_images
from threefold.errors import DataError, shorten
from threefold.names import count_of, natural_key
from threefold.recipe.schema import DataSpec


def load_data(
    spec: DataSpec, seed: int, trained: tuple[str, ...] = (), fresh: bool = False
) -> Sources:
    """Find, verify and label the images of a recipe.

    Every file is decoded once to verify it, and not again while its size and times stay the same
    (`verified`). `limit_per_class` draws from the training files before that, so the draw depends
    only on the seed and the list of files. With `bad_images = "skip"`, readable files whose suffix
    names another format are kept and noted.

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


def _require_two_of_each(labels: Sequence[str], classes: tuple[str, ...]) -> None:
    counts = Counter(labels)
    few = [f"{name} ({counts[name]})" for name in classes if counts[name] < 2]
    if few:
        raise DataError(
            "classes with fewer than 2 usable training images",
            got=shorten(few),
            fix="add images or leave these classes out",
        )


def _with_group_file(data: ImageDataset, spec: DataSpec, *, every: bool) -> ImageDataset:
    """Add the groups of data.group_file; `every` = an image without one is an error."""
    if not spec.group_file:
        return data
    table = read_groups(Path(spec.group_file).expanduser())
    if not every and None in find_groups(data.ids, table):
        return data
    return replace(data, groups=groups_of(data.ids, table, spec.group_file))


def _shared_groups(train: ImageDataset, test: ImageDataset | None) -> list[str]:
    """Warn about groups on both sides of the official split."""
    if test is None:
        return []
    shared = set(train.groups or ()) & set(test.groups or ())
    groups = count_of(len(shared), "group is", "groups are")
    return [f"{groups} in both train and test: {shorten(sorted(shared))}"] if shared else []


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


def _fold_notes(train: ImageDataset, column: str) -> list[str]:
    """Say which folds the user's own column makes."""
    if train.folds is None:
        return []
    values = fold_values(train.folds)
    return [f"{count_of(len(values), 'fold')} from the column {column}: {shorten(values)}"]
