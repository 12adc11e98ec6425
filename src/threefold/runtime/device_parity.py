"""Check that a device answers as the CPU does, on the images at hand."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from threefold.errors import ExportError
from threefold.names import count_of
from threefold.runtime.model import Model
from threefold.runtime.tolerances import TOLERANCES


class DeviceParity(NamedTuple):
    """How far a device's answers are from those of the CPU."""

    device: str
    images: int
    difference: float
    """Largest absolute difference of a probability."""
    tolerance: float

    def describe(self) -> str:
        """Describe it in one line."""
        return (
            f"{self.device} against the CPU on {count_of(self.images, 'image')}: largest "
            f"difference {self.difference:.1e} (allowed {self.tolerance:g})"
        )


def compare_with_cpu(model: Model, images: np.ndarray) -> DeviceParity:
    """Answer a batch on the model's device and on the CPU, with every member.

    Args:
        model: opened on a device.
        images: uint8 (b, h, w, 3).

    Raises:
        ExportError: a probability differs by more than an exported file's may from its pipeline's
            (`tolerances`), at the precision that the model card states.
    """
    reference = Model(model.path, model.threads)
    difference = float(np.abs(model.answer(images) - reference.answer(images)).max(initial=0.0))
    precision = str(model.card.get("precision") or "float32")
    tolerance = TOLERANCES.get(precision, TOLERANCES["float32"]).difference
    parity = DeviceParity(model.device, len(images), difference, tolerance)
    if not difference <= tolerance:  # also refuses a difference that is not a number
        raise ExportError(
            "the device answers differently from the CPU",
            where=model.device,
            expected=f"difference <= {tolerance:g}",
            got=f"{difference:.2e} over {len(images)} images",
            fix="leave --device out to answer on the CPU",
        )
    return parity
