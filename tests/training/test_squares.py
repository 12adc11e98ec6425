"""Squares of images: the pixels of decode and resize, and large photographs decoded once."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tiny_runs import tiny_tree

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.images import decode
from threefold.data.sources.folder import FilePaths
from threefold.models.views import Views
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import MemberSpec, ViewSpec
from threefold.training.features.cache import FeatureCache
from threefold.training.features.store import FeatureStore
from threefold.training.pixel_cache import PixelCache
from threefold.training.squares import SquareForm, Squares, resize_image

SMALL, LARGE = SquareForm(24, "squash"), SquareForm(40, "crop")


@pytest.fixture
def dataset(tmp_path: Path) -> ImageDataset:
    """Three photographs that are large beside both squares, and one that is small."""
    rng = np.random.default_rng(0)
    paths = []
    for number, (height, width) in enumerate([(90, 120), (200, 64), (81, 80), (30, 30)]):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(pixels).save(paths[-1])
    labels, ids = np.array([0, 1, 0, 1]), tuple(path.name for path in paths)
    return ImageDataset(FilePaths(list(map(str, paths))), labels, ids, ("a", "b"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the images that are decoded."""
    rows: list[int] = []
    original = ImageDataset.pixels

    def pixels(self: ImageDataset, row: int) -> np.ndarray:
        rows.append(row)
        return original(self, row)

    monkeypatch.setattr(ImageDataset, "pixels", pixels)
    return rows


def expected(dataset: ImageDataset, form: SquareForm) -> np.ndarray:
    images = [decode(Path(image)) for image in dataset.images]
    return np.stack([resize_image(image, *form) for image in images])


@pytest.mark.parametrize("is_pooled", [False, True])
def test_squares_are_those_of_decode_and_resize(
    tmp_path: Path, dataset: ImageDataset, is_pooled: bool
) -> None:
    folder, rows = tmp_path / "store", range(4)

    with ThreadPoolExecutor(2) as pool:
        for squares in (Squares(), Squares(folder), Squares(folder)):
            found = squares.read(dataset, rows, [SMALL, LARGE], pool if is_pooled else None)
            squares.save()

            for form in (SMALL, LARGE):
                assert np.array_equal(found[form], expected(dataset, form))


def test_large_photographs_are_decoded_once(
    tmp_path: Path, dataset: ImageDataset, decoded: list[int]
) -> None:
    """Both forms come from one decoding; another process finds them; small images stay files."""
    first = Squares(tmp_path / "store")
    first.read(dataset, range(4), [SMALL, LARGE])
    first.save()
    assert decoded == [0, 1, 2, 3]
    decoded.clear()

    again = Squares(tmp_path / "store").read(dataset, [3, 2, 1, 0], [LARGE, SMALL])

    assert decoded == [3]
    assert np.array_equal(again[LARGE][::-1], expected(dataset, LARGE))


def test_a_new_form_asks_only_for_what_is_missing(
    tmp_path: Path, dataset: ImageDataset, decoded: list[int]
) -> None:
    squares = Squares(tmp_path / "store")
    squares.read(dataset, [0, 1], [SMALL])
    squares.save()
    decoded.clear()

    found = squares.read(dataset, [0, 1, 2], [SMALL])

    assert decoded == [2]
    assert np.array_equal(found[SMALL], expected(dataset, SMALL)[:3])


def test_squares_are_found_by_the_content_of_the_image(
    tmp_path: Path, dataset: ImageDataset, decoded: list[int]
) -> None:
    squares = Squares(tmp_path / "store")
    squares.read(dataset, [0], [SMALL])
    squares.save()
    paths = [tmp_path / "other.png", tmp_path / "new.png"]
    shutil.copy(tmp_path / "0.png", paths[0])
    shutil.copy(tmp_path / "1.png", paths[1])
    renamed = ImageDataset(paths, np.array([0, 1]), ("x", "y"), ("a", "b"))
    decoded.clear()

    found = squares.read(renamed, [0, 1], [SMALL])

    assert decoded == [1]
    assert np.array_equal(found[SMALL], expected(dataset, SMALL)[:2])


