"""Labelled images to score a finished model on: no folds, no training rows, any number a class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from threefold.data.dataset import ImageDataset, arrays_dataset, make_dataset
from threefold.data.detect_source import detect_source
from threefold.data.read_source import UNLABELLED, read_source
from threefold.data.sources.folder import ArrayDataset
from threefold.data.verified import verify_images
from threefold.data.walk import is_image, list_entries
from threefold.errors import DataError, shorten
from threefold.names import natural_key
from threefold.recipe.schema import WITH_LABEL_SETS
from threefold.tasks import Task


def load_labelled(
    data: str | Path,
    task: Task = "multiclass",
    separator: str | None = None,
    notify: Callable[[str], object] = lambda note: None,
) -> ImageDataset:
    """Find, verify and label images; of images in splits, those of the test split.

    Args:
        data: whatever `detect_source` knows, as for training.
        task: multilabel = an image has any number of labels, which are in `targets`.
        separator: of the labels in a cell; None = found.
        notify: called with a note if images of other splits are left out.

    Raises:
        DataError: images or labels are missing or cannot be read; or a folder of class folders has
            one class for each image, where any number of labels is meant.
    """
    spec = detect_source(data)
    if task == "multilabel":
        if spec.source not in WITH_LABEL_SETS:
            raise DataError(
                "a folder has one class for each image, and the model answers several labels",
                where=data,
                fix="give a table with a column of 0 and 1 for each label, or one column labels",
            )
        spec = spec.model_copy(update={"task": task, "label_separator": separator})
    folder = Path(spec.root)
    if spec.source == "folder" and folder.is_dir() and _is_flat(folder):
        raise DataError(
            "the images have no labels",
            where=data,
            expected="one folder per class, or a table with a column of labels",
            fix=f"add labels; {UNLABELLED}",
        )
    listing = read_source(spec, has_recipe=False)
    if isinstance(listing, ArrayDataset):
        if listing.test:
            notify(_left_out(len(listing.test[1]), len(listing.train[1])))
        return arrays_dataset(listing.test or listing.train, listing.classes)
    items = sorted(item for item in listing.items if item.part == "test")
    if items and len(items) < len(listing.items):
        notify(_left_out(len(items), len(listing.items) - len(items)))
    items = items or sorted(listing.items)
    verified = verify_images(items, listing.encoded, f"{spec.source} {spec.root}")
    unreadable = [image for image in verified.bad if not image.readable]
    if unreadable:
        raise DataError(
            f"{len(unreadable)} of {len(items)} images cannot be read",
            got=shorten(f"{image.path} ({image.reason})" for image in unreadable),
            fix="repair them or move them away",
        )
    names = {name for item in items for name in item.labels or ()}
    if task == "multiclass":
        names = {item.label for item in items}
    classes = listing.classes if task == "multilabel" else ()
    classes = classes or tuple(sorted(names, key=natural_key))
    made = make_dataset(items, classes, "", listing.encoded)
    return replace(made, digests=verified.digests)


def _is_flat(folder: Path) -> bool:
    """Whether a folder holds images and no folders, such as the test images of a competition."""
    inside, files = list_entries(folder)
    return not inside and any(map(is_image, files))


def _left_out(scored: int, others: int) -> str:
    return (
        f"only the {scored:,} images of the test split are answered: models may have learned from "
        f"the {others:,} others (to answer these, name their folder)"
    )
