"""Bad input: each case ends in a one-line error that names the file or class and the reason."""

from __future__ import annotations

import gzip
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from threefold.data.dataset import ImageDataset
from threefold.data.load import load_data
from threefold.errors import DataError
from threefold.recipe.schema import DataSpec


def message_of(spec: DataSpec) -> str:
    """The error that loading ends in; it is one line and keeps to a length that people read."""
    with pytest.raises(DataError) as error:
        load_data(spec, 0)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 3000
    return text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A sound data set that each case spoils."""
    ids = [
        f"{part}/{name}/{i}.png"
        for part in ("train", "test")
        for name in ("cat", "dog")
        for i in range(3)
    ]
    for shade, name in enumerate(ids):
        write_image(tmp_path / "my data" / name, shade)
    return tmp_path / "my data"


def write_image(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 4, 3), shade, dtype=np.uint8)).save(path)


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink() if path.is_file() else shutil.rmtree(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50])  # in the middle of the pixels


FOLDERS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing folder": (
        shutil.rmtree,
        ["the image folder does not exist", "my data", "fix: give the path of a folder"],
    ),
    "empty folder": (empty, ["there are no class folders", "my data", "one folder per class"]),
    "empty train": (lambda r: empty(r / "train"), ["my data"]),
    "class without images": (
        lambda r: empty(r / "train/dog"),
        ["class folder has no images", "train/dog"],
    ),
    "class with text only": (
        lambda r: (empty(r / "test/dog"), (r / "test/dog/a.txt").write_text("a")),
        ["class folder has no images", "test/dog"],
    ),
    "one class": (
        lambda r: [shutil.rmtree(r / part / "dog") for part in ("train", "test")],
        ["2 or more classes", "only cat"],
    ),
    "class with one image": (
        lambda r: [(r / f"train/dog/{i}.png").unlink() for i in (0, 1)],
        ["fewer than 2 usable training images", "dog (1)"],
    ),
    "class missing in test": (
        lambda r: shutil.rmtree(r / "test/dog"),
        ["classes differ", "only in train: dog"],
    ),
    "class missing in train": (
        lambda r: shutil.rmtree(r / "train/dog"),
        ["2 or more classes", "only cat"],
    ),
    "class spelt otherwise": (
        lambda r: (r / "test/dog").rename(r / "test/Dog"),
        ["only in train: dog and only in test: Dog", "same class names"],
    ),
    "no train": (
        lambda r: shutil.rmtree(r / "train"),
        ["neither split nor one folder per class", "got test/"],
    ),
    "class beside the split": (
        lambda r: shutil.copytree(r / "train/cat", r / "cow"),
        ["neither split nor one folder per class", "cow/"],
    ),
    "no test images left": (lambda r: empty(r / "test"), ["my data"]),
    "zero bytes": (
        lambda r: (r / "train/dog/1.png").write_bytes(b""),
        ["1 of 12 images", "train/dog/1.png", "empty"],
    ),
    "truncated": (
        lambda r: truncate(r / "test/cat/2.png"),
        ["1 of 12", "test/cat/2.png", "truncated"],
    ),
    "text": (
        lambda r: (r / "train/cat/0.png").write_text("hello\nworld"),
        ["train/cat/0.png", "not an image"],
    ),
    "name that misleads": (
        lambda r: (r / "train/cat/0.png").rename(r / "train/cat/0.jpg"),
        ["train/cat/0.jpg (content is PNG, suffix is .jpg)", "rename"],
    ),
    "broken link": (
        lambda r: (r / "train/cat/x.png").symlink_to("gone.png"),
        ["train/cat/x.png", "No such file"],
    ),
    "folder called like an image": (lambda r: (r / "x.png").mkdir(), ["neither split", "x.png/"]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders(root: Path, case: str) -> None:
    spoil, expected = FOLDERS[case]
    spoil(root)

    message = message_of(DataSpec(root=str(root)))

    for text in expected:
        assert text in message


def test_a_folder_that_may_not_be_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def guarded(path: str) -> Any:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)

    message = message_of(DataSpec(root=str(root)))

    assert "cannot read the folder" in message
    assert (
        "train/dog; got Permission denied" in message
        or "test/dog; got Permission denied" in message
    )


def test_a_file_name_that_is_not_unicode(root: Path) -> None:
    try:
        (root / "train/cat" / os.fsdecode(b"\xff.png")).touch()
    except OSError:
        pytest.skip("this file system takes Unicode names only")

    message = message_of(DataSpec(root=str(root)))

    assert "not valid Unicode" in message
    assert message.isprintable()


def test_a_root_that_is_not_set_or_is_a_file(root: Path) -> None:
    assert "data.root is not set" in message_of(DataSpec())
    assert "data.root is not set" in message_of(DataSpec(source="csv"))
    assert 'data.source = "csv"' in message_of(DataSpec(root=str(root / "train/cat/0.png")))


def test_only_the_first_ten_bad_files_are_listed(tmp_path: Path) -> None:
    for i in range(14):
        (tmp_path / "ab"[i % 2]).mkdir(exist_ok=True)
        (tmp_path / "ab"[i % 2] / f"{i:02}.png").touch()

    message = message_of(DataSpec(root=str(tmp_path)))

    assert message.startswith("14 of 14 images cannot be used; got ")
    assert message.count("the file is empty") == 10
    assert "and 4 more" in message
    assert 'data.bad_images = "skip"' in message


def test_skip_does_not_help_where_nothing_is_left(root: Path) -> None:
    for i in (0, 1):
        (root / f"train/dog/{i}.png").write_bytes(b"")

    spec = DataSpec(root=str(root), bad_images="skip")

    assert "dog (1)" in message_of(spec)

    write_image(root / "train/dog/0.png", 1)
    for path in root.glob("test/*/*"):
        path.write_bytes(b"")

    assert "none of the test images can be read" in message_of(spec)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        (r"signer\d", ["does not match", "cat/0.png", r"signer\d"]),
        (r"cat|(do)g", ["does not match", "cat/0.png"]),
        ("x*", ["does not match", "cat/0.png"]),
    ],
)
def test_group_patterns(root: Path, pattern: str, expected: list[str]) -> None:
    message = message_of(DataSpec(root=str(root / "train"), group_regex=pattern))

    for text in expected:
        assert text in message


GOOD = "path,label\n" + "".join(
    f"train/{name}/{i}.png,{name}\n" for name in ("cat", "dog") for i in range(3)
)
CSVS: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["no column that can be the path or the label", "an empty file"]),
    "no path": (
        GOOD.replace("path,", "where,").encode(),
        ["be the path:", "path, image, file", "got where, label", "--set data.path_column=NAME"],
    ),
    "no label": (
        GOOD.replace("label", "what").encode(),
        ["be the label:", "label, class,", "got path, what", "--set data.label_column=NAME"],
    ),
    "mixed separators": (
        (GOOD + "train/cat/9.png;cat\n").encode(),
        ["the separators are mixed", "line 8", "expected commas", "got semicolons"],
    ),
    "path twice": (
        (GOOD + "./train/cat/1.png,dog\n").encode(),
        ["the CSV file repeats paths", "train/cat/1.png"],
    ),
    "missing files": (
        (GOOD + "train/cow/1.png,cat\ntrain/cow/2.png,cat\n").encode(),
        ["2 files", "train/cow/1.png, train/cow/2.png"],
    ),
    "empty label": ((GOOD + "train/cat/9.png,\n").encode(), ["line 8", "not empty"]),
    "missing cell": ((GOOD + "train/cat/9.png\n").encode(), ["line 8", "not empty"]),
    "surplus cell": ((GOOD + "train/cat/9.png,cat,5\n").encode(), ["line 8", "surplus"]),
    "empty group": (b"path,label,group\ntrain/cat/0.png,cat,\n", ["line 2", "group not empty"]),
    "unknown split": (
        b"path,label,split\ntrain/cat/0.png,cat,extern\n",
        ["line 2", "train, val", "extern"],
    ),
    "header only": (b"path,label\n", ["the table has no rows"]),
    "one class": (b"path,label\ntrain/cat/0.png,cat\n", ["2 or more classes", "only cat"]),
    "test only": (b"path,label,split\ntest/cat/0.png,cat,test\n", ["no training images"]),
    "not UTF-8": (
        GOOD.replace("cat\n", "ch\u00e2t\n").encode("latin-1"),
        ["cannot read the CSV file", "utf-8"],
    ),
    "open quote": ((GOOD + '"train/cat').encode(), ["cannot read the CSV file"]),
    "an image": (b"\x89PNG\r\n\x1a\n\xff", ["cannot read the CSV file"]),
}


@pytest.mark.parametrize("case", CSVS)
def test_csv_files(root: Path, case: str) -> None:
    content, expected = CSVS[case]
    (root / "data.csv").write_bytes(content)

    message = message_of(DataSpec(source="csv", root=str(root / "data.csv")))

    for text in expected:
        assert text in message


def test_a_sound_csv_file_passes(root: Path) -> None:
    (root / "data.csv").write_text(GOOD)

    assert len(load_data(DataSpec(source="csv", root=str(root / "data.csv")), 0).train) == 6


def test_csv_file_that_is_missing_or_a_folder(root: Path) -> None:
    assert "none.csv; got No such file" in message_of(
        DataSpec(source="csv", root=str(root / "none.csv"))
    )
    assert "Is a directory" in message_of(DataSpec(source="csv", root=str(root)))


def test_groups_given_twice(root: Path) -> None:
    (root / "data.csv").write_text("path,label,group\ntrain/cat/0.png,cat,g\n")

    assert "groups are defined twice" in message_of(
        DataSpec(source="csv", root=str(root / "data.csv"), group_regex=".")
    )


def test_a_single_group_of_all_images_is_refused(root: Path) -> None:
    (root / "data.csv").write_text(
        "\n".join(f"{line},{'group' if i == 0 else 'g'}" for i, line in enumerate(GOOD.split()))
    )

    message = message_of(DataSpec(source="csv", root=str(root / "data.csv")))

    assert "all training images are in one group" in message
    assert "expected two groups or more, or none, got g; fix: remove the groups" in message


def idx(array: np.ndarray, count: int | None = None) -> bytes:
    shape = (len(array) if count is None else count, *array.shape[1:])
    return (
        bytes([0, 0, 8, array.ndim])
        + struct.pack(f">{array.ndim}L", *shape)
        + array.astype(np.uint8).tobytes()
    )


IMAGES, LABELS = np.zeros((20, 28, 28)), np.arange(20) % 10
IDX: dict[str, tuple[str, bytes | None, list[str]]] = {
    "missing": (
        "t10k-labels-idx1-ubyte.gz",
        None,
        ["t10k-labels-idx1-ubyte.gz", "dataset-fashion-mnist"],
    ),
    "not gzip": (
        "train-images-idx3-ubyte.gz",
        idx(IMAGES),
        ["train-images", "cannot read the idx file"],
    ),
    "cut": (
        "train-images-idx3-ubyte.gz",
        gzip.compress(idx(IMAGES))[:-9],
        ["train-images", "cannot read"],
    ),
    "magic": (
        "train-labels-idx1-ubyte.gz",
        gzip.compress(idx(IMAGES)),
        ["train-labels", "00000801", "00000803"],
    ),
    "no header": (
        "train-labels-idx1-ubyte.gz",
        gzip.compress(b"\0\0\x08\x01\0"),
        ["train-labels", "got 0"],
    ),
    "nothing": (
        "train-labels-idx1-ubyte.gz",
        gzip.compress(b""),
        ["train-labels", "magic 00000801"],
    ),
    "too short": (
        "t10k-images-idx3-ubyte.gz",
        gzip.compress(idx(IMAGES, 21)),
        ["t10k-images", "not complete", "16464"],
    ),
    "lengths": (
        "t10k-labels-idx1-ubyte.gz",
        gzip.compress(idx(LABELS[:7])),
        ["t10k-labels", "expected 20, got 7"],
    ),
    "label 10": (
        "train-labels-idx1-ubyte.gz",
        gzip.compress(idx(LABELS + 1)),
        ["labels do not fit", "1 to 10"],
    ),
}


@pytest.mark.parametrize("case", IDX)
def test_idx_files(tmp_path: Path, case: str) -> None:
    for prefix in ("train", "t10k"):
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS)))

    spec = DataSpec(source="fashion-mnist", root=str(tmp_path))

    assert len(load_data(spec, 0).train) == 20

    name, content, expected = IDX[case]
    (tmp_path / name).unlink() if content is None else (tmp_path / name).write_bytes(content)

    message = message_of(spec)

    for text in expected:
        assert text in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"labels": np.array([0])}, "differ in number; got 2, 1, 2"),
        ({"groups": ("g",)}, "differ in number; got 2, 2, 2, 1"),
        ({"ids": ("a", "a")}, "ids are not unique; got a"),
        ({"labels": np.array([0, 2])}, "expected 0 to 1, got 0 to 2"),
        ({"labels": np.array([-1, 0])}, "expected 0 to 1, got -1 to 0"),
    ],
)
def test_data_sets_that_contradict_themselves(change: dict, expected: str) -> None:
    sound = {
        "images": np.zeros((2, 4, 4), dtype=np.uint8),
        "labels": np.array([0, 1]),
        "ids": ("a", "b"),
        "classes": ("x", "y"),
    }
    ImageDataset(**sound)

    with pytest.raises(DataError, match=expected):
        ImageDataset(**{**sound, **change})
