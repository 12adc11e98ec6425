"""The image cache: what the exported pipeline sees, in any batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.splits import Roles
from threefold.errors import RunError
from threefold.models.resize import resize_square
from threefold.models.views import Views
from threefold.recipe_schema import MemberSpec, ViewSpec
from threefold.training.pixel_cache import CHUNK, PixelCache

SPEC = MemberSpec(name="m", backbone="test_resnet", img_size=24)


def make_cache(folder: Path, test: bool = True) -> tuple[PixelCache, np.ndarray]:
    """A cache of noise images (n, 31, 17, 3), and the images."""
    n = CHUNK * 2 + 5
    images = np.random.default_rng(0).integers(0, 256, (n, 31, 17, 3), dtype=np.uint8)
    ids = tuple(f"{i:03d}" for i in range(n))
    dataset = ImageDataset(images, np.arange(n) % 2, ids, ("a", "b"))
    sources = Sources(dataset, dataset.subset(np.arange(4)) if test else None, (), ())

    def views(spec: MemberSpec) -> Views:
        return Views(ViewSpec(upsample=1.5), spec.img_size, 0)

    return PixelCache(sources, views, folder / "cache"), images


@pytest.mark.parametrize(("views", "side"), [(False, 24), (True, 36)])
def test_rows_equal_the_pipelines_resize(tmp_path: Path, views: bool, side: int) -> None:
    cache, images = make_cache(tmp_path)
    rows = np.array([0, 40, len(images) - 1])

    pixels, labels = cache.rows("train", SPEC, rows, views)

    for row, square, label in zip(rows, pixels, labels, strict=True):
        alone = resize_square(torch.from_numpy(images[row][None]), side, "squash")[0]
        np.testing.assert_array_equal(square, alone.permute(1, 2, 0).numpy())
        assert label == row % 2


def test_cache_is_written_once_and_removed(tmp_path: Path) -> None:
    cache, _ = make_cache(tmp_path)

    cache.rows("train", SPEC, np.array([0]))
    (path,) = (tmp_path / "cache").glob("*.npy")
    written = path.stat().st_mtime_ns
    cache.rows("train", SPEC, np.array([1]))
    make_cache(tmp_path)[0].rows("train", SPEC, np.array([1]))

    assert [p.stat().st_mtime_ns for p in (tmp_path / "cache").glob("*.npy")] == [written]
    cache.remove()
    assert not (tmp_path / "cache").exists()


def test_select_falls_back_to_the_test_split(tmp_path: Path) -> None:
    empty = np.zeros(0, dtype=np.int64)
    roles = Roles(np.arange(5), empty, empty)

    assert len(make_cache(tmp_path / "a")[0].select(SPEC, roles).labels) == 4
    with pytest.raises(
        RunError, match=r"nothing to choose checkpoints on.*a test split, or folds.k >= 2"
    ):
        make_cache(tmp_path / "b", test=False)[0].select(SPEC, roles)


def test_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")

    with pytest.raises(RunError, match=r"cannot write the image cache.*it needs 0 MB"):
        make_cache(tmp_path)[0].rows("train", SPEC, np.array([0]))


def test_full_disk_is_an_error_before_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)

    with pytest.raises(
        RunError, match=r"cannot write the image cache: .*No space left on device.*free disk space"
    ):
        make_cache(tmp_path)[0].rows("train", SPEC, np.array([0]))
    assert not list((tmp_path / "cache").iterdir())


def test_rows_of_any_side(tmp_path: Path) -> None:
    cache, images = make_cache(tmp_path)

    pixels, _ = cache.rows("train", SPEC, np.array([3]), side=40)

    expected = resize_square(torch.from_numpy(images[[3]]), 40, SPEC.resize)
    assert np.array_equal(pixels, expected.permute(0, 2, 3, 1).to(torch.uint8).numpy())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no record"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    cache, images = make_cache(tmp_path)
    rows = np.array([0, len(images) - 1])
    before = cache.rows("train", SPEC, rows).pixels
    (path,) = (tmp_path / "cache").glob("*.npy")
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    if damage == "no record":
        path.with_suffix(".sha256").unlink()
    path.write_bytes({"cut": data[:100], "empty": b""}.get(damage, data))

    after = make_cache(tmp_path)[0].rows("train", SPEC, rows).pixels

    np.testing.assert_array_equal(after, before)
