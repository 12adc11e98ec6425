"""Batches of images on the training device; on a GPU the whole data set stays there if it fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from torch import Tensor

from threefold.models.pipeline import ImageRows, to_pixels

SHARE_OF_MEMORY: Final = 0.25
"""Share of a GPU's free memory that images may take; training needs the rest."""

CHUNK: Final = 4096
"""Images copied to the GPU at a time."""


def pixel_reader(pixels: ImageRows, device: torch.device) -> Callable[[np.ndarray], Tensor]:
    """Return a function that reads batches of images by their row numbers.

    On a GPU the images are copied there once, as uint8, if they fit into a share of its free
    memory. So a batch is a look-up, and no step waits for the host. The values are the same.

    Args:
        pixels: uint8 (n, s, s, 3).
        device: where the batches are needed.

    Returns:
        A function from row numbers (b,) to float pixels (b, 3, s, s) in 0..255.
    """
    if device.type == "cuda" and fits(pixels, torch.cuda.mem_get_info(device)[0]):
        return resident_reader(pixels, device)
    return lambda rows: to_pixels(pixels[rows], device)


def fits(pixels: ImageRows, free_bytes: int) -> bool:
    """Whether images take no more than their share of a GPU's free memory."""
    return math.prod(pixels.shape) <= SHARE_OF_MEMORY * free_bytes


def resident_reader(pixels: ImageRows, device: torch.device) -> Callable[[np.ndarray], Tensor]:
    """Copy images to a device, and return a function as `pixel_reader` does."""
    resident = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
    for begin in range(0, len(pixels), CHUNK):
        part = np.ascontiguousarray(pixels[begin : begin + CHUNK])
        resident[begin : begin + CHUNK] = torch.from_numpy(part).to(device)

    def read(rows: np.ndarray) -> Tensor:
        batch = resident[torch.from_numpy(rows).to(device)]
        return batch.permute(0, 3, 1, 2).float()

    return read
