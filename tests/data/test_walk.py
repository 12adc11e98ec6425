"""Which files of a folder are images, which folders are splits, and what is left out."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.sources import load_source

from threefold.data.dataset import Sources
from threefold.data.split_names import split_of
from threefold.errors import DataError
from threefold.runtime.predict import find_images


def make(root: Path, *names: str) -> Path:
    """Images of a shade of their own each, in the format PNG whatever their names."""
    for shade, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((3, 4), shade, dtype=np.uint8)).save(path, "PNG")
    return root


def make_classes(root: Path, *parents: str, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    """Two images of two classes in each parent."""
    return make(root, *(f"{p}/{c}/{i}.png" for p in parents for c in classes for i in range(2)))


def load(root: Path, **options: object) -> Sources:
    return load_source("folder", root, **options)


def refuse(root: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("training_set", "test_set"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("trainset", "testset"),
        ("TRAIN", "holdout"),
        ("train data", "test1"),
    ],
)
def test_other_names_of_splits(tmp_path: Path, train: str, test: str) -> None:
    sources = load(make_classes(tmp_path, train, test))

    assert sources.train.classes == ("cat", "dog")
    assert all(name.startswith(f"{train}/") for name in sources.train.ids)
    assert sources.test is not None
    assert all(name.startswith(f"{test}/") for name in sources.test.ids)


def test_dev_is_validation(tmp_path: Path) -> None:
    sources = load(make_classes(tmp_path, "train", "dev"))

    assert (len(sources.train), sources.test) == (8, None)
    assert sources.notes[0].startswith("dev/ was joined with train/")


@pytest.mark.parametrize("name", ["trained", "contest", "car", "value", "fold_0", "strain", "1"])
def test_names_that_are_no_splits(name: str) -> None:
    assert split_of(name) is None


@pytest.mark.parametrize("folders", [("fold_0", "fold_1", "fold_2"), ("a", "b"), ("1", "2")])
def test_parts_of_one_data_set_are_no_classes(tmp_path: Path, folders: tuple[str, ...]) -> None:
    make_classes(tmp_path, *folders)

    refuse(tmp_path, "read like parts of one data set.*which all hold cat/, dog/.*fold_column")


def test_splits_below_the_classes_are_refused(tmp_path: Path) -> None:
    make_classes(tmp_path, "cat", "dog", classes=("train", "test"))

    refuse(tmp_path, "read like parts of one data set")


@pytest.mark.parametrize("test", ["test", "test1", "val"])
def test_splits_without_class_folders_are_refused(tmp_path: Path, test: str) -> None:
    make(tmp_path, *(f"{part}/cat.{i}.jpg" for part in ("train", test) for i in range(3)))

    refuse(tmp_path, "neither split nor one folder per class.*path,label,split")


def test_unlabelled_test_images_are_refused(tmp_path: Path) -> None:
    make(make_classes(tmp_path, "train"), "test/1.png")

    refuse(tmp_path, "neither split nor.*class in test/.*move images without labels away")


def test_class_names_that_read_like_parts_are_a_warning(tmp_path: Path) -> None:
    make(tmp_path, *(f"{part}/{i}.png" for part in ("part1", "part2", "car") for i in range(2)))

    warnings = load(tmp_path).warnings

    assert warnings[-1].startswith("2 classes are named like parts of a data set: part1, part2;")


def test_accents_of_macos_are_the_same_class(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    make(
        tmp_path, *(f"{name}/{i}.png" for name in names for i in range(2)), "thé/1.png", "thé/2.png"
    )

    sources = load(tmp_path)

    assert sources.train.classes == (names[0], "thé")
    assert sources.train.labels.tolist().count(0) == 4


def test_a_hidden_class_folder_is_not_lost(tmp_path: Path) -> None:
    make(tmp_path, *(f"{name}/{i}.png" for name in (".NET", "java", "rust") for i in range(2)))

    refuse(tmp_path, r"a hidden folder beside the class folders holds images: .*/\.NET; .*rename")


@pytest.mark.parametrize("name", ["Ã\x89clair", "a\tb", "a\nb", "\x1b[31mred"])
def test_control_characters_in_a_class_are_refused(tmp_path: Path, name: str) -> None:
    make(tmp_path, *(f"{folder}/{i}.png" for folder in (name, "other") for i in range(2)))

    refuse(tmp_path, "name of a class has control characters.*fix: rename")
    if name.startswith("Ã"):
        refuse(tmp_path, "expected a name such as Éclair")


def test_runs_are_never_data(tmp_path: Path) -> None:
    make(tmp_path, *(f"{name}/{i}.png" for name in ("cat", "dog") for i in range(2)))
    make(tmp_path, "runs/photos/pictures/1.png", "cat/run/2.png", "photos-run/3.png")
    for run in ("runs/photos", "cat/run", "photos-run"):
        (tmp_path / run / "recipe.toml").write_text("")
    (tmp_path / "runs/planned").mkdir()
    (tmp_path / "runs/planned/groups.csv").write_text("id,group")

    sources = load(tmp_path)

    assert sources.train.ids == ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")
    assert sources.notes == ("4 folders of runs were ignored: photos, photos-run, planned, run",)


JUNK = ("cat/._0.png", "__MACOSX/cat/9.png", "cat/.ipynb_checkpoints/0.png", "cat/@eaDir/0.png")


def test_one_walk_for_every_verb(tmp_path: Path) -> None:
    root = make(
        tmp_path / "data", "cat/0.png", "cat/1", "cat/IMG.2", "dog/0.jpg", "dog/1.png", *JUNK
    )
    make(tmp_path / "elsewhere", "2.png", "3.png")
    (root / "dog/more").symlink_to(tmp_path / "elsewhere")
    (root / "dog/loop").symlink_to(root / "dog")
    (root / "dog/notes.txt").write_text("text")
    (root / "dog/README").write_text("text")
    os.mkfifo(root / "dog/pipe.png")
    expected = {
        *("cat/0.png", "cat/1", "cat/IMG.2"),
        *("dog/0.jpg", "dog/1.png", "dog/more/2.png", "dog/more/3.png"),
    }
    notes = (
        "2 files that are not images were ignored: .txt, README",
        "4 hidden files and folders were ignored: ._0.png, .ipynb_checkpoints, @eaDir, __MACOSX",
        "1 pipe or device was ignored: pipe.png",
    )
    told: list[object] = []

    sources = load(root, bad_images="skip")
    predicted = list(find_images([str(root)], notify=told.append))

    assert set(sources.train.ids) == expected
    assert {path.relative_to(root).as_posix() for path in predicted} == expected
    assert sources.notes[:3] == notes
    assert told == [f"{root}: {note}" for note in notes]


def test_classes_that_differ_in_capitals_are_a_warning(tmp_path: Path) -> None:
    names = ("Cat", "cat", "hot dog", "hot_dog", "hen")
    make(tmp_path, *(f"{name}/{i}.png" for name in names for i in range(2)))

    assert load(tmp_path).warnings[-1] == (
        "2 classes have names that differ in capitals or spaces only: "
        "'Cat' = 'cat', 'hot dog' = 'hot_dog'"
    )


def test_a_group_file_with_the_accents_of_macos(tmp_path: Path) -> None:
    nfd = unicodedata.normalize("NFD", "é")
    make(tmp_path, *(f"{folder}/{nfd}{i}.png" for folder in ("a", "b") for i in range(2)))
    rows = [f"{folder}/é{i}.png,g{i}" for folder in ("a", "b") for i in range(2)]
    (tmp_path / "g.csv").write_text("\n".join(["id,group", *rows]), encoding="utf-8")

    sources = load(tmp_path, group_file=str(tmp_path / "g.csv"))

    assert sources.train.groups == ("g0", "g1", "g0", "g1")
