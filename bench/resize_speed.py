"""Milliseconds to resize an image to a square, in numpy and as the networks' own graph does.

    python bench/resize_speed.py [--size 224] [--rounds 3]

numpy: `data.resize.resize_pixels`. graph: `models.resize.resize_square` in eager PyTorch, the same
pixels. pillow: `Image.resize`, whose pixels are a little different. One image at a time, all three
in turns; the least of the rounds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from threefold.data.resize import resize_pixels
from threefold.models.resize import resize_square

SHAPES = ((128, 128), (375, 500), (1200, 1600), (3000, 4000))


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Mean time of a call."""
    begin = time.perf_counter()
    for _ in range(repeats):
        work()
    return 1000 * (time.perf_counter() - begin) / repeats


def main() -> None:
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    size = args.size
    for height, width in SHAPES:
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        batch, image = torch.from_numpy(pixels[None]), Image.fromarray(pixels)
        ways: dict[str, Callable[[], object]] = {
            "numpy": lambda pixels=pixels: resize_pixels(pixels, size, "squash"),
            "graph": lambda batch=batch: resize_square(batch, size, "squash"),
            "pillow": lambda image=image: image.resize((size, size), Image.Resampling.BILINEAR),
        }
        repeats = max(3, 4_000_000 // (height * width))
        times = {name: [milliseconds(way, repeats)] for name, way in ways.items()}
        for _ in range(args.rounds - 1):
            for name, way in ways.items():
                times[name].append(milliseconds(way, repeats))
        least = {name: min(values) for name, values in times.items()}
        print(
            f"{width} x {height} to {size}: numpy {least['numpy']:.2f} ms, graph "
            f"{least['graph']:.2f} ms, pillow {least['pillow']:.2f} ms; graph / numpy "
            f"{least['graph'] / least['numpy']:.1f}"
        )


if __name__ == "__main__":
    main()
