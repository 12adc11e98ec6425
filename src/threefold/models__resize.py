"""The square resize of every image: antialiased, exact in float32, and exportable with any height and width."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

WEIGHT_STEPS = 2**16
"""Resize weights are multiples of 1/65536. A product with an 8-bit pixel, and any sum of such products up to 255, is
then exact in float32, so the result depends neither on the order of summation nor on the runtime that does it."""


def resize_square(images: Tensor, size: int, mode: Literal["squash", "crop"]) -> Tensor:
    """Resize images to a square with an antialiased triangle filter (Pillow's BILINEAR).

    Two matrix products whose weights are computed from the height and width, hence exportable with both dynamic. Call
    it outside autocast and without TF32 matrix products, which would round the weights.

    Args:
        images: uint8 (b, h, w, 3).
        size: side of the result in pixels.
        mode: squash scales each side by itself; crop keeps the largest centred square.

    Returns:
        Tensor: float32 (b, 3, size, size) holding whole numbers in 0..255.
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
    return _whole(down @ _whole(pixels @ across.T))


def triangle_weights(length: int, start: Tensor, side: Tensor, size: int) -> Tensor:
    """Weights that resize the pixels start .. start + side of a line of `length` pixels to `size` pixels.

    Enlarging is linear interpolation between pixel centres with the edges held; reducing widens the triangle by the
    scale.

    Args:
        length: pixels in the line; may be symbolic under torch.export.
        start: scalar float32, first pixel used.
        side: scalar float32, number of pixels used.
        size: pixels in the result.

    Returns:
        Tensor: float32 (size, length); rows sum to 1 within length / WEIGHT_STEPS.
    """
    scale = side / size
    centres = start + (torch.arange(size, device=start.device, dtype=torch.float32) + 0.5) * scale
    positions = torch.arange(length, device=start.device, dtype=torch.float32) + 0.5
    distances = (positions - centres.unsqueeze(1)).abs() / scale.clamp(min=1.0)
    inside = ((positions > start) & (positions < start + side)).float()
    # Rounded before they are summed too: a sum of whole numbers is the same in every order.
    weights = torch.round((1.0 - distances).clamp(min=0.0) * inside * WEIGHT_STEPS)
    return torch.round(weights / weights.sum(dim=1, keepdim=True) * WEIGHT_STEPS) / WEIGHT_STEPS


def _whole(pixels: Tensor) -> Tensor:
    """Round half up, as Pillow does, and keep to 0..255."""
    return torch.floor(pixels + 0.5).clamp(0.0, 255.0)
