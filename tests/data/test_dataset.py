"""Data sets: what the sources give for sound data, and what they write down about doubtful data."""

from __future__ import annotations

import gzip
import importlib.util
import os
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.paths import ROOT

from threefold.data.dataset import ImageDataset
from threefold.data.images import BadImage
from threefold.data.load import load_data
from threefold.data.published import FASHION_MNIST_CLASSES
from threefold.data.sources.arrays import FASHION_MNIST_ROOT, read_idx
from threefold.errors import DataError
from threefold.recipe.schema import DataSpec

ASSETS = ROOT / "src/threefold/assets/fashion_mnist"


def write_image(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((3, 4, 3), shade, dtype=np.uint8)).save(path)
    return path


def make_folder(root: Path, *ids: str) -> Path:
    """Images with these ids, each of its own shade (by position)."""
    for shade, name in enumerate(ids):
        write_image(root / name, shade)
    return root


def folder(root: Path, **options) -> DataSpec:
    return DataSpec(source="folder", root=str(root), **options)


def labelled(data: ImageDataset) -> dict[str, str]:
    return {name: data.classes[label] for name, label in zip(data.ids, data.labels, strict=True)}


def test_a_folder_of_class_folders(tmp_path: Path) -> None:
    make_folder(tmp_path, "cat/b.png", "cat/a.png", "dog/a.png", "dog/deep/er/c.png")

    sources = load_data(folder(tmp_path), 0)

    data = sources.train
    assert data.classes == ("cat", "dog")
    assert data.ids == ("cat/a.png", "cat/b.png", "dog/a.png", "dog/deep/er/c.png")
    assert data.labels.tolist() == [0, 0, 1, 1]
    assert data.labels.dtype == np.int64
    assert [int(data.pixels(i)[0, 0, 0]) for i in range(4)] == [1, 0, 2, 3]
    assert (sources.test, sources.notes, sources.skipped, data.groups) == (None, (), (), None)


def test_classes_are_in_natural_order(tmp_path: Path) -> None:
    names = ["10", "9", "1", "01", "class 2", "class 10", "Zebra", "ant"]
    make_folder(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(2)))

    assert load_data(folder(tmp_path), 0).train.classes == (
        "01",
        "1",
        "9",
        "10",
        "Zebra",
        "ant",
        "class 2",
        "class 10",
    )


def test_unicode_and_spaces_in_paths(tmp_path: Path) -> None:
    root = tmp_path / "mes données" / "圖像"
    ids = ("blé tendre/è 1.png", "blé tendre/è 2.png", "маïs/ж ж.png", "маïs/ё.png")
    make_folder(root, *ids)

    assert set(load_data(folder(root), 0).train.ids) == set(ids)


def test_a_split_folder_and_its_validation_part(tmp_path: Path) -> None:
    ids = [
        f"{part}/{name}/{i}.png"
        for part in ("train", "Valid", "test")
        for name in ("cat", "dog")
        for i in range(2)
    ]
    make_folder(tmp_path, *ids)

    sources = load_data(folder(tmp_path), 0)

    assert sources.test is not None
    assert set(sources.train.ids) == set(ids[:8])
    assert set(sources.test.ids) == set(ids[8:])
    assert labelled(sources.train)["Valid/dog/1.png"] == "dog"
    assert labelled(sources.test)["test/dog/1.png"] == "dog"
    assert len(sources.notes) == 1
    assert sources.notes[0].startswith("Valid/ was joined with train/")


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    make_folder(tmp_path, "train/1.png", "train/2.png", "car/1.png", "car/2.png")

    sources = load_data(folder(tmp_path), 0)

    assert sources.train.classes == ("car", "train")
    assert sources.test is None


