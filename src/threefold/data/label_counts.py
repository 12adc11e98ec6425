"""Images with any number of labels: their targets, and what the labels must have to be learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from threefold.errors import DataError, shorten
from threefold.names import natural_key


class LabelledRows(Protocol):
    """A data set, as far as its labels are concerned."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the labels."""

    @property
    def targets(self) -> NDArray[np.uint8] | None:
        """(n, k) zeros and ones, or None where each image has one class."""


def find_labels(
    train: Collection[str], test: Collection[str], official: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Return the names of the labels, in official or natural order.

    Args:
        train: names that training images have.
        test: names that test images have.
        official: all names, where the source has a list of them.

    Raises:
        DataError: there are fewer than two, or a label is on test images only.
    """
    names = official or tuple(sorted(train, key=natural_key))
    if len(names) < 2:
        raise DataError(
            "too few labels",
            expected="2 or more labels on the training images",
            got=f"only {names[0]}" if names else "no label",
            fix='for one label, name two classes and set data.task = "multiclass"',
        )
    unknown = sorted(set(test) - set(train), key=natural_key)
    if unknown:
        raise DataError(
            "labels differ between train and test",
            got=f"only in test: {shorten(unknown)}",
            fix="give training images with these labels, or leave the labels out",
        )
    return names


def make_targets(sets: Sequence[Collection[str]], classes: Sequence[str]) -> NDArray[np.uint8]:
    """Return zeros and ones (n, k) of the labels of n images."""
    number = {name: label for label, name in enumerate(classes)}
    targets = np.zeros((len(sets), len(classes)), np.uint8)
    for row, names in enumerate(sets):
        targets[row, [number[name] for name in names]] = 1
    return targets


def require_both(data: LabelledRows) -> None:
    """Check that each label has training images with it and without it, two of each.

    Raises:
        DataError: one has not, so that it cannot be learned or scored.
    """
    if data.targets is None:
        return
    n, counts = len(data.targets), data.targets.sum(0)
    few = [f"{data.classes[i]} ({counts[i]})" for i in np.flatnonzero(counts < 2)]
    if few:
        raise DataError(
            "labels on fewer than 2 usable training images",
            got=shorten(few),
            fix="add images with these labels, or leave the labels out",
        )
    common = [f"{data.classes[i]} ({n - counts[i]})" for i in np.flatnonzero(n - counts < 2)]
    if common:
        raise DataError(
            "labels missing on fewer than 2 usable training images",
            expected="images with the label and images without it",
            got=shorten(common),
            fix="add images without these labels, or leave the labels out",
        )


def limited_sets(sets: Sequence[Collection[str]], limit: int, seed: int) -> NDArray[np.int64]:
    """Return ascending rows: all, or those drawn while one of their labels has fewer than `limit`.

    Images without labels count as one label of their own.
    """
    if not limit:
        return np.arange(len(sets))
    counts: Counter[str] = Counter()
    drawn = []
    for row in np.random.default_rng(seed % 2**32).permutation(len(sets)):
        names = sets[row] or ("",)
        if any(counts[name] < limit for name in names):
            counts.update(names)
            drawn.append(row)
    return np.sort(np.array(drawn, dtype=np.int64))


def note_label_counts(train: LabelledRows, test: LabelledRows | None) -> list[str]:
    """Say how many labels images have, and which labels no test image has."""
    if train.targets is None:
        return []
    per_image = train.targets.sum(1)
    notes = [
        f"{len(train.classes)} labels, {per_image.mean():.1f} per training image on average, none "
        f"on {int((per_image == 0).sum()):,} and at most {int(per_image.max())}"
    ]
    if test is not None and test.targets is not None:
        absent = [test.classes[i] for i in np.flatnonzero(test.targets.sum(0) == 0)]
        if absent:
            notes.append(f"no test image has {shorten(absent)}, which test scores leave out")
    return notes
