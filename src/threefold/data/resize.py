"""Resize images to a square, in numpy: the same pixels as the networks' own resize has.

`models.resize` is two products of matrices, in torch and in exported graphs. Here the same sums are
made without most of the zeros, and in bands of rows. That takes less time, which
`bench/resize_speed.py` measures, and less memory. All sums are exact, so their order changes no
pixel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, Literal, NamedTuple

import numpy as np

WEIGHT_STEPS: Final = 2**16
"""Weights are multiples of 1/65536, here and in `models.resize`.

A product with an 8-bit pixel, and any sum of such products up to 255, is then exact in float32. So
the result does not depend on the order of summation or on the runtime.
"""
MAX_SCALE: Final = 256
"""Largest reduction for which the sums of weights are exact in float32."""
BAND_PIXELS: Final = 500_000
"""Pixels that are floats at the same time."""
PART: Final = 32
"""Resized pixels of a line that are computed together."""


def can_resize(shape: Sequence[int], size: int, mode: Literal["squash", "crop"]) -> bool:
    """Whether the sums are exact for images (h, w, ...) of this shape."""
    height, width = shape[:2]
    side = max(height, width) if mode == "squash" else min(height, width)
    return side <= MAX_SCALE * size


def resize_pixels(pixels: np.ndarray, size: int, mode: Literal["squash", "crop"]) -> np.ndarray:
    """Resize an image as `models.resize.resize_square` does.

    Args:
        pixels: uint8 (h, w, 3), for which `can_resize` is true.
        size: side of the result in pixels.
        mode: `squash` scales both sides independently; `crop` keeps the largest centred square.

    Returns:
        uint8 (size, size, 3).
    """
    height, width = pixels.shape[:2]
    down_side = height if mode == "squash" else min(height, width)
    across_side = width if mode == "squash" else min(height, width)
    across = _triangle_weights((width - across_side) // 2, across_side, size)
    down = _triangle_weights((height - down_side) // 2, down_side, size)
    rows = np.empty((height, 3, size), np.float32)
    band = max(1, BAND_PIXELS // width)
    for top in range(0, height, band):
        lines = np.array(pixels[top : top + band].transpose(0, 2, 1), np.float32, order="C")
        lines = lines.reshape(-1, width)
        resized = np.concatenate([lines[:, part.pixels] @ part.weights for part in across], axis=1)
        rows[top : top + band] = _round(resized).reshape(-1, 3, size)
    columns = rows.reshape(height, -1)
    square = np.concatenate([part.weights.T @ columns[part.pixels] for part in down])
    square = _round(square).reshape(size, 3, size)
    return np.ascontiguousarray(square.transpose(0, 2, 1), dtype=np.uint8)


class _Part(NamedTuple):
    """Some neighbouring pixels of a resized line, and the pixels that they are made of."""

    pixels: slice
    """Of the line."""
    weights: np.ndarray
    """float32 (pixels, resized pixels)."""


@lru_cache(maxsize=16)  # many images of a folder have one size
def _triangle_weights(start: int, side: int, size: int) -> tuple[_Part, ...]:
    """Return the weights of `models.resize.triangle_weights`, without most of the zeros.

    A resized pixel is made of few pixels of the line. So each part reads only those that it needs.
    """
    one = np.float32(1)
    scale = np.float32(side) / np.float32(size)
    reach = max(float(scale), 1.0)
    parts = []
    for first in range(0, size, PART):
        numbers = np.arange(first, min(first + PART, size), dtype=np.float32)
        centres = np.float32(start) + (numbers + np.float32(0.5)) * scale
        low = max(start, math.floor(float(centres[0]) - reach) - 1)
        high = min(start + side, math.ceil(float(centres[-1]) + reach) + 1)
        positions = np.arange(low, high, dtype=np.float32)[:, None] + np.float32(0.5)
        distances = np.abs(positions - centres) / np.maximum(scale, one)
        steps = np.float32(WEIGHT_STEPS)
        weights = np.rint(np.maximum(one - distances, np.float32(0)) * steps)
        shares = weights / weights.sum(axis=0)
        parts.append(_Part(slice(low, high), np.rint(shares * steps) / steps))
    return tuple(parts)


def _round(values: np.ndarray) -> np.ndarray:
    """Round half up and clip to 0..255, in place."""
    values += np.float32(0.5)
    np.floor(values, out=values)
    return np.clip(values, np.float32(0), np.float32(255), out=values)
