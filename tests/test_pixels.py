"""The cache: what the exported pipeline sees, whatever the company of an image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from threefold.datasets import ImageDataset, Sources
from threefold.errors import RunError
from threefold.models__resize import resize_square
from threefold.models__views import Views
from threefold.pixels import CHUNK, Pixels
from threefold.recipe_schema import MemberSpec, ViewSpec
from threefold.splits import Roles

SPEC = MemberSpec(name="m", backbone="test_resnet", img_size=24)


def cache(folder: Path, n: int = CHUNK * 2 + 5, test: bool = True) -> tuple[Pixels, np.ndarray]:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, 31, 17, 3), dtype=np.uint8)
    dataset = ImageDataset(
        images, np.arange(n) % 2, tuple(f"{i:03d}" for i in range(n)), ("a", "b")
    )
    sources = Sources(dataset, dataset.subset(np.arange(4)) if test else None, (), ())
    return Pixels(
        sources, lambda spec: Views(ViewSpec(upsample=1.5), spec.img_size, 0), folder / "cache"
    ), images


def test_every_row_is_what_the_pipeline_resizes_alone(tmp_path: Path) -> None:
    pixels, images = cache(tmp_path)
    rows = np.array([0, 40, len(images) - 1])
    for views, side in ((False, 24), (True, 36)):
        found, labels = pixels.rows("train", SPEC, rows, views)
        for row, square, label in zip(rows, found, labels, strict=True):
            alone = resize_square(torch.from_numpy(images[row][None]), side, "squash")[0].permute(
                1, 2, 0
            )
            np.testing.assert_array_equal(square, alone.numpy())
            assert label == row % 2


def test_it_is_made_once_and_removed(tmp_path: Path) -> None:
    pixels, _ = cache(tmp_path)
    pixels.rows("train", SPEC, np.array([0]))
    made = list((tmp_path / "cache").iterdir())
    stamp = made[0].stat().st_mtime_ns
    pixels.rows("train", SPEC, np.array([1]))
    assert [p.stat().st_mtime_ns for p in (tmp_path / "cache").iterdir()] == [stamp]
    pixels.remove()
    assert not (tmp_path / "cache").exists()


def test_select_falls_back_to_the_test_split_or_says_what_is_missing(tmp_path: Path) -> None:
    nothing = np.zeros(0, dtype=np.int64)
    roles = Roles(np.arange(5), nothing, nothing)
    assert len(cache(tmp_path / "a")[0].select(SPEC, roles)[1]) == 4
    with pytest.raises(
        RunError, match=r"nothing to choose checkpoints on.*a test split, or folds.k >= 2"
    ):
        cache(tmp_path / "b", test=False)[0].select(SPEC, roles)


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(RunError, match=r"cannot write the image cache.*it needs 0 MB"):
        cache(tmp_path)[0].rows("train", SPEC, np.array([0]))


def test_a_disk_that_is_full_is_found_before_the_file_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with pytest.raises(
        RunError, match=r"cannot write the image cache: .*No space left on device.*free disk space"
    ):
        cache(tmp_path)[0].rows("train", SPEC, np.array([0]))
    assert not list((tmp_path / "cache").iterdir())
