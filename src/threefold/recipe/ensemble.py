"""The `ensemble` table of a recipe: how members are combined, calibrated and exported."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from threefold.recipe.schema import Section, Share

Method = Literal[
    "mean",
    "best",
    "vote",
    "pruned",
    "top2",
    "weighted",
    "greedy",
    "pool",
    "logistic",
    "stacked-shrunk",
    "stacked",
]


class StackedSpec(Section):
    """Network of the `stacked` ensemble: softmaxes, hidden, LeakyReLU, dropout, classes."""

    hidden: Annotated[int, Field(ge=1)] = 4096
    epochs: Annotated[int, Field(ge=0)] = 0
    """0 = automatic: 40, more when rows are few (at least 600 steps), fewer for very large
    inputs."""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    batch_size: Annotated[int, Field(ge=1)] = 200


class EnsembleSpec(Section):
    """How to combine the members; each method is scored cross-fitted on out-of-fold rows."""

    methods: tuple[Method, ...] = ("mean", "pruned", "stacked")
    export: Literal["auto"] | Method = "auto"
    """The method to export; auto = the simplest within one standard error of the best, out of
    fold."""
    members: tuple[str, ...] = ()
    """The members to combine (empty = all with their own backbone)."""
    top: Annotated[int, Field(ge=0)] = 0
    """Combine only this many members, the most accurate out of fold (paper: three; 0 = all)."""
    calibration: Literal["none", "temperature", "vector", "auto", "logistic"] = "temperature"
    """Fitted on out-of-fold rows and scored cross-fitted; auto = the simplest within one standard
    error. Images with any number of labels have logistic (Platt, 1999), for each label by itself,
    where it lowers the log loss by more than a standard error."""
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of images whose true class may be missing from the prediction set (conformal alpha)."""
    reject: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of images of known classes that may be rejected as unknown."""
    disagreement: Share = 0.005
    """Share of images whose class may differ from the full ensemble's when a cascade stops early
    (0 = no cascade)."""
    stacked: StackedSpec = StackedSpec()
