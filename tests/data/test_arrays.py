"""MNIST, CIFAR and SVHN in their official formats, and damaged files of each."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cifar import pickle_as_python2, write_python_cifar
from support.sources import load_source

from threefold.data.published import CIFAR10_CLASSES, CIFAR100_CLASSES, DIGITS
from threefold.data.sources.arrays import read_cifar, read_idx, read_mnist, read_svhn
from threefold.data.synthetic import write_sample
from threefold.errors import DataError

# MNIST


def test_mnist_gzipped_plain_and_below_raw(tmp_path: Path) -> None:
    write_sample("mnist", tmp_path / "MNIST/raw")

    sources = load_source("mnist", tmp_path)

    assert sources.test is not None
    assert (sources.train.classes, len(sources.train), len(sources.test)) == (DIGITS, 60, 30)
    assert np.bincount(sources.train.labels).tolist() == [6] * 10
    assert sources.train.ids[:2] == ("train/00000", "train/00001")

    content = gzip.decompress((tmp_path / "MNIST/raw/train-images-idx3-ubyte.gz").read_bytes())

    assert sources.train.pixels(3)[..., 1].tobytes() == content[16 + 3 * 784 : 16 + 4 * 784]
    assert sources.notes == (
        "not the complete MNIST: 60 training and 30 test images instead of 60,000 and 10,000",
    )

    for path in (tmp_path / "MNIST/raw").iterdir():
        (tmp_path / path.name.removesuffix(".gz")).write_bytes(gzip.decompress(path.read_bytes()))

    assert np.array_equal(read_mnist(tmp_path, "mnist").train.images, sources.train.images)


def test_an_idx_header_allocates_no_memory(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes([0, 0, 8, 3]) + b"\xff" * 12 + b"x")

    with pytest.raises(DataError, match="not complete"):
        read_idx(tmp_path / "a", 3)


def test_missing_mnist_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="threefold data fetch mnist"):
        read_mnist(tmp_path, "mnist")


# CIFAR

SETS = {
    "cifar10": (
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        "cifar-10-batches-bin",
        "cifar-10-binary.tar.gz",
    ),
    "cifar100": (
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        "cifar-100-binary",
        "cifar-100-binary.tar.gz",
    ),
}


def unpickle(path: Path) -> dict[bytes, Any]:
    """Read a batch as the authors' page says."""
    return pickle.loads(path.read_bytes(), encoding="bytes")


@pytest.mark.parametrize("name", SETS)
def test_cifar_in_every_form(tmp_path: Path, name: str) -> None:
    """A folder, its parent, an archive or its folder, in both versions: the same images."""
    python, python_archive, binary, binary_archive = SETS[name]
    sample = tmp_path / "sample"
    write_python_cifar(sample, name)
    for folder, archive in ((python, python_archive), (binary, binary_archive)):
        (tmp_path / folder).mkdir()
        with tarfile.open(tmp_path / folder / archive, "w:gz") as tar:
            tar.add(sample / folder, folder)

    first = read_cifar(sample, name)

    for root in (
        sample / python,
        sample / binary,
        tmp_path / python,
        tmp_path / binary,
        tmp_path / python / python_archive,
    ):
        again = read_cifar(root, name)
        assert again.classes == first.classes
        for part, other in ((first.train, again.train), (first.test, again.test)):
            assert np.array_equal(part.images, other.images)
            assert np.array_equal(part.labels, other.labels)
            assert part.ids == other.ids
    assert not list(tmp_path.glob("**/*.unpacked"))


@pytest.mark.parametrize(
    ("name", "classes"), [("cifar10", CIFAR10_CLASSES), ("cifar100", CIFAR100_CLASSES)]
)
def test_cifar_agrees_with_its_page(tmp_path: Path, name: str, classes: tuple[str, ...]) -> None:
    """Row-major planes of red, green and blue; batches in order; names from the meta file."""
    folder = write_python_cifar(tmp_path, name)
    files = [f"data_batch_{i}" for i in range(1, 6)] if name == "cifar10" else ["train"]
    batches = [unpickle(folder / file) for file in files]
    key = b"labels" if name == "cifar10" else b"fine_labels"
    labels = [label for batch in batches for label in batch[key]]
    data = np.concatenate([batch[b"data"] for batch in batches])

    sources = load_source(name, folder)

    assert sources.test is not None
    assert sources.train.classes == classes
    assert (len(sources.train), len(sources.test)) == (2 * len(classes), len(classes))
    assert sources.train.labels.tolist() == labels
    for row in (0, len(labels) - 1):
        assert [sources.train.pixels(row)[2, 5, c] for c in range(3)] == [
            data[row, c * 1024 + 2 * 32 + 5] for c in range(3)
        ]


