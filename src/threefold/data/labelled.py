"""Labelled images to score a finished model on: no folds, no training rows, any number a class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from threefold.data.dataset import ImageDataset, make_dataset, verify
from threefold.data.detect_source import detect_source
from threefold.data.sources.csv_table import list_csv
from threefold.data.sources.folder import Listing, list_folder
from threefold.data.sources.parquet import list_parquet
from threefold.errors import DataError, shorten
from threefold.names import natural_key

LISTERS: dict[str, Callable[[Path], Listing]] = {
    "folder": list_folder,
    "csv": list_csv,
    "parquet": list_parquet,
}


def load_labelled(data: str | Path) -> ImageDataset:
    """Find, verify and label images; of images in splits, those of the test split.

    Args:
        data: a folder of class folders, or of train/ [val/] test/ with class folders inside; a
            CSV or parquet file, as for training.

    Raises:
        DataError: images or labels are missing or cannot be read.
    """
    spec = detect_source(data)
    listing = LISTERS[spec.source](Path(spec.root))
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
