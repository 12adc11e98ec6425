"""Files whose graph takes images of one size, which `Model` resizes before it runs the graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from threefold.data.resize import MAX_SCALE
from threefold.errors import DataError, ExportError
from threefold.runtime.canvas import Canvas, fit_canvas


def is_fixed_size(card: Mapping[str, Any], canvas: Canvas | None, where: str | Path) -> bool:
    """Whether the graph takes images on the canvas only.

    Args:
        card: the model card.
        canvas: of all members; None if they have several.
        where: the file, for the message.

    Raises:
        ExportError: the card states another size than that of the canvas.
    """
    stated = card.get("fixed_size")
    size = canvas.size if canvas is not None else None
    if stated is not None and stated != size:
        raise ExportError(
            "the model card is damaged",
            where=where,
            expected=f"members of the fixed size {stated}",
            got=size or "several sizes",
            fix="export the run again",
        )
    return stated is not None


def check_batch(images: np.ndarray, size: int, where: Path) -> None:
    """Refuse a batch that is not on the canvas.

    Raises:
        ExportError: it has another shape than (b, size, size, 3).
    """
    if images.shape[1:] != (size, size, 3):
        raise ExportError(
            "the model takes images of one size",
            where=where,
            expected=f"(b, {size}, {size}, 3)",
            got=images.shape,
            fix="resize each image with Model.fit_canvas",
        )


def resize(pixels: np.ndarray, canvas: Canvas) -> np.ndarray:
    """Resize an image uint8 (h, w, 3) to its canvas, uint8 (size, size, 3).

    Raises:
        DataError: it is too large for exact sums.
    """
    square = fit_canvas(pixels, canvas)
    if square.shape[:2] != (canvas.size, canvas.size):
        raise DataError(
            "the image is too large for this model",
            expected=f"sides of at most {MAX_SCALE * canvas.size} pixels",
            got=f"{pixels.shape[1]} x {pixels.shape[0]}",
        )
    return square
