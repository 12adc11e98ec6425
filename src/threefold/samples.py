"""Small made-up data sets in exactly the official formats, for tests and for smoke runs of the paper's tables.

Each class has a hue and a stripe pattern of its own, so that a network can learn them within seconds; the values say
nothing about the real data. Files, folders, names, label numbers and byte layouts are those of the official data.
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
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from threefold.data__published import (
    CASSAVA_2020_CLASSES,
    CASSAVA_CLASSES,
    CIFAR10_CLASSES,
    CIFAR100_CLASSES,
    CIFAR100_SUPERCLASSES,
    SURREY_LETTERS,
)
from threefold.errors import DataError, RunError
from threefold.listing import shorten

SPECIES = (("Plants", 3), ("Insects", 2), ("Birds", 1))
"""Super categories of the made-up iNaturalist, and how many species each has."""

SIGNERS = ("A", "B", "C")
"""Signers of the made-up Surrey set; the official one has A to E."""

_Labels = NDArray[np.int64]
_Images = NDArray[np.uint8]


def write_sample(name: str, root: str | Path, seed: int = 0, per_class: int = 6) -> Path:
    """Write a made-up data set in the official format of `name`.

    Args:
        name: one of `SAMPLES`, which are values of `data.source`.
        root: the folder; it is made if need be. What a recipe's `data.root` then has to be.
        seed: of the pictures; the same arguments give the same pixels.
        per_class: training images of each class (Surrey: of each class and signer), 2 or more; the parts that are
            held out or extra have half as many, at least 1.

    Returns:
        `root`.

    Raises:
        DataError: no such data set, or too few images.
        RunError: the folder cannot be written.
    """
    if name not in SAMPLES:
        raise DataError("there is no sample of that data set", got=name, expected=shorten(SAMPLES))
    if per_class < 2:
        raise DataError(
            "a sample needs more images of each class", expected="2 or more", got=per_class
        )
    SAMPLES[name](Path(root), np.random.default_rng(seed), per_class)
    return Path(root)


# Pictures -------------------------------------------------------------------------------------------------------------


def draw(
    labels: _Labels, classes: int, shape: tuple[int, int], rng: np.random.Generator
) -> _Images:
    """Pictures of these classes: stripes in the class's hue, direction and width, at a random place, with noise.

    Args:
        labels: class numbers (n).
        classes: how many classes there are.
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
    hue = 2 * np.pi * (labels / classes)[:, None] + np.array([0, 2, 4]) * np.pi / 3
    colour = 0.5 + 0.4 * np.cos(hue)
    light = 0.75 + 0.2 * stripes + rng.normal(0, 0.05, stripes.shape)
    pixels = 255 * colour[:, None, None, :] * light[..., None]
    noisy: _Images = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
    return noisy


def _shuffled(classes: int, count: int, rng: np.random.Generator) -> _Labels:
    return rng.permutation(np.repeat(np.arange(classes), count))


