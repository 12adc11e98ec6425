"""Images that change or vanish while a run works or before it goes on: found and named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.frozen_runs import PROBE, frozen_tree
from support.tiny_runs import make_folder, paint, tiny_tree

from threefold import api
from threefold.errors import DataError, RunError, ThreefoldError
from threefold.predictions.run_folder import RunFolder
from threefold.recipe.recipe import Recipe
from threefold.training.features.cache import FeatureCache
from threefold.training.pixel_cache import PixelCache
from threefold.training.progress.watcher import Watcher
from threefold.training.run import Run
from threefold.training.run_images import IMAGES_FILE, check_images, image_changes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "images", per_class=3, test=2)


def begin(folder: Path, target: Path, **changes: Any) -> Run:
    """Start a run, as training does before its first job."""
    run = Run.create(Recipe.parse(tiny_tree(folder, **changes)), target)
    check_images(run)
    return run


def changes_of(folder: Path) -> list[str]:
    """What is said of the images of a run as they are now."""
    run = Run.open(folder)
    return image_changes(run, run.sources)


def repaint(path: Path, size: tuple[int, int] = (40, 32)) -> None:
    paint(path, (9, 9, 9), seed=99, size=size)


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "overwritten": (
        lambda root: repaint(root / "train/red/001.png"),
        r"1 training image changed: train/red/001\.png",
    ),
    "another size": (
        lambda root: repaint(root / "test/blue/000.png", (90, 80)),
        r"1 test image changed: test/blue/000\.png",
    ),
    "removed": (
        lambda root: (root / "train/red/002.png").unlink(),
        r"1 training image missing: train/red/002\.png",
    ),
    "added": (
        lambda root: repaint(root / "train/green/new.png"),
        r"1 training image added: train/green/new\.png",
    ),
    "moved to another class": (
        lambda root: (root / "train/red/000.png").rename(root / "train/green/000x.png"),
        r"added: train/green/000x\.png; .*missing: train/red/000\.png",
    ),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_a_resumed_run_names_the_changed_images(
    folder: Path, tmp_path: Path, change: Callable[[Path], object], words: str
) -> None:
    begin(folder, tmp_path / "run")
    change(folder)

    with pytest.raises(
        RunError, match=f"images have changed since.*{words}.*fix: restore"
    ) as error:
        check_images(Run.open(tmp_path / "run"))

    assert "\n" not in str(error.value)


def test_images_that_were_restored_are_the_same(folder: Path, tmp_path: Path) -> None:
    begin(folder, tmp_path / "run")
    shutil.copytree(folder, tmp_path / "kept")
    repaint(folder / "train/red/001.png")
    assert changes_of(tmp_path / "run")
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "kept", folder)

    assert changes_of(tmp_path / "run") == []


def test_an_edited_table_names_its_rows(folder: Path, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    paths = sorted((folder / "train").rglob("*.png"))
    rows = [f"{path},{path.parent.name},g{number}" for number, path in enumerate(paths)]
    table.write_text("\n".join(["path,label,group", *rows]))
    data = {"source": "csv", "root": str(table)}
    run = begin(folder, tmp_path / "run", data=data)
    first, last = run.sources.train.ids[0], run.sources.train.ids[-1]

    rows[0] = rows[0].replace(",blue,", ",red,")
    rows[-1] = rows[-1].replace(",g8", ",g0")
    table.write_text("\n".join(["path,label,group", *rows]))

    assert changes_of(tmp_path / "run") == [
        f"1 training image with another label: {first}",
        f"1 training image with another group: {last}",
    ]


def test_a_damaged_record_is_written_again(folder: Path, tmp_path: Path) -> None:
    begin(folder, tmp_path / "run")
    kept = (tmp_path / "run" / IMAGES_FILE).read_bytes()
    (tmp_path / "run" / IMAGES_FILE).write_bytes(b"damaged")

    check_images(Run.open(tmp_path / "run"))

    assert (tmp_path / "run" / IMAGES_FILE).read_bytes() == kept


@pytest.mark.parametrize("vanishes", [False, True])
def test_caches_hold_no_image_that_changed(folder: Path, tmp_path: Path, vanishes: bool) -> None:
    """Between the listing, the hash and the decoding there is no moment to mix contents."""
    recipe = Recipe.parse(frozen_tree(folder, members=[PROBE]), ["features.engine=torch"])
    run = Run.create(recipe, tmp_path / "run")
    name = run.sources.train.images[4]
    assert isinstance(name, Path)
    name.unlink() if vanishes else repaint(name)
    words = "could be read before" if vanishes else "changed after it was read first"
    rows, spec = np.arange(9), recipe.members[0]

    with pytest.raises(DataError, match=f"{words}.*{name.name}.*fix: restore it"):
        PixelCache(run.sources, run.all_views, tmp_path / "cache").rows("train", spec, rows)
    with pytest.raises(DataError, match=words):
        FeatureCache(run.sources, recipe, folder=tmp_path / "features").rows("train", spec, rows)

    assert not list((tmp_path / "cache").glob("*.npy"))
    assert not list((tmp_path / "features").rglob("*.npy"))


def test_squares_of_other_images_are_made_again(folder: Path, tmp_path: Path) -> None:
    run = begin(folder, tmp_path / "run")
    spec, rows = run.recipe.members[0], np.arange(9)
    PixelCache(run.sources, run.all_views, tmp_path / "cache").rows("train", spec, rows)
    repaint(folder / "train/red/001.png")
    other = Run.create(run.recipe, tmp_path / "other")

    caches = [
        PixelCache(other.sources, other.all_views, tmp_path / name).rows("train", spec, rows)
        for name in ("cache", "new")
    ]

    assert np.array_equal(caches[0].pixels[:], caches[1].pixels[:])


class Meddler(Watcher):
    """Changes an image when a stage has ended its first epoch, and collects notes."""

    def __init__(self, change: Callable[[], object]) -> None:
        self.change, self.notes = change, []
        self.is_done = False

    def epoch(self, record: dict[str, Any]) -> None:
        """Change it once."""
        if not self.is_done:
            self.is_done = True
            self.change()

    def note(self, text: str) -> None:
        """Collect a note."""
        self.notes.append(text)


@pytest.mark.slow
@pytest.mark.parametrize("vanishes", [False, True])
def test_a_change_during_training_is_found_and_mended(tmp_path: Path, vanishes: bool) -> None:
    folder = make_folder(tmp_path / "images", per_class=4, test=2)
    tree = tiny_tree(folder)
    tree["members"] = [tree["members"][0]]
    recipe, image = Recipe.parse(tree), folder / "test/blue/000.png"
    kept = image.read_bytes()
    api.train(recipe, tmp_path / "right")

    with pytest.raises(ThreefoldError, match=r"test/blue/000\.png.*restore"):
        # The training images are decoded by then, the test images are not.
        api.train(
            recipe,
            tmp_path / "run",
            Meddler(image.unlink if vanishes else lambda: repaint(image)),
        )
    with pytest.raises(RunError, match=r"have changed since.*test/blue/000\.png"):
        api.train(recipe, tmp_path / "run")
    image.write_bytes(kept)
    api.train(recipe, tmp_path / "run")

    for name in ("oof.npz", "test.npz"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "right" / name).read_bytes()


@pytest.mark.slow
def test_an_export_after_a_change_says_so(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", per_class=4)
    recipe = Recipe.parse(frozen_tree(folder, members=[PROBE]), ["features.engine=torch"])
    run = api.train(recipe, tmp_path / "run", Watcher())
    repaint(folder / "red/001.png")
    watcher = Meddler(lambda: None)

    api.finish(Run(RunFolder.open(run.dir), watcher))

    assert any("have changed since the run began" in note for note in watcher.notes)
