"""The check of a data set: its counts and findings; it never stops at the first fault."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from threefold.data import check
from threefold.data.check import Finding, check_data, find_spec
from threefold.data.synthetic import write_sample
from threefold.errors import DataError, RecipeError
from threefold.recipe.schema import DataSpec


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

    report = check_data(spec(tmp_path))

    assert report.classes == {"cat": {"train": 40, "test": 3}, "dog": {"train": 3, "test": 3}}
    assert (report.groups, report.sizes) == ({}, {"8 x 6": 40, "20 x 6": 3})
    assert report.skipped == {str(tmp_path / "train/cat/bad.png"): "the file is empty (0 bytes)"}
    assert not report.usable
    assert {(level, what.split(":")[0], number) for level, what, number in report.findings} == {
        ("error", "1 image cannot be read", 1),
        ("warning", "classes with fewer than 20 training images", 1),
        (
            "warning",
            "the largest class has 13 times the images of the smallest; "
            "accuracy alone will mislead",
            0,
        ),
        ("note", "images differ in size", 0),
        ("note", "images more than twice as long as wide, which resize = squash distorts", 3),
        ("note", "3 images stand out, much longer or wider than the others", 3),
        ("note", "5 images stand out, bright even in the darkest parts", 5),
        ("warning", "1 test image is an exact copy of training images", 0),
        ("warning", "1 image is in several classes as exact copies", 0),
        (
            "warning",
            "1 pair of images is equal; 1 is in two folds or splits, which makes scores too good",
            0,
        ),
    }
    assert check_data(spec(tmp_path, bad_images="skip")).usable
    assert json.loads(json.dumps(report._asdict()))["classes"] == report.classes


def test_data_that_cannot_be_loaded(tmp_path: Path) -> None:
    report = check_data(spec(tmp_path / "absent"))

    assert [(finding.level, finding.number) for finding in report.findings] == [("error", 0)]
    assert "does not exist" in report.findings[0].what
    assert not report.usable


def test_images_are_counted_by_group(tmp_path: Path) -> None:
    write_sample("surrey-asl", tmp_path, per_class=2)

    report = check_data(DataSpec(source="surrey-asl", root=str(tmp_path)))

    assert (report.groups, report.sizes, len(report.classes)) == (
        {"A": 48, "B": 48, "C": 48},
        {"36 x 40": 144},
        24,
    )


def test_images_in_arrays_are_checked(tmp_path: Path) -> None:
    write_sample("mnist", tmp_path, per_class=25)

    report = check_data(DataSpec(source="mnist", root=str(tmp_path)))

    # Synthetic images look alike, so pairs are expected.
    messages = [finding.what for finding in report.findings if "pairs" not in finding.what]
    assert report.classes == {str(i): {"train": 25, "test": 12} for i in range(10)}
    assert [message.split(":")[0] for message in messages] == ["not the complete MNIST"]
    assert report.guessed_regex == ""


def test_groups_are_guessed_from_file_names(tmp_path: Path) -> None:
    """A guess is only a note: nothing is grouped until the pattern is set."""
    for label, name in enumerate(("cat", "dog")):
        for i in range(24):
            write(tmp_path / name / f"patient{i % 6}_{i}.png", 100 * label + i)

    report = check_data(spec(tmp_path))

    (finding,) = [f for f in report.findings if "file names look like 6 groups" in f.what]
    assert report.groups == {}
    assert (finding.level, finding.number) == ("note", 6)

    grouped = check_data(spec(tmp_path, group_regex=report.guessed_regex))

    assert grouped.groups == {f"patient{i}": 8 for i in range(6)}
    assert grouped.guessed_regex == ""


def test_near_copies_are_looked_for_in_small_data_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        for i in range(3):
            (tmp_path / label).mkdir(exist_ok=True)
            pixels = rng.integers(0, 255, (8, 8, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    with Image.open(tmp_path / "cat/0.png") as first:
        first.resize((48, 48)).save(tmp_path / "cat/copy.png")
    (near,) = [f for f in check_data(spec(tmp_path)).findings if "of images" in f.what]

    assert (near.level, near.what[:39]) == ("note", "1 pair of images looks nearly the same,")

    monkeypatch.setattr(check, "NEAR_COPIES", 6)
    messages = [f.what for f in check_data(spec(tmp_path)).findings]

    assert "near copies are not searched for among more than 6 images" in messages
    assert not any("look nearly the same" in what for what in messages)


def test_images_that_stand_out_are_listed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / label).mkdir()
        for i in range(12):
            pixels = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / label / f"{i}.png")
    write(tmp_path / "cat/empty.png", 128, (12, 12))

    report = check_data(spec(tmp_path))

    assert [(found.id, found.fault) for found in report.quality] == [
        ("cat/empty.png", "one colour")
    ]
    assert Finding("note", "1 image stands out, nearly one colour: cat/empty.png", 1) in (
        report.findings
    )


@pytest.mark.parametrize(
    ("sample", "folder", "kind"),
    [
        ("svhn", "a", "svhn"),
        ("mnist", "b", "mnist"),
        ("fashion-mnist", "my-fashion", "fashion-mnist"),
        ("cifar10", "c", "cifar10"),
        ("cifar100", "d", "cifar100"),
        ("surrey-asl", "e", "surrey-asl"),
        ("icassava2019", "f", "icassava2019"),
        ("inaturalist2019", "g", "inaturalist2019"),
        ("cassava2020", "h", "cassava2020"),
        ("folder", "i", "folder"),
    ],
)
def test_a_folder_is_known_by_its_files(
    tmp_path: Path, sample: str, folder: str, kind: str
) -> None:
    root = write_sample(sample, tmp_path / folder, per_class=2)

    assert find_spec(str(root)).source == kind


def test_a_path_or_a_name_gives_its_source(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("path,label\n")

    assert find_spec(str(tmp_path / "t.csv")).source == "csv"
    assert find_spec(str(tmp_path), "csv").source == "csv"
    assert find_spec("demo").source == "demo"

    root = write_sample("icassava2019", tmp_path / "sample", per_class=2)

    assert find_spec(str(root / "cassavaleafdata.zip")).source == "icassava2019"
    with pytest.raises(
        DataError, match="no such file or folder: svhn; fix: threefold data fetch svhn --to FOLDER"
    ):
        find_spec("svhn")
    with pytest.raises(RecipeError, match="not a source of data: --as; expected folder"):
        find_spec(str(tmp_path), "photos")


def test_what_the_user_sets_is_not_overruled(tmp_path: Path) -> None:
    rows = ["path,labels,fold,kfold", "a.png,cat|dog,1,2", "b.png,dog,2,1", "c.png,cat|dog,1,1"]
    table = tmp_path / "t.csv"
    table.write_text("\n".join(rows))

    found = find_spec(str(table), overrides=["data.fold_column=kfold"])
    kept = find_spec(str(table), overrides=["data.task=multiclass", "data.fold_column=fold"])

    assert (found.task, found.fold_column) == ("multilabel", "kfold")
    assert (kept.task, kept.fold_column) == ("multiclass", "fold")


@pytest.mark.parametrize("per_class", [19, 20])
def test_few_images_begin_below_twenty(tmp_path: Path, per_class: int) -> None:
    write_sample("mnist", tmp_path, per_class=per_class)

    report = check_data(DataSpec(source="mnist", root=str(tmp_path)))

    few = [finding for finding in report.findings if "fewer" in finding.what]
    assert len(few) == (per_class < 20)
