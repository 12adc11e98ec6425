"""The square resize: antialiased, exact in float32, exportable with any height and width."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from threefold.data.resize import WEIGHT_STEPS


def resize_square(images: Tensor, size: int, mode: Literal["squash", "crop"]) -> Tensor:
    """Resize images to a square with an antialiased triangle filter (Pillow's BILINEAR).

    The resize is two matrix products with weights computed from the height and width, so that it
    exports with both dynamic. Do not call it under autocast or with TF32 matrix products, which
    round the weights.

    Args:
        images: uint8 (b, h, w, 3).
        size: side of the result in pixels.
        mode: `squash` scales both sides independently; `crop` keeps the largest centred square.

    Returns:
        float32 (b, 3, size, size), whole numbers in 0..255.
    """
    height = images.new_full((), images.shape[1], dtype=torch.float32)
    width = images.new_full((), images.shape[2], dtype=torch.float32)
    if mode == "crop":
        side = torch.minimum(height, width)
        across = triangle_weights(images.shape[2], torch.floor((width - side) / 2), side, size)
        down = triangle_weights(images.shape[1], torch.floor((height - side) / 2), side, size)
    else:
        across = triangle_weights(images.shape[2], torch.zeros_like(width), width, size)
        down = triangle_weights(images.shape[1], torch.zeros_like(height), height, size)
    pixels = images.permute(0, 3, 1, 2).float()
    return _round(down @ _round(pixels @ across.T))


@torch.inference_mode()
def resize_each(
    images: Sequence[np.ndarray], size: int, mode: Literal["squash", "crop"]
) -> np.ndarray:
    """Resize images uint8 (h, w, 3) of any sizes, each as `resize_square` does.

    Returns:
        float32 (n, 3, size, size), whole numbers in 0..255.
    """
    if not images:
        return np.zeros((0, 3, size, size), np.float32)
    batches = (torch.from_numpy(image[None].copy()) for image in images)
    return np.concatenate([resize_square(batch, size, mode).numpy() for batch in batches])


def triangle_weights(length: int, start: Tensor, side: Tensor, size: int) -> Tensor:
    """Compute weights that resize part of a line of pixels, from start to start + side, to `size`.

    Enlarging interpolates linearly between pixel centres and repeats the edges. Reducing widens the
    triangle by the scale.

    Args:
        length: number of pixels in the line; may be symbolic under torch.export.
        start: scalar float32, first pixel used.
        side: scalar float32, number of pixels used.
        size: number of pixels in the result.

    Returns:
        float32 (size, length); rows sum to 1 within length / WEIGHT_STEPS.
    """
    scale = side / size
    centres = start + (torch.arange(size, device=start.device, dtype=torch.float32) + 0.5) * scale
    positions = torch.arange(length, device=start.device, dtype=torch.float32) + 0.5
    distances = (positions - centres.unsqueeze(1)).abs() / scale.clamp(min=1.0)
    inside = ((positions > start) & (positions < start + side)).float()
    # Rounded before the sum as well: a sum of whole numbers is the same in every order.
    weights = torch.round((1.0 - distances).clamp(min=0.0) * inside * WEIGHT_STEPS)
    return torch.round(weights / weights.sum(dim=1, keepdim=True) * WEIGHT_STEPS) / WEIGHT_STEPS


def _round(pixels: Tensor) -> Tensor:
    """Round half up, as Pillow does, and clip to 0..255."""
    return torch.floor(pixels + 0.5).clamp(0.0, 255.0)
