"""Data sets whose official files hold pixels: MNIST and Fashion-MNIST (idx), CIFAR-10 and -100, SVHN (MATLAB).

CIFAR's archives are read where they are; nothing is unpacked. Sizes are checked before memory is taken for them.
Memory is what the pixels need as bytes: 55 MB for MNIST, 184 MB for CIFAR; for SVHN see `read_svhn`.
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

from threefold.archives import read_members
from threefold.data__published import DIGITS, FASHION_MNIST_CLASSES, count_note
from threefold.errors import DataError
from threefold.listing import ArrayDataset, ImageArrays, shorten
from threefold.pickled import read_batch

FASHION_MNIST_ROOT = "/usr/share/datasets/fashion-mnist"
"""Where the Debian package `dataset-fashion-mnist` puts its files."""

_LARGEST = 1 << 30
_RECORD = 3 * 32 * 32


def with_row_ids(
    part: str, images: NDArray[np.uint8], labels: NDArray[Any], rows: NDArray[np.integer]
) -> ImageArrays:
    """Images whose ids are their part and their row in the official file."""
    width = max(5, len(str(rows[-1]))) if len(rows) else 5
    return ImageArrays(
        images, labels.astype(np.int64), tuple(f"{part}/{row:0{width}d}" for row in rows)
    )


# idx ------------------------------------------------------------------------------------------------------------------


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """Read an idx file of bytes, the format of MNIST, with `ndim` axes; gzipped where its name ends in .gz.

    Raises:
        DataError: the file is missing, not gzip, not idx with that many axes, or of another length than it says.
    """
    magic = bytes([0, 0, 8, ndim])  # 8 = unsigned bytes
    length = 4 + 4 * ndim
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            head = stream.read(length)
            shape = struct.unpack_from(f">{ndim}L", head.ljust(length, b"\0"), 4)
            body = stream.read(min(prod(shape), _LARGEST) + 1) if head[:4] == magic else b""
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            "cannot read the idx file", where=path, got=getattr(error, "strerror", "") or error
        ) from None
    if head[:4] != magic:
        raise DataError(
            "not such an idx file", where=path, expected=f"magic {magic.hex()}", got=head[:4].hex()
        )
    if len(body) != prod(shape):
        raise DataError(
            "the idx file is not complete",
            where=path,
            expected=f"{prod(shape)} bytes",
            got=len(body),
        )
    return np.frombuffer(body, dtype=np.uint8).reshape(shape)


def read_mnist(root: Path, name: str) -> ArrayDataset:
    """The official split of MNIST or Fashion-MNIST (LeCun et al. 1998; Xiao et al. 2017).

    Args:
        root: folder of the four idx files, gzipped or not, or a folder above their `raw/` (as torchvision keeps them).
        name: `mnist` or `fashion-mnist`.

    Raises:
        DataError: a file is missing, damaged, or labels and images differ in number.
    """
    fix = f"set data.root to the folder of the four files, or run: threefold data fetch {name} --to {root}"
    if name == "fashion-mnist":
        fix = "install the Debian package dataset-fashion-mnist, or " + fix
    parts = []
    for part, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = (
            read_idx(_idx_file(root, f"{prefix}-{what}-idx{ndim}-ubyte", fix), ndim)
            for what, ndim in (("images", 3), ("labels", 1))
        )
        if len(images) != len(labels):
            where = _idx_file(root, f"{prefix}-labels-idx1-ubyte", fix)
            raise DataError(
                "images and labels differ in number",
                where=where,
                expected=len(images),
                got=len(labels),
            )
        parts.append(with_row_ids(part, images, labels, np.arange(len(labels))))
    classes = FASHION_MNIST_CLASSES if name == "fashion-mnist" else DIGITS
    return ArrayDataset(
        parts[0], parts[1], classes, count_note(name, len(parts[0].ids), len(parts[1].ids))
    )


def _idx_file(root: Path, name: str, fix: str) -> Path:
    folders = (root, root / "raw", root / "MNIST/raw", root / "FashionMNIST/raw")
    paths = [folder / (name + suffix) for folder in folders for suffix in (".gz", "")]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        raise DataError("there is no such file of the data set", where=paths[0], fix=fix)
    return found


# CIFAR ----------------------------------------------------------------------------------------------------------------


class _Layout(NamedTuple):
    """One of the two forms in which a CIFAR data set is published."""

    folder: str
    archive: str
    train: tuple[str, ...]
    test: str
    names: str
    read: Callable[[bytes, str, int], tuple[NDArray[np.uint8], NDArray[np.int64]]]
    read_names: Callable[[bytes, str], list[str]]


def read_cifar(root: Path, name: str) -> ArrayDataset:
    """The official split of CIFAR-10 or CIFAR-100 with fine labels (Krizhevsky 2009), python or binary version.

    Pickled batches are read as plain data (`pickled.read_batch`); nothing in them is ever run.

    Args:
        root: the official .tar.gz, a folder that has it, its unpacked folder, or a folder above that.
        name: `cifar10` or `cifar100`.

    Raises:
        DataError: files are missing or damaged, or labels have no name.
    """
    layout, files, where = _cifar_files(root, _LAYOUTS[name], name)
    classes = tuple(layout.read_names(files[layout.names], f"{where}/{layout.names}"))
    if len(classes) != (10 if name == "cifar10" else 100):
        raise DataError(
            "the class names are not complete", where=f"{where}/{layout.names}", got=len(classes)
        )
    parts = []
    for part, batches in (("train", layout.train), ("test", (layout.test,))):
        read = [layout.read(files[batch], f"{where}/{batch}", len(classes)) for batch in batches]
        images = np.concatenate([images for images, _ in read])
        labels = np.concatenate([labels for _, labels in read])
        parts.append(with_row_ids(part, images, labels, np.arange(len(labels))))
    return ArrayDataset(
        parts[0], parts[1], classes, count_note(name, len(parts[0].ids), len(parts[1].ids))
    )


def _cifar_files(
    root: Path, layouts: tuple[_Layout, ...], name: str
) -> tuple[_Layout, dict[str, bytes], Path]:
    """The version that is there, its files' contents, and where they were found."""
    fix = (
        f"set data.root to their folder or archive, or run: threefold data fetch {name} --to {root}"
    )
    for layout in layouts:
        names = (*layout.train, layout.test, layout.names)
        archives = [root] if root.is_file() else [root / layout.archive]
        for folder in (root, root / layout.folder):
            if (folder / layout.train[0]).is_file():
                absent = [file for file in names if not (folder / file).is_file()]
                if absent:
                    raise DataError(
                        "files of the data set are missing",
                        where=folder,
                        got=shorten(absent),
                        fix=fix,
                    )
                return layout, {file: _content(folder / file) for file in names}, folder
        for archive in archives:
            if archive.is_file() and set(found := read_members(archive, names)) == set(names):
                return layout, found, archive
    expected = " or ".join(f"{layout.folder}/ or {layout.archive}" for layout in layouts)
    raise DataError("the data set is not there", where=root, expected=expected, fix=fix)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError("cannot read the file", where=path, got=error.strerror or error) from None


