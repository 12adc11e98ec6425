"""What every part of a plan has in common: the data, the time, and decisions with their reasons."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

from threefold.models.backbones import resolve_backbone
from threefold.models.flops import count_macs
from threefold.models.member import create_backbone, fixed_size, has_levels
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import MemberSpec

Quality = Literal["fast", "good", "best"]

SCORING_SECONDS = 4.0
"""Time for ensembles, statistics and the report of a few thousand images on two cores."""

EXPORT_SECONDS = 3.0
"""Time for exporting one network on two cores."""

PROBE_FOLDS = 5
"""Folds of a plan without tuning."""

LEAST_FOLDS = 3
"""The same where the time does not allow more."""


def finishing_seconds(networks: int, export_seconds: float = EXPORT_SECONDS) -> float:
    """Time for scoring, the report and the export of a run that has so many networks.

    Args:
        networks: their number.
        export_seconds: for one of them.
    """
    return 2 * SCORING_SECONDS + export_seconds * networks


class Decision(NamedTuple):
    """One value of a planned recipe."""

    key: str
    value: Any
    reason: str


class DataSummary(NamedTuple):
    """What the plan depends on."""

    n: int
    """Training images."""
    images: int
    """Training and test images."""
    classes: tuple[str, ...]
    smallest_class: int
    """Images of the smallest class."""
    largest_class: int
    side: int
    """Median of the images' shorter sides, in pixels."""
    own_folds: int = 0
    """Folds in the user's own column; 0 = none."""
    is_multilabel: bool = False
    """Whether images have any number of labels. The class counts are then of the images with a
    label, or of those without it where these are fewer."""


@dataclass(frozen=True)
class Clock:
    """The time budget of a job.

    Attributes:
        budget: seconds; 0 = none.
        end: the time.monotonic() value at which it ends, or infinity.
    """

    budget: float
    end: float

    @classmethod
    def start(cls, budget: float, began: float | None = None) -> Clock:
        """Start the clock of a budget.

        Args:
            budget: seconds; 0 = none.
            began: the time.monotonic() value from which it counts; None = now.
        """
        began = time.monotonic() if began is None else began
        return cls(budget, began + budget if budget else math.inf)

    @property
    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self.end - time.monotonic())

    @property
    def spent(self) -> float:
        """Seconds since the clock of a budget was started."""
        return time.monotonic() - self.end + self.budget


def relative_costs(draft: Recipe) -> list[float]:
    """Cost of each member's features, relative to the first."""
    macs = [
        count_macs(resolve_backbone(member.backbone).split(".")[0], usual_size(member))
        for member in draft.members
    ]
    return [count / macs[0] for count in macs]


def usual_size(member: MemberSpec) -> int:
    """Return the side in pixels of a member's images where nobody chose one."""
    default: int = MemberSpec.model_fields["img_size"].default
    return fixed_size(member.backbone) or default


def widest_input(backbone: str) -> Literal["levels", "pooled"]:
    """Return the `head.sequence` that reads most of a backbone: levels, or else pooled."""
    spec = MemberSpec(name="m", backbone=backbone, weights="none")
    with torch.device("meta"):
        return "levels" if has_levels(create_backbone(spec, pretrained=False)) else "pooled"
