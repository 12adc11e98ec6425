"""The image cache: what the exported pipeline sees, in any batch."""

from __future__ import annotations

import errno
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from support.disk import files_up_to

from threefold.data.dataset import ImageDataset, Sources
from threefold.data.splits import Roles
from threefold.errors import RunError
from threefold.models.resize import resize_square
from threefold.models.views import Views
from threefold.recipe.schema import MemberSpec, ViewSpec
from threefold.training.pixel_cache import (
    CHUNK,
    PixelCache,
    StoredPixels,
    join_rows,
)
from threefold.training.squares import resize_images

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


INDEXES = (slice(None), slice(3, 9), np.array([0, 11, 5]), np.array([10, 10]), slice(8, 3))


@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_rows_of_files_are_indexed_like_an_array(tmp_path: Path, index: slice | np.ndarray) -> None:
    squares = np.random.default_rng(0).integers(0, 256, (20, 4, 4, 3), dtype=np.uint8)
    np.save(tmp_path / "a.npy", squares[:12])
    np.save(tmp_path / "b.npy", squares[12:])
    of_a, of_b = np.array([3, 0, 11, 7, 5, 5]), np.array([6, 1, 2, 0, 7, 3, 4])

    joined = join_rows(
        StoredPixels([(tmp_path / "a.npy", of_a)]), StoredPixels([(tmp_path / "b.npy", of_b)])
    )

    expected = squares[np.concatenate([of_a, 12 + of_b])]
    assert joined.shape == expected.shape
    np.testing.assert_array_equal(joined[index], expected[index])
    np.testing.assert_array_equal(list(joined), expected)


def test_reading_all_rows_keeps_none_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    squares = np.lib.format.open_memmap(path, "w+", np.uint8, (4096, 64, 64, 3))
    squares[:] = 1
    del squares
    pixels = StoredPixels([(path, np.arange(4096))])
    before = _mapped_bytes(path)

    total = sum(int(image[0, 0, 0]) for image in pixels)

    assert total == 4096
    assert before == _mapped_bytes(path) == 0


def _mapped_bytes(path: Path) -> int:
    """How much of a file this process has mapped."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists the mapped files of a process")
    lines = [line for line in maps.read_text().splitlines() if line.endswith(str(path))]
    ends = [line.split()[0].split("-") for line in lines]
    return sum(int(end, 16) - int(begin, 16) for begin, end in ends)


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


def test_full_disk_is_an_error_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)

    with pytest.raises(
        RunError, match=r"cannot write the image cache: .*No space left on device.*free disk space"
    ):
        make_cache(tmp_path)[0].rows("train", SPEC, np.array([0]))
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]


@pytest.mark.parametrize("size", [0, 100, 10_000])
def test_disk_that_fills_up_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    def unknown(*_: int) -> None:  # as file systems say that cannot reserve
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("os.posix_fallocate", unknown, raising=False)
    rows, right = np.arange(12), make_cache(tmp_path / "right")[0]

    with files_up_to(size), pytest.raises(RunError, match="cannot write the image cache"):
        make_cache(tmp_path)[0].rows("train", SPEC, rows)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]

    again = make_cache(tmp_path)[0].rows("train", SPEC, rows)
    assert np.array_equal(again.pixels[:], right.rows("train", SPEC, rows).pixels[:])


def test_rows_of_any_side(tmp_path: Path) -> None:
    cache, images = make_cache(tmp_path)

    pixels, _ = cache.rows("train", SPEC, np.array([3]), side=40)

    expected = resize_square(torch.from_numpy(images[[3]]), 40, SPEC.resize)
    assert np.array_equal(pixels[:], expected.permute(0, 2, 3, 1).to(torch.uint8).numpy())


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no record"])
def test_a_damaged_file_is_made_again(tmp_path: Path, damage: str) -> None:
    cache, images = make_cache(tmp_path)
    rows = np.array([0, len(images) - 1])
    before = cache.rows("train", SPEC, rows).pixels[:]
    (path,) = (tmp_path / "cache").glob("*.npy")
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    if damage == "no record":
        path.with_suffix(".sha256").unlink()
    path.write_bytes({"cut": data[:100], "empty": b""}.get(damage, data))

    after = make_cache(tmp_path)[0].rows("train", SPEC, rows).pixels[:]

    np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("mode", ["squash", "crop"])
@pytest.mark.parametrize("is_pooled", [True, False])
def test_images_of_any_shape_get_the_networks_pixels(
    mode: Literal["squash", "crop"], is_pooled: bool
) -> None:
    rng = np.random.default_rng(0)
    shapes = [(40, 30), (7, 90), (1, 1), (200, 1), (3, 2000)]  # the last is beyond exact sums
    images = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in shapes]

    with ThreadPoolExecutor(2) as pool:
        squares = resize_images(images, 6, mode, pool if is_pooled else None)

    for image, square in zip(images, squares, strict=True):
        expected = resize_square(torch.from_numpy(image[None]), 6, mode)[0].permute(1, 2, 0)
        np.testing.assert_array_equal(square, expected.numpy())
