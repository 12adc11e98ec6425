"""Data sets whose official files hold pixels: MNIST and Fashion-MNIST, CIFAR-10 and -100, SVHN.

CIFAR's archives are read in place, without unpacking. Declared sizes are checked before memory is
allocated for them. The pixels are kept as bytes: 55 MB for MNIST, 184 MB for CIFAR; for SVHN see
`read_svhn`. torchvision's readers are not used: they import torch, read only complete official
files (by MD5), and unpickle CIFAR.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from threefold.data.published import DIGITS, FASHION_MNIST_CLASSES, count_note
from threefold.data.sources.archives import read_members
from threefold.data.sources.cifar_pickle import read_batch
from threefold.data.sources.folder import ArrayDataset, ImageArrays, read_file
from threefold.errors import DataError, shorten

FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"
"""Where the Debian package `dataset-fashion-mnist` installs its files."""

_MAX_IDX_BYTES = 1 << 30
_IMAGE_BYTES = 3 * 32 * 32


def with_row_ids(
    part: str, images: NDArray[np.uint8], labels: NDArray[Any], rows: NDArray[np.integer]
) -> ImageArrays:
    """Give images the ids `part/row`.

    Args:
        part: `train` or `test`.
        images: (n, h, w) or (n, h, w, 3).
        labels: (n,).
        rows: ascending rows of the images in the official files (n,).
    """
    width = max(5, len(str(rows[-1]))) if len(rows) else 5
    ids = tuple(f"{part}/{row:0{width}d}" for row in rows)
    return ImageArrays(images, labels.astype(np.int64), ids)


def _with_all_rows(part: str, images: NDArray[np.uint8], labels: NDArray[Any]) -> ImageArrays:
    return with_row_ids(part, images, labels, np.arange(len(labels)))


def _fetch_hint(what: str, name: str, root: Path) -> str:
    return f"set data.root to {what}, or run: threefold data fetch {name} --to {root}"


# MNIST


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes, the format of MNIST; gzipped if its name ends in .gz.

    Args:
        path: the file.
        ndim: the number of axes that it must have.

    Raises:
        DataError: the file is missing, is not a gzip or idx file with that many axes, or is
            shorter or longer than its header says.
    """
    magic = bytes([0, 0, 8, ndim])  # 8 = unsigned bytes
    header_size = 4 + 4 * ndim
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            header = stream.read(header_size)
            shape = struct.unpack_from(f">{ndim}L", header.ljust(header_size, b"\0"), 4)
            body = stream.read(min(prod(shape), _MAX_IDX_BYTES) + 1) if header[:4] == magic else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError("cannot read the idx file", where=path, got=error) from None
    if header[:4] != magic:
        expected = f"magic {magic.hex()}"
        raise DataError("not such an idx file", where=path, expected=expected, got=header[:4].hex())
    if len(body) != prod(shape):
        expected = f"{prod(shape)} bytes"
        raise DataError(
            "the idx file is not complete", where=path, expected=expected, got=len(body)
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def read_mnist(root: Path, name: str) -> ArrayDataset:
    """Read MNIST or Fashion-MNIST (LeCun et al. 1998; Xiao et al. 2017).

    Args:
        root: folder of the four idx files, gzipped or not, or a folder above torchvision's `raw/`.
        name: `mnist` or `fashion-mnist`.

    Raises:
        DataError: a file is missing or damaged, or labels and images differ in number.
    """
    train = _read_idx_pair(root, name, part="train", prefix="train")
    test = _read_idx_pair(root, name, part="test", prefix="t10k")
    classes = FASHION_MNIST_CLASSES if name == "fashion-mnist" else DIGITS
    return ArrayDataset(train, test, classes, count_note(name, len(train.ids), len(test.ids)))


def _read_idx_pair(root: Path, name: str, part: str, prefix: str) -> ImageArrays:
    images = read_idx(_find_idx(root, name, f"{prefix}-images-idx3-ubyte"), ndim=3)
    labels_path = _find_idx(root, name, f"{prefix}-labels-idx1-ubyte")
    labels = read_idx(labels_path, ndim=1)
    if len(images) != len(labels):
        raise DataError(
            "images and labels differ in number",
            where=labels_path,
            expected=len(images),
            got=len(labels),
        )
    return _with_all_rows(part, images, labels)


def _find_idx(root: Path, name: str, file: str) -> Path:
    folders = (root, root / "raw", root / "MNIST/raw", root / "FashionMNIST/raw")
    paths = [folder / (file + suffix) for folder in folders for suffix in (".gz", "")]
    for path in paths:
        if path.is_file():
            return path
    fix = _fetch_hint("the folder of the four files", name, root)
    if name == "fashion-mnist":
        fix = "install the Debian package dataset-fashion-mnist, or " + fix
    raise DataError("a file of the data set is missing", where=paths[0], fix=fix)


# CIFAR


class _CifarLayout(NamedTuple):
    """One of the two published versions of a CIFAR data set."""

    binary: bool
    folder: str
    archive: str
    train_files: tuple[str, ...]
    test_file: str
    names_file: str

    @property
    def files(self) -> tuple[str, ...]:
        return (*self.train_files, self.test_file, self.names_file)


_CIFAR_LAYOUTS = {
    "cifar10": (
        _CifarLayout(
            binary=False,
            folder="cifar-10-batches-py",
            archive="cifar-10-python.tar.gz",
            train_files=tuple(f"data_batch_{i}" for i in range(1, 6)),
            test_file="test_batch",
            names_file="batches.meta",
        ),
        _CifarLayout(
            binary=True,
            folder="cifar-10-batches-bin",
            archive="cifar-10-binary.tar.gz",
            train_files=tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            test_file="test_batch.bin",
            names_file="batches.meta.txt",
        ),
    ),
    "cifar100": (
        _CifarLayout(
            binary=False,
            folder="cifar-100-python",
            archive="cifar-100-python.tar.gz",
            train_files=("train",),
            test_file="test",
            names_file="meta",
        ),
        _CifarLayout(
            binary=True,
            folder="cifar-100-binary",
            archive="cifar-100-binary.tar.gz",
            train_files=("train.bin",),
            test_file="test.bin",
            names_file="fine_label_names.txt",
        ),
    ),
}


def read_cifar(root: Path, name: str) -> ArrayDataset:
    """Read CIFAR-10, or CIFAR-100 with fine labels (Krizhevsky 2009), python or binary version.

    The pickles of the python version are read as plain data; nothing in them runs.

    Args:
        root: the official .tar.gz, its unpacked folder, or a folder that contains either.
        name: `cifar10` or `cifar100`.

    Raises:
        DataError: files are missing or damaged, or labels have no name.
    """
    num_classes = 10 if name == "cifar10" else 100
    layout, contents, source = _find_cifar(root, name)
    names_path = f"{source}/{layout.names_file}"
    names_content = contents[layout.names_file]
    if layout.binary:
        classes = tuple(names_content.decode("utf-8", "replace").split())
    else:
        classes = _parse_pickled_names(names_content, names_path)
    if len(classes) != num_classes:
        raise DataError("the class names are not complete", where=names_path, got=len(classes))
    parse = _parse_binary_batch if layout.binary else _parse_pickled_batch
    parts = []
    for part, files in (("train", layout.train_files), ("test", (layout.test_file,))):
        batches = [parse(contents[file], f"{source}/{file}", num_classes) for file in files]
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        parts.append(_with_all_rows(part, images, labels))
    train, test = parts
    return ArrayDataset(train, test, classes, count_note(name, len(train.ids), len(test.ids)))


def _find_cifar(root: Path, name: str) -> tuple[_CifarLayout, dict[str, bytes], Path]:
    """Find a version of the data set; return its layout, its files, and the folder or archive."""
    layouts = _CIFAR_LAYOUTS[name]
    fix = _fetch_hint("their folder or archive", name, root)
    for layout in layouts:
        for folder in (root, root / layout.folder):
            if (folder / layout.train_files[0]).is_file():
                missing = [file for file in layout.files if not (folder / file).is_file()]
                if missing:
                    what = "files of the data set are missing"
                    raise DataError(what, where=folder, got=shorten(missing), fix=fix)
                return layout, {file: read_file(folder / file) for file in layout.files}, folder
        archive = root if root.is_file() else root / layout.archive
        if archive.is_file():
            contents = read_members(archive, layout.files)
            if set(contents) == set(layout.files):
                return layout, contents, archive
    expected = " or ".join(f"{layout.folder}/ or {layout.archive}" for layout in layouts)
    raise DataError("the data set is not there", where=root, expected=expected, fix=fix)


def _parse_pickled_batch(
    content: bytes, where: str, num_classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 32, 32, 3) and labels (n,)."""
    batch = read_batch(content, where)
    planes: Any = batch.get("data")
    labels: Any = batch.get("fine_labels" if num_classes == 100 else "labels")
    are_numbers = isinstance(labels, list) and all(isinstance(label, int) for label in labels)
    if not (
        isinstance(planes, np.ndarray)
        and are_numbers
        and planes.shape == (len(labels), _IMAGE_BYTES)
    ):
        expected, got = "data (n, 3072) and n labels", shorten(batch)
        raise DataError("not a batch of CIFAR", where=where, expected=expected, got=got)
    # Numbers of any size fit an object array; those out of range stay out of range when clipped.
    clipped = np.clip(np.array(labels, dtype=object), -1, num_classes).astype(np.int64)
    return _planes_to_images(planes, clipped, where, num_classes)


def _parse_binary_batch(
    content: bytes, where: str, num_classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 32, 32, 3) and labels (n,).

    A record is the label and the pixels; CIFAR-100 has the coarse label before the fine one.
    """
    label_bytes = 2 if num_classes == 100 else 1
    record_bytes = label_bytes + _IMAGE_BYTES
    if not content or len(content) % record_bytes:
        raise DataError(
            "not a batch of CIFAR",
            where=where,
            expected=f"records of {record_bytes} bytes",
            got=len(content),
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, record_bytes)
    labels = records[:, label_bytes - 1].astype(np.int64)
    return _planes_to_images(records[:, label_bytes:], labels, where, num_classes)


def _planes_to_images(
    planes: NDArray[np.uint8], labels: NDArray[np.int64], where: str, num_classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Turn planes of red, green and blue (n, 3072) into images, and check the labels."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        expected = f"0 to {num_classes - 1}"
        raise DataError("labels do not fit the classes", where=where, expected=expected)
    images = np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return images, labels


def _parse_pickled_names(content: bytes, where: str) -> tuple[str, ...]:
    meta = read_batch(content, where)
    names = meta.get("fine_label_names", meta.get("label_names"))
    if not isinstance(names, list):
        raise DataError("there are no class names", where=where, got=shorten(meta))
    return tuple(
        name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names
    )


# SVHN


def read_svhn(root: Path, extra: bool) -> ArrayDataset:
    """Read the cropped digits of SVHN (Netzer et al. 2011).

    The files store the digit 0 as label 10; here a label is its digit. While a file is read it is
    in memory twice: with `extra`, 604,388 x 3,072 bytes = 1.9 GB, and 1.6 GB more at the peak.

    Args:
        root: folder of train_32x32.mat, test_32x32.mat and, with `extra`, extra_32x32.mat.
        extra: add the 531,131 extra images to the training set; their ids begin with `extra/`.

    Raises:
        DataError: a file is missing, damaged, or not of this format.
    """
    train_parts = ("extra", "train") if extra else ("train",)
    train = _read_mats([root / f"{part}_32x32.mat" for part in train_parts])
    test = _read_mats([root / "test_32x32.mat"])
    notes = count_note("svhn", len(train.ids), len(test.ids), extra)
    return ArrayDataset(train, test, DIGITS, notes)


def _read_mats(paths: list[Path]) -> ImageArrays:
    """Concatenate the images of several files."""
    counts = [_count_mat_images(path) for path in paths]
    images = np.empty((sum(counts), 32, 32, 3), np.uint8)
    labels = np.empty(sum(counts), np.int64)
    ids: list[str] = []
    for path, count in zip(paths, counts, strict=True):
        rows = slice(len(ids), len(ids) + count)
        # MATLAB's order is (row, column, channel, image).
        images[rows] = _read_mat_variable(path, "X").transpose(3, 0, 1, 2)
        digits = _read_mat_variable(path, "y").ravel()
        if len(digits) != count or not np.isin(digits, range(1, 11)).all():
            expected = f"{count} labels from 1 to 10"
            raise DataError("labels do not fit the images", where=path, expected=expected)
        labels[rows] = digits % 10
        part = path.name.partition("_")[0]
        ids += [f"{part}/{row:06d}" for row in range(count)]
    return ImageArrays(images, labels, tuple(ids))


def _count_mat_images(path: Path) -> int:
    """Read the number of images that a file declares, and check it against the file's size."""
    from scipy.io import whosmat

    if not path.is_file():
        fix = _fetch_hint("the folder of the .mat files", "svhn", path.parent)
        raise DataError("a file of SVHN is missing", where=path, fix=fix)
    variables = {name: (shape, dtype) for name, shape, dtype in _call_scipy(whosmat, path)}
    shape, dtype = variables.get("X", ((), ""))
    labels_shape, _ = variables.get("y", ((), ""))
    is_svhn = (
        len(shape) == 4
        and shape[:3] == (32, 32, 3)
        and dtype == "uint8"
        and prod(labels_shape) == shape[3]
    )
    # Deflate shrinks by 1032 at most; a damaged header may declare more and exhaust the memory.
    if not is_svhn or shape[3] * _IMAGE_BYTES > 1032 * path.stat().st_size:
        contents = [f"{name} {shape} of {dtype}" for name, (shape, dtype) in variables.items()]
        raise DataError(
            "not a file of SVHN's cropped digits",
            where=path,
            expected="X (32, 32, 3, n) of uint8 and y (n, 1)",
            got=", ".join(contents) or "no variables",
        )
    return int(shape[3])


def _read_mat_variable(path: Path, name: str) -> NDArray[Any]:
    from scipy.io import loadmat

    return np.asarray(_call_scipy(lambda file: loadmat(file, variable_names=[name])[name], path))


def _call_scipy(read: Callable[[str], Any], path: Path) -> Any:
    try:
        return read(str(path))
    except Exception as error:  # on damaged files scipy raises errors of nearly every type
        got = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError("cannot read the MATLAB file", where=path, got=got) from None
