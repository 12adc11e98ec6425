"""iNaturalist, Cassava and Surrey in their official layouts, and damaged files of each."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sources import load_source

from threefold.data.dataset import ImageDataset
from threefold.data.images import decode
from threefold.data.published import CASSAVA_2020_CLASSES, CASSAVA_CLASSES, SURREY_LETTERS
from threefold.data.sources.archives import read_members
from threefold.data.synthetic import write_sample
from threefold.errors import DataError, RecipeError
from threefold.recipe.recipe import Recipe


def count(data: ImageDataset | None) -> dict[str, int]:
    return {} if data is None else dict(Counter(data.classes[label] for label in data.labels))


def zip_up(folder: Path, archive: Path) -> Path:
    with zipfile.ZipFile(archive, "w") as target:
        for path in sorted(folder.rglob("*")):
            target.write(path, path.relative_to(folder))
    shutil.rmtree(folder)
    return archive


# iNaturalist


def annotations(root: Path, part: str) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(
        read_members(root / f"{part}2019.json.tar.gz", [f"{part}2019.json"])[f"{part}2019.json"]
    )
    return tree


def write_json(root: Path, part: str, tree: Any) -> None:
    (root / f"{part}2019.json.tar.gz").unlink(missing_ok=True)
    (root / f"{part}2019.json").write_text(json.dumps(tree))


def test_inaturalist_holds_out_its_validation_images(tmp_path: Path) -> None:
    write_sample("inaturalist2019", tmp_path)

    sources = load_source("inaturalist2019", tmp_path)

    assert sources.test is not None
    assert (count(sources.train), count(sources.test)) == (
        {str(i): 6 for i in range(6)},
        {str(i): 3 for i in range(6)},
    )
    assert sources.train.classes == tuple("012345")
    for part, data in (("train", sources.train), ("val", sources.test)):
        tree = annotations(tmp_path, part)
        files = {image["id"]: image["file_name"] for image in tree["images"]}
        labels = {files[entry["image_id"]]: entry["category_id"] for entry in tree["annotations"]}
        assert dict(zip(data.ids, data.labels.tolist(), strict=True)) == labels
    assert np.array_equal(sources.train.pixels(4), decode(tmp_path / sources.train.ids[4]))


def test_inaturalist_with_extra_holds_out_nothing(tmp_path: Path) -> None:
    write_sample("inaturalist2019", tmp_path)

    joined = load_source("inaturalist2019", tmp_path, extra=True)

    assert (count(joined.train), joined.test) == ({str(i): 9 for i in range(6)}, None)
    assert "nothing is held out" in joined.notes[-1]


def test_inaturalist_classes_follow_their_numbers(tmp_path: Path) -> None:
    """categories.json has the names; one name of two species gets their numbers."""
    write_sample("inaturalist2019", tmp_path, per_class=2)
    names = ["Zea mays", "Ajuga", "Ajuga", "Bombus", "Apis", "Corvus"]
    (tmp_path / "categories.json").write_text(
        json.dumps([{"id": i, "name": name} for i, name in enumerate(names)][::-1])
    )

    train = load_source("inaturalist2019", tmp_path).train

    assert train.classes == ("Zea mays", "Ajuga (1)", "Ajuga (2)", "Bombus", "Apis", "Corvus")
    assert {
        name.split("/")[2]: label
        for name, label in zip(train.ids, train.labels.tolist(), strict=True)
    } == {str(i): i for i in range(6)}


def test_inaturalist_from_its_archive(tmp_path: Path) -> None:
    write_sample("inaturalist2019", tmp_path / "plain", per_class=2)
    write_sample("inaturalist2019", tmp_path / "packed", per_class=2)
    shutil.make_archive(
        str(tmp_path / "packed/train_val2019"), "gztar", tmp_path / "packed", "train_val2019"
    )
    shutil.rmtree(tmp_path / "packed/train_val2019")

    plain = load_source("inaturalist2019", tmp_path / "plain")

    for root in (tmp_path / "packed", tmp_path / "packed/train_val2019.tar.gz"):
        assert load_source("inaturalist2019", root).train.ids == plain.train.ids


def change(part: str, edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        tree = annotations(root, part)
        edit(tree)
        write_json(root, part, tree)

    return spoil


def leave_out(root: Path) -> None:
    next((root / "train_val2019").rglob("*.jpg")).unlink()


BAD_INAT: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (
        lambda r: shutil.rmtree(r / "train_val2019"),
        "is not there: .*train_val2019/ .*fetch inaturalist2019",
    ),
    "no annotations": (
        lambda r: (r / "val2019.json.tar.gz").unlink(),
        "a file of iNaturalist 2019 is missing: .*val2019.json",
    ),
    "no JSON": (
        lambda r: write_json(r, "train", None) or (r / "train2019.json").write_text("{"),
        "not valid JSON",
    ),
    "no key": (
        change("val", lambda t: t.pop("images")),
        "annotations cannot be read: .*val2019.json; got KeyError",
    ),
    "no image": (
        change("train", lambda t: t["images"].pop()),
        "annotations cannot be read.*got KeyError",
    ),
    "no category": (
        change("train", lambda t: t["annotations"][0].update(category_id=9)),
        "labels have no category: .*got 9",
    ),
    "a list": (
        lambda r: write_json(r, "train", [1]),
        "categories cannot be read|annotations cannot be read",
    ),
    "twice": (
        change("val", lambda t: t["annotations"].append(t["annotations"][0])),
        "images are listed twice",
    ),
    "outside": (
        change("val", lambda t: t["images"][0].update(file_name="../x.jpg")),
        "unsafe name",
    ),
    "absent": (leave_out, "1 listed image does not exist"),
}


@pytest.mark.parametrize("case", BAD_INAT)
def test_bad_inaturalist(tmp_path: Path, case: str) -> None:
    write_sample("inaturalist2019", tmp_path, per_class=2)
    spoil, message = BAD_INAT[case]
    spoil(tmp_path)

    with pytest.raises(DataError, match=message):
        load_source("inaturalist2019", tmp_path)


# Cassava


def test_icassava_with_three_labelled_parts(tmp_path: Path) -> None:
    write_sample("icassava2019", tmp_path)

    sources = load_source("icassava2019", tmp_path)

    assert sources.train.classes == CASSAVA_CLASSES
    assert count(sources.train) == dict.fromkeys(CASSAVA_CLASSES, 6)
    assert count(sources.test) == dict.fromkeys(CASSAVA_CLASSES, 3)
    assert sources.train.ids[0] == "train/cbb/train-cbb-0.jpg"
    assert "15 validation images are not used" in sources.notes[1]

    folder = tmp_path / "cassavaleafdata.zip.unpacked/cassavaleafdata"

    assert np.array_equal(sources.train.pixels(0), decode(folder / sources.train.ids[0]))
    for root in (folder, folder.parent, tmp_path / "cassavaleafdata.zip"):
        assert count(load_source("icassava2019", root, extra=True).train) == dict.fromkeys(
            CASSAVA_CLASSES, 9
        )


def test_icassava_in_kaggles_edition(tmp_path: Path) -> None:
    """train.zip and test.zip in one archive; the test images have no labels."""
    write_sample("icassava2019", tmp_path / "sample", per_class=2)
    load_source("icassava2019", tmp_path / "sample")
    folder = tmp_path / "sample/cassavaleafdata.zip.unpacked/cassavaleafdata"
    (tmp_path / "train").mkdir()
    (folder / "train").rename(tmp_path / "train/train")
    (tmp_path / "box").mkdir()
    zip_up(tmp_path / "train", tmp_path / "box/train.zip")
    (tmp_path / "kaggle").mkdir()
    zip_up(tmp_path / "box", tmp_path / "kaggle/cassava-disease.zip")

    sources = load_source("icassava2019", tmp_path / "kaggle")

    assert (count(sources.train), sources.test) == (dict.fromkeys(CASSAVA_CLASSES, 2), None)

    unpacked = tmp_path / "kaggle/cassava-disease.zip.unpacked/train.zip.unpacked"
    shutil.copytree(folder / "test/cbb", unpacked / "test/0")

    notes = load_source("icassava2019", unpacked).notes
    assert notes[-1] == "the test images have no labels and are not used"
    with pytest.raises(DataError, match="no extra images"):
        load_source("icassava2019", unpacked, extra=True)

    shutil.rmtree(unpacked / "train/healthy")

    with pytest.raises(DataError, match=r"class folders are missing.*healthy"):
        load_source("icassava2019", unpacked)


def test_cassava2020(tmp_path: Path) -> None:
    write_sample("cassava2020", tmp_path / "sample")

    sources = load_source("cassava2020", tmp_path / "sample")

    assert (sources.train.classes, sources.test) == (CASSAVA_2020_CLASSES, None)

    rows = dict(
        line.split(",") for line in (tmp_path / "sample/train.csv").read_text().splitlines()[1:]
    )

    assert {
        name: str(label)
        for name, label in zip(sources.train.ids, sources.train.labels, strict=True)
    } == {f"train_images/{name}": label for name, label in rows.items()}
    assert sources.notes[-1] == "the test images have no labels and are not used"

    archive = zip_up(tmp_path / "sample", tmp_path / "cassava-leaf-disease-classification.zip")

    for root in (archive, tmp_path):
        assert load_source("cassava2020", root).train.ids == sources.train.ids


BAD_CASSAVA: dict[str, tuple[Callable[[Path], object], str]] = {
    "no table": (lambda r: (r / "train.csv").unlink(), "cannot read the file: .*train.csv"),
    "no names": (
        lambda r: (r / "label_num_to_disease_map.json").unlink(),
        "cannot read the file: .*disease_map.json",
    ),
    "columns": (lambda r: (r / "train.csv").write_text("a,b\n1,2\n"), "expected image_id,label"),
    "text": (
        lambda r: (r / "train.csv").write_text("image_id,label\nx.jpg,cmd\n"),
        "labels cannot be read",
    ),
    "label 9": (lambda r: (r / "train.csv").write_text("image_id,label\nx.jpg,9\n"), "KeyError 9"),
    "a list": (
        lambda r: (r / "label_num_to_disease_map.json").write_text("[]"),
        "labels cannot be read",
    ),
    "absent": (
        lambda r: (r / "train.csv").write_text("image_id,label\nx.jpg,1\n"),
        "1 listed image does not exist",
    ),
    "outside": (
        lambda r: (r / "train.csv").write_text("image_id,label\n../x.jpg,1\n"),
        "unsafe name",
    ),
}


@pytest.mark.parametrize("case", BAD_CASSAVA)
def test_bad_cassava2020(tmp_path: Path, case: str) -> None:
    write_sample("cassava2020", tmp_path, per_class=2)
    spoil, message = BAD_CASSAVA[case]
    spoil(tmp_path)

    with pytest.raises(DataError, match=message):
        load_source("cassava2020", tmp_path)


# Surrey


def test_surrey_has_signers_as_groups(tmp_path: Path) -> None:
    write_sample("surrey-asl", tmp_path, per_class=2)

    sources = load_source("surrey-asl", tmp_path)

    train = sources.train

    assert (train.classes, sources.test) == (SURREY_LETTERS, None)
    assert not {"j", "z"} & set(train.classes)
    assert count(train) == dict.fromkeys(SURREY_LETTERS, 6)
    assert train.ids[0] == "A/a/color_0_0002.png"
    assert train.groups == tuple(name[0] for name in train.ids)
    assert sources.notes[-1] == "144 depth images are not used"
    assert np.array_equal(train.pixels(0), decode(tmp_path / "dataset5" / train.ids[0]))


def test_surrey_from_its_archive(tmp_path: Path) -> None:
    write_sample("surrey-asl", tmp_path, per_class=2)
    ids = load_source("surrey-asl", tmp_path).train.ids
    shutil.make_archive(str(tmp_path / "fingerspelling5"), "bztar", tmp_path, "dataset5")
    (tmp_path / "alone").mkdir()

    archive = (tmp_path / "fingerspelling5.tar.bz2").rename(
        tmp_path / "alone/fingerspelling5.tar.bz2"
    )

    for root in (tmp_path / "dataset5", archive, archive.parent):
        assert load_source("surrey-asl", root).train.ids == ids


def test_surrey_refuses_unknown_folders(tmp_path: Path) -> None:
    write_sample("surrey-asl", tmp_path, per_class=2)
    (tmp_path / "dataset5/B/j").mkdir()

    with pytest.raises(DataError, match=r"none of the 24 letters.*got j"):
        load_source("surrey-asl", tmp_path)
    with pytest.raises(DataError, match=r"is not there: .*dataset5/A/a"):
        load_source("surrey-asl", tmp_path / "absent")


# Recipes


def test_recipes_know_groups_and_extra_images() -> None:
    def recipe(**data: Any) -> Recipe:
        parts: dict[str, Any] = {
            "stages": [{"name": "a", "epochs": 1, "lr": 1}],
            "members": [{"name": "m", "backbone": "x"}],
        }
        return Recipe.parse(
            {**parts, "data": {"root": "x", **data}, "folds": {"scheme": "leave-one-group-out"}}
        )

    assert recipe(source="surrey-asl").folds.scheme == "leave-one-group-out"
    with pytest.raises(RecipeError, match="needs groups"):
        recipe(source="mnist")
    with pytest.raises(RecipeError, match="source = surrey-asl has no extra images; svhn"):
        recipe(source="surrey-asl", extra=True)
