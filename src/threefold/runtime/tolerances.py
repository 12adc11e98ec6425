"""How far answers may be from those they are compared with: a file's, a device's, a precision's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, NamedTuple


class Tolerance(NamedTuple):
    """How much the answers may change."""

    difference: float
    """Largest absolute difference of a probability."""
    changed: float
    """Share of images whose predicted class changes."""
    loss: float
    """Share of images: correct answers lost minus correct answers gained."""


TOLERANCES: Final[Mapping[str, Tolerance]] = {
    # Sums in another order: 1e-6 measured. 1e-4 is a bug, or a network that amplifies rounding.
    "float32": Tolerance(1e-4, 0.0, 0.0),
    # Relative rounding of 2**-11: 0.0015 measured on the demo's six networks of 100 layers.
    "float16": Tolerance(0.01, 0.005, 0.005),
    # Eight times coarser than float16, 2**-8: 0.024 measured.
    "bfloat16": Tolerance(0.08, 0.02, 0.01),
    # 7-bit weights, 8-bit activations: unsure images move (0.11 measured); classes must hold.
    "int8": Tolerance(0.3, 0.03, 0.01),
}
"""By precision. A share above 0 always allows at least one image."""
