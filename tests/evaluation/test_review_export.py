"""What Label Studio and FiftyOne import: the keys of their formats, and files that exist."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
from xml.etree import ElementTree

import pytest
from PIL import Image
from support.command_line import threefold_command
from support.review import COPY, EMPTY, write_photos

from threefold.errors import DataError
from threefold.evaluation.label_errors import Suspect
from threefold.evaluation.review import Review, collect_items, open_review
from threefold.evaluation.review_export import (
    label_studio_config,
    media_root,
    to_fiftyone,
    to_label_studio,
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("review") / "my photos"
    folder.mkdir()
    return write_photos(folder)


@pytest.fixture(scope="module")
def review(photos: Path) -> Review:
    found = open_review(str(photos))
    suspect = Suspect("dog/3.png", "dog", "cat", 0.1, "labelled dog; the ensemble says cat")
    items = collect_items(found.sources, [suspect], [], [])
    return found._replace(items=(*items, *found.items))


def test_label_studio_finds_each_image(review: Review, photos: Path) -> None:
    tasks = to_label_studio(review)

    addresses = [urlsplit(task["data"]["image"]) for task in tasks]
    assert {address.path for address in addresses} == {"/data/local-files/"}
    files = [media_root(review).parent / parse_qs(address.query)["d"][0] for address in addresses]
    assert files == [photos / "dog/3.png", photos / COPY, photos / EMPTY]
    assert all(file.is_file() for file in files)


def test_predictions_fit_the_labelling_interface(review: Review) -> None:
    view = ElementTree.fromstring(label_studio_config(review))
    choices, image = view.find("Choices"), view.find("Image")
    assert choices is not None
    assert image is not None
    classes = [choice.get("value") for choice in choices]

    results = [task["predictions"][0]["result"][0] for task in to_label_studio(review)]

    assert classes == ["cat", "dog"]
    assert [result["value"]["choices"] for result in results] == [["cat"], ["dog"], ["cat"]]
    for result in results:
        assert result["type"] == "choices"
        assert result["from_name"] == choices.get("name")
        assert result["to_name"] == choices.get("toName") == image.get("name")


def test_fiftyone_finds_each_image_and_class(review: Review) -> None:
    tree = to_fiftyone(review)

    root = media_root(review)
    files = {  # as FiftyOne names what is below the folder of the images
        path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.png")
    }
    assert set(tree["labels"]) <= files
    entry = tree["labels"]["dog/3"]
    assert tree["classes"][entry["label"]] == "dog"
    assert entry["attributes"]["suggested"] == "cat"
    assert len(tree["labels"]) == 3


def test_names_that_fiftyone_confuses_are_refused(photos: Path) -> None:
    Image.new("RGB", (300, 600), (200, 9, 9)).save(photos / "cat/empty.jpg")

    with pytest.raises(DataError, match="differ in their suffix only"):
        to_fiftyone(open_review(str(photos)))


@pytest.mark.slow
def test_the_command_writes_a_new_file_only(photos: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    words = ("data", "export", str(photos), "--format", "labelstudio", "--out", str(target))

    first = threefold_command(*words)
    content = target.read_text()
    second = threefold_command(*words)

    assert (first.returncode, second.returncode) == (0, 1), first.stderr
    assert [task["data"]["id"] for task in json.loads(content)] == [COPY, EMPTY]
    assert "the file exists" in second.stderr
    assert target.read_text() == content
