"""The check of a data set: what it counts, what it points out, and that it never stops at the first fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threefold.datacheck import check_data
from threefold.recipe import DataSpec
from threefold.samples import write_sample


def write(path: Path, shade: int, size: tuple[int, int] = (8, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), shade, np.uint8)).save(path)


def spec(root: Path, **options: object) -> DataSpec:
    return DataSpec(source="folder", root=str(root), **options)  # type: ignore[arg-type]


def test_counts_sizes_and_findings(tmp_path: Path) -> None:
    for i in range(40):
        write(tmp_path / f"train/cat/{i}.png", i)
    for i in range(3):
        write(tmp_path / f"train/dog/{i}.png", 100 + i, (20, 6))
        write(tmp_path / f"test/cat/{i}.png", 200 + i)
        write(tmp_path / f"test/dog/{i}.png", 210 + i)
    (tmp_path / "test/dog/0.png").write_bytes((tmp_path / "train/cat/0.png").read_bytes())
    (tmp_path / "train/cat/bad.png").write_bytes(b"")
    found = check_data(spec(tmp_path))
    assert found.classes == {"cat": {"train": 40, "test": 3}, "dog": {"train": 3, "test": 3}}
    assert (found.groups, found.sizes) == ({}, {"8 x 6": 40, "20 x 6": 3})
    assert found.skipped == {str(tmp_path / "train/cat/bad.png"): "the file is empty (0 bytes)"}
    assert not found.usable
    told = {(finding.level, finding.what.split(":")[0], finding.number) for finding in found.findings}
    assert told == {
        ("error", "images cannot be read", 1),
        ("warning", "classes with fewer than 20 training images", 1),
        ("warning", "the largest class has 13 times the images of the smallest; accuracy alone will mislead", 0),
        ("note", "images differ in size", 0),
        ("note", "images more than twice as long as wide, which resize = squash distorts", 3),
        ("warning", "1 test images are exact copies of training images", 0),
        ("warning", "1 images stand in several classes as exact copies", 0),
    }
    assert check_data(spec(tmp_path, bad_images="skip")).usable
    assert json.loads(json.dumps(found._asdict()))["classes"] == found.classes


def test_data_that_cannot_be_loaded(tmp_path: Path) -> None:
    found = check_data(spec(tmp_path / "absent"))
    assert [(finding.level, finding.number) for finding in found.findings] == [("error", 0)]
    assert "does not exist" in found.findings[0].what
    assert not found.usable


def test_groups_are_counted_and_arrays_are_looked_at(tmp_path: Path) -> None:
    write_sample("surrey-asl", tmp_path / "surrey", per_class=2)
    found = check_data(DataSpec(source="surrey-asl", root=str(tmp_path / "surrey")))
    assert (found.groups, found.sizes, len(found.classes)) == ({"A": 48, "B": 48, "C": 48}, {"36 x 40": 144}, 24)
    write_sample("mnist", tmp_path / "mnist", per_class=25)
    found = check_data(DataSpec(source="mnist", root=str(tmp_path / "mnist")))
    assert found.classes == {str(i): {"train": 25, "test": 12} for i in range(10)}
    assert [finding.level for finding in found.findings] == ["note"]


@pytest.mark.parametrize("per_class", [19, 20])
def test_few_images_begin_below_twenty(tmp_path: Path, per_class: int) -> None:
    write_sample("mnist", tmp_path, per_class=per_class)
    few = [
        finding
        for finding in check_data(DataSpec(source="mnist", root=str(tmp_path))).findings
        if "fewer" in finding.what
    ]
    assert len(few) == (per_class < 20)
