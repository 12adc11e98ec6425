"""WebDataset shards: samples by key, labels in .cls and .json, read in place."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.http_server import hosting

from threefold.data.check import check_data, find_spec
from threefold.data.dataset import Sources
from threefold.data.detect_source import detect_source, seems_data
from threefold.data.labelled import load_labelled
from threefold.data.load import load_data
from threefold.data.sources.webdataset import expand_range, holds_samples, split_name
from threefold.errors import DataError
from threefold.predictions.run_folder import default_run_folder

Samples = Mapping[str, Mapping[str, bytes]]


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((3, 4, 3), shade, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def pack(path: Path, samples: Samples) -> Path:
    """Write a shard: each key with the content of each extension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def cls(shade: int, label: object) -> dict[str, bytes]:
    return {"png": png(shade), "cls": str(label).encode()}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("THREEFOLD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two shards of four samples with the same keys, of shades 0 to 7; returns their pattern."""
    for number in range(2):
        samples = {f"{i:04d}": cls(4 * number + i, i % 2) for i in range(4)}
        pack(tmp_path / f"data/train-{number:03d}.tar", samples)
    (tmp_path / "data/classnames.txt").write_text("wolf\nant\n")
    return tmp_path / "data/train-{000..001}.tar"


def load(root: Path | str, **options: str) -> Sources:
    return load_data(detect_source(root).model_copy(update=options), 0)


def check(sources: Sources) -> None:
    assert sources.train.classes == ("wolf", "ant")
    assert sources.train.labels.tolist() == [0, 1] * 4
    assert [int(sources.train.pixels(i)[0, 0, 0]) for i in range(8)] == list(range(8))


def test_samples_are_read_in_place(shards: Path, cache: Path) -> None:
    sources = load(shards)

    check(sources)
    assert sources.train.ids[3:5] == ("train-000/0003", "train-001/0000")
    assert sources.notes == ("8 samples in 2 shards, read in place",)
    # Nothing is unpacked: the cache has places, and what is known to be sound.
    assert {path.suffix for path in cache.rglob("*") if path.is_file()} == {".json", ".bin"}


@pytest.mark.parametrize("root", ["data", "data/train-*.tar", "data/train-{000..001}.tar"])
def test_folder_and_patterns_are_alike(shards: Path, tmp_path: Path, root: str) -> None:
    assert seems_data(str(tmp_path / root))
    check(load(tmp_path / root))
    assert check_data(find_spec(str(tmp_path / root))).usable


def test_second_start_reads_no_header(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(shards)
    monkeypatch.setattr(tarfile.TarFile, "next", lambda self: 1 / 0)

    check(load(shards))


def test_shards_at_an_address(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hosting(shards.parent) as url:
        sources = load(url + "train-{000..001}.tar")

        # The names of the classes are not beside the copies.
        assert sources.train.classes == ("0", "1")
        assert sources.train.ids[4] == "train-001/0000"
    again = load(url + "train-{000..001}.tar")  # the server is gone

    assert again.train.ids == sources.train.ids


def test_splits_of_folders_and_of_names(tmp_path: Path) -> None:
    for part, shades in (("train", range(4)), ("test", range(4, 6))):
        pack(tmp_path / f"wds/{part}/0.tar", {f"s{i}": cls(i, "ab"[i % 2]) for i in shades})
    pack(tmp_path / "wds/imagenet-validation-00.tar", {f"s{i}": cls(9, "a") for i in range(2)})

    sources = load(tmp_path / "wds")

    assert sources.test is not None
    assert (len(sources.train), len(sources.test)) == (6, 2)
    assert sources.test.ids == ("test/0/s4", "test/0/s5")
    assert load_labelled(tmp_path / "wds").ids == sources.test.ids


def test_labels_groups_and_folds_of_json(tmp_path: Path) -> None:
    records = [
        {"label": "ab"[i % 2], "group": i // 2, "fold": i % 3, "caption": "x"} for i in range(8)
    ]
    samples = {
        f"dir/{i}": {"jpg": png(i), "json": json.dumps(record).encode()}
        for i, record in enumerate(records)
    }
    path = pack(tmp_path / "one.tar", samples)

    # Of what format an image is, its content says, whatever the key.
    train = load(path, fold_column="fold").train

    assert (train.ids[0], train.classes, train.groups) == (
        "one/dir/0",
        ("a", "b"),
        tuple("00112233"),
    )
    assert train.folds == tuple("01201201")


def test_groups_under_another_key(tmp_path: Path) -> None:
    samples = {
        str(i): {
            "png": png(i),
            "json": json.dumps({"label": "ab"[i % 2], "patient": i // 2}).encode(),
        }
        for i in range(8)
    }
    path = pack(tmp_path / "one.tar", samples)

    assert load(path).train.groups is None  # and the index of this answer is not taken below
    assert load(path, group_column="patient").train.groups == tuple("00112233")
    with pytest.raises(DataError, match=r"no group who: .*expected the key who .*got label, pati"):
        load(path, group_column="who")


BAD: dict[str, tuple[Samples, str]] = {
    "no label": ({"a": {"png": png(0), "txt": b"a cat"}, "b": cls(1, 0)}, "a sample has no label"),
    "no image": (
        {"a": {"cls": b"0"}, "b": cls(1, 0)},
        "no image: .*a; expected one image, got cls",
    ),
    "two images": (
        {"a": {**cls(0, 0), "jpg": png(0)}, "b": cls(1, 1)},
        "has 2 images.*path_column",
    ),
    "json": (
        {"a": {"png": png(0), "json": b"{"}, "b": cls(1, 0)},
        "the .json of a sample is damaged",
    ),
    "link out": ({"../a": cls(0, 0), "b": cls(1, 1)}, "unsafe name"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_samples_are_named(tmp_path: Path, case: str) -> None:
    samples, message = BAD[case]
    path = pack(tmp_path / "data/bad.tar", {"ok": cls(3, 0), **samples})

    with pytest.raises(DataError, match=message):
        load(path)


def test_a_bad_image_moves_no_label(tmp_path: Path) -> None:
    samples = {f"{i}": cls(i, "ab"[i % 2]) for i in range(6)}
    samples["2"]["png"] = b"none"
    path = pack(tmp_path / "a.tar", samples)

    with pytest.raises(DataError, match=r"1 of 6 images cannot be used; got a/2 \(not an image"):
        load(path)
    train = load(path, bad_images="skip").train

    assert train.labels.tolist() == [0, 1, 1, 0, 1]
    assert [int(train.pixels(i)[0, 0, 0]) for i in range(5)] == [0, 1, 3, 4, 5]


def test_a_truncated_or_changed_shard_is_named(shards: Path) -> None:
    sources = load(shards)
    first = shards.parent / "train-000.tar"
    content = first.read_bytes()
    first.write_bytes(content[:3000])

    with pytest.raises(DataError, match=r"the shard has changed .*train-000\.tar"):
        sources.train.pixels(0)
    with pytest.raises(DataError, match=r"(truncated|cannot read the shard): .*train-000\.tar"):
        load(shards)

    first.unlink()

    with pytest.raises(DataError, match="1 shard does not exist"):
        load(shards)


def test_an_archive_of_class_folders_is_no_shard(tmp_path: Path) -> None:
    pack(tmp_path / "a.tar", {"wolf/1": {"png": png(0)}, "ant/1": {"png": png(1)}})

    assert not holds_samples(tmp_path / "a.tar")
    assert holds_samples(pack(tmp_path / "b.tar", {"1": cls(0, 1)}))


def test_runs_are_named_after_shards() -> None:
    address = "https://host/train-{000..146}.tar"

    assert default_run_folder(Path(address)) == Path("runs/train-000-146")
    # pathlib takes a slash away.
    assert detect_source(Path(address)).root == address
    assert default_run_folder(Path("hf://datasets/a/b@main:small")) == Path("runs/b-main-small")


def test_ranges_and_keys() -> None:
    assert expand_range("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_range("{0..1}/{1..2}.tar") == ["0/1.tar", "0/2.tar", "1/1.tar", "1/2.tar"]
    with pytest.raises(DataError, match="empty or too long"):
        expand_range("{5..1}.tar")
    assert split_name("a.b/c.seg.PNG") == ("a.b/c", "seg.png")
