"""Batches of images on the training device; on a GPU the whole data set stays there if it fits.

Where it does not, a thread reads the next batch while the present one is trained on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, Protocol

import numpy as np
import torch
from torch import Tensor

from threefold.models.pipeline import ImageRows, to_pixels

SHARE_OF_MEMORY: Final = 0.25
"""Share of a GPU's free memory that images may take; training needs the rest."""

CHUNK: Final = 4096
"""Images copied to the GPU at a time."""


class PixelReader(Protocol):
    """Reads batches of images."""

    def announce(self, batches: Sequence[np.ndarray]) -> None:
        """Learn which batches will be asked for next.

        Args:
            batches: row numbers (b,) of each, in the order in which they will be asked for.
        """

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Return the float pixels (b, 3, s, s) in 0..255 of rows, given by their numbers (b,)."""


class HostReader:
    """Reads batches of images from the memory or the disk of the host.

    Batches that were announced are read by one thread, in their order. What they hold does not
    depend on that, and an error of theirs is raised when they are asked for.

    Args:
        pixels: uint8 (n, s, s, 3).
        device: where the batches are needed.
    """

    def __init__(self, pixels: ImageRows, device: torch.device) -> None:
        self._pixels, self._device = pixels, device
        self._ahead: dict[bytes, Future[np.ndarray]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")

    def announce(self, batches: Sequence[np.ndarray]) -> None:
        """Begin to read batches, and forget those that were announced before and are no longer."""
        if isinstance(self._pixels, np.ndarray):  # they are in memory already
            return
        before, self._ahead = self._ahead, {}
        for rows in batches:
            key = rows.tobytes()
            read = before.pop(key, None)
            self._ahead[key] = read or self._thread.submit(self._pixels.__getitem__, rows)
        for read in before.values():
            read.cancel()

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Wait for the images of rows if they were announced, and read them now otherwise."""
        future = self._ahead.pop(rows.tobytes(), None)
        return to_pixels(self._pixels[rows] if future is None else future.result(), self._device)


class ResidentReader:
    """Reads batches of images that were copied to the device once, as uint8.

    So a batch is a look-up, and no step waits for the host. The values are the same.
    """

    def __init__(self, pixels: ImageRows, device: torch.device) -> None:
        self._device = device
        self._resident = torch.empty(pixels.shape, dtype=torch.uint8, device=device)
        for begin in range(0, len(pixels), CHUNK):
            part = np.ascontiguousarray(pixels[begin : begin + CHUNK])
            self._resident[begin : begin + CHUNK] = torch.from_numpy(part).to(device)

    def announce(self, batches: Sequence[np.ndarray]) -> None:
        """Do nothing: all batches are there."""

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Look rows up on the device."""
        batch = self._resident[torch.from_numpy(rows).to(self._device)]
        return batch.permute(0, 3, 1, 2).float()


def pixel_reader(pixels: ImageRows, device: torch.device) -> PixelReader:
    """Return what reads batches of images, from the device itself if they fit there.

    Args:
        pixels: uint8 (n, s, s, 3).
        device: where the batches are needed.
    """
    if device.type == "cuda" and fits(pixels, torch.cuda.mem_get_info(device)[0]):
        return ResidentReader(pixels, device)
    return HostReader(pixels, device)


def fits(pixels: ImageRows, free_bytes: int) -> bool:
    """Whether images take no more than their share of a GPU's free memory."""
    return math.prod(pixels.shape) <= SHARE_OF_MEMORY * free_bytes