def test_hidden_files_are_not_seen_and_others_are_counted(tmp_path: Path) -> None:
    make_folder(tmp_path, "cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png", "stray.png")
    for name in (".git/x.png", "cat/.hidden.png", "cat/.cache/x.png", "__MACOSX/cat/._1.png"):
        write_image(tmp_path / name, 9)
    for name in ("README.md", "cat/labels.txt", "dog/notes.TXT", "dog/Makefile"):
        (tmp_path / name).write_text("text")

    sources = load_data(folder(tmp_path), 0)

    assert len(sources.train) == 4
    assert sources.notes == (
        "1 image outside class folders was ignored: stray.png",
        "4 files that are not images were ignored: .md, .txt, Makefile",
        "4 hidden files and folders were ignored: .cache, .git, .hidden.png, __MACOSX",
    )


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    make_folder(tmp_path / "data", "cat/1.png", "cat/2.png", "dog/1.png")
    make_folder(tmp_path / "elsewhere", "3.png", "x/4.png")
    (tmp_path / "data/dog/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/dog/again").symlink_to(tmp_path / "data/dog")
    (tmp_path / "elsewhere/x/up").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/dog/self").symlink_to("self")

    sources = load_data(folder(tmp_path / "data"), 0)

    assert set(sources.train.ids) == {
        "cat/1.png",
        "cat/2.png",
        "dog/1.png",
        "dog/more/3.png",
        "dog/more/x/4.png",
    }


def test_the_order_of_the_file_system_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(
        tmp_path, *(f"{name}/{i}/{j}.png" for name in "ab" for i in range(3) for j in range(3))
    )
    (tmp_path / "b/alias").symlink_to(tmp_path / "b/1")
    spec, listdir = folder(tmp_path, limit_per_class=8), os.listdir
    before = load_data(spec, 0).train
    monkeypatch.setattr(os, "listdir", lambda path: listdir(path)[::-1])

    assert load_data(spec, 0).train.ids == before.ids


def test_skip_leaves_out_and_records(tmp_path: Path) -> None:
    make_folder(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(3)))
    (tmp_path / "dog/1.png").write_bytes(b"")
    (tmp_path / "cat/2.png").rename(tmp_path / "cat/2.jpg")

    sources = load_data(folder(tmp_path, bad_images="skip"), 0)

    assert sources.skipped == (BadImage(tmp_path / "dog/1.png", "the file is empty (0 bytes)"),)
    assert labelled(sources.train) == {
        "cat/0.png": "cat",
        "cat/1.png": "cat",
        "cat/2.jpg": "cat",
        "dog/0.png": "dog",
        "dog/2.png": "dog",
    }
    assert [int(sources.train.pixels(i)[0, 0, 0]) for i in range(5)] == [0, 1, 2, 3, 5]
    assert sources.notes == (
        f"1 image was read despite a misleading suffix: {tmp_path}/cat/2.jpg (content is PNG, "
        "suffix is .jpg)",
    )


def test_exact_copies_are_noted(tmp_path: Path) -> None:
    ids = [
        f"{part}/{name}/{i}.png"
        for part in ("train", "test")
        for name in ("cat", "dog")
        for i in range(2)
    ]
    make_folder(tmp_path, *ids)
    for copy, original in (
        ("test/dog/0.png", "train/dog/1.png"),
        ("train/cat/copy.png", "train/dog/0.png"),
    ):
        (tmp_path / copy).write_bytes((tmp_path / original).read_bytes())

    assert load_data(folder(tmp_path), 0).warnings == (
        "1 test image is an exact copy of training images: test/dog/0.png",
        "1 training image is an exact copy of others; only grouped folds keep copies together",
        "1 image is in several classes as exact copies: train/cat/copy.png = train/dog/0.png",
    )


def test_limit_per_class_is_seeded_and_spares_the_test_split(tmp_path: Path) -> None:
    make_folder(
        tmp_path,
        *(f"train/{name}/{i}.png" for name, n in (("cat", 12), ("dog", 3)) for i in range(n)),
        *(f"test/{name}/{i}.png" for name in ("cat", "dog") for i in range(6)),
    )
    spec = folder(tmp_path, limit_per_class=4)
    first, again, other = (load_data(spec, seed) for seed in (1, 1, 2))

    assert Counter(labelled(first.train).values()) == {"cat": 4, "dog": 3}
    assert first.train.ids == again.train.ids != other.train.ids
    assert first.train.ids == tuple(sorted(first.train.ids))
    assert first.test is not None
    assert len(first.test) == 12
    assert len(load_data(spec, -5).train) == 7


