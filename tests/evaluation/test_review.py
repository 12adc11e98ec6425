"""A review: findings of each image are joined, and its table is what `fit` reads."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.fake_runs import fake_recipe

from threefold.data.load import load_data
from threefold.data.synthetic import write_sample
from threefold.errors import DataError, RunError
from threefold.evaluation.label_errors import Suspect, read_suspects, write_suspects
from threefold.evaluation.review import (
    Decision,
    Review,
    check_target,
    collect_items,
    open_review,
    write_reviewed,
)
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.schema import DataSpec


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of noise, with a copy under another label and one empty image."""
    rng = np.random.default_rng(0)
    root = tmp_path / "photos"
    for label in ("cat", "dog, small"):
        for part, count in (("train", 12), ("test", 2)):
            folder = root / part / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    copy = (root / "train/cat/0.png").read_bytes()
    (root / "train/dog, small/copy.png").write_bytes(copy)
    Image.new("RGB", (12, 12), (9, 9, 9)).save(root / "train/cat/empty.png")
    return root


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_findings_are_listed_with_their_reasons(photos: Path) -> None:
    review = open_review(str(photos))

    copy, empty = review.items
    assert (copy.id, copy.kinds, copy.label) == (
        "train/dog, small/copy.png",
        ("copy",),
        "dog, small",
    )
    assert copy.reasons == ("the same pixels as train/cat/0.png, which is labelled cat",)
    assert copy.copy_of == "train/cat/0.png"
    assert (empty.id, empty.kinds) == ("train/cat/empty.png", ("quality",))
    assert empty.reasons == ("nearly one colour: standard deviation 0.0 of 255",)
    assert review.notes == ("labels are looked at in a run only: give the folder of one",)


def test_the_table_of_decisions_is_read_by_fit(photos: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*.png")}
    review, target = open_review(str(photos)), tmp_path / "clean.csv"
    decisions = {
        "train/dog, small/copy.png": Decision("drop"),
        "train/cat/empty.png": Decision("relabel", "dog, small"),
        "train/cat/0.png": Decision("accept"),
    }

    count = write_reviewed(target, review, decisions)

    sources = load_data(DataSpec(source="csv", root=str(target)), 0)
    labels = {
        Path(name).relative_to(photos).as_posix(): sources.train.classes[label]
        for name, label in zip(sources.train.ids, sources.train.labels, strict=True)
    }
    assert sources.test is not None
    assert (count, len(sources.train), len(sources.test)) == (29, 25, 4)
    assert labels["train/cat/empty.png"] == "dog, small"
    assert labels["train/cat/0.png"] == "cat"
    assert "train/dog, small/copy.png" not in labels
    assert {path: path.read_bytes() for path in photos.rglob("*.png")} == before


def test_groups_and_folds_are_kept(photos: Path, tmp_path: Path) -> None:
    table = tmp_path / "own.csv"
    with open(table, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "group", "fold"])
        for i, path in enumerate(sorted((photos / "train").rglob("*.png"))):
            writer.writerow([path, path.parent.name, f"g{i % 5}", i % 3])

    write_reviewed(tmp_path / "clean.csv", open_review(str(table)), {})

    assert [
        (Path(row["path"]), row["label"], row["group"], row["fold"])
        for row in rows(tmp_path / "clean.csv")
    ] == [(Path(row["path"]), row["label"], row["group"], row["fold"]) for row in rows(table)]


def test_suspects_are_read_back(tmp_path: Path) -> None:
    suspects = [
        Suspect("=1+2.png", "cat", "-dog", 0.25, "labelled cat; says -dog"),
        Suspect("a, b.png", "'cat", "dog", 0.5, "why"),
    ]

    write_suspects(tmp_path / "suspects.csv", suspects)

    assert read_suspects(tmp_path / "suspects.csv") == suspects


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label\na,b\n", "not a list of suspect labels: .*; expected id, label, suggested"),
        ("", "not a list of suspect labels"),
        ("id,label,suggested,score,reason\na,b\n", "expected five cells in each row"),
        ("id,label,suggested,score,reason\na,b,c,high,e\n", "expected five cells in each row"),
        (None, "cannot read the suspect labels"),
    ],
)
def test_other_tables_are_no_suspects(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "suspects.csv").write_text(text)

    with pytest.raises(DataError, match=message):
        read_suspects(tmp_path / "suspects.csv")


def test_a_run_brings_its_suspect_labels(photos: Path, tmp_path: Path) -> None:
    recipe = fake_recipe("run", "honest", "auto")
    data = DataSpec(source="folder", root=str(photos))
    folder = RunFolder.create(tmp_path / "run", recipe.model_copy(update={"data": data})).path
    suspect = Suspect("train/cat/1.png", "cat", "dog, small", 0.1, "labelled cat; ...")

    assert open_review(str(folder)).notes == (
        "the run has no suspects.csv: labels are not looked at",
    )
    write_suspects(folder / "suspects.csv", [suspect])
    review = open_review(str(folder))

    assert [(item.id, item.kinds) for item in review.items] == [
        ("train/cat/1.png", ("label",)),
        ("train/dog, small/copy.png", ("copy",)),
        ("train/cat/empty.png", ("quality",)),
    ]
    assert (review.items[0].suggested, review.notes) == ("dog, small", ())


def test_a_suspect_has_the_suggested_class(photos: Path) -> None:
    sources = load_data(DataSpec(source="folder", root=str(photos)), 0)
    suspect = Suspect("train/cat/1.png", "cat", "dog, small", 0.1, "labelled cat; ...")

    (item,) = collect_items(sources, [suspect], [], [])

    assert (item.suggested, item.kinds, item.part) == ("dog, small", ("label",), "train")
    with pytest.raises(DataError, match="suspect images are not in the data set; got gone"):
        collect_items(sources, [suspect._replace(id="gone")], [], [])


def test_nothing_of_the_user_is_overwritten(photos: Path, tmp_path: Path) -> None:
    review = open_review(str(photos))
    (tmp_path / "mine.csv").write_text("mine")

    check_target(review, tmp_path / "clean.csv")
    for target, message in (
        (tmp_path / "mine.csv", "the file exists"),
        (photos / "clean.csv", "would lie among the images"),
        (photos / "train/cat/clean.csv", "would lie among the images"),
        (tmp_path / "clean.txt", "not a name for this file"),
    ):
        with pytest.raises(RunError, match=message):
            check_target(review, target)


@pytest.mark.parametrize(
    ("decisions", "message"),
    [
        ({"gone": Decision("drop")}, "decisions about images that are not there; got gone"),
        ({"train/cat/0.png": Decision("relabel", "cow")}, "no such class; expected cat, dog"),
        ({"train/cat/0.png": Decision("relabel")}, "no such class; .* got nothing"),
    ],
)
def test_impossible_decisions_are_refused(
    photos: Path, tmp_path: Path, decisions: dict[str, Decision], message: str
) -> None:
    review: Review = open_review(str(photos))

    with pytest.raises(DataError, match=message):
        write_reviewed(tmp_path / "clean.csv", review, decisions)

    assert not (tmp_path / "clean.csv").exists()


def test_images_in_arrays_cannot_be_listed(tmp_path: Path) -> None:
    write_sample("mnist", tmp_path, per_class=2)

    with pytest.raises(DataError, match="the images are no files"):
        open_review(str(tmp_path))
