"""Images in the arrays of an .npz file, as Keras and MedMNIST publish them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from threefold.data.label_counts import make_targets
from threefold.data.sources.arrays import with_row_ids
from threefold.data.sources.columns import NO_NAMES, NamedColumns
from threefold.data.sources.folder import ArrayDataset, ImageArrays
from threefold.data.sources.label_sets import (
    LabelCells,
    LabelSet,
    all_labels,
    read_label_sets,
)
from threefold.data.split_names import PARTS, split_of
from threefold.errors import DataError, RunError, shorten
from threefold.names import natural_key
from threefold.npz_files import read_arrays

_IMAGES: Final = ("images", "image", "x")
_LABELS: Final = ("labels", "label", "y", "targets", "target")
_NAMES: Final = ("classes", "class_names")


def read_npz(path: Path, named: NamedColumns = NO_NAMES) -> ArrayDataset:
    """Read images and labels from the arrays of an .npz file.

    The arrays are called `images` and `labels`, or `x` and `y`; with `train`, `val` or `test` in
    their names, as in `x_train` or `test_images`, they are a part of the data. Labels are whole
    numbers or texts (n,) or (n, 1), images uint8 (n, h, w), (n, h, w, 1) or (n, h, w, 3). Where
    images have any number of labels (`named.task`), labels are 0 and 1 (n, k), whose names are in
    the array `classes`, or else numbers; or texts that name them all.

    Raises:
        DataError: the file cannot be read, or its arrays are not images with labels.
    """
    arrays = _read(path)
    found = _find_arrays(arrays, path)
    several: dict[str, list[LabelSet]] = {split: [] for split in found}
    names: tuple[str, ...] = ()
    if named.task == "multilabel":
        several, names = _read_sets(arrays, found, path, named.separator)
    images: dict[str, list[NDArray[np.uint8]]] = {"train": [], "test": []}
    labels: dict[str, list[Any]] = {"train": [], "test": []}
    for split, (image_key, label_key) in found.items():
        part = check_images(arrays[image_key], f"{path}: {image_key}")
        texts: list[Any] = several[split]
        if named.task != "multilabel":
            texts = list(label_texts(arrays[label_key], f"{path}: {label_key}"))
        if len(part) != len(texts):
            raise DataError(
                "images and labels differ in number",
                where=path,
                got=f"{len(part)} {image_key}, {len(texts)} {label_key}",
            )
        images[PARTS[split]].append(part)
        labels[PARTS[split]] += texts
    if named.task == "multilabel":
        used = {part: set(all_labels(labels[part])) for part in labels}
    else:
        used = {part: set(labels[part]) for part in labels}
    classes = names or tuple(sorted(used["train"], key=natural_key))
    unknown = sorted(used["test"] - set(classes), key=natural_key)
    if unknown:
        raise DataError(
            "classes differ between train and test",
            where=path,
            got=f"only in test: {shorten(unknown)}",
        )
    parts: dict[str, ImageArrays] = {}
    for part_name in ("train", "test"):
        if images[part_name]:
            pixels = _join(images[part_name], path)
            coded = _code(labels[part_name], classes)
            parts[part_name] = with_row_ids(part_name, pixels, coded, np.arange(len(coded)))
    if "train" not in parts:
        raise DataError("there are no training images", where=path, got=shorten(arrays))
    notes = ["the validation images were joined with train"] if "val" in found else []
    return ArrayDataset(parts["train"], parts.get("test"), classes, notes)


def _read(path: Path) -> dict[str, NDArray[np.generic]]:
    """Read the arrays of a file."""
    if not path.is_file():
        raise DataError("no such file", where=path)
    try:
        return read_arrays(path)
    except RunError as error:
        raise DataError("cannot read the file of arrays", where=path, got=error) from None


def _code(labels: list[Any], classes: tuple[str, ...]) -> NDArray[np.int64]:
    """Return labels as numbers (n,), or sets of labels as zeros and ones (n, k)."""
    if not any(isinstance(item, tuple) for item in labels):
        number = {name: label for label, name in enumerate(classes)}
        return np.array([number[name] for name in labels], dtype=np.int64)
    return make_targets(labels, classes).astype(np.int64)


def _label_cells(arrays: dict[str, NDArray[np.generic]], key: str, path: Path) -> LabelCells:
    """Return what can be several labels of each image, from one array."""
    array = arrays[key]
    if array.ndim == 2 and array.shape[1] > 1:
        names = _label_names(arrays, array.shape[1], path)
        if array.dtype.kind not in "biuf" or not np.isin(array, (0, 1)).all():
            raise DataError(
                "labels of several classes are not 0 and 1",
                where=f"{path}: {key}",
                got=f"{array.dtype} {array.shape}",
            )
        return LabelCells(
            None,
            {name: [str(int(v)) for v in array[:, i].tolist()] for i, name in enumerate(names)},
        )
    return LabelCells(
        [str(v).strip() for v in array.reshape(len(array), -1)[:, 0].tolist()], {}, key
    )


def _label_names(arrays: dict[str, NDArray[np.generic]], count: int, path: Path) -> list[str]:
    """Return the names of k labels: those of the array `classes`, or numbers."""
    key = next((key for key in arrays if key.lower() in _NAMES), None)
    if key is None:
        return [str(number) for number in range(count)]
    names = [str(name) for name in arrays[key].ravel().tolist()]
    if len(set(names)) != count:
        raise DataError(
            "the names of the labels do not fit their number",
            where=f"{path}: {key}",
            expected=f"{count} different names",
            got=shorten(names),
        )
    return names


def _read_sets(
    arrays: dict[str, NDArray[np.generic]],
    found: dict[str, tuple[str, str]],
    path: Path,
    separator: str,
) -> tuple[dict[str, list[LabelSet]], tuple[str, ...]]:
    """Return the labels of the images of each split, and all names where the file has them."""
    sets: dict[str, list[LabelSet]] = {}
    names: tuple[str, ...] = ()
    for split, (_, key) in found.items():
        cells = _label_cells(arrays, key, path)
        read = read_label_sets(cells.cells, cells.columns, separator)
        assert read is not None  # there are cells or columns
        sets[split], names = read.sets, read.names or names
    return sets, names


def read_npz_label_cells(path: Path) -> LabelCells:
    """Read what can be several labels of each training image of an .npz file.

    Raises:
        DataError: the file cannot be read, or its arrays are not images with labels.
    """
    arrays = _read(path)
    found = _find_arrays(arrays, path)
    return _label_cells(arrays, found["train" if "train" in found else next(iter(found))][1], path)


def _find_arrays(arrays: dict[str, NDArray[np.generic]], path: Path) -> dict[str, tuple[str, str]]:
    """Return the names of the arrays of images and of labels of each split.

    Raises:
        DataError: they are not in pairs.
    """
    images: dict[str, str] = {}
    labels: dict[str, str] = {}
    for key in arrays:
        words = [word for word in re.split(r"[\W_]+", key.lower()) if word]
        splits = [split for split in map(split_of, words) if split is not None]
        split = splits[0] if splits else "train"
        for names, found in ((_IMAGES, images), (_LABELS, labels)):
            if any(word in names for word in words):
                found.setdefault(split, key)
    if not images or images.keys() != labels.keys():
        raise DataError(
            "the arrays are not images with labels",
            where=path,
            expected="images and labels, or x_train, y_train[, x_test, y_test]",
            got=shorten(arrays) or "an empty file",
            fix="name them: np.savez('data.npz', x_train=..., y_train=...)",
        )
    return {split: (images[split], labels[split]) for split in images}


def _join(parts: list[NDArray[np.uint8]], path: Path) -> NDArray[np.uint8]:
    if len({part.shape[1:] for part in parts}) > 1:
        shapes = " and ".join(str(part.shape) for part in parts)
        raise DataError("train and val have images of different shapes", where=path, got=shapes)
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def check_images(images: NDArray[np.generic], where: str) -> NDArray[np.uint8]:
    """Return an array of images as uint8 (n, h, w) or (n, h, w, 3).

    Raises:
        DataError: it has another type or shape.
    """
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    expected = "uint8 (n, height, width) or (n, height, width, 3)"
    got = f"{images.dtype} {images.shape}"
    is_grey, is_colour = images.ndim == 3, images.ndim == 4 and images.shape[3] == 3
    if not (is_grey or is_colour) or not images.size:
        fix = ""
        if images.ndim == 4 and images.shape[1] in (1, 3):
            fix = "move the channels to the end: images.transpose(0, 2, 3, 1)"
        elif images.ndim == 4 and images.shape[3] == 4:
            fix = "leave out the alpha channel: images[..., :3]"
        what = "the array does not have the shape of images"
        raise DataError(what, where=where, expected=expected, got=got, fix=fix)
    if images.dtype == np.uint8:
        return images.view(np.ndarray).astype(np.uint8, copy=False)
    if np.issubdtype(images.dtype, np.integer) and images.min() >= 0 and images.max() <= 255:
        return images.astype(np.uint8)
    raise DataError(
        "the pixels are not whole numbers from 0 to 255",
        where=where,
        expected=expected,
        got=got,
        fix="scale them: (255 * images).round().astype('uint8') for values from 0 to 1",
    )


def label_texts(labels: NDArray[np.generic], where: str) -> list[str]:
    """Return labels (n,), (n, 1) or 0 and 1 in (n, k) as texts.

    Raises:
        DataError: they have another shape, or one is missing or is neither text nor whole number.
    """
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and labels.size and labels.dtype.kind in "biuf":
        is_one_hot = np.isin(labels, (0, 1)).all() and (labels.sum(axis=1) == 1).all()
        if is_one_hot:
            labels = labels.argmax(axis=1)
    if labels.ndim != 1:
        raise DataError(
            "each image needs one label",
            where=where,
            expected="labels (n,), or (n, k) with one 1 in each row",
            got=f"{labels.dtype} {labels.shape}",
            fix='for several labels per image (multi-label) set data.task = "multilabel"'
            if labels.ndim == 2
            else "",
        )
    return [label_text(label, f"{where}, row {row}") for row, label in enumerate(labels.tolist())]


def label_text(label: object, where: str) -> str:
    """Return one label as text; a whole number reads alike in every type.

    Raises:
        DataError: it is missing, or neither text nor a whole number.
    """
    if isinstance(label, float | np.floating) and float(label).is_integer():
        label = int(label)  # pandas stores whole numbers as floats in a column with gaps
    if isinstance(label, str | int | np.integer | np.bool_) and str(label).strip():
        return str(label).strip()
    if isinstance(label, bytes):
        return label_text(label.decode("utf-8", "replace"), where)
    what = "a label is neither text nor a whole number"
    raise DataError(what, where=where, got=repr(label)[:100])