def test_groups_come_from_the_id(tmp_path: Path) -> None:
    make_folder(
        tmp_path,
        *(f"{name}/p{p}_{i}.png" for name in ("cat", "dog") for p in (1, 2) for i in range(2)),
    )
    with_parentheses = load_data(folder(tmp_path, group_regex=r"/p(\d)_"), 0).train

    whole_match = load_data(folder(tmp_path, group_regex=r"p\d"), 0).train

    assert with_parentheses.groups == ("1", "1", "2", "2") * 2
    assert whole_match.groups == ("p1", "p1", "p2", "p2") * 2


def test_groups_in_train_and_in_test_are_noted(tmp_path: Path) -> None:
    ids = [
        f"{part}/{name}/{g}{i}.png"
        for part, g in (("train", "ab"), ("test", "bc"))
        for name in "xy"
        for g in g
        for i in "12"
    ]
    make_folder(tmp_path, *ids)

    sources = load_data(folder(tmp_path, group_regex=r"/([abc])\d"), 0)

    assert sources.warnings == ("1 group is in both train and test: b",)


def test_a_csv_file(tmp_path: Path) -> None:
    make_folder(tmp_path / "images", *(f"{i}.png" for i in range(6)))
    table = tmp_path / "data é.csv"
    table.write_text(
        "\ufefflabel, path ,split,group,weight\n"
        'dog,images/5.png,test,s2,1\n"cat, small",./images/1.png,train,s1,1\n'
        "cat\u0301,images/0.png,,s1,\n",
        encoding="utf-8",
    )

    with pytest.raises(DataError, match="line 4"):
        load_data(DataSpec(source="csv", root=str(table)), 0)

    lines = ["label, path ,split,group,weight"]
    lines += [
        f'"cat, small",./images/{i}.png,{part},s{i % 2},1'
        for i, part in ((3, "train"), (0, "Val"), (5, "test"))
    ]
    lines += [
        f" dog ,images/../images/{i}.png,{part},s{i % 2},"
        for i, part in ((1, "train"), (2, "train"), (4, "test"))
    ]
    table.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")

    sources = load_data(DataSpec(source="csv", root=str(table)), 0)

    assert sources.test is not None
    assert labelled(sources.train) == {
        "images/0.png": "cat, small",
        "images/1.png": "dog",
        "images/2.png": "dog",
        "images/3.png": "cat, small",
    }
    assert sources.train.groups == ("s0", "s1", "s0", "s1")
    assert sources.test.ids == ("images/4.png", "images/5.png")
    assert [int(sources.train.pixels(i)[0, 0, 0]) for i in range(4)] == [0, 1, 2, 3]


def test_a_csv_file_without_optional_columns(tmp_path: Path) -> None:
    make_folder(tmp_path, "0.png", "1.png", "2.png", "3.png")
    (tmp_path / "data.csv").write_text(
        "path,label\n" + "".join(f"{i}.png,{'ab'[i % 2]}\n" for i in range(4))
    )

    sources = load_data(DataSpec(source="csv", root=str(tmp_path / "data.csv")), 0)

    assert (len(sources.train), sources.test, sources.train.groups) == (4, None, None)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}L", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


def write_fashion_mnist(root: Path) -> np.ndarray:
    images = np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)
    for prefix, rows in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        write_idx(root / f"{prefix}-images-idx3-ubyte.gz", images[rows])
        write_idx(root / f"{prefix}-labels-idx1-ubyte.gz", np.arange(40)[rows] % 10)
    return images


def test_fashion_mnist_files(tmp_path: Path) -> None:
    images = write_fashion_mnist(tmp_path)

    sources = load_data(DataSpec(source="fashion-mnist", root=str(tmp_path), group_regex=r"\d$"), 0)

    assert sources.test is not None
    assert (len(sources.train), len(sources.test)) == (30, 10)
    assert sources.train.classes == FASHION_MNIST_CLASSES
    assert sources.train.ids[:2] == ("train/00000", "train/00001")
    assert sources.train.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9] * 3
    assert np.array_equal(sources.test.pixels(2), np.repeat(images[32][..., None], 3, axis=2))
    assert sources.train.groups is not None
    assert sources.train.groups[12] == "2"

    limited = load_data(DataSpec(source="fashion-mnist", root=str(tmp_path), limit_per_class=2), 0)

    assert np.bincount(limited.train.labels).tolist() == [2] * 10