def test_small_images_leave_no_store(tmp_path: Path, dataset: ImageDataset) -> None:
    squares = Squares(tmp_path / "store")

    squares.read(dataset, [3], [SMALL, LARGE])
    squares.save()

    assert not (tmp_path / "store").exists()


def test_arrays_are_not_stored(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 90, 90, 3), dtype=np.uint8)
    dataset = ImageDataset(images, np.array([0, 1]), ("x", "y"), ("a", "b"))
    squares = Squares(tmp_path / "store")

    squares.read(dataset, [0, 1], [SMALL])
    squares.save()

    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("gigabytes", ["0", "0.00001"])
def test_nothing_is_stored_beyond_half_of_the_limit(
    tmp_path: Path, dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch, gigabytes: str
) -> None:
    """Four squares take 6,912 bytes, more than half of 10,000."""
    monkeypatch.setenv("THREEFOLD_CACHE_GB", gigabytes)
    squares = Squares(tmp_path / "store")

    found = squares.read(dataset, range(4), [SMALL])
    squares.save()

    assert not list((tmp_path / "store").rglob("*.npy"))
    assert np.array_equal(found[SMALL], expected(dataset, SMALL))


def test_features_that_were_not_used_for_longest_give_way(
    tmp_path: Path, dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("THREEFOLD_CACHE_GB", "0.00002")
    old = FeatureStore(tmp_path / "store", "old")
    old.write(["image"], np.zeros((1, 9_000), np.float16))
    squares = Squares(tmp_path / "store")

    squares.read(dataset, range(4), [SMALL])
    squares.save()

    assert not old.folder.exists()
    assert len(list((tmp_path / "store").rglob("*.npy"))) == 1


def test_what_is_deleted_or_damaged_is_decoded_again(tmp_path: Path, dataset: ImageDataset) -> None:
    folder = tmp_path / "store"
    squares = Squares(folder)
    squares.read(dataset, range(4), [SMALL])
    squares.save()
    part = next(folder.rglob("*.npy"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(content)

    after_damage = Squares(folder).read(dataset, range(4), [SMALL])
    shutil.rmtree(folder)
    after_deletion = Squares(folder).read(dataset, range(4), [SMALL])

    assert np.array_equal(after_damage[SMALL], expected(dataset, SMALL))
    assert np.array_equal(after_deletion[SMALL], expected(dataset, SMALL))


def test_epochs_on_cached_activations_decode_a_photograph_once(
    tmp_path: Path, dataset: ImageDataset, decoded: list[int]
) -> None:
    """The choice of the engine reads the same squares; the small image is read in each epoch."""
    tree = tiny_tree(Path("x"), stages=[{"name": "probe", "kind": "head"}])
    recipe = Recipe.parse(tree, ["members.plain.backbone=test_efficientnet", "augment.hflip=true"])
    spec = recipe.member("plain")
    cache = FeatureCache(Sources(dataset, None, (), ()), recipe, folder=tmp_path / "features")

    for copy in (1, 2, 3):
        cache.blocks("train", spec, np.arange(4), 2, copy=copy)

    assert sorted(decoded) == [0, 1, 2, *[3] * 4]


def test_the_image_cache_of_a_run_reads_them(
    tmp_path: Path, dataset: ImageDataset, decoded: list[int]
) -> None:
    spec = MemberSpec(name="m", backbone="test_resnet", img_size=SMALL.side)
    squares, sources = Squares(tmp_path / "store"), Sources(dataset, None, (), ())
    squares.read(dataset, range(4), [SMALL])
    squares.save()
    decoded.clear()
    views = partial(Views, ViewSpec(), SMALL.side, 0)

    cache = PixelCache(sources, lambda _: views(), tmp_path / "cache", squares)
    pixels = cache.rows("train", spec, np.arange(4)).pixels[:]

    assert decoded == [3]
    assert np.array_equal(pixels, expected(dataset, SMALL))


def test_a_disk_that_is_full_is_no_error(
    tmp_path: Path, dataset: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("threefold.training.features.store.free_disk", lambda folder: 100)
    squares = Squares(tmp_path / "store")

    found = squares.read(dataset, range(4), [SMALL])
    squares.save()

    assert np.array_equal(found[SMALL], expected(dataset, SMALL))
    assert not list((tmp_path / "store").rglob("*.npy"))
