"""What a model resizes images to, and that resize outside of its graph: quicker, in less memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from threefold.data.resize import can_resize, resize_pixels

MAX_CANVAS: Final = 4096


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


def fit_canvas(pixels: np.ndarray, canvas: Canvas) -> np.ndarray:
    """Resize an image uint8 (h, w, 3) to its canvas, uint8 (size, size, 3), as the graph does.

    An image is returned as it is if it is too large for exact sums.

    Args:
        pixels: the image.
        canvas: its canvas.
    """
    if not can_resize(pixels.shape, canvas.size, canvas.mode):
        return pixels
    return resize_pixels(pixels, canvas.size, canvas.mode)
