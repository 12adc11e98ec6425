"""The part of an exported file that is not a network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from threefold.models.pipeline import Combiner


@dataclass(frozen=True)
class ExportedEnsemble:
    """The part of an exported file that is not a network.

    Attributes:
        combiner: the ensemble and its calibration as a module.
        members: names of the members that it combines.
        card: the entries of the model card about the ensemble.
        thresholds: (k,) from which probability on an image has each label; None = an image has one
            class.
    """

    combiner: Combiner
    members: list[str]
    card: dict[str, Any]
    thresholds: np.ndarray | None = None