def test_the_demo_needs_no_file_but_its_own() -> None:
    sources = load_data(DataSpec(source="demo"), 0)

    assert sources.test is not None
    assert np.bincount(sources.train.labels).tolist() == [300] * 10
    assert np.bincount(sources.test.labels).tolist() == [100] * 10
    assert sources.train.ids == tuple(sorted(sources.train.ids))
    assert not set(sources.train.ids) & set(sources.test.ids)
    assert sources.train.classes == FASHION_MNIST_CLASSES
    assert sources.train.pixels(0).shape == (28, 28, 3)
    assert (ASSETS / "data.npz").stat().st_size <= 3_000_000
    assert "Copyright (c) 2017 Zalando SE" in (ASSETS / "LICENSE").read_text()


@pytest.mark.skipif(not Path(FASHION_MNIST_ROOT).is_dir(), reason="Fashion-MNIST is not installed")
def test_the_demo_is_what_its_script_chooses() -> None:
    spec = importlib.util.spec_from_file_location(
        "make_demo_data", ROOT / "scripts/make_demo_data.py"
    )

    assert spec is not None
    assert spec.loader is not None

    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    root = Path(FASHION_MNIST_ROOT)
    with np.load(ASSETS / "data.npz", allow_pickle=False) as packed:
        arrays = dict(packed)

    for part, prefix in (("train", "train"), ("test", "t10k")):
        labels = read_idx(root / f"{prefix}-labels-idx1-ubyte.gz", 1)
        rows = script.choose_rows(labels, script.PER_CLASS[part], script.SEED)
        assert np.array_equal(arrays[f"{part}_rows"], rows)
        assert np.array_equal(arrays[f"{part}_labels"], labels[rows])

    test_images = read_idx(root / "t10k-images-idx3-ubyte.gz", 3)

    assert np.array_equal(arrays["test_images"], test_images[arrays["test_rows"]])

    small = {name: array[:5] for name, array in arrays.items()}

    assert script.pack(small) == script.pack(small)


def test_subset_keeps_rows_together(tmp_path: Path) -> None:
    images = np.arange(5 * 6, dtype=np.uint8).reshape(5, 2, 3)
    data = ImageDataset(
        images, np.array([0, 1, 0, 1, 0]), tuple("abcde"), ("x", "y"), tuple("ppqqr")
    )

    part = data.subset([3, 0])

    assert (part.ids, part.groups, part.labels.tolist(), part.classes) == (
        ("d", "a"),
        ("q", "p"),
        [1, 0],
        ("x", "y"),
    )
    assert np.array_equal(part.pixels(0)[..., 1], images[3])
    assert data.subset(data.labels == 1).ids == ("b", "d")

    files = ImageDataset(
        [write_image(tmp_path / f"{i}.png", i) for i in range(3)],
        np.zeros(3, int),
        tuple("abc"),
        ("x",),
    )

    assert files.subset(np.array([2])).pixels(0)[0, 0].tolist() == [2, 2, 2]
    with pytest.raises(IndexError):
        data.subset([5])


def test_pixels_are_a_copy() -> None:
    for shape in ((1, 2, 2), (1, 2, 2, 3)):
        images = np.zeros(shape, dtype=np.uint8)
        ImageDataset(images, np.array([0]), ("a",), ("x",)).pixels(0)[:] = 9
        assert not images.any()


def test_data_sets_import_no_torch() -> None:
    code = "import sys, threefold.data.dataset; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}

    process = subprocess.run([sys.executable, "-c", code], env=environment, check=False)

    assert process.returncode == 0


def test_the_size_of_an_image_is_known_without_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path, "cat/a.png", "cat/b.png", "dog/a.png", "dog/b.png")
    files = load_data(folder(tmp_path), 0).train
    arrays = ImageDataset(np.zeros((2, 5, 6), np.uint8), np.array([0, 1]), ("x", "y"), ("a", "b"))
    monkeypatch.setattr(ImageDataset, "pixels", None)

    assert sorted(files.size_of(1)) == [3, 4]
    assert arrays.size_of(0) == (5, 6)
    (tmp_path / "cat/b.png").unlink()
    with pytest.raises(DataError, match="cannot read the file"):
        files.size_of(1)
