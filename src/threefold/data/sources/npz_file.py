"""Images in the arrays of an .npz file, as Keras and MedMNIST publish them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from threefold.data.sources.arrays import with_row_ids
from threefold.data.sources.folder import ArrayDataset, ImageArrays
from threefold.data.split_names import PARTS, split_of
from threefold.errors import DataError, RunError, shorten
from threefold.files import read_arrays
from threefold.names import natural_key

_IMAGES: Final = ("images", "image", "x")
_LABELS: Final = ("labels", "label", "y", "targets", "target")


def read_npz(path: Path) -> ArrayDataset:
    """Read images and labels from the arrays of an .npz file.

    The arrays are called `images` and `labels`, or `x` and `y`; with `train`, `val` or `test` in
    their names, as in `x_train` or `test_images`, they are a part of the data. Labels are whole
    numbers or texts (n,) or (n, 1), images uint8 (n, h, w), (n, h, w, 1) or (n, h, w, 3).

    Raises:
        DataError: the file cannot be read, or its arrays are not images with labels.
    """
    if not path.is_file():
        raise DataError("no such file", where=path)
    try:
        arrays = read_arrays(path)
    except RunError as error:
        raise DataError("cannot read the file of arrays", where=path, got=error) from None
    found = _find_arrays(arrays, path)
    images: dict[str, list[NDArray[np.uint8]]] = {"train": [], "test": []}
    labels: dict[str, list[str]] = {"train": [], "test": []}
    for split, (image_key, label_key) in found.items():
        part = check_images(arrays[image_key], f"{path}: {image_key}")
        texts = label_texts(arrays[label_key], f"{path}: {label_key}")
        if len(part) != len(texts):
            raise DataError(
                "images and labels differ in number",
                where=path,
                got=f"{len(part)} {image_key}, {len(texts)} {label_key}",
            )
        images[PARTS[split]].append(part)
        labels[PARTS[split]] += texts
    classes = tuple(sorted(set(labels["train"]), key=natural_key))
    unknown = sorted(set(labels["test"]) - set(classes), key=natural_key)
    if unknown:
        raise DataError(
            "classes differ between train and test",
            where=path,
            got=f"only in test: {shorten(unknown)}",
        )
    number = {name: label for label, name in enumerate(classes)}
    parts: dict[str, ImageArrays] = {}
    for part_name in ("train", "test"):
        if images[part_name]:
            pixels = _join(images[part_name], path)
            coded = np.array([number[name] for name in labels[part_name]], dtype=np.int64)
            parts[part_name] = with_row_ids(part_name, pixels, coded, np.arange(len(coded)))
    if "train" not in parts:
        raise DataError("there are no training images", where=path, got=shorten(arrays))
    notes = ["the validation images were joined with train"] if "val" in found else []
    return ArrayDataset(parts["train"], parts.get("test"), classes, notes)


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
            fix="several labels per image (multi-label) are not supported yet"
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
