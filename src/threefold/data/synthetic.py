"""Synthetic data sets in the official formats, for tests and smoke runs of the paper's tables.

Each class has its own hue and stripe pattern, so that a network can learn it within seconds; the
images say nothing about the real data. Files, folders, names, label numbers and byte layouts are
those of the official data.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from threefold.data.published import (
    CASSAVA_2020_CLASSES,
    CASSAVA_CLASSES,
    CIFAR10_CLASSES,
    CIFAR100_CLASSES,
    CIFAR100_SUPERCLASSES,
    SURREY_LETTERS,
)
from threefold.errors import DataError, RunError, shorten

SPECIES = (("Plants", 3), ("Insects", 2), ("Birds", 1))
"""Super-categories of the synthetic iNaturalist, and their number of species."""

SIGNERS = ("A", "B", "C")
"""Signers of the synthetic Surrey set; the official one has A to E."""

_Labels = NDArray[np.int64]
_Images = NDArray[np.uint8]


def write_sample(name: str, root: str | Path, seed: int = 0, per_class: int = 6) -> Path:
    """Write a synthetic data set in the official format of `name`.

    Args:
        name: a key of `SAMPLES`, which is a `data.source`.
        root: the folder, made if needed; what a recipe's `data.root` must be.
        seed: seed of the images; equal arguments give equal pixels.
        per_class: training images per class (Surrey: per class and signer), 2 or more. Held-out
            and extra parts have half as many, at least 1.

    Returns:
        `root`.

    Raises:
        DataError: there is no such sample, or too few images are requested.
        RunError: the folder cannot be written.
    """
    if name not in SAMPLES:
        raise DataError("there is no sample of that data set", got=name, expected=shorten(SAMPLES))
    if per_class < 2:
        what = "a sample needs more images of each class"
        raise DataError(what, expected="2 or more", got=per_class)
    SAMPLES[name](Path(root), np.random.default_rng(seed), per_class)
    return Path(root)


def draw_images(
    labels: _Labels, num_classes: int, shape: tuple[int, int], rng: np.random.Generator
) -> _Images:
    """Draw stripes in the hue, direction and width of each class, with random phase and noise.

    Args:
        labels: class numbers (n,).
        num_classes: number of classes.
        shape: height and width in pixels.
        rng: source of phase, brightness and noise.

    Returns:
        uint8 pixels (n, height, width, 3).
    """
    height, width = shape
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    angle = np.pi * (labels * 0.381966 % 1)
    waves = 1.5 + labels % 3
    phase = rng.uniform(0, 2 * np.pi, len(labels))
    along = np.cos(angle)[:, None, None] * x + np.sin(angle)[:, None, None] * y
    stripes = np.sin(2 * np.pi * waves[:, None, None] * along + phase[:, None, None])
    hue = 2 * np.pi * (labels / num_classes)[:, None] + np.array([0, 2, 4]) * np.pi / 3
    colour = 0.5 + 0.4 * np.cos(hue)
    light = 0.75 + 0.2 * stripes + rng.normal(0, 0.05, stripes.shape)
    pixels = 255 * colour[:, None, None, :] * light[..., None]
    noisy: _Images = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    return noisy


def _shuffled_labels(num_classes: int, count: int, rng: np.random.Generator) -> _Labels:
    return rng.permutation(np.repeat(np.arange(num_classes), count))


def _encode(pixels: _Images | NDArray[np.uint16], format: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format)
    return stream.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise RunError("cannot write", where=path, got=error) from None


def _half(count: int) -> int:
    return max(1, count // 2)


def _write_idx(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """MNIST and Fashion-MNIST."""
    for prefix, count in (("train", per_class), ("t10k", _half(per_class))):
        labels = _shuffled_labels(10, count, rng)
        # Grey images have no hue, but the green channel differs between the hues.
        images = draw_images(labels, 10, (28, 28), rng)[..., 1]
        for kind, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}L", *array.shape)
            content = gzip.compress(header + array.tobytes(), mtime=0)
            _write(root / f"{prefix}-{kind}-ubyte.gz", content)


def _cifar_records(
    labels: _Labels, label_columns: list[_Labels], num_classes: int, rng: np.random.Generator
) -> bytes:
    """Records of the label bytes, then all red, all green and all blue values of an image."""
    images = draw_images(labels, num_classes, (32, 32), rng)
    planes = images.transpose(0, 3, 1, 2).reshape(len(labels), -1)
    return np.column_stack([*label_columns, planes]).astype(np.uint8).tobytes()


def _write_cifar10(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """The binary version."""
    folder = root / "cifar-10-batches-bin"
    batches = np.array_split(_shuffled_labels(10, per_class, rng), 5)
    files = [(f"data_batch_{i}.bin", labels) for i, labels in enumerate(batches, start=1)]
    files.append(("test_batch.bin", _shuffled_labels(10, _half(per_class), rng)))
    for name, labels in files:
        _write(folder / name, _cifar_records(labels, [labels], 10, rng))
    _write(folder / "batches.meta.txt", "\n".join([*CIFAR10_CLASSES, ""]).encode())


def _write_cifar100(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """The binary version."""
    folder = root / "cifar-100-binary"
    for name, count in (("train.bin", per_class), ("test.bin", _half(per_class))):
        labels = _shuffled_labels(100, count, rng)
        _write(folder / name, _cifar_records(labels, [labels % 20, labels], 100, rng))
    _write(folder / "fine_label_names.txt", "\n".join([*CIFAR100_CLASSES, ""]).encode())
    _write(folder / "coarse_label_names.txt", "\n".join([*CIFAR100_SUPERCLASSES, ""]).encode())


def _write_svhn(root: Path, rng: np.random.Generator, per_class: int) -> None:
    from scipy.io import savemat

    half = _half(per_class)
    for part, count in (("train", per_class), ("extra", half), ("test", half)):
        digits = _shuffled_labels(10, count, rng)
        images = draw_images(digits, 10, (32, 32), rng).transpose(1, 2, 3, 0)
        labels = np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]
        stream = io.BytesIO()
        savemat(stream, {"X": images, "y": labels}, do_compression=True)
        _write(root / f"{part}_32x32.mat", stream.getvalue())


def _write_inaturalist(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """The images as files, the annotations in their .tar.gz, as they are published."""
    supers = [name for name, count in SPECIES for _ in range(count)]
    categories = [{"id": i, "name": str(i), "supercategory": name} for i, name in enumerate(supers)]
    number = 0
    for part, count in (("train", per_class), ("val", _half(per_class))):
        labels = _shuffled_labels(len(supers), count, rng)
        pictures = draw_images(labels, len(supers), (48, 60), rng)
        images, annotations = [], []
        for label, pixels in zip(labels, pictures, strict=True):
            file = f"train_val2019/{supers[label]}/{label}/{rng.bytes(16).hex()}.jpg"
            _write(root / file, _encode(pixels, "JPEG"))
            image = {"id": number, "file_name": file, "width": 60, "height": 48}
            images.append({**image, "license": 3, "rights_holder": ""})
            annotations.append({"id": number, "image_id": number, "category_id": int(label)})
            number += 1
        tree = {
            "info": {},
            "images": images,
            "licenses": [],
            "annotations": annotations,
            "categories": categories,
        }
        _write(root / f"{part}2019.json.tar.gz", _pack_json(f"{part}2019.json", tree))


def _pack_json(name: str, tree: object) -> bytes:
    """A .tar.gz with one JSON file."""
    content = json.dumps(tree).encode()
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def _write_icassava(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """The edition with three labelled parts, as its archive."""
    half = _half(per_class)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for part, count in (("train", per_class), ("test", half), ("validation", half)):
            labels = np.repeat(np.arange(len(CASSAVA_CLASSES)), count)
            images = draw_images(labels, 5, (50, 70), rng)
            for i, (label, pixels) in enumerate(zip(labels, images, strict=True)):
                name = CASSAVA_CLASSES[label]
                file = f"cassavaleafdata/{part}/{name}/{part}-{name}-{i % count}.jpg"
                archive.writestr(file, _encode(pixels, "JPEG"))
    _write(root / "cassavaleafdata.zip", packed.getvalue())


def _write_cassava2020(root: Path, rng: np.random.Generator, per_class: int) -> None:
    labels = _shuffled_labels(5, per_class, rng)
    rows = []
    for label, pixels in zip(labels, draw_images(labels, 5, (60, 80), rng), strict=True):
        file = f"{rng.integers(10**6, 2**32)}.jpg"
        rows.append((file, int(label)))
        _write(root / "train_images" / file, _encode(pixels, "JPEG"))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("image_id", "label"), *rows])
    _write(root / "train.csv", table.getvalue().encode())
    names = {str(label): name for label, name in enumerate(CASSAVA_2020_CLASSES)}
    _write(root / "label_num_to_disease_map.json", json.dumps(names).encode())
    (test_image,) = draw_images(np.array([0]), 5, (60, 80), rng)
    _write(root / "test_images/2216849948.jpg", _encode(test_image, "JPEG"))


def _write_surrey(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """Colour images, and depth images in 16-bit grey as a Kinect gives them."""
    for signer in SIGNERS:
        labels = np.repeat(np.arange(len(SURREY_LETTERS)), per_class)
        images = draw_images(labels, 24, (40, 36), rng)
        for i, (label, pixels) in enumerate(zip(labels, images, strict=True)):
            folder = root / "dataset5" / signer / SURREY_LETTERS[label]
            number = f"{label:d}_{i % per_class + 2:04d}"
            _write(folder / f"color_{number}.png", _encode(pixels, "PNG"))
            depth = rng.integers(0, 4000, pixels.shape[:2]).astype(np.uint16)
            _write(folder / f"depth_{number}.png", _encode(depth, "PNG"))


def _write_folder(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """Class folders of PNG files below train/ and test/."""
    names = ("one", "two", "three")
    for part, count in (("train", per_class), ("test", _half(per_class))):
        labels = np.repeat(np.arange(len(names)), count)
        images = draw_images(labels, len(names), (40, 48), rng)
        for i, (label, pixels) in enumerate(zip(labels, images, strict=True)):
            _write(root / part / names[label] / f"{i % count:03d}.png", _encode(pixels, "PNG"))


SAMPLES: dict[str, Callable[[Path, np.random.Generator, int], None]] = {
    "folder": _write_folder,
    "mnist": _write_idx,
    "fashion-mnist": _write_idx,
    "cifar10": _write_cifar10,
    "cifar100": _write_cifar100,
    "svhn": _write_svhn,
    "inaturalist2019": _write_inaturalist,
    "icassava2019": _write_icassava,
    "cassava2020": _write_cassava2020,
    "surrey-asl": _write_surrey,
}
"""The writer of each sample, by `data.source`."""
