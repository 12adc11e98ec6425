"""Labelled images to score a finished model on: no folds, no training rows, any number a class."""

from __future__ import annotations

from pathlib import Path

from threefold.data.dataset import ImageDataset, arrays_dataset, make_dataset, verify
from threefold.data.detect_source import detect_source
from threefold.data.read_source import read_source
from threefold.data.sources.folder import ArrayDataset
from threefold.errors import DataError, shorten
from threefold.names import natural_key


def load_labelled(data: str | Path) -> ImageDataset:
    """Find, verify and label images; of images in splits, those of the test split.

    Args:
        data: whatever `detect_source` knows, as for training.

    Raises:
        DataError: images or labels are missing or cannot be read.
    """
    listing = read_source(detect_source(data), has_recipe=False)
    if isinstance(listing, ArrayDataset):
        return arrays_dataset(listing.test or listing.train, listing.classes)
    items = sorted(item for item in listing.items if item.part == "test")
    items = items or sorted(listing.items)
    bad = verify(items, listing.encoded)
    unreadable = [image for image in bad if not image.readable]
    if unreadable:
        raise DataError(
            f"{len(unreadable)} of {len(items)} images cannot be read",
            got=shorten(f"{image.path} ({image.reason})" for image in unreadable),
            fix="repair them or move them away",
        )
    classes = tuple(sorted({item.label for item in items}, key=natural_key))
    return make_dataset(items, classes, "", listing.encoded)
