"""Enlarged development sets: the first images of each class, at the size that is asked for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from enlarge_photos import enlarge_set
from PIL import Image


def test_the_first_images_of_each_class_become_large(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for label, shade in (("a", 60), ("b", 180)):
            folder = tmp_path / "small" / split / label
            folder.mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (9, 7), (shade, 90, 90)).save(folder / f"{number}.png")

    count = enlarge_set(tmp_path / "small", tmp_path / "large", {"train": 3, "test": 1}, 50, 38)

    paths = sorted((tmp_path / "large").rglob("*.jpg"))
    assert count == len(paths) == 8
    assert [path.name for path in paths[:2]] == ["0.jpg", "0.jpg"]
    pixels = np.asarray(Image.open(tmp_path / "large/train/b/2.jpg"))
    assert pixels.shape == (38, 50, 3)
    assert abs(pixels[..., 0].mean() - 180) < 2
    assert 2 < pixels[..., 0].std() < 10
