"""Resize images to a square, in numpy: the same pixels as the networks' own resize has.

`models.resize` is two products of matrices, in torch and in exported graphs. Here the same sums are
made without most of the zeros, in bands of rows, and with the colours of a pixel side by side as
they are in memory. That takes less time, which `bench/resize_speed.py` measures, and less memory.
All sums are exact, so their order changes no pixel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
ACROSS_PART, DOWN_PART = 4, 8
"""Resized pixels of a row, and of a column, that are computed together: with more of them more
zeros are multiplied, with fewer there are more products."""


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
    across = _across_parts((width - across_side) // 2, across_side, size)
    down = _down_parts((height - down_side) // 2, down_side, size)
    rows = np.empty((height, 3 * size), np.float32)
    band = max(1, BAND_PIXELS // width)
    for top in range(0, height, band):
        lines = pixels[top : top + band].reshape(-1, 3 * width).astype(np.float32)
        for part in across:
            np.matmul(lines[:, part.read], part.weights, out=rows[top : top + band, part.made])
    _round(rows)
    square = np.empty((size, 3 * size), np.float32)
    for part in down:
        np.matmul(part.weights, rows[part.read], out=square[part.made])
    return _round(square).reshape(size, size, 3).astype(np.uint8)


class _Part(NamedTuple):
    """Some neighbouring pixels of a resized line, and those of the line that they are made of."""

    read: slice
    """Of the line."""
    made: slice
    """Of the resized line."""
    weights: np.ndarray
    """float32 (read, made)."""


@lru_cache(maxsize=16)  # many images of a folder have one size
def _across_parts(start: int, side: int, size: int) -> tuple[_Part, ...]:
    """Return the parts of a row, whose numbers are the three colours of each pixel in turn."""
    first, blocks = _weight_blocks(start, side, size, ACROSS_PART)
    count, read, made = blocks.shape
    colours = np.zeros((count, read, 3, made, 3), np.float32)
    for colour in range(3):
        colours[:, :, colour, :, colour] = blocks
    weights = colours.reshape(count, 3 * read, 3 * made)
    return tuple(_parts(3 * first, weights, 3 * size))


@lru_cache(maxsize=16)
def _down_parts(start: int, side: int, size: int) -> tuple[_Part, ...]:
    """Return the parts of a column, with weights (made, read)."""
    first, blocks = _weight_blocks(start, side, size, DOWN_PART)
    return tuple(
        part._replace(weights=np.ascontiguousarray(part.weights.T))
        for part in _parts(first, blocks, size)
    )


def _parts(first: np.ndarray, blocks: np.ndarray, size: int) -> Iterator[_Part]:
    """Yield the parts of a resized line of `size` numbers; the last one may be shorter."""
    _, read, length = blocks.shape
    for number, (begin, block) in enumerate(zip(first.tolist(), blocks, strict=True)):
        made = slice(number * length, min((number + 1) * length, size))
        yield _Part(slice(begin, begin + read), made, block[:, : made.stop - made.start])


def _weight_blocks(start: int, side: int, size: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of `models.resize.triangle_weights`, without most of the zeros.

    A resized pixel is made of few pixels of the line. So each part reads only those that it needs.

    Args:
        start: first pixel of the line that counts.
        side: number of pixels that count.
        size: number of resized pixels.
        length: resized pixels of a part.

    Returns:
        The first pixel that each part reads, and the weights float32 (parts, pixels, length) of
        those that follow. Past the end of the resized line they mean nothing.
    """
    one = np.float32(1)
    scale = np.float32(side) / np.float32(size)
    reach = max(float(scale), 1.0)
    count = -(-size // length)
    numbers = np.arange(count * length, dtype=np.float32)
    centres = (np.float32(start) + (numbers + np.float32(0.5)) * scale).reshape(count, 1, length)
    read = min(side, math.ceil((length - 1) * float(scale) + 2 * reach) + 4)
    first = np.floor(centres[:, 0, 0] - reach).astype(int) - 1
    first = np.clip(first, start, start + side - read)
    positions = (first[:, None] + np.arange(read)).astype(np.float32)[..., None] + np.float32(0.5)
    distances = np.abs(positions - centres) / np.maximum(scale, one)
    steps = np.float32(WEIGHT_STEPS)
    weights = np.rint(np.maximum(one - distances, np.float32(0)) * steps)
    shares = weights / np.maximum(weights.sum(axis=1, keepdims=True), one)
    return first, np.rint(shares * steps) / steps


def _round(values: np.ndarray) -> np.ndarray:
    """Round half up and clip to 0..255, in place."""
    values += np.float32(0.5)
    np.floor(values, out=values)
    return np.clip(values, np.float32(0), np.float32(255), out=values)
