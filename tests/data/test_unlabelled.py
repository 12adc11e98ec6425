"""Unlabelled images: read from any folder, and refused where they are labelled ones, too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.sources import load_source
from support.tiny_runs import make_folder, paint

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.unlabelled import with_unlabelled
from threefold.errors import DataError


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return load_source(
        "folder", make_folder(tmp_path_factory.mktemp("labelled"), per_class=3, test=2)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images, one of them below a subfolder."""
    paint(tmp_path / "more" / "b.png", (10, 200, 30), 501)
    paint(tmp_path / "more" / "any" / "a.png", (10, 20, 230), 502)
    return tmp_path / "more"


def test_images_at_any_depth_have_no_label(labelled: Sources, folder: Path) -> None:
    (folder / "notes.txt").write_text("none")

    sources = with_unlabelled(labelled, str(folder), "fail")

    assert sources.part("unlabelled").ids == ("any/a.png", "b.png")
    assert sources.part("unlabelled").labels.tolist() == [-1, -1]
    assert sources.train is labelled.train
    assert sources.notes[-2:] == (
        "2 unlabelled images for pseudo labels",
        "beside them: 1 file that is not an image was ignored: .txt",
    )


def test_labels_are_all_there_or_all_missing(labelled: Sources) -> None:
    train = labelled.train
    labels = np.where(np.arange(len(train)) == 1, -1, train.labels)

    with pytest.raises(DataError, match="labels do not fit the classes"):
        ImageDataset(train.images, labels, train.ids, train.classes)


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_pixels_of_a_labelled_image_are_refused(
    labelled: Sources, folder: Path, split: str
) -> None:
    """Another name and another format hide nothing."""
    image = labelled.part(split)
    Image.fromarray(image.pixels(1)).save(folder / "copy.bmp")

    with pytest.raises(DataError) as error:
        with_unlabelled(labelled, str(folder), "fail")

    assert "unlabelled images are training or test images, too" in str(error.value)
    assert f"got 1 of 3: copy.bmp = {image.ids[1]}" in str(error.value)


def test_a_recompressed_copy_is_noted(labelled: Sources, folder: Path) -> None:
    Image.fromarray(labelled.train.pixels(0)).save(folder / "copy.jpg", quality=95)

    sources = with_unlabelled(labelled, str(folder), "fail")

    assert "1 unlabelled image looks nearly the same" in sources.notes[-1]
    assert f"copy.jpg = {labelled.train.ids[0]}" in sources.notes[-1]


def test_a_misleading_suffix_is_noted_where_bad_images_may_be(
    labelled: Sources, folder: Path
) -> None:
    (folder / "b.png").rename(folder / "b.jpg")

    sources = with_unlabelled(labelled, str(folder), "skip")

    assert len(sources.part("unlabelled")) == 2
    assert "1 image was read despite a misleading suffix" in sources.notes[-1]


def test_unreadable_images_stop_or_are_recorded(labelled: Sources, folder: Path) -> None:
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff torn")

    with pytest.raises(DataError, match=r"1 of 3 unlabelled images cannot be used.*torn\.jpg"):
        with_unlabelled(labelled, str(folder), "fail")
    sources = with_unlabelled(labelled, str(folder), "skip")

    assert len(sources.part("unlabelled")) == 2
    assert [image.path.name for image in sources.skipped] == ["torn.jpg"]


@pytest.mark.parametrize("case", ["missing", "file", "empty", "torn"])
def test_a_folder_without_images_is_one_line(labelled: Sources, folder: Path, case: str) -> None:
    root = folder / "none"
    if case == "file":
        root.write_bytes(b"")
    if case in ("empty", "torn"):
        root.mkdir()
    if case == "torn":
        (root / "torn.jpg").write_bytes(b"")

    with pytest.raises(DataError, match=r"unlabelled images.*fix: correct pseudo_labels\.images"):
        with_unlabelled(labelled, str(root), "skip")


def test_pixels_in_memory_are_compared_with_files(folder: Path) -> None:
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (4, 20, 20), np.uint8)
    ids = tuple("abcd")
    train = ImageDataset(grey, np.array([0, 0, 1, 1]), ids, ("x", "y"))
    Image.fromarray(grey[2]).save(folder / "grey.png")

    with pytest.raises(DataError, match=r"grey\.png = c"):
        with_unlabelled(Sources(train, None, (), ()), str(folder), "fail")