def _encoded(pixels: _Images, kind: str) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def _put(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise RunError("cannot write", where=path, got=error.strerror or error) from None


def _half(count: int) -> int:
    return max(1, count // 2)


# idx ------------------------------------------------------------------------------------------------------------------


def _write_idx(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """MNIST and Fashion-MNIST: grey values are the class's brightness and stripes."""
    for prefix, count in (("train", per_class), ("t10k", _half(per_class))):
        labels = _shuffled(10, count, rng)
        # Hue is lost in grey: the green channel of the picture varies with it.
        images = draw(labels, 10, (28, 28), rng)[..., 1]
        for what, array in (("images-idx3", images), ("labels-idx1", labels.astype(np.uint8))):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}L", *array.shape)
            content = gzip.compress(header + array.tobytes(), mtime=0)
            _put(root / f"{prefix}-{what}-ubyte.gz", content)


# CIFAR ----------------------------------------------------------------------------------------------------------------


def pickle_as_python2(tree: dict[str, Any]) -> bytes:
    """A dictionary as Python 2's cPickle writes it with protocol 2, the format of CIFAR's python version.

    With the official names it gives the official `batches.meta` and `meta` byte for byte.

    Args:
        tree: values are whole numbers, strings, lists of these, or uint8 arrays of two axes.
    """
    writer = _Pickler()
    writer.dictionary(tree)
    return bytes(writer.out) + b"."


class _Pickler:
    def __init__(self) -> None:
        self.out, self.memo = bytearray(b"\x80\x02"), 0

    def remember(self) -> None:
        self.memo += 1
        self.out += (
            b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<L", self.memo)
        )

    def text(self, value: str) -> None:
        raw = value.encode("latin-1")
        self.out += (
            b"U" + bytes([len(raw)]) if len(raw) < 256 else b"T" + struct.pack("<L", len(raw))
        ) + raw
        self.remember()

    def number(self, value: int) -> None:
        if value < 256:
            self.out += b"K" + bytes([value])
        else:
            self.out += (
                b"M" + struct.pack("<H", value)
                if value < 1 << 16
                else b"J" + struct.pack("<l", value)
            )

    def value(self, value: Any) -> None:
        if isinstance(value, np.ndarray):
            self.array(value)
        elif isinstance(value, list):
            self.listing(value)
        elif isinstance(value, str):
            self.text(value)
        else:
            self.number(int(value))

    def listing(self, values: list[Any]) -> None:
        self.out += b"]"
        self.remember()
        for start in range(0, len(values), 1000):  # cPickle's batches
            self.out += b"("
            for value in values[start : start + 1000]:
                self.value(value)
            self.out += b"e"

    def dictionary(self, tree: dict[str, Any]) -> None:
        self.out += b"}"
        self.remember()
        self.out += b"("
        for key, value in tree.items():
            self.text(key)
            self.value(value)
        self.out += b"u"

    def name(self, text: bytes) -> None:
        self.out += b"c" + text
        self.remember()

    def array(self, array: _Images) -> None:
        self.name(b"numpy.core.multiarray\n_reconstruct\n")
        self.name(b"numpy\nndarray\n")
        self.out += b"K\0\x85"
        self.remember()
        self.text("b")
        self.out += b"\x87"
        self.remember()
        self.out += b"R"
        self.remember()
        self.out += b"(K\1"
        for side in array.shape:
            self.number(side)
        self.out += b"\x86"
        self.remember()
        self.name(b"numpy\ndtype\n")
        self.text("u1")
        self.out += b"K\0K\1\x87"
        self.remember()
        self.out += b"R"
        self.remember()
        self.out += b"(K\3"
        self.text("|")
        self.out += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0t"
        self.remember()
        self.out += b"b\x89"
        self.text(array.tobytes().decode("latin-1"))
        self.out += b"t"
        self.remember()
        self.out += b"b"


def _planes(labels: _Labels, classes: int, rng: np.random.Generator) -> _Images:
    """Rows of 3072 bytes: all red, then all green, then all blue values."""
    return np.ascontiguousarray(draw(labels, classes, (32, 32), rng).transpose(0, 3, 1, 2)).reshape(
        len(labels), -1
    )


def _write_cifar10(root: Path, rng: np.random.Generator, per_class: int) -> None:
    folder = root / "cifar-10-batches-py"
    labels = np.array_split(_shuffled(10, per_class, rng), 5)
    batches = [
        (f"data_batch_{i + 1}", f"training batch {i + 1} of 5", batch)
        for i, batch in enumerate(labels)
    ]
    batches.append(("test_batch", "testing batch 1 of 1", _shuffled(10, _half(per_class), rng)))
    for name, title, batch in batches:
        tree = {
            "batch_label": title,
            "labels": batch.tolist(),
            "data": _planes(batch, 10, rng),
            "filenames": [
                f"{CIFAR10_CLASSES[label]}_s_{i:06d}.png" for i, label in enumerate(batch)
            ],
        }
        _put(folder / name, pickle_as_python2(tree))
    meta = {"num_cases_per_batch": 10_000, "label_names": list(CIFAR10_CLASSES), "num_vis": 3072}
    _put(folder / "batches.meta", pickle_as_python2(meta))


def _write_cifar100(root: Path, rng: np.random.Generator, per_class: int) -> None:
    folder = root / "cifar-100-python"
    for name, title, count in (
        ("train", "training batch 1 of 1", per_class),
        ("test", "testing batch 1 of 1", _half(per_class)),
    ):
        labels = _shuffled(100, count, rng)
        tree = {
            "filenames": [
                f"{CIFAR100_CLASSES[label]}_s_{i:06d}.png" for i, label in enumerate(labels)
            ],
            "batch_label": title,
            "fine_labels": labels.tolist(),
            "coarse_labels": (labels % 20).tolist(),
            "data": _planes(labels, 100, rng),
        }
        _put(folder / name, pickle_as_python2(tree))
    meta = {
        "fine_label_names": list(CIFAR100_CLASSES),
        "coarse_label_names": list(CIFAR100_SUPERCLASSES),
    }
    _put(folder / "meta", pickle_as_python2(meta))


# SVHN -----------------------------------------------------------------------------------------------------------------


def _write_svhn(root: Path, rng: np.random.Generator, per_class: int) -> None:
    from scipy.io import savemat

    for part, count in (
        ("train", per_class),
        ("extra", _half(per_class)),
        ("test", _half(per_class)),
    ):
        digits = _shuffled(10, count, rng)
        images = draw(digits, 10, (32, 32), rng).transpose(1, 2, 3, 0)
        stream = io.BytesIO()
        savemat(
            stream,
            {"X": images, "y": np.where(digits == 0, 10, digits).astype(np.uint8)[:, None]},
            do_compression=True,
        )
        _put(root / f"{part}_32x32.mat", stream.getvalue())


# Photos ---------------------------------------------------------------------------------------------------------------


def _write_inaturalist(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """The images as files, the annotations in their .tar.gz, as they are published."""
    supers = [name for name, count in SPECIES for _ in range(count)]
    categories = [{"id": i, "name": str(i), "supercategory": name} for i, name in enumerate(supers)]
    number = 0
    for part, count in (("train", per_class), ("val", _half(per_class))):
        labels = _shuffled(len(supers), count, rng)
        images, annotations = [], []
        for label, pixels in zip(labels, draw(labels, len(supers), (48, 60), rng), strict=True):
            file = f"train_val2019/{supers[label]}/{label}/{rng.bytes(16).hex()}.jpg"
            _put(root / file, _encoded(pixels, "JPEG"))
            images.append(
                {
                    "id": number,
                    "file_name": file,
                    "width": 60,
                    "height": 48,
                    "license": 3,
                    "rights_holder": "",
                }
            )
            annotations.append({"id": number, "image_id": number, "category_id": int(label)})
            number += 1
        tree = {
            "info": {},
            "images": images,
            "licenses": [],
            "annotations": annotations,
            "categories": categories,
        }
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as archive:
            content = json.dumps(tree).encode()
            entry = tarfile.TarInfo(f"{part}2019.json")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
        _put(root / f"{part}2019.json.tar.gz", packed.getvalue())


def _write_icassava(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """The edition with three labelled parts, as its archive."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for part, count in (
            ("train", per_class),
            ("test", _half(per_class)),
            ("validation", _half(per_class)),
        ):
            labels = np.repeat(np.arange(len(CASSAVA_CLASSES)), count)
            for i, (label, pixels) in enumerate(
                zip(labels, draw(labels, 5, (50, 70), rng), strict=True)
            ):
                name = CASSAVA_CLASSES[label]
                archive.writestr(
                    f"cassavaleafdata/{part}/{name}/{part}-{name}-{i % count}.jpg",
                    _encoded(pixels, "JPEG"),
                )
    _put(root / "cassavaleafdata.zip", packed.getvalue())


def _write_cassava2020(root: Path, rng: np.random.Generator, per_class: int) -> None:
    labels = _shuffled(5, per_class, rng)
    rows = []
    for label, pixels in zip(labels, draw(labels, 5, (60, 80), rng), strict=True):
        rows.append((f"{rng.integers(10**6, 2**32)}.jpg", int(label)))
        _put(root / "train_images" / rows[-1][0], _encoded(pixels, "JPEG"))
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([("image_id", "label"), *rows])
    _put(root / "train.csv", table.getvalue().encode())
    names = {str(label): name for label, name in enumerate(CASSAVA_2020_CLASSES)}
    _put(root / "label_num_to_disease_map.json", json.dumps(names).encode())
    _put(
        root / "test_images/2216849948.jpg",
        _encoded(draw(np.array([0]), 5, (60, 80), rng)[0], "JPEG"),
    )


def _write_surrey(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """Colour and depth images; the depth is 16-bit grey, as a Kinect gives it."""
    for signer in SIGNERS:
        labels = np.repeat(np.arange(len(SURREY_LETTERS)), per_class)
        for i, (label, pixels) in enumerate(
            zip(labels, draw(labels, 24, (40, 36), rng), strict=True)
        ):
            folder, number = (
                root / "dataset5" / signer / SURREY_LETTERS[label],
                f"{label:d}_{i % per_class + 2:04d}.png",
            )
            _put(folder / f"color_{number}", _encoded(pixels, "PNG"))
            depth = Image.fromarray(rng.integers(0, 4000, pixels.shape[:2]).astype(np.uint16))
            stream = io.BytesIO()
            depth.save(stream, "PNG")
            _put(folder / f"depth_{number}", stream.getvalue())


def _write_folder(root: Path, rng: np.random.Generator, per_class: int) -> None:
    """Class folders of PNG files below train/ and test/."""
    names = ("one", "two", "three")
    for part, count in (("train", per_class), ("test", _half(per_class))):
        labels = np.repeat(np.arange(len(names)), count)
        for i, (label, pixels) in enumerate(
            zip(labels, draw(labels, len(names), (40, 48), rng), strict=True)
        ):
            _put(root / part / names[label] / f"{i % count:03d}.png", _encoded(pixels, "PNG"))


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
"""What can be made up, by the name that a recipe's `data.source` has for it."""
