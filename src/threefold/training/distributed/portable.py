"""What another process can receive: networks without a device, and the names of files of images."""

from __future__ import annotations

import copy

import numpy as np
from torch import nn

from threefold.files import real_path
from threefold.models.pipeline import ImageRows
from threefold.training.pixel_cache import StoredPixels


def portable(network: nn.Module) -> nn.Module:
    """Return a network that another process can receive, whichever device it has."""
    device = next(network.parameters()).device
    return network if device.type == "cpu" else copy.deepcopy(network).cpu()


def portable_rows(pixels: ImageRows) -> ImageRows:
    """Return rows of images that another process can receive: the names of files are absolute."""
    if isinstance(pixels, StoredPixels):
        return StoredPixels([(real_path(path), rows) for path, rows in pixels.parts])
    return np.asarray(pixels)