BAD_CIFAR: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (
        lambda f: (f / "data_batch_4").unlink(),
        "files of the data set are missing: .*data_batch_4",
    ),
    "nothing": (
        shutil.rmtree,
        "is not there: .*cifar-10-batches-py/ or cifar-10-python.tar.gz.*data fetch cifar10",
    ),
    "hostile": (
        lambda f: (f / "test_batch").write_bytes(b"cos\nsystem\n(S'true'\ntR."),
        "the name os.system",
    ),
    "cut": (
        lambda f: (f / "test_batch").write_bytes((f / "test_batch").read_bytes()[:-99]),
        "cannot read the pickle",
    ),
    "no data": (
        lambda f: (f / "test_batch").write_bytes(pickle_as_python2({"labels": [1]})),
        "not a batch of CIFAR",
    ),
    "label": (
        lambda f: (f / "test_batch").write_bytes(
            pickle_as_python2({"data": np.zeros((1, 3072), np.uint8), "labels": [10]})
        ),
        "labels do not fit the classes: .*test_batch",
    ),
    "huge label": (
        lambda f: (f / "test_batch").write_bytes(
            pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10**30]}, 2)
        ),
        "labels do not fit the classes",
    ),
    "names": (
        lambda f: (f / "batches.meta").write_bytes(pickle_as_python2({"label_names": ["a"]})),
        "got 1",
    ),
    "no names": (
        lambda f: (f / "batches.meta").write_bytes(pickle_as_python2({"a": 1})),
        "no class names",
    ),
}


@pytest.mark.parametrize("case", BAD_CIFAR)
def test_bad_cifar(tmp_path: Path, case: str) -> None:
    folder = write_python_cifar(tmp_path, "cifar10")
    shutil.rmtree(tmp_path / "cifar-10-batches-bin")
    spoil, message = BAD_CIFAR[case]
    spoil(folder)

    with pytest.raises(DataError, match=message):
        read_cifar(tmp_path, "cifar10")


def test_a_binary_batch_of_another_length(tmp_path: Path) -> None:
    write_sample("cifar10", tmp_path, per_class=2)
    with open(tmp_path / "cifar-10-batches-bin/test_batch.bin", "ab") as file:
        file.write(b"x")

    with pytest.raises(DataError, match="expected records of 3073 bytes"):
        read_cifar(tmp_path / "cifar-10-batches-bin", "cifar10")


# SVHN


def test_svhn_without_extra_images(tmp_path: Path) -> None:
    from scipy.io import loadmat

    write_sample("svhn", tmp_path)
    official = loadmat(tmp_path / "train_32x32.mat")

    sources = load_source("svhn", tmp_path)

    assert sources.test is not None
    assert (len(sources.train), len(sources.test), sources.train.classes) == (60, 30, DIGITS)
    assert official["X"].shape == (32, 32, 3, 60)
    assert set(official["y"].ravel()) == set(range(1, 11))
    assert sources.train.labels.tolist() == [int(label) % 10 for label in official["y"].ravel()]
    assert np.array_equal(sources.train.pixels(7), official["X"][..., 7])


def test_svhn_with_extra_images(tmp_path: Path) -> None:
    write_sample("svhn", tmp_path)
    plain = load_source("svhn", tmp_path).train

    extra = load_source("svhn", tmp_path, extra=True).train

    assert (len(extra), extra.ids[0], extra.ids[30]) == (90, "extra/000000", "train/000000")
    assert extra.ids == tuple(sorted(extra.ids))
    assert np.array_equal(extra.pixels(37), plain.pixels(7))

    limited = load_source("svhn", tmp_path, extra=True, limit_per_class=2).train

    assert np.bincount(limited.labels).tolist() == [2] * 10


def mat(**variables: np.ndarray) -> bytes:
    from scipy.io import savemat

    stream = io.BytesIO()
    savemat(stream, variables)
    return stream.getvalue()


X, Y = np.zeros((32, 32, 3, 4), np.uint8), np.array([[1], [2], [10], [9]], np.uint8)
BAD_MAT = {
    "missing": (None, "a file of SVHN is missing: .*train_32x32.mat.*data fetch svhn"),
    "no MATLAB": (b"nothing", "cannot read the MATLAB file"),
    "cut": (mat(X=X, y=Y)[:-6], "cannot read the MATLAB file"),
    "cut early": (mat(X=X, y=Y)[:3000], "not a file of SVHN"),
    "no labels": (mat(X=X), "expected X .32, 32, 3, n. of uint8 and y"),
    "floats": (mat(X=X.astype(float), y=Y), "got .*double"),
    "label 0": (mat(X=X, y=Y - 1), "4 labels from 1 to 10"),
    "fewer labels": (mat(X=X, y=Y[:3]), "not a file of SVHN"),
    "claims": (
        mat(X=X, y=Y).replace(np.int32(4).tobytes(), np.int32(2**30).tobytes(), 1),
        "MATLAB|not a file of SVHN",
    ),
}


@pytest.mark.parametrize("case", BAD_MAT)
def test_bad_svhn(tmp_path: Path, case: str) -> None:
    write_sample("svhn", tmp_path, per_class=2)
    content, message = BAD_MAT[case]
    path = tmp_path / "train_32x32.mat"
    path.unlink() if content is None else path.write_bytes(content)

    with pytest.raises(DataError, match=message):
        read_svhn(tmp_path, extra=False)