def _read_pickled(
    content: bytes, where: str, classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images (n, 32, 32, 3) and labels (n) of a pickled batch."""
    tree = read_batch(content, where)
    images: Any = tree.get("data")
    labels: Any = tree.get("fine_labels" if classes == 100 else "labels")
    numbers = isinstance(labels, list) and all(isinstance(label, int) for label in labels)
    if not (isinstance(images, np.ndarray) and numbers and images.shape == (len(labels), _RECORD)):
        raise DataError(
            "not a batch of CIFAR",
            where=where,
            expected="data (n, 3072) and n labels",
            got=shorten(map(str, tree)),
        )
    return _upright(
        images,
        np.clip(np.array(labels, dtype=object), -1, classes).astype(np.int64),
        where,
        classes,
    )


def _read_binary(
    content: bytes, where: str, classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images and labels of a binary batch: one label byte (CIFAR-100: coarse and fine), then 3072 bytes."""
    ahead = 2 if classes == 100 else 1
    if not content or len(content) % (ahead + _RECORD):
        raise DataError(
            "not a binary batch of CIFAR",
            where=where,
            expected=f"records of {ahead + _RECORD} bytes",
            got=len(content),
        )
    records = np.frombuffer(content, np.uint8).reshape(-1, ahead + _RECORD)
    return _upright(records[:, ahead:], records[:, ahead - 1].astype(np.int64), where, classes)


def _upright(
    planes: NDArray[np.uint8], labels: NDArray[np.int64], where: str, classes: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            "labels do not fit the classes", where=where, expected=f"0 to {classes - 1}"
        )
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels


def _pickled_names(content: bytes, where: str) -> list[str]:
    tree = read_batch(content, where)
    names = tree.get("fine_label_names", tree.get("label_names"))
    if not isinstance(names, list):
        raise DataError("there are no class names", where=where, got=shorten(map(str, tree)))
    return [
        name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names
    ]


def _listed_names(content: bytes, where: str) -> list[str]:
    return content.decode("utf-8", "replace").split()


_LAYOUTS = {
    "cifar10": (
        _Layout(
            "cifar-10-batches-py",
            "cifar-10-python.tar.gz",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            "test_batch",
            "batches.meta",
            _read_pickled,
            _pickled_names,
        ),
        _Layout(
            "cifar-10-batches-bin",
            "cifar-10-binary.tar.gz",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            "test_batch.bin",
            "batches.meta.txt",
            _read_binary,
            _listed_names,
        ),
    ),
    "cifar100": (
        _Layout(
            "cifar-100-python",
            "cifar-100-python.tar.gz",
            ("train",),
            "test",
            "meta",
            _read_pickled,
            _pickled_names,
        ),
        _Layout(
            "cifar-100-binary",
            "cifar-100-binary.tar.gz",
            ("train.bin",),
            "test.bin",
            "fine_label_names.txt",
            _read_binary,
            _listed_names,
        ),
    ),
}


# SVHN -----------------------------------------------------------------------------------------------------------------


def read_svhn(root: Path, extra: bool) -> ArrayDataset:
    """SVHN, cropped digits (Netzer et al. 2011): train_32x32.mat, test_32x32.mat and, on request, extra_32x32.mat.

    The files call the digit 0 label 10; here a label is its digit. Each part is kept as bytes, and while a file is
    read it is in memory a second time: with `extra`, 604,388 x 3,072 bytes = 1.9 GB, and 1.6 GB more at the peak.

    Args:
        root: folder of the .mat files.
        extra: add the 531,131 extra images to the training set; their ids begin with `extra/`.

    Raises:
        DataError: a file is missing, damaged, or not of this format.
    """
    train = _read_mats(
        [root / f"{part}_32x32.mat" for part in (["extra"] if extra else []) + ["train"]]
    )
    test = _read_mats([root / "test_32x32.mat"])
    return ArrayDataset(
        train, test, DIGITS, count_note("svhn", len(train.ids), len(test.ids), extra)
    )


def _read_mats(paths: list[Path]) -> ImageArrays:
    """The images of several files, one after the other."""
    counts = [_mat_images(path) for path in paths]
    images = np.empty((sum(counts), 32, 32, 3), np.uint8)
    labels = np.empty(sum(counts), np.int64)
    ids: list[str] = []
    for path, count in zip(paths, counts, strict=True):
        rows = slice(len(ids), len(ids) + count)
        # MATLAB's order is (row, column, colour, image).
        images[rows] = _mat_variable(path, "X").transpose(3, 0, 1, 2)
        digits = _mat_variable(path, "y").ravel()
        if len(digits) != count or not np.isin(digits, range(1, 11)).all():
            raise DataError(
                "labels do not fit the images", where=path, expected=f"{count} labels from 1 to 10"
            )
        labels[rows] = digits % 10
        ids += [f"{path.name.split('_')[0]}/{row:06d}" for row in range(count)]
    return ImageArrays(images, labels, tuple(ids))


def _mat_images(path: Path) -> int:
    """How many images a file declares, believed only as far as its size allows."""
    from scipy.io import whosmat

    if not path.is_file():
        fix = f"set data.root to the folder of the .mat files, or run: threefold data fetch svhn --to {path.parent}"
        raise DataError("there is no such file of SVHN", where=path, fix=fix)
    found = {name: (shape, kind) for name, shape, kind in _mat(whosmat, path)}
    shape, kind = found.get("X", ((), ""))
    # Deflate shrinks by 1032 at most; a header may claim more and take all memory.
    sound = (
        len(shape) == 4
        and shape[:3] == (32, 32, 3)
        and kind == "uint8"
        and prod(found.get("y", ((), ""))[0]) == shape[3]
    )
    if not sound or shape[3] * _RECORD > 1032 * path.stat().st_size:
        raise DataError(
            "not a file of SVHN's cropped digits",
            where=path,
            expected="X (32, 32, 3, n) of uint8 and y (n, 1)",
            got=", ".join(f"{name} {shape} of {kind}" for name, (shape, kind) in found.items())
            or "no variables",
        )
    return int(shape[3])


def _mat_variable(path: Path, name: str) -> NDArray[Any]:
    from scipy.io import loadmat

    return np.asarray(_mat(lambda file: loadmat(file, variable_names=[name])[name], path))


def _mat(read: Callable[[str], Any], path: Path) -> Any:
    """What a reader of scipy makes of a MATLAB file."""
    try:
        return read(str(path))
    except Exception as error:  # on damaged files scipy raises errors of nearly every type
        got = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError("cannot read the MATLAB file", where=path, got=got) from None
