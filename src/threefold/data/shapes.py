"""A synthetic set of images with any number of labels: the shapes in each, also none."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from threefold.errors import RunError

SHAPES: Final = ("circle", "square", "triangle", "cross")
"""The labels. A cross comes half as often as the others."""

_COLOURS: Final = ((200, 60, 50), (60, 160, 70), (60, 90, 200), (220, 180, 40), (150, 80, 180))


def write_shapes(
    root: str | Path, count: int = 240, test: int = 0, seed: int = 0, size: int = 64
) -> Path:
    """Write images of several shapes and a table `shapes.csv` with a column of 0 and 1 for each.

    Args:
        root: the folder, made if needed.
        count: training images.
        test: test images; with any, the table has a column `split`.
        seed: of the images; equal arguments give equal pixels.
        size: side of the images in pixels.

    Returns:
        The table.

    Raises:
        RunError: the folder cannot be written.
    """
    root, rng = Path(root), np.random.default_rng(seed)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["path", *SHAPES, *(["split"] if test else [])])
    try:
        (root / "images").mkdir(parents=True, exist_ok=True)
        for number in range(count + test):
            targets = (rng.random(len(SHAPES)) < (0.4, 0.4, 0.4, 0.2)).astype(int)
            name = f"images/{number:05d}.png"
            Image.fromarray(draw_shapes(targets, size, rng)).save(root / name)
            split = ["train" if number < count else "test"] if test else []
            writer.writerow([name, *targets, *split])
        table = root / "shapes.csv"
        table.write_text(stream.getvalue(), encoding="utf-8")
    except OSError as error:
        raise RunError("cannot write", where=root, got=error) from None
    return table


def draw_shapes(
    targets: NDArray[np.integer], size: int, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """Draw the shapes that an image has, in random colours, sizes and places.

    Args:
        targets: (4,) of `SHAPES`, 1 where the image has one.
        size: side in pixels.
        rng: source of randomness.

    Returns:
        uint8 (size, size, 3).
    """
    grey = rng.integers(100, 160)
    image = Image.new("RGB", (size, size), (int(grey),) * 3)
    draw = ImageDraw.Draw(image)
    for label in rng.permutation(np.flatnonzero(targets)):
        radius = rng.uniform(0.12, 0.2) * size
        x, y = rng.uniform(radius, size - radius, 2)
        colour = _COLOURS[rng.integers(len(_COLOURS))]
        box = (x - radius, y - radius, x + radius, y + radius)
        if SHAPES[label] == "circle":
            draw.ellipse(box, fill=colour)
        elif SHAPES[label] == "square":
            draw.rectangle(box, fill=colour)
        elif SHAPES[label] == "triangle":
            draw.polygon((x, y - radius, x - radius, y + radius, x + radius, y + radius), colour)
        else:
            width = int(max(1, radius / 2))
            draw.line((x - radius, y - radius, x + radius, y + radius), colour, width)
            draw.line((x - radius, y + radius, x + radius, y - radius), colour, width)
    noisy = np.asarray(image) + rng.normal(0, 6, (size, size, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)
