"""What a stage of training is given, and what it results in."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from threefold.models.pipeline import ImageRows
from threefold.recipe.recipe import Recipe
from threefold.recipe.schema import StageSpec
from threefold.training.checkpoints import SAVE_INTERVAL, Checkpoint, State
from threefold.training.features.activations import Activations
from threefold.training.features.cache import FeatureRows
from threefold.training.pixel_cache import PixelRows
from threefold.training.progress.watcher import Watcher


@dataclass(frozen=True)
class StageTask:
    """Everything a stage depends on besides the network.

    Attributes:
        stage: epochs, learning rate, schedule and trainable parameters.
        recipe: the run's recipe.
        fit: the rows to train on; of features, the network is a `HeadNetwork`.
        select: the rows to choose the best epoch on.
        seed: of all random draws in the stage.
        num_classes: classes of the data set.
        first: whether the stage starts from a random head, which any training improves.
        batch_size: 0 = the recipe's.
        deadline: a time.monotonic() value to stop at, or infinity.
        watcher: receives batches and epochs, and may stop the stage after any step.
        teacher_probs: (n, k) a teacher's probabilities on the fit rows; None = learn from labels.
        resume_path: where to save the state between epochs; None = nowhere.
        save_interval: least seconds between two such saves.
        network: names the network where its precision is recorded.
        precision_file: the record of measured precisions; None = none.
        activations: what the frozen first blocks answer; None = train on pixels.
        targets: (n, k) what is learned of the fit rows, each times its weight, where some have
            pseudo labels; None = their labels.
    """

    stage: StageSpec
    recipe: Recipe
    fit: PixelRows | FeatureRows
    select: PixelRows | FeatureRows
    seed: int
    num_classes: int
    first: bool = True
    batch_size: int = 0
    deadline: float = math.inf
    watcher: Watcher = field(default_factory=Watcher)
    teacher_probs: np.ndarray | None = None
    resume_path: Path | None = None
    save_interval: float = SAVE_INTERVAL
    network: str = "the network"
    precision_file: Path | None = None
    activations: Activations | None = None
    targets: np.ndarray | None = None


@dataclass
class StageOutcome:
    """What a stage results in.

    Attributes:
        state: the best weights.
        history: the content of history.json.
        correct: (n,) booleans, the select rows that these weights answer correctly; or shares of
            their labels.
        elapsed_before: seconds spent before the stage was resumed.
    """

    state: State
    history: dict[str, Any]
    correct: np.ndarray
    elapsed_before: float = 0.0


def pixels_of(rows: PixelRows | FeatureRows) -> ImageRows:
    """Return the images of rows that are images."""
    assert isinstance(rows, PixelRows)
    return rows.pixels


def features_of(rows: PixelRows | FeatureRows) -> np.ndarray:
    """Return the features of rows that are features."""
    assert isinstance(rows, FeatureRows)
    return rows.features


def why_stopped(cut_short: bool, epochs: int, best: Checkpoint, stage: StageSpec) -> str:
    """Say why a stage ended before its last epoch; empty if it did not.

    Args:
        cut_short: whether the time budget ended it.
        epochs: that it had.
        best: its best checkpoint.
        stage: what it was.
    """
    if not cut_short and epochs == stage.epochs:
        return ""
    if not cut_short and stage.patience and epochs - 1 - best.epoch >= stage.patience:
        return f"stopped early: no better epoch in {stage.patience}"
    return "cut short by the time budget"
