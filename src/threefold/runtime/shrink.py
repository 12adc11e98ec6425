"""The resize of an exported graph for large images, outside of the graph and in little memory.

The graph turns a whole image into floats. Here it is resized in bands of rows, by the same weights
in the same arithmetic (`models.resize`), so that the answer is the same: all sums are exact, and
resizing a square to its own size changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import numpy as np

WEIGHT_STEPS: Final = 2**16
"""Resize weights are multiples of 1/65536, as in the graph."""
MAX_SCALE: Final = 256
"""Largest reduction for which the sums of weights are exact in float32."""
MAX_CANVAS: Final = 4096
BAND_PIXELS: Final = 500_000
"""Pixels that are floats at the same time."""


class Canvas(NamedTuple):
    """What a graph resizes images to: a square, and how they are fitted into it."""

    size: int
    mode: Literal["squash", "crop"]


def common_canvas(card: Mapping[str, Any]) -> Canvas | None:
    """Return the canvas of a model card's members; None if they have several, or it has none."""
    parts = card.get("preprocessing")
    if not isinstance(parts, list) or not parts:
        return None
    canvases = set()
    for part in parts:
        if not isinstance(part, Mapping) or part.get("filter") != "triangle, antialiased":
            return None
        size, mode = part.get("pixels"), part.get("resize")
        if not isinstance(size, int) or not 1 <= size <= MAX_CANVAS:
            return None
        if mode not in ("squash", "crop"):
            return None
        canvases.add(Canvas(size, mode))
    return canvases.pop() if len(canvases) == 1 else None


def shrink(pixels: np.ndarray, canvas: Canvas, enlarge: bool = False) -> np.ndarray:
    """Resize an image uint8 (h, w, 3) to its canvas, uint8 (size, size, 3), as the graph does.

    An image is returned as it is if it is too large for exact sums.

    Args:
        pixels: the image.
        canvas: its canvas.
        enlarge: also resize an image that is smaller than the canvas, which saves no memory.
    """
    height, width = pixels.shape[:2]
    size = canvas.size
    down_side = height if canvas.mode == "squash" else min(height, width)
    across_side = width if canvas.mode == "squash" else min(height, width)
    is_small = min(height, width) < size and not enlarge
    if is_small or max(down_side, across_side) > MAX_SCALE * size:
        return pixels
    across = _triangle_weights(width, (width - across_side) // 2, across_side, size).T
    down = _triangle_weights(height, (height - down_side) // 2, down_side, size)
    rows = np.empty((height, 3 * size), np.float32)
    band = max(1, BAND_PIXELS // width)
    for top in range(0, height, band):
        lines = np.array(pixels[top : top + band].transpose(0, 2, 1), np.float32, order="C")
        rows[top : top + band] = _round(lines @ across).reshape(len(lines), 3 * size)
    square = _round(down @ rows).reshape(size, 3, size)
    return np.ascontiguousarray(square.transpose(0, 2, 1), dtype=np.uint8)


def _triangle_weights(length: int, start: int, side: int, size: int) -> np.ndarray:
    """Return float32 (size, length): the weights of `models.resize.triangle_weights`."""
    one, half = np.float32(1), np.float32(0.5)
    scale = np.float32(side) / np.float32(size)
    centres = np.float32(start) + (np.arange(size, dtype=np.float32) + half) * scale
    positions = np.arange(length, dtype=np.float32) + half
    distances = np.abs(positions - centres[:, None]) / np.maximum(scale, one)
    inside = (positions > start) & (positions < start + side)
    steps = np.float32(WEIGHT_STEPS)
    weights = np.rint(
        np.maximum(one - distances, np.float32(0)) * inside.astype(np.float32) * steps
    )
    shares = weights / weights.sum(axis=1, keepdims=True)
    rounded: np.ndarray = np.rint(shares * steps) / steps
    return rounded


def _round(values: np.ndarray) -> np.ndarray:
    """Round half up and clip to 0..255."""
    rounded: np.ndarray = np.clip(
        np.floor(values + np.float32(0.5)), np.float32(0), np.float32(255)
    )
    return rounded
